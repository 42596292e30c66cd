"""What outlasts the process: rows, sums, retention, upgrades, whatever is wrong with the file."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LocalClient, settings_for
from helpers import figures, kill_all, no_thread, wait_until, worker_of, workers_of
from upstream import error

import router as module
from parts import history
from parts.history import History

COST = 0.00005  # of one answer of the scripted upstream, in USD


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "BATCH_S", 0.02)
    monkeypatch.setattr(history, "RETRY_S", 0.05)


@pytest.fixture
def file(routes: Path) -> Path:
    return routes.parent / "usage.db"


def rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of the file, oldest first; none while there is none."""
    try:
        with contextlib.closing(history.opened(file, writes=False)) as db:
            return history.last_rows(db, 100_000)[::-1]
    except (sqlite3.Error, history.Unusable):
        return []


def written(client: Any, file: Path, n: int) -> list[dict[str, Any]]:
    wait_until(lambda: len(rows_in(file)) == n)
    return rows_in(file)


def health(client: Any) -> dict[str, Any]:
    return client.get("/health").json["history"]


def again(routes: Path, **env: str) -> LocalClient:
    """Another process, as far as the history can tell."""
    return LocalClient(module.create_app(settings_for(routes, **env)))


# --- rows ----------------------------------------------------------------------------------------


def test_rows_that_are_written_while_they_are_asked_for_stand_once(client, file, monkeypatch):
    ask = history._asked

    def late(*args: Any) -> Any:
        written(client, file, 3)
        return ask(*args)

    for _ in range(3):
        client.chat()
    monkeypatch.setattr(history, "_asked", late)

    rows = client.get("/usage/requests").json["requests"]

    assert len({row["id"] for row in rows}) == len(rows) == 3


def test_a_thread_that_cannot_be_had_now_is_asked_for_again(client, file, monkeypatch):
    no_thread(monkeypatch, "history")

    assert [client.chat().status_code for _ in range(3)] == [200] * 3

    written(client, file, 3)
    assert figures(client)["requests"]["success"] == 3


@pytest.mark.parametrize(("name", "stream"), [("watcher", False), ("carrier", True)])
def test_the_other_threads_are_asked_for_again_too(serve_once, build, monkeypatch, name, stream):
    no_thread(monkeypatch, name)
    app = build()

    with contextlib.suppress(Exception):
        app.chat(stream=stream)

    assert b"Hello from upstream" in app.chat(stream=stream).data


def test_rows_that_are_just_being_written_are_shown(client, monkeypatch):
    insert, seen = history.insert, set()

    def look(db: Any, rows: Any, pause: Any) -> None:
        seen.update(row["id"] for row in client.router.history.requests(10))
        insert(db, rows, pause)

    monkeypatch.setattr(history, "insert", look)
    asked = client.chat().headers["X-Request-Id"]

    wait_until(lambda: seen)
    assert seen == {asked}


def test_rows_that_are_written_while_sums_are_asked_for_are_counted_once(client, file, monkeypatch):
    """Read from a file that has not got them yet, they would be in memory no more."""
    ask, all_written = history._asked, lambda: len(rows_in(file)) == 3

    def early(*args: Any) -> Any:
        found = ask(*args)
        by = time.monotonic() + 10 * history.BATCH_S
        while time.monotonic() < by and not all_written():
            time.sleep(0.001)
        return found

    for _ in range(3):
        client.chat()
    monkeypatch.setattr(history, "_asked", early)

    [sums] = client.router.history.usage(["category"], 1, client.router.current_table())

    assert sums["requests"] == 3
    wait_until(all_written)


def test_while_the_disk_hangs_sums_are_told_all_the_same(client, file, monkeypatch):
    client.chat()
    written(client, file, 1)
    kept = client.router.history
    kept.close()  # its thread would take the lock
    monkeypatch.setattr(history, "WAIT_S", 0.01)

    with kept._moving:  # as while a write does not end
        [sums] = kept.usage(["category"], 1, client.router.current_table())

    assert sums["requests"] == 1


def test_few_rows_are_written_behind_a_pause_and_many_where_there_is_none(tmp_path, table_and_call):
    row, counts = history.row_of(table_and_call[1]), []
    with contextlib.closing(history.opened(tmp_path / "other.db")) as db:

        def pause() -> bool:
            counts.extend(db.execute("SELECT COUNT(*) FROM requests").fetchone())
            return len(counts) <= 3

        history.insert(db, [row._replace(id=str(n)) for n in range(149)], pause)

        assert counts == [0, 16, 32, 48, 98, 148]
        assert [found["id"] for found in history.last_rows(db, 200)][::-1] == [
            str(n) for n in range(149)
        ]


def test_a_write_pauses_while_it_is_short_and_the_process_goes_on(tmp_path):
    kept = History(tmp_path / "other.db")

    assert kept._pause(time.monotonic() + 60)
    assert not kept._pause(time.monotonic())
    kept.close()
    assert not kept._pause(time.monotonic() + 60)


def test_rows_are_booked_as_they_come(tmp_path, table_and_call):
    """All at once would make the requests wait that come meanwhile."""
    _, call = table_and_call
    kept = History(tmp_path / "other.db")
    kept._stop.set()  # no thread: it would write them

    for _ in range(history.AT_ONCE * 3 + 1):
        kept.add(call)

    assert len(kept._rows) - kept._counted == 1


def test_a_request_leaves_a_row_that_says_what_its_headers_said(client, file):
    answer = client.chat("please refactor this python")

    [row] = written(client, file, 1)
    said = {"id": "X-Request-Id", "category": "X-Router-Category", "mode": "X-Router-Mode",
            "model": "X-Router-Model", "cost_source": "X-Router-Cost-Source"}  # fmt: skip
    assert {key: row[key] for key in said} == {k: answer.headers[h] for k, h in said.items()}
    assert row["cost_usd"] == pytest.approx(float(answer.headers["X-Router-Cost-Usd"]))
    assert (row["outcome"], row["attempts"], row["status"]) == ("success", 1, 200)
    assert (row["dialect"], row["client"]) == ("chat", "default")
    assert abs(row["time"] - time.time()) < 60


def test_tokens_and_cost_of_failed_attempts_are_in_the_row_of_their_request(client, upstream, file):
    upstream.scripts["acme/one"] = error(500)

    client.chat()

    [row] = written(client, file, 1)
    assert (row["model"], row["attempts"], row["outcome"]) == ("acme/two", 3, "success")


def test_no_prompt_and_no_answer_is_in_the_file(client, file):
    client.chat("MARKER-PROMPT hello")
    written(client, file, 1)

    data = b"".join(path.read_bytes() for path in file.parent.glob("usage.db*"))

    assert b"MARKER" not in data
    assert oct(file.stat().st_mode & 0o777) == "0o600"


def test_what_is_refused_at_the_door_leaves_no_row(build, file):
    client = build(ROUTER_API_KEY="k" * 20)

    assert client.chat().status_code == 401
    assert client.chat(headers={"Authorization": f"Bearer {'k' * 20}"}).status_code == 200

    assert len(written(client, file, 1)) == 1


def test_32_threads_lose_no_row_and_no_cent(tmp_path, table_and_call):
    _, call = table_and_call
    kept = History(tmp_path / "other.db")

    def work() -> None:
        for _ in range(200):
            kept.add(call)

    threads = [threading.Thread(target=work) for _ in range(32)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]

    wait_until(lambda: len(rows_in(tmp_path / "other.db")) == 6400)
    assert kept.figures("day")["cost_usd"] == pytest.approx(6400 * COST)
    assert History(tmp_path / "other.db").figures("day") == kept.figures("day")


# --- what outlasts the process -------------------------------------------------------------------


def test_the_days_spending_holds_after_a_restart(build, routes, file, upstream):
    client = build(daily_limit_usd=1.5 * COST)
    client.chat()
    client.chat()
    written(client, file, 2)

    other = again(routes)

    assert other.chat().status_code == 429
    assert figures(other)["spent_today_usd"] == pytest.approx(2 * COST)
    assert len(upstream.requests) == 2


def test_what_another_process_writes_is_heard_of(tmp_path, table_and_call):
    _, call = table_and_call
    old, new = History(tmp_path / "other.db"), History(tmp_path / "other.db")
    new.add(call)

    old.add(call)

    wait_until(lambda: new.figures("day")["requests"] == 2)
    wait_until(lambda: old.figures("day")["cost_usd"] == pytest.approx(2 * COST))


def test_a_kill_loses_nothing_that_is_older_than_a_second(serve_once):
    service = serve_once(daily_limit_usd=2.5 * COST)
    service.chat()
    service.chat()
    time.sleep(1.0)  # the promise itself

    kill_all(service)
    service.start()

    assert service.get("/metrics").json()["spent_today_usd"] == pytest.approx(2 * COST)
    assert service.chat().status_code == 200
    wait_until(lambda: service.get("/metrics").json()["spent_today_usd"] > 2.5 * COST)
    assert service.chat().status_code == 429


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_and_a_reload_lose_nothing(serve_once, signal_):
    service = serve_once(daily_limit_usd=1.5 * COST)
    before = worker_of(service)
    service.chat()
    service.chat()

    service.process.send_signal(signal_)
    if signal_ == signal.SIGTERM:
        service.process.wait(20)
        service.start()
    wait_until(lambda: before not in workers_of(service) and worker_of(service), 20)

    assert service.chat().status_code == 429
    assert [row["outcome"] for row in rows_in(service.folder / "usage.db")[:2]] == ["success"] * 2


# --- whatever is wrong with the file -------------------------------------------------------------


def foreign(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE somebodys (x)")
        db.commit()


def newer(file: Path) -> None:
    history.opened(file).close()
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 99")


BAD = {"garbage": lambda file: file.write_bytes(b"no database at all" * 100),
       "half": lambda file: (history.opened(file).close(), os.truncate(file, 5000)),
       "foreign": foreign, "newer": newer, "folder": lambda file: file.mkdir()}  # fmt: skip


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_used_costs_one_warning_and_no_request(
    build, file, spoil, lines, tmp_path
):
    spoil(file)
    before = file.read_bytes() if file.is_file() else b""

    client = build(daily_limit_usd=2.5 * COST)
    statuses = [client.chat().status_code for _ in range(4)]
    wait_until(lambda: client.router.history._thread is not None)

    assert statuses == [200, 200, 200, 429]  # in memory the limit holds all the same
    assert health(client)["status"] == "failing"
    assert client.get("/usage").json["rows"][0]["requests"] == 4
    assert len([line for line in lines if "history_failing" in line]) == 1
    if file.is_file():
        assert file.read_bytes()[:1000] == before[:1000]
        file.rename(tmp_path / "away")
    else:
        file.rmdir()
    written(client, file, 4)  # and once it is mended nothing is missing
    wait_until(lambda: health(client) == {"status": "ok"})


def test_a_locked_file_is_written_when_it_is_free_again(client, file, monkeypatch):
    monkeypatch.setattr(history, "WAIT_S", 0.05)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        client.chat()
        wait_until(lambda: health(client)["status"] == "failing")
        assert health(client)["error"] == "another program holds it locked"
        db.execute("ROLLBACK")

    assert len(written(client, file, 1)) == 1
    wait_until(lambda: health(client) == {"status": "ok"})


def test_a_full_disk_costs_no_request(client, file, monkeypatch):
    real = history.opened

    def small(path: Path, **more: Any) -> sqlite3.Connection:
        db = real(path, **more)
        db.execute("PRAGMA max_page_count = 1")
        return db

    monkeypatch.setattr(history, "opened", small)
    for _ in range(300):
        assert client.chat().status_code == 200
    wait_until(lambda: health(client).get("error") == "the disk is full")
    monkeypatch.setattr(history, "opened", real)

    assert len(written(client, file, 300)) == 300


def test_a_file_that_was_taken_away_is_begun_anew(client, file):
    client.chat()
    written(client, file, 1)
    for path in file.parent.glob("usage.db*"):
        path.unlink()

    client.chat()

    assert len(written(client, file, 1)) == 1


def test_rows_that_wait_too_long_are_given_up_and_their_sums_are_not(
    tmp_path, table_and_call, monkeypatch
):
    _, call = table_and_call
    monkeypatch.setattr(history, "MOST_WAITING", 100)
    path = tmp_path / "other.db"
    path.mkdir()
    kept = History(path)
    for _ in range(250):
        kept.add(call)

    path.rmdir()

    wait_until(lambda: len(rows_in(path)) >= 80)
    assert kept.health()["lost"] + len(rows_in(path)) == 250
    assert History(path).figures("day")["cost_usd"] == pytest.approx(250 * COST)


def test_without_a_file_all_is_as_it_was_but_for_the_restart(build, file):
    client = build(ROUTER_HISTORY="off", daily_limit_usd=1.5 * COST)

    statuses = [client.chat().status_code for _ in range(3)]

    assert statuses == [200, 200, 429]
    assert health(client) == {"status": "off"}
    assert client.get("/usage").json["rows"][0]["success"] == 2
    assert len(client.get("/usage/requests").json["requests"]) == 3
    assert not file.exists()


# --- how long it is kept -------------------------------------------------------------------------


@pytest.fixture
def table_and_call(build, client):
    """A routing table, and a request that has ended and cost COST."""
    client.chat()
    model = client.router.current_table().models["acme/one"]
    attempt = module.Attempt(model, "success", 200)
    attempt.price({"prompt_tokens": 30, "completion_tokens": 10})
    call = module.Call("id", outcome="success", category="code", mode="keywords",
                       attempts=[attempt], answered_by=attempt, flight=None,
                       table=client.router.current_table(), started=0.0)  # fmt: skip
    return call.table, call


def test_rows_older_than_history_days_go_and_the_months_sums_stay(tmp_path, table_and_call):
    _, call = table_and_call
    path = tmp_path / "old.db"
    kept = History(path)
    kept.add(call)
    wait_until(lambda: len(rows_in(path)) == 1)
    with contextlib.closing(history.opened(path)) as db:
        db.execute("UPDATE requests SET time = time - 2 * 86400")

        history.tidy(db, 1)

    assert rows_in(path) == []
    assert History(path).figures("month")["requests"] == 1


def test_the_oldest_of_too_many_rows_go_chunk_by_chunk_and_give_their_room_back(
    tmp_path, table_and_call, monkeypatch
):
    _, call = table_and_call
    monkeypatch.setattr(history, "MOST_ROWS", 100)
    monkeypatch.setattr(history, "CHUNK", 400)
    path = tmp_path / "many.db"
    row = history.row_of(call)
    with contextlib.closing(history.opened(path)) as db:
        history.insert(db, [row._replace(id=str(n)) for n in range(1000)])
        [before] = db.execute("PRAGMA page_count").fetchone()

        rounds = [history.tidy(db, 90) for _ in range(3)]

        assert rounds == [True, True, False]
        assert [row["id"] for row in rows_in(path)] == [str(n) for n in range(900, 1000)]
        assert db.execute("PRAGMA page_count").fetchone()[0] < before / 2


def test_a_file_of_an_older_version_is_brought_up_with_all_it_holds(
    tmp_path, table_and_call, monkeypatch
):
    _, call = table_and_call
    path = tmp_path / "v1.db"
    kept = History(path)
    kept.add(call)
    wait_until(lambda: len(rows_in(path)) == 1)
    kept.close()

    monkeypatch.setattr(history, "STEPS", (*history.STEPS, "ALTER TABLE requests ADD note TEXT"))
    newer = History(path)

    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(history.STEPS),)
        assert db.execute("SELECT id, note FROM requests").fetchall() == [("id", None)]
    assert newer.figures("day") == kept.figures("day")


def test_figures_read_the_sums_and_no_row(tmp_path):
    with contextlib.closing(history.opened(tmp_path / "other.db")) as db:
        asked: list[str] = []
        db.set_trace_callback(asked.append)
        history.sums_by(db, ["day", "category"], "2026-01-01")
        history.sums_in(db)

    assert asked
    assert not any("FROM requests" in sql for sql in asked)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A file of 5,000 rows: the first 10 of a model that was never asked again."""
    with contextlib.closing(history.opened(tmp_path_factory.mktemp("many") / "usage.db")) as db:
        row = history.Row(time.time(), "id", "chat", "code", "keywords", "new", "success", 200, 1,
                          10, 10, 0, 0, 0.1, "upstream", None, 10.0, "")  # fmt: skip
        history.insert(db, [row._replace(model="old") if n < 10 else row for n in range(5000)])
        yield db


def steps_of(db: sqlite3.Connection, work: Callable[[], Any]) -> int:
    """How many hundred steps SQLite takes for it."""
    steps: list[int] = []
    db.set_progress_handler(lambda: steps.append(1), 100)  # `append` gives None: go on
    work()
    db.set_progress_handler(None, 0)
    return len(steps)


@pytest.mark.parametrize("model", ["", "old", "new", "none"])
@pytest.mark.parametrize("outcome", ["", "success", "failed"])
@pytest.mark.parametrize("before", [None, 4000])
def test_any_filter_reads_the_rows_it_shows_and_no_others(many, model, outcome, before):
    assert steps_of(many, lambda: history.last_rows(many, 10, model, outcome, before)) < 10


def test_what_is_old_is_looked_for_without_reading_all(many, monkeypatch):
    monkeypatch.setattr(history, "CHUNK", 10)

    assert steps_of(many, lambda: history.tidy(many, 90)) < 10


def test_the_thread_ends_when_nothing_comes_and_closes_the_file(client, file):
    client.chat()
    written(client, file, 1)

    wait_until(lambda: client.router.history._thread is None)

    wait_until(lambda: not file.with_name("usage.db-wal").exists())


def test_a_history_of_the_wrong_name_stops_nothing(build, tmp_path):
    client = build(ROUTER_HISTORY=str(tmp_path / "no" / "such" / "folder.db"))

    assert client.chat().status_code == 200
    assert health(client)["status"] == "failing"
