"""A request for a model, in any dialect: its body read, parsed, checked and kept as it came.

A body is forwarded as it came; only the members that must change are replaced in its bytes, so big
integers, unknown fields and the client's own layout survive. What differs from one wire format to
the next is asked of `Chat.dialect` (dialects.py).
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from parts.errors import RouterError, invalid, say_schema_error
from parts.jsontext import Member, has_over, parse_object

if TYPE_CHECKING:
    import flask

HERE = Path(__file__).resolve().parent
MOST_MEMBERS = 100  # of a body whose places are kept; real ones have 30
LENGTH = re.compile("[0-9]{1,18}")
MOST_VALUES = 100_000  # a validator takes up to 50 µs for each


@dataclass(eq=False)
class Chat:
    """A request for a model. `data` is the body as it came, `members` where its members stand.

    `dialect` is dialects.Dialect, which stands on a higher floor.
    """

    data: bytes
    body: Mapping[str, Any]
    members: Sequence[Member]
    dialect: Any = None
    stream: bool = False  # the client wants server-sent events
    query: str = ""  # of the request, where it is passed on
    headers: Mapping[str, str] = field(default_factory=dict)  # the same
    choices: int = 1  # how many answers it wants
    category: Any = None  # table.Category that it was put into
    must_be_json: bool = False  # it asks for JSON, and the category wants that checked
    # What `note_wishes` finds in the body:
    tools_offered: int = 0  # how many a model may call
    tool_choice: str = "auto"  # none of them may be called, one must be (`required`), or `auto`
    wants_tools: bool = False  # a model may be expected to call one
    wants_images: bool = False  # to see one
    wants_usage: bool = False  # the client asked for the usage chunk of a stream itself

    def note_wishes(self) -> None:
        """Work out what is asked of a model; messages and tools are forgotten soon after."""
        n, options = self.body.get("n"), self.body.get("stream_options")
        self.choices = n if isinstance(n, int) and 1 < n <= 128 else 1
        self.wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self.tools_offered, self.tool_choice = self._tools_offered(), self._tool_choice()
        self.wants_tools = bool(self.tools_offered) and self.tool_choice != "none"
        self.wants_images = self._wants_images()

    def _tools_offered(self) -> int:
        """How many; `functions` is what they were called until 2023.

        Codex puts some of them into groups, a `namespace` each.
        """
        tools, functions = self.body.get("tools"), self.body.get("functions")
        tools = [t for t in tools if isinstance(t, dict)] if isinstance(tools, list) else []
        groups = [tool["tools"] for tool in tools if isinstance(tool.get("tools"), list)]
        grouped = sum(map(len, groups)) - len(groups)
        return len(tools) + grouped + (len(functions) if isinstance(functions, list) else 0)

    def _tool_choice(self) -> str:
        for name in ("tool_choice", "function_call"):
            if name in self.body and (choice := _choice(self.body[name])) != "auto":
                return choice
        return "auto"

    def _wants_images(self) -> bool:
        """True when a message holds a picture, or a file, which is shown as pictures of its pages.

        Anthropic's `image` may stand in what a tool gave back, one level below; what a tool gave
        is an item's `output` in Responses.
        """
        level = self.dialect.turns(self.body)
        for _ in range(2):
            inner: list[Any] = []
            for holder in level:
                content = holder.get("content", holder.get("output"))
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

    def for_model(self, model: Any, usage: str = "ask") -> list[bytes | memoryview]:
        """The body for one upstream call: `model` replaced, `params` set, a stream's usage asked.

        `model` is table.Model; `params` of routes.json are its own and those of the category.

        `usage` is `leave` where the upstream tells it unasked, or nobody may ask, and `drop` where
        it refuses the very member `stream_options`. In pieces, most of them still those of `data`:
        a copy would double what a request holds.
        """
        holders = [h for h in (model, self.category) if h and (h.params or h.params_force)]
        present: Set[str] = self.body.keys()  # some were forgotten, but not these two
        edits: dict[str, str] = {}
        if holders:
            present = {m.key for m in self.members} | present
            edits = self._params(holders, present)
        edits["model"] = json.dumps(model.called)
        if self.stream and usage == "ask" and self.dialect.adds_usage and not self.wants_usage:
            options = {**(self.body.get("stream_options") or {}), "include_usage": True}
            edits["stream_options"] = json.dumps(options)
        data, done = memoryview(self.data), self.members[0].start
        new = [f'"{key}": {value}, ' for key, value in edits.items() if key not in present]
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

    def _params(self, holders: Sequence[Any], present: Set[str]) -> dict[str, str]:
        """Members that routes.json sets, as JSON text; what the category says outdoes the model."""
        edits: dict[str, str] = {}
        for holder in holders:
            for member, value in holder.params.get(self.dialect.name, {}).items():
                if member not in present and SAME.get(member) not in present:
                    edits[member] = value
        for holder in holders:
            for member, value in holder.params_force.get(self.dialect.name, {}).items():
                other = SAME.get(member, "")
                edits[other if other in present and member not in present else member] = value
        return edits

    def _with_comma(self, member: Member) -> tuple[int, int]:
        """From where to where a member stands with the comma behind it, else the one before it."""
        behind = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*").match(self.data, member.end)
        if behind:
            return member.start, behind.end()
        before = self.data[: member.start].rstrip()
        return len(before) - before.endswith(b","), member.end


SAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
PICTURES = ("image_url", "input_image", "image", "file", "input_file", "document")


def _choice(value: Any) -> str:
    """What a `tool_choice` or `function_call` says: none, required or auto."""
    if isinstance(value, dict):
        allowed = value.get("allowed_tools")  # OpenAI: some of those offered
        mode = (allowed if isinstance(allowed, dict) else value).get("mode") or value.get("type")
        return "none" if mode == "none" else "auto" if mode == "auto" or not value else "required"
    return "none" if value == "none" else "required" if value in ("required", "any") else "auto"


def read_body(request: flask.Request) -> bytes:
    """The request body; RouterError 413 when it is too large, 499 when it was cut short."""
    most = request.max_content_length or 0  # one more than allowed: werkzeug cuts chunked bodies
    told = request.environ.get("CONTENT_LENGTH", "")
    plain = LENGTH.fullmatch(told) and "HTTP_TRANSFER_ENCODING" not in request.environ
    length = int(told) if plain else request.content_length  # werkzeug's takes ten times as long
    try:
        if length is not None and length < most:  # the usual case, without werkzeug's wrappers
            data = request.environ["wsgi.input"].read(length)
        else:
            data = request.get_data(cache=False)
        if len(data) >= most:
            raise RequestEntityTooLarge
        if len(data) < (length or 0):
            raise ClientDisconnected
        return data.removeprefix(BOM_UTF8)  # PowerShell and .NET write one
    except RequestEntityTooLarge as e:
        text = f"the body is over {most >> 20} MB (ROUTER_MAX_BODY_MB)"
        raise RouterError(413, "request_too_large", text) from e
    except ParseException as e:  # chunk sizes that lie
        raise RouterError(400, "bad_request", "the chunked body is malformed") from e
    except (ClientDisconnected, OSError) as e:
        raise RouterError(499, "client_left", "the upload was cut short") from e


def parse_body(data: bytes) -> tuple[str, dict[str, Any], list[Member]]:
    """Text, value and members of the JSON object in `data`; 400 when it holds none."""
    try:
        return parse_object(data)
    except ValueError as e:
        raise RouterError(400, "invalid_json", str(e)) from None


def read_chat(data: bytes, dialect: Any) -> Chat:
    """The request in `data`; 400 when it is not JSON, 422 with every place that does not fit.

    The schema takes 2 ms for a long conversation, so it only words a refusal.
    """
    chat = chat_of(data, *parse_body(data), dialect)
    meant = dialect.belongs_to(chat.body)
    if meant:
        text = f"this body belongs to {meant}: it has another wire format than this path"
        raise RouterError(422, "wrong_format", text, detail=[{"loc": ["body"], "msg": text}])
    if not dialect.fits(chat.body):
        check(chat.body, dialect.schema)
    chat.note_wishes()
    return chat


def chat_of(data: bytes, text: str, body: dict[str, Any], members: list[Member],
            dialect: Any) -> Chat:  # fmt: skip
    """A request that was parsed, with the places of what `for_model` may replace, in bytes."""
    usual = members[1:MOST_MEMBERS]
    usual += [m for m in members[MOST_MEMBERS:] if m.key in ("model", "stream_options")]
    members = [*members[:1], *usual]
    if not text.isascii():
        members = in_bytes(text, members)
    return Chat(data, body, members, dialect, dialect.streams and bool(body.get("stream")))


def in_bytes(text: str, members: Sequence[Member]) -> list[Member]:
    """`members`, in order, as they stand in the UTF-8 of `text`."""
    at = size = 0
    out = []
    for member in members:
        places = []
        for place in member[1:]:
            size, at = size + len(text[at:place].encode()), place
            places.append(size)
        out.append(Member(member.key, *places))
    return out


def is_parts(value: Any) -> bool:
    """Whether `value` is a list of objects."""
    return isinstance(value, list) and {*map(type, value)} <= {dict}


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
    names = ("ChatRequest", "MessagesRequest", "ResponsesRequest", "EmbeddingsRequest",
             "RouteRequest", "CategoryChange", "MappingChange")  # fmt: skip
    return {
        name: jsonschema.Draft202012Validator(
            {**components["schemas"][name], "components": components}
        )
        for name in names
    }
