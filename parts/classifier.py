"""What a model that names the category is asked, and what its answer means.

It is Ollama's model, or with `classifier` in routes.json one of an upstream. The examples are chat
turns with the very answers that are wanted. A model of 135M parameters was right on 50 of 125
texts so, and on 46 with examples as lines of the system prompt: no clear difference.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from parts.errors import ClassifierError, scrub
from parts.errortext import read_error
from parts.table import Table, Upstream

CHARS = 800  # of the user's text: the task stands at the start
EXAMPLES = (
    ("Turn off the lights in the kitchen", "tools"),
    ("Pourquoi le ciel est-il bleu ?", "reasoning"),
    ("Why does this loop never end? while(i<3){}", "code"),
    ("Bonjour, comment ça va ?", "conversation"),
    ("A train leaves at 9 and takes 75 minutes. When does it arrive?", "reasoning"),
    ("Écris une requête SQL qui compte les clients", "code"),
    ("Write a birthday card for my boss", "conversation"),
    ("Quel temps fera-t-il demain à Lyon ?", "tools"),
)


class Question(NamedTuple):
    """One call: to Ollama, or to `upstream` with its key."""

    url: str
    body: bytes
    model: str
    upstream: Upstream | None = None

    @property
    def whom(self) -> str:
        """Who is asked, for a sentence."""
        if self.upstream:
            return f"the classifier's upstream {self.upstream.name}"
        return f"Ollama at {self.url.removesuffix('/api/chat')}"


def messages_for(table: Table, text: str) -> list[dict[str, str]]:
    """The chat that ends in `text`.

    All before it is the same for every request, so that a server keeps it evaluated.
    """
    names = list(table.categories)
    lines = [f"- {name}: {table.categories[name].description or name}" for name in names]
    told = ["Name the category of the user's request. Answer with JSON only.", *lines]
    chat = [{"role": "system", "content": "\n".join(told)}]
    for said, name in EXAMPLES:
        if name in table.categories:
            answer = json.dumps({"category": name}, separators=(",", ":"))
            chat += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [*chat, {"role": "user", "content": text}]


def question_for(table: Table, text: str, *, may_think: bool = False) -> Question:
    """The call that asks for the category of `text`.

    Ollama's answer can only be one of the categories. Models that think do so unless told not to,
    and spend `num_predict` on it.
    """
    body: dict[str, Any] = {"stream": False, "messages": messages_for(table, text)}
    if table.classifier:
        model, upstream = table.classifier["model"], table.upstreams[table.classifier["upstream"]]
        body |= {"model": model, "temperature": 0, "max_tokens": 24}
        url = f"{upstream.base_url}/chat/completions"
        return Question(url, json.dumps(body).encode(), model, upstream)
    model, names = table.ollama["model"], list(table.categories)
    answer = {"category": {"type": "string", "enum": names}}
    body |= {
        "model": model,
        "keep_alive": "30m",
        **({} if may_think else {"think": False}),
        "format": {"type": "object", "properties": answer, "required": ["category"]},
        "options": {"temperature": 0, "seed": 1, "num_predict": 24, "num_ctx": 2048},
    }
    url = table.ollama["base_url"].rstrip("/") + "/api/chat"
    return Question(url, json.dumps(body).encode(), model)


# Fences, quotes and prose around the answer are as good; of two categories neither was meant.
CATEGORY_IN_JSON = re.compile(r'"category"\s{0,9}:\s{0,9}"([^"]{1,80})"', re.I)
THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.I | re.S)


def read_category(data: bytes, table: Table) -> str:
    """The one category that the answer names; ClassifierError when it names none, or two."""
    model = asked_model(table)
    try:
        answer = json.loads(data)
        message = (answer["choices"][0] if table.classifier else answer)["message"]
        said = THOUGHTS.sub("", message["content"]).rpartition("</think>")[2]
    except (ValueError, TypeError, LookupError, RecursionError) as e:
        text = f"{model} does not answer in the form that was asked for"
        raise ClassifierError("unreadable_answer", text) from e
    for text in (" ".join(CATEGORY_IN_JSON.findall(said)), said):
        words = {word.strip("-_") for word in re.findall(r"[\w-]+", text.lower())}
        named = words.intersection(table.categories)
        if len(named) == 1:
            return named.pop()
    if not said.strip() and (message.get("thinking") or message["content"].strip()):
        where = "classifier.model" if table.classifier else "ollama.model"
        text = f"{model} thinks instead of answering: name a model that does not think as " \
               f'{where} in routes.json, or write "routing_mode": "keywords"'  # fmt: skip
        raise ClassifierError("only_thoughts", text)
    text = f"{model} does not name one category of routes.json; a larger model may"
    raise ClassifierError("unknown_category", text)


def asked_model(table: Table) -> str:
    """The model that names the category."""
    return str((table.classifier or table.ollama)["model"])


def patience_s(table: Table) -> float:
    """How long its answer is awaited, in seconds."""
    return float((table.classifier or table.ollama)["timeout_sec"])


def refusal(whom: str, status: int, data: bytes, key: str) -> ClassifierError:
    """What an error of the classifier's upstream means for a person; without the key."""
    said = scrub(read_error(data).message, [key] if key else [])[:200] or "no words"
    return ClassifierError(f"status {status}", f"{whom} answers with status {status}: {said}")
