"""Configuration over HTTP and by hand: the three routes, and a real gunicorn meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import KEY, LocalClient, Service, small_routes
from helpers import in_turn, user, wait_until, worker_of

MODELS = ["acme/one", "acme/two"]
CATEGORY, MAPPING = "/config/category", "/config/model-mapping"


def stored(routes: Path, name: str) -> Any:
    return json.loads(routes.read_text())["categories"].get(name)


def set_category(client: LocalClient, name: str = "haiku", **more: Any) -> Any:
    return client.post(CATEGORY, {"name": name, "models": ["acme/one"], **more})


# --- created, changed, deleted -------------------------------------------------------------------


def test_a_new_category_answers_the_next_chat_and_is_shown_at_once(client, upstream):
    set_category(client, keywords=["autumn moon"], models=["acme/two"])

    answer = client.chat("autumn moon")

    assert answer.headers["X-Router-Category"] == "haiku"
    assert upstream.models_asked() == ["acme/two"]
    assert "haiku" in client.get("/health").json["categories"]
    assert "router/haiku" in [m["id"] for m in client.get("/v1/models").json["data"]]
    assert client.get("/config").json["model_mappings"]["haiku"] == ["acme/two"]


def test_a_deleted_category_answers_no_more_and_leaves_the_bytes_that_were(client, routes):
    before = routes.read_bytes()
    set_category(client, keywords=["autumn moon"])
    made = routes.read_bytes()

    client.open("DELETE", "/config/category/haiku")

    assert client.chat("autumn moon").headers["X-Router-Category"] == "conversation"
    assert client.chat(model="router/haiku").status_code == 404
    assert made != before
    assert routes.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "keywords", "description"),
    [({}, ["moon"], "Short verse"), ({"keywords": [], "description": ""}, [], "")],
)
def test_keywords_and_description_change_only_when_given(
    client, routes, given, keywords, description
):
    set_category(client, keywords=["moon"], description="Short verse")

    set_category(client, models=["acme/two"], **given)

    assert stored(routes, "haiku") == {"models": given.get("models", ["acme/two"]),
                                       "keywords": keywords,
                                       "description": description}  # fmt: skip


def test_what_a_call_does_not_set_stays(client, routes):
    file = json.loads(routes.read_text())
    file["categories"]["code"] |= {"stream": "whole", "timeouts_sec": {"idle": 2}}
    routes.write_text(json.dumps(file))
    before = stored(routes, "code")

    set_category(client, "code", keywords=["x"])
    client.post(MAPPING, {"category": "code", "models": ["acme/two"]})

    assert stored(routes, "code") == {**before, "keywords": ["x"], "models": ["acme/two"]}


# --- names and warnings --------------------------------------------------------------------------


def test_a_short_name_that_two_models_have_is_a_422_with_the_candidates(client, routes):
    set_category(client, models=["other/one"])
    before = routes.read_bytes()

    answer = set_category(client, "tanka", models=["one"])

    assert answer.status_code == 422
    assert "acme/one, other/one" in answer.json["error"]["message"]
    assert routes.read_bytes() == before


def test_an_unknown_model_is_kept_as_given_with_a_warning(client):
    answer = set_category(client, models=["acme/one", "new/thing"], keywords=["moon"])

    [warning] = answer.json["warnings"]
    assert answer.json["models"] == ["acme/one", "new/thing"]
    assert "new/thing" in warning


def test_a_mapping_warns_too_and_only_of_its_own_category(client):
    set_category(client, "of", models=["new/thing"])

    answer = client.post(MAPPING, {"category": "code", "models": ["a/b"]})

    [warning] = answer.json["warnings"]
    assert "a/b" in warning
    assert set_category(client, "category", keywords=["x"]).json["warnings"] == []


# --- refused ----


def category(**changes: Any) -> tuple[str, dict[str, Any]]:
    """A change of a category that is fine but for `changes`; ... drops a member."""
    body = {"name": "haiku", "models": MODELS, **changes}
    return CATEGORY, {key: value for key, value in body.items() if value is not ...}


MISFITS: dict[str, tuple[tuple[str, dict[str, Any]], str]] = {
    "nothing": ((CATEGORY, {}), "body"),
    "no models": (category(models=...), "body"),
    "no name": (category(name=...), "body"),
    "empty models": (category(models=[]), "body.models"),
    "models a string": (category(models="acme/one"), "body.models"),
    "a model a number": (category(models=[1]), "body.models.0"),
    "a model with a blank": (category(models=["a b"]), "body.models.0"),
    "a model with a line end": (category(models=["a/b\n"]), "body.models.0"),
    "33 models": (category(models=[f"a/{n}" for n in range(33)]), "body.models"),
    "a model twice": (category(models=["acme/one", "one"]), "body"),
    "keywords a string": (category(keywords="moon"), "body.keywords"),
    "keywords null": (category(keywords=None), "body.keywords"),
    "a keyword of signs": (category(keywords=["?"]), "body.keywords.0"),
    "a keyword of 101": (category(keywords=["x" * 101]), "body.keywords.0"),
    "10,001 keywords": (category(keywords=["x"] * 10_001), "body.keywords"),
    "a lone surrogate": (category(keywords=["a\ud800"]), "body"),
    "a lone surrogate to describe it": (category(description="\ud800"), "body"),
    "description a number": (category(description=1), "body.description"),
    "description of 501": (category(description="x" * 501), "body.description"),
    "a base URL": (category(base_url="http://evil"), "body"),
    "a key": (category(api_key="x"), "body"),
    "what only a hand may set": (category(stream="whole"), "body"),
    **{f"name {name!r:.9}": (category(name=name), "body.name") for name in
       (1, "", "Haiku", "my haiku", "-haiku", "haïku", "haiku\n", "../x", "x" * 65, "router")},
    "mapping without models": ((MAPPING, {"category": "code"}), "body"),
    "mapping to nothing": ((MAPPING, {"category": "code", "models": []}), "body.models"),
    "mapping with keywords": ((MAPPING, {"category": "code", "models": MODELS, "keywords": []}),
                              "body"),
    "mapping by name": ((MAPPING, {"name": "code", "models": MODELS}), "body"),
    "mapping of a list": ((MAPPING, {"category": ["code"], "models": MODELS}), "body.category"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "place"), MISFITS.values(), ids=MISFITS)
def test_a_change_that_does_not_fit_is_a_422_with_its_place(client, routes, change, place):
    before = routes.read_bytes()

    answer = client.post(*change)

    assert answer.status_code == 422
    assert set(answer.json["error"]) >= {"message", "type", "param", "code"}
    assert answer.json["detail"][0]["msg"]
    assert ".".join(map(str, answer.json["detail"][0]["loc"])).startswith(place)
    assert routes.read_bytes() == before


@pytest.mark.parametrize("name", ["x", "0", "a-b_c", "9lives", "x" * 64, "keywords", "models"])
def test_a_name_that_fits_is_taken(client, routes, name):
    assert set_category(client, name).status_code == 200
    assert stored(routes, name)
    assert client.open("DELETE", f"/config/category/{name}").status_code == 200


def test_32_models_and_ten_thousand_keywords_are_taken(client, routes):
    many = {"models": [f"a/m{n}" for n in range(32)],
            "keywords": [f"moon {n}" for n in range(10_000)]}  # fmt: skip

    assert set_category(client, **many).status_code == 200
    assert stored(routes, "haiku") == many


def test_any_keyword_comes_back_as_it_went(client, routes):
    words = ['say "hi"', "back\\slash", "été", "日本語", "tab\there", "😀 face"]

    set_category(client, keywords=words)

    assert stored(routes, "haiku")["keywords"] == words
    assert client.get("/config").json["keywords"]["haiku"] == words


def test_a_mapping_of_an_unknown_category_is_a_404(client):
    answer = client.post(MAPPING, {"category": "nowhere", "models": MODELS})

    assert (answer.status_code, answer.json["error"]["code"]) == (404, "category_not_found")


@pytest.mark.parametrize(
    ("name", "status"),
    [("conversation", 422), ("tools", 400), ("code", 400), ("reasoning", 400), ("nowhere", 404),
     ("router", 404), ("a%20b", 404), ("..", 404), ("x" * 500, 404)],
)  # fmt: skip
def test_what_cannot_be_deleted_is_refused_by_its_kind(client, routes, name, status):
    before = routes.read_bytes()

    answer = client.open("DELETE", f"/config/category/{name}")

    assert answer.status_code == status
    assert set(answer.json["error"]) >= {"message", "type", "param", "code"}
    assert routes.read_bytes() == before


# --- ETag, If-Match, 409 -------------------------------------------------------------------------

CHANGES: dict[str, tuple[str, str, Any]] = {
    "category": ("POST", CATEGORY, {"name": "tanka", "models": MODELS}),
    "mapping": ("POST", MAPPING, {"category": "code", "models": ["acme/two"]}),
    "deletion": ("DELETE", "/config/category/haiku", None),
}


def test_the_etag_changes_with_the_file_and_comes_back_with_it(client):
    first = client.get("/config").headers["ETag"]
    set_category(client)
    second = client.get("/config").headers["ETag"]

    client.open("DELETE", "/config/category/haiku", headers={"If-Match": second})

    assert first != second
    assert client.get("/config").headers["ETag"] == first


@pytest.mark.parametrize(("method", "path", "body"), CHANGES.values(), ids=CHANGES)
def test_a_write_with_a_stale_etag_is_a_412_and_changes_no_byte(client, routes, method, path, body):
    etag = client.get("/config").headers["ETag"]
    set_category(client)
    before = routes.read_bytes()

    answer = client.open(method, path, json=body, headers={"If-Match": etag})

    assert (answer.status_code, answer.json["error"]["code"]) == (412, "stale_version")
    assert routes.read_bytes() == before


@pytest.mark.parametrize(("method", "path", "body"), CHANGES.values(), ids=CHANGES)
def test_a_write_while_the_file_is_bad_is_a_409_that_says_where(client, routes, method, path, body):
    routes.write_text("{\n  oops")

    answer = client.open(method, path, json=body)

    assert answer.status_code == 409
    assert "line 2, column 3" in answer.json["error"]["message"]
    assert routes.read_text() == "{\n  oops"


@pytest.mark.parametrize("key", [KEY, ""])
def test_config_says_whether_there_is_a_key_and_never_shows_it(build, key):
    shown = build(TEST_API_KEY=key).get("/config")

    assert shown.json["upstreams"]["local"]["configured"] is bool(key)
    assert KEY not in shown.text


def test_health_says_degraded_with_place_and_since_until_mended(build, routes, clock):
    client, good = build(clock), routes.read_text()
    routes.write_text(good.replace('"keywords":', '"keywrods":', 1))
    clock += 1

    bad = client.get("/health")
    routes.write_text(good)
    clock += 1

    assert (bad.status_code, bad.json["status"]) == (200, "degraded")
    assert bad.json["config"]["status"] == "stale"
    assert "$.categories.tools" in bad.json["config"]["error"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", bad.json["config"]["since"])
    assert client.get("/health").json["status"] == "healthy"


# --- a real gunicorn -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_service(serve: Callable[..., Service]) -> Service:
    return serve(ROUTER_GUNICORN_LOGLEVEL="info")


@pytest.fixture
def live(own_service: Service, upstream: Any) -> Service:
    own_service.routes.write_text(json.dumps(small_routes(upstream.url), indent=2))
    wait_until(lambda: health(own_service)["status"] == "healthy", 15)
    return own_service


def health(service: Service) -> dict[str, Any]:
    return service.get("/health").json()


def renew_worker(service: Service, how: str) -> None:
    """A reload or a crash; returns when the next worker has booted."""
    before, booted = worker_of(service), service.log.read_text().count("Booting worker")
    os.kill(service.process.pid if how == "reload" else before,
            signal.SIGHUP if how == "reload" else signal.SIGKILL)  # fmt: skip
    wait_until(lambda: service.log.read_text().count("Booting worker") > booted, 15)
    wait_until(lambda: worker_of(service) not in (0, before), 15)


def test_a_hand_edit_is_in_force_within_a_second(live):
    routes = json.loads(live.routes.read_text())
    routes["categories"]["haiku"] = {"models": MODELS}
    live.routes.write_text(json.dumps(routes))

    assert wait_until(lambda: "haiku" in health(live)["categories"]) < 1


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a table that does not fit": ("$.categories: should be non-empty", lambda path: path.write_text(
        json.dumps({**json.loads(path.read_text()), "categories": {}}))),
    "nothing": ("line 1, column 1", lambda path: path.write_text("")),
    "no file": ("cannot be read", lambda path: path.unlink()),
}  # fmt: skip


@pytest.mark.parametrize(("how", "place", "spoil"), in_turn(BAD_FILES, "reload", "crash"))
def test_a_new_worker_while_the_file_is_bad_serves_the_last_good_table(live, how, place, spoil):
    live.post(CATEGORY, {"name": "haiku", "models": MODELS})
    spoil(live.routes)

    renew_worker(live, how)

    found = health(live)
    assert found["status"] == "degraded"
    assert place in found["config"]["error"]
    assert found["config"]["since"]
    assert live.chat(model="router/haiku").status_code == 200
    assert live.process.poll() is None


def test_the_service_answers_throughout_one_bad_file_after_the_other(live):
    good = live.routes.read_text()
    errors, statuses = [None], []

    for text in ("", good[:-3], good.replace('"default_category"', '"default"')):
        live.routes.write_text(text)
        wait_until(lambda: health(live)["config"].get("error") not in errors)
        errors.append(health(live)["config"]["error"])
        statuses.append(live.chat().status_code)

    live.routes.write_text(good)
    wait_until(lambda: health(live)["status"] == "healthy")
    assert statuses == [200] * 3


def test_eight_clients_chat_through_writes_and_hand_edits_without_one_failure(live):
    done, statuses = threading.Event(), []
    good = live.routes.read_text()
    texts = [good, good.replace('"hello"', '"salut"'), good[:-9], good]

    def chat() -> None:
        with requests.Session() as session:
            while not done.is_set():
                body = {"model": "router", "messages": [user("hello")]}
                answer = session.post(live.base + "/v1/chat/completions", json=body, timeout=20)
                statuses.append(answer.status_code)

    def write(n: int) -> int:
        body = {"name": f"haiku{n % 4}", "models": MODELS, "keywords": [f"moon{n}"]}
        return live.post(CATEGORY, body).status_code

    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(chat) for _ in range(8)]
        answers = [write(n) for n in range(15)]
        for text in texts * 4:
            live.routes.write_text(text)
            answers.append(write(0))
        done.set()
        failures = [future.exception(30) for future in chats]

    assert failures == [None] * 8
    assert set(statuses) == {200}
    assert len(statuses) > 100
    assert answers[:15] == [200] * 15
    assert set(answers) == {200, 409}


def test_writes_during_a_reload_are_all_kept(live):
    acknowledged = []

    def write() -> None:
        for n in range(30):
            answer = live.post(CATEGORY, {"name": f"haiku{n}", "models": MODELS})
            acknowledged.extend([f"haiku{n}"] * (answer.status_code == 200))

    with ThreadPoolExecutor(1) as pool:
        writes = pool.submit(write)
        renew_worker(live, "reload")
        failure = writes.exception(30)

    assert failure is None
    assert len(acknowledged) == 30
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
