"""Demo answers: a transport adapter for requests that answers `demo://` in this process.

Loaded with ROUTER_DEMO=1 only. It lets a newcomer see the router choose, stream and count before
there is any key; every answer says that it is made up and for which model it stands in.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import BaseAdapter

WORD_PAUSE_S = 0.02  # so that a stream looks like one


class Paced(io.RawIOBase):
    """Bytes that come piece by piece, each a moment after the one before."""

    reason = "OK"

    def __init__(self, pieces: list[bytes], pause_s: float):
        super().__init__()
        self._pieces = pieces
        self._pause_s = pause_s

    def read1(self, size: int = -1) -> bytes:
        """The next piece; b'' after the last."""
        if not self._pieces:
            return b""
        time.sleep(self._pause_s)
        return self._pieces.pop(0)

    def release_conn(self) -> None:
        """Nothing to give back: there is no connection."""


class DemoAdapter(BaseAdapter):
    """Answers chat completions as an upstream would, whole or streamed."""

    def send(
        self, request: requests.PreparedRequest, *args: Any, **kwargs: Any
    ) -> requests.Response:
        """A made-up answer to the chat request in `request`."""
        body = json.loads(b"".join(request.body or [b"{}"]))  # type: ignore[arg-type]
        text = (
            f"[demo] No API key is set, so nobody was asked. {body['model']} would have answered "
            "here. Put your key into .env and start again."
        )
        response = requests.Response()
        response.status_code = 200
        response.request = request
        if body.get("stream"):
            response.headers["Content-Type"] = "text/event-stream"
            response.raw = Paced(stream_pieces(body, text), WORD_PAUSE_S)
        else:
            response.headers["Content-Type"] = "application/json"
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = {
                **envelope(body, "chat.completion"),
                "choices": [choice],
                "usage": usage(body, text),
            }
            response.raw = Paced([json.dumps(whole).encode()], 0.0)
        return response

    def close(self) -> None:
        """Nothing to close."""


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
