"""What a request costs, counted in calls: the same on every machine, and it must not creep up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import LocalClient, small_routes
from load import agent_body, small_body, talk_body
from upstream import Upstream, stream


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, this thread calls meanwhile."""
    seen = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def calls(client: LocalClient, body: bytes) -> int:
    """Of one chat, once everything is warm."""

    def ask() -> None:
        answer = client.flask.post(
            "/v1/chat/completions", data=body, content_type="application/json", buffered=True
        )
        assert answer.status_code == 200

    ask()
    return min(calls_of(ask), calls_of(ask))  # each sixteenth also books the rows of all sixteen


def test_a_small_chat_costs_at_most_2_500_calls(client):
    assert calls(client, small_body("router")) <= 2_500  # 2,080, Flask's client included


def test_an_agents_200_kb_cost_little_more(client):
    extra = calls(client, agent_body("router")) - calls(client, small_body("router"))

    assert extra <= 2_500  # 1,930, though there are 30,000 words in it


def test_calls_grow_no_faster_than_the_body(client):
    ten, hundred = (calls(client, talk_body("router", kb)) for kb in (10, 100))

    assert hundred - ten <= 90 * 20  # 14 for each message of 1 KB


@pytest.mark.parametrize(("many", "words"), [(200, 3), (1, 10_000)])
def test_categories_and_keywords_cost_nothing(build, upstream: Upstream, client, many, words):
    categories = small_routes(upstream.url)["categories"]
    for n in range(many):
        own = [f"zz{n}x{i}" for i in range(words)]
        categories[f"own-{n}"] = {"models": ["acme/one"], "keywords": own}
    body = small_body("router")
    before = calls(client, body)

    larger = build(categories=categories)

    assert calls(larger, body) <= before + 450  # scores: two for each category


def test_recent_requests_cost_nothing(client):
    body = small_body("router")
    before = calls(client, body)
    for _ in range(200):
        client.chat()

    assert calls(client, body) <= before + 20


def test_an_event_costs_at_most_110_calls(client, upstream: Upstream):
    def of(n: int) -> int:
        upstream.default = stream(["word "] * n)
        return calls(client, small_body("router", stream=True))

    cost = of(300) - of(100)
    assert cost <= 200 * 110, cost  # 77
