"""The wire formats as clients ask and upstreams answer: requests, events, whole answers, errors.

Written from the formats' public descriptions; nothing here imports the router's own reading.
"""

from __future__ import annotations

import json
import re
import types
from typing import Any, NamedTuple

import upstream as chat_upstream
from upstream import Script, pieces, plain


class Read(NamedTuple):
    """What a strict client makes of an answer: its text, the error it tells, and a good end."""

    text: str
    error: str
    complete: bool


def event(kind: str, **members: Any) -> bytes:
    """A named event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode()


def read_events(data: bytes) -> list[dict[str, Any]]:
    """What each event of a stream holds; [DONE] is {"type": "[DONE]"}; all else must be JSON."""
    found = []
    for block in re.split(rb"\r?\n\r?\n", data):
        lines = [line[5:].strip() for line in block.splitlines() if line.startswith(b"data:")]
        if lines == [b"[DONE]"]:
            found.append({"type": "[DONE]"})
        elif lines:
            found.append(json.loads(b"\n".join(lines)))
    return found


class Chat:
    """Chat completions."""

    name, path = "chat", "/v1/chat/completions"
    tokens = (10, 0, 20)  # input, cached of it, output

    def ask(self, text: str = "hello", model: str = "router", **more: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": text}], **more}

    def begun(self, words: list[str]) -> list[bytes]:
        """The events up to the last word."""
        return [chat_upstream.chunk({"content": word}) for word in words]

    def end(self, kind: str = "stop") -> list[bytes]:
        """The events that end an answer well."""
        return chat_upstream.events([], kind)[1:]

    def whole(self, text: str, kind: str = "stop") -> dict[str, Any]:
        return chat_upstream.answer_body(text, finish_reason=kind)

    def error(self, message: str, code: str | None = None) -> dict[str, Any]:
        return {"error": {"message": message, "type": "x", "param": None, "code": code}}

    def error_event(self, message: str) -> bytes:
        return chat_upstream.sse(self.error(message))

    def read_stream(self, data: bytes) -> Read:
        text, told, done = "", "", False
        for said in read_events(data):
            done |= said.get("type") == "[DONE]"
            told = said["error"]["message"] if "error" in said else told
            for choice in said.get("choices", ()):
                text += choice["delta"].get("content") or ""
        return Read(text, told, done)

    def read_whole(self, body: dict[str, Any]) -> Read:
        if "error" in body:
            return Read("", body["error"]["message"], False)
        choice = body["choices"][0]
        return Read(choice["message"]["content"] or "", "", choice["finish_reason"] == "stop")

    # What all formats share, in words of the above.

    def good(self, text: str | list[str] = "Hello") -> Script:
        """A script that answers well, as a stream where one is asked for."""
        words = [text] if isinstance(text, str) else text
        as_stream = pieces([*self.begun(words), *self.end()])
        as_whole = plain(200, json.dumps(self.whole("".join(words))).encode())
        return lambda peer, request: (as_stream if request.body.get("stream") else as_whole)(
            peer, request
        )

    def refuses(self, status: int, message: str = "went wrong", code: str | None = None,
                **headers: str) -> Script:  # fmt: skip
        """A script that answers with an error."""
        return plain(status, json.dumps(self.error(message, code)).encode(), **headers)


class Messages(Chat):
    """Anthropic's Messages."""

    name, path = "messages", "/v1/messages"
    tokens = (100, 40, 20)
    usage = types.MappingProxyType(
        {"input_tokens": 60, "cache_read_input_tokens": 40, "output_tokens": 20}
    )

    def ask(self, text: str = "hello", model: str = "router", **more: Any) -> dict[str, Any]:
        turn = {"role": "user", "content": [{"type": "text", "text": text}]}
        return {"model": model, "max_tokens": 100, "messages": [turn], **more}

    def begun(self, words: list[str]) -> list[bytes]:
        head = {**self.whole("", ""), "stop_reason": None}
        head["usage"] = {**self.usage, "output_tokens": 1}
        start = {"type": "text", "text": ""}
        return [
            event("message_start", message=head),
            event("content_block_start", index=0, content_block=start),
            event("ping"),
            *(event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
              for word in words),
        ]  # fmt: skip

    def end(self, kind: str = "end_turn") -> list[bytes]:
        return [
            event("content_block_stop", index=0),
            event("message_delta", delta={"stop_reason": kind}, usage={"output_tokens": 20}),
            event("message_stop"),
        ]

    def whole(self, text: str, kind: str = "end_turn") -> dict[str, Any]:
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": "own-name",
                "content": [{"type": "text", "text": text}] if text else [],
                "stop_reason": kind, "usage": {**self.usage}}  # fmt: skip

    def error(self, message: str, code: str | None = None) -> dict[str, Any]:
        return {"type": "error", "error": {"type": code or "api_error", "message": message}}

    def error_event(self, message: str) -> bytes:
        return event("error", error={"type": "overloaded_error", "message": message})

    def read_stream(self, data: bytes) -> Read:
        text, told, stop, done = "", "", None, False
        for said in read_events(data):
            assert not done, "something behind message_stop"
            done = said["type"] == "message_stop"
            told = said["error"]["message"] if said["type"] == "error" else told
            text += said.get("delta", {}).get("text", "")
            stop = said.get("delta", {}).get("stop_reason") or stop
        return Read(text, told, done and stop is not None)

    def read_whole(self, body: dict[str, Any]) -> Read:
        if body["type"] == "error":
            return Read("", body["error"]["message"], False)
        return Read("".join(b["text"] for b in body["content"]), "", bool(body["stop_reason"]))


class Responses(Chat):
    """OpenAI's Responses."""

    name, path = "responses", "/v1/responses"
    tokens = (100, 40, 20)
    usage = types.MappingProxyType(
        {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 40}, "output_tokens": 20}
    )

    def ask(self, text: str = "hello", model: str = "router", **more: Any) -> dict[str, Any]:
        return {"model": model, "input": text, **more}

    def head(self, status: str, **more: Any) -> dict[str, Any]:
        return {"id": "resp_1", "object": "response", "created_at": 1, "model": "own-name",
                "status": status, "error": None, "output": [], "usage": None, **more}  # fmt: skip

    def item(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {"id": "msg_1", "type": "message", "role": "assistant", "content": [part]}

    def begun(self, words: list[str]) -> list[bytes]:
        self.said = "".join(words)
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("response.created", {"response": self.head("in_progress")}),
            ("response.in_progress", {"response": self.head("in_progress")}),
            ("response.output_item.added", {"output_index": 0, "item": self.item("")}),
            *(("response.output_text.delta", {"output_index": 0, "delta": word})
              for word in words),
        ]  # fmt: skip
        return [event(kind, sequence_number=n, **more) for n, (kind, more) in enumerate(kinds)]

    def end(self, kind: str = "completed") -> list[bytes]:
        last, item = self.whole(self.said, kind), {"output_index": 0, "item": self.item(self.said)}
        done = event("response.output_item.done", sequence_number=900, **item)
        return [done, event(f"response.{last['status']}", response=last, sequence_number=901)]

    def whole(self, text: str, kind: str = "completed") -> dict[str, Any]:
        output = [self.item(text)] if text else []
        if kind != "completed":
            more = {"incomplete_details": {"reason": kind}}
            return self.head("incomplete", output=output, usage={**self.usage}, **more)
        return self.head("completed", output=output, usage={**self.usage})

    def error_event(self, message: str) -> bytes:
        failed = self.head("failed", error={"code": "server_error", "message": message})
        return event("response.failed", response=failed, sequence_number=3)

    def read_stream(self, data: bytes) -> Read:
        text, told, done = "", "", False
        for said in read_events(data):
            assert not done, "something behind the last event"
            kind = said["type"]
            done = kind in ("response.completed", "response.incomplete")
            if kind in ("response.failed", "error"):
                told = (said.get("response") or {"error": said})["error"]["message"]
            text += said["delta"] if kind == "response.output_text.delta" else ""
        return Read(text, told, done)

    def read_whole(self, body: dict[str, Any]) -> Read:
        if body.get("error"):
            return Read("", body["error"]["message"], False)
        parts = [part for item in body["output"] for part in item["content"]]
        return Read("".join(part["text"] for part in parts), "", body["status"] == "completed")


FORMATS = {form.name: form for form in (Chat(), Messages(), Responses())}
