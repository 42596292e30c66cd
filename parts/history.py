"""What lasts longer than the process: one row a request, and what was spent, in SQLite.

A request that ends leaves its row in memory (`add`). One thread writes what came, at most half a
second later; it starts with the first row, ends when nothing comes, and closes the file then. What
was spent is kept in memory, too: it is read from the file at the start, and again whenever another
process wrote to it (in a reload the old worker still ends its streams). So a limit is asked of
memory, and nothing of a request waits for the disk.

The file is WAL and synced once per batch: a kill, a crash, a power cut lose the rows of the last
second and nothing older. Whatever is wrong with the file costs one warning: rows wait in memory,
and when those are too many their sums still do, until it can be written again.

    requests   a row for each: no prompt, no answer
    days       the sums of each day, category, model and client; limits and figures are read here,
               so a million requests cost as little as ten
    about      the ledger's name: two workers on one file are one ledger for the cluster

A write takes some 10 ms of CPU for 1,000 rows, on the one CPU that serves. In one piece it would
make the requests that come meanwhile 2 to 5 ms slower; so it is done in small steps with pauses,
and rows are booked as they come.

Who may touch what: `_lock` guards all fields but the thread's own (`_version`, `_file`, `_told`);
it is never held while the file is read or written. `_moving` is, by the thread while it moves rows
and sums from memory to the file, and by whoever adds both up: else it might find what is being
moved in none of them. No chat waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from parts.errors import RouterError
from parts.logs import now_text, where_it_broke
from parts.table import Limit, Table

log = logging.getLogger("llm_router")

BATCH_S = 0.5  # from write to write; with the time one takes, a kill loses less than a second
RETRY_S = 2.0  # a file that could not be written is tried again after this
IDLE_ROUNDS = 10  # the thread ends after so many without a row
WAIT_S = 1.0  # for another process that writes; by `usage` for our own thread, too
MOST_WAITING = 20_000  # rows in memory while the file cannot be written, about 8 MB
MOST_ROWS = 2_000_000  # rows in the file, about 500 MB
CHUNK = 10_000  # rows deleted in one step: nobody shall wait long for the file
NEAR = 0.8  # of a limit: then it is told
OURS = 0x6C6C6D72  # "llmr", in the file's head

# Each brings the file from the version before to its own; none is ever changed, only added.
STEPS = (
    """CREATE TABLE requests (seq INTEGER PRIMARY KEY, time REAL NOT NULL, id TEXT, dialect TEXT,
         category TEXT, mode TEXT, model TEXT, outcome TEXT, status INTEGER, attempts INTEGER,
         tokens_in INTEGER, tokens_out INTEGER, tokens_cached INTEGER, tokens_reasoning INTEGER,
         cost_usd REAL, cost_source TEXT, first_token_ms REAL, latency_ms REAL, client TEXT);
       CREATE INDEX by_model ON requests (model);
       CREATE INDEX by_outcome ON requests (outcome);
       CREATE TABLE days (day TEXT, category TEXT, model TEXT, client TEXT,
         requests INTEGER, success INTEGER, failed INTEGER, rejected INTEGER, cancelled INTEGER,
         tokens_in INTEGER, tokens_out INTEGER, tokens_cached INTEGER, tokens_reasoning INTEGER,
         cost_usd REAL, unpriced_requests INTEGER,
         priced_in INTEGER, priced_out INTEGER, priced_cached INTEGER, priced_usd REAL,
         PRIMARY KEY (day, category, model, client)) WITHOUT ROWID;
       CREATE TABLE about (ledger TEXT);
       INSERT INTO about VALUES (lower(hex(randomblob(8))))""",
    # Without it SQLite walks all rows of one outcome for the few of a model that is seldom asked.
    "CREATE INDEX by_both ON requests (model, outcome)",
)


class Row(NamedTuple):
    """One request that has ended."""

    time: float
    id: str
    dialect: str
    category: str
    mode: str
    model: str
    outcome: str
    status: int
    attempts: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    tokens_reasoning: int
    cost_usd: float | None  # of all attempts, as far as known
    cost_source: str
    first_token_ms: float | None
    latency_ms: float
    client: str


COLUMNS = ", ".join(Row._fields)
GROUPS = ("day", "category", "model", "client")
# `priced_`: of the requests whose cost and tokens are both known, which alone can be compared.
COUNTS = ("requests", "success", "failed", "rejected", "cancelled", "tokens_in", "tokens_out",
          "tokens_cached", "tokens_reasoning", "cost_usd", "unpriced_requests",
          "priced_in", "priced_out", "priced_cached", "priced_usd")  # fmt: skip
COST, SHOWN = COUNTS.index("cost_usd"), COUNTS.index("priced_in")
AT_ONCE = 16  # rows that are booked or written in one go, while a request may wait
AT_MOST = 50  # rows in one statement: SQLite took 999 values before 3.32
PAUSE_S = 0.001
PAUSES_S = 0.1  # with the steps between, in one write: under load it shall not take ever longer
_PLACES = f"({', '.join('?' * len(Row._fields))})"
_BOOK = (
    f"INSERT INTO days ({', '.join((*GROUPS, *COUNTS))}) "
    f"VALUES ({', '.join('?' * (len(GROUPS) + len(COUNTS)))}) ON CONFLICT DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
)
_SUMS = ", ".join(f"SUM({name})" for name in COUNTS)

Cell = tuple[str, str, str, str]  # day, category, model, client
Sum = tuple[str, str, str]  # span (2026-11-26 or 2026-11), kind (all, category, client), name


T = TypeVar("T")


class Unusable(Exception):
    """The file cannot be used; a sentence for a person."""


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(number * 86400))


def day_of(seconds: float) -> str:
    """The day of a time, UTC: 2026-11-26. Its first seven characters are the month."""
    return _day(int(seconds) // 86400)


def row_of(call: Any) -> Row:
    """What is kept of a metrics.Record: tokens and cost of all its attempts."""
    tokens: dict[str, int] = dict.fromkeys(("input", "output", "cached", "reasoning"), 0)
    cost: float | None = None
    for attempt in call.attempts:
        for kind in tokens:
            tokens[kind] += attempt.tokens[kind]
        if attempt.cost_usd is not None:
            cost = (cost or 0.0) + attempt.cost_usd
    last, first_s = call.last, call.first_token_s
    return Row(
        time.time(), call.id, call.dialect, call.category, call.mode, last.model.id if last else "",
        call.counted_as, call.status, len(call.attempts), tokens["input"],
        tokens["output"], tokens["cached"], tokens["reasoning"], cost,
        last.cost_source if last else "unknown",
        None if first_s is None else round(first_s * 1000, 2), round(call.seconds * 1000, 2),
        call.client,
    )  # fmt: skip


def counts_of(row: Row) -> list[float]:
    """What a row adds to the sums, in the order of COUNTS."""
    outcome, known = row.outcome, row.cost_source != "unknown"
    counts: list[float] = [
        1, outcome == "success", outcome == "failed", outcome == "rejected", outcome == "cancelled",
        *row[9:13], row.cost_usd or 0.0, not known and outcome in ("success", "cancelled"),
    ]  # fmt: skip
    comparable = known and row.cost_usd is not None and row.tokens_in > 0
    return counts + ([row.tokens_in, row.tokens_out, row.tokens_cached, row.cost_usd or 0.0]
                     if comparable else [0, 0, 0, 0.0])  # fmt: skip


def add_to(sums: dict[Any, list[float]], key: Any, counts: Sequence[float]) -> None:
    """Add `counts` to those under `key`."""
    before = sums.get(key)
    if before is None:
        sums[key] = list(counts)
    else:
        for n, count in enumerate(counts):
            before[n] += count


def spans_of(cell: Cell) -> Iterator[Sum]:
    """The sums that a cell is part of."""
    day, category, _, client = cell
    for span in (day, day[:7]):
        yield from ((span, "all", ""), (span, "category", category), (span, "client", client))


class History:
    """Requests and spending. `path` None: of this process alone, in memory."""

    def __init__(self, path: Path | None, peers: Any = None):
        self._path = path
        self._peers = peers  # other instances, told when a limit is near; None: there are none
        self._moving = threading.Lock()  # taken before `_lock`
        self._lock = threading.Lock()  # guards what follows; never held during I/O
        self._rows: list[Row] = []  # yet to be written
        self._writing: list[Row] = []  # just being written
        self._counted = 0  # so many of them are in the sums
        self._cells: dict[Cell, list[float]] = {}  # sums yet to be written
        self._sums: dict[Sum, list[float]] = {}  # of this day and month, written or not
        self._elsewhere: dict[Sum, float] = {}  # USD that other instances spent
        self._table: Table | None = None  # the last one that a request came with
        self._near = False  # some limit is
        self._thread: threading.Thread | None = None
        self._error, self._since, self._lost = "", "", 0
        self.ledger = secrets.token_hex(8)
        self._stop = threading.Event()
        self._version = 0  # SQLite's: another one tells that somebody else wrote
        self._file = 0  # the inode that is open
        self._told: dict[tuple[Limit, str], float] = {}
        self._next_tidy = 0.0
        if path:
            try:
                self._open(path).close()
            except (sqlite3.Error, OSError, Unusable) as e:
                self._complain(e)

    # --- asked by requests: memory only -----------------------------------------------------------

    def add(self, call: Any) -> None:
        """Keep a metrics.Record that has ended, if it got as far as a category.

        What is refused before, for want of a key perhaps, must not push out what was paid for.
        """
        if call.mode == "none":
            return
        row = row_of(call)
        with self._lock:
            self._table = call.table
            self._rows.append(row)
            if len(self._rows) - self._counted >= AT_ONCE:
                self._count()
            if len(self._rows) > MOST_WAITING:
                self._drop_oldest()
            self._start()
        if self._near and self._peers is not None:
            self._peers.tell()

    def spent_limit(self, table: Table, category: str, client: str) -> Limit | None:
        """A limit of this request that is spent; None when it may go.

        Of the category that `on_limit` names its own limits alone count.
        """
        if not table.limits:
            return None
        keys = [("category", category)]
        if category != table.on_limit:
            keys += [("all", ""), ("client", client)]
        limits = [limit for key in keys for limit in table.limits.get(key, ())]
        with self._lock:
            self._table = table
            self._start()
            self._count()
            return next((limit for limit in limits if self._spent(limit) >= limit.usd), None)

    def way_out(self, table: Table, category: str, client: str) -> str:
        """The category of `on_limit` for a request whose limit is spent; '' where there is none.

        Who asks for one model gets that one or a refusal.
        """
        other = table.on_limit
        if other in ("refuse", category) or category == "explicit":
            return ""
        return other if self.spent_limit(table, category, client) else ""

    def refuse_spent(self, table: Table, category: str, client: str) -> None:
        """RouterError 429 when a limit of this request is spent."""
        limit = self.spent_limit(table, category, client)
        if limit is None:
            return
        now = time.time()
        daily = limit.span == "day"
        end = "at midnight UTC" if daily else "with the month, UTC"
        word, key = ("daily", "daily_limit_usd") if daily else ("monthly", "monthly_limit_usd")
        whose = f" of {limit.kind} {limit.name}" if limit.name else ""
        text = f"the {word} limit{whose} of {limit.usd} USD ({key}) is spent; it ends {end}"
        wait_s = int((_day_end(now) if daily else month_end(now)) - now) + 1
        headers = {"Retry-After": str(wait_s), "x-should-retry": "false"}
        raise RouterError(429, "budget_exhausted", text, headers=headers)

    def figures(self, span: str, kind: str = "all", name: str = "",
                table: Table | None = None) -> dict[str, Any]:  # fmt: skip
        """The sums of this `span` (day or month), with limit and saving where `table` has them."""
        now = day_of(time.time())
        key = (now if span == "day" else now[:7], kind, name)
        with self._lock:
            self._start()
            self._count()
            counts = list(self._sums.get(key, [0] * len(COUNTS)))
            elsewhere = self._elsewhere.get(key, 0.0)
        shown = shown_of(counts, table)
        for limit in table.limits.get((kind, name), ()) if table else ():
            if limit.span == span:
                left = round(max(0.0, limit.usd - counts[COST] - elsewhere), 10)
                shown |= {"limit_usd": limit.usd, "left_usd": left}
        if elsewhere:
            shown["elsewhere_usd"] = round(elsewhere, 10)
        return shown

    def health(self) -> dict[str, Any]:
        """For GET /health: {status: ok, off or failing, error, since, lost}."""
        if not self._path:
            return {"status": "off"}
        with self._lock:
            error, since, lost = self._error, self._since, self._lost
        shown: dict[str, Any] = {"status": "failing" if error else "ok"}
        shown |= {"error": error, "since": since} if error else {}
        return shown | ({"lost": lost} if lost else {})

    def _start(self) -> None:
        """Have the thread write, or look what others wrote; under the lock."""
        if self._thread is None and not self._stop.is_set():
            thread = threading.Thread(target=self._run, name="history", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be had now: the next row asks again
                return
            self._thread = thread
            atexit.unregister(self.close)
            atexit.register(self.close)

    # --- the sums: all under the lock -------------------------------------------------------------

    def _count(self) -> None:
        """Book the rows that came since into the sums."""
        if self._counted == len(self._rows):
            return
        cells: dict[Cell, list[float]] = {}
        for row in self._rows[self._counted :]:
            cell = (day_of(row.time), row.category, row.model, row.client)
            add_to(cells, cell, counts_of(row))
        self._counted = len(self._rows)
        for cell, counts in cells.items():
            add_to(self._cells, cell, counts)
            for key in spans_of(cell):
                add_to(self._sums, key, counts)

    def _spent(self, limit: Limit) -> float:
        now = day_of(time.time())
        key = (now if limit.span == "day" else now[:7], limit.kind, limit.name)
        mine = self._sums.get(key)
        return (mine[COST] if mine else 0.0) + self._elsewhere.get(key, 0.0)

    def _drop_oldest(self) -> None:
        """Of the rows that wait; their sums stay."""
        self._count()
        surplus = len(self._rows) - MOST_WAITING * 9 // 10
        del self._rows[:surplus]
        self._counted -= surplus
        self._lost += surplus

    # --- the cluster's thread ---------------------------------------------------------------------

    def share(self) -> dict[str, float]:
        """What was spent of each limit, here; {} where there is no limit."""
        with self._lock:
            self._count()
            limits = self._table.limits.values() if self._table else ()
            now = day_of(time.time())
            keys = [(now if limit.span == "day" else now[:7], limit.kind, limit.name)
                    for group in limits for limit in group]  # fmt: skip
            found = {key: self._sums.get(key) for key in keys}
        return {"|".join(key): counts[COST] if counts else 0.0 for key, counts in found.items()}

    def hear(self, others: Iterable[Mapping[str, float]]) -> None:
        """What the others spent."""
        total: dict[Sum, float] = {}
        for spent in others:
            for name, usd in spent.items():
                span, _, rest = name.partition("|")
                kind, _, who = rest.partition("|")
                total[span, kind, who] = total.get((span, kind, who), 0.0) + usd
        with self._lock:
            self._elsewhere = total

    # --- the thread -------------------------------------------------------------------------------

    def close(self) -> None:
        """Write what waits, for the process ends."""
        self._stop.set()
        thread = self._thread
        if thread:
            thread.join(5)

    def _run(self) -> None:
        db, idle, pause_s = None, 0, BATCH_S
        try:
            while idle < IDLE_ROUNDS or not self._may_end():
                ends, wrote, began = self._stop.wait(pause_s), False, time.monotonic()
                try:
                    if db and self._file != _inode(self._path):  # moved away, or replaced
                        db.close()
                        db = None
                    db = db or (self._open(self._path) if self._path else None)
                    wrote = self._write(db) if db else self._forget_rows()
                    pause_s = max(BATCH_S / 2, began + BATCH_S - time.monotonic())
                except (sqlite3.Error, OSError, Unusable) as e:
                    pause_s = RETRY_S
                    self._complain(e)
                    _close(db)
                    db = None
                self._tell_limits()
                idle = 0 if wrote else idle + 1
                if ends:
                    return
        except Exception:
            log.error("history_error", {"where": where_it_broke()})
            raise
        finally:
            _close(db)
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _may_end(self) -> bool:
        """True, and the next row starts another thread, unless one has just come."""
        with self._lock:
            if self._rows and self._path:
                return False
            self._thread = None
            return True

    def _open(self, path: Path) -> sqlite3.Connection:
        """The file, and the sums in it, which another process may have changed."""
        db = opened(path)
        try:
            self._file = _inode(path)
            [ledger] = db.execute("SELECT ledger FROM about").fetchone()
            self._version = db.execute("PRAGMA data_version").fetchone()[0]
            self._take(sums_in(db))
        except BaseException:
            db.close()
            raise
        self.ledger = str(ledger)
        return db

    def _take(self, sums: dict[Sum, list[float]]) -> None:
        """The sums of the file, and what is not yet in it."""
        with self._lock:
            self._count()
            for cell, counts in self._cells.items():
                for key in spans_of(cell):
                    add_to(sums, key, counts)
            self._sums = sums

    def _write(self, db: sqlite3.Connection) -> bool:
        """Write what waits, in one transaction; the sums anew when somebody else wrote.

        False when there was nothing.
        """
        with self._moving:
            with self._lock:
                self._count()
                rows, cells = self._rows, self._cells
                self._writing, self._rows, self._cells, self._counted = rows, [], {}, 0
            try:
                if rows or cells:
                    with transaction(db):
                        insert(db, rows, partial(self._pause, time.monotonic() + PAUSES_S))
                        db.executemany(_BOOK, [(*cell, *counts) for cell, counts in cells.items()])
            except BaseException:
                with self._lock:
                    self._writing, self._rows[:0] = [], rows
                    self._counted += len(rows)
                    newer, self._cells = self._cells, cells
                    for cell, counts in newer.items():
                        add_to(self._cells, cell, counts)
                raise
            self._writing = []
        version = db.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._take(sums_in(db))
            self._version = version
        self._mended()
        if time.monotonic() >= self._next_tidy:
            days = self._table.history_days if self._table else 90
            more = tidy(db, days)
            self._next_tidy = time.monotonic() + (0.0 if more else 60.0)
        return bool(rows or cells)

    def _pause(self, by: float) -> bool:
        """Let requests go first; False from the time `by` on, and when the process ends."""
        return time.monotonic() < by and not self._stop.wait(PAUSE_S)

    def _forget_rows(self) -> bool:
        """Without a file: keep the last rows, and the sums of the last days. False, to end soon."""
        oldest = day_of(time.time() - 86400 * (self._table.history_days if self._table else 90))
        with self._lock:
            self._count()
            surplus = max(0, len(self._rows) - 1000)
            del self._rows[:surplus]
            self._counted -= surplus
            self._cells = {cell: n for cell, n in self._cells.items() if cell[0] >= oldest}
        return False

    def _complain(self, e: Exception) -> None:
        why = str(e) if isinstance(e, Unusable) else sentence(e)
        with self._lock:
            is_new, self._error = why != self._error, why
            self._since = self._since if self._since and not is_new else now_text()
        if is_new:
            log.warning("history_failing", {"file": str(self._path), "why": why})

    def _mended(self) -> None:
        with self._lock:
            was, self._error, self._since = self._error, "", ""
        if was:
            log.info("history_back", {"file": str(self._path)})

    def _tell_limits(self) -> None:
        """One line when a limit is nearly spent, one when it is; then others hear of each cent."""
        table, found, today = self._table, [], day_of(time.time())
        with self._lock:
            self._count()
            self._sums = {key: n for key, n in self._sums.items() if key[0] in (today, today[:7])}
            for group in table.limits.values() if table else ():
                found += [(limit, self._spent(limit)) for limit in group]
        self._near = any(spent >= NEAR * limit.usd for limit, spent in found)
        for limit, spent in found:
            key, level = (limit, today if limit.span == "day" else today[:7]), spent / limit.usd
            reached = 1.0 if level >= 1 else NEAR if level >= NEAR else 0.0
            if reached > self._told.get(key, 0.0):
                self._told[key] = reached
                facts = {"limit": limit.span, "of": f"{limit.kind} {limit.name}".strip(),
                         "usd": limit.usd, "spent_usd": round(spent, 6)}  # fmt: skip
                log.warning("limit_spent" if reached == 1 else "limit_near", facts)

    # --- read by routes ---------------------------------------------------------------------------

    def usage(self, by: Sequence[str], days: int, table: Table,
              client: str = "") -> list[dict[str, Any]]:  # fmt: skip
        """Sums of the last `days` grouped `by` some of GROUPS, what is not yet written included."""
        first = day_of(time.time() - 86400 * (days - 1))
        found: dict[tuple[str, ...], list[float]] = {}
        # While the disk hangs we go on without: what is being moved is left out.
        is_ours = self._moving.acquire(timeout=WAIT_S)
        try:
            if self._path:
                found = _asked(self._path, lambda db: sums_by(db, by, first), found)
            with self._lock:
                self._count()
                cells = {cell: list(counts) for cell, counts in self._cells.items()}
        finally:
            if is_ours:
                self._moving.release()
        for cell, counts in cells.items():
            if cell[0] >= first:
                add_to(found, tuple(cell[GROUPS.index(name)] for name in by), counts)
        return [
            dict(zip(by, key, strict=True)) | shown_of(counts, table)
            for key, counts in sorted(found.items())
        ]

    def requests(self, most: int, model: str = "", outcome: str = "",
                 before: int | None = None) -> list[dict[str, Any]]:  # fmt: skip
        """The last requests, newest first; `before` a `seq`: older ones."""
        with self._lock:
            waiting = [] if before else [*self._writing, *self._rows][::-1]
        wanted = [row for row in waiting
                  if model in ("", row.model) and outcome in ("", row.outcome)]  # fmt: skip
        found = [{"seq": None, **row._asdict()} for row in wanted[:most]]
        if self._path and len(found) < most:
            written: list[dict[str, Any]] = _asked(
                self._path, lambda db: last_rows(db, most, model, outcome, before), []
            )
            mine = {row.id for row in waiting}  # some may have been written meanwhile
            found += [row for row in written if row["id"] not in mine]
        return found[:most]


# --- the file ------------------------------------------------------------------------------------


def opened(path: Path, *, writes: bool = True) -> sqlite3.Connection:
    """A connection to the history, upgraded if need be; Unusable, sqlite3.Error or OSError."""
    if writes and not path.exists():  # others on this machine need not know what is asked here
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    uri = f"{path.absolute().as_uri()}?mode={'rw' if writes else 'ro'}"
    db = sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None,
                         check_same_thread=False)  # fmt: skip
    try:
        version = _version_of(db)
        if writes:
            db.execute("PRAGMA synchronous = FULL")
            if version < len(STEPS):
                _upgrade(db, version)
        elif version != len(STEPS):
            raise Unusable("it is of an older version; the running service upgrades it")
    except BaseException:
        db.close()
        raise
    return db


def insert(db: sqlite3.Connection, rows: Sequence[Row],
           pause: Callable[[], bool] = lambda: False) -> None:  # fmt: skip
    """Append `rows`: some at once, and fewer behind each `pause` that was made (True)."""
    at = 0
    while at < len(rows):
        some = rows[at : at + (AT_ONCE if pause() else AT_MOST)]
        places = ", ".join([_PLACES] * len(some))
        db.execute(f"INSERT INTO requests ({COLUMNS}) VALUES {places}", [*chain(*some)])
        at += len(some)


def _version_of(db: sqlite3.Connection) -> int:
    """The version of the file's tables, 0 for an empty file; Unusable when it is not ours."""
    [mark], [version] = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    empty = not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    if not (mark == OURS or (empty and version == 0)):
        raise Unusable("it is a database of another program; name another with ROUTER_HISTORY")
    if version > len(STEPS):
        raise Unusable("a newer version of the router wrote it; name another with ROUTER_HISTORY")
    return int(version)


def _upgrade(db: sqlite3.Connection, version: int) -> None:
    """Bring the file to the newest version, in one transaction: all of it or nothing."""
    if version == 0:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, and before WAL
        db.execute("PRAGMA journal_mode = WAL")
    with transaction(db):
        for step in STEPS[_version_of(db) :]:  # another process may have been quicker
            for statement in step.split(";"):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(STEPS)}")
        db.execute(f"PRAGMA application_id = {OURS}")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
            db.execute("ROLLBACK")
        raise


def _asked(path: Path, question: Callable[[sqlite3.Connection], T], nothing: T) -> T:
    """The file's answer; `nothing` when it cannot be read: /health says what is wrong."""
    try:
        with contextlib.closing(opened(path, writes=False)) as db:
            return question(db)
    except (sqlite3.Error, OSError, Unusable):
        return nothing


def _close(db: sqlite3.Connection | None) -> None:
    with contextlib.suppress(sqlite3.Error):
        if db:
            db.close()


def _inode(path: Path | None) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_ino if path else 0
    return 0


def sums_in(db: sqlite3.Connection) -> dict[Sum, list[float]]:
    """The sums of this day and this month."""
    today = day_of(time.time())
    query = f"SELECT day = ?, category, client, {_SUMS} FROM days WHERE day >= ? GROUP BY 1, 2, 3"
    sums: dict[Sum, list[float]] = {}
    for is_today, category, client, *counts in db.execute(query, (today, today[:7])):
        for span in (today, today[:7]) if is_today else (today[:7],):
            for kind, name in (("all", ""), ("category", category), ("client", client)):
                add_to(sums, (span, kind, name), counts)
    return sums


def sums_by(
    db: sqlite3.Connection, by: Sequence[str], first: str
) -> dict[tuple[str, ...], list[float]]:
    """The sums since the day `first`, grouped by some of GROUPS."""
    names = ", ".join(name for name in GROUPS if name in by)
    query = f"SELECT {names}, {_SUMS} FROM days WHERE day >= ? GROUP BY {names}"
    order = [name for name in GROUPS if name in by]
    found = {}
    for values in db.execute(query, (first,)):
        named = dict(zip(order, values, strict=False))
        found[tuple(named[name] for name in by)] = list(values[len(order) :])
    return found


def last_rows(
    db: sqlite3.Connection,
    most: int,
    model: str = "",
    outcome: str = "",
    before: int | None = None,
    after: int | None = None,
) -> list[dict[str, Any]]:
    """The last rows, newest first, with their `seq`."""
    wanted = [("model = ?", model or None), ("outcome = ?", outcome or None),
              ("seq < ?", before), ("seq > ?", after)]  # fmt: skip
    terms = [(term, value) for term, value in wanted if value is not None]
    where = f"WHERE {' AND '.join(term for term, _ in terms)}" if terms else ""
    query = f"SELECT seq, {COLUMNS} FROM requests {where} ORDER BY seq DESC LIMIT ?"
    names = ("seq", *Row._fields)
    return [dict(zip(names, row, strict=True))
            for row in db.execute(query, (*(value for _, value in terms), most))]  # fmt: skip


def tidy(db: sqlite3.Connection, days: int) -> bool:
    """Delete the oldest rows that are too old or too many, a chunk of them; True: more are left.

    The sums of this month stay as long as a limit may ask for them.
    """
    now = time.time()
    # Two questions: asked for both at once, SQLite would read all rows, and the writing waits.
    first, last = (db.execute(f"SELECT {end}(seq) FROM requests").fetchone()[0] or 0
                   for end in ("MIN", "MAX"))  # fmt: skip
    surplus = last - first + 1 - MOST_ROWS
    oldest = day_of(now - 86400 * days)
    with transaction(db):
        gone = db.execute(
            "DELETE FROM requests WHERE seq IN (SELECT seq FROM requests ORDER BY seq LIMIT ?) "
            "AND (time < ? OR seq < ?)",
            (CHUNK, now - 86400 * days, first + surplus),
        ).rowcount
        db.execute("DELETE FROM days WHERE day < ?", (min(oldest, day_of(now)[:7]),))
    if gone:
        db.executescript("PRAGMA incremental_vacuum")  # `execute` would give back one page only
    return gone == CHUNK


def sentence(e: Exception) -> str:
    """What is wrong with the file, for a person."""
    text = str(e)
    if "locked" in text or "busy" in text:
        return "another program holds it locked"
    if "full" in text:
        return "the disk is full"
    if isinstance(e, sqlite3.DatabaseError) and not isinstance(e, sqlite3.OperationalError):
        return "it is damaged or no database: move it away, and a new one begins"
    return "it cannot be written: its folder or the file is read-only or not there"


# --- what is shown -------------------------------------------------------------------------------


def shown_of(counts: Sequence[float], table: Table | None) -> dict[str, Any]:
    """The sums by name, and what they would have cost at `compare_with`'s price: an estimate."""
    shown: dict[str, Any] = {
        name: round(count, 10) if name.endswith("usd") else int(count)
        for name, count in zip(COUNTS[:SHOWN], counts, strict=False)
    }
    price = table.compare_with.cost if table and table.compare_with else None
    if price:
        asked, answered, cached, spent = counts[SHOWN:]
        usd = (asked - cached) * price["input"] + answered * price["output"]
        usd += cached * price.get("cached_input", price["input"])
        shown["saved_usd"] = round(usd / 1e6 - spent, 10)
    return shown


def _day_end(now: float) -> float:
    return (int(now) // 86400 + 1) * 86400.0


def month_end(now: float) -> float:
    """When this month ends, UTC."""
    year, month = time.gmtime(now)[:2]
    days = 0
    while time.gmtime(now + days * 86400)[:2] == (year, month):
        days += 1
    return (int(now) // 86400 + days) * 86400.0
