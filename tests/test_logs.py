"""Logs: one line per event, nothing from outside begins a line of its own, no prompt, no key."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import KEY, LocalClient, Service, settings_for, small_routes
from helpers import answer_to, head_of
from upstream import DONE, error, plain, stream, whole

import router as module
from parts.logs import READER_S, EventFormatter, Stderr


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


@pytest.mark.parametrize("where", ["/dev/full", "no/such/folder", ".", "pipe"])
def test_a_log_of_rejections_that_cannot_be_written_keeps_no_permit(routes, capsys, where):
    folder = routes.parent
    os.mkfifo(folder / "pipe")  # which nobody reads
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


def fill(descriptor: int) -> None:
    """Write to a pipe until there is no room in it."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"-" * 4095 + b"\n")
    os.set_blocking(descriptor, True)


def read_lines(descriptor: int) -> list[str]:
    """All that is in a pipe, but what `fill` wrote."""
    os.set_blocking(descriptor, False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(descriptor, 1 << 20):
            data += more
    return [line for line in data.decode().splitlines() if not line.startswith("---")]


def test_a_log_that_nobody_reads_holds_no_thread(tmp_path, upstream):
    pipe = tmp_path / "log.txt"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    try:
        with Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="24") as service:
            fill(reader)
            with ThreadPoolExecutor(4) as clients:
                answers = list(clients.map(lambda _: service.chat().status_code, range(40)))
            health = service.get("/health").status_code
            read_lines(reader)
            service.chat()
        lines = read_lines(reader)
    finally:
        os.close(reader)
        pipe.unlink()

    assert answers == [200] * 40
    assert health == 200
    lost = [int(line.rpartition("=")[2]) for line in lines if "event=log_lines_lost" in line]
    told = [line for line in lines if "event=request" in line]
    assert (len(lost), sum(lost) + len(told)) == (1, 41)
    assert "event=stop" in lines[-1]


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        handler = Stderr(stream)
        handler.setFormatter(EventFormatter(False))
        yield reader, writer, handler


def record(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": "thing", "args": {"text": text}})


def test_a_reader_that_stopped_is_waited_for_once(pipe):
    reader, writer, handler = pipe
    fill(writer)

    began = time.monotonic()
    [handler.handle(record("lost")) for _ in range(50)]

    assert READER_S <= time.monotonic() - began < 2 * READER_S
    assert read_lines(reader) == []


def test_a_line_that_broke_off_is_ended_before_the_next(pipe):
    reader, writer, handler = pipe
    fill(writer)
    os.read(reader, 8192)

    handler.handle(record("a" * 20_000))
    lines = read_lines(reader)
    handler.handle(record("b" * 20_000))
    more = read_lines(reader)

    assert len(lines) == 1
    assert lines[0].endswith("aaa")
    assert more[0] == ""
    assert more[1].endswith("event=log_lines_lost lines=1")
    assert more[2].endswith("b" * 20_000)


def test_a_pipe_whose_reader_has_gone_is_no_reason_for_a_traceback(pipe, capsys):
    reader, _, handler = pipe
    with open(os.devnull) as nobody:
        os.dup2(nobody.fileno(), reader)

    handler.handle(record("nobody reads this"))

    assert capsys.readouterr().err == ""


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
