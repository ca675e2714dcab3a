"""Who asks: a login name, or on one's own machine an id in a cookie.

No address and no user agent is kept of anybody, in memory or on disk.
"""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_rlhf.errors import ConfigError, UserError
from ui.users import LOCAL, Users

if TYPE_CHECKING:
    import gradio as gr

COOKIE = "lora-rlhf-id"
SCOPE_KEY = "lora_rlhf.person"  # where the middleware leaves the Person in the ASGI scope

_ID = re.compile(r"[0-9a-f]{32}")
_SECRET_BYTES = 32

# From the cookies of a request to the name that is logged in, and the token that says so.
Logins = Callable[[Mapping[str, str]], tuple[str, str] | None]


class NotAllowed(UserError):
    """Something that only an admin may do."""


@dataclass(frozen=True)
class Person:
    """Somebody who asks.

    Attributes:
        name: of the login, or `local-` and a hash; what judgements are stored under.
        is_admin: may export, retrain and see what others did.
        session: a salted hash of one login, or of one browser while this server runs.
    """

    name: str
    is_admin: bool
    session: str


def person_of(request: "gr.Request") -> Person:
    """Who made the request of a handler.

    Raises:
        RuntimeError: the app runs without `ui.security.Guard`, so nobody is known.
    """
    person = request.request.scope.get(SCOPE_KEY) if request.request else None
    if not isinstance(person, Person):
        raise RuntimeError("no Person in the request: the app must be served by ui.server")
    return person


def require_admin(person: Person, what: str = "This") -> None:
    """Refuse whoever is no admin; every handler for admins calls it, hidden or not.

    Raises:
        NotAllowed: in words for the person.
    """
    if not person.is_admin:
        raise NotAllowed(f"{what} is for the admin alone, and {person.name} is none.")


@dataclass(frozen=True)
class Known:
    """A request's person.

    Attributes:
        person: who it is.
        new_id: to be kept in the browser's cookie; None where there is one already.
    """

    person: Person
    new_id: str | None = None


class People:
    """Tells from the cookies of a request who made it.

    Args:
        users: who may log in; None on one's own machine, where nobody has to.
        logins: finds the login in the cookies; needed with users.
        secret: what names are salted with, the same at every start.
    """

    def __init__(
        self, users: Users | None = None, logins: Logins | None = None, secret: bytes | None = None
    ) -> None:
        assert (users is None) == (logins is None), "logins and users go together"
        self.users = users
        self._logins = logins
        self._secret = secret or secrets.token_bytes(_SECRET_BYTES)
        self._salt = secrets.token_bytes(_SECRET_BYTES)  # of this start alone

    def identify(self, cookies: Mapping[str, str], own_machine: bool) -> Known | None:
        """Who asks, or None where one has to log in first.

        Args:
            cookies: of the request.
            own_machine: it came from this machine, not through a proxy. Without users, that is
                what makes an admin.
        """
        if self.users is not None and self._logins is not None:
            login = self._logins(cookies)
            role = self.users.role(login[0]) if login else None
            if login is None or role is None:
                return None
            return Known(Person(login[0], role == "admin", self._session(login[1])))
        kept = cookies.get(COOKIE, "")
        known = _ID.fullmatch(kept) is not None
        identity = kept if known else secrets.token_hex(16)
        name = LOCAL + _hash(self._secret, "name", identity)[:8]
        person = Person(name, own_machine, self._session(identity))
        return Known(person, None if known else identity)

    def _session(self, credential: str) -> str:
        return _hash(self._salt, "session", credential)[:16]


def _hash(key: bytes, purpose: str, value: str) -> str:
    return hmac.new(key, f"{purpose}:{value}".encode(), hashlib.sha256).hexdigest()


def secret_at(path: Path) -> bytes:
    """The secret kept in a file that its owner alone can read; made when there is none.

    Raises:
        ConfigError: others can read the file, or it holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        # Written aside and linked: whoever starts at the same time never reads half a secret.
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(aside, path)
        finally:
            os.unlink(aside)
    mode = path.stat().st_mode & 0o777
    secret = path.read_bytes()
    if mode & 0o077 or len(secret) != _SECRET_BYTES:
        raise ConfigError(
            f"{path} has mode {mode:03o} and {len(secret)} bytes; allowed are mode 600 and "
            f"{_SECRET_BYTES} bytes, for names of people are hashed with it. Mend the mode with "
            f"chmod 600 {path}, or remove it: whoever has no login then gets a new name."
        )
    return secret
