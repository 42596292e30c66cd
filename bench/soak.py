"""A soak: 30 kinds of requests and faults at once while descriptors, disk and connections run out.

    python bench/soak.py [--seconds 600] [--clients 12] [--folder DIR]

The real service, a scripted upstream and the clients all run on this machine. `--folder`: where the
service keeps its files; a small file system of its own (mount -t tmpfs -o size=64m) is filled up
when the disk's turn comes, else RLIMIT_FSIZE stands in. Exit status 1 when something was lost: a
permit, a thread, a descriptor, a count, or an answer that is neither complete nor an error that
says so. Each 30 s, and at rest in the end, a line tells the memory of the worker.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers import CHAT, errors_of, head_of, reset, user, words_of, worker_of
from service import Service, small_routes
from upstream import (
    DONE,
    WORDS,
    Peer,
    Request,
    Upstream,
    drop_at_once,
    error,
    events,
    hang,
    pieces,
    plain,
    raw,
    reset_at_once,
    slow,
    whole,
)

SAID = "".join(WORDS)
LARGE = "x" * 3_000_000  # an answer that a slow reader takes in many pieces
PATIENCE_S = 40.0  # of a client
HEAD_S = 10.0  # what the service gives a connection that has said nothing, or half a head
BEGUN = events(WORDS)[:4]
CONNECTIONS = 250  # the service's limit, so that it can be reached

# Model by model what the upstream does. A good one stands behind each in its chain.
BEFORE = {
    "reset": reset_at_once,
    "dropped": drop_at_once,
    "silent": hang,
    "limited": error(429, Retry_After="1"),
    "broken": error(500),
    "busy": error(503),
    "html": plain(200, b"<html>hello</html>", "text/html"),
    "empty": whole(""),
    "nonsense": raw(b"NONSENSE\r\n\r\n"),
    "half": raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    ),
    "slow": slow(0.4, whole(SAID)),
}
# These begin an answer and do not end it.
AFTER = {
    "cut": pieces(BEGUN, "cut"),
    "stalled": pieces(BEGUN, "hang"),
    "reset-late": pieces(BEGUN, "reset"),
    "error-late": pieces([*BEGUN, b'data: {"error": {"message": "broke", "code": 500}}\n\n']),
}

# The other kinds, methods of `Soak`, and what may come of them while nothing runs out.
OTHERS = {
    "held streamed large_body slow_reader two_in_a_row edit figures health dry_run": "complete",
    "alone bad_body too_large unknown_route": "error",
    "leaves_in_head leaves_in_body leaves_waiting leaves_in_stream leaves_with_reset "
    "edit_by_hand": "left",
    "says_nothing says_half_a_head": "left complete",
}


def good(peer: Peer, request: Request) -> Any:
    """A stream with pauses, or a whole answer."""
    if not request.body.get("stream"):
        return whole(SAID)(peer, request)
    return pieces([part for event in events(WORDS) for part in (event, 0.003)])(peer, request)


def routes_for(url: str) -> dict[str, Any]:
    chains = {name: [f"acme/{name}", "acme/good"] for name in (*BEFORE, *AFTER)}
    alone = {"alone": ["acme/broken"], "large": ["acme/large"], "conversation": ["acme/good"]}
    made = {name: {"models": chain} for name, chain in {**chains, **alone}.items()}
    breaker = {"failure_threshold": 3, "recovery_timeout_sec": 5, "first_retry_sec": 0.5}
    limits = {"connect": 2, "first_token": 2, "idle": 2, "answer": 2, "total": 20}
    return small_routes(url, circuit_breaker=breaker, timeouts_sec=limits, models={},
                        categories=made)  # fmt: skip


class Soak:
    """Clients of every kind, and what came of each."""

    def __init__(self, service: Service, upstream: Upstream):
        self.service, self.upstream = service, upstream
        self.seen: Counter[tuple[str, str]] = Counter()  # by kind and by what came of it
        self.booked = Counter[str]()  # chats that the service must have counted, or may have
        self.waiting: deque[tuple[float, socket.socket]] = deque()  # that say nothing
        self.health_s = 0.0  # the slowest
        self.short_of = ""
        self.over = threading.Event()

    # --- what clients are made of

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.service.port), timeout=PATIENCE_S)

    def ask(self, data: bytes, expected: str = SAID, slowly: bool = False) -> str:
        """Send a request; complete, error, or what of it was lost."""
        with self.connect() as sock:
            for at in range(0, len(data), 100_000):
                sock.sendall(data[at : at + 100_000])
            return read_answer(sock, expected, slowly)

    def counted(self, came: str) -> str:
        """What came of a request that the service counts, unless it may not have seen it."""
        self.booked["maybe" if came == "nothing" else "surely"] += 1
        return came

    def chat(self, category: str = "conversation", expected: str = SAID, slowly: bool = False,
             headers: tuple[str, ...] = (), **more: Any) -> str:  # fmt: skip
        return self.counted(self.ask(chat_to(category, *headers, **more), expected, slowly))

    @contextlib.contextmanager
    def left(self, data: bytes, surely: bool = True) -> Iterator[socket.socket]:
        """A connection on which a chat's head was sent, and which then ends."""
        with self.connect() as sock:
            sock.sendall(data)
            self.booked["surely" if surely and not self.short_of else "maybe"] += 1
            yield sock

    # --- the kinds

    def fault(self, name: str) -> str:
        return self.chat(name, stream=random.random() < 0.5)

    def begun(self, name: str) -> str:
        return self.chat(name, stream=True)

    def held(self) -> str:
        name = random.choice(list(AFTER))
        return self.chat(name, stream=True, headers=("X-Router-Stream: whole",))

    def streamed(self) -> str:
        return self.chat(stream=True)

    def alone(self) -> str:
        return self.chat("alone", stream=random.random() < 0.5)

    def large_body(self) -> str:
        return self.chat(text="word " * random.choice((2_000, 40_000, 300_000)))

    def slow_reader(self) -> str:
        return self.chat("large", LARGE, slowly=True)

    def bad_body(self) -> str:
        body = random.choice((b"{", b'{"messages": 1}', b'{"messages": [], "top_p": 1e999}', b"[]"))
        return self.counted(self.ask(head_of("POST", CHAT, body=body)))

    def too_large(self) -> str:
        return self.chat(text="word " * 500_000)

    def two_in_a_row(self) -> str:
        with self.connect() as sock:
            came = "complete"
            for stream in (True, False):
                if came == "complete":
                    sock.sendall(chat_to("conversation", stream=stream))
                    came = self.counted(read_answer(sock, SAID))
        return self.chat() if came == "nothing" else came  # it may be closed while it rests

    def leaves_in_head(self) -> str:
        with self.connect() as sock:
            sock.sendall(chat_to("conversation")[:40])
        return "left"

    def leaves_in_body(self) -> str:
        with self.left(chat_to("conversation")[:-20]):
            return "left"

    def leaves_waiting(self) -> str:
        with self.left(chat_to("silent")):
            time.sleep(random.random() / 4)
            return "left"

    def leaves_in_stream(self) -> str:
        with self.left(chat_to("conversation", stream=True)) as sock:
            sock.recv(1)
            return "left"

    def leaves_with_reset(self) -> str:
        with self.left(chat_to("conversation"), surely=False) as sock:
            reset(sock)
            return "left"

    def says_nothing(self) -> str:
        return self.says(b"")

    def says_half_a_head(self) -> str:
        return self.says(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")

    def says(self, data: bytes) -> str:
        """Such connections are ended by the service in time; one of earlier is looked at."""
        sock = self.connect()
        sock.sendall(data)
        self.waiting.append((time.monotonic(), sock))
        if time.monotonic() < self.waiting[0][0] + HEAD_S + 2:
            return "left"
        _, sock = self.waiting.popleft()
        with sock:
            sock.settimeout(0.01)
            try:
                return "complete" if sock.recv(1000)[:12] in (b"", b"HTTP/1.1 408") else "false"
            except TimeoutError:
                return "kept"
            except OSError:
                return "complete"

    def edit(self) -> str:
        change = {"name": "extra", "models": ["acme/good"], "keywords": [f"w{random.random()}"]}
        return self.ask(head_of("POST", "/config/category", body=json.dumps(change).encode()), "")

    def edit_by_hand(self) -> str:
        routes = routes_for(self.upstream.url)
        routes["categories"]["alone"]["keywords"] = [f"w{random.random()}"]
        new = self.service.routes.with_suffix(f".{threading.get_ident()}")
        try:
            new.write_text(json.dumps(routes))
            os.replace(new, self.service.routes)
        except OSError:  # the disk is full
            new.unlink(missing_ok=True)
        return "left"

    def figures(self) -> str:
        return self.ask(head_of("GET", random.choice(("/metrics", "/config", "/v1/models"))), "")

    def health(self) -> str:
        began = time.monotonic()
        came = self.ask(head_of("GET", "/health"), "")
        if not self.short_of:
            self.health_s = max(self.health_s, time.monotonic() - began)
        return came

    def dry_run(self) -> str:
        return self.ask(head_of("POST", "/route", body=b'{"text": "hello"}'), "")

    def unknown_route(self) -> str:
        return self.counted(self.ask(head_of("GET", "/v2/nothing"), ""))

    def kinds(self) -> dict[str, tuple[Callable[[], str], set[str]]]:
        """Each kind, and what may come of it while nothing runs out."""
        found: dict[str, tuple[Callable[[], str], set[str]]] = {"good": (self.chat, {"complete"})}
        for name in BEFORE:
            found[name] = lambda name=name: self.fault(name), {"complete"}
        for name in AFTER:
            found[name] = lambda name=name: self.begun(name), {"complete", "error"}
        for names, wanted in OTHERS.items():
            found.update(
                {name: (getattr(self, name), set(wanted.split())) for name in names.split()}
            )
        return found

    def client(self) -> None:
        """One after the other, by chance, until it is over."""
        kinds = self.kinds()
        while not self.over.wait(random.random() * 0.08):
            name = random.choice(list(kinds))
            ask, wanted = kinds[name]
            before = self.short_of
            try:
                came = ask()
            except TimeoutError:
                came = "silence"
            except OSError as e:
                came = f"not reached ({type(e).__name__})"
            allowed = wanted | ({"error", "left"} if before or self.short_of else set())
            self.seen[name, came if came in allowed else f"!{came} {self.short_of}".strip()] += 1


def chat_to(category: str, *headers: str, text: str = "hello", **more: Any) -> bytes:
    body = {"model": f"router/{category}", "messages": [user(text)], **more}
    return head_of("POST", CHAT, *headers, body=json.dumps(body).encode())


def read_answer(sock: socket.socket, expected: str, slowly: bool = False) -> str:
    """complete, an error that says so, or: nothing (no byte), silence, cut, false."""
    reply = http.client.HTTPResponse(sock)
    try:
        reply.begin()
        data = b""
        while slowly and (piece := reply.read(200_000)):
            data += piece
            time.sleep(0.02)
        data += reply.read()
    except TimeoutError:
        return "silence"
    except (OSError, http.client.HTTPException):
        return "nothing" if reply.status == "UNKNOWN" else "cut"
    if reply.headers["Content-Type"].startswith("text/event-stream"):
        is_done = data.endswith(DONE)
        if errors_of(data):
            return "false" if is_done else "error"
        return "complete" if is_done and words_of(data) == expected else "false"
    return judged(reply.status, json.loads(data), expected)


def judged(status: int, body: Any, expected: str) -> str:
    """What a JSON answer is; without `expected` any will do."""
    if status != 200:
        return "error" if body["error"]["message"] else "false"
    is_right = not expected or body["choices"][0]["message"]["content"] == expected
    return "complete" if is_right else "false"


# --- what the worker holds, and what is taken from it --------------------------------------------


class Worker:
    """The worker's process, from outside."""

    def __init__(self, service: Service, upstream: Upstream):
        self.pid, self.service, self.upstream = worker_of(service), service, upstream
        self.limits = {which: resource.prlimit(self.pid, which)
                       for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)}  # fmt: skip
        self.ballast = service.folder / "ballast"
        self.strangers: list[socket.socket] = []

    def read(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def descriptors(self) -> int:
        """But those of pooled connections to the upstream, which may stay."""
        ours = f":{self.upstream.port:04X}"
        pooled = sum(line.split()[2].endswith(ours) and line.split()[3] in ("01", "08")
                     for line in self.read("net/tcp").splitlines()[1:])  # fmt: skip
        return len(os.listdir(f"/proc/{self.pid}/fd")) - pooled

    def threads(self) -> int:
        return int(self.read("status").split("Threads:")[1].split()[0])

    def memory_mib(self) -> tuple[float, float]:
        """RSS and PSS."""
        text = self.read("smaps_rollup")
        return tuple(int(text.split(f"{k}:")[1].split()[0]) / 1024 for k in ("Rss", "Pss"))  # type: ignore[return-value]

    def booked(self) -> int:
        counted: dict[str, int] = self.service.get("/metrics").json()["requests"]
        return sum(counted[outcome] for outcome in ("success", "failed", "rejected", "cancelled"))

    def run_out_of(self, what: str) -> None:
        """Take it away; "" gives all of it back."""
        for which, limits in self.limits.items():
            resource.prlimit(self.pid, which, limits)
        self.ballast.unlink(missing_ok=True)
        while self.strangers:
            self.strangers.pop().close()
        if what == "descriptors":
            most = len(os.listdir(f"/proc/{self.pid}/fd")) + 6
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE,
                             (most, self.limits[resource.RLIMIT_NOFILE][1]))  # fmt: skip
        if what == "disk" and os.statvfs(self.service.folder).f_blocks < 1 << 18:  # one of its own
            with contextlib.suppress(OSError), self.ballast.open("wb") as file:
                while True:
                    file.write(bytes(1 << 20))
        elif what == "disk":
            resource.prlimit(
                self.pid, resource.RLIMIT_FSIZE, (0, self.limits[resource.RLIMIT_FSIZE][1])
            )
        if what == "connections":
            for n in range(2 * CONNECTIONS):
                sock = socket.create_connection(("127.0.0.1", self.service.port), timeout=1)
                if n % 2:
                    sock.sendall(head_of("GET", "/health"))
                self.strangers.append(sock)


def until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait for it so long; whether it came."""
    end = time.monotonic() + seconds
    while not (so := is_so()) and time.monotonic() < end:
        time.sleep(0.1)
    return so


SHORTAGES = ("", "descriptors", "", "disk", "", "connections")


def soak(folder: Path, seconds: float, clients: int) -> tuple[Soak, list[str]]:
    """Run it; the clients' account and what was lost. Prints a line each 30 s."""
    upstream = Upstream()
    upstream.default = good
    upstream.scripts.update({f"acme/{name}": script for name, script in (BEFORE | AFTER).items()})
    upstream.scripts["acme/large"] = whole(LARGE)
    (folder / "log.txt").unlink(missing_ok=True)  # of an earlier run
    args = {"GUNICORN_CMD_ARGS": f"--worker-connections {CONNECTIONS}"}
    with Service(folder, routes_for(upstream.url), ROUTER_MAX_BODY_MB="2", **args) as service:
        soak, worker = Soak(service, upstream), Worker(service, upstream)
        soak.streamed(), soak.chat("large", LARGE)  # start what is started by the first
        before = worker.threads(), worker.descriptors()
        threads = [threading.Thread(target=soak.client) for _ in range(clients)]
        [thread.start() for thread in threads]
        for n, shortage in enumerate(turns := SHORTAGES * max(1, round(seconds / 60))):
            soak.short_of = shortage
            worker.run_out_of(shortage)
            if n % 3 == 0:
                tell(worker, soak)
            time.sleep(seconds / len(turns))
            upstream.requests.clear()
            if soak.short_of:  # what was begun then may end a little later
                worker.run_out_of("")
                time.sleep(min(3.0, seconds / 20))
        soak.over.set()
        [thread.join() for thread in threads]
        [sock.close() for _, sock in soak.waiting]
        lost = losses(soak, worker, before)
        time.sleep(min(20.0, seconds / 20))
        tell(worker, soak)
    upstream.close()
    return soak, lost


def tell(worker: Worker, soak: Soak) -> None:
    """A line of figures."""
    rss, pss = worker.memory_mib()
    print(f"{time.strftime('%H:%M:%S')} RSS {rss:5.1f} PSS {pss:5.1f} MiB, "
          f"{worker.threads()} threads, {worker.descriptors()} descriptors, {soak.seen.total()} "
          f"requests, next short of {soak.short_of or 'nothing'}", flush=True)  # fmt: skip


def losses(soak: Soak, worker: Worker, before: tuple[int, int]) -> list[str]:
    """What is not as it was, or was told falsely."""
    service = soak.service
    lost = [
        f"{kind}: {came[1:]} ({n} times)" for (kind, came), n in soak.seen.items() if came[0] == "!"
    ]
    if not until(lambda: service.get("/metrics").json()["in_flight"] == 0, 30):
        lost.append("permits")
    if not until(lambda: (worker.threads(), worker.descriptors() - 1) <= before, 30):
        lost.append(
            f"threads, descriptors: {before} became {worker.threads(), worker.descriptors()}"
        )
    fewest, most = soak.booked["surely"] + 2, soak.booked.total() + 2
    if not fewest <= worker.booked() <= most:
        lost.append(f"counts: {worker.booked()} booked, {fewest} to {most} sent")
    if worker_of(service) != worker.pid:
        lost.append("the worker")
    log = service.log.read_text(errors="replace")
    lost += {line for line in log.splitlines() if "event=internal_error" in line}
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen, lost = soak(args.folder or Path(folder), args.seconds, args.clients)
    kinds = sorted({kind for kind, _ in seen.seen})
    for kind in kinds:
        came = {what: n for (of, what), n in seen.seen.items() if of == kind}
        print(f"{kind:18} {', '.join(f'{what} {n}' for what, n in sorted(came.items()))}")
    print(
        f"{seen.seen.total()} requests of {len(kinds)} kinds; /health took at most "
        f"{1000 * seen.health_s:.0f} ms with nothing short; lost: {'; '.join(lost) or 'nothing'}"
    )
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
