"""bench/CARD.md: how well the router chooses, on which texts, and where it is weak.

`python bench/routing.py --card [FILE.jsonl...]` writes it. Files are public rows that stay out of
the repository; "source" in each row says where it comes from.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import routing
import train_words
from routing import NAMES, ROOT

Pairs = list[tuple[str, str]]


def variants(text: str) -> dict[str, str]:
    """The same request as another hand, or a client, would write it."""
    random.seed(len(text))
    words = text.split(" ")
    at = max(range(len(words)), key=lambda n: (len(words[n]) < 12) * len(words[n]))
    word = words[at]
    if len(word) > 3:
        n = random.randrange(1, len(word) - 2)  # two letters of the longest word change places
        word = word[:n] + word[n + 1] + word[n] + word[n + 2 :]
    plain = unicodedata.normalize("NFD", text)
    return {
        "lower case, no punctuation": re.sub(r"[.,;!?¿«»\"“”]+", "", text.lower()).strip(),
        "without accents": "".join(c for c in plain if not unicodedata.combining(c)),
        "one typo": " ".join([*words[:at], word, *words[at + 1 :]]),
        "a greeting before": f"Hi! {text}",
        "a word of thanks behind": f"{text}\nThanks in advance!",
        "quoted by a chat client": routing.ENVELOPES[2].format(text),
    }


def share(found: Pairs) -> str:
    """Accuracy with its number of texts."""
    return f"{routing.accuracy(found):.3f} | {len(found)}"


def table(head: str, rows: Iterable[str]) -> list[str]:
    """Lines of a Markdown table."""
    columns = head.count("|") + 1
    return [f"| {head} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows), ""]


def junk() -> dict[str, str]:
    """Texts of 50 KB that are no prompts."""
    random.seed(1)
    return {
        "letters and signs": "".join(random.choices("abcdefgh ijkl. \n:?[]<>#(){}0123", k=50_000)),
        "words": " ".join(random.choices(["turn", "the", "a.b", "é", "12", "prove"], k=11_000)),
        "brackets": "( " * 25_000,
    }


def write(files: list[Path], path: Path = ROOT / "bench" / "CARD.md") -> Path:
    """Measure, and write the card."""
    decide = routing.deciding()
    own = [(path.name, row) for path in train_words.OWN for row in routing.rows_of(path)]
    public = [(row["source"].partition("/")[0], row) for f in files for row in routing.rows_of(f)]
    sets: dict[tuple[str, str, str], Pairs] = defaultdict(list)
    margins, took, held = [], [], []
    for origin, rows in (("own", own), ("public", public)):
        for source, row in rows:
            began = time.thread_time()
            decision = decide(routing.messages_of(row))
            took.append((time.thread_time() - began) * 1e6)
            new = origin == "public" or train_words.is_held_back(row)
            kind = origin if origin == "public" else "held back" if new else "trained on"
            sets[kind, source, row["lang"]].append((row["category"], decision.category))
            if new:
                margins.append((decision.margin, row["category"] == decision.category))
            if kind == "held back" and "text" in row:
                held.append((row["text"], decision.category))
    out = ["# How well it chooses", "", *about(files), "## Accuracy", ""]
    rows = [f"{kind} | {source} | {lang} | {share(pairs)}"
            for (kind, source, lang), pairs in sorted(sets.items())]  # fmt: skip
    out += table("texts | source | language | right | number", rows)
    fresh = [pair for (kind, *_), found in sets.items() if kind != "trained on" for pair in found]
    out += [*confusion(fresh), *calibration(margins), *robustness(decide, held)]
    out += [*timing(decide, took[1:]), *weak(sets, fresh)]
    path.write_text("\n".join(out).rstrip() + "\n", encoding="utf-8")
    return path


def about(files: list[Path]) -> list[str]:
    """What was measured, and what the table was trained on."""
    raw = json.loads((ROOT / "parts" / "words.json").read_text(encoding="utf-8"))
    learnt = ", ".join(f"{n} {source}" for source, n in raw["rows"].items())
    named = " ".join(path.name for path in files)
    with_files = (
        f"Public rows measured: `{named}`; they are not in the repository."
        if files
        else "Made without public rows: only the project's own prompts are measured here, whose "
        "style the lists know. On strangers' prompts expect less."
    )
    return [
        f"Made by `python bench/routing.py --card {named}`".rstrip() + ", keywords alone decide. "
        + with_files,
        "",
        f"The table of words ({len(raw['words'])} entries) was trained on rows: {learnt} "
        "([ATTRIBUTION.md](ATTRIBUTION.md)). The lists were written by hand with an eye on "
        "`tests/routing_examples.jsonl`, so that file flatters them, held back or not.",
        "",
    ]  # fmt: skip


def confusion(found: Pairs) -> list[str]:
    """Wanted against got, over what the table was not trained on."""
    counts, rows = Counter(found), []
    for name in NAMES:
        precision, recall, f1 = routing.scores(found, name)
        got = " | ".join(str(counts[name, other]) for other in NAMES)
        rows.append(f"{name} | {got} | {precision:.2f} | {recall:.2f} | {f1:.2f}")
    head = "wanted / got | " + " | ".join(NAMES) + " | precision | recall | F1"
    title = "All but what was trained on."
    return ["## Confusion", "", title, "", *table(head, rows)]


def calibration(found: list[tuple[float, bool]]) -> list[str]:
    """How right the answers of a margin are."""
    edges = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.01)
    rows = []
    for low, high in itertools.pairwise(edges):
        band = [right for margin, right in found if low <= margin < high]
        if band:
            rows.append(f"{low:.1f} to {min(high, 1.0):.1f} | {statistics.mean(band):.3f} | "
                        f"{len(band) / len(found):.1%}")  # fmt: skip
    return ["## Right by margin", "", *table("margin | right | share of texts", rows)]


def robustness(decide: Callable[..., Any], held: list[tuple[str, str]]) -> list[str]:
    """How many held-back texts keep their category when they are written otherwise."""
    same: Counter[str] = Counter()
    for text, category in held:
        for name, other in variants(text).items():
            same[name] += decide([{"role": "user", "content": other}]).category == category
    rows = [f"{name} | {n / len(held):.3f}" for name, n in same.items()]
    return ["## The same request written otherwise", "", f"{len(held)} held-back texts.", "",
            *table("change | same category", rows)]  # fmt: skip


def timing(decide: Callable[..., Any], took: list[float]) -> list[str]:
    """CPU time of a decision."""
    took = sorted(took)
    rows = [f"a text, median | {statistics.median(took):.0f} µs",
            f"a text, 95 of 100 are under | {took[int(len(took) * 0.95)]:.0f} µs"]  # fmt: skip
    for name, text in junk().items():
        began = time.thread_time()
        decide([{"role": "user", "content": text}])
        rows.append(f"50 KB of {name} | {(time.thread_time() - began) * 1e3:.1f} ms")
    return ["## CPU time of a choice", "", *table("what | time", rows)]


def weak(sets: dict[tuple[str, str, str], Pairs], fresh: Pairs) -> list[str]:
    """The worst languages and sources, and the commonest mistakes."""
    languages: dict[str, Pairs] = defaultdict(list)
    for (kind, _, lang), found in sets.items():
        languages[lang] += found if kind != "trained on" else []
    worst = sorted((routing.accuracy(f), lang) for lang, f in languages.items() if f)
    lines = [f"- {lang}: {n:.3f} right" for n, lang in worst]
    sources = [(routing.accuracy(f), s, lang, len(f)) for (kind, s, lang), f in sets.items()
               if kind == "public" and len(f) >= 10]  # fmt: skip
    lines += [f"- {s} ({lang}, {n} texts): {a:.3f} right" for a, s, lang, n in sorted(sources)[:4]]
    wrong = Counter(pair for pair in fresh if pair[0] != pair[1]).most_common(4)
    lines += [f"- {n} times {got} instead of {wanted}" for (wanted, got), n in wrong]
    return ["## Where it is weak", "", *lines, ""]
