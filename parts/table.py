"""routes.json, checked and immutable: the routing table, and the one text it is made of.

`load_table` makes it, `Table.with_category` and `without_category` make the text of another one.
Nothing here knows Flask or HTTP: a refusal is a `Refused` with the status and kind that the API
shall answer with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jsonschema

from parts.addresses import read_url
from parts.errors import Refused, RoutesError, hint, say_schema_error
from parts.jsontext import (
    FINITE,
    SMALL,
    place_of,
    say_json_error,
    scan_object,
    set_member,
    written,
)
from parts.prompts import is_entry
from parts.vocabulary import CONTINUATIONS, is_old_form, lists_of, slim

HERE = Path(__file__).resolve().parent
log = logging.getLogger("llm_router")

OTHER_DIALECTS = ("messages", "responses")  # whose params stand in an object of their own
BUILT_IN = ("tools", "code", "reasoning", "conversation")
DEFAULTS: dict[str, Any] = {
    "routing_mode": "hybrid",
    "tools_routing": "auto",
    "agent_tool_count": 8,
    "continuations": [],
    "daily_limit_usd": None,
    "monthly_limit_usd": None,
    "on_limit": "refuse",
    "clients": {},
    "compare_with": None,
    "history_days": 90,
    "machine_category": None,
    "classifier": None,
    "sticky": "turn",
    "sticky_sec": 300,
    "same_call_limit": None,
    "ollama": {"base_url": "http://127.0.0.1:11434", "model": "qwen2.5:0.5b", "timeout_sec": 2},
    "circuit_breaker": {"failure_threshold": 3, "recovery_timeout_sec": 300, "first_retry_sec": 5},
    "timeouts_sec": {"connect": 5, "first_token": 12, "idle": 30, "answer": 120, "total": 300},
}


# Of a body of each dialect: member -> its value as JSON text, as it stands in the file.
Params = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Upstream:
    """Where models are reached: an OpenAI-compatible base URL and the name of its key."""

    name: str
    base_url: str
    api_key_env: str | None = None
    usage_in_streams: bool = True  # it may be asked for the usage of a stream
    speaks: tuple[str, ...] = ("chat",)  # of the dialects
    headers: tuple[tuple[str, str], ...] = ()  # sent with each request

    def __hash__(self) -> int:
        """Of its URL alone: the way of a request asks for it several times."""
        return hash(self.base_url)


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
    name: str = ""  # what its upstream calls it, where that is not the id
    params: Params = field(default_factory=dict)  # set in bodies where the client sent none
    params_force: Params = field(default_factory=dict)  # set whatever it sent

    @property
    def called(self) -> str:
        """What its upstream calls it."""
        return self.name or self.id

    @property
    def short(self) -> str:
        """The last path segment: `glm-5` of `z-ai/glm-5`."""
        return self.id.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Limit:
    """So many USD a day or a month (UTC) for all requests, or those of a category or a client."""

    span: str  # day or month
    kind: str  # all, category or client
    name: str  # '' for all
    usd: float


Limits = Mapping[tuple[str, str], tuple[Limit, ...]]  # by kind and name


@dataclass(frozen=True)
class Category:
    """One category: its fallback chain and the words that lead to it."""

    name: str
    models: tuple[Model, ...]
    keywords: tuple[str, ...] = ()
    description: str = ""
    whole: bool = False
    timeouts: Mapping[str, float] = field(default_factory=dict)
    vocabulary: bool = True  # False: the built-in words do not lead here
    params: Params = field(default_factory=dict)
    params_force: Params = field(default_factory=dict)
    want: str = ""  # json: an answer that is none, where one was asked for, is doubtful
    keepalive_s: float | None = None  # a stream that nobody began by then says that it is alive

    @property
    def lists(self) -> tuple[Sequence[str], Sequence[str]]:
        """(built-in entries, a person's own) that lead here."""
        return lists_of(self.name, self.keywords, self.vocabulary)

    @property
    def built_in(self) -> int:
        """How many built-in entries lead here, beside the keywords of the file."""
        entries = self.lists[0]
        return 0 if entries is self.keywords else len(entries)


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
    monthly_limit_usd: float | None
    on_limit: str  # refuse, or the category that goes on when a limit is spent
    clients: Mapping[str, Mapping[str, float]]
    limits: Limits
    compare_with: Model | None
    history_days: int
    ollama: Mapping[str, Any]
    breaker: Mapping[str, float]
    timeouts: Mapping[str, float]
    upstreams: Mapping[str, Upstream]
    models: Mapping[str, Model]
    categories: Mapping[str, Category]
    shorts: Mapping[str, tuple[str, ...]]
    machine_category: str  # where an agent's own calls go: titles, heartbeats, compaction
    classifier: Mapping[str, Any] | None = None  # a model of an upstream instead of Ollama's
    doubts: tuple[tuple[tuple[str, ...], str], ...] = ()  # (categories, sentence)
    sticky: str = "turn"  # what stays with its model: a turn, a conversation too, or neither: off
    sticky_sec: float = 300  # how long a conversation stays: its provider's cache is warm
    same_call_limit: int | None = None  # equal calls of a tool in a row that are refused
    aliases: Mapping[str, str] = field(default_factory=dict)  # pattern -> what is meant

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

    def meant(self, name: str) -> str:
        """What a client's `model` stands for by `aliases`; a full id stands for itself."""
        if not self.aliases or name in self.models:
            return name
        fits = (to for alias, to in self.aliases.items() if fnmatchcase(name, alias))
        return next(fits, name)

    def twins(self, model: Model) -> tuple[Model, ...]:
        """`model`, and behind it the same one at other upstreams, by its name there."""
        same = [m for m in self.models.values() if m.called == model.called]
        return (model, *(m for m in same if m.upstream != model.upstream))

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
        aliases = [alias for alias in self.aliases if "*" not in alias and alias not in chains]
        return ["router", *(f"router/{name}" for name in self.categories), *chains, *aliases]

    def as_json(self) -> dict[str, Any]:
        """The reference's keys for GET /config and the rest of the table; it holds no keys."""
        categories = self.categories.items()
        return {
            "routing_mode": self.mode,
            "ollama": dict(self.ollama),
            "model_mappings": {name: [m.id for m in c.models] for name, c in categories},
            "keywords": {name: list(c.keywords) for name, c in categories},
            "model_costs": {id_: dict(m.cost) for id_, m in self.models.items() if m.cost},
            "model_names": {id_: m.name for id_, m in self.models.items() if m.name},
            "vocabulary": {name: c.built_in for name, c in categories},
            "machine_category": self.machine_category,
            "classifier": dict(self.classifier) if self.classifier else None,
            "model_params": {
                id_: told for id_, m in self.models.items() if (told := params_json(m))
            },
            "default_category": self.default_category,
            "aliases": dict(self.aliases),
            "tools_routing": self.tools_routing,
            "agent_tool_count": self.agent_tool_count,
            "categories": {
                name: {"models": [m.id for m in c.models], "description": c.description,
                       "stream": "whole" if c.whole else "live", "timeouts_sec": dict(c.timeouts),
                       "vocabulary": c.vocabulary,
                       "keepalive_sec": c.keepalive_s, "want": c.want or None,
                       **params_json(c)}
                for name, c in categories
            },
            "circuit_breaker": dict(self.breaker),
            "timeouts_sec": dict(self.timeouts),
            "daily_limit_usd": self.daily_limit_usd,
            "monthly_limit_usd": self.monthly_limit_usd,
            "on_limit": self.on_limit,
            "limits": [vars(limit) for group in self.limits.values() for limit in group],
            "compare_with": self.compare_with.id if self.compare_with else None,
            "history_days": self.history_days,
            "sticky": self.sticky,
            "sticky_sec": self.sticky_sec,
            "same_call_limit": self.same_call_limit,
            "upstreams": {
                u.name: {"base_url": u.base_url, "api_key_env": u.api_key_env,
                         "usage_in_streams": u.usage_in_streams, "speaks": list(u.speaks),
                         "headers": dict(u.headers)}
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


def slim_text(table: Table) -> str:
    """The file's text without what is built in, which files up to version 0.4.0 had to hold."""
    text = table.text
    lists: list[tuple[tuple[str, ...], str, Sequence[str]]] = [
        (("categories", name, "keywords"), name, category.keywords)
        for name, category in table.categories.items()
    ]
    for path, name, entries in [*lists, (("continuations",), CONTINUATIONS, table.continuations)]:
        if is_old_form(name, entries):
            text = set_member(text, path, slim(name, entries) or None)
    return text


def params_json(holder: Model | Category) -> dict[str, Any]:
    """What it sets in bodies, for GET /config, in the form of the file."""
    told = {}
    for key in ("params", "params_force"):
        found: Params = getattr(holder, key)
        values = {name: {k: json.loads(v) for k, v in of.items()} for name, of in found.items()}
        if values:
            told[key] = {**values.pop("chat", {}), **values}
    return told


def no_such_category(name: str) -> Refused:
    """The 404 of the configuration routes."""
    return Refused(
        404, "category_not_found", f"no such category: {name[:64]!r}; GET /config lists them"
    )


def load_table(text: str) -> Table:
    """The table that `text` (routes.json) describes; RoutesError with place and JSON path."""
    if len(text.encode(errors="surrogatepass")) > SMALL:  # once written it could not be read
        raise RoutesError(f"routes.json would be over {SMALL >> 20} MB")
    try:
        raw = json.loads(text, object_pairs_hook=_unique_keys, **FINITE)
    except json.JSONDecodeError as e:
        raise RoutesError(f"line {e.lineno}, column {e.colno}: {say_json_error(e)}") from e
    except (ValueError, RecursionError) as e:
        raise RoutesError(str(e) or "nested too deeply") from e
    if re.search(r"\\u[dD][89a-fA-F]", text) and not _is_text(raw):
        raise RoutesError("a lone surrogate is no text")
    found = sorted(routes_schema().iter_errors(raw), key=lambda e: str(e.json_path))
    if found:
        raise RoutesError("\n".join(f"{e.json_path}: {say_schema_error(e)}" for e in found[:10]))
    table = _build_table(text, raw)
    problems = list(_cross_check(table))
    if problems:
        raise RoutesError("\n".join(problems))
    return replace(table, doubts=tuple(_doubts(table, raw)))


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


def _build_table(text: str, raw: Mapping[str, Any]) -> Table:
    merged: dict[str, Any] = {
        key: {**default, **raw.get(key, {})} if isinstance(default, dict) else raw.get(key, default)
        for key, default in DEFAULTS.items()
    }
    upstreams = {
        name: Upstream(name, _base_url(f"$.upstreams.{name}", u["base_url"], ENDPOINTS),
                       u.get("api_key_env"), u.get("usage_in_streams", True),
                       tuple(u.get("speaks", ("chat",))), tuple(u.get("headers", {}).items()))
        for name, u in raw["upstreams"].items()
    }  # fmt: skip
    if merged["classifier"]:
        merged["classifier"] = {"timeout_sec": 3, **merged["classifier"]}
    ollama_url = _base_url("$.ollama", merged["ollama"]["base_url"], OLLAMA_ENDPOINTS)
    merged["ollama"]["base_url"] = ollama_url
    models = {
        id_: replace(_build_model(id_, m, upstreams), **_params(text, m, "models", id_))
        for id_, m in raw.get("models", {}).items()
    }
    chains = dict(_full_ids(raw))
    for id_ in (id_ for ids in chains.values() for id_ in ids):
        models.setdefault(id_, _build_model(id_, {}, upstreams))
    shorts: dict[str, tuple[str, ...]] = {}
    for id_, model in models.items():
        shorts[model.short] = (*shorts.get(model.short, ()), id_)
    categories = {
        name: Category(name, tuple(models[id_] for id_ in chains[name]),
                       tuple(c.get("keywords", ())), c.get("description", ""),
                       c.get("stream") == "whole", c.get("timeouts_sec", {}),
                       c.get("vocabulary", True),
                       **_params(text, c, "categories", name), keepalive_s=c.get("keepalive_sec"),
                       want=c.get("want", ""))
        for name, c in raw["categories"].items()
    }  # fmt: skip
    return Table(
        text, merged["routing_mode"], raw["default_category"], merged["tools_routing"],
        merged["agent_tool_count"], tuple(merged["continuations"]), merged["daily_limit_usd"],
        merged["monthly_limit_usd"], merged["on_limit"], merged["clients"], _limits(raw),
        _compared(merged["compare_with"], models, shorts), merged["history_days"],
        merged["ollama"], merged["circuit_breaker"], merged["timeouts_sec"],
        upstreams, models, categories, shorts,
        merged["machine_category"] or raw["default_category"], merged["classifier"],
        sticky=merged["sticky"], sticky_sec=merged["sticky_sec"], aliases=raw.get("aliases", {}),
        same_call_limit=merged["same_call_limit"],
    )  # fmt: skip


def _limits(raw: Mapping[str, Any]) -> Limits:
    """What may be spent: of all, of each category, of each client."""
    holders = {("all", ""): raw}
    for kind, members in (("category", raw["categories"]), ("client", raw.get("clients", {}))):
        holders |= {(kind, name): holder for name, holder in members.items()}
    limits = {
        (kind, name): tuple(
            Limit(span, kind, name, holder[key])
            for span, key in (("day", "daily_limit_usd"), ("month", "monthly_limit_usd"))
            if key in holder
        )
        for (kind, name), holder in holders.items()
    }
    return {key: group for key, group in limits.items() if group}


def _compared(name: str | None, models: Mapping[str, Model],
              shorts: Mapping[str, tuple[str, ...]]) -> Model | None:  # fmt: skip
    """The model that costs are compared with."""
    found = (name,) if name in models else shorts.get(name or "", ())
    if name and len(found) != 1:
        why = f"could be any of {', '.join(found)}" if found else "is not in $.models"
        raise RoutesError(f"$.compare_with: {why}{'' if found else hint(name, models)}")
    return models[str(found[0])] if found else None


def _params(text: str, raw: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """`params` and `params_force` at `path`, by dialect, each value as it is written there."""
    found: dict[str, Any] = {}
    for key in (key for key in ("params", "params_force") if key in raw):
        at = place_of(text, (*path, key))
        others = {m.key: m.value for m in scan_object(text, at)[1] if m.key in OTHER_DIALECTS}
        chat = {k: v for k, v in written(text, at).items() if k not in others}
        found[key] = {"chat": chat, **{k: written(text, at) for k, at in others.items()}}
    return found


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
                 raw.get("images", True), raw.get("timeouts_sec", {}),
                 raw.get("name", ""))  # fmt: skip


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
    if table.on_limit not in ("refuse", *table.categories):
        near = hint(table.on_limit, table.categories)
        yield f"$.on_limit: is neither `refuse` nor in $.categories{near}"
    if table.machine_category not in table.categories:
        near = hint(table.machine_category, table.categories)
        yield f"$.machine_category: is not in $.categories{near}"
    if table.classifier and table.classifier["upstream"] not in table.upstreams:
        near = hint(table.classifier["upstream"], table.upstreams)
        yield f"$.classifier.upstream: is not in $.upstreams{near}"
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
    yield from _check_headers(table)
    yield from _check_aliases(table)
    if table.breaker["first_retry_sec"] > table.breaker["recovery_timeout_sec"]:
        yield "$.circuit_breaker.first_retry_sec: should not be above recovery_timeout_sec"


def _doubts(table: Table, raw: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Warnings: nothing is broken, but a person may want to know."""
    yield from (((), sentence) for sentence in _doubts_about_urls(raw))
    if table.compare_with and table.compare_with.cost is None:
        yield (), f"compare_with: {table.compare_with.id} has no price in `models`: nothing is told"
    owners: dict[str, str] = {}
    for name, category in table.categories.items():
        built_in, own = category.lists
        muted = {fold(entry[:-2]) for entry in own if entry.endswith("^0")}
        for word in dict.fromkeys((*_folded(tuple(built_in)), *_folded(tuple(own)))):
            if word not in muted and owners.setdefault(word, name) != name:
                both = (owners[word], name)
                yield both, f"keyword {word!r} stands in {both[0]} and in {name}"
        if not any(category.lists) and name != table.default_category:
            yield (name,), f"no keyword leads to category {name}"
        for model in category.models:
            if model.id not in raw.get("models", {}):
                why = f"{model.id} of category {name} is not in `models`: no price, no context"
                yield (name,), why


@lru_cache(maxsize=16)  # the same lists come again with each edit of the file
def _folded(entries: tuple[str, ...]) -> tuple[str, ...]:
    return tuple([fold(entry.rpartition("^")[0] or entry) for entry in entries])


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


# What says how bodies are framed, or is a key; those come from the environment.
OWN_HEADERS = ("host", "content-length", "content-type", "content-encoding", "transfer-encoding",
               "connection", "keep-alive", "te", "trailer", "upgrade", "expect", "accept",
               "accept-encoding")  # fmt: skip
KEY_HEADERS = ("authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key",
               "cookie")  # fmt: skip


def _check_headers(table: Table) -> Iterator[str]:
    for upstream in table.upstreams.values():
        for name, _ in upstream.headers:
            place = f"$.upstreams.{upstream.name}.headers.{name}"
            if name.lower() in KEY_HEADERS:
                yield f"{place}: no key stands in this file: name its variable as api_key_env"
            elif name.lower() in OWN_HEADERS:
                yield f"{place}: is set by the router itself"


def _check_aliases(table: Table) -> Iterator[str]:
    known = table.names() + list(table.models)
    for alias, meant in table.aliases.items():
        try:
            found = meant in known or table.resolve(meant)
        except Refused as e:
            yield f"$.aliases['{alias}']: {e}"
            continue
        if not found or (meant in table.aliases and meant not in table.models):
            near = hint(meant, known)
            yield f"$.aliases['{alias}']: is no model and no router/<category> of this file{near}"


def fold(text: str) -> str:
    """Lower case without accents, for comparing words."""
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in plain if not unicodedata.combining(c))


@lru_cache(maxsize=1)
def routes_schema() -> jsonschema.Draft202012Validator:
    """The compiled schema of routes.json."""
    text = (HERE / "routes.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))
