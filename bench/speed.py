"""How fast the router is beside what it could be compared with, all of it on this machine.

    python bench/speed.py [--quick] [--only small,alone,agent,formats,streams,edits,board,...]
        [--rounds N] [--seconds S] [--pin] [--router DIR ...] [--env NAME=VALUE ...] [--json FILE]

small    1 KB bodies, an upstream without delay, 16 connections
alone    the same on one connection: what a request costs in time
agent    200 KB bodies (40 messages, 20 tools), 8 connections
formats  1 KB bodies, 16 connections: the router in chat, Messages and Responses
streams  many parallel streams of server-sent events: the delay of each event   (bench/streams.py)
edits    the same while routes.json is edited ten times a second
board    added latency, streams held and memory as a public board has them   (bench/board.py)
memory   PSS after load, and while streams are open         (bench/size.py)
start    from the execution of gunicorn to the first answer                     (bench/size.py)
growth   time per request over the sizes of things                              (bench/size.py)

Contestants are measured in turns, in an order that changes from round to round; figures are
medians over the rounds. On shared cores only the ratios within one run mean anything. `direct` is
the upstream itself, `nginx` a bare proxy, `constant` and `flask` gunicorn with the router's kind of
worker and a constant answer. LiteLLM and Portkey take part when BENCH_LITELLM (its executable) and
BENCH_PORTKEY (build/start-server.js of its gateway) name them. `--pin` keeps the contestants on one
CPU, load and upstream on another. `--router` may be repeated to compare checkouts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import signal
import sys
from pathlib import Path
from statistics import median
from typing import Any

import board
import servers
import size
import streams
from goals import Figures, goal_rows, ratio
from load import Load, agent_body, in_format, need_wrk, small_body, wrk
from processes import Stage, memory_mib
from servers import Contestant

CONTESTS = ("small", "alone", "agent", "formats", "streams", "edits", "board", "memory", "start",
            "growth")  # fmt: skip
QUICK = CONTESTS[:-1]
ON_DEMAND = ("million",)  # takes 15 minutes
LOADS = {  # contest: body, connections, who takes no part, who else does not in a quick run
    "small": (small_body, 16, (), ("flask",)),
    "alone": (small_body, 1, ("flask",), ("constant", "nginx")),
    "agent": (agent_body, 8, ("constant", "flask"), ("nginx",)),
    "formats": (small_body, 16, (), ()),
}


def contestants(stage: Stage, up: Contestant, args: argparse.Namespace) -> list[Contestant]:
    """All that can be started here, the upstream itself first."""
    found = [up, servers.nginx(stage, up), servers.constant(stage),
             servers.constant(stage, "flask")]  # fmt: skip
    found += [
        servers.router(stage, up, folder, name, **args.env) for name, folder in args.routers.items()
    ]
    found += [servers.litellm(stage, up), servers.portkey(stage, up)]
    return [who for who in found if who]


def loads(stage: Stage, args: argparse.Namespace, figures: Figures) -> None:
    """The contests under wrk: requests/s, latency, CPU time."""
    wanted = [name for name in LOADS if name in args.only]
    if not wanted:
        return
    everyone = contestants(stage, servers.upstream(stage), args)
    for contest in wanted:
        body, connections, absent, absent_too = LOADS[contest]
        absent += absent_too if args.quick else ()
        here = [who for who in everyone if who.name not in absent]
        if contest == "formats":
            here = [in_path for who in everyone if who.name in args.routers
                    for in_path in servers.in_formats(who)]  # fmt: skip
        turns: dict[str, list[Load]] = {who.name: [] for who in here}
        for n in range(args.rounds):
            for who in here[n % len(here) :] + here[: n % len(here)]:
                request = in_format(who.path, body(who.model))
                if warm := warming(args.quick, n, contest == wanted[0]):
                    wrk(who, request, connections, warm, stage.root)
                turn = wrk(who, request, connections, args.seconds, stage.root)
                turns[who.name].append(turn)
        first = next(iter(args.routers))
        figures[contest] = rows = summed_up(turns, first)
        for who in here:
            rows[who.name]["pss_mib"] = memory_mib(who.pid)[0]
        say_loads(contest, connections, rows, first)
    for who in everyone:
        stage.stop(who.pid)


def warming(quick: bool, n: int, first: bool) -> int:
    """Seconds of warm-up before round `n`: Node compiles while it runs, and LiteLLM fills caches.

    A quick run has one second of it in all, which favours whatever is compiled already.
    """
    return int(first) if quick else 1 if n else 3


def summed_up(turns: dict[str, list[Load]], first: str) -> dict[str, dict[str, Any]]:
    """Medians over the rounds. Ratios are taken within each round, where the noise is shared."""
    return {
        name: {
            "rate": median(turn.rate for turn in mine),
            "rates": [round(turn.rate, 1) for turn in mine],
            "p50_ms": median(turn.p50_ms for turn in mine),
            "p99_ms": median(turn.p99_ms for turn in mine),
            "cpu_ms": median(turn.cpu_ms for turn in mine),
            "router_is": median(
                ratio(r.rate, t.rate) for r, t in zip(turns[first], mine, strict=True)
            ),
            "bad": sum(turn.bad for turn in mine),
        }
        for name, mine in turns.items()
    }


def say_loads(contest: str, connections: int, rows: dict[str, dict[str, Any]], first: str) -> None:
    """One contest as a table."""
    title = {"agent": "200 KB agent body"}.get(contest, "1 KB body")
    many = "connection" if connections == 1 else "connections"
    table(
        f"{contest}: {title}, {connections} {many}",
        [
            "",
            "requests/s",
            "min-max",
            "p50 ms",
            "p99 ms",
            "CPU ms/request",
            f"{first} is",
            "MiB",
            "errors",
        ],
        [
            [
                name,
                f"{row['rate']:.0f}",
                f"{min(row['rates']):.0f}-{max(row['rates']):.0f}",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['cpu_ms']:.3f}",
                f"{row['router_is']:.2f} x",
                f"{row['pss_mib']:.0f}",
                f"{row['bad'] or '-'}",
            ]
            for name, row in rows.items()
        ],
    )


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns, the first one to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(["  " + row[0].ljust(widths[0]), *cells]))


# --- the command -------------------------------------------------------------------------------


def machine() -> str:
    """What this ran on."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return (
        f"machine: {found[1] if found else platform.machine()}, {cores} cores, "
        f"Python {platform.python_version()}, Linux {platform.release()}"
    )


def arguments() -> argparse.Namespace:
    """The command line; `routers` maps names to checkouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, without growth")
    parser.add_argument("--only", help=f"some of {','.join(CONTESTS + ON_DEMAND)}, with commas")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--seconds", type=int, help="of wrk, each turn; default 3")
    parser.add_argument("--streams", type=int, help="at once; default 256")
    parser.add_argument("--pin", action="store_true", help="contestants on CPU 0, load on CPU 1")
    parser.add_argument("--router", action="append", type=Path, help="a checkout; this one")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for the router")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    args.only = args.only.split(",") if args.only else list(QUICK if args.quick else CONTESTS)
    if wrong := set(args.only) - set(CONTESTS + ON_DEMAND):
        parser.error(f"--only: no contest {', '.join(sorted(wrong))}")
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.seconds = args.seconds or (1 if args.quick else 3)
    args.env = dict(pair.split("=", 1) for pair in args.env)
    folders = [folder.resolve() for folder in args.router or [Path(__file__).parent.parent]]
    args.routers = {}
    for folder in folders:
        name = "router" if len(folders) == 1 else folder.name
        same = sum(taken.split("#")[0] == name for taken in args.routers)
        args.routers[f"{name}#{same + 1}" if same else name] = folder
    if args.pin and len(os.sched_getaffinity(0)) < 2:
        parser.error("--pin needs two CPUs")
    return args


def leave(*_: Any) -> None:
    """On SIGTERM: out through the end of the stage, which a second signal must not cut short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> int:
    """Run the contests and print their tables."""
    args = arguments()
    need_wrk()
    command, here = f"python {shlex.join(sys.argv)}", machine()
    now = datetime.datetime.now(datetime.UTC)
    print(f"{here}\ndate: {now:%Y-%m-%d %H:%M} UTC\ncommand: {command}")
    figures: Figures = {}
    signal.signal(signal.SIGTERM, leave)
    with Stage(args.pin) as stage:
        loads(stage, args, figures)
        for contest, run in (
            ("streams", streams.contest),
            ("edits", streams.edits),
            ("board", board.contest),
            ("memory", size.memory),
            ("start", size.start),
            ("growth", size.growth),
            ("million", size.million),
        ):
            if contest in args.only:
                figures[contest], *shown = run(stage, args)
                table(*shown)
    routers = list(args.routers)
    table("goals", ["", "goal", *routers], goal_rows(figures, routers))
    if args.json:
        about = {"machine": here, "date": now.isoformat(), "command": command}
        args.json.write_text(json.dumps({**about, "figures": figures}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
