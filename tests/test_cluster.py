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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from conftest import ROOT, Service, free_port, settings_for, small_routes
from helpers import kill_all, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nginx import SITE, Nginx
from upstream import Upstream, error, hang, slow, whole

import router as module
from parts import cluster
from parts import settings as parts_settings
from parts.errors import Refused

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


class Member:
    """An instance without its thread: it looks at the cluster when `share` is called."""

    def __init__(self, folder: Path, name: str, url: str, routes: dict[str, Any] | None):
        folder.mkdir(exist_ok=True)
        self.file = folder / "routes.json"
        if routes:
            self.file.write_text(json.dumps(routes))
        settings = settings_for(self.file, ROUTER_REDIS_URL=url, ROUTER_INSTANCE=name)
        self.owner = module.create_app(settings).extensions["router"]
        self.cluster, self.store = self.owner.cluster, self.owner.store
        self.breakers, self.health = self.owner.breakers, self.owner.cluster.health

    def share(self) -> None:
        with contextlib.suppress(cluster.Away):
            self.cluster.share()

    def add(self, name: str) -> None:
        given = {"models": ["acme/one"], "keywords": [name]}
        self.store.change(lambda table: table.with_category(name, given, must_exist=False))

    def has(self, name: str) -> bool:
        return name in self.store.current().categories

    def edit(self, name: str) -> None:
        """As a person would: without asking anybody."""
        text = self.store.current().with_category(name, {"models": ["acme/one"]}, must_exist=False)
        self.file.write_text(text)
        self.store._next_look = 0.0

    def fail(self, model: str = "acme/one", times: int = 3, **more: Any) -> None:
        for _ in range(times):
            ticket = self.breakers.admit(model, 5)
            self.breakers.settle(ticket, "strike", QUICK, "server_error", 500, **more)

    def make_due(self, model: str = "acme/one") -> None:
        """Time passes, for this instance."""
        circuit = self.breakers._circuits[model]
        circuit.due = circuit.lease = 0.0

    def state(self, model: str = "acme/one") -> str:
        return self.breakers.snapshot().get(model, {"state": "closed"})["state"]

    def probe(self, model: str = "acme/one") -> Any:
        return self.breakers.admit(model, 5)


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
        made = Member(folder, name, url or server.url, routes or fresh)
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
    """Two instances that both know acme/one to be open."""
    a, b = pair
    a.fail()
    a.share()
    b.share()
    return pair


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
    a.share()
    b.share()

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


def test_a_broken_file_on_one_waits_until_it_is_mended(pair, caplog, monkeypatch):
    a, b = pair
    monkeypatch.setattr(cluster, "RETRY_S", 0.0)
    b.file.write_text("{ broken")
    b.store._next_look = 0.0
    a.add("poem")

    b.share()
    b.share()

    assert b.health()["behind"] == "routes_file_bad"
    assert b.file.read_text() == "{ broken"
    assert [r.msg for r in caplog.records].count("cluster_routes_refused") == 1
    b.file.write_text(json.dumps(small_routes("http://127.0.0.1:9/v1")))
    b.share()
    assert b.has("poem")
    assert "behind" not in b.health()


def test_a_text_that_does_not_fit_is_never_in_force(pair, server):
    a, _ = pair
    before = a.file.read_bytes()
    version = f"9-{cluster.tag_for('{}')}"
    server.client.hset("llm-router:config", mapping={"version": version, "text": "{}", "by": "x"})

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


def test_a_change_made_while_the_clusters_routes_are_read_is_not_overwritten(pair, monkeypatch):
    a, b = pair
    a.add("poem")
    real = b.cluster.link.routes

    def routes() -> Any:
        monkeypatch.setattr(b.cluster.link, "routes", real)
        found = real()
        b.share()
        b.add("song")
        return found

    monkeypatch.setattr(b.cluster.link, "routes", routes)
    b.share()
    b.share()
    a.share()

    assert a.has("song") and a.has("poem")
    assert a.file.read_text() == b.file.read_text()


def test_two_workers_on_one_file_make_no_hand_edit_of_each_others_changes(pair, member):
    old, b = pair
    new = member("a")
    new.add("poem")
    b.share()
    b.add("song")

    old.share()
    new.share()

    assert old.has("song") and new.has("song")
    assert not old.file.with_name(".routes.json.mine").exists()


def test_a_crash_between_the_clusters_word_and_the_file_leaves_the_new_version(pair, member):
    a, b = pair
    text = a.store.current().with_category("poem", {"models": ["acme/one"]}, must_exist=False)
    a.cluster.agree(a.store.current().text, text)

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
    a.share()
    b.share()

    assert not a.has("poem") and not b.has("poem")
    assert a.health()["version"] == b.health()["version"]


def while_asked(monkeypatch, one: Member, act: Callable[[], None]) -> None:
    """Let something happen once, right after the cluster has agreed to a change of `one`."""
    real, todo = one.cluster.link.call, [act]

    def call(script: str, *args: Any, **more: Any) -> Any:
        found = real(script, *args, **more)
        if script == "publish" and todo:
            todo.pop()()
        return found

    monkeypatch.setattr(one.cluster.link, "call", call)


def test_a_hand_edit_while_the_cluster_is_asked_is_kept_and_the_change_is_a_409(pair, monkeypatch):
    a, b = pair
    while_asked(monkeypatch, a, lambda: a.edit("song"))

    with pytest.raises(Refused) as refused:
        a.add("poem")
    a.share()
    b.share()

    assert (refused.value.status, refused.value.kind) == (409, "conflict")
    assert a.has("song") and b.has("song")
    assert not a.has("poem") and not b.has("poem")
    assert a.file.read_text() == b.file.read_text()
    assert a.health()["version"] == b.health()["version"]
    assert not a.file.with_name(".routes.json.mine").exists()


def test_who_took_the_refused_change_meanwhile_takes_the_hand_edit_after_it(pair, monkeypatch):
    a, b = pair
    while_asked(monkeypatch, a, lambda: (a.edit("song"), b.share()))

    with pytest.raises(Refused):
        a.add("poem")
    assert b.has("poem")
    a.share()
    b.share()

    assert b.has("song") and not b.has("poem")
    assert not b.file.with_name(".routes.json.mine").exists()


def test_a_bad_hand_edit_while_the_cluster_is_asked_stays_and_the_change_is_taken_back(
    pair, monkeypatch
):
    a, b = pair
    while_asked(monkeypatch, a, lambda: a.file.write_text("{ broken"))

    with pytest.raises(Refused) as refused:
        a.add("poem")
    a.store._next_look = 0.0
    a.share()
    b.share()

    assert refused.value.status == 409
    assert a.file.read_text() == "{ broken"
    assert not a.has("poem") and not b.has("poem")
    assert a.health()["version"] == b.health()["version"]


def test_a_crash_after_that_hand_edit_leaves_it_a_change(pair, member, monkeypatch):
    a, b = pair
    while_asked(monkeypatch, a, lambda: a.edit("song"))
    with pytest.raises(Refused):
        a.add("poem")
    a.share()

    a = member("a")
    b.share()

    assert a.has("song") and b.has("song")
    assert not a.has("poem") and not b.has("poem")


def test_a_hand_edit_that_cannot_be_kept_beside_the_file_is_not_replaced(pair, monkeypatch):
    a, b = pair
    a.add("poem")
    b.edit("song")
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name.endswith(".mine"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    b.share()

    assert b.has("song") and not b.has("poem")
    assert b.health()["behind"] == "routes_not_writable"


def test_an_emptied_redis_gets_the_same_version_again(pair, server):
    a, b = pair
    a.add("poem")
    version = a.health()["version"]
    b.share()

    server.client.flushall()
    b.share()
    a.share()

    assert server.client.hget("llm-router:config", "version") == version
    assert a.has("poem") and b.has("poem")


def test_an_older_copy_of_redis_does_not_take_a_change_back(pair, server):
    a, b = pair
    old = server.client.hgetall("llm-router:config")
    a.add("poem")
    b.share()

    server.client.hset("llm-router:config", mapping=old)
    b.share()
    a.share()

    assert a.has("poem") and b.has("poem")


# --- circuits ------------------------------------------------------------------------------------


def test_a_circuit_that_opens_on_one_is_open_on_the_other_for_as_long(pair):
    a, b = pair

    a.fail()
    a.share()
    b.share()

    ours, theirs = (m.breakers.snapshot()["acme/one"] for m in (a, b))
    assert ours["state"] == theirs["state"] == "open"
    assert abs(ours["retry_in_sec"] - theirs["retry_in_sec"]) <= 0.2
    assert (theirs["reason"], theirs["last_status"]) == ("server_error", 500)


def test_strikes_before_that_are_each_instances_own(pair, server):
    a, b = pair

    a.fail(times=2)
    a.share()
    b.share()

    assert b.breakers.snapshot() == {}
    assert server.client.hgetall("llm-router:circuits") == {}


def test_a_retry_after_holds_on_both(pair):
    a, b = pair

    a.fail(times=1, retry_after_s=30)
    a.share()
    b.share()

    assert b.probe() is None
    assert b.breakers.snapshot()["acme/one"]["retry_in_sec"] > 25


@pytest.mark.parametrize("models", [["acme/one"], None])
def test_a_reset_on_one_is_one_on_the_other(opened, models):
    a, b = opened

    b.breakers.reset(models)
    b.share()
    a.share()

    assert (a.state(), b.state()) == ("closed", "closed")


def test_a_reset_forgets_the_strikes_on_both_though_requests_came_since(opened):
    a, b = opened

    a.breakers.reset()
    a.fail(times=1)
    a.share()
    b.share()

    assert b.breakers.snapshot() == {}


def test_a_reset_of_all_reaches_models_that_only_others_know(pair):
    a, b = pair
    a.fail()
    a.share()

    b.breakers.reset()
    b.share()
    a.share()

    assert a.state() == "closed"


def test_a_reset_of_all_is_not_heard_by_who_made_it(pair):
    a, _ = pair
    a.fail()
    a.breakers.reset()
    a.share()
    a.breakers.reset()
    a.share()

    a.fail(times=2)
    a.share()
    a.fail(times=1)

    assert a.state() == "open"


def test_results_in_the_air_do_not_undo_what_was_heard(pair):
    a, b = pair
    late = [b.probe() for _ in range(3)]
    a.fail()
    a.breakers.reset(["acme/one"])
    a.share()
    a.fail()
    a.share()
    b.share()

    for ticket in late:
        b.breakers.settle(ticket, "good", QUICK)
    b.share()
    a.share()

    assert (a.state(), b.state()) == ("open", "open")


def test_what_is_refused_while_a_request_came_in_between_is_heard_in_the_next_round(
    pair, monkeypatch
):
    a, b = pair
    real = b.breakers.hear

    def hear(model: str, state: Any, known: Any) -> bool:
        monkeypatch.undo()
        b.probe()
        return real(model, state, known)

    a.fail()
    a.share()
    monkeypatch.setattr(b.breakers, "hear", hear)
    b.share()
    assert b.state() == "closed"
    b.share()

    assert b.state() == "open"


def test_who_was_overtaken_without_a_sign_hears_what_stands_there(pair, server):
    a, _ = pair
    a.share()
    server.client.hset("llm-router:circuits", "acme/one", f"7 {entry()}")

    a.fail()
    a.share()

    assert a.breakers.snapshot()["acme/one"]["retry_in_sec"] > 40


def test_one_probe_in_the_cluster(opened):
    a, b = opened
    a.make_due()
    b.make_due()

    first, second = a.probe(), b.probe()

    assert first.probe
    assert second is None
    assert b.state() == "half-open"


def test_a_probe_that_ends_well_closes_the_circuit_on_both(opened, server):
    a, b = opened
    a.make_due()

    ticket = a.probe()
    a.breakers.commit(ticket, 3)
    a.share()
    b.share()
    a.breakers.settle(ticket, "good", QUICK)

    assert (a.state(), b.state()) == ("closed", "closed")
    assert b.breakers.snapshot()["acme/one"]["strikes"] == 2
    assert list(server.client.scan_iter("llm-router:probe:*")) == []


def test_a_probe_that_says_nothing_leaves_the_next_one_to_anybody(opened):
    a, b = opened
    a.make_due()
    ticket = a.probe()

    a.breakers.settle(ticket, "none", QUICK)
    a.share()
    b.share()
    b.make_due()

    assert b.probe().probe


def test_nobody_probes_on_what_is_no_longer_so(opened):
    a, b = opened
    b.make_due()
    a.breakers.reset(["acme/one"])
    a.share()

    assert b.probe() is None
    b.share()
    assert b.probe().probe is False


def test_the_lease_of_a_dead_instance_goes_to_the_next_one(opened, server):
    a, b = opened
    a.make_due()
    b.make_due()
    assert a.probe().probe

    server.client.zrem("llm-router:instances", a.cluster.link.member)

    assert b.probe().probe


def test_an_emptied_redis_hears_of_open_circuits_again(opened, server):
    a, b = opened

    server.client.flushall()
    for one in (a, b, a, b):
        one.share()

    assert server.client.hkeys("llm-router:circuits") == ["acme/one"]
    assert (a.state(), b.state()) == ("open", "open")


def test_circuits_of_models_that_left_the_table_are_forgotten(pair, server):
    a, b = pair
    a.fail("acme/two")
    a.share()
    routes = json.loads(a.file.read_text())
    for category in routes["categories"].values():
        category["models"] = ["acme/one"]

    a.file.write_text(json.dumps(routes))
    a.store._next_look = 0.0
    for one in (a, b, a, b):
        one.share()

    assert server.client.hkeys("llm-router:circuits") == []


def test_a_lease_whose_probe_ended_while_alone_is_given_back_whatever_was_probed_since(
    pair, server
):
    a, _ = pair
    a.fail()
    a.share()
    a.make_due()
    ticket = a.probe()
    server.hang()
    a.share()
    a.breakers.settle(ticket, "strike", QUICK, "server_error", 500)
    a.make_due()
    a.breakers.settle(a.probe(), "strike", QUICK, "server_error", 500)

    server.go_on()
    a.share()

    assert list(server.client.scan_iter("llm-router:probe:*")) == []


def test_what_opened_while_alone_is_told_afterwards(pair, server):
    a, b = pair
    server.hang()
    a.share()
    a.fail()

    server.go_on()
    a.share()
    b.share()

    assert b.state() == "open"


def test_what_opens_after_a_reset_is_open_however_late_the_others_hear_of_the_reset(opened):
    a, b = opened

    a.breakers.reset()
    a.fail()
    a.share()
    b.share()

    assert (a.state(), b.state()) == ("open", "open")


# --- Redis that does not answer ------------------------------------------------------------------


def test_a_hung_redis_costs_a_probe_one_short_wait_and_the_next_none(pair, server):
    a, _ = pair
    a.fail("acme/one")
    a.fail("acme/two")
    a.make_due("acme/one")
    a.make_due("acme/two")
    server.hang()

    began = time.monotonic()
    first = a.probe("acme/one")
    between = time.monotonic()
    second = a.probe("acme/two")
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
    a.share()
    b.share()

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

    a.share()
    a.share()
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
    with pytest.raises(parts_settings.SettingsError) as wrong:
        module.create_app(settings_for(routes, ROUTER_REDIS_URL=url))

    assert "ROUTER_REDIS_URL" in str(wrong.value)
    assert "s3cret" not in str(wrong.value)


def test_a_missing_package_stops_the_start_with_the_command_that_helps(routes, monkeypatch):
    monkeypatch.setattr(parts_settings, "find_spec", lambda name: None)

    with pytest.raises(parts_settings.SettingsError, match=r"pip install 'redis>=5\.2,<9'"):
        settings_for(routes, ROUTER_REDIS_URL="redis://127.0.0.1/0")


def test_without_the_setting_no_line_of_it_runs(routes):
    code = (
        "import sys, router; router.create_app(); "
        "print({'parts.cluster', 'redis'} & set(sys.modules))"
    )
    env = {"PATH": os.environ["PATH"], "ROUTER_ROUTES": str(routes)}

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                          check=True, text=True)  # fmt: skip

    assert done.stdout == "set()\n"


# --- what a stranger may write into Redis ---------------------------------------------------------

DIGITS = "9" * 5000


def entry(**changed: Any) -> str:
    """An open circuit as an instance writes it, but for what is changed."""
    now = time.time()
    told = {"open": True, "due": now + 50, "hold": 0, "first_open": now - 10, "strikes": 3,
            "reason": "server_error", "status": 500, "since": "2026-11-25T10:00:00Z",
            "by": "x", **changed}  # fmt: skip
    return json.dumps(told).replace('"<', "").replace('>"', "")  # "<...>" stands as it is


def put(server: Redis, model: str, text: str | bytes) -> None:
    """Write one circuit as if there were news."""
    server.client.hset("llm-router:circuits", model, text)
    server.client.set("llm-router:seq", f"{int(time.time())}999")
    server.client.incr("llm-router:seq")


IN_A_YEAR = (
    {"due": time.time() + 3e7},
    {"hold": time.time() + 3e7},
    {"first_open": time.time() + 3e7},
)
NUMBERS = ("<NaN>", "<Infinity>", "<-Infinity>", "<1e999>", "<" + "9" * 300 + ">", -1, "1", True,
           [], {}, f"<{DIGITS}>")  # fmt: skip
ODD = [
    *({key: value} for key in ("due", "hold", "first_open", "strikes") for value in NUMBERS),
    *IN_A_YEAR, {"due": None}, {"hold": None}, {"strikes": 1e10}, {"status": 1000},
    {"status": "500"}, {"status": "<NaN>"}, {"open": 1}, {"open": "true"}, {"open": None},
    {"reason": None}, {"reason": "x" * 201}, {"reason": "a\nb"}, {"reason": "\ud800"},
    {"since": 0}, {"since": "\0"}, {"by": None}, {"by": ["x"]}, {"by": "x" * 201},
]  # fmt: skip


@pytest.mark.parametrize(
    "changed", ODD, ids=lambda c: "-".join(c) if isinstance(c, dict) else str(c)[:40]
)
def test_a_circuit_that_cannot_be_meant_is_ignored_with_one_line(pair, server, caplog, changed):
    a, _ = pair
    for number in (7, 8):
        put(server, "acme/one", f"{number} {entry(**changed)}")
        put(server, "acme/two", f"{number} {entry()}")
        a.share()

    assert (a.state("acme/one"), a.state("acme/two")) == ("closed", "open")
    assert [r.args["model"] for r in caplog.records if r.msg == "cluster_odd"] == ["acme/one"]
    assert a.health()["status"] == "ok"


def test_a_circuit_without_a_hold_is_told_by_times_that_any_clock_can_read(opened, server):
    a, b = opened
    b.make_due()
    b.breakers.commit(b.probe(), 3)
    b.share()

    told = json.loads(server.client.hget("llm-router:circuits", "acme/one").partition(" ")[2])
    a.share()

    assert 1e9 < told["hold"] < time.time() and 1e9 < told["due"] < time.time()
    assert a.breakers.news()[0]["acme/one"].hold == 0.0
    assert a.state() == "closed"


TEXTS = ["", "7", "7 ", "garbage", "7 {", "7 []", "7 null", "7 7", "7 {}", '7 {"gone": 1}',
         "7 " + "[" * 3900, "7 " + '{"a":' * 700, f"7 {DIGITS}", "7 " + " " * 500_000 + "{}",
         DIGITS + " " + entry(), b"7 \xff\xfe", b"\x00"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t[:12]))
def test_a_text_that_is_no_circuit_is_ignored_and_the_next_word_of_an_instance_takes_its_place(
    pair, server, caplog, text
):
    a, b = pair
    put(server, "acme/one", text)
    put(server, "acme/two", f"7 {entry()}")

    a.share()
    a.fail()
    a.share()
    b.share()

    assert (b.state("acme/one"), b.state("acme/two")) == ("open", "open")
    assert [r.msg for r in caplog.records].count("cluster_odd") == 1
    a.make_due()
    assert a.probe().probe


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t[:12]))
def test_a_circuit_that_was_spoilt_is_probed_again(pair, server, text):
    a, _ = pair
    a.fail()
    a.make_due()
    a.share()
    a.share()
    server.client.hset("llm-router:circuits", "acme/one", text)

    a.probe()
    a.share()
    a.make_due()

    assert a.probe().probe


def test_a_circuit_that_was_deleted_is_told_and_probed_again(pair, server):
    a, _ = pair
    a.fail()
    a.make_due()
    a.share()
    a.share()
    server.client.hdel("llm-router:circuits", "acme/one")

    assert a.probe() is None
    a.share()
    a.share()
    a.make_due()

    assert a.probe().probe
    assert server.client.hkeys("llm-router:circuits") == ["acme/one"]


@settings(max_examples=300)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                    max_leaves=8),
       st.sampled_from(["due", "hold", "first_open", "strikes", "status", "open", "reason",
                        "since", "by", "gone", "more"]))  # fmt: skip
def test_whatever_stands_in_a_circuit_is_taken_whole_or_not_at_all(value, key):
    link = cluster.Link("redis://127.0.0.1:1", "x", time.time)
    try:
        state, by = cluster.read_entry(f"7 {entry(**{key: value})}", link)
    except cluster.Odd:
        return

    assert by.isprintable()
    times = [state.due, state.hold, state.first_open or 0.0] if state else []
    assert all(0 <= at <= time.time() + 86_460 for at in times)


VERSIONS = [DIGITS, f"{DIGITS}-{'0' * 16}", "-", "9", "NaN-0", "-1-0", "9-" + "0" * 500_000,
            "9-xyz", "９-0", "1e3-0", " ", b"\xff-0"]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: repr(v[:12]))
def test_a_version_that_is_none_is_ignored_with_one_line_and_goes_when_redis_is_emptied(
    pair, server, caplog, version
):
    a, b = pair
    before = a.file.read_bytes()
    b.fail()
    b.share()
    server.client.hset("llm-router:config", "version", version)

    a.share()
    a.share()

    assert (a.state(), a.health()["behind"]) == ("open", "odd")
    assert a.file.read_bytes() == before
    assert [r.msg for r in caplog.records].count("cluster_routes_refused") == 1
    server.client.delete("llm-router:config")
    a.share()
    b.share()
    b.add("poem")
    a.share()
    assert a.has("poem") and "behind" not in a.health()


LONG = "x" * (cluster.MOST_TEXT + 1)
ROUTES = [{"text": LONG}, {"text": ""}, {"text": "{}"}, {"text": b"\xff"}, {"tags": "-0" * 2000},
          {"by": "x" * 5000}]  # fmt: skip


@pytest.mark.parametrize("changed", ROUTES, ids=lambda c: str(c)[:20])
def test_routes_that_no_instance_wrote_are_not_taken(pair, server, caplog, changed):
    a, b = pair
    a.add("poem")
    b.fail()
    server.client.hset("llm-router:config", mapping=changed)

    b.share()
    b.share()

    assert not b.has("poem")
    assert b.health()["behind"] == "odd"
    assert [r.msg for r in caplog.records].count("cluster_routes_refused") == 1
    a.share()
    assert a.state() == "open"


def test_routes_over_8_mb_are_not_even_fetched(pair, server):
    _, b = pair
    version = f"9-{cluster.tag_for(LONG)}"
    server.client.hset("llm-router:config", mapping={"version": version, "text": LONG})
    before = server.client.info("stats")["total_net_output_bytes"]

    b.share()

    assert b.health()["behind"] == "odd"
    assert server.client.info("stats")["total_net_output_bytes"] - before < 100_000


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 100_000, f'{{"x": {DIGITS}}}'],
                         ids=["lists", "objects", "digits"])  # fmt: skip
def test_routes_that_cannot_be_read_are_refused_and_circuits_go_on(pair, server, text):
    a, b = pair
    b.fail()
    b.share()
    version = f"9-{cluster.tag_for(text)}"
    server.client.hset("llm-router:config", mapping={"version": version, "text": text})

    a.share()

    assert (a.state(), a.health()["behind"]) == ("open", "invalid_request_error")


def test_routes_that_are_too_large_are_not_offered_either(pair, server, monkeypatch):
    a, _ = pair
    version = server.client.hget("llm-router:config", "version")
    monkeypatch.setattr(cluster, "MOST_TEXT", 100)

    with pytest.raises(Refused) as refused:
        a.add("poem")
    a.edit("song")
    a.share()

    assert refused.value.status == 422
    assert a.health()["behind"] == "invalid_request_error"
    assert server.client.hget("llm-router:config", "version") == version


COUNTERS = [
    *(partial(redis.Redis.set, name="llm-router:seq", value=value)
      for value in ("abc", "-5", "7", DIGITS, str(2**63 - 1))),
    lambda client: client.rpush("llm-router:seq", "a"),
]  # fmt: skip


@pytest.mark.parametrize("write", COUNTERS)
def test_a_counter_that_counts_no_more_is_begun_anew(pair, server, write):
    a, b = pair
    server.client.delete("llm-router:seq")
    write(server.client)

    a.fail()
    a.share()
    b.share()

    assert b.state() == "open"
    b.make_due()
    assert b.probe().probe


def leave_a_lease(server: Redis, a: Member, kind: str) -> None:
    """A lease that nobody should wait for."""
    key = cluster.probe_key("acme/one")
    held = f"{a.cluster.link.member}|1"
    {"forever": lambda: server.client.set(key, held),
     "for years": lambda: server.client.set(key, held, ex=10**8),
     "of nobody": lambda: server.client.set(key, "x", ex=50),
     "a list": lambda: server.client.rpush(key, held)}[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["forever", "for years", "of nobody", "a list"])
def test_a_lease_that_no_instance_took_keeps_nobody_from_probing(opened, server, kind):
    a, b = opened
    leave_a_lease(server, a, kind)
    b.make_due()

    ticket = b.probe()
    b.breakers.settle(ticket, "none", QUICK)
    b.share()

    assert ticket.probe
    assert b.health()["status"] == "ok"
    assert not server.client.exists(cluster.probe_key("acme/one"))


@pytest.mark.parametrize("key", ["config", "circuits", "instances"])
def test_a_key_of_another_kind_leaves_each_alone_until_it_is_gone(pair, server, caplog, key):
    a, _ = pair
    a.breakers.reset(["acme/one"])
    server.client.set(f"llm-router:{key}", "x")

    a.share()
    a.share()

    assert a.health()["error"] == "refused"
    assert [r.msg for r in caplog.records].count("cluster_alone") == 1
    server.client.delete(f"llm-router:{key}")
    a.share()
    a.share()
    assert a.health()["status"] == "ok"


def test_names_that_no_instance_has_are_not_shown(pair, server):
    a, _ = pair
    names = ["x" * 300, "a\nb#1", b"\xff\x00#1", "c#1"]
    server.client.zadd("llm-router:instances", dict.fromkeys(names, 9e15))

    a.share()

    assert a.health()["instances"] == ["a", "b", "c"]


def test_a_crowd_of_other_circuits_is_in_nobodys_way(pair, server):
    a, _ = pair
    crowd = {f"{n}/{'x' * (n % 400)}": entry() for n in range(5000)}
    server.client.hset("llm-router:circuits", mapping=crowd)
    put(server, "acme/two", f"7 {entry()}")

    a.share()

    assert a.state("acme/two") == "open"
    assert set(a.breakers.snapshot()) == {"acme/two"}


@pytest.mark.parametrize("note", [DIGITS, f"{DIGITS}-0", "x", "-1-0", "\0"])
def test_a_note_that_is_none_makes_a_start_as_the_first_one(pair, member, note):
    _, b = pair
    b.file.with_name(".routes.json.cluster").write_text(note)

    b = member("b")

    assert b.health()["status"] == "ok"
    assert b.health()["version"].startswith("1-")


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
        began = time.monotonic()
        wait_until(lambda: all(seen(one) for one in (self.a, self.b)), seconds)
        return time.monotonic() - began

    def is_calm(self) -> None:
        """Both in the cluster, on the same routes, with no open circuit."""
        self.both(lambda one: cluster_of(one)["instances"] == ["a", "b"])
        self.a.post("/circuit-breaker/reset-all")
        self.both(lambda one: open_on(one) == {})


def cluster_of(one: Service) -> dict[str, Any]:
    return one.get("/health").json()["cluster"]


def open_on(one: Service) -> dict[str, Any]:
    return one.get("/metrics").json()["circuit_breaker"]["open_circuits"]


def wait_until_due(one: Service) -> None:
    wait_until(lambda: open_on(one)["acme/one"]["retry_in_sec"] == 0)
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

    two.both(lambda one: "acme/one" in open_on(one), 2)
    upstream.scripts.clear()
    two.b.post("/circuit-breaker/reset/one")

    two.both(lambda one: open_on(one) == {}, 2)


def test_30_requests_on_both_send_one_probe(two, upstream):
    upstream.scripts["acme/one"] = error(500)
    for _ in range(3):
        two.a.chat()
    two.both(lambda one: "acme/one" in open_on(one), 2)
    upstream.scripts["acme/one"] = slow(1.5, whole("I am back"))
    wait_until_due(two.a)
    wait_until_due(two.b)
    upstream.requests.clear()

    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda n: (two.a, two.b)[n % 2].chat().status_code, range(30)))

    assert set(found) == {200}
    assert upstream.models_asked().count("acme/one") == 1
    two.both(lambda one: open_on(one) == {}, 2)


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
        "import time, router, parts.cluster; began = time.monotonic(); "
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
    while "acme/one" not in open_on(third):
        third.chat()
    upstream.scripts["acme/one"] = hang
    two.both(lambda one: "acme/one" in open_on(one), 2)
    wait_until_due(third)
    nginx = Nginx(tmp_path, two.a.port, site_for(two.a, third))
    upstream.requests.clear()
    threading.Thread(target=chat_until_killed, args=(third,), daemon=True).start()
    wait_until(lambda: "acme/one" in upstream.models_asked())
    assert open_on(third)["acme/one"]["state"] == "half-open"
    upstream.scripts["acme/one"] = whole("I am back")
    stop, found = threading.Event(), []

    def load() -> None:
        while not stop.wait(0.2):  # nginx allows 50 a second
            found.append(nginx.chat().status_code)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load) for _ in range(8)]
        wait_until(lambda: len(found) > 40)
        kill_all(third)
        two.both(lambda one: open_on(one) == {}, 8)
        two.both(lambda one: cluster_of(one)["instances"] == ["a", "b"], 8)
        stop.set()
        for client in clients:
            client.result(10)
    nginx.stop()

    assert set(found) == {200}


# --- spending ----------------------------------------------------------------------------------


LIMITED = {**small_routes("http://127.0.0.1:9/v1"), "daily_limit_usd": 1.0}


def spend(member: Member, usd: float) -> None:
    """A request that cost `usd` ends on this instance."""
    table = member.store.current()
    call = member.owner.begin(None)
    attempt = module.Attempt(table.models["acme/one"], "success", 200)
    attempt.price({"cost": usd, "prompt_tokens": 1})
    call.attempts, call.answered_by = [attempt], attempt
    call.outcome, call.mode, call.category = "success", "keywords", "code"
    member.owner.history.add(call)


def is_spent(member: Member) -> bool:
    return bool(member.owner.history.spent_limit(member.store.current(), "code", "default"))


def test_a_limit_is_held_against_what_all_of_them_spent(member):
    a, b = member("a", LIMITED), member("b", LIMITED)
    spend(a, 0.6)
    spend(b, 0.3)
    [one.share() for one in (a, b, a)]
    assert (is_spent(a), is_spent(b)) == (False, False)

    spend(b, 0.2)
    [one.share() for one in (b, a)]

    assert (is_spent(a), is_spent(b)) == (True, True)
    assert a.owner.history.figures("day")["elsewhere_usd"] == pytest.approx(0.5)


def test_who_starts_again_finds_its_own_part_and_the_others(member):
    a, b = member("a", LIMITED), member("b", LIMITED)
    spend(a, 0.6)
    spend(b, 0.5)
    a.share()
    b.share()
    a.owner.history.close()

    again = member("a")
    spend(again, 0.0)
    again.share()

    assert is_spent(again)
    assert again.owner.history.ledger == a.owner.history.ledger
    assert again.owner.history.figures("day")["cost_usd"] == pytest.approx(0.6)


def test_without_redis_the_limit_holds_against_what_was_heard_last(member, server):
    a, b = member("a", LIMITED), member("b", LIMITED)
    spend(a, 0.6)
    spend(b, 0.3)
    [one.share() for one in (a, b, a)]
    server.kill()
    try:
        spend(a, 0.2)
        a.share()

        assert is_spent(a)
    finally:
        server.start()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"x": -1}', '{"x": NaN}', '{"x": 1e999}', '{"x": "1"}', "9" * 300_000]
)
def test_spending_that_no_instance_wrote_counts_nothing(member, server, text):
    a = member("a", LIMITED)
    spend(a, 0.6)
    server.client.hset(cluster.SPENT + time.strftime("%Y-%m", time.gmtime()), "stranger", text)

    a.share()

    assert not is_spent(a)
    assert a.health()["status"] == "ok"


def test_instances_without_limits_do_not_tell_what_they_spent(member, server):
    spend(member("a"), 0.6)

    assert server.client.keys(cluster.SPENT + "*") == []
