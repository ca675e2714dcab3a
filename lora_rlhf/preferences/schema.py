"""The tables of the store on SQLite and PostgreSQL, append-only by triggers, and their versions."""

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    func,
    insert,
    select,
    text,
    update,
)

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences.events import KINDS

VERSION = 1
APPLICATION_ID = 0x4C524C48  # "LRLH" in the header of the SQLite file

METADATA = MetaData()
EVENTS = Table(
    "preference_events",
    METADATA,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("kind", Text, CheckConstraint(f"kind IN {tuple(KINDS)}"), nullable=False),
    Column("task_id", Text, ForeignKey("preference_events.id")),
    Column("ref", Text, ForeignKey("preference_events.id")),
    Column("annotator", Text),
    Column("mode", Text),
    Column("prompt_sha256", Text),
    Column("ts", Float, nullable=False),
    Column("body", Text, nullable=False),
    sqlite_autoincrement=True,  # a seq never comes twice, also after the newest row was erased
)
Index("preference_events_by_task", EVENTS.c.task_id, EVENTS.c.annotator, EVENTS.c.kind)
Index("preference_events_by_annotator", EVENTS.c.annotator, EVENTS.c.kind, EVENTS.c.seq)
Index(
    "preference_events_one_retract",
    EVENTS.c.ref,
    unique=True,
    sqlite_where=EVENTS.c.kind == "retract",
    postgresql_where=EVENTS.c.kind == "retract",
)
# Whoever stands here may have judgements and retracts deleted; rows live within one transaction.
ERASURES = Table("preference_erasures", METADATA, Column("annotator", Text, primary_key=True))
# PostgreSQL has no user_version.
VERSIONS = Table("preference_version", METADATA, Column("version", Integer, nullable=False))

_ERASABLE = (
    "OLD.kind IN ('judgement', 'retract') AND EXISTS "
    "(SELECT 1 FROM preference_erasures e WHERE e.annotator = OLD.annotator)"
)
_REFUSAL = "preference_events is append-only"
_SQLITE_TRIGGERS = {
    "preference_events_no_update": f"BEFORE UPDATE ON preference_events "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
    "preference_events_no_delete": f"BEFORE DELETE ON preference_events WHEN NOT ({_ERASABLE}) "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
    # INSERT OR REPLACE deletes without asking the trigger above.
    "preference_events_no_replace": f"BEFORE INSERT ON preference_events WHEN EXISTS "
    f"(SELECT 1 FROM preference_events e WHERE e.id = NEW.id OR e.seq = NEW.seq) "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
}
_POSTGRES_GUARD = f"""
CREATE OR REPLACE FUNCTION preference_events_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    IF {_ERASABLE} THEN RETURN OLD; END IF;
  END IF;
  RAISE EXCEPTION '{_REFUSAL}';
END $$
"""
_POSTGRES_TRIGGERS = {
    "preference_events_no_change": "BEFORE UPDATE OR DELETE ON preference_events "
    "FOR EACH ROW EXECUTE FUNCTION preference_events_guard()",
    "preference_events_no_truncate": "BEFORE TRUNCATE ON preference_events "
    "FOR EACH STATEMENT EXECUTE FUNCTION preference_events_guard()",
}

Migration = Callable[[Connection], None]
MIGRATIONS: dict[int, Migration] = {}
"""From a version to the one after it. The triggers are off meanwhile, and it is one transaction."""


def is_sqlite(connection: Connection) -> bool:
    """Whether this is SQLite; otherwise it is PostgreSQL."""
    return connection.dialect.name == "sqlite"


def version_of(connection: Connection) -> int:
    """The version of the tables that are there; 0: none yet."""
    if is_sqlite(connection):
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if connection.scalar(select(func.to_regclass(VERSIONS.name))) is None:
        return 0
    return connection.scalar(select(VERSIONS.c.version)) or 0


def upgrade(connection: Connection, shown: str) -> None:
    """Make the tables, or bring older ones to this version, in the caller's transaction.

    Args:
        connection: in a transaction that no other writer can share.
        shown: the store's name in messages.

    Raises:
        PreferenceError: the tables are newer, or the file is a database of something else.
    """
    found = examine(connection, shown)
    if found == VERSION:
        return
    if found == 0:
        METADATA.create_all(connection)
    else:
        _set_triggers(connection, on=False)
        for version in range(found, VERSION):
            MIGRATIONS[version](connection)
    _set_triggers(connection, on=True)
    _write_version(connection)


def examine(connection: Connection, shown: str) -> int:
    """The version of the tables, 0 where there are none yet; changes nothing.

    Raises:
        PreferenceError: they are newer, or the file is a database of another program.
    """
    found = version_of(connection)
    if found > VERSION:
        raise PreferenceError(
            f"{shown} was written by a newer lora-rlhf (its format is {found}; this one reads up "
            f"to {VERSION}). Upgrade: pip install -U lora-rlhf"
        )
    if is_sqlite(connection):
        mark = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        if mark != (APPLICATION_ID if found else 0) or (tables and not found):
            raise PreferenceError(
                f"{shown} is an SQLite database of another program. Give another file; it is made "
                f"when it does not exist."
            )
    return found


def _set_triggers(connection: Connection, on: bool) -> None:
    sqlite = is_sqlite(connection)
    for name, rule in (_SQLITE_TRIGGERS if sqlite else _POSTGRES_TRIGGERS).items():
        table = "" if sqlite else f" ON {EVENTS.name}"
        connection.execute(text(f"DROP TRIGGER IF EXISTS {name}{table}"))
        if on:
            if not sqlite:
                connection.execute(text(_POSTGRES_GUARD))
            connection.execute(text(f"CREATE TRIGGER {name} {rule}"))


def _write_version(connection: Connection) -> None:
    if is_sqlite(connection):
        connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
        connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    elif connection.execute(update(VERSIONS).values(version=VERSION)).rowcount == 0:
        connection.execute(insert(VERSIONS).values(version=VERSION))
