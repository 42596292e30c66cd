"""Counters, cost and the recent requests: what the router did, exact to the request and the cent.

One dictionary of counters behind one lock; JSON and Prometheus text are two views of it.
Nothing here knows Flask or HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder

from parts.logs import now_text
from parts.table import Model, Table

log = logging.getLogger("llm_router")

MOST_USD = 1e6  # an answer that costs more is a mistake of the upstream
RECENT = 100  # requests kept for /metrics and the page
SAMPLES = 512  # latencies kept per model for the percentiles
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FINE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.05, 0.25, 1.0, 2.5)
BUCKET_NAMES = {bound: str(bound) for bound in (*BUCKETS_S, *FINE_BUCKETS_S, math.inf)}
Key = tuple[str, ...]


# --- usage ---------------------------------------------------------------------------------------

# Where each count stands, in every dialect that was met; of several the largest that is one.
INPUT = (("prompt_tokens",), ("input_tokens",))
OUTPUT = (("completion_tokens",), ("output_tokens",))
CACHED = (  # OpenAI, its Responses, Kimi, DeepSeek, Anthropic
    ("prompt_tokens_details", "cached_tokens"), ("input_tokens_details", "cached_tokens"),
    ("cached_tokens",), ("prompt_cache_hit_tokens",), ("cache_read_input_tokens",),
)  # fmt: skip
REASONING = (
    ("completion_tokens_details", "reasoning_tokens"),
    ("output_tokens_details", "reasoning_tokens"),
    ("reasoning_tokens",),
)  # fmt: skip
ANTHROPIC_CACHE = (("cache_read_input_tokens",), ("cache_creation_input_tokens",))
USD = (  # OpenRouter, Perplexity, DeepInfra, OpenRouter without a fee
    ("cost",), ("cost", "total_cost"), ("cost", "total"), ("total_cost",), ("estimated_cost",),
    ("cost_details", "total_cost"), ("cost_details", "upstream_inference_cost"),
)  # fmt: skip
TELLS_USD = frozenset((*(path[0] for path in USD), "cost_in_usd_ticks"))
TOTAL = (("total_tokens",),)
XAI_TICK_USD = 1e-10  # xAI tells the cost of an answer in these


def usage_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer or an event says it used; {} when it says nothing that can be read.

    OpenAI puts it at the top, Groq into `x_groq`, Kimi into the last choice. Counts of zero alone
    say nothing: no prompt has no tokens.
    """
    choices = body.get("choices")
    last = choices[-1] if isinstance(choices, list) and choices else None
    for holder in (body, body.get("x_groq"), last):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        if any([_number(value) if isinstance(value, str) else value and not isinstance(value, dict)
                for value in usage.values()]):  # fmt: skip
            return usage
    return {}


def _number(value: Any) -> float | None:
    """A number from 0 on, also one that came as a text; None when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


def _at(usage: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What stands at `path`, of one or two keys; None when nothing does."""
    value = usage.get(path[0])
    if len(path) == 1:
        return value
    return value.get(path[1]) if isinstance(value, dict) else None


def _count(usage: Mapping[str, Any], paths: tuple[tuple[str, ...], ...]) -> int | None:
    """The token count at one of `paths`; 0 when there is none, None when all there is is nonsense.

    New API gives OpenAI's counts and zeros under Anthropic's names: the largest is the one meant.
    """
    largest, is_there = -1, False
    for path in paths:
        value = _at(usage, path) if path[0] in usage else None
        if value is None:
            continue
        is_there = True
        number = value if type(value) is int and value >= 0 else _number(value)
        if number is not None and largest < number < 1 << 53 and number == int(number):
            largest = int(number)
    return largest if largest >= 0 else None if is_there else 0


def token_counts(usage: Mapping[str, Any]) -> dict[str, int]:
    """{input, output, cached, reasoning} tokens; cached is part of input, reasoning of output."""
    asked, answered = _count(usage, INPUT) or 0, _count(usage, OUTPUT) or 0
    cached, thought = _count(usage, CACHED) or 0, _count(usage, REASONING) or 0
    beside = 0
    for path in ANTHROPIC_CACHE:
        if path[0] in usage:
            beside += _count(usage, (path,)) or 0
    within = "prompt_tokens" in usage or usage.get("input_tokens_details")
    if not within or asked < beside:  # Anthropic's input is what was not cached
        asked += beside
    left = (_count(usage, TOTAL) or 0) - asked - answered
    if left > 0 and left != cached and thought in (0, left):
        answered += left  # xAI and Gemini count what was thought beside the answer
    return {"input": asked, "output": answered, "cached": min(cached, asked),
            "reasoning": min(thought, answered)}  # fmt: skip


NO_TOKENS = token_counts({})


def _told_usd(usage: Mapping[str, Any]) -> float | None:
    """What the upstream says it costs, in USD."""
    if TELLS_USD.isdisjoint(usage):
        return None
    usd = None
    for path in USD:
        usd = _number(_at(usage, path)) if usd is None else usd
    ticks = _number(usage.get("cost_in_usd_ticks"))
    if usd is None and ticks is not None:
        usd = ticks * XAI_TICK_USD
    if usd is not None and usage.get("is_byok") is True and "cost" in usage:
        details = usage.get("cost_details")  # OpenRouter's fee, and what the key's owner pays
        beside = details.get("upstream_inference_cost") if isinstance(details, dict) else None
        usd += _number(beside) or 0.0
    return usd if usd is not None and usd < MOST_USD else None


def cost_of(model: Model, usage: Mapping[str, Any],
            tokens: Mapping[str, int]) -> tuple[float | None, str]:  # fmt: skip
    """USD and where the figure comes from: upstream, routes.json, free, or (None, unknown).

    `tokens` are the counts of `usage`.
    """
    told = _told_usd(usage)
    if told is not None:
        return told, "upstream"
    if model.called.endswith(":free"):
        return 0.0, "free"
    price = model.cost
    if price is None or not usage or _count(usage, OUTPUT) is None:
        return None, "unknown"
    if not tokens["input"]:
        return None, "unknown"  # no prompt has no tokens: what came could not be read
    usd = (tokens["input"] - tokens["cached"]) * price["input"] + tokens["output"] * price["output"]
    usd += tokens["cached"] * price.get("cached_input", price["input"])
    return usd / 1e6, "routes.json"


@dataclass
class Attempt:
    """One try of one model and what came of it."""

    model: Model
    outcome: str
    status: int | None
    seconds: float = 0.0
    why: str = ""  # what came of it, for a person; not in figures
    usage: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=NO_TOKENS.copy)
    cost_usd: float | None = None
    cost_source: str = "unknown"

    def price(self, usage: Mapping[str, Any]) -> None:
        """Note what it used and what that cost."""
        if usage is not self.usage:
            self.usage, self.tokens = usage, token_counts(usage)
            self.cost_usd, self.cost_source = cost_of(self.model, usage, self.tokens)

    def summary(self) -> dict[str, Any]:
        """For `error.attempts` and the recent requests."""
        ms = round(self.seconds * 1000)
        return {"model": self.model.id, "outcome": self.outcome, "status": self.status, "ms": ms}


@dataclass
class Record:
    """What is told of one request when it has ended; no prompt, no answer."""

    id: str
    dialect: str = "chat"
    outcome: str = ""
    status: int = 200
    category: str = "none"
    mode: str = "none"
    reason: str = ""
    stream: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    answered_by: Attempt | None = None
    seconds: float = 0.0
    first_token_s: float | None = None
    choose_s: float = 0.0
    client: str = "default"  # whose key it came with

    is_counted: bool = True  # False: only in the log

    @property
    def last(self) -> Attempt | None:
        """The attempt that answered, or the last one made."""
        return self.answered_by or (self.attempts[-1] if self.attempts else None)

    @property
    def counted_as(self) -> str:
        """success, failed, cancelled, or rejected (it ended before an attempt)."""
        if self.outcome == "client_left":
            return "cancelled"
        return self.outcome if self.attempts else "rejected"

    def tries(self) -> list[dict[str, Any]]:
        """A summary of each attempt."""
        return [attempt.summary() for attempt in self.attempts]

    def summary(self) -> dict[str, Any]:
        """The request as /metrics and the log show it."""
        last, tries = self.last, []
        for attempt in self.attempts:
            tries.append(attempt.summary())
        tokens = last.tokens if last else NO_TOKENS
        first_ms = None if self.first_token_s is None else round(self.first_token_s * 1000, 2)
        return {
            "id": self.id, "outcome": self.counted_as, "status": self.status,
            "dialect": self.dialect,
            "category": self.category, "mode": self.mode, "reason": self.reason,
            "model": last.model.id if last else None, "attempts": tries,
            "stream": self.stream,
            "latency_ms": round(self.seconds * 1000, 2), "first_token_ms": first_ms,
            "choose_ms": round(self.choose_s * 1000, 3),
            "tokens_in": tokens["input"], "tokens_out": tokens["output"],
            "cost_usd": last.cost_usd if last else None,
            "cost_source": last.cost_source if last else "unknown",
        }  # fmt: skip


class Metrics:
    """What happened since the start: dictionaries of counts and sums behind one lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()  # guards everything below
        self._counts: Counter[Key] = Counter()
        self._sums: defaultdict[Key, float] = defaultdict(float)
        self._latencies: dict[str, deque[float]] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def record(self, call: Record) -> dict[str, Any]:
        """Book one request and return its summary. Only labels of the configuration become keys."""
        entry = call.summary()
        outcome, last = entry["outcome"], call.last
        if not call.is_counted:
            return entry
        with self._lock:
            self._counts["requests", outcome] += 1
            self._counts["route", call.category, call.mode, call.dialect, outcome] += 1
            if call.mode != "none":
                self._observe("choose", call.mode, call.choose_s, FINE_BUCKETS_S)
            for attempt in call.attempts:
                self._book_attempt(attempt)
            if outcome == "success" and last:
                self._book_success(call, last.model.id)
            if outcome in ("success", "failed"):
                self._observe("duration", call.category, call.seconds, BUCKETS_S)
            self._recent.append({"time": now_text(), **entry})
        return entry

    def _book_attempt(self, attempt: Attempt) -> None:
        id_ = attempt.model.id
        self._counts["attempt", id_, attempt.outcome] += 1
        for kind, n in attempt.tokens.items():
            self._counts["tokens", id_, kind] += n
        if attempt.cost_usd is not None:
            self._sums[("cost", id_)] += attempt.cost_usd
        elif attempt.usage or attempt.outcome in ("success", "client_left"):
            self._counts["unpriced", id_] += 1

    def _book_success(self, call: Record, id_: str) -> None:
        for key in (("category", call.category), ("mode", call.mode), ("model", id_)):
            self._counts[key] += 1
        self._latencies.setdefault(id_, deque(maxlen=SAMPLES)).append(call.seconds)
        self._sums[("latency", id_)] += call.seconds
        if call.first_token_s is not None:
            self._observe("first_token", id_, call.first_token_s, BUCKETS_S)

    def _observe(self, name: str, label: str, seconds: float, buckets: tuple[float, ...]) -> None:
        at = bisect_left(buckets, seconds)
        self._counts[name, label, BUCKET_NAMES[buckets[at] if at < len(buckets) else math.inf]] += 1
        self._sums[(name, label)] += seconds

    def recent(self) -> list[dict[str, Any]]:
        """The last requests, newest first."""
        with self._lock:
            return list(self._recent)[::-1]

    def as_json(self, table: Table) -> dict[str, Any]:
        """The reference's keys and what we add; model_distribution shows short names."""
        with self._lock:
            counts, sums = dict(self._counts), dict(self._sums)
            latencies = {id_: sorted(values) for id_, values in self._latencies.items()}
        requests = {
            o: counts.get(("requests", o), 0)
            for o in ("success", "failed", "rejected", "cancelled")
        }
        labels = table.labels()
        models = sorted({key[1] for key in counts if key[0] == "attempt"})
        return {
            "requests": {"total": requests["success"] + requests["failed"], **requests},
            "avg_latency_ms": _average_ms("latency", requests["success"], sums),
            "total_cost_usd": round(sum(s for k, s in sums.items() if k[0] == "cost"), 10),
            "model_distribution": {labels.get(id_, id_): n for id_, n in _column("model", counts)},
            "category_distribution": dict(_column("category", counts)),
            "routing_mode_distribution": dict(_column("mode", counts)),
            "unpriced_requests": sum(n for _, n in _column("unpriced", counts)),
            "tokens": _tokens_in_all(counts),
            "models": {
                id_: _model_figures(id_, counts, sums, latencies.get(id_)) for id_ in models
            },
            "avg_first_token_ms": _average_ms(
                "first_token", _observed("first_token", counts), sums
            ),
            "avg_choosing_ms": _average_ms("choose", _observed("choose", counts), sums),
            "uptime_sec": round(self._clock() - self._started, 1),
        }

    def collect(self) -> Iterator[Any]:
        """The same counters as Prometheus metric families, for a prometheus-client registry."""
        with self._lock:
            counts, sums = dict(self._counts), dict(self._sums)
        for name, key, labels, text in COUNTERS:
            family = CounterMetricFamily(f"llm_router_{name}", text, labels=labels)
            values: Mapping[Key, float] = sums if key == "cost" else counts
            for k, amount in values.items():
                if k[0] == key:
                    family.add_metric(k[1:], amount)
            yield family
        for title, first, label, told, bounds in HISTOGRAMS:
            histogram = HistogramMetricFamily(f"llm_router_{title}_seconds", told, labels=[label])
            for value in dict.fromkeys(k[1] for k in counts if k[0] == first):
                buckets, total = [], 0
                for bound in (*bounds, math.inf):
                    total += counts.get((first, value, str(bound)), 0)
                    buckets.append(("+Inf" if bound == math.inf else str(bound), total))
                histogram.add_metric([value], buckets, sums.get((first, value), 0.0))
            yield histogram


# name, first part of the counters' keys, labels (the rest of the keys), help
COUNTERS = (
    ("requests", "route", ("category", "mode", "dialect", "outcome"), "Requests that ended"),
    ("attempts", "attempt", ("model", "outcome"), "Tries of a model"),
    ("tokens", "tokens", ("model", "kind"), "Tokens as upstreams counted them"),
    ("cost_usd", "cost", ("model",), "US dollars, where the price is known"),
)
HISTOGRAMS = (
    ("request_duration", "duration", "category", "From the request to its end", BUCKETS_S),
    ("time_to_first_token", "first_token", "model", "Of streams", BUCKETS_S),
    ("classify_duration", "choose", "mode", "Time spent choosing a category", FINE_BUCKETS_S),
)


class Gauges:
    """What is so now: circuits (0 closed, 1 half-open, 2 open), requests in flight, the version."""

    def __init__(self, circuits: Mapping[str, str], in_flight: int, version: str):
        self._circuits = circuits
        self._in_flight = in_flight
        self._version = version

    def collect(self) -> Iterator[Any]:
        """As Prometheus metric families."""
        text = "0 closed, 1 half-open, 2 open"
        family = GaugeMetricFamily("llm_router_circuit_state", text, labels=["model"])
        for model, state in self._circuits.items():
            family.add_metric([model], ("closed", "half-open", "open").index(state))
        yield family
        yield GaugeMetricFamily("llm_router_in_flight", "Requests in flight", self._in_flight)
        info = GaugeMetricFamily("llm_router_build_info", "The version", labels=["version"])
        info.add_metric([self._version], 1)
        yield info


def breaker_figures(
    circuits: Mapping[str, Mapping[str, Any]], config: Mapping[str, float]
) -> dict[str, Any]:
    """The reference's view of `Breakers.snapshot`: strikes, what is not closed, the settings."""
    told = ("state", "retry_in_sec", "reason", "last_status", "since")
    return {
        "failures": {model: c["strikes"] for model, c in circuits.items() if c["strikes"]},
        "open_circuits": {
            model: {key: c[key] for key in told}
            for model, c in circuits.items() if c["state"] != "closed"
        },
        "config": {key: config[key] for key in ("failure_threshold", "recovery_timeout_sec")},
    }  # fmt: skip


def as_prometheus(accept: str, *collectors: Any) -> tuple[bytes, str]:
    """The text and its content type, in the format that `accept` asks for."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encoder, content_type = choose_encoder("")
    return encoder(registry), content_type


def _tokens_in_all(counts: Mapping[Key, int]) -> dict[str, int]:
    totals = dict.fromkeys(("input", "output", "cached", "reasoning"), 0)
    for key, n in counts.items():
        if key[0] == "tokens":
            totals[key[2]] += n
    return totals


def _column(name: str, counts: Mapping[Key, int]) -> list[tuple[str, int]]:
    return [(key[1], n) for key, n in counts.items() if key[0] == name]


def _observed(name: str, counts: Mapping[Key, int]) -> int:
    return sum(n for _, n in _column(name, counts))


def _average_ms(name: str, n: int, sums: Mapping[Key, float]) -> float:
    total = sum(s for key, s in sums.items() if key[0] == name)
    return round(1000 * total / n, 3) if n else 0.0


def _model_figures(id_: str, counts: Mapping[Key, int], sums: Mapping[Key, float],
                   latencies: list[float] | None) -> dict[str, Any]:  # fmt: skip
    n, mine = counts.get(("model", id_), 0), [(k, c) for k, c in counts.items() if k[1] == id_]
    ranked = latencies or []
    at = {p: ranked[min(len(ranked) - 1, len(ranked) * p // 100)] for p in (50, 95, 99) if ranked}
    return {
        "success": n,
        "attempts": {k[2]: c for k, c in mine if k[0] == "attempt"},
        "tokens": {k[2]: c for k, c in mine if k[0] == "tokens"},
        "cost_usd": round(sums.get(("cost", id_), 0.0), 10),
        "avg_latency_ms": round(1000 * sums.get(("latency", id_), 0.0) / n, 2) if n else None,
        **{f"p{p}_ms": round(1000 * seconds, 2) for p, seconds in at.items()},
    }
