"""More than one instance: the same routes and the same circuits on all, agreed on through Redis.

Requests read local objects only; one thread per instance speaks to Redis beside them, twice a
second. A request itself asks Redis in one case: before it probes an open circuit, so that one
probe is out in the whole cluster. A change of the routes asks too, before it is in force.

    Link            the connection, the scripts, and whether the cluster can be reached
    SharedBreakers  router.Breakers, whose openings, closings and resets are seen by all
    Cluster         the thread, the version of the routes, and what /health and /metrics show

Whenever Redis fails, is slow or full, the instance is alone: it serves on what it knows, asks
nobody, and joins again by itself. Every command that changes something carries the time after
which it is void: one that lay in the queue of a hung Redis must not come into force later.

Redis holds `llm-router:config` (version, text, by), `llm-router:circuits` (model -> sequence
number and state), `llm-router:seq`, `llm-router:instances`, and a `llm-router:probe:<hash>` for
each probe that is out. Nothing that a client sends is in a key or a command. Only router.py's
`create_app` imports this, and only when ROUTER_REDIS_URL is set.
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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from parts.errors import Refused, RoutesError
from parts.livefile import Store, locked, read_file, replace_file
from parts.logs import now_text, where_it_broke
from parts.settings import Settings, SettingsError
from parts.table import Table
from router import Breakers, Circuit, Router, Ticket

log = logging.getLogger("llm_router")

TICK_S = 0.5  # how often an instance looks at the cluster; a change is on all within about 1 s
CALL_S = 0.2  # the longest wait for one answer of Redis; a request waits so long once per outage
VOID_S = 0.15  # a command that Redis begins later than this does nothing
JOIN_S = 1.0  # a start waits so long for the first sight of the cluster
ALIVE_S = 4.0  # who has not been seen for so long is gone, and so is its probe
REFUSED_S = 1.0  # a probe of another instance is asked about at most this often
RETRY_S = 2.0  # a text that cannot be taken over is tried again after this
KEYS = {name: f"llm-router:{name}" for name in ("config", "circuits", "seq", "instances")}
PROBE = "llm-router:probe:"

# ARGV[1] of each script is the latest time, by Redis's own clock, at which it may begin.
VOID = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if now > tonumber(ARGV[1]) then return redis.error_reply('LATE') end
"""
# A sequence starts with the time, so that an emptied Redis never repeats a number.
NEXT = """
local function next_seq(key)
  redis.call('SET', key, t[1] .. '000', 'NX')
  redis.call('INCR', key)
  return redis.call('GET', key)
end
"""
SCRIPTS = {
    "look": """
redis.call('ZADD', KEYS[1], now, ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[3]))
return {t[1], t[2], redis.call('HGET', KEYS[2], 'version') or '',
        redis.call('GET', KEYS[3]) or '', redis.call('ZRANGE', KEYS[1], 0, -1)}
""",
    "publish": """
if (redis.call('HGET', KEYS[1], 'version') or '') ~= ARGV[2] then return 0 end
local tags = (redis.call('HGET', KEYS[1], 'tags') or '') .. string.match(ARGV[3], '%-.*')
redis.call('HSET', KEYS[1], 'version', ARGV[3], 'text', ARGV[4], 'by', ARGV[5],
           'tags', string.sub(tags, -1700))
return 1
""",
    # Refused (0) when the circuit changed since this instance last saw it; a reset always counts.
    "push": NEXT
    + """
local model, seen, entry, lease, always = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6] == '1'
if always or redis.call('GET', KEYS[3]) == lease then redis.call('DEL', KEYS[3]) end
local at = string.match(redis.call('HGET', KEYS[1], model) or '', '^%d*')
if entry == '' or not (always or at == '' or at == seen) then return 0 end
local n = next_seq(KEYS[2])
redis.call('HSET', KEYS[1], model, n .. ' ' .. entry)
return n
""",
    "forget": NEXT
    + """
for n = 2, #ARGV do redis.call('HDEL', KEYS[1], ARGV[n]) end
return next_seq(KEYS[2])
""",
    # 0: go; -1: look again, it changed; else the milliseconds that another probe may still take.
    "probe": """
local model, seen, lease, ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if string.match(redis.call('HGET', KEYS[1], model) or '', '^%d*') ~= seen then return -1 end
if redis.call('SET', KEYS[3], lease, 'NX', 'PX', ms) then return 0 end
local holder = string.match(redis.call('GET', KEYS[3]), '^(.*)|')
if redis.call('ZSCORE', KEYS[2], holder or '') then
  return math.max(1, redis.call('PTTL', KEYS[3]))
end
redis.call('SET', KEYS[3], lease, 'PX', ms)
return 0
""",
}


class Away(Exception):
    """The cluster cannot be reached now."""


class Sight(NamedTuple):
    """What one look at the cluster found."""

    version: str
    seq: str
    members: tuple[str, ...]


def probe_key(model: str) -> str:
    """Where the lease of `model`'s probe lies."""
    return PROBE + hashlib.sha256(model.encode()).hexdigest()[:32]


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
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=CALL_S, socket_connect_timeout=CALL_S, protocol=2,
                retry=Retry(NoBackoff(), 0), decode_responses=True,
                client_name=re.sub(r"[^\w.:-]", "_", f"llm-router-{instance}", flags=re.ASCII),
            )  # fmt: skip
        except ValueError:  # its message would hold the URL, and that a password
            raise SettingsError("ROUTER_REDIS_URL: cannot be read as a URL") from None
        self._scripts = {n: self._redis.register_script(VOID + s) for n, s in SCRIPTS.items()}

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

    def look(self) -> Sight:
        """Show that this instance lives, and see what is new; sets the clock by Redis's."""
        before = self.clock()
        keys = KEYS["instances"], KEYS["config"], KEYS["seq"]
        found = self.call("look", keys, self.member, int(ALIVE_S * 1000), timely=False)
        if self.error not in (None, "starting") and self.clock() - before > CALL_S / 2:
            raise self.lost("timeout")  # who is slow at the limit must not come and go
        seconds, micros, version, seq, members = found
        self._ahead = int(seconds) + int(micros) / 1e6 - (before + self.clock()) / 2
        return Sight(version, seq, tuple(members))

    def routes(self) -> dict[str, str]:
        """The cluster's routes: version, text, by, and the tags of the last hundred versions."""
        return dict(self._read(lambda: self._redis.hgetall(KEYS["config"])))

    def circuits(self) -> dict[str, str]:
        """{model: sequence number and state} as Redis holds it."""
        return dict(self._read(lambda: self._redis.hgetall(KEYS["circuits"])))

    def _read(self, command: Callable[[], Any]) -> Any:
        try:
            return command()
        except (redis.RedisError, OSError, UnicodeDecodeError) as e:
            raise self.lost(word_for(e)) from e

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


View = tuple[bool, float, float]
NEW: View = (False, 0.0, 0.0)


def view_of(circuit: Circuit) -> View:
    """What of a circuit is shared: strikes before it opens are each instance's own."""
    return circuit.is_open, circuit.due if circuit.is_open else 0.0, circuit.hold


class SharedBreakers(Breakers):
    """Breakers whose openings, holds, closings, resets and probes are the cluster's."""

    def __init__(self, link: Link):
        super().__init__(link.clock)
        self._link = link
        # All guarded by _lock. A model is dirty while its state or its lease has yet to be told.
        self._dirty: dict[str, str] = {}  # model -> its lease to give back, or ""
        self._reset: set[str] = set()  # told whatever the cluster knows
        self._reset_all = False
        self._told: dict[str, View] = {}  # as last told or heard
        self._seen: dict[str, str] = {}  # model -> sequence number

    def admit(self, model: str, lease_s: float, *, early: bool = False) -> Ticket | None:
        """As in Breakers; a probe also needs the cluster's lease, while the cluster is in reach."""
        if self._link.alone:
            return super().admit(model, lease_s, early=early)
        asked = self._about_to_probe(model, early)
        if asked is None:
            ticket = super().admit(model, lease_s, early=early)
            if not (ticket and ticket.probe):
                return ticket
            super().settle(ticket, "none", {})  # due since a moment: the next one asks for it
            return None
        circuit, generation, seen = asked
        wait_ms = self._take_lease(model, generation, seen, lease_s)
        ticket = Ticket(model, circuit, generation, True)
        if not self._goes(ticket, wait_ms, lease_s):
            return None
        log.info("circuit_half_open", {"model": model})
        return ticket

    def _goes(self, ticket: Ticket, wait_ms: float, lease_s: float) -> bool:
        """True when the probe is in the air now: it got its lease, and nobody reset it since."""
        now, circuit = self._clock(), ticket.circuit
        with self._lock:
            if not ticket.is_current:
                if wait_ms == 0:  # a lease for nothing
                    self._dirty.setdefault(ticket.model, self._lease(ticket.generation))
                return False
            if wait_ms:
                circuit.lease = now + min(wait_ms / 1000, REFUSED_S)
                return False
            circuit.lease = now + lease_s
            circuit.in_air += 1
            return True

    def _about_to_probe(self, model: str, early: bool) -> tuple[Circuit, int, str] | None:
        """The circuit, if this request would probe it; others see it half-open from now on."""
        now = self._clock()
        with self._lock:
            circuit = self._circuits.get(model)
            if circuit is None or not circuit.is_open or not circuit.lets_go(now, early):
                return None
            circuit.lease = now + 10 * CALL_S
            circuit.generation = self._next_generation()
            return circuit, circuit.generation, self._seen.get(model, "")

    def _take_lease(self, model: str, generation: int, seen: str, lease_s: float) -> float:
        """0 when the probe is ours, else the milliseconds after which to ask again."""
        keys = KEYS["circuits"], KEYS["instances"], probe_key(model)
        args = model, seen, self._lease(generation), max(1, int(lease_s * 1000))
        try:
            answer = int(self._link.call("probe", keys, *args))
        except Away:
            return 0  # nobody to agree with: the probe is this instance's own
        if answer < 0:
            self._link.wake.set()
        return answer if answer >= 0 else CALL_S * 1000

    def _lease(self, generation: int) -> str:
        return f"{self._link.member}|{generation}"

    def commit(self, ticket: Ticket, threshold: float) -> None:
        """As in Breakers; the cluster hears of a circuit that closes."""
        was_probe = ticket.probe
        super().commit(ticket, threshold)
        if was_probe and not ticket.probe:
            self._note(ticket.model, self._lease(ticket.generation))

    def settle(self, ticket: Ticket, verdict: str, config: Mapping[str, float], reason: str = "",
               status: int | None = None, retry_after_s: float | None = None) -> None:  # fmt: skip
        """As in Breakers; the cluster hears of an opening, of a hold and of a probe that ended."""
        was_probe = ticket.probe and not ticket.settled
        super().settle(ticket, verdict, config, reason, status, retry_after_s)
        self._note(ticket.model, self._lease(ticket.generation) if was_probe else "")

    def _note(self, model: str, lease: str) -> None:
        """Have the thread tell the others, if there is anything to tell."""
        with self._lock:
            circuit = self._circuits.get(model)
            view = view_of(circuit) if circuit else NEW
            news = circuit is not None and view != self._told.get(model, NEW)
            if news or lease:
                self._told[model] = view
                self._dirty[model] = lease or self._dirty.get(model, "")
        if news or lease:
            self._link.wake.set()

    def reset(self, models: Iterable[str] | None = None) -> None:
        """As in Breakers, on all instances."""
        given = None if models is None else list(models)
        with self._lock:  # all at once: nothing old is heard between the two
            chosen = list(self._circuits) if given is None else given
            for model in chosen:
                self._drop(model)
            self._reset.update(chosen)
            self._reset_all |= given is None
        log.info("circuits_reset", {"models": ",".join(chosen)})
        self._link.wake.set()

    def _drop(self, model: str) -> None:
        super()._drop(model)
        self._told.pop(model, None)
        self._seen.pop(model, None)

    # What follows is called by the cluster's thread alone.

    def push(self) -> None:
        """Tell the cluster what changed here. Who was overtaken by news hears them in `pull`."""
        everything = self._reset_all
        known = self._link.circuits() if everything else {}
        with self._lock:
            self._reset.update(known)
            self._reset_all &= not everything
            models = {*self._reset, *self._dirty}
        for model in models:
            self._push_one(model)

    def _push_one(self, model: str) -> None:
        with self._lock:
            is_reset, lease = model in self._reset, self._dirty.pop(model, "")
            self._reset.discard(model)
            circuit, seen = self._circuits.get(model), self._seen.get(model, "")
            if is_reset and circuit and view_of(circuit) == NEW:
                circuit = None
            entry = self._entry(circuit)  # after a reset: what became of it since
        text = json.dumps(entry) if is_reset or circuit else ""
        keys = KEYS["circuits"], KEYS["seq"], probe_key(model)
        try:
            seq = self._link.call("push", keys, model, seen, text, lease, int(is_reset))
        except Away:
            with self._lock:
                self._dirty.setdefault(model, lease)
                self._reset.update([model] if is_reset else ())
            raise
        with self._lock:
            if seq and self._seen.get(model, "") == seen:
                self._seen[model] = str(seq)

    def _entry(self, circuit: Circuit | None) -> dict[str, Any]:
        """A circuit as the cluster knows it, its times by Redis's clock; None: forgotten."""
        if circuit is None:
            return {"gone": True, "by": self._link.instance}
        shared = self._link.shared_time
        first = circuit.first_open
        return {"open": circuit.is_open, "due": shared(circuit.due), "hold": shared(circuit.hold),
                "first_open": None if first is None else shared(first),
                "strikes": circuit.strikes, "reason": circuit.reason,
                "status": circuit.last_status, "since": circuit.since,
                "by": self._link.instance}  # fmt: skip

    def pull(self, models: frozenset[str], tidy: bool) -> None:
        """Take over what changed elsewhere; `tidy`: all but `models` are forgotten by all."""
        found = self._link.circuits()
        others = [model for model in found if model not in models]
        if others and tidy:
            self._link.call("forget", (KEYS["circuits"], KEYS["seq"]), *others)
        for model in models & found.keys():
            self._hear(model, *found[model].partition(" ")[::2])
        with self._lock:  # an emptied Redis is told again
            lost = [model for model in models & (self._circuits.keys() - found.keys())
                    if view_of(self._circuits[model]) != NEW]  # fmt: skip
            for model in lost:
                self._dirty.setdefault(model, "")
        if lost:
            self._link.wake.set()

    def _hear(self, model: str, seq: str, text: str) -> None:
        """Take over one circuit, unless it is known or has news of its own to tell first."""
        try:
            entry = json.loads(text)
            heard = entry.get("gone") or heard_circuit(entry, self._link.local_time)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # not ours; a newer version's, perhaps
        with self._lock:
            if self._seen.get(model) == seq or self._has_news(model):
                return
            is_news = model in self._circuits or (heard is not True and view_of(heard) != NEW)
            if heard is True:
                self._drop(model)
            else:
                self._take_over(model, heard)
            self._seen[model] = seq
        state = "reset" if heard is True else "open" if heard.is_open else "closed"
        if is_news:
            told = {"model": model, "state": state, "by": str(entry.get("by"))}
            log.info("circuit_heard", told)

    def _has_news(self, model: str) -> bool:
        return self._reset_all or model in self._reset or model in self._dirty

    def _take_over(self, model: str, heard: Circuit) -> None:
        circuit = self._circuits.setdefault(model, heard)
        if heard.is_open or circuit.is_open:
            circuit.strikes = heard.strikes
        circuit.is_open, circuit.due, circuit.hold = heard.is_open, heard.due, heard.hold
        circuit.first_open, circuit.reason = heard.first_open, heard.reason
        circuit.last_status, circuit.since = heard.last_status, heard.since
        circuit.lease, circuit.generation = 0.0, self._next_generation()  # in the air: void
        self._told[model] = view_of(circuit)


def heard_circuit(entry: Mapping[str, Any], local: Callable[[float], float]) -> Circuit:
    """The circuit that another instance told of; ValueError, KeyError or TypeError if none."""
    first, status = entry["first_open"], entry["status"]
    return Circuit(
        0, strikes=int(entry["strikes"]), is_open=bool(entry["open"]),
        first_open=None if first is None else local(float(first)),
        due=local(float(entry["due"])), hold=local(float(entry["hold"])),
        reason=str(entry["reason"]), last_status=None if status is None else int(status),
        since=str(entry["since"]),
    )  # fmt: skip


def number_of(version: str) -> int:
    """How many changes led to a version; 0 for none."""
    number = version.partition("-")[0]
    return int(number) if number.isdecimal() and number.isascii() else 0


def tag_of(version: str) -> str:
    """The ETag of the text that a version names."""
    return version.partition("-")[2]


class Cluster:
    """This instance's place in the cluster: the thread, and the version of the routes it is on."""

    def __init__(self, link: Link, store: Store, breakers: SharedBreakers, given: Path):
        self.link = link
        self._store = store
        self._breakers = breakers
        self._note = given.with_name(f".{given.name}.cluster")
        self._mine = given.with_name(f".{given.name}.mine")
        self._noted = self._version = self._read_note()  # set under the folder's lock
        self._members: tuple[str, ...] = ()
        self._heard = ""  # the sequence number up to which circuits are known
        self._behind: str | None = None  # why the cluster's text could not be taken over
        self._retry_at = 0.0
        self._first = threading.Event()

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

    def share(self) -> None:
        """One round: look, agree on the routes, tell and hear of circuits. Away when it fails."""
        sight = self.link.look()
        self._members = sight.members
        before = self._version
        with contextlib.suppress(OSError):  # the folder is not writable: nothing can be agreed on
            self._agree_on_routes(sight.version)
            self._write_note()
        self._breakers.push()
        if sight.seq != self._heard or before != self._version or self.link.alone:
            tidy = self._version == sight.version and not self._behind
            self._breakers.pull(self._store.table.chain_ids, tidy)
            self._heard = sight.seq
        if self.link.found():
            about = {"instance": self.link.instance, "version": self._version}
            log.info("cluster_joined", {**about, "instances": ",".join(self._names())})

    # --- the routes ------------------------------------------------------------------------------

    def agree(self, before: str, after: str) -> None:
        """Store's word before a change is in force: 409 on an old version, 503 without Redis."""
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
        tag = tag_for(text)
        same = tag == tag_of(self._version)
        version = self._version if same else f"{number_of(self._version) + 1}-{tag}"
        args = expected, version, text, self.link.instance
        return version if self.link.call("publish", [KEYS["config"]], *args) else ""

    def _agree_on_routes(self, version: str) -> None:
        """Take the cluster's version, or offer ours: after a hand edit, or to an emptied Redis."""
        ours = self._version
        self._behind = None if version == ours else self._behind
        if version != ours and version and number_of(version) >= number_of(ours):
            self._take(version, ours)
        elif version != ours:
            self._offer(version)
        if self._store.table.etag != tag_of(self._version) and not self._behind:
            self._offer(self._version)

    def _offer(self, expected: str) -> None:
        """Publish the table in force; refused is as good: the next round takes the newer one."""
        with locked(self._store.path.parent, wait=True):
            text = self._store.table.text
            edited = not self._store.error and read_text(self._store.path) != text
            if edited or (expected == self._version and tag_for(text) == tag_of(expected)):
                return  # in the middle of a change: the next round will see
            version = self._publish(expected, text)
            self._version = version or self._version
        if version:
            about = {"instance": self.link.instance, "version": version}
            log.info("cluster_routes_offered", about)

    def _take(self, version: str, ours: str) -> None:
        """Bring the cluster's text into force here, by the same checked path as any change."""
        if self._behind and self.link.clock() < self._retry_at:
            return
        found = self.link.routes()
        if not {"version", "text"} <= found.keys():
            return
        version, text = found["version"], found["text"]
        # A text that the cluster had once is no hand edit: a worker that is being replaced, or a
        # neighbour with the same file, may have written it.
        known = {tag_of(version), tag_of(ours), *found.get("tags", "").split("-")}
        try:
            spared = self._adopt(text, ours, known)
        except Refused as e:
            self._fall_behind(e, version)
            return
        self._behind = None
        if self._version == ours:
            self._version = version
            about = {"instance": self.link.instance, "version": version,
                     "by": found.get("by", "")}  # fmt: skip
            log.info("cluster_routes_taken", about)
        if spared:
            self._spare(spared)

    def _adopt(self, text: str, ours: str, known: set[str]) -> str:
        """Write `text` to the file; what stood there, if that was a hand edit, else ''."""
        spared = [""]

        def edit(table: Table) -> str:
            """The cluster's text, under the folder's lock."""
            if self._version != ours:  # a change was made here meanwhile, on top of this one
                return table.text
            spared[0] = "" if table.etag in known else table.text
            return text

        self._store.adopt(edit)
        return spared[0]

    def _fall_behind(self, e: Refused, version: str) -> None:
        self._retry_at = self.link.clock() + RETRY_S
        if self._behind != e.kind:
            log.error("cluster_routes_refused", {"version": version, "why": str(e)})
        self._behind = e.kind

    def _spare(self, text: str) -> None:
        """Keep a hand edit that came too late beside the file."""
        self._keep(self._mine, text)
        log.warning("cluster_file_kept", {"kept_in": str(self._mine)})

    def _keep(self, path: Path, text: str) -> None:
        with locked(self._store.path.parent, wait=True):
            replace_file(path, text, like=self._store.path)

    def _write_note(self) -> None:
        """Keep the version beside the file: a restart knows by it whether the file was edited."""
        if self._noted != self._version and not self._behind:
            version = self._version
            self._keep(self._note, version + "\n")
            self._noted = version

    def _read_note(self) -> str:
        return read_text(self._note).strip()[:80]

    # --- what is shown ---------------------------------------------------------------------------

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


def tag_for(text: str) -> str:
    """The ETag of a table with this text, without making one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_text(path: Path) -> str:
    """The text of a file, or '' when it cannot be read."""
    try:
        return read_file(path)
    except RoutesError:
        return ""


def instance_name(settings: Settings) -> str:
    """ROUTER_INSTANCE, or the machine's name and our port."""
    return settings.instance or f"{socket.gethostname()}:{settings.address[1]}"


def join(owner: Router) -> Cluster:
    """Make `owner` share its circuits and routes; it serves alone while Redis is out of reach."""
    link = Link(owner.settings.redis_url, instance_name(owner.settings), owner.clock)
    breakers = owner.breakers = SharedBreakers(link)
    cluster = Cluster(link, owner.store, breakers, owner.settings.routes)
    owner.store.agree = cluster.agree
    cluster.start()
    return cluster
