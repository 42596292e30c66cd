"""The circuit breaker: its state table line by line, then compared with a simple model of it."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import Clock
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from parts.cluster import CircuitState
from parts.logs import EventFormatter
from router import Breakers, Ticket

CONFIG = {"failure_threshold": 3, "recovery_timeout_sec": 300, "first_retry_sec": 5}
LEASE_S = 100.0


class Bench:
    """Breakers on a clock moved by hand, with the words of the tests below."""

    def __init__(self, clock: Clock, peers: Any = None):
        self.clock = clock
        self.breakers = Breakers(clock, peers)

    def go(self, model: str = "m", **more: Any) -> Ticket:
        ticket = self.breakers.admit(model, LEASE_S, **more)
        assert ticket is not None
        return ticket

    def is_shut(self, model: str = "m") -> bool:
        return self.breakers.admit(model, LEASE_S) is None

    def end(self, ticket: Ticket, verdict: str, **more: Any) -> None:
        if verdict == "good":
            self.breakers.commit(ticket, CONFIG["failure_threshold"])
        self.breakers.settle(ticket, verdict, CONFIG, "reset", **more)

    def strike(self, times: int = 1, model: str = "m", **more: Any) -> None:
        for _ in range(times):
            self.end(self.go(model), "strike", **more)

    def shown(self, model: str = "m") -> dict[str, Any]:
        return self.breakers.snapshot()[model]


@pytest.fixture
def bench(clock: Clock) -> Bench:
    return Bench(clock)


@pytest.fixture
def lines(caplog) -> Iterator[list[str]]:
    """What the router logs, as it is written."""
    log, wording, found = logging.getLogger("llm_router"), EventFormatter(False), []

    def note(record: logging.LogRecord) -> bool:
        found.append(wording.format(record))
        return True

    caplog.set_level("INFO", "llm_router")
    log.addFilter(note)
    yield found
    log.removeFilter(note)


# --- closed --------------------------------------------------------------------------------------


def test_a_circuit_stays_closed_below_the_threshold(bench):
    bench.strike(2)

    assert bench.shown()["state"] == "closed"
    assert bench.shown()["strikes"] == 2
    assert not bench.is_shut()


def test_a_circuit_opens_at_the_threshold_for_first_retry_sec(bench):
    bench.strike(3)

    assert bench.shown()["state"] == "open"
    assert bench.shown()["retry_in_sec"] == 5
    assert bench.is_shut()


def test_an_answer_that_ended_well_forgets_the_strikes(bench):
    bench.strike(2)

    bench.end(bench.go(), "good")
    bench.strike(2)

    assert bench.shown()["state"] == "closed"


def test_an_attempt_that_does_not_count_leaves_the_strikes_as_they_are(bench):
    bench.strike(2)

    bench.end(bench.go(), "none")

    assert bench.shown()["strikes"] == 2


def test_a_threshold_of_one_opens_at_the_first_strike(bench):
    config = {**CONFIG, "failure_threshold": 1}

    bench.breakers.settle(bench.go(), "strike", config, "reset")

    assert bench.shown()["state"] == "open"


def test_models_do_not_share_strikes(bench):
    bench.strike(3, "m")

    assert bench.is_shut("m")
    assert not bench.is_shut("n")


def test_a_ticket_counts_once_however_often_it_is_settled(bench):
    ticket = bench.go()

    bench.end(ticket, "strike")
    bench.end(ticket, "strike")
    bench.end(ticket, "good")

    assert bench.shown()["strikes"] == 1


# --- open ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("later_s", [0.0, 2.5, 4.999])
def test_an_open_circuit_is_passed_over_until_it_is_due(bench, clock, later_s):
    bench.strike(3)

    clock += later_s

    assert bench.is_shut()
    assert not bench.breakers.would_admit("m")


def test_an_open_circuit_lets_one_request_through_when_it_is_due(bench, clock):
    bench.strike(3)

    clock += 5
    ticket = bench.go()

    assert ticket.probe
    assert bench.is_shut()
    assert bench.shown()["state"] == "half-open"


def test_an_open_circuit_that_is_also_held_waits_for_both(bench, clock):
    bench.strike(2)
    bench.strike(1, retry_after_s=60)

    clock += 59

    assert bench.is_shut()
    assert bench.shown()["retry_in_sec"] == 1


# --- the probe -----------------------------------------------------------------------------------


def probe(bench: Bench) -> Ticket:
    """The probe of a circuit that has just opened and come due."""
    bench.strike(3)
    bench.clock += 5
    return bench.go()


def test_a_probe_that_commits_closes_the_circuit_for_everyone(bench):
    ticket = probe(bench)

    bench.breakers.commit(ticket, 3)

    assert bench.shown()["state"] == "closed"
    assert not bench.go().probe
    assert not bench.go().probe


def test_after_a_probe_committed_one_more_strike_opens_again(bench):
    bench.breakers.commit(probe(bench), 3)

    bench.strike(1)

    assert bench.shown()["state"] == "open"


def test_a_probe_whose_answer_breaks_after_the_commit_opens_again(bench):
    ticket = probe(bench)
    bench.breakers.commit(ticket, 3)

    bench.breakers.settle(ticket, "strike", CONFIG, "cut")

    assert bench.shown()["state"] == "open"


def test_first_open_is_kept_until_an_answer_ends_well(bench, clock):
    bench.strike(3)
    clock += 80
    bench.breakers.commit(bench.go(), 3)

    bench.strike(1)

    assert bench.shown()["retry_in_sec"] == 20


def test_first_open_is_forgotten_when_an_answer_ended_well(bench, clock):
    bench.strike(3)
    clock += 80
    bench.end(bench.go(), "good")

    bench.strike(3)

    assert bench.shown()["retry_in_sec"] == 5


def test_all_strikes_are_forgotten_when_the_probed_answer_ended_well(bench):
    bench.end(probe(bench), "good")

    bench.strike(2)

    assert bench.shown()["state"] == "closed"


@pytest.mark.parametrize(
    ("down_s", "wait_s"), [(5, 5), (19, 5), (40, 10), (60, 15), (1199, 299.75), (3600, 300)]
)
def test_a_probe_that_fails_waits_a_quarter_of_the_outage(bench, clock, down_s, wait_s):
    bench.strike(3)
    clock += down_s

    bench.end(bench.go(), "strike")

    clock += wait_s - 0.01
    assert bench.is_shut()
    clock += 0.02
    assert bench.go().probe


def test_a_flat_wait_when_first_retry_is_recovery_timeout(bench, clock):
    config = {"failure_threshold": 1, "recovery_timeout_sec": 30, "first_retry_sec": 30}
    bench.breakers.settle(bench.go(), "strike", config)
    clock += 500

    bench.breakers.settle(bench.go(), "strike", config)

    assert bench.shown()["retry_in_sec"] == 30


def test_a_probe_without_a_verdict_leaves_the_next_request_to_probe(bench):
    bench.end(probe(bench), "none")

    assert bench.shown()["state"] == "open"
    assert bench.go().probe


def test_a_probe_that_is_not_returned_is_lost_after_its_lease(bench, clock):
    probe(bench)

    clock += LEASE_S - 0.01
    assert bench.is_shut()
    clock += 0.01
    assert bench.shown()["state"] == "open"
    assert bench.go().probe


@pytest.mark.parametrize("verdict", ["good", "strike", "none"])
def test_a_lost_probe_says_nothing_once_another_probes(bench, clock, verdict):
    lost = probe(bench)
    clock += LEASE_S
    bench.go()

    bench.end(lost, verdict)

    assert bench.shown()["state"] == "half-open"
    assert bench.is_shut()


# --- any: Retry-After ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told_s", "held_s"), [(0, 1), (0.2, 1), (7, 7), (300, 300), (301, 300), (1e9, 300)]
)
def test_retry_after_holds_the_model_within_bounds(bench, clock, told_s, held_s):
    bench.strike(1, retry_after_s=told_s)

    clock += held_s - 0.01
    assert bench.is_shut()
    clock += 0.01
    assert not bench.is_shut()


def test_retry_after_is_a_strike_as_well(bench):
    bench.strike(1, retry_after_s=2)

    assert bench.shown()["strikes"] == 1
    assert bench.shown()["state"] == "open"


def test_a_closed_circuit_that_is_no_longer_held_is_for_everyone(bench, clock):
    bench.strike(1, retry_after_s=7)

    clock += 7

    assert [bench.go().probe for _ in range(3)] == [False] * 3
    assert bench.shown()["state"] == "closed"


def test_nothing_probes_a_held_model_not_even_early(bench, clock):
    bench.strike(2)
    bench.strike(1, retry_after_s=60)

    clock += 10

    assert bench.breakers.admit("m", LEASE_S, early=True) is None
    assert bench.breakers.due_soonest(["m"]) is None


def test_a_probe_that_is_rate_limited_is_held_and_open(bench, clock):
    bench.end(probe(bench), "strike", retry_after_s=30)

    clock += 29
    assert bench.is_shut()
    clock += 1
    assert bench.go().probe


# --- any: generations ----------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["good", "strike", "none"])
def test_a_result_from_before_the_opening_is_void(bench, verdict):
    late = bench.go()
    bench.strike(3)

    bench.end(late, verdict)

    assert bench.shown()["state"] == "open"
    assert bench.shown()["strikes"] == 3
    assert bench.shown()["retry_in_sec"] == 5


@pytest.mark.parametrize("verdict", ["good", "strike", "none"])
def test_a_result_from_before_the_reset_makes_no_circuit(bench, verdict):
    late = bench.go()
    bench.breakers.reset(["m"])

    bench.end(late, verdict)

    assert bench.breakers.snapshot() == {}


@pytest.mark.parametrize("verdict", ["good", "strike"])
def test_a_result_from_before_the_reset_is_void_for_the_next_circuit(bench, verdict):
    late = bench.go()
    bench.breakers.reset()
    bench.strike(1)

    bench.end(late, verdict)

    assert bench.shown()["strikes"] == 1


def test_a_late_strike_after_a_reset_says_nothing_in_the_log(bench, lines):
    bench.strike(2)
    late = bench.go()
    bench.breakers.reset()
    lines.clear()

    bench.end(late, "strike")

    assert lines == []


def test_a_late_probe_after_a_reset_says_nothing_in_the_log(bench, lines):
    late = probe(bench)
    bench.breakers.reset()
    lines.clear()

    bench.end(late, "good")

    assert lines == []


# --- reset, early probes, forgotten models, what is shown ----------------------------------------


def test_reset_forgets_strikes_hold_and_opening_at_once(bench):
    bench.strike(2)
    bench.strike(1, retry_after_s=100)

    bench.breakers.reset(["m"])

    assert not bench.go().probe
    assert bench.shown()["strikes"] == 0


def test_reset_of_one_model_leaves_the_others(bench):
    bench.strike(3, "m")
    bench.strike(3, "n")

    bench.breakers.reset(["m"])

    assert not bench.is_shut("m")
    assert bench.is_shut("n")


def test_the_open_circuit_due_soonest_is_named_when_all_are_open(bench, clock):
    bench.strike(3, "a")
    clock += 1
    bench.strike(3, "b")

    assert bench.breakers.due_soonest(["b", "a"]) == "a"


def test_nobody_is_probed_early_while_one_circuit_is_closed(bench):
    bench.strike(3, "a")
    bench.strike(2, "b")

    assert bench.breakers.due_soonest(["a", "b"]) is None
    assert bench.breakers.due_soonest(["a", "never-asked"]) is None


def test_a_held_circuit_is_not_the_one_due_soonest(bench, clock):
    bench.strike(2, "a")
    bench.strike(1, "a", retry_after_s=60)
    clock += 1
    bench.strike(3, "b")

    assert bench.breakers.due_soonest(["a", "b"]) == "b"


def test_an_early_probe_is_the_only_one(bench):
    bench.strike(3)

    ticket = bench.go(early=True)

    assert ticket.probe
    assert bench.breakers.admit("m", LEASE_S, early=True) is None


def test_the_circuit_of_a_model_in_no_chain_goes_when_nothing_is_in_the_air(bench):
    ticket = bench.go("gone")

    bench.breakers.keep_only(["m"])
    assert "gone" in bench.breakers.snapshot()
    bench.end(ticket, "strike")
    bench.breakers.keep_only(["m"])

    assert "gone" not in bench.breakers.snapshot()


def test_what_is_shown_says_why_and_since_when(bench):
    bench.breakers.settle(bench.go(), "strike", CONFIG, "server_error", 503, 7)

    shown = bench.shown()

    assert shown.keys() == {"state", "strikes", "retry_in_sec", "reason", "last_status", "since"}
    assert (shown["reason"], shown["last_status"], shown["retry_in_sec"]) == (
        "server_error",
        503,
        7,
    )
    assert shown["since"].startswith("20")


@pytest.mark.parametrize(
    ("verdict", "said"), [("strike", "circuit_opened model=m"), ("good", "circuit_closed model=m")]
)
def test_a_change_of_state_is_one_line_in_the_log(bench, lines, verdict, said):
    ticket = probe(bench)
    lines.clear()

    bench.end(ticket, verdict)

    assert [said in line for line in lines] == [True]


def test_a_probe_that_goes_is_a_change_of_state_and_one_line_in_the_log(bench, lines):
    bench.strike(3)
    bench.clock += 5
    lines.clear()

    bench.go()

    assert ["model=m" in line for line in lines] == [True]


# --- 64 threads at the moment of half-open -------------------------------------------------------


class Crowd:
    """Threads that ask all at once, round after round."""

    def __init__(self, breakers: Breakers, size: int, rounds: int):
        self.breakers = breakers
        self.rounds = rounds
        self.gate = threading.Barrier(size + 1, timeout=30)
        self.tickets: list[Ticket] = []
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(size)]

    def _ask(self) -> None:
        for _ in range(self.rounds):
            self.gate.wait()
            ticket = self.breakers.admit("m", LEASE_S)
            if ticket:
                self.tickets.append(ticket)
            self.gate.wait()

    def play(self) -> Iterator[list[Ticket]]:
        """The tickets of each round."""
        for thread in self.threads:
            thread.start()
        for _ in range(self.rounds):
            self.tickets.clear()
            self.gate.wait()
            self.gate.wait()
            yield list(self.tickets)
        for thread in self.threads:
            thread.join(30)


@pytest.mark.parametrize("verdict", ["strike", "none"])
def test_of_64_threads_at_half_open_exactly_one_goes_200_times_in_a_row(bench, clock, verdict):
    bench.strike(3)
    clock += 5
    seen = []

    for tickets in Crowd(bench.breakers, 64, 200).play():
        seen.append([ticket.probe for ticket in tickets])
        bench.end(tickets[0], verdict)
        clock += 300

    assert seen == [[True]] * 200


# --- with peers ----------------------------------------------------------------------------------


class Peers:
    """Another instance, as the breakers see it: what it answers, and what it was told."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        self.meanwhile = lambda: None
        self.lent: list[tuple[str, int]] = []
        self.told: list[tuple[str, int | None]] = []

    def lend(self, model: str, generation: int, lease_s: float) -> float:
        self.meanwhile()
        self.lent.append((model, generation))
        return self.wait_s

    def tell(self, model: str = "", generation: int | None = None) -> None:
        self.told.append((model, generation))


OPEN = CircuitState(True, 1050.0, 0.0, 990.0, 7, "timeout", 504, "2026-11-25T10:00:00Z")
CLOSED = CircuitState(False, 0.0, 0.0, None, 2, "", None, "")


@pytest.fixture
def peers() -> Peers:
    return Peers()


@pytest.fixture
def sharing(clock: Clock, peers: Peers) -> Bench:
    return Bench(clock, peers)


def due(bench: Bench) -> None:
    """The circuit of m is open, and its first probe due."""
    bench.strike(3)
    bench.clock += 5


def test_peers_are_not_asked_while_the_circuit_is_closed(sharing, peers):
    sharing.strike(2)
    sharing.end(sharing.go(), "good")

    assert (peers.lent, peers.told) == ([], [])


def test_a_probe_that_the_peers_refuse_stays_and_is_asked_about_later(sharing, peers, clock):
    due(sharing)
    peers.wait_s = 0.5

    assert sharing.is_shut()
    assert sharing.shown()["state"] == "half-open"
    assert sharing.is_shut()
    assert len(peers.lent) == 1
    clock += 0.5
    peers.wait_s = 0.0
    assert sharing.go().probe
    assert sharing.breakers.keep_only(frozenset()) is False


def test_nothing_is_in_the_air_after_a_refusal(sharing, peers):
    due(sharing)
    peers.wait_s = 0.5

    assert sharing.is_shut()

    assert sharing.breakers.keep_only(frozenset()) is True


def test_a_reset_while_the_peers_are_asked_is_not_undone_by_their_refusal(sharing, peers):
    due(sharing)
    peers.wait_s, peers.meanwhile = 0.5, lambda: sharing.breakers.reset(["m"])

    assert sharing.is_shut()

    assert not sharing.go().probe


@pytest.mark.parametrize("verdict", ["good", "strike", "none"])
def test_peers_hear_once_that_a_probe_ended(sharing, peers, verdict):
    due(sharing)
    ticket, peers.told = sharing.go(), []

    sharing.end(ticket, verdict)
    sharing.end(ticket, verdict)

    assert peers.told == [("m", peers.lent[0][1])]


def test_peers_hear_that_a_probe_ended_that_a_reset_had_made_void(sharing, peers):
    due(sharing)
    ticket = sharing.go()
    sharing.breakers.reset()

    sharing.end(ticket, "strike")

    assert peers.told[-1] == ("m", peers.lent[0][1])


def test_peers_hear_of_an_opening_a_hold_and_a_reset(sharing, peers):
    sharing.strike(3)
    sharing.strike(model="n", retry_after_s=9)
    sharing.breakers.reset(["n"])

    assert peers.told == [("m", None), ("n", None), ("", None)]


def test_news_hold_each_reset_once(sharing):
    sharing.strike(1)
    sharing.breakers.reset()
    sharing.breakers.reset(["x"])

    assert sharing.breakers.news() == ({}, {"m", "x", ""})
    assert sharing.breakers.news() == ({}, set())


def test_news_are_copies(sharing):
    sharing.strike(1)

    circuits, _ = sharing.breakers.news()
    sharing.strike(1)

    assert circuits["m"].strikes == 1


def test_one_alone_keeps_no_list_of_resets(bench):
    bench.breakers.reset()

    assert bench.breakers.news() == ({}, set())


def heard(bench: Bench, state: CircuitState | None) -> bool:
    return bench.breakers.hear("m", state, bench.breakers.news()[0].get("m"))


def test_an_opening_elsewhere_is_taken_over_and_makes_results_in_the_air_void(sharing):
    ticket = sharing.go()

    assert heard(sharing, OPEN)
    sharing.end(ticket, "good")

    assert sharing.shown() == {
        "state": "open", "strikes": 7, "retry_in_sec": 50.0, "reason": "timeout",
        "last_status": 504, "since": "2026-11-25T10:00:00Z"}  # fmt: skip


def test_a_closing_elsewhere_leaves_one_strike_to_the_next_opening(sharing):
    sharing.strike(3)

    assert heard(sharing, CLOSED)

    assert (sharing.shown()["state"], sharing.shown()["strikes"]) == ("closed", 2)


def test_strikes_of_a_circuit_that_is_closed_on_both_are_each_ones_own(sharing):
    sharing.strike(1)

    assert heard(sharing, CLOSED)

    assert sharing.shown()["strikes"] == 1


def test_a_reset_elsewhere_forgets_it_here(sharing):
    sharing.strike(3)

    assert heard(sharing, None)

    assert sharing.breakers.snapshot() == {}


def test_what_changed_here_since_is_not_overwritten_by_what_was_heard(sharing):
    known = sharing.breakers.news()[0].get("m")
    sharing.strike(3)

    assert not sharing.breakers.hear("m", CLOSED, known)

    assert sharing.shown()["state"] == "open"


@pytest.mark.parametrize("models", [["m"], None])
def test_a_reset_that_was_not_told_yet_is_not_overwritten(sharing, models):
    sharing.breakers.reset(models)

    assert not sharing.breakers.hear("m", OPEN, None)

    assert sharing.breakers.snapshot() == {}


def test_traffic_alone_is_no_change(sharing):
    sharing.strike(1)
    known = sharing.breakers.news()[0]["m"]
    sharing.end(sharing.go(), "good")
    sharing.strike(1)

    assert sharing.breakers.hear("m", OPEN, known)


# --- the reference -------------------------------------------------------------------------------


@dataclass
class Trip:
    """A ticket as the reference knows it: `epoch` is what the circuit was when it was given."""

    model: str
    epoch: object
    probe: bool


class Reference:
    """The rules read aloud: a circuit is a small dictionary, an epoch tells its lives apart."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.circuits: dict[str, dict[str, Any]] = {}

    def circuit(self, model: str) -> dict[str, Any]:
        fresh = {"strikes": 0, "opened": None, "due": None, "hold": 0.0, "probe_until": None,
                 "epoch": object()}  # fmt: skip
        return self.circuits.setdefault(model, fresh)

    def state(self, model: str) -> str:
        c, now = self.circuit(model), self.clock()
        if c["due"] is None:
            return "held" if now < c["hold"] else "closed"
        if c["probe_until"] is not None and now < c["probe_until"]:
            return "half-open"
        return "held" if now < c["hold"] else "due" if now >= c["due"] else "open"

    def ask(self, model: str, early: bool) -> Trip | None:
        state, c = self.state(model), self.circuit(model)
        if state == "closed":
            return Trip(model, c["epoch"], False)
        if state == "due" or (state == "open" and early):
            c.update(probe_until=self.clock() + LEASE_S, epoch=object())
            return Trip(model, c["epoch"], True)
        return None

    def counts(self, trip: Trip) -> bool:
        return self.circuits.get(trip.model, {}).get("epoch") is trip.epoch

    def commit(self, trip: Trip) -> None:
        if self.counts(trip) and trip.probe:
            strikes = CONFIG["failure_threshold"] - 1
            self.circuit(trip.model).update(due=None, probe_until=None, strikes=strikes)
            trip.probe = False

    def good(self, trip: Trip) -> None:
        self.commit(trip)
        if self.counts(trip):
            self.circuit(trip.model).update(strikes=0, opened=None)

    def none(self, trip: Trip) -> None:
        if self.counts(trip) and trip.probe:
            self.circuit(trip.model).update(probe_until=None)

    def strike(self, trip: Trip, retry_after_s: float | None) -> None:
        if not self.counts(trip):
            return
        c, now = self.circuit(trip.model), self.clock()
        c["strikes"] += 1
        if retry_after_s is not None:
            c["hold"] = now + min(max(1, retry_after_s), CONFIG["recovery_timeout_sec"])
        if trip.probe or c["strikes"] >= CONFIG["failure_threshold"]:
            opened = now if c["opened"] is None else c["opened"]
            wait_s = max(CONFIG["first_retry_sec"], (now - opened) / 4)
            due = now + min(CONFIG["recovery_timeout_sec"], wait_s)
            c.update(opened=opened, due=due, probe_until=None, epoch=object())

    def soonest(self, models: list[str]) -> set[str]:
        states = {model: self.state(model) for model in models}
        if {"closed", "due"} & set(states.values()):
            return set()
        now = self.clock()
        told = {model: self.circuit(model) for model in models}
        ready = {m: c["due"] for m, c in told.items() if c["due"] is not None and now >= c["hold"]}
        return {m for m, due in ready.items() if due == min(ready.values())}


MODELS = ["a", "b", "c"]
SHOWN = {
    "held": "open",
    "due": "open",
    "open": "open",
    "closed": "closed",
    "half-open": "half-open",
}


class Pair:
    """The breakers and the reference, given the same and compared after each step."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.real = Breakers(self.clock)
        self.told = Reference(self.clock)
        self.air: list[tuple[Ticket, Trip]] = []

    def ask(self, model: str, early: bool) -> None:
        ticket, trip = self.real.admit(model, LEASE_S, early=early), self.told.ask(model, early)
        assert (ticket and ticket.probe) == (trip and trip.probe)
        if ticket and trip:
            self.air.append((ticket, trip))

    def commit(self, which: int) -> None:
        ticket, trip = self.air[which % len(self.air)]
        self.real.commit(ticket, CONFIG["failure_threshold"])
        self.told.commit(trip)

    def end(self, which: int, verdict: str, retry_after_s: float | None = None) -> None:
        ticket, trip = self.air.pop(which % len(self.air))
        if verdict == "good":
            self.real.commit(ticket, CONFIG["failure_threshold"])
        self.real.settle(ticket, verdict, CONFIG, "why", 500, retry_after_s)
        {"good": self.told.good, "none": self.told.none,
         "strike": lambda trip: self.told.strike(trip, retry_after_s)}[verdict](trip)  # fmt: skip

    def reset(self, models: list[str] | None) -> None:
        self.real.reset(models)
        for model in MODELS if models is None else models:
            self.told.circuits.pop(model, None)

    def compare(self) -> None:
        shown = self.real.snapshot()
        for model in MODELS:
            state, real = (
                self.told.state(model),
                shown.get(model, {"state": "closed", "strikes": 0}),
            )
            assert real["state"] == SHOWN[state]
            assert self.real.would_admit(model) == (state in ("closed", "due"))
            if self.told.circuit(model)["due"] is None:
                assert real["strikes"] == self.told.circuit(model)["strikes"]
        named, right = self.real.due_soonest(MODELS), self.told.soonest(MODELS)
        assert named in right if right else named is None


WAITS = [0.0, 0.5, 1.0, 4.999, 5.0, 10.0, 60.0, LEASE_S, 299.0, 1000.0, 5000.0]


class BreakersAgainstReference(RuleBasedStateMachine):
    """Random histories, shrunk by hypothesis when one of them tells the two apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    @rule(model=st.sampled_from(MODELS), early=st.booleans())
    def ask(self, model: str, early: bool) -> None:
        self.pair.ask(model, early)

    @precondition(lambda self: self.pair.air)
    @rule(which=st.integers(0, 63))
    def commit(self, which: int) -> None:
        self.pair.commit(which)

    @precondition(lambda self: self.pair.air)
    @rule(which=st.integers(0, 63), verdict=st.sampled_from(["good", "none", "strike"]))
    def end(self, which: int, verdict: str) -> None:
        self.pair.end(which, verdict)

    @precondition(lambda self: self.pair.air)
    @rule(which=st.integers(0, 63), seconds=st.floats(0, 1e6))
    def end_with_retry_after(self, which: int, seconds: float) -> None:
        self.pair.end(which, "strike", seconds)

    @rule(
        model=st.sampled_from(MODELS),
        seconds=st.sampled_from(WAITS),
        verdict=st.sampled_from(["good", "none", "strike", "strike", "strike"]),
        times=st.integers(1, 3),
    )
    def wait_and_go_there_and_back(
        self, model: str, seconds: float, verdict: str, times: int
    ) -> None:
        self.pair.clock += seconds
        for _ in range(times):
            before = len(self.pair.air)
            self.pair.ask(model, early=False)
            if len(self.pair.air) > before:
                self.pair.end(before, verdict)

    @rule(seconds=st.one_of(st.sampled_from(WAITS), st.floats(0, 5000)))
    def wait(self, seconds: float) -> None:
        self.pair.clock += seconds

    @rule(models=st.one_of(st.none(), st.lists(st.sampled_from(MODELS), max_size=2)))
    def reset(self, models: list[str] | None) -> None:
        self.pair.reset(models)

    @invariant()
    def agree(self) -> None:
        self.pair.compare()


TestBreakersAgainstReference = BreakersAgainstReference.TestCase
TestBreakersAgainstReference.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, database=None, derandomize=True
)


def wander(seed: int, steps: int) -> Pair:
    """One random walk of `steps` steps, mostly strikes and asks so that circuits open."""
    dice, pair = random.Random(seed), Pair()
    for _ in range(steps):
        move = dice.random()
        if move < 0.45:
            pair.ask(dice.choice(MODELS), dice.random() < 0.3)
        elif move < 0.8 and pair.air:
            verdict = dice.choice(["strike", "strike", "strike", "good", "none"])
            retry_after_s = dice.choice([None, None, 0.5, 20, 1e4]) if verdict == "strike" else None
            pair.end(dice.randrange(64), verdict, retry_after_s)
        elif move < 0.85 and pair.air:
            pair.commit(dice.randrange(64))
        elif move < 0.98:
            pair.clock += dice.choice(WAITS)
        else:
            pair.reset(dice.choice([None, [dice.choice(MODELS)]]))
        pair.compare()
    return pair


@pytest.mark.parametrize("block", range(20))
def test_a_hundred_random_walks_agree_with_the_reference(block):
    walks = [wander(seed, steps=45) for seed in range(block * 100, block * 100 + 100)]

    assert len(walks) == 100
