"""routes.json: reading, checking, watching and changing the one file that is the whole truth.

`Store.table` is the last good table; a bad edit never takes it away. `Store.change` applies one
change to the text on disk and touches no other byte of it. Nothing here knows Flask or HTTP: a
refusal is a `Refused` with the status and kind that the API shall answer with.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import jsonschema

from parts.addresses import read_url
from parts.prompts import is_entry
from parts.settings import decode, hint

HERE = Path(__file__).resolve().parent
log = logging.getLogger("llm_router")

BUILT_IN = ("tools", "code", "reasoning", "conversation")
DEFAULTS: dict[str, Any] = {
    "routing_mode": "hybrid",
    "tools_routing": "auto",
    "agent_tool_count": 8,
    "continuations": [],
    "daily_limit_usd": None,
    "ollama": {"base_url": "http://127.0.0.1:11434", "model": "qwen2.5:0.5b", "timeout_sec": 2},
    "circuit_breaker": {"failure_threshold": 3, "recovery_timeout_sec": 300, "first_retry_sec": 5},
    "timeouts_sec": {"connect": 5, "first_token": 12, "idle": 30, "answer": 120, "total": 300},
}
LOOK_EVERY_S = 0.5  # how often a request looks at routes.json; a change is seen within 1 s
YOUNG_S = 2.0  # a file this young may change again within one tick of its timestamps
LINE_WIDTH = 100
_BLANK = re.compile(r"[ \t\n\r]*")


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


@dataclass(frozen=True)
class Upstream:
    """Where models are reached: an OpenAI-compatible base URL and the name of its key."""

    name: str
    base_url: str
    api_key_env: str | None = None


@dataclass(frozen=True)
class Model:
    """One model as routes.json knows it; `cost` is USD per million tokens."""

    id: str
    upstream: Upstream
    cost: Mapping[str, float] | None = None
    context: int | None = None
    tools: bool = True
    images: bool = True
    timeouts: Mapping[str, float] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """The last path segment: `glm-5` of `z-ai/glm-5`."""
        return self.id.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Category:
    """One category: its fallback chain and the words that lead to it."""

    name: str
    models: tuple[Model, ...]
    keywords: tuple[str, ...] = ()
    description: str = ""
    whole: bool = False
    timeouts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """routes.json, checked and immutable. A request keeps the table it began with."""

    text: str
    mode: str
    default_category: str
    tools_routing: str
    agent_tool_count: int
    continuations: tuple[str, ...]
    daily_limit_usd: float | None
    ollama: Mapping[str, Any]
    breaker: Mapping[str, float]
    timeouts: Mapping[str, float]
    upstreams: Mapping[str, Upstream]
    models: Mapping[str, Model]
    categories: Mapping[str, Category]
    shorts: Mapping[str, tuple[str, ...]]
    doubts: tuple[tuple[tuple[str, ...], str], ...] = ()  # (categories, sentence)

    @cached_property
    def etag(self) -> str:
        """Names this version of the file, for If-Match."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def resolve(self, name: str) -> str | None:
        """The full id for an id or an unambiguous short name; None when unknown; 422 if unclear."""
        found = (name,) if name in self.models else self.shorts.get(name, ())
        if len(found) > 1:
            names = ", ".join(found)
            raise Refused(
                422, "ambiguous_model", f"{name} could be any of {names}: use the full name"
            )
        return found[0] if found else None

    def labels(self) -> dict[str, str]:
        """{full id: short name}, or the full id where two models share a short name."""
        return {
            id_: m.short if len(self.shorts[m.short]) == 1 else id_
            for id_, m in self.models.items()
        }

    @cached_property
    def chain_ids(self) -> frozenset[str]:
        """The models that stand in any chain."""
        return frozenset(model.id for c in self.categories.values() for model in c.models)

    def names(self) -> list[str]:
        """What `model` may be: `router`, `router/<category>` and every model of a chain."""
        chains = [id_ for id_ in self.models if id_ in self.chain_ids]
        return ["router", *(f"router/{name}" for name in self.categories), *chains]

    def as_json(self) -> dict[str, Any]:
        """The reference's keys for GET /config and the rest of the table; it holds no keys."""
        categories = self.categories.items()
        return {
            "routing_mode": self.mode,
            "ollama": dict(self.ollama),
            "model_mappings": {name: [m.id for m in c.models] for name, c in categories},
            "keywords": {name: list(c.keywords) for name, c in categories},
            "model_costs": {id_: dict(m.cost) for id_, m in self.models.items() if m.cost},
            "default_category": self.default_category,
            "tools_routing": self.tools_routing,
            "agent_tool_count": self.agent_tool_count,
            "categories": {
                name: {"models": [m.id for m in c.models], "description": c.description,
                       "stream": "whole" if c.whole else "live", "timeouts_sec": dict(c.timeouts)}
                for name, c in categories
            },
            "circuit_breaker": dict(self.breaker),
            "timeouts_sec": dict(self.timeouts),
            "daily_limit_usd": self.daily_limit_usd,
            "upstreams": {
                u.name: {"base_url": u.base_url, "api_key_env": u.api_key_env}
                for u in self.upstreams.values()
            },
            "warnings": list(self.warnings),
        }  # fmt: skip

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person may want to know although nothing is broken."""
        return tuple(sentence for _, sentence in self.doubts)

    def doubts_about(self, name: str) -> list[str]:
        """The warnings about the category `name`."""
        return [sentence for categories, sentence in self.doubts if name in categories]

    def with_category(self, name: str, given: Mapping[str, Any], *, must_exist: bool) -> str:
        """The file's text with `name`'s chain set, and its keywords and description if given."""
        if must_exist and name not in self.categories:
            raise no_such_category(name)
        ids = [self.resolve(model) or model for model in given["models"]]
        members = {"models": ids} | {k: given[k] for k in ("keywords", "description") if k in given}
        if name not in self.categories:
            return set_member(self.text, ("categories", name), members)
        text = self.text
        for key, value in members.items():
            text = set_member(text, ("categories", name, key), value)
        return text

    def without_category(self, name: str) -> str:
        """The file's text without `name`; Refused for the default, a built-in, an unknown one."""
        if name == self.default_category:
            why = f"{name} is the default category: change default_category in routes.json first"
            raise Refused(422, "default_category", why)
        if name in BUILT_IN:
            raise Refused(400, "built_in_category", f"{name} is built in and cannot be deleted")
        if name not in self.categories:
            raise no_such_category(name)
        return set_member(self.text, ("categories", name), None)


def no_such_category(name: str) -> Refused:
    """The 404 of the configuration routes."""
    return Refused(
        404, "category_not_found", f"no such category: {name[:64]!r}; GET /config lists them"
    )


class Member(NamedTuple):
    """Where one member of a JSON object stands in its text."""

    key: str
    start: int  # of the key
    value: int  # start of the value
    end: int  # of the value


def scan_object(text: str, at: int = 0) -> tuple[dict[str, Any], list[Member], int]:
    """The JSON object at `at`: its value, where its members stand, and its end.

    Raises ValueError like json.loads. Positions let a caller replace one member and leave every
    other byte as it is: big integers, floats, key order and layout survive.
    """
    values: dict[str, Any] = {}
    members: list[Member] = []
    at = _skip(text, _expect(text, at, "{"))
    while not (text.startswith("}", at) and not members):
        start, at = at, _expect(text, at, '"')
        key, at = json.decoder.scanstring(text, at, True)  # type: ignore[attr-defined]
        value_at = _skip(text, _expect(text, at, ":"))
        try:
            values[key], at = DECODER.scan_once(text, value_at)
        except StopIteration as e:
            raise json.JSONDecodeError("Expecting value", text, e.value) from None
        members.append(Member(key, start, value_at, at))
        at = _skip(text, at)
        if text.startswith("}", at):
            break
        at = _skip(text, _expect(text, at, ","))
    return values, members, at + 1


NESTS = (dict, list)  # json makes no others; looking at the type is three times as quick


def depth_of(value: Any) -> int:
    """How deep `value` is nested; looking stops at 100."""
    level, depth = [value], 0
    while level and depth < 100:
        depth += 1
        level = [v for node in level for v in values_of(node) if type(v) in NESTS]
    return depth


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


def _expect(text: str, at: int, char: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != char:
        raise json.JSONDecodeError(f"Expecting {char!r}", text, at)
    return at + 1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER: Any = json.JSONDecoder(parse_constant=_refuse_constant)


def set_member(text: str, path: tuple[str, ...], value: Any) -> str:
    """`text` with the member at `path` set (or dropped: None); all other bytes as they were."""
    at = 0
    for key in path[:-1]:
        at = next(m.value for m in scan_object(text, at)[1] if m.key == key)
    _, members, end = scan_object(text, at)
    depth, key = len(path), path[-1]
    found = next((n for n, m in enumerate(members) if m.key == key), None)
    if value is None:
        return text if found is None else _drop_member(text, members, found, end)
    head = f"{'  ' * depth}{json.dumps(key, ensure_ascii=False)}: "
    if found is not None:
        member = members[found]
        same = DECODER.scan_once(text, member.value)[0] == value
        return (
            text
            if same
            else splice(text, member.value, member.end, pretty(value, depth, len(head)))
        )
    line = "\n" + head + pretty(value, depth, len(head))
    if members:
        return splice(text, members[-1].end, members[-1].end, "," + line)
    return splice(text, at + 1, end - 1, line + "\n" + "  " * (depth - 1))


def _drop_member(text: str, members: list[Member], n: int, end: int) -> str:
    if n > 0:  # with the comma before it
        return splice(text, members[n - 1].end, members[n].end, "")
    if len(members) > 1:  # the first of several: with the comma after it
        return splice(text, members[0].start, members[1].start, "")
    return splice(text, members[0].start, end - 1, "")


def splice(text: str, start: int, end: int, new: str) -> str:
    """`text` with `new` instead of what stands from `start` to `end`."""
    return text[:start] + new + text[end:]


def pretty(value: Any, depth: int = 0, used: int = 0) -> str:
    """`value` as JSON in the house form: short values on one line, lists wrapped at 100 columns."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value:
        return flat
    inner = "  " * (depth + 1)
    nests = depth < 2 and any(isinstance(v, dict) for v in values_of(value))
    if used + len(flat) < LINE_WIDTH and not nests:
        return flat
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            head = f"{inner}{json.dumps(key, ensure_ascii=False)}: "
            lines.append(head + pretty(item, depth + 1, len(head)))
        return "{\n" + ",\n".join(lines) + f"\n{inner[2:]}}}"
    lines = [inner]
    for n, item in enumerate(value, 1):
        word = pretty(item, depth + 1, len(inner)) + ("," if n < len(value) else "")
        if len(lines[-1]) + len(word) > LINE_WIDTH and lines[-1] != inner:
            lines[-1] = lines[-1].rstrip()
            lines.append(inner)
        lines[-1] += word + " "
    return "[\n" + "\n".join(line.rstrip() for line in lines) + f"\n{inner[2:]}]"


def values_of(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """The members' values, or the items."""
    return value.values() if type(value) is dict else value


def load_table(text: str, schema: jsonschema.Draft202012Validator) -> Table:
    """The table that `text` (routes.json) describes; RoutesError with place and JSON path."""
    try:
        raw = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as e:
        raise RoutesError(f"line {e.lineno}, column {e.colno}: {say_json_error(e)}") from e
    except (ValueError, RecursionError) as e:
        raise RoutesError(str(e) or "nested too deeply") from e
    if re.search(r"\\u[dD][89a-fA-F]", text) and not _is_text(raw):
        raise RoutesError("a lone surrogate is no text")
    found = sorted(schema.iter_errors(raw), key=lambda e: str(e.json_path))
    if found:
        raise RoutesError("\n".join(f"{e.json_path}: {say_schema_error(e)}" for e in found[:10]))
    table = _build_table(text, raw)
    problems = list(_cross_check(table))
    if problems:
        raise RoutesError("\n".join(problems))
    return replace(table, doubts=tuple(_doubts(table, raw)))


def say_json_error(e: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text, with a word on what people write into it most."""
    if e.doc[e.pos : e.pos + 1] in ("/", "#"):
        return "JSON knows no comments"
    before = e.doc[: e.pos].rstrip()
    if before.endswith(",") and e.doc[e.pos : e.pos + 1] in ("}", "]", ""):
        return "a comma too many before the end"
    return e.msg


def _is_text(value: Any) -> bool:
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, n in counts.items() if n > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


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


def _build_table(text: str, raw: Mapping[str, Any]) -> Table:
    merged: dict[str, Any] = {
        key: {**default, **raw.get(key, {})} if isinstance(default, dict) else raw.get(key, default)
        for key, default in DEFAULTS.items()
    }
    upstreams = {
        name: Upstream(name, _base_url(f"$.upstreams.{name}", u["base_url"], ENDPOINTS),
                       u.get("api_key_env"))
        for name, u in raw["upstreams"].items()
    }  # fmt: skip
    ollama_url = _base_url("$.ollama", merged["ollama"]["base_url"], OLLAMA_ENDPOINTS)
    merged["ollama"]["base_url"] = ollama_url
    models = {id_: _build_model(id_, m, upstreams) for id_, m in raw.get("models", {}).items()}
    chains = dict(_full_ids(raw))
    for id_ in (id_ for ids in chains.values() for id_ in ids):
        models.setdefault(id_, _build_model(id_, {}, upstreams))
    shorts: dict[str, tuple[str, ...]] = {}
    for id_, model in models.items():
        shorts[model.short] = (*shorts.get(model.short, ()), id_)
    categories = {
        name: Category(name, tuple(models[id_] for id_ in chains[name]),
                       tuple(c.get("keywords", ())), c.get("description", ""),
                       c.get("stream") == "whole", c.get("timeouts_sec", {}))
        for name, c in raw["categories"].items()
    }  # fmt: skip
    return Table(
        text, merged["routing_mode"], raw["default_category"], merged["tools_routing"],
        merged["agent_tool_count"], tuple(merged["continuations"]), merged["daily_limit_usd"],
        merged["ollama"], merged["circuit_breaker"], merged["timeouts_sec"],
        upstreams, models, categories, shorts,
    )  # fmt: skip


# What the router appends to a base URL itself, or what stands where its paths begin.
ENDPOINTS = (
    "/chat/completions",
    "/completions",
    "/responses",
    "/messages",
    "/embeddings",
    "/models",
)
OLLAMA_ENDPOINTS = ("/api/chat", "/api/generate", "/api/tags", "/api",
                    "/v1/chat/completions", "/v1")  # fmt: skip


def _base_url(place: str, text: str, endings: tuple[str, ...]) -> str:
    try:
        return read_url(text, endings)[0]
    except ValueError as e:
        raise RoutesError(f"{place}.base_url: {e}") from e


def _build_model(id_: str, raw: Mapping[str, Any], upstreams: Mapping[str, Upstream]) -> Model:
    name = raw.get("upstream", next(iter(upstreams)))
    if name not in upstreams:
        near = hint(name, upstreams)
        raise RoutesError(f"$.models['{id_}'].upstream: is not in $.upstreams{near}")
    return Model(id_, upstreams[name], raw.get("cost"), raw.get("context"), raw.get("tools", True),
                 raw.get("images", True), raw.get("timeouts_sec", {}))  # fmt: skip


def _full_ids(raw: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(category, ids) with short names spelled out: the one id with that last path segment."""
    chains = {name: category["models"] for name, category in raw["categories"].items()}
    known = {*raw.get("models", {}), *(id_ for ids in chains.values() for id_ in ids if "/" in id_)}
    shorts: dict[str, list[str]] = {}
    for id_ in sorted(known):
        shorts.setdefault(id_.rpartition("/")[2], []).append(id_)
    for name, ids in chains.items():
        for n, id_ in enumerate(ids):
            found = shorts.get(id_, [])
            if id_ not in known and len(found) > 1:
                place = f"$.categories.{name}.models[{n}]"
                why = f"{id_} could be any of {', '.join(found)}: write the full name"
                raise RoutesError(f"{place}: {why}")
        yield name, [id_ if id_ in known else shorts.get(id_, [id_])[0] for id_ in ids]


def _cross_check(table: Table) -> Iterator[str]:
    """What the schema cannot say."""
    if table.default_category not in table.categories:
        near = hint(table.default_category, table.categories)
        yield f"$.default_category: is not in $.categories{near}"
    lists = {f"$.categories.{name}.keywords": c.keywords for name, c in table.categories.items()}
    for place, entries in {"$.continuations": table.continuations, **lists}.items():
        for n, entry in enumerate(entries):
            if not is_entry(entry):
                yield f"{place}[{n}]: has no word"
    if "router" in table.categories:
        yield "$.categories.router: the name `router` is reserved"
    for name, category in table.categories.items():
        ids = [m.id for m in category.models]
        yield from (
            f"$.categories.{name}.models: {i} stands twice"
            for i, n in Counter(ids).items()
            if n > 1
        )
    if table.breaker["first_retry_sec"] > table.breaker["recovery_timeout_sec"]:
        yield "$.circuit_breaker.first_retry_sec: should not be above recovery_timeout_sec"


def _doubts(table: Table, raw: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Warnings: nothing is broken, but a person may want to know."""
    yield from (((), sentence) for sentence in _doubts_about_urls(raw))
    owners: dict[str, str] = {}
    for name, category in table.categories.items():
        for word in dict.fromkeys(fold(e.rpartition("^")[0] or e) for e in category.keywords):
            if owners.setdefault(word, name) != name:
                both = (owners[word], name)
                yield both, f"keyword {word!r} stands in {both[0]} and in {name}"
        if not category.keywords and name != table.default_category:
            yield (name,), f"no keyword leads to category {name}"
        for model in category.models:
            if model.id not in raw.get("models", {}):
                why = f"{model.id} of category {name} is not in `models`: no price, no context"
                yield (name,), why


def _doubts_about_urls(raw: Mapping[str, Any]) -> Iterator[str]:
    for name, upstream in raw["upstreams"].items():
        url, ending = read_url(upstream["base_url"], ENDPOINTS)
        if ending:
            yield f"upstream {name}: the router appends {ending} itself; asked is {url}{ending}"
        elif not re.search(r"/v\d", url):
            yield f"upstream {name}: {url} has no version at its end; most want {url}/v1"
    url, ending = read_url(raw.get("ollama", {}).get("base_url", "http://ollama"), OLLAMA_ENDPOINTS)
    if ending:
        yield f"ollama: the router appends its path itself; asked is {url}/api/chat"


def fold(text: str) -> str:
    """Lower case without accents, for comparing words."""
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in plain if not unicodedata.combining(c))


class Store:
    """The routes file and the table read from it. `table` is always the last good one."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._given = path.absolute()  # perhaps a symlink, which may be swapped for another
        self._last_good = self._given.with_name(f".{path.name}.last-good")
        self._clock = clock
        self._lock = threading.Lock()  # guards the look at the file and the swap
        self._schema = routes_schema()
        self._seen: tuple[int, ...] = ()
        self._next_look = 0.0
        self._kept = ""  # the text in the last-good copy
        # Asked with (text in force, new text) before a change is in force: may raise Refused.
        self.agree: Callable[[str, str], None] | None = None
        self.error: str | None = None
        self.error_since: str | None = None
        self._table = self._first_table()

    @property
    def path(self) -> Path:
        """The file itself, behind any symlinks."""
        return Path(os.path.realpath(self._given))

    @property
    def table(self) -> Table:
        """The table in force; looks at the file at most every half second."""
        if self._clock() >= self._next_look and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._table

    def _first_table(self) -> Table:
        try:
            table = load_table(read_file(self.path), self._schema)
        except RoutesError as bad:
            try:
                table = load_table(read_file(self._last_good), self._schema)
            except RoutesError:
                raise bad from None
            self._complain(bad)
        self._keep(table.text)
        return table

    def _look(self) -> None:
        self._next_look = self._clock() + LOOK_EVERY_S
        try:
            stat = os.stat(self.path)
            seen = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
            young = time.time() - max(stat.st_mtime, stat.st_ctime) <= YOUNG_S
            if seen != self._seen or young:
                self._take_up(read_file(self.path))
                self._seen = seen
        except OSError as e:
            self._seen = ()
            self._complain(RoutesError(f"cannot be read: {e.strerror}"))
        except RoutesError as e:
            self._seen = () if isinstance(e, Unreadable) else seen
            self._complain(e)
        self._keep(self._table.text)

    def _take_up(self, text: str) -> None:
        if text != self._table.text:
            self._table = load_table(text, self._schema)
            log.info("routes_loaded", {"version": self._table.etag})
        self.error = self.error_since = None

    def _complain(self, bad: RoutesError) -> None:
        if str(bad) != self.error:
            self.error, self.error_since = str(bad), now_text()
            log.error("routes_bad", {"file": str(self.path), "why": str(bad)})

    def _keep(self, text: str) -> None:
        """Copy the table in force for a worker that boots while the file is bad."""
        if text == self._kept:
            return
        with contextlib.suppress(OSError):  # not writable, or a writer is busy: at the next look
            with locked(self._last_good.parent, wait=False):
                if not self._last_good.exists() or read_file(self._last_good) != text:
                    replace_file(self._last_good, text, like=self.path)
            self._kept = text

    def adopt(self, edit: Callable[[Table], str]) -> Table:
        """As `change`, for a text that others agreed on already: nobody is asked."""
        return self._change(edit, None, None)

    def change(self, edit: Callable[[Table], str], if_match: str | None = None) -> Table:
        """The table after `edit` (table -> new text) was checked and written, or Refused.

        Writers of all threads and processes take turns: the folder itself carries the lock, so no
        lock file is left behind. Nothing is written unless everything fits: 409 while the file on
        disk is bad, 412 when `if_match` names another version, 503 when it cannot be written.
        """
        return self._change(edit, if_match, self.agree)

    def _change(self, edit: Callable[[Table], str], if_match: str | None,
                agree: Callable[[str, str], None] | None) -> Table:  # fmt: skip
        try:
            with locked(self.path.parent, wait=True) as folder:
                after = self._write(edit, if_match, agree)
                with contextlib.suppress(OSError):  # in place; only a power cut could undo it
                    os.fsync(folder)
        except OSError as e:
            why = f"{self.path} cannot be written: {e.strerror}; nothing changed"
            raise Refused(503, "routes_not_writable", why) from e
        with self._lock:
            self._table, self.error, self._next_look = after, None, 0.0
        self._keep(after.text)
        return after

    def _write(self, edit: Callable[[Table], str], if_match: str | None,
               agree: Callable[[str, str], None] | None) -> Table:  # fmt: skip
        for _ in range(20):  # a hand edit in between is read again, not overwritten
            before, after = self._prepare(edit, if_match)
            same = after.text == before.text
            if same or replace_file(self.path, after.text, self.path, before.text, agree):
                return after
        raise Refused(409, "conflict", f"{self.path} keeps changing; try again")

    def _prepare(self, edit: Callable[[Table], str], if_match: str | None) -> tuple[Table, Table]:
        """The table as the file on disk has it, and as `edit` would have it."""
        before = self._table
        try:
            text = read_file(self.path)
            before = before if text == before.text else load_table(text, self._schema)
        except RoutesError as e:
            why = f"{self.path} is broken; mend it first: {e}"
            raise Refused(409, "routes_file_bad", why) from e
        tags = [tag.strip().removeprefix("W/").strip('"') for tag in (if_match or "*").split(",")]
        if not {before.etag, "*"} & set(tags):
            raise Refused(412, "stale_version", "routes.json has changed; GET /config, try again")
        try:
            text = edit(before)
            text.encode()
            return before, before if text == before.text else load_table(text, self._schema)
        except Refused:
            raise
        except UnicodeEncodeError as e:
            raise Refused(422, "invalid_request_error", "a lone surrogate is no text") from e
        except RoutesError as e:
            raise Refused(422, "invalid_request_error", str(e)) from e


def routes_schema() -> jsonschema.Draft202012Validator:
    """The compiled schema of routes.json."""
    text = (HERE / "routes.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def read_file(path: Path) -> str:
    """The text of a routes file, line ends as they are; Unreadable or RoutesError."""
    try:
        if not path.is_file() and path.exists():  # a pipe would wait for its writer
            raise Unreadable("cannot be read: not a regular file")
        return decode(path.read_bytes())
    except OSError as e:
        raise Unreadable(f"cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise RoutesError(f"byte {e.start} is not UTF-8: save the file as UTF-8") from e


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[int]:
    """The folder's descriptor, while no other thread or process holds its lock; else OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str, like: Path, instead_of: str | None = None,
                 agree: Callable[[str, str], None] | None = None) -> bool:  # fmt: skip
    """Replace `path` in one step, so that a crash leaves the old or the new file, never half.

    False when it does not hold `instead_of` any more: somebody edited it meanwhile. `agree` is
    asked last, when nothing but the rename is left that could fail. The name of
    the temporary file is fixed, so that a crash leaves at most one; call this under the lock.
    """
    temp = path.with_name(f".{path.name.lstrip('.')}.tmp")
    try:
        write_beside(temp, text, like)
        if instead_of is not None and read_file(path) != instead_of:
            return False
        if agree and instead_of is not None:
            agree(instead_of, text)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    return True


def write_beside(temp: Path, text: str, like: Path) -> None:
    """Write and fsync `temp`, with the mode and, where allowed, the owner of `like`."""
    stat = like.stat()
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        with contextlib.suppress(PermissionError):
            os.fchown(fd, stat.st_uid, stat.st_gid)
        os.fchmod(fd, stat.st_mode & 0o7777)
        file.write(text.encode())
        file.flush()
        os.fsync(fd)


def now_text() -> str:
    """The time of day for people: UTC, ISO 8601, whole seconds."""
    return _text_of_second(int(time.time()))


@lru_cache(maxsize=8)
def _text_of_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
