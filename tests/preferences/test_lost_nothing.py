"""Killed writers, full disks, locked and vanished files: what was acknowledged is there."""

import json
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences import database, files
from lora_rlhf.preferences.store import Store
from tests.preferences.making import task, vote
from tests.preferences.writers import WRITERS

ROOT = Path(__file__).resolve().parents[2]


def program(*arguments: str, before: tuple[str, ...] = (), **options) -> dict:
    command = [*before, sys.executable, "-m", "tests.preferences.writers", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, **options
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_eight_writers_killed_in_mid_write_lose_nothing_acknowledged(location):
    found = program("killed", location)
    assert found["statuses"] == [signal.SIGKILL] * WRITERS
    acknowledged = {event for each in found["acknowledged"] for event in each}
    assert all(found["acknowledged"]), "each writer was at work"
    with Store.open(location) as store:
        store.check()
        there = {j.task.id for j in store.judged()} | {j.judgement.id for j in store.judged()}
        alone = {i for i in acknowledged - there if store.task(i) is not None}
        assert acknowledged <= there | alone
        # At most one event a writer was stored and not yet acknowledged.
        assert store.version() - len(acknowledged) <= WRITERS + _gaps(store, location)
        shown = task()
        assert store.add(shown)
        assert store.add(vote(shown)), "and it can be written again at once"


def _gaps(store: Store, location: str) -> int:
    """Numbers that PostgreSQL gave to transactions that were killed."""
    counts = store.counts()
    return store.version() - counts["tasks"] - counts["judgements"] if "://" in location else 0


def test_a_limit_on_the_file_is_a_sentence_and_loses_nothing(tmp_path):
    found = program("full", str(tmp_path), "limit")
    _held(found)


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    """On a disk of one megabyte, mounted for the program alone."""
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    own = ("unshare", "--mount", "sh", "-c", mount, "sh")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own, "true"], capture_output=True).returncode
    ):
        pytest.skip("no disk can be mounted here (needs root and unshare)")
    found = program("full", str(tmp_path), "disk", before=own)
    _held(found)
    assert "no space is left on the disk" in found["failed"]


def _held(found: dict) -> None:
    assert found["failed"].endswith(".")
    assert "Nothing was stored by this call" in found["failed"]
    assert found["acknowledged"] > 10
    assert found["lost"] == []
    assert found["events"] == found["acknowledged"], "and nothing that was not acknowledged"


def test_a_file_that_another_process_locks_is_waited_for_and_then_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "rankings.db"
    with Store.open(path) as store:
        store.add(task())
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Store.open(path) as store:
        with pytest.raises(PreferenceError, match="locked by another process"):
            store.add(task())
        assert store.counts()["tasks"] == 1, "reading goes on meanwhile"
        other.execute("ROLLBACK")
        assert store.add(task())
    other.close()


def test_a_file_that_was_removed_or_replaced_takes_no_more_votes(tmp_path):
    """They would go into a file that has no name any more."""
    path = tmp_path / "rankings.db"
    with Store.open(path) as store:
        store.add(task())
        path.rename(tmp_path / "away.db")
        with pytest.raises(PreferenceError, match="removed or replaced"):
            store.add(task())
        shutil.copy(tmp_path / "away.db", path)
        with pytest.raises(PreferenceError, match="removed or replaced"):
            store.add(task())


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that everybody may enter; pytest's own are for their owner."""
    folder = Path(tempfile.mkdtemp(prefix="store-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(path: Path, code: str) -> str:
    """Run code as a user for whom permissions count, also where the tests run as root."""
    # That user may not see the interpreter's own folder: fork instead of exec.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "no error"
        try:
            if os.geteuid() == 0:
                os.setuid(pwd.getpwnam("nobody").pw_uid)
            exec(code, {"path": path, "Store": Store, "task": task})
        except PreferenceError as error:
            said = str(error)
        except BaseException as error:
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        said = lines.read()
    os.waitpid(pid, 0)
    return said


def test_a_file_that_may_only_be_read_is_a_sentence(open_folder):
    path = open_folder / "rankings.db"
    with Store.open(path) as store:
        store.add_many([shown := task(), vote(shown)])
    path.chmod(0o444)
    said = as_nobody(path, "Store.open(path).add(task())")
    assert said.startswith(str(path)), said
    assert "read-only" in said
    code = "store = Store.open(path, read_only=True); assert len(store.judged()) == 1"
    assert as_nobody(path, code) == "no error", "but it can be read"
    assert "cannot be opened or made" in as_nobody(path, "Store.open(path.with_name('new.db'))")
    path.chmod(0o000)
    assert "cannot be opened" in as_nobody(path, "Store.open(path)")
    open_folder.chmod(0o700)
    if os.geteuid() == 0:
        assert "Permission denied" in as_nobody(path, "Store.open(path)")


# -- what is erased -------------------------------------------------------------------------------

SECRET = "a note that nobody may find again"


def is_there(folder: Path) -> bool:
    return any(SECRET.encode() in p.read_bytes() for p in folder.iterdir())


@pytest.fixture
def noted(tmp_path) -> Iterator[Store]:
    """Ana has left a note, in the pages and in the log."""
    with Store.open(tmp_path / "rankings.db") as store:
        shown = task()
        store.add_many([shown, vote(shown, note=SECRET)])
        store.add_many([shown := task(annotator="bob"), vote(shown)])
        yield store


def reader_of(store: Store):
    """Somebody who reads the state of now for as long as they like."""
    connection = sqlite3.connect(store.location, isolation_level=None)
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM preference_events").fetchall()
    return connection


def test_erasing_while_nobody_reads_leaves_nothing(noted, tmp_path):
    assert noted.erase("ana") == 1
    assert not noted.owes_erasure
    assert not is_there(tmp_path)
    assert not list(tmp_path.glob("*erasing*"))


@pytest.mark.parametrize("settles", ["write", "close", "open", "kill"])
def test_erasing_while_somebody_reads_is_owed_until_it_is_done(noted, tmp_path, settles):
    reader = reader_of(noted)
    began = time.monotonic()
    assert noted.erase("ana") == 1
    assert time.monotonic() - began < 5
    assert noted.owes_erasure
    assert is_there(tmp_path), "else the reader would see no older state"
    noted.add(task())
    assert noted.erase("ana") == 0
    assert noted.owes_erasure, "it is said until it is done"
    if settles in ("open", "kill"):
        held = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-killed")
        noted.close()
        assert noted.owes_erasure
        if settles == "kill":  # the files as a machine that went down would leave them
            tmp_path, noted = held, None
    reader.close()
    if settles == "write":
        noted.add(task())
    elif settles == "close":
        noted.close()
    else:
        Store.open(tmp_path / "rankings.db", read_only=True).close()
        assert is_there(tmp_path) or settles == "open", "who reads alone changes nothing"
        with Store.open(tmp_path / "rankings.db") as opened:
            assert not opened.owes_erasure
    if noted is not None:
        assert not noted.owes_erasure
    assert not is_there(tmp_path)
    assert not list(tmp_path.glob("*erasing*"))


def test_another_process_that_writes_settles_what_is_owed(noted, tmp_path):
    with Store.open(noted.location) as other:
        reader = reader_of(noted)
        noted.erase("ana")
        reader.close()
        other.add(task())
        assert not is_there(tmp_path)
        assert not noted.owes_erasure


def test_who_erases_while_another_settles_is_not_forgotten(noted, tmp_path, monkeypatch):
    """The other has emptied the log, and the mark it goes to clear is a newer one."""
    reader = reader_of(noted)
    noted.erase("ana")
    reader.close()
    which = files.Owed.which
    answers = []

    def late(self):
        if len(answers) == 2:  # asked for the third time: after the log was emptied
            self.set()
        answers.append(which(self))
        return answers[-1]

    monkeypatch.setattr(files.Owed, "which", late)
    noted.add(task())
    assert len(set(answers[:2])) == 1
    assert answers[2] != answers[1]
    monkeypatch.undo()
    assert noted.owes_erasure
    noted.add(task())
    assert not noted.owes_erasure


def test_what_cannot_be_settled_does_not_fail_the_vote(noted, tmp_path, monkeypatch):
    reader = reader_of(noted)
    noted.erase("ana")
    reader.close()

    def broken(self):
        raise PermissionError(13, "read-only")

    with monkeypatch.context() as patched:
        patched.setattr(files.Owed, "clear", broken)
        assert noted.add(task())
    assert noted.owes_erasure
    assert noted.add(task())
    assert not noted.owes_erasure


def test_what_cannot_be_remembered_is_not_erased(noted, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "make_private", full)
    with pytest.raises(PreferenceError, match=r"No space left on device\. Nothing was erased"):
        noted.erase("ana")
    assert len(noted.judged("ana")) == 1


# -- faults outside of transactions ---------------------------------------------------------------


def test_a_limit_on_files_is_a_sentence_in_copies_exports_and_at_the_start(tmp_path):
    found = program("copies", str(tmp_path))
    assert set(found) == {"backup", "export", "snapshot", "start"}
    for what, (kind, said) in found.items():
        assert kind == "PreferenceError", (what, said)
        assert said.endswith("."), what
        assert "disk I/O error" in said or "no space is left" in said, what
    assert found["backup"][1].startswith(str(tmp_path / "copy.db")), "not the store: it is fine"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(("copy", ".copy"))]


def test_the_command_line_says_a_failed_copy_in_a_sentence(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lora_rlhf.cli import app

    with Store.open(tmp_path / "rankings.db") as store:
        store.add(task())

    class Full(sqlite3.Connection):
        def execute(self, sql, *rest):
            if sql.startswith("VACUUM INTO"):
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *rest)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Full))
    given = ("backup", "copy.db", "--store", "rankings.db")
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["preferences", *given])
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "copy.db could not be written: no space is left on the disk" in said
    assert "Traceback" not in said
