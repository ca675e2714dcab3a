"""The gold protocol: what "working" means, read off the finished runs of `protocol_arms`.

Criteria (a) to (h) are those of the project's study of what can be proven without a big model: a
hidden programmatic utility, gold, plays the human, so that the truth about every arm is known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_rlhf.evaluation.best_of_n import (
    Drawn,
    best_of_n_kl,
    expected_best,
    kept,
)
from lora_rlhf.evaluation.choosing import Chooser, Floats
from lora_rlhf.evaluation.frontier import POLICIES, START, path_of, spreads_of
from lora_rlhf.evaluation.protocol_arms import BASE, BEST_OF, TRAINED, Job, is_done
from lora_rlhf.evaluation.watch import mean_interval, since_the_peak
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run

QUORUM = 0.75  # of seeds, criterion (h): three of four
_CHOOSER = Chooser()
Figures = dict[str, float]


@dataclass(frozen=True)
class ArmFacts:
    """One arm of one seed on the held-out prompts.

    Attributes:
        gold: utility, one value a prompt, (p,).
        proxy: score of the reward model, (p,).
        win_rate: chance that its answer is of more gold than one of `sft`, ties half, (p,).
        kl: nats a response from `sft`.
        eos_rate: share of answers that ended by themselves.
        tokens: mean length.
        nats: negative log-likelihood a token of held-out plain text; None for best-of-n.
    """

    gold: Floats
    proxy: Floats
    win_rate: Floats
    kl: float
    eos_rate: float
    tokens: float
    nats: float | None = None


@dataclass(frozen=True)
class SeedFacts:
    """All arms of one seed that have ended.

    Attributes:
        seed: which.
        spread: standard deviation of gold of single answers of `sft`, the unit "sd".
        arms: by name, `sft` and best-of-n among them.
        reward: what the reward stage found.
        free: the frontier of ppo-free and its path; {} without it.
        kl_coef: what a nat of KL cost the PPO arms, in gold.
    """

    seed: int
    spread: float
    arms: Mapping[str, ArmFacts]
    reward: Mapping[str, Any]
    free: Mapping[str, float]
    kl_coef: float = 0.0

    def gain(self, arm: str, over: str = "sft") -> Floats:
        """Gold gained over another arm, in sd, (p,)."""
        return (self.arms[arm].gold - self.arms[over].gold) / self.spread


def read_seed(folder: Path, seed: int) -> SeedFacts | None:
    """The facts of a seed from its runs; None before its base has ended."""
    if not is_done(folder, Job(seed, BASE)):
        return None
    base, ppo = Run(folder / Job(seed, BASE).name), load_recipe(str(folder / "recipe.yaml")).ppo
    assert ppo is not None
    summary = base.summary()
    start = kept(base, START)["sft"]
    assert start.gold is not None, "the protocol's recipe has a judge"
    arms = {"sft": _of_policy(start, start, summary["protocol"]["nats_a_token"])}
    arms |= {f"best-of-{n}": _of_best(start, n) for n in BEST_OF if n <= start.count}
    free: dict[str, float] = {}
    for arm in TRAINED:
        if not is_done(folder, Job(seed, arm)):
            continue
        run = Run(folder / Job(seed, arm).name)
        policies = kept(run, POLICIES)
        *_, last = policies.values()
        arms[arm] = _of_policy(last, start, run.summary()["protocol"]["nats_a_token"])
        if arm == "ppo-free":
            free = _of_free(policies, start, run.summary()["frontier"])
    spread = float(start.gold.std())
    return SeedFacts(seed, spread, arms, summary["reward"], free, ppo.kl_coef)


def _of_policy(drawn: Drawn, start: Drawn, nats: float) -> ArmFacts:
    assert drawn.gold is not None
    return ArmFacts(
        gold=drawn.gold.mean(-1),
        proxy=_CHOOSER.combine(drawn.scores).mean(-1),
        win_rate=_wins(drawn.gold, start).mean(-1),
        kl=float(drawn.kl.mean()),
        eos_rate=float(drawn.ended.mean()),
        tokens=float(drawn.tokens.mean()),
        nats=nats,
    )


def _of_best(start: Drawn, n: int) -> ArmFacts:
    scores = _CHOOSER.combine(start.scores)
    assert start.gold is not None

    def at_best(values: Floats) -> Floats:
        return expected_best(scores, values, n)

    return ArmFacts(
        gold=at_best(start.gold),
        proxy=at_best(scores),
        win_rate=at_best(_wins(start.gold, start)),
        kl=best_of_n_kl(n),
        eos_rate=float(at_best(start.ended).mean()),
        tokens=float(at_best(start.tokens).mean()),
    )


def _wins(gold: Floats, start: Drawn) -> Floats:
    """Share of sft's answers to the same prompt that each answer beats, ties half, (p, n)."""
    assert start.gold is not None
    mine, theirs = gold[:, :, None], start.gold[:, None, :]
    shares: Floats = ((mine > theirs) + 0.5 * (mine == theirs)).mean(-1)
    return shares


def _of_free(
    policies: Mapping[str, Drawn], start: Drawn, frontier: Mapping[str, Any]
) -> dict[str, float]:
    """How the unpenalised run went on after its height of gold, in sd, and Gao's fit."""
    first = next(iter(policies.values())).count
    stages = {0: start.first(first)}
    stages |= {int(name.removeprefix("step-")): drawn for name, drawn in policies.items()}
    change = since_the_peak(path_of(stages, _CHOOSER), *spreads_of(start, _CHOOSER))
    law = frontier["fits"]["ppo"]["gold"]
    return {
        "gold since peak": change.truth.value,
        "at most": change.truth.high,
        "proxy since peak": change.proxy.value,
        "at least": change.proxy.low,
        "R2": math.nan if law is None else law["r2"],
    }


# -- criteria -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criterion:
    """One of (a) to (g): figures of a seed, and whether they suffice.

    Attributes:
        letter: of the protocol.
        what: it demands.
        figures: of a seed; what is missing there raises KeyError.
        holds: for figures of a seed, or for their means over seeds; None: cannot be said.
    """

    letter: str
    what: str
    figures: Callable[[SeedFacts], Figures]
    holds: Callable[[Figures], bool | None]


def _reward(facts: SeedFacts) -> Figures:
    return {
        "accuracy": facts.reward["accuracy"],
        "Bayes": facts.reward["bayes_accuracy"],
        "longer": facts.reward["longer_baseline"],
    }


def _better(facts: SeedFacts) -> Figures:
    gain = mean_interval(facts.gain("ppo"))
    won = float(facts.arms["ppo"].win_rate.mean())
    return {"gain sd": gain.value, "at least": gain.low, "win rate": won}


def _against_best_of_n(facts: SeedFacts) -> Figures:
    return {
        "over best-of-4 sd": float(facts.gain("ppo", "best-of-4").mean()),
        "over best-of-16 sd": float(facts.gain("ppo", "best-of-16").mean()),
        "KL ratio": facts.arms["ppo"].kl / best_of_n_kl(16),
    }


def _healthy(facts: SeedFacts) -> Figures:
    arm, sft = facts.arms["ppo"], facts.arms["sft"]
    return {"KL": arm.kl, "EOS": arm.eos_rate, "length change": arm.tokens / sft.tokens - 1.0}


def _turned_over(facts: SeedFacts) -> Figures:
    return {key: facts.free[key] for key in ("at most", "at least", "R2")} | {
        "gold since peak sd": facts.free["gold since peak"],
        "proxy since peak sd": facts.free["proxy since peak"],
    }


def _tax(facts: SeedFacts) -> Figures:
    perplexity = {a: math.exp(facts.arms[a].nats or 0.0) for a in ("sft", "ppo", "ppo-ptx")}
    return {
        "perplexity sft": perplexity["sft"],
        "ppo": perplexity["ppo"],
        "ptx": perplexity["ppo-ptx"],
        "gain sd": float(facts.gain("ppo").mean()),
        "gain ptx sd": float(facts.gain("ppo-ptx").mean()),
    }


def _regained(figures: Figures) -> bool | None:
    lost, gain = figures["ppo"] - figures["perplexity sft"], figures["gain sd"]
    if lost <= 0 or gain <= 0:
        return None  # there is nothing to regain, or nothing to pay with
    regained = (figures["ppo"] - figures["ptx"]) / lost
    return regained >= 0.5 and (gain - figures["gain ptx sd"]) / gain <= 0.1


def _controls(facts: SeedFacts) -> Figures:
    over = float(facts.gain("ppo-gold", "ppo").mean())
    dearer = facts.arms["ppo-gold"].kl - facts.arms["ppo"].kl
    return {
        "gold reward over ppo sd": over,
        # What PPO on gold maximises, and is a bound of: at unequal KL gold alone is not.
        "over ppo less KL's cost sd": over - facts.kl_coef * dearer / facts.spread,
        "random reward sd": float(facts.gain("ppo-random").mean()),
    }


CRITERIA: tuple[Criterion, ...] = (
    Criterion(
        "a",
        "reward model: accuracy >= Bayes - 5 points, > always longer + 5 points",
        _reward,
        lambda f: f["accuracy"] >= f["Bayes"] - 0.05 and f["accuracy"] > f["longer"] + 0.05,
    ),
    Criterion(
        "b",
        "PPO over SFT: gold >= 0.5 sd, interval above 0, win rate >= 65%",
        _better,
        lambda f: f["gain sd"] >= 0.5 and f["at least"] > 0 and f["win rate"] >= 0.65,
    ),
    Criterion(
        "c",
        "PPO >= best-of-4, and best-of-16 - 0.3 sd at <= 4 times its KL",
        _against_best_of_n,
        lambda f: (
            f["over best-of-4 sd"] >= 0 and f["over best-of-16 sd"] >= -0.3 and f["KL ratio"] <= 4
        ),
    ),
    Criterion(
        "d",
        "PPO: KL 2 to 15 nats, EOS >= 95%, length within 25% of SFT",
        _healthy,
        lambda f: 2 <= f["KL"] <= 15 and f["EOS"] >= 0.95 and abs(f["length change"]) <= 0.25,
    ),
    Criterion(
        "e",
        "without KL penalty gold turns over while the proxy rises; d(a - b ln d) fits, R2 >= 0.9",
        _turned_over,
        lambda f: f["at most"] < 0 and f["at least"] > 0 and f["R2"] >= 0.9,
    ),
    Criterion(
        "f",
        "ptx regains >= 50% of the perplexity lost at <= 10% of the gold gained",
        _tax,
        _regained,
    ),
    Criterion(
        "g",
        "gold as reward beats the proxy; a random reward moves gold by < 0.1 sd",
        _controls,
        lambda f: f["gold reward over ppo sd"] > 0 and abs(f["random reward sd"]) < 0.1,
    ),
)


@dataclass(frozen=True)
class Row:
    """A criterion's row of the table.

    Attributes:
        letter: a to h.
        what: it demands.
        seeds: for each seed, whether it holds (None: not known) and its figures.
        passed: over all seeds; None while one is missing.
        figures: means over seeds.
    """

    letter: str
    what: str
    seeds: list[tuple[bool | None, Figures]]
    passed: bool | None
    figures: Figures


def judge(seeds: Sequence[SeedFacts | None]) -> list[Row]:
    """The table: each criterion for each seed, and on the means over all seeds.

    (h) counts the seeds in which PPO succeeded by (b); three of four suffice. No seed is left out:
    while one is not finished nothing has passed.
    """
    rows = [_row(criterion, seeds) for criterion in CRITERIA]
    succeeded = next(row for row in rows if row.letter == "b")
    held = [held for held, _ in succeeded.seeds]
    share = sum(h is True for h in held) / len(held)
    done = None not in held
    figures = {"seeds": share} if done else {}
    each: list[tuple[bool | None, Figures]] = [(h, {}) for h in held]
    passed = share >= QUORUM if done else None
    return [*rows, Row("h", "three of four seeds succeed by (b)", each, passed, figures)]


def _row(criterion: Criterion, seeds: Sequence[SeedFacts | None]) -> Row:
    each: list[tuple[bool | None, Figures]] = []
    for facts in seeds:
        try:
            figures = {} if facts is None else criterion.figures(facts)
        except KeyError:  # an arm that has not ended
            figures = {}
        each.append((criterion.holds(figures) if figures else None, figures))
    if not all(figures for _, figures in each):
        return Row(criterion.letter, criterion.what, each, None, {})
    means = {k: float(np.mean([figures[k] for _, figures in each])) for k in each[0][1]}
    return Row(criterion.letter, criterion.what, each, criterion.holds(means), means)
