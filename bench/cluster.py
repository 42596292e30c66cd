"""Two instances, their Redis and an nginx on this machine: what is shared, and what it costs.

    python bench/cluster.py [--seconds 10]

Real programs on 127.0.0.1, in folders of their own, ended by process id: Debian's redis-server
and nginx with deploy/nginx.conf, gunicorn twice, and a scripted upstream. Prints a line per step
with the time it took, then what Redis was asked. Exit status 1 when a step is not as promised.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # first: this file has the name of the module it shows
from helpers import kill_all, open_circuits
from test_cluster import POEM, Pair, Redis, categories, cluster_of, site_for, wait_until_due
from test_nginx import Nginx
from upstream import Upstream, error, slow, whole

PROBES = 200


def say(what: str, took_s: float | None = None) -> None:
    """One line of the report."""
    print(what if took_s is None else f"{what:72}{took_s * 1000:6.0f} ms", flush=True)


class Load:
    """Clients that ask through nginx, 40 requests a second in all, until told to stop."""

    def __init__(self, nginx: Nginx, clients: int = 8):
        self.nginx, self.found = nginx, []
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(clients)
        self.futures = [self.pool.submit(self.ask) for _ in range(clients)]

    def ask(self) -> None:
        """One client."""
        while not self.stopped.wait(0.2):
            self.found.append(self.nginx.chat().status_code)

    def stop(self) -> str:
        """What came back, in words."""
        self.stopped.set()
        for future in self.futures:
            future.result(30)
        return f"{len(self.found)} requests, {sum(s != 200 for s in self.found)} failed"


def show_sharing(two: Pair, upstream: Upstream) -> None:
    """A category and a circuit go from one instance to the other."""
    two.a.post("/config/category", POEM).raise_for_status()
    say(
        "category `poem` posted to a; on both after",
        two.both(lambda one: "poem" in categories(one)),
    )
    requests.delete(two.b.base + "/config/category/poem", timeout=5).raise_for_status()
    took = two.both(lambda one: "poem" not in categories(one))
    say("category `poem` deleted on b; gone on both after", took)
    upstream.scripts["acme/one"] = error(500)
    while "acme/one" not in open_circuits(two.a):
        two.a.chat()
    say(
        "acme/one fails on a; open on both after",
        two.both(lambda one: "acme/one" in open_circuits(one)),
    )
    wait_until_due(two.a)
    wait_until_due(two.b)
    upstream.scripts["acme/one"] = slow(1.5, whole("I am back"))
    upstream.requests.clear()
    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda n: (two.a, two.b)[n % 2].chat().status_code, range(30)))
    probes = upstream.models_asked().count("acme/one")
    say(f"30 requests to both at once: {found.count(200)} answered, probes of acme/one: {probes}")
    say(
        "the probe was answered; closed on both after",
        two.both(lambda one: open_circuits(one) == {}),
    )
    assert (found.count(200), probes) == (30, 1)
    upstream.scripts.clear()


def show_outages(two: Pair, nginx: Nginx) -> None:
    """Redis hangs, dies and comes back; an instance dies. Nobody outside notices."""
    load = Load(nginx)
    ends: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
        ("Redis hangs (SIGSTOP)", two.server.hang, two.server.go_on),
        ("Redis is killed, and comes back empty", two.server.kill, two.server.start),
    ]
    for what, begin, end in ends:
        begin()
        say(f"{what}; both alone after", two.both(lambda one: cluster_of(one)["status"] == "alone"))
        status = two.a.post("/config/category", POEM).status_code
        say(f"  a change meanwhile: {status}")
        end()
        took = two.both(lambda one: cluster_of(one)["instances"] == ["a", "b"])
        say("  Redis is back; both joined after", took)
        assert status == 503
    kill_all(two.b)
    began = time.monotonic()
    while cluster_of(two.a)["instances"] != ["a"]:
        time.sleep(0.01)
    say("b is killed (SIGKILL); a counts it out after", time.monotonic() - began)
    say(f"  through nginx during all of this: {load.stop()}")
    assert set(load.found) == {200}


def commands(server: Redis) -> tuple[float, int, float, dict[str, int]]:
    """Time, commands processed, CPU seconds of Redis, and calls per command."""
    stats = server.client.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): int(row["calls"]) for name, row in stats.items()}
    cpu = server.client.info("cpu")
    total = server.client.info("stats")["total_commands_processed"]
    return time.monotonic(), total, cpu["used_cpu_user"] + cpu["used_cpu_sys"], calls


def show_cost(two: Pair, seconds: float) -> None:
    """What two instances ask of Redis, and what hundred would."""
    began, total, cpu, calls = commands(two.server)
    time.sleep(seconds)
    ended, total_after, cpu_after, calls_after = commands(two.server)
    took = ended - began
    sent = (calls_after["evalsha"] - calls["evalsha"]) / took / 2
    ours = total_after - total - 5  # our own INFOs
    share = (cpu_after - cpu) / took / 2
    say(f"at rest, per instance and second: {sent:.1f} commands sent, {ours / took / 2:.1f} with "
        f"those inside scripts")  # fmt: skip
    say(f"CPU of Redis per instance: {share * 100:.2f} % of one core")
    say(f"by arithmetic, 100 instances: {100 * sent:.0f} commands a second, "
        f"{100 * share * 100:.0f} % of one core")  # fmt: skip


def show_probe_cost(server: Redis) -> None:
    """How long a request waits for the lease of a probe, measured as the router asks."""
    from parts import cluster

    link = cluster.Link(server.url, "bench", time.monotonic)
    link.look()
    keys = cluster.KEYS["circuits"], cluster.KEYS["instances"], cluster.probe_key("bench")
    took_ms = []
    for n in range(PROBES):
        began = time.monotonic()
        link.call("probe", keys, "bench", "", f"{link.member}|{n}", 1, 1000)
        took_ms.append((time.monotonic() - began) * 1000)
        time.sleep(0.002)
    server.client.zrem(cluster.KEYS["instances"], link.member)
    p99 = sorted(took_ms)[int(PROBES * 0.99)]
    say(f"a probe's lease: {statistics.median(took_ms):.2f} ms in the median, {p99:.2f} ms at p99")


def main() -> int:
    """Run all steps."""
    parser = argparse.ArgumentParser(description="Two instances, Redis and nginx on this machine.")
    parser.add_argument("--seconds", type=float, default=10, help="how long Redis is counted")
    seconds = parser.parse_args().seconds
    missing = [name for name in ("redis-server", "nginx") if not shutil.which(name)]
    if missing:
        print(
            f"not installed: {', '.join(missing)}; on Debian: sudo apt install redis-server nginx"
        )
        return 1
    root = Path(tempfile.mkdtemp(prefix="llm-router-cluster-"))
    for name in ("redis", "a", "b", "nginx"):
        (root / name).mkdir()
    upstream, server = Upstream(), Redis(root / "redis")
    two = Pair(server, upstream, [root / "a", root / "b"])
    nginx = Nginx(root / "nginx", two.a.port, site_for(two.a, two.b))
    try:
        two.is_calm()
        say(f"redis-server {server.port}, instances a {two.a.port} and b {two.b.port}, "
            f"nginx {nginx.port} with least_conn")  # fmt: skip
        show_sharing(two, upstream)
        show_cost(two, seconds)
        show_probe_cost(server)
        show_outages(two, nginx)
    finally:
        nginx.stop()
        two.a.stop()
        two.b.stop()
        server.stop()
        upstream.close()
        shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
