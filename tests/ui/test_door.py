"""Logging in: how often one may try, from one address and from many, also behind a proxy."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException

from tests.ui.served import Visitor, quick_passwords, served, small_app, users_file
from ui import users as users_module
from ui.logins import (
    LOGINS_A_MINUTE,
    LOGINS_AN_HOUR,
    NAME_AN_HOUR,
    PEER,
    PEER_A_MINUTE,
    Door,
)
from ui.server import Running, Settings
from ui.users import Users

PUBLIC = "votes.example"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Running]:
    with quick_passwords(), served(Settings(port=0, users=users_file(tmp_path))) as running:
        yield running


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[Running]:
    """Behind a proxy on this machine, which says who is behind it."""
    with quick_passwords():
        settings = Settings(port=0, users=users_file(tmp_path), host_names=(PUBLIC,))
        with served(settings) as running:
            yield running


def attempt(visitor: Visitor, name: str, password: str, through: str | None = None) -> int:
    headers = {} if through is None else {"x-forwarded-for": through, "host": PUBLIC}
    form = {"username": name, "password": password}
    return visitor.post("/login", data=form, headers=headers).status_code


def test_gradio_alone_lets_one_try_forever() -> None:
    blocks = small_app()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, auth=("ana", "correct horse"))
    codes = {
        httpx.post(f"{url}login", data={"username": "ana", "password": f"{n}"}).status_code
        for n in range(5 * LOGINS_A_MINUTE)
    }
    blocks.close(verbose=False)
    assert codes == {400}


def test_ten_attempts_a_minute_and_then_not_even_the_right_one(app: Running) -> None:
    with Visitor(app) as visitor:
        wrong = [attempt(visitor, "ana", f"wrong {n}") for n in range(LOGINS_A_MINUTE)]
        assert wrong == [400] * LOGINS_A_MINUTE
        answer = visitor.login("ana")
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "Too many attempts" in answer.json()["detail"]
        assert not [name for name in visitor.cookies if name.startswith("access-token")]
        assert attempt(visitor, "bob", "battery staple") == 200, "ana's ten are not bob's"


def test_an_attempt_past_the_limit_costs_no_hash(
    app: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    digest = users_module._digest

    def counted(password: str, *rest: Any) -> bytes:
        hashed.append(password)
        return digest(password, *rest)

    monkeypatch.setattr(users_module, "_digest", counted)
    with Visitor(app) as visitor:
        for n in range(LOGINS_A_MINUTE + 5):
            attempt(visitor, "ana", f"wrong {n}")
    assert len(hashed) == LOGINS_A_MINUTE


def test_whoever_knows_the_password_is_not_counted(app: Running) -> None:
    with Visitor(app) as visitor:
        for _ in range(LOGINS_A_MINUTE + 3):
            assert visitor.login("ana").status_code == 200


def test_other_spellings_of_the_route_try_no_password(app: Running) -> None:
    with Visitor(app) as visitor:
        form = {"username": "ana", "password": "correct horse"}
        for path in ("/login/", "//login", "/Login", "/%2Flogin", "/gradio_api/login"):
            url = visitor.base_url.copy_with(raw_path=path.encode())
            assert visitor.post(url, data=form).status_code == 404
        assert visitor.post("/login?x", data=form).status_code == 200


def test_who_guesses_shuts_nobody_out(proxied: Running) -> None:
    with Visitor(proxied) as visitor:
        for _ in range(2 * LOGINS_A_MINUTE):
            last = attempt(visitor, "ana", "wrong", "198.51.100.1")
        assert last == 429
        assert attempt(visitor, "ana", "correct horse", "198.51.100.1") == 429
        assert attempt(visitor, "ana", "correct horse", "198.51.100.2") == 200


def test_many_names_from_one_address_which_cannot_make_up_another(proxied: Running) -> None:
    """The proxy adds the address it sees at the end; the rest is the client's words."""
    with Visitor(proxied) as visitor:
        codes = [
            attempt(visitor, f"user{n}", "wrong", f"198.51.100.{n}, 203.0.113.7")
            for n in range(PEER_A_MINUTE + 1)
        ]
        assert codes == [400] * PEER_A_MINUTE + [429]


def test_without_a_proxy_nobody_believes_the_header(app: Running) -> None:
    with Visitor(app) as visitor:
        codes = []
        for n in range(LOGINS_A_MINUTE + 1):
            form = {"username": "ana", "password": "wrong"}
            headers = {"x-forwarded-for": f"198.51.100.{n}"}
            codes.append(visitor.post("/login", data=form, headers=headers).status_code)
        assert codes == [400] * LOGINS_A_MINUTE + [429]


# -- guessing slowly, against a clock that is turned by hand --------------------------------------


class Guesser:
    """Tries passwords for ana from any address at any time."""

    def __init__(self, users: Users) -> None:
        self.now = 1000.0
        self.door = Door(users, lambda: self.now)

    def tries(self, peer: str, password: str = "wrong", name: str = "ana") -> bool | None:
        """Whether it was the password; None where it was not looked at."""

        async def check() -> bool:
            PEER.set(peer)
            return await self.door.check(name, password)

        try:
            return asyncio.run(check())
        except HTTPException as error:
            if error.status_code != 429:
                raise
            return None

    def looked_at(self, peer: str, times: int, every: float) -> int:
        """Of so many tries, so many seconds apart, those that were answered."""
        count = 0
        for _ in range(times):
            count += self.tries(peer) is not None
            self.now += every
        return count


@pytest.fixture
def guesser(tmp_path: Path) -> Iterator[Guesser]:
    with quick_passwords():
        yield Guesser(Users(users_file(tmp_path)))


def test_one_address_guesses_a_tenth_of_what_all_may(guesser: Guesser) -> None:
    for hour in range(3):
        assert guesser.looked_at("192.0.2.1", 100, every=36) == LOGINS_AN_HOUR, hour
    assert 10 * LOGINS_AN_HOUR <= NAME_AN_HOUR
    assert guesser.tries("192.0.2.2", "correct horse")


def test_a_name_is_guessed_from_many_addresses_so_often_and_no_more(guesser: Guesser) -> None:
    found = [guesser.tries(f"192.0.{n // 250}.{n % 250}") for n in range(NAME_AN_HOUR + 50)]
    assert found == [False] * NAME_AN_HOUR + [None] * 50
    assert guesser.tries("203.0.113.1", "battery staple", name="bob")
    guesser.now += 3600
    assert guesser.tries("203.0.113.1", "correct horse")


@pytest.mark.parametrize(
    ("peers", "network"),
    [
        ("2001:db8:1:2::{:x}", "one guesser has a whole /64"),
        ("2001:db8:1:2:{:x}::1%eth0", "with a zone as well"),
    ],
)
def test_addresses_of_one_network_are_one_guesser(
    guesser: Guesser, peers: str, network: str
) -> None:
    found = [guesser.tries(peers.format(n)) for n in range(LOGINS_A_MINUTE + 1)]
    assert found == [False] * LOGINS_A_MINUTE + [None], network
    assert guesser.tries("2001:db8:1:3::1", "correct horse")


def test_an_ipv4_address_is_the_same_in_ipv6_s_spelling(guesser: Guesser) -> None:
    peers = ("192.0.2.1", "::ffff:192.0.2.1")
    found = [guesser.tries(peers[n % 2]) for n in range(LOGINS_A_MINUTE + 1)]
    assert found == [False] * LOGINS_A_MINUTE + [None]
    assert guesser.tries("::ffff:192.0.2.2", "correct horse")


def test_what_was_refused_counts_nowhere(guesser: Guesser) -> None:
    """Else whoever is past one limit would go on using up the others."""
    guesser.looked_at("192.0.2.1", 5 * NAME_AN_HOUR, every=0)
    assert guesser.tries("192.0.2.2", "correct horse")
    assert guesser.tries("192.0.2.1", "battery staple", name="bob")


def test_addresses_are_kept_nowhere(proxied: Running, tmp_path: Path) -> None:
    with Visitor(proxied) as visitor:
        attempt(visitor, "ana", "wrong", "198.51.100.77")
        headers = {"x-forwarded-for": "198.51.100.77", "host": PUBLIC, "user-agent": "telltale/7"}
        form = {"username": "bob", "password": "battery staple"}
        visitor.post("/login", data=form, headers=headers)
        visitor.headers["host"] = PUBLIC
        assert visitor.now("whoami_now").json()["data"][0].startswith("bob False ")
        for path in [*tmp_path.rglob("*"), *proxied._files.rglob("*")]:
            if path.is_file():
                text = path.read_bytes()
                assert b"198.51.100.77" not in text
                assert b"telltale" not in text


# -- who counts as sitting at the machine ---------------------------------------------------------


def admin(visitor: Visitor, **headers: str) -> bool:
    body = visitor.body("whoami_now")
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    answer = visitor.post("/gradio_api/run/predict", json=body, headers=named)
    return str(answer.raise_for_status().json()["data"][0]).split()[1] == "True"


def test_at_the_machine_one_is_its_admin_and_through_a_proxy_one_is_not() -> None:
    with served() as running, Visitor(running) as visitor:
        visitor.open()
        assert admin(visitor)
        assert admin(visitor, host="localhost:1")  # ssh -L 1:localhost:7860
        for header in ("x_forwarded_for", "forwarded", "x_real_ip", "via", "cf_connecting_ip"):
            assert not admin(visitor, **{header: "192.0.2.1"})
        assert not admin(visitor, x_forwarded_host="localhost")


def test_nobody_is_admin_of_a_machine_that_a_proxy_opens() -> None:
    settings = Settings(port=0, open_to_all=True, host_names=(PUBLIC,))
    with served(settings) as running, Visitor(running) as visitor:
        visitor.open()
        assert not admin(visitor)
        assert not admin(visitor, host=PUBLIC, origin=f"https://{PUBLIC}")


def test_on_an_open_address_the_machine_itself_is_the_admin_alone() -> None:
    """The peer is checked, not what it says of itself."""
    settings = Settings(host="0.0.0.0", port=0, open_to_all=True)
    with served(settings) as running, Visitor(running) as visitor:
        visitor.open()
        assert admin(visitor)
        assert not admin(visitor, host="192.0.2.1")
