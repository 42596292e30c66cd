"""Three models of an upstream refused by the same quota: the others are passed over until then."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import circuits
from upstream import error

NAMES = [f"acme/m{n}" for n in range(6)]
SAME = "Rate limit of your organisation: 100 of 100 requests for {} today"


@pytest.fixture
def made(build, upstream, clock):
    def make(names: list[str] = NAMES, **more: Any) -> Any:
        chain = {"models": [*names, "other/model"]}
        upstreams = {name: {"base_url": upstream.url} for name in ("local", "second")}
        models = {"other/model": {"upstream": "second"}}
        return build(clock, categories={"conversation": chain}, upstreams=upstreams,
                     models=models, **more)  # fmt: skip

    return make


def refuse(upstream: Any, words: list[str], wait_s: str = "120") -> None:
    for name, said in zip(upstream.names, words, strict=True):
        upstream.scripts[name] = error(429, said.format(name), Retry_After=wait_s)


def test_the_others_are_passed_over_until_the_quota_is_back(made, upstream, clock):
    client, upstream.names = made(), NAMES
    refuse(upstream, [SAME] * 6)

    assert client.chat().headers["X-Router-Model"] == "other/model"

    assert upstream.models_asked() == [*NAMES[:3], "other/model"]
    open_ = circuits(client)["open_circuits"]
    assert {*open_} == {*NAMES}
    assert open_[NAMES[5]]["reason"] == "rate_limited"
    assert open_[NAMES[5]]["retry_in_sec"] == 120
    clock += 121
    upstream.scripts.clear()
    assert client.chat().headers["X-Router-Model"] == NAMES[0]


@pytest.mark.parametrize(("words", "wait_s"), [
    ([SAME, SAME, "Too many of {}", SAME, "The model is busy", "x"], "120"),  # three at the fourth
    ([f"quota {word}" for word in ("a", "b", "c", "d", "e", "f")], "120"),
])  # fmt: skip
def test_other_words_are_other_quotas(made, upstream, words, wait_s):
    client, upstream.names = made(), NAMES
    refuse(upstream, words, wait_s)

    client.chat()

    asked = 4 if words[0] == SAME else 6
    assert upstream.models_asked() == [*NAMES[:asked], "other/model"]


def test_a_quota_of_the_free_ones_leaves_those_that_are_paid_for(made, upstream):
    names = [*(f"acme/m{n}:free" for n in range(4)), "acme/paid"]
    client, upstream.names = made(names), names
    refuse(upstream, ["Rate limit exceeded: free-models-per-day"] * 5)
    upstream.scripts.pop("acme/paid")

    assert client.chat().headers["X-Router-Model"] == "acme/paid"

    assert upstream.models_asked() == [*names[:3], "acme/paid"]


def test_when_all_is_held_the_client_is_told_to_wait(made, upstream):
    client, upstream.names = made(), [*NAMES, "other/model"]
    refuse(upstream, [SAME] * 7)

    answer = client.chat()

    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "120"
    assert len(upstream.requests) == 4
