"""Programs of the speed bench: started in folders of their own, measured, ended by process id."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

CPUS = sorted(os.sched_getaffinity(0))
SERVING, LOADING = CPUS[0], CPUS[-1]  # with --pin: contestants; the bench itself, load, upstream


class Stage:
    """Starts programs, each in a folder of its own, and ends them by process id."""

    def __init__(self, pin: bool = False):
        self.pin = pin
        if pin:  # wrk and the other clients inherit it
            os.sched_setaffinity(0, {LOADING})
        self.root = Path(tempfile.mkdtemp(prefix="llm-router-bench-"))
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type | None, e: Exception | None, at: TracebackType | None) -> None:
        while self.processes:
            self.stop(self.processes[-1].pid)
        shutil.rmtree(self.root, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """A new folder for one program."""
        return Path(tempfile.mkdtemp(prefix=f"{name.replace('/', '-')}-", dir=self.root))

    def start(
        self,
        command: list[Any],
        folder: Path,
        cpu: int = SERVING,
        cwd: Path | None = None,
        **env: str,
    ) -> int:
        """Run a command, its output in a file of `folder`; its pid."""
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=cwd or folder,
                env={**clean_environment(), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=(lambda: os.sched_setaffinity(0, {cpu})) if self.pin else None,
            )
        self.processes.append(process)
        return process.pid

    def runs(self, pid: int) -> bool:
        """True while a started program has not ended."""
        return any(p.pid == pid and p.poll() is None for p in self.processes)

    def stop(self, pid: int) -> None:
        """End one program and its children: politely, after ten seconds by force."""
        settle(pid)  # gthread hangs when told to quit while it hands a request to a thread
        process = next(p for p in self.processes if p.pid == pid)
        self.processes.remove(process)
        quick = "gunicorn" in process.args  # which would wait for its threads on SIGTERM
        process.send_signal(signal.SIGINT if quick else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            for member in reversed(tree(pid)):  # our own children, and theirs
                os.kill(member, signal.SIGKILL)
            process.wait(10)


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name, from the state on; [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (stat := stat_of(int(entry))):
            parents[int(entry)] = int(stat[1])

    def below(root: int) -> Iterator[int]:
        yield root
        for child, parent in parents.items():
            if parent == root:
                yield from below(child)

    return list(below(pid))


def cpu_seconds(pid: int) -> float:
    """User and system time of the process tree so far."""
    ticks = sum(int(stat[11]) + int(stat[12]) for p in tree(pid) if (stat := stat_of(p)))
    return ticks / os.sysconf("SC_CLK_TCK")


def settle(pid: int) -> None:
    """Wait until a process tree is idle: what it still has to do must not disturb the next turn."""
    until, before = time.monotonic() + 3, -1.0
    while time.monotonic() < until and (now := cpu_seconds(pid)) > before:
        before = now
        time.sleep(0.05)


def memory_mib(pid: int) -> tuple[float, float]:
    """(PSS of the process tree, RSS of its largest process) in MiB."""
    pss, rss = 0, [0]
    for member in tree(pid):
        try:
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = dict(re.findall(r"(?m)^(Rss|Pss):\s+(\d+) kB", text))
        pss += int(sizes.get("Pss", 0))
        rss.append(int(sizes.get("Rss", 0)))
    return pss / 1024, max(rss) / 1024


def clean_environment() -> dict[str, str]:
    """The environment without settings of the router and without proxies.

    Bytecode may be written: a start that compiles every file anew is nobody's start.
    """
    unwanted = re.compile(r"(?i)ROUTER_.*|OPENROUTER_API_KEY|.*_PROXY|PYTHONDONTWRITEBYTECODE")
    return {k: v for k, v in os.environ.items() if not unwanted.fullmatch(k)}


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
