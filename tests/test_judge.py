"""The table of what counts as a failure, row by row, and each upstream's way of saying it."""

from __future__ import annotations

import json

import pytest

from parts.judge import VERDICTS, failure_from, judge

# --- the table, a line per row -----------------------------------------------------------------


OUTCOMES = {  # (goes on to the next model, counts as a strike): the outcomes
    ("yes", True): "connect tls reset first_token answer idle cut server_error redirect "
                   "not_an_answer rate_limited unknown_model",
    ("yes", False): "context_length unauthorized payment not_found client_error",
    ("once", False): "empty not_json refused",
    ("no", False): "content_filter total shortage client_left internal_error",
}  # fmt: skip


def test_each_outcome_has_its_row():
    found = {name: (verdict.next, verdict.strike) for name, verdict in VERDICTS.items()}

    assert found == {name: row for row, names in OUTCOMES.items() for name in names.split()}


def test_every_outcome_is_said_in_words():
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
def test_a_text_that_says_nothing_plainly_excuses_no_server_error_and_no_rate_limit(status):
    text = "context, token, model, key, account, credit, safety, prompt and quota are words"

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
    "quota": (402, said("You exceeded your current quota", code="insufficient_quota"), "payment"),
    "server": (500, said("The server had an error while processing your request."),
               "server_error"),
    "overloaded": (503, said("The engine is currently overloaded"), "server_error"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body", "outcome"), OPENAI.values(), ids=OPENAI)
def test_openai_dialect(status, body, outcome):
    failure = failure_from(status, body)

    assert failure.outcome == outcome
    assert failure.status == (402 if outcome == "payment" else status)
    assert failure.message == body["error"]["message"]


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


# --- what providers were seen to say, whatever the status ----------------------------------------

# Each row: who said it, the status, the words; a text stands for {"error": {"message": text}}.
PROMPT_TOO_LONG = [
    ("OpenAI", 400, "This model's maximum context length is 8192 tokens. However, your messages "
                    "resulted in 9001 tokens. Please reduce the length of the messages."),
    ("OpenAI, Responses", 400, "Your input exceeds the context window of this model. Please adjust "
                               "your input and try again."),
    ("OpenAI, tokens", 400, "Input tokens exceed the configured limit of 272000 tokens. Your "
                            "messages resulted in 300000 tokens."),
    ("OpenAI, a message", 400, "Invalid 'messages[1].content': string too long. Expected a string "
                               "with maximum length 10485760, but got 11000000 instead."),
    ("OpenAI, embeddings", 400, "Requested 350000 tokens, max 300000 tokens per request"),
    ("Anthropic", 400, "prompt is too long: 213462 tokens > 200000 maximum"),
    ("Anthropic, with max_tokens", 400, "input length and `max_tokens` exceed context limit: "
                                        "186433 + 20000 > 200000"),
    ("Anthropic, bytes", 413, {"type": "error", "error": {
        "type": "request_too_large", "message": "Request exceeds the maximum size"}}),
    ("Anthropic, tier", 429, {"type": "error", "error": {
        "type": "rate_limit_error",
        "message": "Extra usage is required for long context requests."}}),
    ("Gemini", 400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "The input "
                      "token count (1196265) exceeds the maximum number of tokens allowed "
                      "(1048575)."}}]),
    ("Gemini, bytes", 400, "Request payload size exceeds the limit: 20971520 bytes."),
    ("Bedrock", 400, {"message": "Input is too long for requested model."}),
    ("xAI", 400, {"code": "Client specified an invalid argument", "error": "This model's maximum "
                  "prompt length is 131072 but the request contains 537812 tokens."}),
    ("Groq", 400, "Please reduce the length of the messages or completion."),
    ("Cerebras", 400, {"message": "Please reduce the length of the messages or completion. Current "
                       "length is 9000 while limit is 8192", "code": "context_length_exceeded"}),
    ("OpenRouter", 400, "This endpoint's maximum context length is 262144 tokens. However, you "
                        "requested about 284283 tokens"),
    ("OpenRouter, Poolside", 400, "Input length 140000 exceeds the maximum allowed input length "
                                  "of 131072 tokens."),
    ("Together", 422, "The input (9000 tokens) is longer than the model's context length (8192 "
                      "tokens)."),
    ("Mistral", 400, {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft "
                      "tokens, too large for model with 32768 maximum context length"}),
    ("Moonshot", 400, "Invalid request: Your request exceeded model token limit: 262144 "
                      "(requested: 269030)"),
    ("MiniMax", 400, "invalid params, context window exceeds limit (2013)"),
    ("Zhipu", 400, {"error": {"code": "1261", "message": "Prompt exceeds max length"}}),
    ("Zhipu, Chinese", 400, {"error": {"code": "1261", "message": "Prompt 超长"}}),
    ("Zhipu, tokens", 400, "tokens in request more than max tokens allowed"),
    ("DashScope", 400, {"error": {"code": "invalid_parameter_error", "message":
                        "Range of input length should be [1, 129024]"}}),
    ("Volcano Ark", 400, "Input length 203743 exceeds the maximum length 202752"),
    ("GitHub Copilot", 400, {"error": {"code": "model_max_prompt_tokens_exceeded", "message":
                             "prompt token count of 135000 exceeds the limit of 128000"}}),
    ("llama.cpp, 500", 500, "Context size has been exceeded."),
    ("llama.cpp, 500, type", 500, {"error": {"code": 500, "type": "exceed_context_size_error",
     "message": "the request exceeds the available context size. try increasing the context size "
     "or enable context shift", "n_prompt_tokens": 1407, "n_ctx": 256}}),
    ("llama.cpp, 400", 400, "request (4390 tokens) exceeds the available context size (4096 "
                            "tokens), try increasing it"),
    ("llama-cpp-python", 400, {"detail": "Requested tokens (3000) exceed context window of 2048"}),
    ("LM Studio", 400, {"error": "Trying to keep the first 5000 tokens when context the overflows. "
                        "However, the model is loaded with context length of only 4096 tokens, "
                        "tokens to keep from the initial prompt is greater than the context "
                        "length"}),
    ("Ollama", 400, "prompt too long; exceeded max context length by 100 tokens"),
    ("Ollama, input", 400, "the input length exceeds the context length"),
    ("vLLM", 400, "The decoder prompt (length 9000) is longer than the maximum model length of "
                  "8192."),
    ("vLLM, with max_tokens", 400, "'max_tokens' or 'max_completion_tokens' is too large: 9000. "
     "This model's maximum context length is 8192 tokens and your request has 20 input tokens."),
    ("vLLM behind a proxy", 500, "litellm.ContextWindowExceededError: Hosted_vllmException"),
    ("SGLang", 400, "Input length (9000 tokens) exceeds the maximum allowed length (8192 tokens)."),
    ("SGLang, total", 400, "Requested token count exceeds the model's maximum context length of "
                           "8192 tokens."),
    ("TGI", 422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= "
                  "4096. Given: 4000 `inputs` tokens and 200 `max_new_tokens`"}),
    ("TensorRT-LLM", 500, "Prompt length (5000) exceeds maximum input length (4096)."),
    ("TabbyAPI", 400, "Prompt length 5000 is greater than max_seq_len 4096"),
    ("Cohere", 400, {"message": "too many tokens: size limit exceeded by 300 tokens. Try using "
                     "shorter or fewer inputs"}),
    ("AI21", 422, {"detail": "Prompt has 9000 tokens which is longer than the max number of "
                   "tokens allowed (8192)"}),
    ("mlx", 400, "Prompt exceeds maximum context length"),
    ("nginx", 413, "<html><head><title>413 Request Entity Too Large</title></head></html>"),
    ("a proxy's body limit", 400, "request entity too large"),
    ("a Chinese gateway", 400, "上下文过长，请压缩上下文后重试"),
    ("a Chinese gateway, input", 500, "输入内容过长：输入长度超过模型上限"),
    ("GitHub Models", 413, {"error": {"code": "tokens_limit_reached", "message": "Request body too "
                            "large for gpt-4o model. Max size: 8000 tokens."}}),
    ("GitHub Models, 400", 400, "Request body too large for gpt-4o model. Max size: 8000 tokens."),
    ("Vertex", 400, "The input token count is 1200000 but model only supports up to 1048576."),
    ("Fireworks", 400, "The prompt is too long: 200001, model maximum context length: 131072"),
    ("Cloudflare", 400, {"success": False, "errors": [{"code": 5021, "message": "AiError: The "
     "estimated number of input and maximum output tokens (9000) exceeded this model context "
     "window limit (8192)."}]}),
    ("watsonx", 400, {"errors": [{"code": "invalid_input_argument", "message": "The number of "
     "input tokens 5000 cannot exceed the total tokens limit 4096 for this model"}]}),
    ("Baidu, 200", 200, {"error_code": 336007, "error_msg": "the max input characters is 516096"}),
    ("llama.cpp, other words", 500, "prompt_tokens (5000) exceeds n_ctx (4096)"),
]  # fmt: skip
NOT_PAID = [
    ("OpenAI", 429, {"error": {"message": "You exceeded your current quota, please check your plan "
                     "and billing details.", "type": "insufficient_quota",
                     "code": "insufficient_quota"}}),
    ("OpenAI, inactive", 429, {"error": {"message": "Your account is not active, please check your "
                               "billing details on our website.", "code": "billing_not_active"}}),
    ("OpenAI, limit", 400, {"error": {"message": "Billing hard limit has been reached",
                            "code": "billing_hard_limit_reached"}}),
    ("Anthropic", 400, {"type": "error", "error": {"type": "invalid_request_error", "message":
                        "Your credit balance is too low to access the Anthropic API. Please go to "
                        "Plans & Billing to upgrade or purchase credits."}}),
    ("OpenRouter", 402, "This request requires more credits, or fewer max_tokens."),
    ("OpenRouter, account", 402, "Insufficient credits. Add more using https://..."),
    ("DeepSeek", 402, {"error": {"message": "Insufficient Balance", "type": "unknown_error",
                       "code": "invalid_request_error"}}),
    ("xAI", 403, {"code": "The caller does not have permission to execute the specified operation",
                  "error": "Your team acme has either used all available credits or reached its "
                  "monthly spending limit. To continue making API requests, please purchase more "
                  "credits or raise your spending limit."}),
    ("MiniMax, 500", 500, {"type": "error", "error": {"type": "api_error",
                           "message": "insufficient balance (1008)"}}),
    ("MiniMax, 429", 429, {"error": {"http_code": "429", "message": "insufficient balance (1008)",
                           "type": "insufficient_balance_error"}}),
    ("Zhipu", 429, {"error": {"code": "1113", "message": "余额不足或无可用资源包,请充值。"}}),
    ("Zhipu, English", 429, {"error": {"code": "1113", "message": "Insufficient balance or no "
                             "resource package. Please recharge."}}),
    ("Zhipu, plan", 429, {"error": {"code": "1311", "message": "Your current subscription plan "
                          "does not yet include access to GLM-5V-Turbo"}}),
    ("Moonshot", 429, {"error": {"type": "exceeded_current_quota_error", "message": "Your account "
                       "org-1 is suspended, please check your plan and billing details"}}),
    ("Moonshot, tokens", 429, {"error": {"type": "exceeded_current_quota_error", "message": "You "
                               "exceeded your current token quota, please check your account "
                               "balance"}}),
    ("DashScope", 400, {"error": {"code": "Arrearage", "message": "Access denied, please make sure "
                        "your account is in good standing."}}),
    ("DashScope, free", 403, {"error": {"code": "AllocationQuota.FreeTierOnly", "message": "The "
                              "free tier of the model has been exhausted."}}),
    ("Volcano Ark", 400, {"error": {"code": "InvalidSubscription", "message": "Your account does "
                          "not have a valid CodingPlan subscription"}}),
    ("SiliconFlow", 403, {"code": 30001, "message": "Sorry, your account balance is insufficient",
                          "data": None, "reason": "INSUFFICIENT_BALANCE"}),
    ("Novita", 403, {"code": 403, "reason": "NOT_ENOUGH_BALANCE", "message": "not enough balance",
                     "metadata": {}}),
    ("new-api", 403, {"error": {"message": "user quota is not enough", "type": "new_api_error",
                      "code": "insufficient_user_quota"}}),
    ("new-api, Chinese", 403, {"error": {"message": "预扣费额度失败, 用户剩余额度: ＄0.01, "
                               "需要预扣费额度: ＄0.02", "type": "new_api_error"}}),
    ("new-api, token", 401, {"error": {"message": "该令牌额度已用尽", "type": "new_api_error"}}),
    ("sub2api", 403, {"code": "INSUFFICIENT_BALANCE", "message": "Insufficient account balance"}),
    ("OpenCode Zen", 401, {"type": "error", "error": {"type": "CreditsError", "message":
                           "Insufficient balance. Manage your billing here: https://..."}}),
    ("Hugging Face", 402, {"error": "You have exceeded your monthly included credits for Inference "
                           "Providers."}),
    ("Replicate", 402, {"title": "Insufficient credit", "detail": "You have insufficient credit to "
                        "run this model.", "status": 402}),
    ("Venice", 402, {"error": "Insufficient USD or Diem balance to complete request."}),
    ("LiteLLM", 400, {"error": {"message": "Budget has been exceeded! Current cost: 1.0, Max "
                      "budget: 1.0", "type": "budget_exceeded", "code": "400"}}),
    ("a gateway that wraps", 500, {"error": True, "status_code": 500, "message": "Error code: 429, "
     'with error text {"error":{"code":"1113","message":"余额不足或无可用资源包,请充值。"}}'}),
    ("Perplexity", 401, {"error": {"message": "You exceeded your current quota, please check your "
                         "plan and billing details", "type": "insufficient_quota", "code": 401}}),
    ("Together", 400, {"error": {"message": "Credit limit exceeded, please update your payment "
                       "method.", "type": "credit_limit"}}),
    ("Fireworks", 412, "Account acme is suspended, possibly due to reaching the monthly spending "
                       "limit or failure to pay past invoices."),
    ("Chutes", 402, {"detail": {"message": "Quota exceeded and account balance is $0.0"}}),
    ("Ollama", 403, "this model requires a subscription, upgrade for access"),
    ("Vercel", 403, {"error": {"message": "AI Gateway requires a valid credit card on file to "
                     "service requests.", "type": "customer_verification_required"}}),
    ("Volcano Ark, overdue", 403, {"error": {"code": "AccountOverdueError", "message": "The "
                                   "request failed because your account has an overdue balance."}}),
    ("Huawei", 401, {"code": "ModelArts.81005", "message": "The free quota has been used up."}),
    ("Tencent, 200", 200, {"Response": {"Error": {
        "Code": "FailedOperation.FreeResourcePackExhausted", "Message": "x"}}}),
]  # fmt: skip
KEY_REFUSED = [
    ("OpenAI", 401, "Incorrect API key provided: sk-abc***xyz."),
    ("OpenAI, none", 401, "You didn't provide an API key."),
    ("xAI, 400", 400, {"code": "Client specified an invalid argument", "error": "Incorrect API key "
                       "provided: ba***na. You can obtain an API key from https://console.x.ai."}),
    ("Gemini, 400", 400, {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "API key "
     "not valid. Please pass a valid API key.", "details": [{"reason": "API_KEY_INVALID"}]}}),
    ("Gemini, 400, list", 400, [{"error": {"code": 400, "message": "API key expired. Please renew "
                                 "the API key."}}]),
    ("Gemini, leaked", 403, "Your API key was reported as leaked. Please use another API key."),
    ("Hugging Face, 400", 400, {"error": "Authorization header is correct, but the token seems "
                                "invalid"}),
    ("Hugging Face", 401, {"error": "Invalid username or password."}),
    ("Anthropic", 401, {"type": "error", "error": {"type": "authentication_error",
                        "message": "invalid x-api-key"}}),
    ("Anthropic, 400", 400, {"type": "error", "error": {"type": "invalid_request_error", "message":
                             "This organization has been disabled."}}),
    ("Bedrock", 403, {"message": "The security token included in the request is invalid."}),
    ("Bedrock, key", 403, {"Message": "Authentication failed: Please make sure your API Key is "
                           "valid."}),
    ("Azure", 401, {"error": {"code": "401", "message": "Access denied due to invalid subscription "
                    "key or wrong API endpoint."}}),
    ("DashScope, 400", 400, {"code": "InvalidApiKey", "message": "Invalid API-key provided."}),
    ("DeepSeek", 401, "Authentication Fails (no such user)"),
    ("Zhipu", 401, {"error": {"code": "1002", "message": "令牌已过期或验证不正确"}}),
    ("Zhipu, 500", 500, {"error": {"code": "1000", "message": "身份验证失败"}}),
    ("new-api", 401, {"error": {"message": "无效的令牌", "type": "new_api_error"}}),
    ("new-api, 403", 403, {"error": {"message": "该令牌状态不可用", "type": "new_api_error"}}),
    ("Cerebras", 401, {"message": "Wrong API Key", "code": "wrong_api_key"}),
    ("SiliconFlow", 401, '"Invalid token"'),
    ("Baidu, 200", 200, {"error_code": 110, "error_msg": "Access token invalid or no longer "
                          "valid"}),
    ("MiniMax, 200", 200, {"base_resp": {"status_code": 1004, "status_msg": "login fail: Please "
                           "carry the API secret key in the 'Authorization' field"}}),
    ("Perplexity", 401, "<html><head><title>401 Authorization Required</title></head></html>"),
    ("Kimi", 403, "Access terminated due to a violation of our terms"),
    ("Fireworks", 403, {"error": "unauthorized"}),
    ("Cloudflare", 400, {"success": False, "errors": [{"code": 10000,
                         "message": "Authentication error"}]}),
    ("Replicate", 401, {"title": "Unauthenticated", "detail": "You did not pass an authentication "
                        "token", "status": 401}),
    ("OpenRouter", 403, "Key limit exceeded (monthly limit). Manage it using the keys page"),
    ("a gateway that wraps", 500, {"error": {"message": "Error code: 401 - {'error': {'message': "
                                   "'Invalid Authentication'}}"}}),
    ("Anthropic, subscription", 400, "This credential is only authorized for use with Claude Code "
                                     "and cannot be used for other API requests."),
    ("Groq, 400", 400, "Organization has been restricted. Please reach out to support"),
    ("Lambda", 401, {"error": {"code": "global/invalid-api-key", "message": "API key was invalid, "
                     "expired, or deleted."}}),
    ("LiteLLM, 400", 400, {"error": {"message": "Authentication Error, Invalid proxy server token "
                           "passed.", "type": "auth_error", "code": "401"}}),
    ("Huawei, 400", 400, {"code": "ModelArts.81002", "message": "Failed to get the authorization "
                          "header."}),
    ("Google", 403, "Permission denied: Consumer 'api_key:x' has been suspended."),
    ("Qwen", 400, "invalid access token or token expired"),
    ("Tencent, 200", 200, {"Response": {"Error": {"Code": "AuthFailure.SecretIdNotFound",
                           "Message": "The SecretId is not found"}}}),
]  # fmt: skip
RATE_LIMITED = [
    ("OpenAI", 429, {"error": {"message": "Rate limit reached for gpt-4o on tokens per min (TPM)",
                     "type": "tokens", "code": "rate_limit_exceeded"}}),
    ("Groq, 413", 413, {"error": {"message": "Request too large for model `acme` in organization "
     "`org_1` service tier `on_demand` on tokens per minute (TPM): Limit 12000, Requested 14137, "
     "please reduce your message size and try again. Need more tokens? Upgrade to Dev Tier today "
     "at https://console.groq.com/settings/billing", "type": "tokens",
     "code": "rate_limit_exceeded"}}),
    ("Gemini", 429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "You "
     "exceeded your current quota, please check your plan and billing details. * Quota exceeded "
     "for metric: generativelanguage.googleapis.com/generate_content_free_tier_requests, limit: "
     "20. Please retry in 34.07s."}}]),
    ("Vertex", 429, "Resource exhausted. Please try again later."),
    ("OpenRouter, a day", 429, "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock "
                               "1000 free model requests per day"),
    ("OpenRouter, 400", 400, {"code": 400, "message": "Provider returned error", "metadata": {
                              "raw": '{"error":{"code":429,"message":"slow down"}}'}}),
    ("Bedrock", 400, {"__type": "ThrottlingException", "message": "Too many tokens, please wait "
                      "before trying again."}),
    ("Bedrock, tokens", 429, {"message": "Too many tokens, please wait before trying again."}),
    ("a proxy, 503", 503, {"error": {"message": "Rate limit exceeded, try again in 5s"}}),
    ("a proxy, 500", 500, {"error": {"message": "Too Many Requests", "type": "api_error"}}),
    ("GitHub, 403", 403, {"message": "API rate limit exceeded for user ID 1."}),
    ("DashScope, 400", 400, {"code": "Throttling.RateQuota", "message": "Requests rate limit "
                             "exceeded, please try again later."}),
    ("Mistral", 429, {"object": "error", "message": "Service tier capacity exceeded for this "
                      "model.", "code": "3505"}),
    ("Mistral, 400", 400, {"message": "Service tier capacity exceeded for this model."}),
    ("Zhipu", 429, {"error": {"code": "1302", "message": "您当前使用该 API 的并发数过高"}}),
    ("Zhipu, 400", 400, {"error": {"code": "1303", "message": "您当前使用该 API 的频率过高"}}),
    ("Zhipu, hours", 429, {"error": {"code": "1308", "message": "Usage limit reached for 5 hour. "
                           "Your limit will reset at 2026-07-02 17:39:49"}}),
    ("Kimi, 403", 403, "You've reached your usage limit for this billing cycle."),
    ("CLIProxyAPI, 500", 500, {"error": {"code": "model_cooldown", "message": "All credentials for "
                               "model acme are cooling down"}}),
    ("a code in a 400", 400, {"error": {"message": "slower, please", "code": 429}}),
    ("Cloudflare", 429, "error code: 1015"),
    ("Anthropic", 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "This "
     "request would exceed your organization's rate limit of 40,000 input tokens per minute"}}),
    ("Azure", 429, "Requests to the ChatCompletions_Create Operation have exceeded token rate "
                   "limit of your current OpenAI S0 pricing tier. Please retry after 6 seconds."),
    ("Anthropic, 400", 400, "You have reached your specified API usage limits. You will regain "
                            "access on 2026-01-01 at 00:00 UTC."),
    ("Cerebras", 429, {"message": "Tokens per day limit exceeded - too many tokens processed.",
                       "type": "too_many_tokens_error", "code": "token_quota_exceeded"}),
    ("Groq, 498", 498, "Flex tier capacity exceeded"),
    ("SiliconFlow, 403", 403, {"message": "Request was rejected due to rate limiting. Details:TPM "
                               "limit reached.", "data": None}),
    ("Baidu, 200", 200, {"error_code": 17, "error_msg": "Open api daily request limit reached"}),
    ("watsonx", 403, {"errors": [{"code": "token_quota_reached", "message": "This account exceeded "
                      "the token quota"}]}),
]  # fmt: skip
FILTERED = [
    ("OpenAI", 400, {"error": {"message": "Your request was rejected as a result of our safety "
                     "system.", "code": "content_policy_violation"}}),
    ("Azure", 400, {"error": {"message": "The response was filtered due to the prompt triggering "
                    "Azure OpenAI's content management policy.", "code": "content_filter",
                    "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    ("DeepSeek", 400, "Content Exists Risk"),
    ("DashScope", 400, {"error": {"code": "data_inspection_failed", "message": "Input data may "
                        "contain inappropriate content."}}),
    ("Zhipu", 400, {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或"
                    "敏感内容，请您避免输入易产生敏感内容的提示语"}}),
    ("Moonshot", 400, {"error": {"type": "content_filter", "message": "The request was rejected "
                       "because it was considered high risk"}}),
    ("MiniMax, 500", 500, {"type": "error", "error": {"message": "input new_sensitive (1026)"}}),
    ("new-api, 500", 500, {"error": {"message": "user sensitive words detected",
                           "code": "sensitive_words_detected"}}),
    ("xAI", 403, {"code": "The caller does not have permission", "error": "Content violates usage "
                  "guidelines."}),
    ("Anthropic", 400, "Output blocked by content filtering policy"),
    ("OpenAI, reasoning", 400, {"error": {"message": "Invalid prompt: we've limited access to this "
                                "content for safety reasons.", "code": "invalid_prompt"}}),
    ("Volcano Ark", 400, {"error": {"code": "SensitiveContentDetected", "message": "The request "
                          "failed because the input text may contain sensitive information."}}),
    ("iFlytek, 200", 200, {"error": {"message": "输入内容审核不通过，涉嫌违规", "code": 10013}}),
]  # fmt: skip
UNKNOWN_MODEL = [
    ("OpenAI", 404, "The model `gpt-9` does not exist or you do not have access to it."),
    ("OpenAI, project", 403, {"error": {"message": "Project `proj_1` does not have access to model "
                              "`gpt-5`", "code": "model_not_found"}}),
    ("Anthropic", 404, {"type": "error", "error": {"type": "not_found_error",
                        "message": "model: claude-9"}}),
    ("Gemini", 404, [{"error": {"code": 404, "message": "models/gemini-9 is not found for API "
                      "version v1main, or is not supported for generateContent."}}]),
    ("Vertex", 404, "Publisher Model `projects/p/models/x` was not found or your project does not "
                    "have access to it."),
    ("Azure", 404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment for "
                    "this resource does not exist."}}),
    ("Bedrock", 400, {"message": "The provided model identifier is invalid."}),
    ("DeepSeek", 400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}),
    ("SiliconFlow", 400, {"code": 20012, "message": "Model does not exist. Please check it "
                          "carefully.", "data": None}),
    ("Zhipu", 400, {"error": {"code": "1211", "message": "模型不存在，请检查模型代码。"}}),
    ("Z.AI", 400, {"error": {"code": "1211", "message": "Unknown Model, please check the model "
                   "code."}}),
    ("Moonshot", 404, "Not found the model kimi-9 or Permission denied"),
    ("DashScope", 403, {"error": {"code": "Model.AccessDenied",
                          "message": "Model access denied."}}),
    ("Volcano Ark", 404, "Your account has not activated the model doubao-9."),
    ("Perplexity", 400, "Invalid model 'sonar-9'. Permitted models can be found in the docs"),
    ("Mistral", 400, {"message": "Invalid model: x", "type": "invalid_model", "code": "1500"}),
    ("Groq", 400, {"error": {"message": "The model `acme` has been decommissioned and is no longer "
                   "supported.", "code": "model_decommissioned"}}),
    ("NVIDIA", 404, {"status": 404, "title": "Not Found", "detail": "Function 'f-1': Not found for "
                     "account 'a-1'"}),
    ("GitHub Copilot", 400, {"error": {"message": "The requested model is not supported.",
                             "code": "model_not_supported"}}),
    ("iFlow, 200", 200, {"status": "435", "msg": "Model not support", "body": None}),
    ("new-api, 503", 503, {"error": {"message": "当前分组 default 下对于模型 acme 无可用渠道",
                           "code": "model_not_found"}}),
    ("new-api, English", 503, "No available channel for model acme under group default"),
    ("LiteLLM, key", 401, {"error": {"message": "key not allowed to access model. This key can "
                           "only access models=['a']. Tried to access b",
                           "type": "key_model_access_denied"}}),
    ("LM Studio", 404, {"error": {"message": "No models loaded. Please load a model."}}),
    ("OpenCode Zen", 401, {"type": "error", "error": {"type": "ModelError", "message": "Model "
                           "acme not supported"}}),
    ("Groq, 403", 403, {"error": {"message": "The model `x` is blocked at the organization level.",
                        "code": "model_permission_blocked_org"}}),
    ("Bedrock, 403", 403, "You don't have access to the model with the specified model ID."),
    ("Volcano Ark, endpoint", 404, "The model or endpoint x does not exist or you do not have "
                                   "access to it."),
    ("SiliconFlow, disabled", 403, {"code": 30003, "message": "Model disabled."}),
    ("Cohere", 404, "model 'x' was removed on September 15, 2025."),
    ("DashScope, unpurchased", 403, "Access to model denied. Please make sure you are eligible for "
                                    "using the model."),
]  # fmt: skip
BUSY = [
    ("a proxy, 400", 400, {"error": {"message": "The model is overloaded. Please try again."}}),
    ("Moonshot, 400", 400, {"error": {"type": "engine_overloaded_error", "message": "The engine is "
                            "currently overloaded, please try again later"}}),
    ("OpenAI, 400", 400, "Selected model is at capacity. Please try a different model."),
    ("SiliconFlow, 400", 400, {"code": 50603, "message": "System is too busy now."}),
    ("vLLM, 400", 400, {"object": "error", "message": "Internal server error",
                        "type": "InternalServerError", "code": 500}),
    ("Zhipu, 400", 400, {"error": {"code": "1234", "message": "服务繁忙，请稍后再试"}}),
    ("Hugging Face", 503, {"error": "Model acme is currently loading", "estimated_time": 20.0}),
    ("Anthropic", 529, {"type": "error", "error": {"type": "overloaded_error",
                        "message": "Overloaded"}}),
    ("NVIDIA, 400", 400, {"status": 400, "title": "Bad Request", "detail": "Function id 'x': "
                          "DEGRADED function cannot be invoked"}),
    ("TGI, 424", 424, "Request failed during generation: Server error: CUDA out of memory"),
]  # fmt: skip
ELSEWHERE = [
    ("OpenAI", 403, {"error": {"code": "unsupported_country_region_territory", "message":
                     "Country, region, or territory not supported", "type": "request_forbidden"}}),
    ("Gemini, 400", 400, {"error": {"code": 400, "status": "FAILED_PRECONDITION", "message": "User "
                          "location is not supported for the API use."}}),
    ("OpenRouter", 403, "This model is not available in your region."),
    ("a key's region", 403, "You are not authorized: not available in your country"),
    ("OpenRouter, terms", 403, "The request is prohibited due to a violation of provider Terms Of "
                               "Service."),
]  # fmt: skip
REFUSED = [  # what looks like one of the above, and is the request's fault
    ("OpenAI, max_tokens", 400, "max_tokens is too large: 99999. This model supports at most 16384 "
                                "completion tokens, whereas you provided 99999."),
    ("Anthropic, max_tokens", 400, "max_tokens: 65536 > 64000, which is the maximum allowed number "
                                   "of output tokens for claude"),
    ("a proxy, max_tokens", 400, "max_tokens exceeds the model's maximum output tokens of 8192"),
    ("DeepSeek, max_tokens", 400, "Invalid max_tokens value, the valid range of max_tokens is [1, "
                                  "8192]"),
    ("Groq, max_tokens", 400, "`max_tokens` must be less than or equal to `8192`, the maximum "
                              "value for `max_tokens` is less than the `context_window` for this "
                              "model"),
    ("OpenAI, a name", 400, "Invalid 'tools[0].function.name': string too long. Expected a string "
                            "with maximum length 64, but got a string with length 70 instead."),
    ("Anthropic, a picture", 400, "messages.0.content.1.image.source.base64: image exceeds 5 MB "
                                  "maximum: 6000000 bytes > 5242880 bytes"),
    ("a picture", 400, "Input image exceeds the maximum size of 20 MB"),
    ("OpenAI, a download", 400, "Error while downloading https://x.test/a.png: upstream status "
                                "code 403 Forbidden"),
    ("Ollama, tools", 400, "registry.ollama.ai/library/acme:latest does not support tools"),
    ("Unknown parameters", 400, "Unknown parameter: 'api_key'."),
    ("Unknown parameters, limit", 400, "Unknown parameter: 'max_input_tokens'."),
    ("Unknown parameters, safety", 400, "Unrecognized request argument supplied: safety_settings"),
    ("JSON", 400, "Invalid JSON: unexpected token at position 17"),
    ("a grammar", 400, "Invalid token in the grammar: expected an identifier"),
    ("a penalty, Chinese", 400, "frequency_penalty 频率惩罚参数非法。请检查文档"),
    ("an answer", 400, "The model output is not valid JSON for this schema"),
    ("a schema", 400, 'Invalid schema for function \'f\': {"type": "object", "description": "api '
                      'key is invalid"} is not valid'),
    ("vLLM, quoting", 400, {"object": "error", "message": "[{'type': 'missing', 'loc': ('body',), "
                            "'msg': 'Field required', 'input': {'content': 'my API key is "
                            "invalid, maximum context length, insufficient balance'}}]"}),
    ("FastAPI, quoting", 422, {"detail": [{"loc": ["body"], "msg": "field required",
                               "input": {"message": "the API key is invalid"}}]}),
    ("Zhipu", 400, {"error": {"code": "1210", "message": "API 调用参数有误，请检查文档"}}),
    ("OpenRouter", 400, {"error": {"code": 400, "message": "Provider returned error", "metadata": {
                         "raw": '{"error":{"message":"tools.0: bad schema"}}'}}}),
    ("new-api", 400, {"error": {"message": "messages is required", "type": "upstream_error"}}),
    ("Bedrock, max_tokens", 400, "The maximum tokens you requested exceeds the model limit of "
                                 "4096. Try again with a maximum tokens value that is lower."),
    ("OpenAI, an id", 400, "Invalid 'messages[2].tool_calls[0].id': string too long. Expected a "
                           "string with maximum length 40, but got 46"),
    ("many pictures", 400, "The number of images in the request exceeds the limit of 10"),
    ("sound", 400, "audio input exceeds 25 MB"),
    ("many tools", 400, "Number of tools exceeds the maximum of 128"),
    ("a tool's name", 400, "function 'get_account_balance' has invalid parameters"),
    ("another tool's name", 400, "Tool 'check_rate_limit' schema invalid"),
    ("a third", 400, "tools.3.name: 'api_key_invalid' is reserved"),
    ("a parameter", 400, "`temperature` is deprecated for this model."),
    ("DashScope", 400, {"error": {"message": "<400> InternalError.Algo.InvalidParameter: The tool "
                        "call is not supported.", "code": "invalid_parameter_error"}}),
    ("a schema's member", 400, "json_schema is invalid: api_key property must be string"),
    ("a download", 400, "Unable to download image: timeout exceeded"),
    ("vLLM, tools", 400, "tool choice requires --enable-auto-tool-choice"),
]  # fmt: skip
WORDS = {
    "context_length": PROMPT_TOO_LONG, "payment": NOT_PAID, "unauthorized": KEY_REFUSED,
    "rate_limited": RATE_LIMITED, "content_filter": FILTERED, "unknown_model": UNKNOWN_MODEL,
    "server_error": BUSY, "client_error": ELSEWHERE, "refused": REFUSED,
}  # fmt: skip
ROWS = [
    pytest.param(status, body, outcome, id=f"{outcome}: {who}")
    for outcome, rows in WORDS.items()
    for who, status, body in rows
]


def as_sent(body) -> bytes:
    """A text that is no document of its own stands for the message of OpenAI's envelope."""
    if isinstance(body, str):
        whole = body.startswith(("<", '"', "error code"))
        return body.encode() if whole else json.dumps(said(body)).encode()
    return json.dumps(body).encode()


@pytest.mark.parametrize(("status", "body", "outcome"), ROWS)
def test_what_an_error_says_plainly_outranks_its_status(status, body, outcome):
    assert failure_from(status, as_sent(body)).outcome == outcome


@pytest.mark.parametrize(("status", "body", "outcome"), ROWS)
def test_an_error_is_passed_on_in_its_own_words(status, body, outcome):
    message = failure_from(status, as_sent(body)).message

    assert message
    assert message.split()[0] in as_sent(body).decode("unicode-escape") or message in str(body)


@pytest.mark.parametrize(("status", "body", "outcome"), ROWS)
def test_an_outcome_comes_with_a_status_that_goes_with_it(status, body, outcome):
    told = failure_from(status, as_sent(body)).status

    assert told in {
        "context_length": (400, 413, 422), "payment": (402, 403), "unauthorized": (401, 403),
        "rate_limited": (429, 503), "content_filter": (400, 403), "unknown_model": (400, 404),
        "server_error": (500, 503, 529), "client_error": (400, 403), "refused": (400, 422),
    }[outcome]  # fmt: skip


def test_a_prompt_that_is_too_long_is_no_strike_however_often_it_comes_as_a_500():
    failure = failure_from(500, b'{"error": {"message": "Context size has been exceeded."}}')

    assert not VERDICTS[failure.outcome].strike
    assert failure.status == 400  # nor is the same model asked again, as after a 500


# --- when to ask again ---------------------------------------------------------------------------


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
    headers = {"Retry-After": value} if value else {}

    assert failure_from(status, None, headers).retry_after_s == seconds
