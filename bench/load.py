"""Load for the speed bench: request bodies and wrk."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import cpu_seconds, settle

LUA = """
local file = assert(io.open("{body}", "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
{headers}
done = function(summary, latency, requests)
  local bad = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), bad.status,
    bad.connect + bad.read + bad.write + bad.timeout))
end
"""
WORDS = (
    "the a of to in and that it for with as on is this be by at from or an the file value user "
    "request answer model list name text line first next case point result time part state change "
    "order number kind page note table group early late short long plain small large open closed "
    "often never always since until because while about after before between under over"
)


@dataclass
class Load:
    """What wrk measured in one turn, and the CPU time of the contestant's process tree."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    bad: int


def wrk(who: Any, body: bytes, connections: int, seconds: int, folder: Path) -> Load:
    """One turn of wrk with one thread against a contestant."""
    (folder / "body.json").write_bytes(body)
    headers = "\n".join(f"wrk.headers[{k!r}] = {v!r}" for k, v in who.all_headers.items())
    (folder / "load.lua").write_text(LUA.format(body=folder / "body.json", headers=headers))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "30s"]
    before = cpu_seconds(who.pid)
    done = subprocess.run(
        [*command, "-s", folder / "load.lua", who.base + who.path],
        capture_output=True, text=True, check=False, timeout=seconds + 60,
    )  # fmt: skip
    cpu = cpu_seconds(who.pid) - before
    settle(who.pid)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if not found:
        sys.exit(f"wrk failed against {who.name}: {done.stdout[-500:]} {done.stderr[-500:]}")
    count, took_us, p50, p99, statuses, broken = map(int, found.groups())
    if statuses or broken:
        print(f"!!! {who.name}: {statuses} answers with an error status, {broken} broken requests")
    return Load(count / (took_us / 1e6), p50 / 1e3, p99 / 1e3, cpu * 1e3 / max(1, count),
                statuses + broken)  # fmt: skip


def need_wrk() -> None:
    """Stop with a sentence when wrk is missing."""
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; on Debian or Ubuntu: sudo apt install wrk")


# --- bodies ------------------------------------------------------------------------------------


def small_body(model: str, **more: Any) -> bytes:
    """A chat of 1 KB: a system prompt and a question."""
    chat = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Write a Python function that reverses a string. "},
        ],
        **more,
    }
    return padded(chat, 1024)


def in_format(path: str, body: bytes) -> bytes:
    """The same chat as the format of `path` has it."""
    chat = json.loads(body)
    if path.endswith("/messages"):
        system, *turns = chat["messages"]
        chat |= {"system": system["content"], "messages": turns, "max_tokens": 1000}
    elif path.endswith("/responses"):
        chat["input"] = chat.pop("messages")
    return json.dumps(chat).encode()


def agent_body(model: str) -> bytes:
    """An agent's turn of 200 KB: 40 messages, among them tool calls and results, and 20 tools."""
    prose = Prose()
    messages = [
        {"role": "system", "content": prose.text(8000)},
        {"role": "user", "content": prose.text(300)},
        {"role": "assistant", "content": prose.text(600)},
    ]
    for n in range(9):
        call = {"name": f"tool_{n}", "arguments": json.dumps({"path": f"/srv/{n}", "limit": 100})}
        messages += [
            {"role": "user", "content": prose.text(400)},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": f"call_{n}", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": f"call_{n}", "content": prose.text(14000)},
            {"role": "assistant", "content": prose.text(1500)},
        ]  # fmt: skip
    messages.append({"role": "user", "content": "Now refactor the Python function and test it. "})
    tools = [{"type": "function", "function": tool(n, prose)} for n in range(20)]
    return padded({"model": model, "messages": messages, "tools": tools}, 200 * 1024)


def tool(n: int, prose: Prose) -> dict[str, Any]:
    """The declaration of one tool with six parameters."""
    fields = {f"field_{i}": {"type": "string", "description": prose.text(120)} for i in range(6)}
    parameters = {"type": "object", "properties": fields, "required": ["field_0"]}
    return {"name": f"tool_{n}", "description": prose.text(300), "parameters": parameters}


def talk_body(model: str, kb: int) -> bytes:
    """A conversation of so many KB in messages of about 1 KB."""
    prose, roles = Prose(), ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": prose.text(950)} for n in range(kb - 1)]
    messages.append({"role": "user", "content": "Write a Python function. "})
    return padded({"model": model, "messages": messages}, kb * 1024)


def padded(chat: dict[str, Any], size: int) -> bytes:
    """The chat as JSON of exactly `size` bytes: its last message is made longer."""
    missing = size - len(json.dumps(chat))
    assert missing >= 0, f"the chat is {-missing} bytes too long"
    chat["messages"][-1]["content"] += Prose().text(missing, plain=True)
    return json.dumps(chat).encode()


class Prose:
    """The same made-up text each time, with the line ends and quotes of real text."""

    def __init__(self) -> None:
        self.random = random.Random(7)
        self.words = WORDS.split()

    def text(self, size: int, plain: bool = False) -> str:
        """So many characters of text."""
        words: list[str] = []
        length = 0
        while length < size:
            word = self.random.choice(self.words)
            if not plain and self.random.random() < 0.06:
                word = self.random.choice(('"' + word + '"', word + "\n", word + ",\n    "))
            words.append(word)
            length += len(word) + 1
        return " ".join(words)[:size]
