"""Retraining jobs: one at a time, cancelled, failed, decided on, and found again."""

import errno
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.store import Store
from lora_rlhf.runs import Run
from tests.preferences.making import task, vote
from tests.ui.training import (
    ROOMY,
    TIGHT,
    WISHES,
    Watched,
    base_run,
    finished,
    scripted_jobs,
    twenty_votes,
    wait,
)
from ui.finding import process_of
from ui.job import Job, Progress, adopted_runs, is_offered, read_job
from ui.jobs import Jobs
from ui.opening import newest
from ui.preparing import Memory
from ui.process import Training


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with one finished run, quick."""
    return base_run(tmp_path / "runs" / "quick").path.parent


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with twenty_votes(tmp_path / "votes.db") as opened:
        yield opened


@pytest.fixture
def engine(runs: Path) -> Watched:
    return Watched(runs / "quick")


@pytest.fixture
def make(runs, store, engine, tmp_path, monkeypatch) -> Iterator[Callable[..., Jobs]]:
    with scripted_jobs(tmp_path, runs, store, engine, monkeypatch) as made:
        yield made


# -- training -----------------------------------------------------------------------------------


def test_progress_has_stage_step_and_time_left(make) -> None:
    jobs = make(steps=100)
    jobs.start("ana", WISHES)
    wait(jobs, "running")
    seen = []
    while jobs.job().state == "running" and len(seen) < 40:
        seen.append(jobs.progress())
        time.sleep(0.03)
    steps = [p.step for p in seen if p.stage]
    assert steps == sorted(steps)
    assert {p.total for p in seen if p.stage} == {100}
    left = [p.seconds_left for p in seen if p.seconds_left]
    assert left
    # 100 steps of 0.02 s or, on a busy machine, some more.
    assert all(0 < seconds < 60 for seconds in left)


def test_one_at_a_time_and_a_finished_one_waits_for_a_decision(make, runs) -> None:
    jobs = make(steps=50)
    jobs.start("ana", WISHES)
    with pytest.raises(ConfigError, match="is at work"):
        jobs.start("bob", WISHES)
    wait(jobs, "done")
    with pytest.raises(ConfigError, match="quick-2 waits for a decision"):
        jobs.start("bob", WISHES)
    jobs.adopt()
    finished(jobs)
    assert jobs.job().name == "quick-3"


def test_another_app_on_the_same_runs_is_respected(make, runs) -> None:
    first = make(steps=100)
    first.start("ana", WISHES)
    wait(first, "running")
    second = make(engine=Watched(runs / "other"))  # has other runs, so it does not take it up
    assert second.job().state == "none"
    with pytest.raises(ConfigError, match="quick-2 is being trained by another app"):
        second._require_free()


def test_a_failure_keeps_the_reason_the_code_and_the_log(make) -> None:
    jobs = finished(make("fails"))
    job = jobs.job()
    assert (job.state, job.exit_code) == ("failed", 2)
    assert job.error == "the loss is not finite"
    assert "<b>Traceback</b>" in jobs.log_tail()


def test_a_process_that_dies_says_so(make) -> None:
    job = finished(make("dies")).job()
    assert (job.state, job.exit_code) == ("failed", -signal.SIGKILL)
    assert "exit code -9" in job.error


def test_the_log_tail_is_its_end(make) -> None:
    jobs = finished(make())
    (jobs.folder / "train-console.log").write_text("first\n" + "x" * 40_000 + "\nlast\n")
    assert jobs.log_tail() == "last\n"
    assert len(jobs.log_tail(100_000)) == 40_012


def test_of_a_progress_bar_the_log_keeps_its_last_state(make) -> None:
    jobs = finished(make())
    log = jobs.folder / "train-console.log"
    bar = "".join(f"\rLoading weights: {i}%" for i in range(0, 101, 5))
    log.write_text(f"first\r\n{bar}\nlast\n{bar}")  # the second one still goes on
    assert jobs.log_tail() == "first\nLoading weights: 100%\nlast\nLoading weights: 100%"
    log.write_text("first\n" + "\r" * 30_000 + "done\n")
    assert jobs.log_tail() == "first\ndone\n"  # more than is shown, were it not written over


def test_cancel_interrupts_so_that_a_checkpoint_is_kept(make, runs) -> None:
    jobs = make(steps=1000)
    jobs.start("ana", WISHES)
    wait(jobs, "running")
    while "training" not in jobs.log_tail():
        time.sleep(0.01)
    jobs.cancel()
    wait(jobs, "cancelled")
    assert (runs / "quick-2" / "checkpoint").read_text() == "kept"
    assert jobs.job().exit_code == 130
    with pytest.raises(ConfigError, match="Nothing is being trained"):
        jobs.cancel()


def test_a_cancel_while_it_is_prepared_is_heard(make, runs) -> None:
    preparing, go_on = threading.Event(), threading.Event()

    def predict(recipe) -> Memory:
        preparing.set()
        assert go_on.wait(20)
        return ROOMY

    jobs = make(steps=1000, predict=predict)
    starting = threading.Thread(target=lambda: jobs.start("ana", WISHES))
    starting.start()
    assert preparing.wait(20)
    jobs.cancel()
    go_on.set()
    starting.join(20)
    wait(jobs, "cancelled")
    assert jobs.log_tail() == ""  # nothing was begun
    jobs.discard()


def test_who_does_not_listen_is_killed_after_the_grace(make) -> None:
    jobs = make("deaf", steps=100_000)
    jobs.start("ana", WISHES)
    wait(jobs, "running")
    while "training" not in jobs.log_tail():
        time.sleep(0.01)
    jobs.cancel()
    wait(jobs, "cancelled")
    assert jobs.job().exit_code == -signal.SIGKILL


def test_a_cancelled_one_goes_on_in_the_same_run(make, runs) -> None:
    jobs = make(steps=1000)
    jobs.start("ana", WISHES)
    wait(jobs, "running")
    jobs.cancel()
    wait(jobs, "cancelled")
    sha256 = jobs.job().snapshot_sha256
    jobs.close()
    again = make(steps=2)
    again.resume("bob")
    assert again.progress() == Progress()  # of the process that was cancelled, nothing is told
    wait(again, "done")
    assert (again.job().name, again.job().person) == ("quick-2", "bob")
    assert again.job().snapshot_sha256 == sha256
    with pytest.raises(ConfigError, match="no retraining that was stopped"):
        again.resume("bob")


# -- memory -------------------------------------------------------------------------------------


def test_chat_gives_the_device_up_only_where_both_do_not_fit(make, engine) -> None:
    finished(make(memory=ROOMY))
    assert not {"release", "restore"} & set(engine.calls)


def test_what_was_released_is_back_before_anything_is_measured(make, engine) -> None:
    jobs = make(memory=TIGHT, steps=50)
    jobs.start("ana", WISHES)
    wait(jobs, "running")
    assert engine.calls == ["release"]
    assert jobs.has_device
    wait(jobs, "done")
    assert not jobs.has_device
    assert engine.calls[:3] == ["release", "restore", "consider"]
    assert engine.calls.count("restore") == 1


@pytest.mark.parametrize("manner", ["fails", "dies", "deaf"])
def test_chat_comes_back_however_training_ends(make, engine, manner) -> None:
    jobs = make(manner, memory=TIGHT, steps=10 if manner != "deaf" else 100_000)
    jobs.start("ana", WISHES)
    wait(jobs, "running", "failed")
    if manner == "deaf":
        jobs.cancel()
    wait(jobs, "failed", "cancelled")
    assert engine.calls == ["release", "restore"]
    assert engine.state() == "ready"


def test_a_memory_plan_beside_what_is_held() -> None:
    assert Memory("a card", needs=7.0, usable=10.0, held=3.0).fits_beside
    assert not Memory("a card", needs=7.0, usable=10.0, held=3.1).fits_beside


# -- afterwards ---------------------------------------------------------------------------------


def test_old_and_new_are_measured_on_the_same_judgements(make, engine, store) -> None:
    for i in range(9):
        made = task(prompt_source=f"pool:heldout#{i}")
        store.add_many([made, vote(made)])
    job = finished(make()).job()
    assert job.result is not None
    assert (job.result.before_adapter, job.result.after_adapter) == (
        "quick/reward",
        "quick-2/reward",
    )
    assert {c for c in engine.calls if c.startswith("score")} == {
        "score quick/reward",
        "score quick-2/reward",
    }
    assert job.result.pairs == job.result.prompts == job.measurable == 9
    assert job.choosing is not None
    assert 1 < job.choosing.prompts < 20


def test_without_comparisons_nothing_is_measured(make) -> None:
    """Twenty rankings of training prompts; those that chose the step prove nothing."""
    job = finished(make()).job()
    assert (job.state, job.error, job.measurable) == ("done", "", 0)
    assert job.result is None
    assert job.choosing is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_cannot_be_measured_can_be_adopted_and_the_next_begun(make, engine) -> None:
    def score(items, adapter=None):
        raise RuntimeError("CUDA out of memory")

    engine.score = score
    jobs = make()
    jobs.start("ana", WISHES)
    wait(jobs, "done")
    assert jobs.job().choosing is None
    assert "could not be measured: RuntimeError: CUDA out of memory" in jobs.job().error
    jobs.adopt()
    jobs.start("ana", WISHES)
    wait(jobs, "done")
    jobs.discard()


def test_a_state_that_cannot_be_written_is_the_state_all_the_same(
    make, monkeypatch, caplog
) -> None:
    jobs = make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def start(*told: object) -> Training:
        monkeypatch.setattr("ui.job.write_atomically", full)  # once it is prepared
        return began(*told)

    began = Training.start
    monkeypatch.setattr("ui.jobs.Training.start", start)
    jobs.start("ana", WISHES)
    wait(jobs, "done")
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    jobs.adopt()


def test_a_candidate_is_offered_to_nobody_until_it_is_adopted(make, engine, runs) -> None:
    jobs = finished(make())
    assert not any("quick-2" in name for name in engine.answerers())
    assert not is_offered(runs / "quick-2")
    assert adopted_runs(runs, ["quick"]) == []
    names = jobs.adopt()
    assert "quick-2/policy" in names
    assert "quick-2/policy" in engine.answerers()
    assert is_offered(runs / "quick-2")
    assert is_offered(runs / "quick")
    assert adopted_runs(runs, ["quick"]) == [runs / "quick-2"]
    assert adopted_runs(runs, ["other"]) == []
    assert jobs.job().state == "adopted"
    with pytest.raises(ConfigError, match="no finished retraining to adopt"):
        jobs.adopt()


def test_the_next_app_opens_what_was_adopted_and_no_candidate(make, runs) -> None:
    jobs = make(steps=30)
    jobs.start("ana", WISHES)
    wait(jobs, "running")
    assert [run.name for run in newest(runs)] == ["quick"]
    wait(jobs, "done")
    assert [run.name for run in newest(runs)] == ["quick"]
    jobs.adopt()
    assert [run.name for run in newest(runs)] == ["quick", "quick-2"]


def test_discard_moves_the_run_and_its_name_is_not_used_again(make, engine, runs) -> None:
    jobs = finished(make())
    assert engine.considered == {runs / "quick-2"}
    where = jobs.discard()
    assert where == runs / ".discarded" / "quick-2"
    assert (where / "rankings.db").is_file()
    assert not (runs / "quick-2").exists()
    assert engine.considered == set()
    job = read_job(where)
    assert job is not None
    assert job.state == "discarded"
    with pytest.raises(ConfigError, match="no retraining to discard"):
        jobs.discard()
    finished(jobs)
    assert jobs.job().name == "quick-3"


def test_what_is_adopted_cannot_be_discarded(make) -> None:
    jobs = finished(make())
    jobs.adopt()
    with pytest.raises(ConfigError, match="no retraining to discard"):
        jobs.discard()


# -- another app's beginnings -------------------------------------------------------------------


def test_training_outlives_the_app_and_a_new_one_finds_it(make, runs) -> None:
    first = make(steps=100)
    first.start("ana", WISHES)
    wait(first, "running")
    pid = first.job().pid
    first.close()
    assert first.job().state == "running"
    second = make(steps=100)
    assert second.job().state == "running"
    assert second.job().pid == pid
    wait(second, "done")
    assert second.job().choosing is not None
    assert second.job().exit_code is None  # nobody could see it


def test_a_new_app_can_cancel_what_another_has_started(make, runs) -> None:
    first = make(steps=1000)
    first.start("ana", WISHES)
    wait(first, "running")
    while "training" not in first.log_tail():
        time.sleep(0.01)
    first.close()
    second = make(steps=1000)
    second.cancel()
    assert first._training is not None
    first._training.wait(10)  # reaps it, as the init of a machine does for an app that is gone
    wait(second, "cancelled")
    assert (runs / "quick-2" / "checkpoint").exists()


def test_training_of_an_app_killed_with_its_chat_unloaded_keeps_the_device(make, runs) -> None:
    first = make(memory=TIGHT, steps=100)
    first.start("ana", WISHES)
    wait(first, "running")
    first.close()
    fresh = Watched(runs / "quick")
    second = make(memory=TIGHT, engine=fresh)
    assert fresh.calls == ["release"]
    assert second.has_device
    wait(second, "done")
    assert fresh.calls[:3] == ["release", "restore", "consider"]


def test_what_ended_while_no_app_was_there_is_looked_at_by_the_next(make, runs) -> None:
    first = make("fails", steps=30)
    first.start("ana", WISHES)
    wait(first, "running")
    first.close()
    assert first._training is not None
    assert first._training.wait(20)
    second = make()
    wait(second, "failed")
    assert second.job().error == "the loss is not finite"


def test_another_process_of_the_same_number_is_not_taken_for_training(make, runs) -> None:
    jobs = finished(make())
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        record = jobs.folder / "retraining.json"
        said = json.loads(record.read_text()) | {
            "state": "running",
            "pid": stranger.pid,
            "process_began": "12345",
        }
        record.write_text(json.dumps(said))
        summary = Run(jobs.folder).summary()
        del summary["seconds"]["reward"]
        (jobs.folder / "summary.json").write_text(json.dumps(summary))
        jobs.close()
        second = make()
        wait(second, "failed")
        assert "nobody saw how it ended" in second.job().error
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_nor_is_one_that_is_older_than_the_job_which_never_wrote_its_number_down(
    make, runs
) -> None:
    jobs = finished(make())
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        Run(jobs.folder).write_json("status.json", {"state": "running", "pid": stranger.pid})
        record = jobs.folder / "retraining.json"
        said = json.loads(record.read_text()) | {
            "state": "preparing",
            "pid": 0,
            "process_began": "",
        }
        for started_at, is_it in ((time.time() - 1.0, True), (time.time() + 60.0, False)):
            job = Job.model_validate(said | {"started_at": started_at})
            assert (process_of(jobs.folder, job) is not None) == is_it
    finally:
        stranger.kill()
        stranger.wait()


def test_a_finished_one_is_still_to_be_decided_after_a_restart(make, engine, runs) -> None:
    finished(make()).close()
    second = make()
    assert second.job().state == "done"
    assert second.job().choosing is not None
    assert "quick-2/policy" in second.adopt()
    third = make()
    assert third.job().state == "none"


def test_a_damaged_record_is_no_retraining(make, runs) -> None:
    finished(make()).close()
    (runs / "quick-2" / "retraining.json").write_text('{"state": "done"')
    assert make().job().state == "none"
    # A record copied into another run says nothing of it.
    (runs / "quick" / "retraining.json").write_text(
        '{"state": "done", "name": "x", "base": "quick"}'
    )
    assert make().job().state == "none"
