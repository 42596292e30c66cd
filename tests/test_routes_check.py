"""What is wrong with routes.json, where, and what was perhaps meant; never a pasted secret."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import ROOT, small_routes
from helpers import in_turn

from parts.errors import Refused, RoutesError
from parts.table import load_table, routes_schema

SCHEMA = routes_schema()
SECRET = "sk-or-v1-0123456789abcdef"
GONE = object()


def routes_with(*path: str | int, value: Any) -> dict[str, Any]:
    """The small routes with one place changed (GONE: dropped)."""
    routes = json.loads(json.dumps(small_routes("http://127.0.0.1:1/v1")))
    node: Any = routes
    for key in path[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    node[path[-1]] = value
    if value is GONE:
        del node[path[-1]]
    return routes


def load(routes: dict[str, Any]):
    return load_table(json.dumps(routes))


def complaint(routes: dict[str, Any]) -> str:
    with pytest.raises(RoutesError) as caught:
        load(routes)
    return str(caught.value)


def wrong(text: str) -> str:
    with pytest.raises(RoutesError) as caught:
        load_table(text)
    return str(caught.value)


# --- JSON ----


@pytest.mark.parametrize(
    ("text", "place"),
    [("", "line 1, column 1"), ("not json", "line 1, column 1"),
     ('{\n  "a": 1,\n}', "a comma too many before the end"),
     ('{\n  "a": 1\n  "b": 2\n}', "line 3, column 3"),
     ('{"a": 1} x', "line 1, column 10"), ('{"a": "x\n"}', "line 1, column 9"),
     ('{"a": [1, 2}', "line 1, column 12"), ("{// comment\n}", "line 1, column 2")],
)  # fmt: skip
def test_a_slip_in_the_json_is_told_with_line_and_column(text, place):
    assert place in wrong(text)


@pytest.mark.parametrize(
    "text",
    [
        *('{"a": NaN}', '{"a": Infinity}', '{"a": ' + "9" * 5000 + "}", "[" * 100_000),
        *('{"a":' * 5000, '"\\ud800"', "null", "[]", "7"),
    ],
)
def test_odd_json_is_an_error_like_any_other(text):
    assert wrong(text)


@pytest.mark.parametrize(
    ("before", "more", "name"),
    [("{", '"routing_mode": "hybrid", ', "routing_mode"),
     ('"categories": {', '"code": {"models": ["a/b"]}, ', "code")],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_by_its_name(before, more, name):
    text = json.dumps(small_routes("http://127.0.0.1:1")).replace(before, before + more, 1)

    assert f"'{name}' stands twice" in wrong(text)


def test_a_lone_surrogate_in_the_file_is_refused():
    text = json.dumps(small_routes("http://h")).replace("refactor*", "caf\\ud800 zz")

    assert "surrogate" in wrong(text)


def test_a_number_beyond_all_floats_is_refused():
    text = json.dumps(routes_with("daily_limit_usd", value=777)).replace("777", "1e999")

    assert wrong(text) == "1e999 is beyond all numbers"


# --- schema ----


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["categories", "code", "models"], [], "$.categories.code.models: should be non-empty"),
        (["categories", "code", "models"], GONE,
         "$.categories.code: 'models' is missing"),
        (["categories", "code", "models"], "glm-5", "$.categories.code.models: should be a list"),
        (["categories", "code", "models"], [5],
         "$.categories.code.models[0]: should be text in quotes"),
        (["categories", "code", "models"], ["a b"],
         "$.categories.code.models[0]: should be a model's id: plain characters"),
        (["categories", "code", "models"], [f"a/m{n}" for n in range(33)],
         "$.categories.code.models: should have at most 32 entries"),
        (["categories", "code", "keywords"], ["ok", ""], "$.categories.code.keywords[1]: "),
        *[(["categories", "code", "keywords"], [word], "$.categories.code.keywords[0]: ")
          for word in ("^3", "*", "*^2", "...", "^", "?!")],
        (["categories", "code", "keywords"], ["x" * 101],
         "$.categories.code.keywords[0]: should have at most 100 characters"),
        (["categories", "code", "keywords"], ["x"] * 10_001,
         "$.categories.code.keywords: should have at most 10000 entries"),
        (["categories", "code", "description"], "x" * 501,
         "$.categories.code.description: should have at most 500 characters"),
        (["categories", "code", "stream"], "hole",
         "$.categories.code.stream: should be one of live, whole; did you mean 'whole'?"),
        (["categories", "code", "keyword"], [],
         "$.categories.code: unknown key 'keyword'; did you mean 'keywords'?"),
        (["categories"], {}, "$.categories: should be non-empty"),
        (["categories"], GONE, "$: 'categories' is missing"),
        (["upstreams"], GONE, "$: 'upstreams' is missing"),
        (["default_category"], GONE, "$: 'default_category' is missing"),
        (["upstreams"], {}, "$.upstreams: should be non-empty"),
        (["upstreams", "local", "base_url"], GONE,
         "$.upstreams.local: 'base_url' is missing"),
        (["upstreams", "local", "api_key"], SECRET,
         "$.upstreams.local: unknown key 'api_key'; did you mean 'api_key_env'?"),
        (["routing_mode"], "hybird",
         "$.routing_mode: should be one of hybrid, ollama, keywords; did you mean 'hybrid'?"),
        (["tools_routing"], True, "$.tools_routing: should be one of auto, always, never"),
        (["routing_mod"], "hybrid", "$: unknown key 'routing_mod'; did you mean 'routing_mode'?"),
        (["zzz"], 1, "$: unknown key 'zzz'"),
        (["agent_tool_count"], 0, "$.agent_tool_count: should be at least 1"),
        (["agent_tool_count"], "8", "$.agent_tool_count: should be a whole number"),
        (["daily_limit_usd"], 0, "$.daily_limit_usd: should be more than 0"),
        (["timeouts_sec", "idle"], -1, "$.timeouts_sec.idle: should be more than 0"),
        (["timeouts_sec", "first_tokn"], 1,
         "$.timeouts_sec: unknown key 'first_tokn'; did you mean 'first_token'?"),
        (["circuit_breaker", "failure_threshold"], 1.5,
         "$.circuit_breaker.failure_threshold: should be a whole number"),
        (["ollama", "model"], "", "$.ollama.model: should be non-empty"),
        (["models", "acme/one", "cost"], {"input": 1},
         "$.models['acme/one'].cost: 'output' is missing"),
        (["models", "acme/one", "cost", "input"], -1,
         "$.models['acme/one'].cost.input: should be at least 0"),
        (["models", "acme/one", "tools"], "no",
         "$.models['acme/one'].tools: should be true or false"),
        (["models", "acme/one", "timeouts_sec", "total"], 5,
         "$.models['acme/one'].timeouts_sec: unknown key 'total'"),
        (["continuations"], [""], "$.continuations[0]: "),
    ],
)  # fmt: skip
def test_what_breaks_the_schema_is_told_with_its_path(path, value, said):
    assert said in complaint(routes_with(*path, value=value)).splitlines()[0]


@pytest.mark.parametrize("name", ["Code", "my code", "-x", "é", "x" * 65, "", "a/b", "code\n"])
def test_a_category_name_that_does_not_fit_is_told_by_its_name(name):
    said = complaint(routes_with("categories", name, value={"models": ["a/b"]}))

    assert said.startswith("$.categories")
    assert repr(name)[1:20].strip("'") in said


@pytest.mark.parametrize("name", ["a/b\n", "a b", "é", "", "x" * 201])
def test_a_model_id_is_one_word_of_printable_ascii(name):
    said = complaint(routes_with("categories", "code", "models", value=["acme/one", name]))

    assert said.startswith("$.categories.code.models[1]: ")


def test_all_findings_are_told_at_once_one_per_line():
    routes = routes_with("routing_mode", value="x")
    routes["agent_tool_count"] = 0

    assert len(complaint(routes).splitlines()) == 2


@pytest.mark.parametrize(
    "path",
    [["upstreams", "local", "api_key"], ["upstreams", "local", "api_key_env"],
     ["upstreams", "local"], ["upstreams"], ["routing_mode"], ["default_category"],
     ["models", "acme/one", "upstream"], ["models", "acme/one", "cost"],
     ["categories", "code", "stream"], ["categories", "code", "models"], ["timeouts_sec", "idle"],
     ["openrouter_key"]],
)  # fmt: skip
def test_a_key_pasted_in_the_wrong_place_is_not_repeated(path):
    assert SECRET not in complaint(routes_with(*path, value=SECRET))


@pytest.mark.parametrize("url", [f"https://user:{SECRET}@host/v1", f"https://host/v1?key={SECRET}"])
def test_a_key_in_a_url_is_refused_and_not_repeated(url):
    said = complaint(routes_with("upstreams", "local", "base_url", value=url))

    assert said.startswith("$.upstreams.local.base_url: ")
    assert SECRET not in said


# --- cross-checks ----


@pytest.mark.parametrize(
    ("path", "value", "place", "meant"),
    [
        (["default_category"], "convrsation", "$.default_category: ", "'conversation'"),
        (["models", "acme/one", "upstream"], "locl", "$.models['acme/one'].upstream: ", "'local'"),
        (["categories", "router"], {"models": ["a/b"]}, "$.categories.router: ", "router"),
        (["categories", "code", "models"], ["acme/one", "acme/one"],
         "$.categories.code.models: ", "acme/one stands twice"),
        (["categories", "code", "models"], ["acme/one", "one"],
         "$.categories.code.models: ", "acme/one stands twice"),
        (["circuit_breaker", "first_retry_sec"], 301, "$.circuit_breaker.first_retry_sec: ", ""),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told_with_what_was_perhaps_meant(path, value, place, meant):
    said = complaint(routes_with(*path, value=value))

    assert said.startswith(place)
    assert meant in said


BASES = ["upstreams", "local", "base_url"], ["ollama", "base_url"]
URLS = ["", "localhost:8080", "ftp://host", "http://", "http://host:99999", "http://host:x",
        "http://host/v1#x", "file:///etc/passwd"]  # fmt: skip


@pytest.mark.parametrize(("path", "url"), in_turn({url: url for url in URLS}, *BASES))
def test_a_url_that_cannot_work_is_refused(path, url):
    said = complaint(routes_with(*path, value=url))

    assert said.startswith("$." + ".".join(path) + ": ")


# --- short names ----


def test_a_chain_may_use_the_short_name_of_a_known_model():
    table = load(routes_with("categories", "code", "models", value=["two", "one"]))

    assert [m.id for m in table.categories["code"].models] == ["acme/two", "acme/one"]


def test_an_exact_id_wins_over_a_short_name():
    routes = routes_with("models", "one", value={})
    routes["categories"]["code"]["models"] = ["one"]

    assert [m.id for m in load(routes).categories["code"].models] == ["one"]


def test_an_ambiguous_short_name_is_refused_with_its_path_and_the_candidates():
    routes = routes_with("models", "other/one", value={})
    routes["categories"]["code"]["models"] = ["acme/two", "one"]

    said = complaint(routes)

    assert said.startswith("$.categories.code.models")
    assert "acme/one" in said
    assert "other/one" in said


@pytest.mark.parametrize("order", [["code", "tools"], ["tools", "code"]])
def test_a_short_name_means_the_same_whichever_category_stands_first(order):
    chains = {"code": {"models": ["lab/poet"]}, "tools": {"models": ["poet"]}}
    routes = routes_with("default_category", value="code")
    routes["categories"] = {name: chains[name] for name in order}

    table = load(routes)

    assert [m.id for m in table.categories["tools"].models] == ["lab/poet"]


@pytest.mark.parametrize(
    ("name", "found"), [("acme/one", "acme/one"), ("two", "acme/two"), ("three", None), ("", None)]
)
def test_a_name_resolves_to_one_full_id_or_none(name, found):
    assert load(small_routes("http://127.0.0.1:1/v1")).resolve(name) == found


def test_an_ambiguous_name_in_a_call_is_a_422_with_the_candidates():
    table = load(routes_with("models", "other/one", value={}))

    with pytest.raises(Refused, match="acme/one, other/one") as caught:
        table.resolve("one")

    assert caught.value.status == 422


def test_models_that_share_a_short_name_are_shown_in_full():
    labels = load(routes_with("models", "other/one", value={})).labels()

    assert labels["acme/one"] == "acme/one"
    assert labels["other/one"] == "other/one"
    assert labels["acme/two"] == "two"


# --- warnings ----


def test_a_plain_file_has_no_warnings():
    assert load(small_routes("http://127.0.0.1:1/v1")).warnings == ()


@pytest.mark.parametrize(
    ("path", "value", "warnings"),
    [
        *[(["tools", "keywords"], [word], ["keyword 'python' stands in tools and in code"])
          for word in ("python", "Python", "pythòn", "python^3")],
        (["code", "keywords"], [], ["no keyword leads to category code"]),
        (["code", "keywords"], GONE, ["no keyword leads to category code"]),
        (["conversation", "keywords"], [], []),  # the default category needs none
    ],
)  # fmt: skip
def test_what_a_person_may_want_to_know_is_a_warning(path, value, warnings):
    assert list(load(routes_with("categories", *path, value=value)).warnings) == warnings


def test_a_model_of_which_nothing_is_known_is_warned_about():
    [warning] = load(routes_with("categories", "code", "models", value=["a/b"])).warnings

    assert warning.startswith("a/b of category code")


def test_warnings_of_a_category_are_only_its_own():
    routes = routes_with("categories", "in", value={"models": ["acme/one"], "keywords": ["inn"]})
    routes["categories"]["tools"]["keywords"] = ["python"]

    assert load(routes).doubts_about("in") == []


def test_warnings_come_in_the_order_of_the_file():
    words = [f"word{n}" for n in range(50)]
    routes = routes_with("categories", "code", "keywords", value=words)
    routes["categories"]["tools"]["keywords"] = words

    found = [warning.split("'")[1] for warning in load(routes).warnings]

    assert found == words


# --- what the shipped file promises ----


def test_the_shipped_file_fits_and_warns_of_nothing_but_shared_keywords():
    table = load_table((ROOT / "routes.json").read_text())

    assert list(table.categories) == ["tools", "code", "reasoning", "conversation"]
    assert [w for w in table.warnings if not w.startswith("keyword ")] == []


@pytest.mark.parametrize("key", ["upstreams", "categories", "default_category"])
def test_only_three_keys_are_required(key):
    routes = {k: v for k, v in small_routes("http://127.0.0.1:1/v1").items()
              if k in ("upstreams", "categories", "default_category")}  # fmt: skip

    table = load(routes)

    assert table.mode == "hybrid"
    assert table.breaker["first_retry_sec"] == 5
    assert table.timeouts["total"] == 300
    assert key in complaint({k: v for k, v in routes.items() if k != key})
