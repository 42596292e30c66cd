"""README is tested: it names what there is, and its commands work in demo mode."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess

import pytest
from conftest import ROOT, Service

import router as module
from parts import settings

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    routes = json.loads((ROOT / "routes.json").read_text())
    service = Service(folder, {**routes, "routing_mode": "keywords"}, ROUTER_DEMO="1")
    yield service
    service.stop()


def curl_lines() -> list[str]:
    return re.findall(r"^ *(curl .*)$", README, re.M)


@pytest.mark.debian("curl")
@pytest.mark.parametrize("line", curl_lines())
def test_each_curl_of_the_readme_works_in_demo_mode(demo, line):
    command = shlex.split(line.replace("127.0.0.1:3456", f"127.0.0.1:{demo.port}"))

    done = subprocess.run([*command, "-s", "--fail"], capture_output=True, check=True, timeout=20)

    assert json.loads(done.stdout)


def test_the_printed_answer_is_the_demo_answer(demo):
    printed = json.loads(re.search(r'```json\n(\{"id": "gen-demo".*?)\n```', README, re.S)[1])

    answer = demo.chat("Write a Python function that reverses a string").json()

    assert answer["choices"] == printed["choices"]
    assert answer["model"] == printed["model"]


def test_each_route_is_named(demo):
    app = module.create_app(module.Settings(routes=demo.routes))

    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:path:)?\w+>", "<", rule.rule).split("<")[0].rstrip("/") or "/"
        assert path in README, rule.rule


def test_each_setting_is_named():
    names = {name for name in settings.NAMES if name.removesuffix("_FILE") == name}

    assert len(names) >= len(dataclasses.fields(module.Settings)) - 2
    assert {name for name in names if f"`{name}`" not in README} == set()


def test_each_make_target_is_named():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)

    assert [name for name in targets if f"make {name}" not in README] == []


def test_each_error_status_and_outcome_header_is_named():
    source = (ROOT / "router.py").read_text() + (ROOT / "parts/access.py").read_text()
    statuses = set(re.findall(r"RouterError\(\s*(\d{3})", source))
    headers = set(re.findall(r'"(X-Router-[\w-]+)"', (ROOT / "router.py").read_text()))

    assert {s for s in statuses - {"499", "502"} if s not in README} == set()
    assert {h for h in headers if h not in README} == set()
