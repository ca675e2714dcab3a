"""Logging in: how often one may try a password, and which logins a password still stands for."""

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from ipaddress import IPv6Address, ip_address

from ui.limits import Clock, Window
from ui.users import Users

LOGINS_A_MINUTE = 10  # for one name from one address
LOGINS_AN_HOUR = 30
PEER_A_MINUTE = 20  # from one address, for whatever names
NAME_AN_HOUR = 300  # for one name from all addresses; ten at their hour's limit use it up
_IPV6_NETWORK = 64  # bits: what a household or a rented machine gets, all of it for one guesser

PEER: ContextVar[str] = ContextVar("peer", default="")  # address of the request in hand
_MARK: ContextVar[str] = ContextVar("mark", default="")  # of the password that was just right


class Door:
    """Checks passwords for Gradio, which asks it wherever it lets somebody log in.

    Wrong attempts are counted, right ones are not. One address has `LOGINS_A_MINUTE` and
    `LOGINS_AN_HOUR` for one name, and `PEER_A_MINUTE` for all names together: past them it waits,
    and nobody else does. Whoever guesses slowly from many addresses has `NAME_AN_HOUR` for one
    name over all of them, 7200 a day; only that limit can make a person wait for what others do,
    and one address, or one /64 network of IPv6, uses up a tenth of it at most. Who is logged in
    stays so. Names and addresses are kept as salted hashes, in memory, for an hour.

    Args:
        users: who may log in.
        clock: seconds that never go back.
    """

    def __init__(self, users: Users, clock: Clock | None = None) -> None:
        self._users = users
        self._salt = secrets.token_bytes(16)
        timing = () if clock is None else (clock,)
        self._own_minute = Window(LOGINS_A_MINUTE, 60, *timing)
        self._own_hour = Window(LOGINS_AN_HOUR, 3600, *timing)
        self._peer = Window(PEER_A_MINUTE, 60, *timing)
        self._name = Window(NAME_AN_HOUR, 3600, *timing)

    async def check(self, name: str, password: str) -> bool:
        """Whether somebody may come in.

        Raises:
            HTTPException: 429, too many attempts; the password was not looked at.
        """
        from fastapi import HTTPException

        limits = self._limits(name, PEER.get())
        wait = _take(limits)  # before the check, so that many at once count, too
        if wait:
            seconds = int(wait) + 1
            detail = f"Too many attempts. Try again in {seconds} s."
            raise HTTPException(429, detail, {"Retry-After": str(seconds)})
        # Before the check as well: a password that changes meanwhile ends the login at once.
        mark = self._users.mark(name)
        right = await asyncio.to_thread(self._users.check, name, password)
        if mark is None or not right:
            return False
        _give_back(limits)
        _MARK.set(mark)
        return True

    def _limits(self, name: str, peer: str) -> list[tuple[Window, str]]:
        network = _network(peer)
        own = self._key(name, network)
        return [
            (self._own_minute, own),
            (self._own_hour, own),
            (self._peer, self._key(network)),
            (self._name, self._key(name)),
        ]

    def _key(self, *parts: str) -> str:
        found = hashlib.blake2b(key=self._salt, digest_size=16)
        for part in parts:
            found.update(hashlib.sha256(part.encode(errors="replace")).digest())
        return found.hexdigest()


def _take(limits: list[tuple[Window, str]]) -> float:
    """Count one in every window, or in none; the seconds to wait, 0 where it was counted."""
    taken: list[tuple[Window, str]] = []
    for window, key in limits:
        wait = window.take(key)
        if wait:
            _give_back(taken)
            return wait
        taken.append((window, key))
    return 0.0


def _give_back(limits: list[tuple[Window, str]]) -> None:
    for window, key in limits:
        window.give_back(key)


def _network(peer: str) -> str:
    """The address, or of IPv6 the network that its owner draws addresses from as they like."""
    try:
        address = ip_address(peer.split("%")[0])
    except ValueError:
        return peer
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{int(address) >> (128 - _IPV6_NETWORK):x}/{_IPV6_NETWORK}"


class Tokens(dict[str, str]):
    """Gradio's tokens of who is logged in, each for as long as the password that it was got with.

    Put in the place of the dictionary in which Gradio looks tokens up. A token that was got
    without `Door` is good for nothing.

    Args:
        users: who may log in.
    """

    def __init__(self, users: Users) -> None:
        super().__init__()
        self._users = users
        self._marks: dict[str, str] = {}

    def __setitem__(self, token: str, name: str) -> None:
        self._marks[token] = _MARK.get()
        super().__setitem__(token, name)

    def __delitem__(self, token: str) -> None:  # of one that is gone, too: two may log out at once
        self._marks.pop(token, None)
        self.pop(token, None)

    def login(self, cookies: Mapping[str, str], cookie_id: str) -> tuple[str, str] | None:
        """Name and token of the login in the cookies; one that has ended is taken out.

        Args:
            cookies: of a request.
            cookie_id: the app's own part of the names of Gradio's cookies.

        Raises:
            ConfigError: the file of users broke.
        """
        for kind in ("access-token", "access-token-unsecure"):
            token = cookies.get(f"{kind}-{cookie_id}", "")
            name = self.get(token)
            if name is None:
                continue
            if self._marks.get(token) == self._users.mark(name):
                return name, token
            del self[token]
        return None
