"""The table of what counts as a failure, row by row, and each upstream's way of saying it."""

from __future__ import annotations

import json

import pytest

from judge import VERDICTS, failure_from, judge
from wire import retry_after_of

# --- the table, a line per row -----------------------------------------------------------------


ROWS = {  # (goes on to the next model, counts as a strike): the outcomes
    ("yes", True): "connect tls reset first_token answer idle cut server_error redirect "
                   "not_an_answer rate_limited unknown_model",
    ("yes", False): "context_length unauthorized payment not_found client_error",
    ("once", False): "empty refused",
    ("no", False): "content_filter total client_left internal_error",
}  # fmt: skip


def test_each_outcome_has_its_row_and_is_said_in_words():
    found = {name: (verdict.next, verdict.strike) for name, verdict in VERDICTS.items()}

    assert found == {name: row for row, names in ROWS.items() for name in names.split()}
    assert all(verdict.says for verdict in VERDICTS.values())


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (300, "redirect"), (301, "redirect"), (302, "redirect"), (304, "redirect"),
        (307, "redirect"), (308, "redirect"),
        (400, "refused"), (401, "unauthorized"), (402, "payment"), (403, "client_error"),
        (404, "not_found"), (405, "client_error"), (406, "client_error"), (408, "server_error"),
        (409, "client_error"), (410, "client_error"), (413, "context_length"),
        (415, "client_error"), (418, "client_error"), (422, "refused"), (423, "client_error"),
        (429, "rate_limited"), (451, "client_error"),
        (500, "server_error"), (501, "server_error"), (502, "server_error"),
        (503, "server_error"), (504, "server_error"), (520, "server_error"),
        (524, "server_error"), (529, "server_error"), (999, "server_error"),
        (101, "not_an_answer"), (103, "not_an_answer"), (202, "not_an_answer"),
        (204, "not_an_answer"), (206, "not_an_answer"),
    ],
)  # fmt: skip
def test_a_status_without_a_text_has_its_row(status, outcome):
    assert judge(status, "") == outcome


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_text_never_excuses_a_server_error_or_a_rate_limit(status):
    text = "context length exceeded, content policy, model not found, api key"

    assert VERDICTS[judge(status, text)].strike


# --- the dialects --------------------------------------------------------------------------------


def said(message: str, **more) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None,
                      "code": None, **more}}  # fmt: skip


OPENAI = {
    "context": (400, said("This model's maximum context length is 8192 tokens. However, your "
                          "messages resulted in 9001 tokens. Please reduce the length of the "
                          "messages.", code="context_length_exceeded"), "context_length"),
    "context-by-code": (400, said("Bad request", code="context_length_exceeded"), "context_length"),
    "policy": (400, said("Your request was rejected as a result of our safety system.",
                         code="content_policy_violation"), "content_filter"),
    "azure-policy": (400, said("The response was filtered due to the prompt triggering Azure "
                               "OpenAI's content management policy.", code="content_filter"),
                     "content_filter"),
    "invalid-prompt": (400, said("Your input was flagged as potentially violating our usage "
                                 "policy", code="invalid_prompt"), "content_filter"),
    "parameter": (400, said("Unsupported parameter: 'max_tokens' is not supported with this "
                            "model. Use 'max_completion_tokens' instead.",
                            code="unsupported_parameter"), "refused"),
    "value": (400, said("Invalid value: 'x'. Supported values are: 'a' and 'b'."), "refused"),
    "max-tokens": (400, said("max_tokens is too large: 99999. This model supports at most 16384 "
                             "completion tokens, whereas you provided 99999."), "refused"),
    "tool-order": (400, said("An assistant message with 'tool_calls' must be followed by tool "
                             "messages responding to each 'tool_call_id'."), "refused"),
    "bad-key": (401, said("Incorrect API key provided: sk-abc***xyz.", code="invalid_api_key"),
                "unauthorized"),
    "key-403": (403, said("You have insufficient permissions for this operation."), "unauthorized"),
    "country": (403, said("Country, region, or territory not supported"), "client_error"),
    "model": (404, said("The model `gpt-9` does not exist or you do not have access to it.",
                        code="model_not_found"), "unknown_model"),
    "model-400": (400, said("The model `gpt-9` does not exist", code="model_not_found"),
                  "unknown_model"),
    "rate": (429, said("Rate limit reached for gpt-4o in organization org-1 on tokens per min",
                       code="rate_limit_exceeded"), "rate_limited"),
    "quota": (429, said("You exceeded your current quota", code="insufficient_quota"),
              "rate_limited"),
    "server": (500, said("The server had an error while processing your request."),
               "server_error"),
    "overloaded": (503, said("The engine is currently overloaded"), "server_error"),
}  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        "Invalid 'tools[0].function.name': string too long. Expected a string with maximum "
        "length 64, but got a string with length 70 instead.",
        "Unknown parameter: 'safety_identifier'.",
        "Unrecognized request argument supplied: safety_settings",
        "Invalid 'user': string too long. Expected a string with maximum length 64.",
        "The model could not fetch the image: URL not found",
        "Invalid model parameter: temperature",
        "tools[0].description is too long",
    ],
)
def test_a_wrong_parameter_is_neither_a_long_prompt_nor_a_filter(message):
    assert failure_from(400, said(message)).outcome == "refused"


@pytest.mark.parametrize(
    "message",
    [
        "This model does not support image input",
        "The model does not support tool use",
        "Model acme/one: 'temperature' is not supported",
    ],
)
def test_a_request_that_the_model_cannot_take_is_no_strike_against_it(message):
    outcome = failure_from(400, said(message)).outcome

    assert not VERDICTS[outcome].strike


OPENROUTER = {
    "numeric-401": (401, {"code": 401, "message": "User not found."}, "unauthorized"),
    "numeric-402": (402, {"code": 402, "message": "This request requires more credits, or fewer "
                          "max_tokens."}, "payment"),
    "moderated": (403, {"code": 403, "message": "acme/one requires moderation. Your input was "
                        "flagged.", "metadata": {"reasons": ["violence"], "flagged_input": "x"}},
                  "content_filter"),
    "moderated-by-reasons-alone": (403, {"code": 403, "message": "Refused.",
                                         "metadata": {"reasons": ["violence"]}},
                                   "content_filter"),
    "key-limit": (403, {"code": 403, "message": "Key limit exceeded (total limit). Manage it "
                        "using the API key settings"}, "unauthorized"),
    "unknown-model": (400, {"code": 400, "message": "acme/none is not a valid model ID"},
                      "unknown_model"),
    "no-endpoints": (404, {"code": 404, "message": "No endpoints found for acme/none."},
                     "unknown_model"),
    "raw-context": (400, {"code": 400, "message": "Provider returned error", "metadata": {
        "provider_name": "Acme", "raw": '{"error":{"message":"This model\'s maximum context '
        'length is 8192 tokens"}}'}}, "context_length"),
    "raw-filter": (400, {"code": 400, "message": "Provider returned error", "metadata": {
        "raw": '{"error":{"code":"content_filter"}}'}}, "content_filter"),
    "raw-other": (400, {"code": 400, "message": "Provider returned error", "metadata": {
        "raw": '{"error":{"message":"tools.0: bad schema"}}'}}, "refused"),
    "context": (400, {"code": 400, "message": "This endpoint's maximum context length is 32768 "
                      "tokens. However, you requested about 40000 tokens"}, "context_length"),
    "rate": (429, {"code": 429, "message": "Rate limit exceeded: free-models-per-min"},
             "rate_limited"),
    "timeout": (408, {"code": 408, "message": "Request timed out"}, "server_error"),
    "provider-down": (502, {"code": 502, "message": "Provider returned error"},
                      "server_error"),
    "no-provider": (503, {"code": 503, "message": "No available model provider"},
                    "server_error"),
}  # fmt: skip


@pytest.mark.parametrize("in_a_200", [False, True])
@pytest.mark.parametrize(("status", "error", "outcome"), OPENROUTER.values(), ids=OPENROUTER)
def test_openrouter_dialect_also_inside_a_200(status, error, outcome, in_a_200):
    body = {"id": "gen-1", "error": error, "user_id": "user_1", "choices": []}

    failure = failure_from(200 if in_a_200 else status, body)

    assert (failure.outcome, failure.status) == (outcome, status)


@pytest.mark.parametrize(
    "message",
    [
        "No endpoints found that support tool use. To learn more about provider routing, visit: x",
        "No endpoints found that support image input",
        "No endpoints found matching your data policy (Free model publication).",
    ],
)
def test_openrouter_endpoints_that_lack_a_feature_are_no_strike(message):
    outcome = failure_from(404, {"error": {"code": 404, "message": message}}).outcome

    assert VERDICTS[outcome].next == "yes"
    assert not VERDICTS[outcome].strike


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ({"code": "502", "message": "Bad gateway"}, "server_error"),
        ({"code": "429", "message": "slow down"}, "rate_limited"),
        ({"code": None, "message": "maximum context length is 8 tokens"}, "context_length"),
        ({"code": "content_filter", "message": "no"}, "content_filter"),
        ({"code": "server_error", "message": "no"}, "server_error"),
        ({"code": 200, "message": "odd"}, "server_error"),
        ({"code": 99999, "message": "odd"}, "server_error"),
        ({"code": [1], "message": {"a": 1}}, "server_error"),
        ("a plain text", "server_error"),
        (["a", "list"], "server_error"),
        (True, "server_error"),
        (17, "server_error"),
    ],
)
def test_an_error_in_a_200_is_a_failure_whatever_its_shape(error, outcome):
    assert failure_from(200, {"error": error}).outcome == outcome


OLLAMA = {
    "unknown": (404, {"error": {"message": 'model "acme" not found, try pulling it first',
                                "type": "api_error", "param": None, "code": None}},
                "unknown_model"),
    "unknown-old": (404, {"error": "model 'acme' not found, try pulling it first"},
                    "unknown_model"),
    "no-tools": (400, {"error": {"message": "registry.ollama.ai/library/acme:latest does not "
                                 "support tools", "type": "api_error"}}, "refused"),
    "busy": (503, {"error": "server busy, please try again. maximum pending requests exceeded"},
             "server_error"),
    "memory": (500, {"error": {"message": "model requires more system memory (9.1 GiB) than is "
                               "available (3.2 GiB)", "type": "api_error"}}, "server_error"),
    "runner": (500, {"error": {"message": "llama runner process has terminated: signal: killed",
                               "type": "api_error"}}, "server_error"),
    "bad-json": (400, {"error": {"message": "invalid character 'x' looking for beginning of "
                                 "value", "type": "invalid_request_error"}}, "refused"),
    "long": (400, {"error": {"message": "the input length exceeds the context length",
                             "type": "invalid_request_error"}}, "context_length"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (400, "refused"), (403, "client_error"), (404, "not_found"), (413, "context_length"),
        (429, "rate_limited"), (502, "server_error"), (503, "server_error"),
        (504, "server_error"), (521, "server_error"),
    ],
)  # fmt: skip
def test_an_html_page_of_a_proxy_counts_by_its_status_alone(status, outcome):
    failure = failure_from(status, None)

    assert (failure.outcome, failure.status, failure.message) == (outcome, status, "")


FASTAPI = {
    "text": (422, {"detail": "messages: field required"}, "refused"),
    "places": (422, {"detail": [{"loc": ["messages"], "msg": "field required"}]}, "refused"),
    "not-found": (404, {"detail": "Not Found"}, "not_found"),
    "model": (404, {"detail": "The model `acme` does not exist."}, "unknown_model"),
    "context": (400, {"detail": "Requested tokens exceed context window of 2048"},
                "context_length"),
    "object": (400, {"detail": {"message": "maximum context length is 2048"}}, "context_length"),
    "key": (401, {"detail": "Not authenticated"}, "unauthorized"),
    "forbidden": (403, {"detail": "Not authenticated"}, "unauthorized"),
    "vllm": (400, {"object": "error", "message": "This model's maximum context length is 2048 "
                   "tokens.", "type": "BadRequestError", "code": 400}, "context_length"),
    "internal": (500, {"detail": "Internal Server Error"}, "server_error"),
}  # fmt: skip


DIALECTS = {
    f"{name}-{case}": row
    for name, rows in (("openai", OPENAI), ("ollama", OLLAMA), ("fastapi", FASTAPI))
    for case, row in rows.items()
}


@pytest.mark.parametrize(("status", "body", "outcome"), DIALECTS.values(), ids=DIALECTS)
def test_each_dialect_is_understood(status, body, outcome):
    failure = failure_from(status, body)

    assert (failure.outcome, failure.status) == (outcome, status)
    assert failure.message


@pytest.mark.parametrize(("status", "body", "outcome"), OPENAI.values(), ids=OPENAI)
def test_the_message_is_what_the_upstream_said(status, body, outcome):
    assert failure_from(status, body).message == body["error"]["message"]


def test_fastapi_places_reach_the_client_as_a_text():
    detail = [{"loc": ["body", "messages", 0, "role"], "msg": "unexpected value"}]

    assert "unexpected value" in failure_from(422, {"detail": detail}).message


@pytest.mark.parametrize(
    "body", [None, [], "text", 5, {}, {"error": None}, {"error": {}}, {"error": {"metadata": 5}}]
)
def test_any_shape_of_an_error_body_is_judged_by_its_status(body):
    assert failure_from(500, body).outcome == "server_error"
    assert failure_from(400, json.loads(json.dumps(body))).outcome == "refused"


@pytest.mark.parametrize(
    ("status", "value", "seconds"),
    [
        (429, "7", 7.0), (503, "7", 7.0), (429, "0.5", 0.5), (429, "-3", 0.0),
        (429, None, None), (429, "soon", None), (429, "nan", None), (429, "inf", 1e10),
        (429, "9" * 400, 1e10),
        (500, "7", None), (400, "7", None), (402, "7", None),
    ],
)  # fmt: skip
def test_retry_after_is_read_of_a_429_and_a_503_only(status, value, seconds):
    assert failure_from(status, None, value).retry_after_s == seconds


def test_retry_after_may_be_a_date():
    assert retry_after_of("Wed, 01 Jan 2020 00:00:00 GMT") == 0.0
    assert (retry_after_of("Wed, 01 Jan 2120 00:00:00 GMT") or 0) > 1e9
    assert retry_after_of("Wed, 99 Foo 2020") is None
