"""A stranger's page in a real Chromium tries to spend money and to change this machine's router."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Service, small_routes
from upstream import Upstream, error

pytestmark = pytest.mark.debian("chromium")

# Each returns a promise: what a page can send without asking first, and what it must ask for.
ATTACKS = {
    "json": "fetch(R + '/v1/chat/completions', {method: 'POST', body: CHAT, headers: JSON_TYPE})",
    "json to the short path":
        "fetch(R + '/chat/completions', {method: 'POST', body: CHAT, headers: JSON_TYPE})",
    "text, unasked":
        "fetch(R + '/v1/chat/completions', {method: 'POST', mode: 'no-cors', body: CHAT})",
    "no type at all": "fetch(R + '/v1/chat/completions', {method: 'POST', mode: 'no-cors', "
                      "body: new Blob([CHAT])})",
    "beacon": "navigator.sendBeacon(R + '/v1/chat/completions', CHAT)",
    "beacon of JSON": "navigator.sendBeacon(R + '/v1/chat/completions', "
                      "new Blob([CHAT], {type: 'application/json'}))",
    "with cookies": "fetch(R + '/v1/chat/completions', {method: 'POST', body: CHAT, "
                    "headers: JSON_TYPE, credentials: 'include'})",
    "reset": "fetch(R + '/circuit-breaker/reset-all', {method: 'POST', mode: 'no-cors'})",
    "reset one": "fetch(R + '/circuit-breaker/reset/acme/one', {method: 'POST'})",
    "category": "fetch(R + '/config/category', {method: 'POST', mode: 'no-cors', body: CATEGORY})",
    "category as JSON":
        "fetch(R + '/config/category', {method: 'POST', body: CATEGORY, headers: JSON_TYPE})",
    "delete": "fetch(R + '/config/category/mine', {method: 'DELETE'})",
    "dry run": "fetch(R + '/route', {method: 'POST', body: CHAT, headers: JSON_TYPE})",
    "read the configuration": "fetch(R + '/config').then(r => r.text()).then(seen)",
    "read the figures": "fetch(R + '/metrics').then(r => r.text()).then(seen)",
    "read the health": "fetch(R + '/health').then(r => r.text()).then(seen)",
    "form": "submit('/v1/chat/completions', CHAT)",
    "form that resets": "submit('/circuit-breaker/reset-all', '')",
    "form from a box without an origin": "boxed('/v1/chat/completions')",
    "frame of the page": "frame('/')",
}  # fmt: skip
PAGE = """<!doctype html><title>a stranger's page</title><body><script>
const R = ROUTER, JSON_TYPE = {'Content-Type': 'application/json'};
const CHAT = JSON.stringify({model: 'router', messages: [{role: 'user', content: 'hello'}]});
const CATEGORY = JSON.stringify({name: 'evil', models: ['acme/one']});
const seen = text => { window.stolen = (window.stolen || '') + text; };
const wait = (element, start) => new Promise(done => {
  element.onload = element.onerror = done; document.body.append(element); start(); });
const frame = path => { const f = document.createElement('iframe');
  return wait(f, () => { f.src = R + path; }); };
const boxed = path => { const f = document.createElement('iframe');
  f.sandbox = 'allow-scripts allow-forms';
  return wait(f, () => { f.srcdoc = `<script>fetch('${R}${path}',
    {method: 'POST', mode: 'no-cors', body: '${CHAT}'})</` + 'script>'; }); };
const submit = (path, body) => { const f = document.createElement('iframe'); f.name = 'f' + path;
  const form = document.createElement('form'), field = document.createElement('input');
  const [name, value] = body ? [body.slice(0, -1) + ',"x":"', '"}'] : ['a', 'b'];
  Object.assign(form, {method: 'POST', action: R + path, enctype: 'text/plain', target: f.name});
  Object.assign(field, {name, value}); form.append(field); document.body.append(form);
  return wait(f, () => form.submit()); };
window.attack = code => Promise.resolve(eval(code)).then(r => 'sent', e => 'refused: ' + e);
</script>"""


class Stranger(http.server.BaseHTTPRequestHandler):
    """Serves the page; `server.router` is whom it attacks."""

    def do_GET(self) -> None:
        page = PAGE.replace("ROUTER", json.dumps(self.server.router)).encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def victim(
    tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream
) -> Iterator[Service]:
    """A router as most people run it: at home, without keys of its own."""
    routes = small_routes(shared_upstream.url)
    routes["categories"]["mine"] = {"models": ["acme/two"]}
    service = Service(Path(tmp_path_factory.mktemp("victim")), routes)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def stranger(victim: Service) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    server.router = victim.base  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def wounded(victim: Service, upstream: Upstream) -> Service:
    """With a circuit that is open, and an upstream that has not been asked since."""
    victim.post("/circuit-breaker/reset-all")
    upstream.scripts["acme/one"] = error(503)
    for _ in range(3):
        victim.chat(model="acme/one")
    assert open_circuits(victim) == ["acme/one"]
    upstream.reset()
    return victim


def open_circuits(service: Service) -> list[str]:
    return list(service.get("/metrics").json()["circuit_breaker"]["open_circuits"])


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "evil.test"])
def test_a_page_of_another_origin_can_do_nothing(
    chromium: Any, wounded: Service, stranger: int, upstream: Upstream, name: str
) -> None:
    routes = wounded.routes.read_bytes()
    doors = wounded.get("/metrics").json()["requests"]["rejected"]
    chromium.get(f"http://{name}:{stranger}/")

    for code in ATTACKS.values():
        chromium.execute_async_script("attack(arguments[0]).then(arguments[1])", code)

    figures = wounded.get("/metrics").json()
    assert figures["requests"]["rejected"] >= doors + 4  # they did arrive, and were turned away
    assert upstream.requests == []
    assert open_circuits(wounded) == ["acme/one"]
    assert wounded.routes.read_bytes() == routes
    assert chromium.execute_script("return window.stolen") is None
    chromium.get("about:blank")


def test_a_stranger_s_name_that_points_here_is_turned_away(chromium: Any, wounded: Service) -> None:
    """DNS rebinding: then the page and the router are of one origin."""
    chromium.get(f"http://evil.test:{wounded.port}/")

    assert "host_not_allowed" in chromium.page_source
    script = "fetch(arguments[0], {method: 'POST'}).then(r => arguments[1](r.status))"
    assert chromium.execute_async_script(script, "/circuit-breaker/reset-all") == 403
    assert open_circuits(wounded) == ["acme/one"]
    chromium.get("about:blank")


def test_the_router_s_own_page_can_do_all_of_it(
    chromium: Any, wounded: Service, upstream: Upstream
) -> None:
    """What the strangers' attempts would have done had they been let in."""
    chromium.get(f"{wounded.base}/")
    chat = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}
    script = """const [path, body, done] = arguments;
        fetch(path, {method: 'POST', body: body && JSON.stringify(body),
                     headers: body ? {'Content-Type': 'application/json'} : {}})
            .then(r => done(r.status))"""

    statuses = [
        chromium.execute_async_script(script, path, body)
        for path, body in [("/v1/chat/completions", chat), ("/circuit-breaker/reset-all", None)]
    ]

    assert statuses == [200, 200]
    assert len(upstream.requests) == 1
    assert open_circuits(wounded) == []
    chromium.get("about:blank")
