"""Figures one can trust: counts, cost, tokens, Prometheus text, the daily limit."""

from __future__ import annotations

import random
import subprocess
import threading
import time

import pytest
from helpers import CHAT, figures
from prometheus_client.parser import text_string_to_metric_families
from upstream import chunk, error, pieces, stream, whole

from metrics import Attempt, Metrics, Record, cost_of, token_counts
from routes_file import Model, Upstream

UP = Upstream("u", "http://h")
PRICED = Model("acme/one", UP, cost={"input": 1.0, "output": 2.0, "cached_input": 0.5})


@pytest.fixture
def table(client):
    return client.router.table


# --- cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "usage", "wanted"),
    [
        (PRICED, {"prompt_tokens": 1000, "completion_tokens": 100}, (0.0012, "routes.json")),
        (PRICED, {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 400}},
         (0.0008, "routes.json")),
        (PRICED, {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 99}},
         (0.000005, "routes.json")),
        (PRICED, {"prompt_tokens": 1000, "cost": 0.5}, (0.5, "upstream")),
        (PRICED, {"prompt_tokens": 1000, "cost": 0}, (0.0, "upstream")),
        (PRICED, {"prompt_tokens": 1000, "cost": "free"}, (0.001, "routes.json")),
        (PRICED, {"prompt_tokens": 1000, "cost": -1}, (0.001, "routes.json")),
        (PRICED, {"prompt_tokens": 1000, "cost": True}, (0.001, "routes.json")),
        *[(PRICED, {"prompt_tokens": 1000, "cost": cost}, (0.001, "routes.json"))
          for cost in (10**400, 1e308, float("nan"))],
        (PRICED, {}, (None, "unknown")),
        (Model("acme/x:free", UP), {"prompt_tokens": 5}, (0.0, "free")),
        (Model("acme/x", UP), {"prompt_tokens": 5}, (None, "unknown")),
        (Model("acme/x", UP, cost={"input": 0, "output": 0}), {"prompt_tokens": 5},
         (0.0, "routes.json")),
        (Model("a", UP, cost={"input": 1.0, "output": 1.0}),
         {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 400}},
         (0.001, "routes.json")),
    ],
)  # fmt: skip
def test_cost_and_its_source(model, usage, wanted):
    usd, source = cost_of(model, usage)

    assert (usd if usd is None else round(usd, 12), source) == wanted


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": "7"}, {"prompt_tokens": -1}, {"prompt_tokens": True},
     {"prompt_tokens_details": 5}, {"prompt_tokens": 1 << 60}],
)  # fmt: skip
def test_nonsense_in_usage_counts_nothing(usage):
    assert set(token_counts(usage).values()) == {0}


def test_tokens_of_all_kinds_are_counted():
    usage = {
        "prompt_tokens": 9, "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 7},
        "completion_tokens_details": {"reasoning_tokens": 6},
    }  # fmt: skip

    assert token_counts(usage) == {"input": 9, "output": 8, "cached": 7, "reasoning": 6}


# --- counting ----------------------------------------------------------------------------------


def record(metrics: Metrics, rng: random.Random) -> tuple[str, int]:
    """Book one random request; what it should add."""
    outcome = rng.choice(["success", "failed", "client_left", "rejected"])
    attempts = (
        [] if outcome == "rejected" else [Attempt(PRICED, rng.choice(["success", "cut"]), 200)]
    )
    for attempt in attempts:
        attempt.price({"prompt_tokens": 1_000_000})
    call = Record("id", outcome, attempts=attempts, category="code", mode="keywords", seconds=0.5)
    call.answer = attempts[0] if outcome == "success" else None
    metrics.record(call)
    return call.counted_as, len(attempts)


def test_everything_adds_up_after_32_threads_of_500_requests(clock, table):
    metrics, booked, barrier = Metrics(clock), [], threading.Barrier(32)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        barrier.wait(10)
        booked.append([record(metrics, rng) for _ in range(500)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(32)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]

    flat = [one for many in booked for one in many]
    shown = metrics.as_json(table)
    assert len(flat) == 16_000
    for outcome in ("success", "failed", "rejected", "cancelled"):
        assert shown["requests"][outcome] == sum(o == outcome for o, _ in flat)
    assert shown["total_cost_usd"] == sum(n for _, n in flat)
    assert shown["category_distribution"]["code"] == shown["requests"]["success"]


def test_figures_agree_with_what_the_upstream_saw(client, upstream):
    upstream.scripts["acme/one"] = [
        whole("a"), stream(["b"]), error(503), pieces([chunk({"content": "c"})], after="cut"),
        error(400, "bad"), stream(["d"], usage={"prompt_tokens": 100, "completion_tokens": 1,
                                               "prompt_tokens_details": {"cached_tokens": 50}}),
    ]  # fmt: skip
    client.chat()
    client.chat(stream=True)
    client.chat()  # fails over to acme/two
    client.chat(stream=True)  # cut after its first token
    client.chat()  # refused, second opinion answers
    client.chat(stream=True)

    shown = figures(client)
    one, two = shown["models"]["acme/one"], shown["models"]["acme/two"]
    assert shown["requests"]["total"] == 6
    assert shown["requests"]["failed"] == 1
    assert sum(one["attempts"].values()) == upstream.models_asked().count("acme/one")
    assert sum(two["attempts"].values()) == upstream.models_asked().count("acme/two")
    assert one["tokens"] == {"input": 120, "output": 41, "cached": 50, "reasoning": 0}
    assert one["cost_usd"] == round((2 * (10 + 40) + 50 + 25 + 2) / 1e6, 10)
    assert two["cost_usd"] == round(2 * (100 + 400) / 1e6, 10)
    assert shown["total_cost_usd"] == round(one["cost_usd"] + two["cost_usd"], 10)


def test_a_failed_attempt_that_used_tokens_is_billed_to_its_own_model(client, upstream):
    usage = {"prompt_tokens": 1000, "completion_tokens": 0}
    upstream.scripts["acme/one"] = whole("", usage=usage)  # an empty answer
    upstream.scripts["acme/two"] = whole("yes")

    client.chat()

    models = figures(client)["models"]
    assert models["acme/one"]["cost_usd"] == 0.001
    assert models["acme/two"]["cost_usd"] == 0.0005


def test_an_answer_without_a_price_is_counted_as_such(build):
    client = build(models={})

    answer = client.chat()

    assert answer.headers["X-Router-Cost-Usd"] == "unknown"
    assert figures(client)["unpriced_requests"] == 1
    assert figures(client)["total_cost_usd"] == 0


def test_names_from_clients_add_no_key(client):
    def ask(n: int) -> int:
        client.chat(model=f"name-{n}")
        client.chat(model=f"router/x{n}")
        client.post(CHAT, {"messages": n})
        return client.get("/metrics?format=prometheus").text.count("\n")

    first = ask(0)

    assert {ask(n) for n in range(1, 100)} == {first}


def test_latency_has_percentiles_beside_the_average(clock, table):
    metrics = Metrics(clock)
    for n in range(1, 101):
        attempt = Attempt(PRICED, "success", 200)
        call = Record("id", "success", attempts=[attempt], answer=attempt, seconds=n / 1000)
        metrics.record(call)

    shown = metrics.as_json(table)["models"]["acme/one"]

    assert shown["avg_latency_ms"] == 50.5
    assert (shown["p50_ms"], shown["p95_ms"], shown["p99_ms"]) == (51, 96, 100)


# --- Prometheus --------------------------------------------------------------------------------


@pytest.fixture
def scraped(client, upstream) -> str:
    upstream.scripts["acme/one"] = [whole("x"), stream(["x"]), error(503)]
    client.chat()
    client.chat(stream=True)
    client.chat()
    return client.get("/metrics?format=prometheus").text


def test_prometheus_text_is_read_by_its_own_parser_and_agrees_with_the_json(client, scraped):
    samples = [s for family in text_string_to_metric_families(scraped) for s in family.samples]
    requests = [s for s in samples if s.name == "llm_router_requests_total"]

    done = sum(s.value for s in requests if s.labels["outcome"] == "success")
    assert done == figures(client)["requests"]["success"] == 3
    assert {s.name for s in samples} >= {
        "llm_router_requests_total", "llm_router_attempts_total",
        "llm_router_request_duration_seconds_bucket",
        "llm_router_time_to_first_token_seconds_sum", "llm_router_classify_duration_seconds_count",
        "llm_router_tokens_total", "llm_router_cost_usd_total", "llm_router_circuit_state",
        "llm_router_in_flight", "llm_router_build_info",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/plain", "text/plain"),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
         "application/openmetrics-text"),
    ],
)  # fmt: skip
def test_who_asks_for_prometheus_text_gets_it(client, accept, kind):
    answer = client.get("/metrics", headers={"Accept": accept})

    assert answer.mimetype == kind


@pytest.mark.debian("promtool")
def test_promtool_has_nothing_to_say(scraped):
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scraped,
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- the daily limit ---------------------------------------------------------------------------


@pytest.fixture
def limited(build):
    return build(daily_limit_usd=0.00009)


def test_over_the_daily_limit_requests_are_a_429_until_midnight(limited, upstream):
    statuses = [limited.chat().status_code for _ in range(3)]

    last = limited.chat()
    assert statuses == [200, 200, 429]  # 0.00005 USD each
    assert last.json["error"]["code"] == "budget_exhausted"
    assert 0 < int(last.headers["Retry-After"]) <= 86400
    assert last.headers["x-should-retry"] == "false"
    assert len(upstream.requests) == 2


def test_the_next_day_begins_at_zero(limited, monkeypatch):
    limited.chat()
    limited.chat()
    tomorrow = time.time() + 86400

    monkeypatch.setattr("metrics.time.time", lambda: tomorrow)

    assert limited.chat().status_code == 200
