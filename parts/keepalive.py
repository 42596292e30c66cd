"""Signs of life: what a client gets while no model has begun its answer yet.

Without `keepalive_sec` a walk runs in the thread that serves the request, and nothing is sent
before an answer has begun: every failure has its true status. With it the walk runs in a thread of
its own. If that takes longer, the stream begins at once, with a sign of life every few seconds that
each format's clients pass over; failover goes on behind it, and if nobody answers, the stream ends
with the format's own error event.

The walk's thread owns the call until it is done; the serving thread only waits. Whoever closes the
response ends the flight and waits for the walk before the call is booked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from parts.access import as_router_error
from parts.carrier import Carrier

OFTEN_S = 5.0  # once the stream has begun


class Walk:
    """A walk along the chain, and its `relay`; None while nobody has begun an answer yet."""

    def __init__(self, walk: Callable[[], Any], call: Any):
        category = call.chat.category
        self._call, self._every_s = call, 0.0
        self._raised: BaseException | None = None
        self.relay: Any = None
        keepalive_s = category.keepalive_s if call.stream and category else None
        if keepalive_s is None:
            self.relay = walk()
            return
        self._done = threading.Event()
        try:
            threading.Thread(target=self._run, args=(walk,), name="walk", daemon=True).start()
        except RuntimeError:  # no thread can be had: rather no signs of life than no answer
            self.relay = walk()
            return
        self._every_s = min(keepalive_s, OFTEN_S)
        if self._done.wait(keepalive_s):
            self.relay = self._result()

    def _run(self, walk: Callable[[], Any]) -> None:
        try:
            self._found = walk()
        except BaseException as e:  # noqa: BLE001  raised again by the thread that serves
            self._raised = e
        self._done.set()

    def _result(self) -> Any:
        raised, self._raised = self._raised, None
        if raised is not None:
            try:
                raise raised
            finally:
                del raised  # its frames hold this object
        return self._found

    def known(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Of a response's `headers` those that are true already."""
        unknown = () if self.relay else ("X-Router-Model", "X-Router-Attempts")
        return {name: value for name, value in headers.items() if name not in unknown}

    def pass_on(self, carrier: Carrier, client: Any, chunked: bool) -> Iterator[bytes]:
        """The stream, as Relay.pass_on has it, with signs of life where they are wanted."""
        if not self._every_s:
            return self.relay.pass_on(carrier, client, chunked)
        return self._alive(carrier)

    def _alive(self, carrier: Carrier) -> Iterator[bytes]:
        call, dialect = self._call, self._call.chat.dialect
        relay = self.relay
        if relay is None:
            yield dialect.sign
            while not self._done.wait(self._every_s):
                yield dialect.sign
            try:
                relay = self._result()
            except Exception as raised:  # noqa: BLE001  the head is gone: told in the stream
                e = as_router_error(raised, dialect.paths[0])
                call.status = e.status
                call.outcome = "client_left" if e.status == 499 else "failed"
                yield dialect.failed(e, call.id)
                return
        relay.sign, relay.every_s = dialect.sign, self._every_s
        yield from relay.pass_on(carrier, None, False)

    def close(self, finish: Callable[[], None]) -> None:
        """End the walk if it goes on, then `finish`."""
        if self._every_s and not self._done.is_set():
            self._call.flight.end("client_left")
            self._done.wait()
        self._raised = None  # its frames hold this object
        finish()
