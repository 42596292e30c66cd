"""The routes that only show: what may be asked for, what was done, what was spent."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Iterable
from typing import Any

import flask

from parts.access import CLIENT
from parts.clients import DEFAULT
from parts.errors import RouterError, hint, invalid
from parts.history import GROUPS, day_of
from parts.metrics import Gauges, as_prometheus, breaker_figures
from parts.settings import VERSION
from parts.table import Model, Table

shown = flask.Blueprint("shown", __name__)
MOST_DAYS = 3650
MOST_ROWS = 1000
FORMULA = ("=", "+", "@", "-")
OUTCOMES = ("success", "failed", "rejected", "cancelled")


def router() -> Any:
    """The Router of the app that serves this request."""
    return flask.current_app.extensions["router"]


def asked(name: str, default: int, most: int) -> int:
    """The whole number from 1 to `most` in the query; 422 when it is none."""
    text = flask.request.args.get(name, str(default))
    if not re.fullmatch("[0-9]{1,16}", text) or not 1 <= int(text) <= most:
        msg = f"should be a whole number from 1 to {most}"
        raise invalid([{"loc": ["query", name], "msg": msg}])
    return int(text)


# --- models --------------------------------------------------------------------------------------


@shown.get("/v1/models")
@shown.get("/models")
def models() -> dict[str, Any]:
    """OpenAI's list of what `model` may be."""
    table = router().current_table()
    return {"object": "list", "data": [model_entry(id_, table) for id_ in table.names()]}


@shown.get("/v1/models/<path:name>")
@shown.get("/models/<path:name>")
def model(name: str) -> dict[str, Any]:
    """One entry of that list."""
    table = router().current_table()
    if name not in table.names():
        text = "no such model: GET /v1/models lists them"
        raise RouterError(404, "model_not_found", text, param="model")
    return model_entry(name, table)


def model_entry(id_: str, table: Table) -> dict[str, Any]:
    """OpenAI's model object, with what OpenRouter's has beside it, as far as it is known.

    A category has what all of its models have: the smallest context, the abilities of each. It
    has no price, for that depends on who answers.
    """
    owner = "llm-router" if id_.partition("/")[0] == "router" else id_.rpartition("/")[0]
    chain, price = chain_of(id_, table), {}
    context = smallest(model.context for model in chain)
    if id_ in table.models and (cost := table.models[id_].cost):
        names = {"input": "prompt", "output": "completion", "cached_input": "input_cache_read"}
        price = {"pricing": {names[k]: per_token(usd) for k, usd in cost.items()}}
    return {
        "id": id_, "object": "model", "created": 0, "owned_by": owner or "llm-router",
        **({"context_length": context} if context else {}), **price,
        "architecture": {"input_modalities": inputs_of(chain), "output_modalities": ["text"]},
        "supported_parameters": ["tools", "tool_choice"] if all(m.tools for m in chain) else [],
    }  # fmt: skip


def chain_of(id_: str, table: Table) -> list[Model]:
    """The models that may answer to the name `id_`."""
    if id_ in table.models:
        return [table.models[id_]]
    kept = table.categories.get(id_.removeprefix("router/"))
    return [m for c in ([kept] if kept else table.categories.values()) for m in c.models]


def smallest(contexts: Iterable[int | None]) -> int | None:
    """The smallest context, in tokens; None when one of them is not known."""
    known = list(contexts)
    return None if not known or None in known else min(n for n in known if n)


def inputs_of(chain: list[Model]) -> list[str]:
    """What every model of the chain can take."""
    return ["text", "image"] if all(model.images for model in chain) else ["text"]


def per_token(usd_per_million: float) -> str:
    """A price as OpenRouter writes it: USD a token, as text, never like 1e-06."""
    return f"{usd_per_million / 1e6:.12f}".rstrip("0").rstrip(".") or "0"


# --- as OpenClaw's plugin for a router of its own reads it ----------------------------------------


@shown.get("/v1/catalog")
def catalog() -> dict[str, Any]:
    """What `model` may be, with context and price: micro-USD per million tokens."""
    table = router().current_table()
    routes = [{"path": "/v1/chat/completions", "methods": ["POST"],
               "requestFormat": "openai.chat_completions"}]  # fmt: skip
    return {"providers": [{
        "id": "llm-router", "displayName": "llm-router", "openaiCompatible": True,
        "nativeBaseUrl": "/v1/native/llm-router", "routes": routes,
        "models": [catalog_entry(id_, table) for id_ in table.names()],
    }]}  # fmt: skip


def catalog_entry(id_: str, table: Table) -> dict[str, Any]:
    """One model of the catalog."""
    chain = chain_of(id_, table)
    context = smallest(model.context for model in chain)
    cost = (table.models[id_].cost if id_ in table.models else None) or {}
    names = {"input": "inputMicrosPerMillion", "output": "outputMicrosPerMillion",
             "cached_input": "cachedInputMicrosPerMillion"}  # fmt: skip
    pricing: dict[str, int] = {names[kind]: round(usd * 1e6) for kind, usd in cost.items()}
    pricing |= {"maxInputTokens": context} if context else {}
    return {"id": id_, "upstream": id_, "capabilities": ["llm.chat", "llm.stream"],
            "input_modalities": inputs_of(chain), "pricing": pricing}  # fmt: skip


@shown.get("/v1/usage")
def own_usage() -> dict[str, Any]:
    """The budget of this month and what is used of it: of a client's key, its own alone.

    Where only a daily limit is set, that is the budget, and its window the day.
    """
    table, name = router().current_table(), flask.request.environ.get(CLIENT, "")
    who = ("client", name) if name else ("all", "")
    now, history = day_of(time.time()), router().history
    month, day = (history.figures(span, *who, table) for span in ("month", "day"))
    span, window = (now, day) if "limit_usd" not in month and "limit_usd" in day else (
        now[:7], month)  # fmt: skip
    spent = window["cost_usd"] + window.get("elsewhere_usd", 0.0)
    limit = window.get("limit_usd")
    budget = {"configured": limit is not None, "windowKey": f"{name or 'all'}/{span}"}
    if limit is not None:
        budget |= {"limitMicros": micros(limit), "spentMicros": micros(spent),
                   "remainingMicros": micros(window["left_usd"])}  # fmt: skip
    summary = {"requestCount": month["requests"], "actualCostMicros": micros(month["cost_usd"]),
               "totalTokens": month["tokens_in"] + month["tokens_out"]}  # fmt: skip
    return {"client": name or DEFAULT, "budget": budget, "usage": {"summary": summary},
            "today": day, "month": month}  # fmt: skip


def micros(usd: float) -> int:
    """Millionths of a USD."""
    return round(usd * 1e6)


# --- figures -------------------------------------------------------------------------------------


@shown.get("/metrics")
def metrics() -> dict[str, Any] | flask.Response:
    """The reference's figures and ours, or the same as Prometheus text for who asks for that."""
    owner = router()
    table, circuits = owner.current_table(), owner.breakers.snapshot()
    accept = flask.request.headers.get("Accept", "")
    wanted = flask.request.args.get("format") == "prometheus"
    scraper = "openmetrics-text" in accept or "text/plain" in accept
    if wanted or (scraper and "application/json" not in accept):
        states = {model: circuit["state"] for model, circuit in circuits.items()}
        gauges = Gauges(states, len(owner.flights), VERSION)
        text, content_type = as_prometheus(accept, owner.metrics, gauges)
        return flask.Response(text, content_type=content_type)
    today = owner.history.figures("day", table=table)
    return {
        **owner.metrics.as_json(table),
        "spent_today_usd": today["cost_usd"],
        "today": today,
        "month": owner.history.figures("month", table=table),
        **(owner.cluster.figures() if owner.cluster else {}),
        "in_flight": len(owner.flights),
        "circuit_breaker": breaker_figures(circuits, table.breaker),
        "recent_requests": owner.metrics.recent(),
    }


@shown.get("/usage")
def usage() -> dict[str, Any] | flask.Response:
    """What was asked and spent in the last `days`, grouped `by` day, category, model, client."""
    by, days = flask.request.args.get("by", "day").split(","), asked("days", 30, MOST_DAYS)
    odd = next((name for name in by if name not in GROUPS), "")
    if odd or len(set(by)) < len(by) or not by[0]:
        msg = (
            f"should be one of {', '.join(GROUPS)}, or some of them with commas{hint(odd, GROUPS)}"
        )
        raise invalid([{"loc": ["query", "by"], "msg": msg}])
    table = router().current_table()
    rows = router().history.usage(by, days, table)
    if flask.request.args.get("format") == "csv":
        return as_csv(rows, f"usage-by-{'-'.join(by)}.csv")
    now = time.time()
    return {
        "by": by, "from": day_of(now - 86400 * (days - 1)), "to": day_of(now), "rows": rows,
        "compare_with": table.compare_with.id if table.compare_with else None,
        "history": router().history.health(),
    }  # fmt: skip


@shown.get("/usage/requests")
def requests() -> dict[str, Any]:
    """The last requests of the history, newest first; `before` a `seq`: those before it."""
    model, outcome = (flask.request.args.get(name, "") for name in ("model", "outcome"))
    if outcome and outcome not in OUTCOMES:
        msg = f"should be one of {', '.join(OUTCOMES)}"
        raise invalid([{"loc": ["query", "outcome"], "msg": msg}])
    before = asked("before", 1, 1 << 53) if "before" in flask.request.args else None
    rows = router().history.requests(asked("limit", 100, MOST_ROWS), model, outcome, before)
    for row in rows:
        row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row["time"]))
    return {"requests": rows, "history": router().history.health()}


def as_csv(rows: list[dict[str, Any]], name: str) -> flask.Response:
    """The rows as a file for a spreadsheet."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["requests"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: plain(value) for key, value in row.items()})
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return flask.Response(text.getvalue(), mimetype="text/csv", headers=headers)


def plain(value: Any) -> Any:
    """A name that begins like a formula, as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULA else value


@shown.get("/")
def index() -> dict[str, Any] | flask.Response:
    """The page for a browser, pointers to the other routes for a program."""
    if "text/html" in flask.request.headers.get("Accept", ""):
        page, policy = flask.current_app.extensions["page"]
        headers = {"Content-Security-Policy": policy}
        return flask.Response(page, mimetype="text/html", headers=headers)
    return {"service": "llm-router", "version": VERSION, "chat": "/v1/chat/completions",
            "models": "/v1/models", "dry_run": "/route", "health": "/health", "metrics": "/metrics",
            "usage": "/usage", "config": "/config"}  # fmt: skip
