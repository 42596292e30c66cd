"""A turn stays with the model that answered its last step; a conversation can keep its category."""

from __future__ import annotations

import json
from typing import Any

import pytest
from formats import FORMATS
from test_dialects import speaking
from upstream import error

EVERY = tuple(FORMATS)


def call_of(name: str, n: int) -> list[dict[str, Any]]:
    """A call of a tool and its result, as each format has them in the history."""
    if name == "chat":
        function = {"name": "read", "arguments": json.dumps({"n": n})}
        call = {"id": f"c{n}", "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": f"c{n}", "content": f"result {n}"}]  # fmt: skip
    if name == "messages":
        use = {"type": "tool_use", "id": f"c{n}", "name": "read", "input": {"n": n}}
        result = {"type": "tool_result", "tool_use_id": f"c{n}", "content": f"result {n}"}
        return [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    call = {"type": "function_call", "call_id": f"c{n}", "name": "read",
            "arguments": json.dumps({"n": n})}  # fmt: skip
    return [call, {"type": "function_call_output", "call_id": f"c{n}", "output": f"result {n}"}]


def body_of(name: str, *history: Any, **more: Any) -> dict[str, Any]:
    """A request with these turns: a text is the person's, a number so many calls of a tool."""
    turns: list[dict[str, Any]] = []
    for item in history:
        if isinstance(item, int):
            turns += [turn for n in range(item) for turn in call_of(name, n)]
        else:
            turns.append({"role": "user", "content": item} if isinstance(item, str) else item)
    key = "input" if name == "responses" else "messages"
    needed = {"max_tokens": 100} if name == "messages" else {}
    return {"model": "router", key: turns, **needed, **more}


SAID = {"role": "assistant", "content": "Done."}
WEAK = "maybe we could look at another part of the whole thing"  # of reasoning, by a little


class Agent:
    """Asks in one format and tells which model answered."""

    def __init__(self, client: Any, upstream: Any, name: str):
        self.client, self.name, form = client, name, FORMATS[name]
        self.path, upstream.default = form.path, form.good()

    def ask(self, *history: Any, headers: Any = None, **more: Any) -> Any:
        return self.client.post(self.path, body_of(self.name, *history, **more), headers=headers)

    def model(self, *history: Any, **more: Any) -> str:
        answer = self.ask(*history, **more)
        assert answer.status_code == 200
        return answer.headers["X-Router-Model"]


@pytest.fixture
def agent(build, upstream, clock):
    def made(name: str = "chat", **changes: Any) -> Agent:
        calm = {"failure_threshold": 100, "recovery_timeout_sec": 300, "first_retry_sec": 5}
        given = {"upstreams": speaking(upstream), "circuit_breaker": calm, **changes}
        return Agent(build(clock, **given), upstream, name)

    return made


@pytest.mark.parametrize("name", EVERY)
def test_no_step_of_a_turn_hops_back_after_a_failover(agent, upstream, name):
    asking = agent(name)
    before = [asking.model("hello", n) for n in range(20)]
    upstream.scripts["acme/one"] = [error(503), FORMATS[name].good()]

    after = [asking.model("hello", n) for n in range(20, 50)]

    assert {*before} == {"acme/one"}
    assert {*after} == {"acme/two"}
    answer = asking.ask("hello", 50)
    assert answer.headers["X-Router-Mode"] == "keywords"
    assert answer.headers["X-Router-Reason"] == "hello, stays with acme%2Ftwo"


@pytest.mark.parametrize("name", EVERY)
def test_the_next_turn_and_a_repeated_request_start_at_the_head_of_the_chain(agent, upstream, name):
    asking = agent(name)
    upstream.scripts["acme/one"] = [error(503), FORMATS[name].good()]
    assert asking.model("hello") == "acme/two"

    assert asking.model("hello") == "acme/one"
    upstream.scripts["acme/one"] = [error(503), FORMATS[name].good()]
    assert asking.model("hello", 1) == "acme/two"
    assert asking.model("hello", 1, SAID, "hello again") == "acme/one"


@pytest.mark.parametrize("sticky", ["off", "turn"])
def test_off_keeps_nothing(agent, upstream, sticky):
    asking = agent(sticky=sticky)
    upstream.scripts["acme/one"] = [error(503), FORMATS["chat"].good()]
    asking.model("hello", 1)

    assert asking.model("hello", 2) == {"off": "acme/one", "turn": "acme/two"}[sticky]


OTHERS = {
    "another beginning": {"history": ("prove it", SAID, "hello", 1)},
    "another text": {"history": ("hello", SAID, "hello you", 1)},
    "a session": {"history": ("hello", 1), "headers": {"x-claude-code-session-id": "s2"}},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_turn_is_not_held_to_this_one(agent, upstream, other):
    asking = agent()
    upstream.scripts["acme/one"] = [error(503), FORMATS["chat"].good()]
    assert asking.model("hello", 1) == "acme/two"

    assert asking.model(*other["history"], headers=other.get("headers")) == "acme/one"


def test_with_a_session_the_beginning_may_be_cut_off(agent, upstream):
    asking, session = agent(), {"session-id": "s1"}
    upstream.scripts["acme/one"] = [error(503), FORMATS["chat"].good()]
    asking.model("why", SAID, "hello", 1, headers=session)

    assert asking.model("hello", 2, headers=session) == "acme/two"


def test_a_kept_model_that_fails_or_is_in_the_chain_no_more_is_left(agent, upstream):
    asking = agent()
    upstream.scripts["acme/one"] = [error(503), FORMATS["chat"].good()]
    asking.model("hello", 1)
    upstream.scripts["acme/two"] = error(503)
    assert asking.model("hello", 2) == "acme/one"
    assert asking.model("hello", 3) == "acme/one"

    asking.client.post("/config/category", {"name": "conversation", "models": ["acme/two"]})
    upstream.scripts.clear()

    assert asking.model("hello", 4) == "acme/two"


CHAINS = {
    "code": {"models": ["acme/one"], "keywords": ["python"]},
    "reasoning": {"models": ["acme/two"], "keywords": ["prove^9", "maybe^0.2"]},
    "conversation": {"models": ["acme/two"]},
}


@pytest.mark.parametrize("name", EVERY)
def test_a_conversation_keeps_its_category_until_a_text_is_clearly_of_another(agent, name):
    asking = agent(name, categories=CHAINS, sticky="conversation")
    asking.ask("python", 1)

    weak = asking.ask("python", 1, SAID, WEAK)
    step = asking.ask("python", 1, SAID, WEAK, 2)
    clear = asking.ask("python", 1, SAID, WEAK, 2, SAID, "prove it")

    seen = [(a.headers["X-Router-Category"], a.headers["X-Router-Mode"]) for a in (weak, step)]
    assert seen == [("code", "sticky"), ("code", "sticky")]
    assert weak.headers["X-Router-Reason"].endswith("this text alone is reasoning")
    assert clear.headers["X-Router-Category"] == "reasoning"
    assert clear.headers["X-Router-Mode"] == "keywords"


@pytest.mark.parametrize(("sticky", "later_s", "kept"), [
    ("conversation", 299, True), ("conversation", 301, False), ("turn", 0, False), ("off", 0, False)
])  # fmt: skip
def test_only_while_the_cache_is_warm_and_it_is_asked_for(agent, clock, sticky, later_s, kept):
    asking = agent(categories=CHAINS, sticky=sticky)
    asking.ask("python")
    clock += later_s

    answer = asking.ask("python", SAID, WEAK)

    assert (answer.headers["X-Router-Mode"] == "sticky") is kept
    assert (answer.headers["X-Router-Category"] == "code") is kept


def test_what_was_asked_for_by_name_is_not_overruled(agent):
    asking = agent(categories=CHAINS, sticky="conversation")
    asking.ask("python")

    answer = asking.ask("python", SAID, WEAK, model="router/reasoning")

    assert answer.headers["X-Router-Category"] == "reasoning"
    assert asking.ask("python", SAID, WEAK).headers["X-Router-Category"] == "code"


def test_a_conversation_stays_with_the_model_that_answered_its_last_turn(agent, upstream):
    asking = agent(sticky="conversation")
    upstream.scripts["acme/one"] = [error(503), FORMATS["chat"].good()]
    asking.model("hello")

    assert asking.model("hello", SAID, "hello you") == "acme/two"
    assert asking.model("hello") == "acme/one"


def test_the_dry_run_says_the_same_and_keeps_nothing(agent, upstream):
    asking = agent()
    upstream.scripts["acme/one"] = [error(503), FORMATS["chat"].good()]
    asking.model("hello", 1)

    body = asking.client.post("/route", body_of("chat", "hello", 2)).json

    assert [entry["model"] for entry in body["chain"]] == ["acme/two", "acme/one"]
    assert body["reason"] == "hello, stays with acme/two"
    config = asking.client.get("/config").json
    assert (config["sticky"], config["sticky_sec"]) == ("turn", 300)
