"""What may go wrong, each thing one exception, and how it is told to a client.

Failure      one attempt brought no answer: the walk goes on with the next model, or ends
RoutesError  routes.json cannot be used; Refused: what a client wants of it cannot be granted
RouterError  an answer to the client that is an error
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jsonschema


class RoutesError(Exception):
    """routes.json cannot be used; the message says where and why, one line per finding."""


class Unreadable(RoutesError):
    """routes.json could not be read at all, perhaps only for now."""


class Refused(RoutesError):
    """A request about the file that cannot be granted; nothing was changed."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status = status
        self.kind = kind


class Failure(Exception):
    """A call that brought no answer: one word for what happened, and what is known of it."""

    def __init__(
        self,
        outcome: str,
        message: str = "",
        status: int | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(outcome)
        self.outcome = outcome
        self.message = message
        self.status = status
        self.retry_after_s = retry_after_s
        self.names_usage = False  # it refuses that a stream's usage is asked for
        self.relay: Any = None  # what it read so far: an empty answer may be passed on yet
        self.attempt: Any = None

    def bare(self) -> Failure:
        """Without its history, whose frames would keep request and answer alive in a circle."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class Full(Exception):
    """No permit is left; the message says how many there are."""


class ClassifierError(Exception):
    """The classifier did not answer: one word, and a sentence for /health and the log."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(reason)
        self.message = message


class RouterError(Exception):
    """An answer to the client that is an error: status, kind and a sentence to act on."""

    def __init__(self, status: int, kind: str, message: str, *, param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None,
                 detail: list[dict[str, Any]] | None = None,
                 attempts: list[dict[str, Any]] | None = None):  # fmt: skip
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.detail = detail
        self.error: dict[str, Any] = {
            "message": message, "type": kind, "param": param, "code": code or kind,
        }  # fmt: skip
        if attempts is not None:
            self.error["attempts"] = attempts

    def body(self) -> dict[str, Any]:
        """The envelope of OpenAI's API, which OpenClaw and the SDKs show best."""
        return {"error": self.error} | ({} if self.detail is None else {"detail": self.detail})


def invalid(detail: list[dict[str, Any]]) -> RouterError:
    """The 422 for a body that does not fit: `detail` holds [{loc, msg}], never values."""
    where = ".".join(str(part) for part in detail[0]["loc"])
    message = f"{where}: {detail[0]['msg']}"
    return RouterError(422, "invalid_request_error", message, param=where, detail=detail)


SPOKEN = ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses",
          "/v1/embeddings", "/v1/models", "/route", "/health", "/health/ready", "/metrics",
          "/config", "/config/category", "/config/model-mapping",
          "/circuit-breaker/reset-all")  # fmt: skip


NOT_SPOKEN = {
    "/completions": "text completions are", "/images": "images are", "/audio": "audio is",
    "/moderations": "moderations are", "/files": "files are",
    "/fine_tuning": "fine-tuning is", "/batches": "batches are", "/assistants": "assistants are",
    "/threads": "threads are", "/vector_stores": "vector stores are", "/realtime": "realtime is",
    "/messages/batches": "batches of messages are",
    "/rerank": "reranking is", "/api": "Ollama's own API is",
}  # fmt: skip


SEGMENTS = frozenset("/".join([*SPOKEN, *NOT_SPOKEN, "openai generations edits speech v2 "
                     "transcriptions translations chat tags generate beta"]).replace(" ", "/")
                     .split("/"))  # fmt: skip


def no_such_route(path: str) -> str:
    """What to answer on a path that is none of ours: what was perhaps meant."""
    plain, short = f"/{path.strip('/')}", f"/{path.strip('/')}"
    while short.startswith("/v1/"):
        short = short.removeprefix("/v1")
    if plain.startswith("/v1/v1/"):
        return f"the path begins with /v1 twice: leave it out of the base URL; /v1{short} is meant"
    if short.startswith("/responses/"):
        return "the router keeps no responses: ask the upstream that made it"
    for head, what in NOT_SPOKEN.items():
        if f"{short}/".startswith(f"{head}/"):
            return f"{what} not spoken here; POST /v1/chat/completions is"
    meant = next((known for known in SPOKEN if plain.endswith(known.removeprefix("/v1"))), "")
    if meant:
        return f"there is no such route; the base URL should end in /v1, then {meant} is asked"
    return f"there is no such route; GET / lists them{hint(plain, SPOKEN, 0.8)}"


def known_part(path: str) -> str:
    """`path` for the log: segments that no API's path holds are `*`, for they may be secrets."""
    segments = path.strip("/").split("/")[:8]
    return "/" + "/".join(part if part in SEGMENTS else "*" for part in segments)


_KEY_SHAPES = re.compile(r"(?i)bearer\s+\S+|\b(?:sk|pk|rk|key|gsk|xai)[-_][\w-]{8,}|AIza[\w-]{20,}")


def scrub(text: str, known: Iterable[str] = ()) -> str:
    """`text` for a person: known secrets and key-like words masked, controls gone, 600 chars."""
    text = text[:4000]
    for secret in filter(None, known):
        text = text.replace(secret, "***")
        squeezed = "".join(c for c in text if c.isprintable() and not c.isspace())
        if (
            len(secret) >= 8 and secret.casefold() in squeezed.casefold()
        ):  # with a blank in its middle, or in capitals
            return "***"
    text = _KEY_SHAPES.sub("***", text)[:600]
    return "".join(c if c.isprintable() else " " for c in text).strip()


def hint(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """`; did you mean ...?` when one of `known` is near, else ''."""
    near = difflib.get_close_matches(word, list(known), 1, likeness)
    return f"; did you mean {near[0]!r}?" if near else ""


TYPES = {"object": "an object {...}", "array": "a list [...]", "string": "text in quotes",
         "integer": "a whole number", "number": "a number", "boolean": "true or false",
         "null": "null"}  # fmt: skip


SAYS = {
    "uniqueItems": "should name each model once",
    "minItems": "should be non-empty", "minProperties": "should be non-empty",
    "minLength": "should be non-empty", "minimum": "should be at least {}",
    "exclusiveMinimum": "should be more than {}", "maximum": "should be at most {}",
    "maxItems": "should have at most {} entries", "maxProperties": "should have at most {} members",
    "maxLength": "should have at most {} characters", "not": "is a reserved name",
}  # fmt: skip


def say_schema_error(e: jsonschema.ValidationError) -> str:
    """One finding without the value itself: a key pasted in the wrong place must not be logged."""
    kind, wanted, given = str(e.validator), cast(Any, e.validator_value), cast(Any, e.instance)
    if kind == "additionalProperties":
        known = list(e.schema.get("properties", {})) if isinstance(e.schema, dict) else []
        extra = next(k for k in given if k not in known)
        return f"unknown key {extra[:40]!r}{hint(extra, known)}"
    if kind == "required":
        return f"{next(key for key in wanted if key not in given)!r} is missing"
    if kind == "type":
        types = [wanted] if isinstance(wanted, str) else wanted
        return f"should be {' or '.join(TYPES[name] for name in types)}"
    if kind == "enum":
        choices = [str(choice) for choice in wanted]
        return f"should be one of {', '.join(choices)}{hint(str(given), choices)}"
    if kind == "pattern" and isinstance(e.schema, dict):
        name = f"the name {str(given)[:40]!r} " if "propertyNames" in e.schema_path else ""
        return name + str(e.schema.get("patternErrorMessage", "has a form that cannot be used"))
    if kind == "anyOf":
        return f"should hold {' or '.join(key for way in wanted for key in way['required'])}"
    return SAYS[kind].format(wanted)
