"""Does an agent go round in circles: the same call of a tool, with the same result, again.

Counted in the history that comes with each request, so nothing has to be remembered. Polling with
results that change, pages one after another and a few retries are no circle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

# What Codex puts before each result of its shell, and what is never the same twice.
VARYING = re.compile(r"^(?:Chunk ID|Wall time): [^\n]*\n", re.M)


class ToolCall(NamedTuple):
    """A call of a tool and what came of it; two are equal when all of it is."""

    name: str
    arguments: Any
    result: Any


def repeats(turns: Sequence[Any]) -> tuple[int, str]:
    """How many calls at the end of `turns` are the same, and the tool's name; (0, "") for none."""
    calls = calls_backwards(turns)
    last = next(calls, None)
    if last is None:
        return 0, ""
    count = 1
    while next(calls, None) == last:
        count += 1
    return count, last.name


def calls_backwards(turns: Sequence[Any]) -> Iterator[ToolCall]:
    """The calls in `turns` that have a result, the last one first, in whatever format."""
    results: dict[Any, Any] = {}
    for turn in filter(is_object, reversed(turns)):
        if turn.get("role") in ("tool", "function"):  # chat, and chat until 2023
            results[str(turn.get("tool_call_id") or turn.get("name"))] = turn.get("content")
        elif "output" in turn:  # Responses
            results[str(turn.get("call_id"))] = turn["output"]
        content = turn.get("content")
        for part in filter(is_object, content if isinstance(content, list) else ()):
            if part.get("type") == "tool_result":  # Messages
                results[str(part.get("tool_use_id"))] = part.get("content")
        for id_, name, arguments in reversed(list(calls_in(turn))):
            if id_ in results:
                yield ToolCall(name, arguments, steady(results.pop(id_)))


def calls_in(turn: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(id, tool, arguments) of each call that one turn makes."""
    if "call_id" in turn and "output" not in turn:
        told = turn.get("arguments", turn.get("input", turn.get("action")))
        yield str(turn["call_id"]), str(turn.get("name")), told
    old = turn.get("function_call")
    if is_object(old):
        yield str(old.get("name")), str(old.get("name")), old.get("arguments")
    calls, content = turn.get("tool_calls"), turn.get("content")
    for call in filter(is_object, calls if isinstance(calls, list) else ()):
        function = call.get("function")
        if is_object(function):
            yield str(call.get("id")), str(function.get("name")), function.get("arguments")
    for part in filter(is_object, content if isinstance(content, list) else ()):
        if part.get("type") == "tool_use":
            yield str(part.get("id")), str(part.get("name")), part.get("input")


def steady(result: Any) -> Any:
    """`result` without what its client changes from one request to the next."""
    if isinstance(result, str):
        return VARYING.sub("", result)
    if not isinstance(result, list):
        return result
    parts = [part for part in result if is_object(part)]
    return [{k: v for k, v in part.items() if k != "cache_control"} for part in parts]


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether `value` is a JSON object."""
    return isinstance(value, dict)
