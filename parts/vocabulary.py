"""The built-in vocabulary: lists of words for the four built-in categories, and continuations.

`vocabulary.json` beside this file holds them, read once. The keywords in routes.json are a person's
own and add to it; `lists_of` says what of both counts. Until version 0.4.0 routes.json held the
lists themselves: such a file keeps its behaviour (`is_old_form`) until `slim` shortens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

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
