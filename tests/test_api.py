"""The contract: every example of the reference, as printed there, and the error envelope."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import requests
import responses
from conftest import KEY, ROOT, LocalClient, settings_for, small_routes
from helpers import CHAT, failures, figures, in_flight, user
from responses import matchers
from upstream import answer_body, error
from werkzeug.test import EnvironBuilder

import router as module


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_reference_chat_example(shipped, path):
    body = {
        "model": "router",
        "messages": [user("Hello")],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "temperature": 0.7,
    }

    answer = shipped.post(path, body)

    assert answer.status_code == 200
    assert {"id", "model", "choices", "usage"} <= answer.json.keys()
    assert answer.json["usage"]["prompt_tokens"] == 10
    assert answer.headers["X-Router-Category"] == "tools"


def test_reference_health_example(shipped):
    health = shipped.get("/health").json

    assert list(health)[:5] == ["status", "service", "version", "routing_mode", "categories"]
    assert health["status"] == "healthy"
    assert health["service"] == "llm-router"
    assert health["version"] == "0.4.0"
    assert health["categories"] == ["tools", "code", "reasoning", "conversation"]


def test_reference_metrics_example(shipped):
    shipped.chat("write a python function")
    shipped.chat("hello")

    shown = figures(shipped)

    wanted = {
        "requests", "avg_latency_ms", "total_cost_usd", "model_distribution",
        "category_distribution", "routing_mode_distribution", "circuit_breaker", "recent_requests",
    }  # fmt: skip
    assert wanted <= shown.keys()
    assert shown["requests"]["total"] == 2
    assert shown["model_distribution"] == {"glm-5": 1, "gpt-4o-mini": 1}
    assert shown["category_distribution"] == {"code": 1, "conversation": 1}
    assert shown["routing_mode_distribution"] == {"keywords": 2}
    assert shown["circuit_breaker"] == {
        "failures": {},
        "open_circuits": {},
        "config": {"failure_threshold": 3, "recovery_timeout_sec": 300},
    }
    assert len(shown["recent_requests"]) == 2


def test_reference_config_example(shipped):
    config = shipped.get("/config").json

    assert list(config)[:5] == [
        "routing_mode", "ollama", "model_mappings", "keywords", "model_costs",
    ]  # fmt: skip
    assert config["ollama"]["model"] == "qwen2.5:0.5b"
    assert config["ollama"]["base_url"]
    assert config["model_mappings"]["code"][0] == "z-ai/glm-5"
    assert config["model_costs"]["z-ai/glm-5"] == {"input": 1.0, "output": 3.2}
    assert {"categories", "circuit_breaker", "upstreams"} <= config.keys()


def stored(routes, name):
    return json.loads(routes.read_text())["categories"].get(name)


def test_reference_category_and_delete_examples(shipped, routes):
    body = {"models": ["moonshotai/kimi-k2.5"], "keywords": ["story", "poem"],
            "description": "Creative writing"}  # fmt: skip

    answer = shipped.post("/config/category", {"name": "creative", **body})
    made = stored(routes, "creative")
    deleted = shipped.open("DELETE", "/config/category/creative")

    assert answer.status_code == deleted.status_code == 200
    assert list(answer.json.items())[:3] == [
        ("status", "ok"), ("category", "creative"), ("models", ["moonshotai/kimi-k2.5"])
    ]  # fmt: skip
    assert answer.json["warnings"] == ["keyword 'story' stands in conversation and in creative"]
    assert made == body
    assert deleted.json["status"] == "ok"
    assert stored(routes, "creative") is None


def test_reference_model_mapping_example_takes_short_names_and_stores_full_ids(shipped, routes):
    body = {"category": "code", "models": ["glm-5", "kimi-k2.5", "gpt-4o-mini"]}

    answer = shipped.post("/config/model-mapping", body)

    full = ["z-ai/glm-5", "moonshotai/kimi-k2.5", "openai/gpt-4o-mini"]
    assert answer.status_code == 200
    assert (answer.json["status"], answer.json["category"]) == ("ok", "code")
    assert answer.json["models"] == stored(routes, "code")["models"] == full
    assert shipped.get("/config").json["model_mappings"]["code"] == full


@pytest.mark.parametrize("name", ["moonshotai/kimi-k2.5", "kimi-k2.5"])
def test_reference_reset_example_needs_no_body(shipped, name):
    answer = shipped.post(f"/circuit-breaker/reset/{name}")

    assert answer.status_code == 200
    assert answer.json == {"status": "ok", "model": "moonshotai/kimi-k2.5"}
    assert shipped.post("/circuit-breaker/reset-all").json == {"status": "ok"}


def test_reference_error_422_is_in_validation_errors_log(shipped, tmp_path):
    answer = shipped.post("/v1/chat/completions", {"model": "router", "messages": "secret words"})

    line = json.loads((tmp_path / "validation_errors.log").read_text().splitlines()[-1])
    assert answer.status_code == 422
    assert answer.json["detail"] == [{"loc": ["body", "messages"], "msg": "should be a list [...]"}]
    assert line["path"] == "/v1/chat/completions"
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert line["msg"] == "should be a list [...]"
    assert "secret words" not in json.dumps(line)


def test_reference_error_500_when_all_models_failed(shipped, upstream):
    upstream.default = error(503)

    answer = shipped.chat()

    assert answer.status_code == 500
    assert answer.json["error"]["code"] == "all_models_failed"
    assert [a["outcome"] for a in answer.json["error"]["attempts"]] == ["server_error"] * 3


def test_reference_error_503_names_the_variable_of_a_missing_key(build):
    answer = build(TEST_API_KEY="").chat()

    assert answer.status_code == 503
    assert "TEST_API_KEY" in answer.json["error"]["message"]
    assert int(answer.headers["Retry-After"]) <= 30


def test_a_method_not_allowed_says_which_are(client):
    assert "POST" in client.get("/chat/completions").headers["Allow"]


def test_a_body_over_the_limit_is_a_413(build):
    answer = build(ROUTER_MAX_BODY_MB="1").chat("x" * 1_100_000)

    assert answer.status_code == 413
    assert "ROUTER_MAX_BODY_MB" in answer.json["error"]["message"]


def test_a_lone_surrogate_in_the_history_is_passed_on(client, upstream):
    data = b'{"messages": [{"role": "user", "content": "\\ud83d hello"}]}'

    answer = client.flask.post("/v1/chat/completions", data=data, content_type="application/json")

    assert answer.status_code == 200
    assert b"\\ud83d hello" in upstream.requests[-1].raw


def test_a_bug_of_ours_is_a_500_that_blames_no_model(client, monkeypatch):
    monkeypatch.setattr(client.router.upstreams, "open", None)

    answer = client.chat()

    assert answer.status_code == 500
    assert answer.json["error"]["code"] == "internal_error"
    assert failures(client) == {}


def test_an_answer_that_the_server_refuses_to_start_gives_its_permit_back(app, client):
    def refuse(*_):
        raise ValueError("a header it does not like")

    environ = EnvironBuilder(CHAT, method="POST", json={"messages": [user("a")]}).get_environ()

    with pytest.raises(ValueError, match="does not like"):
        app(environ, refuse)

    assert in_flight(client) == 0


def test_chat_answers_explain_themselves(client):
    headers = client.chat("please refactor this").headers

    assert headers["X-Router-Category"] == "code"
    assert headers["X-Router-Mode"] == "keywords"
    assert headers["X-Router-Reason"] == "refactor*"
    assert headers["X-Router-Model"] == "acme/one"
    assert headers["X-Router-Attempts"] == "1"
    assert headers["X-Router-Cost-Usd"] == "0.00005000"
    assert headers["X-Router-Cost-Source"] == "routes.json"
    assert len(headers["X-Request-Id"]) == 16


@pytest.mark.parametrize(
    ("model", "category", "first"),
    [
        ("router/code", "code", "acme/one"),
        ("code", "code", "acme/one"),
        ("acme/two", "explicit", "acme/two"),
        ("two", "explicit", "acme/two"),
        ("router/acme/two", "explicit", "acme/two"),
        ("router/two", "explicit", "acme/two"),
        ("router/router/code", "code", "acme/one"),
    ],
)
def test_an_explicit_model_or_category_is_taken(client, upstream, model, category, first):
    answer = client.chat(model=model)

    assert answer.headers["X-Router-Category"] == category
    assert answer.headers["X-Router-Mode"] == "explicit"
    assert upstream.models_asked() == [first]


@pytest.mark.parametrize("model", ["router", "router/router", "router/router/router"])
def test_the_routers_own_name_is_known_with_and_without_a_clients_prefix(client, model):
    answer = client.chat("refactor this", model=model)

    assert answer.headers["X-Router-Category"] == "code"
    assert answer.headers["X-Router-Mode"] == "keywords"
    assert "X-Router-Model-Ignored" not in answer.headers


@pytest.mark.parametrize(
    ("model", "category"), [("router/code", "code"), ("router/far", "explicit")]
)
def test_a_model_whose_id_begins_like_the_router_gives_way_to_a_category(
    tmp_path, upstream, model, category
):
    path = tmp_path / "routes.json"
    models = {"router/code": {}, "router/far": {}}
    path.write_text(json.dumps(small_routes(upstream.url, models=models)))

    answer = LocalClient(module.create_app(settings_for(path))).chat(model=model)

    assert answer.headers["X-Router-Category"] == category
    assert answer.headers["X-Router-Model"] == {"code": "acme/one"}.get(category, model)


def test_any_other_model_counts_as_router_and_says_so(client):
    answer = client.chat(model="gpt-99")

    assert answer.status_code == 200
    assert answer.headers["X-Router-Model-Ignored"] == "gpt-99"


@pytest.mark.parametrize("model", ["router/none", "router/", "router/router/none/x"])
def test_an_unknown_category_is_a_404(client, model):
    answer = client.chat(model=model)

    assert answer.status_code == 404
    assert answer.json["error"]["code"] == "model_not_found"


@responses.activate
def test_one_call_goes_to_the_base_url_with_the_key(tmp_path):
    path = tmp_path / "routes.json"
    path.write_text(json.dumps(small_routes("https://api.example.com/v1")))
    responses.post(
        "https://api.example.com/v1/chat/completions",
        json=answer_body("from afar"),
        match=[matchers.header_matcher({"Authorization": f"Bearer {KEY}"})],
    )
    client = LocalClient(module.create_app(settings_for(path), session=requests.Session()))

    answer = client.chat()

    assert answer.json["choices"][0]["message"]["content"] == "from afar"


def test_importing_the_module_starts_nothing_and_a_start_loads_only_what_is_set(routes):
    code = (
        "import threading, os, sys; os.environ.clear(); before = set(os.listdir('.'));"
        "import router, pathlib; assert threading.active_count() == 1;"
        "assert set(os.listdir('.')) <= before | {'__pycache__'};"
        "router.create_app(router.Settings(routes=pathlib.Path(sys.argv[1])));"
        "assert not {'demo', 'cluster', 'redis'} & {name.partition('.')[0] for name in sys.modules}"
    )

    subprocess.run([sys.executable, "-c", code, routes], cwd=ROOT, check=True, timeout=20)


@pytest.mark.parametrize(("key", "status"), [(KEY, 200), ("", 503)])
def test_readiness_needs_a_model_with_its_key(build, key, status):
    assert build(TEST_API_KEY=key).get("/health/ready").status_code == status


def test_index_points_a_program_to_the_routes(client):
    assert client.get("/").json["chat"] == "/v1/chat/completions"
