"""The real thing: a real gunicorn, a real upstream on a socket, the real openai SDK."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
from conftest import KEY, Service, small_routes
from upstream import (
    DONE,
    Upstream,
    answer_body,
    chunk,
    error,
    events,
    pieces,
    plain,
    stream,
    whole,
)  # fmt: skip


@pytest.fixture
def sdk(service: Service) -> openai.OpenAI:
    with openai.OpenAI(base_url=service.base + "/v1", api_key="local", max_retries=2) as found:
        yield found


def ask(sdk: openai.OpenAI, **more):
    messages = [{"role": "user", "content": "hello"}]
    return sdk.chat.completions.create(**{"model": "router", "messages": messages, **more})


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
    upstream.scripts["acme/one"] = [
        whole(None, message={"tool_calls": [call]}, finish_reason="tool_calls"),
        whole("done"),
    ]
    tools = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
    first = ask(sdk, tools=tools).choices[0].message

    history = [first.model_dump(), {"role": "tool", "tool_call_id": "c1", "content": "42"}]
    second = ask(sdk, tools=tools, messages=[{"role": "user", "content": "x"}, *history])

    assert first.tool_calls[0].function.arguments == '{"a": 1}'
    assert second.choices[0].message.content == "done"
    assert upstream.requests[-1].body["messages"][-1]["tool_call_id"] == "c1"


def test_sdk_lists_models(sdk):
    names = [model.id for model in sdk.models.list()]

    assert names[:2] == ["router", "router/tools"]
    assert "acme/one" in names
    assert sdk.models.retrieve("acme/one").owned_by == "acme"


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (error(400, "bad parameter"), openai.BadRequestError),
        (error(500), openai.InternalServerError),
        (error(429), openai.RateLimitError),
    ],
)
def test_sdk_raises_its_own_error_classes(sdk, upstream, script, wanted):
    upstream.default = script

    with pytest.raises(wanted) as caught:
        ask(sdk.with_options(max_retries=0))

    assert caught.value.body["message"]


def test_sdk_raises_on_a_body_that_does_not_fit(sdk):
    with pytest.raises(openai.UnprocessableEntityError, match="messages"):
        ask(sdk, messages=[])


def test_a_failed_chain_is_not_walked_again_by_the_sdk(sdk, upstream):
    upstream.default = error(503)

    with pytest.raises(openai.InternalServerError):
        ask(sdk)

    assert upstream.models_asked() == ["acme/one", "acme/two"]


def test_the_body_goes_upstream_as_it_came_with_only_the_model_changed(service, upstream):
    body = (
        '{"model" : "router",\n "messages":[{"role":"user",'
        '"content":[{"type":"text","text":"hé"}]},'
        '{"role":"assistant","content":null,"reasoning_content":"r","tool_calls":[]}],'
        '"max_completion_tokens":5, "seed": 123456789012345678901234567890, "temperature":1.10,'
        '"x_unknown":{"a":[1,2]}, "metadata":{"model":"keep me"}}'
    )

    answer = requests.post(
        service.base + "/chat/completions",
        data=body.encode(),
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


def test_usage_is_asked_for_and_hidden_again(service, upstream):
    text = service.chat(stream=True).text

    assert upstream.requests[-1].body["stream_options"] == {"include_usage": True}
    assert '"usage"' not in text


def test_usage_is_passed_on_when_the_client_asked_for_it(service, upstream):
    text = service.chat(stream=True, stream_options={"include_usage": True}).text

    assert '"usage"' in text


def test_two_hundred_parallel_streams_arrive_whole(upstream: Upstream, tmp_path):
    upstream.default = stream([f"{n} " for n in range(20)], pause_s=0.01)
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="256")
    expected = "".join(f"{n} " for n in range(20))

    def one(_: int) -> str:
        lines = service.chat(stream=True).text.split("\n\n")
        datas = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
        assert lines[-2] == "data: [DONE]"
        return "".join(d["choices"][0]["delta"].get("content", "") for d in datas)

    try:
        with ThreadPoolExecutor(200) as pool:
            texts = list(pool.map(one, range(200)))
    finally:
        service.stop()

    assert texts == [expected] * 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
            400,
        ),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"NONSENSE\r\n\r\n", 400),
    ],
)
def test_what_gunicorn_refuses_is_json_too(service, request_bytes, status):
    head, _, body = service.raw(request_bytes).partition(b"\r\n\r\n")

    assert int(head.split(b" ")[1]) in (400, status)
    assert b"application/json" in head
    assert json.loads(body)["error"]["message"]


def test_a_taken_port_is_said_in_a_sentence(service, tmp_path):
    with pytest.raises(AssertionError, match="ROUTER_BIND"):
        Service(
            tmp_path, small_routes("http://127.0.0.1:1"), ROUTER_BIND=f"127.0.0.1:{service.port}"
        )


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ROUTER_THREADS": "many"}, "ROUTER_THREADS"),
        ({"ROUTER_MAX_BODY_MB": "-1"}, "ROUTER_MAX_BODY_MB"),
        ({"ROUTER_LOG_FORMAT": "xml"}, "ROUTER_LOG_FORMAT"),
        ({"ROUTER_DEMO": "yes"}, "ROUTER_DEMO"),
    ],
)
def test_an_unusable_setting_names_itself_and_stops_the_start(tmp_path, env, said):
    with pytest.raises(AssertionError, match=said):
        Service(tmp_path, small_routes("http://127.0.0.1:1"), **env)


def test_a_bind_beyond_loopback_without_keys_refuses_to_start(tmp_path):
    with pytest.raises(AssertionError, match="ROUTER_ALLOW_OPEN"):
        Service(tmp_path, small_routes("http://127.0.0.1:1"), ROUTER_BIND="0.0.0.0:0")


def test_a_bad_routes_file_at_first_start_is_said_with_its_place(tmp_path):
    bad = small_routes("http://127.0.0.1:1")
    bad["categories"]["code"]["models"] = []

    with pytest.raises(AssertionError, match=r"\$\.categories\.code\.models: should be non-empty"):
        Service(tmp_path, bad)


def test_whole_and_stream_survive_an_upstream_that_closes_instead_of_chunking(service, upstream):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"
    as_stream = head % b"text/event-stream" + b"".join(events(["x"]))
    as_whole = head % b"application/json" + json.dumps(answer_body("y")).encode()
    upstream.scripts["acme/one"] = [
        lambda peer, request: peer.send(as_stream),
        lambda peer, request: peer.send(as_whole),
    ]

    assert service.chat(stream=True).content.endswith(DONE)
    assert service.chat().json()["choices"][0]["message"]["content"] == "y"
