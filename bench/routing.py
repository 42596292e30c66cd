"""How well and how quickly keywords choose a category, over a JSONL of labelled prompts.

    python bench/routing.py [FILE.jsonl] [--wrap] [--errors]
    python bench/routing.py --card [FILE.jsonl...]

`--card` writes bench/CARD.md, with public rows as arguments if there are any. Rows hold "lang",
"category" and either "text" or "messages". The shipped routes.json decides, with the same code as a
real request, in keywords mode. `--wrap` puts each text into the envelopes of chat clients, to see
what stripping loses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from parts.dialects import CHAT  # noqa: E402
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


def deciding() -> Any:
    """A function from messages to a Decision, by the shipped routes.json and keywords alone."""
    table = load_table(read_file(ROOT / "routes.json"))
    table = replace(table, mode="keywords")
    chooser = Chooser(Classifier(lambda *_: b""))
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


def main() -> int:
    """Print the figures of a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--card", action="store_true", help="write bench/CARD.md")
    parser.add_argument("--wrap", action="store_true", help="put each text into clients' envelopes")
    parser.add_argument("--errors", action="store_true", help="print what went wrong")
    args = parser.parse_args()
    if args.card:
        import card

        print(card.write(args.files))
        return 0
    rows = rows_of(args.files[0] if args.files else ROOT / "tests" / "routing_examples.jsonl")
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
