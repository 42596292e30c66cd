"""The real thing: a real gunicorn, a real upstream on a socket, the real openai SDK."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from conftest import KEY, Service, small_routes
from helpers import user
from upstream import chunk, error, events, pieces, plain, stream, whole

import router as module

ONE, TWO = "acme/one", "acme/two"
TOO_LONG = error(400, "maximum context length is 10 tokens", "context_length_exceeded")
FILTERED = error(400, "rejected by our safety system", "content_policy_violation")


@pytest.fixture
def sdk(service: Service) -> Iterator[Any]:
    """The SDK as people use it: two retries of its own."""
    import openai  # takes 1.5 s, in the one test process that needs it

    with openai.OpenAI(base_url=service.base + "/v1", api_key="local", max_retries=2) as found:
        yield found


def ask(sdk: Any, **more):
    return sdk.chat.completions.create(**{"model": "router", "messages": [user("hello")], **more})


def test_sdk_gets_a_whole_answer(sdk, upstream):
    answer = ask(sdk)

    assert answer.choices[0].message.content == "Hello from upstream"
    assert answer.model == "upstream/own-name"


def test_sdk_gets_a_stream_word_by_word(sdk, upstream):
    upstream.default = stream(["a ", "b ", "c"])

    words = [c.choices[0].delta.content for c in ask(sdk, stream=True)]

    assert [w for w in words if w] == ["a ", "b ", "c"]


def test_sdk_makes_a_tools_round_trip(sdk, upstream):
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    upstream.scripts[ONE] = [
        whole(None, message={"tool_calls": [call]}, finish_reason="tool_calls"),
        whole("done"),
    ]
    tools = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
    first = ask(sdk, tools=tools).choices[0].message

    history = [first.model_dump(), {"role": "tool", "tool_call_id": "c1", "content": "42"}]
    second = ask(sdk, tools=tools, messages=[user("x"), *history])

    assert first.tool_calls[0].function.arguments == '{"a": 1}'
    assert second.choices[0].message.content == "done"
    assert upstream.requests[-1].body["messages"][-1]["tool_call_id"] == "c1"


def test_sdk_lists_models(sdk):
    names = [model.id for model in sdk.models.list()]

    assert names[:2] == ["router", "router/tools"]
    assert ONE in names
    assert sdk.models.retrieve(ONE).owned_by == "acme"


@pytest.mark.parametrize(
    ("script", "asked", "raised"),
    [
        (error(503), [ONE, TWO], "InternalServerError"),
        (error(500), [ONE, ONE, TWO], "InternalServerError"),
        (error(401), [ONE], "InternalServerError"),
        (error(402), [ONE, TWO], "InternalServerError"),
        (error(400), [ONE, TWO], "BadRequestError"),
        (error(422), [ONE, TWO], "UnprocessableEntityError"),
        (TOO_LONG, [ONE, TWO], "BadRequestError"),
        (FILTERED, [ONE], "BadRequestError"),
    ],
    ids=["503", "500", "401", "402", "400", "422", "context", "filter"],
)
def test_one_call_of_the_sdk_walks_the_chain_once_and_raises_its_own_error(
    sdk, upstream, script, asked, raised
):
    upstream.default = script
    began = time.monotonic()

    with pytest.raises(Exception) as caught:
        ask(sdk)

    assert type(caught.value).__name__ == raised
    assert caught.value.body["message"]
    assert upstream.models_asked() == asked
    assert time.monotonic() - began < 2


def test_the_sdk_comes_back_when_a_rate_limit_ends(sdk, upstream):
    upstream.default = error(429)
    upstream.scripts[ONE] = [error(429), whole("back")]
    began = time.monotonic()

    answer = ask(sdk)

    assert answer.choices[0].message.content == "back"
    assert upstream.models_asked() == [ONE, TWO, ONE]
    assert 0.9 < time.monotonic() - began < 3


def test_sdk_raises_on_a_body_that_does_not_fit(sdk):
    with pytest.raises(Exception, match="messages") as caught:
        ask(sdk, messages=[])

    assert type(caught.value).__name__ == "UnprocessableEntityError"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "behind-a-bom"])
def test_the_body_goes_upstream_as_it_came_with_only_the_model_changed(service, upstream, bom):
    body = (
        '{"model" : "router",\n "messages":[{"role":"user",'
        '"content":[{"type":"text","text":"hé"}]},'
        '{"role":"assistant","content":null,"reasoning_content":"r","tool_calls":[]}],'
        '"max_completion_tokens":5, "seed": 123456789012345678901234567890, "temperature":1.10,'
        '"x_unknown":{"a":[1,2]}, "metadata":{"model":"keep me"}}'
    )

    answer = requests.post(
        service.base + "/chat/completions",
        data=bom + body.encode(),
        headers={"Content-Type": "application/json"},
        timeout=10,
    )

    assert answer.status_code == 200
    assert upstream.requests[-1].raw == body.replace('"router"', '"acme/one"', 1).encode()


def test_only_our_own_headers_go_upstream(service, upstream):
    service.chat(headers={"Authorization": "Bearer mine", "Cookie": "a=b", "X-Any": "1"})

    seen = upstream.requests[-1].headers
    assert seen["authorization"] == f"Bearer {KEY}"
    assert not {"cookie", "x-any"} & seen.keys()
    assert seen["accept-encoding"] == "identity"


def test_a_whole_answer_goes_back_as_the_bytes_that_came(service, upstream):
    body = (
        b'{"choices" : [{"message":{"content":"x"}, "n": 1.10}],\n "big":12345678901234567890123}'
    )
    upstream.default = plain(200, body)

    assert service.chat().content == body


def test_events_leave_when_they_arrive(service, upstream):
    gate = threading.Event()
    upstream.default = pieces([chunk({"content": "first"}), gate.wait, *events(["second"])])

    lines = service.chat(stream=True).iter_lines(chunk_size=1)
    first = next(lines)
    gate.set()
    rest = b"".join(lines)

    assert b"first" in first
    assert b"second" in rest


def test_a_taken_port_is_said_in_a_sentence(service, tmp_path):
    with pytest.raises(AssertionError, match="ROUTER_BIND"):
        Service(
            tmp_path, small_routes("http://127.0.0.1:1"), ROUTER_BIND=f"127.0.0.1:{service.port}"
        )


@pytest.mark.parametrize(
    ("name", "value"), [("ROUTER_THREADS", "many"), ("ROUTER_MAX_BODY_MB", "-1")]
)
def test_an_unusable_setting_names_itself_and_stops_the_start(tmp_path, name, value):
    with pytest.raises(AssertionError, match=name):
        Service(tmp_path, small_routes("http://127.0.0.1:1"), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ROUTER_MAX_BODY_MB", "0", "ROUTER_MAX_BODY_MB"),
        ("ROUTER_LOG_FORMAT", "xml", "ROUTER_LOG_FORMAT"),
        ("ROUTER_DEMO", "yes", "ROUTER_DEMO"),
        ("ROUTER_BIND", "0.0.0.0:0", "ROUTER_ALLOW_OPEN"),  # beyond loopback, without keys
    ],
)
def test_a_setting_that_does_not_fit_is_named(name, value, said):
    with pytest.raises(module.SettingsError, match=said):
        module.Settings.from_env({name: value})


def test_a_bad_routes_file_at_first_start_is_said_with_its_place(tmp_path):
    bad = small_routes("http://127.0.0.1:1")
    bad["categories"]["code"]["models"] = []

    with pytest.raises(AssertionError, match=r"\$\.categories\.code\.models: should be non-empty"):
        Service(tmp_path, bad)
