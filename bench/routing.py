"""How well and how quickly keywords choose a category, over a JSONL of labelled prompts.

    python bench/routing.py [FILE.jsonl] [--wrap] [--errors]
    python bench/routing.py --card [FILE.jsonl...]
    python bench/routing.py [FILE.jsonl] --ollama URL [--rows N]

`--card` writes bench/CARD.md, with public rows as arguments if there are any. Rows hold "lang",
"category" and either "text" or "messages". The shipped routes.json decides, with the same code as a
real request, in keywords mode. `--wrap` puts each text into the envelopes of chat clients, to see
what stripping loses. `--ollama` asks the model of routes.json at that address, one text at a time
and each once, and says how right it is alone, and hybrid by the margin under which it is asked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import router  # noqa: E402
from parts.classifier import CHARS, question_for, read_category  # noqa: E402
from parts.dialects import CHAT  # noqa: E402
from parts.errors import ClassifierError  # noqa: E402
from parts.livefile import read_file  # noqa: E402
from parts.table import load_table  # noqa: E402
from router import Chat, Chooser, Classifier, Decision, Flight  # noqa: E402

NAMES = ("tools", "code", "reasoning", "conversation")
ENVELOPES = (
    "[Sun 2026-11-22 20:58 UTC] {}\n\nRuntime: agent=main | session=x | os=Linux | shell=bash",
    'Sender (untrusted metadata):\n```json\n{{"name": "Ana"}}\n```\n\n{}',
    "[Telegram Ana id:12 +5m 2026-01-01 10:00 UTC] {}\n[message_id: 12]",
    "[Chat messages since your last reply - for context]\n"
    "[WhatsApp +1555 2026-01-18 00:19 PST] Bob: fix the python bug\n\n"
    "[Current message - respond to this]\n"
    "[WhatsApp +1555 2026-01-18 00:20 PST] Ana: {}\n[from: Ana (+1555)]",
    '{}\n\nConversation info: ⟦openclaw:ctx⟧\n```json\n{{"chat_id": "1"}}\n```',
    "<system-reminder>\nThe user opened main.py; run the tests.\n</system-reminder>\n{}",
)


class Patient:
    """Stands in for the Classifier: asks one text at a time, each once, and waits."""

    def __init__(self) -> None:
        self.answers: dict[bytes, str | None] = {}

    def ask(self, table: Any, text: str, _flight: Flight) -> str | None:
        """The category the model names, or None when it names none: then keywords decide."""
        question = question_for(table, text[:CHARS])
        if question.body not in self.answers:
            answer = requests.post(question.url, data=question.body, timeout=300)
            try:
                self.answers[question.body] = read_category(answer.content, table)
            except ClassifierError:
                self.answers[question.body] = None
        return self.answers[question.body]


def deciding(mode: str = "keywords", url: str = "", classifier: Any = None) -> Any:
    """A function from messages to a Decision, by the shipped routes.json; keywords alone if so."""
    table = load_table(read_file(ROOT / "routes.json"))
    ollama = {**table.ollama, "base_url": url}
    table = replace(table, mode=mode, ollama=ollama, classifier=None)
    chooser = Chooser(classifier or Classifier(lambda *_: b""))
    flight = Flight(None, time.monotonic)

    def decide(messages: list[dict[str, Any]]) -> Decision:
        return chooser.choose(
            Chat(b"", {"model": "router", "messages": messages}, (), CHAT), table, flight
        )

    return decide


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def messages_of(row: dict[str, Any], envelope: str = "{}") -> list[dict[str, Any]]:
    """The messages of a row; its text in an envelope."""
    return row.get("messages") or [{"role": "user", "content": envelope.format(row["text"])}]


def accuracy(pairs: list[tuple[str, str]]) -> float:
    """The share of (wanted, got) that agree."""
    return sum(a == b for a, b in pairs) / len(pairs)


def scores(pairs: list[tuple[str, str]], name: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of one category."""
    right = sum(a == b == name for a, b in pairs)
    got, wanted = sum(b == name for _, b in pairs), sum(a == name for a, _ in pairs)
    precision, recall = right / got if got else 0.0, right / wanted if wanted else 0.0
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def macro_f1(pairs: list[tuple[str, str]]) -> float:
    """The mean F1 of the categories that occur."""
    return statistics.mean(
        scores(pairs, name)[2] for name in NAMES if any(a == name for a, _ in pairs)
    )


def print_table(title: str, pairs: list[tuple[str, str]]) -> None:
    """Accuracy, macro-F1 and the confusion table."""
    figures = f"accuracy {accuracy(pairs):.3f}, macro-F1 {macro_f1(pairs):.3f}"
    print(f"\n{title}: {len(pairs)} prompts, {figures}")
    print(
        f"  {'wanted / got':14s}"
        + "".join(f"{n[:9]:>10s}" for n in NAMES)
        + "  precision recall   F1"
    )
    counts = Counter(pairs)
    for name in NAMES:
        row = "".join(f"{counts[name, other]:10d}" for other in NAMES)
        precision, recall, f1 = scores(pairs, name)
        print(f"  {name:14s}{row}  {precision:9.2f} {recall:6.2f} {f1:4.2f}")


def print_margins(found: list[tuple[float, bool]]) -> None:
    """How right answers are by margin, and where they are right 95 % of the time."""
    print("\nmargin at least   share   right")
    for threshold in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8):
        band = [right for margin, right in found if margin >= threshold]
        if band:
            print(f"  {threshold:14.2f} {len(band) / len(found):7.1%} {sum(band) / len(band):7.1%}")


def print_hybrid(rows: list[dict[str, Any]], url: str) -> None:
    """How right the model at `url` is alone, and hybrid by the margin under which it is asked."""
    patient = Patient()
    print(f"{len(rows)} prompts\n\nasked when the margin is under   asked   right")
    for threshold in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, None):
        router.SURE_MARGIN = threshold or 0.0
        decide = deciding("ollama" if threshold is None else "hybrid", url, patient)
        found = [(decide(messages_of(row)), row["category"]) for row in rows]
        asked = sum(decision.mode == "ollama" for decision, _ in found) / len(rows)
        right = accuracy([(wanted, decision.category) for decision, wanted in found])
        print(f"{'always' if threshold is None else threshold:>31} {asked:7.1%} {right:7.1%}")
    said = list(patient.answers.values())
    print(f"\n{said.count(None)} of {len(said)} answers named no category")


def main() -> int:
    """Print the figures of a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--card", action="store_true", help="write bench/CARD.md")
    parser.add_argument("--wrap", action="store_true", help="put each text into clients' envelopes")
    parser.add_argument("--errors", action="store_true", help="print what went wrong")
    parser.add_argument("--ollama", metavar="URL", help="ask the model there, alone and in hybrid")
    parser.add_argument("--rows", type=int, default=0, help="take so many by chance, always these")
    args = parser.parse_args()
    if args.card:
        import card

        print(card.write(args.files))
        return 0
    rows = rows_of(args.files[0] if args.files else ROOT / "tests" / "routing_examples.jsonl")
    if 0 < args.rows < len(rows):
        rows = random.Random(1).sample(rows, args.rows)
    if args.ollama:
        print_hybrid(rows, args.ollama)
        return 0
    decide, took = deciding(), []
    pairs: dict[str, list[tuple[str, str]]] = {}
    margins = []
    for n, row in enumerate(rows):
        messages = messages_of(row, ENVELOPES[n % len(ENVELOPES)] if args.wrap else "{}")
        began = time.thread_time()
        decision = decide(messages)  # the first look: a second one would be remembered
        took.append((time.thread_time() - began) * 1e6)
        pairs.setdefault(row["lang"], []).append((row["category"], decision.category))
        margins.append((decision.margin, decision.category == row["category"]))
        if args.errors and decision.category != row["category"]:
            print(f"{row['category']} -> {decision.category}: {str(messages[-1])[:150]}")
            print(f"    because of {decision.reason}")
    for lang, found in sorted(pairs.items()):
        print_table(lang, found)
    print_table("all", [pair for found in pairs.values() for pair in found])
    print_margins(margins)
    took = took[1:]  # the first one builds the matcher
    print(f"\nµs per prompt: median {statistics.median(took):.0f}, most {max(took):.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
