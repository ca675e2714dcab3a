"""Evaluate a run after it has ended: its adapters put back in place, then judged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lora_rlhf.continuing import refuse_if_running, ways_on
from lora_rlhf.errors import CheckpointError, ConfigError, DataError
from lora_rlhf.evaluation import contest, labelers
from lora_rlhf.evaluation.arms import parse_arms
from lora_rlhf.evaluation.choosing import chooser_of
from lora_rlhf.evaluation.frontier import frontier_of_contest, watch_votes
from lora_rlhf.evaluation.judging import parse_judge
from lora_rlhf.evaluation.probes import examine_health, policy_scores
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.memory import forget_measurements, plan
from lora_rlhf.pipeline import load_finished_adapters
from lora_rlhf.quiet import hush
from lora_rlhf.recipe import STAGES, Evaluate, Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.report import write_report
from lora_rlhf.runs import Json, Run
from lora_rlhf.stages import reward
from lora_rlhf.training.material import all_heldout_prompts
from lora_rlhf.training.offline import Task, fit
from lora_rlhf.training.reward_report import Group, score_groups
from lora_rlhf.training.session import Session

RESULTS = (*contest.KEYS, "suites", "labelers", "health", "frontier")
"""Keys of summary.json that say how good the run is."""


@dataclass(frozen=True)
class Wanted:
    """What to find out; None and () leave it to the recipe.

    Attributes:
        arms: as a person writes them.
        judges: likewise; the first is the main one.
        reference: the arm that all others are compared with.
        prompts: held-out ones.
        suite: public sets instead of win rates, unless arms' win rates are asked for as well.
        suite_data: folder of their files.
        limit: most documents of a set.
        labelers: a store whose annotators are split, instead of win rates likewise.
        groups: of annotators.
        frontier: N of best-of-n, instead of win rates likewise.
        rewards: reward adapters that score and choose, as `chooser_of` takes them.
        rule: of several of them.
    """

    arms: Sequence[str] | None = None
    judges: Sequence[str] = ()
    reference: str | None = None
    prompts: int | None = None
    suite: str | None = None
    suite_data: Path | None = None
    limit: int | None = None
    labelers: str | None = None
    groups: int = 5
    frontier: int | None = None
    rewards: Sequence[str] = ()
    rule: str = "mean"

    @property
    def win_rates(self) -> bool:
        """Whether arms are to be judged."""
        named = self.judges or self.prompts is not None or self.reference is not None
        others = (self.suite, self.labelers, self.frontier)
        return bool(named) or others == (None, None, None)


def evaluate_run(run: Run, wanted: Wanted, console: Console, force: bool = False) -> Json:
    """Find out what is wanted of a run; results go into its summary and report.

    Stopped at any moment, the same call goes on where it was.

    Returns:
        The keys of the summary that say how good the run is.

    Raises:
        UserError: whatever there is to say.
    """
    hush()
    refuse_if_running(run, force)
    recipe = load_recipe(str(run.path / "recipe.yaml"), finished=STAGES)
    _check(wanted)
    if recipe.sft is not None and "sft" not in run.adapters():
        raise CheckpointError(f"{run.path} has no adapter sft yet. {ways_on(run)}")
    with _status_kept(run, recipe):
        session = open_session(recipe, run, console)
        chooser = None
        if wanted.rewards:
            chooser = chooser_of(session.backbone, run, wanted.rewards, wanted.rule)
        settings = _settings(session, wanted)
        held = contest.open_contest(session, settings, wanted.arms, wanted.judges, chooser)
        _require_health(session)
        if wanted.win_rates:
            contest.hold(held)
        if wanted.frontier is not None:
            frontier_of_contest(held, wanted.frontier)
        watch_votes(run)
        if wanted.suite is not None:
            # Here, since lm-eval is an extra that few have.
            from lora_rlhf.evaluation.suites.public import run_suite

            found = run_suite(
                session, wanted.suite, held.arms, data=wanted.suite_data, limit=wanted.limit
            )
            run.write_json("summary.json", run.summary() | {"suites": found})
        if wanted.labelers is not None:
            groups = labelers.cross_validate(session, wanted.labelers, wanted.groups, _fit_reward)
            run.write_json("summary.json", run.summary() | {"labelers": {"groups": groups}})
    write_report(run)
    summary = run.summary()
    return {"run": run.name} | {key: summary[key] for key in RESULTS if key in summary}


def _check(wanted: Wanted) -> None:
    """Find what means nothing before anything is loaded, let alone decoded.

    Raises:
        UserError: an arm, a judge, a suite or a store of annotators that is none.
    """
    if wanted.arms is not None:
        parse_arms(wanted.arms, wanted.reference or "sft")
    for judge in wanted.judges:
        parse_judge(judge)
    if wanted.suite is not None:
        from lora_rlhf.evaluation.suites.tasks import tasks_of

        tasks_of(wanted.suite)
    if wanted.labelers is not None:
        labelers.read_split(wanted.labelers, wanted.groups)


def open_session(recipe: Recipe, run: Run, console: Console) -> Session:
    """A session over the run's backbone with all its adapters, frozen.

    Raises:
        CheckpointError: no `sft`, or an adapter of another backbone.
    """
    memory = plan(recipe)
    forget_measurements()
    backbone = Backbone.load(recipe.base)
    session = Session.planned(recipe, run, backbone, console, memory, force=True)
    load_finished_adapters(session, [])
    return session


def _require_health(session: Session) -> None:
    """Make the health card of a reward model that was trained before there were cards."""
    recipe, adapters, summary = session.recipe, session.backbone.adapters, session.run.summary()
    ranked = recipe.rank is not None or recipe.data.rankings is not None
    if "health" in summary or "reward" not in adapters.heads or not ranked:
        return
    try:
        _, heldout = reward.rankings(session)
    except DataError as error:  # the store may have moved since; that stops no evaluation
        session.tell(f"evaluate: no health card of the reward model. {error}")
        return
    scores = [s.tolist() for s in score_groups(session, heldout)]
    card = examine_health(session, heldout, scores)
    if "policy" in adapters.names:
        card["scores"] = policy_scores(session)
    session.run.write_json("summary.json", session.run.summary() | {"health": card})


def _settings(session: Session, wanted: Wanted) -> Evaluate:
    """The recipe's settings, or as many prompts as there are, with what is wanted otherwise."""
    settings = session.recipe.evaluate
    if settings is None:
        there = len(all_heldout_prompts(session))
        settings = Evaluate(prompts=max(1, min(Evaluate().prompts, there)))
    changes: dict[str, object] = {}
    if wanted.prompts is not None:
        changes["prompts"] = wanted.prompts
    if wanted.reference is not None:
        changes["reference"] = wanted.reference
    return settings.model_copy(update=changes)


@contextmanager
def _status_kept(run: Run, recipe: Recipe) -> Iterator[None]:
    """What the run was, it is afterwards: an evaluation takes nothing from it.

    One that was killed leaves `running`; a run whose stages have all ended was finished before.
    """
    before = run.status()
    state = before.get("state", "stopped")
    if state == "running" and all(run.is_complete(s) for s in recipe.stages if s != "evaluate"):
        state = "finished"
    try:
        yield
    finally:
        run.set_status(
            "stopped" if state == "running" else state,
            before.get("stage", ""),
            before.get("step", 0),
            before.get("total", 0),
            before.get("error", ""),
        )


def _fit_reward(session: Session, train: list[Group], heldout: list[Group]) -> None:
    """Train `reward` anew from `sft` on some rankings, as the stage does."""
    settings = session.recipe.reward
    if settings is None:
        raise ConfigError(
            "--labelers trains reward models, and the run's recipe has no reward section. Take a "
            "run that has one."
        )
    reward.begin(session)
    task = Task(
        stage="reward",
        lengths=[g.tokens for g in train],
        counts=[1] * len(train),
        loss=lambda items: reward.group_loss(session, [train[i] for i in items]),
        evaluate=lambda: reward.heldout_metrics(session, heldout),
    )
    fit(session, settings, task)
    session.backbone.adapters.freeze("reward")
