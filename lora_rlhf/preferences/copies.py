"""Consistent copies of a store as one SQLite file."""

import os
import tempfile
from pathlib import Path

from sqlalchemy import insert, select

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences.database import Database
from lora_rlhf.preferences.files import sync_folder
from lora_rlhf.preferences.schema import EVENTS

_ROWS_AT_ONCE = 500


def copy_to(database: Database, path: Path) -> None:
    """Write the store to a new file, for its owner alone; it appears whole or not at all.

    Raises:
        PreferenceError: the file exists, or cannot be written.
    """
    path = path.expanduser()
    if path.exists():
        raise PreferenceError(f"{path} exists, and a copy overwrites nothing. Give another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            making = Path(folder) / "copy.db"
            if database.path is None:
                _copy_rows(database, making)
            else:
                os.close(os.open(making, os.O_CREAT | os.O_EXCL, 0o600))
                with database.alone(about=path) as driver:
                    driver.execute("VACUUM INTO ?", (str(making),))
            with making.open("rb") as file:
                os.fsync(file.fileno())  # SQLite does not
            os.link(making, path)  # unlike a rename, it never replaces what another has just made
        sync_folder(path)
    except OSError as error:
        raise PreferenceError(f"{path} cannot be written: {error.strerror}.") from error


def _copy_rows(database: Database, path: Path) -> None:
    copy = Database(path)
    with database.reading() as source, copy.writing() as target:
        source = source.execution_options(yield_per=_ROWS_AT_ONCE)
        for rows in source.execute(select(EVENTS).order_by(EVENTS.c.seq)).mappings().partitions():
            target.execute(insert(EVENTS), [dict(row) for row in rows])
    with copy.alone() as driver:
        driver.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
    copy.close()
