"""JSON as text: where its members stand, and one of them set with all other bytes as they were."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

LINE_WIDTH = 100
_OPEN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\})?")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")


class Member(NamedTuple):
    """Where one member of a JSON object stands in its text."""

    key: str
    start: int  # of the key
    value: int  # start of the value
    end: int  # of the value


def scan_object(
    text: str, at: int = 0, decoder: Any = None
) -> tuple[dict[str, Any], list[Member], int]:
    """The JSON object at `at`: its value, where its members stand, and its end.

    Raises ValueError like json.loads. Positions let a caller replace one member and leave every
    other byte as it is: big integers, floats, key order and layout survive.
    """
    opened = _OPEN.match(text, at)
    if not opened:
        raise _expecting("'{'", text, at)
    scan = (decoder or DECODER).scan_once
    values: dict[str, Any] = {}
    members: list[Member] = []
    if opened[1]:
        return values, members, opened.end(1)
    at = opened.end()
    while True:
        if text[at : at + 1] != '"':
            raise _expecting("'\"'", text, at)
        start = at
        key, at = json.decoder.scanstring(text, at + 1, True)  # type: ignore[attr-defined]
        colon = _COLON.match(text, at)
        if not colon:
            raise _expecting("':'", text, at)
        try:
            values[key], at = scan(text, colon.end())
        except StopIteration as e:
            raise json.JSONDecodeError("Expecting value", text, e.value) from None
        members.append(Member(key, start, colon.end(), at))
        found = _NEXT.match(text, at)
        if not found:
            raise _expecting("','", text, at)
        if found[1] == "}":
            return values, members, found.end(1)
        at = found.end()


NESTS = (dict, list)  # json makes no others; looking at the type is three times as quick


def depth_of(value: Any) -> int:
    """How deep `value` is nested; looking stops at 100."""
    level, depth = [value], 0
    while level and depth < 100:
        depth, inner = depth + 1, []
        for node in level:
            for v in node.values() if type(node) is dict else node:
                if type(v) in NESTS:
                    inner.append(v)
        level = inner
    return depth


def _expecting(what: str, text: str, at: int) -> json.JSONDecodeError:
    blank = re.compile(r"[ \t\n\r]*").match(text, at)
    return json.JSONDecodeError(f"Expecting {what}", text, blank.end() if blank else at)


def refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is not JSON")


def read_float(text: str) -> float:
    """The number; ValueError when it is beyond all floats, which would make it an infinity."""
    value = float(text)
    if value in (math.inf, -math.inf):
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return value


def read_int(text: str) -> int:
    """The same for a whole number; longer ones are beyond all floats."""
    if len(text) > 300 and math.isinf(float(text)):
        raise ValueError(f"{text[:20]}... is beyond all numbers")
    return int(text)


FINITE: dict[str, Any] = {
    "parse_float": read_float,
    "parse_int": read_int,
    "parse_constant": refuse_constant,
}
CAREFUL: Any = json.JSONDecoder(**FINITE)
# Without `read_int`: 200 KB of small numbers are read in a quarter of the time.
DECODER: Any = json.JSONDecoder(parse_float=read_float, parse_constant=refuse_constant)
_DIGITS = bytes(0x30 if 0x30 <= n <= 0x39 else 0x20 for n in range(256))


def decoder_for(data: bytes) -> Any:
    """What reads `data`: the careful one where 309 digits stand in a row, as they hardly ever do.

    At first every 103rd byte is looked at, 3 of which would be among them: 10 µs for 200 KB.
    """
    some = b"000" in data[::103].translate(_DIGITS)
    return CAREFUL if some and b"0" * 309 in data.translate(_DIGITS) else DECODER


def place_of(text: str, path: tuple[str, ...]) -> int:
    """Where the value at `path` begins, which has to be there."""
    at = 0
    for key in path:
        at = next(m.value for m in scan_object(text, at)[1] if m.key == key)
    return at


def written(text: str, at: int) -> dict[str, str]:
    """The members of the object at `at`, each value as it is written."""
    return {m.key: text[m.value : m.end] for m in scan_object(text, at)[1]}


def set_member(text: str, path: tuple[str, ...], value: Any) -> str:
    """`text` with the member at `path` set (or dropped: None); all other bytes as they were."""
    at = place_of(text, path[:-1])
    _, members, end = scan_object(text, at)
    depth, key = len(path), path[-1]
    found = next((n for n, m in enumerate(members) if m.key == key), None)
    if value is None:
        return text if found is None else _drop_member(text, members, found, end)
    head = f"{'  ' * depth}{json.dumps(key, ensure_ascii=False)}: "
    if found is not None:
        member = members[found]
        same = DECODER.scan_once(text, member.value)[0] == value
        return (
            text
            if same
            else splice(text, member.value, member.end, pretty(value, depth, len(head)))
        )
    line = "\n" + head + pretty(value, depth, len(head))
    if members:
        return splice(text, members[-1].end, members[-1].end, "," + line)
    return splice(text, at + 1, end - 1, line + "\n" + "  " * (depth - 1))


def _drop_member(text: str, members: list[Member], n: int, end: int) -> str:
    if n > 0:  # with the comma before it
        return splice(text, members[n - 1].end, members[n].end, "")
    if len(members) > 1:  # the first of several: with the comma after it
        return splice(text, members[0].start, members[1].start, "")
    return splice(text, members[0].start, end - 1, "")


def splice(text: str, start: int, end: int, new: str) -> str:
    """`text` with `new` instead of what stands from `start` to `end`."""
    return text[:start] + new + text[end:]


def pretty(value: Any, depth: int = 0, used: int = 0) -> str:
    """`value` as JSON in the house form: short values on one line, lists wrapped at 100 columns."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value:
        return flat
    inner = "  " * (depth + 1)
    nests = depth < 2 and any(isinstance(v, dict) for v in values_of(value))
    if used + len(flat) < LINE_WIDTH and not nests:
        return flat
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            head = f"{inner}{json.dumps(key, ensure_ascii=False)}: "
            lines.append(head + pretty(item, depth + 1, len(head)))
        return "{\n" + ",\n".join(lines) + f"\n{inner[2:]}}}"
    lines = [inner]
    for n, item in enumerate(value, 1):
        word = pretty(item, depth + 1, len(inner)) + ("," if n < len(value) else "")
        if len(lines[-1]) + len(word) > LINE_WIDTH and lines[-1] != inner:
            lines[-1] = lines[-1].rstrip()
            lines.append(inner)
        lines[-1] += word + " "
    return "[\n" + "\n".join(line.rstrip() for line in lines) + f"\n{inner[2:]}]"


def values_of(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """The members' values, or the items."""
    return value.values() if type(value) is dict else value


def say_json_error(e: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text, with a word on what people write into it most."""
    if e.doc[e.pos : e.pos + 1] in ("/", "#"):
        return "JSON knows no comments"
    before = e.doc[: e.pos].rstrip()
    at_end = before.endswith(",") and e.doc[e.pos : e.pos + 1] in ("}", "]", "")
    if at_end or "trailing comma" in e.msg:  # Python 3.13 knows it, and points at the comma
        return "a comma too many before the end"
    return e.msg


def parse_loosely(data: bytes | str) -> Any:
    """The JSON value in `data`, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


LARGE = 64 << 10  # bytes of a JSON text; what is made of a larger one is bounded
DENSE = 5  # bytes a brace or bracket in it: `[{},{}]` has more, and would take 27 times its bytes
# What may stand in a JSON string. Possessive: to go back, the matcher would note each character.
_ANYTHING = rb'(?:[^\x00-\x1f"\\]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})++'
IN_STRING = re.compile(_ANYTHING)
# Words and pictures: nobody asks more of them than whether there are any.
_WORDS = re.compile(
    rb'("(?:content|reasoning|reasoning_content|text|thinking|delta|result|url|data|b64_json)"'
    rb'\s*+:\s*+")' + _ANYTHING
)


def parse_lean(data: bytes) -> Any:
    """The JSON value in `data`, or None; a large one without its long words, or within bounds."""
    if len(data) > LARGE:
        data = without_words(data)
        if len(data) > LARGE and DENSE * (data.count(b"{") + data.count(b"[")) > len(data):
            return None
    return parse_loosely(data)


def without_words(data: bytes) -> bytes:
    """`data` with dots for each long text that nobody asks for; b"" when it is no UTF-8.

    As a str, one that holds a single emoji takes four times its bytes, and twice while it is read.
    """

    def shortened(found: re.Match[bytes]) -> bytes:
        return found[0] if len(found[0]) < LARGE else found[1] + b"..."

    return _WORDS.sub(shortened, data) if is_utf8(data) else b""


def is_utf8(data: bytes) -> bool:
    """Whether `data` is UTF-8, found out in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with contextlib.suppress(UnicodeDecodeError):
        for at in range(0, len(data), LARGE):
            decoder.decode(data[at : at + LARGE], at + LARGE >= len(data))
        return True
    return False


def has_over(most: int, value: Any) -> bool:
    """Whether `value` holds more than `most` values, at any depth; looking stops there."""
    level, count = [value], 0
    while level and count <= most:
        count += len(level)
        level = [v for node in level if isinstance(node, dict | list) for v in values_of(node)]
    return count > most


SMALL = 8 << 20  # bytes of a file that people edit by hand; a hundred times what a large one has
BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def decode(data: bytes) -> str:
    """The text of a small file as editors and shells save it; UnicodeDecodeError."""
    return data.decode(next((name for bom, name in BOMS if data.startswith(bom)), "utf-8"))


MAX_DEPTH = 64  # real requests stay under 20; the C parser of json gives up near 1,000


def parse_object(data: bytes) -> tuple[str, dict[str, Any], list[Member]]:
    """Text, value and member positions of a JSON object.

    ValueError, with a sentence for the client, when it is not one, or too deep.
    """
    try:
        text = data.decode()
        value, members, end = scan_object(text, decoder=decoder_for(data))
        if text[end:].strip(" \t\r\n"):
            raise json.JSONDecodeError("Extra data", text, end)
        if depth_of(value) > MAX_DEPTH:
            raise ValueError
    except UnicodeDecodeError as e:
        why = f"byte {e.start} is not UTF-8"
    except json.JSONDecodeError as e:
        why = f"line {e.lineno}, column {e.colno}: {e.msg}"
    except (ValueError, RecursionError):  # NaN, 1e999, integers of hundreds of digits, depth
        why = f"a number that JSON does not know, or nested over {MAX_DEPTH} deep"
    else:
        return text, value, members
    raise ValueError(f"the body is not a JSON object: {why}")
