"""Quotas of a whole upstream: what refuses three of its models in the same words refuses all.

Each model of such an upstream would cost a request its time to say so. The others are held as if
they had been asked: until the wait that the third one told, at most `recovery_timeout_sec`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from parts.errors import Failure
from parts.lru import Lru
from parts.table import Model, Table

ENOUGH = 3  # models; two may each have a limit of their own


class Quotas:
    """Remembers which models of an upstream are refused in which words, while they are."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._refused = Lru(200)  # (upstream, which models, words) -> ((model, until), ...)

    def refused(self, model: Model, failure: Failure, table: Table, breakers: Any) -> None:
        """Note that `model` is refused; with the third one, hold the others in `breakers`.

        Where all three are free ones, only free ones are: others are paid for, and have no part
        in that quota.
        """
        if failure.outcome != "rate_limited" or failure.retry_after_s is None:
            return
        now, wait_s = self._clock(), failure.retry_after_s
        key = model.upstream.name, is_free(model), words_of(model, failure.message)
        held = {id_: until for id_, until in self._refused.get(key) or () if until > now}
        held[model.id] = now + wait_s
        self._refused.put(key, tuple(held.items()))
        if len(held) < ENOUGH:
            return
        others = [m for m in table.models.values() if m.upstream.name == model.upstream.name
                  and m.id not in held and m.id in table.chain_ids
                  and (is_free(m) or not is_free(model))]  # fmt: skip
        circuits = breakers.snapshot()
        for other in others:
            if circuits.get(other.id, {"state": "closed"})["state"] != "closed":
                continue
            ticket = breakers.admit(other.id, 1.0)
            if ticket:  # held, and no nearer to an open circuit than by one strike
                calm = {**table.breaker, "failure_threshold": math.inf}
                breakers.settle(ticket, "strike", calm, "rate_limited", 429, wait_s)


def is_free(model: Model) -> bool:
    """As OpenRouter has them: with a quota of their own for all of them."""
    return model.called.endswith(":free")


def words_of(model: Model, message: str) -> str:
    """What says which quota it is: the words without the model's name and without figures."""
    for name in (model.called, model.short):
        message = message.replace(name, "")
    return re.sub(r"[\W\d_]+", " ", message.lower())[:200]
