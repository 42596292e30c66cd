"""The terminal: commands, exit status, JSON, colour only on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import ROOT


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ROUTER_")}
    command = [sys.executable, "router.py", *args]
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, timeout=30
    )


def test_without_a_command_it_prints_its_commands():
    done = run()

    assert done.returncode == 2
    assert all(name in done.stdout for name in ("serve", "route", "check"))


@pytest.mark.parametrize("command", ["serve", "route", "check"])
def test_each_command_explains_itself(command):
    done = run(command, "--help")

    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize(("args", "status"), [(["check"], 0), (["nonsense"], 2), (["route"], 2)])
def test_exit_status_tells_fine_from_wrong_usage(args, status):
    assert run(*args).returncode == status


def test_check_of_a_bad_file_is_status_1_in_both_forms(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"categories": {}')

    plain, as_json = run("check", str(bad)), run("check", "--json", str(bad))

    assert (plain.returncode, as_json.returncode) == (1, 1)
    assert "line 1, column 18" in plain.stderr
    assert json.loads(as_json.stdout)["errors"][0].endswith("Expecting ',' delimiter")


def test_check_as_json_lists_warnings():
    report = json.loads(run("check", "--json", OPENROUTER_API_KEY="").stdout)

    assert report["ok"] is True
    assert any("OPENROUTER_API_KEY" in warning for warning in report["warnings"])


def test_color_is_for_a_terminal_only():
    leader, follower = pty.openpty()
    subprocess.run(
        [sys.executable, "router.py", "check"], cwd=ROOT, stdout=follower, timeout=30, check=True
    )
    os.close(follower)
    on_terminal = os.read(leader, 65536)
    os.close(leader)

    assert b"\x1b[32mfine" in on_terminal
    assert "\x1b" not in run("check").stdout


def test_the_banner_is_json_for_a_program():
    done = run("check", "--banner", ROUTER_LOG_FORMAT="json", ROUTER_BIND="127.0.0.1:3999")

    assert json.loads(done.stderr)["url"] == "http://127.0.0.1:3999"
