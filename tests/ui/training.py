"""A base run without a model, a training without torch, and an engine that notes its orders."""

from pathlib import Path

from lora_rlhf.recipe_io import dump_recipe, recipe_from
from lora_rlhf.runs import Run, write_atomically
from tests.ui.fakes import FakeEngine

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
    run.finish_stage("sft", 36.0, sft={"heldout_loss": 0.7})
    run.finish_stage("reward", 80.0, reward={"prompts": 40})
    return run
