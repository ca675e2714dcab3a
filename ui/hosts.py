"""Which names this server answers to, and which origins are its own.

A page of a stranger can point a name of its own at 127.0.0.1 (DNS rebinding) and is then of the
same origin as the app, for the browser. The Host header still bears the stranger's name.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def name_of(host: str) -> str | None:
    """The name in a Host header, lower case, no port and no brackets; None where it is no host."""
    found = _HOST.fullmatch(host)
    return found["name"].strip("[]").rstrip(".").lower() if found else None


class Hosts:
    """The names of this server.

    Args:
        bound: what it is bound to.
        names: others that it is known by, such as the name of the proxy in front of it.
        root_url: of the proxy, when it is a whole URL.
    """

    def __init__(self, bound: str, names: Iterable[str] = (), root_url: str = "") -> None:
        public = urlsplit(root_url).netloc.lower()
        self._public = {name.lower() for name in (*names, public) if name}
        self._names = {n for n in map(name_of, self._public) if n} | {bound.lower()}
        self._from_outside = not is_loopback(bound)
        if self._from_outside:
            self._names |= {socket.gethostname().lower()}

    def serves(self, host: str) -> bool:
        """Whether a Host header names this server.

        Who listens on all addresses is reached by any of them: no stranger's name is an address.
        """
        name = name_of(host)
        if name is None:
            return False
        if self._from_outside and _address(name) is not None:
            return True
        return name in LOOPBACK_NAMES or name in self._names

    def owns(self, origin: str, host: str) -> bool:
        """Whether an Origin header is of this server, asked for as `host`.

        A proxy may put its own name into Host; then the origin is one of the other names.
        """
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https"):
            return False
        return parts.netloc.lower() in {host.lower(), *self._public}
