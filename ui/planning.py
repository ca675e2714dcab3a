"""A retraining before it begins: what it trains on, by which recipe, and its run directory."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_rlhf.data.records import Ranking
from lora_rlhf.preferences.events import Judgement, Task
from lora_rlhf.preferences.store import Judged, Store
from lora_rlhf.recipe import Recipe, Reward
from lora_rlhf.runs import TRAINED_ON, Json, Run
from ui.asking import Prompts
from ui.earlier import earlier_events
from ui.job import Job
from ui.measuring import CHOOSING, prompts_in, write_rankings
from ui.measuring import FILE as HELDOUT
from ui.preparing import (
    SNAPSHOT,
    copy_adapters,
    fill,
    goes_on,
    new_name,
    recipe_of,
    retraining_recipe,
    write_recipe,
)
from ui.retraining import Chosen, Material, Wishes, choose, count, heldout_among, ranking_of

_MANY = 100  # rankings
_START_SECONDS = 15.0  # of a process: imports, the backbone, the report


@dataclass(frozen=True)
class Plan:
    """What a retraining would do.

    Attributes:
        base: the run it starts from.
        name: of the new run.
        wishes: of the admin.
        chosen: out of the store.
        earlier: rankings of the base run, as events.
        material: all that, counted.
        recipe: of the new run.
        defaults: `key=value` that differ from the base run's recipe, and yield to the admin's.
        known: hashes of held-out prompts that this or a run before was let train on. They measure
            and evaluate nothing, in no run that goes on from this one.
    """

    base: Run
    name: str
    wishes: Wishes
    chosen: Chosen
    earlier: list[Task | Judgement]
    material: Material
    recipe: Recipe
    defaults: tuple[str, ...]
    known: frozenset[str]

    @classmethod
    def make(
        cls, store: Store, base: Run, runs_dir: Path, wishes: Wishes, prompts: Prompts
    ) -> "Plan":
        """Read the store and the base run; nothing is changed.

        Args:
            store: of judgements.
            base: the run to start from.
            runs_dir: where the new run will lie.
            wishes: of the admin.
            prompts: of the base run: what training must not see, and what it has seen.

        Raises:
            UserError: an override that cannot be, or a base run that lacks something.
        """
        old = recipe_of(base)
        judged = store.judged()
        chosen = choose(judged, wishes, prompts)
        is_fresh = "reward" not in goes_on(base, wishes)
        wanted = wishes.earlier if wishes.earlier is not None else is_fresh
        earlier = earlier_events(base, old) if wanted else []
        material = count(chosen, rankings_in(earlier), old.data.heldout_fraction)
        name = new_name(runs_dir, base.name)
        rankings = material.judgements + material.earlier
        defaults = reward_settings(fresh_settings(base, old), not is_fresh, rankings)
        trained = {j.task.prompt_sha256 for j in chosen.kept}
        trained |= {e.prompt_sha256 for e in earlier if isinstance(e, Task)}
        known = prompts.known | (trained & heldout_among(judged, prompts))
        if old.evaluate is not None and known:
            # What is trained on does not evaluate.
            left = max(1, len(prompts.unseen - known))
            defaults += (f"evaluate.prompts={min(old.evaluate.prompts, left)}",)
        recipe = retraining_recipe(base, runs_dir / name, wishes, defaults)
        return cls(base, name, wishes, chosen, earlier, material, recipe, defaults, known)

    def events(self) -> Iterator[Task | Judgement]:
        """What the snapshot holds, tasks before their judgements."""
        tasks = {each.task.task_id: each.task for each in self.chosen.kept}
        yield from tasks.values()
        yield from (each.judgement for each in self.chosen.kept)
        yield from self.earlier

    def snapshot_sha256(self, store: Store) -> str:
        """The hash of the snapshot that would be trained on; the file itself is thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            return fill(Path(folder) / SNAPSHOT, store, self.events())

    @property
    def seconds(self) -> float | None:
        """About how long it takes, from what the base run took; None where that is not known."""
        summary, old = self.base.summary(), recipe_of(self.base)
        taken = summary.get("seconds", {})
        total = _START_SECONDS
        for stage in self.wishes.stages:
            if stage not in taken:
                return None
            total += taken[stage] * self._ratio(stage, old, summary)
        return total

    def _ratio(self, stage: str, old: Recipe, summary: Json) -> float:
        """How much more there is to do in a stage than there was in the base run."""
        new = self.recipe
        if stage == "reward" and old.reward and new.reward:
            before = summary.get("reward", {}).get("prompts", 1) * old.reward.epochs
            return self.material.train.rankings * new.reward.epochs / max(before, 1e-9)
        if stage == "ppo" and old.ppo and new.ppo:
            return new.ppo.steps * new.ppo.batch_size / (old.ppo.steps * old.ppo.batch_size)
        if stage == "evaluate" and old.evaluate and new.evaluate:
            return new.evaluate.prompts / old.evaluate.prompts
        return 1.0


def rankings_in(events: Sequence[Task | Judgement]) -> list[Ranking]:
    """The judgements among events, with the tasks among them, as the reward model reads them."""
    tasks = {e.task_id: e for e in events if isinstance(e, Task)}
    judgements = [e for e in events if isinstance(e, Judgement)]
    return [ranking_of(Judged(tasks[j.task_id], j, 0)) for j in judgements]


def fresh_settings(base: Run, old: Recipe) -> Json:
    """How a fresh reward model was trained in the run that all of this began with."""
    reward = old.reward or Reward()
    own = {"learning_rate": reward.learning_rate, "epochs": reward.epochs}
    kept: Json = base.summary().get("retraining", {}).get("fresh", own)
    return kept


def reward_settings(fresh: Json, going_on: bool, rankings: int) -> tuple[str, ...]:
    """What suits a reward model that goes on, or a fresh one.

    Half the learning rate of a fresh one, for two epochs, taught it 300 rankings without unlearning
    the earlier ones; of 40 that is too much, and a quarter for one epoch does no harm (measured on
    the quickstart). A fresh one that sees everything again overfits in more than its own epochs.

    Args:
        fresh: of `fresh_settings`.
        going_on: start from the base run's reward model.
        rankings: to train on.
    """
    rate, epochs = fresh["learning_rate"], fresh["epochs"]
    if going_on:
        rate, epochs = (rate / 2, 2) if rankings >= _MANY else (rate / 4, 1)
    return f"reward.learning_rate={rate:g}", f"reward.epochs={epochs:g}"


def prepare_run(
    plan: Plan, store: Store, person: str, before: str | None, runs_dir: Path
) -> tuple[Job, Path]:
    """Make the run directory; nothing is left of it when that fails.

    Args:
        plan: of `Plan.make`.
        store: that it was made of.
        person: who wants it.
        before: name of the reward adapter to compare with.
        runs_dir: where runs lie.

    Raises:
        UserError: the base run lacks `sft`, or the disk has no room.
    """
    folder = runs_dir / plan.name
    folder.mkdir()  # whoever makes it has the name
    job = Job(
        state="preparing",
        name=plan.name,
        base=plan.base.name,
        person=person,
        stages=plan.wishes.stages,
        force=plan.wishes.force,
        started_at=time.time(),
        judgements=plan.material.judgements,
        earlier=plan.material.earlier,
        before=before,
        measurable=prompts_in(plan.material.measured),
    )
    try:
        job.save(folder)
        new = Run(folder)
        copy_adapters(plan.base, new, goes_on(plan.base, plan.wishes))
        sha256 = fill(folder / SNAPSHOT, store, plan.events())
        write_rankings(folder / HELDOUT, plan.material.measured)
        write_rankings(folder / CHOOSING, plan.material.choosing)
        job = job.model_copy(update={"snapshot_sha256": sha256})
        origin = _origin(job) | {"fresh": fresh_settings(plan.base, recipe_of(plan.base))}
        origin |= {TRAINED_ON: sorted(plan.known)}
        new.write_json("summary.json", new.summary() | {"retraining": origin})
        job.save(folder)
        write_recipe(new, plan.recipe)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return job, folder


def _origin(job: Job) -> Json:
    """What the new run's summary says of where it came from."""
    return {
        "base": job.base,
        "rankings_sha256": job.snapshot_sha256,
        "judgements": job.judgements,
        "earlier": job.earlier,
    }
