"""One upstream answer: held until it has begun, or is complete, then passed on as it comes.

Until the commit a `Failure` is raised and another model may be tried; after it a failure is told
in the stream and never hidden. What became of an answer stands in `usage`, `finish` and `failure`.

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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from parts.carrier import Carried, Carrier
from parts.errors import Failure, RouterError
from parts.events import Event, EventReader
from parts.exchange import MAX_ANSWER, Reply, read_whole
from parts.flights import Flight
from parts.jsontext import LARGE, parse_lean, parse_loosely
from parts.judge import (
    FINISHES,
    TELLS_ERROR,
    VERDICTS,
    error_of,
    failure_from,
    finish_kind,
    without_choices,
)  # fmt: skip
from parts.logs import where_it_broke
from parts.metrics import usage_of

log = logging.getLogger("llm_router")

DRAIN_S = 1.0  # after the last event; then the connection is closed instead of kept
DONE = b"data: [DONE]\n\n"
DONE_BEHIND = re.compile(rb"\s*(?:data:\s*)?\[DONE\]\s*\Z")
BOM = b"\xef\xbb\xbf"
UNKNOWN: set[str] = set()  # finish reasons that were told of once
# What counts as a token; a role alone does not.
SAYS = ("content", "reasoning", "reasoning_content", "tool_calls", "function_call", "refusal",
        "audio", "images")  # fmt: skip


def choices_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer or an event, as far as they have the right shape."""
    choices = body.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []


class Relay:
    """One answer of `model`, the name it is told by.

    `whole`: a stream is held until it is complete. `keep_usage`: the client asked for the usage
    event itself. `choices`: how many it asked for. `idle_s` may pass between two events, `client_s`
    until the client takes what was sent, and `deadline` bounds everything up to the commit.
    """

    def __init__(self, reply: Reply, flight: Flight, model: str, *, stream: bool, whole: bool,
                 keep_usage: bool, choices: int, idle_s: float, client_s: float,
                 deadline: float):  # fmt: skip
        self.usage: dict[str, Any] = {}
        self.failure: Failure | None = None  # what broke it after the commit
        self.has_content = False
        self.done = False  # the end was read: [DONE], or a whole answer's last byte
        self.ended = False  # it was passed on to its end, good or bad
        self.held: list[bytes] = []
        self.reply, self._flight, self._model = reply, flight, model
        self._stream, self._whole, self._keep_usage = stream, whole, keep_usage
        self._idle_s, self._client_s, self._deadline = idle_s, client_s, deadline
        self._idle_at = self._paused_at = 0.0
        self._reader: EventReader
        self._left: Sequence[Event] = ()  # of the batch in which the answer began
        self._finish = ""  # the kind of the last finish_reason
        self._choices = choices
        self._begun: set[int] = set()  # choices that have no finish_reason yet, and those that have
        self._finished: set[int] = set()
        self._came = False  # something that the client gets came since it was last looked at
        self._arguments: dict[tuple[Any, ...], list[str]] = {}  # of tool calls, in whole mode
        self._call: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # where more arguments belong

    @property
    def has_begun(self) -> bool:
        """True from the first token on, or when there will be none for a good reason."""
        return self.has_content or self._finish in ("length", "filter", "calls")

    @property
    def is_finished(self) -> bool:
        """True when every choice has its finish_reason: from here on any end is a good one."""
        return not self._begun and len(self._finished) >= self._choices

    # --- up to the commit ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read up to the commit; Failure while another model may still be tried."""
        if not self._stream:
            self._read_answer()
        else:
            try:
                self._hold_until_begun()
            except Failure:
                if not self.is_finished or self._flight.why == "client_left":
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
            raise without_choices(body)
        self._note(body, "message")
        if not choices_of(body):
            raise without_choices(body)
        self.held, self.done, self.ended = [data], True, True
        self._check_arguments()
        if not self.has_begun:
            raise Failure("empty", status=200)

    def _hold_until_begun(self) -> None:
        self._reader, size, ended = EventReader(), 0, False
        data = self._first_of_stream()
        while not ended:
            ended = not data
            batch = self._reader.feed(data) if data else self._reader.rest()
            for n, event in enumerate(batch, 1):
                self.held.append(self._passed(event))
                size += len(event.raw)
                if size > MAX_ANSWER:
                    raise Failure("not_an_answer", f"over {MAX_ANSWER} bytes", 200)
                if self.done or (self.has_begun and not self._whole):
                    self._left = batch[n:]
                    return
            if self._came and self.has_content:
                self._came, idle_at = False, self._flight.clock() + self._idle_s
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
            if isinstance(body, dict) and choices_of(body) and not error_of(body):
                raise Failure("not_an_answer", "no stream", 200)
            raise without_choices(body)
        return data

    def _check_held(self) -> None:
        """Failure unless what is held may go to the client."""
        if self.has_begun and not self._whole:
            return
        if not (self.is_finished or self.done):
            raise Failure("cut" if any(self.held) else "not_an_answer", "no end", 200)
        self._check_arguments()
        if not self.done:
            self.held.append(DONE)
            self.done = True
        if not self.has_begun:
            raise Failure("empty", status=200)

    # --- what an answer says ---------------------------------------------------------------------

    def _passed(self, event: Event) -> bytes:
        """What to pass on of `event`, after noting what it says; Failure when it is an error."""
        if event.kind == "malformed":
            return b""
        if event.kind == "error":
            told = event.data if "error" in event.data else {"error": event.data}
            raise failure_from(200, told)
        if event.kind == "done":
            self.done = True
        if event.kind != "data":
            return event.raw
        self._note(event.data, "delta")
        extra = event.data.get("usage") and not event.data.get("choices")
        return b"" if extra and not self._keep_usage else event.raw

    def _note(self, body: Mapping[str, Any], part: str) -> None:
        """What `body`, an answer or an event, says and used; Failure when it tells of an error."""
        odd = "choices" not in body or not TELLS_ERROR.isdisjoint(body)
        told = error_of(body) if odd or body.get("object") == "error" else None
        if told:
            raise failure_from(200, told)
        usage = body.get("usage")
        if isinstance(usage, dict) and usage.get("prompt_tokens"):  # nearly always so
            self.usage = usage
        elif usage or "x_groq" in body:
            self.usage = usage_of(body) or self.usage
        for choice in choices_of(body):
            told = error_of(choice) if "error" in choice else None
            if told:  # OpenRouter tells it in a choice, too
                raise failure_from(200, told)
            index, said, reason = choice.get("index"), choice.get(part), choice.get("finish_reason")
            index = index if isinstance(index, int) else 0
            if isinstance(said, dict) and any(map(said.get, SAYS)):
                self._came = self.has_content = True
                if index not in self._finished:
                    self._begun.add(index)
                if self._whole:
                    self._note_arguments(index, said.get("tool_calls"), part)
            if "usage" in choice:
                self.usage = usage_of(body) or self.usage
            if isinstance(reason, str):
                self._note_finish(index, reason)

    def _note_finish(self, index: int, reason: str) -> None:
        kind = FINISHES.get(reason) or finish_kind(reason)
        if kind == "open":
            return
        self._came, self._finish = True, kind
        if self._finish == "failed":
            raise Failure("cut", f"finish_reason {reason[:40]}", 200)
        if self._finish == "unknown" and reason not in UNKNOWN and len(UNKNOWN) < 100:
            UNKNOWN.add(reason)
            log.warning("finish_reason_unknown", {"model": self._model, "reason": reason[:40]})
        self._begun.discard(index)
        self._finished.add(index)

    def _note_arguments(self, choice: int, calls: Any, part: str) -> None:
        """Put a tool call's arguments together; another id is another call, whatever its index."""
        for n, tool in enumerate(calls if isinstance(calls, list) else ()):
            function = tool.get("function") if isinstance(tool, dict) else None
            text = function.get("arguments") if isinstance(function, dict) else None
            if not isinstance(text, str):
                continue
            index, id_ = tool.get("index"), str(tool.get("id") or "")
            place = (choice, index if isinstance(index, int) else None)
            key = self._call.get(place)
            if part == "message":
                key = (choice, n, "whole")
            elif key is None or (id_ and key[-1] != id_):
                key = self._call[place] = (*place, len(self._arguments), id_)
            self._arguments.setdefault(key, []).append(text)

    def _check_arguments(self) -> None:
        told = ["".join(pieces) for pieces in self._arguments.values()]
        half = any(a.strip() and parse_loosely(a) is None for a in told)
        if half and self._finish != "length":
            raise Failure("cut", "half a tool call", 200)

    # --- after the commit ------------------------------------------------------------------------

    def pass_on(self, carrier: Carrier, client: socket.socket | None,
                chunked: bool) -> Iterator[bytes]:  # fmt: skip
        """The bytes that the server has to send; the carrier writes to `client` itself.

        `chunked`: how the client is answered. Without a plain socket to it (TLS, another server)
        all bytes come out here. The last ones say how the answer ended.
        """
        try:
            more = b"" if self.done else self._passed_all(self._left)
            yield b"".join(self.held) + more
            if not self.done and not self.failure:
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
        if client is not None and type(client) is socket.socket:
            carrier.carry(self._carried(client, chunked))
            return
        ours, sink = socket.socketpair()
        with contextlib.closing(ours):
            yield from carrier.through(self._carried(sink, False), ours)

    def _carried(self, sink: socket.socket, chunked: bool) -> Carried:
        same = partial(self._same, chunked)
        return Carried(self.reply.sock, sink, same, self._receive, self._wait_for, chunked)

    def _same(self, framed: bool, data: bytes) -> bytes:
        """For the carrier: what to send when `data` only adds words, like the event before it."""
        event = self.reply.one_chunk(data)
        if not event or not self._reader.is_more(event):
            return b""
        self._more_came()
        return data if framed else event

    def _receive(self, data: bytes, ended: bool = False) -> tuple[bytes, bool]:
        """For the carrier: what to send when `data` has come, and whether that is the last."""
        body = b"" if ended else self.reply.unframe(data)
        ended = ended or self.reply.is_whole
        batch = self._reader.feed(body) if body else []
        batch = batch + self._reader.rest() if ended else batch
        out = self._passed_all(batch)
        if self._came:  # comments, and what nobody gets or what says nothing, win no time
            self._more_came()
        return out, ended or self.done or self.failure is not None

    def _more_came(self) -> None:
        """The next event may take `idle` again."""
        self._came = False
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
                out.append(self._passed(event))
                if self.done:
                    break
        except Failure as e:
            self.failure = e.bare()
        return b"".join(out)

    def _last(self) -> Iterator[bytes]:
        """The last bytes: a missing [DONE], or an error that no client takes for an end."""
        if self.done or self.is_finished:
            self.failure, self.ended = None, True
            if not self.done:
                yield DONE
            self._flight.due = self._flight.clock() + DRAIN_S, "drain"
            with contextlib.suppress(Failure):  # read to the end: the connection can be kept
                while self.reply.read1():
                    pass
            return
        self.failure, self.ended = self.failure or Failure("cut", status=200), True
        if self.failure.outcome != "client_left":
            says = VERDICTS[self.failure.outcome].says
            text = f"{self._model} {says}; the answer is not complete"
            body = RouterError(502, "upstream_error", text).body()
            yield b"data: " + json.dumps(body).encode() + b"\n\n"
