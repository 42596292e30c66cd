"""The doors: who may come in, and what a refusal looks like.

`guard` looks at a request's head only: host name, origin, key, content type. A page in somebody's
browser, a stranger behind a careless proxy and a client without its key are all told apart here.
"""

from __future__ import annotations

import base64
import hmac
import logging
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import flask
from werkzeug.exceptions import HTTPException

from parts.addresses import is_address, is_loopback, read_host
from parts.dialects import DIALECT_AT
from parts.errors import Full, Refused, RouterError, no_such_route, scrub
from parts.logs import where_it_broke
from parts.settings import Settings

log = logging.getLogger("llm_router")

JSON = "application/json"
CLIENT = "llm_router.client"  # where the environment keeps the name of a client
# Whoever passes a request on says so in one of these, as WSGI names them. There are too many to
# list, and to take one of another kind for one of them only asks for ROUTER_ADMIN_TOKEN.
FORWARDED = re.compile(
    r"HTTP_(?:VIA|CDN_LOOP|CF_RAY|X_ORIGINAL_\w+|\w*FORWARD\w*|\w*(?:_|CLIENT)IP|\w+_ADDR(?:ESS)?)"
)
OUR_NAMES = ("localhost", "host.docker.internal")  # the second is how a container calls its host


def read_page(path: Path) -> tuple[bytes, str]:
    """The page and the policy under which a browser runs its own style and script, and no other."""
    text = path.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digests = [base64.b64encode(sha256(part.encode()).digest()).decode() for part in inside]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {hashes['style']}; "
        f"script-src {hashes['script']}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text.encode(), policy


class Clients(Protocol):
    """Whose key it is (parts/clients.py); false when no file names any."""

    def __bool__(self) -> bool: ...

    def name_of(self, key: str) -> str:
        """The client's name, '' for nobody's."""


def guard(request: flask.Request, settings: Settings, clients: Clients) -> None:
    """Host, origin, key and content type of every request, before anything is read.

    Whose key it is stands in the environment under CLIENT, if it is a client's.
    """
    check_origin(request, settings)
    needed = keys_needed(request, settings)
    environ = request.environ  # a fifth of the cost of request.headers
    named = clients and for_clients(request.path)
    given = keys_given(environ) if needed or named else []
    name = next(filter(None, map(clients.name_of, given)), "") if named else ""
    if name:
        environ[CLIENT] = name
    elif (needed or named) and not any(
        [hmac.compare_digest(g.encode(), key.encode()) for g in given for key in needed.values()]
    ):
        # a sentence that survives clients which mask what looks secret
        names = " or ".join([*needed, *(["a key of ROUTER_CLIENTS_FILE"] if named else [])])
        text = f"no key was sent; send the value of {names} as a Bearer token"
        text = f"the key that was sent is not the value of {names}" if given else text
        raise RouterError(401, "invalid_api_key", text, headers={"WWW-Authenticate": "Bearer"})
    chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    if chunked or environ.get("CONTENT_LENGTH", "0") != "0":
        encoding = environ.get("HTTP_CONTENT_ENCODING", "identity").lower()
        is_json = environ.get("CONTENT_TYPE") == JSON or request.mimetype == JSON
        if not is_json or encoding != "identity":
            text = "send the body as Content-Type: application/json, not compressed"
            raise RouterError(415, "unsupported_media_type", text)


def keys_given(environ: Mapping[str, Any]) -> list[str]:
    """The keys that a request shows: as a Bearer token, and as Anthropic's clients do."""
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    token = token.strip() if scheme.lower() == "bearer" else ""
    return [key for key in (token, environ.get("HTTP_X_API_KEY", "").strip()) if key]


def check_origin(request: flask.Request, settings: Settings) -> None:
    """403 for a host name that is not ours (a page may point its own here) or another's page."""
    environ, host = request.environ, host_of(request.environ)
    # A load balancer's HTTP/1.0 needs no Host; no browser sends such a request.
    nameless = "HTTP_HOST" not in environ and environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
    if not (host in OUR_NAMES or is_allowed(host, settings) or is_address(host) or nameless):
        given = scrub(host or environ.get("HTTP_HOST", ""))[:100]
        text = f"the host name {given!r} is not in ROUTER_ALLOWED_HOSTS"
        raise RouterError(403, "host_not_allowed", text)
    if cors_headers(request, settings):
        return
    origin = environ.get("HTTP_ORIGIN")
    foreign = origin is not None and origin.partition("://")[2] != environ.get("HTTP_HOST")
    other_site = environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("none", "same-origin")
    visit = request.path == "/" and environ.get("HTTP_SEC_FETCH_MODE") == "navigate"
    if foreign or (other_site and not visit):
        text = "pages of another origin may not use this router"
        if not is_operators(request.path):
            text += "; one that may is named in ROUTER_ALLOWED_ORIGINS"
        raise RouterError(403, "origin_not_allowed", text)


def is_allowed(host: str, settings: Settings) -> bool:
    """True for a name in ROUTER_ALLOWED_HOSTS, or below one that is written `*.name` there."""
    below = "." + host.partition(".")[2]
    while below != ".":
        if below in settings.allowed_hosts:
            return True
        below = "." + below[1:].partition(".")[2]
    return host in settings.allowed_hosts


def is_operators(path: str) -> bool:
    """True for what shows or changes the state of the router: no page of another origin may."""
    return path in ("/config", "/metrics", "/usage") or path.startswith(
        ("/config/", "/circuit-breaker/", "/usage/")
    )


def for_clients(path: str) -> bool:
    """True for what a client's key opens."""
    models = path.removeprefix("/v1").startswith("/models")
    return path in DIALECT_AT or models or path in ("/route", "/v1/usage", "/v1/catalog")


def cors_headers(request: flask.Request, settings: Settings) -> dict[str, str]:
    """What a browser wants to see on an answer for an app of ROUTER_ALLOWED_ORIGINS; else {}."""
    origin = request.environ.get("HTTP_ORIGIN", "")
    if origin.lower() not in settings.allowed_origins or is_operators(request.path):
        return {}
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "*",
            "Vary": "Origin"}  # fmt: skip


def preflight(request: flask.Request, settings: Settings) -> flask.Response | None:
    """The answer to a browser that asks what an app may send; None for any other request."""
    allowed = cors_headers(request, settings)
    if request.method != "OPTIONS" or not allowed:
        return None
    wanted = request.environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
    return flask.Response(status=204, headers={
        **allowed, "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": wanted if _HEADER_NAMES.fullmatch(wanted) else "",
        "Access-Control-Allow-Private-Network": "true", "Access-Control-Max-Age": "600",
    })  # fmt: skip


_HEADER_NAMES = re.compile(r"[\w, -]{0,2000}", re.A)


def keys_needed(request: flask.Request, settings: Settings) -> dict[str, str]:
    """{setting: key}, any of which opens this route; {} when it is open; 403 for outsiders."""
    path, api_key, token = request.path, settings.api_key, settings.admin_token
    any_key = {"ROUTER_API_KEY": api_key, "ROUTER_ADMIN_TOKEN": token}
    needed = {}
    if path.startswith(("/config/", "/circuit-breaker/")):
        if not token and not is_local(request):
            text = "without ROUTER_ADMIN_TOKEN only this machine may change things, and by no proxy"
            raise RouterError(403, "only_local", text)
        needed = {"ROUTER_ADMIN_TOKEN": token}
    elif is_operators(path) or (path == "/route" and (api_key or settings.clients_file)):
        needed = any_key
    elif for_clients(path) and path != "/route":
        needed = {"ROUTER_API_KEY": api_key}
    return {name: key for name, key in needed.items() if key}


_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*://([^/?#]*)", re.I)


def host_of(environ: Mapping[str, Any]) -> str:
    """The host asked for, without port and brackets, in lower case; '' when it is malformed.

    A target such as `http://name/path` outranks the Host header (RFC 9112, 3.2.2).
    """
    target = _ABSOLUTE.match(environ.get("RAW_URI", ""))
    return read_host(target[1] if target else environ.get("HTTP_HOST", ""))


def is_local(request: flask.Request) -> bool:
    """True when the request comes straight from this machine, as far as one can tell."""
    direct = not any(map(FORWARDED.fullmatch, request.environ))
    modern = request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"  # nginx speaks 1.0 by default
    return (
        direct
        and modern
        and is_loopback(request.remote_addr or "")
        and is_loopback(host_of(request.environ))
    )


def as_router_error(e: Exception, path: str = "") -> RouterError:
    """Whatever was raised, as our error; a bug is a 500 that blames no model and logs no value."""
    if isinstance(e, RouterError):
        return e
    if isinstance(e, Full):
        return RouterError(
            503, "too_many_requests", f"{e}; try again", headers={"Retry-After": "1"}
        )
    if isinstance(e, Refused):
        detail = [{"loc": ["body"], "msg": str(e)}] if e.status == 422 else None
        return RouterError(e.status, e.kind, str(e), detail=detail)
    if not isinstance(e, HTTPException):
        log.error("internal_error", {"where": where_it_broke()})
        return RouterError(500, "internal_error", "the router has a bug; its log says where",
                           headers={"x-should-retry": "false"})  # fmt: skip
    known = {404: ("not_found", no_such_route(path)),
             405: ("method_not_allowed", "this route does not take that method"),
             413: ("request_too_large", "the body is over ROUTER_MAX_BODY_MB")}  # fmt: skip
    kind, text = known.get(e.code or 500, ("bad_request", e.name))
    allow = {key: value for key, value in e.get_headers() if key == "Allow"}
    return RouterError(e.code or 500, kind, text, headers=allow)
