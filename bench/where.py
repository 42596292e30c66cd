"""Where the router's CPU time goes: one chat by part, and one event of a stream.

    python bench/where.py [--seconds N] [--body small|agent] [--router DIR] [--connections N]

A real gunicorn serves wrk, or streams; in its worker each function below is wrapped, so that the
CPU time of a thread counts for the innermost of them that runs. What the wrapping itself costs,
some 2 us each, is in the figures; so the whole without it stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import servers
import streams
from load import agent_body, need_wrk, small_body, wrk
from processes import Stage, cpu_seconds, settle
from servers import Contestant

HERE = Path(__file__).resolve().parent
Spent = tuple[dict[str, float], float, float]  # us by part, the whole while traced, without tracing
CHAT = {  # part: the functions of it, as module:name or module:class.name
    "connection: wake, park": ("worker:Direct.serve_one",),
    "head of the request": ("worker:Parser.has_head",),
    "guard": ("router:guard",),
    "body, JSON": ("router:read_body", "router:read_chat"),
    "choosing": ("router:Chooser.choose",),
    "turn": ("router:Turns.find", "router:Turns.keep", "router:Turns.note"),
    "walk": ("router:Router.walk",),
    "body for the model": ("router:Chat.for_model",),
    "exchange": ("router:Endpoint.send",),
    "answer: read, judged": ("router:Relay.prepare",),
    "the way and the response": ("router:serve_chat",),
    "response: head, sending": ("worker:Unhurried.start_response", "worker:Unhurried.write",
                                "worker:Unhurried.close"),
    "record": ("router:Router.finish",),
    "log line": ("logging:Logger.handle",),
    "history": ("router:History.add", "router:History._write", "router:History._tell_limits"),
}  # fmt: skip
EVENT = {
    "wait and wake": ("parts.carrier:Carrier._round",),
    "receive and send": ("parts.carrier:Carried.hand_on", "parts.carrier:Carried.move"),
    "like the last one?": ("parts.relay:Relay._same",),
    "read and judged": ("parts.relay:Relay._receive",),
}
CONF = """
import sys
__file__ = {conf!r}
exec(compile(open(__file__).read(), __file__, "exec"))
sys.path.append({here!r})
_initialised = post_worker_init
def post_worker_init(worker):
    import where
    _initialised(worker)
    where.trace({parts!r}, type(worker), {out!r})
"""


# --- in the worker -------------------------------------------------------------------------------


class Parts(threading.local):
    """What one thread has spent, in ns, by part."""

    def __init__(self, everybody: list[Counter[str]]) -> None:
        self.part, self.at, self.spent = "", 0, Counter[str]()
        everybody.append(self.spent)


def traced(function: Callable[..., Any], part: str, mine: Parts) -> Callable[..., Any]:
    """`function`, with its CPU time counted for `part`."""
    now = time.thread_time_ns

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = mine.part
        at = now()
        mine.spent[before] += at - mine.at
        mine.part, mine.at = part, at
        try:
            return function(*args, **kwargs)
        finally:
            at = now()
            mine.spent[part] += at - mine.at
            mine.part, mine.at = before, at

    return wrapper


def trace(parts: dict[str, tuple[str, ...]], worker: Any, out: str) -> None:
    """Wrap the functions of `parts`, and write what was spent to `out`, twice a second."""
    everybody: list[Counter[str]] = []
    mine = Parts(everybody)
    for part, functions in parts.items():
        for function in functions:
            module, _, name = function.partition(":")
            # gunicorn.conf.py loads the worker's file itself: no module has its name.
            here = worker.__init__.__globals__ if module == "worker" else vars(sys.modules[module])
            owner, _, last = name.rpartition(".")
            if owner:
                setattr(here[owner], last, traced(getattr(here[owner], last), part, mine))
            else:
                here[last] = traced(here[last], part, mine)

    def tell() -> None:
        while True:
            time.sleep(0.5)
            Path(out).write_text(json.dumps(sum(everybody, Counter[str]())))

    threading.Thread(target=tell, daemon=True).start()


# --- outside -------------------------------------------------------------------------------------


def router(stage: Stage, up: Contestant, args: argparse.Namespace,
           parts: dict[str, tuple[str, ...]] | None) -> tuple[Contestant, Path]:  # fmt: skip
    """The router, its functions wrapped where there are `parts`; and where it tells of them."""
    folder = stage.folder("traced")
    out, conf = folder / "spent.json", args.router / "gunicorn.conf.py"
    if parts:
        text = CONF.format(conf=str(conf), here=str(HERE), parts=parts, out=str(out))
        conf = folder / "gunicorn.conf.py"
        conf.write_text(text)
    return servers.router(stage, up, args.router, conf=str(conf), ROUTER_THREADS="128"), out


def told(out: Path) -> Counter[str]:
    """What was spent so far, a moment after the load."""
    time.sleep(1.1)
    return Counter(json.loads(out.read_text()))


def of_chats(stage: Stage, args: argparse.Namespace) -> Spent:
    """us of CPU a chat by part; the whole of the process while traced, and without that."""
    body = {"small": small_body, "agent": agent_body}[args.body]("router")

    def load(who: Contestant) -> tuple[float, float]:
        turn = wrk(who, body, args.connections, args.seconds, stage.root)
        return turn.rate * args.seconds, turn.cpu_ms * 1e3

    return in_turns(stage, servers.upstream(stage), args, CHAT, load)


def of_events(stage: Stage, args: argparse.Namespace) -> Spent:
    """The same of an event among 64 streams."""

    def load(who: Contestant) -> tuple[float, float]:
        before = cpu_seconds(who.pid)
        count = json.loads(streams.ask(who, 64, 100, 200, 60).communicate()[0])["events"]
        used = cpu_seconds(who.pid) - before
        settle(who.pid)
        return count, used * 1e6 / count

    return in_turns(stage, streams.delaying_upstream(stage, 20), args, EVENT, load)


def in_turns(stage: Stage, up: Contestant, args: argparse.Namespace,
             names: dict[str, tuple[str, ...]],
             load: Callable[[Contestant], tuple[float, float]]) -> Spent:  # fmt: skip
    """What `load`, which says how many and us each, took in the round that was disturbed least."""
    plain, _ = router(stage, up, args, None)
    traced_one, out = router(stage, up, args, names)
    whole, found = [], []
    for n in range(4):
        _, us = load(plain)
        before = told(out)
        count, traced_us = load(traced_one)
        spent = told(out) - before
        if n:  # the first warms up
            whole.append(us)
            found.append((traced_us, {part: ns / 1e3 / count for part, ns in spent.items()}))
    traced_us, parts = min(found, key=lambda round_: round_[0])
    return parts, traced_us, min(whole)


def say(title: str, names: dict[str, Any], parts: dict[str, float], whole: float,
        plain: float) -> None:  # fmt: skip
    """One table."""
    print(f"\n{title}")
    for name in (*names, ""):
        print(f"  {name or 'between them':28}{parts.get(name, 0.0):7.1f}")
    print(f"  {'the process, traced':28}{whole:7.1f}\n  {'the process, as it is':28}{plain:7.1f}")


def main() -> int:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--body", choices=("small", "agent"), default="small")
    parser.add_argument("--router", type=Path, default=HERE.parent)
    parser.add_argument("--only", choices=("chat", "event"))
    args = parser.parse_args()
    args.router = args.router.resolve()
    need_wrk()
    with Stage() as stage:
        if args.only != "event":
            title = f"one chat, {args.body} body, {args.connections} connection(s): us of CPU"
            say(title, CHAT, *of_chats(stage, args))
        if args.only != "chat":
            say("one event of 64 streams, 20 ms apart: us of CPU", EVENT, *of_events(stage, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
