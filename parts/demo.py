"""Demo answers: a transport adapter for requests that answers `demo://` in this process.

Loaded with ROUTER_DEMO=1 only. It lets a newcomer see the router choose, stream and count before
there is any key; every answer says that it is made up and for which model it stands in. It comes
over a socket pair, in HTTP, so that nobody else has to know that it is none of an upstream.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests
from requests.adapters import BaseAdapter

WORD_PAUSE_S = 0.02  # so that a stream looks like one


class DemoAdapter(BaseAdapter):
    """Answers chat completions as an upstream would, whole or streamed.

    `reply` is exchange.Reply: what reads an answer from a socket, with this as its pool.
    """

    def __init__(self, reply: Callable[..., Any]):
        super().__init__()
        self._reply = reply

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        """A made-up answer to the chat request in `request`."""
        outgoing: Any = request.body
        body = json.loads(b"".join(outgoing.pieces))
        ours, theirs = socket.socketpair()
        outgoing.flight.attach(ours)
        threading.Thread(target=answer, args=(theirs, body), name="demo", daemon=True).start()
        reply = self._reply(ours, outgoing.flight, self, ours)
        reply.begin()
        return reply

    def _put_conn(self, conn: socket.socket) -> None:
        conn.close()

    def close(self) -> None:
        """Nothing to close."""


def answer(sock: socket.socket, body: Mapping[str, Any]) -> None:
    """Send the answer to `body` in HTTP, a stream word by word, and hang up."""
    text = (
        f"[demo] No API key is set, so nobody was asked. {body['model']} would have answered "
        "here. Put your key into .env and start again."
    )
    kind, pieces = "text/event-stream", stream_pieces(body, text)
    if not body.get("stream"):
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = envelope(body, "chat.completion")
        whole = {**head, "choices": [choice], "usage": usage(body, text)}
        kind, pieces = "application/json", [json.dumps(whole).encode()]
    with contextlib.closing(sock), contextlib.suppress(OSError):  # the client may leave
        sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode())
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(WORD_PAUSE_S if len(pieces) > 1 else 0)


def envelope(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What every answer or chunk begins with."""
    return {"id": "gen-demo", "object": kind, "created": int(time.time()), "model": body["model"]}


def usage(body: Mapping[str, Any], text: str) -> dict[str, int]:
    """Rough counts: a demo has no tokenizer."""
    asked, said = len(json.dumps(body["messages"])) // 4, len(text) // 4
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def stream_pieces(body: Mapping[str, Any], text: str) -> list[bytes]:
    """The answer as server-sent events, a word each."""
    head = envelope(body, "chat.completion.chunk")
    words = text.split(" ")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word + " " * (n < len(words))} for n, word in enumerate(words, 1)]
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({**head, "choices": [], "usage": usage(body, text)})
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [
        b"data: [DONE]\n\n"
    ]
