"""Retraining on the embedded base: the ordinary command line, real adapters, a real engine."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.runs import Run, write_atomically
from tests.preferences.making import task, vote
from tests.small_run import small_run
from ui.engine import StudioEngine
from ui.jobs import Jobs
from ui.retraining import Wishes

pytestmark = pytest.mark.slow

WISHES = Wishes("quick", "reward", force=True, overrides=("reward.normalize_on=none",))
TEXTS = ("a red hat.", "a blue hat.", "no no no.")


def votes(store: Store, count: int) -> None:
    for i in range(count):
        answers = [{"text": text, "adapter": "quick/policy"} for text in TEXTS]
        made = task(answers, prompt=f"Describe hat {i}.", prompt_source=f"pool:train#{i}")
        store.add_many([made, vote(made, ["r0"], ["r1"], ["r2"])])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A run with random adapters, whose recipe has a reward section."""
    run = small_run(tmp_path / "runs" / "quick")
    changes = (
        "reward.batch_size=4",
        "rank={judge: 'builtin:gold'}",
        "data.max_response_tokens=96",
    )
    recipe = load_recipe(str(run.path / "recipe.yaml"), changes)
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    return run.path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "votes.db") as opened:
        votes(opened, 40)
        yield opened


@pytest.fixture
def jobs(base: Path, store: Store) -> Iterator[Jobs]:
    engine = StudioEngine([Run(base)]).start()
    made = Jobs(engine, store, base.parent, look=0.1)
    yield made
    if made._training is not None:
        made._training.kill()
    made.close()
    engine.close()


def wait(jobs: Jobs, *states: str) -> None:
    ends_at = time.monotonic() + 300
    while jobs.job().state not in states:
        assert time.monotonic() < ends_at, f"{jobs.job()}\n{jobs.log_tail()}"
        time.sleep(0.05)


def ready(jobs: Jobs) -> Jobs:
    assert isinstance(jobs.engine, StudioEngine)
    jobs.engine.ready(120)
    return jobs


def test_forty_votes_become_a_reward_adapter_that_scores_after_adoption(jobs, base) -> None:
    began = time.monotonic()
    ready(jobs).start("ana", WISHES)
    wait(jobs, "done", "failed")
    assert jobs.job().state == "done", jobs.log_tail()
    assert time.monotonic() - began < 180
    new = Run(base.parent / "quick-2")
    facts = json.loads((new.adapter("reward") / "lora_rlhf.json").read_text())
    sha256 = hashlib.sha256((new.path / "rankings.db").read_bytes()).hexdigest()
    assert facts["data"]["rankings_sha256"] == jobs.job().snapshot_sha256 == sha256
    assert facts["data"]["train"] + facts["data"]["heldout"] == 40
    assert facts["parent"] == "reward"
    plan = jobs.plan(WISHES).material  # the split that was promised is the one that was trained on
    assert (plan.train.rankings, plan.heldout.rankings) == (
        facts["data"]["train"],
        facts["data"]["heldout"],
    )
    assert jobs.job().result is None  # nobody has compared anything on held-out prompts
    result = jobs.job().choosing
    assert result is not None
    assert (result.prompts, result.pairs) == (plan.heldout.prompts, 3 * plan.heldout.prompts)
    assert jobs.engine.reward_adapter() == "quick/reward"
    jobs.adopt()
    assert jobs.engine.reward_adapter() == "quick-2/reward"
    scores = jobs.engine.score([(({"role": "user", "content": "Describe hat 1."},), TEXTS[0])])
    assert len(scores) == 1


def test_the_base_runs_adapters_are_not_touched(jobs, base) -> None:
    def weights() -> dict[str, bytes]:
        return {str(f): f.read_bytes() for f in sorted(base.rglob("*.safetensors"))}

    before = weights()
    ready(jobs).start("ana", WISHES)
    wait(jobs, "done", "failed")
    assert weights() == before


def test_killed_training_goes_on_from_its_checkpoint(jobs) -> None:
    long = Wishes(
        "quick",
        "reward",
        force=True,
        overrides=("reward.epochs=40", "reward.checkpoint_every=2", "reward.normalize_on=none"),
    )
    ready(jobs).start("ana", long)
    folder = jobs.folder
    ends_at = time.monotonic() + 200
    while not list((folder / "reward" / "checkpoints").glob("step-*")):
        assert time.monotonic() < ends_at, jobs.log_tail()
        time.sleep(0.05)
    os.killpg(jobs.job().pid, signal.SIGKILL)
    wait(jobs, "failed")
    assert "exit code -9" in jobs.job().error
    jobs.resume("ana")
    wait(jobs, "running")
    while not jobs.progress().stage:
        assert jobs.job().state == "running", jobs.log_tail()
        time.sleep(0.05)
    assert jobs.progress().step >= 2
    jobs.cancel()
    wait(jobs, "cancelled", "done")
    if jobs.job().state == "cancelled":
        assert jobs.job().exit_code == 130
        assert list((folder / "reward" / "checkpoints").glob("step-*"))


def test_training_outlives_an_app_that_is_killed(base, store, tmp_path) -> None:
    """The app is a process of its own here, and dies of SIGKILL in mid-training."""
    app = tmp_path / "app.py"
    app.write_text(
        f"""
import sys, time
from pathlib import Path
from lora_rlhf.preferences.store import Store
from lora_rlhf.runs import Run
from tests.ui.test_jobs_for_real import WISHES
from ui.engine import StudioEngine
from ui.jobs import Jobs
base = Path({str(base)!r})
engine = StudioEngine([Run(base)]).start().ready()
jobs = Jobs(engine, Store.open({str(tmp_path / "votes.db")!r}), base.parent, look=0.05)
jobs.start("ana", WISHES)
while jobs.job().state != "running":
    time.sleep(0.02)
print(jobs.job().pid, flush=True)
time.sleep(600)
"""
    )
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, str(app)], stdout=subprocess.PIPE, text=True, cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    engine = StudioEngine([Run(base)]).start()
    jobs = Jobs(engine, store, base.parent, look=0.1)
    try:
        assert jobs.job().pid == pid
        wait(jobs, "done", "failed")
        assert jobs.job().state == "done", jobs.log_tail()
        assert jobs.job().choosing is not None
        assert Run(base.parent / "quick-2").is_complete("reward")
    finally:
        jobs.close()
        engine.close()
