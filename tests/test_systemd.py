"""deploy/llm-router.service, by systemd's own checks, and what it starts, with a notify socket."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from conftest import KEY, ROOT, free_port, small_routes
from helpers import CHAT, connected, user, wait_until
from upstream import Upstream

UNIT = (ROOT / "deploy" / "llm-router.service").read_text()
SAID = [line for line in UNIT.splitlines() if "=" in line and not line.startswith("#")]
HELLO = {"model": "router", "messages": [user("hello")]}


def value(name: str) -> str:
    """What the unit says about `name`, once."""
    [found] = [line.partition("=")[2] for line in SAID if line.startswith(name + "=")]
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit as it would be with the code in this folder: the paths it names exist here."""
    path = tmp_path / "llm-router.service"
    python = sys.executable
    text = UNIT.replace("/opt/llm-router/.venv/bin/python", python)
    path.write_text(text.replace("/opt/llm-router", str(ROOT)))
    return path


@pytest.mark.debian("systemd")
def test_systemd_finds_nothing_wrong_with_the_unit(installed):
    done = subprocess.run(
        ["systemd-analyze", "verify", installed], capture_output=True, text=True, timeout=60
    )

    assert "llm-router.service" not in done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.debian("systemd")
def test_the_exposure_is_at_most_1_5(installed):
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=15"]
    done = subprocess.run([*command, installed], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)[1]) <= 1.5


def test_each_key_comes_as_a_credential_and_is_named_by_its_setting():
    files = dict(line.partition("=")[2].split(":") for line in SAID if line.startswith("LoadCred"))
    given = [line.partition("=")[2] for line in SAID if "_FILE=" in line]

    assert set(files.values()) == {f"/etc/llm-router/{name}" for name in files}
    assert given == [f"{name.upper()}_FILE=%d/{name}" for name in files]
    assert set(files) >= {"openrouter_api_key", "router_api_key", "router_admin_token"}


def test_a_key_that_is_missing_or_empty_stops_the_start():
    files = {line.rpartition(":")[2] for line in SAID if line.startswith("LoadCred")}
    asserted = {line.partition("=")[2] for line in SAID if line.startswith("AssertFileNotEmpty")}

    assert asserted == files


def test_a_stop_waits_longer_than_gunicorn_does():
    settings = (ROOT / "gunicorn.conf.py").read_text()
    graceful_s = int(re.search(r"^graceful_timeout = (\d+)", settings, re.M)[1])

    assert int(value("TimeoutStopSec")) > graceful_s


def test_the_first_start_copies_routes_json_and_later_ones_keep_it(tmp_path):
    state = tmp_path / "llm-router"
    state.mkdir()
    script = value("ExecStartPre").removeprefix("/bin/sh -c '").removesuffix("'")
    script = script.replace("/opt/llm-router", str(ROOT)).replace("%S", str(tmp_path))

    subprocess.run(["/bin/sh", "-c", script], env={"PATH": "/usr/bin:/bin"}, check=True, timeout=10)
    first = (state / "routes.json").read_text()
    (state / "routes.json").write_text("mine")
    subprocess.run(["/bin/sh", "-c", script], env={"PATH": "/usr/bin:/bin"}, check=True, timeout=10)

    assert first == (ROOT / "routes.json").read_text()
    assert (state / "routes.json").read_text() == "mine"


class Started:
    """What ExecStart runs, with the environment systemd would give it and keys in files."""

    def __init__(self, folder: Path, upstream: Upstream):
        keys = {"test_api_key": KEY, "router_api_key": "k1", "router_admin_token": "k2"}
        for name, key in keys.items():
            (folder / name).write_text(key + "\n")
        self.routes = folder / "routes.json"
        self.routes.write_text(json.dumps(small_routes(upstream.url)))
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify"))
        self.notify.settimeout(20)
        self.log = folder / "log.txt"
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        files = {f"{name.upper()}_FILE": str(folder / name) for name in keys}
        env = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(folder / "notify"), **files,
               "ROUTER_ROUTES": str(self.routes), "ROUTER_BIND": f"127.0.0.1:{self.port}",
               "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
        command = [sys.executable, ROOT / "router.py", "serve"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        self.notify.close()
        return self.process.wait(20)


@pytest.fixture
def started(tmp_path, upstream):
    """It has said to systemd that it listens, and its worker has booted."""
    service = Started(tmp_path, upstream)
    assert b"READY=1" in service.notify.recv(1000)
    connected(service).close()
    wait_until(lambda: "event=start" in service.log.read_text(), 15)
    yield service
    service.stop()


def test_keys_from_files_open_the_doors_and_nothing_else_does(started, upstream):
    def ask(path: str, key: str, **more) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return requests.request(
            more.pop("method", "GET"), started.base + path, headers=headers, timeout=10, **more
        ).status_code

    chat = {"method": "POST", "json": HELLO}
    assert [ask(CHAT, key, **chat) for key in ("", "k1")] == [401, 200]
    assert [ask("/config", key) for key in ("", "k1", "k2")] == [401, 200, 200]
    resets = [ask("/circuit-breaker/reset-all", key, method="POST") for key in ("k1", "k2")]
    assert resets == [401, 200]
    assert upstream.requests[-1].headers["authorization"] == f"Bearer {KEY}"


def test_the_history_is_kept_where_the_service_may_write(started):
    headers = {"Authorization": "Bearer k1"}
    requests.post(started.base + CHAT, json=HELLO, headers=headers, timeout=10)

    found = requests.get(started.base + "/health", timeout=10).json()["history"]

    assert f"Environment=ROUTER_ROUTES=%S/{value('StateDirectory')}/routes.json" in SAID
    assert found == {"status": "ok"}
    assert oct((started.routes.parent / "usage.db").stat().st_mode & 0o777) == "0o600"


def test_the_signal_of_execreload_keeps_the_process_and_a_stop_ends_with_status_0(started):
    assert value("ExecReload") == "/bin/kill -HUP $MAINPID"
    statuses = []

    def has_asked_and_reloaded() -> bool:
        headers = {"Authorization": "Bearer k1"}
        answer = requests.post(started.base + CHAT, json=HELLO, headers=headers, timeout=10)
        statuses.append(answer.status_code)
        return "event=stop" in started.log.read_text()

    started.process.send_signal(signal.SIGHUP)
    wait_until(has_asked_and_reloaded, 15)

    assert set(statuses) == {200}
    assert started.process.poll() is None
    assert started.stop() == 0
