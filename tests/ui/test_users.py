"""The file of users: who is in it, what it gives away, and how long a check takes."""

import base64
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.errors import ConfigError
from tests.ui.served import STRONG, quick_passwords
from ui.users import Users, add_user, read_users


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_passwords():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.txt"


def test_a_user_is_let_in_with_the_right_password_alone(path: Path) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    add_user(path, "bob", "battery staple", admin=False)
    users = Users(path)
    assert users.names() == ["ana", "bob"]
    assert (users.role("ana"), users.role("bob"), users.role("eve")) == ("admin", "labeler", None)
    assert users.check("ana", "correct horse")
    for name, password in [
        ("ana", "battery staple"),
        ("ana", "correct horse "),
        ("ana", ""),
        ("Ana", "correct horse"),
        ("eve", "correct horse"),
        ("", ""),
    ]:
        assert not users.check(name, password)


def test_the_line_is_scrypt_of_the_standard_library(path: Path) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    text = path.read_text()
    assert "correct horse" not in text
    name, role, stored = text.strip().split(":")
    scheme, n, r, p, salt, digest = stored.split("$")
    assert (name, role, scheme) == ("ana", "admin", "scrypt")
    assert hashlib.scrypt(
        b"correct horse", salt=base64.b64decode(salt), n=int(n), r=int(r), p=int(p), dklen=32
    ) == base64.b64decode(digest)


def test_passwords_are_hashed_slowly_outside_of_tests() -> None:
    """OWASP's cheat sheet has five settings of equal strength; these are the ones with n * p."""
    n, r, p = STRONG
    assert r == 8
    assert (n, p) in {(2**17, 1), (2**16, 2), (2**15, 3), (2**14, 5), (2**13, 10)}


def test_the_same_password_has_another_hash_each_time(path: Path) -> None:
    add_user(path, "ana", "correct horse", admin=False)
    add_user(path, "bob", "correct horse", admin=False)
    users = read_users(path)
    assert users["ana"].digest != users["bob"].digest


def test_adding_again_gives_a_new_password_and_role(path: Path) -> None:
    assert add_user(path, "ana", "correct horse", admin=True)
    add_user(path, "bob", "battery staple", admin=False)
    assert not add_user(path, "ana", "another one", admin=False)
    users = Users(path)
    assert users.role("ana") == "labeler"
    assert users.check("ana", "another one")
    assert not users.check("ana", "correct horse")
    assert users.check("bob", "battery staple")


def test_the_mark_changes_with_the_password_and_tells_nothing_of_it(path: Path) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    users = Users(path)
    marks = {users.mark("ana")}
    assert users.mark("eve") is None
    assert marks == {users.mark("ana")}
    for password in ("another one", "correct horse", "correct horse"):
        add_user(path, "ana", password, admin=True)
        marks.add(users.mark("ana"))
    assert len(marks) == 4
    salt, digest = path.read_text().strip().split("$")[-2:]
    for mark in marks:
        assert mark is not None
        assert bytes.fromhex(mark) not in base64.b64decode(salt) + base64.b64decode(digest)


def test_the_file_is_of_its_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        add_user(path, "ana", "correct horse", admin=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["users.txt"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o644])
def test_a_file_that_others_can_read_is_refused(path: Path, mode: int) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    path.chmod(mode)
    for use in (lambda: Users(path), lambda: add_user(path, "bob", "battery staple", False)):
        with pytest.raises(ConfigError, match=f"has mode {mode:03o}.*chmod 600 {path}"):
            use()


def test_names_that_are_not_there_cost_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work, not the time: the same hash, with the same settings, as often."""
    add_user(path, "ana", "correct horse", admin=True)
    users = Users(path)
    asked: list[dict[str, Any]] = []
    scrypt = hashlib.scrypt

    def counted(password: bytes, **options: Any) -> bytes:
        asked.append({k: options[k] for k in ("n", "r", "p", "dklen")} | {"size": len(password)})
        return scrypt(password, **options)

    monkeypatch.setattr(hashlib, "scrypt", counted)
    users.check("ana", "wrong")
    users.check("eve", "wrong")
    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_a_change_counts_at_once(path: Path) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    users = Users(path)
    add_user(path, "bob", "battery staple", admin=False)
    assert users.role("bob") == "labeler"
    path.chmod(0o644)
    with pytest.raises(ConfigError):
        users.role("ana")


@pytest.mark.parametrize(
    "name", ["", "a b", "a:b", "a\nb", "ana\n", "../x", "é", "a" * 33, "local-12345678", "-a"]
)
def test_names_that_could_break_the_file_are_refused(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a user"):
        add_user(path, name, "correct horse", admin=False)
    assert not path.exists()


@pytest.mark.parametrize("password", ["", "seven77", "x" * 1025])
def test_passwords_have_a_length(path: Path, password: str) -> None:
    with pytest.raises(ConfigError, match="Allowed: 8 to 1024"):
        add_user(path, "ana", password, admin=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: line.replace("admin", "root"), ":2: not a line of users"),
        (lambda line: line.replace("scrypt", "md5"), ":2: not a line of users"),
        (lambda line: line.replace("$16$", "$15$"), ":2: not a line of users"),
        (lambda line: line.replace("$16$", "$1099511627776$"), ":2: not a line of users"),
        (lambda line: line.replace("$16$8$1$", "$16$8$99$"), ":2: not a line of users"),
        (lambda line: line[:-8], ":2: not a line of users"),
        (lambda line: line.split("$")[0], ":2: not a line of users"),
        (lambda line: line.replace("eve", "local-1"), ":2: 'local-1' is no name"),
        (lambda line: line.replace("eve", "ana"), ":2: ana is there twice"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(path: Path, change: Any, says: str) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    first = path.read_text()
    path.write_text(first + change(first.replace("ana", "eve").strip()) + "\n")
    with pytest.raises(ConfigError, match=f"{path}{says}"):
        Users(path)


def test_comments_and_empty_lines_are_left_alone(path: Path) -> None:
    add_user(path, "ana", "correct horse", admin=True)
    path.write_text(f"# who may rank\n\n{path.read_text()}")
    assert Users(path).names() == ["ana"]


@pytest.mark.parametrize("content", [None, "", "# nobody\n"])
def test_a_file_without_anybody_is_refused(path: Path, content: str | None) -> None:
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match="lora-rlhf ui --add-user NAME"):
        Users(path)
