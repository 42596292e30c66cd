"""The speed bench's arithmetic, what it measures is nobody's test; and a short soak."""

from __future__ import annotations

from collections import Counter

import pytest
import soak
import sse
import where
from goals import rate_over, ratio
from load import Load
from speed import summed_up


def turn(rate: float, bad: int = 0) -> Load:
    return Load(rate=rate, p50_ms=1.0, p99_ms=rate / 10, cpu_ms=0.5, bad=bad)


def test_rounds_are_summed_up_by_medians_and_ratios_within_each_round():
    turns = {"router": [turn(100), turn(300), turn(200)], "other": [turn(50), turn(100), turn(400)]}

    rows = summed_up(turns, "router")

    assert [rows[name]["rate"] for name in turns] == [200, 100]
    assert rows["other"]["router_is"] == 2.0  # of 2, 3 and 0.5
    assert rows["router"]["p99_ms"] == 20.0
    assert rate_over("other")(rows["router"], rows) == 2.0


def test_errors_add_up_and_who_answered_nothing_is_outdone():
    assert summed_up({"router": [turn(1, bad=2), turn(1, bad=3)]}, "router")["router"]["bad"] == 5
    assert ratio(1, 0) == float("inf")


def test_cpu_time_counts_for_the_innermost_part_that_runs(monkeypatch):
    ticks = iter(range(0, 100, 10))
    monkeypatch.setattr(where.time, "thread_time_ns", lambda: next(ticks))
    everybody: list[Counter[str]] = []
    mine = where.Parts(everybody)
    inner = where.traced(lambda: None, "inner", mine)
    outer = where.traced(inner, "outer", mine)

    outer()

    assert everybody == [{"": 0, "outer": 20, "inner": 10}]


@pytest.mark.parametrize(
    ("times", "lost", "stalls"), [((0, 20), 0, 0), ((0, 300), 0, 1), ((0,), 1, 0)]
)
def test_lost_events_and_long_pauses_of_a_stream_are_counted(times, lost, stalls):
    stream = object.__new__(sse.Stream)
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    events = [head + sse.WORD % (n, 0) if n == 0 else sse.WORD % (n, 0) for n in range(len(times))]
    stream.sent = 0
    stream.arrivals = [(ms * 10**6, event) for ms, event in zip(times, events, strict=True)]

    found = sse.sum_up([stream], 2, 200)

    assert (found["lost"], found["stalls"]) == (lost, stalls)


def test_a_few_seconds_of_soak_lose_nothing(tmp_path):
    account, lost = soak.soak(tmp_path, seconds=3, clients=8)

    assert lost == []
    assert account.seen.total() > 50
