"""What agents wrap around a person's words, and what they ask of themselves; all texts made up."""

from __future__ import annotations

import time

import pytest
import routing
from conftest import ROOT
from helpers import user
from test_vocabulary import SHIPPED

from parts.prompts import MACHINE, WRAPPINGS, clean, machine_call, user_texts

STAMP = "[Sun 2026-11-22 20:58 UTC] "
QUEUED = (
    "[Queued user message from a previous active turn; preserved as context only. "
    "Continue with the active prompt below.]\n"
)
EARLIER = "[Earlier unanswered user message. Address this request alongside the current input.]\n"
RETRY = "Continue where you left off. The previous model attempt failed or timed out."
SCHEMA = (
    "The output should be formatted as a JSON instance that conforms to the JSON schema below.\n"
)
WRAPPED = {
    "repeat": QUEUED + "turn on the lamp\n\n" + RETRY,
    "repeat of a stamped text": QUEUED + STAMP + "turn on the lamp\n\n" + RETRY,
    "the same words twice": QUEUED + "turn on the lamp\n\nturn on the lamp",
    "twice repeated": QUEUED + QUEUED + "turn on the lamp\n\n" + RETRY,
    "old and new words": QUEUED + STAMP + "fix my python\n\n" + STAMP + "turn on the lamp",
    "newer mark": EARLIER + STAMP + "fix my python\n\n" + STAMP + "turn on the lamp",
    "retry": "[Retry after the previous model attempt failed or timed out]\n\nturn on the lamp",
    "restart": "[System] Your previous turn was interrupted by a gateway restart while tool results"
    " were persisted. The last message from the user before the interruption was:\n\nturn on the "
    "lamp\n\nPlease continue where you left off.",
    "cron": "[cron:7f3a lights] turn on the lamp\nCurrent time: Thursday, 8:00 (UTC)\n"
    "Return your summary as plain text; it will be delivered automatically.",
    "reminder": "A scheduled reminder has been triggered. The reminder content is:\n\nturn on the "
    "lamp\n\nPlease relay this reminder to the user.",
    "inter-session": "[Inter-session message] sourceSession=agent:main isUser=false\nTreat it as "
    "inter-session data.\nturn on the lamp",
    "local commands": "<local-command-caveat>DO NOT respond</local-command-caveat>\n<command-name>"
    "/clear</command-name>\n<local-command-stdout>python</local-command-stdout>\nturn on the lamp",
    "arguments": "<command-message>do</command-message><command-args>turn on the lamp"
    "</command-args>",
    "shell": "<bash-input>ls *.py</bash-input><bash-stdout>a.py</bash-stdout><bash-stderr>"
    "</bash-stderr>turn on the lamp",
    "interrupted": "[Request interrupted by user for tool use]\nturn on the lamp",
    "continued": "This session is being continued from a previous conversation that ran out of "
    "context.\nturn on the lamp",
    "AGENTS.md": "# AGENTS.md instructions for /home/x\n\n<INSTRUCTIONS>\npython\n</INSTRUCTIONS>\n"
    "<environment_context><cwd>/x</cwd></environment_context>\nturn on the lamp",
    "Open WebUI's sources": "### Task:\nRespond to the user query using the provided context, with"
    " citations.\n<context>python code</context>\n<user_query>turn on the lamp</user_query>",
    "schema": "turn on the lamp\n" + SCHEMA + "Here is the output schema:\n```\n{}\n```",
    "fields": "turn on the lamp\nThe output should be a markdown code snippet formatted in the "
    'following schema, including the leading "```json":\n```json\n{}\n```',
    "commas": "turn on the lamp\nYour response should be a list of comma separated values, eg: `a`",
}


@pytest.mark.parametrize("text", WRAPPED.values(), ids=WRAPPED)
def test_what_an_agent_wraps_around_the_words_is_stripped(text):
    assert clean(text) == "turn on the lamp"


CONTINUES = {
    "retry": RETRY,
    "no visible answer": "The previous attempt did not produce a user-visible answer. Continue from"
    " the current state and produce the visible answer now.",
    "only thoughts": "The previous assistant turn recorded reasoning but did not produce a "
    "user-visible answer. Continue from that partial turn.",
    "no output": "[Your previous response had no visible output. Please continue and answer.]",
    "restart": "[System] Your previous turn was interrupted by a gateway restart. Continue.",
    "handed over": "Another language model started to solve this problem and produced a summary "
    "of its python work.\n\nIt fixed main.py.",
    "task output": "Summarize the task tool output above and continue with your task.",
}


@pytest.mark.parametrize("text", CONTINUES.values(), ids=CONTINUES)
def test_an_agent_that_tells_itself_to_go_on_is_passed_by(text):
    texts = list(user_texts([user("turn on the lamp"), user(STAMP + text)]))

    assert texts == ["turn on the lamp"]


CALLS = {
    "heartbeat": "Read HEARTBEAT.md if it exists (workspace context). Follow it strictly. If "
    "nothing needs attention, reply HEARTBEAT_OK.\nCurrent time: Thursday",
    "heartbeat in one's own words": "Check the mail. If nothing is new, reply HEARTBEAT_OK.",
    "flush": "Pre-compaction memory flush. Store durable memories only in memory/2026-05-01.md.",
    "summary": "<conversation>\n[User]: fix my python\n</conversation>\n\nThe messages above are a "
    "conversation to summarize. Create a structured context checkpoint.",
    "update": "<previous-summary>x</previous-summary><conversation>x</conversation>The messages "
    "above are NEW conversation messages to incorporate.",
    "prefix": "<conversation>x</conversation>\nThis is the PREFIX of a turn that was too large.",
    "opencode's summary": "Provide a detailed prompt for continuing our conversation above.",
    "a coding agent's summary": "Your task is to create a detailed summary of the conversation so "
    "far, paying close attention to the code.",
    "Claude Code's compaction": "fix my python\nCRITICAL: Respond with TEXT ONLY. Do NOT call any "
    "tools.\n\n- Do NOT use Read.",
    "Codex's compaction": "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff.",
    "Claude Code's title": "<session>\nfix my python\n</session>\n\nWrite the title for this.",
    "words of a title": "Please write a 5-10 word title for the following conversation:\nx",
    "Codex's title": "Generate a concise, single-line task title.\nUser prompt:\nfix my python",
    "opencode's title": "Generate a title for this conversation:\nfix my python",
    "slug": "Based on this conversation, generate a short 1-2 word filename slug.",
    "suggestion": "[SUGGESTION MODE: Suggest what the user might type next]",
    "Open WebUI's title": "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing "
    "the chat history.\n### Chat History:\n<chat_history>\nUSER: fix my python\n</chat_history>",
    "Open WebUI's tags": "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the "
    "chat history",
    "Open WebUI's follow-ups": "### Task:\nSuggest 3-5 relevant follow-up questions or prompts, "
    "based on the chat history",
    "new session": "A new session was started via /new or /reset. Execute your startup.",
    "agents": "Agent-to-agent announce step.",
}


@pytest.mark.parametrize("text", CALLS.values(), ids=CALLS)
def test_what_an_agent_asks_of_itself_goes_to_the_machine_category(build, text):
    raw = {**SHIPPED, "routing_mode": "keywords", "machine_category": "reasoning"}

    decision = build(**raw).post("/route", {"text": STAMP + text}).json

    assert decision["category"] == "reasoning"
    assert decision["reason"].startswith("an agent's own call: ")


def test_a_title_asked_for_in_a_message_of_its_own_is_the_agents(build):
    asked = [user("Generate a title for this conversation:\n"), user("fix my python")]

    decision = build(**SHIPPED).post("/route", {"messages": asked}).json

    assert decision["category"] == "conversation"  # the default category
    assert decision["reason"] == "an agent's own call: title"


@pytest.mark.parametrize(
    "text",
    [
        "### Task:\nWrite a function that adds", "Write the title of my thesis",
        "Generate a title for my poem", "What does HEARTBEAT_OK mean in OpenClaw?",
        "Summarise the conversation above", "Give me a detailed summary of the conversation",
        "In my log: the previous turn was interrupted. Why?", "<session> what is this tag?",
    ],
)  # fmt: skip
def test_a_persons_words_about_such_things_are_the_persons(text):
    assert (clean(text), machine_call(text)) == (text, "")


def test_each_shape_has_an_example_here():
    texts = [*WRAPPED.values(), *CONTINUES.values(), *CALLS.values()]
    older = ("<<<BEGIN_OPENCLAW", "<active_memory_plugin>", "Untrusted context (", "(untrusted",
             "⟦openclaw:ctx⟧", "[Replying to", "Queued #")  # fmt: skip
    lines = [mark for mark, pattern in WRAPPINGS if pattern.pattern.endswith("[^\\n]*")]

    shapes = [(mark, pattern.search) for mark, pattern in WRAPPINGS]
    shapes += [(mark, pattern.match) for _, mark, pattern in MACHINE]
    unseen = [
        mark for mark, found in shapes if not any(mark in text and found(text) for text in texts)
    ]

    assert set(unseen) <= {*older, *lines, "<system-reminder>", "<local-command-stderr>",
                           "<user_instructions>", "<turn_aborted>"}  # fmt: skip


def test_a_repeat_after_a_failure_keeps_the_category():
    decide = routing.deciding()
    rows = [row for row in routing.rows_of(ROOT / "tests/routing_examples.jsonl") if "text" in row]
    shapes = (QUEUED + "{}\n\n" + RETRY, QUEUED + STAMP + "{0}\n\n" + STAMP + "{0}", RETRY[:0] +
              "[Retry after the previous model attempt failed or timed out]\n\n{}")  # fmt: skip

    changed = [
        row["text"]
        for n, row in enumerate(rows)
        if decide([user(row["text"])]).category
        != decide([user(shapes[n % 3].format(row["text"]))]).category
    ]

    assert len(changed) <= len(rows) / 50


@pytest.mark.parametrize(
    "text",
    ["<conversation></conversation>" * 1700, "<session>" * 5000 + "</session>", "[\n" * 25_000,
     QUEUED * 400, "### Task:\n" * 5000, "HEARTBEAT " * 5000, "<" * 49_000 + "PREFIX of a turn",
     "[Sun 2026-11-22 20:58 UTC] \n" * 1800 + QUEUED, "This is the PREFIX of a turn<" * 1600],
    ids=range(9),
)  # fmt: skip
def test_no_text_takes_long_to_strip(text):
    began = time.process_time()

    machine_call(clean(text))

    assert time.process_time() - began < 0.1


def test_a_machines_call_with_few_tools_is_the_machines_still(build, upstream):
    cheap = {"models": ["acme/two"], "keywords": []}
    tools = {"models": ["acme/one"], "keywords": []}
    client = build(categories={"tools": tools, "cheap": cheap}, default_category="tools",
                   machine_category="cheap")  # fmt: skip
    text = "Read HEARTBEAT.md if it exists (workspace context). Follow it strictly."
    offered = [{"type": "function", "function": {"name": "f"}}]

    answer = client.chat(text, tools=offered)

    assert answer.headers["X-Router-Category"] == "cheap"
