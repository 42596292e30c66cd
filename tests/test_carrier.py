"""The carrier: streams passed on in one thread, with slow clients and ends of all kinds."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from helpers import wait_until

from parts.carrier import Carried, Carrier
from parts.dialects import ChatAnswer
from parts.errors import Failure
from parts.events import EventReader, shape_of
from parts.exchange import Reply
from parts.flights import Flight
from parts.relay import Relay

MUCH = b"x" * 2_000_000


class Ends:
    """Both ends of a stream: what the test is to the carrier, upstream and client."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.upstream, self.source = socket.socketpair()
        self.sink, self.client = socket.socketpair()
        self.client.settimeout(5)
        self.waits: list[str] = []

    def carry(self, take: Callable[[bytes], Any], chunked: bool = False,
              same: Callable[[bytes], bytes] = lambda data: b"") -> Future[None]:  # fmt: skip
        stream = Carried(self.source, self.sink, same, take, self.waits.append, chunked)
        pool = ThreadPoolExecutor(1)
        found: Future[None] = pool.submit(self.carrier.carry, stream)
        pool.shutdown(wait=False)
        return found

    def send_much(self) -> threading.Thread:
        """More than the sockets hold, while the client reads nothing."""
        sender = threading.Thread(target=self.upstream.sendall, args=(MUCH + b".",))
        sender.start()
        return sender

    def close(self) -> None:
        for sock in (self.upstream, self.source, self.sink, self.client):
            sock.close()


@pytest.fixture(scope="module")
def carrier() -> Carrier:
    return Carrier()


@pytest.fixture
def ends(carrier: Carrier) -> Iterator[Ends]:
    found = Ends(carrier)
    yield found
    found.close()


other = ends  # of a second stream


def until_dot(data: bytes) -> tuple[bytes, bool]:
    if not data:
        raise Failure("cut")
    return data, data.endswith(b".")


def never(data: bytes) -> bytes:
    return b""


def but_dots(data: bytes) -> bytes:
    return b"" if b"." in data else data


def read(sock: socket.socket, size: int) -> bytes:
    out = b""
    while len(out) < size and (more := sock.recv(65536)):
        out += more
    return out


def test_what_comes_is_passed_on_at_once_and_the_last_ends_it(ends):
    done = ends.carry(until_dot)

    for said in (b"one ", b"two ", b"three."):
        ends.upstream.sendall(said)
        assert ends.client.recv(100) == said

    assert done.result(5) is None


def test_pieces_are_framed_as_chunks(ends):
    done = ends.carry(until_dot, chunked=True)

    ends.upstream.sendall(b"0123456789abcde.")

    assert done.result(5) is None
    assert ends.client.recv(100) == b"10\r\n0123456789abcde.\r\n"


def test_what_is_said_to_be_the_same_goes_on_as_told_and_the_rest_is_taken(ends):
    done = ends.carry(
        until_dot, chunked=True, same=lambda data: data * 2 if set(data) == {97} else b""
    )

    for said, sent in [(b"a", b"aa"), (b"bc", b"2\r\nbc\r\n"), (b"aaa", b"aaaaaa")]:
        ends.upstream.sendall(said)
        assert ends.client.recv(100) == sent
    ends.upstream.sendall(b"d.")

    assert done.result(5) is None


@pytest.mark.parametrize("same", [never, but_dots])
def test_an_upstream_that_breaks_off_is_told_to_the_thread_that_waits(ends, same):
    done = ends.carry(until_dot, same=same)
    ends.upstream.sendall(b"aa")
    assert ends.client.recv(100) == b"aa"

    ends.upstream.close()

    with pytest.raises(Failure, match="cut"):
        done.result(5)


@pytest.mark.parametrize("same", [never, but_dots])
def test_a_client_that_left_ends_the_stream(ends, same):
    done = ends.carry(until_dot, same=same)
    ends.client.close()

    ends.upstream.sendall(b"word")

    with pytest.raises(Failure, match="client_left"):
        done.result(5)


@pytest.mark.parametrize("same", [never, but_dots])
def test_a_slow_client_gets_all_of_it_and_is_waited_for(ends, same):
    done = ends.carry(until_dot, same=same)
    sender = ends.send_much()
    wait_until(lambda: "client" in ends.waits)  # which reads nothing yet

    got = read(ends.client, len(MUCH) + 1)

    sender.join(5)
    assert done.result(5) is None
    assert got == MUCH + b"."
    assert ends.waits[:2] == ["client", "upstream"]


def test_a_slow_client_holds_up_no_other_stream(ends, other):
    slow, sender, done = ends.carry(until_dot), ends.send_much(), other.carry(until_dot)

    other.upstream.sendall(b"quick.")

    assert other.client.recv(100) == b"quick."
    assert done.result(5) is None
    read(ends.client, len(MUCH) + 1)
    sender.join(5)
    assert slow.result(5) is None


MANY = 20  # streams; more than 16 that can be moved on at once are a round that others wait for


@pytest.fixture
def many() -> Iterator[list[Ends]]:
    carrier = Carrier()
    found = [Ends(carrier) for _ in range(MANY)]
    yield found
    for ends in found:
        ends.close()


def test_requests_that_begin_wait_while_many_streams_have_to_be_moved_on(many, monkeypatch):
    monkeypatch.setattr("parts.carrier.WAY_S", 60)
    held: queue.Queue[None] = queue.Queue()
    go: queue.Queue[None] = queue.Queue()
    carrier = many[0].carrier

    def take(data: bytes) -> tuple[bytes, bool]:
        if data == b"hold":
            held.put(None)
            go.get(timeout=5)
        return until_dot(data)

    def all_in_the_next_round() -> None:
        for ends in (many[0], *many[2:]):
            ends.upstream.sendall(b"more")
        many[1].upstream.sendall(b"hold")  # the last in the round, as it is the last that can go on

    def next_round() -> None:
        go.put(None)
        held.get(timeout=5)

    done = [ends.carry(take) for ends in many]
    wait_until(lambda: len(carrier._selector.get_map()) == MANY + 1)
    many[0].upstream.sendall(b"hold")
    held.get(timeout=5)
    with ThreadPoolExecutor(4) as pool:
        pool.submit(carrier.give_way).result(5)  # one stream holds nobody up
        all_in_the_next_round()
        next_round()
        begun = [pool.submit(carrier.give_way) for _ in range(3)]
        wait_until(lambda: len(carrier._waiting) == 3)
        all_in_the_next_round()
        next_round()  # behind the last one, of 20 streams, one may begin
        wait_until(lambda: any(one.done() for one in begun))
        assert sum(one.done() for one in begun) == 1
        go.put(None)
        for one in begun:  # and all when nothing is left to be moved on
            assert one.result(5) is None

    for ends in many:
        ends.upstream.sendall(b".")
    assert [one.result(5) for one in done] == [None] * MANY
    assert not carrier._waiting


def test_a_request_that_finds_the_carrier_behind_for_long_begins_nevertheless(monkeypatch):
    monkeypatch.setattr("parts.carrier.WAY_S", 0.01)
    carrier = Carrier()
    carrier._is_behind = True

    assert carrier.give_way() is None
    assert not carrier._waiting  # it takes the turn of nobody who waits


def test_a_chat_gives_way_before_an_upstream_is_asked(client, upstream, monkeypatch):
    asked: list[int] = []
    way = client.router.carrier
    monkeypatch.setattr(way, "give_way", lambda: asked.append(len(upstream.requests)))

    assert client.chat().status_code == 200
    assert asked == [0]


@pytest.mark.parametrize(
    ("take", "same"),
    [(lambda data: (data, bool(1 // 0)), never), (until_dot, lambda data: b"%d" % (1 // 0))],
    ids=["in what takes", "in what is the same"],
)
def test_a_bug_in_one_stream_ends_no_other(ends, other, take, same):
    wrong, done = other.carry(take, same=same), ends.carry(until_dot)
    other.upstream.sendall(b"x")
    with pytest.raises(ZeroDivisionError):
        wrong.result(5)

    ends.upstream.sendall(b"well.")

    assert done.result(5) is None


def through(ends: Ends, take: Callable[[bytes], Any] = until_dot) -> Iterator[bytes]:
    """The stream's bytes for a server that alone can write to its client."""
    stream = Carried(ends.source, ends.sink, never, take, ends.waits.append, False)
    return ends.carrier.through(stream, ends.client)


def test_a_stream_can_be_read_from_the_other_end_of_its_sink(ends):
    found = through(ends)
    for said in (b"one ", b"two."):
        ends.upstream.sendall(said)

    assert b"".join(found) == b"one two."


def test_whoever_stops_reading_a_stream_ends_it(ends):
    found = through(ends)
    ends.upstream.sendall(b"one ")
    assert next(found) == b"one "

    found.close()

    ends.upstream.settimeout(5)
    assert ends.source.fileno() >= 0  # it is its owner's to close


def test_what_breaks_a_stream_is_told_to_its_reader_behind_what_came(ends):
    found = through(ends)
    ends.upstream.sendall(b"one ")
    assert next(found) == b"one "

    ends.upstream.close()

    with pytest.raises(Failure, match="cut"):
        list(found)


# --- events like the one before ------------------------------------------------------------------

EVENT = b'data: {"choices":[{"delta":{"content":"%b"},"finish_reason":null}],"n":1}\n\n'


@pytest.mark.parametrize(
    ("chunk", "more"),
    [
        (EVENT % b"other words", True),
        (EVENT % b"", False),  # an empty one says nothing, which counts
        (EVENT % rb"a \" quote, a line\n and \u00e9", True),
        (EVENT % rb"\u00e", False),
        (EVENT % rb"\x", False),
        (EVENT % b"half an escape\\", False),
        (EVENT % b'","x":"', False),
        (EVENT % b"\x07", False),  # no JSON
        (EVENT % "é€".encode(), True),
        (EVENT % "é".encode()[:1], False),
        (EVENT.replace(b"null", b'"stop"') % b"end", False),
        (EVENT.replace(b'"n":1', b'"error":{}') % b"oops", False),
        (EVENT % b"two" + EVENT % b"events", False),
        (b"data: [DONE]\n\n", False),
        (EVENT[:-3] % b"half", False),
    ],
)
def test_an_event_is_like_the_last_only_when_words_alone_differ(chunk, more):
    reader = EventReader(ChatAnswer.words, ChatAnswer("m").adds_words)
    reader.feed(EVENT % b"words")

    assert reader.is_more(chunk) is more


def test_an_event_behind_half_of_another_is_not_like_the_last():
    reader = EventReader(ChatAnswer.words, ChatAnswer("m").adds_words)
    reader.feed(EVENT % b"words")
    reader.feed(b"data: {")

    assert not reader.is_more(EVENT % b"more")


def test_an_event_without_choices_is_no_model_for_the_next():
    usage = b'data: {"choices":[],"usage":{"content":"%b"}}\n\n'
    reader = EventReader(ChatAnswer.words, ChatAnswer("m").adds_words)
    reader.feed(usage % b"words")

    assert not reader.is_more(usage % b"more")


@pytest.mark.parametrize("raw", [b"data: {}\n\n", EVENT % b"", EVENT % rb"\x", b'"content":"'])
def test_an_event_without_plain_words_has_no_shape(raw):
    assert shape_of(raw, ChatAnswer.words) is None


# --- chunks ----


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def reply_in_chunks() -> Reply:
    reply = Reply(socket.socket(), Flight(None, time.monotonic))
    reply.sock.close()
    reply.status_code, reply.chunked = 200, True
    return reply


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (chunk(b"one"), [b"one"]),
        (chunk(b"one") + chunk(b"and another"), [b"one", b"and another"]),
        (chunk(b"one") + b"5\r\nhal", []),
        (chunk(b"one") + b"0\r\n\r\n", []),
        (b"3;x=y\r\none\r\n", []),
        (b"03\r\none\r\n", []),
        (b"B\r\nhello world\r\n", []),
        (b"3\r\none..", []),
        (b"3\none\n", []),
        (b"", []),
    ],
)
def test_whole_chunks_are_told_from_anything_else(data, found):
    assert reply_in_chunks().whole_chunks(data) == found


def test_events_that_came_together_are_passed_on_unread_like_single_ones():
    reply = reply_in_chunks()
    relay = Relay(reply, reply.flight, "m", ChatAnswer("m"), stream=True, whole=False,
                  idle_s=9, client_s=9, deadline=1e9)  # fmt: skip
    relay._reader = EventReader(ChatAnswer.words, relay.answer.adds_words)
    relay._reader.feed(EVENT % b"words")
    many = chunk(EVENT % b"two") + chunk(EVENT % b"three")
    odd = chunk(EVENT % b"two") + chunk(EVENT.replace(b"null", b'"stop"') % b"")

    assert relay._same(True, many) == many
    assert relay._same(False, many) == EVENT % b"two" + EVENT % b"three"
    assert relay._same(True, odd) == b""
