"""ROUTER_NOTIFY_URL: who is told, of what, how often, and what a bad receiver costs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import no_thread, wait_until
from upstream import Upstream, error, hang, plain

from parts.notify import EVENTS, Notifier
from parts.settings import Settings, SettingsError

SECRET = "a-secret-of-the-url"
log = logging.getLogger("llm_router")


@pytest.fixture
def receiver() -> Iterator[Upstream]:
    server = Upstream()
    server.default = plain(204, b"")
    yield server
    server.close()


def told(receiver: Upstream) -> list[dict[str, Any]]:
    return [request.body for request in receiver.requests]


@pytest.fixture
def notifier(receiver: Upstream, clock: Any) -> Iterator[Notifier]:
    found = Notifier(f"{receiver.url}/{SECRET}", clock=clock)
    log.addHandler(found)
    yield found
    log.removeHandler(found)


def test_a_circuit_that_opens_is_told_once(build, receiver, upstream):
    client = build(ROUTER_NOTIFY_URL=f"{receiver.url}/{SECRET}")
    upstream.scripts["acme/one"] = error(503)

    for _ in range(4):
        client.chat()

    wait_until(lambda: told(receiver))
    [message] = told(receiver)
    assert message["event"] == "circuit_opened"
    assert message["text"] == "acme/one is failing (server_error): its circuit is open"
    assert message["content"] == message["text"]


def test_a_refused_key_is_told_by_the_name_of_its_variable(build, receiver, upstream):
    client = build(ROUTER_NOTIFY_URL=receiver.url)
    upstream.default = error(401, "bad key")

    client.chat()
    client.chat()

    wait_until(lambda: told(receiver))
    assert told(receiver)[0]["text"] == "upstream local refuses the key (TEST_API_KEY)"


def test_a_limit_and_a_broken_file_are_told(build, receiver, routes, monkeypatch, clock):
    monkeypatch.setattr("parts.history.BATCH_S", 0.01)
    client = build(clock, ROUTER_NOTIFY_URL=receiver.url, daily_limit_usd=0.00001)

    client.chat()
    routes.write_text("{")
    clock += 1
    client.get("/health")

    wait_until(lambda: {m["event"] for m in told(receiver)} == {"limit_spent", "routes_bad"})


def test_within_a_minute_only_the_latest_of_a_matter_waits_for_its_end(notifier, receiver, clock):
    log.warning("circuit_opened", {"model": "m", "reason": "cut"})
    wait_until(lambda: len(told(receiver)) == 1)
    for event in ("circuit_closed", "circuit_opened", "circuit_closed"):
        log.warning(event, {"model": "m", "reason": "cut"})
    log.warning("circuit_opened", {"model": "other", "reason": "cut"})
    wait_until(lambda: len(told(receiver)) == 2)

    clock += 61
    log.info("circuit_closed", {"model": "third"})

    wait_until(lambda: len(told(receiver)) == 4)
    assert [m["model"] for m in told(receiver)][:2] == ["m", "other"]
    assert {(m["model"], m["event"]) for m in told(receiver)[2:]} == {
        ("m", "circuit_closed"), ("third", "circuit_closed")}  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [error(500), plain(302, b"", Location="http://127.0.0.1:9/"), hang],
    ids=["500", "redirect", "silence"],
)
def test_a_bad_receiver_costs_no_request_and_shows_its_url_nowhere(
    build, receiver, upstream, lines, bad, monkeypatch
):
    monkeypatch.setattr("parts.notify.TIMEOUT_S", 0.2)
    receiver.default = bad
    client = build(ROUTER_NOTIFY_URL=f"{receiver.url}/{SECRET}")
    upstream.scripts["acme/one"] = error(503)

    statuses = [client.chat().status_code for _ in range(4)]

    wait_until(lambda: any("notify_failing" in line for line in lines))
    wait_until(lambda: receiver.requests)  # on a busy machine it gets to it only now
    assert statuses == [200] * 4
    assert len(receiver.requests) == 1
    shown = [*lines, client.get("/config").text, client.get("/health").text]
    assert [text for text in shown if SECRET in text] == []


def test_what_waits_is_bounded(notifier, receiver):
    receiver.default = hang
    for n in range(1000):
        log.warning("circuit_opened", {"model": f"m{n}", "reason": "cut"})

    assert len(notifier._waiting) <= 100


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_is_a_sentence(event, receiver, clock):
    facts = {"model": "m", "reason": "cut", "limit": "day", "of": "all", "usd": 1, "upstream": "u",
             "key": "K", "file": "f", "why": "w"}  # fmt: skip

    Notifier(receiver.url, clock=clock).handle(
        logging.LogRecord("llm_router", logging.INFO, "", 0, event, (facts,), None)
    )

    wait_until(lambda: told(receiver))
    assert "{" not in told(receiver)[0]["text"]


@pytest.mark.parametrize("url", ["ntfy.sh/x", "ftp://x", "https://?x", "https:///x"])
def test_a_url_that_is_none_stops_the_start_without_it(url):
    with pytest.raises(SettingsError, match="ROUTER_NOTIFY_URL: expected http") as e:
        Settings.from_env({"ROUTER_NOTIFY_URL": url})

    assert url not in str(e.value)


def test_a_url_that_no_library_can_read_ends_no_thread(lines):
    notifier = Notifier("http://" + "a" * 70 + ".example/" + SECRET)
    log.addHandler(notifier)
    try:
        log.warning("limit_spent", {"limit": "day", "of": "all", "usd": 1, "spent_usd": 1})
        wait_until(lambda: any("notify_failing" in line for line in lines))
        wait_until(lambda: notifier._thread is None)
    finally:
        log.removeHandler(notifier)

    assert SECRET not in "".join(lines)


def test_limits_of_one_name_are_two_matters(notifier, receiver):
    for of in ("category code", "client code"):
        log.warning("limit_spent", {"limit": "day", "of": of, "usd": 1, "spent_usd": 1})

    wait_until(lambda: len(told(receiver)) == 2)


def test_without_a_thread_nobody_who_logs_is_hurt_and_the_next_matter_asks_again(
    notifier, receiver, monkeypatch
):
    no_thread(monkeypatch, "notify")
    event = next(iter(EVENTS))

    log.warning(event, {name: "acme/one" for name in ("model", "upstream", "reason", "limit")})
    log.warning("key_refused", {"upstream": "acme", "key": "ACME_KEY"})

    wait_until(lambda: len(told(receiver)) == 2)
