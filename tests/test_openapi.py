"""openapi.json against the service: every route, every status, every answer as it says."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from service import plain_environ
from upstream import error, plain

SPEC = json.loads((ROOT / "parts/openapi.json").read_text())
SCHEMAS = SPEC["components"]["schemas"]
SOURCES = ("router.py", "parts/access.py", "parts/table.py", "parts/cluster.py", "parts/views.py",
           "parts/history.py")  # fmt: skip
# gunicorn's refusals, our doors, another method, a bug: these can happen on any route.
EVERYWHERE = {"400", "403", "405", "414", "415", "417", "431", "500"}
OPERATIONS = [
    pytest.param(path, method, id=f"{method} {path}")
    for path, methods in SPEC["paths"].items()
    for method in methods
]

GUARDED = [
    case
    for case in OPERATIONS
    if "401" in SPEC["paths"][case.values[0]][case.values[1]]["responses"]
]

CONFIG = """
[generation]
deterministic = true
max-examples = 8

# What a schema cannot say: another version named in If-Match, a model under both of its names;
# Responses have a 400 for what is a 422 elsewhere.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", "401", "403", "404", "409", "429", "5xx", "400", "412", "422"]
"""


@functools.cache
def described() -> Any:
    """openapi.json as schemathesis reads it, which takes a second to load."""
    import schemathesis

    return schemathesis.openapi.from_path(str(ROOT / "parts/openapi.json"))


def references(part: Any) -> Iterator[str]:
    """Every $ref below `part`."""
    if isinstance(part, dict):
        yield from ([part["$ref"]] if "$ref" in part else [])
    for inner in part.values() if isinstance(part, dict) else part:
        if isinstance(inner, dict | list):
            yield from references(inner)


def resolve(reference: str) -> Any:
    found = SPEC
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def raised() -> list[tuple[int, str]]:
    """(status, kind) of every RouterError and Refused that the code makes with both in plain."""
    calls = (
        node
        for name in SOURCES
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Call) and len(node.args) >= 3 and isinstance(node.func, ast.Name)
    )
    made = (call.args[:2] for call in calls if call.func.id in ("RouterError", "Refused"))
    plain = ([a.value for a in args if isinstance(a, ast.Constant)] for args in made)
    return sorted({(pair[0], pair[1]) for pair in plain if len(pair) == 2})


def documented() -> set[str]:
    return {
        status
        for item in SPEC["paths"].values()
        for op in item.values()
        for status in op["responses"]
    }


def test_every_route_is_described_and_nothing_else(app):
    served = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD"}
    }

    assert served == {(path, method) for path, item in SPEC["paths"].items() for method in item}


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_parameter_of_a_path_is_described(path, method):
    given = SPEC["paths"][path][method].get("parameters", [])

    parameters = [resolve(p["$ref"]) if "$ref" in p else p for p in given]

    names = {p["name"] for p in parameters if p["in"] == "path"}
    assert names == set(re.findall(r"{(\w+)}", path))


def test_every_reference_leads_somewhere_and_every_component_is_used():
    used = set(references(SPEC))
    parts = {
        f"#/components/{kind}/{name}"
        for kind, named in SPEC["components"].items()
        for name in named
    }

    assert all(resolve(reference) is not None for reference in used)
    assert parts - used - {p for p in parts if "/securitySchemes/" in p} == set()


@pytest.mark.parametrize(("status", "kind"), raised())
def test_every_error_that_the_code_raises_is_documented(status, kind):
    assert kind in SCHEMAS["Error"]["properties"]["error"]["properties"]["type"]["enum"]
    # A 502 stands in the last event of a broken stream, never on a status line.
    assert str(status) in documented() or (status, kind) == (502, "upstream_error")


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_what_can_happen_anywhere_is_documented_everywhere(path, method):
    assert set(SPEC["paths"][path][method]["responses"]) >= {"200", *EVERYWHERE}


@pytest.mark.parametrize("name", ["CategoryChange", "MappingChange"])
def test_what_refuses_unknown_members_says_so(name):
    assert SCHEMAS[name]["additionalProperties"] is False


# --- states that no made-up request reaches -------------------------------------------------------


def fits(response: Any, path: str, method: str) -> bool:
    """True when status, content type, headers and body are as described; else AssertionError."""
    described()[path][method].validate_response(response)
    return True


@pytest.mark.parametrize(
    ("script", "status"),
    [(error(500), 500), (error(401, "bad key"), 500), (plain(200, b"<html>", "text/html"), 500),
     (error(429, Retry_After="60"), 429), (error(400, "bad parameter"), 400),
     (error(404, "nothing here"), 404), (error(413, "too long"), 413),
     (error(422, "bad parameter"), 422)],
)  # fmt: skip
def test_all_is_as_described_when_upstreams_fail(client, upstream, script, status):
    upstream.default = script

    answers = [client.chat(model="an/unknown-one") for _ in range(3)]

    assert answers[0].status_code == status
    assert all(fits(answer, "/v1/chat/completions", "POST") for answer in answers)
    assert fits(client.get("/metrics"), "/metrics", "GET")
    assert fits(client.get("/health"), "/health", "GET")
    assert fits(client.get("/health/ready"), "/health/ready", "GET")
    assert fits(client.post("/route", {"text": "hello"}), "/route", "POST")


def test_all_is_as_described_after_good_answers(client):
    assert fits(client.chat("hello"), "/v1/chat/completions", "POST")
    assert fits(client.chat("hello", stream=True), "/v1/chat/completions", "POST")
    assert fits(client.get("/metrics"), "/metrics", "GET")
    assert fits(client.get("/metrics?format=prometheus"), "/metrics", "GET")
    assert fits(client.get("/", headers={"Accept": "text/html"}), "/", "GET")


@pytest.mark.parametrize(("path", "method"), GUARDED)
def test_a_wanted_key_is_as_described(build, path, method):
    client = build(ROUTER_API_KEY="k" * 20, ROUTER_ADMIN_TOKEN="t" * 20)

    answer = client.open(method.upper(), path.replace("{name}", "one"))

    assert answer.status_code == 401
    assert fits(answer, path, method.upper())


def test_a_missing_key_is_as_described(build):
    client = build(TEST_API_KEY="")

    assert client.chat().status_code == 503
    assert fits(client.chat(), "/v1/chat/completions", "POST")
    assert fits(client.get("/health"), "/health", "GET")
    assert fits(client.get("/health/ready"), "/health/ready", "GET")


def test_a_bad_routes_file_is_as_described(client, routes):
    routes.write_text("{")
    change = {"name": "creative", "models": ["acme/one"]}

    answer = client.post("/config/category", change)

    assert answer.status_code == 409
    assert fits(answer, "/config/category", "POST")
    assert fits(client.get("/health"), "/health", "GET")


@pytest.mark.parametrize(("name", "status"), [("conversation", 422), ("code", 400), ("no", 404)])
def test_a_category_that_stays_is_as_described(client, name, status):
    answer = client.open("DELETE", f"/config/category/{name}")

    assert answer.status_code == status
    assert fits(answer, "/config/category/{name}", "DELETE")


# --- schemathesis: requests made from the description ------------------------------


def test_the_service_does_what_openapi_json_says(serve_once, tmp_path):
    """By a program of its own: in pytest each test process would make all requests up."""
    (tmp_path / "config.toml").write_text(CONFIG)
    service = serve_once()  # its routes.json is filled with categories

    run = subprocess.run(
        [Path(sys.executable).parent / "schemathesis", "--config-file", "config.toml", "run",
         "--phases", "examples,coverage,fuzzing", "--request-timeout", "10", "--warnings", "off",
         "--url", service.base, ROOT / "parts/openapi.json"],
        cwd=tmp_path, env=plain_environ(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip

    assert run.returncode == 0, run.stdout
    assert f"Tested: {len(OPERATIONS)}\n" in run.stdout
