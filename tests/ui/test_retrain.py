"""The Retrain tab's handlers: who may, what is shown, and that nothing of it is markup."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.errors import ConfigError, TrainingError, UserError
from lora_rlhf.preferences.store import Store
from lora_rlhf.training.optim import require_finite
from lora_rlhf.training.reward_report import coin_warning
from tests.preferences.making import task, vote
from tests.ui.training import TRAINING, Watched, base_run
from ui.job import Job, Progress
from ui.jobs import Jobs
from ui.measuring import BeforeAfter, Share
from ui.people import NotAllowed, Person
from ui.preparing import Memory
from ui.retrain_views import (
    FORCE,
    in_the_page,
    job_sentence,
    memory_sentence,
    plan_html,
    progress_html,
    result_html,
)
from ui.retraining import SCOPES, TooLittle, Wishes
from ui.studio import Studio
from ui.trainer import (
    FOR_ADMINS,
    adopt,
    cancel,
    discard,
    dry_run,
    resume,
    start,
    view,
    wishes_of,
)

ADMIN = Person("ana", True, "s1")
LABELER = Person("bob", False, "s2")
ROOMY = Memory("a card", needs=1.0, usable=10.0, held=2.0)
TIGHT = Memory("a card", needs=9.0, usable=10.0, held=2.0)
WISHES = Wishes("quick", "reward")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    """Twenty votes, one of them on a held-out prompt, and a training of three steps."""
    runs = tmp_path / "runs"
    base_run(runs / "quick")
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    manner = tmp_path / "manner"
    manner.write_text("3 well")
    monkeypatch.setattr(
        "ui.jobs.command",
        lambda run, only, force: [
            sys.executable,
            str(script),
            str(run),
            *manner.read_text().split(),
        ],
    )
    with Store.open(tmp_path / "votes.db") as store:
        for i in range(19):
            made = task([{}, {"adapter": EVIL}], prompt=f"prompt {i}", prompt_source="pool:train#0")
            store.add_many([made, vote(made)])
        made = task(prompt_source="pool:heldout#1")
        store.add_many([made, vote(made)])
        engine = Watched(runs / "quick")
        jobs = Jobs(engine, store, runs, predict=lambda recipe: ROOMY, look=0.02, grace=0.3)
        opened = Studio(engine, store, runs, jobs)
        yield opened
        opened.close()


def wait(studio: Studio, *states: str) -> None:
    ends_at = time.monotonic() + 60
    while studio.jobs.job().state not in states:
        assert time.monotonic() < ends_at, studio.jobs.job()
        time.sleep(0.01)


# -- who may ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        lambda studio: dry_run(studio, LABELER, WISHES),
        lambda studio: start(studio, LABELER, WISHES),
        lambda studio: resume(studio, LABELER),
        lambda studio: cancel(studio, LABELER),
        lambda studio: adopt(studio, LABELER),
        lambda studio: discard(studio, LABELER),
    ],
)
def test_whoever_is_no_admin_is_refused_and_nothing_happens(studio, act) -> None:
    with pytest.raises(NotAllowed, match="Retraining is for the admin alone, and bob is none"):
        act(studio)
    assert studio.jobs.job() == Job()
    assert [path.name for path in studio.runs_dir.iterdir()] == ["quick"]


def test_whoever_is_no_admin_sees_a_friendly_sentence_and_no_log(studio) -> None:
    start(studio, ADMIN, WISHES)
    wait(studio, "done")
    seen = view(studio, LABELER)
    assert seen.status == FOR_ADMINS
    assert (seen.log, seen.result, seen.bar) == ("", "", "")
    assert not any((seen.can_start, seen.can_adopt, seen.can_discard, seen.busy))
    assert "training" in view(studio, ADMIN).log


# -- the dry run --------------------------------------------------------------------------------


def test_the_dry_run_shows_counts_hash_memory_and_changes_nothing(studio) -> None:
    found = dry_run(studio, ADMIN, WISHES)
    shown = found.shown
    assert found.can_start
    sha256 = studio.jobs.plan(WISHES).snapshot_sha256(studio.store)
    for part in (
        "19 judgements of 19 prompts by 1 annotator: 19 strict pairs",
        "1 on a held-out prompt",
        f"SHA-256 {sha256}",
        "Chat stays loaded: training needs 1.0 GB, 2.0 GB are in use, 10.0 GB can be used",
        "starts as a copy of sft",  # the base run has no reward adapter on disk
        "quick-2, from quick. Nothing is changed yet.",
    ):
        assert part in shown
    assert [path.name for path in studio.runs_dir.iterdir()] == ["quick"]
    start(studio, ADMIN, WISHES)
    assert studio.jobs.job().snapshot_sha256 == sha256


def test_what_people_and_models_wrote_is_no_markup(studio) -> None:
    shown = dry_run(studio, ADMIN, WISHES).shown
    assert EVIL not in shown
    assert "&lt;img src=x onerror=alert(1)&gt; 19" in shown
    share = Share(value=0.5, low=0.4, high=0.6)
    result = BeforeAfter(
        before_adapter=EVIL,
        after_adapter=EVIL,
        before=share,
        after=share,
        change=share,
        pairs=1,
        prompts=1,
    )
    assert "<img" not in result_html(Job(state="done", result=result, choosing=result))


def test_too_little_and_bad_settings_are_a_sentence(studio) -> None:
    with pytest.raises(ConfigError, match="cannot be changed here"):
        dry_run(studio, ADMIN, replace(WISHES, overrides=("base.model=x",)))
    studio.store.erase("ana")
    with pytest.raises(TooLittle, match="Rank answers to 4 more"):
        start(studio, ADMIN, WISHES)


def test_too_little_stays_on_the_page_with_what_was_left_out_and_why(studio) -> None:
    studio.store.erase("ana")
    for i in range(3):
        made = task(prompt=f"prompt {i}", prompt_source="pool:train#0")
        studio.store.add_many([made, vote(made, client_ms=1)])
    found = dry_run(studio, ADMIN, WISHES)
    assert not found.can_start
    assert "Rank answers to 4 more." in found.shown
    left_out = '<tr class=marked><th scope="row">Left out</th><td>3 faster than anybody reads</td>'
    assert left_out in found.shown
    assert "Snapshot" not in found.shown  # of nothing
    studio.store.erase("ana")
    assert "Left out</th><td>nothing</td>" in dry_run(studio, ADMIN, WISHES).shown
    assert "marked" not in dry_run(studio, ADMIN, WISHES).shown


def test_the_panel_is_read_with_suspicion() -> None:
    good = ("quick", "reward", True, False, False, True, False, "reward.epochs=3  seed=1")
    assert wishes_of(*good) == Wishes(
        "quick", "reward", go_on=True, earlier=False, fast=True,
        overrides=("reward.epochs=3", "seed=1"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="How far: 'everything'"):
        wishes_of(good[0], "everything", *good[2:])
    with pytest.raises(ConfigError, match="How far"):
        wishes_of(good[0], ["reward"], *good[2:])
    with pytest.raises(ConfigError, match="Close the quotes"):
        wishes_of(*good[:-1], 'reward.epochs="3')
    with pytest.raises(ConfigError, match="over 2000 characters"):
        wishes_of(*good[:-1], "x" * 3000)
    assert wishes_of(None, SCOPES[1], None, None, None, None, None, None).base == ""


# -- a job --------------------------------------------------------------------------------------


def test_buttons_follow_the_state(studio) -> None:
    def buttons() -> set[str]:
        now = view(studio, ADMIN)
        names = ("start", "cancel", "resume", "adopt", "discard")
        return {name for name in names if getattr(now, f"can_{name}")}

    assert buttons() == {"start"}
    (studio.runs_dir.parent / "manner").write_text("2000 well")
    assert start(studio, ADMIN, WISHES).busy
    wait(studio, "running")
    assert buttons() == {"cancel"}
    assert not cancel(studio, ADMIN).can_cancel  # once is enough
    wait(studio, "cancelled")
    assert buttons() == {"start", "resume", "discard"}
    (studio.runs_dir.parent / "manner").write_text("2 well")
    resume(studio, ADMIN)
    wait(studio, "done")
    assert buttons() == {"adopt", "discard"}
    assert not view(studio, ADMIN).busy
    assert "train-row" in view(studio, ADMIN).result
    adopt(studio, ADMIN)
    assert buttons() == {"start"}
    assert "quick-2/policy" in studio.engine.answerers()


def test_discard_says_where_the_run_went(studio) -> None:
    start(studio, ADMIN, WISHES)
    wait(studio, "done")
    said = discard(studio, ADMIN).status
    assert ".discarded/quick-2" in said
    assert (studio.runs_dir / ".discarded" / "quick-2" / "recipe.yaml").is_file()


def test_a_failure_shows_reason_and_log(studio) -> None:
    (studio.runs_dir.parent / "manner").write_text("2 fails")
    start(studio, ADMIN, WISHES)
    wait(studio, "failed")
    now = view(studio, ADMIN)
    assert now.status == "quick-2 has failed: the loss is not finite"
    assert now.tone == "bad"
    assert now.log.endswith("<b>Traceback</b>\n")  # goes into a text box, not into markup


def test_a_weak_reward_model_is_gone_on_from_by_force_alone(studio) -> None:
    (studio.runs_dir.parent / "manner").write_text("2 fails")
    start(studio, ADMIN, WISHES)
    wait(studio, "failed")
    assert not studio.jobs.job().force
    error = coin_warning({"accuracy": 0.5, "accuracy_ci": [0.4, 0.6]})
    said, _ = job_sentence(studio.jobs.job().model_copy(update={"error": error}), Progress())
    assert said.endswith(
        f"Collect more rankings, or tick {FORCE!r} under More and press Go on with it."
    )
    (studio.runs_dir.parent / "manner").write_text("2 well")
    resume(studio, ADMIN, True)
    wait(studio, "done")
    assert studio.jobs.job().force


def test_advice_of_the_command_line_is_given_in_words_of_the_page() -> None:
    with pytest.raises(TrainingError) as found:
        require_finite(float("nan"), "loss", "ppo step 3")
    assert in_the_page(str(found.value)).endswith("of that step; then press Go on with it.")
    damaged = "Delete that directory to go back to the one before it, then --resume again."
    assert in_the_page(damaged).endswith("before it, then press Go on with it.")
    held = "if that process is something else, add --force."
    assert in_the_page(held).endswith(f"else, tick {FORCE!r} under More and press Go on with it.")


def test_a_forged_decision_is_refused(studio) -> None:
    for act in (adopt, discard, cancel, resume):
        with pytest.raises(UserError):
            act(studio, ADMIN)


# -- words --------------------------------------------------------------------------------------


def test_a_running_job_says_stage_step_and_time_left() -> None:
    job = Job(state="running", name="quick-2", stages=("reward", "ppo"), released=True)
    now = Progress("ppo", 6, 24, 95.0)
    said, _ = job_sentence(job, now)
    assert said == "quick-2 is being trained: stage 2 of 2, ppo. Chat is unloaded meanwhile."
    assert "step 6 of 24, 1:35 left of this stage" in progress_html(job, now)
    assert 'style="width:25.0%"' in progress_html(job, now)
    assert progress_html(job.model_copy(update={"state": "done"}), now) == ""
    assert job_sentence(job, Progress())[0].startswith("quick-2 is starting.")


def test_the_memory_sentence_says_whether_chat_stays() -> None:
    assert memory_sentence(ROOMY).startswith("Chat stays loaded")
    assert memory_sentence(TIGHT).startswith("Chat is unloaded meanwhile and comes back")
    huge = replace(TIGHT, needs=11.0)
    assert memory_sentence(huge).endswith("Even alone it may not fit.")


def result(before: tuple[float, float, float], after: tuple[float, float, float]) -> BeforeAfter:
    def share(numbers: tuple[float, float, float]) -> Share:
        return Share(value=numbers[0], low=numbers[1], high=numbers[2])

    return BeforeAfter(
        before_adapter="quick/reward",
        after_adapter="quick-2/reward",
        before=share(before),
        after=share(after),
        change=share((after[0] - before[0], -0.05, 0.25)),
        pairs=90,
        prompts=30,
    )


def done(found: BeforeAfter | None, **more: Any) -> Job:
    return Job(state="done", name="quick-2", result=found, **more)


def test_without_votes_on_held_out_prompts_there_is_a_sentence_and_no_verdict() -> None:
    alone = result((0.5, 0.4, 0.54), (0.7, 0.55, 0.8))
    shown = result_html(done(None, measurable=3, choosing=alone))
    assert "Nothing to measure on" in shown
    assert "there are 3. Compare some held-out prompts first" in shown
    assert "On the rankings that also chose the step: 90 pairs of 30 prompts" in shown
    assert "70.0% (55.0% to 80.0%)" in shown
    for verdict in ("agrees with people", "No difference", "overlap", "change", "+20.0%"):
        assert verdict not in shown
    assert result_html(Job(state="measuring", name="quick-2")) == ""
    assert "Nothing to measure" not in result_html(done(None, error="It could not be measured."))


def test_the_verdict_is_of_held_out_votes_where_both_are_shown() -> None:
    alone = result((0.5, 0.4, 0.6), (0.7, 0.55, 0.8))
    shown = result_html(done(alone, choosing=alone))
    assert shown.count("train-verdict") == 1
    assert shown.index("train-verdict") < shown.index("also chose the step")
    assert "Nothing to measure on" not in shown


def test_bars_lie_where_their_numbers_say_and_the_numbers_stand_beside_them() -> None:
    shown = result_html(done(result((0.5, 0.4, 0.6), (0.7, 0.55, 0.8))))
    assert "left:40.0%;width:20.0%" in shown
    assert "left:55.0%;width:25.0%" in shown
    assert "50.0% (40.0% to 60.0%)" in shown
    assert "+20.0% (-5.0% to +25.0%)" in shown
    assert "left:60.0%" in shown  # the change of 0.2 on a scale from -1 to 1
    assert "90 pairs of 30 held-out prompts" in shown


def test_overlap_is_said_plainly() -> None:
    overlapping = result_html(done(result((0.5, 0.4, 0.6), (0.7, 0.55, 0.8))))
    apart = result_html(done(result((0.5, 0.4, 0.54), (0.7, 0.55, 0.8))))
    assert "The two intervals overlap. No difference can be told" in overlapping
    assert "overlap" not in apart


def test_plan_html_names_scope_and_settings(studio) -> None:
    wishes = Wishes("quick", "reward + PPO + evaluate", overrides=("ppo.steps=7",))
    plan = studio.jobs.plan(wishes)
    shown = plan_html(plan, TIGHT, "0" * 64)
    assert "7 rounds of 64 answers" in shown
    assert "held-out prompts, judged by builtin:gold" in shown
    assert "Chat is unloaded meanwhile" in shown
    assert "not known" in shown  # the base run has no ppo to go by
