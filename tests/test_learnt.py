"""The learnt table: a second opinion beside the lists, and how it is made."""

from __future__ import annotations

import json
import time

import card
import pytest
import train_words
from conftest import ROOT
from test_vocabulary import SHIPPED, decide, routes

import router as module
from parts import vocabulary
from parts.vocabulary import Learnt, learnt, mixed, pairs_of, pieces_of


def small() -> Learnt:
    weights = {"alpha": (0, 90), "beta": (90, 0), "alpha $": (0, 30), "~_alp": (0, 50)}
    return Learnt(("code", "tools"), (0.0, 0.0), weights)


def test_features_are_words_pairs_and_pieces():
    assert pieces_of("write") == ["write", "~_wri", "~writ", "~rite", "~ite_"]
    assert pieces_of("2026") == ["#"]
    assert pairs_of(["add", "2"]) == ["^ add", "add #", "# $"]


def test_the_table_says_how_probable_each_category_is():
    opinion = small().opinion(["alpha"])

    assert opinion is not None
    assert opinion.shares["tools"] > 0.9
    assert sum(opinion.shares.values()) == pytest.approx(1)
    assert [word for word, _ in small().heaviest(opinion, "tools")] == ["~alpha", "~alpha $"]


@pytest.mark.parametrize("words", [[], ["gamma"], ["alphas"], ["beta"]])
def test_of_too_few_words_it_has_no_opinion(words):
    assert small().opinion(words) is None


def test_a_muted_word_says_nothing_for_its_category():
    table = small().without([("tools", "alph", True), ("lamps", "alpha", False)])

    opinion = table.opinion(["alpha"])

    assert opinion is not None
    assert opinion.shares["tools"] == opinion.shares["code"]
    assert table.heaviest(opinion, "tools") == []
    assert small().without([]).opinion(["alpha"]) == small().opinion(["alpha"])


def test_strong_hits_outweigh_the_table_and_weak_ones_do_not():
    against = {"code": 0.1, "tools": 0.9}

    strong, weak = (
        mixed({"code": 6.0, "tools": 0.0}, against),
        mixed({"code": 0.4, "tools": 0.0}, against),
    )

    assert max(strong, key=strong.__getitem__) == "code"
    assert max(weak, key=weak.__getitem__) == "tools"


def test_silence_stays_the_default():
    assert mixed({"code": 0.0, "tools": 0.0}, {"code": 0.4, "tools": 0.3}) == {}
    assert decide(SHIPPED, "qwx zzgh plomf").mode == "default"


def test_where_the_lists_are_silent_a_sure_table_decides_and_says_why():
    decision = decide(SHIPPED, "Wie wird das Wetter morgen in Kiel?")

    assert decision.category == "tools"
    assert any(word.startswith("~") for word, _ in decision.words)


def test_a_category_that_a_person_made_is_never_overruled():
    raw = routes()
    raw["categories"]["lamps"] = {"models": ["glm-5"], "keywords": ["hallway"]}

    assert decide(raw, "switch off the light in the hallway of the house").category in (
        "lamps",
        "tools",
    )
    assert decide(raw, "Apaga el hallway").category == "lamps"


def test_without_any_built_in_words_there_is_no_table_either():
    raw = routes(*module.BUILT_IN)

    assert decide(raw, "Wie wird das Wetter morgen in Kiel?").mode == "default"


def test_the_file_is_small_and_names_where_it_comes_from():
    path = ROOT / "parts" / "words.json"
    raw = json.loads(path.read_text())
    told = (ROOT / "bench" / "ATTRIBUTION.md").read_text().lower().replace(" ", "")

    assert path.stat().st_size < 260_000
    assert raw["categories"] == list(module.BUILT_IN)
    sources = [name.partition("_")[0].rstrip("0123456789") for name in raw["rows"]]
    assert [name for name in sources if name not in ("own",) and name not in told] == []


def test_a_third_is_held_back_and_the_same_rows_make_the_same_table():
    rows = [row for path in train_words.OWN for row in train_words.rows_of(path)]
    some = [train_words.as_row(row, 1.0) for row in rows[::40]]

    held = sum(map(train_words.is_held_back, rows)) / len(rows)

    assert 0.28 < held < 0.38
    assert train_words.learn(some) == train_words.learn(some)


def test_the_card_tells_what_is_measured_today(tmp_path):
    today = card.write([], tmp_path / "card.md").read_text()
    kept = (ROOT / "bench" / "CARD.md").read_text()

    own = [line for line in today.splitlines() if line.startswith(("| held back", "| trained on"))]
    assert own
    assert [line for line in own if line not in kept] == []
    assert "Made without public rows" in today


def test_no_text_takes_long_and_own_keywords_cost_nothing():
    texts = card.junk()
    many = {"mine": [f"frob{n}" for n in range(10_000)]}
    lists = {name: vocabulary.built_in(name) for name in module.BUILT_IN}
    few = module.Keywords(dict.fromkeys(lists, ()), lists)
    more = module.Keywords({**dict.fromkeys(lists, ()), **many}, lists)

    def took(keywords: module.Keywords, text: str) -> float:
        spent = []
        for n in range(5):
            began = time.thread_time()
            keywords.match(text[n:])
            spent.append(time.thread_time() - began)
        return min(spent)

    slow = [took(few, text) for text in texts.values()]
    assert max(slow) < 0.05
    assert max(took(more, text) for text in texts.values()) < 2 * max(slow) + 0.005
    assert learnt() is learnt()
