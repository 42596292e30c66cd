"""Several instances with Debian's real redis-server: what they share, and what they do without."""

from __future__ import annotations

import contextlib
import json
import logging
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
import redis
import requests
from conftest import ROOT, Clock, Service, free_port, settings_for, small_routes
from helpers import kill_all, open_circuits, wait_until
from test_nginx import SITE, Nginx
from upstream import Upstream, error, hang, slow, whole

import cluster
import router as module
import startup
from routes_file import Refused

pytestmark = pytest.mark.debian("redis")
QUICK = {"failure_threshold": 3, "recovery_timeout_sec": 60, "first_retry_sec": 1}
PATIENT = {"connect": 2, "first_token": 20, "idle": 20, "answer": 20, "total": 30}
POEM = {"name": "poem", "models": ["acme/one"], "keywords": ["ode"], "description": "x"}
OURS = re.compile(r"llm-router:(config|circuits|seq|instances|probe:[0-9a-f]{32})")


class Redis:
    """A real redis-server in a folder of its own, on one port through all its lives."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.options = folder, options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port, decode_responses=True)
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self.folder), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.kill()
        self.client.close()


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


# --- one object at a time, in this process, a round at a time ------------------------------------


class Running(Clock):
    """A clock that runs, and that tests move on by hand."""

    def __call__(self) -> float:
        return self.now + time.monotonic()


class Member:
    """An instance without its thread: it looks at the cluster when `share` is called."""

    def __init__(self, folder: Path, name: str, server: Redis, url: str, routes: Any):
        folder.mkdir(exist_ok=True)
        self.redis = server.client
        self.file = folder / "routes.json"
        if routes:
            self.file.write_text(json.dumps(routes))
        settings = settings_for(self.file, ROUTER_REDIS_URL=url, ROUTER_INSTANCE=name)
        self.clock = Running()
        self.owner = module.create_app(settings, clock=self.clock).extensions["router"]
        self.cluster, self.store = self.owner.cluster, self.owner.store
        self.breakers, self.health = self.owner.breakers, self.owner.cluster.health
        self.air: list[Any] = []  # tickets, the oldest first

    def share(self) -> None:
        with contextlib.suppress(cluster.Away):
            self.cluster.share()

    def add(self, name: str) -> None:
        given = {"models": ["acme/one"], "keywords": [name]}
        self.store.change(lambda table: table.with_category(name, given, must_exist=False))

    def has(self, name: str) -> bool:
        return name in self.store.table.categories

    def edit(self, name: str) -> None:
        """As a person would: without asking anybody."""
        text = self.store.table.with_category(name, {"models": ["acme/one"]}, must_exist=False)
        self.write(text)

    def write(self, text: str) -> None:
        """Into its file, which it will look at next."""
        self.file.write_text(text)
        self.clock += 0.6

    def strike(self, model: str = "acme/one", **more: Any) -> None:
        ticket = self.breakers.admit(model, 5)
        self.breakers.settle(ticket, "strike", QUICK, "server_error", 500, **more)

    def fail(self, model: str = "acme/one") -> None:
        """Until the circuit opens."""
        for _ in range(3):
            self.strike(model)

    def held(self) -> None:
        self.strike(retry_after_s=30)

    def wait(self) -> None:
        """Time passes, for this instance, until open circuits are due."""
        self.clock += QUICK["first_retry_sec"]

    def state(self, model: str = "acme/one") -> str:
        return self.breakers.snapshot().get(model, {"state": "closed"})["state"]

    def ask(self, model: str = "acme/one") -> Any:
        return self.breakers.admit(model, 5)

    def go(self) -> None:
        ticket = self.ask()
        assert ticket is not None
        self.air.append(ticket)

    def probe(self) -> None:
        self.go()
        assert self.air[-1].probe

    def miss(self) -> None:
        assert self.ask() is None

    def commit(self) -> None:
        self.breakers.commit(self.air[0], QUICK["failure_threshold"])

    def end(self, verdict: str) -> None:
        self.breakers.settle(self.air.pop(0), verdict, QUICK)

    def reset(self, *models: str) -> None:
        self.breakers.reset(models or None)

    def die(self) -> None:
        """The others have not seen it for too long."""
        self.redis.zrem("llm-router:instances", self.cluster.link.member)


def share(*members: Member) -> None:
    """One looks at the cluster after the other."""
    for one in members:
        one.share()


@pytest.fixture
def server(shared_redis: Redis) -> Redis:
    shared_redis.client.flushall()
    return shared_redis


@pytest.fixture
def member(server: Redis, tmp_path: Path, monkeypatch) -> Callable[..., Member]:
    """Makes instances that share; each looks at the cluster once while it starts."""
    monkeypatch.setattr(cluster.Cluster, "start", lambda self: None)

    def make(name: str, routes: Any = None, url: str = "") -> Member:
        folder = tmp_path / name
        fresh = None if (folder / "routes.json").exists() else small_routes("http://127.0.0.1:9/v1")
        made = Member(folder, name, server, url or server.url, routes or fresh)
        made.share()
        return made

    return make


@pytest.fixture
def pair(member) -> tuple[Member, Member]:
    a, b = member("a"), member("b")
    a.share()
    return a, b


@pytest.fixture
def opened(pair: tuple[Member, Member]) -> tuple[Member, Member]:
    """Two who both know that a circuit is open."""
    a, b = pair
    a.fail()
    share(a, b)
    return a, b


def test_a_change_is_on_the_other_after_its_next_look_and_in_its_own_file(pair):
    a, b = pair

    a.add("poem")
    b.share()

    assert b.has("poem")
    assert b.file.read_text() == a.file.read_text()
    assert a.health() == {"status": "ok", "instance": "a", "version": b.health()["version"],
                          "instances": ["a", "b"]}  # fmt: skip


def test_a_write_on_an_old_version_is_a_409_and_changes_nothing(pair):
    a, b = pair
    a.add("poem")
    before = b.file.read_bytes()

    with pytest.raises(Refused) as refused:
        b.add("song")

    assert (refused.value.status, refused.value.kind) == (409, "conflict")
    assert b.file.read_bytes() == before
    b.share()
    b.add("song")
    a.share()
    assert a.has("poem") and a.has("song")


def test_a_hand_edit_counts_as_a_write(pair):
    a, b = pair

    a.edit("poem")
    share(a, b)

    assert b.has("poem")
    assert a.file.read_text() == b.file.read_text()


def test_a_hand_edit_that_comes_too_late_is_kept_beside_the_file(pair, caplog):
    a, b = pair
    a.add("poem")
    b.edit("song")
    mine = b.file.read_text()

    b.share()

    assert b.has("poem") and not b.has("song")
    assert b.file.with_name(".routes.json.mine").read_text() == mine
    assert [r.msg for r in caplog.records].count("cluster_file_kept") == 1


def test_a_broken_file_on_one_waits_until_it_is_mended(pair, caplog):
    a, b = pair
    b.write("{ broken")
    a.add("poem")

    b.share()
    b.clock += cluster.RETRY_S
    b.share()

    assert b.health()["behind"] == "routes_file_bad"
    assert b.file.read_text() == "{ broken"
    assert [r.msg for r in caplog.records].count("cluster_routes_refused") == 1
    b.write(json.dumps(small_routes("http://127.0.0.1:9/v1")))
    b.clock += cluster.RETRY_S
    b.share()
    assert b.has("poem")
    assert "behind" not in b.health()


def test_a_text_that_does_not_fit_is_never_in_force(pair, server):
    a, _ = pair
    before = a.file.read_bytes()
    server.client.hset("llm-router:config", mapping={"version": "9-0", "text": "{}", "by": "x"})

    a.share()

    assert a.health()["behind"] == "invalid_request_error"
    assert a.file.read_bytes() == before


def test_who_starts_takes_the_clusters_version(member):
    a = member("a")
    a.add("poem")

    b = member("b", small_routes("http://127.0.0.1:8/v1"))

    assert b.has("poem")
    assert "127.0.0.1:8" in b.file.with_name(".routes.json.mine").read_text()


def test_who_was_away_takes_what_changed_meanwhile(pair, member):
    a, _ = pair
    a.add("poem")

    b = member("b")

    assert b.has("poem")
    assert not b.file.with_name(".routes.json.mine").exists()


def test_a_file_that_was_edited_while_its_instance_was_down_counts_as_a_write(pair, member):
    a, b = pair
    b.edit("song")

    b = member("b")
    a.share()

    assert b.has("song") and a.has("song")


def test_two_workers_on_one_file_make_no_hand_edit_of_each_others_changes(pair, member):
    old, b = pair
    new = member("a")
    new.add("poem")
    b.share()
    b.add("song")

    share(old, new)

    assert old.has("song") and new.has("song")
    assert not old.file.with_name(".routes.json.mine").exists()


def test_a_crash_between_the_clusters_word_and_the_file_leaves_the_new_version(pair, member):
    a, b = pair
    text = a.store.table.with_category("poem", {"models": ["acme/one"]}, must_exist=False)
    a.cluster.agree(a.store.table.text, text)

    a = member("a")
    b.share()

    assert a.has("poem") and b.has("poem")


def test_a_change_that_cannot_be_written_is_taken_back(pair, monkeypatch):
    a, b = pair

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(Refused):
            a.add("poem")
    share(a, b)

    assert not a.has("poem") and not b.has("poem")
    assert a.health()["version"] == b.health()["version"]


def test_an_emptied_redis_gets_the_same_version_again(pair, server):
    a, b = pair
    a.add("poem")
    version = a.health()["version"]
    b.share()

    server.client.flushall()
    share(b, a)

    assert server.client.hget("llm-router:config", "version") == version
    assert a.has("poem") and b.has("poem")


def test_an_older_copy_of_redis_does_not_take_a_change_back(pair, server):
    a, b = pair
    old = server.client.hgetall("llm-router:config")
    a.add("poem")
    b.share()

    server.client.hset("llm-router:config", mapping=old)
    share(b, a)

    assert a.has("poem") and b.has("poem")


# --- circuits ------------------------------------------------------------------------------------


def test_a_circuit_that_opens_on_one_is_open_on_the_other_for_as_long(pair):
    a, b = pair

    a.fail()
    share(a, b)

    ours, theirs = (m.breakers.snapshot()["acme/one"] for m in (a, b))
    assert ours["state"] == theirs["state"] == "open"
    assert abs(ours["retry_in_sec"] - theirs["retry_in_sec"]) <= 0.2
    assert (theirs["reason"], theirs["last_status"]) == ("server_error", 500)


OPENED = "a.fail ab.share"
# what happened, to a, to b, or to one after the other; the state of the circuit for each of them
HISTORIES: dict[str, tuple[str, str, str]] = {
    "strikes are each instance's own": ("a.strike a.strike ab.share", "closed", "closed"),
    "what opens is open on both": (OPENED, "open", "open"),
    "a Retry-After holds on both": ("a.held ab.share b.miss", "open", "open"),
    "a reset is one on both": (f"{OPENED} b.reset:acme/one ba.share", "closed", "closed"),
    "a reset of all is one on both": (f"{OPENED} b.reset ba.share", "closed", "closed"),
    "but not heard again by who made it":
        ("a.fail a.reset a.share a.reset a.share a.strike a.strike a.share a.strike", "open",
         "closed"),
    "what goes after a reset undoes nothing of it":
        (f"{OPENED} a.reset a.go ab.share", "closed", "closed"),
    "what opens after a reset is open however late it is heard of":
        (f"{OPENED} a.reset a.fail ab.share", "open", "open"),
    "results in the air do not undo what was heard":
        ("b.go b.go b.go a.fail a.reset:acme/one a.share a.fail ab.share b.end:good b.end:good "
         "b.end:good ba.share", "open", "open"),
    "one probe in the cluster": (f"{OPENED} ab.wait a.probe b.miss", "half-open", "half-open"),
    "one that ends well closes it on both":
        (f"{OPENED} a.wait a.probe a.commit ab.share a.end:good", "closed", "closed"),
    "with one strike to go":
        (f"{OPENED} a.wait a.probe a.commit ab.share b.strike", "closed", "open"),
    "one that says nothing leaves the next to anybody":
        (f"{OPENED} a.wait a.probe a.end:none ab.share b.wait b.probe", "open", "half-open"),
    "the lease of a dead one goes to the next":
        (f"{OPENED} ab.wait a.probe a.die b.probe", "half-open", "half-open"),
    "nobody probes on what is no longer so":
        (f"{OPENED} b.wait a.reset:acme/one a.share b.miss b.share b.go", "closed", "closed"),
}  # fmt: skip


@pytest.mark.parametrize(("history", "of_a", "of_b"), HISTORIES.values(), ids=HISTORIES)
def test_circuits_are_shared_line_by_line(pair, history, of_a, of_b):
    members = dict(zip("ab", pair, strict=True))

    for step in history.split():
        who, _, does = step.partition(".")
        what, _, how = does.partition(":")
        for name in who:
            getattr(members[name], what)(*filter(None, [how]))

    assert [one.state() for one in pair] == [of_a, of_b]


def test_a_probe_that_ended_leaves_no_lease_behind(opened, server):
    a, _ = opened
    a.wait()

    a.probe()
    a.commit()
    a.share()
    a.end("good")

    assert list(server.client.scan_iter("llm-router:probe:*")) == []


def test_who_finds_it_due_in_the_last_moment_does_not_probe_without_a_lease(pair, monkeypatch):
    a, _ = pair
    a.fail()
    a.share()
    a.wait()

    with monkeypatch.context() as patch:
        patch.setattr(a.breakers, "_about_to_probe", lambda model, early: None)
        a.miss()

    a.probe()


def test_an_emptied_redis_hears_of_open_circuits_again(opened, server):
    a, b = opened

    server.client.flushall()
    share(a, b, a, b)

    assert server.client.hkeys("llm-router:circuits") == ["acme/one"]
    assert (a.state(), b.state()) == ("open", "open")


def test_circuits_of_models_that_left_the_table_are_forgotten(pair, server):
    a, b = pair
    a.fail("acme/two")
    a.share()
    routes = json.loads(a.file.read_text())
    for category in routes["categories"].values():
        category["models"] = ["acme/one"]

    a.write(json.dumps(routes))
    share(a, b, a, b)

    assert server.client.hkeys("llm-router:circuits") == []


def test_what_opened_while_alone_is_told_afterwards(pair, server):
    a, b = pair
    server.hang()
    a.share()
    a.fail()

    server.go_on()
    share(a, b)

    assert b.state() == "open"


# --- Redis that does not answer ------------------------------------------------------------------


def test_a_hung_redis_costs_a_probe_one_short_wait_and_the_next_none(pair, server):
    a, _ = pair
    a.fail("acme/one")
    a.fail("acme/two")
    a.wait()
    server.hang()

    began = time.monotonic()
    first = a.ask("acme/one")
    between = time.monotonic()
    second = a.ask("acme/two")
    done = time.monotonic()
    server.go_on()

    assert first.probe and second.probe
    assert between - began < 2 * cluster.CALL_S
    assert done - between < 0.05
    assert a.health()["error"] == "timeout"


def test_a_change_while_redis_hangs_is_a_503_and_never_comes_into_force(pair, server):
    a, b = pair
    before = a.file.read_bytes()
    server.hang()

    with pytest.raises(Refused) as refused:
        a.add("poem")
    time.sleep(cluster.VOID_S)  # by the clock of Redis
    server.go_on()
    share(a, b)

    assert (refused.value.status, refused.value.kind) == (503, "cluster_unreachable")
    assert a.file.read_bytes() == before
    assert not a.has("poem") and not b.has("poem")


def test_a_redis_that_is_slow_at_the_limit_does_not_come_and_go(pair, server, caplog):
    caplog.set_level(logging.INFO)
    a, _ = pair
    server.hang()
    a.share()
    server.go_on()
    server.client.ping()
    server.client.client_pause(150)

    a.share()

    assert a.health()["status"] == "alone"
    a.share()
    assert a.health()["status"] == "ok"
    assert [r.msg for r in caplog.records if r.msg in ("cluster_alone", "cluster_joined")][-2:] == [
        "cluster_alone", "cluster_joined"]  # fmt: skip


def test_a_full_redis_leaves_each_alone(pair, server, caplog):
    a, _ = pair
    before = a.file.read_bytes()
    server.client.set("filler", "x" * 2**20)
    server.client.config_set("maxmemory", "1mb")

    share(a, a)
    with pytest.raises(Refused):
        a.add("poem")

    assert a.health()["error"] == "full"
    assert a.file.read_bytes() == before
    assert [r.msg for r in caplog.records].count("cluster_alone") == 1
    server.client.config_set("maxmemory", "0")
    a.share()
    assert a.health()["status"] == "ok"


def test_the_password_is_nowhere(member, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    closed = Redis(tmp_path, "--requirepass", "s3cret-open")
    good = member("a", url=f"redis://:s3cret-open@127.0.0.1:{closed.port}/0")
    bad = member("b", url=f"redis://:s3cret-wrong@127.0.0.1:{closed.port}/0")
    closed.stop()

    assert good.health()["status"] == "ok"
    assert (bad.health()["status"], bad.health()["error"]) == ("alone", "auth")
    shown = caplog.text + str([r.args for r in caplog.records]) + str(bad.health())
    assert "s3cret" not in shown + repr(bad.owner.settings)


@pytest.mark.parametrize("url", ["http://:s3cret@h", "redis://:s3cret@h:port"])
def test_a_url_that_is_none_stops_the_start_without_showing_it(url, routes):
    with pytest.raises(startup.SettingsError) as wrong:
        module.create_app(settings_for(routes, ROUTER_REDIS_URL=url))

    assert "ROUTER_REDIS_URL" in str(wrong.value)
    assert "s3cret" not in str(wrong.value)


def test_a_missing_package_stops_the_start_with_the_command_that_helps(routes, monkeypatch):
    monkeypatch.setattr(startup, "find_spec", lambda name: None)

    with pytest.raises(startup.SettingsError, match=r"pip install 'redis>=5\.2,<9'"):
        settings_for(routes, ROUTER_REDIS_URL="redis://127.0.0.1/0")


# --- real instances ------------------------------------------------------------------------------


class Pair:
    """Two real instances, their Redis, and an nginx before them."""

    def __init__(self, server: Redis, upstream: Upstream, folders: list[Path]):
        self.server = server
        routes = small_routes(upstream.url, circuit_breaker=QUICK, timeouts_sec=PATIENT)
        self.a, self.b = (
            Service(folder, routes, ROUTER_REDIS_URL=server.url, ROUTER_INSTANCE=name)
            for folder, name in zip(folders, "ab", strict=True)
        )

    def both(self, seen: Callable[[Service], Any], seconds: float = 5.0) -> float:
        """How long it took until both see it; AssertionError when it takes longer."""
        return wait_until(lambda: all(seen(one) for one in (self.a, self.b)), seconds)

    def is_calm(self) -> None:
        """Both in the cluster, on the same routes, with no open circuit."""
        self.both(lambda one: cluster_of(one)["instances"] == ["a", "b"])
        self.a.post("/circuit-breaker/reset-all")
        self.both(lambda one: open_circuits(one) == {})


def cluster_of(one: Service) -> dict[str, Any]:
    return one.get("/health").json()["cluster"]


def wait_until_due(one: Service) -> None:
    wait_until(lambda: open_circuits(one)["acme/one"]["retry_in_sec"] == 0)
    time.sleep(0.06)  # it is rounded to tenths


def categories(one: Service) -> list[str]:
    return one.get("/health").json()["categories"]


def events_of(one: Service, since: int = 0) -> list[str]:
    return re.findall(r"event=(\w+)", one.log.read_text()[since:])


@pytest.fixture(scope="module")
def shared_pair(tmp_path_factory, shared_upstream) -> Iterator[Pair]:
    server = Redis(tmp_path_factory.mktemp("redis-of-pair"))
    two = Pair(server, shared_upstream, [tmp_path_factory.mktemp(name) for name in "ab"])
    yield two
    two.a.stop()
    two.b.stop()
    server.stop()


@pytest.fixture
def two(shared_pair: Pair, upstream: Upstream) -> Pair:
    shared_pair.is_calm()
    return shared_pair


def test_a_category_posted_to_one_and_deleted_on_the_other(two):
    assert two.a.post("/config/category", POEM).status_code == 200
    two.both(lambda one: "poem" in categories(one), 2)
    assert two.b.chat("an ode").headers["X-Router-Category"] == "poem"

    assert requests.delete(two.b.base + "/config/category/poem", timeout=5).status_code == 200
    two.both(lambda one: "poem" not in categories(one), 2)

    assert two.a.routes.read_bytes() == two.b.routes.read_bytes()


def test_figures_stay_with_their_instance_which_names_the_others(two):
    before = two.b.get("/metrics").json()["requests"]["total"]
    two.a.chat()

    shown = two.b.get("/metrics").json()

    assert (shown["instance"], shown["instances"]) == ("b", ["a"])
    assert shown["requests"]["total"] == before


def test_a_circuit_opened_by_requests_to_one_is_open_on_both_and_reset_on_both(two, upstream):
    upstream.scripts["acme/one"] = error(500)
    for _ in range(3):
        assert two.a.chat().status_code == 200

    two.both(lambda one: "acme/one" in open_circuits(one), 2)
    upstream.scripts.clear()
    two.b.post("/circuit-breaker/reset/one")

    two.both(lambda one: open_circuits(one) == {}, 2)


def test_30_requests_on_both_send_one_probe(two, upstream):
    upstream.scripts["acme/one"] = error(500)
    for _ in range(3):
        two.a.chat()
    two.both(lambda one: "acme/one" in open_circuits(one), 2)
    upstream.scripts["acme/one"] = slow(0.7, whole("I am back"))
    wait_until_due(two.a)
    wait_until_due(two.b)
    upstream.requests.clear()

    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda n: (two.a, two.b)[n % 2].chat().status_code, range(30)))

    assert set(found) == {200}
    assert upstream.models_asked().count("acme/one") == 1
    two.both(lambda one: open_circuits(one) == {}, 2)


def test_nothing_a_client_sends_becomes_a_key(two):
    for name in ("router", "evil\r\nFLUSHALL\r\n", "acme/one*"):
        body = {"model": name, "messages": [{"role": "user", "content": "MARKER-PROMPT"}]}
        two.a.post("/v1/chat/completions", body)
        two.a.post("/circuit-breaker/reset/" + requests.utils.quote(name))
    two.both(lambda one: cluster_of(one)["status"] == "ok")

    keys = list(two.server.client.scan_iter("*"))

    assert [key for key in keys if not OURS.fullmatch(key)] == []
    assert set(two.server.client.hkeys("llm-router:circuits")) <= {"acme/one", "acme/two"}


def outage(two: Pair, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Redis goes and comes back; requests and the files do not notice."""
    marks = [(one, len(one.log.read_text())) for one in (two.a, two.b)]
    before = two.a.routes.read_bytes()
    begin()
    two.both(lambda one: cluster_of(one)["status"] == "alone")
    took = []
    for one in (two.a, two.b) * 10:
        began = time.monotonic()
        assert one.chat().status_code == 200
        took.append(time.monotonic() - began)
    assert two.a.post("/config/category", POEM).status_code == 503
    assert two.a.routes.read_bytes() == before
    end()
    two.both(lambda one: cluster_of(one)["instances"] == ["a", "b"])
    assert max(took) < 0.5
    for one, mark in marks:
        found = events_of(one, mark)
        assert (found.count("cluster_alone"), found.count("cluster_joined")) == (1, 1)
        assert "poem" not in categories(one)


def test_a_redis_that_hangs(two):
    outage(two, two.server.hang, two.server.go_on)


def test_a_redis_that_is_killed_and_comes_back_empty(two):
    outage(two, two.server.kill, two.server.start)

    version = cluster_of(two.a)["version"]
    assert two.server.client.hget("llm-router:config", "version") == version


def test_a_reload_leaves_one_instance_with_one_name(two, upstream):
    upstream.scripts["acme/one"] = slow(0.7, whole("late"))
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(two.a.chat)
        wait_until(lambda: upstream.requests)
        mark = len(two.a.log.read_text())
        two.a.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "cluster_joined" in events_of(two.a, mark))
        assert two.a.post("/config/category", POEM).status_code == 200
        assert last.result(10).status_code == 200
    two.both(lambda one: "poem" in categories(one), 2)

    assert cluster_of(two.b)["instances"] == ["a", "b"]
    assert requests.delete(two.b.base + "/config/category/poem", timeout=5).status_code == 200
    two.both(lambda one: "poem" not in categories(one), 2)
    assert not two.a.routes.with_name(".routes.json.mine").exists()


@pytest.mark.parametrize("how", ["gone", "hung"])
def test_a_start_without_redis_is_hardly_later(how, tmp_path, routes):
    server = Redis(tmp_path)
    server.kill() if how == "gone" else server.hang()
    code = (
        "import time, cluster, router; began = time.monotonic(); "
        "router.create_app(); print(time.monotonic() - began)"
    )
    env = {"PATH": os.environ["PATH"], "ROUTER_ROUTES": str(routes), "TEST_API_KEY": "x",
           "ROUTER_REDIS_URL": server.url}  # fmt: skip

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                          check=True, text=True)  # fmt: skip
    server.go_on()
    server.stop()

    assert float(done.stdout) < 2.5
    assert done.stderr.count("cluster_alone") == 1


def site_for(one: Service, other: Service) -> str:
    """The shipped file with its second server switched on."""
    site = SITE.replace("#zone", "zone").replace("#least_conn", "least_conn")
    return site.replace("#server 127.0.0.1:3457", f"server 127.0.0.1:{other.port}")


def chat_until_killed(one: Service) -> None:
    with pytest.raises(OSError):
        one.chat()


@pytest.mark.debian("nginx")
def test_killing_one_under_load_fails_nothing_and_its_probe_goes_to_the_other(
    two, upstream, tmp_path, tmp_path_factory
):
    third = Service(tmp_path_factory.mktemp("c"), small_routes(upstream.url, circuit_breaker=QUICK),
                    ROUTER_REDIS_URL=two.server.url, ROUTER_INSTANCE="c")  # fmt: skip
    upstream.scripts["acme/one"] = error(500)
    while "acme/one" not in open_circuits(third):
        third.chat()
    upstream.scripts["acme/one"] = hang
    two.both(lambda one: "acme/one" in open_circuits(one), 2)
    wait_until_due(third)
    nginx = Nginx(tmp_path, two.a.port, site_for(two.a, third))
    upstream.requests.clear()
    threading.Thread(target=chat_until_killed, args=(third,), daemon=True).start()
    wait_until(lambda: "acme/one" in upstream.models_asked())
    assert open_circuits(third)["acme/one"]["state"] == "half-open"
    upstream.scripts["acme/one"] = whole("I am back")
    stop, found = threading.Event(), []

    def load() -> None:
        while not stop.wait(0.2):  # nginx allows 50 a second
            found.append(nginx.chat().status_code)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load) for _ in range(8)]
        wait_until(lambda: len(found) > 40)
        kill_all(third)
        two.both(lambda one: open_circuits(one) == {}, 8)
        two.both(lambda one: cluster_of(one)["instances"] == ["a", "b"], 8)
        stop.set()
        for client in clients:
            client.result(10)
    nginx.stop()

    assert set(found) == {200}
