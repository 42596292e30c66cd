"""What routes.json sets in bodies and headers, and names that stand for others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from formats import FORMATS
from service import small_routes
from test_dialects import speaking

from parts.errors import RoutesError
from parts.table import load_table

TEXT = """{
  "upstreams": {"local": {"base_url": "%s", "speaks": ["chat", "messages", "responses"],
                          "headers": {"HTTP-Referer": "https://a.example", "user-agent": "mine"}}},
  "default_category": "conversation",
  "routing_mode": "keywords",
  "sticky": "off",
  "models": {"acme/one": {"params": {"temperature": 1.50, "seed": 12345678901234567890}},
             "acme/two": {"name": "acme/one", "params_force": {"top_p": 1}}},
  "aliases": {"gpt-4o*": "router/code", "acme/o*": "acme/two", "haiku": "two"},
  "categories": {
    "conversation": {"models": ["acme/one"], "params": {
      "temperature": 0.70, "provider": {"order": ["é", "b"],  "x": 1e0}, "max_tokens": 5,
      "messages": {"temperature": 1}, "responses": {"reasoning": {"effort":"low"}}}},
    "code": {"models": ["acme/one"], "params_force": {"temperature": 0, "max_tokens": 7}}
  }
}"""


@pytest.fixture
def client(build, routes, upstream):
    built = build()
    routes.write_text(TEXT % upstream.url)
    built.router.store.change(lambda table: TEXT % upstream.url, None)
    return built


def sent(client: Any, upstream: Any, data: str, path: str = "/v1/chat/completions") -> str:
    upstream.default = FORMATS["chat"].good()
    if path != "/v1/chat/completions":
        upstream.default = FORMATS[path.rsplit("/", 1)[1]].good()
    answer = client.open("POST", path, data=data.encode(), content_type="application/json")
    assert answer.status_code == 200, answer.json
    return upstream.requests[-1].raw.decode()


SET = '"temperature": 0.70, "seed": 12345678901234567890, "provider": {"order": ["é", "b"],  ' \
      '"x": 1e0}, "max_tokens": 5, '  # fmt: skip
HI = '"messages" : [{"role":"user","content":"é \\ud83d hello"}]'
CASES = {
    "none sent": ("{ %s, %s}", '"model":"router"', '"model":"acme/one"', SET),
    "some sent": ('{ "max_completion_tokens":9, %s, %s,\t"temperature" : 0.1e1}',
                  '"model":"router"', '"model":"acme/one"',
                  SET.replace('"temperature": 0.70, ', "").replace('"max_tokens": 5, ', "")),
    "forced": ('{ %s, %s}', '"model":"router/code"', '"model":"acme/one"',
               '"temperature": 0, "seed": 12345678901234567890, "max_tokens": 7, '),
    "by its model alone": ("{ %s, %s}", '"model":"acme/two"', '"model":"acme/one"',
                           '"top_p": 1, '),
}  # fmt: skip


@pytest.mark.parametrize(("body", "asked", "named", "added"), CASES.values(), ids=CASES)
def test_params_go_in_as_written_where_none_was_sent(client, upstream, body, asked, named, added):
    assert sent(client, upstream, body % (HI, asked)) == "{ " + added + (body % (HI, named))[2:]


def test_forced_ones_replace_what_was_sent_by_either_name(client, upstream):
    body = '{"max_completion_tokens": 9, %s, "model":"%s", "temperature" : 0.1e1, "x":[ 1.0 ]}'
    want = '"max_completion_tokens": 7, %s, "model":"%s", "temperature" : 0, "x":[ 1.0 ]}'

    got = sent(client, upstream, body % (HI, "router/code"))

    assert got == '{"seed": 12345678901234567890, ' + want % (HI, "acme/one")


@pytest.mark.parametrize(("name", "added"), [
    ("messages", '"temperature": 1, '), ("responses", '"reasoning": {"effort":"low"}, ')
])  # fmt: skip
def test_the_other_formats_have_their_own(client, upstream, name, added):
    form = FORMATS[name]
    data = json.dumps(form.ask())

    got = sent(client, upstream, data, form.path)

    assert got == "{" + added + data[1:].replace('"router"', '"acme/one"')


def test_headers_of_an_upstream_are_sent(client, upstream):
    sent(client, upstream, "{" + HI + "}")

    headers = upstream.requests[-1].headers
    assert headers["http-referer"] == "https://a.example"
    assert headers["user-agent"] == "mine"


@pytest.mark.parametrize(("model", "category", "asked"), [
    ("gpt-4o-mini", "code", "acme/one"),
    ("haiku", "explicit", "acme/two"),
    ("acme/one", "explicit", "acme/one"),  # a full id stands for itself
    ("acme/other", "explicit", "acme/two"),
    ("gpt-5", "conversation", "acme/one"),
])  # fmt: skip
def test_an_alias_stands_for_a_model_or_a_category(client, upstream, model, category, asked):
    answer = client.chat(model=model)

    assert answer.headers["X-Router-Category"] == category
    assert answer.headers["X-Router-Model"].replace("%2F", "/") == asked
    assert ("X-Router-Model-Ignored" in answer.headers) is (model == "gpt-5")


def test_the_configuration_shows_it_all_and_models_name_the_aliases(client):
    config = client.get("/config").json
    categories = config["categories"]

    assert categories["conversation"]["params"]["messages"] == {"temperature": 1}
    assert categories["code"]["params_force"] == {"temperature": 0, "max_tokens": 7}
    assert config["model_params"]["acme/two"] == {"params_force": {"top_p": 1}}
    assert config["upstreams"]["local"]["headers"]["HTTP-Referer"] == "https://a.example"
    assert config["aliases"]["haiku"] == "two"
    assert "haiku" in [entry["id"] for entry in client.get("/v1/models").json["data"]]


def with_headers(**headers: Any) -> dict[str, Any]:
    return {"upstreams": {"local": {"base_url": "http://a/v1", "headers": headers}}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key": (with_headers(AuthoRization="Bearer x"), "headers.AuthoRization: no key stands in"),
    "another": (with_headers(**{"X-Api-Key": "x"}), "name its variable as api_key_env"),
    "a cookie": (with_headers(Cookie="a=1"), "no key stands in this file"),
    "framing": (with_headers(**{"Content-Length": "1"}), "is set by the router itself"),
    "a line break": (with_headers(X="a\r\nY: b"), "should be printable ASCII"),
    "no name": (with_headers(**{"X Y": "b"}), "is no name of a header"),
    "an alias to nobody": ({"aliases": {"a": "acme/ones"}}, "did you mean 'acme/one'?"),
    "an alias to an alias": ({"aliases": {"a": "b", "b": "acme/one"}}, "aliases['a']: is no model"),
    "an odd alias": ({"aliases": {"a[b]": "acme/one"}}, "in which * stands for anything"),
    "the model as a param": (
        {"categories": {"conversation": {"models": ["a"], "params": {"stream": True}}}},
        "the client alone decides",
    ),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_with_a_sentence(changes, says):
    with pytest.raises(RoutesError) as raised:
        load_table(json.dumps(small_routes("http://127.0.0.1/v1", **changes)))

    assert says in str(raised.value)
    assert "Bearer" not in str(raised.value)


def test_upstreams_as_other_tests_have_them_still_stand(build, upstream):
    assert build(upstreams=speaking(upstream)).chat().status_code == 200
