"""How well the shipped keywords choose, on prompts made for this; 75 of them meant to be hard."""

from __future__ import annotations

import json

import pytest
import routing
from conftest import ROOT

ROWS = [
    json.loads(line)
    for line in (ROOT / "tests" / "routing_examples.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def decide():
    return routing.deciding()


def pairs(decide, rows, envelope="{}"):
    return [(row["category"], decide(routing.messages_of(row, envelope)).category) for row in rows]


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
    rows = [row for row in ROWS if "text" in row and row.get("note") != "hard"]
    decisions = [(row["category"], decide(routing.messages_of(row))) for row in rows]

    sure = [(wanted, d.category) for wanted, d in decisions if d.margin >= 0.6]

    assert len(sure) > len(rows) / 3
    assert routing.accuracy(sure) >= 0.95
