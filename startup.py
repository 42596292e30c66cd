"""Before the first request: the settings of the environment, and the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from addresses import is_loopback
from routes_file import RoutesError, Store, Table, Upstream, load_table, read_file, routes_schema

VERSION = "0.4.0"
HERE = Path(__file__).resolve().parent


class SettingsError(Exception):
    """A setting of the environment is unusable; the message names it."""


@dataclass(frozen=True)
class Settings:
    """What the environment says, read once. README lists every variable."""

    routes: Path = HERE / "routes.json"
    bind: str = "127.0.0.1:3456"
    threads: int = 64
    api_key: str = field(default="", repr=False)
    admin_token: str = field(default="", repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_body_mb: int = 16
    validation_log: Path = HERE / "validation_errors.log"
    log_format: str = "logfmt"
    demo: bool = False
    allow_open: bool = False
    redis_url: str = field(default="", repr=False)
    instance: str = ""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings in `environ`; SettingsError naming the variable that does not parse."""
        routes = Path(environ.get("ROUTER_ROUTES") or cls.routes).absolute()
        hosts = environ.get("ROUTER_ALLOWED_HOSTS", "").lower().split(",")
        bundle = environ.get("REQUESTS_CA_BUNDLE")
        if bundle and not Path(bundle).exists():
            raise SettingsError(f"REQUESTS_CA_BUNDLE: there is no {bundle}")
        settings = cls(
            routes=routes,
            bind=environ.get("ROUTER_BIND") or cls.bind,
            threads=_whole_number(environ, "ROUTER_THREADS", cls.threads, 4096),
            api_key=read_secret(environ, "ROUTER_API_KEY"),
            admin_token=read_secret(environ, "ROUTER_ADMIN_TOKEN"),
            allowed_hosts=tuple(host.strip() for host in hosts if host.strip()),
            max_body_mb=_whole_number(environ, "ROUTER_MAX_BODY_MB", cls.max_body_mb, 1024),
            validation_log=Path(environ.get("ROUTER_VALIDATION_LOG")
                                or routes.parent / cls.validation_log.name),
            log_format=_one_of(environ, "ROUTER_LOG_FORMAT", "logfmt", "json"),
            demo=_one_of(environ, "ROUTER_DEMO", "0", "1") == "1",
            allow_open=_one_of(environ, "ROUTER_ALLOW_OPEN", "0", "1") == "1",
            redis_url=_redis_url(environ),
            instance=environ.get("ROUTER_INSTANCE") or "",
            environ=dict(environ),
        )  # fmt: skip
        if not is_loopback(settings.address[0]) and not settings.guarded:
            raise SettingsError(
                f"ROUTER_BIND: {settings.bind} can be reached from other machines; set "
                "ROUTER_API_KEY and ROUTER_ADMIN_TOKEN first, or ROUTER_ALLOW_OPEN=1 to serve all"
            )
        return settings

    def secret(self, name: str) -> str:
        """The value of the variable `name`, or of the file in `<name>_FILE`; '' when unset."""
        return read_secret(self.environ, name)

    @property
    def guarded(self) -> bool:
        """True when strangers meet keys everywhere, or are welcome."""
        return bool(self.api_key and self.admin_token) or self.allow_open

    @property
    def url(self) -> str:
        """Where this machine reaches the service."""
        host, port = self.address
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `bind`; SettingsError when it is not HOST:PORT."""
        host, _, port = self.bind.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise SettingsError(f"ROUTER_BIND: expected HOST:PORT, got {self.bind!r}")
        return host.strip("[]"), int(port)


def read_secret(environ: Mapping[str, str], name: str) -> str:
    """`name` from the environment or from the file in `<name>_FILE`; '' when neither is set."""
    value, path = environ.get(name, "").strip(), environ.get(f"{name}_FILE")
    if path and not value:
        try:
            value = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise SettingsError(f"{name}_FILE: cannot read {path}: {type(e).__name__}") from e
        if not value:  # whoever names a file wants a key: an empty one must not open the door
            raise SettingsError(f"{name}_FILE: {path} is empty")
    if value and not (value.isascii() and value.isprintable()):
        raise SettingsError(f"{name}: a key is one line of printable ASCII characters")
    return value


def _whole_number(environ: Mapping[str, str], name: str, default: int, most: int) -> int:
    value = environ.get(name) or str(default)
    if not value.isdecimal() or not value.isascii() or not 1 <= int(value) <= most:
        raise SettingsError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")
    return int(value)


def _redis_url(environ: Mapping[str, str]) -> str:
    url = read_secret(environ, "ROUTER_REDIS_URL")
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise SettingsError("ROUTER_REDIS_URL: expected redis://, rediss:// or unix://")
    if url and not find_spec("redis"):
        raise SettingsError(
            "ROUTER_REDIS_URL: needs the package redis: pip install 'redis>=5.2,<9'"
        )
    return url


def _one_of(environ: Mapping[str, str], name: str, *choices: str) -> str:
    value = environ.get(name) or choices[0]
    if value not in choices:
        raise SettingsError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
    return value


def main(argv: list[str] | None = None) -> int:
    """The command line; exit status 0 fine, 1 not fine, 2 wrong usage."""
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        if args.command == "serve":
            return run_serve(args.or_demo, args.json)
        if args.command == "route":
            return run_route(args.text, args.json)
        if args.command == "check":
            return run_check(args.file, args.banner, args.json)
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
    for command in (serve, route, check):
        command.add_argument("--json", action="store_true", help="for a program: one JSON document")
    return parser


def mark(word: str, color: int, stream: TextIO) -> str:
    """`word` in a color on a terminal, plain in a pipe or with NO_COLOR set."""
    colored = stream.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{color}m{word}\x1b[0m" if colored else word


def read_dotenv(path: Path) -> None:
    """Put KEY=VALUE lines of `path` into the environment; what is set already wins."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, equals, value = line.strip().removeprefix("export ").partition("=")
            if equals and not key.startswith("#"):
                os.environ.setdefault(key.strip(), value.strip().strip("\"'"))


def run_serve(or_demo: bool, as_json: bool) -> int:
    """Become gunicorn; 1 when routes.json or a setting is unusable."""
    read_dotenv(HERE / ".env")
    settings = Settings.from_env(os.environ)
    table = table_for_start(settings)
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
    store = Store(settings.routes)
    if store.error:
        sys.stderr.write(
            f"router: {settings.routes} IS BROKEN, serving the last good one: {store.error}\n"
        )
    return store.table


def run_route(text: str, as_json: bool) -> int:
    """Print the dry run of `text`: by the running service, else here with circuits unknown."""
    read_dotenv(HERE / ".env")
    settings = Settings.from_env(os.environ)
    headers = {"Authorization": f"Bearer {settings.api_key or settings.admin_token}"}
    try:
        status, found = ask_service(settings.url, text, headers)
    except (OSError, ValueError, KeyError, TypeError):  # it does not run, or is a stranger
        from router import create_app  # late: router imports this module

        alone = replace(settings, redis_url="")
        answer = (
            create_app(alone).test_client().post("/route", json={"text": text}, headers=headers)
        )
        status, found = answer.status_code, json.loads(answer.data)
        for model in found.get("chain", ()):
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


def run_check(file: str | None, banner: bool, as_json: bool) -> int:
    """Print warnings, or a banner; errors are raised with their place."""
    if not banner:  # the service's own start has its environment already
        read_dotenv(HERE / ".env")
    settings = Settings.from_env(os.environ)
    if banner:
        table = table_for_start(settings)
        without_key(settings, table)  # a key that cannot be read stops the start by its name
        print_banner(settings, table)
        return 0
    path = Path(file) if file else settings.routes
    try:
        table = load_table(read_file(path), routes_schema())
    except RoutesError as e:
        raise RoutesError("\n".join(f"{path}: {line}" for line in str(e).splitlines())) from e
    missing = [f"{u.name} has no key: set {u.api_key_env}" for u in without_key(settings, table)]
    warnings = [*table.warnings, *missing]
    if as_json:
        sys.stdout.write(json.dumps({"ok": True, "warnings": warnings}, ensure_ascii=False) + "\n")
        return 0
    for warning in warnings:
        sys.stdout.write(f"{mark('warning', 33, sys.stdout)}: {warning}\n")
    counts = f"{len(table.categories)} categories, {len(table.models)} models"
    sys.stdout.write(f"{path}: {counts}: {mark('fine', 32, sys.stdout)}\n")
    return 0


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
        ollama = f"{table.ollama['model']} at {table.ollama['base_url']}"
        order = "keywords, then" if table.mode == "hybrid" else "Ollama,"
        classifier = f"{table.mode}: {order} {ollama}"
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
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":  # gunicorn.conf.py's check; people call router.py
    sys.exit(main())
