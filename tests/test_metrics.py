"""Figures one can trust: counts, cost, tokens, Prometheus text, the daily limit."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time

import pytest
from helpers import CHAT, figures
from prometheus_client.parser import text_string_to_metric_families
from upstream import chunk, error, pieces, stream, whole

from parts.metrics import Attempt, Metrics, Record, cost_of, token_counts, usage_of
from parts.table import Model, Upstream

UP = Upstream("u", "http://h")
PRICED = Model("acme/one", UP, cost={"input": 1.0, "output": 2.0, "cached_input": 0.5})


@pytest.fixture
def table(client):
    return client.router.current_table()


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
    usd, source = cost_of(model, usage, token_counts(usage))

    assert (usd if usd is None else round(usd, 12), source) == wanted


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": "seven"}, {"prompt_tokens": -1}, {"prompt_tokens": True},
     {"prompt_tokens_details": 5}, {"prompt_tokens": 1 << 60}, {"prompt_tokens": 7.5},
     {"prompt_tokens": [7]}, {"prompt_tokens": float("nan")}, {"prompt_tokens": None},
     {"prompt_tokens": "9" * 500}, {"total_tokens": "x", "prompt_tokens": {}}],
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


# usage as it was met, then input, output, cached and reasoning tokens
DIALECTS = {
    "Kimi": ({"prompt_tokens": 9, "completion_tokens": 8, "cached_tokens": 7}, (9, 8, 7, 0)),
    "DeepSeek": ({"prompt_tokens": 9, "completion_tokens": 8, "prompt_cache_hit_tokens": 7,
                  "prompt_cache_miss_tokens": 2}, (9, 8, 7, 0)),
    "Responses": ({"input_tokens": 9, "input_tokens_details": {"cached_tokens": 7},
                   "output_tokens": 8, "output_tokens_details": {"reasoning_tokens": 6},
                   "total_tokens": 17}, (9, 8, 7, 6)),
    "Anthropic": ({"input_tokens": 2, "cache_read_input_tokens": 6,
                   "cache_creation_input_tokens": 1, "output_tokens": 8}, (9, 8, 6, 0)),
    "LiteLLM of Anthropic": ({"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17,
                              "cache_read_input_tokens": 6}, (9, 8, 6, 0)),
    "a proxy of Anthropic": ({"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10,
                              "cache_read_input_tokens": 7}, (9, 8, 7, 0)),
    "New API": ({"prompt_tokens": 9, "completion_tokens": 8, "input_tokens": 0, "output_tokens": 0,
                 "input_tokens_details": None}, (9, 8, 0, 0)),
    "xAI": ({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 17,
             "completion_tokens_details": {"reasoning_tokens": 6}}, (9, 8, 0, 6)),
    "Gemini": ({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 17}, (9, 8, 0, 0)),
    "a total with the cached beside": ({"prompt_tokens": 9, "completion_tokens": 8,
                                        "cached_tokens": 7, "total_tokens": 24}, (9, 8, 7, 0)),
    "floats": ({"prompt_tokens": 9.0, "completion_tokens": 8e0}, (9, 8, 0, 0)),
    "texts": ({"prompt_tokens": "9", "completion_tokens": " 8 "}, (9, 8, 0, 0)),
    "nulls": ({"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": None,
               "completion_tokens_details": {"reasoning_tokens": None}}, (9, 8, 0, 0)),
    "more cached than asked": ({"prompt_tokens": 9, "cached_tokens": 99}, (9, 0, 9, 0)),
    "embeddings": ({"prompt_tokens": 9, "total_tokens": 9}, (9, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize(("usage", "tokens"), DIALECTS.values(), ids=DIALECTS)
def test_usage_is_read_in_every_dialect(usage, tokens):
    assert tuple(token_counts(usage).values()) == tokens


ASKED = {"prompt_tokens": 1000, "completion_tokens": 100}
COSTS = {
    "OpenRouter": ({**ASKED, "cost": 0.5, "cost_details": {"upstream_inference_cost": None}}, 0.5),
    "OpenRouter, own key": ({**ASKED, "cost": 0.05, "is_byok": True,
                             "cost_details": {"upstream_inference_cost": 0.5}}, 0.55),
    "OpenRouter, resold": ({**ASKED, "cost": 0.5, "is_byok": False,
                            "cost_details": {"upstream_inference_cost": 0.4}}, 0.5),
    "OpenRouter, no fee": ({**ASKED, "is_byok": True,
                            "cost_details": {"upstream_inference_cost": 0.5}}, 0.5),
    "Perplexity": ({**ASKED, "cost": {"input_tokens_cost": 0.1, "total_cost": 0.5}}, 0.5),
    "DeepInfra": ({**ASKED, "estimated_cost": 0.5}, 0.5),
    "xAI": ({**ASKED, "cost_in_usd_ticks": 5_000_000_000}, 0.5),
    "a text": ({**ASKED, "cost": "0.5"}, 0.5),
    "total_cost": ({**ASKED, "total_cost": 0.5}, 0.5),
}  # fmt: skip


@pytest.mark.parametrize(("usage", "usd"), COSTS.values(), ids=COSTS)
def test_a_cost_that_an_upstream_tells_is_read(usage, usd):
    told, source = cost_of(PRICED, usage, token_counts(usage))

    assert (round(told or 0, 9), source) == (usd, "upstream")


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": -5, "completion_tokens": 3}, {"prompt_tokens": 5, "completion_tokens": "x"},
     {"prompt_tokens": 5, "completion_tokens": -1}, {"completion_tokens": 3}, {"total_tokens": 8},
     {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": None}, {"tokens": 5},
     {"prompt_tokens": "many", "completion_tokens": 3}, {"cost": {}, "prompt_tokens": True}],
)  # fmt: skip
def test_usage_that_cannot_be_read_is_of_unknown_cost_and_never_free(usage):
    assert cost_of(PRICED, usage, token_counts(usage)) == (None, "unknown")


@pytest.mark.parametrize(
    "body",
    [
        {"usage": ASKED, "choices": []},
        {"choices": [{"delta": {}, "usage": ASKED}]},
        {"choices": [{"delta": {}}, {"delta": {}, "usage": ASKED}], "usage": None},
        {"choices": [], "x_groq": {"id": "req", "usage": ASKED}},
        {"usage": {"prompt_tokens": 0, "completion_tokens": 0}, "x_groq": {"usage": ASKED}},
    ],
    ids=["OpenAI", "Kimi", "Kimi, the last choice", "Groq", "zeros beside it"],
)  # fmt: skip
def test_usage_is_found_where_upstreams_put_it(body):
    assert usage_of(body) == ASKED


@pytest.mark.parametrize(
    "body",
    [{}, {"usage": None}, {"usage": {}}, {"usage": 5}, {"choices": 5}, {"choices": [5]},
     {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, {"usage": {"prompt_tokens": "x"}},
     {"x_groq": 5}, {"choices": [{"usage": []}]}],
)  # fmt: skip
def test_usage_that_says_nothing_is_none(body):
    assert usage_of(body) == {}


def test_zeros_behind_the_usage_of_a_stream_do_not_make_it_free(client, upstream):
    zeros = {"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}}
    said = chunk({"content": "x"}, "stop", usage={"prompt_tokens": 7, "completion_tokens": 3})
    upstream.scripts["acme/one"] = pieces([said, f"data: {json.dumps(zeros)}\n\n".encode()])

    client.chat(stream=True)

    recent = client.get("/metrics").json["recent_requests"][0]
    assert (recent["tokens_in"], recent["tokens_out"]) == (7, 3)


# --- counting ----------------------------------------------------------------------------------


def record(metrics: Metrics, rng: random.Random) -> tuple[str, int]:
    """Book one random request; what it should add."""
    outcome = rng.choice(["success", "failed", "client_left", "rejected"])
    attempts = (
        [] if outcome == "rejected" else [Attempt(PRICED, rng.choice(["success", "cut"]), 200)]
    )
    for attempt in attempts:
        attempt.price({"prompt_tokens": 1_000_000})
    call = Record("id", outcome=outcome, attempts=attempts, category="code", mode="keywords")
    call.seconds = 0.5
    call.answered_by = attempts[0] if outcome == "success" else None
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
        call = Record("id", outcome="success", attempts=[attempt], answered_by=attempt)
        call.seconds = n / 1000
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

    monkeypatch.setattr("parts.metrics.time.time", lambda: tomorrow)

    assert limited.chat().status_code == 200
