"""Which runs are opened when none is named, and where the secret lies."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.errors import ConfigError
from ui import opening
from ui.opening import newest, secret_path
from ui.server import Settings


def make_run(runs_dir: Path, name: str, trained: int, weights: str | None = "w") -> None:
    """A run with an adapter, as far as a listing goes."""
    adapter = runs_dir / name / "sft" / "adapter"
    adapter.mkdir(parents=True)
    (runs_dir / name / "recipe.yaml").write_text("")
    (adapter / "adapter_config.json").write_text("{}")
    if weights is not None:
        fingerprint = {"weights": weights, "quantization": "nf4", "template": "t", "model": name}
        (adapter / "lora_rlhf.json").write_text(json.dumps({"fingerprint": fingerprint}))
    summary = runs_dir / name / "summary.json"
    summary.write_text("{}")
    os.utime(summary, (trained, trained))


def names(runs_dir: Path) -> list[str]:
    return [run.name for run in newest(runs_dir)]


def test_the_newest_run_and_all_on_its_backbone_oldest_first(tmp_path: Path) -> None:
    make_run(tmp_path, "b", trained=3)
    make_run(tmp_path, "a", trained=1)
    make_run(tmp_path, "other", trained=2, weights="v")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text("")
    assert names(tmp_path) == ["a", "b"]
    make_run(tmp_path, "other-2", trained=4, weights="v")
    assert names(tmp_path) == ["other", "other-2"]


def test_an_adapter_of_another_tool_stands_alone(tmp_path: Path) -> None:
    make_run(tmp_path, "a", trained=1, weights=None)
    make_run(tmp_path, "b", trained=2, weights=None)
    assert names(tmp_path) == ["b"]


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} has no run with an adapter yet"):
        newest(tmp_path)
    with pytest.raises(ConfigError, match="lora-rlhf run quickstart"):
        newest(tmp_path / "nothing")


def test_a_run_that_was_stopped_early_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for runs_dir, also in ((Path("runs"), ""), (Path("other"), "--runs-dir other ")):
        (runs_dir / "mine").mkdir(parents=True)
        (runs_dir / "mine" / "recipe.yaml").write_text("")
        line = f"lora-rlhf run {runs_dir}/mine/recipe.yaml --name mine {also}--resume"
        with pytest.raises(ConfigError, match=re.escape(f"it: {line}") + "$"):
            newest(runs_dir)


def test_the_secret_lies_beside_the_store(tmp_path: Path) -> None:
    assert secret_path("a/votes.db", tmp_path) == Path("a/votes.db.secret")
    server = "postgresql://ana:word@db.example/votes"
    assert secret_path(server, tmp_path) == tmp_path / ".ui-secret"
    assert secret_path("~/votes.db", tmp_path) == Path.home() / "votes.db.secret"


def test_who_is_not_let_in_learns_it_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any) -> None:
        raise AssertionError("runs were looked at first")

    monkeypatch.setattr(opening, "newest", too_late)
    with pytest.raises(ConfigError, match="nobody would have to log in"):
        opening.main(
            [],
            runs_dir=tmp_path,
            store="votes.db",
            settings=Settings(host="0.0.0.0"),
            say=lambda line: None,
        )
