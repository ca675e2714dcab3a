"""The file of users: a line `name:role:scrypt$n$r$p$salt$hash` for each; passwords lie nowhere."""

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from lora_rlhf.errors import ConfigError

Role = Literal["admin", "labeler"]
LOCAL = "local-"  # names that people without a login have; no login may look like one
SHORTEST_PASSWORD = 8
_LONGEST_PASSWORD = 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
# 32 MiB and three passes: of the settings of equal strength that OWASP's password storage cheat
# sheet lists for scrypt, the one of that size.
_N, _R, _P = 2**15, 8, 3
_SALT_BYTES = _HASH_BYTES = 32
_LEAST_SALT_BYTES = 16
_MOST_MEMORY = 2**28  # so that a line with outsized settings is refused, not obeyed
_ADD = "lora-rlhf ui --add-user NAME --users FILE"


@dataclass(frozen=True)
class _User:
    role: Role
    n: int
    r: int
    p: int
    salt: bytes
    digest: bytes

    def knows(self, password: str) -> bool:
        return hmac.compare_digest(
            _digest(password, self.salt, self.n, self.r, self.p), self.digest
        )

    def line(self, name: str) -> str:
        salt, digest = (base64.b64encode(x).decode() for x in (self.salt, self.digest))
        return f"{name}:{self.role}:scrypt${self.n}${self.r}${self.p}${salt}${digest}"


def _digest(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(
        password.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MOST_MEMORY, dklen=_HASH_BYTES
    )


def _made(password: str, role: Role) -> _User:
    salt = secrets.token_bytes(_SALT_BYTES)
    return _User(role, _N, _R, _P, salt, _digest(password, salt, _N, _R, _P))


class Users:
    """Who may log in, as a file says; a file that has changed is read again.

    Args:
        path: the file.

    Raises:
        ConfigError: there is none, others can read it, nobody is in it, or a line cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        # What a name that is not there is checked against: no password has this digest.
        salt, digest = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_HASH_BYTES)
        self._nobody = _User("labeler", _N, _R, _P, salt, digest)
        self._read_at: tuple[int, ...] = ()
        self._users: dict[str, _User] = {}
        self._current()

    def names(self) -> list[str]:
        """Everybody who may log in."""
        return sorted(self._current())

    def role(self, name: str) -> Role | None:
        """What somebody may do; None for who is not in the file, or no longer."""
        user = self._current().get(name)
        return user.role if user else None

    def mark(self, name: str) -> str | None:
        """What changes with somebody's password, and tells nothing of it; None for nobody."""
        user = self._current().get(name)
        return hashlib.sha256(user.salt + user.digest).hexdigest() if user else None

    def check(self, name: str, password: str) -> bool:
        """Whether the password is right; takes as long for names that are not there.

        One at a time, so that many logins at once do not take many times the memory.
        """
        user = self._current().get(name)
        with self._one_at_a_time:
            right = (user or self._nobody).knows(password[:_LONGEST_PASSWORD])
        return right and user is not None

    def _current(self) -> dict[str, _User]:
        with self._lock:
            stamp = _stamp(self.path)
            if stamp != self._read_at:
                self._users = read_users(self.path)
                self._read_at = stamp
            return self._users


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        about = path.stat()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file of users. Make one: {_ADD}") from error
    return about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode


def read_users(path: Path) -> dict[str, _User]:
    """The users of a file, by name.

    Raises:
        ConfigError: others can read the file, nobody is in it, or a line cannot be used.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of users. Make one: {_ADD}")
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:03o}: others on this machine can read or change who logs in. "
            f"Allowed is 600. Do: chmod 600 {path}"
        )
    users: dict[str, _User] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, user = _parsed(line, f"{path}:{number}")
        if name in users:
            raise ConfigError(f"{path}:{number}: {name} is there twice. Remove one of the lines.")
        users[name] = user
    if not users:
        raise ConfigError(f"{path} has no users, so nobody could log in. Add one: {_ADD}")
    return users


def _parsed(line: str, where: str) -> tuple[str, _User]:
    parts = re.split(r"[:$]", line.strip())
    try:
        name, role, scheme, *numbers, salt, digest = parts
        n, r, p = (int(number) for number in numbers)
        if scheme != "scrypt" or role not in get_args(Role) or not _bearable(n, r, p):
            raise ValueError("another scheme, role or setting")
        salted = base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True)
        if len(salted[0]) < _LEAST_SALT_BYTES or len(salted[1]) != _HASH_BYTES:
            raise ValueError("cut off")
    except (ValueError, binascii.Error) as error:
        raise ConfigError(
            f"{where}: not a line of users. Allowed: NAME:{'|'.join(get_args(Role))}:scrypt$... as "
            f"written by {_ADD}"
        ) from error
    check_name(name, where)
    return name, _User(cast("Role", role), n, r, p, *salted)


def _bearable(n: int, r: int, p: int) -> bool:
    """Whether these settings of scrypt make sense and fit the memory a login may take."""
    return n > 1 and n & (n - 1) == 0 and r > 0 and 0 < p <= 16 and 128 * n * r < _MOST_MEMORY


def check_name(name: str, where: str) -> None:
    """Refuse what cannot be the name of a user.

    Raises:
        ConfigError: with what is allowed.
    """
    if not _NAME.fullmatch(name) or name.startswith(LOCAL):
        raise ConfigError(
            f"{where}: {name!r} is no name of a user. Allowed: 1 to 32 letters, digits, '.', '_' "
            f"and '-', a letter or digit first, not beginning with {LOCAL!r}."
        )


def add_user(path: Path, name: str, password: str, admin: bool) -> bool:
    """Put a user into the file, or give one who is there a new password and role.

    Returns:
        Whether the user is new.

    Raises:
        ConfigError: a name or password that is not allowed, or a file that cannot be used.
    """
    check_name(name, "--add-user")
    if not SHORTEST_PASSWORD <= len(password) <= _LONGEST_PASSWORD:
        raise ConfigError(
            f"The password has {len(password)} characters. Allowed: {SHORTEST_PASSWORD} to "
            f"{_LONGEST_PASSWORD}."
        )
    users = read_users(path) if path.exists() else {}
    new = name not in users
    users[name] = _made(password, "admin" if admin else "labeler")
    _write_privately(path, "".join(f"{user.line(n)}\n" for n, user in users.items()))
    return new


def _write_privately(path: Path, text: str) -> None:
    """Replace `path` in one step by a file that its owner alone can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
