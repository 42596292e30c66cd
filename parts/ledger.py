"""The commands `costs` and `requests`: the history in a terminal, with or without a service."""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from parts.errors import RoutesError
from parts.history import (
    COUNTS,
    GROUPS,
    Unusable,
    day_of,
    last_rows,
    opened,
    sentence,
    shown_of,
    sums_by,
)
from parts.livefile import read_file
from parts.settings import Settings, SettingsError
from parts.table import Table, load_table

LOOK_EVERY_S = 0.5


def history_of(settings: Settings) -> sqlite3.Connection:
    """The file, to read; SettingsError with a sentence."""
    path = settings.history
    if not path:
        raise SettingsError("ROUTER_HISTORY: the history is off")
    if not path.exists():
        raise SettingsError(f"{path}: there is no history yet; ROUTER_ROUTES and ROUTER_HISTORY "
                            "say where it is looked for")  # fmt: skip
    try:
        return opened(path, writes=False)
    except (sqlite3.Error, OSError, Unusable) as e:
        why = e if isinstance(e, Unusable) else sentence(e)
        raise SettingsError(f"{path}: {why}") from e


def table_of(path: Path) -> Table | None:
    """The routing table, for the model to compare with; None while the file is bad."""
    try:
        return load_table(read_file(path))
    except RoutesError:
        return None


def show_costs(settings: Settings, by: str, days: int, form: str) -> int:
    """Print the sums of the last `days`, as a table, `csv` or `json`."""
    names = by.split(",")
    if odd := [name for name in names if name not in GROUPS] or len(set(names)) < len(names):
        raise SettingsError(f"--by: expected some of {', '.join(GROUPS)}, each once, got {odd}")
    with closing(history_of(settings)) as db:
        first = day_of(time.time() - 86400 * (days - 1))
        sums = sorted(sums_by(db, names, first).items())
    table = table_of(settings.routes)
    rows = [dict(zip(names, key, strict=True)) | shown_of(counts, table) for key, counts in sums]
    if form == "json":
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    if form == "csv":
        fields = [*names, *shown_of([0] * len(COUNTS), table)]
        writer = csv.DictWriter(sys.stdout, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return 0
    total = shown_of([sum(column) for column in zip(*(c for _, c in sums), strict=True)], table) \
        if sums else {}  # fmt: skip
    head = [*names, "requests", "failed", "tokens in", "tokens out", "cost"]
    head += ["saved (estimate)"] if total and "saved_usd" in total else []
    lines = [head, *(line_of(names, row) for row in rows)]
    if len(rows) > 1:
        lines.append(line_of(names, total | dict.fromkeys(names, "") | {names[0]: "all"}))
    sys.stdout.write(columns(lines, len(names)) if rows else "nothing yet\n")
    if total.get("unpriced_requests"):
        sys.stdout.write(f"{total['unpriced_requests']:,} more at a cost that nobody knows\n")
    return 0


def line_of(names: Sequence[str], row: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    counts = [f"{row[key]:,}" for key in ("requests", "failed", "tokens_in", "tokens_out")]
    usd = [f"${row[key]:,.4f}" for key in ("cost_usd", "saved_usd") if key in row]
    return [*(str(row[name]) or "-" for name in names), *counts, *usd]


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """The lines with their columns under each other; the first `left` ones begin at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*padded, ""])


def show_requests(settings: Settings, most: int, model: str, outcome: str, follow: bool,
                  as_json: bool) -> int:  # fmt: skip
    """Print the last requests, oldest first; with `follow` those that end from now on, too."""
    after = None
    while True:
        with closing(history_of(settings)) as db:
            rows = last_rows(db, most, model, outcome, after=after)[::-1]
        for row in rows:
            sys.stdout.write((json.dumps(row) if as_json else text_of(row)) + "\n")
        sys.stdout.flush()
        if not follow:
            return 0
        after = rows[-1]["seq"] if rows else after or 0
        most = 10_000
        time.sleep(LOOK_EVERY_S)


def text_of(row: Mapping[str, Any]) -> str:
    """One request, for a person."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
    cost = "   unknown" if row["cost_usd"] is None else f"${row['cost_usd']:.7f}"
    tries = f" after {row['attempts']} attempts" if row["attempts"] > 1 else ""
    took = f"{row['latency_ms'] / 1000:7.2f} s"
    tokens = f"{row['tokens_in']:>7,} > {row['tokens_out']:<6,}"
    who = f"{row['model'] or 'no model asked'}{tries}, {row['client']}"
    said = f"{row['outcome']:9s} {row['status']}  {took}  {cost:>10s}  {tokens}"
    return f"{at}  {said} {row['category']} by {row['mode']}: {who}"
