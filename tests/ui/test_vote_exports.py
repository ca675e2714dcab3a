"""Exports: for the admin alone, in a file that nobody else can read and that is gone soon."""

import csv
import io
import json
import stat
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences.exports import EXPORTS
from tests.ui.voted import POLICY, SFT, fill
from ui.downloads import Downloads
from ui.people import NotAllowed, Person
from ui.studio import Studio
from ui.vote_exports import EVERYTHING, export


@pytest.fixture
def filled(studio: Studio) -> Studio:
    return fill(studio)


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path / "downloads")


def names_in(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


def test_each_export_is_a_zip_with_its_manifest(
    filled: Studio, ana: Person, downloads: Downloads
) -> None:
    split = ("pairs", "rankings", "kto")
    files = {kind: {f"{kind}.jsonl", f"{kind}-eval.jsonl"} for kind in split}
    files["leaderboard"] = {"leaderboard.csv"}
    for kind in EXPORTS:
        path, said = export(filled, ana, downloads, kind)
        assert path.name == f"{kind}.zip"
        assert names_in(path) == files.get(kind, {f"{kind}.jsonl"}) | {f"{kind}.manifest.json"}
        assert said.startswith(f"{kind} ")
    path, said = export(filled, ana, downloads, EVERYTHING)
    assert path.name == "votes.zip"
    assert len(names_in(path)) == 13
    assert all(kind in said for kind in EXPORTS)


def test_what_an_export_holds_and_leaves_out(
    filled: Studio, ana: Person, downloads: Downloads
) -> None:
    path, said = export(filled, ana, downloads, "battles")
    with zipfile.ZipFile(path) as archive:
        battles = [json.loads(line) for line in archive.read("battles.jsonl").splitlines()]
        manifest = json.loads(archive.read("battles.manifest.json"))
    # Of 14: three likes and a skip give none; one is taken back, one not blind, one too fast.
    winners = sorted(battle["winner"] for battle in battles)
    assert winners == ["model_a"] * 3 + ["model_b"] * 3 + ["tie"]
    assert manifest["filters"]["retracted"] == {"on": True, "removed": 1}
    assert "battles 7 rows of 11 judgements" in said
    for words in ("1 retracted", "1 non-blind", "1 too-fast", "3 a like", "1 skipped"):
        assert words in said
    path, said = export(filled, ana, downloads, "battles", ["retracted"])
    assert "battles 9 rows of 13 judgements" in said
    path, _ = export(filled, ana, downloads, "leaderboard", ["retracted"])
    with zipfile.ZipFile(path) as archive:
        board = list(csv.DictReader(io.StringIO(archive.read("leaderboard.csv").decode())))
    assert [row["adapter"] for row in board] == [POLICY, SFT]


def test_exports_are_the_admins_alone(
    filled: Studio, ben: Person, downloads: Downloads, tmp_path: Path
) -> None:
    for kind in (*EXPORTS, EVERYTHING):
        with pytest.raises(NotAllowed, match="ben"):
            export(filled, ben, downloads, kind)
    assert not (tmp_path / "downloads").exists()


@pytest.mark.parametrize("forged", ["../../etc", "", None, ["pairs"], "pairs/..", 5])
def test_an_export_that_there_is_not_is_refused(
    filled: Studio, ana: Person, downloads: Downloads, tmp_path: Path, forged: Any
) -> None:
    with pytest.raises(PreferenceError):
        export(filled, ana, downloads, forged)
    with pytest.raises(PreferenceError):
        export(filled, ana, downloads, "pairs", ["retracted", forged])
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_file_lies_where_nobody_else_can_read_it_and_is_gone_soon(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "files", seconds=0.3)
    path = downloads.put("votes.zip", lambda to: to.write_text("votes"))
    assert path.name == "votes.zip"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with path.open() as begun:
        ends_at = time.monotonic() + 20
        while path.parent.exists():
            assert time.monotonic() < ends_at, "it stays"
            time.sleep(0.02)
        assert begun.read() == "votes", "a download that has begun goes on"
    assert list((tmp_path / "files").iterdir()) == []


def test_closing_removes_what_is_left_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "files")
    one, two = (downloads.put("a", lambda to: to.write_text("x")) for _ in range(2))
    assert one != two

    def fail(to: Path) -> None:
        to.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        downloads.put("b", fail)
    assert len(list((tmp_path / "files").iterdir())) == 2
    downloads.close()
    assert list((tmp_path / "files").iterdir()) == []
