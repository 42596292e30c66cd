"""`check --live`: asks each upstream for its models and formats, Ollama for its own; it is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests

from parts.addresses import is_loopback
from parts.errors import hint
from parts.exchange import what_failed
from parts.jsontext import parse_loosely
from parts.settings import Settings, ca_bundle
from parts.table import Table, Upstream

ASK_S = (5, 15)  # to connect, and to answer
MOST = 16 << 20  # bytes of a list of models; OpenRouter's has 600 KB
Told = tuple[int, Any]  # status, and the JSON that came with it


class Finding(NamedTuple):
    """One row: what was asked about, in one word and in a sentence how it is."""

    what: str
    state: str
    says: str
    is_fine: bool


def ask_all(settings: Settings, table: Table) -> list[Finding]:
    """A row for each upstream, each unknown model of a chain, and Ollama."""
    with requests.Session() as session:
        session.trust_env = False  # .netrc would replace a key; proxies are set one by one
        session.verify = ca_bundle(settings.environ) or True
        found = [
            row for u in table.upstreams.values() for row in _upstream(session, settings, table, u)
        ]
        asked = table.mode != "keywords" and not table.classifier
        return found + (list(_ollama(session, table)) if asked else [])


def _get(session: requests.Session, url: str, key: str = "", method: str = "GET") -> Told:
    """Status and JSON (None: no JSON) of a GET, or of a POST of {}; requests' exceptions."""
    host = urlsplit(url).hostname or ""
    proxies = {} if is_loopback(host) else requests.utils.get_environ_proxies(url)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with session.request(method, url, headers=headers, timeout=ASK_S, proxies=proxies,
                         json={} if method == "POST" else None,
                         allow_redirects=False, stream=True) as reply:  # fmt: skip
        data = reply.raw.read(MOST, decode_content=True)
        return reply.status_code, parse_loosely(data)


def _upstream(session: requests.Session, settings: Settings, table: Table,
              upstream: Upstream) -> Iterator[Finding]:  # fmt: skip
    """Whether its base_url is right, its key good, and the models of the chains known to it."""
    key = settings.secret(upstream.api_key_env) if upstream.api_key_env else ""
    if upstream.api_key_env and not key:
        yield Finding(upstream.name, "no key", f"set {upstream.api_key_env}", False)
        return
    url = f"{upstream.base_url}/models"
    try:
        status, body = _get(session, url, key)
    except requests.RequestException as e:
        where = urlsplit(url).netloc
        yield Finding(
            upstream.name, "away", f"could not be reached: {what_failed(e, where)}", False
        )
        return
    trouble = _trouble(upstream, url, status, body)
    if trouble:
        yield trouble
        return
    known = sorted({str(m.get("id")) for m in _listed(body) if isinstance(m, dict)})
    wanted = [
        m for m in table.models.values() if m.upstream == upstream and m.id in table.chain_ids
    ]
    money = _money(session, upstream, key)
    says = f"{len(known)} models at {upstream.base_url}"
    yield money or Finding(upstream.name, "fine", says, True)
    yield from _formats(session, upstream, key)
    for model in wanted:
        if model.called not in known and f"{model.called}:latest" not in known:
            text = f"{upstream.name} does not list {model.called}{hint(model.called, known)}"
            yield Finding(model.id, "unknown", text, False)


# In each format a request that nobody can answer, so that it costs nothing: what is told of it
# tells whether the path is known.
ENDPOINTS = {"messages": "/messages", "responses": "/responses", "embeddings": "/embeddings"}
UNKNOWN_PATH = (404, 405, 410, 501)


def _formats(session: requests.Session, upstream: Upstream, key: str) -> Iterator[Finding]:
    """The formats that routes.json and the upstream itself do not agree on."""
    for name, path in ENDPOINTS.items():
        try:
            status, _ = _get(session, upstream.base_url + path, key, method="POST")
        except requests.RequestException:
            continue
        speaks, listed = status not in UNKNOWN_PATH and status < 500, name in upstream.speaks
        what = f"{upstream.name} {name}"
        if listed and status in UNKNOWN_PATH:
            text = f"{upstream.base_url}{path} is not there ({status}): take {name} out of `speaks`"
            yield Finding(what, "unspoken", text, False)
        elif speaks and not listed:
            text = f"{upstream.base_url}{path} is there: `speaks` may name {name}"
            yield Finding(what, "possible", text, True)


def _trouble(upstream: Upstream, url: str, status: int, body: Any) -> Finding | None:
    """What a list of models that did not come means."""
    if status in (401, 403):
        key = upstream.api_key_env
        text = f"{key} is refused ({status})" if key else f"wants a key ({status}): set api_key_env"
        return Finding(upstream.name, "key", text, False)
    if status == 402:
        return Finding(upstream.name, "money", "wants payment (402): no credit is left", False)
    if status == 404 or (status == 200 and not _listed(body)):
        said = "is not found (404)" if status == 404 else "holds no list of models"
        return Finding(upstream.name, "base_url", f"{url} {said}: is base_url right?", False)
    if status != 200:
        return Finding(upstream.name, "failing", f"{url} answers with status {status}", False)
    return None


def _listed(body: Any) -> list[Any]:
    """The entries of OpenAI's list of models, or of what servers send in its place."""
    listed = body.get("data", body.get("models")) if isinstance(body, dict) else body
    return listed if isinstance(listed, list) else []


def _money(session: requests.Session, upstream: Upstream, key: str) -> Finding | None:
    """OpenRouter lists its models for everybody; /key tells of the key and what is left."""
    if not key:
        return None
    try:
        status, body = _get(session, f"{upstream.base_url}/key", key)
    except requests.RequestException:
        return None
    if status in (401, 403):
        return Finding(upstream.name, "key", f"{upstream.api_key_env} is refused ({status})", False)
    data = body.get("data") if status == 200 and isinstance(body, dict) else None
    left = data.get("limit_remaining") if isinstance(data, dict) else None
    if isinstance(left, int | float) and left <= 0:
        return Finding(upstream.name, "money", "the key's limit is spent", False)
    return None


def _ollama(session: requests.Session, table: Table) -> Iterator[Finding]:
    """Whether the classifier's model is there. In hybrid mode keywords do without: no error."""
    base, model = table.ollama["base_url"], table.ollama["model"]
    optional = table.mode == "hybrid"
    try:
        status, body = _get(session, f"{base}/api/tags")
    except requests.RequestException as e:
        where = urlsplit(base).netloc
        text = f"{what_failed(e, where)}; start Ollama, or set routing_mode to keywords"
        yield Finding("classifier", "away", text, optional)
        return
    names = {str(m.get("name")) for m in _listed(body) if isinstance(m, dict)}
    if status != 200 or not isinstance(body, dict) or "models" not in body:
        yield Finding("classifier", "base_url", f"{base}/api/tags is no Ollama's", optional)
    elif model in names or f"{model}:latest" in names:
        yield Finding("classifier", "fine", f"{model} at {base}", True)
    else:
        yield Finding("classifier", "no model", f"ollama pull {model}", optional)
