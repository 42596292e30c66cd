"""The terminal: commands, exit status, what is said of a bad file, JSON, colour on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import KEY, ROOT, settings_for, small_routes
from service import plain_environ

import router as module
from parts.errors import RoutesError
from router import explain_here

SMALL = json.dumps(small_routes("http://127.0.0.1:1/v1"), indent=2)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command in this process: exit status, standard output and error."""
    before = dict(os.environ)

    def command(*args: str, **env: str) -> tuple[int, str, str]:
        os.environ.clear()
        os.environ.update(plain_environ(before), **env)
        try:
            status = module.main(explain_here, [*args])
        except SystemExit as e:  # wrong usage
            status = int(str(e.code))
        return (status, *capsys.readouterr())

    yield command
    os.environ.clear()
    os.environ.update(before)


def run_really(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "router.py", *args]
    return subprocess.run(command, cwd=ROOT, env=plain_environ(), text=True, timeout=30, **more)


def test_without_a_command_it_prints_its_commands():
    done = run_really(capture_output=True)

    assert done.returncode == 2
    assert all(name in done.stdout for name in ("serve", "route", "check"))


@pytest.mark.parametrize("command", ["serve", "route", "check", "costs", "requests"])
def test_each_command_explains_itself(run, command):
    status, out, _ = run(command, "--help")

    assert status == 0
    assert "--json" in out


@pytest.mark.parametrize(("args", "status"), [(["check"], 0), (["nonsense"], 2), (["route"], 2)])
def test_exit_status_tells_fine_from_wrong_usage(run, args, status):
    assert run(*args)[0] == status


def test_color_is_for_a_terminal_only():
    leader, follower = pty.openpty()
    run_really("check", stdout=follower, check=True)
    os.close(follower)
    on_terminal = os.read(leader, 65536)
    os.close(leader)

    assert b"\x1b[32mfine" in on_terminal
    assert "\x1b" not in run_really("check", capture_output=True).stdout


def test_the_banner_is_json_for_a_program(run):
    _, _, err = run("check", "--banner", ROUTER_LOG_FORMAT="json", ROUTER_BIND="127.0.0.1:3999")

    assert json.loads(err)["url"] == "http://127.0.0.1:3999"


def test_a_key_file_that_cannot_be_read_stops_the_start_by_its_name(run, routes, tmp_path):
    env = {"ROUTER_ROUTES": str(routes), "TEST_API_KEY_FILE": str(tmp_path / "none")}

    status, _, err = run("check", "--banner", **env)  # what gunicorn.conf.py runs first

    assert status == 1
    assert "TEST_API_KEY_FILE" in err


# --- check ---------------------------------------------------------------------------------------


def test_check_of_a_good_file_is_status_0_and_leaves_its_folder_as_it_was(run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(SMALL)

    status, out, err = run("check", str(path), TEST_API_KEY="x")

    assert (status, err) == (0, "")
    assert "fine" in out
    assert "warning" not in out
    assert os.listdir(tmp_path) == ["mine.json"]


def test_check_takes_the_file_of_the_settings_by_default(run, routes):
    status, out, _ = run("check", ROUTER_ROUTES=str(routes))

    assert status == 0
    assert str(routes) in out


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
def test_check_of_a_bad_file_is_status_1_with_file_place_and_suggestion(run, tmp_path, text, said):
    path = tmp_path / "mine.json"
    path.write_text(text)

    status, out, err = run("check", str(path))

    assert (status, out) == (1, "")
    assert str(path) in err
    assert [part for part in said if part not in err] == []
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_check_of_what_cannot_be_read_is_a_sentence(run, tmp_path, name):
    status, _, err = run("check", str(tmp_path / name))

    assert status == 1
    assert str(tmp_path / name) in err


def test_check_says_the_same_as_the_service(run, routes):
    routes.write_bytes(b'{"a": "\xe9"}')

    _, _, err = run("check", str(routes))

    with pytest.raises(RoutesError) as caught:
        module.create_app(settings_for(routes))
    assert str(caught.value) in err


def test_check_warns_of_unknown_models_missing_keys_and_unreachable_categories(run, tmp_path):
    routes = json.loads(SMALL)
    routes["categories"]["haiku"] = {"models": ["new/thing"]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(routes))

    status, out, _ = run("check", str(path))
    report = json.loads(run("check", "--json", str(path))[1])

    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert status == 0
    assert [f"warning: {warning}" for warning in report["warnings"]] == warnings
    assert report["ok"] is True
    assert len(warnings) == 3
    assert any("new/thing" in line for line in warnings)
    assert any("TEST_API_KEY" in line for line in warnings)
    assert any("haiku" in line and "keyword" in line for line in warnings)


def test_check_as_json_tells_the_errors(run, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"categories": {}')

    status, out, _ = run("check", "--json", str(path))

    assert status == 1
    assert json.loads(out)["errors"][0].endswith("line 1, column 18: Expecting ',' delimiter")


# --- route ---------------------------------------------------------------------------------------


def test_a_dry_run_works_without_a_service(run, routes):
    env = {"ROUTER_ROUTES": str(routes), "ROUTER_BIND": "127.0.0.1:1", "TEST_API_KEY": KEY}

    status, out, _ = run("route", "--json", "please refactor this", **env)

    report = json.loads(out)
    assert status == 0
    assert report["category"] == "code"
    assert report["chain"][0]["circuit"] == "unknown"


def test_a_dry_run_asks_the_running_service(run, service):
    _, out, _ = run("route", "please refactor this", **service.env)

    assert "category  code" in out
    assert "acme/one  circuit closed" in out
