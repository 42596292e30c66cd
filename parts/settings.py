"""The settings: the environment, with `.env` put into it, read once.

gunicorn.conf.py reads its own few settings with the functions below, so that nothing is read in
two ways. Nothing here starts anything, and of the router only addresses.py is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from parts.addresses import is_address, is_loopback, read_host
from parts.errors import hint
from parts.jsontext import BOMS, decode

VERSION = "0.4.0"
HERE = Path(__file__).resolve().parent.parent

SECRETS = ("ROUTER_API_KEY", "ROUTER_ADMIN_TOKEN", "ROUTER_REDIS_URL", "ROUTER_NOTIFY_URL")
PATHS = ("ROUTER_ROUTES", "ROUTER_VALIDATION_LOG", "ROUTER_HISTORY", "REQUESTS_CA_BUNDLE")
NAMES = (
    *SECRETS, *(f"{name}_FILE" for name in SECRETS), *PATHS,
    "ROUTER_BIND", "ROUTER_THREADS", "ROUTER_ALLOWED_HOSTS", "ROUTER_ALLOWED_ORIGINS",
    "ROUTER_MAX_BODY_MB", "ROUTER_LOG_FORMAT", "ROUTER_GUNICORN_LOGLEVEL", "ROUTER_PIN_CPU",
    "ROUTER_DEMO", "ROUTER_ALLOW_OPEN", "ROUTER_INSTANCE", "ROUTER_CLIENTS_FILE",
)  # fmt: skip
LOG_LEVELS = ("warning", "debug", "info", "error", "critical")


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
    allowed_origins: frozenset[str] = frozenset()
    max_body_mb: int = 16
    validation_log: Path = HERE / "validation_errors.log"
    history: Path | None = None  # of requests and spending; None: in memory only
    clients_file: Path | None = None
    notify_url: str = field(default="", repr=False)
    log_format: str = "logfmt"
    demo: bool = False
    allow_open: bool = False
    redis_url: str = field(default="", repr=False)
    instance: str = ""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings in `environ`; SettingsError naming the variable that cannot be meant."""
        routes = path_in(environ, "ROUTER_ROUTES") or cls.routes
        ca_bundle(environ)
        settings = cls(
            routes=routes,
            bind=bind_in(environ),
            threads=threads_in(environ),
            api_key=read_secret(environ, "ROUTER_API_KEY"),
            admin_token=read_secret(environ, "ROUTER_ADMIN_TOKEN"),
            allowed_hosts=tuple(_allowed_hosts(environ)),
            allowed_origins=frozenset(map(_origin, _list(environ, "ROUTER_ALLOWED_ORIGINS"))),
            max_body_mb=_whole_number(environ, "ROUTER_MAX_BODY_MB", cls.max_body_mb, 1024),
            validation_log=path_in(environ, "ROUTER_VALIDATION_LOG")
            or routes.parent / cls.validation_log.name,
            history=_history(environ, routes),
            clients_file=path_in(environ, "ROUTER_CLIENTS_FILE"),
            notify_url=_notify_url(environ),
            log_format=one_of(environ, "ROUTER_LOG_FORMAT", "logfmt", "json"),
            demo=one_of(environ, "ROUTER_DEMO", "0", "1") == "1",
            allow_open=one_of(environ, "ROUTER_ALLOW_OPEN", "0", "1") == "1",
            redis_url=_redis_url(environ),
            instance=_instance(environ),
            environ=dict(environ),
        )
        if not is_loopback(settings.address[0]) and not settings.guarded:
            raise SettingsError(
                f"ROUTER_BIND: {settings.bind} can be reached from other machines; set "
                "ROUTER_API_KEY and ROUTER_ADMIN_TOKEN first, or ROUTER_ALLOW_OPEN=1 to serve all"
            )
        if settings.clients_file and not (settings.api_key or settings.admin_token):
            raise SettingsError(
                "ROUTER_CLIENTS_FILE: set ROUTER_API_KEY or ROUTER_ADMIN_TOKEN, too, or every "
                "client could read what the others spent"
            )
        return settings

    def secret(self, name: str) -> str:
        """The value of the variable `name`, or of the file in `<name>_FILE`; '' when unset."""
        return read_secret(self.environ, name)

    @property
    def guarded(self) -> bool:
        """True when strangers meet keys everywhere, or are welcome."""
        return bool((self.api_key or self.clients_file) and self.admin_token) or self.allow_open

    @property
    def url(self) -> str:
        """Where this machine reaches the service."""
        host, port = self.address
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `bind`."""
        host, _, port = self.bind.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def doubts(self) -> list[str]:
        """What a person may want to know although nothing is broken."""
        odd = [n for n in self.environ if n.startswith("ROUTER_") and n not in NAMES]
        found = [f"{name} is no setting of the router{hint(name, NAMES)}" for name in odd]
        if not os.access(self.validation_log.parent, os.W_OK) or self.validation_log.is_dir():
            found.append(f"ROUTER_VALIDATION_LOG: {self.validation_log} cannot be written; what "
                         "was wrong with refused bodies is not kept")  # fmt: skip
        file = self.clients_file
        if file and file.exists() and file.stat().st_mode & 0o077:
            found.append(f"ROUTER_CLIENTS_FILE: others may read the keys in {file}: chmod 600 it")
        return found


# --- one setting ---------------------------------------------------------------------------------


def bind_in(environ: Mapping[str, str]) -> str:
    """ROUTER_BIND as HOST:PORT; an IPv6 host stands in brackets."""
    text = value_in(environ, "ROUTER_BIND") or Settings.bind
    head, _, port = text.rpartition(":")
    host = read_host(head)
    bare = ":" in head and not head.startswith("[")
    if not host or bare or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise SettingsError(f"ROUTER_BIND: expected HOST:PORT, got {text!r}")
    return f"{f'[{host}]' if ':' in host else host}:{int(port)}"


def threads_in(environ: Mapping[str, str]) -> int:
    """ROUTER_THREADS."""
    return _whole_number(environ, "ROUTER_THREADS", Settings.threads, 4096)


def value_in(environ: Mapping[str, str], name: str) -> str:
    """The value of `name` without blanks around it; '' when it is unset or empty."""
    return environ.get(name, "").strip()


def path_in(environ: Mapping[str, str], name: str) -> Path | None:
    """The path in `name`, absolute; None when it is unset. `~` is the home folder."""
    value = value_in(environ, name)
    try:
        return Path(value).expanduser().absolute() if value else None
    except RuntimeError as e:
        raise SettingsError(f"{name}: {value!r} names nobody's home folder") from e


def one_of(environ: Mapping[str, str], name: str, *choices: str) -> str:
    """The value of `name`, which has to be one of `choices`; the first is the default."""
    value = value_in(environ, name) or choices[0]
    if value not in choices:
        raise SettingsError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
    return value


def read_secret(environ: Mapping[str, str], name: str) -> str:
    """`name` from the environment or from the file in `<name>_FILE`; '' when neither is set.

    SettingsError, without the value, for what cannot be a key: two words, quotes, a placeholder.
    """
    value, path = value_in(environ, name), path_in(environ, f"{name}_FILE")
    if path and not value:
        try:
            value = decode(path.read_bytes()).strip()
        except (OSError, UnicodeDecodeError) as e:
            raise SettingsError(f"{name}_FILE: cannot read {path}: {type(e).__name__}") from e
        if not value:  # whoever names a file wants a key: an empty one must not open the door
            raise SettingsError(f"{name}_FILE: {path} is empty")
    if value:
        check_key(value, name)
    return value


def check_key(value: str, name: str) -> None:
    """SettingsError, without the value, for what cannot be a key."""
    if value.lower().startswith("bearer "):
        raise SettingsError(f"{name}: write the key alone, without the word Bearer")
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise SettingsError(f"{name}: a key is one line of printable ASCII characters, no blanks")
    if value[0] in "\"'" or value[-1] in "\"'":
        raise SettingsError(f"{name}: the quotes would be part of the key; leave them out")
    if value.startswith(f"{name}=") or value.endswith("...") or re.fullmatch("<.*>", value):
        raise SettingsError(f"{name}: holds no key but what stands in its place in an example")


def ca_bundle(environ: Mapping[str, str]) -> str:
    """REQUESTS_CA_BUNDLE, a file or a folder of certificates; '' when it is unset."""
    path = path_in(environ, "REQUESTS_CA_BUNDLE")
    if not path:
        return ""
    if not path.exists():
        raise SettingsError(f"REQUESTS_CA_BUNDLE: there is no {path}")
    # Loading it, as each connection over TLS does, takes seconds where it is large.
    if path.is_file() and b"-----BEGIN " not in path.read_bytes():
        raise SettingsError(f"REQUESTS_CA_BUNDLE: {path} holds no certificates")
    return str(path)


def _whole_number(environ: Mapping[str, str], name: str, default: int, most: int) -> int:
    value = value_in(environ, name) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= most:
        raise SettingsError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")
    return int(value)


def _list(environ: Mapping[str, str], name: str) -> list[str]:
    return value_in(environ, name).replace(",", " ").replace(";", " ").split()


def _allowed_hosts(environ: Mapping[str, str]) -> Iterator[str]:
    """Hosts; `.example.com` stands for all names below it, and so does `*.example.com`."""
    for text in _list(environ, "ROUTER_ALLOWED_HOSTS"):
        name = re.sub(r"^[a-z][a-z0-9+.-]*://([^/?#]*)/?$", r"\1", text, flags=re.I)
        below = name.startswith(("*.", "."))
        host = read_host(name.removeprefix("*").removeprefix(".") if below else name)
        if name == "*":
            raise SettingsError("ROUTER_ALLOWED_HOSTS: * would let any page in a browser in, by a "
                                "name of its own; write the names, or *.example.com")  # fmt: skip
        if not host or (below and is_address(host)):
            raise SettingsError(f"ROUTER_ALLOWED_HOSTS: {text[:100]!r} is no host name")
        yield f".{host}" if below else host
        if name.startswith("."):  # as Django and cookies have it: the name itself, too
            yield host


ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]*]+)(?::([0-9]{1,5}))?/?")


def _origin(text: str) -> str:
    """An origin as a browser sends it: lower case, no default port, no final slash."""
    found = ORIGIN.fullmatch(text.lower())
    if not found:
        why = "expected an origin such as http://localhost:3000 or app://obsidian.md"
        raise SettingsError(f"ROUTER_ALLOWED_ORIGINS: {why}, got {text[:100]!r}")
    default = {"http": "80", "https": "443"}.get(found[1])
    port = f":{found[3]}" if found[3] and found[3] != default else ""
    return f"{found[1]}://{found[2]}{port}"


def _redis_url(environ: Mapping[str, str]) -> str:
    url = read_secret(environ, "ROUTER_REDIS_URL")
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise SettingsError("ROUTER_REDIS_URL: expected redis://, rediss:// or unix://")
    if url and not find_spec("redis"):
        raise SettingsError(
            "ROUTER_REDIS_URL: needs the package redis: pip install 'redis>=5.2,<9'"
        )
    if url:
        import redis  # only here: one instance alone does without

        try:
            redis.ConnectionPool.from_url(url)
        except ValueError:  # its message would hold the URL, and that a password
            raise SettingsError("ROUTER_REDIS_URL: cannot be read as a URL") from None
    return url


def _history(environ: Mapping[str, str], routes: Path) -> Path | None:
    """ROUTER_HISTORY; a demo, whose costs are made up, leaves none."""
    off = value_in(environ, "ROUTER_HISTORY") == "off" or value_in(environ, "ROUTER_DEMO") == "1"
    return None if off else path_in(environ, "ROUTER_HISTORY") or routes.parent / "usage.db"


def _notify_url(environ: Mapping[str, str]) -> str:
    url = read_secret(environ, "ROUTER_NOTIFY_URL")
    if url and not re.match(r"https?://[^/?#\s]", url):
        raise SettingsError("ROUTER_NOTIFY_URL: expected http:// or https://")
    return url


def _instance(environ: Mapping[str, str]) -> str:
    name = value_in(environ, "ROUTER_INSTANCE")
    if not name.isprintable() or len(name) > 100:
        raise SettingsError("ROUTER_INSTANCE: expected at most 100 printable characters")
    return name


# --- .env ----------------------------------------------------------------------------------------

LINE = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(.*)")
QUOTED = re.compile(r"""(?:"([^"]*)"|'([^']*)')[ \t]*(?:#.*)?""")


def read_dotenv(path: Path) -> list[str]:
    """Put the NAME=value lines of `path` into the environment; what is set there already wins.

    Returns the names. SettingsError, without any value, for what is no such line. An empty value
    is as good as none: neither here nor in the environment does it hide another. Of a name that
    stands twice the last value counts. Relative paths count from the folder of the file.
    """
    found: dict[str, str] = {}
    for n, line in enumerate(_lines_of(path), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            name, value = _parse_line(line, f"{path}, line {n}")
            found[name] = value or found.get(name, "")
    absolute_paths(found, path.absolute().parent)
    for name, value in found.items():
        if not value_in(os.environ, name):
            os.environ[name] = value
    return list(found)


def _lines_of(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror}") from e
    try:
        return decode(data).splitlines()
    except UnicodeDecodeError as e:
        if data.startswith((BOMS[1][0], BOMS[2][0])):
            raise SettingsError(f"{path} is damaged UTF-16; save it as UTF-8") from e
        return data.decode("latin-1").splitlines()  # a word with an accent, in a comment mostly


def _parse_line(line: str, place: str) -> tuple[str, str]:
    found = LINE.fullmatch(line)
    if not found:
        told = re.match(r"([A-Za-z_][A-Za-z0-9_]*)[ \t]*:[ \t]", line)
        more = f": write {told[1]}=..." if told else ""
        raise SettingsError(f"{place}: expected NAME=value{more}")
    name, value = found[1], found[2].strip()
    literal = value.startswith("'")
    if value[:1] in ("'", '"'):
        quoted = QUOTED.fullmatch(value)
        if not quoted:
            raise SettingsError(f"{place}: {name}: a quote is not closed, or something follows it")
        value = (quoted[1] or quoted[2] or "").strip()
    else:
        value = re.sub(r"(^|[ \t]+)#.*", "", value)
    if not literal and re.search(r"\$(?:\w|[({])|`", value):
        why = "$NAME is not replaced here; write the value itself, or '...' around it"
        raise SettingsError(f"{place}: {name}: {why}")
    if not value.isprintable():
        raise SettingsError(f"{place}: {name}: holds a control character")
    return name, value


def absolute_paths(environ: dict[str, str] | os._Environ[str], folder: Path) -> None:
    """Make the relative paths in `environ` absolute: they count from `folder`."""
    for name in [n for n in environ if n in PATHS or n.endswith("_FILE")]:
        value = value_in(environ, name)
        if value and not value.startswith("~") and (name, value) != ("ROUTER_HISTORY", "off"):
            environ[name] = os.path.join(folder, value)
