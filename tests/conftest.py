"""Fixtures: a scripted upstream, a routes file, a Flask client, one real gunicorn."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from service import KEY, ROOT, Service, free_port, small_routes
from upstream import Upstream

import router as module

hypothesis.settings.register_profile("same every time", derandomize=True, database=None)
hypothesis.settings.load_profile("same every time")

__all__ = ["KEY", "ROOT", "Service", "free_port", "small_routes"]  # for the test files
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --disable-dev-shm-usage --window-size=1200,1600"""
NAMES = "--host-resolver-rules=MAP *.test 127.0.0.1"  # as if a stranger's name pointed here
PROGRAMS = {
    "nginx": "nginx",
    "redis": "redis-server",
    "chromium": "chromium",
    "promtool": "promtool",
    "systemd": "systemd-analyze",
    "curl": "curl",
    "wrk": "wrk",
    "sed": "sed",
}


# Ordinary users of Debian do not have it on their PATH; CI names an empty folder, to hide programs.
SBIN = os.environ.get("TESTS_SBIN", "/usr/sbin:/sbin")
os.environ["PATH"] = f"{os.environ['PATH']}:{SBIN}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose Debian program is not installed."""
    kept, left = [], []
    for item in items:
        needs = [mark.args[0] for mark in item.iter_markers("debian")]
        (left if any(not shutil.which(PROGRAMS[name]) for name in needs) else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line what was not installed; the processes that run the tests cannot."""
    missing = sorted(name for name, program in PROGRAMS.items() if not shutil.which(program))
    if missing:
        terminalreporter.write_line(f"tests deselected, not installed: {', '.join(missing)}")


class Clock:
    """A monotonic clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def __iadd__(self, seconds: float) -> Clock:
        self.now += seconds
        return self


@pytest.fixture(scope="session", autouse=True)
def nothing_leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the whole run: no log of any service holds the upstream's key or a marked prompt."""
    yield
    base = tmp_path_factory.getbasetemp()
    logs = [*base.rglob("log.txt"), *base.rglob("validation_errors.log*")]
    marks = (KEY, "MARKER-PROMPT", "MARKER-ANSWER")
    assert [str(log) for log in logs for mark in marks if mark in log.read_text()] == []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    shared_upstream.reset()
    return shared_upstream


@pytest.fixture
def routes(tmp_path: Path, upstream: Upstream) -> Path:
    path = tmp_path / "routes.json"
    path.write_text(json.dumps(small_routes(upstream.url)))
    return path


def settings_for(path: Path, **more: str) -> module.Settings:
    return module.Settings.from_env({"ROUTER_ROUTES": str(path), "TEST_API_KEY": KEY, **more})


@pytest.fixture
def app(routes: Path) -> Any:
    return module.create_app(settings_for(routes))


@pytest.fixture
def client(app: Any) -> Any:
    return LocalClient(app)


class LocalClient:
    """Flask's test client; answers are read to their end, as a server would."""

    def __init__(self, app: Any):
        self.app = app
        self.flask = app.test_client()

    def open(self, method: str, path: str, **kwargs: Any) -> Any:
        return self.flask.open(path, method=method, buffered=True, **kwargs)

    def get(self, path: str, **kwargs: Any) -> Any:
        return self.open("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        return self.open("POST", path, **({} if body is None else {"json": body}), **kwargs)

    def chat(self, text: str = "hello", **more: Any) -> Any:
        headers = more.pop("headers", None)
        body = {"model": "router", "messages": [{"role": "user", "content": text}], **more}
        return self.post("/v1/chat/completions", body, headers=headers)


@pytest.fixture(scope="session")
def shared_service(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    service = Service(folder, small_routes(shared_upstream.url), ROUTER_THREADS="64")
    yield service
    service.stop()


@pytest.fixture
def service(shared_service: Service, upstream: Upstream) -> Service:
    shared_service.post("/circuit-breaker/reset-all")
    return shared_service


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in [*FLAGS.split(), NAMES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    driver.set_script_timeout(10)
    yield driver
    driver.quit()
