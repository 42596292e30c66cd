"""The failure drill ends as docs/failures.md promises, with every time shortened alike."""

from __future__ import annotations

from collections.abc import Callable

import drill
import pytest
from conftest import Service, small_routes
from formats import FORMATS
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


FORMS = [("chat", mode, name) for mode in ("stream", "whole") for name in FAULTS]
# What is read of an answer differs from one format to the next; `make drill` runs all in all.
READ = ("cut after 40 of 60 words", "stall after 20 words", "one malformed event", "no [DONE]",
        "context length 400", "content filter 400", "accounting")  # fmt: skip
FORMS += [(form, "stream", name) for form in ("messages", "responses") for name in READ]
FORMS += [("chat", "plain", name) for name in READ if "stall" not in name]


@pytest.mark.parametrize(("form", "mode", "name"), FORMS)
def test_each_fault_of_the_drill_ends_as_promised(drilled, upstream, form, mode, name):
    n, name, fault, streaming = FAULTS[name]
    one = drill.Drill(upstream, drilled, FORMATS[form], mode, SCALE)

    grade = drill.one(n, name, fault, one)

    assert grade == (streaming if mode == "stream" else "pass")


def test_16_faults_are_drilled_and_13_hidden_from_streams():
    assert [wanted for _, _, wanted in drill.FAULTS].count("pass") == 13
    assert len(drill.FAULTS) == 16
