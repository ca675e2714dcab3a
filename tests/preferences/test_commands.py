"""`lora-rlhf preferences`: each command does what its help says, and mistakes are sentences."""

import json
import re
import shlex
import sqlite3
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.preferences.store import Store
from tests.preferences.making import task, vote

COMMANDS = ("import", "export", "stats", "backup", "erase")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def call(*arguments: str, code: int = 0, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, ["preferences", *arguments], input=typed)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def pairs(path, count: int = 3):
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vote_all(path, wins: int = 12, losses: int = 4) -> None:
    with Store.open(path) as store:
        for number in range(wins + losses):
            shown = task([{"adapter": "sft"}, {"adapter": "[ppo]"}])
            groups = (("r1",), ("r0",)) if number < wins else (("r0",), ("r1",))
            store.add_many([shown, vote(shown, *groups)])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_lines_that_can_be_pasted(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = CliRunner().invoke(app, ["preferences", command, "--help"]).output
    lines = [line.strip() for line in text.partition("Try:")[2].splitlines() if line.strip()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["lora-rlhf", "preferences", command]
        options = {w for w in words if w.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", text.partition("Try:")[0]))


def test_the_help_is_quick_and_loads_no_database():
    code = (
        "import sys; from lora_rlhf.cli import app; from typer.testing import CliRunner; "
        "print(CliRunner().invoke(app, ['preferences', '--help']).exit_code, "
        "[m for m in ('sqlalchemy', 'torch', 'numpy', 'scipy') if m in sys.modules])"
    )
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0 []"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("wins", "losses"), [(12, 4), (4, 12)])
def test_who_wins_more_stands_first(here, wins, losses):
    vote_all(here / "rankings.db", wins, losses)
    better, worse = ("[ppo]", "sft") if wins > losses else ("sft", "[ppo]")
    row = next(line for line in call("stats").splitlines() if " vs " in line)
    assert row.startswith(f"{better} vs {worse}")
    assert "12-4-0" in row
    low, high = map(int, re.search(r"75% \((\d+)-(\d+)\)", row).groups())
    assert low < 75 < high
    assert abs(low - 50) < 5 < high - 80  # Wilson's interval of 12 of 16 is 51 to 90 %


def test_import_twice_then_stats_backup_and_export(here):
    pairs(here / "votes.jsonl")
    first = call("import", "votes.jsonl", "--annotator", "ana")
    assert "3 rankings added to rankings.db; 0 were there already" in first
    assert "data: {rankings: rankings.db}" in first
    said = call("stats")
    assert "rankings.db: " in said
    assert "imported" in said
    said = call("backup", "copy.db")
    assert "--store copy.db" in said
    assert call("stats", "--store", "copy.db").partition(":")[2] == call("stats").partition(":")[2]
    assert "exists" in call("backup", "copy.db", code=2)


def test_the_same_file_adds_nothing(here):
    pairs(here / "votes.jsonl")
    for expected in ("3 rankings added", "0 rankings added"):
        assert expected in call("import", "votes.jsonl", "--annotator", "ana", "--store", "s.db")


def test_stats_tell_win_rates_with_intervals_and_what_is_missing(here):
    vote_all(here / "rankings.db")
    said = call("stats")
    assert "16 judgements on 16 tasks; annotators: 1; retracted: 0" in said
    row = next(line for line in said.splitlines() if line.startswith("[ppo] vs sft"))
    assert "75% (" in row
    assert "12-4-0" in row
    assert "180 more" in row
    assert "first answer wins" in said
    assert "median time" in said
    assert "20.0 s" in said
    assert "Win rates count 16 judgements" in said
    Store.open(here / "empty.db").close()
    assert "lora-rlhf ui" in call("stats", "--store", "empty.db")


def test_export_says_what_it_left_out(here):
    vote_all(here / "rankings.db")
    with Store.open("rankings.db") as store:
        shown = task(blind=False)
        store.add_many([shown, vote(shown)])
    said = call("export", "pairs", "battles", "--to", "out")
    assert "out/battles.jsonl: 16 rows; without 1 non-blind" in said
    assert "out/battles.jsonl: 17 rows" in call(
        "export", "battles", "--to", "out", "--keep", "non-blind"
    )
    assert sorted(p.name for p in (here / "out").iterdir()) == [
        "battles.jsonl",
        "battles.manifest.json",
        "pairs-eval.jsonl",
        "pairs.jsonl",
        "pairs.manifest.json",
    ]
    call("export", "--to", "all", "--heldout", "0", "--margin")
    assert "margin" in (here / "all" / "pairs.jsonl").read_text()
    assert len(list((here / "all").iterdir())) == 13


def test_erase_asks_and_forgets(here):
    vote_all(here / "rankings.db", 2, 1)
    call("erase", "ana", typed="n\n", code=1)
    with Store.open("rankings.db") as store:
        assert store.counts()["live"] == 3
    assert "3 judgements of ana erased" in call("erase", "ana", typed="y\n")
    assert "0 judgements of ana erased" in call("erase", "ana", "--yes")


def test_erase_says_that_text_is_left_until_it_is_gone(here):
    vote_all(here / "rankings.db", 2, 1)
    reader = sqlite3.connect("rankings.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM preference_events").fetchall()
    left = "The text of erased judgements is still in the files of rankings.db"
    said = call("erase", "ana", "--yes")
    assert "3 judgements of ana erased" in said
    assert left in said
    assert left in call("erase", "ana", "--yes")
    reader.close()
    assert left not in call("erase", "ana", "--yes")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("stats", "--store", "none.db"), "no such store"),
        (("export", "--store", "none.db"), "no such store"),
        (("backup", "b.db", "--store", "none.db"), "no such store"),
        (("erase", "ana", "--store", "none.db"), "no such store"),
        (("import", "none.jsonl"), "no such file"),
        (("export", "elo"), "Allowed: one of pairs"),
        (("export", "--keep", "nice"), "Allowed: retracted"),
        (("export", "--heldout", "2"), "Allowed: one of pairs"),
        (("stats", "--store", "mysql://host/votes"), "postgresql://"),
    ],
)
def test_mistakes_are_sentences(here, arguments, sentence):
    vote_all(here / "rankings.db", 1, 0)
    before = sorted(p.name for p in here.iterdir())
    assert sentence in " ".join(call(*arguments, code=2).split())
    left = sorted(p.name for p in here.iterdir() if not p.name.endswith(("-wal", "-shm")))
    assert [n for n in left if n != "exports"] == before


def test_on_a_server(server_location, here):
    pairs(here / "votes.jsonl")
    assert "3 rankings added" in call("import", "votes.jsonl", "--store", server_location)
    assert "3 judgements" in call("stats", "--store", server_location)
    call("backup", "copy.db", "--store", server_location)
    assert "3 judgements" in call("stats", "--store", "copy.db")
