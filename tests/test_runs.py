"""The run directory: nothing is ever half written, and what a crash cut is left out."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lora_rlhf.errors import CheckpointError
from lora_rlhf.runs import Run, directory_atomically, write_atomically


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "r")


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# -- atomic files -------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "f.txt", "one")
    write_atomically(tmp_path / "a" / "f.txt", "zwei ü")
    assert (tmp_path / "a" / "f.txt").read_text(encoding="utf-8") == "zwei ü"
    assert names(tmp_path / "a") == ["f.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "f.txt", "new \udc80")
    assert (tmp_path / "f.txt").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["f.txt"]


def test_a_reader_never_sees_half_of_a_file(tmp_path: Path) -> None:
    """A writer is killed at a random moment while it replaces a file of 2 MB over and over."""
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from lora_rlhf.runs import write_atomically
        path, n = Path(sys.argv[1]), 0
        while True:
            n += 1
            write_atomically(path, str(n % 10) * 2_000_000)
        """
    )
    path = tmp_path / "f.txt"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    seen = 0
    try:
        while seen < 50:
            assert writer.poll() is None
            if path.exists():
                text = path.read_text(encoding="utf-8")
                assert text == text[0] * 2_000_000
                seen += 1
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    text = path.read_text(encoding="utf-8")
    assert text == text[0] * 2_000_000


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "step-1"
    with directory_atomically(target) as making:
        (making / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"

    def replace_and_fail() -> None:
        with directory_atomically(target) as making:
            (making / "a").write_text("2")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        replace_and_fail()
    assert (target / "a").read_text() == "1"
    assert names(target.parent) == ["step-1"]


def test_a_directory_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for content in ("old", "new"):
        with directory_atomically(target) as making:
            (making / content).write_text(content)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["adapter"]


def test_others_may_read_a_directory_made_here(tmp_path: Path) -> None:
    with directory_atomically(tmp_path / "adapter"):
        pass
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o755


# -- status and summary -------------------------------------------------------------------------


def test_a_new_run_has_no_status_and_no_summary(run: Run) -> None:
    assert (run.status(), run.summary(), run.adapters()) == ({}, {}, [])


def test_the_status_says_who_is_where(run: Run) -> None:
    run.set_status("running", "ppo", 3, 24)
    status = run.status()
    assert (status["state"], status["stage"], status["step"], status["total"]) == (
        "running",
        "ppo",
        3,
        24,
    )
    assert status["pid"] == os.getpid()


def test_a_stage_is_complete_when_its_seconds_are_in_the_summary(run: Run) -> None:
    run.finish_stage("sft", 1.26, sft={"heldout_loss": 2.0})
    assert run.is_complete("sft")
    assert not run.is_complete("reward")
    assert run.summary() == {"seconds": {"sft": 1.3}, "sft": {"heldout_loss": 2.0}}


def test_results_of_a_later_stage_are_merged_into_the_summary(run: Run) -> None:
    run.finish_stage("sft", 1.0, sft={"heldout_loss": 2.0}, win_rates=[])
    run.finish_stage("reward", 2.0, sft={"chosen_by": "loss"}, win_rates=[{"a": "ppo"}])
    assert run.summary() == {
        "seconds": {"sft": 1.0, "reward": 2.0},
        "sft": {"heldout_loss": 2.0, "chosen_by": "loss"},
        "win_rates": [{"a": "ppo"}],
    }


def test_forgetting_drops_the_named_stages_alone(run: Run) -> None:
    for stage in ("sft", "reward", "ppo"):
        (run.stage(stage) / "adapter").mkdir()
        run.append(f"{stage}/metrics.jsonl", {"step": 1})
        run.finish_stage(stage, 1.0)
    run.forget_from(["reward", "ppo"])
    assert run.summary()["seconds"] == {"sft": 1.0}
    assert run.is_complete("sft")
    assert not run.is_complete("ppo")
    assert names(run.path) == ["sft", "summary.json"]


@pytest.mark.parametrize(
    ("stages", "kept"),
    [
        (["sft", "reward", "ppo", "evaluate"], set()),
        (["reward", "ppo", "evaluate"], set()),
        (["ppo", "evaluate"], {"labelers"}),
        (["evaluate"], {"labelers", "suites"}),
    ],
)
def test_what_was_measured_on_an_adapter_goes_with_it(
    run: Run, stages: list[str], kept: set[str]
) -> None:
    run.write_json("summary.json", {"seconds": {}, "suites": {"tasks": {}}, "labelers": {}})
    run.forget_from(stages)
    assert set(run.summary()) - {"seconds"} == kept


def test_forgetting_what_never_ran_is_no_error(run: Run) -> None:
    run.forget_from(["sft", "ppo"])
    assert run.summary() == {}


def test_damaged_json_is_the_users_to_mend_and_names_the_file(run: Run) -> None:
    (run.path / "summary.json").write_text('{"seconds": {', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"summary\.json: not valid JSON"):
        run.summary()


def test_adapters_are_listed_in_the_order_of_the_pipeline(run: Run) -> None:
    for role in ("value", "policy", "sft"):
        directory = run.adapter(role)
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
    run.adapter("reward").mkdir(parents=True)
    assert run.adapters() == ["sft", "policy", "value"]


# -- lines --------------------------------------------------------------------------------------


def test_lines_come_back_as_they_went_in(run: Run) -> None:
    records = [{"step": 1, "prompt": "a\nb ü \u2028"}, {"step": 2, "x": 0.1}]
    for record in records:
        run.append("ppo/samples.jsonl", record)
    assert run.lines("ppo/samples.jsonl") == records
    assert run.lines("ppo/none.jsonl") == []


def test_a_last_line_cut_by_a_crash_is_left_out(run: Run) -> None:
    """At every byte, so also within a letter of two bytes."""
    for step in (1, 2):
        run.append("m.jsonl", {"step": step, "text": "grün"})
    whole = (run.path / "m.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        (run.path / "m.jsonl").write_bytes(whole[:cut])
        assert run.lines("m.jsonl") == [{"step": 1, "text": "grün"}]


def test_cutting_drops_later_steps_and_the_partial_line(run: Run) -> None:
    for step in range(1, 6):
        run.append("m.jsonl", {"step": step})
    run.append("m.jsonl", {"note": "before any step"})
    with (run.path / "m.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    run.cut_lines_after("m.jsonl", 3)
    text = (run.path / "m.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3},
        {"note": "before any step"},
    ]
    run.append("m.jsonl", {"step": 4})
    assert run.lines("m.jsonl")[-1] == {"step": 4}


def test_cutting_a_file_that_is_not_there_makes_none(run: Run) -> None:
    run.cut_lines_after("m.jsonl", 3)
    assert names(run.path) == []
