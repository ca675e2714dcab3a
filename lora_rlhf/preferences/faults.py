"""What a database says in codes -> what a person can do about it."""

import sqlite3

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lora_rlhf.errors import PreferenceError

BUSY_SECONDS = 10.0
"""How long a call waits for another writer."""


class OldFormat(PreferenceError):
    """A store that an older version has written, opened for reading alone."""


_SQLITE_FAULTS = {
    "not a database": "is no SQLite database. Give another file, or restore a backup of it",
    "malformed": "is damaged. Restore a backup of it (lora-rlhf preferences backup makes them)",
    "disk is full": "could not be written: no space is left on the disk. Nothing was stored by "
    "this call; all that was stored before is safe. Free some space and try again",
    "disk i/o error": "could not be read or written (disk I/O error). Nothing was stored by this "
    "call. Look at the disk, its quota and the limits on file size",
    "is locked": f"was locked by another process for {BUSY_SECONDS:.0f} seconds. Nothing was "
    f"stored by this call. Try again, or end the other process",
    "readonly database": "cannot be written: the file or its folder is read-only for this user. "
    "Change their permissions, or give another file",
    "unable to open": "cannot be opened. Look at the permissions of the file and its folder",
}
_SERVER_FAULTS = {
    "53100": "could not be written: no space is left on the server's disk. Nothing was stored by "
    "this call",
    "55P03": f"was locked for {BUSY_SECONDS:.0f} seconds. Nothing was stored by this call",
    "42501": "does not allow this user what is needed",
    "25006": "can only be read",
}


def sentence_on(error: DBAPIError | PoolTimeout | sqlite3.Error) -> str | None:
    """The end of a sentence that starts with the store's name, or None for a bug."""
    if isinstance(error, PoolTimeout):
        return f"had no free connection for {BUSY_SECONDS:.0f} seconds. Try again"
    if isinstance(error, sqlite3.Error):  # that did not pass through SQLAlchemy
        return _sqlite_sentence(error)
    if isinstance(error.orig, sqlite3.Error):
        return _sqlite_sentence(error.orig)
    code = getattr(error.orig, "sqlstate", None) or ""
    for start, sentence in _SERVER_FAULTS.items():
        if code.startswith(start):
            return f"{sentence} ({_first_line(error.orig)})"
    if type(error.orig).__name__ == "OperationalError":
        return f"cannot be reached ({_first_line(error.orig)}). Is the server up, and the URL right"
    return None


def _sqlite_sentence(error: sqlite3.Error) -> str | None:
    said = str(error).lower()
    return next((text for part, text in _SQLITE_FAULTS.items() if part in said), None)


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().split("\n")[0]
