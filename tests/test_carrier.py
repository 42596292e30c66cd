"""The carrier: streams passed on in one thread, with slow clients and ends of all kinds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from test_wire import wait_until

from parts.carrier import Carried, Carrier, carried
from parts.errors import Failure
from parts.events import EventReader, shape_of

PIECE = b"x" * 100_000


class Ends:
    """Both ends of a stream: what the test is to the carrier, upstream and client."""

    def __init__(self) -> None:
        self.upstream, self.source = socket.socketpair()
        self.sink, self.client = socket.socketpair()
        self.client.settimeout(5)
        self.waits: list[str] = []

    def carry(self, carrier: Carrier, take: Callable[[bytes], Any], chunked: bool = False,
              same: Callable[[bytes], bytes] = lambda data: b"") -> Any:  # fmt: skip
        stream = Carried(self.source, self.sink, same, take, self.waits.append, chunked)
        pool = ThreadPoolExecutor(1)
        found: Future[None] = pool.submit(carrier.carry, stream)
        pool.shutdown(wait=False)
        return found

    def close(self) -> None:
        for sock in (self.upstream, self.source, self.sink, self.client):
            sock.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    found = Ends()
    yield found
    found.close()


@pytest.fixture(scope="module")
def carrier() -> Carrier:
    return Carrier()


def until_dot(data: bytes) -> tuple[bytes, bool]:
    if not data:
        raise Failure("cut")
    return data, data.endswith(b".")


def read(sock: socket.socket, size: int) -> bytes:
    out = b""
    while len(out) < size and (more := sock.recv(65536)):
        out += more
    return out


def test_what_comes_is_passed_on_at_once_and_the_last_ends_it(carrier, ends):
    done = ends.carry(carrier, until_dot)

    for said in (b"one ", b"two ", b"three."):
        ends.upstream.sendall(said)
        assert ends.client.recv(100) == said

    assert done.result(5) is None


def test_pieces_are_framed_as_chunks(carrier, ends):
    done = ends.carry(carrier, until_dot, chunked=True)

    ends.upstream.sendall(b"0123456789abcde.")

    assert done.result(5) is None
    assert ends.client.recv(100) == b"10\r\n0123456789abcde.\r\n"


def test_an_upstream_that_breaks_off_is_told_to_the_thread_that_waits(carrier, ends):
    done = ends.carry(carrier, until_dot)

    ends.upstream.close()

    with pytest.raises(Failure, match="cut"):
        done.result(5)


def test_a_client_that_left_ends_the_stream(carrier, ends):
    done = ends.carry(carrier, until_dot)
    ends.client.close()

    ends.upstream.sendall(b"word")

    with pytest.raises(Failure, match="client_left"):
        done.result(5)


def test_a_slow_client_gets_all_of_it_and_is_waited_for(carrier, ends):
    done = ends.carry(carrier, until_dot)
    sender = threading.Thread(target=ends.upstream.sendall, args=(PIECE * 20 + b".",))
    sender.start()
    wait_until(lambda: "client" in ends.waits)  # which reads nothing yet

    got = read(ends.client, len(PIECE) * 20 + 1)

    sender.join(5)
    assert done.result(5) is None
    assert got == PIECE * 20 + b"."
    assert ends.waits[:2] == ["client", "upstream"]


def test_a_slow_client_holds_up_no_other_stream(carrier, ends):
    slow, other = ends.carry(carrier, until_dot), Ends()
    sender = threading.Thread(target=ends.upstream.sendall, args=(PIECE * 20 + b".",))
    sender.start()
    done = other.carry(carrier, until_dot)

    other.upstream.sendall(b"quick.")

    assert other.client.recv(100) == b"quick."
    assert done.result(5) is None
    read(ends.client, len(PIECE) * 20 + 1)
    sender.join(5)
    assert slow.result(5) is None
    other.close()


def test_a_bug_in_one_stream_ends_no_other(carrier, ends):
    broken = Ends()
    with pytest.raises(ZeroDivisionError):
        wrong = broken.carry(carrier, lambda data: (data, bool(1 // 0)))
        broken.upstream.sendall(b"x")
        wrong.result(5)
    done = ends.carry(carrier, until_dot)

    ends.upstream.sendall(b"well.")

    assert done.result(5) is None
    broken.close()


def test_nothing_is_carried_but_from_one_plain_socket_to_another(ends):
    rest: Any = (lambda data: b"", until_dot, ends.waits.append, True)

    assert carried(ends.source, ends.sink, *rest) is not None
    assert carried(ends.source, None, *rest) is None
    assert carried(object(), ends.sink, *rest) is None


def test_a_bug_in_what_is_the_same_ends_this_stream_and_no_other(carrier, ends):
    broken = Ends()
    wrong = broken.carry(carrier, until_dot, same=lambda data: b"%d" % (1 // 0))
    broken.upstream.sendall(b"x")
    with pytest.raises(ZeroDivisionError):
        wrong.result(5)
    done = ends.carry(carrier, until_dot)

    ends.upstream.sendall(b"well.")

    assert done.result(5) is None
    broken.close()


def same_word(data: bytes) -> bytes:
    return data * 2 if set(data) == {ord("a")} else b""


def test_what_is_said_to_be_the_same_goes_on_as_told_and_the_rest_is_taken(carrier, ends):
    done = ends.carry(carrier, until_dot, chunked=True, same=same_word)

    for said, sent in [(b"a", b"aa"), (b"bc", b"2\r\nbc\r\n"), (b"aaa", b"aaaaaa")]:
        ends.upstream.sendall(said)
        assert ends.client.recv(100) == sent
    ends.upstream.sendall(b"d.")

    assert done.result(5) is None


def test_a_client_that_is_slow_with_more_of_the_same_gets_all_of_it(carrier, ends):
    done = ends.carry(carrier, until_dot, same=lambda data: b"" if b"." in data else data)
    sender = threading.Thread(target=ends.upstream.sendall, args=(PIECE * 20 + b".",))
    sender.start()
    wait_until(lambda: "client" in ends.waits)

    got = read(ends.client, len(PIECE) * 20 + 1)

    sender.join(5)
    assert done.result(5) is None
    assert got == PIECE * 20 + b"."


def test_a_client_that_left_ends_a_stream_of_the_same(carrier, ends):
    done = ends.carry(carrier, until_dot, same=same_word)
    ends.client.close()

    ends.upstream.sendall(b"a")

    with pytest.raises(Failure, match="client_left"):
        done.result(5)


def test_an_upstream_that_breaks_off_between_the_same_is_told(carrier, ends):
    done = ends.carry(carrier, until_dot, same=same_word)
    ends.upstream.sendall(b"aa")
    assert ends.client.recv(100) == b"aaaa"

    ends.upstream.close()

    with pytest.raises(Failure, match="cut"):
        done.result(5)


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
    reader = EventReader()
    reader.feed(EVENT % b"words")

    assert reader.is_more(chunk) is more


def test_an_event_behind_half_of_another_is_not_like_the_last():
    reader = EventReader()
    reader.feed(EVENT % b"words")
    reader.feed(b"data: {")

    assert not reader.is_more(EVENT % b"more")


def test_an_event_without_choices_is_no_model_for_the_next():
    usage = b'data: {"choices":[],"usage":{"content":"%b"}}\n\n'
    reader = EventReader()
    reader.feed(usage % b"words")

    assert not reader.is_more(usage % b"more")


@pytest.mark.parametrize("raw", [b"data: {}\n\n", EVENT % b"", EVENT % rb"\x", b'"content":"'])
def test_an_event_without_plain_words_has_no_shape(raw):
    assert shape_of(raw) is None
