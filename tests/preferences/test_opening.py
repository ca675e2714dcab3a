"""Opening a store: new, old, newer, damaged, somebody else's; and what the file is like."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences import schema
from lora_rlhf.preferences.faults import OldFormat
from lora_rlhf.preferences.store import Store
from tests.preferences.making import task, vote
from tests.preferences.test_store import outside


def filled(path: Path) -> Path:
    with Store.open(path) as store:
        for _ in range(40):
            shown = task()
            store.add_many([shown, vote(shown)])
    return path


# -- the file -----------------------------------------------------------------------------------


def test_all_files_are_for_the_owner_alone_and_the_folder_is_made(tmp_path):
    old = os.umask(0)  # the most permissive there is
    try:
        path = tmp_path / "a" / "b" / "rankings.db"
        with Store.open(path) as store:
            store.add(task())
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == dict.fromkeys(("rankings.db", "rankings.db-wal", "rankings.db-shm"), 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o666)
    with Store.open(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_sqlite_acknowledges_what_is_on_the_disk(tmp_path):
    """WAL with synchronous=FULL on every connection, deleted content overwritten, keys checked."""
    with Store.open(tmp_path / "rankings.db") as store:
        engine = store._database.engine
        connections = [engine.connect() for _ in range(3)]
        for connection in connections:
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
            }
            assert found == {
                "journal_mode": "wal",
                "synchronous": 2,
                "secure_delete": 1,
                "foreign_keys": 1,
            }
            connection.close()


def test_postgres_waits_for_the_disk_though_the_server_does_not(server_location):
    lazy = f"{server_location}%20-csynchronous_commit%3Doff"
    with outside(lazy).connect() as connection:
        assert connection.scalar(text("SHOW synchronous_commit")) == "off"
    with Store.open(lazy) as store, store._database.writing() as connection:
        assert connection.scalar(text("SHOW synchronous_commit")) == "on"


@pytest.mark.parametrize("name", ["votes é %20?mode=ro#.db", "a b.db", "plain"])
def test_any_name_of_a_file_is_a_name(tmp_path, name):
    with Store.open(tmp_path / name) as store:
        store.add(task())
    assert [p.name for p in tmp_path.iterdir()] == [name]


# -- what is no store ---------------------------------------------------------------------------


def test_what_is_no_store_is_said_in_a_sentence_and_left_alone(tmp_path):
    (tmp_path / "text.db").write_text("no database at all, but long enough to be one" * 100)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE photos (id)").connection.close()
    (tmp_path / "empty.jsonl").touch()
    said = {
        "text.db": "no SQLite database",
        "other.db": "another program",
        "empty.jsonl": "empty",
        "missing.db": "no such store",
        ".": "is a folder",
    }
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for name, sentence in said.items():
        for read_only in (False, True):
            with pytest.raises(PreferenceError) as error:
                Store.open(tmp_path / name, create=False, read_only=read_only)
            assert sentence in str(error.value)
            assert str(tmp_path / name) in str(error.value)
            assert str(error.value).endswith(".")
    for path, content in before.items():
        assert path.read_bytes() == content


def test_damage_is_found_when_a_store_is_opened(tmp_path):
    path = filled(tmp_path / "rankings.db")
    size = path.stat().st_size
    pages = range(4096 * 3, size - 4096, 4096 * 4)
    with path.open("r+b") as file:
        for place in pages:
            file.seek(place)
            file.write(b"\xff" * 512)
    for read_only in (True, False):
        with pytest.raises(PreferenceError, match="damaged"):
            Store.open(path, read_only=read_only)
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(PreferenceError, match="damaged"):
        Store.open(path)


def test_a_judgement_without_its_task_is_damage(tmp_path):
    path = filled(tmp_path / "rankings.db")
    other = sqlite3.connect(path)
    with other:
        other.execute(
            "INSERT INTO preference_events (id, kind, task_id, ts, body) "
            "VALUES ('x', 'judgement', 'nowhere', 1.0, '{}')"
        )
    other.close()
    with pytest.raises(PreferenceError, match="1 orphans"):
        Store.open(path)


# -- versions -----------------------------------------------------------------------------------


def set_version(location: str, version: int) -> None:
    with outside(location).begin() as connection:
        if "://" in location:
            connection.execute(text(f"UPDATE preference_version SET version = {version}"))
        else:
            connection.exec_driver_sql(f"PRAGMA user_version = {version}")


def test_a_newer_store_is_refused_in_one_sentence(location):
    with Store.open(location) as store:
        store.add(task())
    set_version(location, schema.VERSION + 1)
    for read_only in (False, True):
        with pytest.raises(PreferenceError, match=r"newer lora-rlhf.*pip install -U lora-rlhf"):
            Store.open(location, read_only=read_only)


def test_an_older_store_is_brought_up_to_date_in_one_go(location, monkeypatch):
    """A version 2 that knows when events arrived: a column is added and filled from ts."""
    with Store.open(location) as store:
        shown = task()
        store.add_many([shown, vote(shown)])
        before = store.digest()

    def to_two(connection) -> None:
        connection.execute(text("ALTER TABLE preference_events ADD COLUMN arrived FLOAT"))
        connection.execute(text("UPDATE preference_events SET arrived = ts"))

    def broken(connection) -> None:
        to_two(connection)
        raise PreferenceError("power cut.")

    monkeypatch.setattr(schema, "VERSION", 2)
    monkeypatch.setitem(schema.MIGRATIONS, 1, broken)
    with pytest.raises(OldFormat, match="older format"):
        Store.open(location, read_only=True)
    with pytest.raises(PreferenceError, match="power cut"):
        Store.open(location)
    with outside(location).connect() as connection:
        columns = connection.execute(text("SELECT * FROM preference_events")).keys()
        assert "arrived" not in columns, "half of a migration is none"

    monkeypatch.setitem(schema.MIGRATIONS, 1, to_two)
    with Store.open(location) as store:
        assert store.digest() == before
        assert store.judged()[0].task == shown
        assert store.add(task())
    with outside(location).connect() as connection:
        rows = connection.execute(text("SELECT ts, arrived FROM preference_events ORDER BY seq"))
        assert [(ts == arrived) for ts, arrived in rows][:2] == [True, True]
        assert schema.version_of(connection) == 2
    with (
        outside(location).begin() as connection,
        pytest.raises(Exception, match="append-only"),
    ):
        connection.execute(text("UPDATE preference_events SET arrived = 0"))
    with Store.open(location) as store:
        assert store.version() == 3, "the second opening changes nothing"


# -- locations ----------------------------------------------------------------------------------

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        (f"mysql://ana:{SECRET}@host/votes", "Allowed: the path of an SQLite file, or postgresql"),
        (f"postgresql://ana:{SECRET}@host:port/votes", "no URL"),
        (f"postgresql://ana:{SECRET}@127.0.0.1:1/votes", "cannot be reached"),
        ("postgresql:///votes?host=/nowhere", "cannot be reached"),
        ("sqlite:///votes.db", "Allowed: the path of an SQLite file"),
    ],
)
def test_a_location_that_cannot_be_used_is_said_without_its_password(location, sentence):
    with pytest.raises(PreferenceError) as error:
        Store.open(location)
    assert sentence in str(error.value)
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_password_is_in_no_location(server_location):
    with Store.open(server_location.replace("postgres@", f"postgres:{SECRET}@")) as store:
        assert SECRET not in store.location
        assert store.location.startswith("postgresql://postgres:***@")


def test_without_psycopg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(PreferenceError, match=r"pip install 'lora-rlhf\[postgres\]'"):
        Store.open("postgresql://ana@127.0.0.1/votes")


def test_a_database_that_cannot_keep_every_character_is_refused(postgres):
    admin = outside(postgres).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1'"))
    with pytest.raises(PreferenceError, match="UTF8"):
        Store.open(postgres.replace("/postgres?", "/latin?"))


def test_a_user_without_rights_gets_a_sentence(postgres):
    with outside(postgres).begin() as connection:
        connection.execute(text("CREATE ROLE guest LOGIN"))
    with pytest.raises(PreferenceError, match="does not allow"):
        Store.open(postgres.replace("postgres@", "guest@"))


def test_importing_the_store_and_its_reports_brings_no_torch():
    code = (
        "import sys, lora_rlhf.preferences.store, lora_rlhf.preferences.exports, "
        "lora_rlhf.preferences.ratings, lora_rlhf.preferences.imports; "
        "print('torch' in sys.modules, 'scipy.stats' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
