"""A scripted upstream on port 0: real sockets, one thread per connection, any misbehaviour.

A script is a function `(peer, request)`; the scripts below are the building blocks. What the
upstream saw is in `requests`, and `closed` counts connections that the router closed.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WORDS = [f"word{n} " for n in range(1, 11)]


@dataclass
class Request:
    """One request as it came over the wire."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def body(self) -> Any:
        return json.loads(self.raw or b"{}")  # a GET has none

    @property
    def model(self) -> str:
        return self.body.get("model", "")


class Peer:
    """The router's connection, as the upstream sees it."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.left_at: float | None = None

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_left(self, seconds: float) -> bool:
        """True when the router closed its side within `seconds`."""
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


Script = Callable[[Peer, Request], Any]


class Upstream:
    """The server. `scripts[model]` is a script or a list of scripts, the last of which repeats."""

    def __init__(self, context: ssl.SSLContext | None = None):
        self.context = context
        self.requests: list[Request] = []
        self.left: list[float] = []  # when the router hung up on a script that was not done
        self.scripts: dict[str, Script | list[Script]] = {}
        self.default: Script = whole("Hello from upstream")
        self.connections = 0
        self.open_now = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._listener.getsockname()[1]
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def models_asked(self) -> list[str]:
        return [request.model for request in self.requests]

    def reset(self) -> None:
        self.requests.clear()
        self.left.clear()
        self.scripts.clear()
        self.default = whole("Hello from upstream")

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self.connections += 1
            self.open_now += 1
        try:
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            while self._answer_one(sock):
                pass
        except OSError:
            pass
        finally:
            sock.close()
            with self._lock:
                self.open_now -= 1

    def _answer_one(self, sock: socket.socket) -> bool:
        """Read one request and run its script; True when the connection is kept."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                return False
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        while len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(65536)
        method, path, _ = lines[0].split(" ")
        request = Request(method, path, headers, body)
        peer = Peer(sock)
        with self._lock:
            self.requests.append(request)
            script = self._script_for(request)
        try:
            keep = script(peer, request)
        except OSError:  # it was still sending
            keep = "left"
        if keep == "left":
            self.left.append(time.monotonic())
        return keep is True

    def _script_for(self, request: Request) -> Script:
        script = self.scripts.get(request.model, self.default)
        if isinstance(script, list):
            return script.pop(0) if len(script) > 1 else script[0]
        return script


# --- scripts -----------------------------------------------------------------------------------


def plain(
    status: int, body: bytes, content_type: str = "application/json", **headers: str
) -> Script:
    """Any complete answer."""
    more = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\n{more}"
    head += f"Content-Length: {len(body)}\r\n\r\n"

    def script(peer: Peer, request: Request) -> bool:
        peer.send(head.encode() + body)
        return True

    return script


def error(status: int, message: str = "went wrong", code: Any = None, **headers: str) -> Script:
    """An error in OpenAI's shape."""
    body = {"error": {"message": message, "type": "x", "param": None, "code": code}}
    return plain(status, json.dumps(body).encode(), **headers)


def answer_body(text: str | None, **extra: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **extra.pop("message", {})}
    finish = extra.pop("finish_reason", "stop")
    return {
        "id": "gen-1", "object": "chat.completion", "model": "upstream/own-name",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
        **extra,
    }  # fmt: skip


def whole(text: str | None = "Hello", **extra: Any) -> Script:
    """A whole answer, or the same as a stream when the request wants one."""
    as_stream = stream([text] if text else [], finish=extra.get("finish_reason", "stop"))
    as_whole = plain(200, json.dumps(answer_body(text, **extra)).encode())

    def script(peer: Peer, request: Request) -> Any:
        return (as_stream if request.body.get("stream") else as_whole)(peer, request)

    return script


def chunk(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": "gen-1", "object": "chat.completion.chunk", "model": "upstream/own-name",
            "choices": [choice], **extra}  # fmt: skip
    return sse(body)


def sse(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
DONE = b"data: [DONE]\n\n"


def events(
    words: list[str], finish: str | None = "stop", usage: Any = USAGE, done: bool = True
) -> list[bytes]:
    """The events of a usual stream."""
    out = [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": word}) for word in words),
    ]
    if finish:
        out.append(chunk({}, finish))
    if usage:
        out.append(
            sse({"id": "gen-1", "model": "upstream/own-name", "choices": [], "usage": usage})
        )
    return out + [DONE] * done


def pieces(parts: list[Any], after: str = "end") -> Script:
    """Send a chunked SSE answer: bytes are sent, numbers are slept, functions are called.

    `after`: end (a proper end), cut (close without it), reset, or hang (until the router leaves).
    """

    def script(peer: Peer, request: Request) -> Any:
        peer.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for part in parts:
            if isinstance(part, bytes):
                peer.send(b"%x\r\n%s\r\n" % (len(part), part))
            elif callable(part):
                part()
            else:
                time.sleep(part)
        return finish_as(peer, after, b"0\r\n\r\n")

    return script


def finish_as(peer: Peer, after: str, end: bytes) -> Any:
    if after == "end":
        peer.send(end)
        return True
    if after == "reset":
        peer.reset()
    if after == "hang":
        return "left" if peer.wait_left(30) else False
    return False


def stream(
    words: list[str], pause_s: float = 0.0, finish: str | None = "stop", **more: Any
) -> Script:
    """A usual stream, an event per word."""
    after = more.pop("after", "end")
    parts: list[Any] = []
    for event in events(words, finish, **more):
        parts += [event, pause_s] if pause_s else [event]
    return pieces(parts, after)


def reset_at_once(peer: Peer, request: Request) -> None:
    """RST before any header."""
    peer.reset()


def drop_at_once(peer: Peer, request: Request) -> bool:
    """FIN before any header."""
    return False


def hang(peer: Peer, request: Request) -> str | bool:
    """Silence until the router leaves."""
    return "left" if peer.wait_left(60) else False


def slow(seconds: float, then: Script) -> Script:
    """Silence for a while, then `then`."""

    def script(peer: Peer, request: Request) -> Any:
        time.sleep(seconds)
        return then(peer, request)

    return script


def raw(data: bytes, after: str = "cut") -> Script:
    """Any bytes at all."""

    def script(peer: Peer, request: Request) -> Any:
        peer.send(data)
        return finish_as(peer, after, b"")

    return script
