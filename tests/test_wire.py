"""The wire: server-sent events as they are cut into packets, and flights that can be ended."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import trustme
from conftest import Clock, LocalClient
from helpers import (
    CHAT,
    close,
    figures,
    half_close,
    in_flight,
    no_thread,
    pair_of_sockets,
    user,
    wait_until,
)
from upstream import Upstream, chunk, events, hang, pieces, raw, stream, whole
from werkzeug.test import EnvironBuilder

from parts.dialects import ChatAnswer
from parts.errors import Failure, Full
from parts.events import MAX_EVENT, Event, EventReader, parse_event
from parts.exchange import MAX_ANSWER, Endpoint, Reply, new_session, read_whole
from parts.flights import _LEFT, Flight, Flights

SMALL = b'{"model": "acme/one", "messages": []}'


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read_batches(chunks: Iterable[bytes]) -> Iterator[list[Event]]:
    """Complete events as they come; those that came together stay together."""
    reader = EventReader()
    for data in chunks:
        if batch := reader.feed(data):
            yield batch
    if batch := reader.rest():
        yield batch


def read_events(chunks: Iterable[bytes]) -> Iterator[Event]:
    return (event for batch in read_batches(chunks) for event in batch)


def kinds(data: bytes) -> list[str]:
    return [event.kind for event in read_events([data])]


# --- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_characters_cut_across_packets_stay_whole(size):
    sent = 'data: {"a": "é€😀"}\n\n'.encode() * 3

    found = list(read_events(in_pieces(sent, size)))

    assert [event.data for event in found] == [{"a": "é€😀"}] * 3
    assert b"".join(event.raw for event in found) == sent


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_the_standard_ends_an_event_once(end, size):
    sent = (b'data: {"n": 1}' + end * 2) * 2 + b"data: [DONE]" + end * 2

    found = list(read_events(in_pieces(sent, size)))

    assert [event.kind for event in found] == ["data", "data", "done"]
    assert b"".join(event.raw for event in found) == sent


def test_an_event_is_there_before_the_next_packet_comes():
    packets = iter([b'data: {"n": 1}\n\ndata: {"n"', b": 2}\n\n"])
    found = read_events(packets)

    first = next(found)

    assert first.data == {"n": 1}
    assert next(packets) == b": 2}\n\n"


def test_several_data_lines_are_one_value():
    event = parse_event(b'event: x\ndata: {"a":\ndata:  1}\nid: 7\n\n')

    assert event.kind == "data"
    assert event.data == {"a": 1}


@pytest.mark.parametrize(
    ("tail", "kind"), [(b"data: [DONE]", "done"), (b'data: {"n":', "malformed")]
)
def test_a_tail_without_its_blank_line_counts(tail, kind):
    found = list(read_events([b'data: {"n": 1}\n\n' + tail]))

    assert [event.kind for event in found] == ["data", kind]
    assert found[-1].raw == tail + b"\n\n"


@pytest.mark.parametrize(
    ("raw", "kind"),
    [(b": OPENROUTER PROCESSING\n\n", "comment"), (b"event: ping\n\n", "comment"),
     (b"retry: 10\n\n", "comment"), (b"id: 1\n\n", "comment"),
     (b': note\ndata: {"n": 1}\n\n', "data")],
)  # fmt: skip
def test_what_holds_no_data_is_a_comment(raw, kind):
    assert kinds(raw) == [kind]


@pytest.mark.parametrize(
    "raw",
    [b"data: {oops\n\n", b"data: [1]\n\n", b'data: "text"\n\n', b"data: \xff\xfe\n\n",
     b"<html>\n\n", b"data: " + b"[" * 100_000 + b"\n\n"],
)  # fmt: skip
def test_what_is_no_object_is_malformed_and_no_error(raw):
    assert kinds(raw + b'data: {"n": 1}\n\n') == ["malformed", "data"]


def test_an_event_beyond_all_measure_is_refused_before_it_is_complete(monkeypatch):
    monkeypatch.setattr("parts.events.MAX_EVENT", 1000)
    endless = iter([b"data: " + b"x" * 600, b"x" * 600, b"never asked for"])

    with pytest.raises(Failure) as caught:
        list(read_events(endless))

    assert caught.value.outcome == "not_an_answer"
    assert next(endless) == b"never asked for"


def test_many_small_events_may_be_larger_together_than_one_may_be(monkeypatch):
    monkeypatch.setattr("parts.events.MAX_EVENT", 1000)

    assert len(list(read_events([b'data: {"n": 1}\n\n' * 500]))) == 500


def seconds_to_read(size: int) -> float:
    sent = b'data: {"a": "' + b"x" * size + b'"}\n\n'
    before = time.thread_time()
    assert len(list(read_events(in_pieces(sent, 8)))) == 1
    return time.thread_time() - before


def test_a_trickled_event_is_read_in_linear_time():
    small = min(seconds_to_read(100_000) for _ in range(3))

    large = seconds_to_read(800_000)

    assert large < 8 * small * 3


def large(delta: dict, *, escaped: bool = True) -> bytes:
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=escaped)
    return b"data: " + text.encode() + b"\n\n"


N = 2 << 20
LARGE_EVENTS = {
    "a picture": large({"content": "![](data:image/png;base64," + "iVBORw0KGgo" * (N // 11) + ")"}),
    "line ends": large({"content": "\n" * (N // 2)}),
    "quotes": large({"content": '"' * (N // 2)}),
    "accents": large({"content": "é" * (N // 2)}, escaped=False),
    "escapes": large({"content": "é" * (N // 6)}),
    "one emoji": large({"content": "a" * N + "😀"}, escaped=False),
    "one emoji, escaped": large({"content": "a" * N + "😀"}),
    "thoughts": large({"reasoning_content": "a" * N + "😀"}),
    "an image part": large({"images": [{"image_url": {"url": "a" * N}}]}),
    "audio": large({"audio": {"data": "a" * N}}),
}  # fmt: skip


@pytest.mark.parametrize("sent", LARGE_EVENTS.values(), ids=LARGE_EVENTS)
def test_a_large_event_takes_at_most_four_times_its_bytes(sent):
    reader, found = EventReader(ChatAnswer.words, ChatAnswer("m").adds_words), []
    tracemalloc.start()
    for piece in in_pieces(sent, 65536):
        found += reader.feed(piece)
    like = reader.is_more(sent)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert [event.kind for event in found] == ["data"]
    assert found[0].raw == sent
    assert any(found[0].data["choices"][0]["delta"].values())
    assert like == ("content" in found[0].data["choices"][0]["delta"])
    assert peak < 4 * len(sent)  # the text alone was 120 times, when it was matched to go back


@pytest.mark.parametrize(
    "sent",
    [b"data: {" + b'"a":[' + b"{}," * N + b"{}]}\n\n", b"data: 1\n" * (N // 8) + b"\n",
     large({"content": "a" * N})[:-9] + b"\xff" + b'"}}]}\n\n', b": x\n" * (N // 4) + b"\n"],
    ids=["objects", "lines", "no UTF-8", "comments"],
)  # fmt: skip
def test_a_large_event_that_would_take_many_times_its_bytes_is_malformed(sent):
    tracemalloc.start()
    found = EventReader().feed(sent)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert [event.kind for event in found] == ["malformed"]
    assert peak < 8 * len(sent)


def test_what_is_asked_of_a_large_event_is_read_although_its_words_are_not():
    arguments = json.dumps({"path": "a" * 200_000})
    call = {"index": 0, "function": {"name": "write", "arguments": arguments}}
    body = {"choices": [{"delta": {"content": "a" * 200_000, "tool_calls": [call]},
                         "finish_reason": "stop"}], "usage": {"prompt_tokens": 7}}  # fmt: skip

    data = parse_event(b"data: " + json.dumps(body).encode() + b"\n\n").data

    assert data["choices"][0]["delta"]["tool_calls"] == [call]
    assert data["choices"][0]["finish_reason"] == "stop"
    assert data["usage"] == {"prompt_tokens": 7}


def test_the_largest_event_is_as_large_as_the_largest_whole_answer():
    assert MAX_EVENT == MAX_ANSWER


# --- flights -------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with pair_of_sockets() as both:
        yield both


@pytest.fixture
def flights(clock: Clock) -> Flights:
    return Flights(16, clock)


@pytest.fixture
def fly(flights: Flights, clock: Clock) -> Any:
    """Makes flights that are in the air."""

    def made(client: Any = None) -> Flight:
        flight = Flight(client, clock)
        flights.acquire(flight)
        return flight

    return made


def test_a_flight_that_nobody_can_watch_takes_no_permit(flights, clock, monkeypatch):
    no_thread(monkeypatch, "watcher")

    with pytest.raises(RuntimeError):
        flights.acquire(Flight(None, clock))

    assert len(flights) == 0


def test_a_flight_ends_when_the_clock_passes_its_limit(flights, fly, clock):
    flight = fly()
    flight.due = clock() + 30, "idle"

    flights.look()
    before = flight.why
    clock += 30
    flights.look()

    assert (before, flight.why) == (None, "idle")


def test_the_first_reason_stays(clock):
    flight = Flight(None, clock)

    flight.end("first_token")
    flight.end("client_left")

    assert flight.why == "first_token"


@pytest.mark.parametrize(
    ("why", "after"),
    [("client_left", "client_left"), ("total", "total"), ("first_token", None), ("answer", None),
     ("idle", None), ("classify", None)],
)  # fmt: skip
def test_the_next_attempt_forgets_what_ended_the_last_one_but_not_the_request(clock, why, after):
    flight = Flight(None, clock)
    flight.end(why)

    flight.next_attempt()

    assert flight.why == after
    assert flight.due[0] > clock() + 1e9


def test_a_deadline_that_was_replaced_fells_nothing(clock):
    flight = Flight(None, clock)
    flight.due = clock() + 1, "first_token"
    read_before = flight.due
    flight.due = clock() + 60, "idle"

    flight.end("first_token", read_before)

    assert flight.why is None


def test_a_wait_ends_with_the_flight(clock):
    flight = Flight(None, clock)
    waiter = threading.Thread(target=flight.wait, args=(60,))
    waiter.start()

    flight.end("client_left")
    waiter.join(5)

    assert not waiter.is_alive()


def wait(sock: socket.socket) -> None:
    pass


def send_ahead(sock: socket.socket) -> None:
    sock.sendall(b"GET /")


@pytest.mark.parametrize("has_rdhup", [True, False])
@pytest.mark.parametrize(
    ("does", "why"),
    [(close, "client_left"), (half_close, "client_left"), (send_ahead, None), (wait, None)],
)
def test_a_client_that_closes_or_half_closes_has_left(
    flights, fly, pair, does, why, has_rdhup, monkeypatch
):
    monkeypatch.setattr("parts.flights._LEFT", _LEFT if has_rdhup else 0)
    flight = fly(pair[0])

    does(pair[1])
    flights.look()

    assert flight.why == why


def test_the_watcher_sees_a_client_leave_without_being_asked(pair):
    flights, flight = Flights(16), Flight(pair[0], time.monotonic)
    flights.acquire(flight)

    pair[1].close()

    wait_until(lambda: flight.why == "client_left", 1.0)


def test_permits_are_as_many_as_the_threads_less_the_reserve(clock):
    flights = Flights(10, clock)
    flights.acquire(Flight(None, clock))
    flights.acquire(Flight(None, clock))

    with pytest.raises(Full, match="2 requests"):
        flights.acquire(Flight(None, clock))

    assert len(flights) == 2
    assert Flights(1, clock).limit == 1  # few threads still give one


def test_a_landed_flight_gives_its_permit_back_once(flights, fly):
    first = fly()

    flights.release(first)
    flights.release(first)
    fly()

    assert len(flights) == 1


def test_a_landed_flight_is_not_ended_any_more(flights, fly, pair):
    flight = fly(pair[0])
    flight.attach(pair[1])

    flights.release(flight)
    flight.end("client_left")
    pair[1].sendall(b"x")

    assert pair[0].recv(1) == b"x"


def test_one_flight_that_cannot_be_watched_does_not_keep_the_others_alive(flights, fly, pair):
    broken, healthy = fly(object()), fly(pair[0])

    pair[1].close()

    with contextlib.ExitStack() as at_end:
        at_end.callback(flights.release, broken)
        wait_until(lambda: healthy.why == "client_left", 1.0)


# --- the traps of hanging up --------------------------------------------------------------------


@pytest.fixture
def line(upstream: Upstream) -> Endpoint:
    return Endpoint(new_session(4), upstream.url + "/chat/completions", {})


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as found:
        yield found


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"


def send_in_thread(url: str, flight: Flight, connect_s: float = 10.0) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    found = pool.submit(Endpoint(new_session(4), url, {}).send, [SMALL], flight, connect_s)
    pool.shutdown(wait=False)
    return found


def outcome_of(sent: Future[Any], seconds: float) -> str:
    with pytest.raises(Failure) as caught:
        sent.result(seconds)
    return caught.value.outcome


def test_a_late_shutdown_does_not_fell_the_next_request_on_the_connection(line, upstream, clock):
    before, first, second = upstream.connections, Flight(None, clock), Flight(None, clock)
    read_whole(line.send([SMALL], first, 2))
    response = line.send([SMALL], second, 2)

    first.end("client_left")
    answer = read_whole(response)

    assert b"Hello from upstream" in answer
    assert upstream.connections == before + 1


def test_a_connection_shut_down_while_it_was_read_is_not_used_again(line, clock):
    first, second = Flight(None, clock), Flight(None, clock)
    response = line.send([SMALL], first, 2)

    first.end("client_left")
    with pytest.raises(Failure, match="client_left"):
        read_whole(response)
    response.close()

    assert b"Hello" in read_whole(line.send([SMALL], second, 2))


@pytest.mark.parametrize("script", [stream(["a ", "b "]), whole("x"), pieces([*events(["a "])])])
def test_a_call_read_to_its_end_leaves_its_connection_for_the_next(line, upstream, clock, script):
    upstream.default = script
    before = upstream.connections

    for flight in (Flight(None, clock), Flight(None, clock)):
        read_whole(line.send([SMALL], flight, 2))

    assert upstream.connections == before + 1


@pytest.mark.parametrize("script", [hang, pieces([chunk({"content": "a"})], after="hang")])
def test_a_silent_upstream_is_left_with_the_flight_and_sees_it(line, upstream, clock, script):
    upstream.default, flight = script, Flight(None, clock)
    threading.Timer(0.05, flight.end, ["idle"]).start()

    with pytest.raises(Failure, match="idle"):
        read_whole(line.send([SMALL], flight, 2))

    wait_until(lambda: upstream.left, 1.0)


def test_a_flight_over_before_its_connection_sends_nothing(clock, listener):
    flight = Flight(None, clock)
    flight.end("client_left")

    sent = send_in_thread(url_of(listener), flight)
    peer, _ = listener.accept()

    assert peer.recv(1000) == b""
    assert outcome_of(sent, 5) == "client_left"
    peer.close()


def test_a_connect_under_way_is_let_go_when_it_succeeds_too_late(clock, listener):
    filler = socket.create_connection(listener.getsockname())  # the backlog is full from here on
    flight = Flight(None, clock)
    sent = send_in_thread(url_of(listener), flight)

    flight.end("client_left")
    with filler, listener.accept()[0], listener.accept()[0] as late:
        seen = late.recv(1000)

    assert seen == b""
    assert outcome_of(sent, 5) == "client_left"


def test_a_connect_under_way_ends_at_its_own_limit(clock, listener):
    flight = Flight(None, clock)
    filler = socket.create_connection(listener.getsockname())

    sent = send_in_thread(url_of(listener), flight, connect_s=0.3)

    assert outcome_of(sent, 2) == "connect"
    filler.close()


def test_a_tls_handshake_under_way_ends_with_its_flight(clock, listener):
    flight = Flight(None, clock)
    sent = send_in_thread(url_of(listener, "https"), flight)
    with listener.accept()[0] as peer:
        hello = peer.recv(5)

        flight.end("client_left")

        assert outcome_of(sent, 1) == "client_left"
    assert hello[:1] == b"\x16"


def test_a_tls_handshake_that_never_ends_is_a_connect_failure(clock, listener):
    sent = send_in_thread(url_of(listener, "https"), Flight(None, clock), connect_s=0.3)

    assert outcome_of(sent, 3) in ("connect", "tls")


def start_only(client: LocalClient, **more: Any) -> Any:
    """The answer's iterable, of which nothing was taken, as when the client is gone by then."""
    body = {"model": "router", "messages": [user("x")], **more}
    environ = EnvironBuilder(CHAT, method="POST", json=body).get_environ()
    return client.app.wsgi_app(environ, lambda status, headers, exc_info=None: lambda data: None)


def test_a_stream_that_never_started_gives_everything_back_and_is_no_strike(client, upstream):
    upstream.default = pieces([chunk({"content": "a"})], after="hang")

    start_only(client, stream=True).close()

    wait_until(lambda: upstream.left, 1.0)
    assert in_flight(client) == 0
    assert figures(client)["requests"]["cancelled"] == 1
    assert client.router.breakers.snapshot()["acme/one"]["strikes"] == 0


def test_closing_an_answer_twice_books_it_once(client):
    answer = start_only(client)

    answer.close()
    answer.close()

    assert figures(client)["requests"]["success"] == 1


# --- heads of answers, and proxies ---------------------------------------------------------------


@contextlib.contextmanager
def answered(data: bytes) -> Iterator[Reply]:
    """The answer that these bytes are, its head read; then the upstream closes."""
    with pair_of_sockets() as (ours, theirs):
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        answer = Reply(ours, Flight(None, time.monotonic))
        answer.begin()
        yield answer


def test_a_head_is_read_in_all_its_forms():
    data = (
        b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"
        b"HTTP/1.1 429 Too Many\r\nRetry-After:  7 \r\n"
        b"X-Folded: a\r\n b\r\nno colon\r\ncontent-LENGTH: 5\r\nX-Folded: c\nX-\xe9: \xe9\r\n\r\n"
        b"hello"
    )

    with answered(data) as answer:
        assert (answer.status_code, answer.length) == (429, 5)
        assert answer.headers["retry-after"] == "7"
        assert answer.headers["x-folded"] == "a, b, c"
        assert not answer.will_close
        assert answer.read1() == b"hello"


@pytest.mark.parametrize(
    ("head", "length", "will_close"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", None, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED", None, False),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive", None, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 5", 5, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0005", 5, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5", 5, False),
        (b"HTTP/1.1 204 OK\r\nTransfer-Encoding: chunked", 0, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: Close", 5, True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5", 5, True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive", 5, False),
        (b"HTTP/1.1 204 OK\r\nContent-Length: 5", 0, False),
        (b"HTTP/1.1 200 OK", None, True),
    ],
)
def test_how_an_answer_ends_is_told_by_its_head(head, length, will_close):
    with answered(head + b"\r\n\r\n") as answer:
        assert (answer.length, answer.will_close) == (length, will_close)


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
     b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
     *(b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n"
       for length in (b"-5", b"+5", b"5a", b"0x5", b"", b"5 5", b"9" * 16, b"\xb2")),
     *(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + coding + b"\r\nContent-Length: 5\r\n\r\n"
       for coding in (b"gzip, chunked", b"chunked, chunked", b"xchunked", b"gzip", b"")),
     b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"ICY 200 OK\r\n\r\n", b""],
)  # fmt: skip
def test_a_head_that_is_none_is_refused(data):
    with pytest.raises((Failure, OSError)), answered(data):
        pass


def test_head_and_body_leave_in_one_piece(line, clock, monkeypatch):
    sent = []
    sendmsg = socket.socket.sendmsg

    def note(sock, data, *more):
        sent.append(data)
        return sendmsg(sock, data, *more)

    monkeypatch.setattr(socket.socket, "sendmsg", note)

    with contextlib.closing(line.send([SMALL], Flight(None, clock), 2)) as response:
        read_whole(response)

    [mine] = [b"".join(data) for data in sent if data[-1] == SMALL]
    assert mine.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:")


class Proxy:
    """Passes bytes on to `target`, whoever is asked for; keeps the first line it was sent."""

    def __init__(self, target: tuple[str, int]):
        self.asked: list[bytes] = []
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            head = client.recv(65536)
            self.asked.append(head)
            if head.startswith(b"CONNECT "):
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                server.sendall(head)
            back = threading.Thread(target=self._pump, args=(server, client))
            back.start()
            self._pump(client, server)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_of_the_environment_is_used(upstream, clock, monkeypatch, tmp_path, scheme):
    authority, context = trustme.CA(), None
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    if scheme == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("model.test").configure_cert(context)
    server = Upstream(context)
    proxy = Proxy(("127.0.0.1", int(server.url.rpartition(":")[2].partition("/")[0])))
    monkeypatch.setenv(f"{scheme}_proxy", proxy.url.replace("//", "//user:word@"))
    line = Endpoint(new_session(4), f"{scheme}://model.test/v1/chat/completions",
                {"REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem")}, key="k")  # fmt: skip
    try:
        for _ in range(2):  # the second over the same connection
            with contextlib.closing(line.send([SMALL], Flight(None, clock), 5)) as response:
                assert b"choices" in read_whole(response)
    finally:
        proxy.close()
        server.close()

    [asked] = proxy.asked
    first = {"http": b"POST http://model.test/v1/chat/completions HTTP/1.1\r\n",
             "https": b"CONNECT model.test:443 HTTP/1."}[scheme]  # fmt: skip
    assert asked.startswith(first)
    assert b"proxy-authorization: basic " in asked.lower()
    assert (b"bearer k" in asked.lower()) == (scheme == "http")
    assert [request.headers["host"] for request in server.requests] == ["model.test"] * 2
    assert all("proxy-authorization" not in r.headers for r in server.requests if scheme == "https")


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("size", "trailer"), [(1, b""), (2, b"X-Sum: 1\r\n"), (3, b""), (7, b"X-Sum: 1\r\n"),
                          (65536, b""), (65536, b"X-Sum: 1\r\n")]
)  # fmt: skip
def test_a_chunked_body_is_put_together_however_it_comes(size, trailer):
    body = b"".join(b"%x;e=1\r\n%s\r\n" % (n, b"\r\n"[:n] + b"x" * (n - 2)) for n in (1, 2, 3, 300))
    with answered(CHUNKED + body + b"0\r\n" + trailer + b"\r\n") as answer:
        parts = list(iter(lambda: answer.read1(size), b""))

    assert b"".join(parts) == b"\r" + b"\r\n" + b"\r\nx" + b"\r\n" + b"x" * 298
    assert answer.is_whole


@pytest.mark.parametrize(
    "body",
    [b"3\r\nab", b"3\r\nabc\r\n", b"x\r\nabc", b"-3\r\nabc", b"\r\n", b"1" * 70_000, b"0\r\n"],
)
def test_a_chunked_body_that_breaks_off_or_lies_is_cut(body):
    with answered(CHUNKED + body) as answer:
        with pytest.raises(Failure, match="cut"):
            while answer.read1(65536):
                pass
        assert not answer.is_whole


def test_events_that_came_together_are_told_together():
    sent = b'data: {"n": 1}\n\n' * 3

    batches = list(read_batches([sent, sent[:20], sent[20:]]))

    assert [len(batch) for batch in batches] == [3, 1, 2]


def test_bytes_behind_an_answer_close_its_connection(line, upstream, clock):
    upstream.default = raw(CHUNKED + b"2\r\n{}\r\n0\r\n\r\nHTTP/1.1 200 OK", after="hang")
    before = upstream.connections

    for flight in (Flight(None, clock), Flight(None, clock)):
        assert read_whole(line.send([SMALL], flight, 2)) == b"{}"

    assert upstream.connections == before + 2


def test_a_path_beyond_ascii_is_sent_percent_encoded(upstream, clock):
    line = Endpoint(new_session(4), upstream.url + "/é€/v1", {})

    with contextlib.closing(line.send([SMALL], Flight(None, clock), 2)):
        assert upstream.requests[-1].path.endswith("/%C3%A9%E2%82%AC/v1")
