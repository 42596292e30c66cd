"""Parallel streams through the contestants: how late each event is, and are all streams whole.

The upstream and the client are processes of their own, bench/sse.py. `edits` measures the same
while routes.json is edited ten times a second, and requests come that are put into categories.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import requests
import servers
from load import small_body
from processes import LOADING, Stage, cpu_seconds, free_port, settle
from servers import Contestant

CLIENT_AND_UPSTREAM = Path(__file__).resolve().parent / "sse.py"


def delaying_upstream(stage: Stage, gap_ms: float) -> Contestant:
    """An upstream whose events are so far apart."""
    folder, port = stage.folder("delaying"), free_port()
    command = [
        sys.executable,
        CLIENT_AND_UPSTREAM,
        "serve",
        "--port",
        str(port),
        "--gap",
        str(gap_ms),
    ]
    return servers.ready(stage, Contestant("direct", port, stage.start(command, folder, LOADING)))


def ask(who: Contestant, streams: int, events: int, spread_ms: float, limit_s: float,
        stall_ms: float = 1000) -> subprocess.Popen[str]:  # fmt: skip
    """Start a client process; its output is what `sum_up` found."""
    more = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": events}
    body = small_body(who.model, **more)
    headers = "".join(f"{name}: {value}\r\n" for name, value in who.all_headers.items())
    head = f"POST {who.path} HTTP/1.1\r\nHost: 127.0.0.1:{who.port}\r\n{headers}"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body.decode()}"
    process = subprocess.Popen(
        [sys.executable, CLIENT_AND_UPSTREAM, "load"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    given = {"port": who.port, "request": request, "streams": streams, "events": events,
             "spread_ms": spread_ms, "limit_s": limit_s, "stall_ms": stall_ms}  # fmt: skip
    process.stdin.write(json.dumps(given))
    process.stdin.close()
    process.stdin = None  # so that communicate() leaves it alone
    return process


def contest(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """Figures and table: the delay of events through each contestant, in turns."""
    streams, events, gap = (64, 25, 20.0) if args.quick else (args.streams or 256, 50, 20.0)
    up = delaying_upstream(stage, gap)
    env = {"ROUTER_THREADS": "300", **args.env}
    found = [up, servers.nginx(stage, up)]
    found += [
        servers.router(stage, up, folder, name, **env) for name, folder in args.routers.items()
    ]
    if not args.quick:  # LiteLLM alone takes half a minute
        found += [servers.litellm(stage, up), servers.portkey(stage, up)]
    here = [who for who in found if who]
    turns: dict[str, list[dict[str, Any]]] = {who.name: [] for who in here}
    for n in range(args.rounds):
        for who in here[n % len(here) :] + here[: n % len(here)]:
            if n == 0:
                ask(who, 16, 5, 100, 20).communicate()
            before = cpu_seconds(who.pid)
            client = ask(who, streams, events, events * gap / 2, 30)
            turn = json.loads(client.communicate()[0])
            turn["cpu_ms"] = 1e3 * (cpu_seconds(who.pid) - before) / max(1, turn["events"])
            turns[who.name].append(turn)
            settle(who.pid)
    for who in here:
        stage.stop(who.pid)
    keys = ("p50_ms", "p99_ms", "first_ms", "cpu_ms", "client_ms")
    figures = {
        name: {
            **{key: sum(turn[key] for turn in mine) for key in ("whole", "streams")},
            **{key: median(turn[key] for turn in mine) for key in keys},
            "p99_each": [round(turn["p99_ms"], 2) for turn in mine],
            "open_at_once": min(turn["open_at_once"] for turn in mine),
        }
        for name, mine in turns.items()
    }
    return (
        figures,
        f"streams: {streams} streams of {events} events {gap:.0f} ms apart",
        *rows(figures),
    )


EDITING = ("models", "keywords")  # what is edited; nothing at first


def edits(stage: Stage, args: argparse.Namespace) -> tuple[Any, ...]:
    """Figures and table: how late the latest of 16 streams' events is while the file is edited."""
    up = delaying_upstream(stage, 20)
    figures: dict[str, dict[str, Any]] = {}
    for name, folder in args.routers.items():
        who = servers.router(stage, up, folder, name, **args.env)
        files = stage.root.glob(f"{name.replace('/', '-')}-*/routes.json")
        file = max(files, key=lambda file: file.stat().st_mtime)
        turns: dict[str, list[float]] = {what: [] for what in ("nothing", *EDITING)}
        for n in range(args.rounds + 1):
            for what, mine in turns.items():
                client = ask(who, 16, 150, 300, 30)
                count = 0
                while client.poll() is None:
                    count += 1
                    edit(file, what, count)
                    text = f"write a python function, please ({count})"
                    chat = {"model": "router", "messages": [{"role": "user", "content": text}]}
                    requests.post(who.base + who.path, json=chat, timeout=10).raise_for_status()
                    time.sleep(0.1)
                latest = json.loads(client.communicate()[0])["most_ms"]
                mine += [latest] if n else []  # the first warms up
        stage.stop(who.pid)
        figures[name] = {f"{what}_ms": median(mine) for what, mine in turns.items()}
        figures[name] |= {f"{what}_each": mine for what, mine in turns.items()}
    stage.stop(up.pid)
    head = ["", *(f"{what} edited: latest event, ms" for what in ("nothing", *EDITING))]
    shown = [[name, *(f"{row[f'{what}_ms']:.1f}" for what in ("nothing", *EDITING))]
             for name, row in figures.items()]  # fmt: skip
    return figures, "edits: 16 streams, routes.json edited ten times a second", head, shown


def edit(file: Path, what: str, n: int) -> None:
    """Another chain or another keyword in the file, as an editor writes it."""
    if what == "nothing":
        return
    table = json.loads(file.read_text())
    category = table["categories"]["code"]
    if what == "models":
        category["models"] = category["models"][::-1]
    else:
        category["keywords"] = [f"word{n}"]
    new = file.with_suffix(".new")
    new.write_text(json.dumps(table, indent=2))
    new.replace(file)


def rows(figures: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    head = ["", "whole", "open at once", "event p50 ms", "p99 ms", "min-max", "added p99",
            "first p50 ms", "added", "CPU ms/event"]  # fmt: skip
    direct = figures["direct"]
    return head, [
        [
            name,
            f"{row['whole']}/{row['streams']}",
            f"{row['open_at_once']}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{min(row['p99_each']):.2f}-{max(row['p99_each']):.2f}",
            f"{row['p99_ms'] - direct['p99_ms']:.2f}",
            f"{row['first_ms']:.2f}",
            f"{row['first_ms'] - direct['first_ms']:.2f}",
            f"{row['cpu_ms']:.3f}",
        ]
        for name, row in figures.items()
    ]
