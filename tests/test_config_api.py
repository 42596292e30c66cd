"""Configuration over HTTP and by hand: the three routes, a real gunicorn, `router.py check`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import KEY, ROOT, LocalClient, Service, settings_for, small_routes
from upstream import Upstream

import router as module
from parts.errors import RoutesError

MODELS = ["acme/one", "acme/two"]
CREATIVE = {
    "name": "creative",
    "models": ["moonshotai/kimi-k2.5"],
    "keywords": ["story", "poem"],
    "description": "Creative writing",
}
MAPPING = {"category": "code", "models": ["glm-5", "kimi-k2.5", "gpt-4o-mini"]}


@pytest.fixture
def shipped(tmp_path: Path) -> LocalClient:
    """The file as it is shipped, so that the reference's examples work as printed."""
    path = tmp_path / "routes.json"
    path.write_bytes((ROOT / "routes.json").read_bytes())
    text = path.read_text().replace('"routing_mode": "hybrid"', '"routing_mode": "keywords"')
    path.write_text(text)
    return LocalClient(module.create_app(settings_for(path)))


def file_of(client: LocalClient) -> Path:
    return client.app.extensions["router"].settings.routes


def stored(client: LocalClient, name: str) -> Any:
    return json.loads(file_of(client).read_text())["categories"].get(name)


def set_category(client: LocalClient, name: str = "haiku", **more: Any) -> Any:
    return client.post("/config/category", {"name": name, "models": ["acme/one"], **more})


# --- the reference's answers ----


def test_the_references_category_example(shipped):
    answer = shipped.post("/config/category", CREATIVE)

    assert answer.status_code == 200
    assert list(answer.json.items())[:3] == [
        ("status", "ok"), ("category", "creative"), ("models", ["moonshotai/kimi-k2.5"])
    ]  # fmt: skip
    assert answer.json["warnings"] == ["keyword 'story' stands in conversation and in creative"]
    assert stored(shipped, "creative") == {k: v for k, v in CREATIVE.items() if k != "name"}


def test_the_references_mapping_example_stores_full_ids(shipped):
    full = ["z-ai/glm-5", "moonshotai/kimi-k2.5", "openai/gpt-4o-mini"]

    answer = shipped.post("/config/model-mapping", MAPPING)

    assert (answer.status_code, answer.json["status"]) == (200, "ok")
    assert (answer.json["category"], answer.json["models"]) == ("code", full)
    assert stored(shipped, "code")["models"] == full


def test_the_references_delete_example(shipped):
    shipped.post("/config/category", CREATIVE)

    answer = shipped.open("DELETE", "/config/category/creative")

    assert (answer.status_code, answer.json["status"]) == (200, "ok")
    assert stored(shipped, "creative") is None


def test_the_references_config_example(shipped):
    shown = shipped.get("/config").json

    assert list(shown)[:5] == ["routing_mode", "ollama", "model_mappings", "keywords",
                               "model_costs"]  # fmt: skip
    assert {"base_url", "model"} <= shown["ollama"].keys()
    assert shown["model_mappings"]["conversation"]
    assert shown["model_costs"]["z-ai/glm-5"] == {"input": 1.0, "output": 3.2}
    assert {"categories", "circuit_breaker", "upstreams"} <= shown.keys()


def test_what_is_made_and_deleted_gives_the_bytes_of_the_file_back(shipped):
    before = file_of(shipped).read_bytes()

    shipped.post("/config/category", CREATIVE)
    made = file_of(shipped).read_bytes()
    shipped.open("DELETE", "/config/category/creative")

    assert made != before
    assert file_of(shipped).read_bytes() == before


def test_a_mapping_changed_and_changed_back_gives_the_bytes_of_the_file_back(shipped):
    before, old = file_of(shipped).read_bytes(), stored(shipped, "code")["models"]

    shipped.post("/config/model-mapping", {**MAPPING, "models": ["glm-5"]})
    shipped.post("/config/model-mapping", {**MAPPING, "models": old})

    assert file_of(shipped).read_bytes() == before


# --- created, changed, deleted ----


def test_a_new_category_answers_the_next_chat(client, upstream):
    set_category(client, keywords=["autumn moon"], models=["acme/two"])

    answer = client.chat("autumn moon")

    assert answer.headers["X-Router-Category"] == "haiku"
    assert upstream.models_asked() == ["acme/two"]


def test_a_deleted_category_answers_no_more(client):
    set_category(client, keywords=["autumn moon"])
    client.open("DELETE", "/config/category/haiku")

    assert client.chat("autumn moon").headers["X-Router-Category"] == "conversation"
    assert client.chat(model="router/haiku").status_code == 404


def test_a_change_is_in_health_models_and_config_at_once(client):
    set_category(client)

    assert "haiku" in client.get("/health").json["categories"]
    assert "router/haiku" in [m["id"] for m in client.get("/v1/models").json["data"]]
    assert client.get("/config").json["model_mappings"]["haiku"] == ["acme/one"]


def test_keywords_and_description_stay_when_not_given(client):
    set_category(client, keywords=["moon"], description="Short verse")

    set_category(client, models=["acme/two"])

    assert stored(client, "haiku") == {"models": ["acme/two"], "keywords": ["moon"],
                                       "description": "Short verse"}  # fmt: skip


def test_keywords_and_description_change_when_given(client):
    set_category(client, keywords=["moon"], description="Short verse")

    set_category(client, keywords=[], description="")

    assert stored(client, "haiku") == {"models": ["acme/one"], "keywords": [], "description": ""}


def test_a_mapping_keeps_everything_but_the_chain(client):
    before = stored(client, "code")

    client.post("/config/model-mapping", {"category": "code", "models": ["acme/two"]})

    assert stored(client, "code") == {**before, "models": ["acme/two"]}


def test_members_no_call_can_set_stay(client):
    routes = json.loads(file_of(client).read_text())
    routes["categories"]["code"] |= {"stream": "whole", "timeouts_sec": {"idle": 2}}
    file_of(client).write_text(json.dumps(routes))

    set_category(client, "code", keywords=["x"])

    assert stored(client, "code")["stream"] == "whole"
    assert stored(client, "code")["timeouts_sec"] == {"idle": 2}


def test_a_long_list_of_keywords_is_wrapped_not_one_word_per_line(client):
    set_category(client, keywords=[f"word number {n}" for n in range(300)])

    lines = file_of(client).read_text().split('"haiku"')[1].splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 80


# --- names and warnings ----


def test_a_short_name_that_two_models_have_is_a_422_with_the_candidates(client):
    set_category(client, models=["other/one"])
    before = file_of(client).read_bytes()

    answer = set_category(client, "tanka", models=["one"])

    assert answer.status_code == 422
    assert "acme/one, other/one" in answer.json["error"]["message"]
    assert file_of(client).read_bytes() == before


def test_an_unknown_model_is_kept_as_given_with_a_warning(client):
    answer = set_category(client, models=["acme/one", "new/thing"], keywords=["moon"])

    assert answer.json["models"] == ["acme/one", "new/thing"]
    assert len(answer.json["warnings"]) == 1
    assert "new/thing" in answer.json["warnings"][0]


def test_a_keyword_that_another_category_has_is_warned_about(client):
    warnings = set_category(client, keywords=["Python"]).json["warnings"]

    assert len(warnings) == 1
    assert "'python'" in warnings[0]
    assert "code" in warnings[0]


def test_a_category_without_keywords_is_warned_about(client):
    assert len(set_category(client).json["warnings"]) == 1


def test_a_mapping_warns_too_and_only_of_its_own_category(client):
    set_category(client, "of", models=["new/thing"])

    answer = client.post("/config/model-mapping", {"category": "code", "models": ["a/b"]})

    assert len(answer.json["warnings"]) == 1
    assert "a/b" in answer.json["warnings"][0]
    assert set_category(client, "category", keywords=["x"]).json["warnings"] == []


# --- refused ----


def refused(client: LocalClient, answer: Any, before: bytes) -> str:
    """The place of the finding, after looking at everything a 422 promises."""
    assert answer.status_code == 422
    assert set(answer.json["error"]) >= {"message", "type", "param", "code"}
    assert answer.json["detail"][0]["msg"]
    assert file_of(client).read_bytes() == before
    return ".".join(str(part) for part in answer.json["detail"][0]["loc"])


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "body"),
        ({"name": "haiku"}, "body"),
        ({"models": MODELS}, "body"),
        ({"name": "haiku", "models": []}, "body.models"),
        ({"name": "haiku", "models": "acme/one"}, "body.models"),
        ({"name": "haiku", "models": [1]}, "body.models.0"),
        ({"name": "haiku", "models": ["a b"]}, "body.models.0"),
        ({"name": "haiku", "models": ["a/b\n"]}, "body.models.0"),
        ({"name": "haiku", "models": [f"a/{n}" for n in range(33)]}, "body.models"),
        ({"name": "haiku", "models": ["acme/one", "one"]}, "body"),
        ({"name": "haiku", "models": MODELS, "keywords": "moon"}, "body.keywords"),
        ({"name": "haiku", "models": MODELS, "keywords": None}, "body.keywords"),
        ({"name": "haiku", "models": MODELS, "keywords": ["?"]}, "body.keywords.0"),
        ({"name": "haiku", "models": MODELS, "keywords": ["x" * 101]}, "body.keywords.0"),
        ({"name": "haiku", "models": MODELS, "keywords": ["x"] * 10_001}, "body.keywords"),
        ({"name": "haiku", "models": MODELS, "keywords": ["a\ud800"]}, "body"),
        ({"name": "haiku", "models": MODELS, "description": "\ud800"}, "body"),
        ({"name": "haiku", "models": MODELS, "description": 1}, "body.description"),
        ({"name": "haiku", "models": MODELS, "description": "x" * 501}, "body.description"),
        ({"name": "haiku", "models": MODELS, "base_url": "http://evil"}, "body"),
        ({"name": "haiku", "models": MODELS, "api_key": "x"}, "body"),
        ({"name": "haiku", "models": MODELS, "stream": "whole"}, "body"),
        ({"name": 1, "models": MODELS}, "body.name"),
        ({"name": "", "models": MODELS}, "body.name"),
        ({"name": "Haiku", "models": MODELS}, "body.name"),
        ({"name": "my haiku", "models": MODELS}, "body.name"),
        ({"name": "-haiku", "models": MODELS}, "body.name"),
        ({"name": "haïku", "models": MODELS}, "body.name"),
        ({"name": "haiku\n", "models": MODELS}, "body.name"),
        ({"name": "x" * 65, "models": MODELS}, "body.name"),
        ({"name": "router", "models": MODELS}, "body.name"),
    ],
)
def test_a_category_that_does_not_fit_is_a_422_with_its_place(client, body, place):
    before = file_of(client).read_bytes()

    answer = client.post("/config/category", body)

    assert refused(client, answer, before).startswith(place)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"category": "code"}, "body"),
        ({"category": "code", "models": []}, "body.models"),
        ({"category": "code", "models": [f"a/{n}" for n in range(33)]}, "body.models"),
        ({"category": "code", "models": MODELS, "keywords": []}, "body"),
        ({"name": "code", "models": MODELS}, "body"),
        ({"category": ["code"], "models": MODELS}, "body.category"),
    ],
)
def test_a_mapping_that_does_not_fit_is_a_422_with_its_place(client, body, place):
    before = file_of(client).read_bytes()

    answer = client.post("/config/model-mapping", body)

    assert refused(client, answer, before).startswith(place)


@pytest.mark.parametrize("name", ["x", "0", "a-b_c", "9lives", "x" * 64, "keywords", "models"])
def test_a_name_that_fits_is_taken(client, name):
    assert set_category(client, name).status_code == 200
    assert stored(client, name)
    assert client.open("DELETE", f"/config/category/{name}").status_code == 200


@pytest.mark.parametrize("count", [1, 32])
def test_one_to_thirty_two_models_are_taken(client, count):
    answer = set_category(client, models=[f"a/m{n}" for n in range(count)])

    assert answer.status_code == 200
    assert len(stored(client, "haiku")["models"]) == count


def test_ten_thousand_keywords_are_taken(client):
    words = [f"moon {n}" for n in range(10_000)]

    answer = set_category(client, keywords=words)

    assert answer.status_code == 200
    assert stored(client, "haiku")["keywords"] == words


@pytest.mark.parametrize(
    "word", ['say "hi"', "back\\slash", "été", "日本語", "tab\there", "😀 face"]
)
def test_any_keyword_comes_back_as_it_went(client, word):
    set_category(client, keywords=[word])

    assert stored(client, "haiku")["keywords"] == [word]
    assert client.get("/config").json["keywords"]["haiku"] == [word]


def test_a_mapping_of_an_unknown_category_is_a_404(client):
    answer = client.post("/config/model-mapping", {"category": "nowhere", "models": MODELS})

    assert (answer.status_code, answer.json["error"]["code"]) == (404, "category_not_found")


@pytest.mark.parametrize(
    ("name", "status"),
    [("conversation", 422), ("tools", 400), ("code", 400), ("reasoning", 400), ("nowhere", 404),
     ("router", 404), ("a%20b", 404), ("..", 404), ("x" * 500, 404)],
)  # fmt: skip
def test_what_cannot_be_deleted_is_refused_by_its_kind(client, name, status):
    before = file_of(client).read_bytes()

    answer = client.open("DELETE", f"/config/category/{name}")

    assert answer.status_code == status
    assert set(answer.json["error"]) >= {"message", "type", "param", "code"}
    assert file_of(client).read_bytes() == before


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b'{"name": "a", "name": "b"}', b""])
def test_a_body_that_is_no_object_is_refused_and_changes_nothing(client, data):
    before = file_of(client).read_bytes()

    answer = client.post("/config/category", data=data, content_type="application/json")

    assert answer.status_code in (400, 422)
    assert file_of(client).read_bytes() == before


def test_a_rejection_is_logged_with_its_place_and_without_values(client):
    client.post("/config/category", {"name": "Secret Name", "models": MODELS})

    log = file_of(client).with_name("validation_errors.log").read_text()
    entry = json.loads(log.splitlines()[-1])
    assert (entry["path"], entry["loc"]) == ("/config/category", ["body", "name"])
    assert "Secret Name" not in log


# --- ETag, If-Match, 409 ----


def test_the_etag_changes_with_the_file_and_comes_back_with_it(client):
    first = client.get("/config").headers["ETag"]
    set_category(client)
    second = client.get("/config").headers["ETag"]

    client.open("DELETE", "/config/category/haiku")

    assert first != second
    assert client.get("/config").headers["ETag"] == first


def test_a_write_with_the_etag_in_force_goes_through(client):
    etag = client.get("/config").headers["ETag"]
    body = {"category": "code", "models": ["acme/two"]}

    answer = client.post("/config/model-mapping", body, headers={"If-Match": etag})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/config/category", {"name": "tanka", "models": MODELS}),
        ("POST", "/config/model-mapping", {"category": "code", "models": ["acme/two"]}),
        ("DELETE", "/config/category/haiku", None),
    ],
)
def test_a_write_with_a_stale_etag_is_a_412_and_changes_no_byte(client, method, path, body):
    etag = client.get("/config").headers["ETag"]
    set_category(client)
    before = file_of(client).read_bytes()

    answer = client.open(method, path, json=body, headers={"If-Match": etag})

    assert (answer.status_code, answer.json["error"]["code"]) == (412, "stale_version")
    assert file_of(client).read_bytes() == before


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/config/category", {"name": "tanka", "models": MODELS}),
        ("POST", "/config/model-mapping", {"category": "code", "models": ["acme/two"]}),
        ("DELETE", "/config/category/haiku", None),
    ],
)
def test_a_write_while_the_file_is_bad_is_a_409_that_says_where(client, method, path, body):
    file_of(client).write_text("{\n  oops")

    answer = client.open(method, path, json=body)

    assert answer.status_code == 409
    assert "line 2, column 3" in answer.json["error"]["message"]
    assert file_of(client).read_text() == "{\n  oops"


def test_config_never_shows_a_key(client):
    shown = client.get("/config")

    assert shown.json["upstreams"]["local"]["configured"] is True
    assert KEY not in shown.text


def test_config_says_when_an_upstream_has_no_key(routes):
    settings = module.Settings.from_env({"ROUTER_ROUTES": str(routes)})

    shown = LocalClient(module.create_app(settings)).get("/config").json

    assert shown["upstreams"]["local"]["configured"] is False


# --- bad files under the Flask client ----


def test_health_says_degraded_with_place_and_since_until_mended(client):
    path, clock = file_of(client), client.app.extensions["router"].store
    good = path.read_text()
    path.write_text(good.replace('"keywords":', '"keywrods":', 1))
    clock._next_look = 0.0

    bad = client.get("/health")
    path.write_text(good)
    clock._next_look = 0.0

    assert (bad.status_code, bad.json["status"]) == (200, "degraded")
    assert bad.json["config"]["status"] == "stale"
    assert "$.categories.tools" in bad.json["config"]["error"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", bad.json["config"]["since"])
    assert client.get("/health").json["status"] == "healthy"


# --- a real gunicorn ----


@pytest.fixture(scope="module")
def own_service(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("live")
    service = Service(folder, small_routes(shared_upstream.url), ROUTER_GUNICORN_LOGLEVEL="info")
    yield service
    service.stop()


@pytest.fixture
def live(own_service: Service, upstream: Upstream) -> Service:
    own_service.routes.write_text(json.dumps(small_routes(upstream.url), indent=2))
    until(lambda: health(own_service)["status"] == "healthy")
    return own_service


def until(true: Callable[[], Any], seconds: float = 15) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def health(service: Service) -> dict[str, Any]:
    return service.get("/health").json()


def worker_of(service: Service) -> int:
    """The process id of the youngest worker; 0 when there is none."""
    pid = service.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(map(int, children), default=0)


def renew_worker(service: Service, how: str) -> None:
    """A reload or a crash; returns when the next worker has booted."""
    before, booted = worker_of(service), service.log.read_text().count("Booting worker")
    os.kill(service.process.pid if how == "reload" else before,
            signal.SIGHUP if how == "reload" else signal.SIGKILL)  # fmt: skip
    until(lambda: service.log.read_text().count("Booting worker") > booted)
    until(lambda: worker_of(service) not in (0, before))


def test_a_hand_edit_is_in_force_within_a_second(live):
    routes = json.loads(live.routes.read_text())
    routes["categories"]["haiku"] = {"models": MODELS}
    live.routes.write_text(json.dumps(routes))
    began = time.monotonic()

    until(lambda: "haiku" in health(live)["categories"])

    assert time.monotonic() - began < 1


BAD_FILES: list[tuple[str, Callable[[Path], Any]]] = [
    ("$.categories: should be non-empty", lambda p: p.write_text(
        json.dumps({**json.loads(p.read_text()), "categories": {}}))),
    ("line 1, column 1", lambda p: p.write_text("")),
    ("cannot be read", lambda p: p.unlink()),
]  # fmt: skip


@pytest.mark.parametrize("how", ["reload", "crash"])
@pytest.mark.parametrize(("place", "spoil"), BAD_FILES)
def test_a_new_worker_while_the_file_is_bad_serves_the_last_good_table(live, how, place, spoil):
    live.post("/config/category", {"name": "haiku", "models": MODELS})
    spoil(live.routes)

    renew_worker(live, how)

    found = health(live)
    assert found["status"] == "degraded"
    assert place in found["config"]["error"]
    assert found["config"]["since"]
    assert live.chat(model="router/haiku").status_code == 200
    assert live.process.poll() is None


def test_the_service_answers_throughout_ten_kinds_of_bad_files(live):
    good = live.routes.read_text()
    bad = [
        *("", "{", "null", "[", good[:-3], good + "}", good.replace(":", "", 1), "\ufeff" + good),
        *(good.replace('"default_category"', '"default"'), good.replace("acme/one", "")),
    ]
    errors, statuses = [None], []

    for text in bad:
        live.routes.write_text(text)
        until(lambda: health(live)["config"].get("error") not in errors)
        errors.append(health(live)["config"]["error"])
        statuses.append(live.chat().status_code)

    live.routes.write_text(good)
    until(lambda: health(live)["status"] == "healthy")
    assert statuses == [200] * 10


def test_eight_clients_chat_through_writes_and_hand_edits_without_one_failure(live):
    done, statuses = threading.Event(), []
    good = live.routes.read_text()
    texts = [good, good.replace('"hello"', '"salut"'), good[:-9], good]

    def chat() -> None:
        with requests.Session() as session:
            while not done.is_set():
                body = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}
                answer = session.post(live.base + "/v1/chat/completions", json=body, timeout=20)
                statuses.append(answer.status_code)

    def write(n: int) -> int:
        body = {"name": f"haiku{n % 4}", "models": MODELS, "keywords": [f"moon{n}"]}
        return live.post("/config/category", body).status_code

    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(chat) for _ in range(8)]
        answers = [write(n) for n in range(30)]
        for text in texts * 10:
            live.routes.write_text(text)
            answers.append(write(0))
        done.set()
        failures = [future.exception(30) for future in chats]

    assert failures == [None] * 8
    assert set(statuses) == {200}
    assert len(statuses) > 100
    assert answers[:30] == [200] * 30
    assert set(answers) == {200, 409}


def test_writes_during_a_reload_are_all_kept(live):
    acknowledged = []

    def write() -> None:
        for n in range(60):
            answer = live.post("/config/category", {"name": f"haiku{n}", "models": MODELS})
            acknowledged.extend([f"haiku{n}"] * (answer.status_code == 200))

    with ThreadPoolExecutor(1) as pool:
        writes = pool.submit(write)
        renew_worker(live, "reload")
        failure = writes.exception(30)

    assert failure is None
    assert len(acknowledged) == 60
    assert set(acknowledged) <= json.loads(live.routes.read_text())["categories"].keys()


def test_a_start_with_a_bad_file_and_a_last_good_one_says_so_loudly_and_serves_it(
    tmp_path, upstream
):
    routes = small_routes(upstream.url)
    (tmp_path / ".routes.json.last-good").write_text(json.dumps(routes))
    service = Service(tmp_path, {**routes, "categories": {}})

    found = health(service)
    service.stop()

    assert found["status"] == "degraded"
    assert "BROKEN" in service.log.read_text()
    assert "$.categories: should be non-empty" in service.log.read_text()


# --- python router.py check ----


def check(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ROUTER_", "TEST_API"))}
    command = [sys.executable, "router.py", "check", *args]
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **env}, text=True, capture_output=True, timeout=20
    )


def checked(path: Path, text: str, **env: str) -> subprocess.CompletedProcess[str]:
    path.write_text(text)
    return check(str(path), **env)


SMALL = json.dumps(small_routes("http://127.0.0.1:1/v1"), indent=2)


def test_check_of_a_good_file_is_status_0(tmp_path):
    found = checked(tmp_path / "mine.json", SMALL, TEST_API_KEY="x")

    assert (found.returncode, found.stderr) == (0, "")
    assert "fine" in found.stdout
    assert "warning" not in found.stdout


def test_check_takes_the_file_of_the_settings_by_default(routes):
    found = check(ROUTER_ROUTES=str(routes))

    assert found.returncode == 0
    assert str(routes) in found.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL[:-1], ["line ", "column "]),
        (SMALL.replace('"keywords":', '"keywrods":', 1),
         ["$.categories.tools: unknown key 'keywrods'; did you mean 'keywords'?"]),
        (SMALL.replace('": "keywords"', '": "keyword"'),
         ["$.routing_mode: should be one of", "did you mean 'keywords'?"]),
        (SMALL.replace('": "conversation"', '": "conversatoin"'),
         ["$.default_category: ", "did you mean 'conversation'?"]),
    ],
)  # fmt: skip
def test_check_of_a_bad_file_is_status_1_with_file_place_and_suggestion(tmp_path, text, said):
    found = checked(tmp_path / "mine.json", text)

    assert (found.returncode, found.stdout) == (1, "")
    assert str(tmp_path / "mine.json") in found.stderr
    assert [part for part in said if part not in found.stderr] == []
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_check_of_what_cannot_be_read_is_a_sentence(tmp_path, name):
    found = check(str(tmp_path / name))

    assert found.returncode == 1
    assert str(tmp_path / name) in found.stderr
    assert "Traceback" not in found.stderr


def test_check_says_the_same_as_the_service(routes):
    routes.write_bytes(b'{"a": "\xe9"}')

    found = check(str(routes))

    with pytest.raises(RoutesError) as caught:
        module.create_app(settings_for(routes))
    assert str(caught.value) in found.stderr


def test_check_warns_of_unknown_models_missing_keys_and_unreachable_categories(tmp_path):
    routes = small_routes("http://127.0.0.1:1/v1")
    routes["categories"]["haiku"] = {"models": ["new/thing"]}

    found = checked(tmp_path / "mine.json", json.dumps(routes))

    warnings = [line for line in found.stdout.splitlines() if line.startswith("warning: ")]
    assert found.returncode == 0
    assert len(warnings) == 3
    assert any("new/thing" in line for line in warnings)
    assert any("TEST_API_KEY" in line for line in warnings)
    assert any("haiku" in line and "keyword" in line for line in warnings)


def test_check_leaves_the_folder_as_it_was(tmp_path):
    checked(tmp_path / "mine.json", SMALL)

    assert os.listdir(tmp_path) == ["mine.json"]


def test_the_shipped_file_checks_fine():
    assert check("routes.json").returncode == 0
