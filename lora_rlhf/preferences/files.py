"""Files of the store: for their owner alone, hashed, and what is still to be done to them."""

import hashlib
import os
import stat
import uuid
from pathlib import Path

from lora_rlhf.errors import PreferenceError

_BLOCK_BYTES = 2**20


def prepare(path: Path, create: bool) -> None:
    """See to it that the file is there, for its owner alone; SQLite's own files inherit that."""
    try:
        if path.is_dir():
            raise PreferenceError(f"{path} is a folder. Give a file in it, such as rankings.db.")
        if not path.exists():
            if not create:
                raise PreferenceError(
                    f"{path}: there is no such store of rankings. The app makes one, and so does "
                    f"lora-rlhf preferences import."
                )
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private(path)
        elif not create and path.stat().st_size == 0:
            # SQLite would take it for a new database and write into it.
            raise PreferenceError(f"{path} is empty, and no store of rankings.")
        elif create:
            found = path.stat()
            if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077:
                path.chmod(0o600)
    except OSError as error:
        raise PreferenceError(
            f"{path} cannot be opened or made: {error.strerror}. Give a path in a folder of yours."
        ) from error


def make_private(path: Path) -> None:
    """An empty file that its owner alone can read; one that another process just made is fine."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make the name of a file as durable as its content."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, whatever its size; `hashlib.file_digest` needs Python 3.11."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


class Owed:
    """A mark beside a store: what was erased from it may still stand in its log or its pages.

    It lies on the disk, so that whoever opens the store next knows of it, also after a kill. Only
    who holds the store's write lock may set or clear it.

    Args:
        path: of the store.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}-erasing")

    def which(self) -> str | None:
        """What tells this mark from an earlier and a later one; None where nothing is owed."""
        try:
            return self._path.read_text(encoding="ascii")
        except FileNotFoundError:
            return None

    def set(self) -> None:
        """Say that something is owed from now on.

        Raises:
            PreferenceError: it could not be written down.
        """
        try:
            make_private(self._path)
            self._path.write_text(uuid.uuid4().hex, encoding="ascii")
            sync_folder(self._path)
        except OSError as error:
            raise PreferenceError(
                f"{self._path} cannot be written: {error.strerror}. Nothing was erased."
            ) from error

    def clear(self) -> None:
        """Say that nothing is owed any more."""
        self._path.unlink(missing_ok=True)
