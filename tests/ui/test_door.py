"""Logging in: how often one may try, by name and by address, also behind a proxy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ui.served import Visitor, quick_passwords, served, small_app, users_file
from ui import users as users_module
from ui.security import LOGINS_A_MINUTE
from ui.server import Running, Settings

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
        assert attempt(visitor, "bob", "battery staple") == 429, "the same address"


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


def test_one_name_from_many_addresses(proxied: Running) -> None:
    with Visitor(proxied) as visitor:
        codes = [
            attempt(visitor, "ana", "wrong", f"198.51.100.{n}") for n in range(LOGINS_A_MINUTE + 1)
        ]
        assert codes == [400] * LOGINS_A_MINUTE + [429]
        assert attempt(visitor, "bob", "battery staple", "198.51.100.200") == 200


def test_many_names_from_one_address_which_cannot_make_up_another(proxied: Running) -> None:
    """The proxy adds the address it sees at the end; the rest is the client's words."""
    with Visitor(proxied) as visitor:
        codes = [
            attempt(visitor, f"user{n}", "wrong", f"198.51.100.{n}, 203.0.113.7")
            for n in range(LOGINS_A_MINUTE + 1)
        ]
        assert codes == [400] * LOGINS_A_MINUTE + [429]


def test_without_a_proxy_nobody_believes_the_header(app: Running) -> None:
    with Visitor(app) as visitor:
        codes = []
        for n in range(LOGINS_A_MINUTE + 1):
            form = {"username": f"user{n}", "password": "wrong"}
            headers = {"x-forwarded-for": f"198.51.100.{n}"}
            codes.append(visitor.post("/login", data=form, headers=headers).status_code)
        assert codes == [400] * LOGINS_A_MINUTE + [429]


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
