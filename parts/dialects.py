"""The wire formats: one object for each, which says only what differs.

A request is never translated: it goes to a model whose upstream speaks its dialect, byte for byte
but for `model`. So the walk, the relay, the judge, the figures are the same for all of them, and
ask the dialect for three things:

    the request   where it came in and where it goes, whether it fits, what a person said in it
    the answer    an `Answer`: when it begins, ends, fails, and what it used
    an error      how it is told, as an answer and in mid-stream, so that the clients of that
                  dialect show our words and try again only where that helps

A fifth dialect is one class here, its schema in openapi.json, and a row of tests.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from parts.chat import is_parts
from parts.errors import Failure, RouterError
from parts.events import Event
from parts.jsontext import parse_loosely
from parts.judge import (
    FINISHES,
    TELLS_ERROR,
    error_of,
    failure_from,
    finish_kind,
)  # fmt: skip
from parts.metrics import usage_of
from parts.prompts import clean, user_texts

log = logging.getLogger("llm_router")

DONE = b"data: [DONE]\n\n"
MOST_ID = 1000  # characters of a response's id that are remembered; some proxies make long ones
UNKNOWN: set[str] = set()  # finish reasons that were told of once


def event_of(kind: str, **members: Any) -> bytes:
    """A named event, as Messages and Responses have them."""
    return b"event: %b\ndata: %b\n\n" % (
        kind.encode(),
        json.dumps({"type": kind, **members}).encode(),
    )


# --- answers -------------------------------------------------------------------------------------


class Answer:
    """What one answer of `model` has said so far.

    `choices`: how many the client asked for. `keep_usage`: it asked for a stream's usage itself.
    `whole`: the answer is held until it is complete, so half a tool call can be told.
    """

    # What stands before the words that an event adds, and in which events: see EventReader.
    words: tuple[bytes, ...] = ()

    def __init__(self, model: str, *, choices: int = 1, keep_usage: bool = True,
                 whole: bool = False, must_be_json: bool = False):  # fmt: skip
        self.usage: dict[str, Any] = {}
        self.has_content = False
        self.came = False  # something that the client gets came since it was last looked at
        self.done = False  # the last event was read
        self.finish = ""  # the kind of the last finish reason: see FINISHES
        self.id = ""  # by which a later request may continue it
        self._model, self._choices = model, choices
        self._keep_usage, self._whole, self._must_be_json = keep_usage, whole, must_be_json
        self._arguments: dict[Any, list[str]] = {}  # of tool calls, where the answer is held

    @property
    def has_begun(self) -> bool:
        """True from the first token on, or when there will be none for a good reason."""
        return self.has_content or self.finish in ("length", "filter", "calls")

    @property
    def is_finished(self) -> bool:
        """True when all has been said: from here on any end is a good one."""
        return bool(self.finish)

    def take(self, event: Event) -> bytes:
        """What to pass on of `event`, after noting what it says; Failure when it is an error."""
        if event.kind == "data":
            self.note(event.data)
        elif event.kind == "error":
            told = event.data if "error" in event.data else {"error": event.data}
            raise failure_from(200, told)
        elif event.kind != "comment":  # no event of this dialect is [DONE]
            return b""
        return event.raw

    def note(self, said: Mapping[str, Any]) -> None:
        """What the event `said` says and used; Failure when it tells of an error."""
        raise NotImplementedError

    def read(self, body: Mapping[str, Any]) -> None:
        """The same for a whole answer; Failure when it is none."""
        raise NotImplementedError

    def holds(self, body: Mapping[str, Any]) -> bool:
        """True when `body` has what makes a whole answer."""
        raise NotImplementedError

    def adds_words(self, said: Mapping[str, Any]) -> bool:
        """True when what follows the event `said` may be passed on unread if it is like it."""
        return False

    def check_arguments(self) -> None:
        """Failure when half a tool call stands in an answer that calls itself complete."""
        told = ["".join(pieces) for pieces in self._arguments.values()]
        half = any(a.strip() and parse_loosely(a) is None for a in told)
        if half and self.finish != "length":
            raise Failure("cut", "half a tool call", 200)

    def check_json(self, held: Sequence[bytes]) -> None:
        """Failure when JSON must be there and all that was `held` is none; a tool call is fine."""
        if not self._must_be_json or self.finish == "calls":
            return
        lines = [line for piece in held for line in piece.splitlines()]
        lines = [line[5:] for line in lines if line.startswith(b"data:")] or [b"".join(held)]
        bodies = [body for body in map(parse_loosely, lines) if isinstance(body, dict)]
        text = "".join(word for body in bodies for word in self.words_in(body))
        if not text.strip():
            raise Failure("empty", status=200)
        if parse_loosely(text) is None:
            raise Failure("not_json", status=200)

    def words_in(self, said: Mapping[str, Any]) -> Iterator[str]:
        """The text in an event of a stream, or in a whole answer."""
        return iter(())

    def good_end(self) -> bytes:
        """What is missing behind a finished answer."""
        return b""

    def bad_end(self, text: str) -> bytes:
        """The event that says that the answer is not complete, and why."""
        raise NotImplementedError

    def _content(self) -> None:
        self.came = self.has_content = True

    def _finish(self, reason: str) -> bool:
        """Note a finish reason; False for one that means that there is none yet."""
        kind = FINISHES.get(reason) or finish_kind(reason)
        if kind == "open":
            return False
        self.came, self.finish = True, kind
        if self.finish == "failed":
            raise Failure("cut", f"finish_reason {reason[:40]}", 200)
        if self.finish == "unknown" and reason not in UNKNOWN and len(UNKNOWN) < 100:
            UNKNOWN.add(reason)
            log.warning("finish_reason_unknown", {"model": self._model, "reason": reason[:40]})
        return True


# What counts as a token of a chat; a role alone does not.
SAYS = ("content", "reasoning", "reasoning_content", "tool_calls", "function_call", "refusal",
        "audio", "images")  # fmt: skip


def choices_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer or an event, as far as they have the right shape."""
    choices = body.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []


class ChatAnswer(Answer):
    """A chat completion."""

    words = (b'"content":"', b'"reasoning":"')

    def __init__(self, model: str, **more: Any):
        super().__init__(model, **more)
        self._begun: set[int] = set()  # choices that have no finish_reason yet, and those that have
        self._finished: set[int] = set()
        self._call: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # where more arguments belong

    @property
    def is_finished(self) -> bool:
        """True when every choice has its finish_reason."""
        return not self._begun and len(self._finished) >= self._choices

    def take(self, event: Event) -> bytes:
        """As any answer's; [DONE] is an event of this one."""
        if event.kind == "done":
            self.done = True
            return event.raw
        if event.kind != "data":
            return super().take(event)
        self.note(event.data)
        extra = event.data.get("usage") and not event.data.get("choices")
        return b"" if extra and not self._keep_usage else event.raw

    def adds_words(self, said: Mapping[str, Any]) -> bool:
        """Not an event of usage alone, which may not be passed on at all."""
        return bool(said.get("choices"))

    def note(self, said: Mapping[str, Any], part: str = "delta") -> None:
        """Of each choice what its `part` says; OpenRouter tells an error in a choice, too."""
        odd = "choices" not in said or not TELLS_ERROR.isdisjoint(said)
        told = error_of(said) if odd or said.get("object") == "error" else None
        if told:
            raise failure_from(200, told)
        usage = said.get("usage")
        if isinstance(usage, dict) and usage.get("prompt_tokens"):  # nearly always so
            self.usage = usage
        elif usage or "x_groq" in said:
            self.usage = usage_of(said) or self.usage
        for choice in choices_of(said):
            told = error_of(choice) if "error" in choice else None
            if told:
                raise failure_from(200, told)
            index, delta, reason = (
                choice.get("index"),
                choice.get(part),
                choice.get("finish_reason"),
            )
            index = index if isinstance(index, int) else 0
            if isinstance(delta, dict) and any(map(delta.get, SAYS)):
                self.came = self.has_content = True
                if index not in self._finished:
                    self._begun.add(index)
                if self._whole:
                    self._note_arguments(index, delta.get("tool_calls"), part)
            if "usage" in choice:
                self.usage = usage_of(said) or self.usage
            if isinstance(reason := choice.get("finish_reason"), str) and self._finish(reason):
                self._begun.discard(index)
                self._finished.add(index)

    def read(self, body: Mapping[str, Any]) -> None:
        """The message of each choice."""
        self.note(body, "message")

    def holds(self, body: Mapping[str, Any]) -> bool:
        """By its choices."""
        return bool(choices_of(body))

    def words_in(self, said: Mapping[str, Any]) -> Iterator[str]:
        """The content of each choice."""
        for choice in choices_of(said):
            part = choice.get("delta") or choice.get("message")
            if isinstance(part, dict) and isinstance(part.get("content"), str):
                yield part["content"]

    def _note_arguments(self, choice: int, calls: Any, part: str) -> None:
        """Put a tool call's arguments together; another id is another call, whatever its index."""
        for n, tool in enumerate(calls if isinstance(calls, list) else ()):
            function = tool.get("function") if isinstance(tool, dict) else None
            text = function.get("arguments") if isinstance(function, dict) else None
            if not isinstance(text, str):
                continue
            index, id_ = tool.get("index"), str(tool.get("id") or "")
            place = (choice, index if isinstance(index, int) else None)
            key = self._call.get(place)
            if part == "message":
                key = (choice, n, "whole")
            elif key is None or (id_ and key[-1] != id_):
                key = self._call[place] = (*place, len(self._arguments), id_)
            self._arguments.setdefault(key, []).append(text)

    def good_end(self) -> bytes:
        """[DONE]."""
        return DONE

    def bad_end(self, text: str) -> bytes:
        """An error without [DONE] behind it: a plain end would be taken for a good one."""
        told = RouterError(502, "upstream_error", text).body()
        return b"data: %b\n\n" % json.dumps(told).encode()


class MessagesAnswer(Answer):
    """A message of Anthropic's API."""

    words = (b'"text":"', b'"thinking":"', b'"partial_json":"')

    def note(self, said: Mapping[str, Any]) -> None:
        """One event: blocks that open and grow, then the stop_reason with the usage."""
        kind, delta = said.get("type"), said.get("delta")
        if kind == "content_block_delta" and isinstance(delta, dict):
            self._grow(said.get("index"), delta)
        elif kind == "content_block_start" and _is_said(said.get("content_block")):
            self._content()
        elif kind == "message_start" and isinstance(said.get("message"), dict):
            self._take_blocks(said["message"])
        elif kind == "message_delta":
            self._add_usage(said.get("usage"))
            if isinstance(delta, dict) and isinstance(delta.get("stop_reason"), str):
                self._finish(delta["stop_reason"])
        elif kind == "message_stop":
            self.done = True
        elif told := error_of(said):
            raise failure_from(200, told)

    def _grow(self, block: Any, delta: Mapping[str, Any]) -> None:
        piece = delta.get("partial_json")
        if piece or delta.get("text") or delta.get("thinking") or delta.get("citation"):
            self._content()
        if self._whole and isinstance(piece, str):
            key = block if isinstance(block, int) else 0
            self._arguments.setdefault(key, []).append(piece)

    def _take_blocks(self, message: Mapping[str, Any]) -> None:
        """What a message holds; in a stream its first event holds no blocks yet, or all."""
        self._add_usage(message.get("usage"))
        blocks = message.get("content")
        if any(_is_said(block) for block in (blocks if isinstance(blocks, list) else ())):
            self._content()

    def read(self, body: Mapping[str, Any]) -> None:
        """The blocks of a message."""
        if not self.holds(body) and (told := error_of(body)):
            raise failure_from(200, told)
        self._take_blocks(body)
        if isinstance(body.get("stop_reason"), str):
            self._finish(body["stop_reason"])

    def holds(self, body: Mapping[str, Any]) -> bool:
        """By its list of blocks, which may be empty."""
        return isinstance(body.get("content"), list) and body.get("type") != "error"

    def adds_words(self, said: Mapping[str, Any]) -> bool:
        """What a block grows by."""
        return said.get("type") == "content_block_delta"

    def words_in(self, said: Mapping[str, Any]) -> Iterator[str]:
        """Of blocks of text, not of thoughts."""
        blocks = said.get("content")
        for piece in blocks if isinstance(blocks, list) else [said.get("delta")]:
            if isinstance(piece, dict) and isinstance(piece.get("text"), str):
                yield piece["text"]

    def _add_usage(self, usage: Any) -> None:
        """Later counts replace earlier ones, but a zero says nothing: no prompt has no tokens."""
        if isinstance(usage, dict):
            told = {key: value for key, value in usage.items() if value}
            self.usage = {**self.usage, **told}

    def good_end(self) -> bytes:
        """message_stop."""
        return event_of("message_stop")

    def bad_end(self, text: str) -> bytes:
        """Claude Code asks again without a stream after it: it loses nothing."""
        return event_of("error", error={"type": "api_error", "message": text})


def _is_said(block: Any) -> bool:
    """True for a block of a message that says something: any but an empty text or thought."""
    if not isinstance(block, dict):
        return False
    kind = block.get("type")
    if kind in ("text", "thinking"):
        return bool(block.get(kind))
    return kind is not None


BEGINNINGS = ("response.created", "response.queued", "response.in_progress")


class ResponsesAnswer(Answer):
    """A response of OpenAI's Responses API."""

    def __init__(self, model: str, **more: Any):
        super().__init__(model, **more)
        self._head: Mapping[str, Any] = {}  # the response as its first event had it
        self._number = -1  # of the last event

    def note(self, said: Mapping[str, Any]) -> None:
        """One event: deltas and items, then the response as it ended."""
        kind = str(said.get("type"))
        if kind.endswith(".delta"):
            if said.get("delta"):
                self._content()
            if self._whole and kind == "response.function_call_arguments.delta":
                self._arguments.setdefault(_place(said), []).append(str(said.get("delta")))
            return self._count(said)
        if kind.startswith("response.") and kind not in BEGINNINGS:
            self.came = True  # a search goes on, a part is done: the model is at work
        if kind == "response.output_item.added":
            item = said.get("item")
            if isinstance(item, dict) and str(item.get("type")).endswith("_call"):
                self._content()
        elif kind == "response.output_item.done":
            item = said.get("item")
            if _has_output([item]):
                self._content()
            self._take_arguments(_place(said), item)
        elif isinstance(said.get("response"), dict):
            self._note_response(said["response"], kind.removeprefix("response."))
        elif told := error_of(said):
            raise failure_from(200, told)
        return self._count(said)

    def words_in(self, said: Mapping[str, Any]) -> Iterator[str]:
        """Of messages; in a stream of its deltas."""
        if said.get("type") == "response.output_text.delta" and isinstance(said.get("delta"), str):
            yield said["delta"]
        output = said.get("output")
        for item in output if isinstance(output, list) else ():
            content = item.get("content") if isinstance(item, dict) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and part.get("type") == "output_text":
                    yield str(part.get("text"))

    def _count(self, said: Mapping[str, Any]) -> None:
        number = said.get("sequence_number")
        if isinstance(number, int):  # of an event that is passed on
            self._number = number

    def _take_arguments(self, place: int, item: Any) -> None:
        """What a finished call says outranks the pieces that came of it."""
        if self._whole and isinstance(item, dict) and isinstance(item.get("arguments"), str):
            self._arguments[place] = [item["arguments"]]

    def _note_response(self, response: Mapping[str, Any], state: str) -> None:
        self._head = self._head or response
        self.id = self.id or str(response.get("id") or "")[:MOST_ID]
        error, status = response.get("error"), response.get("status")
        if isinstance(response.get("usage"), dict):
            self.usage = response["usage"]
        if error or any(told in ("failed", "cancelled") for told in (state, status)):
            raise failure_from(200, {"error": error or {"message": f"the response is {status}"}})
        if state not in ("completed", "incomplete"):
            return
        output = response.get("output")
        output = output if isinstance(output, list) else []
        if _has_output(output):
            self._content()
        for n, item in enumerate(output):
            self._take_arguments(n, item)
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        self._finish("stop" if state == "completed" else str(reason or "incomplete"))
        self.done = True

    def read(self, body: Mapping[str, Any]) -> None:
        """The response as it ended; one that runs in the background has only begun."""
        if not self.holds(body) and (told := error_of(body)):
            raise failure_from(200, told)
        state = body.get("status") or "completed"
        self._note_response(body, str(state))
        if state in ("queued", "in_progress"):
            self._content()

    def holds(self, body: Mapping[str, Any]) -> bool:
        """By its list of items, which may be empty."""
        return isinstance(body.get("output"), list)

    def bad_end(self, text: str) -> bytes:
        """The response as failed: Codex and the SDKs know what it was and may ask again."""
        kept = ("id", "object", "created_at", "model", "previous_response_id", "metadata")
        head = {key: self._head[key] for key in kept if key in self._head}
        error = {"code": "server_error", "message": text}
        return event_of(
            "response.failed", sequence_number=self._number + 1,
            response={"object": "response", **head, "status": "failed", "error": error,
                      "incomplete_details": None, "output": [], "usage": None},
        )  # fmt: skip


def _place(said: Mapping[str, Any]) -> int:
    """Which item of a response an event is about."""
    index = said.get("output_index")
    return index if isinstance(index, int) else 0


def _has_output(items: Any) -> bool:
    """True when one of a response's items says something: any but empty words or thoughts."""
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict):
            continue
        kind = item.get("type")
        if kind == "message":
            parts = item.get("content")
            parts = parts if isinstance(parts, list) else [{"text": parts}]
            if any(isinstance(p, dict) and (p.get("text") or p.get("refusal")) for p in parts):
                return True
        elif kind == "reasoning":
            if item.get("summary") or item.get("content"):
                return True
        elif kind is not None:
            return True
    return False


class EmbeddingsAnswer(Answer):
    """Vectors: one whole answer, never a stream."""

    def note(self, said: Mapping[str, Any]) -> None:
        """There is no stream of these."""
        raise Failure("not_an_answer", "a stream", 200)

    def read(self, body: Mapping[str, Any]) -> None:
        """The vectors and their usage."""
        if not self.holds(body) and (told := error_of(body)):
            raise failure_from(200, told)
        self.usage = usage_of(body)
        if body.get("data"):
            self._content()

    def holds(self, body: Mapping[str, Any]) -> bool:
        """By its list of vectors."""
        return isinstance(body.get("data"), list)

    def bad_end(self, text: str) -> bytes:
        """A whole answer is never begun before it is complete."""
        return b""


class CountAnswer(EmbeddingsAnswer):
    """How many tokens a message would have."""

    def read(self, body: Mapping[str, Any]) -> None:
        """The count, which is no usage."""
        if not self.holds(body) and (told := error_of(body)):
            raise failure_from(200, told)
        self._content()

    def holds(self, body: Mapping[str, Any]) -> bool:
        """By the count."""
        return isinstance(body.get("input_tokens"), int)


# --- requests ------------------------------------------------------------------------------------

# What agents put around a person's words, in parts and messages of their own: <system-reminder>,
# <environment_context>, <permissions instructions>. A tag of HTML is one word without a hyphen.
WRAPPED = re.compile(r"\s*(?:<[a-z]+[-_ ][\w -]{1,60}>|# AGENTS\.md instructions\b)", re.I)


def own_texts(turns: Sequence[Any], parts_hold_one: bool) -> Iterator[str]:
    """The person's texts, newest first, without what an agent wrapped around them.

    `parts_hold_one`: of the parts of a message the last is the person's, as Claude Code has it.
    """
    for turn in reversed(turns):
        if not isinstance(turn, dict) or turn.get("role") != "user":
            continue
        content = turn.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        own = [t for t in texts if isinstance(t, str) and t.strip() and not WRAPPED.match(t)]
        text = clean("\n".join(own[-1:] if parts_hold_one else own))
        if text:
            yield text


class Dialect:
    """Chat completions, and what the others differ in."""

    name = "chat"  # as `speaks` of an upstream has it, and figures and headers
    paths: tuple[str, ...] = ("/v1/chat/completions", "/chat/completions")
    endpoint = "/chat/completions"  # behind an upstream's base URL
    schema = "ChatRequest"  # in openapi.json
    answer: type[Answer] = ChatAnswer
    passed_headers: tuple[str, ...] = ()  # of the client's; with them goes the query
    streams = True  # where the client wants it
    is_counted = True  # in the figures
    needs_choosing = True  # a category may be chosen by what was said
    adds_usage = True  # `stream_options` may be set
    # Sent while nothing else can be: no client shows it. OpenClaw's timer passes comments over.
    # All that a chunk must have is there, empty: typed clients refuse one that lacks it.
    sign = (
        b'data: {"id":"","object":"chat.completion.chunk","created":0,"model":"",'
        b'"choices":[{"index":0,"delta":{},"finish_reason":null}]}\n\n'
    )

    @property
    def speaks(self) -> str:
        """What an upstream has to speak."""
        return self.name

    def turns(self, body: Mapping[str, Any]) -> list[Any]:
        """The conversation."""
        turns = body.get("messages")
        return turns if isinstance(turns, list) else []

    def texts(self, body: Mapping[str, Any]) -> Iterator[str]:
        """What the person said, newest first."""
        return user_texts(body.get("messages"))

    def fits(self, body: Mapping[str, Any]) -> bool:
        """Whether `body` fits the schema, in a hundredth of a validator's time."""
        options = body.get("stream_options")
        return (
            is_turns(body.get("messages"))
            and has_usual_members(body)
            and isinstance(options, (dict, NoneType))
            and isinstance((options or {}).get("include_usage"), (bool, NoneType))
            and isinstance(body.get("tool_choice"), (str, dict, NoneType))
        )

    def belongs_to(self, body: Mapping[str, Any]) -> str:
        """The path where a body that came in here belongs; '' when it is here."""
        return "/v1/responses" if "input" in body and "messages" not in body else ""

    def wants_json(self, body: Mapping[str, Any]) -> bool:
        """True when the answer has to be JSON."""
        return is_json_format(body.get("response_format"))

    def continues(self, body: Mapping[str, Any]) -> str:
        """The id of what the upstream keeps and `body` goes on with, or ''."""
        return ""

    def told(self, e: RouterError, id_: str, streamed: bool,
             size: int) -> tuple[int, dict[str, Any]]:  # fmt: skip
        """Status and body of an error answer; it may change e.headers.

        `streamed`: a stream was asked for. `size`: bytes of the request.
        """
        return e.status, e.body()

    def failed(self, e: RouterError, id_: str) -> bytes:
        """The event that tells it in a stream that holds nothing but signs of life."""
        return b"data: %b\n\n" % json.dumps(e.body()).encode()


MESSAGES_TYPES = {
    401: "authentication_error", 402: "billing_error",
    403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
# Members and roles that only a chat completion has.
CHAT_ONLY = frozenset((
    "stream_options", "max_completion_tokens", "response_format", "frequency_penalty",
    "presence_penalty", "logit_bias", "n", "functions", "function_call",
))  # fmt: skip


class Messages(Dialect):
    """Anthropic's Messages."""

    name = "messages"
    paths = ("/v1/messages",)
    endpoint = "/messages"
    schema = "MessagesRequest"
    answer: type[Answer] = MessagesAnswer
    passed_headers = ("anthropic-version", "anthropic-beta")
    sign = event_of("ping")
    adds_usage = False

    def texts(self, body: Mapping[str, Any]) -> Iterator[str]:
        """The last part of a message is the person's; what is tagged is the agent's."""
        return own_texts(self.turns(body), parts_hold_one=True)

    def fits(self, body: Mapping[str, Any]) -> bool:
        """As the schema."""
        return (
            is_turns(body.get("messages"))
            and has_usual_members(body)
            and (isinstance(body.get("system"), (str, NoneType)) or is_parts(body["system"]))
            and isinstance(body.get("tool_choice"), (dict, NoneType))
        )

    def belongs_to(self, body: Mapping[str, Any]) -> str:
        """Told by what only a chat has."""
        turns, tools = self.turns(body), body.get("tools")
        is_chat = not CHAT_ONLY.isdisjoint(body)
        tools = tools if isinstance(tools, list) else []
        is_chat |= any(isinstance(t, dict) and "function" in t for t in tools)
        is_chat |= any(
            isinstance(t, dict) and (t.get("role") in ("tool", "developer") or "tool_calls" in t)
            for t in turns
        )
        return "/v1/chat/completions" if is_chat else super().belongs_to(body)

    def wants_json(self, body: Mapping[str, Any]) -> bool:
        """Told by the format of its output, which stood elsewhere before."""
        config = body.get("output_config")
        config = config if isinstance(config, dict) else {}
        return any(map(is_json_format, (config.get("format"), body.get("output_format"))))

    def told(self, e: RouterError, id_: str, streamed: bool,
             size: int) -> tuple[int, dict[str, Any]]:  # fmt: skip
        """In Anthropic's envelope, with statuses that Claude Code takes well.

        It shows a 404 as trouble with the model's name and hides our words. On 401, 429 and 5xx it
        tries for minutes unless it is told not to, and on an `overloaded_error` even then.
        """
        status, kind = e.status, e.error["type"]
        status = 503 if kind == "all_models_failed" else status
        status = 400 if status == 404 and kind != "not_found" else status
        if status == 401:
            e.headers["x-should-retry"] = "false"
        e.headers["request-id"] = id_
        is_bad = status in (400, 405, 409, 412, 415, 422)
        told = "invalid_request_error" if is_bad else MESSAGES_TYPES.get(status, "api_error")
        if told == "overloaded_error" and e.headers.get("x-should-retry") == "false":
            told = "api_error"
        body = {"type": "error", "error": {**e.error, "type": told}, "request_id": id_}
        return status, body | ({} if e.detail is None else {"detail": e.detail})

    def failed(self, e: RouterError, id_: str) -> bytes:
        """In Anthropic's envelope."""
        return event_of("error", error=self.told(e, id_, True, 0)[1]["error"], request_id=id_)


class CountTokens(Messages):
    """The count of a message's tokens, which walks the chain like a message."""

    name = "count_tokens"
    paths = ("/v1/messages/count_tokens",)
    endpoint = "/messages/count_tokens"
    answer = CountAnswer
    streams = False
    is_counted = False

    @property
    def speaks(self) -> str:
        """It goes with Messages."""
        return Messages.name

    def told(self, e: RouterError, id_: str, streamed: bool,
             size: int) -> tuple[int, dict[str, Any]]:  # fmt: skip
        """Where nobody can count, an estimate from the bytes is better than none."""
        tries = e.error.get("attempts") or ()
        unknown = {attempt["status"] for attempt in tries} <= {404, 405, 501}
        if (tries and unknown) or e.error["type"] == "no_capable_model":
            e.headers["X-Router-Estimate"] = "bytes"
            return 200, {"input_tokens": max(1, size // 4)}
        return super().told(e, id_, streamed, size)


class Responses(Dialect):
    """OpenAI's Responses."""

    name = "responses"
    paths = ("/v1/responses", "/responses")
    endpoint = "/responses"
    schema = "ResponsesRequest"
    answer = ResponsesAnswer
    adds_usage = False
    sign = b": keepalive\n\n"

    def turns(self, body: Mapping[str, Any]) -> list[Any]:
        """The items of `input`; a text is the person's."""
        given = body.get("input")
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        return given if isinstance(given, list) else []

    def texts(self, body: Mapping[str, Any]) -> Iterator[str]:
        """Items of the user; Codex' own stand before the person's."""
        return own_texts(self.turns(body), parts_hold_one=False)

    def fits(self, body: Mapping[str, Any]) -> bool:
        """As the schema."""
        given = body.get("input")
        return (
            (
                isinstance(given, str)
                or is_parts(given)
                or ("prompt" in body and "input" not in body)
            )
            and has_usual_members(body)
            and isinstance(body.get("tool_choice"), (str, dict, NoneType))
        )

    def belongs_to(self, body: Mapping[str, Any]) -> str:
        """Told by the messages."""
        return "/v1/chat/completions" if "messages" in body and "input" not in body else ""

    def wants_json(self, body: Mapping[str, Any]) -> bool:
        """Told by the format of its text."""
        text = body.get("text")
        return isinstance(text, dict) and is_json_format(text.get("format"))

    def continues(self, body: Mapping[str, Any]) -> str:
        """A response or a conversation, which only the upstream knows that made it."""
        conversation = body.get("conversation")
        if isinstance(conversation, dict):
            conversation = conversation.get("id")
        return str(body.get("previous_response_id") or conversation or "")[:MOST_ID]

    def told(self, e: RouterError, id_: str, streamed: bool,
             size: int) -> tuple[int, dict[str, Any]]:  # fmt: skip
        """With statuses that Codex takes well.

        It asks a 422 or a 404 six times, a 5xx thirty times and hides its words, and waits out any
        Retry-After of a 429; a 400 with a code it shows at once. It always streams; the SDKs obey
        x-should-retry and are told the true status.
        """
        status, kind = e.status, e.error["type"]
        if status == 429:
            e.headers.pop("Retry-After", None)
        final = e.headers.get("x-should-retry") == "false" and kind != "internal_error"
        if status in (402, 413, 415, 422) or (final and streamed):
            status = 400
        if status == 404 and e.error["code"] not in ("model_not_found", "not_found"):
            status = 400
        return status, e.body()

    def failed(self, e: RouterError, id_: str) -> bytes:
        """Codex asks six times after a `server_error`, and shows our words of a bad prompt.

        OpenAI's SDKs raise what stands at the top, and know no failure of what never was created.
        """
        final = (e.status < 500 and e.status != 429) or e.headers.get("x-should-retry") == "false"
        code = "invalid_prompt" if final else "server_error"
        error = {"code": code, "message": e.error["message"]}
        told = {"object": "response", "status": "failed", "error": error, "output": []}
        return event_of("response.failed", sequence_number=0, response=told, error=e.error)


class Embeddings(Dialect):
    """Vectors of texts. Those of two models cannot be compared, so nothing is chosen."""

    name = "embeddings"
    paths = ("/v1/embeddings", "/embeddings")
    endpoint = "/embeddings"
    schema = "EmbeddingsRequest"
    answer = EmbeddingsAnswer
    streams = False
    needs_choosing = False
    adds_usage = False

    def turns(self, body: Mapping[str, Any]) -> list[Any]:
        """Nobody talks."""
        return []

    def texts(self, body: Mapping[str, Any]) -> Iterator[str]:
        """Nothing is said."""
        return iter(())

    def fits(self, body: Mapping[str, Any]) -> bool:
        """As the schema."""
        given = body.get("input")
        return isinstance(body.get("model"), str) and isinstance(given, str | list) and bool(given)

    def belongs_to(self, body: Mapping[str, Any]) -> str:
        """Told by the messages."""
        return "/v1/chat/completions" if "messages" in body and "input" not in body else ""


def is_json_format(told: Any) -> bool:
    """Whether the format of an answer is JSON."""
    return isinstance(told, dict) and told.get("type") in ("json_schema", "json_object")


def is_turns(turns: Any) -> bool:
    """Whether `turns` are messages with a role each."""
    return isinstance(turns, list) and len(turns) > 0 and all(map(_is_message, turns))


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return content is None or isinstance(content, str) or is_parts(content)


def has_usual_members(body: Mapping[str, Any]) -> bool:
    """Whether `model`, `stream` and `tools`, which all dialects have, are what they should be."""
    tools = body.get("tools")
    return (
        isinstance(body.get("model", ""), str)
        and isinstance(body.get("stream"), (bool, NoneType))
        and isinstance(tools, (list, NoneType))
        and {*map(type, tools or ())} <= {dict}
    )


CHAT = Dialect()
MESSAGES = Messages()
RESPONSES = Responses()
EMBEDDINGS = Embeddings()
DIALECTS: tuple[Dialect, ...] = (CHAT, MESSAGES, CountTokens(), RESPONSES, EMBEDDINGS)
DIALECT_AT = {path: dialect for dialect in DIALECTS for path in dialect.paths}


def dialect_of(body: Mapping[str, Any]) -> Dialect:
    """Whose `body` is, by its members: for a dry run, which has one path for all."""
    if "input" in body:
        return RESPONSES
    tools = body.get("tools")
    named = any("input_schema" in tool for tool in tools if isinstance(tool, dict)) if tools else 0
    return MESSAGES if "system" in body or "thinking" in body or named else CHAT


QUERY = re.compile(r"[\w=&.%~+-]{1,200}", re.A)


def passed_on(dialect: Dialect, environ: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The client's headers and query (with its `?`) that go upstream."""
    if not dialect.passed_headers:
        return {}, ""
    headers = {
        name: environ[key]
        for name in dialect.passed_headers
        if (key := "HTTP_" + name.upper().replace("-", "_")) in environ
    }
    query = environ.get("QUERY_STRING", "")
    return headers, f"?{query}" if QUERY.fullmatch(query) else ""
