"""What the speed bench compares: an upstream that answers at once, and the contestants.

Everything listens on 127.0.0.1, lives in a folder of its own below one temporary folder, and is
ended by its process id when the `Stage` closes. See bench/speed.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import requests
from load import small_body
from processes import LOADING, SERVING, Stage, free_port

HERE = Path(__file__).resolve().parent
KEY = "sk-bench-1234"
CHAIN = ["acme/one", "acme/two"]
SAID = "The quick brown fox jumps over the lazy dog while the upstream answers without delay. " * 3
CHOICE = {"index": 0, "message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 250, "completion_tokens": 60, "total_tokens": 310}
ANSWER = json.dumps({"id": "chatcmpl-bench", "object": "chat.completion", "created": 1795410824,
                     "model": "bench", "choices": [CHOICE], "usage": USAGE})  # fmt: skip
SAID_AS = {"type": "output_text", "text": SAID, "annotations": []}
ANSWERS = {  # the same words and counts in each format
    "/v1/chat/completions": ANSWER,
    "/v1/messages": json.dumps({
        "id": "msg_bench", "type": "message", "role": "assistant", "model": "bench",
        "content": [{"type": "text", "text": SAID}], "stop_reason": "end_turn",
        "usage": {"input_tokens": 20, "output_tokens": 60}}),
    "/v1/responses": json.dumps({
        "id": "resp_bench", "object": "response", "status": "completed", "model": "bench",
        "output": [{"type": "message", "role": "assistant", "content": [SAID_AS]}],
        "usage": {"input_tokens": 20, "output_tokens": 60, "total_tokens": 80}}),
}  # fmt: skip
NGINX_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
NGINX = """
{user}worker_processes 1;
daemon off;
pid nginx.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_max_body_size 32m;
    client_body_buffer_size 1m;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {site}
}}
"""
# `return` alone would answer before the body has come; the mirror waits for all of it.
ANSWERING = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        default_type application/json;
        location = /read {{ internal; return 204; }}
        {answers}
    }}
"""
PROXYING = """
    upstream up {{ server {upstream}; keepalive 64; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://up;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
"""
# Both read the body, because every contestant has to.
WSGI = """
def app(environ, start_response):
    environ["wsgi.input"].read()
    head = [("Content-Type", "application/json"), ("Content-Length", str(len(ANSWER)))]
    start_response("200 OK", head)
    return [ANSWER]
"""
FLASK = """
import flask

app = flask.Flask(__name__)

@app.post("/v1/chat/completions")
def answer():
    flask.request.get_data()
    return flask.Response(ANSWER, content_type="application/json")
"""
GTHREAD = """
workers, threads, worker_class, keepalive = 1, 64, "gthread", 75
worker_connections, control_socket_disable, loglevel = 1000, True, "warning"
worker_tmp_dir = "/dev/shm"
"""


@dataclass
class Contestant:
    """A program that answers chats: where and how to ask it, and the process to measure."""

    name: str
    port: int
    pid: int
    model: str = "bench"
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/v1/chat/completions"

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def all_headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", **self.headers}


def in_formats(who: Contestant) -> list[Contestant]:
    """The same program, asked in each format; chat goes by its own name."""
    paths = {path.rpartition("/")[2]: path for path in ANSWERS}
    return [replace(who, name=who.name if path == who.path else f"{who.name} {name}", path=path)
            for name, path in paths.items()]  # fmt: skip


def ready(stage: Stage, who: Contestant, seconds: float = 90) -> Contestant:
    """Wait until the contestant answers a chat, and see that it is the upstream's answer."""
    deadline, last = time.monotonic() + seconds, ""
    while time.monotonic() < deadline and stage.runs(who.pid):
        try:
            reply = requests.post(
                who.base + who.path, small_body(who.model), headers=who.all_headers, timeout=10
            )
            if reply.status_code == 200 and SAID[:40] in reply.text:
                return who
            last = f"{reply.status_code} {reply.text[:300]}"
        except requests.RequestException as e:
            last = str(e)
        time.sleep(0.05)
    log = "".join(p.read_text()[-2000:] for p in stage.root.glob(f"{who.name}-*/log.txt"))
    sys.exit(f"{who.name} did not answer: {last}\n{log}")


def upstream(stage: Stage, name: str = "direct") -> Contestant:
    """Answers every chat at once with the same bytes: nginx, or Python where there is none."""
    folder, port = stage.folder(name), free_port()
    if shutil.which("nginx", path=NGINX_PATH):
        answers = "".join(
            f"location {path} {{ mirror /read; try_files /none @answer{n}; }}\n"
            f"location @answer{n} {{ return 200 '{answer}'; }}\n"
            for n, (path, answer) in enumerate(ANSWERS.items())
        )
        site = ANSWERING.format(port=port, answers=answers)
        pid = start_nginx(stage, folder, site, LOADING)
    else:
        command = [sys.executable, HERE / "sse.py", "serve", "--port", str(port)]
        pid = stage.start(command, folder, LOADING)
    return ready(stage, Contestant(name, port, pid))


def start_nginx(stage: Stage, folder: Path, site: str, cpu: int) -> int:
    """nginx with this site; its pid."""
    user = "user root;\n" if os.geteuid() == 0 else ""  # the folder is closed to www-data
    (folder / "nginx.conf").write_text(NGINX.format(user=user, site=site))
    program = shutil.which("nginx", path=NGINX_PATH)
    assert program
    return stage.start([program, "-p", folder, "-c", "nginx.conf", "-e", "log.txt"], folder, cpu)


def nginx(stage: Stage, up: Contestant) -> Contestant | None:
    """nginx as a bare proxy with one worker."""
    if not shutil.which("nginx", path=NGINX_PATH):
        return left_out("nginx", "is not installed (sudo apt install nginx)")
    folder, port = stage.folder("nginx"), free_port()
    site = PROXYING.format(port=port, upstream=f"127.0.0.1:{up.port}")
    return ready(stage, Contestant("nginx", port, start_nginx(stage, folder, site, SERVING)))


def constant(stage: Stage, name: str = "constant") -> Contestant:
    """gunicorn's gthread worker with a constant answer; `flask`: the same through a Flask view."""
    folder, port = stage.folder(name), free_port()
    code = f"ANSWER = {ANSWER.encode()!r}\n" + (FLASK if name == "flask" else WSGI)
    (folder / "answering.py").write_text(code)
    (folder / "gunicorn.conf.py").write_text(f"bind = '127.0.0.1:{port}'\n" + GTHREAD)
    return ready(stage, Contestant(name, port, stage.start(gunicorn("answering:app"), folder)))


def gunicorn(app: str, conf: str = "gunicorn.conf.py") -> list[str]:
    """The command for an app; its settings are beside it, or where they are said to be."""
    return [sys.executable, "-m", "gunicorn", "-c", conf, app]


def router(
    stage: Stage, up: Contestant, checkout: Path, name: str = "router", wait: bool = True,
    routes: dict[str, Any] | None = None, conf: str = "gunicorn.conf.py", **env: str
) -> Contestant:  # fmt: skip
    """The router of a checkout, with one upstream and the shipped categories and keywords."""
    folder, port = stage.folder(name), free_port()
    table = routes or routes_for(up, checkout)
    (folder / "routes.json").write_text(json.dumps(table))
    settings = {
        "ROUTER_ROUTES": str(folder / "routes.json"),
        "ROUTER_BIND": f"127.0.0.1:{port}",
        "ROUTER_THREADS": "64",
        "TEST_API_KEY": KEY,
        **env,
    }
    pid = stage.start(gunicorn("wsgi:app", conf), folder, cwd=checkout, **settings)
    who = Contestant(name, port, pid, model="router")
    return ready(stage, who) if wait else who


def routes_for(up: Contestant, checkout: Path) -> dict[str, Any]:
    """The shipped routes.json with one local upstream and keywords alone."""
    shipped = json.loads((checkout / "routes.json").read_text())
    categories = shipped["categories"].items()
    local = {"base_url": up.base + "/v1", "api_key_env": "TEST_API_KEY"}
    if (checkout / "parts/dialects.py").exists():  # older ones refuse the key
        local["speaks"] = ["chat", "messages", "responses"]
    return {
        **{key: shipped[key] for key in ("default_category", "circuit_breaker", "timeouts_sec")},
        "routing_mode": "keywords",
        "upstreams": {"local": local},
        "models": {id_: {"cost": {"input": 1.0, "output": 2.0}} for id_ in CHAIN},
        "categories": {name: {**category, "models": CHAIN} for name, category in categories},
    }


def litellm(stage: Stage, up: Contestant) -> Contestant | None:
    """LiteLLM's proxy with one worker and one model."""
    program = os.environ.get("BENCH_LITELLM", "")
    if not Path(program).is_file():
        return left_out("litellm", "BENCH_LITELLM names no file")
    folder, port = stage.folder("litellm"), free_port()
    params = {"model": "openai/bench", "api_base": up.base + "/v1", "api_key": KEY}
    config = {"model_list": [{"model_name": "bench", "litellm_params": params}],
              "litellm_settings": {"telemetry": False}}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "DISABLE_ADMIN_UI": "True"}
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    command = [program, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    pid = stage.start(
        [*command, "--num_workers", "1"], folder, LITELLM_MASTER_KEY=KEY, **quiet, **offline
    )
    headers = {"Authorization": f"Bearer {KEY}"}  # it does not start without a key
    return ready(stage, Contestant("litellm", port, pid, headers=headers))


def portkey(stage: Stage, up: Contestant) -> Contestant | None:
    """Portkey's gateway, told by headers where the upstream is."""
    script = os.environ.get("BENCH_PORTKEY", "")
    if not Path(script).is_file() or not shutil.which("node"):
        return left_out("portkey", "BENCH_PORTKEY names no file, or there is no node")
    folder, port = stage.folder("portkey"), free_port()
    headers = {
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": up.base + "/v1",
        "Authorization": f"Bearer {KEY}",
    }
    trusted = {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    pid = stage.start(["node", script, f"--port={port}", "--headless"], folder, **trusted)
    return ready(stage, Contestant("portkey", port, pid, headers=headers))


def left_out(name: str, why: str) -> None:
    """Say which row will be missing."""
    print(f"left out: {name}, {why}")
