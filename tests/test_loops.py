"""An agent that makes the same call again and again is told of, and refused on demand."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from formats import FORMATS
from test_dialects import speaking
from test_turns import SAID, body_of

from parts.chat import read_chat
from parts.dialects import RESPONSES
from parts.loops import repeats
from parts.turns import Turns

EVERY = tuple(FORMATS)


def called(name: str, arguments: str, result: Any, id_: str, tool: str = "read") -> list[Any]:
    """A call of a tool and its result, in the format `name`."""
    if name == "chat":
        call = {"id": id_, "type": "function", "function": {"name": tool, "arguments": arguments}}
        return [{"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": id_, "content": result}]  # fmt: skip
    if name == "messages":
        use = {"type": "tool_use", "id": id_, "name": tool, "input": {"a": arguments}}
        told = {"type": "tool_result", "tool_use_id": id_, "content": result}
        return [{"role": "assistant", "content": [use]}, {"role": "user", "content": [told]}]
    call = {"type": "function_call", "call_id": id_, "name": tool, "arguments": arguments}
    thought = {"type": "reasoning", "encrypted_content": id_, "summary": []}
    return [thought, call, {"type": "function_call_output", "call_id": id_, "output": result}]


def same(name: str, times: int) -> list[Any]:
    return [turn for n in range(times) for turn in called(name, "{}", "same", f"c{n}")]


@pytest.mark.parametrize("name", EVERY)
def test_equal_calls_at_the_end_are_counted(name):
    other = called(name, '{"a": 1}', "same", "x")

    assert repeats([]) == (0, "")
    assert repeats(same(name, 12)) == (12, "read")
    assert repeats(same(name, 3) + other + same(name, 2)) == (2, "read")
    assert repeats(same(name, 5) + called(name, "{}", "other", "x"))[0] == 1
    assert repeats(same(name, 5) + called(name, "{}", "same", "x", "write")) == (1, "write")


def test_calls_at_once_and_old_ones_are_counted_too():
    calls = [{"id": f"c{n}", "function": {"name": "read", "arguments": "{}"}} for n in range(2)]
    told = [{"role": "tool", "tool_call_id": f"c{n}", "content": "same"} for n in range(2)]
    old = [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
           {"role": "function", "name": "f", "content": "same"}]  # fmt: skip

    assert repeats([{"role": "assistant", "tool_calls": calls}, *told] * 2) == (4, "read")
    assert repeats(old * 3) == (3, "f")


def test_what_clients_change_each_time_makes_no_difference():
    head = "Chunk ID: %s\nWall time: 0.000%d seconds\nProcess exited with code 0\nOutput:\nsame"
    codex = [t for n in range(4) for t in called("responses", "{}", head % (f"a{n}", n), f"c{n}")]
    parts = [[{"type": "text", "text": "same", **more}] for more in ({}, {"cache_control": {}})]
    claude = [t for n, p in enumerate(parts) for t in called("messages", "{}", p, f"c{n}")]

    assert (repeats(codex)[0], repeats(claude)[0]) == (4, 2)


ODD = [None, "x", 1, {}, {"tool_calls": [None, {"function": 3}, {}]}, {"content": [None, {}]},
       {"call_id": None}, {"output": 1}, {"role": "tool"}, {"function_call": "x"},
       {"role": "function", "content": []}]  # fmt: skip


def test_anything_may_stand_in_a_history():
    chance = random.Random(7)

    for _ in range(300):
        repeats(chance.choices(ODD, k=6))


@pytest.fixture
def client(build, upstream):
    def made(**changes: Any) -> Any:
        return build(upstreams=speaking(upstream), **changes)

    return made


@pytest.mark.parametrize("name", EVERY)
def test_a_loop_is_told_of_once_and_refused_from_the_limit_on(client, upstream, lines, name):
    asking, form = client(same_call_limit=11), FORMATS[name]
    upstream.default = form.good()

    answers = [asking.post(form.path, body_of(name, "hello", *same(name, n))) for n in range(13)]

    refused = {"responses": 400}.get(name, 422)
    assert [a.status_code for a in answers] == [200] * 11 + [refused] * 2
    assert "the same call 10 times" in answers[10].headers["X-Router-Reason"]
    assert "times" not in answers[9].headers["X-Router-Reason"]
    told = form.read_whole(answers[11].json).error
    assert "its last 11 calls of 'read' had the same arguments and the same result" in told
    assert "loop_detected" in answers[11].text or name == "messages"
    assert sum("same_call_repeated" in line for line in lines) == 1


def test_a_text_of_the_person_ends_the_count_and_without_a_limit_nobody_is_refused(client):
    history = ["hello", *same("chat", 30)]

    assert client().post("/v1/chat/completions", body_of("chat", *history)).status_code == 200
    asking = client(same_call_limit=5)
    more = body_of("chat", *history, SAID, "hello again", *same("chat", 4))
    assert asking.post("/v1/chat/completions", more).status_code == 200
    assert asking.get("/config").json["same_call_limit"] == 5


def honest(chance: random.Random, name: str) -> list[Any]:
    """A history of honest work: polling, pages, retries, the same file read now and then."""
    history: list[Any] = []
    for n in range(chance.randint(3, 60)):
        kind, id_ = chance.choice(["poll", "page", "read"]), f"c{len(history)}"
        if kind == "poll":
            for k in range(chance.randint(2, 40)):
                history += called(name, '{"job": 1}', f"{n}.{k} % done", f"{id_}.{k}", "status")
        elif kind == "page":
            history += called(name, json.dumps({"page": n}), "20 rows", id_, "list")
        else:
            for k in range(chance.randint(1, 5)):  # fails, and is tried again
                history += called(name, '{"file": "a"}', "not found", f"{id_}.{k}")
            history += called(name, '{"file": "b"}', f"text {n}", id_)
    return history


@pytest.mark.parametrize("name", EVERY)
def test_honest_work_is_never_taken_for_a_loop(name):
    chance = random.Random(24)

    counts = [repeats(honest(chance, name))[0] for _ in range(350)]

    assert max(counts) < 10


def test_loops_without_a_persons_text_are_told_for_each_client(lines):
    turns = Turns(time.monotonic)
    calls = [{"type": "function_call", "call_id": f"c{n}", "name": "ls", "arguments": "{}"}
             for n in range(12)]  # fmt: skip
    items = [item for call in calls
             for item in (call, {"call_id": call["call_id"], "output": "same"})]  # fmt: skip
    chat = read_chat(json.dumps({"model": "router", "input": items}).encode(), RESPONSES)

    for client in ("ann", "ben", "ben"):
        turns.check_loop(turns.find(chat, "", client), None, "id")

    assert sum("same_call_repeated" in line for line in lines) == 2
