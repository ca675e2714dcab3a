"""Numbers of a stage: one JSON line a step, and a tracker where the recipe asks for one."""

import time
from collections.abc import Mapping
from typing import Any

from lora_rlhf.recipe import Recipe
from lora_rlhf.runs import Run


class MetricLog:
    """Writes `<stage>/metrics.jsonl`.

    Args:
        run: the run directory.
        stage: its stage.
        tracker: an accelerate tracker that gets the same numbers, or None.
    """

    def __init__(self, run: Run, stage: str, tracker: Any = None) -> None:
        self._run = run
        self._stage = stage
        self._file = f"{stage}/metrics.jsonl"
        self._tracker = tracker

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        record = {"step": step, "time": round(time.time(), 3)}
        self._run.append(self._file, record | {k: float(v) for k, v in metrics.items()})
        if self._tracker is not None:
            named = {f"{self._stage}/{k}": float(v) for k, v in metrics.items()}
            # Weights & Biases drops whatever comes with a step below its newest, as every stage's
            # first ones would.
            counts_itself = any(t.name == "wandb" for t in self._tracker.trackers)
            named[f"{self._stage}/step"] = float(step)
            self._tracker.log(named, step=None if counts_itself else step)

    def cut_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed stage takes again."""
        self._run.cut_lines_after(self._file, step)
        self._run.cut_lines_after(f"{self._stage}/samples.jsonl", step)

    def last(self) -> dict[str, Any]:
        """The newest line, or {}."""
        lines = self._run.lines(self._file)
        return lines[-1] if lines else {}


def start_tracker(recipe: Recipe, run: Run) -> Any:
    """The tracker the recipe names, through accelerate; None when it names none."""
    if recipe.tracker is None:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=recipe.tracker, project_dir=str(run.path))
    accelerator.init_trackers(recipe.name, config={"recipe": recipe.name, "seed": recipe.seed})
    return accelerator
