"""The routes file on disk: seen when it changes, kept when it is bad, never lost when written."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Clock, small_routes
from helpers import in_turn
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import livefile
from parts.errors import Refused, RoutesError
from parts.livefile import Store
from parts.logs import EventFormatter
from parts.table import Table, load_table

ROUTES = small_routes("http://127.0.0.1:1")
TEXT = json.dumps(ROUTES, indent=2) + "\n"
OTHER = TEXT.replace('"hello"', '"howdy"')  # of the same length
BAD = TEXT.replace('"hello"', "hello")
BAD_PLACE = f"line {BAD[: BAD.index('hello')].count(chr(10)) + 1}, column 9"
WORSE = TEXT.replace('"keywords":', '"keywrods":', 1)
AN_HOUR_AGO = time.time_ns() - 3_600 * 10**9
NOBODY = 65534
TIDY = [".routes.json.last-good", "routes.json"]  # what the folder holds
fork = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "routes.json"
    found.write_text(TEXT)
    os.utime(found, ns=(AN_HOUR_AGO, AN_HOUR_AGO))
    return found


@pytest.fixture
def store(path: Path, clock: Clock) -> Store:
    return Store(path, load_table, clock)


@pytest.fixture(params=["logfmt", "json"])
def log_text(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the service's log says, in both of its forms."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(EventFormatter(request.param == "json"))
    handler.setLevel(logging.ERROR)
    log = logging.getLogger("llm_router")
    log.addHandler(handler)
    yield out
    log.removeHandler(handler)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "routes.json").write_text(TEXT)
        yield Path(name)


def words(store: Store, name: str = "conversation") -> tuple[str, ...]:
    """The keywords in force, a second of the clock later."""
    store._clock += 1  # type: ignore[operator]  # the fixture's clock
    return store.current().categories[name].keywords


def on_disk(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["categories"]


def with_os(monkeypatch: pytest.MonkeyPatch, **changed: Callable[..., Any]) -> None:
    """Let routes_file, and it alone, see an `os` of which some functions are replaced."""
    monkeypatch.setattr("parts.livefile.os", SimpleNamespace(**{**vars(os), **changed}))


def set_words(store: Store, name: str, *keywords: str, if_match: str | None = None):
    """What the API does: create or change a category."""
    body = {"models": ["acme/one"], "keywords": list(keywords)}
    return store.change(lambda t: t.with_category(name, body, must_exist=False), if_match)


def one_more_word(table: Table, word: str) -> str:
    """The text with one more keyword of code; a lost write is a lost word."""
    old = table.categories["code"]
    body = {"models": ["acme/one"], "keywords": [*old.keywords, word]}
    return table.with_category("code", body, must_exist=True)


def refusal(store: Store, if_match: str | None = None) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        set_words(store, "haiku", "autumn", if_match=if_match)
    return caught.value.status, caught.value.kind


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child; its status when it was killed."""
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: theirs.send(work()))
    child.start()
    theirs.close()
    with contextlib.suppress(EOFError):
        return ours.recv()
    child.join(10)
    return child.exitcode


def status_of(store: Store) -> int:
    """200, or the status of the refusal; for children."""
    try:
        set_words(store, "haiku", "autumn")
    except Refused as e:
        return e.status
    return 200


# --- reading ----


def in_place(path: Path, text: str) -> None:
    with path.open("r+", newline="") as file:
        file.truncate()
        file.write(text)


def by_rename(path: Path, text: str) -> None:
    path.with_name("4913").write_text(text)
    os.replace(path.with_name("4913"), path)


def by_backup(path: Path, text: str) -> None:
    path.rename(path.with_name("routes.json~"))
    path.write_text(text)


def by_sed(path: Path, text: str) -> None:
    word = json.loads(text)["categories"]["conversation"]["keywords"][0]
    subprocess.run(["sed", "-i", f's/"hello"/"{word}"/; s/"salut"/"{word}"/', path], check=True)


def with_the_old_time(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, ns=(AN_HOUR_AGO, AN_HOUR_AGO))


def by_copy_of_an_older_file(path: Path, text: str) -> None:
    older = path.with_name("older")
    older.write_text(text)
    os.utime(older, ns=(AN_HOUR_AGO * 2 // 3, AN_HOUR_AGO * 2 // 3))
    shutil.copy2(older, path)


def to_a_symlink(path: Path, text: str) -> None:
    (path.parent / "v2").mkdir()
    (path.parent / "v2" / "other.json").write_text(text)
    (path.parent / "link").symlink_to("v2/other.json")
    os.replace(path.parent / "link", path)


EDITORS = [
    in_place, by_rename, by_backup, pytest.param(by_sed, marks=pytest.mark.debian("sed")),
    with_the_old_time, by_copy_of_an_older_file, to_a_symlink,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITORS)
def test_an_edit_is_seen_within_a_second_whatever_the_editor_does(store, path, edit):
    """The second one, too: it has the same length as the first."""
    in_place(path, TEXT.replace('"hello"', '"salut"'))
    assert words(store) == ("salut",)

    edit(path, OTHER)

    assert words(store) == ("howdy",)


def test_an_edit_within_the_tick_of_the_last_look_is_seen(path, clock, monkeypatch):
    """A file system with a coarse clock: both writes have the same times, length and inode."""
    os.utime(path)
    frozen = os.stat(path)
    with_os(monkeypatch, stat=lambda *_, **__: frozen)
    store = Store(path, load_table, clock)
    words(store)

    in_place(path, OTHER)

    assert words(store) == ("howdy",)


def test_a_swapped_symlink_of_a_whole_folder_is_followed(tmp_path, clock):
    """How Kubernetes swaps a ConfigMap."""
    versions = {"v1": TEXT, "v2": OTHER}
    for name, text in versions.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "routes.json").write_text(text)
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "routes.json").symlink_to("data/routes.json")
    store = Store(tmp_path / "routes.json", load_table, clock)

    (tmp_path / "new").symlink_to("v2")
    os.replace(tmp_path / "new", tmp_path / "data")

    assert words(store) == ("howdy",)


def test_the_file_is_looked_at_no_more_than_twice_a_second(store, path, clock):
    store.current()  # the look that starts the half second
    path.write_text(OTHER)

    clock += 0.4
    early = store.current().categories["conversation"].keywords
    clock += 0.11

    assert early == ("hello",)
    assert store.current().categories["conversation"].keywords == ("howdy",)


def test_a_request_in_flight_keeps_its_table(store, path):
    table = store.current()

    path.write_text(OTHER)

    assert words(store) == ("howdy",)
    assert table.categories["conversation"].keywords == ("hello",)


@pytest.mark.parametrize(
    ("bad", "place"),
    [
        (b"", "line 1, column 1"),
        (TEXT[:200].encode(), "line "),
        (BAD.encode(), BAD_PLACE),
        (WORSE.encode(), "$.categories.tools: unknown key 'keywrods'"),
        (TEXT.replace('"conversation",', '"nowhere",').encode(), "$.default_category: "),
        (b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1], "byte "),
        (TEXT.encode().replace(b"hello", b"h\xe9llo"), "byte "),
        (b"\xef\xbb\xbf\xef\xbb\xbf" + TEXT.encode(), "line 1, column 1"),
        (b"[" * 50_000, ""),
        (b"null", "$: should be an object"),
        (b"\0" * 500, "line 1, column 1"),
    ],
)
def test_a_bad_edit_keeps_the_last_good_table_and_says_where(store, path, bad, place):
    path.write_bytes(bad)

    assert words(store) == ("hello",)
    assert place in store.error
    assert store.error_since.endswith("Z")


@pytest.mark.parametrize(
    ("mend", "text", "word"), [(in_place, OTHER, "howdy"), (with_the_old_time, TEXT, "hello")]
)
def test_the_file_mended_or_put_back_as_it_was_is_no_error_any_more(store, path, mend, text, word):
    path.write_text(BAD)
    words(store)

    mend(path, text)

    assert words(store) == (word,)
    assert (store.error, store.error_since) == (None, None)


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (os.path.exists, "cannot be read: No such file"),
        (os.mkdir, "cannot be read: not a regular file"),
        (os.mkfifo, "cannot be read: not a regular file"),
    ],
)
def test_without_a_file_in_its_place_the_last_good_table_is_kept(store, path, put, said):
    path.unlink()
    put(path)

    assert words(store) == ("hello",)
    assert said in store.error


def test_a_file_that_is_far_too_large_is_refused_without_being_read(store, path):
    os.truncate(path, 1 << 30)  # takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert words(store) == ("hello",)

    assert store.error == "over 8 MB, which no routes file needs"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (64 << 10)  # KB


def test_a_change_that_would_make_the_file_too_large_is_refused(store, path):
    with pytest.raises(Refused, match="over 8 MB") as caught:
        store.change(lambda table: table.text + " " * (8 << 20))

    assert caught.value.status == 422
    assert path.read_text() == TEXT


def test_a_symlink_taken_away_and_put_back_is_no_error_any_more(path, clock):
    link = path.with_name("link.json")
    link.symlink_to(path)
    store = Store(link, load_table, clock)
    words(store)
    link.unlink()
    words(store)

    link.symlink_to(path)

    assert words(store) == ("hello",)
    assert store.error is None


def test_a_passing_lack_of_file_descriptors_does_not_hide_an_edit(store, path):
    words(store)
    with_the_old_time(path, OTHER)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        words(store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert words(store) == ("howdy",)
    assert store.error is None


def test_each_distinct_error_is_logged_once(store, path, log_text):
    seen = []

    for text in (BAD, BAD, BAD, WORSE, WORSE, OTHER, BAD):
        path.write_text(text)
        words(store)
        seen.append(log_text.getvalue().count("\n"))

    assert seen == [1, 1, 1, 2, 2, 2, 3]
    assert "$.categories.tools" in log_text.getvalue().splitlines()[1]
    assert log_text.getvalue().count(str(path)) == 3


def test_a_pasted_key_is_not_logged(store, path, log_text):
    path.write_text(TEXT.replace('"TEST_API_KEY"', '"sk-or-v1-012345"'))

    words(store)

    assert "api_key_env" in log_text.getvalue()
    assert "sk-or" not in log_text.getvalue() + store.error


# --- booting ----


@pytest.mark.parametrize(
    ("spoil", "place"),
    [(lambda path: path.write_text(BAD), BAD_PLACE), (os.remove, "cannot be read")],
)
def test_a_boot_with_a_bad_file_serves_the_last_good_one_until_it_is_mended(
    store, path, clock, spoil, place
):
    spoil(path)
    booted = Store(path, load_table, clock)
    before, error = words(booted), booted.error

    path.write_text(OTHER)

    assert before == ("hello",)
    assert place in error
    assert words(booted) == ("howdy",)
    assert booted.error is None


def test_a_boot_with_a_bad_file_and_nothing_else_is_refused_with_its_place(path, clock):
    path.write_text(BAD)

    with pytest.raises(RoutesError, match=BAD_PLACE):
        Store(path, load_table, clock)


@pytest.mark.parametrize("kept", [b"", b"\xff", BAD.encode()])
def test_a_boot_with_two_bad_files_tells_of_the_one_people_edit(store, path, clock, kept):
    path.write_text(WORSE)
    path.with_name(".routes.json.last-good").write_bytes(kept)

    with pytest.raises(RoutesError, match="keywrods"):
        Store(path, load_table, clock)


def test_the_last_good_copy_follows_every_accepted_edit(store, path, clock):
    path.write_text(OTHER)
    words(store)
    set_words(store, "haiku", "autumn")
    wanted = path.read_text()

    path.write_text(BAD)
    words(store)

    assert path.with_name(".routes.json.last-good").read_text() == wanted


@pytest.mark.parametrize("spoil", [lambda kept: kept.write_bytes(b"\xff"), os.mkdir, os.mkfifo])
def test_a_last_good_copy_that_cannot_be_read_is_in_nobodys_way(tmp_path, clock, spoil):
    path = tmp_path / "routes.json"
    path.write_text(TEXT)
    spoil(tmp_path / ".routes.json.last-good")

    store = Store(path, load_table, clock)

    assert words(store) == ("hello",)
    assert store.error is None


def test_a_symlink_swapped_to_a_bad_file_still_boots_with_the_last_good_one(tmp_path, clock):
    for name, text in {"v1": TEXT, "v2": BAD}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "routes.json").write_text(text)
    link = tmp_path / "routes.json"
    link.symlink_to("v1/routes.json")
    Store(link, load_table, clock)

    link.unlink()
    link.symlink_to("v2/routes.json")

    assert Store(link, load_table, clock).current().categories["conversation"].keywords == (
        "hello",
    )


# --- writing ----


def test_a_write_is_in_the_file_and_in_force_at_once(store, path):
    table = set_words(store, "haiku", "autumn")

    assert on_disk(path)["haiku"] == {"models": ["acme/one"], "keywords": ["autumn"]}
    assert store.current().categories["haiku"].keywords == ("autumn",)
    assert store.current() is table


def test_a_write_keeps_a_hand_edit_that_was_not_seen_yet(store, path):
    store.current()  # the look that starts the half second
    path.write_text(OTHER)

    set_words(store, "haiku", "autumn")

    assert on_disk(path)["conversation"]["keywords"] == ["howdy"]
    assert store.current().categories["conversation"].keywords == ("howdy",)


def test_a_write_touches_no_other_byte(store, path):
    set_words(store, "haiku", "autumn")

    new = ',\n    "haiku": {"models": ["acme/one"], "keywords": ["autumn"]}'
    at = TEXT.rindex("\n  }\n}")
    assert path.read_text() == TEXT[:at] + new + TEXT[at:]


def test_a_write_keeps_windows_line_ends(path, clock):
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    store = Store(path, load_table, clock)

    set_words(store, "haiku", "autumn")
    store.change(lambda table: table.without_category("haiku"))

    assert path.read_bytes() == TEXT.replace("\n", "\r\n").encode()


def test_a_change_of_nothing_leaves_the_file_alone(store, path):
    before = os.stat(path)

    store.change(lambda table: table.text)

    after = os.stat(path)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664])
def test_owner_and_mode_are_kept(store, path, mode):
    path.chmod(mode)
    owner = (12345, 23456) if os.getuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)

    set_words(store, "haiku", "autumn")

    found, kept = os.stat(path), os.stat(path.with_name(TIDY[0]))
    assert stat.S_IMODE(found.st_mode) == mode
    assert (found.st_uid, found.st_gid) == owner
    assert stat.S_IMODE(kept.st_mode) & ~mode == 0  # no more readable than the file


@pytest.mark.parametrize("target", ["real/routes.json", "real/routes-2026.json"])
def test_a_write_follows_symlinks(tmp_path, clock, target):
    (tmp_path / "real").mkdir()
    (tmp_path / target).write_text(TEXT)
    (tmp_path / "hop.json").symlink_to(target)
    link = tmp_path / "routes.json"
    link.symlink_to(tmp_path / "hop.json")

    set_words(Store(link, load_table, clock), "haiku", "autumn")

    assert link.is_symlink()
    assert not (tmp_path / target).is_symlink()
    assert "haiku" in on_disk(tmp_path / target)


def test_a_symlink_laid_where_the_temporary_file_goes_is_not_written_through(store, path):
    victim = path.with_name("victim")
    victim.write_text("untouched")
    path.with_name(".routes.json.tmp").symlink_to(victim)

    with contextlib.suppress(Refused):
        set_words(store, "haiku", "autumn")

    assert victim.read_text() == "untouched"
    assert "haiku" in set_words(store, "haiku", "autumn").categories


def test_a_change_that_does_not_fit_is_a_422_and_changes_no_byte(store, path):
    with pytest.raises(Refused) as caught:
        store.change(lambda t: t.with_category("x y", {"models": ["a/b"]}, must_exist=False))

    assert caught.value.status == 422
    assert path.read_text() == TEXT


@pytest.mark.parametrize("bad", [b"", BAD.encode(), WORSE.encode(), b"\xff", TEXT[:-9].encode()])
def test_a_write_while_the_file_is_bad_is_a_409_and_changes_no_byte(store, path, bad):
    path.write_bytes(bad)

    assert refusal(store) == (409, "routes_file_bad")
    assert path.read_bytes() == bad
    assert words(store) == ("hello",)


def test_a_write_while_the_file_is_gone_is_a_409_and_makes_none(store, path):
    path.unlink()

    assert refusal(store)[0] == 409
    assert not path.exists()


def test_a_stale_version_is_a_412_and_changes_no_byte(store, path):
    etag = store.current().etag
    path.write_text(OTHER)

    assert refusal(store, if_match=f'"{etag}"') == (412, "stale_version")
    assert path.read_text() == OTHER


@pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', "{}", "*", '"0123", "{}"'])
def test_the_version_in_force_lets_a_write_through(store, path, form):
    set_words(store, "haiku", "autumn", if_match=form.format(store.current().etag))

    assert "haiku" in on_disk(path)


def test_a_read_only_folder_is_a_503_and_changes_nothing(open_folder):
    path = open_folder / "routes.json"
    store = Store(path, load_table)
    before = sorted(os.listdir(open_folder))

    def as_nobody() -> int:
        os.chmod(open_folder, 0o555)
        with contextlib.suppress(PermissionError):  # only root is somebody else by default
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return status_of(store)

    assert in_child(as_nobody) == 503
    assert path.read_text() == TEXT
    assert sorted(os.listdir(open_folder)) == before


def test_a_full_disk_is_a_503_and_changes_nothing(store, path):
    def with_a_limit() -> tuple[int, list[str]]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return status_of(store), sorted(os.listdir(path.parent))

    assert in_child(with_a_limit) == (503, TIDY)
    assert path.read_text() == TEXT


def test_no_descriptor_is_left_open_after_refusals(store, path):
    set_words(store, "haiku", "autumn")
    path.write_text(BAD)
    for _ in range(5):
        refusal(store)

    opened = [Path(os.path.realpath(f"/proc/self/fd/{n}")) for n in os.listdir("/proc/self/fd")]
    assert [file for file in opened if path.parent in file.parents] == []


@pytest.mark.parametrize(
    ("name", "nth"),
    [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("fchmod", 1), ("fchmod", 2)],
)
def test_a_step_that_fails_is_a_503_with_the_old_file_or_no_error_with_the_new(
    store, path, monkeypatch, name, nth
):
    real, calls = getattr(os, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(5, "Input/output error")
        return real(*args)

    with_os(monkeypatch, **{name: failing})
    status = status_of(store)

    assert (status, "haiku" in on_disk(path)) in [(503, False), (200, True)]
    assert sorted(os.listdir(path.parent)) == TIDY


STEPS = {f"{name}-{nth}": (name, nth) for name in ("open", "fchown", "fchmod", "fsync", "replace")
         for nth in (1, 2)}  # fmt: skip


@pytest.mark.parametrize(
    ("when", "name", "nth"), [*in_turn(STEPS, "before"), *in_turn(STEPS, "after")]
)
def test_a_crash_at_any_step_leaves_the_old_or_the_new_file_whole(store, path, name, nth, when):
    def crash() -> int:
        real, calls = getattr(os, name), []

        def deadly(*args, **kwargs):
            calls.append(args)
            done = real(*args, **kwargs) if when == "after" or len(calls) < nth else None
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(os, name, deadly)
        return status_of(store)

    assert in_child(crash) in (-signal.SIGKILL, 200)

    assert path.read_text() == TEXT or "haiku" in on_disk(path)
    set_words(Store(path, load_table), "tanka", "spring")
    assert "tanka" in on_disk(path)
    assert sorted(os.listdir(path.parent)) == TIDY


def test_a_hand_edit_during_a_write_is_read_again_and_kept(store, path, monkeypatch):
    real = os.fsync

    def edit_meanwhile(fd: int) -> None:
        real(fd)
        with_os(monkeypatch)
        by_rename(path, OTHER)

    with_os(monkeypatch, fsync=edit_meanwhile)
    set_words(store, "haiku", "autumn")

    assert on_disk(path)["conversation"]["keywords"] == ["howdy"]
    assert on_disk(path)["haiku"]["keywords"] == ["autumn"]


@pytest.mark.parametrize("texts", [[BAD], [OTHER + " " * n for n in range(50)]])
def test_a_bad_hand_edit_during_a_write_or_one_after_the_other_is_a_409(
    store, path, monkeypatch, texts
):
    real, left = os.fsync, list(texts)
    with_os(monkeypatch, fsync=lambda fd: real(fd) or (left and path.write_text(left.pop())))

    assert refusal(store)[0] == 409
    assert path.read_text() in texts


@pytest.mark.parametrize("edit", [in_place, by_rename, lambda path, text: path.unlink()])
def test_a_hand_edit_while_the_peers_are_asked_is_a_409_and_stays(path, clock, edit):
    store = Store(path, load_table, clock, agree=lambda before, after: edit(path, OTHER))

    assert refusal(store) == (409, "conflict")
    assert not path.exists() or path.read_text() == OTHER
    assert ".routes.json.tmp" not in os.listdir(path.parent)


def test_an_edit_while_the_file_is_compared_counts_as_one(store, path, monkeypatch):
    real, edits = livefile.read_file, [OTHER]

    def edited_after(read: Path) -> str:
        text = real(read)
        if read == path and path.with_name(".routes.json.tmp").exists() and edits:
            in_place(path, edits.pop())
        return text

    monkeypatch.setattr(livefile, "read_file", edited_after)
    set_words(store, "haiku", "autumn")

    assert on_disk(path)["conversation"]["keywords"] == ["howdy"]
    assert on_disk(path)["haiku"]["keywords"] == ["autumn"]


def test_a_file_that_is_gone_for_a_moment_during_a_write_is_a_409(store, path, monkeypatch):
    real = os.fsync
    with_os(monkeypatch, fsync=lambda fd: real(fd) or path.unlink(missing_ok=True))

    assert refusal(store) == (409, "routes_file_bad")


# --- many at once ----


@contextlib.contextmanager
def folder_locked(path: Path) -> Iterator[None]:
    """The writers' lock, for an editor that reads, thinks and writes."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def test_two_processes_cannot_lose_each_others_writes(path):
    def work(who: int) -> None:
        store = Store(path, load_table)
        for n in range(20):
            set_words(store, f"p{who}-{n}", f"word{who}{n}")

    children = [fork.Process(target=work, args=(who,)) for who in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)

    assert [child.exitcode for child in children] == [0, 0]
    assert {f"p{who}-{n}" for who in range(2) for n in range(20)} < on_disk(path).keys()


def test_fifty_kills_during_writes_corrupt_nothing_and_lose_nothing(path):
    """Each child counts up in the file and tells what was acknowledged, until it is killed."""
    store, rng = Store(path, load_table), random.Random(7)
    stored = -1

    def count_up(first: int, acknowledged: Any) -> None:
        for n in range(first, first + 10_000):
            set_words(store, "counter", str(n))
            acknowledged.send(n)

    for _ in range(50):
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=count_up, args=(stored + 1, theirs))
        child.start()
        theirs.close()
        assert ours.poll(20)  # the first is written, however slow the machine
        child.join(rng.uniform(0.0, 0.02))
        child.kill()
        child.join(10)
        last = stored
        with contextlib.suppress(EOFError):
            while True:
                last = ours.recv()
        load_table(path.read_text())
        stored = int(on_disk(path).get("counter", {"keywords": [-1]})["keywords"][0])
        assert stored in (last, last + 1)  # written, but killed before it could say so

    assert stored >= 49
    set_words(Store(path, load_table), "counter", "end")
    assert sorted(os.listdir(path.parent)) == TIDY


def test_eight_writers_and_twenty_hand_edits_lose_nothing_and_no_reader_sees_a_bad_file(path):
    stores = [
        Store(path, load_table),
        Store(path, load_table),
    ]  # as two processes have them during a reload
    done, bad, looks = threading.Event(), [], []
    start = threading.Barrier(10, timeout=10)

    def write(who: int) -> None:
        start.wait()
        for n in range(12):
            stores[who % 2].change(lambda table, n=n: one_more_word(table, f"w{who}-{n}"))

    def edit() -> None:
        start.wait()
        for n in range(20):
            with folder_locked(path):
                routes = json.loads(path.read_text())
                routes.setdefault("continuations", []).append(f"hand-{n}")
                by_rename(path, json.dumps(routes, indent=2))

    def read() -> None:
        start.wait()
        while not done.wait(0.01):
            try:
                table = load_table(path.read_text())
                looks.append(len(table.categories["code"].keywords) + len(table.continuations))
            except RoutesError as e:
                bad.append(str(e))

    with ThreadPoolExecutor(10) as pool:
        reader = pool.submit(read)
        work = [pool.submit(edit), *(pool.submit(write, who) for who in range(8))]
        results = [future.exception(60) for future in work]
        done.set()
        reader.result(10)

    table = Store(path, load_table).current()
    wanted = {f"w{who}-{n}" for who in range(8) for n in range(12)}
    assert results == [None] * 9
    assert wanted - set(table.categories["code"].keywords) == set()
    assert list(table.continuations) == [f"hand-{n}" for n in range(20)]
    assert bad == []
    assert looks == sorted(looks)  # no reader sees an older file after a newer one


some_names = st.sampled_from(["code", "haiku", "tanka"])
some_words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3)
steps = st.one_of(
    st.tuples(st.just("api"), some_names, some_words),
    st.tuples(st.just("drop"), some_names, st.none()),
    st.tuples(st.sampled_from([in_place, by_rename, by_backup]), some_names, some_words),
    st.tuples(st.sampled_from([in_place, by_rename]), st.none(), st.none()),  # a slip of the hand
    st.tuples(st.just("look"), st.none(), st.none()),
)


class Story:
    """The file, its Store, and a plain dictionary that says what must be in both."""

    def __init__(self, folder: str):
        self.path = Path(folder) / "routes.json"
        self.path.write_text(TEXT)
        self.clock = Clock()
        self.store = Store(self.path, load_table, self.clock)
        self.wanted = json.loads(TEXT)["categories"]
        self.is_bad = False

    def tell(self, who: Any, name: str | None, keywords: list[str] | None) -> None:
        if who == "look":
            self.look()
        elif who in ("api", "drop"):
            self.call(who, str(name), keywords or [])
        elif name is None:
            who(self.path, json.dumps(ROUTES)[:-1])
            self.is_bad = True
        else:
            self.wanted[name] = {"models": ["acme/two"], "keywords": keywords}
            who(self.path, json.dumps({**ROUTES, "categories": self.wanted}))
            self.is_bad = False

    def call(self, who: str, name: str, keywords: list[str]) -> None:
        before = self.path.read_bytes()
        try:
            if who == "api":
                set_words(self.store, name, *keywords)
                new = {"models": ["acme/one"], "keywords": keywords}
                self.wanted[name] = {**self.wanted.get(name, {}), **new}
            else:
                self.store.change(lambda table: table.without_category(name))
                del self.wanted[name]
        except Refused as e:
            gone = name not in self.wanted
            assert e.status == (409 if self.is_bad else 404 if gone else 400)
            assert self.path.read_bytes() == before

    def look(self) -> None:
        self.clock += 1
        found = {name: list(c.keywords) for name, c in self.store.current().categories.items()}
        assert bool(self.store.error) == self.is_bad
        if not self.is_bad:
            assert on_disk(self.path) == self.wanted
            assert found == {name: c["keywords"] for name, c in self.wanted.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(steps, max_size=12))
def test_any_order_of_hand_edits_and_calls_loses_nothing(story):
    with tempfile.TemporaryDirectory() as folder:
        told = Story(folder)

        for step in story:
            told.tell(*step)

        told.look()
