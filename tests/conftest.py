"""Fixtures: a scripted upstream, a routes file, a Flask client, one real gunicorn."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from service import KEY, ROOT, Service, free_port, small_routes
from upstream import Upstream
from werkzeug.routing import Rule

import router as module
from parts.logs import EventFormatter

hypothesis.settings.register_profile(
    "same every time", derandomize=True, database=None, deadline=None
)
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


@pytest.fixture(scope="session", autouse=True)
def urls_are_compiled_once() -> Iterator[None]:
    """For the 2,500 apps of a run: Werkzeug does it for each, in half the time that one takes."""
    compile_url, known = Rule._compile_builder, {}

    def once(rule: Rule, append_unknown: bool = True) -> Any:
        key = rule.rule, append_unknown
        if key not in known:
            known[key] = compile_url(rule, append_unknown)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rule, "_compile_builder", once)
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the router logs, as it is written."""
    log, wording, found = logging.getLogger("llm_router"), EventFormatter(False), []

    def note(record: logging.LogRecord) -> bool:
        found.append(wording.format(record))
        return True

    caplog.set_level("INFO", "llm_router")
    log.addFilter(note)
    yield found
    log.removeFilter(note)


# --- upstreams, and apps in this process ---------------------------------------------------------


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
def build(routes: Path, upstream: Upstream) -> Callable[..., LocalClient]:
    """Makes clients: names in capitals are settings, others change the small routes file."""

    def made(clock: Callable[[], float] = time.monotonic, **changes: Any) -> LocalClient:
        env, members = in_capitals(changes)
        if members:
            routes.write_text(json.dumps(small_routes(upstream.url, **members)))
        return LocalClient(module.create_app(settings_for(routes, **env), clock=clock))

    return made


def in_capitals(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is named in capitals, and the rest."""
    env = {name: value for name, value in given.items() if name.isupper()}
    return env, {name: value for name, value in given.items() if name not in env}


@pytest.fixture
def client(build: Callable[..., LocalClient]) -> LocalClient:
    return build()


@pytest.fixture
def app(client: LocalClient) -> Any:
    return client.app


@pytest.fixture
def shipped(build: Callable[..., LocalClient], upstream: Upstream) -> LocalClient:
    """The project's own routes.json, with a local upstream and keywords only."""
    raw = json.loads((ROOT / "routes.json").read_text())
    local = {"local": {"base_url": upstream.url, "api_key_env": "TEST_API_KEY"}}
    return build(**{**raw, "routing_mode": "keywords", "upstreams": local})


class LocalClient:
    """Flask's test client; answers are read to their end, as a server would."""

    def __init__(self, app: Any):
        self.app = app
        self.router: module.Router = app.extensions["router"]
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


# --- services ------------------------------------------------------------------------------------


@contextlib.contextmanager
def services(mktemp: Callable[[str], Path], upstream: Upstream) -> Iterator[Callable[..., Service]]:
    """Starts services as `build` makes clients, and stops them."""
    with contextlib.ExitStack() as at_end:

        def start(**changes: Any) -> Service:
            env, members = in_capitals(changes)
            routes = small_routes(upstream.url, **members)
            return at_end.enter_context(Service(mktemp("service"), routes, **env))

        yield start


@pytest.fixture(scope="module")
def serve(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Service]]:
    """Starts services for all tests of a file."""
    with services(tmp_path_factory.mktemp, shared_upstream) as start:
        yield start


@pytest.fixture
def serve_once(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Service]]:
    """Starts services for one test."""
    with services(tmp_path_factory.mktemp, upstream) as start:
        yield start


@pytest.fixture(scope="session")
def shared_service(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    with services(tmp_path_factory.mktemp, shared_upstream) as start:
        yield start(ROUTER_THREADS="64")


@pytest.fixture
def service(shared_service: Service, upstream: Upstream) -> Service:
    return calm(shared_service)


def calm(service: Service) -> Service:
    """A service that several tests share, with no strikes left of the one before."""
    service.post("/circuit-breaker/reset-all")
    return service


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
