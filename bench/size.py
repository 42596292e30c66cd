"""Memory, start and growth of the router; see bench/speed.py.

Growth is measured request by request, in turns between the two or more things compared, so that a
busy neighbour slows all of them alike. A figure of growth is the time that the router adds, the
median of the router's minus the median of the upstream asked directly with the same body.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import servers
import streams
from load import agent_body, small_body, talk_body, wrk
from processes import Stage, memory_mib
from servers import CHAIN, Contestant

# --- memory ------------------------------------------------------------------------------------


def memory(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """PSS of master and worker: at rest, after load, and with 256 streams open."""
    figures = {}
    for name, folder in args.routers.items():
        figures[name] = {
            **after_load(stage, folder, args),
            **while_streaming(stage, folder, args),
        }
    head = ["", "at rest", "after 1 KB bodies", "worker's RSS", "after 200 KB", "worker's RSS",
            "streams open", "MiB then", "worker's RSS"]  # fmt: skip
    keys = ("rest_mib", "small_mib", "small_rss_mib", "agent_mib", "agent_rss_mib",
            "open_at_once", "streams_mib", "streams_rss_mib")  # fmt: skip
    rows = [[name, *(f"{row[key]:.0f}" for key in keys)] for name, row in figures.items()]
    return figures, "memory: PSS of the process tree in MiB", head, rows


def after_load(stage: Stage, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Memory after 1 KB and 200 KB bodies on as many connections as there are permits for chats."""
    up = servers.upstream(stage)
    who = servers.router(stage, up, folder, **args.env)
    found = {"rest_mib": memory_mib(who.pid)[0]}
    for key, body in ("small", small_body), ("agent", agent_body):
        wrk(who, body(who.model), 56, args.seconds + 1, stage.root)
        found[f"{key}_mib"], found[f"{key}_rss_mib"] = memory_mib(who.pid)
    stage.stop(who.pid)
    stage.stop(up.pid)
    return found


def million(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """PSS of master and worker while a million requests are served; a quick run serves fewer."""
    wanted, figures = (3_000, {}) if args.quick else (1_000_000, {})
    up = servers.upstream(stage)
    for name, folder in args.routers.items():
        who, served, bad, seen = servers.router(stage, up, folder, **args.env), 0.0, 0, []
        while served < wanted:
            turn = wrk(who, small_body(who.model), 16, 1 if args.quick else 20, stage.root)
            served, bad = served + turn.rate * (1 if args.quick else 20), bad + turn.bad
            seen.append(memory_mib(who.pid)[0])
        stage.stop(who.pid)
        late = max(seen[len(seen) // 2 :])
        figures[name] = {"served": served, "bad": bad, "each_mib": seen, "late": late / seen[0]}
    stage.stop(up.pid)
    rows = [
        [name, f"{row['served']:,.0f}", f"{row['bad']}", f"{row['each_mib'][0]:.0f}",
         f"{min(row['each_mib']):.0f}-{max(row['each_mib']):.0f}"] for name, row in figures.items()
    ]  # fmt: skip
    head = ["", "requests", "errors", "MiB at first", "min-max"]
    return figures, "million: PSS of the process tree while serving 1 KB bodies", head, rows


def while_streaming(stage: Stage, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Memory in the middle of 256 streams."""
    up = streams.delaying_upstream(stage, 200)
    who = servers.router(stage, up, folder, **{"ROUTER_THREADS": "300", **args.env})
    client = streams.ask(who, 256, 10 if args.quick else 25, 1500, 30)
    most = (0.0, 0.0)
    while client.poll() is None:  # the middle is where the most is in use
        most = max(most, memory_mib(who.pid))
        time.sleep(0.25)
    turn = json.loads(client.communicate()[0])
    stage.stop(who.pid)
    stage.stop(up.pid)
    return {"open_at_once": turn["open_at_once"], "streams_mib": most[0],
            "streams_rss_mib": most[1]}  # fmt: skip


# --- start -------------------------------------------------------------------------------------


def start(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """Seconds from the execution of gunicorn to the first chat answered; the first start is free.

    That first one may have to compile the files to bytecode.
    """
    up = servers.upstream(stage)
    figures = {}
    for name, folder in args.routers.items():
        times = [first_answer(stage, up, folder, args.env) for _ in range(3 if args.quick else 8)]
        figures[name] = {"first_answer_s": median(times[1:]), "each_s": times[1:]}
    stage.stop(up.pid)
    rows = [
        [name, f"{row['first_answer_s']:.2f}", f"{min(row['each_s']):.2f}-{max(row['each_s']):.2f}"]
        for name, row in figures.items()
    ]
    return figures, "start: to the first answered chat", ["", "median s", "min-max"], rows


def first_answer(stage: Stage, up: Contestant, folder: Path, env: dict[str, str]) -> float:
    """Start a router, ask it until it answers, end it."""
    began = time.monotonic()
    who = servers.router(stage, up, folder, wait=False, **env)
    while time.monotonic() - began < 30 and stage.runs(who.pid):
        try:
            Asking(who, small_body(who.model)).seconds()
            break
        except OSError:
            time.sleep(0.005)
    else:
        servers.ready(stage, who, 0)  # says why
    took = time.monotonic() - began
    stage.stop(who.pid)
    return took


# --- growth ------------------------------------------------------------------------------------


class Asking:
    """One connection that sends the same chat again and again."""

    def __init__(self, who: Contestant, body: bytes):
        self.who, self.body = who, body
        self.connection = http.client.HTTPConnection("127.0.0.1", who.port, timeout=30)
        self.times: list[float] = []

    def seconds(self) -> float:
        """Ask once; how long it took."""
        began = time.perf_counter()
        self.connection.request("POST", self.who.path, self.body, self.who.all_headers)
        reply = self.connection.getresponse()
        said = reply.read()
        if reply.status != 200:
            sys.exit(f"{self.who.name} answered {reply.status}: {said[:300].decode()}")
        return time.perf_counter() - began


def added_ms(up: Contestant, asked: list[tuple[Contestant, bytes]], seconds: float) -> list[float]:
    """What each adds to asking the upstream: medians in ms, measured in turns."""
    pairs = [(Asking(up, body), Asking(who, body)) for who, body in asked]
    for pair in pairs:
        for one in pair:
            for _ in range(5):  # connections, pools and caches
                one.seconds()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for pair in pairs:
            for one in pair:
                one.times.append(one.seconds())
    return [1e3 * (median(who.times) - median(direct.times)) for direct, who in pairs]


def growth(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """What the router adds to a request, over the sizes of four things."""
    up = servers.upstream(stage)
    figures, rows = {}, []
    for name, folder in args.routers.items():
        figures[name] = figure = growth_of(stage, up, folder, args)
        for key, label in (
            ("kb", "KB of body"),
            ("categories", "categories"),
            ("keywords", "keywords more"),
            ("requests", "requests before"),
        ):
            each = ", ".join(f"{size}: {ms:.2f}" for size, ms in figure[key].items())
            rows.append([f"{name}, {label}", each, f"{figure[f'{key}_ratio']:.2f}"])
    stage.stop(up.pid)
    return figures, "growth: ms added to a request", ["", "ms", "ratio"], rows


def growth_of(
    stage: Stage, up: Contestant, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one checkout; each ratio is 1 when size costs nothing more than it must."""

    def run(**changes: Any) -> Contestant:
        table = {**servers.routes_for(up, folder), **changes}
        return servers.router(stage, up, folder, routes=table, **args.env)

    categories = servers.routes_for(up, folder)["categories"]
    seconds = 2.0 * args.seconds
    plain = run()
    kb = (1, 10, 100, 1000)
    sizes = added_ms(up, [(plain, talk_body(plain.model, n)) for n in kb], seconds)

    # 196 more with the two keywords that a category of one's own would have
    own = {f"own-{n}": {"models": CHAIN, "keywords": [f"subject{n}", f"topic {n}"],
                        "description": f"Subject {n}"} for n in range(196)}  # fmt: skip
    many = run(categories={**categories, **own})
    body = small_body(plain.model)
    few_many = added_ms(up, [(plain, body), (many, body)], seconds)
    stage.stop(many.pid)

    bare = {name: {**category, "keywords": []} for name, category in categories.items()}
    words = [f"made-up{n}" if n % 2 else f"made up{n}" for n in range(10_000)]
    wordy = {**bare, "conversation": {**bare["conversation"], "keywords": words}}
    none, ten_thousand = run(categories=bare), run(categories=wordy)
    without_with = added_ms(up, [(none, body), (ten_thousand, body)], seconds)
    for who in (none, ten_thousand, plain):
        stage.stop(who.pid)

    # two of a kind, one of which has 2,000 requests behind it, measured in turns
    fresh, used = run(), run()
    old = Asking(used, body)
    for _ in range(2000):
        old.seconds()
    before_after = added_ms(up, [(fresh, body), (used, body)], min(seconds, 1.5))
    for who in (fresh, used):
        stage.stop(who.pid)
    return {
        "kb": dict(zip(kb, sizes, strict=True)),
        "kb_ratio": ((sizes[3] - sizes[0]) / 999) / ((sizes[2] - sizes[0]) / 99),
        "categories": {4: few_many[0], 200: few_many[1]},
        "categories_ratio": few_many[1] / few_many[0],
        "keywords": {0: without_with[0], 10_000: without_with[1]},
        "keywords_ratio": without_with[1] / without_with[0],
        "requests": {0: before_after[0], 2000: before_after[1]},
        "requests_ratio": before_after[1] / before_after[0],
    }
