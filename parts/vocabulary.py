"""The built-in vocabulary: lists of words for the four built-in categories, continuations, and a
learnt table that gives a second opinion.

`vocabulary.json` and `words.json` beside this file hold them, read once. The keywords in
routes.json are a person's own and add to it; `lists_of` says what of both counts. Until version
0.4.0 routes.json held the lists themselves: such a file keeps its behaviour (`is_old_form`) until
`slim` shortens it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CONTINUATIONS = "(continuations)"  # stands beside categories: none can be called so
# A person's own plain keyword counts like a heavy built-in one, or two ordinary ones.
OWN = 3.0


@lru_cache(maxsize=1)
def vocabulary() -> Mapping[str, Any]:
    """vocabulary.json: {lists: {name: entries}, since_0.4.0: {name: {new, gone}}}."""
    found: Mapping[str, Any] = json.loads((HERE / "vocabulary.json").read_text(encoding="utf-8"))
    return found


def built_in(name: str) -> tuple[str, ...]:
    """The built-in entries of the category `name`, or of CONTINUATIONS."""
    return tuple(vocabulary()["lists"].get(name, ()))


@lru_cache(maxsize=8)
def of_0_4_0(name: str) -> frozenset[str]:
    """The same as routes.json of version 0.4.0 held them."""
    since = vocabulary()["since_0.4.0"].get(name, {})
    return frozenset(built_in(name)).difference(since.get("new", ())).union(since.get("gone", ()))


def is_old_form(name: str, entries: Iterable[str]) -> bool:
    """Whether a file holds 0.4.0's list for `name` itself, perhaps edited: half of it, or more."""
    old = of_0_4_0(name)
    return bool(old) and 2 * len(old.intersection(entries)) >= len(old)


def lists_of(name: str, entries: Sequence[str],
             wanted: bool = True) -> tuple[Sequence[str], Sequence[str]]:  # fmt: skip
    """(built-in entries, a person's own) that count for `name`, whose keywords are `entries`.

    The list of a file of the old form stands in the place of the built-in one.
    """
    if is_old_form(name, entries):
        return entries, ()
    return (built_in(name) if wanted else ()), entries


def words_of(entry: str) -> str:
    """`word*` of `Word*^3`: what makes two entries the same."""
    return entry.rpartition("^")[0].strip().lower() if "^" in entry else entry.strip().lower()


def slim(name: str, entries: Sequence[str]) -> list[str]:
    """A list of the old form as a person's own: what was added, `word^0` for what was taken out."""
    if not is_old_form(name, entries):
        return list(entries)
    old, now = of_0_4_0(name), {words_of(entry) for entry in built_in(name)}
    kept = {words_of(entry) for entry in entries}
    mine = []
    for entry in entries:
        word, _, weight = entry.rpartition("^")
        if entry in old:
            continue
        # One that was built in with another weight counts OWN times more from now on.
        known = word and words_of(entry) in now and name != CONTINUATIONS
        mine.append(f"{word}^{round(float(weight) / OWN, 2):g}" if known else entry)
    gone = sorted({words_of(entry) for entry in old} - kept)
    return mine + [f"{word}^0" for word in gone if word in now]


# --- the learnt table ----------------------------------------------------------------------------

SECOND = 0.5  # what the table's opinion weighs beside the lists' share: by cross-validation
DAMP = 2.0  # one light hit is not the whole truth: the lists' share grows with what they found
ALONE = 0.5  # where no list has a word for it, the table must be this sure, or it is silent
FEW = 2  # of fewer known words and pairs it has no opinion


def pieces_of(word: str) -> list[str]:
    """The word itself, `#` for a number, and its pieces of four letters (`~_wri`)."""
    if word.isdigit():
        return ["#"]
    whole = f"_{word}_"
    at = range(len(whole) - 3) if len(word) > 4 else ()
    return [word, *("~" + whole[n : n + 4] for n in at)]


def pairs_of(words: Sequence[str]) -> list[str]:
    """The pairs of neighbours; `^ write` is the first word, `please $` the last."""
    plain = ["^", *["#" if word.isdigit() else word for word in words], "$"]
    return [*map(" ".join, pairwise(plain))]


class Opinion(NamedTuple):
    """What the table makes of a text: {category: probability}, and the features it knew."""

    shares: dict[str, float]
    known: list[tuple[str, tuple[int, ...]]]  # words and pairs, with a weight for each category
    scale: float


class Learnt:
    """A linear table: words, pairs and pieces, each with a weight for each category, in tenths.

    Of a feature's weights the smallest is 0: only their differences count.
    """

    def __init__(self, names: Sequence[str], bias: Sequence[float],
                 weights: Mapping[str, tuple[int, ...]],
                 muted: Sequence[tuple[str, str, bool]] = ()):  # fmt: skip
        self.names = tuple(names)
        self._muted = [
            (self.names.index(name), word, is_prefix)
            for name, word, is_prefix in muted
            if name in self.names
        ]
        self._bias = tuple(bias)
        self._weights = weights
        self._word = lru_cache(maxsize=4096)(self._sum_of)  # the same words come again and again

    def _sum_of(self, word: str) -> tuple[int, tuple[int, ...], tuple[int, ...] | None]:
        """(how many of its features are known, the sum of their weights, the word's own)."""
        pieces = pieces_of(word)
        find = self._weights.get
        found = [weights for name in pieces if (weights := find(name))]
        sums = tuple(map(sum, zip(*found, strict=True)))
        own = find(pieces[0])
        if self._muted:
            sums, own = self._quiet(sums, word), own and self._quiet(own, word)
        return len(found), sums, own

    def opinion(self, words: Sequence[str]) -> Opinion | None:
        """What it makes of these words; None when it knows too few of them and their pairs."""
        find, of_word = self._weights.get, self._word
        known = [(pair, found) for pair in pairs_of(words) if (found := find(pair))]
        vectors, n = [found for _, found in known], len(known)
        for word in words:
            count, sums, own = of_word(word)
            if count:
                n += count
                vectors.append(sums)
                if own:
                    known.append((word, own))
        if len(known) < FEW:
            return None
        scale = 0.1 / math.sqrt(n)
        columns = zip(*vectors, strict=True)
        logits = [b + scale * sum(column) for b, column in zip(self._bias, columns, strict=True)]
        top = max(logits)
        odds = [math.exp(logit - top) for logit in logits]
        total = sum(odds)
        shares = {name: odd / total for name, odd in zip(self.names, odds, strict=True)}
        return Opinion(shares, known, scale)

    def heaviest(self, opinion: Opinion, name: str) -> list[tuple[str, float]]:
        """The few words or pairs that speak most for the category `name`."""
        n = self.names.index(name)
        scale, size = SECOND * opinion.scale, len(self.names)
        said = [(w[n] * size - sum(w), word) for word, w in opinion.known if w[n] > 9]
        said.sort(reverse=True)
        best = dict.fromkeys(said[:4])
        return [(f"~{word}", round(scale * more / size, 2)) for more, word in best if more > size]

    def _quiet(self, weights: tuple[int, ...], feature: str) -> tuple[int, ...]:
        """The weights of a word or pair, without those for which it is muted."""
        out = {
            n for n, word, is_prefix in self._muted for part in feature.split(" ")
            if part == word or (is_prefix and part.startswith(word))
        }  # fmt: skip
        return tuple([min(weights) if n in out else w for n, w in enumerate(weights)])

    def without(self, muted: Sequence[tuple[str, str, bool]]) -> Learnt:
        """The same table, in which each (category, word, or with True its beginning) is muted."""
        if not muted:
            return self
        quiet = Learnt(self.names, self._bias, {}, muted)
        weights = {
            name: quiet._quiet(found, name) if " " in name else found
            for name, found in self._weights.items()
        }
        return Learnt(self.names, self._bias, weights, muted)


@lru_cache(maxsize=1)
def learnt() -> Learnt:
    """The table of words.json, which bench/train_words.py makes."""
    raw = json.loads((HERE / "words.json").read_text(encoding="utf-8"))
    # Small integers, in tuples: lists of floats were three times as slow on a busy machine.
    words = {word: tuple(weights) for word, weights in raw["words"].items()}
    return Learnt(raw["categories"], raw["bias"], words)


def mixed(scores: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Each category's share of the lists' score, and of the table's opinion; together under 1.

    Where the lists say nothing the table alone decides, or nobody.
    """
    total = sum(scores.values())
    if not total and max(shares.values(), default=0.0) < ALONE:
        return {}
    return {
        name: (score / (total + DAMP) + SECOND * shares.get(name, 0.0)) / (1 + SECOND)
        for name, score in scores.items()
    }
