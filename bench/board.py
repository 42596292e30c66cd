"""What a public board of gateways measures, here: added latency, streams held, memory.

Its method, in our own code (onthebench.ai, as read in November 2026): one connection, and what the
gateway adds to the upstream's own p50 and p99; streams of a role and 64 deltas 20 ms apart, twice
as many each time, held as long as no frame is lost and no pause is over ten times as long as it
should be; what is added to the first token at 64 streams; memory at rest, under that load, and
after it. The published figures beside it come from another machine.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import servers
import streams
from load import Load, small_body, wrk
from processes import Stage, memory_mib, settle
from servers import Contestant

DELTAS, GAP_MS, STALL = 64, 20.0, 10
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
AT = 64  # streams, where the first token is measured
PUBLISHED = {  # added p99 at one connection in ms, streams held
    "Helicone": (0.444, None), "Bifrost": (0.939, 128), "Portkey": (3.262, 32),
    "LiteLLM": (7.996, 1),
}  # fmt: skip


def contestants(stage: Stage, up: Contestant, args: argparse.Namespace) -> list[Contestant]:
    """The upstream itself first."""
    env = {"ROUTER_THREADS": str(COUNTS[-1] + 88), **args.env}
    found = [up, servers.nginx(stage, up)]
    found += [servers.router(stage, up, folder, name, **env)
              for name, folder in args.routers.items()]  # fmt: skip
    found += [servers.portkey(stage, up), servers.litellm(stage, up)]
    return [who for who in found if who]


def contest(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """Figures and table."""
    figures: dict[str, dict[str, Any]] = {}
    quick = contestants(stage, servers.upstream(stage), args)
    turns: dict[str, list[Load]] = {who.name: [] for who in quick}
    for n in range(args.rounds + 1):
        for who in quick[n % len(quick) :] + quick[: n % len(quick)]:
            turn = wrk(who, small_body(who.model), 1, args.seconds, stage.root)
            turns[who.name] += [turn] if n else []  # the first warms up
    for name, mine in turns.items():
        figures[name] = {
            f"{key}_ms": median(getattr(turn, f"{key}_ms") for turn in mine)
            for key in ("p50", "p99")
        }
    for who in quick:
        stage.stop(who.pid)
    here = contestants(stage, streams.delaying_upstream(stage, GAP_MS), args)
    for who in here:
        figures[who.name] |= held(who, 64 if args.quick else COUNTS[-1], args.rounds)
    for who in here:
        stage.stop(who.pid)
    title = f"board: 1 connection; streams of {DELTAS} deltas {GAP_MS:.0f} ms apart"
    return figures, title, *rows(figures)


def held(who: Contestant, most: int, rounds: int) -> dict[str, Any]:
    """How many streams at once come whole and without a stall, and what that takes."""
    found: dict[str, Any] = {"idle_mib": memory_mib(who.pid)[0], "held": 0, "first_p99_ms": 0.0}
    run(who, 8)
    turns = [run(who, AT) for _ in range(rounds)]
    found["first_p99_ms"] = median(turn["first_p99_ms"] for turn in turns)
    found["event_p99_ms"] = median(turn["p99_ms"] for turn in turns)
    for count in COUNTS:
        if count > most:
            break
        turn = run(who, count)
        if turn["whole"] < count or turn["lost"] or turn["stalls"]:
            found["broke"] = {key: turn[key] for key in ("streams", "whole", "lost", "stalls")}
            break
        found["held"] = count
        found["steady_mib"] = turn["mib"]
    settle(who.pid)
    time.sleep(2)
    found["recovered_mib"] = memory_mib(who.pid)[0]
    return found


def run(who: Contestant, count: int) -> dict[str, Any]:
    """So many streams, begun within the time of half of one."""
    client = streams.ask(who, count, DELTAS, DELTAS * GAP_MS / 2, 60, STALL * GAP_MS)
    most = 0.0
    while client.poll() is None:
        most = max(most, memory_mib(who.pid)[0])
        time.sleep(0.25)
    turn: dict[str, Any] = json.loads(client.communicate()[0])
    settle(who.pid)
    return {**turn, "mib": most}


def rows(figures: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    head = ["", "added p50 ms", "added p99 ms", "streams held", "first token p99, added ms",
            "event p99 ms", "MiB idle", "steady", "recovered"]  # fmt: skip
    direct = figures["direct"]
    shown = [
        [
            name,
            f"{row['p50_ms'] - direct['p50_ms']:.2f}",
            f"{row['p99_ms'] - direct['p99_ms']:.2f}",
            f"{row['held']}",
            f"{row['first_p99_ms'] - direct['first_p99_ms']:.2f}",
            f"{row['event_p99_ms']:.2f}",
            f"{row['idle_mib']:.0f}",
            f"{row.get('steady_mib', 0):.0f}",
            f"{row['recovered_mib']:.0f}",
        ]
        for name, row in figures.items()
    ]
    for name, (p99, count) in PUBLISHED.items():
        shown.append([f"{name}, published, another machine", "", f"{p99:.2f}",
                      "" if count is None else f"{count}", "", "", "", "", ""])  # fmt: skip
    return head, shown
