"""One upstream answer: held until it has begun, or is complete, then passed on as it comes.

Until the commit a `Failure` is raised and another model may be tried; after it a failure is told
in the stream and never hidden. What the bytes say is asked of the dialect's `Answer`; what became
of it stands in `answer` and `failure`.

    prepare()   the thread of the request reads up to the commit: the first token, or the end
    pass_on()   from there the carrier's thread reads and writes; this one waits for it

The two threads never touch a relay at the same time: the carrier's has it from `carry` until it
says that the stream is over, and while it is at work the other one waits, or only moves bytes
from a socket pair to a client that the server alone can write to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from parts.carrier import Carried, Carrier
from parts.dialects import Answer
from parts.errors import Failure
from parts.events import Event, EventReader
from parts.exchange import MAX_ANSWER, Reply, read_whole
from parts.flights import Flight
from parts.jsontext import LARGE, parse_lean, parse_loosely
from parts.judge import VERDICTS, error_of, without_answer
from parts.logs import where_it_broke

log = logging.getLogger("llm_router")

DRAIN_S = 1.0  # after the last event; then the connection is closed instead of kept
DONE_BEHIND = re.compile(rb"\s*(?:data:\s*)?\[DONE\]\s*\Z")
BOM = b"\xef\xbb\xbf"


class Relay:
    """One answer of `model`, the name it is told by; `answer` reads what it says.

    `whole`: a stream is held until it is complete. `idle_s` may pass between two events, `client_s`
    until the client takes what was sent, and `deadline` bounds everything up to the commit.
    """

    def __init__(self, reply: Reply, flight: Flight, model: str, answer: Answer, *, stream: bool,
                 whole: bool, idle_s: float, client_s: float, deadline: float):  # fmt: skip
        self.failure: Failure | None = None  # what broke it after the commit
        self.ended = False  # it was passed on to its end, good or bad
        self.held: list[bytes] = []
        self.sign, self.every_s = b"", 0.0  # of life, so often, where that is wanted
        self.reply, self.answer, self._flight, self._model = reply, answer, flight, model
        self._stream, self._whole = stream, whole
        self._idle_s, self._client_s, self._deadline = idle_s, client_s, deadline
        self._idle_at = self._paused_at = 0.0
        self._reader: EventReader
        self._left: Sequence[Event] = ()  # of the batch in which the answer began

    @property
    def usage(self) -> dict[str, Any]:
        """What the answer said that it used; complete at its end."""
        return self.answer.usage

    # --- up to the commit ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read up to the commit; Failure while another model may still be tried."""
        if not self._stream:
            self._read_answer()
        else:
            try:
                self._hold_until_begun()
            except Failure:
                if not self.answer.is_finished or self._flight.why == "client_left":
                    raise
            self._check_held()
        self._flight.due = self._flight.clock() + self._client_s, "client_left"

    def _read_answer(self) -> None:
        data = read_whole(self.reply).removeprefix(BOM)
        try:
            body = json.loads(data) if len(data) <= LARGE else parse_lean(data)
        except (ValueError, RecursionError):  # one with the end of a stream behind it is one, too
            data = DONE_BEHIND.sub(b"", data)
            body = parse_loosely(data)
        if not isinstance(body, dict):
            raise without_answer(body)
        self.answer.read(body)
        if not self.answer.holds(body):
            raise without_answer(body)
        self.held, self.answer.done, self.ended = [data], True, True
        self.answer.check_arguments()
        if not self.answer.has_begun:
            raise Failure("empty", status=200)
        self.answer.check_json(self.held)

    def _hold_until_begun(self) -> None:
        answer, size, ended = self.answer, 0, False
        self._reader = EventReader(answer.words, answer.adds_words)
        data = self._first_of_stream()
        while not ended:
            ended = not data
            batch = self._reader.feed(data) if data else self._reader.rest()
            for n, event in enumerate(batch, 1):
                self.held.append(answer.take(event))
                size += len(event.raw)
                if size > MAX_ANSWER:
                    raise Failure("not_an_answer", f"over {MAX_ANSWER} bytes", 200)
                if answer.done or (answer.has_begun and not self._whole):
                    self._left = batch[n:]
                    return
            if answer.came and answer.has_content:
                answer.came, idle_at = False, self._flight.clock() + self._idle_s
                self._flight.due = min((idle_at, "idle"), (self._deadline, "total"))
            data = b"" if ended else self.reply.read1()

    def _first_of_stream(self) -> bytes:
        """The first bytes. What they are decides, not what the head calls them."""
        held, says_nothing = bytearray(), True
        while says_nothing and (more := self.reply.read1()):
            held += more
            says_nothing = not more.strip() or BOM.startswith(held)
            if len(held) > MAX_ANSWER:
                raise Failure("not_an_answer", "blanks", 200)
        data = bytes(held).removeprefix(BOM)
        if data.lstrip()[:1] in (b"{", b"["):
            body = parse_loosely(data + read_whole(self.reply))
            if isinstance(body, dict) and self.answer.holds(body) and not error_of(body):
                raise Failure("not_an_answer", "no stream", 200)
            raise without_answer(body)
        return data

    def _check_held(self) -> None:
        """Failure unless what is held may go to the client."""
        answer = self.answer
        if answer.has_begun and not self._whole:
            return
        if not (answer.is_finished or answer.done):
            raise Failure("cut" if any(self.held) else "not_an_answer", "no end", 200)
        answer.check_arguments()
        if not answer.done:
            self.held.append(answer.good_end())
            answer.done = True
        if not answer.has_begun:
            raise Failure("empty", status=200)
        answer.check_json(self.held)

    # --- after the commit ------------------------------------------------------------------------

    def pass_on(self, carrier: Carrier, client: socket.socket | None,
                chunked: bool) -> Iterator[bytes]:  # fmt: skip
        """The bytes that the server has to send; the carrier writes to `client` itself.

        `chunked`: how the client is answered. Without a plain socket to it (TLS, another server)
        all bytes come out here. The last ones say how the answer ended.
        """
        try:
            more = b"" if self.answer.done else self._passed_all(self._left)
            yield b"".join(self.held) + more
            if not self.answer.done and not self.failure:
                yield from self._go_on(carrier, client, chunked)
        except Failure as e:
            self.failure = e.bare()
        except Exception:  # noqa: BLE001  a bug of ours; the client must learn that this is no end
            log.error("internal_error", {"where": where_it_broke()})
            self.failure = Failure("internal_error")
        yield from self._last()

    def _go_on(self, carrier: Carrier, client: socket.socket | None,
               chunked: bool) -> Iterator[bytes]:  # fmt: skip
        """What comes after the commit, through the carrier."""
        if self.reply.is_whole:  # all has come: what is left is an event without its blank line
            yield self._receive(b"", ended=True)[0]
            return
        self._more_came()
        if client is not None and type(client) is socket.socket and not self.sign:
            carrier.carry(self._carried(client, chunked))
            return
        ours, sink = socket.socketpair()
        with contextlib.closing(ours):
            yield from carrier.through(self._carried(sink, False), ours, self.sign, self.every_s)

    def _carried(self, sink: socket.socket, chunked: bool) -> Carried:
        same = partial(self._same, chunked)
        return Carried(self.reply.sock, sink, same, self._receive, self._wait_for, chunked)

    def _same(self, framed: bool, data: bytes) -> bytes:
        """For the carrier: what to send when `data` only adds words, like the event before it.

        Several events that came together are told apart by their chunks: whoever falls behind
        must not have more to do with each.
        """
        events = self.reply.whole_chunks(data)
        if not events or not all(map(self._reader.is_more, events)):
            return b""
        self._more_came()
        return data if framed else b"".join(events)

    def _receive(self, data: bytes, ended: bool = False) -> tuple[bytes, bool]:
        """For the carrier: what to send when `data` has come, and whether that is the last."""
        body = b"" if ended else self.reply.unframe(data)
        ended = ended or self.reply.is_whole
        batch = self._reader.feed(body) if body else []
        batch = batch + self._reader.rest() if ended else batch
        out = self._passed_all(batch)
        if self.answer.came:  # comments, and what nobody gets or what says nothing, win no time
            self._more_came()
        return out, ended or self.answer.done or self.failure is not None

    def _more_came(self) -> None:
        """The next event may take `idle` again."""
        self.answer.came = False
        self._idle_at = self._flight.clock() + self._idle_s
        self._flight.due = self._idle_at, "idle"

    def _wait_for(self, whom: str) -> None:
        """While the client reads the upstream is not idle; a client that stops reading has left."""
        now = self._flight.clock()
        if whom == "client":
            self._paused_at = now
            self._flight.due = now + self._client_s, "client_left"
        else:
            self._idle_at += now - self._paused_at
            self._flight.due = self._idle_at, "idle"

    def _passed_all(self, batch: Sequence[Event]) -> bytes:
        """What to pass on of events that came together, up to a Failure that one of them is."""
        out = []
        try:
            for event in batch:
                out.append(self.answer.take(event))
                if self.answer.done:
                    break
        except Failure as e:
            self.failure = e.bare()
        return b"".join(out)

    def _last(self) -> Iterator[bytes]:
        """The last bytes: a missing end, or an error that no client takes for an end."""
        answer = self.answer
        if answer.done or answer.is_finished:
            self.failure, self.ended = None, True
            if not answer.done:
                yield answer.good_end()
            self._flight.due = self._flight.clock() + DRAIN_S, "drain"
            with contextlib.suppress(Failure):  # read to the end: the connection can be kept
                while self.reply.read1():
                    pass
            return
        self.failure, self.ended = self.failure or Failure("cut", status=200), True
        if self.failure.outcome != "client_left":
            says = VERDICTS[self.failure.outcome].says
            yield answer.bad_end(f"{self._model} {says}; the answer is not complete")
