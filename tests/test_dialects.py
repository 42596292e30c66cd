"""Messages, Responses and embeddings: passed through, failed over, ended and refused as chat is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from formats import FORMATS, Messages, Responses, event, read_events
from helpers import connected, figures, head_of, last_attempts, open_circuits, wait_until
from upstream import Upstream, error, hang, pieces, plain, raw, whole

from parts.dialects import DIALECT_AT

EVERY = tuple(FORMATS)
NAMED = ("messages", "responses")
SPEAKS_ALL = [*EVERY, "embeddings"]


def speaking(upstream: Upstream, speaks: list[str] | None = None) -> dict[str, Any]:
    """`upstreams` with one that speaks all formats, or those that are given."""
    local = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY"}
    return {"local": {**local, "speaks": speaks or SPEAKS_ALL}}


@pytest.fixture
def client(build, upstream):
    return build(upstreams=speaking(upstream))


def ask(client: Any, form: Any, text: str = "hello", **more: Any) -> Any:
    headers = more.pop("headers", None)
    return client.post(form.path, form.ask(text, **more), headers=headers)


def read(form: Any, answer: Any) -> Any:
    """What a strict client makes of an answer, whole or streamed."""
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        return form.read_stream(answer.data)
    return form.read_whole(answer.json)


# --- the way there -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_an_answer_comes_whole_and_is_counted(client, upstream, form, stream):
    upstream.default = form.good(["a ", "good ", "answer"])

    answer = ask(client, form, stream=stream)

    assert answer.status_code == 200
    assert read(form, answer) == ("a good answer", "", True)
    assert answer.headers["X-Router-Dialect"] == form.name
    assert upstream.requests[0].path == "/v1" + form.path.removeprefix("/v1")
    entry = figures(client)["recent_requests"][0]
    assert (entry["dialect"], entry["outcome"]) == (form.name, "success")
    asked, cached, said = form.tokens
    tokens = figures(client)["tokens"]
    assert (tokens["input"], tokens["cached"], tokens["output"]) == (asked, cached, said)
    assert b'dialect="%s"' % form.name.encode() in client.get("/metrics?format=prometheus").data


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_the_body_goes_up_byte_for_byte_but_for_model(client, upstream, form):
    upstream.default = form.good()
    data = json.dumps(form.ask("é \ud83d\ude00", zz=[1.0, 12345678901234567890, -0.0])).encode()
    data = data.replace(b'"model": "router"', b'"metadata":{"model":"no"} ,\t"model" :  "router"')
    data = data.replace(b"-0.0", b"1e3, -0.0")

    answer = client.open("POST", form.path, data=data, content_type="application/json")

    assert answer.status_code == 200
    assert upstream.requests[0].raw == data.replace(b'  "router"', b'  "acme/one"')


def test_version_betas_and_query_go_up_and_no_key_of_the_client(build, upstream):
    client, form = build(upstreams=speaking(upstream), ROUTER_API_KEY="k" * 20), FORMATS["messages"]
    upstream.default = form.good()
    headers = {"anthropic-version": "2026-10-21", "anthropic-beta": "a-1,b-2"}
    headers |= {"x-api-key": "k" * 20, "Cookie": "c=1", "x-app": "cli"}

    answer = client.post(form.path + "?beta=true", form.ask(), headers=headers)

    assert answer.status_code == 200
    seen = upstream.requests[0]
    assert seen.path == "/v1/messages?beta=true"
    assert seen.headers["anthropic-version"] == "2026-10-21"
    assert seen.headers["anthropic-beta"] == "a-1,b-2"
    assert not {"x-api-key", "cookie", "x-app"} & seen.headers.keys()
    assert "k" * 20 not in str(seen.headers)


@pytest.mark.parametrize("query", ["a=1%0d%0aX: y", "a=1 2", "a=" + "b" * 300, "a=<b>"])
def test_a_query_that_could_be_anything_stays_here(client, upstream, query):
    upstream.default = FORMATS["messages"].good()

    assert client.post("/v1/messages?" + query, FORMATS["messages"].ask()).status_code == 200

    assert upstream.requests[0].path == "/v1/messages"


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_either_key_header_opens_and_a_wrong_key_does_not(build, upstream, form, header):
    client = build(upstreams=speaking(upstream), ROUTER_API_KEY="k" * 20)
    upstream.default = form.good()
    word = "Bearer {}" if header == "Authorization" else "{}"

    good = ask(client, form, headers={header: word.format("k" * 20)})
    bad = ask(client, form, headers={header: word.format("w" * 20)})

    assert (good.status_code, bad.status_code) == (200, 401)
    assert form.read_whole(bad.json).error
    if form.name == "messages":  # Claude Code tries a 401 for minutes unless it is told not to
        assert bad.headers["x-should-retry"] == "false"
        assert bad.json["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("form", [FORMATS[name] for name in NAMED], ids=NAMED)
def test_who_does_not_speak_the_format_is_passed_over(build, upstream, form):
    other = {**speaking(upstream, ["chat"]), "second": speaking(upstream)["local"]}
    client = build(upstreams=other, models={"acme/two": {"upstream": "second"}})
    upstream.default = form.good()

    answer = ask(client, form)
    dry = client.post(
        "/route", {**form.ask(), **({"system": "x"} if form.name == "messages" else {})}
    )

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert upstream.models_asked() == ["acme/two"]
    assert dry.json["dialect"] == form.name
    why = f"does not speak {form.name} (upstreams.local.speaks)"
    assert [model["passed_over"] for model in dry.json["chain"]] == [why, None]


@pytest.mark.parametrize(("name", "status"), [("messages", 422), ("responses", 400)])
def test_nobody_who_speaks_the_format_is_told_with_the_setting(build, upstream, name, status):
    answer = ask(build(), FORMATS[name])

    assert answer.status_code == status
    assert answer.json["error"]["code"] == "no_capable_model"
    assert "upstreams.local.speaks" in answer.json["error"]["message"]
    assert upstream.requests == []


def test_a_model_may_have_another_name_at_its_upstream(build, upstream):
    second = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY"}
    models = {
        "acme/one": {"name": "vendor-one"},
        "acme/two": {"upstream": "b", "name": "vendor-one"},
    }
    client = build(upstreams={**speaking(upstream), "b": second}, models=models)
    upstream.scripts = {"vendor-one": [error(500), error(500), whole("from b")]}

    answer = client.chat()

    assert answer.json["choices"][0]["message"]["content"] == "from b"
    assert upstream.models_asked() == ["vendor-one"] * 3
    assert answer.headers["X-Router-Model"] == "acme/two"
    assert client.get("/config").json["model_names"]["acme/two"] == "vendor-one"


# --- failover and ends ---------------------------------------------------------------------------

FIRST_FAILS = {
    "status": lambda form: form.refuses(503, "overloaded"),
    "error in a 200": lambda form: plain(200, json.dumps(form.error("no")).encode()),
    "error event": lambda form: pieces([*form.begun([]), form.error_event("overloaded")]),
    "html": lambda form: plain(200, b"<html>", "text/html"),
    "cut before a word": lambda form: pieces(form.begun([]), after="cut"),
    "another format": lambda form: other_of(form).good(),
}  # fmt: skip


def other_of(form: Any) -> Any:
    return FORMATS[NAMED[form.name == "messages"]]


@pytest.mark.parametrize("fault", FIRST_FAILS)
@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_before_the_first_word_the_next_model_answers(client, upstream, form, fault):
    upstream.scripts = {"acme/one": FIRST_FAILS[fault](form), "acme/two": form.good("second")}

    answer = ask(client, form, stream=True)

    assert read(form, answer) == ("second", "", True)
    assert b"overloaded" not in answer.data


def failed_whole(form: Any) -> dict[str, Any]:
    """An error in a 200, as a whole answer of the format has it."""
    if form.name == "responses":
        return form.head("failed", error={"code": "server_error", "message": "failed inside"})
    return form.error("failed inside")


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_an_error_inside_a_200_is_no_answer(client, upstream, form):
    bad = plain(200, json.dumps(failed_whole(form)).encode())
    upstream.scripts = {"acme/one": bad, "acme/two": bad}

    answer = ask(client, form)

    assert answer.status_code >= 500
    assert "acme/one failed" in form.read_whole(answer.json).error
    tried = ["acme/one", "acme/one", "acme/two"]
    assert last_attempts(client) == [(model, "server_error") for model in tried]


BREAKS = {
    "cut": lambda form: pieces(form.begun(["half ", "an "]), after="cut"),
    "error": lambda form: pieces([*form.begun(["half ", "an "]), form.error_event("overloaded")]),
}  # fmt: skip


@pytest.mark.parametrize("fault", BREAKS)
@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_behind_the_first_word_an_error_event_ends_it_and_never_a_good_end(
    client, upstream, form, fault
):
    upstream.default = BREAKS[fault](form)

    answer = ask(client, form, stream=True)

    got = form.read_stream(answer.data)
    assert got.text == "half an "
    assert "acme/one" in got.error
    assert not got.complete
    assert upstream.models_asked() == ["acme/one"]


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_held_until_whole_a_cut_fails_over(client, upstream, form):
    upstream.scripts = {"acme/one": BREAKS["cut"](form), "acme/two": form.good("second")}

    answer = ask(client, form, stream=True, headers={"X-Router-Stream": "whole"})

    assert form.read_stream(answer.data) == ("second", "", True)


def test_a_failed_response_goes_on_with_its_id_and_its_numbers(client, upstream):
    upstream.default = BREAKS["error"](FORMATS["responses"])

    said = read_events(ask(client, FORMATS["responses"], stream=True).data)

    assert [one["sequence_number"] for one in said] == list(range(len(said)))
    assert said[-1]["type"] == "response.failed"
    assert said[-1]["response"]["id"] == "resp_1"
    assert said[-1]["response"]["error"]["code"] == "server_error"


def test_a_response_that_ends_failed_is_no_good_end_and_its_tokens_are_paid_for(client, upstream):
    form = FORMATS["responses"]
    failed = form.head("failed", usage={"input_tokens": 50, "output_tokens": 1})
    upstream.scripts = {"acme/one": pieces([event("response.completed", response=failed)])}

    answer = ask(client, form, stream=True)

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert figures(client)["models"]["acme/one"]["tokens"]["input"] == 2 * 50  # asked twice


def test_a_search_of_the_models_is_no_silence(build, upstream):
    client = build(upstreams=speaking(upstream), timeouts_sec={"idle": 0.4, "total": 20})
    form = FORMATS["responses"]
    call = {"type": "web_search_call", "id": "w"}
    parts: list[Any] = [event("response.output_item.added", output_index=0, item=call)]
    for _ in range(4):
        parts += [0.3, event("response.web_search_call.searching", item_id="w")]
    upstream.default = pieces([*parts, 0.3, *form.begun(["found"]), *form.end()])

    assert form.read_stream(ask(client, form, stream=True).data) == ("found", "", True)


def test_a_message_without_its_last_event_gets_it(client, upstream):
    form = FORMATS["messages"]
    upstream.default = pieces([*form.begun(["Hello"]), *form.end()[:-1]])

    answer = ask(client, form, stream=True)

    assert form.read_stream(answer.data) == ("Hello", "", True)


ENDS = [("messages", "max_tokens"), ("messages", "refusal"), ("messages", "pause_turn"),
        ("responses", "max_output_tokens"), ("responses", "content_filter")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), ENDS)
@pytest.mark.parametrize("stream", [False, True])
def test_other_good_ends_are_passed_on(client, upstream, name, kind, stream):
    form = FORMATS[name]
    as_stream = pieces([*form.begun(["so far"]), *form.end(kind)])
    upstream.default = (
        as_stream if stream else plain(200, json.dumps(form.whole("so far", kind)).encode())
    )

    answer = ask(client, form, stream=stream)

    assert answer.status_code == 200
    assert kind.encode() in answer.data
    assert not read(form, answer).error


EMPTY = {
    "messages": Messages().whole(""),
    "responses": Responses().whole(""),
}


@pytest.mark.parametrize("name", NAMED)
def test_an_empty_answer_is_passed_on_only_when_nobody_has_a_better(client, upstream, name):
    empty = plain(200, json.dumps(EMPTY[name]).encode())
    upstream.scripts = {"acme/one": empty, "acme/two": FORMATS[name].good("words")}
    better = ask(client, FORMATS[name])
    upstream.scripts["acme/two"] = empty

    same = ask(client, FORMATS[name])

    assert read(FORMATS[name], better).text == "words"
    assert json.loads(same.data) == EMPTY[name]


BLOCK = {"type": "tool_use", "id": "t", "name": "ls", "input": {}}
CALLS = {
    "messages": lambda rest: [
        *Messages().begun([])[:1],
        event("content_block_start", index=0, content_block=BLOCK),
        event("content_block_delta", index=0,
              delta={"type": "input_json_delta", "partial_json": '{"path": "a' + rest}),
        *Messages().end("tool_use"),
    ],
    "responses": lambda rest: [
        event("response.output_item.added", item={"type": "function_call", "arguments": ""}),
        event("response.function_call_arguments.delta", delta='{"path": "a' + rest),
        event("response.completed", response=Responses().head(
            "completed", output=[{"type": "function_call", "arguments": '{"path": "a' + rest}])),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_held_until_whole_half_a_tool_call_fails_over(client, upstream, name):
    upstream.scripts = {"acme/one": pieces(CALLS[name]("")), "acme/two": pieces(CALLS[name]('"}'))}

    answer = ask(client, FORMATS[name], stream=True, headers={"X-Router-Stream": "whole"})

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert answer.headers["X-Router-Attempts"] == "2"


@pytest.mark.parametrize("name", NAMED)
def test_a_tool_call_begins_an_answer(client, upstream, name):
    first = CALLS[name]("")[:-3] if name == "messages" else CALLS[name]("")[:1]
    upstream.scripts = {"acme/one": pieces(first, after="cut")}

    answer = ask(client, FORMATS[name], stream=True)

    assert upstream.models_asked() == ["acme/one"]
    assert FORMATS[name].read_stream(answer.data).error


# --- what the clients take well ------------------------------------------------------------------

# (what the only two models do, chat, messages, responses whole, responses streamed): the statuses.
# Claude Code shows a 400 at once, hides a 404, and tries 401, 429 and 5xx for minutes unless
# x-should-retry is false. Codex, which always streams, shows a 400 with a code at once, tries
# 404, 422 six times and 5xx thirty times, and waits out the Retry-After of a 429.
TOLD = [
    ({"status": 500}, 500, 503, 500, 400),
    ({"status": 529}, 500, 503, 500, 400),
    ({"status": 401}, 500, 503, 500, 400),
    ({"status": 400, "message": "bad parameter"}, 400, 400, 400, 400),
    ({"status": 404, "message": "nothing here"}, 404, 400, 400, 400),
    ({"status": 413, "message": "prompt is too long"}, 413, 413, 400, 400),
    ({"status": 422, "message": "bad parameter"}, 422, 422, 400, 400),
    ({"status": 429, "Retry_After": "60"}, 429, 429, 429, 429),
]


@pytest.mark.parametrize(("does", *EVERY, "streamed"), TOLD)
def test_each_client_is_told_in_a_way_it_takes_well(
    client, upstream, does, chat, messages, responses, streamed
):
    wanted = [("chat", False, chat), ("messages", True, messages),
              ("responses", False, responses), ("responses", True, streamed)]  # fmt: skip
    for name, stream, status in wanted:
        form = FORMATS[name]
        upstream.default = form.refuses(**does)
        client.post("/circuit-breaker/reset-all")

        answer = ask(client, form, stream=stream)

        assert (name, answer.status_code) == (name, status)
        told = answer.json["error"]
        assert told["message"] and told["code"]
        if name == "messages":
            assert answer.json["type"] == "error"
            assert answer.headers["request-id"] == answer.headers["X-Request-Id"]
            final = (answer.headers.get("x-should-retry"), told["type"])
            assert status != 503 or final == ("false", "api_error")
        if status == 429:
            assert ("Retry-After" in answer.headers) == (name != "responses")


def test_words_that_make_an_agent_compact_get_through(client, upstream):
    words = "prompt is too long: 208310 tokens > 200000 maximum"
    form = FORMATS["messages"]
    upstream.default = form.refuses(400, words, "invalid_request_error")
    message = ask(client, form, stream=True)
    form = FORMATS["responses"]
    upstream.default = form.refuses(400, "input exceeds the context window of this model")
    response = ask(client, form, stream=True)

    assert (message.status_code, message.json["error"]["message"]) == (400, words)
    assert response.json["error"]["code"] == "context_length_exceeded"


OWN = [
    (b"{", "application/json", 400, 400, 400), (b"[1]", "application/json", 400, 400, 400),
    (b"{}", "application/json", 422, 422, 400), (b"{}", "text/plain", 415, 415, 400),
    (b'{"model": "router/none", "messages": [{"role": "user"}], "input": "x"}',
     "application/json", 404, 400, 404),
]  # fmt: skip


@pytest.mark.parametrize(("data", "kind", *EVERY), OWN)
def test_our_own_refusals_have_the_envelope_of_the_path(
    client, data, kind, chat, messages, responses
):
    for form, status in zip(FORMATS.values(), (chat, messages, responses), strict=True):
        body = data.replace(b'"messages"', b'"m"') if form.name == "responses" else data

        answer = client.open("POST", form.path, data=body, content_type=kind)

        assert (form.name, answer.status_code) == (form.name, status)
        assert answer.json["error"]["message"]
        assert (answer.json.get("type") == "error") is (form.name == "messages")


MISPLACED = [
    ("/v1/chat/completions", FORMATS["responses"].ask(), "/v1/responses"),
    ("/v1/messages", FORMATS["responses"].ask(), "/v1/responses"),
    ("/v1/messages", FORMATS["chat"].ask(stream_options={}), "/v1/chat/completions"),
    ("/v1/messages", FORMATS["chat"].ask(tools=[{"type": "function", "function": {"name": "f"}}]),
     "/v1/chat/completions"),
    ("/v1/responses", FORMATS["chat"].ask(), "/v1/chat/completions"),
    ("/v1/embeddings", FORMATS["chat"].ask(), "/v1/chat/completions"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "belongs"), MISPLACED)
def test_a_body_on_the_wrong_path_is_told_where_it_belongs(client, upstream, path, body, belongs):
    answer = client.post(path, body)

    assert answer.status_code in (400, 422)
    assert belongs in answer.json["error"]["message"]
    assert upstream.requests == []


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_stored_responses_are_the_upstreams(client, method):
    answer = client.open(method, "/v1/responses/resp_1/cancel", json={})

    assert answer.status_code == 404
    assert "keeps no responses" in answer.json["error"]["message"]


# --- what was said -------------------------------------------------------------------------------

NOISE = "python refactor python refactor"
SAID = "write a haiku about the sea"


def part(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


def turn(role: str, *texts: str, kind: str = "text") -> dict[str, Any]:
    return {"role": role, "content": [part(text, kind) for text in texts]}


REMINDER = f"<system-reminder>\n{NOISE}\n</system-reminder>"
RESULT = {
    "role": "user",
    "content": [{"type": "tool_result", "tool_use_id": "t", "content": NOISE}],
}
CALL = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "t", "name": NOISE, "input": {}}],
}
AGENTS = f"# AGENTS.md instructions for /home/demo\n\n{NOISE}"
PLACE = f"<environment_context>{NOISE}</environment_context>"
ITEMS = [turn(role, text, kind="input_text")
         for role, text in (("developer", NOISE), ("user", AGENTS), ("user", PLACE))]  # fmt: skip
SHAPES = {
    "Claude Code, a turn": [turn("user", REMINDER, SAID), turn("system", NOISE)],
    "a tool's result": [turn("user", REMINDER, SAID), CALL, RESULT],
    "a reminder beside it": [turn("user", SAID), CALL,
                             {**RESULT, "content": [*RESULT["content"], part(REMINDER)]}],
    "behind a local command": [turn("user", f"<local-command-caveat>{NOISE}</local-command-caveat>",
                                    f"<command-name>/x {NOISE}</command-name>", SAID)],
    "plain": [{"role": "user", "content": NOISE}, turn("assistant", NOISE), turn("user", SAID)],
}  # fmt: skip
CODEX = {
    "Codex, a turn": [*ITEMS, turn("user", SAID, kind="input_text")],
    "a tool's result": [*ITEMS, turn("user", SAID, kind="input_text"),
                        {"type": "function_call_output", "call_id": "c", "output": NOISE}],
    "a string": SAID,
    "items without type": [{"role": "user", "content": SAID}],
}  # fmt: skip
BODIES = [pytest.param("messages", {"messages": turns, "system": [part(NOISE)]}, id=name)
          for name, turns in SHAPES.items()]  # fmt: skip
BODIES += [pytest.param("responses", {"input": items, "instructions": NOISE}, id=name)
           for name, items in CODEX.items()]  # fmt: skip


@pytest.mark.parametrize(("name", "body"), BODIES)
def test_the_persons_words_decide_and_nothing_around_them(build, upstream, name, body):
    sea = {"models": ["acme/one"], "keywords": ["haiku^3"]}
    code = {"models": ["acme/two"], "keywords": ["python^3", "refactor^3"]}
    client = build(upstreams=speaking(upstream), categories={"sea": sea, "code": code},
                   default_category="code")  # fmt: skip
    upstream.default = FORMATS[name].good()

    answer = client.post(FORMATS[name].path, {"model": "router", "max_tokens": 9, **body})

    assert answer.headers["X-Router-Category"] == "sea"


@pytest.mark.parametrize(
    ("name", "more"),
    [("messages", {"tools": [{"name": "f", "input_schema": {}}]}),
     ("messages", {"tools": [{"name": "f"}] * 9, "tool_choice": {"type": "any"}}),
     ("responses", {"tools": [{"type": "function", "name": "f"}]})],
)  # fmt: skip
def test_tools_lead_to_tools(build, upstream, name, more):
    client = build(upstreams=speaking(upstream))
    upstream.default = FORMATS[name].good()

    assert ask(client, FORMATS[name], **more).headers["X-Router-Category"] == "tools"


def test_tools_in_groups_are_counted_one_by_one(client, upstream):
    group = {"type": "namespace", "tools": [{"type": "function", "name": "f"}] * 8}
    upstream.default = FORMATS["responses"].good()

    answer = ask(client, FORMATS["responses"], tools=[group])

    assert answer.headers["X-Router-Mode"] != "tools"


PICTURE = {
    "messages": {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
    "responses": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
}


@pytest.mark.parametrize("name", NAMED)
def test_pictures_pass_over_who_cannot_see(build, upstream, name):
    client = build(upstreams=speaking(upstream), models={"acme/one": {"images": False}})
    upstream.default = FORMATS[name].good()

    answer = client.post(FORMATS[name].path, {**FORMATS[name].ask(), **PICTURE[name]})

    assert answer.headers["X-Router-Model"] == "acme/two"


def test_a_response_goes_on_with_the_model_that_made_it(client, upstream):
    form = FORMATS["responses"]
    upstream.scripts = {"acme/one": form.refuses(503), "acme/two": form.good()}
    ask(client, form)
    client.post("/circuit-breaker/reset-all")
    upstream.scripts = {}
    upstream.default = form.good()

    known = ask(client, form, previous_response_id="resp_1")
    other = ask(client, form, previous_response_id="resp_of_nobody")

    assert known.headers["X-Router-Model"] == "acme/two"
    assert other.headers["X-Router-Model"] == "acme/one"


# --- what nobody should send --------------------------------------------------------------------

ODD = (5, 1.5, True, "x", [1], [None], {"a": 1}, None)


@pytest.mark.parametrize("key", ["tools", "stream_options", "tool_choice", "metadata"])
@pytest.mark.parametrize("path", sorted(DIALECT_AT))
def test_odd_members_of_a_body_are_no_bug_of_ours(client, path, key):
    form = next(
        (form for form in FORMATS.values() if path.endswith(form.path)), FORMATS["messages"]
    )
    body = {**form.ask(), **({"input": "a", "model": "acme/one"} if "embed" in path else {})}

    for value in ODD:
        assert "internal_error" not in client.post(path, {**body, key: value}).text


ODD_RESPONSES = [{"status": []}, {"status": {}}, {"output": 5}, {"output": [5]}, {"usage": [1]},
                 {"id": 5, "output": None}, {"incomplete_details": 1}]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_RESPONSES, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_odd_answers_are_the_models_fault_and_not_ours(client, upstream, odd, stream):
    form = FORMATS["responses"]
    bad = {**form.head("completed", output=[]), **odd}
    ended = pieces([event("response.completed", response=bad)])
    upstream.scripts = {"acme/one": ended if stream else plain(200, json.dumps(bad).encode())}
    upstream.default = form.good("second")

    answer = ask(client, form, stream=stream, headers={"X-Router-Stream": "whole"})

    assert read(form, answer) == ("second", "", True)


def test_zeros_at_the_end_of_a_message_do_not_unsay_its_tokens(client, upstream):
    form = FORMATS["messages"]
    zeros = {"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 20}
    last = event("message_delta", delta={"stop_reason": "end_turn"}, usage=zeros)
    upstream.default = pieces([*form.begun(["hi"]), last, event("message_stop")])

    ask(client, form, stream=True)

    tokens = figures(client)["tokens"]
    assert (tokens["input"], tokens["cached"], tokens["output"]) == form.tokens


HALF = {"type": "function_call", "arguments": '{"a": "b'}


@pytest.mark.parametrize(
    "told",
    [event("response.function_call_arguments.delta", delta=HALF["arguments"]),
     event("response.output_item.done", item=HALF)],
)  # fmt: skip
def test_half_a_call_that_the_last_event_does_not_repeat_fails_over(client, upstream, told):
    form = FORMATS["responses"]
    end = event("response.completed", response=form.head("completed"))
    upstream.scripts = {"acme/one": pieces([told, end]), "acme/two": form.good("second")}

    answer = ask(client, form, stream=True, headers={"X-Router-Stream": "whole"})

    assert form.read_stream(answer.data).text == "second"


@pytest.mark.parametrize("status", [404, 405, 501])
def test_who_cannot_count_may_answer_all_the_same(client, upstream, status):
    upstream.default = error(status)

    for _ in range(5):
        assert client.post(COUNT, FORMATS["messages"].ask()).status_code == 200

    assert open_circuits(client) == {}


@pytest.mark.parametrize("size", [50, 250, 900])
def test_a_long_id_of_a_response_is_remembered(client, upstream, size):
    form = FORMATS["responses"]
    made = plain(200, json.dumps({**form.whole("a"), "id": "r" * size}).encode())
    upstream.scripts = {"acme/one": form.refuses(503), "acme/two": made}
    ask(client, form)
    client.post("/circuit-breaker/reset-all")
    upstream.scripts = {}
    upstream.default = form.good()

    answer = ask(client, form, previous_response_id="r" * size)

    assert answer.headers["X-Router-Model"] == "acme/two"


# --- counts and vectors --------------------------------------------------------------------------

COUNT = "/v1/messages/count_tokens"


def test_tokens_are_counted_by_who_can_and_not_counted_as_a_request(client, upstream):
    upstream.scripts = {"acme/one": error(500), "acme/two": plain(200, b'{"input_tokens": 7}')}

    answer = client.post(COUNT + "?beta=true", FORMATS["messages"].ask())

    assert answer.json == {"input_tokens": 7}
    assert "X-Router-Estimate" not in answer.headers
    assert upstream.requests[-1].path == COUNT + "?beta=true"
    assert figures(client)["requests"]["total"] == 0
    assert figures(client)["in_flight"] == 0


@pytest.mark.parametrize("speaks", [["chat"], ["messages"]])
def test_where_nobody_counts_the_bytes_do(build, upstream, speaks):
    upstream.default = error(404, "not found")
    client, body = build(upstreams=speaking(upstream, speaks)), FORMATS["messages"].ask("x" * 4000)

    answer = client.post(COUNT, body)

    assert answer.status_code == 200
    assert answer.headers["X-Router-Estimate"] == "bytes"
    assert 1000 <= answer.json["input_tokens"] < 1100


def test_a_count_that_failed_is_an_error(client, upstream):
    upstream.default = error(500)

    answer = client.post(COUNT, FORMATS["messages"].ask())

    assert answer.status_code == 503
    assert answer.json["type"] == "error"


VECTORS = json.dumps({"object": "list", "data": [{"index": 0, "embedding": "AAAA"}],
                      "usage": {"prompt_tokens": 9, "total_tokens": 9}}).encode()  # fmt: skip


def test_vectors_come_from_the_model_that_is_named_or_its_twin(build, upstream):
    models = {"acme/v": {"name": "v"}, "b/v": {"name": "v", "upstream": "b"}, "acme/one": {}}
    both = {"local": speaking(upstream)["local"], "b": speaking(upstream)["local"]}
    client = build(upstreams=both, models=models)
    upstream.scripts = {"v": [error(500), error(500), plain(200, VECTORS)]}

    answer = client.post("/v1/embeddings", {"model": "acme/v", "input": ["a", "b"]})

    assert answer.data == VECTORS
    assert answer.headers["X-Router-Model"] == "b/v"
    assert figures(client)["models"]["b/v"]["tokens"]["input"] == 9
    assert upstream.models_asked() == ["v"] * 3


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_category_that_is_named_is_walked_for_vectors(client, upstream, more):
    upstream.scripts = {"acme/one": plain(200, b'{"error": {"message": "no"}}')}
    upstream.default = plain(200, VECTORS)

    answer = client.post("/embeddings", {"model": "router/conversation", "input": "a", **more})

    assert answer.headers["X-Router-Model"] == "acme/two"


@pytest.mark.parametrize("model", ["router", "text-embedding-of-nobody", ""])
def test_nothing_chooses_a_model_for_vectors(client, upstream, model):
    answer = client.post("/v1/embeddings", {"model": model, "input": "a"})

    assert answer.status_code == 400
    assert "name a model" in answer.json["error"]["message"]
    assert upstream.requests == []


# --- on real sockets -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(serve, shared_upstream):
    return serve(upstreams=speaking(shared_upstream))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", [FORMATS[name] for name in NAMED], ids=NAMED)
def test_a_client_that_leaves_ends_the_call(spoken, upstream, form, stream):
    upstream.default = pieces(form.begun(["a word"]), after="hang") if stream else hang
    body = json.dumps(form.ask(stream=stream)).encode()
    head = head_of("POST", form.path, body=body)
    before = figures(spoken)["requests"]["cancelled"]

    with connected(spoken, head):
        wait_until(lambda: upstream.requests)

    wait_until(lambda: upstream.left)
    wait_until(lambda: figures(spoken)["requests"]["cancelled"] == before + 1)
    assert open_circuits(spoken) == {}


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_streams_come_through_the_carrier_as_they_were_sent(spoken, upstream, form):
    parts = [*form.begun([f"word{n} " for n in range(300)]), *form.end()]
    parts = [part for part in parts if b'"choices": []' not in part]  # the usage, not asked for
    upstream.default = pieces([x for part in parts for x in (part, 0.0005)])

    answer = spoken.post(form.path, form.ask(stream=True))

    assert answer.content == b"".join(parts)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_the_demo_answers_in_each_format(build, path):
    client = build(ROUTER_DEMO="1", TEST_API_KEY="")
    form = next(form for form in FORMATS.values() if form.path == path)

    for stream in (False, True):
        got = read(form, ask(client, form, stream=stream))
        assert got.text.startswith("[demo]")
        assert got.complete


def test_the_demo_counts_and_makes_vectors(build):
    client = build(ROUTER_DEMO="1", TEST_API_KEY="")

    assert client.post(COUNT, FORMATS["messages"].ask()).json["input_tokens"] > 5
    vectors = client.post("/v1/embeddings", {"model": "router/code", "input": ["a", "b"]})
    assert [len(one["embedding"]) for one in vectors.json["data"]] == [8, 8]


def test_bytes_that_are_no_http_fail_over_in_each_format(client, upstream):
    for form in FORMATS.values():
        upstream.scripts = {"acme/one": raw(b"nonsense\r\n\r\n"), "acme/two": form.good("second")}
        assert read(form, ask(client, form, stream=True)).text == "second"
