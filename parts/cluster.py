"""More than one instance: the same routes and the same circuits on all, agreed on through Redis.

A hook. The breakers and the routes file ask a `Cluster` three things (`lend`, `tell`, `agree`) and
know no more of it; it imports neither of them, and `join` hands it both. One instance alone has
no hook and runs no line of this: `create_app` imports it only when ROUTER_REDIS_URL is set.

Who runs what
    a request     lend    before it probes an open circuit: one question to Redis, so that one
                          probe is out in the whole cluster
                  tell    after a circuit opened, closed, was held or reset: leaves a word for the
                          thread and wakes it; waits for nothing
    a change      agree   under the folder's lock, when only the rename of the file is left
    the thread    share   twice a second, and when woken: all the rest, and what was spent

Who may touch what
    Link.error, since     under Link's lock; `error` is read without it
    _version              written under the folder's lock; by `_take` right after it, when Redis
                          has moved on, so that no `agree` can succeed on the older one
    _seen                 written by the thread, read by `lend`
    _lent, _ended         a set of the requests; a deque, to which they append and from which the
                          thread takes; each of these is one atomic step
    _stale                requests set it, the thread clears it before it reads what it asks for
    all other fields      the thread alone

Why that is enough
    - A lease that ended is collected before the circuits are copied. So Redis hears what came of a
      probe before its lease is free, or in the same step; who asks for it knowing less is refused.
    - Copies and resets are taken in one step (`news`). What others tell is taken over only if the
      circuit is still as it was copied; otherwise ours is told first, in the next round, and the
      script in Redis decides: who has not seen the latest number is refused, and hears it then.
      A reset is never refused.
    - `lend` reads `_seen` after its ticket was made, and the thread writes it after the circuit.
      So a number newer than the ticket belongs to a circuit that has made the ticket void.
    - Every command that changes something carries the time after which it is void: one that lay
      in the queue of a hung Redis must not come into force later.

Whenever Redis fails, is slow or full, the instance is alone: it serves on what it knows, asks
nobody, and joins again by itself.

Redis holds `llm-router:config` (version, text, by, tags), `llm-router:circuits` (model -> sequence
number and state), `llm-router:seq`, `llm-router:instances`, a `llm-router:probe:<hash>` for each
probe that is out, and `llm-router:spent:<month>` (ledger -> USD of each limit). Nothing that a
client sends is in a key or a command. All of it is read as if a stranger had written it: whole, or
not at all and with one line in the log (`Odd`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from parts.errors import Refused
from parts.logs import now_text, where_it_broke

log = logging.getLogger("llm_router")

TICK_S = 0.5  # how often an instance looks at the cluster; a change is on all within about 1 s
CALL_S = 0.2  # the longest wait for one answer of Redis; a request waits so long once per outage
VOID_S = 0.15  # a command that Redis begins later than this does nothing
JOIN_S = 1.0  # a start waits so long for the first sight of the cluster
ALIVE_S = 4.0  # who has not been seen for so long is gone, and so is its probe
REFUSED_S = 1.0  # a probe of another instance is asked about at most this often
RETRY_S = 2.0  # a text that cannot be taken over is tried again after this
LONGEST_S = 86_400.0  # the schema allows no longer wait before a probe, and no longer request
SLACK_S = 60.0  # Redis's clock may be set while we run
MOST_TEXT = 8 << 20  # bytes of routes.json; the shipped one has 80 KB
MOST_ENTRY = 4000  # characters of one circuit; an instance writes 200 to 2,000
VERSION = re.compile(r"[0-9]{1,15}-[0-9a-f]{1,64}")
MOST_SPENT = 200_000  # characters of what one instance spent: 1,000 clients have 80,000
KEYS = {name: f"llm-router:{name}" for name in ("config", "circuits", "seq", "instances")}
SPENT = "llm-router:spent:"  # and the month
PROBE = "llm-router:probe:"

# ARGV[1] of each script is the latest time, by Redis's own clock, at which it may begin.
# A circuit is `number JSON`; `at` is its number, '' if it has none. A version has at most 100
# characters. Both are cut, for a stranger's value may be of any length.
HEAD = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if now > tonumber(ARGV[1]) then return redis.error_reply('LATE') end
local function start(key, field, length)
  return string.sub(redis.call('HGET', key, field) or '', 1, length)
end
local function at(key, model) return string.match(start(key, model, 20), '^%d*') end
"""
# A sequence starts with the time, so that an emptied Redis never repeats a number.
NEXT = """
local function next_seq(key)
  redis.call('SET', key, t[1] .. '000', 'NX')
  local n = redis.pcall('INCR', key)
  if type(n) ~= 'number' or n < tonumber(t[1]) then redis.call('SET', key, t[1] .. '001') end
  return redis.call('GET', key)
end
"""
SCRIPTS = {
    "look": """
redis.call('ZADD', KEYS[1], now, ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[3]))
local seq = redis.pcall('GET', KEYS[3])
return {t[1], t[2], start(KEYS[2], 'version', 101),
        type(seq) == 'string' and string.sub(seq, 1, 20) or '',
        redis.call('ZRANGE', KEYS[1], 0, 999)}
""",
    "publish": """
if start(KEYS[1], 'version', 101) ~= ARGV[2] then return 0 end
local tags = (redis.call('HGET', KEYS[1], 'tags') or '') .. string.match(ARGV[3], '%-.*')
redis.call('HSET', KEYS[1], 'version', ARGV[3], 'text', ARGV[4], 'by', ARGV[5],
           'tags', string.sub(tags, -1700))
return 1
""",
    # The name of a field that is too long to be read, or all four.
    "routes": """
for field, most in pairs({version = 100, text = tonumber(ARGV[2]), by = 200, tags = 2000}) do
  if redis.call('HSTRLEN', KEYS[1], field) > most then return field end
end
return redis.call('HMGET', KEYS[1], 'version', 'text', 'by', 'tags')
""",
    # The circuits of the models in ARGV[3] and on, each cut; and the names of some others.
    "circuits": """
local texts, others, asked = {}, {}, {}
for n = 3, #ARGV do
  asked[ARGV[n]] = true
  local text = redis.call('HGET', KEYS[1], ARGV[n])
  texts[n - 2] = text and string.sub(text, 1, ARGV[2] + 1)
end
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if not asked[name] and #name <= 200 and #others < 1000 then others[#others + 1] = name end
end
return {texts, others}
""",
    # Refused (0) when the circuit changed since this instance last saw it; a reset always counts.
    "push": NEXT
    + """
local model, seen, entry, lease, always = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6] == '1'
if always or redis.pcall('GET', KEYS[3]) == lease then redis.call('DEL', KEYS[3]) end
local was = at(KEYS[1], model)
if entry == '' or not (always or was == '' or was == seen) then return 0 end
local n = next_seq(KEYS[2])
redis.call('HSET', KEYS[1], model, n .. ' ' .. entry)
return n
""",
    # What the other ledgers hold, each cut; ours is kept beside them.
    "spend": """
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], 3456000)
local others = {}
for _, ledger in ipairs(redis.call('HKEYS', KEYS[1])) do
  if ledger ~= ARGV[2] and #others < 1000 then
    others[#others + 1] = start(KEYS[1], ledger, ARGV[4] + 1)
  end
end
return others
""",
    "forget": "for n = 2, #ARGV do redis.call('HDEL', KEYS[1], ARGV[n]) end",
    # 0: go; -1: look again, it changed; else the milliseconds that another probe may still take.
    "probe": """
local model, seen, lease, ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if at(KEYS[1], model) ~= seen then return -1 end
if redis.call('SET', KEYS[3], lease, 'NX', 'PX', ms) then return 0 end
local held, left = redis.pcall('GET', KEYS[3]), redis.call('PTTL', KEYS[3])
local holder = type(held) == 'string' and string.match(held, '^(.*)|') or ''
if left > 0 and left <= tonumber(ARGV[6]) and redis.call('ZSCORE', KEYS[2], holder) then
  return left
end
redis.call('SET', KEYS[3], lease, 'PX', ms)
return 0
""",
}


class Away(Exception):
    """The cluster cannot be reached now."""


class Odd(Exception):
    """Redis holds what no instance writes; the message says what is wrong with it."""


@dataclass(frozen=True)
class CircuitState:
    """What instances tell each other of a circuit; its times are by this instance's clock."""

    is_open: bool
    due: float  # 0.0 while it is closed
    hold: float  # 0.0: none
    first_open: float | None
    strikes: int
    reason: str
    last_status: int | None
    since: str


class Breakers(Protocol):
    """What the thread asks of router.Breakers, which says more."""

    def news(self) -> tuple[Mapping[str, Any], set[str]]:
        """Copies of the circuits, read here by attribute; and what was reset, '' for all."""

    def hear(self, model: str, state: CircuitState | None, known: Any) -> bool:
        """False when the circuit is not as `known` any more, which is such a copy."""


class Store(Protocol):
    """What the thread asks of livefile.Store, which says more."""

    def current(self) -> Any:
        """The table in force, of which text, etag and chain_ids are read here."""

    def adopt(self, edit: Callable[[Any], str], spare: Callable[[str, str], None]) -> Any:
        """Write the text that `edit` returns; Refused."""

    def writing(self) -> contextlib.AbstractContextManager[int]:
        """The folder's lock; OSError."""

    def settled_text(self) -> str | None:
        """The text in force, under the lock; None while the file holds another."""

    def keep_beside(self, ending: str, text: str) -> Path:
        """Write a note beside the file, under the lock; OSError."""

    def read_beside(self, ending: str) -> str:
        """Such a note, or ''."""


class History(Protocol):
    """What the thread asks of history.History, which says more."""

    ledger: str

    def share(self) -> dict[str, float]:
        """USD spent here of each limit, by `span|kind|name`; {} where there is no limit."""

    def hear(self, others: Iterable[Mapping[str, float]]) -> None:
        """The same of the others."""


class Link:
    """The way to Redis: scripts, its clock, and whether it answers."""

    def __init__(self, url: str, instance: str, clock: Callable[[], float]):
        self.instance = instance
        # A worker that is being replaced and its successor are one instance, but two members.
        self.member = f"{instance}#{secrets.token_hex(4)}"
        self.clock = clock
        self.error: str | None = "starting"  # None: the cluster is in reach
        self.since = now_text()
        self.wake = threading.Event()
        self._ahead = 0.0  # Redis's clock minus ours: instances on several machines share it
        self._lock = threading.Lock()  # guards error and since; never held during I/O
        self._redis = redis.Redis.from_url(
            url, socket_timeout=CALL_S, socket_connect_timeout=CALL_S, protocol=2,
            retry=Retry(NoBackoff(), 0), decode_responses=True, encoding_errors="replace",
            client_name=re.sub(r"[^\w.:-]", "_", f"llm-router-{instance}", flags=re.ASCII),
        )  # fmt: skip
        self._scripts = {n: self._redis.register_script(HEAD + s) for n, s in SCRIPTS.items()}

    @property
    def alone(self) -> bool:
        """True while nobody asks Redis but the thread."""
        return self.error is not None

    def call(self, script: str, keys: Iterable[str], *args: Any, timely: bool = True) -> Any:
        """What the script returns; Away, once and for all requests, when Redis fails."""
        until = int((self.shared_time(self.clock()) + VOID_S) * 1000) if timely else 1 << 52
        try:
            return self._scripts[script](keys=list(keys), args=[until, *args])
        except (redis.RedisError, OSError) as e:
            raise self.lost(word_for(e)) from e

    def lost(self, why: str) -> Away:
        """Note that the cluster is out of reach, with one log line for the whole outage."""
        with self._lock:
            first = self.error in (None, "starting")
            self.since = now_text() if first else self.since
            self.error = why
        if first:
            log.warning("cluster_alone", {"instance": self.instance, "why": why})
        return Away(why)

    def found(self) -> bool:
        """Note that the cluster is in reach; True when it was not before."""
        with self._lock:
            was, self.error = self.error, None
        return was is not None

    def look(self) -> tuple[str, str, list[str]]:
        """Show that this instance lives; version, sequence number, members. Sets the clock."""
        before = self.clock()
        keys = KEYS["instances"], KEYS["config"], KEYS["seq"]
        found = self.call("look", keys, self.member, int(ALIVE_S * 1000), timely=False)
        if self.error not in (None, "starting") and self.clock() - before > CALL_S / 2:
            raise self.lost("timeout")  # who is slow at the limit must not come and go
        seconds, micros, version, seq, members = found
        self._ahead = int(seconds) + int(micros) / 1e6 - (before + self.clock()) / 2
        return version, seq, [m for m in members if len(m) <= 200 and m.isprintable()]

    def routes(self) -> tuple[str, str, str, str]:
        """The cluster's version, text, by, and the tags of its last hundred versions; or Odd."""
        found = self.call("routes", [KEYS["config"]], MOST_TEXT, timely=False)
        if not isinstance(found, list):
            raise Odd(f"their {found} is too long")
        version, text, by, tags = (value or "" for value in found)
        if version and tag_of(version) != tag_for(text):
            raise Odd("the text is not the one that the version names")
        return version, text, by, tags

    def circuits(self, models: Iterable[str]) -> tuple[list[str | None], list[str]]:
        """What Redis holds of each of `models`, and the names of other models there."""
        found = self.call("circuits", [KEYS["circuits"]], MOST_ENTRY, *models, timely=False)
        return found[0], found[1]

    def shared_time(self, at: float) -> float:
        """A moment of our clock by Redis's clock."""
        return at + self._ahead

    def local_time(self, at: float) -> float:
        """A moment of Redis's clock by ours."""
        return at - self._ahead


def word_for(e: Exception) -> str:
    """One word for what is wrong with Redis; its own words may hold what is nobody's business."""
    kinds: dict[type[Exception], str] = {
        redis.exceptions.AuthenticationError: "auth", redis.exceptions.NoPermissionError: "auth",
        redis.exceptions.BusyLoadingError: "loading", redis.exceptions.ReadOnlyError: "readonly",
        redis.exceptions.OutOfMemoryError: "full", redis.TimeoutError: "timeout",
        redis.ConnectionError: "connection", OSError: "connection",
    }  # fmt: skip
    if "LATE" in str(e):
        return "timeout"
    if "OOM" in str(e):  # inside a script it comes as a plain error
        return "full"
    return next((word for kind, word in kinds.items() if isinstance(e, kind)), "refused")


# --- what is read from Redis ---------------------------------------------------------------------


def number_of(version: str) -> int:
    """How many changes led to a version; 0 for none."""
    return int(version.partition("-")[0] or 0)


def tag_of(version: str) -> str:
    """The ETag of the text that a version names."""
    return version.partition("-")[2]


def tag_for(text: str) -> str:
    """The ETag of a table with this text, without making one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def probe_key(model: str) -> str:
    """Where the lease of `model`'s probe lies."""
    return PROBE + hashlib.sha256(model.encode()).hexdigest()[:32]


View = tuple[bool, float, float]
NEW: View = (False, 0.0, 0.0)


def view_of(circuit: Any) -> View:
    """What of a circuit is shared: strikes before it opens are each instance's own."""
    if circuit is None:
        return NEW
    return circuit.is_open, circuit.due if circuit.is_open else 0.0, circuit.hold


def entry_of(circuit: Any, link: Link) -> dict[str, Any]:
    """A circuit as the cluster knows it, its times by Redis's clock; None: forgotten."""
    if circuit is None:
        return {"gone": True, "by": link.instance}
    (is_open, due, hold), first = view_of(circuit), circuit.first_open
    return {"open": is_open, "due": link.shared_time(due), "hold": link.shared_time(hold),
            "first_open": None if first is None else link.shared_time(first),
            "strikes": circuit.strikes, "reason": circuit.reason, "status": circuit.last_status,
            "since": circuit.since, "by": link.instance}  # fmt: skip


def read_entry(text: str, link: Link) -> tuple[CircuitState | None, str]:
    """The circuit that another instance told of (None: it was reset), and who; or Odd."""
    if len(text) > MOST_ENTRY:
        raise Odd("too long")
    try:
        entry = json.loads(text.partition(" ")[2])
    except (ValueError, RecursionError):
        raise Odd("not JSON") from None
    if not isinstance(entry, dict):
        raise Odd("not an object")
    by = word_in(entry, "by")
    if entry.get("gone") is True:
        return None, by
    now = link.shared_time(link.clock())
    soon, latest = now + SLACK_S, now + SLACK_S + LONGEST_S
    first, status, is_open = entry.get("first_open"), entry.get("status"), entry.get("open")
    if type(is_open) is not bool:
        raise Odd("open is neither true nor false")
    due, hold = number_in(entry, "due", latest), number_in(entry, "hold", latest)
    return CircuitState(
        is_open, link.local_time(due) if is_open else 0.0,
        link.local_time(hold) if hold > now else 0.0,  # the 0.0 of another clock, or over
        None if first is None else link.local_time(number_in(entry, "first_open", soon)),
        int(number_in(entry, "strikes", 1e9)), word_in(entry, "reason"),
        None if status is None else int(number_in(entry, "status", 999)), word_in(entry, "since"),
    ), by  # fmt: skip


def read_spent(text: str) -> dict[str, float]:
    """What another instance spent; or Odd."""
    if len(text) > MOST_SPENT:
        raise Odd("too long")
    try:
        spent = json.loads(text)
    except (ValueError, RecursionError):
        raise Odd("not JSON") from None
    if not isinstance(spent, dict):
        raise Odd("not an object")
    return {name: number_in(spent, name, 1e9) for name in spent}


def number_in(entry: Mapping[str, Any], key: str, most: float) -> float:
    """The number from 0 to `most` under `key`; NaN is none."""
    value: Any = entry.get(key)
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise Odd(f"{key} is no number that can be meant")
    return float(value)


def word_in(entry: Mapping[str, Any], key: str) -> str:
    """The short printable text under `key`."""
    value = entry.get(key)
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Odd(f"{key} is no short text")
    return value


class Cluster:
    """This instance's place in the cluster: the three hooks, and the thread behind them."""

    _store: Store
    _breakers: Breakers
    _history: History

    def __init__(self, url: str, instance: str, port: int, clock: Callable[[], float]):
        self.link = Link(url, instance or f"{socket.gethostname()}:{port}", clock)
        self._version = self._noted = ""  # of the routes we are on; and what the note says
        self._behind: str | None = None  # why the cluster's text could not be taken over
        self._retry_at = 0.0
        self._members: list[str] = []
        self._told: dict[str, View] = {}  # circuits as last told or heard
        self._seen: dict[str, str] = {}  # model -> sequence number
        self._resets: set[str] = set()  # told whatever the cluster knows
        self._lent: set[tuple[str, int]] = set()  # (model, generation): probes with a lease
        self._ended: deque[tuple[str, str]] = deque()  # (model, lease) of those that ended
        self._leases: dict[str, str] = {}  # and have yet to be given back
        self._odd: set[str] = set()  # models whose entry was complained of
        self._stale = False  # circuits must be read although no number says so
        self._heard = ("", "")  # sequence number and version up to which circuits are known
        self._first = threading.Event()

    def join(self, store: Store, breakers: Breakers, history: History) -> None:
        """Share these three from now on; they serve alone while Redis is out of reach."""
        self._store, self._breakers, self._history = store, breakers, history
        note = store.read_beside("cluster").strip()
        self._noted = self._version = note if VERSION.fullmatch(note) else ""
        self.start()

    def start(self) -> None:
        """Begin to share; waits for the first sight of the cluster, but not long."""
        threading.Thread(target=self._run, name="cluster", daemon=True).start()
        self._first.wait(JOIN_S)

    def _run(self) -> None:
        while True:
            try:
                self.share()
            except Away:
                pass
            except Exception:  # noqa: BLE001  must outlive anything: else it never joins again
                log.error("cluster_error", {"where": where_it_broke()})
                self.link.lost("internal")
            self._first.set()
            self.link.wake.wait(TICK_S)
            self.link.wake.clear()

    # --- the hooks: called by requests ------------------------------------------------------------

    def lend(self, model: str, generation: int, lease_s: float) -> float:
        """0.0 when the probe is this instance's, else in how many seconds to ask again."""
        if self.link.alone:
            return 0.0
        keys = KEYS["circuits"], KEYS["instances"], probe_key(model)
        args = self._seen.get(model, ""), self._lease(generation), max(1, int(lease_s * 1000))
        self._lent.add((model, generation))
        try:
            left = int(self.link.call("probe", keys, model, *args, int(LONGEST_S * 1000)))
        except Away:
            left = 0  # nobody to agree with: the probe is ours, and Redis may hold its lease
        if left:
            self._lent.discard((model, generation))
        if left < 0:
            self._stale = True
            self.link.wake.set()
        return CALL_S if left < 0 else min(left / 1000, REFUSED_S)

    def tell(self, model: str = "", generation: int | None = None) -> None:
        """Have the thread tell the others; `generation` of `model` was a probe, and ended."""
        if generation is not None and (model, generation) in self._lent:
            self._lent.discard((model, generation))
            self._ended.append((model, self._lease(generation)))
        self.link.wake.set()

    def _lease(self, generation: int) -> str:
        return f"{self.link.member}|{generation}"

    def agree(self, before: str, after: str) -> None:
        """The cluster's word before a change is in force: 409 on an old version, 503 without Redis.

        If the file cannot be replaced after this, the version is ahead of it; the next round finds
        another text in the file than the version names, and offers that as it does a hand edit.
        """
        try:
            if self.link.alone:
                raise Away
            version = self._publish(self._version, after)
        except Away:
            why = "the cluster cannot be reached (Redis); nothing changed"
            raise Refused(503, "cluster_unreachable", why) from None
        if not version:
            self.link.wake.set()
            why = "another instance has changed the routes; read /config again, then try again"
            raise Refused(409, "conflict", why)
        self._version = version
        self.link.wake.set()

    def _publish(self, expected: str, text: str) -> str:
        """The new version, if the cluster was on `expected` and has `text` now; else ''."""
        if len(text.encode()) > MOST_TEXT:
            why = f"routes over {MOST_TEXT >> 20} MB are not shared; nothing changed"
            raise Refused(422, "invalid_request_error", why)
        tag = tag_for(text)
        same = tag == tag_of(self._version)
        version = self._version if same else f"{number_of(self._version) + 1}-{tag}"
        args = expected, version, text, self.link.instance
        return version if self.link.call("publish", [KEYS["config"]], *args) else ""

    # --- the thread -------------------------------------------------------------------------------

    def share(self) -> None:
        """One round: look, agree on the routes, tell and hear of circuits. Away when it fails."""
        version, seq, self._members = self.link.look()
        with contextlib.suppress(OSError):  # the folder is not writable: nothing can be agreed on
            self._agree_on_routes(version)
            self._write_note()
        circuits = self._tell_circuits()
        news = seq, self._version
        if self._stale or self.link.alone or news != self._heard:
            self._stale, self._heard = False, news
            tidy = self._version == version and not self._behind
            self._hear_circuits(circuits, tidy)
        self._share_spending()
        if self.link.found():
            about = {"instance": self.link.instance, "version": self._version}
            log.info("cluster_joined", {**about, "instances": ",".join(self._names())})

    # --- the routes -------------------------------------------------------------------------------

    def _agree_on_routes(self, version: str) -> None:
        """Take the cluster's version, or offer ours: after a hand edit, or to an emptied Redis."""
        ours = self._version
        try:
            if version and not VERSION.fullmatch(version):
                raise Odd("their version is none")
            if version == ours:
                if self._store.current().etag != tag_of(ours):
                    self._offer(ours)
                self._behind = None
            elif version and number_of(version) >= number_of(ours):
                self._take(ours)
            else:
                self._offer(version)
        except (Refused, Odd) as e:
            kind, was = getattr(e, "kind", "odd"), self._behind
            self._behind, self._retry_at = kind, self.link.clock() + RETRY_S
            if was != kind:
                log.error("cluster_routes_refused", {"version": version, "why": str(e)})

    def _offer(self, expected: str) -> None:
        """Publish the table in force; refused is as good: the next round takes the newer one."""
        with self._store.writing():
            text = self._store.settled_text()
            if text is None or (expected == self._version and tag_for(text) == tag_of(expected)):
                return  # in the middle of a change: the next round will see
            version = self._publish(expected, text)
            self._version = version or self._version
        if version:
            self._behind = None
            about = {"instance": self.link.instance, "version": version}
            log.info("cluster_routes_offered", about)

    def _take(self, ours: str) -> None:
        """Bring the cluster's text into force here, by the same checked path as any change."""
        if self._behind and self.link.clock() < self._retry_at:
            return
        version, text, by, tags = self.link.routes()
        if not version:
            return  # emptied since the look
        # A text that the cluster had once is no hand edit: a worker that is being replaced, or a
        # neighbour with the same file, may have written it.
        known = {tag_of(version), tag_of(ours), *tags.split("-")}

        def edit(table: Any) -> str:
            """The cluster's text, unless a change was made here meanwhile, on top of this one."""
            return table.text if self._version != ours else text

        def spare(before: str, after: str) -> None:
            """Keep a hand edit that came too late beside the file, before it is replaced."""
            if tag_for(before) not in known:
                kept = self._store.keep_beside("mine", before)
                log.warning("cluster_file_kept", {"kept_in": str(kept)})

        self._store.adopt(edit, spare)
        self._behind = None
        if self._version == ours:
            self._version = version
            about = {"instance": self.link.instance, "version": version, "by": by}
            log.info("cluster_routes_taken", about)

    def _write_note(self) -> None:
        """Keep the version beside the file: a restart knows by it whether the file was edited."""
        if self._noted != self._version and not self._behind:
            with self._store.writing():
                version = self._version
                self._store.keep_beside("cluster", version + "\n")
            self._noted = version

    # --- circuits ---------------------------------------------------------------------------------

    def _tell_circuits(self) -> Mapping[str, Any]:
        """Tell the cluster what changed here; the circuits as they were when that was found."""
        while self._ended:
            self._leases.update([self._ended.popleft()])
        circuits, reset = self._breakers.news()
        self._resets |= reset
        if "" in self._resets:  # all: also those that only others know
            self._resets = self._resets - {""} | {*self.link.circuits([])[1]}
        changed = {m for m, c in circuits.items() if view_of(c) != self._told.get(m, NEW)}
        for model in self._resets | self._leases.keys() | changed:
            self._tell_one(model, circuits.get(model), model in changed)
        return circuits

    def _tell_one(self, model: str, circuit: Any, changed: bool) -> None:
        is_reset, lease = model in self._resets, self._leases.get(model, "")
        if is_reset and view_of(circuit) == NEW:
            circuit = None  # else: what became of it since the reset
        entry = json.dumps(entry_of(circuit, self.link)) if is_reset or changed else ""
        keys = KEYS["circuits"], KEYS["seq"], probe_key(model)
        seen = self._seen.get(model, "")
        seq = self.link.call("push", keys, model, seen, entry, lease, int(is_reset))
        self._resets.discard(model)
        self._leases.pop(model, None)
        if entry:
            self._told[model] = view_of(circuit)
        if seq:
            self._seen[model] = str(seq)
        elif entry:
            self._stale = True  # overtaken by news

    def _hear_circuits(self, circuits: Mapping[str, Any], tidy: bool) -> None:
        """Take over what changed elsewhere; `tidy`: all but the table's models go, for all."""
        models = sorted(self._store.current().chain_ids)
        texts, others = self.link.circuits(models)
        if others and tidy:
            self.link.call("forget", [KEYS["circuits"]], *others)
        self._seen = {m: self._seen[m] for m in models if m in self._seen}
        for model, text in zip(models, texts, strict=True):
            if text is not None:
                self._hear(model, text, circuits.get(model))
            elif view_of(circuits.get(model)) != NEW:  # an emptied Redis is told again
                self._told.pop(model, None)
                self.link.wake.set()

    def _hear(self, model: str, text: str, known: Any) -> None:
        """Take over one circuit, unless it is known, odd, or ours changed and is told first."""
        seq = str(re.match(r"[0-9]*", text[:20])[0])  # type: ignore[index]  # as `at` in the scripts
        if self._seen.get(model) == seq:
            return
        try:
            state, by = read_entry(text, self.link)
        except Odd as e:
            self._seen[model] = seq  # what we tell next goes in its place
            if model not in self._odd:
                self._odd.add(model)
                log.warning("cluster_odd", {"model": model, "why": str(e)})
            return
        if not self._breakers.hear(model, state, known):
            self._stale = True
            return
        self._seen[model] = seq
        self._odd.discard(model)
        self._told[model] = view_of(state)
        if known is not None or view_of(state) != NEW:
            word = "reset" if state is None else "open" if state.is_open else "closed"
            log.info("circuit_heard", {"model": model, "state": word, "by": by})

    # --- spending ---------------------------------------------------------------------------------

    def _share_spending(self) -> None:
        """Tell what was spent here, where there are limits, and hear of the others'.

        Without Redis the limits hold against what was heard last.
        """
        spent = self._history.share()
        if not spent:
            return
        key = SPENT + time.strftime("%Y-%m", time.gmtime())
        args = self._history.ledger, json.dumps(spent), MOST_SPENT
        heard = []
        for text in self.link.call("spend", [key], *args, timely=False):
            try:
                heard.append(read_spent(text))
            except Odd as e:
                if "spending" not in self._odd:
                    self._odd.add("spending")
                    log.warning("cluster_odd", {"model": "(spending)", "why": str(e)})
        self._history.hear(heard)

    # --- what is shown ----------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return sorted({member.rpartition("#")[0] for member in self._members})

    def health(self) -> dict[str, Any]:
        """For GET /health: whether this instance shares, with whom, and why not."""
        error, since = self.link.error, self.link.since
        shown = {"status": "alone" if error else "ok", "instance": self.link.instance,
                 "version": self._version,
                 "instances": [self.link.instance] if error else self._names()}  # fmt: skip
        if self._behind:
            shown["behind"] = self._behind
        return {**shown, "error": error, "since": since} if error else shown

    def figures(self) -> dict[str, Any]:
        """For GET /metrics: whose figures these are, and who else has some."""
        others = [] if self.link.alone else self._names()
        return {"instance": self.link.instance,
                "instances": [name for name in others if name != self.link.instance]}  # fmt: skip
