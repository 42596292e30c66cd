"""Demo answers: a transport adapter for requests that answers `demo://` in this process.

Loaded with ROUTER_DEMO=1 only. It lets a newcomer see the router choose, stream and count before
there is any key; every answer says that it is made up and for which model it stands in. It comes
over a socket pair, in HTTP, so that nobody else has to know that it is none of an upstream.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests
from requests.adapters import BaseAdapter

WORD_PAUSE_S = 0.02  # so that a stream looks like one


class DemoAdapter(BaseAdapter):
    """Answers every dialect as an upstream would, whole or streamed.

    `reply` is exchange.Reply: what reads an answer from a socket, with this as its pool.
    """

    def __init__(self, reply: Callable[..., Any]):
        super().__init__()
        self._reply = reply

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        """A made-up answer to `request`."""
        outgoing: Any = request.body
        body = json.loads(b"".join(outgoing.pieces))
        path = str(request.url).removeprefix("demo://upstream").partition("?")[0]
        ours, theirs = socket.socketpair()
        outgoing.flight.attach(ours)
        threading.Thread(target=answer, args=(theirs, path, body), daemon=True).start()
        reply = self._reply(ours, outgoing.flight, self, ours)
        reply.begin()
        return reply

    def _put_conn(self, conn: socket.socket) -> None:
        conn.close()

    def close(self) -> None:
        """Nothing to close."""


def answer(sock: socket.socket, path: str, body: Mapping[str, Any]) -> None:
    """Send the answer to `body` in HTTP, a stream word by word, and hang up."""
    text = (
        f"[demo] No API key is set, so nobody was asked. {body['model']} would have answered "
        "here. Put your key into .env and start again."
    )
    whole, events = FORMATS[path](body, text)
    pieces = events if body.get("stream") and events else [json.dumps(whole).encode()]
    kind = "text/event-stream" if pieces is events else "application/json"
    with contextlib.closing(sock), contextlib.suppress(OSError):  # the client may leave
        sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode())
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(WORD_PAUSE_S if len(pieces) > 1 else 0)


Made = tuple[dict[str, Any], list[bytes]]  # the whole answer, and the same as events


def counts(body: Mapping[str, Any], text: str) -> tuple[int, int]:
    """Rough token counts: a demo has no tokenizer."""
    return len(json.dumps(body)) // 4, len(text) // 4


def words_of(text: str) -> list[str]:
    """The text in pieces, a word each."""
    words = text.split(" ")
    return [word + " " * (n < len(words)) for n, word in enumerate(words, 1)]


def named(kind: str, **members: Any) -> bytes:
    """A named event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode()


def chat(body: Mapping[str, Any], text: str) -> Made:
    """A chat completion."""
    head = {"id": "gen-demo", "created": int(time.time()), "model": body["model"]}
    asked, said = counts(body, text)
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    head = {**head, "object": "chat.completion.chunk"}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in words_of(text)]
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({**head, "choices": [], "usage": usage})
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    return whole, [*events, b"data: [DONE]\n\n"]


def messages(body: Mapping[str, Any], text: str) -> Made:
    """A message of Anthropic's."""
    asked, said = counts(body, text)
    usage = {"input_tokens": asked, "output_tokens": said}
    head = {"id": "msg_demo", "type": "message", "role": "assistant", "model": body["model"],
            "stop_sequence": None}  # fmt: skip
    block = {"type": "text", "text": text}
    whole = {**head, "content": [block], "stop_reason": "end_turn", "usage": usage}
    begun = {**head, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    return whole, [
        named("message_start", message=begun),
        named("content_block_start", index=0, content_block={**block, "text": ""}),
        *(named("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
          for word in words_of(text)),
        named("content_block_stop", index=0),
        named("message_delta", delta=end, usage=usage),
        named("message_stop"),
    ]  # fmt: skip


def responses(body: Mapping[str, Any], text: str) -> Made:
    """A response of OpenAI's."""
    asked, said = counts(body, text)
    usage = {"input_tokens": asked, "input_tokens_details": {"cached_tokens": 0},
             "output_tokens": said, "output_tokens_details": {"reasoning_tokens": 0},
             "total_tokens": asked + said}  # fmt: skip
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"id": "msg_demo", "type": "message", "role": "assistant", "status": "completed",
            "content": [part]}  # fmt: skip
    head = {"id": "resp_demo", "object": "response", "created_at": int(time.time()),
            "model": body["model"], "error": None, "incomplete_details": None, "tools": [],
            "tool_choice": "auto", "parallel_tool_calls": True}  # fmt: skip
    whole = {**head, "status": "completed", "output": [item], "usage": usage}
    begun = {**head, "status": "in_progress", "output": [], "usage": None}
    at = {"item_id": "msg_demo", "output_index": 0, "content_index": 0}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("created", {"response": begun}),
        ("in_progress", {"response": begun}),
        ("output_item.added", {"output_index": 0, "item": {**item, "content": []}}),
        ("content_part.added", {**at, "part": {**part, "text": ""}}),
        *(("output_text.delta", {**at, "delta": word}) for word in words_of(text)),
        ("output_text.done", {**at, "text": text}),
        ("content_part.done", {**at, "part": part}),
        ("output_item.done", {"output_index": 0, "item": item}),
        ("completed", {"response": whole}),
    ]
    events = [named(f"response.{kind}", sequence_number=n, **members)
              for n, (kind, members) in enumerate(kinds)]  # fmt: skip
    return whole, events


def embeddings(body: Mapping[str, Any], text: str) -> Made:
    """Vectors of eight zeros, but for one."""
    given = body["input"]
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    vector: Any = [1.0, *[0.0] * 7]
    if body.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack("<8f", *vector)).decode()
    data = [{"object": "embedding", "index": n, "embedding": vector} for n in range(len(inputs))]
    asked, _ = counts(body, text)
    usage = {"prompt_tokens": asked, "total_tokens": asked}
    return {"object": "list", "data": data, "model": body["model"], "usage": usage}, []


def count_tokens(body: Mapping[str, Any], text: str) -> Made:
    """A count."""
    return {"input_tokens": counts(body, text)[0]}, []


FORMATS: dict[str, Callable[[Mapping[str, Any], str], Made]] = {
    "/chat/completions": chat, "/messages": messages, "/messages/count_tokens": count_tokens,
    "/responses": responses, "/embeddings": embeddings,
}  # fmt: skip
