"""Which model has a turn, or a whole conversation: for its next steps that model comes first.

A turn is what an agent does about one text of a person: a request, then one more for each result
of a tool. Whoever made the step before has the prompt in its cache, and alone can read its own
thinking signatures or encrypted reasoning. No session is needed: a turn is known by who asks, by
its session's header or else by how the conversation begins, and by the person's last text.

What is kept is hashes, which mean nothing outside of this process, with the model, the category and
a time; no text. All of it is in memory and bounded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from parts.errors import RouterError, scrub
from parts.loops import repeats
from parts.lru import Lru

log = logging.getLogger("llm_router")

MOST = 10_000  # turns, conversations and made responses that are remembered, each
LOOP = 10  # equal calls in a row, from which on the log and the page say so
# Decisions that a conversation may overrule: the others are what somebody asked for.
BY_TEXT = ("keywords", "ollama", "continuation", "default", "sticky")
# Claude Code's (a subagent has the second, too), Codex', and one for anybody.
SESSION_HEADERS = ("x-claude-code-session-id", "x-claude-code-agent-id", "session-id",
                   "x-session-id")  # fmt: skip
SESSION_KEYS = tuple(f"HTTP_{name.upper().replace('-', '_')}" for name in SESSION_HEADERS)


@dataclass(frozen=True)
class Turn:
    """Where a request stands in its conversation."""

    key: int = 0  # of the turn; 0 when no person said anything
    conversation: int = 0
    is_step: bool = False  # an answer or a tool's result stands behind the person's last text
    goes_on: bool = False  # something was answered in it before
    continues: str = ""  # the id of what the upstream keeps that this goes on with
    repeats: int = 0  # how many calls of a tool at its end are the same, with the same result
    tool: str = ""  # which


NO_TURN = Turn()


class Kept(NamedTuple):
    """Who answered last, in which category, and when."""

    model: str
    category: str
    at: float


class Turns:
    """Remembers who answered, and puts that model first where the request goes on with it."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._made = Lru(MOST)  # id of a response or conversation -> the model that made it
        self._turns = Lru(MOST)  # Turn.key -> Kept
        self._conversations = Lru(MOST)  # Turn.conversation -> Kept
        self._told = Lru(MOST)  # conversations whose loop was logged

    def find(self, chat: Any, session: str = "", client: str = "") -> Turn:
        """Where `chat` stands; `client` names who asks, `session` is of its headers."""
        dialect, continues = chat.dialect, chat.dialect.continues(chat.body)
        turns = dialect.turns(chat.body)
        places = reversed(range(len(turns)))
        found = ((n, text) for n in places if (text := said_in(dialect, turns[n])))
        last, said = next(found, (-1, ""))
        count, tool = repeats(turns[last + 1 :])
        if last < 0:
            nobody = hash_of("conversation", client, session)
            return Turn(conversation=nobody, continues=continues, repeats=count, tool=tool)
        first = next((text for turn in turns[:last] if (text := said_in(dialect, turn))), said)
        behind = any(map(is_answer, turns[last + 1 :]))
        return Turn(
            hash_of("turn", client, session or first, said),
            hash_of("conversation", client, session, first),
            behind, behind or any(map(is_answer, turns[:last])), continues, count, tool,
        )  # fmt: skip

    def keep(self, turn: Turn, decision: Any, table: Any, decide: Callable[..., Any],
             sure: float) -> Any:  # fmt: skip
        """`decision` with the model first that the request goes on with, if any.

        With `"sticky": "conversation"` the category is kept, too, by `decide(table, name, mode,
        reason)`, unless the new text is of another by a margin of at least `sure`.
        """
        decision = self._stay(turn, decision, table, decide, sure)
        if turn.repeats >= LOOP:
            decision = with_reason(decision, f"the same call {turn.repeats} times")
        return decision

    def _stay(self, turn: Turn, decision: Any, table: Any, decide: Callable[..., Any],
              sure: float) -> Any:  # fmt: skip
        made_by = table.models.get(self._made.get(turn.continues)) if turn.continues else None
        if made_by:  # nobody else knows what came before
            return decision._replace(chain=first_of(made_by, decision.chain))
        kept = self._kept(turn, table)
        if kept is None:
            return decision
        if table.sticky == "conversation" and kept.category != decision.category:
            clear = decision.mode == "keywords" and decision.margin >= sure and not turn.is_step
            if decision.mode in BY_TEXT and kept.category in table.categories and not clear:
                reason = f"the conversation stays, this text alone is {decision.category}"
                decision = decide(table, kept.category, "sticky", reason)._replace(
                    ignored=decision.ignored
                )
        model = next((model for model in decision.chain if model.id == kept.model), None)
        if model is None or model is decision.chain[0]:
            return decision
        decision = decision._replace(chain=first_of(model, decision.chain))
        return with_reason(decision, f"stays with {model.id}")

    def _kept(self, turn: Turn, table: Any) -> Kept | None:
        if table.sticky == "off" or not turn.key:
            return None
        kept: Kept | None = self._turns.get(turn.key) if turn.is_step else None
        if kept is None and table.sticky == "conversation" and turn.goes_on:
            kept = self._conversations.get(turn.conversation)
            if kept and self._clock() - kept.at > table.sticky_sec:  # the provider's cache is cold
                return None
        return kept

    def check_loop(self, turn: Turn, limit: int | None, id_: str) -> None:
        """Log a loop, once a conversation; RouterError 422 from `limit` equal calls on.

        `id_` is the request's.
        """
        if turn.repeats >= min(LOOP, limit or LOOP) and not self._told.get(turn.conversation):
            self._told.put(turn.conversation, True)
            log.warning("same_call_repeated", {"id": id_, "times": turn.repeats})
        if limit and turn.repeats >= limit:
            text = f"the agent goes round in circles: its last {turn.repeats} calls of " \
                   f"{scrub(turn.tool)[:64]!r} had the same arguments and the same result " \
                   "(same_call_limit); tell it what to do instead"  # fmt: skip
            raise RouterError(422, "loop_detected", text, headers={"x-should-retry": "false"})

    def note(self, turn: Turn, decision: Any, model: str, made: str) -> None:
        """`model` has begun the answer, which the upstream calls `made` if it keeps it."""
        for id_ in filter(None, (made, turn.continues)):
            self._made.put(id_, model)
        if turn.key:
            kept = Kept(model, decision.category, self._clock())
            self._turns.put(turn.key, kept)
            if decision.mode in BY_TEXT:
                self._conversations.put(turn.conversation, kept)


def hash_of(*parts: str) -> int:
    """Python's own hash, which has another secret in each process; a tenth of a digest's time."""
    return hash(tuple([(len(part), part[:2000], part[-2000:]) for part in parts]))


def said_in(dialect: Any, turn: Any) -> str:
    """What a person says in one turn of the conversation, or ''."""
    if not isinstance(turn, dict) or turn.get("role") != "user":
        return ""
    text: str = next(dialect.texts({"messages": [turn], "input": [turn]}), "")
    return text


def is_answer(turn: Any) -> bool:
    """True for what a model or a tool said; items of Responses without a role are such, too."""
    if not isinstance(turn, dict):
        return False
    return turn.get("role") in ("assistant", "tool", "function", None)


def with_reason(decision: Any, more: str) -> Any:
    """`decision` with `more` behind its reason."""
    return decision._replace(reason=", ".join(filter(None, (decision.reason, more))))


def first_of(model: Any, chain: tuple[Any, ...]) -> tuple[Any, ...]:
    """`chain` with `model` first."""
    return (model, *(other for other in chain if other != model))


def session_of(environ: Mapping[str, Any]) -> str:
    """What the client itself calls its session, or ''."""
    found = [environ.get(key, "")[:200] for key in SESSION_KEYS]
    return "\n".join(found) if any(found) else ""
