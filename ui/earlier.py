"""The rankings that a base run's reward model was trained on, as events for a new snapshot."""

from lora_rlhf.preferences.events import Judgement, Task
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Recipe, Source, is_store
from lora_rlhf.runs import Run

_SIMULATED = "rank/rankings.jsonl"


def earlier_source(base: Run, recipe: Recipe) -> Source | None:
    """Where the rankings of a run lie that its reward model has learned from; None: nowhere."""
    simulated = base.path / _SIMULATED
    if recipe.rank is not None:
        return Source(path=str(simulated)) if simulated.is_file() else None
    return recipe.data.rankings


def earlier_events(base: Run, recipe: Recipe) -> list[Task | Judgement]:
    """Those rankings as imported tasks and judgements, the same at every call; [] for none.

    Of a run that was retrained in the app, its own imported ones alone: what people judged there
    stands in the app's store, unless they have taken it back since.

    Raises:
        UserError: they cannot be read any more.
    """
    source = earlier_source(base, recipe)
    if source is None:
        return []
    if source.path is not None and is_store(source.path):
        return _imported_in(source.path)
    from lora_rlhf.data.sources import load_rankings, require
    from lora_rlhf.preferences.imports import to_events

    name = f"import:{base.name}"
    tasks, judgements = {}, {}
    for ranking in require(load_rankings(source)):
        task, judgement = to_events(ranking, name, name)
        # Without the time of the import, the same rankings make the same snapshot.
        tasks[task.id] = task.model_copy(update={"ts": 0.0})
        timeless = {"ts": 0.0, "shown_ts": 0.0, "done_ts": 0.0}
        judgements[judgement.id] = judgement.model_copy(update=timeless)
    return [*tasks.values(), *judgements.values()]


def _imported_in(path: str) -> list[Task | Judgement]:
    with Store.open(path, create=False, read_only=True) as store:
        imported = [j for j in store.judged() if j.task.sampler.strategy == "import"]
    tasks = {j.task.task_id: j.task for j in imported}
    return [*tasks.values(), *(j.judgement for j in imported)]
