"""The built-in vocabulary beside a person's own keywords, and files that still hold it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import routing
from conftest import ROOT
from helpers import user

import router as module
from parts import vocabulary
from parts.dialects import CHAT
from parts.table import load_table

SHIPPED = json.loads((ROOT / "routes.json").read_text())
NAMES = module.BUILT_IN


def routes(*without: str, **keywords: list[str]) -> dict:
    raw = json.loads(json.dumps(SHIPPED))
    for name, entries in keywords.items():
        raw["categories"][name]["keywords"] = entries
    for name in without:
        raw["categories"][name]["vocabulary"] = False
    return raw


def old_form(**changed: list[str]) -> dict:
    """routes.json as version 0.4.0 had it."""
    lists = {name: sorted(vocabulary.of_0_4_0(name)) for name in NAMES}
    follow_ups = sorted(vocabulary.of_0_4_0(vocabulary.CONTINUATIONS))
    return {**routes(**{**lists, **changed}), "continuations": follow_ups}


def decide(raw: dict, text: str) -> module.Decision:
    table = load_table(json.dumps({**raw, "routing_mode": "keywords"}))
    chooser = module.Chooser(module.Classifier(lambda *_: b""))
    chat = module.Chat(b"", {"model": "router", "messages": [user(text)]}, (), CHAT)
    return chooser.choose(chat, table, module.Flight(None, time.monotonic))


def test_the_shipped_file_can_be_read_at_a_glance():
    assert len((ROOT / "routes.json").read_text().splitlines()) <= 60


def test_the_built_in_words_count_without_standing_in_the_file():
    assert decide(SHIPPED, "fix the bug in my python function").category == "code"


@pytest.mark.parametrize("text", ["fix the frobnicator", "a frobnicator in the garden, please"])
def test_a_persons_own_keyword_outweighs_a_built_in_one(text):
    assert decide(routes(tools=["frobnicator"]), text).category == "tools"


def test_a_weight_of_zero_mutes_a_built_in_word():
    muted = decide(routes(code=["python^0"]), "python")

    assert decide(SHIPPED, "python").category == "code"
    assert muted.category == "conversation"  # the default category
    assert not any("python" in word for word, _ in muted.words)


def test_a_category_may_do_without_the_built_in_words():
    raw = routes("code", code=["frobnicator"])

    assert decide(raw, "python").mode == "default"
    assert decide(raw, "frobnicator").category == "code"


def test_words_of_a_category_that_the_file_lacks_lead_nowhere():
    raw = routes()
    del raw["categories"]["code"]

    assert decide(raw, "fix the bug in my python function").category != "code"


def test_continuations_of_the_file_add_and_mute():
    raw = routes() | {"continuations": ["frobnicate on", "ok^0"]}
    table = load_table(json.dumps(raw))

    chooser = module.Chooser(module.Classifier(lambda *_: b""))
    follow_ups = chooser._words(table)[1]

    assert follow_ups.covers("frobnicate on")
    assert follow_ups.covers("oui")
    assert not follow_ups.covers("ok")


def test_a_file_of_the_old_form_keeps_its_own_list_and_weights():
    edited = [entry for entry in sorted(vocabulary.of_0_4_0("code")) if "python" not in entry]

    assert load_table(json.dumps(old_form())).as_json()["vocabulary"] == dict.fromkeys(NAMES, 0)
    assert not [w for w in decide(old_form(code=edited), "python").words if w[0] == "python"]
    assert decide(old_form(tools=["frobnicator"]), "frobnicator").words == (("frobnicator", 3.0),)


def test_posting_keywords_does_not_lose_the_built_in_words(build):
    client = build(**{**SHIPPED, "routing_mode": "keywords"})

    before = client.get("/config").json["vocabulary"]
    client.post("/config/category", {"name": "code", "models": ["glm-5"], "keywords": ["frob"]})
    shown = client.get("/config").json

    assert shown["vocabulary"] == before
    assert min(before.values()) > 800
    assert shown["keywords"] == {name: ["frob"] if name == "code" else [] for name in NAMES}


def slimmed(path, *more: str) -> tuple[str, dict]:
    command = [sys.executable, "router.py", "check", str(path), "--slim", *more]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr, json.loads(path.read_text())


def test_slim_leaves_what_is_a_persons_own(tmp_path):
    path, old = tmp_path / "routes.json", old_form()
    code = old["categories"]["code"]["keywords"]
    weight = next(entry for entry in code if entry.startswith("python^"))
    code[code.index(weight)] = "python^1.5"
    code.remove("refactor*^3" if "refactor*^3" in code else code[0])
    code.append("frobnicator")
    path.write_text(json.dumps(old, indent=2))

    _, new = slimmed(path)

    assert new["categories"]["code"]["keywords"][:2] == ["python^0.5", "frobnicator"]
    assert [entry.endswith("^0") for entry in new["categories"]["code"]["keywords"]].count(
        True
    ) == 1
    assert [new["categories"][name].get("keywords") for name in ("tools", "reasoning")] == [
        None
    ] * 2
    assert "continuations" not in new


def test_slim_changes_no_decision_and_then_nothing_more(tmp_path):
    path = tmp_path / "routes.json"
    path.write_text(json.dumps(SHIPPED | {"categories": old_form()["categories"]}, indent=2))

    _, once = slimmed(path)
    said, twice = slimmed(path)

    assert "holds no built-in keywords" in said
    assert once == twice
    texts = [row["text"] for row in routing.rows_of(ROOT / "tests/routing_examples.jsonl")[::40]
             if "text" in row]  # fmt: skip
    assert [decide(once, text).category for text in texts] == [
        decide(SHIPPED, text).category for text in texts
    ]
