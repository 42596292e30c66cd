"""Choosing a category: the text of real clients' requests, keywords, context, tools, Ollama."""

from __future__ import annotations

import json
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import pytest
import routing
from conftest import LocalClient, settings_for
from helpers import user, wait_until
from service import small_routes
from upstream import Upstream, hang, plain, raw, slow

import router as module
from parts import prompts, vocabulary
from parts.prompts import Continuations, clean, user_texts

CONTEXT = (
    "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nnotes: python\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
)
STAMP = "[Sun 2026-11-22 20:58 UTC] "
RUNTIME = "\n\nRuntime: agent=main | session=agent:main:main | sessionId=0 | shell=bash"
META = '(untrusted metadata):\n```json\n{"sender": "python"}\n```'


def first_text(*messages) -> str:
    return next(user_texts(list(messages)), "")


# --- the text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        "turn on the lamp",
        STAMP + "turn on the lamp",
        STAMP + "turn on the lamp" + RUNTIME,
        f"Conversation info {META}\n\nturn on the lamp",
        f"Conversation info {META}\n\nSender {META}\n\nturn on the lamp",
        f"turn on the lamp\n\nSender {META}",
        "turn on the lamp\n\nConversation info ⟦openclaw:ctx⟧\n```json\n{}\n```",
        "[Telegram Ana id:7 +5m 2026-01-01 10:00 UTC] turn on the lamp\n[message_id: 7]",
        "[Chat messages since your last reply - for context]\nBob: python!\n\n"
        "[Current message - respond to this]\nturn on the lamp",
        "<system-reminder>use python</system-reminder>turn on the lamp",
        f"{CONTEXT}\nturn on the lamp",
        "turn on the lamp\n<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>> never closed python",
    ],
)
def test_what_a_client_wraps_around_the_words_is_stripped(wrapped):
    assert clean(wrapped) == "turn on the lamp"


@pytest.mark.parametrize(
    "text", ["[1,2,3] sort this", "[ERROR] disk full", "a [link](x) b", "Runtime error in x"]
)
def test_brackets_of_the_user_stay(text):
    assert clean(text) == text


def test_the_last_message_of_openclaw_is_not_the_users_text():
    parts = [{"type": "text", "text": CONTEXT}]

    assert first_text(user(STAMP + "hello"), user(parts)) == "hello"


def test_a_tool_loop_keeps_the_category_of_its_turn(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    loop = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "why? hello, prove it"},
        user([{"type": "text", "text": CONTEXT}]),
    ]

    before = client.chat(messages=[user("refactor this")])
    after = client.chat(messages=[user("refactor this"), *loop])

    assert before.headers["X-Router-Category"] == after.headers["X-Router-Category"] == "code"


@pytest.mark.parametrize(
    "content",
    [None, 5, {}, [], [None, 1, {"type": "text"}, {"type": "text", "text": 7}], "", "   "],
)
def test_a_message_without_text_is_passed_by(content):
    assert first_text(user("hello"), user(content)) == "hello"


@pytest.mark.parametrize("messages", [None, 5, "x", {}, [None, 1, "x", {}, {"role": 5}]])
def test_junk_instead_of_messages_has_no_text(messages):
    assert list(user_texts(messages)) == []


def test_the_system_prompt_and_the_tools_are_never_read(client):
    tools = [{"type": "function", "function": {"name": "python_refactor"}}] * 8

    answer = client.chat(
        messages=[{"role": "system", "content": "python"}, user("hello")], tools=tools
    )

    assert answer.headers["X-Router-Category"] == "conversation"


def test_the_forwarded_body_is_untouched_by_stripping(client, upstream):
    client.chat(STAMP + "hello" + RUNTIME)

    assert upstream.requests[-1].body["messages"][0]["content"] == STAMP + "hello" + RUNTIME


def test_no_text_at_all_is_the_default_category(client):
    answer = client.chat(messages=[{"role": "system", "content": "x"}])

    assert answer.headers["X-Router-Mode"] == "default"
    assert answer.headers["X-Router-Category"] == "conversation"


# --- keywords ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "text", "matches"),
    [("poem", "a poem please", True), ("poem", "poems", False), ("poem*", "two poems", True),
     ("unit test", "write a unit test", True), ("unit test", "the unit of a test", False),
     ("unit test*", "unit testing", True), ("Éléphant", "un ELEPHANT", True),
     ("email", "lire l'email", True), ("l'ecran", "l’écran est noir", True),
     ("c++", "in C++ please", True), ("c#", "my C# class", True), (".net", "a .NET thing", True),
     ("node.js", "with node.js", True), ("go", "gopher", False)],
)  # fmt: skip
def test_keywords_match_whole_words_without_case_and_accents(entry, text, matches):
    found = module.Keywords({"mine": [entry]}).match(text)

    assert (found.category == "mine") is matches


def test_of_a_very_long_phrase_the_first_six_words_decide():
    keywords = module.Keywords({"mine": ["one two three four five six seven eight"]})

    assert keywords.match("one two three four five six and more").category == "mine"
    assert keywords.match("one two three four five seven").category is None


def test_a_weight_counts():
    lists = {"one": ["alpha", "beta"], "two": ["gamma^3"]}

    assert module.Keywords(lists).match("alpha beta gamma").category == "two"


def test_a_users_category_beats_a_weak_built_in_hit_and_wins_ties():
    lists = {"code": ["poem"], "haiku": ["poem"]}

    assert module.Keywords(lists).match("a poem").category == "haiku"


def test_the_reason_names_configured_entries_only(client):
    reason = client.chat("please refactoring my secret words").headers["X-Router-Reason"]

    assert reason == "refactor*"


@pytest.mark.parametrize(
    "text",
    ["a" * 50_000, " " * 50_000, "(" * 50_000, "[](){}" * 9_000, "😀" * 12_000, "漢字" * 25_000,
     "مرحبا " * 9_000, "é" * 50_000, "ﷺ" * 50_000, "1 " * 25_000, "a.b" * 17_000, "`" * 50_000],
    ids=lambda text: ascii(text[:4]),
)  # fmt: skip
def test_any_text_is_put_somewhere_without_an_error(text, shipped_keywords):
    assert shipped_keywords.match(clean(text)).margin <= 1


@pytest.fixture(scope="module")
def shipped_keywords():
    lists = {name: vocabulary.built_in(name) for name in module.BUILT_IN}
    return module.Keywords(dict.fromkeys(lists, ()), lists)


def test_a_text_is_matched_once_however_often_a_tool_loop_asks(monkeypatch):
    keywords = module.Keywords({"code": ["python"]})
    asked = []
    find = keywords.find
    monkeypatch.setattr(keywords, "find", lambda words: asked.append(words) or find(words))

    assert keywords.match("some python") == keywords.match("some python")
    assert len(asked) == 1


def test_an_edit_of_the_order_of_categories_decides_a_tie_anew(upstream: Upstream):
    routes = small_routes(upstream.url)
    own = {name: {"models": ["acme/one"], "keywords": ["zebra"]} for name in ("aa", "bb")}
    chooser, found = module.Chooser(None), []

    for order in (("aa", "bb"), ("bb", "aa")):
        more = {name: own[name] for name in order}
        text = json.dumps({**routes, "categories": {**routes["categories"], **more}})
        found.append(chooser._words(module.load_table(text))[0].match("zebra").category)

    assert found == ["aa", "bb"]


def test_an_edit_keeps_the_words_that_it_does_not_touch(upstream: Upstream, monkeypatch):
    routes = small_routes(upstream.url)
    chooser, read = module.Chooser(None), []
    monkeypatch.setattr(module.Index, "add", lambda *entry: read.append(entry))

    def words() -> tuple[object, object]:
        return chooser._words(module.load_table(json.dumps(routes)))

    first = words()
    routes["categories"]["code"]["models"] = ["acme/two"]
    assert words() == first
    read.clear()
    routes["categories"]["code"]["keywords"] = ["flux capacitor"]

    assert words() != first
    assert len(read) < 100  # a person's own; the thousands of built-in ones are there


@hypothesis.given(st.text(st.sampled_from("abc.+#_ é-1'\nXY漢"), max_size=40))
@hypothesis.settings(derandomize=True, database=None, deadline=None)
def test_the_quick_way_to_words_finds_the_same_words(text):
    folded = unicodedata.normalize("NFD", text.lower())
    slow = prompts.TOKEN.findall(prompts.ACCENTS.sub("", folded))

    assert list(prompts.tokens_of(text)) == slow


def test_french_words_that_fold_to_english_ones_are_no_single_keywords():
    entries = [entry for name in module.BUILT_IN for entry in vocabulary.built_in(name)]

    assert not {"thé", "dés", "roi", "trie"} & {entry.split("^")[0] for entry in entries}


# --- context -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ok", "oui", "vas-y", "go on", "et en Python ?", "fix it"])
def test_a_continuation_keeps_the_category_of_the_turn_before(text, build):
    client = build()
    before = [user("prove that seven is prime"), {"role": "assistant", "content": "x"}]

    answer = client.chat(messages=[*before, user(text)])

    assert answer.headers["X-Router-Category"] == "reasoning"
    assert answer.headers["X-Router-Mode"] == "continuation"


@pytest.fixture(scope="module")
def decide():
    return routing.deciding()


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("what is in this folder?", "tools"),
        ("can you test it?", "code"),
        ("why does this work?", "code"),
        ("translate this", "conversation"),
        ("Reply with OK. Do not use tools.", "conversation"),
        ("Read HEARTBEAT.md if it exists. If nothing needs attention, say so.", "conversation"),
    ],
)
def test_a_short_text_after_a_code_turn_goes_where_a_person_would_say(decide, text, category):
    decision = decide([user("write a python function that sorts a list"), user(text)])

    assert decision.category == category


def test_a_continuation_list_does_not_swallow_a_new_request():
    continuations = Continuations(["ok", "and"])

    assert continuations.covers("ok")
    assert not continuations.covers("ok now write me a long poem about the winter sea")


# --- tools, explicit, who can ------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "category", "mode"),
    [
        ({"tools": [TOOL]}, "tools", "tools"),
        ({"tools": [TOOL] * 8}, "conversation", "keywords"),
        ({"tools": [TOOL] * 8, "tool_choice": "required"}, "tools", "tools"),
        ({"tools": [TOOL] * 8, "tool_choice": {"type": "function"}}, "tools", "tools"),
        ({"tools": [TOOL], "tool_choice": "none"}, "conversation", "keywords"),
        ({"tools": []}, "conversation", "keywords"),
        ({"functions": [{"name": "f"}]}, "tools", "tools"),
        ({"functions": [{"name": "f"}] * 8}, "conversation", "keywords"),
        ({"functions": [{"name": "f"}] * 8, "function_call": {"name": "f"}}, "tools", "tools"),
        ({"functions": [{"name": "f"}], "function_call": "none"}, "conversation", "keywords"),
        ({"functions": "f"}, "conversation", "keywords"),
        ({"tools": [TOOL] * 8, "tool_choice": "any"}, "tools", "tools"),  # Mistral
        ({"tools": [TOOL] * 8, "tool_choice": {"type": "any"}}, "tools", "tools"),  # Anthropic
        ({"tools": [TOOL] * 8, "tool_choice": {"type": "tool", "name": "f"}}, "tools", "tools"),
        ({"tools": [TOOL] * 8, "tool_choice": {"type": "auto"}}, "conversation", "keywords"),
        ({"tools": [TOOL] * 8, "tool_choice": {}}, "conversation", "keywords"),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, "conversation", "keywords"),
        ({"tools": [TOOL] * 8, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [TOOL]}}}, "conversation", "keywords"),
        ({"tools": [TOOL] * 8, "tool_choice": {"type": "allowed_tools", "mode": "required"}},
         "tools", "tools"),
    ],
)  # fmt: skip
def test_tools_offered_by_an_agent_decide_only_when_they_are_few(client, body, category, mode):
    answer = client.chat(**body)

    assert answer.headers["X-Router-Category"] == category
    assert answer.headers["X-Router-Mode"] == mode


@pytest.mark.parametrize(
    ("routing", "count", "category"),
    [("always", 20, "tools"), ("never", 1, "conversation"), ("auto", 7, "tools")],
)
def test_tools_routing_says_what_tools_do(build, routing, count, category):
    answer = build(tools_routing=routing).chat(tools=[TOOL] * count)

    assert answer.headers["X-Router-Category"] == category


IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


@pytest.mark.parametrize(
    ("limits", "body"),
    [
        ({"tools": False}, {"tools": [TOOL]}),
        ({"tools": False}, {"functions": [{"name": "f"}]}),
        ({"images": False}, {"messages": [user(IMAGE)]}),
        ({"images": False}, {"messages": [user([{"type": "input_image"}])]}),
        ({"images": False}, {"messages": [user([{"type": "image", "source": {}}])]}),  # Anthropic
        ({"images": False}, {"messages": [user([{"type": "file", "file": {}}])]}),
        ({"images": False}, {"messages": [user(
            [{"type": "tool_result", "content": [{"type": "image"}]}])]}),
        ({"context": 100}, {"messages": [user("hello " * 1000)]}),
    ],
)  # fmt: skip
def test_models_that_cannot_take_a_request_are_passed_over(build, upstream, limits, body):
    client = build(models={"acme/one": limits})

    able = client.chat(**body)
    unable = client.chat(model="acme/one", **body)

    assert able.headers["X-Router-Model"] == "acme/two"
    assert unable.status_code == 422
    assert unable.json["error"]["code"] == "no_capable_model"
    assert upstream.models_asked() == ["acme/two"]


@pytest.mark.parametrize(
    "body",
    [{"tools": [TOOL], "tool_choice": {"type": "none"}}, {"functions": [], "tools": []},
     {"messages": [user([{"type": "text", "text": "hi"},
                         {"type": "tool_result", "content": "x"}])]}],
)  # fmt: skip
def test_a_model_without_tools_and_pictures_takes_what_needs_none(tmp_path, upstream, body):
    limits = {"tools": False, "images": False}
    path = tmp_path / "routes.json"
    path.write_text(json.dumps(small_routes(upstream.url, models={"acme/one": limits})))

    answer = LocalClient(module.create_app(settings_for(path))).chat(**body)

    assert answer.headers["X-Router-Model"] == "acme/one"


# --- Ollama ------------------------------------------------------------------------------------


@pytest.fixture
def ollama():
    server = Upstream()
    yield server
    server.close()


@pytest.fixture
def asking(build, ollama):
    """A client whose categories are named by the fake Ollama."""
    config = {"base_url": ollama.url.removesuffix("/v1"), "model": "tiny", "timeout_sec": 0.5}
    ollama.default = said("conversation")
    client = build(routing_mode="ollama", ollama=config)
    wait_until(lambda: ollama.requests)  # the warm-up call, from its own thread
    ollama.requests.clear()
    return client


def said(category: str):
    content = json.dumps({"category": category})
    return plain(200, json.dumps({"message": {"role": "assistant", "content": content}}).encode())


def test_the_bench_says_how_right_a_model_is_alone_and_below_each_margin(
    ollama, monkeypatch, capsys
):
    monkeypatch.setattr(module, "SURE_MARGIN", module.SURE_MARGIN)  # the bench moves it
    ollama.default = said("tools")
    texts = {"qqq zzz": "tools", "Write a Python function": "code"}

    rows = [{"text": text, "category": name} for text, name in texts.items()]
    routing.print_hybrid(rows, ollama.url.removesuffix("/v1"))

    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0.0", "0.0%", "50.0%"] in printed
    assert ["0.1", "50.0%", "100.0%"] in printed
    assert ["always", "100.0%", "50.0%"] in printed
    assert len(ollama.requests) == 2  # each text once


def test_ollama_names_the_category(asking, ollama):
    ollama.default = said("reasoning")

    answer = asking.chat("python")

    assert answer.headers["X-Router-Category"] == "reasoning"
    assert answer.headers["X-Router-Mode"] == "ollama"
    assert answer.headers["X-Router-Reason"] == "tiny said reasoning"


def test_ollama_is_asked_as_the_design_says(asking, ollama):
    asking.chat("x" * 2000)

    body = ollama.requests[-1].body
    assert ollama.requests[-1].path == "/api/chat"
    assert body["stream"] is False
    assert body["keep_alive"] == "30m"
    assert body["format"]["properties"]["category"]["enum"] == list(module.BUILT_IN)
    assert body["options"]["temperature"] == 0
    assert len(body["messages"][-1]["content"]) == 800


def test_ollama_answers_are_remembered_per_table(asking, ollama):
    asking.chat("alike")
    asking.chat("alike")
    asking.post("/config/category", {"name": "haiku", "models": ["acme/one"]})
    asking.chat("alike")

    assert len(ollama.requests) == 2
    assert "haiku" in ollama.requests[-1].body["format"]["properties"]["category"]["enum"]


@pytest.mark.parametrize(
    "script",
    [
        slow(2, said("reasoning")),
        hang,
        plain(404, b'{"error": "model not found"}'),
        plain(503, b"busy", "text/plain"),
        plain(200, b"not json"),
        plain(200, b'{"message": {"content": "I cannot say"}}'),
        plain(200, b"[]"),
        said("no-such-category"),
        plain(200, b'{"message": {"content": "' + b"x" * 10_000_000 + b'"}}'),
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"),
    ],
    ids=[
        "slow", "hang", "404", "503", "garbage", "prose", "list", "unknown", "10MB", "drop",
        "cut",
    ],
)  # fmt: skip
def test_whatever_ollama_does_keywords_answer_in_time(asking, ollama, script):
    ollama.default = script
    began = time.monotonic()

    answer = asking.chat("refactor this")

    assert time.monotonic() - began < 2
    assert answer.status_code == 200
    assert answer.headers["X-Router-Mode"] == "keywords"
    assert answer.headers["X-Router-Category"] == "code"


def in_words(content: str, **more):
    message = {"role": "assistant", "content": content, **more}
    return plain(200, json.dumps({"message": message, "done": True}).encode())


@pytest.mark.parametrize(
    "content",
    ['{"category": "reasoning"}', '```json\n{"category": "reasoning"}\n```', "reasoning",
     '"reasoning"', "Reasoning.", '{"category":"Reasoning"}', '[{"category": "reasoning"}]',
     'Here: {"category": "reasoning"}', "**reasoning**", "The category is: reasoning",
     '<think>code? tools?</think>{"category": "reasoning"}', "code, or tools?</think>reasoning",
     '<think>\n\n</think>\n\n{"category":"reasoning"}', '{"Category" : "REASONING"}',
     '{"category": "reasoning", "because": "it is no code"}'],
)  # fmt: skip
def test_an_answer_that_names_one_category_is_taken_however_it_is_wrapped(asking, ollama, content):
    ollama.default = in_words(content)

    answer = asking.chat("refactor this")

    assert answer.headers["X-Router-Category"] == "reasoning"
    assert answer.headers["X-Router-Mode"] == "ollama"
    assert asking.get("/health").json["classifier"] == {"status": "ok"}


def test_content_beside_thoughts_is_the_answer(asking, ollama):
    ollama.default = in_words("reasoning", thinking="code, tools or conversation?")

    assert asking.chat("refactor this").headers["X-Router-Category"] == "reasoning"


@pytest.mark.parametrize(
    ("script", "reason", "advice"),
    [
        (in_words("", thinking="Okay, the user wants code"), "only_thoughts", "does not think"),
        (in_words("<think>Okay, the user wants"), "only_thoughts", "does not think"),
        (in_words("code or reasoning"), "unknown_category", "does not name one category"),
        (in_words('{"category": "code reasoning"}'), "unknown_category", "a larger model may"),
        (in_words("encode"), "unknown_category", "does not name one category"),
        (in_words(""), "unknown_category", "does not name one category"),
        (plain(200, b'{"message": {"content": null}}'), "unreadable_answer", "form"),
        (plain(400, b'{"error": "format is not supported"}'), "status 400", "not supported"),
    ],
)
def test_health_says_in_a_sentence_what_is_wrong_with_the_classifier(
    asking, ollama, script, reason, advice
):
    ollama.default = script

    answer = asking.chat("refactor this")

    told = asking.get("/health").json["classifier"]
    assert answer.headers["X-Router-Mode"] == "keywords"
    assert (told["status"], told["reason"]) == ("failing", reason)
    assert told["message"].startswith(("tiny ", "Ollama at "))
    assert advice in told["message"]


def test_a_model_is_asked_not_to_think_unless_it_refuses_that(asking, ollama):
    refusal, good = plain(400, b'{"error": "\\"tiny\\" does not support thinking"}'), said("code")
    ollama.default = lambda peer, r: (refusal if "think" in r.body else good)(peer, r)

    modes = [asking.chat(f"text {n}").headers["X-Router-Mode"] for n in range(2)]

    assert modes == ["ollama", "ollama"]
    assert [r.body.get("think") for r in ollama.requests] == [False, None, None]


def test_a_dead_ollama_is_left_alone_for_a_while_and_health_says_so(asking, ollama):
    ollama.default = plain(503, b"busy", "text/plain")

    for n in range(5):
        asking.chat(f"text {n}")

    assert len(ollama.requests) == 3
    told = asking.get("/health").json["classifier"]
    assert (told["status"], told["reason"]) == ("failing", "status 503")
    assert "answers with status 503" in told["message"]


def test_at_most_two_ask_ollama_at_once(asking, ollama):
    gate, answer = threading.Event(), said("code")
    ollama.default = lambda peer, request: gate.wait(5) and answer(peer, request)

    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(ask_for, asking, n) for n in range(2)]
        wait_until(lambda: len(ollama.requests) == 2)
        third = ask_for(asking, 3)
        gate.set()

    assert third in ("keywords", "default")
    assert [asked.result(5) for asked in first] == ["ollama"] * 2
    assert len(ollama.requests) == 2


def ask_for(client: LocalClient, n: int) -> str:
    return client.app.test_client().post("/route", json={"text": f"unclear {n}"}).json["mode"]


@pytest.mark.parametrize(
    ("text", "mode", "asked"), [("python refactor", "keywords", 0), ("zzz", "ollama", 1)]
)
def test_hybrid_asks_ollama_only_when_keywords_are_not_sure(
    build, upstream, ollama, text, mode, asked
):
    categories = small_routes(upstream.url)["categories"]
    categories["code"]["keywords"] = ["python^3", "refactor*^3"]
    ollama.default = said("reasoning")
    config = {"base_url": ollama.url.removesuffix("/v1"), "model": "tiny"}
    client = build(routing_mode="hybrid", ollama=config, categories=categories)

    answer = client.chat(text)

    asked_for = [r for r in ollama.requests if r.body["messages"][-1]["content"] == text]
    assert answer.headers["X-Router-Mode"] == mode
    assert len(asked_for) == asked


# --- explaining it -----------------------------------------------------------------------------


def test_the_dry_run_names_words_chain_and_who_is_passed_over(client, upstream):
    report = client.post("/route", {"text": "please refactor this"}).json

    assert report["category"] == "code"
    assert report["words"] == [{"word": "refactor*", "weight": 3.0}]
    assert [m["model"] for m in report["chain"]] == ["acme/one", "acme/two"]
    assert report["chain"][0] == {
        "model": "acme/one", "circuit": "closed", "retry_in_sec": 0.0, "passed_over": None,
    }  # fmt: skip
    assert upstream.requests == []


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [user("why?")]},
        {"messages": [user("refactor"), user("ok")], "model": "router"},
        {"messages": [user("hello")], "tools": [TOOL]},
        {"messages": [user("hello")], "model": "acme/two"},
        {"messages": [user("hello")], "model": "router/code"},
        {"messages": [user("nothing that scores")]},
    ],
)
def test_dry_run_and_real_run_agree(client, body):
    dry = client.post("/route", body).json
    real = client.post("/v1/chat/completions", body).headers

    assert dry["category"] == real["X-Router-Category"]
    assert dry["mode"] == real["X-Router-Mode"]
    assert dry["chain"][0]["model"] == real["X-Router-Model"]
