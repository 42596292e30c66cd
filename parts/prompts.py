"""What a person said inside a chat request, and the words and shapes of it.

`user_texts` finds the user's texts and strips what clients wrap around them; `tokens_of` makes
words comparable; `signals_of` sees code, formulas and word problems; `Continuations` knows a
follow-up. Pure functions of a text: no state, no categories of a table.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

# --- the text -----------------------------------------------------------------------------------

# OpenClaw puts the new message of a group chat after its history; the last such line counts.
CURRENT = re.compile(r"\[(?:Current message|CURRENT MESSAGE)\b[^\[\]\n]{0,60}\]")
# Sentences of OpenClaw that stand behind its stamp in one line.
STAMPED = (
    "turn was interrupted by a gateway restart",
    "produce a user-visible answer",
    "previous model attempt failed or timed out",
    "A scheduled reminder has been triggered",
    "The previous assistant turn only described the plan",
    "Another language model started to solve this problem",
    "Summarize the task tool output above",
)
HEADED = r"^(?:\[\w{3} \d{4}-\d\d-\d\d [^\]\n]{0,30}\] ?)?"
# What clients put around a person's words: (client, mark, pattern). The mark is searched for first.
# Every block may be unclosed: `|\Z` also keeps the search linear, for nothing is scanned twice. A
# message that holds nothing else ("continue where you left off") is passed by: the person's words
# stand in one before it.
WRAPPINGS = tuple(
    (mark, re.compile(pattern.replace("^", HEADED, 1) if mark in STAMPED else pattern, re.S | re.M))
    for client, mark, pattern in (
        (
            "OpenClaw",
            "<<<BEGIN_OPENCLAW",
            r"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>.*?"
            r"(?:<<<END_OPENCLAW_INTERNAL_CONTEXT>>>|\Z)",
        ),
        (
            "OpenClaw",
            "<active_memory_plugin>",
            r"(?:^Context:\s*?\n)?<active_memory_plugin>.*?"
            r"(?:</active_memory_plugin>|\Z)",
        ),
        ("OpenClaw", "Untrusted context (", r"^Untrusted context \(metadata.*\Z"),
        (
            "OpenClaw",
            "(untrusted",
            r"^[^\n(]{0,80}\(untrusted[^\n]{0,60}\):\s*```json.*?(?:\n[ \t]*```|\Z)",
        ),
        (
            "OpenClaw",
            "⟦openclaw:ctx⟧",
            r"^[^\n⟦]{0,120}⟦openclaw:ctx⟧\s*?\n"
            r"(?:\s*```json.*?(?:\n[ \t]*```|\Z)|.*?(?:\n\s*?\n|\Z))",
        ),
        ("OpenClaw", "[Replying to", r"^\[Replying to .*?(?:\[/Replying\]|\Z)"),
        ("OpenClaw", "Queued #", r"^---\nQueued #\d+[^\n]*"),
        (
            "OpenClaw",
            "turn was interrupted by a gateway restart",
            r"^\[System\][^\n]{0,40}turn was interrupted.*?"
            r"(?:last message from the user before the interruption was:|\Z)",
        ),
        (
            "OpenClaw",
            "produce a user-visible answer",
            r"^The previous (?:attempt|assistant turn) [^\n]{0,80}did not produce a user-visible"
            r" answer\.[^\n]*",
        ),
        (
            "OpenClaw",
            "previous model attempt failed or timed out",
            r"^(?:\[Retry after the|Continue where you left off\. The|The) previous model attempt "
            r"failed or timed out[.\]][^\n]*",
        ),
        (
            "OpenClaw",
            "A scheduled reminder has been triggered",
            r"^A scheduled reminder has been triggered\.[^\n]*?(?:content is:|$)|"
            r"^(?:Please relay this reminder|Handle this reminder)[^\n]*",
        ),
        (
            "OpenClaw",
            "[Inter-session message]",
            r"^\[Inter-session message\][^\n]*(?:\n(?:Treat it as|This content was)[^\n]*)*",
        ),
        *(
            ("OpenClaw", line, rf"^{re.escape(line)}[^\n]*")
            for line in (
                "Runtime: agent=",
                "System: [20",
                "System (untrusted): [20",
                "[message_id:",
                "[from:",
                "[media attached",
                "[Queued messages",
                "<media:",
                "Current time: ",
                "Return your summary as plain text",
                "Return your response as plain text",
                "The previous assistant turn only described the plan",
                "Please continue where you left off",
            )
        ),
        *(
            ("Claude Code", f"<{tag}>", rf"<{tag}>.*?(?:</{tag}>|\Z)")
            for tag in (
                "system-reminder",
                "local-command-caveat",
                "local-command-stdout",
                "local-command-stderr",
                "command-name",
                "command-message",
                "bash-input",
                "bash-stdout",
                "bash-stderr",
            )
        ),
        ("Claude Code", "<command-args>", r"</?command-args>"),
        (
            "Claude Code",
            "had no visible output",
            r"\[Your previous response had no visible output\.[^\]]*\]?",
        ),
        ("Claude Code", "[Request interrupted", r"\[Request interrupted by user[^\]\n]*\]"),
        (
            "Claude Code",
            "This session is being continued",
            r"^This session is being continued from a previous conversation[^\n]*",
        ),
        (
            "Codex",
            "# AGENTS.md instructions for",
            r"^# AGENTS\.md instructions for .*?(?:</INSTRUCTIONS>|\Z)",
        ),
        *(
            ("Codex", f"<{tag}>", rf"<{tag}>.*?(?:</{tag}>|\Z)")
            for tag in ("environment_context", "user_instructions", "turn_aborted")
        ),
        (
            "Codex",
            "Another language model started to solve this problem",
            r"^Another language model started to solve this problem.*\Z",
        ),
        (
            "opencode",
            "Summarize the task tool output above",
            r"^Summarize the task tool output above and continue with your task\.?",
        ),
        (
            "Open WebUI",
            "Respond to the user query using the provided context",
            r"^### Task:\s*\nRespond to the user query using the provided context.*?</context>",
        ),
        ("Open WebUI", "<user_query>", r"</?user_query>"),
        (
            "LangChain",
            "output should be formatted as a JSON instance",
            r"The output should be formatted as a JSON instance.*?"
            r"(?:Here is the output schema:\s*```.*?(?:```|\Z)|\Z)",
        ),
        (
            "LangChain",
            "output should be a markdown code snippet",
            r"The output should be a markdown code snippet formatted in the following schema"
            r".*?(?:^```json.*?(?:```|\Z)|\Z)",
        ),
        (
            "LangChain",
            "response should be a list of comma separated values",
            r"Your response should be a list of comma separated values[^\n]*",
        ),
    )
)
# OpenClaw asks again after a failure: what nobody answered, under one of these marks, then perhaps
# the new words.
AGAIN = re.compile(
    r"\[(?:Queued user message from a previous active turn|Earlier unanswered user message)"
    r"[^\]\n]*\]\s*"
)
# What an agent asks of itself: (what, mark, pattern that the cleaned text begins with).
MACHINE = tuple(
    (what, mark, re.compile(pattern, re.S | re.M))
    for what, mark, pattern in (
        ("heartbeat", "HEARTBEAT", r"Read HEARTBEAT\.md\b|.{0,2000}\breply HEARTBEAT_OK\b"),
        ("memory", "Pre-compaction memory flush", r"Pre-compaction memory flush"),
        (
            "compaction",
            "onversation",  # OpenClaw, opencode, Claude Code, Cline
            r"(?:(?><(conversation|previous-summary)>.*?</\1>)\s*)*+"
            r"The (?:messages|conversation) above (?:are|is) (?:a|NEW) conversation|"
            r"Provide a detailed (?:prompt for continuing|summary of) our conversation|"
            r"Your task is to create a detailed summary of the conversation so far",
        ),
        ("compaction", "This is the PREFIX of a turn", r"(?:<.*>\s*)?This is the PREFIX of a turn"),
        (
            "compaction",
            "Respond with TEXT ONLY",  # Claude Code, behind the person's last words
            r".*?^CRITICAL: Respond with TEXT ONLY\. Do NOT call any tools",
        ),
        (
            "compaction",
            "CONTEXT CHECKPOINT COMPACTION",  # Codex
            r"You are performing a CONTEXT CHECKPOINT COMPACTION",
        ),
        ("title", "</session>", r"<session>.*</session>\s*Write the title"),  # Claude Code
        ("title", "title", r"Please write a \d+-\d+ word title for the following conversation"),
        ("title", "task title", r"Generate a concise, single-line task title"),  # Codex
        ("title", "Generate a title", r"Generate a title for this conversation:"),  # opencode
        (
            "title",
            "slug",  # OpenClaw
            r"Based on this conversation, generate a short \d+-\d+ word (?:filename )?slug",
        ),
        ("suggestion", "[SUGGESTION MODE:", r"\[SUGGESTION MODE:"),  # Claude Code
        (
            "chat's own task",
            "### Task:",  # Open WebUI: title, tags, follow-ups, search queries, completion
            r"### Task:\s*\n.*?(?:<chat_history>|### Chat History|<text>|chat history)",
        ),
        (
            "new session",
            "A new session was started",
            r"A new session was started via /new or /reset",
        ),
        ("agents' talk", "Agent-to-agent", r"Agent-to-agent (?:announce|reply) step"),
    )
)
# `[Sun 2026-11-22 20:58 UTC] `, `[Telegram Bob id:1 +5m] Bob: `, `[WhatsApp +1555] `: a date with
# a time, an elapsed time, or a channel's name; `[1,2,3]` and `[ERROR]` are the user's own.
STAMP = re.compile(
    r"\s*\[(?=[^\]\n]{0,300}(?:\d{4}-\d\d-\d\d[ T]\d\d:\d\d|\s\+(?:\d+[smhdwy]|just now)\b)"
    r"|(?:whatsapp|telegram|discord|slack|imessage|webchat|google ?chat|msteams)\s"
    r"|cron:)[^\]\n]{0,500}\]"
    r"[ \t]*",
    re.I,
)


def clean(text: str) -> str:
    """What the user said in `text`, without what a client put around it; may be empty."""
    return _cleaned(text) if len(text) <= USUAL else _cleaned.__wrapped__(text)


USUAL = 32_768  # characters; each step of a turn asks about the same text, twice


@lru_cache(maxsize=128)
def _cleaned(text: str) -> str:
    again = "previous active turn" in text or "Earlier unanswered user" in text
    signs = {sign for sign in "<[(#" if sign in text}
    for mark, pattern in WRAPPINGS:
        if (mark[0] in signs or mark[0] not in "<[(#") and mark in text:
            text = pattern.sub("", text)
    if again:
        text = newest_of(AGAIN.sub("", text))
    if "[" in text:
        *_, text = CURRENT.split(text)
        text = strip_stamps(text)
    return text.strip()


def newest_of(text: str) -> str:
    """The new words behind those that nobody answered; the same words twice are said once."""
    heads = islice(re.finditer(r"^\[", text, re.M), 100)
    stamped = [head.start() for head in heads if STAMP.match(text, head.start())]
    if stamped and text[: stamped[-1]].strip():
        return text[stamped[-1] :]
    text = text.strip()
    before, behind = text[: len(text) // 2].strip(), text[len(text) // 2 :].strip()
    return behind if before == behind else text


def machine_call(text: str, before: str = "") -> str:
    """What an agent asks of itself in the cleaned `text` (title, heartbeat); '' for a person's.

    `before` is the text before it: opencode asks for a title, then repeats what was said.
    """
    if what := _machine(text) if len(text) <= USUAL else _machine.__wrapped__(text):
        return what
    return "title" if before == "Generate a title for this conversation:" else ""


@lru_cache(maxsize=128)
def _machine(text: str) -> str:
    found = (what for what, mark, pattern in MACHINE if mark in text and pattern.match(text))
    return next(found, "")


def strip_stamps(text: str) -> str:
    """`text` without the stamps at its head; a sender's name stays, since it says nothing."""
    for _ in range(3):  # a channel's stamp may stand behind a stamp of the gateway
        stamp = STAMP.match(text)
        if not stamp:
            break
        text = text[stamp.end() :]
    return text


def user_texts(messages: Any) -> Iterator[str]:
    """The user's texts, newest first, cleaned; empty ones and what is no text are skipped."""
    for message in reversed(messages) if isinstance(messages, list) else ():
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, dict))
        text = clean("\n".join(text for text in texts if isinstance(text, str)))
        if text:
            yield text


# --- words --------------------------------------------------------------------------------------

HEAD, TAIL = 1200, 500  # characters: the task stands at one end; the middle is material
MOST_WORDS = 280  # prose has fewer in that many characters
ACCENTS = re.compile("[\u0300-\u036f]+")
LIGATURES = str.maketrans({"œ": "oe", "æ": "ae", "ß": "ss"})
# c++ and c# and .net are words; a Chinese or Japanese character is one, for no spaces part them.
TOKEN = re.compile(
    r"[^\W\d_](?:\+\+|#)(?!\w)|(?<!\w)\.[a-z]\w*|[\u3040-\u30ff\u4e00-\u9fff]"
    r"|[^\W\u3040-\u30ff\u4e00-\u9fff]+"
)
# Plain ASCII without those three is parted eight times as quickly.
NOT_PLAIN = re.compile(r"[+#]|\.(?<!\w\.)[a-z]")
BLANKS = str.maketrans({chr(n): " " for n in range(128) if not (chr(n).isalnum() or n == 95)})


def cap(text: str) -> str:
    """`text`, or its head and tail: what follows costs time by the character."""
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]}\n{text[-TAIL:]}"


@lru_cache(maxsize=256)  # a request asks three times for its text's, or its beginning's
def tokens_of(text: str) -> tuple[str, ...]:
    """The words of `text`, case and accents folded; apostrophes and hyphens part words."""
    text = text.lower()
    if not text.isascii():
        folded = unicodedata.normalize("NFD", text.translate(LIGATURES))
        text = ACCENTS.sub("", folded)
    plain = text.isascii() and not NOT_PLAIN.search(text)
    words = tuple(text.translate(BLANKS).split() if plain else TOKEN.findall(text))
    return words if len(words) <= MOST_WORDS else words[: MOST_WORDS - 100] + words[-100:]


ENTRY = re.compile(r"(?P<words>.*?)(?P<prefix>\*?)(?:\^(?P<weight>\d+(?:\.\d+)?))?", re.S)


LONGEST_PHRASE = 6  # words; of a longer entry the first six decide, which bounds a match's time


def is_entry(entry: str) -> bool:
    """True when `parse_entry` can read it; a weight alone is no word."""
    parts = ENTRY.fullmatch(entry.strip())
    return bool(parts and tokens_of(parts["words"][:100]))


@lru_cache(maxsize=16_384)  # an edit of the file reads the built-in ones again
def parse_entry(entry: str) -> tuple[tuple[str, ...], bool, float]:
    """(words, is a prefix, weight) of `two words`, `word*^2`; ValueError when it has no word."""
    parts = ENTRY.fullmatch(entry.strip())
    words = tokens_of(cap(parts["words"]))[:LONGEST_PHRASE] if parts else ()
    if not parts or not words:
        raise ValueError(f"{entry!r} holds no letter or digit")
    return words, bool(parts["prefix"]), float(parts["weight"] or 1)


# --- structure ----------------------------------------------------------------------------------

Hit = tuple[str, str, float]  # category, entry or signal, weight

# Plain prose shows none of these and is spared the search for code; without a digit, for sums.
# Each branch begins with characters that can be searched for, not with a class such as \w.
SYMBOL = re.compile(
    r"[`(){}<>=;\\$/_\[\]|#~@]|\.(?<=\w\.)\w|[A-Z](?:(?<=[a-z][A-Z])|[A-Z]{3}|(?<=E)rror)"
)
DIGIT = re.compile(r"[0-9\\²³∫√∑≤≥≠∈∀∃π∞]")
SHAPES = tuple(
    (category, f"({name})", weight, re.compile(pattern, re.M))
    for category, name, weight, pattern in (
        ("code", "code block", 3, r"```(?!json)|~~~"),
        (
            "code",
            "traceback",
            4,
            r"Traceback \(most recent|^ {2,8}at [\w.$]{1,80}\(|"
            r"\b[A-Z]\w{0,40}(?:Error|Exception):|core dumped|npm ERR!",
        ),
        (
            "code",
            "definition",
            5,
            r"^[ \t]{0,12}(?:(?:async|export|public|private|static|pub) \w|"
            r"def \w+\(|class \w+[:({]|function\b *\w*\(|func \w+\(|fn \w+[(<]|"
            r"import [\w.{*]+(?:;| from | as |$)|from [\w.]+ import|#include\b|"
            r"using [\w.]+;|package \w+;?$|<\?php|#!/|(?:const|let|var) \w+ =)",
        ),
        (
            "code",
            "sql",
            4,
            r"\bSELECT\b[^;]{1,100}\bFROM\b|\b(?:INSERT INTO|CREATE TABLE|"
            r"UPDATE \w+ SET|DELETE FROM|ALTER TABLE)\b",
        ),
        (
            "code",
            "markup",
            3,
            r"</?(?:div|p|span|html|body|head|script|style|table|t[rdh]|ul|li|a|"
            r"h[1-6]|input|form|button|img|br|svg|meta|link)\b[^<>\n]{0,200}>",
        ),
        ("code", "call", 2, r"\b[a-z]++(?:_\w++|[A-Z]\w*+|\.\w++)\(|\b[a-z]\w{2,40}\(\)"),
        (
            "code",
            "file",
            2,
            r"\w\.(?:py|jsx?|tsx?|java|cpp|hpp?|cs|rb|go|rs|php|sh|sql|html?|css|scss|"
            r"ya?ml|toml|ipynb|kt|swift|vue|ps1|env|conf)\b",
        ),
        (
            "code",
            "shell",
            3,
            r"^[ \t]{0,8}(?:\$ |(?:sudo|git|npm|npx|pip3?|docker|kubectl|curl|ls|cd|"
            r"chmod|grep|apt|brew|cargo|ssh|yarn|systemctl) +[-\w./])",
        ),
        (
            "code",
            "operators",
            2,
            r"[=!]==|=>|\w->\w|\) ->|::|&&|\|\||\+=|\);|^[ \t]{0,12}\}|\) ?\{$|"
            r":\n {2,8}\S|\[\w+\] ?=",
        ),
        ("reasoning", "choices", 2, r"^\(?[A-D][).] [^\n]*\n\(?[B-D][).] |\bOptions ?:"),
        (
            "tools",
            "path or address",
            2,
            r"https?://|\w@\w|"
            r"(?<![\w/<.:)])[~.]{0,2}/\w[\w./-]*+(?!>)|\b[A-Z]:\\\w",
        ),
        (
            "tools",
            "document",
            2,
            r"\w\.(?:txt|md|csv|pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|mp[34]|zip|"
            r"log|ics)\b",
        ),
    )
)
FORMULA = re.compile(
    r"\\(?:frac|int|sum|sqrt|lim|alpha|pi|theta|cdot|leq?|geq?)\b|[∫√∑≤≥≠∈∀∃π∞]|"
    r"\b[fgh]\([a-z\d]\)|\d ?(?:[*×÷^] ?\d|[-+] ?\d{1,6} ?=|% (?:of|off|de|du)\b)|"
    r"\b\d{0,6}[a-z] ?(?:\^ ?\d|[²³]|[=<>] ?-?\d|[-+] ?\d{1,6}[a-z]? ?[-+=<>)])"
)
WHEN = re.compile(
    r"\b\d\d? ?[ap]\.?m\b|\b\d\d?[:h]\d\d\b|\b\d\d? ?h\b|"
    r"\b20\d\d-\d\d-\d\d|\b\d\d?/\d\d?/(?:20)?\d\d\b",
    re.I,
)
NUMBER = re.compile(r"(?<![\w:/.-])[$€£]?\d[\d.,]*")
# What a record is called by ("HX-88213", "n° 45", "#31"); a name inside a sentence ("to Lyon").
IDENTIFIER = re.compile(r"#\d|n° ?\d|\b(?:[A-Z]{1,5}-?\d\d|(?<![.,$€£])\d{5})")
NAME = re.compile(r"[a-z\d,] [A-Z][a-z]")


def signals_of(text: str) -> list[Hit]:
    """(category, name, weight) of each structural signal in the capped `text`."""
    found: list[Hit] = []
    if SYMBOL.search(text):
        found += (shape[:3] for shape in SHAPES if shape[3].search(text))
    if len(text) < 200 and NAME.search(text):  # in a longer text there is always one
        found.append(("tools", "(a name)", 0.4))
    if DIGIT.search(text):
        found += [("reasoning", "(formula)", 2.0)] * bool(FORMULA.search(text))
        found += [("tools", "(date or time)", 1.0)] * bool(WHEN.search(text))
        found += [("tools", "(an identifier)", 1.0)] * bool(IDENTIFIER.search(text))
        numbers = len(NUMBER.findall(text[:HEAD]))
        if numbers > 1 and ("?" in text or len(text) > 80):  # numbers in prose: a word problem
            found.append(("reasoning", "(numbers)", 1.5 if numbers == 2 else 2.5))
    return found


# Verbs that open an order about the world, too common for keywords: for when all else is silent.
ORDER = re.compile(
    r"(?:(?:please|can you|can u|could you|would you|will you|i (?:want|need|d like|would like) to|"
    r"peux tu|tu peux|pouvez vous|je (?:veux|voudrais)|stp) )*"
    r"(?:set|send|add|put|start|stop|cancel|delete|move|order|update|change|check|open|close|mark|"
    r"print|mute|post|push|pull|call|track|increase|lower|rent|book|grab|fetch|retrieve|text|log|"
    r"tell (?!me)|copy|archive|assign|mets|remets|ajoute|envoie|renvoie|enleve|retire|annule|"
    r"ouvre|ferme|verifie|modifie|passe|bloque|note|marque|lance|relance|arrete|coupe|retrouve|"
    r"programme)\b"
)


def is_order(opening: str) -> bool:
    """Whether a text opens like an order about the world: "can you book", "je voudrais ajouter"."""
    return bool(ORDER.match(opening))


# "How do I cancel a subscription politely?" wants words, however much it sounds like an order.
HOW_TO = re.compile(
    r"(?:(?:please|hi|hello|so|can you|could you|tell me|explain|show me|peux tu|dis moi|me dire)"
    r" )*"
    r"(?:how (?:do|can|could|should|would|might) (?:i|you|we|one|people) |how to |what should i |"
    r"what (?:can|could) i |que (?:faire|cuisiner|dire|puis je) |"
    r"comment (?:(?:on|puis je|peut on|faire pour|dois je|se|bien|ne pas|s|l|les?|la|un|une) )*"
    r"\w+(?:er|ir|re)\b|wie (?:kann|bekomme|mache|soll|schreibe) (?:ich|man) )"
)
# A person's own things stay a matter of tools: "how do I get home", "what should I wear today".
NOW = frozenset(
    "today tonight tomorrow now currently weather traffic route home aujourd ce demain meteo "
    "maintenant moment trafic heute morgen jetzt wetter".split()
)


def is_how_to(opening: str, words: Sequence[str]) -> bool:
    """Whether a text asks how something is done, rather than to have it done."""
    return bool(HOW_TO.match(opening)) and NOW.isdisjoint(words)


# A question about the world as it is in books. What is on now, or is the person's, is another.
FACT = re.compile(
    r"(?:who (?:was|were|wrote|won|played|painted|sang|sings|directed|discovered|invented|founded|"
    r"designed|composed|built|created|said|scored|became|married|killed|is the|are the|first)|"
    r"(?:in )?(?:which|what) (?:\w+ ){1,4}(?:won|wrote|sang|plays?|played|features?|released|flows|"
    r"has|had|uses?|makes|made|directed|discovered|invented|painted|composed|founded|was|were|did|"
    r"starred|hosted|is known)|what (?:is|was) the (?:name|capital|currency|first|highest|largest|"
    r"longest|smallest|chemical)|what does \w+ (?:stand for|mean)|"
    r"qui (?:a|fut|etait|est le|est la|jouait|chantait|chante) |en quelle annee|dans quelle? \w+ "
    r"(?:se|est|fut|a)|quelle? (?:\w+ ){1,3}(?:a|fut|etait|jouait|jouent|traverse)|"
    r"quelle? est l[ae]? ?(?:capitale|monnaie|plus|nom)|"
    r"wer (?:war|schrieb|malte|erfand|hat)|wann (?:war|wurde|fiel)|quien \w+|chi (?:ha|era|fu)) "
)
LATELY = NOW | frozenset(
    "my our me mine us last latest next score playing open left right live news yesterday here "
    "this heure heures time temps cours prix price taux train trains vol flight bus tram score "
    "match numero number mon ma mes nos moi dernier derniere hier prochain prochaine soir nuit "
    "matin gestern mein meine ayer mi mis ieri mio mia".split()
)

# A text to be written, whatever it is about; but no program, and no message to be sent.
WRITING = re.compile(
    r"(?:\w+ ){0,3}?(?:write|draft|compose|create|come up with|make up|invent|pen|"
    r"ecris|ecrivez|ecrire|redige|redigez|rediger|compose|composez|invente|inventez|imagine|"
    r"schreibe?|verfasse|dichte|escribe|redacta|inventa|scrivi|componi) "
    r"(?:(?!functions?\b|scripts?\b|programs?\b|code\b|class\b|classes?\b|quer(?:y|ies)\b|tests?\b|"
    r"regex\b|macros?\b|apps?\b|api\b|bot\b|page\b|fonctions?\b|programmes?\b|requetes?\b|sql\b|"
    r"python\b|javascript\b|json\b|css\b|html\b|component\b|that\b|which\b|qui\b|que\b|di\b|"
    r"to\b|die\b|der\b|files?\b|folder\b|event\b|ticket\b|issue\b|fichiers?\b|dossier\b)"
    r"\w+ ){0,6}?"
    r"(?:poems?|stor(?:y|ies)|letters?|e ?mails?|speech|speeches|posts?|essays?|songs?|raps?|"
    r"haikus?|limericks?|invitations?|toasts?|adverts?|ads?|announcements?|press release|"
    r"descriptions?|taglines?|slogans?|dialogues?|scenes?|cards?|articles?|reviews?|bios?|biography|captions?|"
    r"newsletters?|notes?|legends?|fables?|menus?|jokes?|lyrics|headlines?|introductions?|"
    r"paragraphs?|sonnets?|plot|monologues?|greetings?|"
    r"poemes?|histoires?|lettres?|courriels?|mots?|discours|contes?|chansons?|comptines?|annonces?|"
    r"communiques?|biographies?|legendes?|critiques?|dialogues?|cartes?|textes?|paragraphes?|"
    r"nouvelle|blagues?|resumes? de|titres?|"
    r"gedicht\w*|geschichte|brief|einladung|rede|lied|marchen|poema|cuento|carta|cancion|"
    r"poesia|lettera|biglietto|storia|canzone) "
    r"(?!(?:queue|parser|validator|validation|handler|template|api|server|bot|endpoint|class|"
    r"function|module|schema|component|generator|client|request|route|app|to you|list) )"
)
# A premise with numbers and a question about it: a clock or a thermostat in it is nobody's.
ASKED = re.compile(
    r"\b(?:how (?:many|much|long|far|old|fast|tall|often)|what (?:time|day|is the (?:chance|"
    r"probability|price|cost|total))|when (?:do|does|will|did|am) (?:they|it|he|she|i|the)|"
    r"which day|who is|combien|quel(?:le)? (?:jour|heure|age|est le|est la|etait)|quels ages|quand|"
    r"a quelle|wie (?:viele?|lange|alt|weit|spat)|welcher tag|wann|cuant[oa]s?|que dia|quant[oaie]|"
    r"che giorno)\b"
)
COUNT = re.compile(
    r"\b(?:\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|hundred|half|twice|double|noon|"
    r"every|each|deux|trois|quatre|cinq|sept|huit|neuf|dix|douze|cent|demie?|midi|chaque|"
    r"toutes les|zwei|drei|vier|funf|sechs|zehn|hundert|dos|tres|cuatro|"
    r"cinco|seis|diez|cien|due|tre|quattro|"
    r"cinque|sei|dieci|cento)\b"
)
ORDERED = re.compile(
    r"\b(?:remind|set (?:a|an|the|my)|book|please|rappelle|mets|regle|reserve|erinnere)\b"
)
SENTENCE = re.compile(r"[.!?;]\s+(?=\S)|,\s+(?=(?:how|what|when|combien|quel|quand)\b)", re.I)


def shapes_of(text: str, opening: str, words: Sequence[str]) -> list[Hit]:
    """The kinds of tasks that show in how a text opens and ends, whatever words it holds."""
    if WRITING.match(opening):
        return [("conversation", "(a text to write)", 3.5)]
    if FACT.match(opening) and len(words) < 25 and LATELY.isdisjoint(words):
        return [("conversation", "(a fact)", 1.5)]
    if "?" not in text[-200:] or len(words) < 9 or len(words) > 150:
        return []
    *_, last = SENTENCE.split(text.rstrip()[-400:])
    asked = " ".join(tokens_of(last))
    whole = " ".join(words)
    if ASKED.search(asked) and not ORDERED.search(whole) and len(last) < len(text) - 12:
        premise = COUNT.findall(whole)
        return [("reasoning", "(word problem)", 3.0)] if len(premise) > 1 else []
    return []


TASK_WORDS = 24  # a request before or behind pasted material is shorter


# What announces a text that follows, or stands above.
CUES = frozenset(
    "translate rewrite rephrase paraphrase summarize summarise summary classify correct proofread "
    "shorten extract sort label group complete continue edit improve following this these text "
    "sentence sentences paragraph message mail email article review words notes announcement "
    "says opposite below above grammar tone headline traduis traduisez traduire reecris reformule "
    "resume resumez classe corrige corrigez raccourcis extrais trie range separe complete "
    "continue relis transforme rends suivant suivante suivants ce cet cette texte phrase phrases "
    "paragraphe courriel avis mots annonce fautes contraire passe ton dessous dessus "
    "ubersetze korrigiere fasse kurze satz text folgende corrige traduce resume frase siguiente "
    "traduci correggi riassumi frase seguente".split()
)


def asked_in(text: str, words: Sequence[str]) -> tuple[int, int]:
    """How many words at the head and at the tail say what is wanted; between them is material.

    "Translate this: ...", a question above or below a pasted mail; all words if none is pasted.
    """
    everything = len(words), 0
    if len(words) < 8 or ("\n" not in text and ":" not in text):
        return everything
    blocks = [block for block in re.split(r"\n\s*\n", text.strip()) if block.strip()]
    if len(blocks) > 1:
        first, last = len(tokens_of(blocks[0])), len(tokens_of(blocks[-1]))
        head = first if 3 < first <= TASK_WORDS else 0
        asks = last <= TASK_WORDS and (not head or "?" in blocks[-1])
        tail = last if asks else 0
        if (head or tail) and head + tail < len(words) - 6:
            return head, tail
    head_text, colon, _ = blocks[0].partition(":") if blocks else ("", "", "")
    head = len(tokens_of(head_text)) if colon and "//" not in blocks[0][: len(head_text) + 4] else 0
    if 2 <= head <= TASK_WORDS and len(words) - head >= 4 and not CUES.isdisjoint(words[:head]):
        return head, 0
    return everything


LETTERS = re.compile(r"[^\W\d_]+")


def accented(text: str) -> frozenset[str]:
    """The words of `text`, folded, that had accents: `raté` is not the English `rate`."""
    if text.isascii():
        return frozenset()
    words = [word for word in LETTERS.findall(text.lower()) if not word.isascii()]
    return frozenset(ACCENTS.sub("", unicodedata.normalize("NFD", " ".join(words))).split())


MATERIAL = 0.15  # what a word counts that stands in what was pasted
CALM = {
    "(a text to write)": 0.4,
    "(word problem)": 0.3,
    "(a fact)": 0.3,
}  # what is left beside it of tools' words
A_NAME = "(a name)"


class Reading(NamedTuple):
    """A text's words and structural signals, and how much a keyword counts at each place."""

    words: tuple[str, ...]
    signals: list[Hit]
    asked: tuple[int, int]  # words at the head and at the tail that say what is wanted
    calm: float  # for words of tools
    accented: frozenset[str]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The words that say what is wanted, without pasted material."""
        head, tail = self.asked
        return (
            self.words[:head] + self.words[len(self.words) - tail :] if tail else self.words[:head]
        )

    def share(self, category: str, at: int) -> float:
        """What part of its weight a keyword of `category` has that begins at the word `at`."""
        behind = len(self.words) - at
        if at >= self.asked[0] and behind > self.asked[1]:
            pasted = category == "tools" and len(self.words) - sum(self.asked) > 25
            share = 0.0 if pasted else MATERIAL  # a mail's words ask nobody here for anything
        else:
            share = 1.0 if at < 60 or behind < 40 else 0.5  # the middle of a long text is material
        return share * self.calm if category == "tools" else share

    def is_foreign(self, entry: str, at: int) -> bool:
        """Whether a plain `entry` met a word with an accent, which is another word."""
        return self.words[at] in self.accented and entry.isascii() and entry.isalpha()


# Courtesies around a request say nothing of it; alone they are small talk.
HELLO = re.compile(
    r"\s*(?:hi|hello|hey|hiya|dear \w+|good (?:morning|afternoon|evening)|greetings|bonjour|salut|"
    r"bonsoir|coucou|hallo|guten (?:morgen|tag|abend)|hola|buenas|ciao|buongiorno)"
    r"(?: (?:there|all|everyone|team|again|toi|tous|à tous|zusammen))?\s*[!,.:;]+\s*(?=\S.{11})",
    re.I | re.S,
)
THANKS = re.compile(
    r"[\s,;]*(?:(?:many )?thanks|thank you|thx|cheers|merci|danke|gracias|grazie)"
    r"(?: (?:in advance|a lot|so much|very much|again|you|beaucoup|bien|d['’]avance|par avance|"
    r"im voraus|por adelantado|in anticipo))*[\s!.:)]*\Z",
    re.I,
)


def bare(text: str) -> str:
    """`text` without a greeting before the request and thanks behind it."""
    hello = HELLO.match(text)
    if hello:
        text = text[hello.end() :]
    thanks = THANKS.search(text[-60:])
    if thanks and len(text) - (len(thanks[0])) > 11:
        text = text[: -len(thanks[0])]
    return text


def read(text: str) -> Reading:
    """What there is to know of a capped `text` before its words are looked up."""
    text = bare(text)
    words, how_to = tokens_of(text), False
    opening = " ".join(words[:16]) + " "
    shapes = shapes_of(text, opening, words)
    calm = min((CALM[name] for _, name, _ in shapes), default=1.0)
    if not shapes and (how_to := is_how_to(opening, words)):
        calm = 0.3
    asked = asked_in(text, words)
    weaker = calm * (MATERIAL if sum(asked) < len(words) else 1.0)
    signals = shapes + [
        (name, signal, weight * weaker if name == "tools" else weight)
        for name, signal, weight in signals_of(text)
    ]
    if not shapes and not how_to and is_order(opening):
        signals.append(("tools", "(an order)", 1.0))
    return Reading(words, signals, asked, calm, accented(text))


def without_lone_name(hits: list[Hit]) -> list[Hit]:
    """`hits` without the signal of a name when it is the only one of tools: it decides nothing."""
    others = any(name == "tools" and entry != A_NAME for name, entry, _ in hits)
    return hits if others else [hit for hit in hits if hit[1] != A_NAME]


# --- follow-ups ---------------------------------------------------------------------------------

LOOK_BACK = 12  # earlier texts read for a follow-up; a chat of nothing but "ok" must not cost more
POINTERS = frozenset("it that this these them its same again instead ca cela celui celle".split())
FILLERS = frozenset(
    "a an the of to my your on with for me us please can could would you just so "
    "le la les l un une des du de d au aux mon ton moi me tu vous stp svp".split()
)
SURE = 2.0  # what a short text that points back ("test it") must score to open a matter of its own


class Continuations:
    """The words that carry on with what was said before ("ok", "et en", "make it")."""

    def __init__(self, entries: Iterable[str]):
        weights = {words: weight for words, _, weight in map(parse_entry, entries)}
        self._grams = {words for words, weight in weights.items() if weight}  # `ok^0` mutes
        self._longest = max(map(len, self._grams), default=0)
        self._firsts = FILLERS.union(gram[0] for gram in self._grams)

    def covers(self, text: str) -> bool:
        """Whether `text` is a follow-up: these words only, or behind one hardly any other."""
        words = tokens_of(text[:200])
        if not words or len(words) > 12 or not (words[0] in self._firsts or words[0].isdigit()):
            return False
        at, opener, rest = 0, 0, 0
        while at < len(words):
            sizes = (n for n in range(self._longest, 0, -1) if words[at : at + n] in self._grams)
            size = next(sizes, 0)
            opener = opener or (size if at == 0 else 0)
            rest += not size and not words[at].isdigit() and words[at] not in FILLERS
            at += size or 1
        return rest <= min(opener, 2)  # "and tomorrow?", "et en Python ?", "now for 7 days"


def points_back(text: str, score: float) -> bool:
    """Whether a short `text` hardly scores or speaks of what was said ("can you test it?")."""
    words = tokens_of(text[:200])
    return len(words) <= 7 and score < (1 if POINTERS.isdisjoint(words) else SURE)
