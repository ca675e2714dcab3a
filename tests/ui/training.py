"""A base run without a model, a training without torch, and an engine that notes its orders."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe_io import dump_recipe, recipe_from
from lora_rlhf.runs import Run, write_atomically
from tests.preferences.making import task, vote
from tests.ui.fakes import FakeEngine
from ui.jobs import Jobs
from ui.preparing import Memory
from ui.retraining import Wishes

ROOMY = Memory("a card", needs=1.0, usable=10.0, held=2.0)
TIGHT = Memory("a card", needs=9.0, usable=10.0, held=2.0)
WISHES = Wishes("quick", "reward")

# Stands for `lora-rlhf run`: takes the steps it is told to, and writes what a run writes.
TRAINING = """
import json, os, pathlib, signal, sys, time
run, steps, manner = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def status(**facts):
    aside = run / "status.aside"
    aside.write_text(json.dumps({"pid": os.getpid(), "error": "", "time": time.time()} | facts))
    os.replace(aside, run / "status.json")
def stop(number, frame):
    (run / "checkpoint").write_text("kept")
    status(state="stopped", stage="reward", step=0, total=steps)
    print("Stopped.", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, signal.SIG_IGN if manner == "deaf" else stop)
print("training", *sys.argv[1:], flush=True)
for step in range(steps):
    status(state="running", stage="reward", step=step, total=steps)
    time.sleep(0.02)
if manner == "fails":
    status(state="failed", stage="reward", step=1, total=steps, error="the loss is not finite")
    print("<b>Traceback</b>", flush=True)
    sys.exit(2)
if manner == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
for stage in ("reward", "ppo", "evaluate"):
    summary = json.loads((run / "summary.json").read_text())
    summary["seconds"][stage] = 1.0
    (run / "summary.json").write_text(json.dumps(summary))
status(state="stopped", stage="", step=0, total=0)
"""


class Watched(FakeEngine):
    """Notes in which order it is asked what."""

    def __init__(self, run: Path) -> None:
        super().__init__(run=run)
        self.calls: list[str] = []

    def release(self) -> None:
        self.calls.append("release")
        super().release()

    def restore(self) -> None:
        self.calls.append("restore")
        super().restore()

    def consider(self, run: Path) -> list[str]:
        self.calls.append("consider")
        return super().consider(run)

    def score(self, items, adapter=None):
        self.calls.append(f"score {adapter}")
        return super().score(items, adapter)


def base_run(path: Path) -> Run:
    """A run whose sft and reward stages are complete, as far as files say."""
    run = Run(path)
    recipe = recipe_from(
        {
            "name": "quick",
            "base": {"model": "builtin:tiny", "device": "cpu"},
            "data": {
                "demonstrations": {"builtin": "demonstrations", "limit": 50},
                "heldout_fraction": 0.25,
            },
            "sft": {},
            "rank": {"judge": "builtin:gold", "prompts": 9},
            "reward": {},
            "ppo": {},
            "evaluate": {"judge": "builtin:gold", "expect_win_rate": 0.6},
        }
    )
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        write_atomically(run.adapter("sft") / file, "{}")
    fingerprint = {"weights": "w", "quantization": "nf4", "template": "t", "model": "builtin:tiny"}
    made_on = json.dumps({"fingerprint": fingerprint})
    write_atomically(run.adapter("sft") / "lora_rlhf.json", made_on)
    run.finish_stage("sft", 36.0, sft={"heldout_loss": 0.7})
    run.finish_stage("reward", 80.0, reward={"prompts": 40})
    return run


def wait(jobs: Jobs, *states: str, seconds: float = 60.0) -> None:
    ends_at = time.monotonic() + seconds
    while jobs.job().state not in states:
        assert time.monotonic() < ends_at, f"{jobs.job()}\n{jobs.log_tail()}"
        time.sleep(0.01)


def finished(jobs: Jobs, wishes: Wishes = WISHES) -> Jobs:
    jobs.start("ana", wishes)
    wait(jobs, "done", "failed")
    return jobs


@contextmanager
def twenty_votes(path: Path) -> Iterator[Store]:
    """Of ana, on prompts of the training pool."""
    with Store.open(path) as opened:
        for i in range(20):
            made = task(prompt=f"prompt {i}", prompt_source=f"pool:train#{i}")
            opened.add_many([made, vote(made)])
        yield opened


@contextmanager
def scripted_jobs(
    folder: Path, runs: Path, store: Store, engine: FakeEngine, patch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Jobs]]:
    """Makes jobs whose training is the script above; what still trains at the end is killed."""
    script = folder / "training.py"
    script.write_text(TRAINING)
    made: list[Jobs] = []

    def make(manner: str = "well", steps: int = 3, memory: Memory = ROOMY, **options: Any) -> Jobs:
        def command(run: Path, only: str | None, force: bool) -> list[str]:
            told = [str(run), str(steps), manner, str(only), str(force)]
            return [sys.executable, str(script), *told]

        patch.setattr("ui.jobs.command", command)
        kept = {"predict": lambda recipe: memory, "look": 0.02, "grace": 0.3} | options
        made.append(Jobs(kept.pop("engine", engine), store, runs, **kept))
        return made[-1]

    try:
        yield make
    finally:
        for each in made:
            if each._training is not None:
                each._training.kill()
            each.close()
