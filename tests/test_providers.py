"""What providers really send: ends that are none, errors in disguise, labels that lie,
old pools."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from typing import Any

import pytest
from conftest import LocalClient, settings_for
from helpers import errors_of, failures, last_attempts, user, words_of
from service import PATIENT, small_routes
from upstream import (
    DONE,
    Peer,
    Request,
    Upstream,
    answer_body,
    chunk,
    error,
    events,
    hang,
    pieces,
    plain,
    raw,
    slow,
    sse,
    whole,
)

import router as module
from parts import table
from parts.chat import chat_of
from parts.dialects import CHAT
from parts.jsontext import parse_object
from parts.judge import FINISHES, finish_kind

GOOD = whole("good")
MODES: dict[str, dict[str, Any]] = {
    "json": {}, "live": {"stream": True},
    "whole": {"stream": True, "headers": {"X-Router-Stream": "whole"}},
}  # fmt: skip


def ask(client: LocalClient, mode: str, **more: Any) -> Any:
    return client.chat(**MODES[mode], **more)


# --- finish reasons ----


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("stop", "stop"), ("eos", "stop"), ("end_turn", "stop"), ("COMPLETE", "stop"),
        ("tool_calls", "calls"), ("length", "length"), ("MAX_TOKENS", "length"),
        ("max-output-tokens", "length"), ("content_filter", "filter"), ("SAFETY", "filter"),
        ("sensitive", "filter"), ("error", "failed"), ("abort", "failed"),
        ("network_error", "failed"), ("MALFORMED_FUNCTION_CALL", "failed"),
        ("insufficient_system_resource", "failed"), ("backend_overloaded", "failed"),
        ("timeout_reached", "failed"), ("cancelled_by_user", "failed"), ("natural", "unknown"),
        ("TimedOut", "failed"), ("exception", "failed"), ("FINISH_REASON_STOP", "stop"),
        ("FinishReason.SAFETY", "filter"), ("ContentFilter", "filter"), ("MaxTokens", "length"),
        ("", "open"), ("NULL", "open"), ("FINISH_REASON_UNSPECIFIED", "open"),
    ],
)  # fmt: skip
def test_a_finish_reason_says_what_it_says_in_any_spelling(reason, kind):
    assert finish_kind(reason) == kind


def test_every_finish_reason_of_the_table_is_told_by_its_own_name():
    assert {name: finish_kind(name) for name in FINISHES} == FINISHES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reason", ["error", "abort", "gateway_failure"])
def test_a_generation_that_says_it_failed_goes_on_to_the_next_model(client, upstream, mode, reason):
    upstream.scripts |= {"acme/one": whole(None, finish_reason=reason), "acme/two": GOOD}

    answer = ask(client, mode)

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert last_attempts(client)[0] == ("acme/one", "cut")
    assert failures(client) == {"acme/one": 1}


@pytest.mark.parametrize(("mode", "model"), [("json", "acme/two"), ("whole", "acme/two"),
                                             ("live", "acme/one")])  # fmt: skip
def test_half_an_answer_that_failed_is_never_a_success(client, upstream, mode, model):
    upstream.scripts |= {"acme/one": whole("half", finish_reason="network_error"), "acme/two": GOOD}

    answer = ask(client, mode)

    assert answer.headers["X-Router-Model"] == model
    assert bool(errors_of(answer.data)) == (mode == "live")
    assert (b"[DONE]" in answer.data) == (mode == "whole")


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_finish_reason_behind_an_answer_is_a_good_end_told_once(
    routes, upstream, mode, capsys
):
    client = LocalClient(module.create_app(settings_for(routes)))
    upstream.scripts["acme/one"] = whole("fine", finish_reason=f"natural_{mode}")

    answers = [ask(client, mode) for _ in range(2)]

    assert {answer.headers["X-Router-Model"] for answer in answers} == {"acme/one"}
    assert failures(client) == {}
    assert capsys.readouterr().err.count("event=finish_reason_unknown") == 1


@pytest.mark.parametrize("reason", ["", "null", "None"])
@pytest.mark.parametrize(("end", "is_whole"), [([], False), ([chunk({}, "stop")], True)])
def test_a_finish_reason_with_each_event_that_means_none_ends_nothing(
    client, upstream, reason, end, is_whole
):
    upstream.scripts["acme/one"] = pieces([chunk({"content": "a"}, reason), *end], "cut")

    answer = client.chat(stream=True)

    assert bool(errors_of(answer.data)) is not is_whole


def test_an_empty_answer_with_a_finish_that_is_none_gets_a_second_opinion(client, upstream):
    upstream.scripts |= {"acme/one": whole(None, finish_reason="in_progress"), "acme/two": GOOD}

    assert ask(client, "json").headers["X-Router-Model"] == "acme/two"


def choice(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
    return sse({"choices": [{"index": index, "delta": delta, "finish_reason": finish}]})


TWO = [choice(0, {"content": "a"}), choice(1, {"content": "b"}), choice(0, {}, "stop")]


@pytest.mark.parametrize(("end", "is_whole"), [([], False), ([choice(1, {}, "stop")], True),
                                               ([DONE], True)])  # fmt: skip
def test_of_two_choices_both_have_to_end(client, upstream, end, is_whole):
    upstream.scripts["acme/one"] = pieces(TWO + end, "cut")

    answer = client.chat(stream=True, n=2)

    assert bool(errors_of(answer.data)) is not is_whole


def test_done_behind_an_answer_without_a_finish_reason_is_an_end_in_whole_mode(client, upstream):
    upstream.scripts["acme/one"] = pieces([chunk({"content": "fine"}), DONE])

    answer = ask(client, "whole")

    assert (answer.headers["X-Router-Model"], words_of(answer.data)) == ("acme/one", "fine")


@pytest.mark.parametrize(("limit_s", "most_s"), [(0.5, 2.0), (30, 4.0)])
@pytest.mark.parametrize(("status", "outcome"), [(401, "unauthorized"), (503, "server_error")])
def test_the_status_is_the_verdict_though_its_text_never_ends(
    build, upstream, status, outcome, limit_s, most_s
):
    client = build(timeouts_sec={**PATIENT, "answer": limit_s})
    head = f"HTTP/1.1 {status} X\r\nContent-Length: 900\r\n\r\n{{"
    upstream.scripts |= {"acme/one": raw(head.encode(), "hang"), "acme/two": GOOD}
    began = time.monotonic()

    client.chat()

    assert time.monotonic() - began < most_s
    assert last_attempts(client)[0] == ("acme/one", outcome)


# --- errors in disguise ----


TOO_LONG = "the request exceeds the available context size"
DISGUISES = {
    "an error field": f'error: {{"code":400,"message":"{TOO_LONG}"}}\n\n'.encode(),
    "an error event": f'event: error\ndata: {{"message":"{TOO_LONG}"}}\n\n'.encode(),
    "an error event of words": f"event: error\ndata: {TOO_LONG}\n\n".encode(),
    "object error": sse({"object": "error", "message": TOO_LONG, "code": 400}),
    "type error": sse({"type": "error", "error": {"message": TOO_LONG}}),
    "error_type": sse({"choices": None, "error_type": "BadRequest", "error_message": TOO_LONG}),
    "a bare message": sse({"code": 400, "message": TOO_LONG}),
    "in a choice": sse({"choices": [{"index": 0, "delta": {}, "error": {"message": TOO_LONG}}]}),
}


@pytest.mark.parametrize("event", DISGUISES.values(), ids=DISGUISES)
def test_an_error_in_a_stream_is_one_in_whatever_clothes(client, upstream, event):
    upstream.scripts |= {"acme/one": pieces([event, DONE]), "acme/two": GOOD}

    answer = client.chat(stream=True)

    assert words_of(answer.data) == "good"
    assert last_attempts(client)[0] == ("acme/one", "context_length")


@pytest.mark.parametrize("event", DISGUISES.values(), ids=DISGUISES)
def test_behind_the_first_token_it_is_told_in_the_stream(client, upstream, event):
    upstream.scripts["acme/one"] = pieces([chunk({"content": "half"}), event, DONE])

    answer = client.chat(stream=True)

    assert errors_of(answer.data)
    assert b"[DONE]" not in answer.data


@pytest.mark.parametrize("told", [{}, {"message": "", "type": None, "code": None}, None, "", []])
def test_an_error_without_a_word_beside_an_answer_is_none(client, upstream, told):
    upstream.scripts["acme/one"] = plain(
        200, json.dumps({**answer_body("fine"), "error": told}).encode()
    )

    assert client.chat().headers["X-Router-Model"] == "acme/one"


# --- labels ----


def labelled(kind: str, body: bytes, status: str = "200 OK", more: str = "") -> Any:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n"
    return raw(head.encode() + body)


STREAM = b"".join(events(["fine"]))
WHOLE = json.dumps(answer_body("fine")).encode()


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/octet-stream", ""])
def test_a_stream_is_one_whatever_its_label(client, upstream, kind):
    upstream.scripts["acme/one"] = labelled(kind, b"\n\n" + STREAM)

    assert words_of(client.chat(stream=True).data) == "fine"


@pytest.mark.parametrize("kind", ["text/event-stream", "text/html", ""])
def test_a_whole_answer_is_one_whatever_its_label(client, upstream, kind):
    upstream.scripts["acme/one"] = labelled(kind, WHOLE)

    assert client.chat().headers["X-Router-Model"] == "acme/one"


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_an_error_instead_of_a_stream_is_read_whatever_its_label(client, upstream, kind):
    body = json.dumps({"error": {"message": TOO_LONG}}).encode()
    upstream.default = labelled(kind, body)

    answer = client.chat(stream=True)

    assert (answer.status_code, answer.json["error"]["message"]) == (400, TOO_LONG)


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "203 Non-Authoritative Information"])
@pytest.mark.parametrize("coding", ["none", "utf-8", "identity", "UTF8", ""])
def test_a_good_body_is_an_answer_in_each_good_status_and_without_a_coding(
    client, upstream, status, coding
):
    upstream.scripts["acme/one"] = labelled("x/y", WHOLE, status, f"Content-Encoding: {coding}\r\n")

    answer = client.chat()

    assert (answer.status_code, answer.headers["X-Router-Model"]) == (200, "acme/one")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "x-gzip", "gzip, identity"])
def test_a_coding_that_exists_is_refused(client, upstream, coding):
    upstream.scripts |= {
        "acme/one": labelled("x/y", WHOLE, more=f"Content-Encoding: {coding}\r\n"),
        "acme/two": GOOD,
    }

    assert client.chat().headers["X-Router-Model"] == "acme/two"


@pytest.mark.parametrize("body", [b"\xef\xbb\xbf" + WHOLE, WHOLE + b"\n\ndata: [DONE]\n\n",
                                  b"\n\n" + WHOLE])  # fmt: skip
def test_a_whole_answer_with_something_around_it_is_one(client, upstream, body):
    upstream.scripts["acme/one"] = labelled("application/json", body)

    assert client.chat().json["choices"] == answer_body("fine")["choices"]


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\n" * 1000])
def test_nothing_of_a_stream_is_lost_behind_a_bom_or_blank_lines(client, upstream, before):
    words = b"".join(chunk({"content": word}) for word in "ab") + DONE
    upstream.scripts["acme/one"] = pieces([before[:1], before[1:] + words])

    assert words_of(client.chat(stream=True).data) == "ab"


# --- tool calls in whole mode ----


def call(arguments: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def seconds_for(client: LocalClient, upstream: Upstream, n: int) -> float:
    """CPU time for a call whose arguments come in so many pieces."""
    more = calls(call("x" * 1000, index=0)) * n
    data = calls(call('"', index=0)) + more + calls(call('"', index=0)) + DONE
    upstream.scripts["acme/one"] = labelled("text/event-stream", data)
    began = time.process_time()
    assert ask(client, "whole").headers["X-Router-Model"] == "acme/one"
    return time.process_time() - began


def test_long_arguments_in_many_pieces_cost_no_more_for_each(build, upstream):
    client = build(timeouts_sec=PATIENT)
    short, long = (seconds_for(client, upstream, n) for n in (500, 8_000))

    assert long < 30 * short + 0.3


def calls(*tools: dict[str, Any]) -> bytes:
    return b"".join(chunk({"tool_calls": [tool]}) for tool in tools)


A, B = {"id": "a"}, {"id": "b"}
CALLS = {
    "two of one index": (calls(call('{"x":1}', index=0, **A), call('{"y":2}', index=0, **B)), True),
    "two without": (calls(call('{"x":1}', **A), call('{"y":2}', **B)), True),
    "two of none": (calls(call("{}", index=None, **A), call("{}", index=None, **B)), True),
    "in pieces": (calls(call('{"x"', index=0, **A), call(":1}", index=0)), True),
    "in pieces with its id": (calls(call('{"x"', index=0, **A), call(":1}", index=0, **A)), True),
    "pieces of two": (calls(call("{", index=0, **A), call("{", index=1, **B), call("}", index=0),
                            call("}", index=1)), True),
    "half a one": (calls(call('{"x":1}', index=0, **A), call('{"y"', index=0, **B)), False),
    "half without": (calls(call('{"x"', **A)), False),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "is_whole"), CALLS.values(), ids=CALLS)
def test_another_id_is_another_call(client, upstream, sent, is_whole):
    upstream.scripts |= {
        "acme/one": pieces([sent, chunk({}, "tool_calls"), DONE]),
        "acme/two": GOOD,
    }

    model = ask(client, "whole").headers["X-Router-Model"]

    assert model == ("acme/one" if is_whole else "acme/two")


# --- stream_options ----


def strict(peer: Peer, request: Request) -> Any:
    """Refuses what it does not know, as Mistral and Azure have done."""
    refused = "stream_options" in request.body
    places = {
        "detail": [{"loc": ["body", "stream_options", "include_usage"], "msg": "not permitted"}]
    }
    refusal = plain(422, json.dumps({"message": places}).encode())
    return (refusal if refused else whole("fine"))(peer, request)


def test_what_we_add_and_an_upstream_refuses_is_left_out_and_remembered(client, upstream):
    upstream.default = strict

    first, second = client.chat(stream=True), client.chat(stream=True)

    assert words_of(first.data) == words_of(second.data) == "fine"
    asked = ["stream_options" in request.body for request in upstream.requests]
    assert asked == [True, False, False]
    assert failures(client) == {}


def test_usage_in_streams_false_says_it_beforehand(tmp_path, upstream):
    local = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY", "usage_in_streams": False}
    routes = small_routes(upstream.url, upstreams={"local": local})
    (tmp_path / "routes.json").write_text(json.dumps(routes))
    client = LocalClient(module.create_app(settings_for(tmp_path / "routes.json")))

    client.chat(stream=True)

    assert "stream_options" not in upstream.requests[-1].body
    assert client.get("/config").json["upstreams"]["local"]["usage_in_streams"] is False


@pytest.mark.parametrize(
    ("text", "usage", "wanted"),
    [
        ('"stream":true,"a":1', "ask",
         '"stream_options": {"include_usage": true}, "stream":true,"a":1'),
        ('"stream":true,"stream_options":{"include_usage":true}', "ask",
         '"stream":true,"stream_options":{"include_usage":true}'),
        ('"stream":true, "stream_options" : {} , "a":1', "drop", '"stream":true, "a":1'),
        ('"stream":true,"a":1 , "stream_options":{"x":1}', "drop", '"stream":true,"a":1 '),
        ('"stream_options":{},"stream":true', "drop", '"stream":true'),
        ('"stream":true,"stream_options":{"x":1}', "leave",
         '"stream":true,"stream_options":{"x":1}'),
        ('"é":"é","stream_options":{"é":1},"stream":true', "drop", '"é":"é","stream":true'),
    ],
)  # fmt: skip
def test_the_body_is_changed_no_more_than_it_has_to_be(text, usage, wanted):
    data = f"{{{text}}}".encode()
    chat = chat_of(data, *parse_object(data), CHAT)
    chat.note_wishes()

    sent = b"".join(
        chat.for_model(table.Model("m", table.Upstream("u", "http://u")), usage)
    ).decode()

    assert sent == f'{{"model": "m", {wanted}}}'


# --- kept connections ----


def kept_then(upstream: Any, dies: Any) -> Any:
    """A script that answers the first request of each connection, and lets `dies` have the next."""
    seen: set[int] = set()

    def script(peer: Peer, request: Request) -> Any:
        if id(peer.sock) in seen:
            return dies(peer, request)
        seen.add(id(peer.sock))
        upstream.kept.append(peer.sock)
        return whole("fine")(peer, request)

    upstream.kept = []  # so that no id is given twice
    return script


def reset_at_once(peer: Peer, request: Request) -> None:
    peer.reset()


def close_at_once(peer: Peer, request: Request) -> bool:
    return False


@pytest.mark.parametrize("mode", ["json", "live"])
@pytest.mark.parametrize("dies", [reset_at_once, close_at_once, hang])
def test_a_kept_connection_that_is_dead_costs_one_quiet_retry_and_no_strike(
    client, upstream, mode, dies
):
    upstream.scripts["acme/one"] = kept_then(upstream, dies)
    ask(client, mode)

    answer = ask(client, mode)

    assert answer.headers["X-Router-Model"] == "acme/one"
    assert last_attempts(client) == [("acme/one", "success")]
    assert failures(client) == {}


def test_a_burst_over_dead_connections_loses_nothing(service, upstream):
    upstream.scripts["acme/one"] = slow(0.05, kept_then(upstream, reset_at_once))

    def burst(n: int) -> list[int]:
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(service.chat().status_code))
                   for _ in range(n)]  # fmt: skip
        [thread.start() for thread in threads]
        [thread.join(20) for thread in threads]
        return found

    burst(8)

    assert burst(8) == [200] * 8
    assert service.get("/metrics").json()["circuit_breaker"]["failures"] == {}


def test_a_request_is_never_sent_more_than_twice(client, upstream):
    upstream.scripts |= {"acme/one": kept_then(upstream, reset_at_once), "acme/two": GOOD}
    client.chat()
    upstream.scripts["acme/one"] = [upstream.scripts["acme/one"], reset_at_once]

    client.chat()

    assert [request.model for request in upstream.requests[1:]] == [
        "acme/one",
        "acme/one",
        "acme/two",
    ]


def test_a_model_that_was_silent_for_long_and_then_dropped_is_not_asked_again(
    routes, upstream, clock
):
    client = LocalClient(module.create_app(settings_for(routes), clock=clock))

    def late(peer: Peer, request: Request) -> None:
        clock.now += 0.9 if request.model == "quick" else 1.5
        peer.reset()

    upstream.scripts |= {"acme/one": late, "acme/two": GOOD}

    answer = client.chat()

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert [request.model for request in upstream.requests] == ["acme/one", "acme/two"]


def test_it_is_asked_again_when_nobody_else_is_left(routes, upstream, clock):
    client = LocalClient(module.create_app(settings_for(routes), clock=clock))

    def late(peer: Peer, request: Request) -> None:
        clock.now += 1.5
        peer.reset()

    upstream.scripts["acme/two"] = [late, GOOD]

    assert client.chat(model="acme/two").status_code == 200


def test_our_own_shortage_is_a_503_and_no_strike(client, upstream, monkeypatch):
    def no_descriptor(*args: Any, **kwargs: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("urllib3.util.connection.create_connection", no_descriptor)

    answer = client.chat()

    assert (answer.status_code, answer.json["error"]["code"]) == (503, "shortage")
    assert "too many open files" in answer.json["error"]["message"]
    assert failures(client) == {}
    assert upstream.requests == []


def test_a_name_that_cannot_be_looked_up_for_want_of_a_descriptor_is_a_shortage(tmp_path):
    (tmp_path / "routes.json").write_text(json.dumps(small_routes("http://model.invalid/v1")))
    client = LocalClient(module.create_app(settings_for(tmp_path / "routes.json")))
    client.chat()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = [os.dup(2)]
    while held[-1] <= top:  # until every number below is taken
        held.append(os.dup(2))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1, hard))
        answer = client.chat()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        [os.close(fd) for fd in held]

    assert (answer.status_code, answer.json["error"]["code"]) == (503, "shortage")


# --- what counts as alive ----


@pytest.mark.parametrize(
    "noise",
    [b": alive\n\n", b"data: nonsense\n\n", chunk({}), chunk({"content": ""}),
     sse({"choices": [], "usage": {"prompt_tokens": 1}}), b"data: " + b"[" * 2000 + b"\n\n"],
    ids=["comment", "malformed", "empty", "no words", "withheld", "deep"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["live", "whole"])
def test_only_what_the_client_gets_wins_time(service, upstream, noise, mode):
    beat = [noise, 0.2] * 20
    upstream.scripts["acme/one"] = pieces([chunk({"content": "word"}), *beat], "hang")

    answer = service.chat(stream=True, headers=MODES[mode].get("headers"))
    data = answer.content

    outcome = service.get("/metrics").json()["recent_requests"][0]["attempts"][0]["outcome"]
    assert outcome == "idle"
    assert words_of(data) == ("word" if mode == "live" else "Hello from upstream")


# --- framing ----


def test_an_early_refusal_is_seen_while_the_body_is_still_being_sent(client, monkeypatch, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"error": {"message": "the prompt is too long, use fewer tokens"}}).encode()

    def refuse() -> None:
        for _ in range(2):
            peer, _ = listener.accept()
            peer.recv(100)
            peer.sendall(b"HTTP/1.1 413 X\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            peer.settimeout(5)
            while peer.recv(65536):
                pass
            peer.close()

    threading.Thread(target=refuse, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    (tmp_path / "routes.json").write_text(json.dumps(small_routes(url)))
    small = LocalClient(module.create_app(settings_for(tmp_path / "routes.json")))

    answer = small.post("/v1/chat/completions", {"messages": [user("x" * 8_000_000)]})

    listener.close()
    assert answer.status_code in (400, 413)
    assert "too long" in answer.json["error"]["message"]


def test_a_failed_attempt_keeps_nothing_of_what_it_read(client, upstream):
    big = chunk({"content": "x" * 1_000_000})
    upstream.scripts |= {"acme/one": pieces([big, big], "cut"), "acme/two": error(500)}
    held: list[Any] = []
    owner = client.app.extensions["router"]
    told = owner._without_answer
    owner._without_answer = lambda call, failures: (
        held.extend(f.relay for f in failures) or told(call, failures)
    )

    ask(client, "whole")

    assert held
    assert set(held) == {None}


def test_unasked_bytes_close_a_kept_connection(client, upstream):
    def one_too_many(peer: Peer, request: Request) -> bool:
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE)
        threading.Timer(
            0.05, peer.send, [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"]
        ).start()
        return True

    upstream.scripts["acme/one"] = [one_too_many, GOOD]
    before = upstream.connections
    client.chat()
    threading.Event().wait(0.2)

    answer = client.chat()

    assert answer.json["choices"][0]["message"]["content"] == "good"
    assert upstream.connections == before + 2


def test_sockets_to_upstreams_notice_a_peer_that_is_gone(client, upstream, monkeypatch):
    seen: list[int] = []
    connect = socket.socket.connect

    def note(sock: socket.socket, address: Any) -> None:
        seen.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", note)

    client.chat()

    assert seen
    assert all(seen)


def test_an_upstream_that_is_just_slow_is_not_asked_twice(client, upstream):
    upstream.scripts["acme/one"] = slow(0.55, GOOD)

    for _ in range(2):
        client.chat()

    assert [request.model for request in upstream.requests] == ["acme/one", "acme/one"]
