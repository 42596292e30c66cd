"""What several test files need: waiting, requests as bytes, reading answers, figures, processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from service import Service

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
WHOLE = {"X-Router-Stream": "whole"}
READ_SIZE = 65536
CLOSED = 0  # the status of an answer that did not come: the connection ended


def wait_until(is_so: Callable[[], Any], seconds: float = 5.0) -> float:
    """Return as soon as `is_so()`, with the seconds it took; fail when it is not in time."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() < began + seconds, f"not so within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


# --- requests as bytes, so that no library tidies them -------------------------------------------


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def head_of(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    """The bytes of a request; those of a JSON body are announced."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat_bytes(*headers: str, path: str = CHAT, **more: Any) -> bytes:
    body = {"model": "router", "messages": [user("hello")], **more}
    return head_of("POST", path, *headers, body=json.dumps(body).encode())


def connected(server: Any, data: bytes = b"", timeout: float = 10.0) -> socket.socket:
    """A client's socket, with `data` sent and nothing read; `server` has a port."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=timeout)
    sock.sendall(data)
    return sock


class Reply(NamedTuple):
    """What came back; `status` is CLOSED when nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_reply(file: Any) -> Reply:
    """The next answer of a connection; a 100 on the way to it is passed over."""
    line = file.readline()
    if not line:
        return Reply(CLOSED, {}, b"")
    pairs = (field.decode("latin-1").partition(":") for field in iter(file.readline, b"\r\n"))
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    status = int(line.split(b" ")[1])
    if status == 100:
        return read_reply(file)
    return Reply(status, headers, file.read(int(headers.get("content-length", 0))))


def answer_to(server: Any, data: bytes) -> Reply:
    """The first answer to these bytes."""
    with connected(server, data) as sock, sock.makefile("rb") as file:
        return read_reply(file)


def read_until(sock: socket.socket, wanted: bytes, at_least: int = 0) -> bytes:
    """What came until it ended in `wanted`, after so many bytes, or the other side closed."""
    data = bytearray()
    while not (len(data) >= at_least and wanted in data[-2 * READ_SIZE :]):
        more = sock.recv(READ_SIZE)
        if not more:
            break
        data += more
    return bytes(data)


def close(sock: socket.socket) -> None:
    sock.close()


def reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def pair_of_sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# --- streams -------------------------------------------------------------------------------------


def objects_of(data: bytes) -> list[dict[str, Any]]:
    """The JSON of every event but comments and [DONE]."""
    blocks = data.replace(b"\r\n", b"\n").split(b"\n\n")
    return [json.loads(block[6:]) for block in blocks if block.startswith(b"data: {")]


def words_of(data: bytes) -> str:
    choices = [choice for body in objects_of(data) for choice in body.get("choices", ())]
    return "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)


def errors_of(data: bytes) -> list[dict[str, Any]]:
    return [body["error"] for body in objects_of(data) if "error" in body]


# --- what a service, or a client of an app in this process, shows of itself ----------------------


def figures(client: Any) -> dict[str, Any]:
    found = client.get("/metrics").json
    return found() if callable(found) else found


def circuits(client: Any) -> dict[str, Any]:
    return figures(client)["circuit_breaker"]


def open_circuits(client: Any) -> dict[str, Any]:
    return circuits(client)["open_circuits"]


def failures(client: Any) -> dict[str, int]:
    return circuits(client)["failures"]


def in_flight(client: Any) -> int:
    return figures(client)["in_flight"]


def last_attempts(client: Any) -> list[tuple[str, str]]:
    """(model, outcome) of each attempt of the last request, once it is booked."""
    wait_until(lambda: in_flight(client) == 0)
    attempts = figures(client)["recent_requests"][0]["attempts"]
    return [(attempt["model"], attempt["outcome"]) for attempt in attempts]


# --- its processes -------------------------------------------------------------------------------


def workers_of(service: Service) -> list[int]:
    """The process ids of gunicorn's workers, the youngest last."""
    pid = service.process.pid
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def worker_of(service: Service) -> int:
    """The process id of the youngest worker; 0 when there is none."""
    return max(workers_of(service), default=0)


def peak_mib(service: Service) -> float:
    """The most memory that the worker has ever held."""
    status = Path(f"/proc/{worker_of(service)}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def kill_all(service: Service) -> None:
    """Kill the master and its worker, as the kernel does when memory runs out."""
    for pid in (service.process.pid, *workers_of(service)):
        os.kill(pid, signal.SIGKILL)
    service.process.wait(10)
    wait_until(lambda: not can_connect(service.port))


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def in_turn(table: dict[str, Any], *modes: Any) -> list[Any]:
    """Parameters: each row of `table` once, with one of `modes` before it, in turn."""
    rows = [row if isinstance(row, tuple) else (row,) for row in table.values()]
    return [
        pytest.param(mode, *row, id=f"{name}-{called(mode)}")
        for name, row, mode in zip(table, rows, itertools.cycle(modes), strict=False)
    ]


def called(value: Any) -> str:
    """A name for a parameter, the same in every process."""
    if isinstance(value, tuple):
        return "-".join(map(called, value))
    return getattr(value, "__name__", str(value))


def no_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The next thread of that name cannot be started."""
    start, left = threading.Thread.start, [1]

    def once(self: threading.Thread) -> None:
        if self.name == name and left:
            left.pop()
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", once)
