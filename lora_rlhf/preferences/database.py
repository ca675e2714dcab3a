"""The database under the store: SQLite file or PostgreSQL server, transactions, and what can fail.

SQLite keeps what it has acknowledged: WAL with synchronous=FULL, one writer at a time (BEGIN
IMMEDIATE), the file for its owner alone. PostgreSQL gets the same order of writers by a lock that
ends with the transaction, so that `seq` is the order in which events became visible.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    QueuePool,
    create_engine,
    event,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences import schema
from lora_rlhf.preferences.faults import (
    BUSY_SECONDS,
    OldFormat,
    sentence_on,
)
from lora_rlhf.preferences.files import Owed, prepare

_LOCK = 0x6C6F7261  # first key of the advisory lock; the second is the schema's
_INSTALL = "pip install 'lora-rlhf[postgres]'"
_POOL: dict[str, Any] = {"pool_size": 4, "max_overflow": 28, "pool_timeout": BUSY_SECONDS}
_READ_ALL = "SELECT sum(length(body)) FROM {table}"


def is_url(location: str | Path) -> bool:
    """Whether a location names a server, or tries to."""
    return "://" in str(location)


class Database:
    """Connections to one store.

    Args:
        location: path of an SQLite file, or a postgresql:// URL.
        create: make the file and its folder where there is none.
        read_only: never write, not even the format; the file may lie on a read-only disk.

    Raises:
        PreferenceError: it cannot be opened.
    """

    def __init__(self, location: str | Path, create: bool = True, read_only: bool = False) -> None:
        self.read_only = read_only
        self.url = _server(str(location)) if is_url(location) else None
        self.path = None if self.url else Path(location).expanduser()
        self.shown = (
            str(self.path)
            if self.url is None
            else self.url.set(drivername="postgresql").render_as_string()
        )
        if self.path is not None:
            prepare(self.path, create and not read_only)
        self._engine, self._pid = self._connect(), os.getpid()
        self._file = self._identity()
        self._owed = None if self.path is None or read_only else Owed(self.path)
        with self.faults():
            self._open()
        self.settle()

    def close(self) -> None:
        """Close all connections that are not in use."""
        self.settle()
        self._engine.dispose()

    # -- transactions ---------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store."""
        with self.faults(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer shares; durable when the block has ended.

        Raises:
            PreferenceError: it was not stored.
        """
        if self.read_only:
            raise PreferenceError(f"{self.shown} was opened for reading alone.")
        if self._identity() != self._file:
            raise PreferenceError(
                f"{self.shown} was removed or replaced while it was open. Nothing was stored by "
                f"this call. Put the file back, and start again."
            )
        with self.faults(), self.engine.connect() as connection:
            connection = connection.execution_options(writing=True)
            with connection.begin():
                if self.path is None:
                    here = func.hashtext(func.current_schema())
                    connection.execute(select(func.pg_advisory_xact_lock(_LOCK, here)))
                yield connection
        self.settle()

    @contextmanager
    def alone(self, about: str | Path | None = None) -> Iterator[Any]:
        """A driver connection outside of any transaction, for VACUUM and checkpoints.

        Args:
            about: what messages on faults speak of; unset: the store.
        """
        with self.faults(about), self._driver() as driver:
            yield driver

    @contextmanager
    def _driver(self) -> Iterator[Any]:
        pooled = self.engine.raw_connection()
        try:
            yield pooled.driver_connection
        finally:
            pooled.close()

    @property
    def engine(self) -> Engine:
        """Of this process: SQLite's locks and a server's sockets do not survive a fork."""
        if os.getpid() != self._pid:
            self._engine.dispose(close=False)
            self._engine, self._pid = self._connect(), os.getpid()
        return self._engine

    @contextmanager
    def faults(self, about: str | Path | None = None) -> Iterator[None]:
        """Say in a sentence what the database says in codes; a bug keeps its traceback."""
        try:
            yield
        except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
            sentence = sentence_on(error)
            if sentence is None:
                raise
            raise PreferenceError(f"{about or self.shown} {sentence}.") from error

    # -- opening --------------------------------------------------------------------------------

    def _connect(self) -> Engine:
        if self.url is not None:
            try:
                engine = create_engine(
                    self.url,
                    hide_parameters=True,
                    pool_pre_ping=True,
                    connect_args={"connect_timeout": int(BUSY_SECONDS)},
                    **_POOL,
                )
            except ImportError as error:
                raise PreferenceError(f"{self.shown} needs psycopg. Run: {_INSTALL}") from error
            event.listen(engine, "connect", _prepare_server_session)
            return engine
        assert self.path is not None
        uri = f"{self.path.absolute().as_uri()}?{self._mode()}"
        engine = create_engine(
            "sqlite+pysqlite://",
            hide_parameters=True,
            poolclass=QueuePool,
            creator=lambda: sqlite3.connect(
                uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            ),
            **_POOL,
        )
        event.listen(engine, "connect", _prepare_sqlite_session)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _mode(self) -> str:
        """How SQLite opens the file; a log can be read only where its index can be written."""
        assert self.path is not None
        if not self.read_only:
            return "mode=rw"
        log = self.path.with_name(self.path.name + "-wal")
        unlogged = not log.exists() or log.stat().st_size == 0
        fixed = unlogged and not os.access(self.path.parent, os.W_OK)
        return "mode=ro&immutable=1" if fixed else "mode=ro"

    def _open(self) -> None:
        """Check the file or server, and bring its tables to this version."""
        with self.reading() as connection:
            found = schema.examine(connection, self.shown)
            if self.path is None:
                _require_utf8(connection, self.shown)
        if self.path is not None:
            if not self.read_only:
                self._keep_a_log()
            self.check()
        if found == schema.VERSION:
            return
        if self.read_only:
            raise OldFormat(
                f"{self.shown} has an older format (found: {found}; needed: {schema.VERSION}). "
                f"Bring it up to date: lora-rlhf preferences stats --store {self.shown}"
            )
        with self.writing() as connection:
            schema.upgrade(connection, self.shown)

    def _keep_a_log(self) -> None:
        """Switch the file to a write-ahead log, which stays so; two processes may come at once."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with self._driver() as driver:
                    found = driver.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        if found != "wal":
            raise PreferenceError(
                f"{self.shown} cannot have a write-ahead log there (journal mode {found}), as on "
                f"most network file systems. Give a path on a local disk."
            )

    def check(self) -> None:
        """Read all there is and check that it holds together.

        Raises:
            PreferenceError: it is damaged.
        """
        with self.reading() as connection:
            if self.path is None:  # reads every page, which the server checks
                connection.execute(text(_READ_ALL.format(table=schema.EVENTS.name)))
                return
            found = connection.exec_driver_sql("PRAGMA integrity_check(3)").scalars().all()
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if found != ["ok"] or orphans:
            said = "; ".join(map(str, found)) if found != ["ok"] else f"{len(orphans)} orphans"
            raise PreferenceError(
                f"{self.shown} is damaged ({said}). Restore a backup of it (lora-rlhf preferences "
                f"backup makes them)."
            )

    # -- erasing --------------------------------------------------------------------------------

    def owe(self) -> None:
        """Within a transaction that erases: remember that the files still hold what it erases."""
        if self._owed is not None:
            self._owed.set()

    @property
    def owes(self) -> bool:
        """Whether the files may still hold what was erased, because somebody reads an older state.

        `settle` is tried after every write, when the store is closed, and when it is opened.
        """
        return self._owed is not None and self._owed.which() is not None

    def settle(self, patience: float = 0.0) -> None:
        """Overwrite what was erased, in the log too, where it is owed and no reader hinders it.

        What fails stays owed.

        Args:
            patience: seconds to wait for readers of older states, and for writers.
        """
        if self._owed is None or not self.owes:
            return
        # Whoever calls has just stored something, and must not be told otherwise.
        with suppress(PreferenceError, OSError), self.alone() as driver:
            which = self._owed.which()
            before = driver.execute("PRAGMA busy_timeout").fetchone()[0]
            driver.execute(f"PRAGMA busy_timeout = {int(patience * 1000)}")
            try:
                if driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    return  # busy
                driver.execute("BEGIN IMMEDIATE")
                try:
                    if self._owed.which() == which:  # else somebody has erased more meanwhile
                        self._owed.clear()
                finally:
                    driver.execute("ROLLBACK")
            finally:
                driver.execute(f"PRAGMA busy_timeout = {before}")

    def vacuum_server(self) -> None:
        """Have a server drop what was deleted; what an older reader still sees goes later."""
        if self.path is not None:
            return
        with self.alone() as driver:
            driver.autocommit = True
            try:
                driver.execute(f"VACUUM {schema.EVENTS.name}")
            finally:
                driver.autocommit = False

    def _identity(self) -> tuple[int, int] | None:
        """Which file stands under the path."""
        if self.path is None:
            return None
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


# -- sessions -----------------------------------------------------------------------------------


def _prepare_sqlite_session(driver: sqlite3.Connection, record: object) -> None:
    driver.execute("PRAGMA synchronous = FULL")
    driver.execute("PRAGMA foreign_keys = ON")
    driver.execute("PRAGMA secure_delete = ON")  # what is erased is overwritten


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _prepare_server_session(driver: Any, record: object) -> None:
    driver.autocommit = True
    driver.execute("SET synchronous_commit TO on")  # the server's own default may be off
    driver.execute(f"SET lock_timeout TO '{BUSY_SECONDS:.0f}s'")
    driver.autocommit = False


def _require_utf8(connection: Connection, shown: str) -> None:
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != "UTF8":
        raise PreferenceError(
            f"{shown} keeps text as {encoding}. Make a database with ENCODING 'UTF8'."
        )


def _server(location: str) -> URL:
    """The URL for SQLAlchemy, with the one driver that we test."""
    try:
        url = make_url(location)
    except (ArgumentError, ValueError) as error:
        raise PreferenceError(
            f"the location of the store is no URL that can be read ({_without_secret(error)}). "
            f"Allowed: a path, or postgresql://user@host:5432/database"
        ) from error
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise PreferenceError(
            f"{url.render_as_string()}: {url.drivername} is no store. Allowed: the path of an "
            f"SQLite file, or postgresql://user@host:5432/database"
        )
    return url.set(drivername="postgresql+psycopg")


def _without_secret(error: Exception) -> str:
    """Of an error on a URL the kind alone: its text may quote the password."""
    return type(error).__name__
