"""Reading a request: the body is checked at the door and passed on as it came."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import router as module
from parts.chat import chat_of, parse_body, request_schemas
from parts.dialects import CHAT
from parts.jsontext import depth_of, parse_object
from parts.table import Model, Upstream


def chat_in(text: str) -> module.Chat:
    return chat_of(text.encode(), *parse_object(text.encode()), CHAT)


def body_for(chat: module.Chat, model: str) -> str:
    return b"".join(chat.for_model(Model(model, Upstream("u", "http://u")))).decode()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"model":"router","a":1}', '{"model":"m","a":1}'),
        ('{"a":1}', '{"model": "m", "a":1}'),
        ('{ "model" : "x", "b":{"model":"y"}, "model":"z"}',
         '{ "model" : "m", "b":{"model":"y"}, "model":"m"}'),
        ('{"mod\\u0065l":"x"}', '{"mod\\u0065l":"m"}'),
        ('{"é":"€","model":"x","😀":"ü"}', '{"é":"€","model":"m","😀":"ü"}'),
        ('{"€":1}', '{"model": "m", "€":1}'),
    ],
)  # fmt: skip
def test_only_the_model_is_replaced(text, wanted):
    assert body_for(chat_in(text), "m") == wanted


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("", '"stream_options": {"include_usage": true}'),
        (', "stream_options": null', '"stream_options": {"include_usage": true}'),
        (', "stream_options": {"x": 1}', '"stream_options": {"x": 1, "include_usage": true}'),
    ],
)
def test_usage_is_asked_for_in_every_stream(options, wanted):
    body = body_for(chat_in('{"model":"a","stream":true' + options + "}"), "m")

    assert wanted in body
    assert json.loads(body)["stream_options"]["include_usage"] is True


def test_depth_counts_every_level():
    assert depth_of({"a": [{"b": []}]}) == 4


@pytest.mark.parametrize(
    "text", ['{"a":1}x', '{"a":1} {"b":2}', "  ", "null", '{"a":1,}', '{"a" 1}']
)
def test_what_is_no_object_is_a_400(text):
    with pytest.raises(module.RouterError) as caught:
        parse_body(text.encode())

    assert caught.value.status == 400


@pytest.mark.parametrize("before", range(0, 103, 17))
@pytest.mark.parametrize(("many", "status"), [(309, 200), (310, 400)])
def test_a_whole_number_beyond_all_floats_is_a_400_wherever_it_stands(before, many, status):
    text = json.dumps({"a": "x" * before, "b": [1], "c": "3" * 400}).replace("[1]", "1" * many)

    try:
        found = parse_body(text.encode())[1]["b"]
    except module.RouterError as e:
        assert e.status == status
    else:
        assert (found, status) == (int("1" * many), 200)


@pytest.mark.parametrize(
    ("context", "longer"), [(100, True), (10_000, False), (126, True), (None, False)]
)
def test_a_prompt_is_too_long_only_when_it_surely_is(context, longer):
    chat = chat_in(json.dumps({"messages": [{"role": "user", "content": "x " * 500}]}))

    assert (context is not None and chat.is_longer_than(context)) is longer


URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 50_000}}
SOUND = {"type": "input_audio", "input_audio": {"data": "A" * 50_000}}


@pytest.mark.parametrize("content", [[URL], [SOUND], "\u0436" * 700])
def test_what_is_no_text_and_other_letters_do_not_count_as_more_than_they_are(content):
    chat = chat_in(json.dumps({"messages": [{"role": "user", "content": content}]}))
    chat.note_wishes()

    assert chat.wants_images == (content == [URL])
    assert not chat.is_longer_than(100)


@pytest.mark.parametrize(
    "secret",
    ["sk-or-v1-abcdefgh12345", "Bearer abc.def", "AIzaSyA1234567890123456789012", "known-secret"],
)
def test_scrub_masks_keys(secret):
    assert secret not in module.scrub(f"bad key {secret}\n", ["known-secret"])


@pytest.mark.parametrize(
    "told",
    ["known-\nsecret", "known-\u200bsecret", "known- secret", "KNOWN-SECRET", "x known-secre t"],
)
def test_scrub_masks_a_known_key_in_disguise(told):
    assert module.scrub(f"bad key {told}", ["known-secret"]) == "***"


CHAT_SCHEMA = request_schemas()["ChatRequest"]
JUNK = st.sampled_from([None, True, 0, 1.5, "x", "", [], {}, [0], [{}], {"include_usage": 1}])
MESSAGE = JUNK | st.fixed_dictionaries(
    {"role": JUNK | st.just("user")}, optional={"content": JUNK | st.lists(JUNK, max_size=2)}
)
BODY = st.fixed_dictionaries(
    {}, optional={"messages": JUNK | st.lists(MESSAGE, max_size=2), "model": JUNK, "stream": JUNK,
                  "stream_options": JUNK | st.fixed_dictionaries({"include_usage": JUNK}),
                  "tools": JUNK | st.lists(JUNK, max_size=2), "tool_choice": JUNK}
)  # fmt: skip


@given(BODY)
@settings(max_examples=500, derandomize=True, database=None, deadline=None)
def test_the_quick_check_agrees_with_the_schema(body):
    assert CHAT.fits(body) == CHAT_SCHEMA.is_valid(body)


@pytest.mark.parametrize("told", ["9" * 5000, "\u0662", "", "-1", "+2", "two"])
def test_a_length_that_is_none_is_no_bug_of_ours(client, told):
    answer = client.flask.post(
        "/v1/chat/completions", data=b"{}", content_type="application/json",
        environ_overrides={"CONTENT_LENGTH": told},
    )  # fmt: skip

    assert answer.status_code == 400
