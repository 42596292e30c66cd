"""A model that names the category: how it is asked, and one of an upstream instead of Ollama's."""

from __future__ import annotations

import json

import pytest
from conftest import KEY
from service import small_routes
from upstream import plain

from parts.classifier import EXAMPLES, messages_for
from parts.errors import RoutesError
from parts.table import load_table

WITH = {"upstream": "local", "model": "acme/judge", "timeout_sec": 1}


def named(category: str):
    content = json.dumps({"category": category})
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    return plain(200, json.dumps({"choices": [choice]}).encode())


@pytest.fixture
def asking(build, upstream):
    """A client whose categories a model of the upstream names."""
    upstream.scripts["acme/judge"] = named("reasoning")
    return build(routing_mode="ollama", classifier=WITH)


def questions(upstream) -> list:
    return [request for request in upstream.requests if request.model == "acme/judge"]


def test_the_examples_are_chat_turns_half_of_them_french():
    table = load_table(json.dumps(small_routes("http://127.0.0.1:1")))

    system, *turns, last = messages_for(table, "hello")

    assert [turn["role"] for turn in turns] == ["user", "assistant"] * len(EXAMPLES)
    assert turns[1]["content"] == '{"category":"tools"}'
    french = ("Pourquoi", "Bonjour", "Écris", "Quel")
    assert sum(text.startswith(french) for text, _ in EXAMPLES) == len(EXAMPLES) / 2
    assert "conversation" in system["content"]
    assert last == {"role": "user", "content": "hello"}


def test_examples_of_categories_that_the_file_lacks_are_left_out():
    raw = small_routes("http://127.0.0.1:1")
    del raw["categories"]["code"]

    said = json.dumps(messages_for(load_table(json.dumps(raw)), "hello"))

    assert '"code' not in said.replace("\\", "")


def test_a_model_of_an_upstream_names_the_category(asking, upstream):
    answer = asking.chat("refactor this")

    assert answer.headers["X-Router-Category"] == "reasoning"
    assert answer.headers["X-Router-Mode"] == "ollama"
    assert answer.headers["X-Router-Reason"] == "acme%2Fjudge said reasoning"
    question = questions(upstream)[0]
    assert question.path == "/v1/chat/completions"
    assert question.headers["authorization"] == f"Bearer {KEY}"
    assert question.body["messages"][-1]["content"] == "refactor this"
    assert question.body["stream"] is False


def test_its_answers_are_remembered_and_it_is_not_warmed_up(asking, upstream):
    asking.chat("alike")
    asking.chat("alike")

    assert len(questions(upstream)) == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, {"error": {"message": f"no luck with {KEY}"}}, "status 500"),
        (401, {"error": {"message": "wrong key"}}, "status 401"),
        (200, {"choices": []}, "unreadable_answer"),
        (200, {"choices": [{"message": {"content": "perhaps"}}]}, "unknown_category"),
    ],
)
def test_when_it_fails_keywords_answer_and_health_says_why(asking, upstream, status, body, reason):
    upstream.scripts["acme/judge"] = plain(status, json.dumps(body).encode())

    answer = asking.chat("refactor this")

    told = asking.get("/health").json["classifier"]
    assert (answer.status_code, answer.headers["X-Router-Mode"]) == (200, "keywords")
    assert (told["status"], told["reason"]) == ("failing", reason)
    assert KEY not in json.dumps(told)


def test_without_its_key_nobody_is_asked(build, upstream):
    needy = {"base_url": upstream.url, "api_key_env": "OTHER_API_KEY"}
    own = small_routes(upstream.url)["upstreams"]
    client = build(routing_mode="ollama", classifier={**WITH, "upstream": "other"},
                   upstreams={**own, "other": needy})  # fmt: skip

    answer = client.chat("refactor this")

    assert answer.headers["X-Router-Mode"] == "keywords"
    assert "set OTHER_API_KEY" in client.get("/health").json["classifier"]["message"]
    assert questions(upstream) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classifier": {**WITH, "upstream": "locol"}}, "$.classifier.upstream: is not in $.ups"),
        ({"machine_category": "cod"}, "$.machine_category: is not in $.categories"),
        ({"classifier": {"model": "x"}}, "$.classifier"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_its_place(change, says):
    with pytest.raises(RoutesError, match=r".") as refused:
        load_table(json.dumps(small_routes("http://127.0.0.1:1", **change)))

    assert says in str(refused.value)


def test_the_configuration_shows_it(asking):
    shown = asking.get("/config").json

    assert shown["classifier"] == WITH
    assert shown["machine_category"] == "conversation"
