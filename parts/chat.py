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

from parts.errors import RouterError
from parts.jsontext import Member, decoder_for, depth_of, scan_object

MOST_VALUES = 100_000  # a validator takes up to 50 µs for each
MAX_DEPTH = 64  # real requests stay under 20; the C parser of json gives up near 1,000


@dataclass(eq=False)
class Chat:
    """A checked chat request. `data` is the body as it came, `members` where its members stand."""

    data: bytes
    body: Mapping[str, Any]
    members: Sequence[Member]

    @property
    def stream(self) -> bool:
        """True when the client wants server-sent events."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """True when the client asked for the usage chunk of a stream itself."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def settle(self) -> None:
        """Forget messages and tools once a chain is chosen: parsed they take thrice their text."""
        _ = self.wants_tools, self.wants_images  # which look at them
        self.body = {k: v for k, v in self.body.items() if k not in ("messages", "tools")}

    @cached_property
    def wants_tools(self) -> bool:
        """True when a model may be expected to call a tool."""
        return bool(self.body.get("tools")) and self.body.get("tool_choice") != "none"

    @cached_property
    def wants_images(self) -> bool:
        """True when a message holds an image part."""
        contents = (message.get("content") for message in self.body["messages"])
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return any(part.get("type") in ("image_url", "input_image") for part in parts)

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


def read_object(data: bytes) -> Chat:
    """A JSON object with the places of the members that `for_model` may replace, in bytes."""
    text, body, members = parse_object(data)
    others = [m for m in members[1:] if m.key in ("model", "stream_options")]
    members = [*members[:1], *others]
    if not text.isascii():
        members = [
            Member(m.key, *(len(text[:at].encode()) for at in (m.start, m.value, m.end)))
            for m in members
        ]
    return Chat(data, body, members)


def parse_object(data: bytes) -> tuple[str, dict[str, Any], list[Member]]:
    """Text, value and member positions of a JSON object; 400 when it is not one, or too deep."""
    try:
        text = data.decode()
        value, members, end = scan_object(text, decoder=decoder_for(data))
        if text[end:].strip(" \t\r\n"):
            raise json.JSONDecodeError("Extra data", text, end)
        if depth_of(value) > MAX_DEPTH:
            raise ValueError
    except UnicodeDecodeError as e:
        why = f"byte {e.start} is not UTF-8"
    except json.JSONDecodeError as e:
        why = f"line {e.lineno}, column {e.colno}: {e.msg}"
    except (ValueError, RecursionError):  # NaN, 1e999, integers of hundreds of digits, depth
        why = f"a number that JSON does not know, or nested over {MAX_DEPTH} deep"
    else:
        return text, value, members
    raise RouterError(400, "invalid_json", f"the body is not a JSON object: {why}")


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
        and all(isinstance(tool, dict) for tool in tools or ())
        and isinstance(body.get("tool_choice"), str | dict | None)
    )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) for part in content)
    return content is None or isinstance(content, str)
