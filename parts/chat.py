"""A chat request as JSON: its text, its value and where its members stand.

A body is forwarded as it came; only the members that must change are replaced in its bytes, so big
integers, unknown fields and the client's own layout survive. Nothing here knows Flask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parts.jsontext import Member

MOST_VALUES = 100_000  # a validator takes up to 50 µs for each


@dataclass(eq=False)
class Chat:
    """A checked chat request. `data` is the body as it came, `members` where its members stand."""

    data: bytes
    body: Mapping[str, Any]
    members: Sequence[Member]
    stream: bool = False  # the client wants server-sent events
    choices: int = 1  # how many answers it wants

    @cached_property
    def wants_usage(self) -> bool:
        """True when the client asked for the usage chunk of a stream itself."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def note_wishes(self) -> None:
        """Work out what is asked of a model, for when messages and tools are forgotten."""
        _ = self.wants_tools, self.wants_images, self.wants_usage
        n = self.body.get("n")
        self.choices = n if isinstance(n, int) and 1 < n <= 128 else 1

    @property
    def tools_offered(self) -> int:
        """How many tools a model may call; `functions` is what they were called until 2023."""
        offered = (self.body.get("tools"), self.body.get("functions"))
        return sum(len(tools) for tools in offered if isinstance(tools, list))

    @property
    def tool_choice(self) -> str:
        """Of the tools offered: none may be called, one must be (`required`), or `auto`."""
        choices = [_choice(self.body.get(name)) for name in ("tool_choice", "function_call")]
        return next((choice for choice in choices if choice != "auto"), "auto")

    @cached_property
    def wants_tools(self) -> bool:
        """True when a model may be expected to call a tool."""
        return bool(self.tools_offered) and self.tool_choice != "none"

    @cached_property
    def wants_images(self) -> bool:
        """True when a message holds a picture, or a file, which is shown as pictures of its pages.

        Anthropic's `image` may stand in what a tool gave back, one level below.
        """
        parts = _parts_of(self.body["messages"])
        return any(part.get("type") in PICTURES for part in (*parts, *_parts_of(parts)))

    def is_longer_than(self, context: int) -> bool:
        """True when the text surely has over `context` tokens: none is longer than 8 characters."""
        if len(self.data) <= 8 * context:
            return False
        text = re.sub(r'"data:[^"]{200,}"|"[\w+/=-]{1000,}"', "", self.data.decode())  # no text
        return len(re.sub(r"\\u[0-9a-fA-F]{4}", "x", text)) > 8 * context

    def for_model(self, model_id: str) -> list[bytes | memoryview]:
        """The body for one upstream call: `model` replaced, usage asked for when it streams.

        In pieces, most of them still those of `data`: a copy would double what a request holds.
        """
        edits = {"model": json.dumps(model_id)}
        if self.stream:
            options = {**(self.body.get("stream_options") or {}), "include_usage": True}
            edits["stream_options"] = json.dumps(options)
        data, done = memoryview(self.data), self.members[0].start
        new = [f'"{key}": {value}, ' for key, value in edits.items() if key not in self.body]
        out: list[bytes | memoryview] = [data[:done], "".join(new).encode()]
        for member in self.members:
            if member.key in edits:
                out += [data[done : member.value], edits[member.key].encode()]
                done = member.end
        return [*out, data[done:]]


PICTURES = ("image_url", "input_image", "image", "file")


def _parts_of(holders: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    contents = [holder.get("content") for holder in holders]
    return [
        part
        for content in contents
        if isinstance(content, list)
        for part in content
        if isinstance(part, dict)
    ]


def _choice(value: Any) -> str:
    """What a `tool_choice` or `function_call` says: none, required or auto."""
    if isinstance(value, dict):
        allowed = value.get("allowed_tools")  # OpenAI: some of those offered
        mode = (allowed if isinstance(allowed, dict) else value).get("mode") or value.get("type")
        return "none" if mode == "none" else "auto" if mode == "auto" or not value else "required"
    return "none" if value == "none" else "required" if value in ("required", "any") else "auto"


def chat_of(data: bytes, text: str, body: dict[str, Any], members: list[Member]) -> Chat:
    """A chat request that was parsed, with the places of what `for_model` may replace, in bytes."""
    others = [m for m in members[1:] if m.key in ("model", "stream_options")]
    members = [*members[:1], *others]
    if not text.isascii():
        members = [
            Member(m.key, *(len(text[:at].encode()) for at in (m.start, m.value, m.end)))
            for m in members
        ]
    return Chat(data, body, members, bool(body.get("stream")))


def fits(body: Mapping[str, Any]) -> bool:
    """Whether `body` fits openapi.json's ChatRequest, in a hundredth of a validator's time."""
    messages, options = body.get("messages"), body.get("stream_options")
    tools = body.get("tools")
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(map(_is_message, messages))
        and isinstance(body.get("model", ""), str)
        and isinstance(body.get("stream"), bool | None)
        and isinstance(options, dict | None)
        and isinstance((options or {}).get("include_usage"), bool | None)
        and isinstance(tools, list | None)
        and {*map(type, tools or ())} <= {dict}
        and isinstance(body.get("tool_choice"), str | dict | None)
    )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return {*map(type, content)} <= {dict}
    return content is None or isinstance(content, str)
