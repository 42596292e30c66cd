"""What counts as a failure: one table, and the function that finds an answer's row in it.

An attempt ends with one word, its outcome. `VERDICTS` says of each outcome whether the next model
of the chain is tried and whether the model gets a strike; `judge` finds the outcome for what an
upstream answered. To teach the router a new kind of failure, add a row.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from parts.errors import Failure
from parts.exchange import MAX_ERROR, Reply, read_whole, retry_after_of
from parts.jsontext import parse_loosely


class Verdict(NamedTuple):
    """What an outcome means: `next` is yes, no, or once (a second opinion); `strike` counts."""

    next: str
    strike: bool
    says: str


VERDICTS = {
    "connect": Verdict("yes", True, "could not be reached"),
    "tls": Verdict("yes", True, "has no valid TLS certificate"),
    "reset": Verdict("yes", True, "closed the connection"),
    "first_token": Verdict("yes", True, "sent no token in time"),
    "answer": Verdict("yes", True, "did not finish its answer in time"),
    "idle": Verdict("yes", True, "stopped in mid-answer"),
    "cut": Verdict("yes", True, "broke off in mid-answer"),
    "server_error": Verdict("yes", True, "failed"),
    "redirect": Verdict("yes", True, "answered with a redirect"),
    "not_an_answer": Verdict("yes", True, "sent something that is no answer"),
    "rate_limited": Verdict("yes", True, "is rate limited"),
    "unknown_model": Verdict("yes", True, "is not known to its upstream"),
    "not_found": Verdict("yes", False, "was not found"),
    "empty": Verdict("once", False, "sent an empty answer"),
    "refused": Verdict("once", False, "refused the request"),
    "context_length": Verdict("yes", False, "cannot take a prompt of this length"),
    "unauthorized": Verdict("yes", False, "was refused for its key"),
    "payment": Verdict("yes", False, "wants payment"),
    "client_error": Verdict("yes", False, "refused the request"),
    "content_filter": Verdict("no", False, "refused the content"),
    "total": Verdict("no", False, "ran out of the time for the whole request"),
    "shortage": Verdict("no", False, "could not be asked: this machine is short of something"),
    "client_left": Verdict("no", False, "was left by the client"),
    "internal_error": Verdict("no", False, "met a bug of the router"),
}
# A status whose text says nothing more. Other 3xx, 4xx and 5xx: see judge.
BY_STATUS = {
    400: "refused", 401: "unauthorized", 402: "payment", 404: "not_found", 408: "server_error",
    413: "context_length", 422: "refused", 429: "rate_limited",
}  # fmt: skip
# What the text of an error says, for the statuses in which upstreams say it; the first row wins.
BY_TEXT = (
    ("context_length", (400, 422), re.compile(
        r"context.?(length|window|size)|maximum.?context|too many (input |prompt )?tokens"
        r"|(prompt|input|messages?|request)( is)? too long|reduce the length"
        r"|exceeds? .{0,60}(tokens|context)|token limit", re.I)),
    ("content_filter", (400, 403), re.compile(
        r"content.?(filter|policy|management|moderation)|moderation|flagged(?! as deprecated)"
        r"|safety(?!_)|responsible.?ai", re.I)),
    # "does not support tools" and "no endpoints found that support ..." blame the request.
    ("unknown_model", (400, 404), re.compile(
        r"model_not_found|\bmodel:? ?[`'\"]?[\w./:@-]+[`'\"]?,? (was |is |has )?"
        r"(not (been )?(found|exist|valid)|does not exist)|model not found"
        r"|no (endpoints|models?) found for\b"
        r"|(unknown|no such|not a valid) model\b|invalid model( name| id|:|$)", re.I)),
    ("unauthorized", (403,), re.compile(
        r"api.?key|credential|authenticat|authoriz|permission|token|user not found", re.I)),
)  # fmt: skip


def judge(status: int, text: str) -> str:
    """The outcome, a key of VERDICTS, of an upstream's status and what its error says."""
    for outcome, statuses, pattern in BY_TEXT:
        if status in statuses and pattern.search(text[:2000]):
            return outcome
    if 300 <= status < 400:
        return "redirect"
    other = (
        "server_error" if status >= 500 else "client_error" if status >= 400 else "not_an_answer"
    )
    return BY_STATUS.get(status, other)


def failure_from(status: int, body: Any, retry_after: str | None = None) -> Failure:
    """The failure that an error answer means, in any upstream's dialect.

    OpenAI and Ollama send {"error": {...}}; OpenRouter the same with a numeric code, also inside a
    200 and in a stream; others {"error": "text"}, {"detail": ...} or {"message": ...}.
    """
    body = body if isinstance(body, dict) else {}
    error = body.get("error") or body.get("detail") or body.get("message")
    if isinstance(error, list):  # FastAPI's places
        error = "; ".join(str(place.get("msg")) for place in error if isinstance(place, dict))
    error = error if isinstance(error, dict) else {"message": error}
    metadata = error.get("metadata")
    hints = metadata if isinstance(metadata, dict) else {}
    flagged = "flagged" if hints.get("reasons") else ""
    parts = [error.get("code"), error.get("type"), error.get("message"), hints.get("raw"), flagged]
    text = " ".join(str(part) for part in parts if isinstance(part, str | int))
    if status < 300:
        code = str(error.get("code") or error.get("status"))
        told = int(code) if code.isdecimal() and len(code) == 3 and code[0] in "45" else 0
        says_why = any(pattern.search(text) for _, _, pattern in BY_TEXT[:2])
        status = told or (400 if says_why else 500)
    message = error.get("message") if isinstance(error.get("message"), str) else ""
    wait_s = retry_after_of(retry_after) if status in (429, 503) else None
    return Failure(judge(status, text), str(message), status, wait_s)


def check_head(reply: Reply) -> None:
    """Failure unless status and headers announce an answer that we can read."""
    status = reply.status_code
    plain = reply.headers.get("content-encoding", "identity").lower() in ("", "identity")
    if status == 200 and plain:
        return
    if status < 300:
        raise Failure("not_an_answer", f"status {status}" if plain else "compressed", status)
    data = b""
    with contextlib.suppress(Failure):  # the status is the verdict, with or without its text
        data = read_whole(reply, MAX_ERROR) if plain else b""
    if reply.flight.why:
        raise Failure(reply.flight.why, status=status)
    raise failure_from(status, parse_loosely(data), reply.headers.get("retry-after"))


# What a finish_reason says, in the words of all servers in use. One that stands in no row ends an
# answer that there is, for an honest `eos` must not strike a good provider; see `finish_kind`.
FINISHES = {
    word: kind
    for kind, words in {
        "stop": "stop end_turn stop_sequence eos eos_token end complete completed done finished "
                "null none stop_token pause_turn compaction",
        "calls": "tool_calls tool_use function_call tool_call",
        "length": "length max_tokens max_output_tokens max_length model_length token_limit "
                  "model_context_window_exceeded context_length incomplete",
        "filter": "content_filter content_filtered safety recitation blocklist blocked refusal "
                  "prohibited_content spii sensitive guardrail_intervened image_safety moderation",
        "failed": "error abort aborted network_error malformed_function_call malformed_response "
                  "unexpected_tool_call too_many_tool_calls insufficient_system_resource failed "
                  "failure cancelled canceled timeout overloaded unavailable",
    }.items()
    for word in words.split()
}  # fmt: skip
FAILED_NAME = re.compile(r"error|fail|abort|overload|malformed|unavailable|timeout|cancel")


def finish_kind(reason: str) -> str:
    """stop, calls, length, filter, failed, or unknown: what a finish_reason says."""
    name = reason.strip().lower().replace("-", "_")
    known = FINISHES.get(name)
    return known or ("failed" if FAILED_NAME.search(name) else "unknown")


TELLS_ERROR = frozenset(("error", "error_type", "error_message"))  # beside choices, too


def error_of(body: Mapping[str, Any]) -> Any:
    """What in an answer, an event or a choice says that it is an error; None when nothing does."""
    told = body.get("error")
    if told and (not isinstance(told, dict) or any(told.values())):
        return body
    if body.get("object") == "error" or body.get("type") == "error":
        return body
    kind, said = body.get("error_type"), body.get("error_message")
    if kind or said:
        return {"error": {"type": kind, "message": said}}
    bare = body.get("message") or body.get("detail") or body.get("errors") or body.get("msg")
    return body if bare and "choices" not in body and not isinstance(bare, Mapping) else None
