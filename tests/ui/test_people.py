"""Who a request is of, and what is kept of them."""

import dataclasses
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import gradio as gr
import pytest
from fastapi import Request

from lora_rlhf.errors import ConfigError, UserError
from tests.ui.served import quick_passwords, users_file
from ui.people import (
    COOKIE,
    SCOPE_KEY,
    NotAllowed,
    People,
    Person,
    person_of,
    require_admin,
    secret_at,
)
from ui.users import Users

ID, OTHER = "a" * 32, "b" * 32


def request_of(**scope: object) -> gr.Request:
    return gr.Request(Request({"type": "http", "headers": [], **scope}))


def test_a_handler_learns_who_asks() -> None:
    person = Person("ana", True, "s")
    assert person_of(request_of(**{SCOPE_KEY: person})) == person


@pytest.mark.parametrize("request_", [request_of(), gr.Request(), request_of(**{SCOPE_KEY: "ana"})])
def test_without_the_middleware_nobody_is_anybody(request_: gr.Request) -> None:
    with pytest.raises(RuntimeError, match=r"served by ui\.server"):
        person_of(request_)


def test_a_person_holds_three_things_and_nothing_more() -> None:
    assert [f.name for f in dataclasses.fields(Person)] == ["name", "is_admin", "session"]


def test_what_is_for_admins_says_so() -> None:
    require_admin(Person("ana", True, "s"))
    with pytest.raises(NotAllowed, match=r"^Retraining is for the admin alone, and bob is none\.$"):
        require_admin(Person("bob", False, "s"), "Retraining")
    assert issubclass(NotAllowed, UserError)


# -- without logins -------------------------------------------------------------------------------


def test_a_name_is_of_a_cookie_and_a_secret() -> None:
    people = People(secret=b"s" * 32)
    known = people.identify({COOKIE: ID}, own_machine=True)
    assert known is not None
    assert known.new_id is None
    prefix, _, digest = known.person.name.partition("-")
    assert (prefix, len(bytes.fromhex(digest))) == ("local", 4)
    again = People(secret=b"s" * 32).identify({COOKIE: ID}, own_machine=True)
    assert again is not None
    assert again.person.name == known.person.name, "a restart keeps the name"
    assert again.person.session != known.person.session, "and begins a new session"
    for other in (
        People(secret=b"t" * 32).identify({COOKIE: ID}, own_machine=True),
        people.identify({COOKIE: OTHER}, own_machine=True),
    ):
        assert other is not None
        assert other.person.name != known.person.name


def test_a_new_browser_gets_an_id_that_nobody_can_guess() -> None:
    people = People(secret=b"s" * 32)
    ids = set()
    for _ in range(50):
        known = people.identify({}, own_machine=True)
        assert known is not None
        assert known.new_id is not None
        ids.add(known.new_id)
        kept = people.identify({COOKIE: known.new_id}, own_machine=True)
        assert kept is not None
        assert kept.person == known.person
    assert len(ids) == 50
    assert {len(bytes.fromhex(each)) for each in ids} == {16}


def test_only_who_sits_at_the_machine_is_its_admin() -> None:
    people = People()
    for own_machine in (True, False):
        known = people.identify({COOKIE: ID}, own_machine)
        assert known is not None
        assert known.person.is_admin is own_machine


# -- with logins ----------------------------------------------------------------------------------


@pytest.fixture
def users(tmp_path: Path) -> Iterator[Users]:
    with quick_passwords():
        yield Users(users_file(tmp_path))


def login(cookies: Mapping[str, str]) -> tuple[str, str] | None:
    name, _, token = cookies.get("login", "").partition("/")
    return (name, token) if name else None


def test_a_login_is_who_the_file_says(users: Users) -> None:
    people = People(users, login)
    ana = people.identify({"login": "ana/1"}, own_machine=False)
    bob = people.identify({"login": "bob/2"}, own_machine=True)
    assert ana is not None
    assert bob is not None
    assert (ana.person.name, ana.person.is_admin) == ("ana", True)
    assert (bob.person.name, bob.person.is_admin) == ("bob", False)
    assert ana.new_id is bob.new_id is None
    twice = people.identify({"login": "ana/3"}, own_machine=False)
    assert twice is not None
    assert twice.person.session != ana.person.session


@pytest.mark.parametrize("cookies", [{}, {COOKIE: ID}, {"login": "eve/1"}, {"login": "local-a/1"}])
def test_who_is_not_in_the_file_is_nobody(users: Users, cookies: dict[str, str]) -> None:
    assert People(users, login).identify(cookies, own_machine=True) is None


# -- the secret -----------------------------------------------------------------------------------


def test_the_secret_is_made_once_and_of_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rankings.db.secret"
    secret = secret_at(path)
    assert len(secret) == 32
    assert secret_at(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert secret_at(tmp_path / "other") != secret


def test_who_starts_at_the_same_time_gets_the_same_secret(tmp_path: Path) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(secret_at(tmp_path / "secret"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_secret_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret_at(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"mode 644.*chmod 600 {path}"):
        secret_at(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        secret_at(path)
