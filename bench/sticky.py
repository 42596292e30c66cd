"""What `sticky` saves: one conversation of 50 turns at a simulated provider that caches prefixes.

    python bench/sticky.py [--turns 50] [--seed 1]

The provider remembers for each model, for five minutes after their last use, the beginnings of the
prompts that it saw, and tells in its usage how much of a prompt it knew, as real ones do. The turns
are two minutes apart, of mixed kinds (tests/routing_examples.jsonl), with up to seven requests
each; one request in forty is refused by its model. All models have one price, so that only the
cache makes a difference: 1 USD per million tokens, 0.10 when cached, 3 for what they say.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from upstream import Peer, Request, Upstream, answer_body, error, plain

import router as module

ROOT = Path(__file__).resolve().parent.parent
TTL_S, BETWEEN_S = 300.0, 120.0
PRICE = {"input": 1.0, "cached_input": 0.1, "output": 3.0}
SYSTEM = "You are a helpful agent. " * 2400  # 60 KB


class Provider:
    """Answers, and knows which beginnings each model has read lately."""

    def __init__(self, seed: int, now: list[float]):
        self.chance, self.now = random.Random(seed), now
        self.known: dict[tuple[str, bytes], float] = {}
        self.models: list[str] = []

    def answer(self, peer: Peer, request: Request) -> Any:
        """One whole answer with its usage."""
        if self.chance.random() < 1 / 40:
            return error(503)(peer, request)
        model, known, total = request.model, 0, 0
        so_far = hashlib.sha256()
        for message in request.body["messages"]:
            text = json.dumps(message)
            so_far.update(text.encode())
            total += len(text) // 4
            place = model, so_far.digest()
            if self.known.get(place, -TTL_S) + TTL_S > self.now[0]:
                known = total
            self.known[place] = self.now[0]
        self.models.append(model)
        usage = {"prompt_tokens": total, "completion_tokens": 100, "total_tokens": total + 100,
                 "prompt_tokens_details": {"cached_tokens": known}}  # fmt: skip
        return plain(200, json.dumps(answer_body("Done.", usage=usage)).encode())(peer, request)


def step(n: int) -> list[dict[str, Any]]:
    """A call of a tool and its result."""
    call = {"id": f"c{n}", "type": "function", "function": {"name": "read", "arguments": f"[{n}]"}}
    result = {"role": "tool", "tool_call_id": f"c{n}", "content": f"line {n} of it\n" * 40}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}, result]


def talk(sticky: str, turns: int, seed: int) -> dict[str, Any]:
    """The figures of one conversation."""
    now, chance = [1000.0], random.Random(seed)
    upstream, provider = Upstream(), Provider(seed, now)
    upstream.default = provider.answer
    lines = (ROOT / "tests/routing_examples.jsonl").read_text().splitlines()
    examples = [row["text"] for row in map(json.loads, lines) if "text" in row]
    raw = json.loads((ROOT / "routes.json").read_text())
    raw |= {"sticky": sticky, "routing_mode": "keywords",
            "upstreams": {"local": {"base_url": upstream.url}}}  # fmt: skip
    raw["models"] = {m: {"cost": PRICE} for c in raw["categories"].values() for m in c["models"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routes.json"
        path.write_text(json.dumps(raw))
        settings = module.Settings.from_env({"ROUTER_ROUTES": str(path)})
        app = module.create_app(settings, clock=lambda: now[0])
        logging.getLogger("llm_router").setLevel("ERROR")
        client, messages, n = app.test_client(), [{"role": "system", "content": SYSTEM}], 0
        for text in chance.sample(examples, turns):
            messages.append({"role": "user", "content": text})
            for _ in range(chance.randint(1, 7)):
                body = {"model": "router", "messages": messages}
                answer = client.post("/v1/chat/completions", json=body, buffered=True)
                assert answer.status_code == 200, answer.json
                n, now[0] = n + 1, now[0] + 5
                messages += step(n)
            messages[-2:] = [{"role": "assistant", "content": "Done."}]
            now[0] += BETWEEN_S
        found = client.get("/metrics").json
    upstream.close()
    tokens = found["tokens"]
    changes = sum(a != b for a, b in zip(provider.models, provider.models[1:], strict=False))
    return {"requests": n, "changes": changes, "tokens": tokens["input"],
            "cached": tokens["cached"] / tokens["input"], "usd": found["total_cost_usd"],
            "kept": found["routing_mode_distribution"].get("sticky", 0)}  # fmt: skip


def main() -> None:
    """Print one line for each value of `sticky`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("sticky        requests  changes of model  input tokens  cached    USD")
    for sticky in ("off", "turn", "conversation"):
        row = talk(sticky, options.turns, options.seed)
        print(f"{sticky:13} {row['requests']:8} {row['changes']:17} {row['tokens']:13,} "
              f"{row['cached']:7.1%} {row['usd']:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
