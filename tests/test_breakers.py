"""The circuit breaker: its state table line by line, then compared with a simple model of it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Clock

from parts.cluster import CircuitState
from router import Breakers, Ticket

CONFIG = {"failure_threshold": 3, "recovery_timeout_sec": 300, "first_retry_sec": 5}
LEASE_S = 100.0


class Bench:
    """Breakers on a clock moved by hand, with the words of the histories below."""

    def __init__(self, clock: Clock, peers: Any = None):
        self.clock = clock
        self.breakers = Breakers(clock, peers)
        self.air: list[Ticket] = []  # the oldest first

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

    def play(self, history: str) -> None:
        """`strike`, `good`, `none`: one goes and ends so; `held:7`: a strike with a Retry-After.
        `go`: one goes; `commit`, `end:good`: what becomes of the first that is still in the air.
        """
        for step in history.split():
            word, _, how = step.partition(":")
            if word == "wait":
                self.clock += float(how)
            elif word == "go":
                self.air.append(self.go())
            elif word == "commit":
                self.breakers.commit(self.air[0], CONFIG["failure_threshold"])
            elif word == "reset":
                self.breakers.reset(["m"])
            elif word == "held":
                self.strike(retry_after_s=float(how))
            else:
                self.end(self.air.pop(0) if word == "end" else self.go(), how or word)

    def shown(self, model: str = "m") -> dict[str, Any]:
        return self.breakers.snapshot().get(
            model, {"state": "closed", "strikes": 0, "retry_in_sec": 0}
        )

    def next_one(self) -> str:
        """What a request that comes now is: shut out, free to go, or the probe."""
        would = self.breakers.would_admit("m")
        ticket = self.breakers.admit("m", LEASE_S)
        assert would == (ticket is not None)
        return "shut" if ticket is None else "probe" if ticket.probe else "free"


@pytest.fixture
def bench(clock: Clock) -> Bench:
    return Bench(clock)


OPEN = "strike strike strike"
PROBE = f"{OPEN} wait:5 go"
VERDICTS = ("good", "strike", "none")
# what happened; state, strikes and seconds to wait then; what the next request is
HISTORIES: dict[str, tuple[str, str, int, float, str]] = {
    "below the threshold it is closed": ("strike strike", "closed", 2, 0, "free"),
    "at the threshold it opens for first_retry_sec": (OPEN, "open", 3, 5, "shut"),
    "a good end forgets the strikes": ("strike strike good strike strike", "closed", 2, 0, "free"),
    "an end that says nothing keeps them": ("strike strike none", "closed", 2, 0, "free"),
    "nobody goes before it is due": (f"{OPEN} wait:4.999", "open", 3, 0, "shut"),
    "one goes when it is due": (f"{OPEN} wait:5", "open", 3, 0, "probe"),
    "and nobody else": (PROBE, "half-open", 3, 0, "shut"),
    "open and held it waits for both": ("strike strike held:60 wait:59", "open", 3, 1, "shut"),
    # the probe
    "a probe that commits closes it for everyone": (f"{PROBE} commit", "closed", 2, 0, "free"),
    "one more strike opens it again": (f"{PROBE} commit strike", "open", 3, 5, "shut"),
    "so does its own answer that breaks": (f"{PROBE} commit end:strike", "open", 3, 5, "shut"),
    "first_open is kept until then": (f"{OPEN} wait:80 go commit strike", "open", 3, 20, "shut"),
    "and forgotten by a good end": (f"{OPEN} wait:80 good {OPEN}", "open", 3, 5, "shut"),
    "which forgets all strikes": (f"{PROBE} end:good strike strike", "closed", 2, 0, "free"),
    **{f"down for {down_s} s it waits a quarter of it":
       (f"{OPEN} wait:{down_s} strike", "open", 4, wait_s, "shut")
       for down_s, wait_s in ((5, 5), (19, 5), (40, 10), (60, 15), (1199, 299.8), (3600, 300))},
    "a probe that says nothing leaves it to the next": (f"{PROBE} end:none", "open", 3, 0, "probe"),
    "a probe is awaited for its lease": (f"{PROBE} wait:99.99", "half-open", 3, 0, "shut"),
    "and lost after it": (f"{PROBE} wait:100", "open", 3, 0, "probe"),
    **{f"a lost probe that ends {verdict} says nothing":
       (f"{PROBE} wait:100 go end:{verdict}", "half-open", 3, 0, "shut") for verdict in VERDICTS},
    # Retry-After, which is a strike as well
    **{f"a Retry-After of {told} holds for {held_s} s": (f"held:{told}", "open", 1, held_s, "shut")
       for told, held_s in ((0, 1), (0.2, 1), (7, 7), (300, 300), (301, 300), (1e9, 300))},
    "until just before its end": ("held:7 wait:6.99", "open", 1, 0, "shut"),
    "then it is for everyone": ("held:7 wait:7", "closed", 1, 0, "free"),
    "a probe that is limited is held": (f"{OPEN} wait:5 held:30 wait:29", "open", 4, 1, "shut"),
    "and stays open": (f"{OPEN} wait:5 held:30 wait:30", "open", 4, 0, "probe"),
    # generations
    **{f"what ends {verdict} from before the opening is void":
       (f"go {OPEN} end:{verdict}", "open", 3, 5, "shut") for verdict in VERDICTS},
    **{f"what ends {verdict} from before the reset makes no circuit":
       (f"go reset end:{verdict}", "closed", 0, 0, "free") for verdict in VERDICTS},
    **{f"nor does it count for the next: {verdict}":
       (f"go reset strike end:{verdict}", "closed", 1, 0, "free") for verdict in VERDICTS},
    "a reset forgets strikes, hold and opening":
        ("strike strike held:100 reset", "closed", 0, 0, "free"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("history", "state", "strikes", "wait_s", "then"), HISTORIES.values(), ids=HISTORIES
)
def test_the_state_table_line_by_line(bench, history, state, strikes, wait_s, then):
    bench.play(history)

    shown = bench.shown()
    assert (shown["state"], shown["strikes"], shown["retry_in_sec"]) == (state, strikes, wait_s)
    assert bench.next_one() == then


@pytest.mark.parametrize(
    ("threshold", "retry_s", "down_s", "wait_s"), [(1, 5, 5, 5), (1, 30, 500, 30)]
)
def test_threshold_and_waits_are_those_of_the_configuration(
    bench, clock, threshold, retry_s, down_s, wait_s
):
    """The second is a flat wait: first_retry_sec is recovery_timeout_sec."""
    config = {
        "failure_threshold": threshold,
        "recovery_timeout_sec": 30,
        "first_retry_sec": retry_s,
    }
    bench.breakers.settle(bench.go(), "strike", config, "reset")
    first = bench.shown()
    clock += down_s

    bench.breakers.settle(bench.go(), "strike", config)

    assert (first["state"], first["retry_in_sec"]) == ("open", retry_s)
    assert bench.shown()["retry_in_sec"] == wait_s


def test_models_do_not_share_strikes(bench):
    bench.strike(3, "m")

    assert bench.is_shut("m")
    assert not bench.is_shut("n")


def test_a_ticket_counts_once_however_often_it_is_settled(bench):
    ticket = bench.go()

    for verdict in ("strike", "strike", "good"):
        bench.end(ticket, verdict)

    assert bench.shown()["strikes"] == 1


def test_nothing_probes_a_held_model_not_even_early(bench):
    bench.play("strike strike held:60 wait:10")

    assert bench.breakers.admit("m", LEASE_S, early=True) is None
    assert bench.breakers.due_soonest(["m"]) is None


def test_a_result_from_before_the_reset_leaves_nothing_behind(bench):
    bench.play("go reset end:strike")

    assert bench.breakers.snapshot() == {}


@pytest.mark.parametrize(("strikes", "verdict"), [(2, "strike"), (3, "good")])
def test_a_late_result_after_a_reset_says_nothing_in_the_log(bench, lines, strikes, verdict):
    """One strike more would have opened the circuit; the probe's good end would have closed it."""
    bench.strike(strikes)
    bench.clock += 5
    late = bench.go()
    bench.breakers.reset()
    lines.clear()

    bench.end(late, verdict)

    assert lines == []


# --- reset, early probes, forgotten models, what is shown ----------------------------------------


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
    ("verdict", "said"),
    [
        ("strike", "circuit_opened model=m reason=reset status=503"),
        ("good", "circuit_closed model=m"),
    ],
)
def test_a_change_of_state_is_one_line_in_the_log(bench, lines, verdict, said):
    bench.play(PROBE)
    begun = lines[-1:]
    lines.clear()

    bench.end(bench.air[0], verdict, status=503)

    assert ["circuit_half_open model=m" in line for line in begun] == [True]
    assert [said in line for line in lines] == [True]


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


@pytest.mark.parametrize("block", range(10))
def test_a_hundred_random_walks_agree_with_the_reference(block):
    walks = [wander(seed, steps=90) for seed in range(block * 100, block * 100 + 100)]

    assert len(walks) == 100
