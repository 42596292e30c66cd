"""llm-router: many language models behind one OpenAI-compatible endpoint.

The path of a request, which is also the order of this file, top to bottom:

    serve_chat -> guard -> read_chat (limits, JSON, check) -> the table, taken once, immutable
           (chat completions, Messages, Responses and embeddings alike: see parts/dialects.py)
           -> Chooser.choose (category, mode, reason) -> the category's fallback chain
           -> walk: for each model Breakers.admit -> Upstreams.open -> check_head -> Relay
           -> ChatResponse (whole, or stream: keepalive.py) -> finish: exactly one Metrics.record

Who owns which state, each object with one private lock:

    Store        the routing table read from routes.json; swapped whole    (livefile.py)
    Breakers     one circuit per model
    Classifier   the cache of recent answers of the Ollama model
    Flights      what is in the air: permits, sockets, deadlines           (flights.py)
    Turns        which model has a turn or a conversation                  (turns.py)
    Carrier      the streams that one thread passes on                     (carrier.py)
    Metrics      counters and the ring of recent requests                  (metrics.py)
    History      requests and spending, which outlast the process          (history.py)

What this file stands on is in parts/, floor by floor (tests/test_floors.py); nothing there imports
it. Importing this module starts nothing: `create_app` builds the objects.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import re
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from urllib.parse import quote

if __name__ == "__main__":  # from a fresh checkout, with whatever Python was typed
    from parts import bootstrap

    bootstrap.use_environment()

import flask
import requests

from parts.access import (
    CLIENT,
    as_router_error,
    cors_headers,
    guard,
    preflight,
    read_page,
)  # fmt: skip
from parts.carrier import Carrier
from parts.chat import Chat, chat_of, check, parse_body, read_body, read_chat
from parts.classifier import (
    CHARS,
    Question,
    asked_model,
    patience_s,
    question_for,
    read_category,
    refusal,
)  # fmt: skip
from parts.clients import Clients
from parts.command import main
from parts.dialects import CHAT, DIALECT_AT, Dialect, dialect_of, passed_on
from parts.errors import ClassifierError, Failure, RouterError, known_part, scrub
from parts.exchange import MAX_ERROR, Endpoint, Reply, new_session, read_whole
from parts.flights import NEVER, Flight, Flights
from parts.history import History
from parts.judge import (
    DOUBTFUL,
    THINK_REFUSED,
    VERDICTS,
    check_head,
    mendable,
    ollama_trouble,
    refused_key,
    says_nothing,
    sentence,
    still_worth_trying,
)
from parts.keepalive import Walk
from parts.livefile import Store
from parts.logs import log_rejections, log_to_stderr, now_text
from parts.metrics import Attempt, Metrics, Record
from parts.notify import Notifier
from parts.prompts import (
    HEAD,
    LOOK_BACK,
    Continuations,
    Hit,
    cap,
    machine_call,
    parse_entry,
    points_back,
    read,
    without_lone_name,
)  # fmt: skip
from parts.quotas import Quotas
from parts.relay import Relay
from parts.settings import VERSION, Settings, SettingsError
from parts.table import BUILT_IN, Model, Table, Upstream, load_table
from parts.turns import NO_TURN, Turn, Turns, session_of
from parts.views import shown
from parts.vocabulary import CONTINUATIONS, OWN, Learnt, Opinion, learnt, lists_of, mixed

if TYPE_CHECKING:
    from parts.cluster import CircuitState, Cluster

HERE = Path(__file__).resolve().parent
log = logging.getLogger("llm_router")


# --- circuit breakers --------------------------------------------------------------------------


@dataclass
class Circuit:
    """One model's circuit. Times are of the injected monotonic clock, in seconds."""

    generation: int
    strikes: int = 0
    is_open: bool = False
    first_open: float | None = None
    due: float = 0.0  # open: nobody before this
    hold: float = 0.0  # Retry-After: nobody before this, open or closed
    lease: float = 0.0  # half-open: the probe's verdict is awaited until then
    in_air: int = 0
    reason: str = ""
    last_status: int | None = None
    since: str = ""

    def state(self, now: float) -> str:
        """closed, open or half-open; a held model counts as open: nobody may go."""
        if self.is_open and now < self.lease:
            return "half-open"
        return "open" if self.is_open or now < self.hold else "closed"

    def lets_go(self, now: float, early: bool = False) -> bool:
        """True when a request may go now; `early`: a probe although none is due yet."""
        due = early or now >= self.due
        return now >= self.hold and (not self.is_open or (now >= self.lease and due))


def shared(circuit: Circuit | None) -> tuple[bool, float, float] | None:
    """What of a circuit the peers know."""
    return (circuit.is_open, circuit.due, circuit.hold) if circuit else None


@dataclass
class Ticket:
    """Leave to try one model once. `Breakers.settle` it once, whatever happened."""

    model: str
    circuit: Circuit
    generation: int
    probe: bool
    settled: bool = False

    @property
    def is_current(self) -> bool:
        """False when the circuit opened, was probed or reset since: the result is void."""
        return self.generation == self.circuit.generation


class Peers(Protocol):
    """Other instances that share these circuits (parts/cluster.py)."""

    def lend(self, model: str, generation: int, lease_s: float) -> float:
        """0.0 when the probe may go out here, else in how many seconds to ask again; asks Redis."""

    def tell(self, model: str = "", generation: int | None = None) -> None:
        """Something changed here; with `generation`: that probe of `model` ended. Never waits."""


ALL = ""  # no model has this name: all models were reset, also those that only peers know


class Breakers:
    """A circuit per model: failing models are passed over, one probe tells when they are back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, peers: Peers | None = None):
        self._clock = clock
        self._peers = peers  # asked and told without the lock
        self._lock = threading.Lock()  # guards all below; never held during I/O or logging
        self._circuits: dict[str, Circuit] = {}
        self._generation = 0
        self._forgotten: set[str] = set()  # reset, and the peers have yet to hear of it

    def admit(self, model: str, lease_s: float, *, early: bool = False) -> Ticket | None:
        """A ticket, or None while the circuit is open; a ticket for an open one is its probe."""
        now = self._clock()
        with self._lock:
            circuit = self._circuits.get(model)
            if circuit is None:
                circuit = self._circuits[model] = Circuit(self._next_generation())
            if not circuit.lets_go(now, early):
                return None
            if circuit.is_open:
                circuit.lease, circuit.generation = now + lease_s, self._next_generation()
            circuit.in_air += 1
            ticket = Ticket(model, circuit, circuit.generation, circuit.is_open)
        if ticket.probe:
            if self._peers and (wait_s := self._peers.lend(model, ticket.generation, lease_s)):
                self._leave_to_peers(ticket, wait_s)
                return None
            log.info("circuit_half_open", {"model": model})
        return ticket

    def _leave_to_peers(self, ticket: Ticket, wait_s: float) -> None:
        """Another instance probes: the circuit is half-open here too, and asked about later."""
        now = self._clock()
        with self._lock:
            ticket.circuit.in_air -= 1
            ticket.circuit.lease = now + wait_s

    def would_admit(self, model: str) -> bool:
        """True when a request that asked now would get a ticket."""
        now = self._clock()
        with self._lock:
            circuit = self._circuits.get(model)
            return circuit is None or circuit.lets_go(now)

    def due_soonest(self, models: Sequence[str]) -> str | None:
        """When none of `models` admits: the open one not held whose probe is due first, or None."""
        now = self._clock()
        with self._lock:
            circuits = [self._circuits.get(model) for model in models]
            if any(c is None or c.lets_go(now) for c in circuits):
                return None
            ready = [(c.due, model) for model, c in zip(models, circuits, strict=True)
                     if c and c.is_open and now >= c.hold]  # fmt: skip
        return min(ready)[1] if ready else None

    def commit(self, ticket: Ticket, threshold: float) -> None:
        """The answer has begun: a probe closes its circuit, one strike short of opening again."""
        with self._lock:
            closes = ticket.probe and ticket.is_current
            if closes:
                circuit = ticket.circuit
                circuit.is_open, circuit.lease, circuit.strikes = False, 0.0, int(threshold) - 1
                ticket.probe = False
        if closes:
            log.info("circuit_closed", {"model": ticket.model})
            if self._peers is not None:
                self._peers.tell(ticket.model, ticket.generation)

    def settle(self, ticket: Ticket, verdict: str, config: Mapping[str, float], reason: str = "",
               status: int | None = None, retry_after_s: float | None = None) -> None:  # fmt: skip
        """Book the end of an attempt: verdict is `good`, `strike` or `none` (it says nothing).

        A result of an older generation is void. A probe without a verdict leaves the circuit
        open and due as it was, so the next request probes.
        """
        now, circuit, opened = self._clock(), ticket.circuit, False
        with self._lock:
            if ticket.settled:
                return
            ticket.settled = True
            circuit.in_air -= 1
            if ticket.is_current:
                if ticket.probe:
                    circuit.lease = 0.0
                elif verdict == "good":
                    circuit.strikes, circuit.first_open = 0, None
                if verdict == "strike":
                    circuit.reason, circuit.last_status = reason, status
                    opened = self._strike(circuit, now, config, retry_after_s)
        if opened:
            told = {"model": ticket.model, "reason": reason, "status": status}
            log.warning("circuit_opened", told)
        if self._peers is not None and (opened or ticket.probe or retry_after_s is not None):
            self._peers.tell(ticket.model, ticket.generation if ticket.probe else None)

    def _strike(self, circuit: Circuit, now: float, config: Mapping[str, float],
                retry_after_s: float | None) -> bool:  # fmt: skip
        """Count it; True when the circuit opens by it (again)."""
        circuit.strikes += 1
        longest = config["recovery_timeout_sec"]
        if circuit.strikes == 1:
            circuit.since = now_text()
        if retry_after_s is not None:
            circuit.hold = now + min(max(retry_after_s, 1.0), longest)
        if not circuit.is_open and circuit.strikes < config["failure_threshold"]:
            return False
        if circuit.first_open is None:
            circuit.first_open = now
        grown = (now - circuit.first_open) / 4  # down for an hour: tried every 5 minutes
        circuit.due = now + min(longest, max(config["first_retry_sec"], grown))
        circuit.is_open, circuit.lease, circuit.generation = True, 0.0, self._next_generation()
        return True

    def reset(self, models: Iterable[str] | None = None) -> None:
        """Forget everything about `models` (default: all), at once."""
        with self._lock:
            chosen = list(self._circuits) if models is None else list(models)
            for model in chosen:
                self._drop(model)
            if self._peers is not None:
                self._forgotten |= {*chosen, *([ALL] if models is None else ())}
        log.info("circuits_reset", {"models": ",".join(chosen)})
        if self._peers is not None:
            self._peers.tell()

    def keep_only(self, models: frozenset[str]) -> bool:
        """Drop circuits of all other models; False while something of them is in the air."""
        with self._lock:
            others = [model for model in self._circuits if model not in models]
            idle = [model for model in others if not self._circuits[model].in_air]
            for model in idle:
                self._drop(model)
        return len(idle) == len(others)

    def _drop(self, model: str) -> None:
        circuit = self._circuits.pop(model, None)
        if circuit:  # results in the air are void
            circuit.generation = self._next_generation()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """{model: {state, strikes, retry_in_sec, reason, last_status, since}} of every circuit."""
        now = self._clock()
        with self._lock:
            circuits = {model: replace(circuit) for model, circuit in self._circuits.items()}
        return {
            model: {"state": c.state(now), "strikes": c.strikes,
                    "retry_in_sec": round(max(c.hold, c.due if c.is_open else now, now) - now, 1),
                    "reason": c.reason, "last_status": c.last_status, "since": c.since}
            for model, c in circuits.items()
        }  # fmt: skip

    def news(self) -> tuple[dict[str, Circuit], set[str]]:
        """For the peers: a copy of every circuit, and what was reset since they last asked."""
        with self._lock:
            circuits = {model: replace(circuit) for model, circuit in self._circuits.items()}
            forgotten, self._forgotten = self._forgotten, set()
        return circuits, forgotten

    def hear(self, model: str, state: CircuitState | None, known: Circuit | None) -> bool:
        """Take over a peer's circuit (None: its reset); False if ours is not as `known` any more.

        What changed here meanwhile is told first: the peers decide which of the two came first.
        """
        with self._lock:
            ours = self._circuits.get(model)
            if not self._forgotten.isdisjoint((model, ALL)) or shared(ours) != shared(known):
                return False
            self._drop(model)
            if state is not None:
                heard = self._circuits[model] = Circuit(self._next_generation(), **vars(state))
                if ours and not (ours.is_open or state.is_open):
                    heard.strikes = ours.strikes  # before it opens they are each instance's own
        return True

    def _next_generation(self) -> int:
        self._generation += 1
        return self._generation


# --- choosing a category -----------------------------------------------------------------------

# Words of code hardly occur elsewhere, those of science everywhere: half a point, measured.
MULTIPLIERS = {"tools": 1.0, "code": 1.1, "reasoning": 0.9, "conversation": 1.0}
USER_MADE = 4.0  # whoever adds a category wants it: one plain keyword outdoes a weak built-in hit


class Choice(NamedTuple):
    """A category (None: nothing scored), how sure (0..1), and the entries that decided."""

    category: str | None
    margin: float
    score: float = 0.0
    matched: tuple[Hit, ...] = ()


class Index:
    """Entries of categories by the words they begin with. A copy shares what it does not change."""

    def __init__(self, other: Index | None = None):
        self.exact: dict[str, tuple[Hit, ...]] = dict(other.exact) if other else {}
        self.prefix: dict[str, tuple[Hit, ...]] = dict(other.prefix) if other else {}
        # up to 3 letters -> how long the prefixes are
        self.stems: dict[str, frozenset[int]] = dict(other.stems) if other else {}
        # two words (or one) -> how many a phrase has
        self.sizes: dict[str, frozenset[int]] = dict(other.sizes) if other else {}
        # these, with a prefix at the end -> how long it is in all
        self.lengths: dict[tuple[str, int], frozenset[int]] = dict(other.lengths) if other else {}

    def add(self, name: str, entry: str, times: float = 1.0) -> None:
        """One entry of category `name`, before those that begin with the same words."""
        words, is_prefix, weight = parse_entry(entry)
        key, size = " ".join(words), len(words)
        hit = name, entry.partition("^")[0], weight * times
        place = self.prefix if is_prefix else self.exact
        hits = place.get(key, ())
        if not weight or any(other[0] == name and other[2] >= hit[2] for other in hits):
            return  # the same words in one category tell one thing
        place[key] = (hit, *hits)
        if size == 1:
            if is_prefix:
                self.stems[key[:3]] = self.stems.get(key[:3], frozenset()) | {len(key)}
            return
        head = words[0] if is_prefix and size == 2 else " ".join(words[:2])
        self.sizes[head] = self.sizes.get(head, frozenset()) | {size}
        if is_prefix:
            at = head, size
            self.lengths[at] = self.lengths.get(at, frozenset()) | {len(key)}

    def drop(self, name: str, words: Sequence[str], is_prefix: bool) -> None:
        """What category `name` says of these words."""
        place, key = self.prefix if is_prefix else self.exact, " ".join(words)
        if key in place:
            place[key] = tuple([hit for hit in place[key] if hit[0] != name])


@lru_cache(maxsize=2)  # to add them all takes 10 ms, and each edit of a keyword needs them
def index_of(lists: tuple[tuple[str, tuple[str, ...]], ...]) -> Index:
    """The built-in entries: (category, its entries)."""
    index = Index()
    for name, entries in lists:
        for entry in entries:
            index.add(name, entry)
    return index


class Keywords:
    """A routing table's keywords, ready to match: cost grows with the prompt, not the lists."""

    def __init__(self, lists: Mapping[str, Iterable[str]],
                 built_in: Mapping[str, Iterable[str]] = MappingProxyType({})):  # fmt: skip
        self.multipliers = {name: MULTIPLIERS.get(name, USER_MADE) for name in lists}
        # Each step of a tool loop asks about the same text, each follow-up about the one before.
        self._remembered = lru_cache(maxsize=256)(self._match)
        self._single = lru_cache(maxsize=4096)(self._of_word)  # the same words come again and again
        self._builtin = {name for name in lists if name in BUILT_IN and built_in.get(name)}
        self._own = {(name, entry.partition("^")[0]) for name in lists for entry in lists[name]}
        self._index = Index(index_of(tuple(
            (name, tuple(built_in[name])) for name in lists if built_in.get(name)
        )))  # fmt: skip
        muted: list[tuple[str, str, bool]] = []
        # User-made ones last, and so first of all that begin with the same words: they win ties.
        for name in sorted(lists, key=BUILT_IN.__contains__, reverse=True):
            for words, is_prefix, weight in map(parse_entry, lists[name]):
                self._index.drop(name, words, is_prefix)  # a person's weight counts
                muted += [] if weight else [(name, " ".join(words), is_prefix)]
            for entry in lists[name]:
                self._index.add(name, entry, OWN if name in BUILT_IN else 1.0)
        self._learnt = learnt().without(muted) if self._builtin else None

    def find(self, words: Sequence[str]) -> dict[tuple[str, str], tuple[float, int]]:
        """(category, entry) -> (weight, place); of those that begin at one word the heaviest."""
        found: dict[tuple[str, str], tuple[float, int]] = {}
        taken = 0  # up to here the words belong to a user-made category
        for at, hits in self._hits(words):
            best: dict[str, tuple[str, float]] = {}  # "why" and "why is" tell one thing, not two
            for name, entry, weight in hits:
                if name not in best or weight > best[name][1]:
                    best[name] = entry, weight
            mine = {name: hit for name, hit in best.items() if name not in BUILT_IN}
            if mine:
                taken = max(taken, *(at + len(parse_entry(entry)[0]) for entry, _ in mine.values()))
            for name, (entry, weight) in (mine if at < taken else best).items():
                found.setdefault((name, entry), (weight, at))
        return found

    def _hits(self, words: Sequence[str]) -> Iterator[tuple[int, Sequence[Hit]]]:
        """Each place where entries begin, with these."""
        single, sizes = self._single, self._index.sizes
        pairs = [*map(" ".join, pairwise(words)), ""]
        for at, (word, pair) in enumerate(zip(words, pairs, strict=False)):
            hits = single(word)
            for head in (word, pair) if word in sizes or pair in sizes else ():
                for size in sizes.get(head, ()):
                    hits = [*hits, *self._phrase(" ".join(words[at : at + size]), head, size)]
            if hits:
                yield at, hits

    def _of_word(self, word: str) -> Sequence[Hit]:
        """The entries that `word` alone matches; hardly any word does, so that is what is quick."""
        exact, stems = self._index.exact, self._index.stems
        found = [stem for stem in (word[:3], word[:2], word[:1]) if stem in stems]
        if not found and word not in exact:
            return ()
        hits = list(exact.get(word, ()))
        for stem in dict.fromkeys(found):
            for length in stems[stem]:
                hits += self._index.prefix.get(word[:length], ())
        return hits

    def _phrase(self, gram: str, head: str, size: int) -> list[Hit]:
        hits = list(self._index.exact.get(gram, ()))
        for length in self._index.lengths.get((head, size), ()):
            hits += self._index.prefix.get(gram[:length], ())
        return hits

    def match(self, text: str) -> Choice:
        """The category `text` scores best for, by words and by structure."""
        return self._remembered(text if len(text) <= HEAD else cap(text))

    def _match(self, text: str) -> Choice:
        reading = read(text)
        hits = [
            (name, entry, weight * reading.share(name, at))
            for (name, entry), (weight, at) in self.find(reading.words).items()
            if not reading.is_foreign(entry, at) or (name, entry) in self._own
        ]
        hits = [hit for hit in hits + reading.signals if hit[2] and hit[0] in self.multipliers]
        hits = without_lone_name(hits)
        scores = dict.fromkeys(self.multipliers, 0.0)
        for name, _, weight in hits:
            scores[name] += weight * self.multipliers[name]
        choice = decide(scores, hits)
        if self._learnt is None or choice.category not in (None, *BUILT_IN):
            return choice  # no second opinion overrules a category that a person made
        opinion = self._learnt.opinion(reading.wanted)
        return self._reconsider(choice, scores, self._learnt, opinion) if opinion else choice

    def _reconsider(self, choice: Choice, scores: dict[str, float], table: Learnt,
                    opinion: Opinion) -> Choice:  # fmt: skip
        """`choice` with the learnt table's opinion."""
        both = mixed(scores, {n: p for n, p in opinion.shares.items() if n in self._builtin})
        if not both:
            return choice
        first, second, *_ = [*sorted(both, key=lambda name: -both[name]), ""]
        hits = [(first, word, weight) for word, weight in table.heaviest(opinion, first)]
        matched = (*choice.matched, *hits) if choice.matched else tuple(hits)
        return Choice(first, both[first] - both.get(second, 0.0), choice.score, matched)


def decide(scores: dict[str, float], hits: list[Hit]) -> Choice:
    """The best of `scores` with its margin over the second; a user-made category wins a tie."""
    ranked = sorted(scores, key=lambda name: (-scores[name], name in BUILT_IN))
    best = scores[ranked[0]] if ranked else 0.0
    if best <= 0:
        return Choice(None, 0.0)
    second = scores[ranked[1]] if len(ranked) > 1 else 0.0
    matched = tuple(
        (name, entry, round(weight, 2))
        for name, entry, weight in sorted(hits, key=lambda hit: -hit[2])
    )
    return Choice(ranked[0], (best - second) / (best + 1), best, matched)  # + 1: one hit is not all


SURE_MARGIN = 0.2  # above it 97 of 100 are right (bench/CARD.md): no small model is better
CLASSIFIER_CIRCUIT = {"failure_threshold": 3, "recovery_timeout_sec": 30, "first_retry_sec": 30}


class Classifier:
    """A model that names the category. Whatever goes wrong, `ask` says None in time."""

    def __init__(self, post: Callable[..., bytes], clock: Callable[[], float] = time.monotonic):
        self._post = post
        self._breakers = Breakers(clock)
        self._slots = threading.BoundedSemaphore(2)  # a third caller takes the keywords at once
        self._lock = threading.Lock()  # guards _cache
        self._cache: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._last: tuple[str, str] | None = None  # of the last call: ("", "") when it was good
        self._think_refused: set[tuple[str, str]] = set()  # (url, model)

    def ask(self, table: Table, text: str, flight: Flight) -> str | None:
        """The category the model names for `text`, or None when it is slow, busy, down or wrong."""
        text = text[:CHARS]
        key = (table.etag, text)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        if not self._slots.acquire(blocking=False):
            return None
        try:
            name = self._call(table, text, flight)
        finally:
            self._slots.release()
        if name:
            with self._lock:
                self._cache[key] = name
                if len(self._cache) > 512:
                    self._cache.popitem(last=False)
        return name

    def _call(self, table: Table, text: str, flight: Flight) -> str | None:
        timeout_s = patience_s(table)
        ticket = self._breakers.admit("classifier", timeout_s + 1)
        if ticket is None:
            return None
        verdict = reason = "none"
        try:
            name = read_category(self._ask(table, text, flight, timeout_s), table)
            verdict = "good"
            self._breakers.commit(ticket, 1)
            self._note("", "")
            return name
        except ClassifierError as e:
            reason = str(e)
            verdict = "none" if reason == "client_left" else "strike"
            if verdict == "strike":
                self._note(reason, e.message)
            return None
        finally:
            self._breakers.settle(ticket, verdict, CLASSIFIER_CIRCUIT, reason)

    def _ask(self, table: Table, text: str, flight: Flight, timeout_s: float) -> bytes:
        """The answer; asked not to think unless this model was seen to refuse the question."""
        question, until = question_for(table, text), flight.clock() + timeout_s
        key = question.url, question.model
        if key not in self._think_refused:
            try:
                return self._post(question, flight, timeout_s)
            except ClassifierError as e:
                if str(e) != THINK_REFUSED:
                    raise
                self._think_refused.add(key)
        left_s = until - flight.clock()
        return self._post(question_for(table, text, may_think=True), flight, left_s)

    def _note(self, reason: str, message: str) -> None:
        """Remember what came of a call; a new trouble is one log line."""
        if reason and self._last != (reason, message):
            log.warning("classifier_failing", {"reason": reason, "message": message})
        self._last = reason, message

    def warm_up(self, table: Table, flight: Flight) -> None:
        """Make Ollama load the model, which may take a minute, before a request needs it."""
        try:
            read_category(self._ask(table, "Hello", flight, 60.0), table)
            self._note("", "")
        except ClassifierError as e:
            self._note(str(e), e.message)

    def status(self, table: Table) -> dict[str, Any]:
        """For /health: {status: off, unknown, ok or failing, reason, message}; calls nobody."""
        if table.mode == "keywords" or self._last is None:
            return {"status": "off" if table.mode == "keywords" else "unknown"}
        reason, message = self._last
        return (
            {"status": "failing", "reason": reason, "message": message}
            if reason
            else {"status": "ok"}
        )


class Decision(NamedTuple):
    """Where a request goes and why. `words` are configured entries, never the user's own."""

    category: str
    mode: str
    reason: str
    chain: tuple[Model, ...]
    timeouts: Mapping[str, float]
    whole: bool = False
    margin: float = 0.0
    words: tuple[tuple[str, float], ...] = ()
    ignored: str = ""


OUR_NAME = re.compile(r"\A(?:router/)+")


class Chooser:
    """Puts a request into a category: what the client demands, then tools, then the text."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier
        self._compiled: tuple[Table, Any, Keywords, Continuations] | None = None

    def choose(self, chat: Chat, table: Table, flight: Flight) -> Decision:
        """The decision for one request; 404 for an unknown category, 422 for an unclear model."""
        wanted = table.meant(chat.body.get("model", ""))  # some clients put our name before each
        name = OUR_NAME.sub("", wanted)
        if name in table.categories:
            return _decide(table, name, "explicit", "asked for by name")
        known = wanted if wanted in table.models else name
        id_ = table.resolve(known) if name != "router" else None
        if id_:
            chain: tuple[Model, ...] = (table.models[id_],)
            if not chat.dialect.needs_choosing:  # vectors of the same model are comparable
                chain = table.twins(chain[0])
            return Decision("explicit", "explicit", "asked for by name", chain, table.timeouts)
        if not chat.dialect.needs_choosing:
            text = "name a model of routes.json, or router/<category> whose models all make the " \
                   "same vectors: those of two models cannot be compared"  # fmt: skip
            raise RouterError(400, "model_not_found", text, param="model")
        if name not in ("router", wanted):
            text = f"no such category or model: {scrub(name)[:64]!r}; GET /v1/models lists them"
            raise RouterError(404, "model_not_found", text, param="model")
        decision = self._by_request(chat, table, flight)
        return decision if name in ("router", "") else decision._replace(ignored=wanted[:100])

    def _by_request(self, chat: Chat, table: Table, flight: Flight) -> Decision:
        """An agent's own calls first, then tools, then what was said."""
        texts = islice(chat.dialect.texts(chat.body), LOOK_BACK)
        text, before = next(texts, ""), next(texts, "")
        if chat.tool_choice != "required" and (of_machine := machine_call(text, before)):
            reason = f"an agent's own call: {of_machine}"
            return _decide(table, table.machine_category, "default", reason)
        if by_tools := _by_tools(chat, table):
            return by_tools
        if not text:
            return _decide(table, table.default_category, "default", "no text of the user")
        return self._by_text(text, before, texts, table, flight)

    def _by_text(self, text: str, before: str, texts: Iterator[str], table: Table,
                 flight: Flight) -> Decision:  # fmt: skip
        """By `text`; where it carries on with what was said before, by that."""
        keywords, continuations = self._words(table)
        follows = continuations.covers(text)
        choice = keywords.match(text)
        sure = table.mode == "keywords" or (table.mode == "hybrid" and choice.margin >= SURE_MARGIN)
        named = None if follows or sure else self._classifier.ask(table, text, flight)
        if named:
            return _decide(table, named, "ollama", f"{asked_model(table)} said {named}")
        score = max(choice.score, float(choice.margin >= SURE_MARGIN))  # the table may be sure
        if follows or points_back(text, score):
            for earlier in (before, *texts):
                found = keywords.match(earlier)
                if found.category and not continuations.covers(earlier):
                    return _by_words(table, found, "continuation")
        if choice.category is None:
            return _decide(table, table.default_category, "default", "no keyword matched")
        return _by_words(table, choice, "keywords")

    def _words(self, table: Table) -> tuple[Keywords, Continuations]:
        """The matcher for `table`, built once; two threads may build it at once, to no harm.

        It takes 10 ms, so an edit of anything but words keeps the one there is.
        """
        compiled = self._compiled
        if compiled is None or compiled[0] is not table:
            lists = {name: category.lists for name, category in table.categories.items()}
            follow_ups = lists_of(CONTINUATIONS, table.continuations)
            told = tuple(lists.items()), follow_ups  # in order, which decides a tie
            if compiled and compiled[1] == told:
                matchers = compiled[2:]
            else:
                built_in, own = [{name: found[n] for name, found in lists.items()} for n in (0, 1)]
                matchers = Keywords(own, built_in), Continuations([*follow_ups[0], *follow_ups[1]])
            compiled = self._compiled = (table, told, *matchers)
        return compiled[2:]


def _by_tools(chat: Chat, table: Table) -> Decision | None:
    choice, offered = chat.tool_choice, chat.tools_offered
    if "tools" not in table.categories or choice == "none":
        return None
    if choice == "required":
        return _decide(table, "tools", "tools", "tool_choice demands a tool")
    few = table.tools_routing == "auto" and offered < table.agent_tool_count
    if offered and (few or table.tools_routing == "always"):
        return _decide(table, "tools", "tools", f"{offered} tools offered")
    return None


def _by_words(table: Table, choice: Choice, mode: str) -> Decision:
    name = choice.category or table.default_category
    words = tuple((entry, weight) for category, entry, weight in choice.matched if category == name)
    reason = ", ".join(word for word, _ in words[:8])[:200] or "the learnt table"  # for a header
    return _decide(table, name, mode, reason, margin=choice.margin, words=words)


def _decide(table: Table, name: str, mode: str, reason: str, **more: Any) -> Decision:
    category = table.categories[name]
    timeouts = {**table.timeouts, **category.timeouts}
    return Decision(name, mode, reason, category.models, timeouts, category.whole, **more)


# --- upstreams ---------------------------------------------------------------------------------


class Upstreams:
    """The client of all upstreams: each one's key, headers and connections are prepared once."""

    def __init__(self, settings: Settings, session: requests.Session):
        self._settings = settings
        self._session = session
        self._endpoints: dict[Upstream, dict[str, Endpoint]] = {}  # by what is asked there
        self._refuses_usage: set[Upstream] = set()  # those that know no stream_options
        # upstream name -> since when it refuses our key, and when it last did by flight's clock
        self._refused: dict[str, tuple[str, float]] = {}

    def key(self, upstream: Upstream) -> str:
        """Its API key; '' when the variable is not set."""
        with contextlib.suppress(SettingsError):  # a key file that has gone is a missing key
            return self._settings.secret(upstream.api_key_env) if upstream.api_key_env else ""
        return ""

    def keys(self) -> list[str]:
        """Every key that has been sent; one read from a file may have been changed there since."""
        return [endpoint.key for each in list(self._endpoints.values())
                for endpoint in list(each.values())]  # fmt: skip

    def has_key(self, upstream: Upstream) -> bool:
        """True when it can be called: it has its key, needs none, or the demo stands in."""
        if self._settings.demo or not upstream.api_key_env:
            return True
        return upstream in self._endpoints or bool(self.key(upstream))

    def speaks(self, upstream: Upstream, dialect: Dialect) -> bool:
        """True when requests of `dialect` may go there; the demo stands in for all of them."""
        return self._settings.demo or dialect.speaks in upstream.speaks

    def open(self, model: Model, chat: Chat, flight: Flight, connect_s: float) -> Reply:
        """The reply of `model`, its head good and its body unread; or Failure, with it closed."""
        endpoint = self._endpoints.get(model.upstream, {}).get(chat.dialect.endpoint)
        if endpoint is None:
            base = "demo://upstream" if self._settings.demo else model.upstream.base_url
            try:
                endpoint = Endpoint(self._session, base + chat.dialect.endpoint,
                                    self._settings.environ, self.key(model.upstream),
                                    dict(model.upstream.headers))  # fmt: skip
            except SettingsError as e:  # a proxy, met by an upstream that an edit brought
                raise Failure("shortage", str(e)) from e
            self._endpoints.setdefault(model.upstream, {})[chat.dialect.endpoint] = endpoint
        usage = "ask" if model.upstream.usage_in_streams else "leave"
        usage = "drop" if model.upstream in self._refuses_usage else usage
        body = chat.for_model(model, usage)
        reply = endpoint.send(body, flight, connect_s, chat.query, chat.headers)
        if reply.status_code != 200 or "content-encoding" in reply.headers:
            try:
                check_head(reply)
            except Failure:
                reply.close()
                raise
        return reply

    def note(self, upstream: Upstream, outcome: str, now: float) -> None:
        """Remember for /health whether it takes our key."""
        if outcome == "unauthorized":
            since = self._refused.get(upstream.name, (now_text(), now))[0]
            if upstream.name not in self._refused:
                log.warning("key_refused", {"upstream": upstream.name, "key": upstream.api_key_env})
            self._refused[upstream.name] = since, now
        elif outcome == "success":
            self._refused.pop(upstream.name, None)

    def stop_asking_usage(self, upstream: Upstream) -> bool:
        """Ask for no stream's usage there from now on; False when nobody has since it refused."""
        is_new = upstream not in self._refuses_usage
        self._refuses_usage.add(upstream)
        return is_new

    def answers(self, upstream: Upstream, now: float) -> bool:
        """False without a key, and while it lately refused ours.

        Not for ever: who routes by /health/ready would never find out that it takes it again.
        """
        _, at = self._refused.get(upstream.name, ("", -math.inf))
        return self.has_key(upstream) and now - at > REFUSED_S

    def classify(self, question: Question, flight: Flight, timeout_s: float) -> bytes:
        """The classifier's answer as bytes; ClassifierError after `timeout_s`."""
        upstream, whom = question.upstream, question.whom
        key = self.key(upstream) if upstream else ""
        if upstream and (self._settings.demo or (upstream.api_key_env and not key)):
            text = f"{whom} has no API key (set {upstream.api_key_env})"
            raise ClassifierError("no_key", text)
        flight.due = flight.clock() + timeout_s, "classify"
        connect_s = min(2.0 if upstream else 0.5, timeout_s)
        try:
            endpoint = Endpoint(self._session, question.url, self._settings.environ, key)
            with contextlib.closing(endpoint.send([question.body], flight, connect_s)) as reply:
                data = read_whole(reply, MAX_ERROR)
                if reply.status_code != 200 and upstream:
                    raise refusal(whom, reply.status_code, data, key)
                if reply.status_code != 200:
                    base = question.url.removesuffix("/api/chat")
                    raise ollama_trouble(base, question.model, reply.status_code, data)
                return data
        except Failure as e:
            if e.outcome == "classify":
                text = f"{whom} did not answer within {timeout_s:g} s (timeout_sec)"
            else:
                text = f"{whom} is not reached: {e.message or e.outcome}"
            if e.outcome == "connect" and not upstream:
                text += '; start it, or write "routing_mode": "keywords" in routes.json'
            raise ClassifierError(e.outcome, text) from e
        finally:
            flight.next_attempt()

    def state(self, upstream: Upstream) -> dict[str, Any]:
        """For /health: {configured, and key_refused_since when its last answer was a 401}."""
        since = self._refused.get(upstream.name)
        return {"configured": self.has_key(upstream)} | (
            {"key_refused_since": since[0], "message": refused_key(upstream)} if since else {}
        )


# --- the router: walk, relay ---------------------------------------------------------------------

RETRY_WITHIN_S = 1.0  # and only when the first try ended so soon
REFUSED_S = 300.0  # so long after a refused key the upstream does not count as ready
RETRY_PAUSE_S = 0.3  # before the one retry on the same model
RETRY_AFTER_MAX_S = 2.5  # a rate limit this short is waited for
UPLOAD_S = 60  # an upload that takes longer than this has stalled


MATERIAL = ("messages", "input", "tools", "functions", "system", "instructions")
NO_CHAT = Chat(b"", {}, (), CHAT)


@dataclass
class Call(Record):
    """One chat request on its way. `Router.finish` ends it, once, whatever happened."""

    flight: Flight = field(kw_only=True)
    table: Table = field(kw_only=True)
    started: float = field(kw_only=True)
    deadline: float = math.inf
    chat: Chat = NO_CHAT
    decision: Decision | None = None
    whole: bool = False  # held until complete, even if the client asked for a stream
    turn: Turn = NO_TURN
    retried: bool = False
    ticket: Ticket | None = None
    relay: Relay | None = None
    skipped: list[str] = field(default_factory=list)  # models passed over for their circuit

    def headers(self) -> dict[str, str]:
        """What every chat answer says about itself."""
        headers = {"X-Request-Id": self.id, "X-Router-Attempts": str(len(self.attempts)),
                   "X-Router-Dialect": self.dialect}  # fmt: skip
        if self.decision:
            headers["X-Router-Category"] = self.category
            headers["X-Router-Mode"] = self.mode
            headers["X-Router-Reason"] = _in_header(self.reason, " ,.*()'")
            if self.decision.ignored:
                headers["X-Router-Model-Ignored"] = _in_header(self.decision.ignored, "/:")
        attempt = self.answered_by or (self.attempts and self.attempts[-1])
        if attempt:
            headers["X-Router-Model"] = _in_header(attempt.model.id, "/:")
        if self.answered_by and not self.stream:
            cost = self.answered_by.cost_usd
            headers["X-Router-Cost-Usd"] = "unknown" if cost is None else f"{cost:.8f}"
            headers["X-Router-Cost-Source"] = self.answered_by.cost_source
        return headers


@lru_cache(maxsize=256)  # most of them were told before
def _in_header(text: str, safe: str) -> str:
    return quote(text, safe=safe, errors="replace")


class Router:
    """Chooses a chain and walks it until a model answers."""

    def __init__(self, settings: Settings, session: requests.Session, clock: Callable[[], float],
                 cluster: Cluster | None = None):  # fmt: skip
        self.settings = settings
        self.clock = clock
        self.store = Store(settings.routes, load_table, clock, cluster.agree if cluster else None)
        self.breakers = Breakers(clock, cluster)
        self.flights = Flights(settings.threads, clock)
        self.carrier = Carrier()
        self.upstreams = Upstreams(settings, session)
        self.metrics = Metrics(clock)
        self.history = History(settings.history, cluster)
        own = settings.api_key, settings.admin_token
        self.clients = Clients(settings.clients_file, own, clock)
        self.classifier = Classifier(self.upstreams.classify, clock)
        self.turns = Turns(clock)
        self._ids = random.Random()  # noqa: S311  # nosec B311  names of requests, no secrets
        self.quotas = Quotas(clock)
        self.chooser = Chooser(self.classifier)
        self.rejections = log_rejections(settings.validation_log)
        self._tidied: Table | None = None
        self.cluster: Any = cluster  # None: no other instance shares circuits and file

    def current_table(self) -> Table:
        """The table in force; circuits of models that are in no chain any more are forgotten."""
        table = self.store.current()
        if table is not self._tidied and self.breakers.keep_only(table.chain_ids):
            self._tidied = table
        return table

    def begin(self, client: socket.socket | None, dialect: Dialect = CHAT) -> Call:
        """A call that has yet to get its permit (`Flights.acquire`); `finish` must end it."""
        table, now = self.current_table(), self.clock()
        flight = Flight(client, self.clock, (now + UPLOAD_S, "client_left"))
        id_ = f"{self._ids.getrandbits(64):016x}"
        return Call(id_, dialect=dialect.name, is_counted=dialect.is_counted,
                    flight=flight, table=table, started=now)  # fmt: skip

    def choose(self, call: Call, chat: Chat, session: str = "") -> Decision:
        """Decide where `chat` goes; the dry run asks the same."""
        before = self.clock()
        call.chat, call.stream = chat, chat.stream
        call.flight.due = NEVER
        decision: Decision = self.chooser.choose(chat, call.table, call.flight)
        call.turn = self.turns.find(chat, session, call.client)
        decision = self.turns.keep(call.turn, decision, call.table, _decide, SURE_MARGIN)
        other = self.history.way_out(call.table, decision.category, call.client)
        if other and chat.dialect.needs_choosing:
            reason = f"a limit is spent; else {decision.category} by {decision.mode}"
            decision = _decide(call.table, other, "limit", reason)
        call.decision = decision
        call.category, call.mode, call.reason = decision[:3]
        chat.category = call.table.categories.get(call.category)
        chat.must_be_json = chat.category is not None and chat.category.want == "json" \
            and chat.choices == 1 and chat.dialect.wants_json(chat.body)  # fmt: skip
        call.whole = decision.whole or chat.must_be_json
        call.deadline = call.started + decision.timeouts["total"]
        call.choose_s = self.clock() - before
        # Parsed, messages and tools take thrice their text; nobody looks at them again.
        chat.body = {k: v for k, v in chat.body.items() if k not in MATERIAL}
        return decision

    def walk(self, call: Call, decision: Decision) -> Relay:
        """The first answer that a model of the chain begins; RouterError when none does.

        Each model is admitted by its circuit, asked, and judged; what its failure means for the
        rest of the chain stands in judge.py. The ticket of the model that answers stays with the
        call, and `finish` settles it.
        """
        self.history.refuse_spent(call.table, decision.category, call.client)
        self.turns.check_loop(call.turn, call.table.same_call_limit, call.id)
        queue = self._usable(call, decision)
        early = self.breakers.due_soonest([model.id for model in queue])
        failures: list[Failure] = []
        while queue:
            model = queue.pop(0)
            probe_now = model.id == early and not failures
            ticket = self.breakers.admit(model.id, decision.timeouts["total"], early=probe_now)
            if ticket is None:
                call.skipped.append(model.id)
                continue
            call.ticket = ticket
            last = not any([self.breakers.would_admit(other.id) for other in queue])
            try:
                return self._ask(call, decision, model, ticket, last)
            except Failure as failure:
                failures.append(failure.bare())
                call.flight.next_attempt()
                queue = still_worth_trying(queue, model, failures)
        return self._without_answer(call, failures)

    def _ask(self, call: Call, decision: Decision, model: Model, ticket: Ticket,
             last: bool) -> Relay:  # fmt: skip
        """An answer of `model` that has begun, or its Failure, booked.

        A model that failed at once is asked a second time, on a fresh connection; only the second
        outcome counts. `last`: nobody else can be asked, so that it gets all the time there is.
        """
        flight, timeouts, usual = call.flight, {**decision.timeouts, **model.timeouts}, call.stream
        kind, more_s = ("first_token", len(call.chat.data) / 10_000) if usual else ("answer", 0.0)
        patience_s = math.inf if last and not ticket.probe else timeouts[kind] + min(30.0, more_s)
        while True:
            began = self.clock()
            attempt = Attempt(model, "internal_error", None)
            relay = None
            try:
                if flight.why:
                    raise Failure(flight.why)
                call.attempts.append(attempt)
                flight.due = min((began + patience_s, kind), (call.deadline, "total"))
                reply = self.upstreams.open(model, call.chat, flight, timeouts["connect"])
                answer = call.chat.dialect.answer(model.id, choices=call.chat.choices,
                                                  keep_usage=call.chat.wants_usage,
                                                  whole=call.whole,
                                                  must_be_json=call.chat.must_be_json)  # fmt: skip
                relay = Relay(
                    reply, flight, model.id, answer, stream=call.stream, whole=call.whole,
                    idle_s=timeouts["idle"],
                    client_s=call.table.timeouts["total"], deadline=call.deadline,
                )  # fmt: skip
                relay.prepare()
                break
            except BaseException as e:
                if relay:  # a bug of ours must not leave the connection open either
                    relay.reply.close()
                if not isinstance(e, Failure):
                    raise
                attempt.seconds = self.clock() - began
                self._note_failure(call, attempt, e, relay)
                without = e.names_usage and call.stream
                if without and self.upstreams.stop_asking_usage(model.upstream):
                    flight.next_attempt()
                    continue
                if self._again(call, ticket, e, attempt.seconds, last):
                    continue
                unknown = not call.is_counted and e.status in (404, 405, 501)
                strike = "strike" if VERDICTS[e.outcome].strike and not unknown else "none"
                self.breakers.settle(ticket, strike, call.table.breaker, e.outcome, e.status,
                                     e.retry_after_s)  # fmt: skip
                self.quotas.refused(model, e, call.table, self.breakers)
                raise
        now = self.clock()
        attempt.outcome, attempt.status, attempt.seconds = "success", 200, now - began
        call.relay, call.answered_by = relay, attempt
        if call.is_counted:
            self.turns.note(call.turn, decision, model.id, relay.answer.id)
        self.upstreams.note(model.upstream, "success", now)
        self.breakers.commit(ticket, call.table.breaker["failure_threshold"])
        call.first_token_s = now - call.started if call.stream else None
        return relay

    def _note_failure(self, call: Call, attempt: Attempt, failure: Failure,
                      relay: Relay | None) -> None:  # fmt: skip
        """What came of an attempt; what it read is kept only where it may be passed on yet."""
        attempt.outcome, attempt.status = failure.outcome, failure.status
        said = self._scrubbed(failure.message)
        attempt.why = sentence(attempt.model, failure, said, call.chat.dialect.endpoint)
        failure.bare().attempt = attempt
        if relay:
            attempt.price(relay.usage)
            failure.relay = relay if failure.outcome in DOUBTFUL else None
        self.upstreams.note(attempt.model.upstream, failure.outcome, self.clock())

    def _again(self, call: Call, ticket: Ticket, failure: Failure, seconds: float,
               last: bool) -> bool:  # fmt: skip
        """Wait and say True when the same model deserves its one second try.

        Only what failed at once is worth it: who was silent for long before would be silent for
        long again, while the next model waits. A request is never sent more than twice.
        """
        if failure.outcome == "reset" or failure.status in (500, 502):
            pause_s = RETRY_PAUSE_S
        elif failure.outcome == "rate_limited" and failure.retry_after_s is not None:
            pause_s = failure.retry_after_s
        else:
            return False
        late = pause_s > RETRY_AFTER_MAX_S or self.clock() + pause_s >= call.deadline
        late = late or (seconds > RETRY_WITHIN_S and not last)
        flight = call.flight
        if call.retried or flight.resent or ticket.probe or late:
            return False
        call.retried = True
        flight.next_attempt(fresh=True)
        flight.wait(pause_s)
        return True

    def _usable(self, call: Call, decision: Decision) -> list[Model]:
        """The models of the chain that can take the request; 422 or 503 when there is none."""
        usable = [model for model in decision.chain if not self.passed_over(call.chat, model)]
        if usable:
            return usable
        reasons = list(dict.fromkeys(self.passed_over(call.chat, m) for m in decision.chain))
        missing = [reason for reason in reasons if "API key" in reason]
        text = f"no model of {call.category} can take this request: each {' or '.join(reasons)}"
        if missing:
            headers = {"Retry-After": "30", "x-should-retry": "false"}
            raise RouterError(503, "no_key", text, headers=headers)
        detail = [{"loc": ["body"], "msg": f"every model {reason}"} for reason in reasons]
        raise RouterError(422, "no_capable_model", text, detail=detail)

    def passed_over(self, chat: Chat, model: Model) -> str:
        """Why `model` cannot take `chat`, or ''."""
        if not self.upstreams.speaks(model.upstream, chat.dialect):
            return f"does not speak {chat.dialect.speaks} (upstreams.{model.upstream.name}.speaks)"
        if not model.tools and chat.wants_tools:
            return "cannot use tools"
        if not model.images and chat.wants_images:
            return "cannot see images"
        if model.context and chat.is_longer_than(model.context):
            return "cannot take a prompt of this length"
        if not self.upstreams.has_key(model.upstream):
            return f"has no API key (set {model.upstream.api_key_env})"
        return ""

    def _scrubbed(self, text: str) -> str:
        known = [self.settings.api_key, self.settings.admin_token, *self.upstreams.keys()]
        return scrub(text, known) if text else ""

    def _without_answer(self, call: Call, failures: list[Failure]) -> Relay:
        """Nobody answered: an empty answer if one came, else the error that says best why."""
        outcomes = [failure.outcome for failure in failures]
        if "client_left" in outcomes:
            raise RouterError(499, "client_left", "the client left")
        if "shortage" in outcomes:
            said = self._scrubbed(failures[-1].message)
            text = f"nobody could be asked: {said or 'this machine is short of something'}"
            raise RouterError(503, "shortage", text, headers={"Retry-After": "5"})
        doubtful = [failure for failure in failures if failure.outcome in DOUBTFUL]
        if doubtful:
            call.relay, call.answered_by = doubtful[-1].relay, doubtful[-1].attempt
            return cast(Relay, call.relay)
        refusal = mendable(failures)
        if refusal:
            raise self._as_told(refusal, call)
        raise self._all_failed(call, outcomes)

    def _as_told(self, refusal: Failure, call: Call) -> RouterError:
        """An upstream's refusal as it was, since the client can mend it; without any key in it."""
        status = 400 if refusal.outcome == "content_filter" else refusal.status or 400
        codes = {"context_length": "context_length_exceeded", "content_filter": "content_filter"}
        text = self._scrubbed(refusal.message)
        if says_nothing(text):
            text = refusal.attempt.why
        return RouterError(status, "invalid_request_error", text, code=codes.get(refusal.outcome),
                           attempts=call.tries())  # fmt: skip

    def _all_failed(self, call: Call, outcomes: list[str]) -> RouterError:
        """429 when all is rate limits, 503 when nobody could be asked, 500 when all failed."""
        circuits = self.breakers.snapshot()
        asked = [attempt.model.id for attempt in call.attempts]
        waits = [
            circuits[id_]["retry_in_sec"] for id_ in {*asked, *call.skipped} if id_ in circuits
        ]
        soonest_s = max(1, math.ceil(min(waits, default=1)))
        reasons = outcomes + [circuits.get(id_, {}).get("reason", "") for id_ in call.skipped]
        if set(reasons) == {"rate_limited"}:
            text = f"every model of {call.category} is rate limited; try again in {soonest_s} s"
            return RouterError(429, "rate_limited", text, attempts=call.tries(),
                               headers={"Retry-After": str(soonest_s)})  # fmt: skip
        if not outcomes:
            text = f"every model of {call.category} failed lately and is not asked yet; GET " \
                   "/metrics says why, POST /circuit-breaker/reset-all tries now"  # fmt: skip
            return RouterError(503, "all_circuits_open", text,
                               headers={"Retry-After": str(min(30, soonest_s))})  # fmt: skip
        said = "; ".join(dict.fromkeys(attempt.why for attempt in call.attempts))
        text = f"no model of {call.category} answered: {said}"
        headers = {"x-should-retry": "false"}  # the SDKs would walk the chain three times
        return RouterError(500, "all_models_failed", text, headers=headers, attempts=call.tries())

    def finish(self, call: Call) -> None:
        """End a call, once: close the upstream, give back probe and permit, book the outcome."""
        if call.flight.released:
            return
        relay, attempt = call.relay, call.answered_by
        try:
            if relay and attempt:
                self._note_end(call, relay, attempt)
            call.outcome = call.outcome or "client_left"
            if call.ticket:
                outcome = attempt.outcome if attempt else ""
                struck = call.outcome == "failed" and attempt and VERDICTS[outcome].strike
                verdict = "strike" if struck else "good" if call.outcome == "success" else "none"
                status = attempt.status if attempt else None
                self.breakers.settle(call.ticket, verdict, call.table.breaker, outcome, status)
        finally:
            self.flights.release(call.flight)
            call.seconds = self.clock() - call.started
            call.relay, call.chat = None, NO_CHAT  # a response may be kept longer than its call
            if call.is_counted:
                self.history.add(call)
            log.info("request", self.metrics.record(call))

    def _note_end(self, call: Call, relay: Relay, attempt: Attempt) -> None:
        """What became of the answer that was passed on; its usage is complete only now."""
        if relay.reply.conn:
            relay.reply.close()
        if relay.usage is not attempt.usage:
            attempt.price(relay.usage)
        if call.outcome:
            return
        failure = relay.failure or (None if relay.ended else Failure("client_left"))
        call.outcome = "success" if failure is None else "failed"
        if failure:  # a stream that was not read to its end was left by its client
            attempt.outcome, attempt.status = failure.outcome, failure.status or attempt.status
            call.outcome = "client_left" if failure.outcome == "client_left" else "failed"


# --- routes ------------------------------------------------------------------------------------

routes = flask.Blueprint("router", __name__)
CALL = "llm_router.call"  # where the environment of a chat request keeps it
EVENTS = "text/event-stream; charset=utf-8"
ALWAYS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}  # unless set otherwise
SLASHES = re.compile("//+")


class App(flask.Flask):
    """Flask, with what differs from its defaults, and the way of a chat past it."""

    def __init__(self, settings: Settings, page: Path):
        super().__init__("llm-router", static_folder=None)
        most = (settings.max_body_mb << 20) + 1
        self.config.update(MAX_CONTENT_LENGTH=most, PROVIDE_AUTOMATIC_OPTIONS=False)
        self.json.sort_keys = False  # type: ignore[attr-defined]
        self.url_map.merge_slashes = False  # `wsgi_app` does; this would answer with a redirect
        self.extensions["page"] = read_page(page)
        for path in DIALECT_AT:  # for the other methods: a 405 instead of a 404
            self.add_url_rule(path, "chat", methods=["POST"])

    def wsgi_app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer one request."""
        path = environ["PATH_INFO"]
        if "//" in path:  # a base URL that ends in a slash; every door looks at the same path
            path = environ["PATH_INFO"] = SLASHES.sub("/", path)
        if path in DIALECT_AT and environ["REQUEST_METHOD"] == "POST":
            return serve_chat(self, environ)(environ, start_response)
        return super().wsgi_app(environ, start_response)


class ChatResponse:
    """A chat's response, as WSGI wants it. Its headers are complete: nobody looks through them."""

    def __init__(self, body: Iterable[bytes], headers: dict[str, str], close: Callable[[], None]):
        self.headers = headers
        self._body, self._close = body, close

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Start it; what is returned is the body, to be closed. One that cannot start has ended."""
        try:
            start_response("200 OK", list(self.headers.items()))
        except BaseException:
            self.close()
            raise
        return self

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """End the body, then what it belongs to."""
        try:
            if isinstance(self._body, Generator):
                self._body.close()
        finally:
            self._close()


def router() -> Router:
    """The Router of the app that serves this request."""
    found: Router = flask.current_app.extensions["router"]
    return found


def serve_chat(app: App, environ: dict[str, Any]) -> ChatResponse | flask.Response:
    """The way of a chat, from its head to its response.

    Matching the path, contexts, a session and signals, none of which a chat needs, would cost as
    much as choosing and relaying do: Flask only words what is refused.
    """
    request = app.request_class(environ, populate_request=False)  # they would form a circle
    request.max_content_length = app.config["MAX_CONTENT_LENGTH"]
    owner: Router = app.extensions["router"]
    try:
        guard(request, owner.settings, owner.clients)
        return proxy(owner, request)
    except Exception as e:  # noqa: BLE001  a bug of ours becomes a 500 that says so
        with app.request_context(environ):
            return add_headers(error_response(e))


def proxy(owner: Router, request: flask.Request) -> ChatResponse:
    """The proxied chat request: its permit, its body, a model that answers, the relay.

    To close the response ends the call, whatever became of it.
    """
    environ = request.environ
    dialect = DIALECT_AT[environ["PATH_INFO"]]
    call = environ[CALL] = owner.begin(environ.get("gunicorn.socket"), dialect)
    call.client = environ.get(CLIENT, call.client)
    owner.flights.acquire(call.flight)
    owner.carrier.give_way()
    chat = read_chat(read_body(request), dialect)
    chat.headers, chat.query = passed_on(dialect, environ)
    decision = owner.choose(call, chat, session_of(environ))
    call.whole = call.whole or environ.get("HTTP_X_ROUTER_STREAM", "").lower() == "whole"
    walk = Walk(partial(owner.walk, call, decision), call)
    body: Iterable[bytes] = walk.relay.held if walk.relay else ()
    if call.stream:
        more = {"Content-Type": EVENTS, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        protocol = environ.get("SERVER_PROTOCOL")  # of others only the server knows the framing
        client = call.flight.client if protocol in ("HTTP/1.0", "HTTP/1.1") else None
        body = walk.pass_on(owner.carrier, client, chunked=protocol == "HTTP/1.1")
    else:
        if call.answered_by:
            call.answered_by.price(walk.relay.usage)
        more = {"Content-Type": "application/json", "Content-Length": str(len(walk.relay.held[0]))}
    if "HTTP_ORIGIN" in environ:
        more |= cors_headers(request, owner.settings)
    more |= {"X-Router-Demo": "1"} if owner.settings.demo else {}
    close = partial(walk.close, partial(owner.finish, call))
    return ChatResponse(body, ALWAYS | walk.known(call.headers()) | more, close)


@routes.post("/route")
def dry_run() -> dict[str, Any]:
    """Where a request would go and why, through the same code; no upstream is called."""
    with watched_upload(router()) as call:
        call.client = flask.request.environ.get(CLIENT, call.client)
        data = read_body(flask.request)
        chat = chat_of(data, *parse_body(data), CHAT)
        check(chat.body, "RouteRequest")
        if "text" in chat.body:
            chat.body = {**chat.body, "messages": [{"role": "user", "content": chat.body["text"]}]}
        chat.dialect = dialect_of(chat.body)
        chat.note_wishes()
        return explain(router(), call, chat, session_of(flask.request.environ))


@contextlib.contextmanager
def watched_upload(owner: Router, *, counted: bool = True) -> Iterator[Call]:
    """A watched upload, and a permit if `counted`, for a request that is no chat but has a body."""
    call = owner.begin(flask.request.environ.get("gunicorn.socket"))
    owner.flights.acquire(call.flight, counted=counted)
    try:
        yield call
    finally:
        owner.flights.release(call.flight)


def explain(owner: Router, call: Call, chat: Chat, session: str = "") -> dict[str, Any]:
    """The decision with the words that made it, and who of the chain would be passed over."""
    decision, circuits = owner.choose(call, chat, session), owner.breakers.snapshot()
    able = [model.id for model in decision.chain if not owner.passed_over(chat, model)]
    early, chain = owner.breakers.due_soonest(able), []
    for model in decision.chain:
        circuit = circuits.get(model.id, {"state": "closed", "retry_in_sec": 0.0})
        may_go = owner.breakers.would_admit(model.id) or model.id == early
        chain.append({"model": model.id, "circuit": circuit["state"],
                      "retry_in_sec": circuit["retry_in_sec"],
                      "passed_over": owner.passed_over(chat, model)
                      or (None if may_go else "failed lately")})  # fmt: skip
    return {"category": decision.category, "mode": decision.mode, "reason": decision.reason,
            "dialect": chat.dialect.name, "margin": round(decision.margin, 3), "chain": chain,
            "words": [{"word": word, "weight": n} for word, n in decision.words]}  # fmt: skip


@routes.get("/health")
def health() -> dict[str, Any]:
    """The reference's keys, then what an operator asks next; nobody is called."""
    store, table = router().store, router().current_table()
    bad = {"status": "stale", "error": store.error, "since": store.error_since}
    return {
        "status": "degraded" if store.error else "healthy",
        "service": "llm-router",
        "version": VERSION,
        "routing_mode": table.mode,
        "categories": list(table.categories),
        "config": bad if store.error else {"status": "ok"},
        "upstreams": {u.name: router().upstreams.state(u) for u in table.upstreams.values()},
        "classifier": router().classifier.status(table),
        "demo": router().settings.demo,
        "history": router().history.health(),
        **({"clients": router().clients.health()} if router().clients else {}),
        **({"cluster": router().cluster.health()} if router().cluster else {}),
    }


@routes.get("/health/ready")
def ready() -> tuple[dict[str, Any], int]:
    """200 when some model has its key and a circuit that is not open, 503 otherwise."""
    table, upstreams, now = router().current_table(), router().upstreams, router().clock()
    able = (id_ for id_ in table.chain_ids if upstreams.answers(table.models[id_].upstream, now))
    is_ready = any(router().breakers.would_admit(id_) for id_ in able)
    return {"status": "ready" if is_ready else "not_ready"}, 200 if is_ready else 503


@routes.get("/config")
def config() -> flask.Response:
    """The table in force, without keys; its ETag is for If-Match."""
    table = router().current_table()
    shown = table.as_json()
    for upstream in table.upstreams.values():
        shown["upstreams"][upstream.name]["configured"] = router().upstreams.has_key(upstream)
    response = flask.jsonify(shown)
    response.set_etag(table.etag)
    return response


@routes.post("/config/category")
@routes.post("/config/model-mapping")
def set_category() -> dict[str, Any]:
    """Create or change a category; a mapping changes only the chain of one that exists."""
    with watched_upload(router(), counted=False):  # a full house must not keep an operator out
        _, body, _ = parse_body(read_body(flask.request))
    check(body, "CategoryChange" if flask.request.path.endswith("category") else "MappingChange")
    name = body.get("name") or body["category"]
    table = changed(lambda table: table.with_category(name, body, must_exist="category" in body))
    ids = [model.id for model in table.categories[name].models]
    return {"status": "ok", "category": name, "models": ids, "warnings": table.doubts_about(name)}


@routes.delete("/config/category/<name>")
def drop_category(name: str) -> dict[str, Any]:
    """Delete a category that a user made; the default one is 422, another built-in one 400."""
    changed(lambda table: table.without_category(name))
    return {"status": "ok", "category": name}


def changed(edit: Callable[[Table], str]) -> Table:
    """The table after `edit` was written to routes.json."""
    return router().store.change(edit, flask.request.headers.get("If-Match"))


@routes.post("/circuit-breaker/reset/<path:name>")
def reset(name: str) -> dict[str, Any]:
    """Forget the strikes of one model, by full or short name."""
    known = router().current_table().resolve(name) or name
    if known not in router().current_table().models and known not in router().breakers.snapshot():
        raise RouterError(404, "model_not_found", "no such model: GET /v1/models lists them")
    router().breakers.reset([known])
    return {"status": "ok", "model": known}


@routes.post("/circuit-breaker/reset-all")
def reset_all() -> dict[str, Any]:
    """Forget the strikes of all models."""
    router().breakers.reset()
    return {"status": "ok"}


# --- application -------------------------------------------------------------------------------


def create_app(settings: Settings | None = None, *, session: requests.Session | None = None,
               clock: Callable[[], float] = time.monotonic) -> flask.Flask:  # fmt: skip
    """The WSGI application. RoutesError or SettingsError when it cannot serve."""
    settings = settings or Settings.from_env(os.environ)
    log_to_stderr(settings.log_format)
    if settings.notify_url:
        log.addHandler(Notifier(settings.notify_url, settings.instance))
    session = session or new_session(settings.threads)
    if settings.demo:
        from parts import demo  # only here: a router with a key never loads it

        session.mount("demo://", demo.DemoAdapter(Reply))
    app = App(settings, HERE / "parts/dashboard.html")
    cluster = None
    if settings.redis_url:
        from parts.cluster import Cluster  # only here: one instance alone runs no line of it

        cluster = Cluster(settings.redis_url, settings.instance, settings.address[1], clock)
    owner = app.extensions["router"] = Router(settings, session, clock, cluster)
    if cluster:
        cluster.join(owner.store, owner.breakers, owner.history)
    app.register_blueprint(routes)
    app.register_blueprint(shown)
    app.before_request(lambda: preflight(flask.request, settings))
    app.before_request(lambda: guard(flask.request, settings, owner.clients))
    app.after_request(add_headers)
    app.register_error_handler(Exception, error_response)
    log.info("start", {"version": VERSION, "routes": str(settings.routes), "demo": settings.demo})
    table = owner.store.current()
    if table.mode != "keywords" and not table.classifier:  # an upstream's would cost money
        threading.Thread(target=warm_up, args=(owner,), name="warm-up", daemon=True).start()
    return app


def warm_up(owner: Router) -> None:
    """Have Ollama load the classifier's model before the first request needs it."""
    call = owner.begin(None)
    owner.flights.acquire(call.flight, counted=False)
    try:
        owner.classifier.warm_up(call.table, call.flight)
    finally:
        owner.flights.release(call.flight)


def add_headers(response: flask.Response) -> flask.Response:
    """Headers of every answer."""
    for key, value in (ALWAYS | cors_headers(flask.request, router().settings)).items():
        response.headers.setdefault(key, value)
    if router().settings.demo:
        response.headers["X-Router-Demo"] = "1"
    return response


def error_response(raised: Exception) -> flask.Response:
    """The envelope for whatever was raised; ends the call that it ended."""
    path, e = flask.request.path, as_router_error(raised, flask.request.path)
    call: Call | None = flask.request.environ.get(CALL)
    dialect = DIALECT_AT.get(path, CHAT)
    streamed, size = (call.stream, len(call.chat.data)) if call else (False, 0)
    if call is None and flask.request.method == "POST" and path in DIALECT_AT:
        call = router().begin(None, dialect)  # refused at the door: counted and logged like others
    elif call is None and e.error["type"] in ("not_found", "method_not_allowed"):
        call = router().begin(None)  # the trace of a client with another base URL
        call.reason = f"{flask.request.method} {known_part(path)}"
    if call:  # first of all: nothing below may keep its permit
        call.status = e.status
        call.outcome = "client_left" if e.status == 499 else "failed"
        router().finish(call)
    place = {"time": now_text(), "request_id": call.id if call else None, "path": path}
    for finding in (e.detail or ()) if e.status == 422 else ():
        router().rejections.info(json.dumps({**place, **finding}))
    status, body = dialect.told(e, place["request_id"] or "", streamed, size)
    response = flask.jsonify(body)
    response.status_code = status
    response.headers.extend(e.headers)
    response.headers.extend(call.headers() if call else {})
    return response


def explain_here(settings: Settings, text: str) -> dict[str, Any]:
    """The dry run of `text` without a service, which may ask Ollama; no circuit is known."""
    log.addHandler(logging.NullHandler())  # the answer says it all
    owner = Router(settings, new_session(1), time.monotonic)
    call = owner.begin(None)
    body = {"messages": [{"role": "user", "content": text}]}
    return explain(owner, call, read_chat(json.dumps(body).encode(), CHAT))


if __name__ == "__main__":
    sys.exit(main(explain_here))
