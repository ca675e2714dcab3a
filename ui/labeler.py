"""A labeler made of a formula, who uses the app's own handlers: the whole loop, once, for real.

    python -m ui.labeler --run quickstart --rankings 300 --comparisons 256

1. ranks answers of the run's policy to training prompts, K at a time (the Rank tab), as a noisy
   human would: the judge's utility plus Gumbel noise that leaves so much agreement with the judge;
2. retrains reward model and policy, each arm in its turn (the Retrain tab), and adopts the result:
     votes     the reward model goes on with the new rankings, then the policy by it
     control   the policy goes on as long, by the reward model as it was: what an arm gains over
               this is what the votes were worth
     fresh     a fresh reward model from the new and the earlier rankings, and a fresh policy
3. compares each new policy with the old one, and with the control's, on held-out prompts (the
   Compare tab, blind), once as the judge without noise and once as the noisy labeler;
4. prints win rates with their 95 % intervals, and writes them to --report.

Everything goes through the store, and a loop that was stopped goes on where it was. The seed is of
the labeler's noise and of training; prompts, sides and answers are drawn by the app, which has no
seed, so that no two loops are alike.
"""

import json
import random
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lora_rlhf.errors import ConfigError, TrainingError, UserError
from lora_rlhf.preferences.judges import Judge, find_judge
from lora_rlhf.preferences.ratings import PairRate, leaderboard
from lora_rlhf.runs import Json, find_run, write_atomically
from ui.people import Person
from ui.retraining import Scope, Wishes
from ui.scripted import Labeler, Tell, measured_noise
from ui.studio import Settings, Studio
from ui.trainer import adopt, start

_LOOK_SECONDS = 1.0
_SCOPE: Scope = "reward + PPO"


def arms_of(base: str, seed: int) -> dict[str, Wishes]:
    """What is trained, by name."""
    wishes = Wishes(base, _SCOPE, earlier=False, force=True, overrides=(f"seed={seed}",))
    # The rankings it knows, for the shortest time, in steps too small to move a score.
    still = ("reward.epochs=0.01", "reward.learning_rate=1e-12")
    return {
        "votes": wishes,
        "control": replace(
            wishes, votes=False, earlier=True, overrides=(*wishes.overrides, *still)
        ),
        "fresh": replace(wishes, go_on=False, earlier=True),
    }


# -- the loop -----------------------------------------------------------------------------------


@dataclass
class Loop:
    """One whole loop, kept in a report, so that it can go on.

    Attributes:
        studio: the app.
        base: name of the run.
        judge: of utility.
        report: where results are written.
        seed: of noise and training.
        found: the results so far.
    """

    studio: Studio
    base: str
    judge: Judge
    report: Path
    seed: int
    found: Json

    def keep(self, **facts: Any) -> None:
        """Add to the report."""
        self.found |= facts
        write_atomically(self.report, json.dumps(self.found, indent=1) + "\n")

    def labeler(self, name: str, noise: float) -> Labeler:
        """Somebody of this name, whose noise goes on from the number of their votes."""
        votes = self.studio.judged()
        count = sum(j.judgement.annotator == name for j in votes)
        chance = random.Random(f"{self.seed}/{name}/{count}")
        return Labeler(self.studio, Person(name, False, "labeler"), self.judge, noise, chance)

    def rank(self, count: int, answers: int, agreement: float, tell: Tell) -> None:
        """Store rankings of the base run's policy, and keep the noise that they were given."""
        policy = f"{self.base}/policy"
        if "noise" not in self.found:
            noise = measured_noise(self.studio, self.judge, policy, answers, agreement, tell)
            self.keep(noise=noise)
        self.labeler("labeler", self.found["noise"]).rank(policy, answers, count, tell)

    def train(self, arm: str, wishes: Wishes, tell: Tell) -> str:
        """Retrain and adopt; the new run's name. One that was adopted already is not made again.

        Raises:
            TrainingError: it failed.
        """
        made = self.found.setdefault("runs", {})
        if arm in made:
            return str(made[arm])
        jobs, admin = self.studio.jobs, Person("labeler", True, "labeler")
        if not jobs.job().is_at_work and jobs.job().state != "done":
            start(self.studio, admin, wishes)
        while jobs.job().is_at_work:
            progress = jobs.progress()
            tell(f"{arm}: {progress.stage or jobs.job().state}", progress.step, progress.total)
            time.sleep(_LOOK_SECONDS)
        job = jobs.job()
        if job.state != "done":
            raise TrainingError(f"{job.name} {job.state}: {job.error}\n{jobs.log_tail(2000)}")
        adopt(self.studio, admin)
        kept = {}
        for key, result in (("accuracies", job.result), ("choosing", job.choosing)):
            new = None if result is None else result.model_dump()
            kept[key] = self.found.get(key, {}) | {arm: new}
        self.keep(runs=made | {arm: job.name}, **kept)
        return job.name

    def contest(self, new: str, old: str, count: int, tell: Tell) -> None:
        """Compare the policies of two arms, without noise and with it, and keep the rates.

        Args:
            new: name of the arm.
            old: of the other; "old": the run that all started from.
            count: of comparisons, each on a prompt of its own.
            tell: hears of progress.
        """
        rates = self.found.get("win_rates", {})
        runs = {"old": self.base} | self.found["runs"]
        most = min(count, len(self.studio.engine.pool("heldout")))
        for manner, noise in (("judge", 0.0), ("labeler", self.found["noise"])):
            title = f"{new} against {old}, {manner}"
            person = title.replace(" ", "-").replace(",", "")
            policies = f"{runs[new]}/policy", f"{runs[old]}/policy"
            self.labeler(person, noise).compare(*policies, most, title, tell)
            rates[title] = self.rate(person, policies[0])
            self.keep(win_rates=rates)

    def rate(self, person: str, new: str) -> Json:
        """The win rate of one adapter in the comparisons of a person."""
        judged = [j for j in self.studio.judged() if j.judgement.annotator == person]
        (pair,) = leaderboard(judged).pairs
        return _as_seen_by(new, pair)


def _as_seen_by(new: str, pair: PairRate) -> Json:
    rate, first = pair.rate, pair.a == new
    assert rate.share is not None
    return {
        "win_rate": rate.share if first else 1 - rate.share,
        "ci": [rate.low, rate.high] if first else [1 - rate.high, 1 - rate.low],
        "wins": pair.wins if first else pair.losses,
        "losses": pair.losses if first else pair.wins,
        "ties": pair.ties,
        "prompts": rate.clusters,
    }


# -- the command --------------------------------------------------------------------------------

Run = Annotated[str, typer.Option(help="To start from: its name, or its directory.")]
Rankings = Annotated[int, typer.Option(min=1, help="Of its policy's answers.")]
Answers = Annotated[int, typer.Option(min=2, max=9, help="K of each ranking.")]
Comparisons = Annotated[int, typer.Option(min=2, help="Each; at most the held-out prompts.")]
ArmNames = Annotated[str, typer.Option(help="Of votes, control and fresh, with commas.")]
Overrides = Annotated[str, typer.Option(help="key=value for the recipe of every arm.")]
JudgeName = Annotated[str, typer.Option(help="builtin:gold, vader, or package.module:function.")]
Agreement = Annotated[float, typer.Option(min=0.51, max=1.0, help="Of labeler and judge.")]
Location = Annotated[str, typer.Option(help="Of votes: a path, or a postgresql:// URL.")]


def main(
    run: Run = "quickstart",
    rankings: Rankings = 300,
    answers: Answers = 4,
    comparisons: Comparisons = 300,
    arms: ArmNames = "votes,control",
    overrides: Overrides = "",
    judge: JudgeName = "builtin:gold",
    agreement: Agreement = 0.75,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runs_dir: Path = Path("runs"),
    store: Location = "labeler.db",
    report: Path = Path("labeler.json"),
) -> None:
    """Play a labeler through the whole loop."""
    console = Console(highlight=False)
    found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    try:
        base = find_run(run, runs_dir)
        wanted = arms_of(base.name, seed)
        chosen = [name.strip() for name in arms.split(",")]
        if not set(chosen) <= set(wanted):
            raise ConfigError(f"--arms is {arms}. Allowed: any of {', '.join(wanted)}.")
        made = [find_run(name, runs_dir) for name in found.get("runs", {}).values()]
        settings = Settings(overlap=0.0, repeats=0.0)
        studio = Studio.open([base, *made], store, runs_dir, settings)
        loop = Loop(studio, base.name, find_judge(judge), report, seed, found)
        try:
            with _bars(console) as tell:
                _wait_for(studio)
                loop.rank(rankings, answers, agreement, tell)
                for name in chosen:
                    wishes = wanted[name]
                    more = (*shlex.split(overrides), *wishes.overrides)
                    loop.train(name, replace(wishes, overrides=more), tell)
                    loop.contest(name, "old", comparisons, tell)
                for name in chosen:
                    if name != "control" and "control" in chosen:
                        loop.contest(name, "control", comparisons, tell)
        finally:
            studio.close()
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    _show(console, found)


def _wait_for(studio: Studio) -> None:
    while studio.engine.state() != "ready":
        if not studio.engine.state().startswith("The backbone is still"):
            raise ConfigError(studio.engine.state())
        time.sleep(_LOOK_SECONDS)


@contextmanager
def _bars(console: Console) -> Iterator[Tell]:
    """One bar for each thing that is done, with the time left."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total or None)
            progress.update(bars[what], completed=done, total=total or None)

        yield tell


def _show(console: Console, found: Json) -> None:
    """The report as tables."""
    columns = ("arm", "reward model before", "after")
    accuracies = Table(*columns, "change", title="On held-out votes")
    for arm, result in found.get("accuracies", {}).items():
        cells = [_interval(result, key) for key in ("before", "after", "change")]
        accuracies.add_row(arm, *cells)
    choosing = Table(*columns, title="On the rankings that also chose the step")
    for arm, result in found.get("choosing", {}).items():
        choosing.add_row(arm, *(_interval(result, key) for key in ("before", "after")))
    rates = Table("policies, judged by", "win rate of the first", "prompts", "ties")
    for name, rate in found.get("win_rates", {}).items():
        low, high = rate["ci"]
        said = f"{rate['win_rate']:.1%} ({low:.1%} to {high:.1%})"
        rates.add_row(name, said, str(rate["prompts"]), str(rate["ties"]))
    console.print(accuracies, choosing, rates)


def _interval(result: Json | None, key: str) -> str:
    share = None if result is None else result[key]
    if share is None:
        return "not measured"
    return f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"


if __name__ == "__main__":
    typer.run(main)
