"""A real gunicorn with the project's own configuration, and a small routes file for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
KEY = "test-key-that-must-never-show"
# Limits so long that nothing but a client can have ended what ends.
PATIENT = {"connect": 2, "first_token": 60, "idle": 60, "answer": 60, "total": 90}


def small_routes(url: str, **changes: Any) -> dict[str, Any]:
    """A routes file with two models per chain and limits short enough for tests."""
    own = {"models": ["acme/one", "acme/two"], "vocabulary": False}  # these words and no others
    routes: dict[str, Any] = {
        "routing_mode": "keywords",
        "default_category": "conversation",
        "circuit_breaker": {
            "failure_threshold": 3,
            "recovery_timeout_sec": 300,
            "first_retry_sec": 5,
        },
        "timeouts_sec": {"connect": 2, "first_token": 1, "idle": 1, "answer": 1, "total": 8},
        "upstreams": {"local": {"base_url": url, "api_key_env": "TEST_API_KEY"}},
        "models": {
            "acme/one": {"cost": {"input": 1.0, "output": 2.0, "cached_input": 0.5}},
            "acme/two": {"cost": {"input": 10.0, "output": 20.0}},
        },
        "categories": {
            "tools": {**own, "keywords": ["turn on*", "remind me"]},
            "code": {**own, "keywords": ["python", "refactor*"]},
            "reasoning": {**own, "keywords": ["prove", "why"]},
            "conversation": {**own, "keywords": ["hello"]},
        },
    }
    return {**routes, **changes}


def plain_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without settings or keys of the person who runs the tests."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("ROUTER_") and not name.endswith("_API_KEY")
    }


class Service:
    """A real gunicorn with the project's own gunicorn.conf.py, on a port of the system's choice."""

    def __init__(self, folder: Path, routes: dict[str, Any] | None, **env: str):
        self.folder = folder
        self.routes = folder / "routes.json"
        if routes is not None:
            self.routes.write_text(json.dumps(routes, indent=2))
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log.txt"
        bind = f"127.0.0.1:{self.port}"
        own = {"ROUTER_ROUTES": str(self.routes), "ROUTER_BIND": bind, "TEST_API_KEY": KEY}
        self.env = {**plain_environ(), **own, **env}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "wsgi:app"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                requests.get(self.base + "/health", timeout=2)
                return
            except (requests.ConnectionError, requests.Timeout):
                time.sleep(0.02)
        raise AssertionError(f"did not start: {self.log.read_text()}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def post(self, path: str, body: Any = None, **kwargs: Any) -> requests.Response:
        return requests.post(self.base + path, json=body, timeout=30, **kwargs)

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return requests.get(self.base + path, timeout=30, **kwargs)

    def chat(self, text: str = "hello", **more: Any) -> requests.Response:
        headers = more.pop("headers", None)
        body = {"model": "router", "messages": [{"role": "user", "content": text}], **more}
        return self.post(
            "/v1/chat/completions", body, headers=headers, stream=bool(more.get("stream"))
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
