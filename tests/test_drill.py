"""The failure drill ends as docs/failures.md promises, with every time shortened alike."""

from __future__ import annotations

from collections.abc import Callable

import drill
import pytest
from conftest import Service, small_routes
from upstream import Upstream

SCALE = 0.05
OUTAGE = "down for 60 s, 20 requests"  # its waits are test_breakers.py's; `make drill` runs it too
FAULTS = {name: (n, name, fault, wanted) for n, (name, fault, wanted) in
          enumerate(drill.FAULTS, 1) if name != OUTAGE}  # fmt: skip


@pytest.fixture(scope="module")
def drilled(shared_upstream: Upstream, serve: Callable[..., Service]) -> Service:
    scaled = drill.routes_for(shared_upstream.url, SCALE)
    plain = small_routes(shared_upstream.url)
    return serve(**{key: value for key, value in scaled.items() if value != plain[key]})


@pytest.mark.parametrize("mode", ["stream", "whole"])
@pytest.mark.parametrize(("n", "name", "fault", "streaming"), FAULTS.values(), ids=FAULTS)
def test_each_fault_of_the_drill_ends_as_promised(
    drilled, upstream, n, name, fault, streaming, mode
):
    grade = drill.one(n, name, fault, upstream, drilled, mode, SCALE)

    assert grade == ("pass" if mode == "whole" else streaming)


def test_16_faults_are_drilled_and_13_hidden_from_streams():
    assert [wanted for _, _, wanted in drill.FAULTS].count("pass") == 13
    assert len(drill.FAULTS) == 16
