"""Makes parts/words.json, the table of words that gives the keywords a second opinion.

    python bench/train_words.py [FILE.jsonl...]

It learns from the project's own prompts (tests/routing_examples.jsonl and bench/prompts.jsonl,
without the third of them that is held back for the tests) and from public rows, which are not in
the repository: bench/ATTRIBUTION.md says where they come from. Rows hold "text" and "category".

It is a multinomial logistic regression by Adagrad over the features of parts/vocabulary.py, each
text's features scaled to length 1, the categories in balance, a row of our own as heavy as twelve
others. Trained once on all features, then again on those that told most. The same rows make the
same file, byte for byte; it takes a minute and no package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from parts.prompts import cap, read  # noqa: E402
from parts.vocabulary import pairs_of, pieces_of  # noqa: E402

NAMES = ("tools", "code", "reasoning", "conversation")
OWN = (ROOT / "tests" / "routing_examples.jsonl", ROOT / "bench" / "prompts.jsonl")
OWN_WEIGHT = 12.0
EPOCHS = 10
RATE = 0.3
DECAY = 0.02  # much: a table that is never sure goes well with lists
KEPT = 10_000  # features; a quarter of them loses half of what the table gains

Row = tuple[tuple[str, ...], int, float]  # features, category, weight


def is_held_back(row: dict[str, Any]) -> bool:
    """Whether a row of the project's own is one of the third that nothing is trained on."""
    return int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 3 == 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that are one text."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "text" in row]


def as_row(row: dict[str, Any], weight: float) -> Row:
    """What is learnt of a row."""
    words = read(cap(row["text"])).wanted
    features = [*pairs_of(words), *(piece for word in words for piece in pieces_of(word))]
    return tuple(features), NAMES.index(row["category"]), weight


def balanced(rows: list[Row]) -> list[Row]:
    """The rows with weights that are 1 on average and sum up to the same for each category."""
    sums = Counter[int]()
    for _, category, weight in rows:
        sums[category] += weight  # type: ignore[assignment]
    share = len(rows) / len(NAMES)
    return [(features, c, weight * share / sums[c]) for features, c, weight in rows]


def train(rows: list[Row], features: Iterable[str]) -> tuple[list[float], dict[str, list[float]]]:
    """(bias, {feature: weights}) of the regression over these features."""
    weights = {name: [0.0] * len(NAMES) for name in features}
    squares = {name: [1e-4] * len(NAMES) for name in weights}
    bias, bias_squares = [0.0] * len(NAMES), [1e-4] * len(NAMES)
    ready = []
    for n, (found, category, weight) in enumerate(balanced(rows)):
        known = [name for name in found if name in weights]
        pairs = [(weights[name], squares[name]) for name in known]
        ready.append((hashlib.sha256(f"{n}".encode()).digest(), pairs, category, weight))
    ready.sort(key=lambda row: row[0])  # mixed, and the same every time
    means = {name: [0.0] * len(NAMES) for name in weights}
    for epoch in range(EPOCHS):
        for _, pairs, category, weight in ready if epoch % 2 else ready[::-1]:
            scale = 1 / math.sqrt(len(pairs) or 1)
            logits = [b + scale * sum(w[k] for w, _ in pairs) for k, b in enumerate(bias)]
            top = max(logits)
            odds = [math.exp(logit - top) for logit in logits]
            total = sum(odds)
            for k, odd in enumerate(odds):
                slope = weight * (odd / total - (k == category))
                bias_squares[k] += slope * slope
                bias[k] -= 0.1 * slope / math.sqrt(bias_squares[k])
                slope *= scale
                square = slope * slope
                for w, s in pairs:
                    s[k] += square
                    w[k] -= RATE * (slope + DECAY * w[k]) / math.sqrt(s[k])
        if epoch >= EPOCHS // 2:  # the mean of the second half hangs less on the last rows
            for name, w in weights.items():
                means[name] = [a + b for a, b in zip(means[name], w, strict=True)]
    share = EPOCHS - EPOCHS // 2
    return bias, {name: [sum_ / share for sum_ in w] for name, w in means.items()}


def chosen(rows: list[Row], weights: dict[str, list[float]]) -> list[str]:
    """The features that tell most: how far apart their weights are, times how often they occur."""
    often = Counter(name for features, _, _ in rows for name in set(features))
    told = {name: (max(w) - min(w)) * math.sqrt(often[name]) for name, w in weights.items() if w}
    return sorted(sorted(told, key=lambda name: (-told[name], name))[:KEPT])


def learn(rows: list[Row]) -> tuple[list[float], dict[str, list[int]]]:
    """(bias, {feature: weights in tenths}) of the features that tell most."""
    seen = Counter[str]()
    for features, _, weight in rows:
        seen.update(dict.fromkeys(features, 2 if weight > 1 else 1))
    _, first = train(rows, [name for name, n in seen.items() if n > 1])
    bias, weights = train(rows, chosen(rows, first))
    tenths = {}
    for name, w in weights.items():
        tenths[name] = [round(10 * (x - min(w))) for x in w]
    return [round(b, 2) for b in bias], {name: w for name, w in tenths.items() if any(w)}


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="public rows, see bench/ATTRIBUTION.md")
    args = parser.parse_args()
    own = [row for path in OWN for row in rows_of(path) if not is_held_back(row)]
    public = [row for path in args.files for row in rows_of(path)]
    rows = [as_row(row, OWN_WEIGHT) for row in own] + [as_row(row, 1.0) for row in public]
    bias, words = learn(rows)
    sources = Counter(row.get("source", "?") for row in public)
    head = {
        "about": "made by bench/train_words.py, weights in tenths; see bench/ATTRIBUTION.md",
        "rows": {"own": len(own), **dict(sorted(sources.items()))},
        "categories": NAMES,
        "bias": bias,
    }
    lines = [f"{json.dumps(name, ensure_ascii=False)}:{json.dumps(w, separators=(',', ':'))}"
             for name, w in sorted(words.items())]  # fmt: skip
    body = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    text = body + ',\n "words": {\n' + ",\n".join(lines) + "\n }\n}\n"
    (ROOT / "parts" / "words.json").write_text(text, encoding="utf-8")
    print(f"{len(rows)} rows, {len(words)} features, {len(text) // 1024} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
