"""The words of an error, whatever its envelope, and when it says to ask again."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parts.errortext import MOST_UNPACKED, read_error, seconds_of, unpacked, wait_of
from parts.judge import failure_from

SAYS = "This model's maximum context length is 8192 tokens"
OPENAI = {"error": {"message": SAYS, "type": "invalid_request_error", "code": None}}
AS_TEXT = json.dumps(OPENAI)

# --- envelopes -----------------------------------------------------------------------------------

VALUES = {
    "OpenAI": OPENAI,
    "a text": {"error": SAYS},
    "a list": {"error": [SAYS]},
    "Hugging Face": {"error": [f"Error: {SAYS}"], "error_type": "validation"},
    "Gemini": [{"error": {"code": 400, "message": SAYS, "status": "INVALID_ARGUMENT"}}],
    "FastAPI": {"detail": [{"loc": ["body"], "msg": SAYS}]},
    "FastAPI, detail": {"detail": SAYS},
    "FastAPI, object": {"detail": {"message": SAYS}},
    "DeepInfra": {"detail": {"error": SAYS}},
    "vLLM": {"object": "error", "message": SAYS, "type": "BadRequestError", "code": 400},
    "Mistral": {"object": "error", "message": {"detail": [{"msg": SAYS}]}},
    "error in error": {"error": {"error": {"message": SAYS}}},
    "Anthropic": {"type": "error", "error": {"type": "invalid_request_error", "message": SAYS}},
    "Cloudflare": {"success": False, "errors": [{"code": 7003, "message": SAYS}], "result": None},
    "errors, texts": {"errors": [SAYS]},
    "errors by field": {"title": "Bad", "status": 400, "errors": {"messages": [SAYS]}},
    "Bedrock": {"Message": SAYS, "__type": "ValidationException"},
    "Baidu": {"error_code": 336007, "error_msg": SAYS},
    "SiliconFlow": {"code": 20015, "message": SAYS, "data": None},
    "iFlow": {"status": "434", "msg": SAYS, "body": None},
    "MiniMax": {"base_resp": {"status_code": 2013, "status_msg": SAYS}},
    "Novita": {"code": 400, "reason": "INVALID_REQUEST_BODY", "message": SAYS, "metadata": {}},
    "OAuth": {"error": "invalid_request", "error_description": SAYS},
    "problem+json": {"type": "about:blank", "title": "Bad Request", "status": 400, "detail": SAYS},
    "Apigee": {"fault": {"faultstring": SAYS, "detail": {"errorcode": "policies.x"}}},
    "Spring": {"timestamp": 1, "status": 400, "error": "Bad Request", "message": SAYS},
    "OpenRouter": {"error": {"code": 400, "message": "Provider returned error",
                             "metadata": {"raw": AS_TEXT, "provider_name": "Acme"}}},
    "OpenRouter, raw text": {"error": {"code": 400, "message": "Provider returned error",
                                       "metadata": {"raw": SAYS}}},
    "OpenRouter, raw twice": {"error": {"message": "x", "metadata": {"raw": json.dumps({"error": {
        "message": "y", "metadata": {"raw": AS_TEXT}}})}}},
    "a JSON text": {"error": {"message": AS_TEXT, "code": 400}},
    "a JSON text behind words": {"error": {"message": f"Upstream failed (400): {AS_TEXT}"}},
    "a JSON text with blanks": {"error": {"message": json.dumps(OPENAI, indent=2)}},
    "a JSON text that is a list": {"error": {"message": f"API Error: {json.dumps([OPENAI])}"}},
    "a repr": {"error": {"message": f"Error code: 400 - {OPENAI}"}},
    "SSE in JSON": {"error": {"message": f"data: {AS_TEXT}\n\n"}},
    "Vercel": {"error": {"message": "failed", "type": "AI_APICallError", "param": {
        "message": SAYS, "statusCode": 400}}},
    "gRPC": {"status": {"code": 3, "message": SAYS}},
    "Azure": {"error": {"code": "BadRequest", "message": "x", "innererror": {"message": SAYS}}},
    "new-api": {"error": {"message": f"{SAYS} (request id: 2025)", "type": "new_api_error"}},
    "unknown names": {"ok": False, "why": SAYS},
}  # fmt: skip
BYTES = {
    "plain text": SAYS.encode(),
    "a JSON text alone": json.dumps(SAYS).encode(),
    "SSE": b"data: " + AS_TEXT.encode() + b"\n\n",
    "SSE, no blank": b"data:" + AS_TEXT.encode() + b"\r\n\r\n",
    "SSE, event": b"event: error\ndata: " + AS_TEXT.encode() + b"\n\ndata: [DONE]\n\n",
    "SSE, comment first": b": hello\n\ndata: " + AS_TEXT.encode() + b"\n\n",
    "SSE, in lines": b"data: " + json.dumps(OPENAI, indent=1).replace("\n", "\ndata: ").encode(),
    "SSE, text": b"data: " + SAYS.encode() + b"\n\n",
    "llama.cpp": b"error: " + json.dumps(OPENAI["error"]).encode() + b"\n\n",
    "lines of JSON": AS_TEXT.encode() + b"\n" + AS_TEXT.encode() + b"\n",
    "a BOM": b"\xef\xbb\xbf" + AS_TEXT.encode(),
    "UTF-16": AS_TEXT.encode("utf-16"),
    "blanks before": b"\r\n  " + AS_TEXT.encode(),
    "SSE, an id first": b"id: 7\ndata: " + AS_TEXT.encode() + b"\n\n",
    "no SSE": b"id: " + SAYS.encode(),
    "HTML": f"<!DOCTYPE html><html><head><title>{SAYS}</title></head>".encode(),
    "HTML, heading": f"<html><body><h1 class='x'>{SAYS}</h1></body>".encode(),
    "XML": f'<?xml version="1.0"?><Error><Code>X</Code><Message>{SAYS}</Message></Error>'.encode(),
    "cut off": b'{"error": {"message": "' + SAYS.encode() + b'", "input": "' + b"x" * 70_000,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_the_words_are_found_in_every_envelope(value):
    failure = failure_from(400, json.dumps(value).encode())

    assert failure.outcome == "context_length"
    assert SAYS in failure.message.replace("\\'", "'")


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_that_was_read_already_says_the_same_as_its_bytes(value):
    assert read_error(value) == read_error(json.dumps(value).encode())


@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES)
def test_the_words_are_found_in_all_kinds_of_bytes(data):
    failure = failure_from(400, data)

    assert failure.outcome == "context_length"
    assert failure.message.removeprefix("id: ") == SAYS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"title": "Not Found", "detail": "no such thing"}, "Not Found; no such thing"),
        ({"detail": [{"msg": "first"}, {"msg": "second"}]}, "first; second"),
        ({"error": {"message": "same", "errors": [{"message": "same"}]}}, "same"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": "the true words"}}},
         "Provider returned error; the true words"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"error": {"type": "server_error", "message": None}}, "server_error"),
        ({"error": {"message": "  many\n  blanks "}}, "many blanks"),
        ({"error": {"message": 'bad schema {"type": "object"}'}}, 'bad schema {"type": "object"}'),
        ({"error": True, "message": "told"}, "told"),
        ({"status": "error", "why": "an unknown name"}, "an unknown name"),
    ],
)  # fmt: skip
def test_the_message_is_what_a_person_can_use(value, message):
    assert read_error(value).message == message


def test_what_the_client_said_is_no_word_of_the_upstream():
    value = {"detail": [{"msg": "field required", "input": {"message": "a secret"},
                         "value": "another"}], "body": {"messages": ["a third"]}}  # fmt: skip

    assert read_error(value).text == "field required"


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"error": {"code": 502}}, 502), ({"error": {"code": "429"}}, 429),
        ({"error": {"status": 503}}, 503), ({"error": {"http_code": "500"}}, 500),
        ({"error": {"code": 1113}}, 0), ({"error": {"code": 200}}, 0),
        ({"error": {"code": True}}, 0), ({"error": {"code": "5xx"}}, 0),
        ({"error": {"code": 400.0}}, 0), ({"status": 404, "detail": "x"}, 404),
    ],
)  # fmt: skip
def test_the_status_that_an_error_names_is_found(value, status):
    assert read_error(value).status == status


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0\0\0", bytes(range(256)) * 40, b"\xff" * 5000, b"[" * 100_000, b'{"a":' * 100_000,
        b'{"error":' * 60 + b'"deep"' + b"}" * 60, b"[" + b"1," * 30_000 + b"1]",
        b'{"error": ' + b"9" * 6000 + b"}", b'{"error": NaN}', b"data: ", b"event: error\n\n", b"<",
        b"data:" * 12_000, b"data: {" * 9_000, b"data: [DONE]\n\n",
        b'"\\ud800"', b'{"error": {"code": -1, "message": 1e999}}', b"null", b"true",
    ],
    ids=lambda data: repr(data[:16]),
)  # fmt: skip
def test_any_bytes_are_an_error_without_an_exception(data):
    assert failure_from(500, data).outcome == "server_error"
    assert failure_from(400, data).outcome == "refused"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["error", "message", "detail", "code", "metadata", "raw", "errors",
                             "retry_after", "headers", "status", "x"]), inner, max_size=4)
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON, st.sampled_from([200, 400, 403, 404, 429, 500, 503]))
def test_any_value_is_an_error_without_an_exception(value, status):
    failure = failure_from(status, value)

    assert failure.outcome
    assert failure.retry_after_s is None or 0 <= failure.retry_after_s <= 1e10


@given(st.binary(max_size=200), st.sampled_from(["", "gzip", "deflate", "br"]))
def test_anything_may_claim_to_be_compressed(data, coding):
    assert failure_from(429, unpacked(data, coding)).outcome


PAGES = {
    "one word": b"x" * 64_000, "words": b"again retry after " * 4000, "retry": b"retry" * 13_000,
    "exceed": b"prompt exceed " * 4500, "model": b"model not model not " * 3200,
    "quotes": b"model '" * 9000, "digits": b"try again in 1m1m1m" * 3400,
    "tags": b"<title" * 11_000,
    "braces": b'{"' * 32_000, "keys": b"api key " * 8000, "limits": b"limit of reset " * 4200,
    "escapes": b'{"message": "' + b"\\n" * 31_000, "blanks": b"a" + b" " * 64_000 + b"b",
    "lines": b"data: x\n" * 8000, "values": json.dumps([{"error": ["x"] * 60}] * 200).encode(),
}  # fmt: skip


@pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)
def test_64_kb_of_anything_take_milliseconds(data):
    began = time.process_time()

    failure_from(429, data)

    assert time.process_time() - began < 0.5  # 0.03 on an idle machine


# --- compressed ----------------------------------------------------------------------------------


def deflated(data: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


PLAIN = AS_TEXT.encode()


@pytest.mark.parametrize(
    ("data", "coding"),
    [
        (gzip.compress(PLAIN), "gzip"), (gzip.compress(PLAIN), "x-gzip"),
        (gzip.compress(PLAIN), ""), (gzip.compress(gzip.compress(PLAIN)), "gzip, gzip"),
        (deflated(PLAIN, 15), "deflate"), (deflated(PLAIN, -15), "deflate"),
        (PLAIN, "gzip"), (PLAIN, "deflate"), (PLAIN, "none"), (PLAIN, ""),
        (gzip.compress(PLAIN)[:-6], "gzip"),
    ],
)  # fmt: skip
def test_a_compressed_error_is_read(data, coding):
    assert unpacked(data, coding) == PLAIN


def test_a_compressed_flood_is_read_to_a_limit():
    bomb = gzip.compress(b" " * (50 << 20))
    tracemalloc.start()

    found = unpacked(bomb, "gzip")

    assert len(found) <= MOST_UNPACKED
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# --- when to ask again ---------------------------------------------------------------------------

NOW = 1_700_000_000.0


@pytest.fixture
def now(monkeypatch):
    monkeypatch.setattr("parts.errortext.time.time", lambda: NOW)
    return NOW


SPANS = [
    ("20", 20), (7.5, 7.5), ("7.5", 7.5), ("20s", 20), ("6m0s", 360), ("1s", 1), ("250ms", 0.25),
    ("2m59.56s", 179.56), ("1h2m3s", 3723), ("1d", 86400), ("34.074824224s", 34.074824224),
    ("3 seconds", 3), ("5 minutes", 300), ({"seconds": "34"}, 34), ("20, 20", 20), ("5, 20", 20),
    (str(int(NOW) + 60), 60), (int(NOW * 1000) + 60_000, 60), (str(int(NOW * 1000) + 500), 0.5),
    (formatdate(NOW + 20, usegmt=True), 20), ("2023-11-14T22:13:40Z", 20),
    ("2023-11-14T23:13:40+01:00", 20), ("-3", 0), (-3, 0), ("inf", 1e10), ("99999999999999", 1e10),
    ("Wed, 01 Jan 2020 00:00:00 GMT", 0),
    ("soon", None), ("nan", None), ("", None), (None, None), (True, None), ([1], None), ({}, None),
    ("Wed, 99 Foo 2020", None), ("20 apples", None), ("2020-01-01T00:00:00Z", None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "seconds"), SPANS, ids=[repr(value) for value, _ in SPANS])
def test_spans_dates_and_stamps_are_seconds_from_now(now, value, seconds):
    found = seconds_of(value)

    assert found == (seconds if seconds is None else pytest.approx(seconds, abs=0.01))


HEADERS = [
    ({"Retry-After": "20"}, 20), ({"retry-after-ms": "1500"}, 1.5),
    ({"Retry-After": "2", "retry-after-ms": "1500"}, 1.5),
    ({"Retry-After": "soon", "x-ratelimit-reset-requests": "3s"}, 3),
    ({"x-should-retry": "true", "x-retry-count": "7"}, None),
    ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, 1),
    ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "99",
      "x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, 360),
    ({"x-ratelimit-reset-tokens-minute": "11.4", "x-ratelimit-reset-requests-day": "33011"}, 11.4),
    ({"anthropic-ratelimit-requests-reset": "2023-11-14T22:13:40Z"}, 20),
    ({"x-ratelimit-reset": str(int(NOW) + 9)}, 9), ({"ratelimit-reset": "30"}, 30),
    ({"X-RateLimit-Reset": str(int(NOW) - 9)}, None), ({}, None),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "seconds"), HEADERS, ids=[str(h) for h, _ in HEADERS])
def test_headers_say_when_to_ask_again(now, headers, seconds):
    found = wait_of(headers, read_error({}))

    assert found == (seconds if seconds is None else pytest.approx(seconds, abs=0.01))


def told(message: str, **more) -> dict:
    return {"error": {"message": message, **more}}


GOOGLE = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
BODIES = {
    "OpenRouter": (told("Rate limit exceeded", metadata={"headers": {
        "X-RateLimit-Limit": "50", "X-RateLimit-Reset": str(int(NOW * 1000) + 3_600_000)}}), 3600),
    "Gemini": ([told("Quota exceeded", details=[GOOGLE])], 34),
    "Gemini, words": (told("Quota exceeded. Please retry in 34.07s."), 34.07),
    "OpenAI": (told("Rate limit reached on tokens per min. Please try again in 20s. Visit"), 20),
    "OpenAI, ms": (told("Please try again in 250ms."), 0.25),
    "Groq": (told("Limit 100000, Used 97875. Please try again in 18m20.589s."), 1100.589),
    "Azure": (told("Please retry after 3 seconds."), 3),
    "LiteLLM": (told("No deployments available for selected model, Try again in 5 seconds."), 5),
    "bare": (told("rate limited, retry after 60"), 60),
    "bare, in seconds": (told("retry_after_seconds=4"), 4),
    "bare, in words": (told("Retry-After (seconds): 9"), 9),
    "a moment": (told("You can retry after 2023-11-14T22:13:40Z"), 20),
    "another moment": (told("Blocked until 2023-11-14 22:13:40 (UTC)"), 20),
    "wait": (told("Please wait 1 minute and 30 seconds before trying again"), 90),
    "reset": (told("Your limit will reset in 2 hours"), 7200),
    "Zhipu": (told("Usage limit reached. Your limit will reset at 2023-11-14 22:13:40"), 20),
    "Chinese": (told("请求过于频繁，请在 30 秒后重试"), 30),
    "Codex": (told("The usage limit has been reached", resets_in_seconds=50), 50),
    "Codex, stamp": (told("x", resets_at=int(NOW) + 50), 50),
    "a member": (told("slow down", retry_after=12), 12),
    "a member, ms": (told("slow down", retry_after_ms=1200), 1.2),
    "beside the error": ({"error": "slow down", "retry_after": 12}, 12),
    "Hugging Face": ({"error": "Model acme is currently loading", "estimated_time": 20.0}, 20),
    "no span": (told("Please try again later. Limit: 50 requests"), None),
    "no number": (told("try again in a moment"), None),
    "not of a retry": (told("max_retries is 3, retryable"), None),
}  # fmt: skip


@pytest.mark.parametrize(("body", "seconds"), BODIES.values(), ids=BODIES)
def test_an_error_says_when_to_ask_again(now, body, seconds):
    found = failure_from(429, json.dumps(body).encode()).retry_after_s

    assert found == (seconds if seconds is None else pytest.approx(seconds, abs=0.01))


def test_a_header_outranks_what_the_error_says(now):
    body = told("Please try again in 20s.", retry_after=12)

    assert failure_from(429, body, {"Retry-After": "7"}).retry_after_s == 7


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (402, "Insufficient credits, try again in 20s"),
        (400, "maximum context length is 8 tokens; try again in 20s"),
        (500, "oops, try again in 20s"),
        (413, "Request too large for model `acme` on tokens per minute (TPM): Limit 12000, "
              "Requested 14137, try again in 20s"),
    ],
)  # fmt: skip
def test_what_waiting_does_not_mend_is_not_waited_for(status, message):
    assert failure_from(status, told(message)).retry_after_s is None
