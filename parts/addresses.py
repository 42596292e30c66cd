"""Hosts and URLs: one strict reader for settings, routes.json and requests.

What it gives back is plain ASCII in one spelling, so that whatever reads it next reads the same.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import quote, urlsplit

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::[0-9]{0,5})?")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
                   r"(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*")  # fmt: skip
_ODD = re.compile(r"[\s\x00-\x1f\x7f-\xa0\\]")


@lru_cache(maxsize=256)
def is_address(host: str) -> bool:
    """True for an IP address."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@lru_cache(maxsize=256)
def read_host(text: str) -> str:
    """The host in `name`, `NAME.:8443` or `[::1]:80`: lower case, no port; "" when it is none."""
    found = _HOST.fullmatch(text.strip().lower())
    if not found:
        return ""
    if found[1]:
        return found[1] if is_address(found[1]) else ""
    host = found[2].removesuffix(".")
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:  # an empty or endless label
            return ""
    return host if _NAME.fullmatch(host) else ""


def read_url(text: str, own_endings: tuple[str, ...] = ()) -> tuple[str, str]:
    """(URL, ending): `text` as a base URL that paths can be appended to.

    One of `own_endings`, which the router appends itself, is left out and told as `ending`.
    ValueError, with the rest of a sentence, when it cannot be meant.
    """
    text = text.strip()
    if _ODD.search(text):
        raise ValueError("holds a blank, a control character or a backslash")
    try:
        parts = urlsplit(text)
        port, netloc = parts.port, parts.netloc
    except ValueError:
        raise ValueError("holds no host and port that could be read") from None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https") or not netloc:
        raise ValueError("should begin with http:// or https:// and a host")
    if "@" in netloc or "?" in text or "#" in text:
        raise ValueError("should hold no user, no password, no ? and no #")
    host = read_host(netloc)
    if not host or port == 0:
        raise ValueError("holds a host or a port that cannot exist")
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~-._").rstrip("/")
    ending = next((end for end in own_endings if path.lower().endswith(end)), "")
    path = path[: len(path) - len(ending)].rstrip("/")
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}{'' if port is None else f':{port}'}{path}", ending
