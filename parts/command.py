"""The command line: serve, route, check, costs, requests."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from parts.errors import RoutesError
from parts.livefile import Store, read_file, replace_file
from parts.settings import (
    HERE,
    NAMES,
    VERSION,
    Settings,
    SettingsError,
    absolute_paths,
    hint,
    read_dotenv,
    read_secret,
)  # fmt: skip
from parts.table import Table, Upstream, load_table, slim_text

__all__ = ["VERSION", "Settings", "SettingsError", "main", "read_dotenv", "read_secret"]


Explain = Callable[[Settings, str], dict[str, Any]]


def main(explain: Explain, argv: list[str] | None = None) -> int:
    """The command line; exit status 0 fine, 1 not fine, 2 wrong usage.

    `explain` makes the dry run of a text in this process, for when no service runs.
    """
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        if args.command == "serve":
            return run_serve(args.or_demo, args.json)
        if args.command == "route":
            return run_route(args.text, args.json, explain)
        if args.command == "check" and args.banner:
            return run_banner()
        if args.command == "check":
            return run_check(args.file, args.live, args.json, args.slim)
        if args.command in ("costs", "requests"):
            return run_history(args)
    except (SettingsError, RoutesError) as e:
        errors = str(e).splitlines()
        if args.json:
            sys.stdout.write(json.dumps({"ok": False, "errors": errors}, ensure_ascii=False) + "\n")
        for error in () if args.json else errors:
            sys.stderr.write(f"{mark('error', 31, sys.stderr)}: {error}\n")
        return 1
    parser.print_help()
    return 2


def command_line() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser("router.py", description="An OpenAI-compatible LLM router.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the service (settings: environment and .env)")
    serve.add_argument("--or-demo", action="store_true", help="demo texts when there is no key")
    route = commands.add_parser("route", help="say where a text would go and why")
    route.add_argument("text", help="what a person would say")
    check = commands.add_parser("check", help="say what is wrong with routes.json and the settings")
    check.add_argument("file", nargs="?", help="default: ROUTER_ROUTES, or routes.json")
    check.add_argument("--banner", action="store_true", help="say where the service will listen")
    check.add_argument("--live", action="store_true", help="ask each upstream what it knows; free")
    check.add_argument("--slim", action="store_true", help="take the built-in keywords out of it")
    costs = commands.add_parser("costs", help="say what was spent, from the history")
    costs.add_argument("--by", default="day", help="day, category, model, client; some with commas")
    costs.add_argument("--days", type=int, default=30, help="how many, today (UTC) included")
    costs.add_argument("--csv", action="store_true", help="for a spreadsheet")
    kept = commands.add_parser("requests", help="show the last requests of the history")
    kept.add_argument("-n", type=int, default=20, help="how many at most")
    kept.add_argument("--model", default="", help="only those that this model answered")
    kept.add_argument("--outcome", default="", help="success, failed, rejected or cancelled")
    kept.add_argument("--follow", action="store_true", help="go on as they end")
    for command in (serve, route, check, costs, kept):
        command.add_argument("--json", action="store_true", help="for a program: one JSON document")
    return parser


def mark(word: str, color: int, stream: TextIO) -> str:
    """`word` in a color on a terminal, plain in a pipe or with NO_COLOR set."""
    colored = stream.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{color}m{word}\x1b[0m" if colored else word


def say(text: str) -> None:
    """Write to stderr. That it is closed, or its disk full, is no reason not to start."""
    try:
        if sys.stderr:
            sys.stderr.write(text)
            sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  or the exit would find its disk full


def read_environment() -> tuple[Settings, list[str]]:
    """The settings of the environment and of `.env`, and the names that `.env` sets."""
    absolute_paths(os.environ, Path.cwd())
    names = read_dotenv(HERE / ".env")
    return Settings.from_env(os.environ), names


def run_serve(or_demo: bool, as_json: bool) -> int:
    """Become gunicorn; 1 when routes.json or a setting is unusable."""
    settings, names = read_environment()
    table = table_for_start(settings)
    for doubt in doubts_about(names, table):
        say(f"router: {doubt}\n")
    if or_demo and len(without_key(settings, table)) == len(table.upstreams):
        os.environ["ROUTER_DEMO"] = "1"
    if as_json:
        os.environ["ROUTER_LOG_FORMAT"] = "json"
    os.chdir(HERE)
    os.execv(
        sys.executable, [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "wsgi:app"]
    )


def table_for_start(settings: Settings) -> Table:
    """The table to start with: routes.json, or with a loud word the last good one."""
    try:
        store = Store(settings.routes, load_table)
    except RoutesError as e:
        raise in_file(settings.routes, e) from e
    if store.error:
        say(f"router: {settings.routes} IS BROKEN, serving the last good one: {store.error}\n")
    check_proxies(store.current())
    return store.current()


def in_file(path: Path, e: RoutesError) -> RoutesError:
    """The same findings, each with the name of the file."""
    return RoutesError("\n".join(f"{path}: {line}" for line in str(e).splitlines()))


def check_proxies(table: Table) -> None:
    """SettingsError when a proxy of the environment stands before an upstream and is unusable."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        from parts.exchange import (
            proxies_for,  # only here: a start without a proxy needs no HTTP client
        )

        for upstream in table.upstreams.values():
            proxies_for(upstream.base_url)


def doubts_about(names: list[str], table: Table) -> list[str]:
    """Names of `.env` that nobody reads but that are nearly one that is read."""
    keys = [upstream.api_key_env for upstream in table.upstreams.values() if upstream.api_key_env]
    known = [*keys, *(f"{key}_FILE" for key in keys), *NAMES, "HTTPS_PROXY", "HTTP_PROXY"]
    odd = [name for name in names if name not in known and not name.startswith("ROUTER_")]
    told = {name: hint(name, known, 0.85) for name in odd}
    return [f".env: {name} is read by nobody{near}" for name, near in told.items() if near]


def run_route(text: str, as_json: bool, explain: Explain) -> int:
    """Print the dry run of `text`: by the running service, else here with circuits unknown."""
    settings, _ = read_environment()
    headers = {"Authorization": f"Bearer {settings.api_key or settings.admin_token}"}
    try:
        status, found = ask_service(settings.url, text, headers)
    except (OSError, ValueError, KeyError, TypeError):  # it does not run, or is a stranger
        status, found = 200, explain(replace(settings, redis_url="", history=None), text)
        for model in found["chain"]:
            model["circuit"] = "unknown"
    if as_json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    elif status != 200:
        sys.stderr.write(f"router: {found['error']['message']}\n")
    else:
        sys.stdout.write(route_text(found))
    return 0 if status == 200 else 1


def ask_service(url: str, text: str, headers: Mapping[str, str]) -> tuple[int, Any]:
    """Status and body of the running service's dry run; an error when there is no such service."""
    import requests  # only here: the check at each start would need a third of its time for it

    session = requests.Session()
    session.trust_env = False  # no proxy gets to see the key
    if session.get(f"{url}/health", timeout=5).json()["service"] != "llm-router":
        raise ValueError("a stranger on our port")  # who does not get it either
    reply = session.post(f"{url}/route", json={"text": text}, headers=headers, timeout=10)
    return reply.status_code, reply.json()


def route_text(found: Mapping[str, Any]) -> str:
    """The dry run for a person."""
    words = ", ".join(f"{w['word']} {w['weight']:g}" for w in found["words"])
    lines = [
        f"category  {found['category']}", f"mode      {found['mode']}",
        f"reason    {found['reason']}", f"margin    {found['margin']}", f"words     {words or '-'}",
    ]  # fmt: skip
    for n, model in enumerate(found["chain"], 1):
        passed = f", passed over: {model['passed_over']}" if model["passed_over"] else ""
        lines.append(f"{n:8d}. {model['model']}  circuit {model['circuit']}{passed}")
    return "\n".join(lines) + "\n"


def without_key(settings: Settings, table: Table) -> list[Upstream]:
    """The upstreams that need a key and have none."""
    needy = [upstream for upstream in table.upstreams.values() if upstream.api_key_env]
    return [upstream for upstream in needy if not settings.secret(upstream.api_key_env or "")]


def run_banner() -> int:
    """Say where the service will listen; errors are raised. Its environment is complete already."""
    settings = Settings.from_env(os.environ)
    table = table_for_start(settings)
    without_key(settings, table)  # a key that cannot be read stops the start by its name
    print_banner(settings, table)
    return 0


def run_check(file: str | None, live: bool, as_json: bool, slim: bool) -> int:
    """Print warnings, with `live` also what each upstream says; errors are raised with a place.

    `slim`: first write the file without the keywords that are built in since version 0.5.
    """
    settings, names = read_environment()
    path = Path(file) if file else settings.routes
    try:
        table = load_table(read_file(path))
        if slim:
            table = make_slim(path, table)
    except RoutesError as e:
        raise in_file(path, e) from e
    check_proxies(table)
    missing = [f"{u.name} has no key: set {u.api_key_env}" for u in without_key(settings, table)]
    warnings = [*table.warnings, *settings.doubts, *doubts_about(names, table)]
    found = []
    if live:
        from parts.live import ask_all  # only here: it needs an HTTP client

        found = ask_all(settings, table)
    is_fine = all(finding.is_fine for finding in found)
    if as_json:
        report: dict[str, Any] = {"ok": is_fine, "warnings": [*warnings, *missing]}
        report |= {"live": [finding._asdict() for finding in found]} if live else {}
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
        return 0 if is_fine else 1
    for warning in [*warnings, *(() if live else missing)]:
        sys.stdout.write(f"{mark('warning', 33, sys.stdout)}: {warning}\n")
    counts = f"{len(table.categories)} categories, {len(table.models)} models"
    sys.stdout.write(f"{path}: {counts}: {mark('fine', 32, sys.stdout)}\n")
    width = max((len(finding.what) for finding in found), default=0)
    for what, state, says, fine in found:
        word = mark(f"{state:8s}", 32 if state == "fine" else 33 if fine else 31, sys.stdout)
        sys.stdout.write(f"{what:{width}s}  {word}  {says}\n")
    return 0 if is_fine else 1


def run_history(args: argparse.Namespace) -> int:
    """Print what was spent, or the last requests; SettingsError when there is no history."""
    from parts import ledger  # only here: a start needs no SQLite for its check

    settings, _ = read_environment()
    if args.command == "costs":
        form = "json" if args.json else "csv" if args.csv else "text"
        return ledger.show_costs(settings, args.by, max(1, args.days), form)
    most = max(1, args.n)
    try:
        return ledger.show_requests(
            settings, most, args.model, args.outcome, args.follow, args.json
        )
    except (KeyboardInterrupt, BrokenPipeError):  # the only ways to end --follow
        return 0


def make_slim(path: Path, table: Table) -> Table:
    """The table after its file was written without what is built in; RoutesError when it cannot."""
    before, text = table.text.count("\n"), slim_text(table)
    if text == table.text:
        say(f"{path}: holds no built-in keywords\n")
        return table
    load_table(text)
    try:
        if not replace_file(path.resolve(), text, path.resolve(), table.text):
            raise RoutesError("was changed meanwhile; try again")
    except OSError as e:
        raise RoutesError(f"cannot be written: {e.strerror}") from e
    say(f"{path}: {before} lines before, {text.count(chr(10))} now\n")
    return load_table(text)


def print_banner(settings: Settings, table: Table) -> None:
    """What a person needs to know when the service starts."""
    base = settings.url
    upstreams = ", ".join(f"{u.name} ({u.base_url})" for u in table.upstreams.values())
    if settings.demo:
        upstreams = "DEMO: no key found, answers are made up here; set " + " or ".join(
            u.api_key_env or u.name for u in table.upstreams.values()
        )
    classifier = "keywords only"
    if table.mode != "keywords":
        model, where = table.ollama["model"], table.ollama["base_url"]
        if table.classifier:
            model, where = table.classifier["model"], table.classifier["upstream"]
        order = "keywords, then" if table.mode == "hybrid" else "first"
        classifier = f"{table.mode}: {order} {model} at {where}"
    curl = f"curl {base}/v1/chat/completions -H 'Content-Type: application/json' " \
           """-d '{"model":"router","messages":[{"role":"user","content":"Hello"}]}'"""  # fmt: skip
    lines = [
        f"llm-router {VERSION}", f"  listening   {base}", f"  base URL    {base}/v1 (or {base})",
        "  model       router", f"  routes      {settings.routes}", f"  upstream    {upstreams}",
        f"  classifier  {classifier}", "  try it", f"    {curl}",
    ]  # fmt: skip
    if not settings.admin_token:
        lines.append(
            "  note        behind a proxy set ROUTER_ADMIN_TOKEN, or /config is open to all"
        )
    if settings.log_format == "json":
        facts = {"event": "banner", "url": base, "upstream": upstreams, "classifier": classifier}
        lines = [json.dumps({**facts, "routes": str(settings.routes), "demo": settings.demo})]
    say("\n".join([*lines, *(f"router: {doubt}" for doubt in settings.doubts), ""]))


if __name__ == "__main__":  # gunicorn.conf.py's check, quicker without Flask
    try:
        sys.exit(run_banner())
    except (SettingsError, RoutesError) as e:
        sys.exit(
            "\n".join(f"{mark('error', 31, sys.stderr)}: {line}" for line in str(e).splitlines())
        )
