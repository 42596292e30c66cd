"""Where JSON was asked for and the answer is none, one other model is tried, on demand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from formats import FORMATS
from helpers import last_attempts, open_circuits
from test_dialects import read, speaking
from upstream import whole

EVERY = tuple(FORMATS)
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
ASKS = {
    "chat": {"response_format": SCHEMA},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    "responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
}
GOOD = '{"a": [1, "é"]}'
each = pytest.mark.parametrize("stream", [False, True])
in_each = pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)


@pytest.fixture
def client(build, upstream):
    chain = {"models": ["acme/one", "acme/two", "acme/three"]}
    return build(upstreams=speaking(upstream), categories={
        "conversation": {**chain, "want": "json"}, "code": {**chain, "keywords": ["python"]},
    })  # fmt: skip


def ask(client: Any, form: Any, said: str = "hello", stream: bool = False, **more: Any) -> Any:
    return client.post(form.path, {**form.ask(said, stream=stream), **more})


@each
@in_each
def test_one_other_model_is_tried_without_a_strike(client, upstream, form, stream):
    upstream.scripts["acme/one"] = form.good(["I am ", "sorry."])
    upstream.default = form.good(['{"a": ', '[1, "é"]}'])

    answer = ask(client, form, stream=stream, **ASKS[form.name])

    assert read(form, answer) == (GOOD, "", True)
    assert last_attempts(client) == [("acme/one", "not_json"), ("acme/two", "success")]
    assert open_circuits(client) == {}


@each
@in_each
def test_the_second_opinion_is_passed_on(client, upstream, form, stream):
    upstream.default = form.good("I am sorry.")

    answer = ask(client, form, stream=stream, **ASKS[form.name])

    assert read(form, answer) == ("I am sorry.", "", True)
    assert answer.headers["X-Router-Model"] == "acme/two"
    assert len(upstream.requests) == 2


@each
@in_each
def test_nobody_is_held_to_it_who_did_not_ask(client, upstream, form, stream):
    upstream.default = form.good("I am sorry.")

    ask(client, form, stream=stream)
    ask(client, form, "python", stream=stream, **ASKS[form.name])

    assert upstream.models_asked() == ["acme/one"] * 2


def test_an_answer_that_used_up_its_length_on_nothing_is_empty(client, upstream):
    form = FORMATS["chat"]
    upstream.scripts["acme/one"] = whole("", finish_reason="length")
    upstream.default = form.good(GOOD)

    answer = ask(client, form, **ASKS["chat"])

    assert form.read_whole(answer.json).text == GOOD
    assert last_attempts(client)[0] == ("acme/one", "empty")


def test_a_call_of_a_tool_is_a_good_answer(client, upstream):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    upstream.default = whole(None, message={"tool_calls": [call]}, finish_reason="tool_calls")

    ask(client, FORMATS["chat"], **ASKS["chat"])

    assert upstream.models_asked() == ["acme/one"]
    assert json.loads(client.get("/config").data)["categories"]["conversation"]["want"] == "json"
