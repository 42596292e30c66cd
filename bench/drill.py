"""The failure drill: a scripted upstream, the real router, and 16 provider faults one by one.

    python bench/drill.py [--format chat|messages|responses] [--mode stream|whole|plain]
                          [--scale 0.1] [--only N]

Without --format and --mode all of them in turn: streamed, streamed but held until it is whole, and
not streamed. The faults are those of FailoverBench (September 2026). What the client received and
what the upstream saw are checked here, from outside the router, not taken from its own account.
`--scale` shortens every time of the faults and of the router's limits alike. Exit status 1 when a
row is not as promised: 13 pass and 3 safe when streaming, 16 pass in whole-answer mode.

pass: the whole answer of one model. safe: an explicit error, nothing false. fail: anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from formats import FORMATS, Chat, Read
from service import Service, small_routes
from upstream import Peer, Request, Upstream, hang, pieces, plain, raw, reset_at_once

PRIMARY, BACKUP = "acme/one", "acme/two"
MODES = ("stream", "whole", "plain")
TOO_LONG = ("maximum context length is 8192 tokens", "context_length_exceeded")
TOTAL_WORDS = 60


@dataclass
class Received:
    """What the client got for one request."""

    status: int
    text: str
    complete: bool
    error: str
    model: str
    attempts: str
    seconds: float


@dataclass
class Drill:
    """One fault against one router."""

    upstream: Upstream
    service: Service
    form: Chat
    mode: str
    scale: float
    notes: list[str] = field(default_factory=list)

    def words(self, who: str) -> list[str]:
        """The answer that a model gives, so that a mixture of two shows."""
        return [f"{who}{n} " for n in range(TOTAL_WORDS)]

    def events(self, who: str) -> list[bytes]:
        """The same as events."""
        return [*self.form.begun(self.words(who)), *self.form.end()]

    def whole(self, who: str) -> bytes:
        """The same as a whole answer."""
        return json.dumps(self.form.whole("".join(self.words(who)))).encode()

    def good(self, who: str) -> Any:
        """A script that answers well."""
        if self.mode == "plain":
            return plain(200, self.whole(who))
        timed: list[Any] = []
        for event in self.events(who):
            timed += [event, self.scale * 0.01]
        return pieces(timed)

    def refuses(self, status: int, message: str = "went wrong", code: str | None = None,
                **headers: str) -> Any:  # fmt: skip
        """A script that answers with an error, in the format's own envelope."""
        return self.form.refuses(status, message, code, **headers)

    def ask(self, timeout_s: float = 60.0) -> Received:
        """One request, its answer read to its end like a strict client would."""
        headers = {"X-Router-Stream": "whole"} if self.mode == "whole" else {}
        body = self.form.ask(**({} if self.mode == "plain" else {"stream": True}))
        began = time.monotonic()
        reply = requests.post(
            self.service.base + self.form.path, json=body, headers=headers, timeout=timeout_s
        )
        streamed = reply.headers["Content-Type"].startswith("text/event-stream")
        if streamed:
            got = self.form.read_stream(reply.content)
        elif reply.status_code == 200:
            got = self.form.read_whole(reply.json())
        else:
            got = Read("", reply.json()["error"]["message"], False)
        return Received(
            reply.status_code,
            got.text,
            got.complete,
            got.error,
            reply.headers.get("X-Router-Model", ""),
            reply.headers.get("X-Router-Attempts", ""),
            time.monotonic() - began,
        )

    def grade(self, got: Received) -> str:
        """pass, safe or fail for an answer that should be whole."""
        wholes = {"".join(self.words(who)) for who in ("P", "B")}
        if got.complete and got.text in wholes and not got.error:
            return "pass"
        return "safe" if got.error and not got.complete else "fail"


Fault = Callable[[Drill], tuple[Received, str]]


def simple(*scripts: Any) -> Fault:
    """The primary misbehaves as scripted, then answers well; the backup answers well.

    A script is made for the drill, or None for a good answer.
    """

    def run(drill: Drill) -> tuple[Received, str]:
        bad = [script(drill) if script else drill.good("P") for script in scripts]
        drill.upstream.scripts = {PRIMARY: bad, BACKUP: drill.good("B")}
        got = drill.ask()
        return got, drill.grade(got)

    return run


def refusal(status: int, message: str = "went wrong", code: str | None = None,
            **headers: str) -> Callable[[Drill], Any]:  # fmt: skip
    """An error in the format's own envelope."""
    return lambda drill: drill.refuses(status, message, code, **headers)


def just(script: Any) -> Callable[[Drill], Any]:
    """The same in every format."""
    return lambda drill: script


def part_of(drill: Drill, n: int, after: str) -> Any:
    """`n` of the words, then `after`; without a stream as much of the body."""
    if drill.mode != "plain":
        return pieces(drill.form.begun(drill.words("P")[:n]), after=after)
    body = drill.whole("P")
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return raw(head.encode() + b"\r\n\r\n" + body[: len(body) * n // TOTAL_WORDS], after)


def late_first_token(drill: Drill) -> Any:
    if drill.mode == "plain":  # later than `answer`
        return lambda peer, request: (time.sleep(140 * drill.scale), drill.good("P")(peer, request))
    return pieces([20 * drill.scale, *drill.events("P")])


def cut_after_40(drill: Drill) -> Any:
    return part_of(drill, 40, "reset")


def stall_after_20(drill: Drill) -> Any:
    return part_of(drill, 20, "hang")


def malformed_event(drill: Drill) -> Any:
    if drill.mode == "plain":
        return plain(200, drill.whole("P")[:-1] + b",}")
    good = drill.events("P")
    return pieces([*good[:10], b'data: {"choices": [{"delta": {"con\n\n', *good[10:]])


def no_last_event(drill: Drill) -> Any:
    """No [DONE], no message_stop; a response has nothing behind what ends it."""
    end = -1 if drill.form.name != "responses" else None
    return drill.good("P") if drill.mode == "plain" else pieces(drill.events("P")[:end])


def content_filter(drill: Drill) -> tuple[Received, str]:
    """Returned as it is, after exactly one attempt."""
    refuses = drill.refuses(400, "the prompt was flagged by the content policy", "content_filter")
    drill.upstream.scripts = {PRIMARY: refuses, BACKUP: drill.good("B")}
    got = drill.ask()
    alone = drill.upstream.models_asked() == [PRIMARY]
    return got, "pass" if got.status == 400 and "content policy" in got.error and alone else "fail"


def prefill_refused(drill: Drill) -> tuple[Received, str]:
    """The primary is cut; the backup refuses a request that ends in half an answer."""

    def backup(peer: Peer, request: Request) -> Any:
        turns = request.body.get("messages") or request.body["input"]
        prefilled = isinstance(turns, list) and turns[-1]["role"] == "assistant"
        refuses = drill.refuses(400, "this model does not support prefill")
        return (refuses if prefilled else drill.good("B"))(peer, request)

    drill.upstream.scripts = {PRIMARY: cut_after_40(drill), BACKUP: backup}
    got = drill.ask()
    return got, drill.grade(got)


def outage(drill: Drill) -> tuple[Received, str]:
    """The primary is down for 60 s among 20 requests 4 s apart; back on it within 30 s."""
    began = time.monotonic()
    up_again = began + 60 * drill.scale

    def primary(peer: Peer, request: Request) -> Any:
        down = time.monotonic() < up_again
        return (drill.refuses(503) if down else drill.good("P"))(peer, request)

    drill.upstream.scripts = {PRIMARY: primary, BACKUP: drill.good("B")}
    answers = []
    for n in range(20):
        time.sleep(max(0.0, began + n * 4 * drill.scale - time.monotonic()))
        answers.append((time.monotonic(), drill.ask()))
    bad = [got for _, got in answers if drill.grade(got) != "pass"]
    back = next((at for at, got in answers if at > up_again and got.model == PRIMARY), None)
    seen = drill.upstream.models_asked().count(PRIMARY)
    if back is not None:
        took = (back - up_again) / drill.scale
        drill.notes.append(f"back after {took:.0f} s, {seen} calls to the primary in all")
    soon = back is not None and back - up_again <= 30 * drill.scale
    last = bad[0] if bad else answers[-1][1]
    return last, "pass" if soon and not bad else "fail"


def accounting(drill: Drill) -> tuple[Received, str]:
    """The model that answered is the one named and billed."""
    before = drill.service.get("/metrics").json()["models"]
    drill.upstream.scripts = {PRIMARY: drill.refuses(503), BACKUP: drill.good("B")}
    got = drill.ask()
    after = drill.service.get("/metrics").json()["models"]

    def cost(figures: dict[str, Any], model: str) -> float:
        return float(figures.get(model, {}).get("cost_usd", 0.0))

    billed = {model: cost(after, model) - cost(before, model) for model in (PRIMARY, BACKUP)}
    asked, _, said = drill.form.tokens  # no price for cached ones: they cost as the others
    right = abs(billed[BACKUP] - (asked * 10 + said * 20) / 1e6) < 1e-9 and billed[PRIMARY] == 0
    drill.notes.append(f"{got.model} billed {billed[BACKUP]:.6f} USD")
    return got, "pass" if right and got.model == BACKUP and got.complete else "fail"


FAULTS: list[tuple[str, Fault, str]] = [
    ("429 with Retry-After, once", simple(refusal(429, Retry_After="1"), None), "pass"),
    ("429 for ever", simple(refusal(429)), "pass"),
    ("one 500", simple(refusal(500), None), "pass"),
    ("503 for ever", simple(refusal(503)), "pass"),
    ("reset before headers", simple(just(reset_at_once)), "pass"),
    ("silence", simple(just(hang)), "pass"),
    ("first token after 20 s", simple(late_first_token), "pass"),
    ("cut after 40 of 60 words", simple(cut_after_40), "safe"),
    ("stall after 20 words", simple(stall_after_20), "safe"),
    ("one malformed event", simple(malformed_event), "pass"),
    ("no [DONE]", simple(no_last_event), "pass"),
    ("context length 400", simple(refusal(400, *TOO_LONG)), "pass"),
    ("content filter 400", content_filter, "pass"),
    ("cut, fallback refuses prefill", prefill_refused, "safe"),
    ("down for 60 s, 20 requests", outage, "pass"),
    ("accounting", accounting, "pass"),
]


def routes_for(url: str, scale: float) -> dict[str, Any]:
    """The shipped limits, scaled."""
    limits = {"connect": 5, "first_token": 12, "idle": 30, "answer": 120, "total": 300}
    breaker = {"recovery_timeout_sec": max(1.0, 300 * scale), "first_retry_sec": 5 * scale}
    local = {"base_url": url, "api_key_env": "TEST_API_KEY", "speaks": list(FORMATS)}
    return small_routes(
        url,
        upstreams={"local": local},
        timeouts_sec={name: seconds * scale for name, seconds in limits.items()},
        circuit_breaker={"failure_threshold": 3, **breaker},
    )


def run(form: Chat, mode: str, scale: float, only: int | None) -> list[tuple[str, str, str]]:
    """[(fault, wanted, got)], printed as it goes."""
    upstream, rows = Upstream(), []
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), routes_for(upstream.url, scale))
        try:
            for n, (name, fault, streaming) in enumerate(FAULTS, 1):
                if only in (None, n):
                    upstream.reset()
                    drill = Drill(upstream, service, form, mode, scale)
                    wanted = streaming if mode == "stream" else "pass"
                    rows.append((name, wanted, one(n, name, fault, drill)))
        finally:
            service.stop()
            upstream.close()
    return rows


def one(n: int, name: str, fault: Fault, drill: Drill) -> str:
    """Run one fault on a clean slate and print what a person would want to see."""
    drill.service.post("/circuit-breaker/reset-all")
    got, grade = fault(drill)
    circuits = drill.service.get("/metrics").json()["circuit_breaker"]
    print(f"{n:2d}. {name}: {grade}")
    seconds = got.seconds / drill.scale
    print(f"    client:   {got.status} from {got.model or 'nobody'} in {seconds:.1f} s", end="")
    print(f", {got.attempts} attempts, {len(got.text.split())} words", end="")
    print(f", told: {got.error[:90]}" if got.error else ", whole" if got.complete else ", CUT")
    print(f"    upstream: asked {short_list(drill.upstream.models_asked())}")
    state = {m: c["state"] for m, c in circuits["open_circuits"].items()} or "all closed"
    print(f"    circuits: {state}, strikes {circuits['failures'] or 'none'}")
    for note in drill.notes:
        print(f"    note:     {note}")
    return grade


def short_list(models: list[str]) -> str:
    """acme/one x2, acme/two."""
    counts = {model: models.count(model) for model in models}
    return ", ".join(f"{model} x{n}" if n > 1 else model for model, n in counts.items())


def main() -> int:
    """Print the drill and its table; 1 when a row is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=FORMATS, help="default: each")
    parser.add_argument("--mode", choices=MODES, help="default: each")
    parser.add_argument("--scale", type=float, default=0.1, help="1 is real time (default 0.1)")
    parser.add_argument("--only", type=int, help="run one fault, by its number")
    args = parser.parse_args()
    wrong = 0
    tables = {}
    for name in [args.format] if args.format else FORMATS:
        for mode in [args.mode] if args.mode else MODES:
            print(f"\n== {name}, {mode}, times scaled by {args.scale} ==")
            tables[f"{name}, {mode}"] = run(FORMATS[name], mode, args.scale, args.only)
    for mode, rows in tables.items():
        print(f"\n{mode:34s} wanted  got")
        for name, wanted, got in rows:
            wrong += wanted != got
            print(
                f"  {name:32s} {wanted:7s} {got}{'' if wanted == got else '   <-- not as promised'}"
            )
        grades = [got for _, _, got in rows]
        counts = " / ".join(f"{grades.count(g)} {g}" for g in ("pass", "safe", "fail"))
        print(f"  {counts}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
