"""How well the router chooses without a model, on prompts made for this; 75 meant to be hard."""

from __future__ import annotations

import json

import pytest
import routing
import train_words
from conftest import ROOT

from router import SURE_MARGIN

ROWS = [
    json.loads(line)
    for line in (ROOT / "tests" / "routing_examples.jsonl").read_text().splitlines()
]


PROMPTS = routing.rows_of(ROOT / "bench" / "prompts.jsonl")
HELD_BACK = {
    "examples": [row for row in ROWS if train_words.is_held_back(row)],
    "prompts": [row for row in PROMPTS if train_words.is_held_back(row)],
}


@pytest.fixture(scope="module")
def decide():
    return routing.deciding()


def pairs(decide, rows, envelope="{}"):
    return [(row["category"], decide(routing.messages_of(row, envelope)).category) for row in rows]


@pytest.mark.parametrize(("name", "floor"), [("examples", 0.87), ("prompts", 0.89)])
def test_texts_that_nothing_was_trained_on_have_a_floor(decide, name, floor):
    rows = HELD_BACK[name]

    assert len(rows) > 200
    assert routing.accuracy(pairs(decide, rows)) >= floor
    for lang in ("en", "fr"):
        assert routing.accuracy(pairs(decide, [r for r in rows if r["lang"] == lang])) >= 0.85


@pytest.mark.parametrize(("lang", "floor"), [("de", 0.6), ("es", 0.6), ("it", 0.6)])
def test_other_languages_are_better_than_chance(decide, lang, floor):
    rows = [row for row in HELD_BACK["prompts"] if row["lang"] == lang]

    assert routing.accuracy(pairs(decide, rows)) >= floor


@pytest.mark.parametrize("lang", ["en", "fr"])
def test_accuracy_has_a_floor_in_each_language(decide, lang):
    found = pairs(decide, [row for row in ROWS if row["lang"] == lang])

    assert len(found) >= 100
    assert routing.accuracy(found) >= 0.86
    assert routing.macro_f1(found) >= 0.86
    assert routing.scores(found, "tools")[2] >= 0.80


def test_continuations_keep_their_category(decide):
    found = pairs(decide, [row for row in ROWS if row["kind"] == "continuation"])

    assert routing.accuracy(found) >= 0.90


@pytest.mark.parametrize("envelope", routing.ENVELOPES, ids=range(len(routing.ENVELOPES)))
def test_an_envelope_loses_at_most_a_point(decide, envelope):
    rows = [row for row in ROWS if "text" in row and row["kind"] != "wrapped"]

    lost = routing.accuracy(pairs(decide, rows)) - routing.accuracy(pairs(decide, rows, envelope))

    assert lost <= 0.01


def test_some_examples_are_wrong_so_that_the_floor_means_something(decide):
    hard = [row for row in ROWS if row.get("note") == "hard"]

    assert len(hard) >= 40
    assert routing.accuracy(pairs(decide, hard)) < 0.9


def test_a_sure_answer_is_right_nineteen_times_of_twenty(decide):
    rows = [row for row in HELD_BACK["examples"] if "text" in row] + HELD_BACK["prompts"]
    decisions = [(row["category"], decide(routing.messages_of(row))) for row in rows]

    sure = [(wanted, d.category) for wanted, d in decisions if d.margin >= SURE_MARGIN]

    assert len(sure) > len(rows) / 2
    assert routing.accuracy(sure) >= 0.95
