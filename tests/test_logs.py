"""Logs: one line per event, nothing from outside begins a line of its own, no prompt, no key."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import pytest
from conftest import KEY, LocalClient, Service, settings_for, small_routes
from helpers import answer_to, head_of
from upstream import DONE, error, plain, stream, whole

import router as module
from parts.logs import EventFormatter


def line_for(fields: dict, as_json: bool = False) -> str:
    record = logging.LogRecord("llm_router", logging.INFO, "", 0, "thing", (fields,), None)
    return EventFormatter(as_json).format(record)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "value", ["a\nlevel=error", "a\r\nb", "\x1b[31m", "\u2028x", 'q"uote', "é"]
)
def test_a_value_cannot_begin_a_line_of_its_own(value, as_json):
    line = line_for({"reason": value}, as_json)

    assert line.isascii()
    assert line.isprintable()


def test_logfmt_leaves_plain_values_as_they_are():
    line = line_for({"a": "x/y", "b": 1.5, "c": True, "d": None, "e": ""})

    assert line.endswith("event=thing a=x/y b=1.5 c=true")


def test_json_has_the_same_fields():
    assert json.loads(line_for({"a": "x", "n": 1}, True))["event"] == "thing"
    assert json.loads(line_for({"a": "x", "n": 1}, True))["n"] == 1


@pytest.mark.parametrize(("log_format", "first"), [("logfmt", "time="), ("json", "{")])
def test_each_request_is_one_line(build, capsys, log_format, first):
    client = build(ROUTER_LOG_FORMAT=log_format)

    client.chat("hello MARKER-PROMPT")

    lines = [line for line in capsys.readouterr().err.splitlines() if "latency_ms" in line]
    assert len(lines) == 1
    assert lines[0].startswith(first)
    assert "acme/one" in lines[0]
    assert "MARKER-PROMPT" not in lines[0]


def test_an_upstreams_echo_of_key_and_prompt_stays_out_of_the_log(client, upstream, capsys):
    upstream.default = error(400, f"bad key {KEY} for MARKER-PROMPT")

    answer = client.chat("hello MARKER-PROMPT")

    assert KEY not in answer.text
    assert KEY not in capsys.readouterr().err


BAD_BODY = {"messages": "no list"}


@pytest.mark.parametrize("where", ["/dev/full", "no/such/folder", "."])
def test_a_log_of_rejections_that_cannot_be_written_keeps_no_permit(routes, capsys, where):
    folder = routes.parent
    more = {"ROUTER_THREADS": "10", "ROUTER_VALIDATION_LOG": str(folder / where)}
    client = LocalClient(module.create_app(settings_for(routes, **more)))

    bad = [client.post("/v1/chat/completions", BAD_BODY).status_code for _ in range(4)]

    assert bad == [422] * 4
    assert client.chat().status_code == 200
    assert client.get("/metrics").json["in_flight"] == 0
    assert capsys.readouterr().err.count("validation_log_unwritable") == 1


def test_a_full_disk_below_stderr_is_no_reason_for_a_traceback(routes, capsys, monkeypatch):
    client = LocalClient(module.create_app(settings_for(routes)))
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        monkeypatch.setattr(logging.getLogger("llm_router").handlers[0], "stream", full)

        assert client.chat().status_code == 200

    assert "Logging error" not in capsys.readouterr().err


def test_without_room_for_a_log_every_request_is_answered(tmp_path, upstream):
    full = {"GUNICORN_CMD_ARGS": "--capture-output --error-logfile /dev/full"}
    routes = small_routes(upstream.url)
    service = Service(tmp_path, routes, ROUTER_VALIDATION_LOG="/dev/full", **full)
    try:
        bad = [service.post("/v1/chat/completions", BAD_BODY).status_code for _ in range(70)]

        assert bad == [422] * 70
        assert answer_to(service, b"NONSENSE\r\n\r\n").status == 400
        assert service.chat().status_code == 200
        assert service.chat(stream=True).content.endswith(DONE)
        assert service.get("/metrics").json()["in_flight"] == 0
    finally:
        service.stop()


def test_lines_of_others_name_their_source_and_process(client, capsys):
    client.chat()
    others = logging.Logger("others")
    others.addHandler(logging.StreamHandler())
    others.handlers[0].setFormatter(logging.Formatter("[%(process)d] %(filename)s %(message)s"))

    others.warning("hello")

    assert f"[{os.getpid()}] {Path(__file__).name} hello\n" in capsys.readouterr().err


def test_no_prompt_and_no_answer_is_in_anything_a_service_wrote(service, upstream):
    upstream.scripts["acme/one"] = [
        whole("MARKER-ANSWER"), stream(["MARKER-ANSWER"]), error(400, "MARKER-PROMPT is bad"),
        plain(200, b"<html>MARKER-ANSWER"),
    ]  # fmt: skip
    upstream.scripts["acme/two"] = error(500, "MARKER-ANSWER")

    service.chat("MARKER-PROMPT")
    service.chat("MARKER-PROMPT", stream=True)
    service.chat("MARKER-PROMPT")
    service.chat("MARKER-PROMPT")
    service.post("/v1/chat/completions", {"messages": "MARKER-PROMPT", "stream": "MARKER-PROMPT"})
    answer_to(service, head_of("POST", "/MARKER-PROMPT"))

    figures = service.get("/metrics").text + service.get("/metrics?format=prometheus").text
    written = service.log.read_text() + figures
    assert "event=request" in written
    assert "MARKER" not in written
