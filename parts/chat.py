"""A chat request as JSON: its text, its value and where its members stand.

A body is forwarded as it came; only the members that must change are replaced in its bytes, so big
integers, unknown fields and the client's own layout survive. Nothing here knows Flask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema

from parts.errors import invalid, say_schema_error
from parts.jsontext import Member, has_over

HERE = Path(__file__).resolve().parent
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
        _ = self.tool_choice, self.wants_tools, self.wants_images, self.wants_usage
        n = self.body.get("n")
        self.choices = n if isinstance(n, int) and 1 < n <= 128 else 1

    @cached_property
    def tools_offered(self) -> int:
        """How many tools a model may call; `functions` is what they were called until 2023."""
        tools, functions = self.body.get("tools"), self.body.get("functions")
        return len(tools or ()) + (len(functions) if isinstance(functions, list) else 0)

    @cached_property
    def tool_choice(self) -> str:
        """Of the tools offered: none may be called, one must be (`required`), or `auto`."""
        for name in ("tool_choice", "function_call"):
            if name in self.body and (choice := _choice(self.body[name])) != "auto":
                return choice
        return "auto"

    @cached_property
    def wants_tools(self) -> bool:
        """True when a model may be expected to call a tool."""
        return bool(self.tools_offered) and self.tool_choice != "none"

    @cached_property
    def wants_images(self) -> bool:
        """True when a message holds a picture, or a file, which is shown as pictures of its pages.

        Anthropic's `image` may stand in what a tool gave back, one level below.
        """
        level = self.body["messages"]
        for _ in range(2):
            inner: list[Any] = []
            for holder in level:
                content = holder.get("content")
                inner += content if isinstance(content, list) else ()
            inner = [part for part in inner if isinstance(part, dict)]
            if any([part.get("type") in PICTURES for part in inner]):
                return True
            level = inner
        return False

    def is_longer_than(self, context: int) -> bool:
        """True when the text surely has over `context` tokens: none is longer than 8 characters."""
        if len(self.data) <= 8 * context:
            return False
        text = re.sub(r'"data:[^"]{200,}"|"[\w+/=-]{1000,}"', "", self.data.decode())  # no text
        return len(re.sub(r"\\u[0-9a-fA-F]{4}", "x", text)) > 8 * context

    def for_model(self, model_id: str, usage: str = "ask") -> list[bytes | memoryview]:
        """The body for one upstream call: `model` replaced, and `usage` of a stream asked for.

        `leave`: the upstream tells it unasked, or nobody may ask; `drop`: it refuses the very
        member `stream_options`. In pieces, most of them still those of `data`: a copy would double
        what a request holds.
        """
        edits = {"model": json.dumps(model_id)}
        if self.stream and usage == "ask" and not self.wants_usage:
            options = {**(self.body.get("stream_options") or {}), "include_usage": True}
            edits["stream_options"] = json.dumps(options)
        data, done = memoryview(self.data), self.members[0].start
        new = [f'"{key}": {value}, ' for key, value in edits.items() if key not in self.body]
        out: list[bytes | memoryview] = [data[:done], "".join(new).encode()]
        for member in self.members:
            if member.key == "stream_options" and usage == "drop":
                start, end = self._with_comma(member)
                out.append(data[done:start])
                done = end
            elif member.key in edits:
                out += [data[done : member.value], edits[member.key].encode()]
                done = member.end
        return [*out, data[done:]]

    def _with_comma(self, member: Member) -> tuple[int, int]:
        """From where to where a member stands with the comma behind it, else the one before it."""
        behind = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*").match(self.data, member.end)
        if behind:
            return member.start, behind.end()
        before = self.data[: member.start].rstrip()
        return len(before) - before.endswith(b","), member.end


PICTURES = ("image_url", "input_image", "image", "file")


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


def check(body: Any, name: str) -> None:
    """RouterError 422 with a {loc, msg} per place where `body` does not fit the schema `name`."""
    if has_over(MOST_VALUES, body):
        msg = f"does not fit, and holds over {MOST_VALUES} values, too many to say where"
        raise invalid([{"loc": ["body"], "msg": msg}])
    first = islice(request_schemas()[name].iter_errors(body), 20)
    errors = sorted(first, key=lambda e: [str(p) for p in e.absolute_path])
    found = [{"loc": ["body", *e.absolute_path], "msg": say_schema_error(e)} for e in errors]
    if found:
        raise invalid(found)


@lru_cache(maxsize=1)
def request_schemas() -> dict[str, jsonschema.Draft202012Validator]:
    """openapi.json's schemas, compiled once."""
    components = json.loads((HERE / "openapi.json").read_text(encoding="utf-8"))["components"]
    names = ("ChatRequest", "RouteRequest", "CategoryChange", "MappingChange")
    return {
        name: jsonschema.Draft202012Validator(
            {**components["schemas"][name], "components": components}
        )
        for name in names
    }
