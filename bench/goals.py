"""The performance goals of the project, as ratios and differences within one run of speed.py."""

from __future__ import annotations

from math import inf
from statistics import median
from typing import Any

Figures = dict[str, dict[str, dict[str, Any]]]  # contest -> contestant -> figure -> value


def ratio(mine: float, other: float) -> float:
    """Infinite when the other one answered nothing in its turn, as a cold one may in a second."""
    return mine / other if other else inf


def rate_over(other: str) -> Any:
    """A goal's value: the router's requests/s over those of another in the same round."""

    def value(mine: dict[str, Any], all_: dict[str, dict[str, Any]]) -> float:
        return median(ratio(r, o) for r, o in zip(mine["rates"], all_[other]["rates"], strict=True))

    return value


def over_chat(name: str) -> Any:
    """A goal's value: the requests/s of another format over those of chat in the same round."""

    def value(mine: dict[str, Any], all_: dict[str, dict[str, Any]]) -> float:
        return median(ratio(f, c) for f, c in zip(all_[name]["rates"], mine["rates"], strict=True))

    return value


def plus(figure: str) -> Any:
    """A goal's value: a figure of the router over that of the upstream asked directly."""
    return lambda mine, all_: mine[figure] - all_["direct"][figure]


def later(figure: str) -> Any:
    """A goal's value: how much later the latest event was than while nothing was edited."""
    return lambda mine, _: mine[figure] - mine["nothing_ms"]


def plain(figure: str) -> Any:
    """A goal's value: a figure of the router itself."""
    return lambda mine, _: mine[figure]


GOALS: list[tuple[str, str, str, float, Any]] = [  # contest, words, direction, limit, value
    ("small", "requests/s over LiteLLM", ">=", 30, rate_over("litellm")),
    ("small", "requests/s over Portkey", ">=", 2, rate_over("portkey")),
    ("small", "requests/s over a bare nginx", ">=", 1 / 15, rate_over("nginx")),
    ("small", "requests/s over a constant answer", ">=", 0.35, rate_over("constant")),
    ("alone", "added p50, ms", "<=", 0.65, plus("p50_ms")),
    ("agent", "requests/s over LiteLLM", ">=", 12, rate_over("litellm")),
    ("agent", "requests/s over Portkey", ">=", 4, rate_over("portkey")),
    ("formats", "requests/s of Messages over chat", ">=", 0.85, over_chat("router messages")),
    ("formats", "requests/s of Responses over chat", ">=", 0.85, over_chat("router responses")),
    ("streams", "share of whole streams", ">=", 1, lambda mine, _: mine["whole"] / mine["streams"]),
    ("streams", "added delay of an event, p99, ms", "<=", 2, plus("p99_ms")),
    ("streams", "added to the first event, p50, ms", "<=", 2, plus("first_ms")),
    ("edits", "later by edits of the chain, ms", "<=", 5, later("models_ms")),
    ("edits", "later by edits of keywords, ms", "<=", 5, later("keywords_ms")),
    ("board", "added p99 at one connection, ms", "<=", 0.9, plus("p99_ms")),
    ("board", "streams held", ">=", 512, plain("held")),
    ("board", "added to the first token, p99, ms", "<=", 3, plus("first_p99_ms")),
    ("memory", "PSS after 1 KB bodies, MiB", "<=", 85, plain("small_mib")),
    ("memory", "PSS after 200 KB bodies, MiB", "<=", 85, plain("agent_mib")),
    ("memory", "PSS with open streams, MiB", "<=", 100, plain("streams_mib")),
    ("million", "the most memory of the second half over the first", "<=", 1.1, plain("late")),
    ("start", "to the first answer, s", "<=", 1, plain("first_answer_s")),
    ("growth", "cost of a KB up to 1000 KB over up to 100 KB", "<=", 2, plain("kb_ratio")),
    ("growth", "200 categories over 4", "<=", 1.2, plain("categories_ratio")),
    ("growth", "10,000 keywords over none", "<=", 1.2, plain("keywords_ratio")),
    ("growth", "after 2,000 requests over before", "<=", 1.2, plain("requests_ratio")),
]


def goal_rows(figures: Figures, routers: list[str]) -> list[list[str]]:
    """Each goal of the contests that ran, with what was measured for each router."""
    rows = []
    for contest, words, direction, limit, value in GOALS:
        if contest not in figures:
            continue
        cells = []
        for name in routers:
            try:
                got = value(figures[contest][name], figures[contest])
            except KeyError:
                cells.append("not measured")
                continue
            met = got >= limit if direction == ">=" else got <= limit
            cells.append(f"{got:.4g} {'met' if met else 'NOT MET'}")
        rows.append([f"{contest}: {words}", f"{direction} {limit:g}", *cells])
    return rows
