"""Demo mode: answers without a key, loudly marked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, free_port


@pytest.fixture
def demo(build):
    return build(ROUTER_DEMO="1")


def test_a_demo_answer_says_what_it_is_and_for_whom(demo):
    answer = demo.chat()

    assert answer.headers["X-Router-Demo"] == "1"
    assert "[demo]" in answer.json["choices"][0]["message"]["content"]
    assert "acme/one" in answer.json["choices"][0]["message"]["content"]


def test_a_demo_streams_too(demo):
    answer = demo.chat(stream=True)

    assert answer.headers["X-Router-Demo"] == "1"
    assert answer.data.count(b"data: ") > 10
    assert answer.data.endswith(b"data: [DONE]\n\n")


def test_health_says_demo(demo, client):
    assert demo.get("/health").json["demo"] is True
    assert client.get("/health").json["demo"] is False


@pytest.mark.parametrize(("key", "marked"), [("", True), ("a-key", False)])
def test_serve_goes_into_demo_mode_only_without_a_key(tmp_path, key, marked):
    port = free_port()
    env = {**os.environ, "ROUTER_BIND": f"127.0.0.1:{port}", "OPENROUTER_API_KEY": key}
    command = [sys.executable, "router.py", "serve", "--or-demo"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    lines = [process.stderr.readline() for _ in range(7)]
    process.terminate()
    process.communicate(timeout=20)

    assert any(f"http://127.0.0.1:{port}" in line for line in lines)
    assert any("DEMO" in line for line in lines) is marked
