"""Reward against the distance from `sft`: best-of-n and PPO in one plot, with Gao's two laws."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lora_rlhf.evaluation.best_of_n import (
    Drawn,
    Plan,
    best_of_n_kl,
    draw,
    expected_best,
    kept,
)
from lora_rlhf.evaluation.choosing import Chooser, Floats
from lora_rlhf.evaluation.contest import Contest
from lora_rlhf.evaluation.watch import (
    Interval,
    Stage,
    Watch,
    mean_interval,
    watch_stages,
    watch_win_rate,
)
from lora_rlhf.runs import Run
from lora_rlhf.training.material import TokenisedPrompt
from lora_rlhf.training.session import Session

Law = Literal["best_of_n", "ppo"]
START, POLICIES = "evaluate/best_of_n.jsonl", "evaluate/policies.jsonl"
_FEWEST = 4  # points with d > 0 that two coefficients are fitted to


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    Attributes:
        alpha: of d(alpha - beta d), or of d(alpha - beta ln d).
        beta: of the same.
        r2: 1 - residual / total sum of squares.
        peak: the d at which the law is highest; None where it never turns over.
        points: that it was fitted to; those of best-of-n are made of the same answers.
    """

    alpha: float
    beta: float
    r2: float
    peak: float | None
    points: int

    def as_dict(self) -> dict[str, float | None]:
        """As summary.json holds it."""
        return asdict(self)


def fit(law: Law, d: Sequence[float], gained: Sequence[float]) -> Fit | None:
    """Least squares of a law of over-optimisation; both are linear in alpha and beta.

    best_of_n: d(alpha - beta d), highest at d = alpha / (2 beta).
    ppo: d(alpha - beta ln d), highest at d = exp(alpha / beta - 1).

    Args:
        law: which.
        d: square roots of KL in nats, >= 0.
        gained: reward over that of the start, at which d = 0.

    Returns:
        None with fewer than four points off the start, or all at one place.

    Source: Gao et al. 2022, arXiv:2210.10760.
    """
    points = [(x, y) for x, y in zip(d, gained, strict=True) if x > 0]
    if len(points) < _FEWEST or len({x for x, _ in points}) < 2:
        return None
    x, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    design = np.stack([x, -x * (x if law == "best_of_n" else np.log(x))], 1)
    (alpha, beta), *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = float(((design @ [alpha, beta] - y) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    peak = None
    if beta > 0:
        peak = alpha / (2 * beta) if law == "best_of_n" else math.exp(min(alpha / beta - 1, 700.0))
    r2 = 1.0 - residual / total if total > 0 else 0.0
    return Fit(float(alpha), float(beta), r2, None if peak is None else float(peak), len(points))


# -- points -------------------------------------------------------------------------------------


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and the most itself."""
    powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return powers if powers[-1] == most else [*powers, most]


def best_of_n_points(
    drawn: Drawn, chooser: Chooser, counts: Sequence[int], arm: str = "sft"
) -> list[dict[str, Any]]:
    """A point for each n, all estimated from the same N answers."""
    scores = chooser.combine(drawn.scores)
    points = []
    for n in counts:
        point = {"kind": "best_of_n", "arm": arm, "n": n, "kl": best_of_n_kl(n)}
        gold = None if drawn.gold is None else expected_best(scores, drawn.gold, n)
        points.append(point | _heights(expected_best(scores, scores, n), gold))
    return points


def policy_points(
    stages: Mapping[int, Drawn], chooser: Chooser, arm: str = "policy"
) -> list[dict[str, Any]]:
    """A point for each kept policy, by its round; KL is the mean log-ratio to `sft`."""
    points = []
    for step, drawn in stages.items():
        kl = mean_interval(drawn.kl.mean(-1))
        point = {"kind": "ppo", "arm": arm, "step": step, "kl": kl.value}
        gold = None if drawn.gold is None else drawn.gold.mean(-1)
        points.append(point | _heights(chooser.combine(drawn.scores).mean(-1), gold))
    return points


def _heights(proxy: Floats, gold: Floats | None) -> dict[str, Any]:
    """Means over prompts with intervals, from one value a prompt, (p,)."""
    score = mean_interval(proxy)
    found: dict[str, Any] = {"proxy": score.value, "proxy_ci": [score.low, score.high]}
    utility = None if gold is None else mean_interval(gold)
    found["gold"] = None if utility is None else utility.value
    found["gold_ci"] = None if utility is None else [utility.low, utility.high]
    return found


def fits_of(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Both laws for proxy and gold, over the first point of each kind, which is the start."""
    laws: tuple[Law, ...] = ("best_of_n", "ppo")
    fits: dict[str, Any] = {}
    for law in laws:
        mine = [p for p in points if p["kind"] == law]
        fits[law] = {}
        for height in ("proxy", "gold"):
            known = bool(mine) and mine[0][height] is not None
            found = _fit_points(law, mine, height) if known else None
            fits[law][height] = None if found is None else found.as_dict()
    return fits


def _fit_points(law: Law, points: Sequence[Mapping[str, Any]], height: str) -> Fit | None:
    start = points[0][height]
    d = [math.sqrt(max(p["kl"], 0.0)) for p in points]
    return fit(law, d, [p[height] - start for p in points])


def watch_policies(stages: Mapping[int, Drawn], chooser: Chooser, start: Drawn) -> Watch:
    """The over-optimisation watch over kept policies; `start` gives the units."""
    if start.gold is None:
        return Watch(
            False, "Not watched: nothing but the reward model has judged. Give evaluate.judge."
        )
    return watch_stages(path_of(stages, chooser), *spreads_of(start, chooser))


def path_of(stages: Mapping[int, Drawn], chooser: Chooser) -> list[Stage]:
    """What proxy and gold say of each kept policy, a prompt."""
    return [
        Stage(f"step {step}", chooser.combine(d.scores).mean(-1), d.gold.mean(-1))
        for step, d in stages.items()
        if d.gold is not None
    ]


def spreads_of(start: Drawn, chooser: Chooser) -> tuple[float, float]:
    """Standard deviations of the start's single answers by proxy and gold."""
    assert start.gold is not None
    return (
        max(float(chooser.combine(start.scores).std()), 1e-9),
        max(float(start.gold.std()), 1e-9),
    )


# -- running ------------------------------------------------------------------------------------


def run_frontier(
    session: Session,
    prompts: Sequence[TokenisedPrompt],
    most: int,
    *,
    chooser: Chooser | None = None,
    judge: str | None = None,
    temperature: float = 1.0,
    answers: int = 1,
    stage: str = "evaluate",
) -> dict[str, Any]:
    """Draw, fit and watch; writes `frontier` into the summary and returns it.

    Args:
        session: with `sft` and the choosing adapters on its backbone.
        prompts: held out.
        most: N of best-of-n, 2 to 64.
        chooser: unset, the adapter `reward`.
        judge: as in `evaluate.judge`.
        temperature: of sampling.
        answers: of each kept policy a prompt.
        stage: that the progress is shown under.

    Raises:
        CheckpointError: no reward adapter, or a kept policy that does not fit.
    """
    began, chooser = time.monotonic(), chooser or Chooser()
    plan = Plan({"sft": "sft"}, most, temperature, chooser.members, judge)
    start = draw(session, START, plan, prompts, stage)["sft"]
    points = best_of_n_points(start, chooser, counts_up_to(most))
    stages = {0: start.first(answers)}
    with kept_policies(session) as policies:
        if policies:
            named = {f"step-{step}": adapter for step, adapter in policies.items()}
            plan = Plan(named, answers, temperature, chooser.members, judge)
            drawn = draw(session, POLICIES, plan, prompts, stage)
            stages |= {step: drawn[f"step-{step}"] for step in policies}
    if len(stages) > 1:
        points += policy_points({0: start} | {s: d for s, d in stages.items() if s}, chooser)
    found = {
        "points": points,
        "fits": fits_of(points),
        "watch": watch_policies(stages, chooser, start).as_dict(),
        "prompts": len(prompts),
        "rule": chooser.rule,
        "members": list(chooser.members),
        "judge": judge,
        "seconds": round(time.monotonic() - began, 1),
    }
    session.run.write_json("summary.json", session.run.summary() | {"frontier": found})
    return found


def frontier_of_contest(contest: Contest, most: int) -> dict[str, Any]:
    """The frontier on the prompts of a contest, by the first of its judges that is a function.

    Raises:
        CheckpointError: as `run_frontier`.
    """
    gold = next((j.name for j in contest.judges if j.kind == "function"), None)
    return run_frontier(
        contest.session,
        contest.prompts,
        most,
        chooser=contest.chooser,
        judge=gold,
        temperature=contest.settings.temperature,
    )


def watch_votes(run: Run) -> None:
    """Let people's votes for the policy over `sft` take gold's place in the watch, if it has none.

    The rise of the proxy is that of the newest kept policy over `sft`, on the frontier's prompts.
    """
    summary = run.summary()
    frontier = summary.get("frontier", {})
    votes = [
        row
        for row in summary.get("win_rates", [])
        if (row["a"], row["b"]) == ("policy", "sft") and row["judge"].startswith("human")
    ]
    judged = frontier.get("judge") is not None
    if not votes or not frontier or judged or not (run.path / POLICIES).exists():
        return
    chooser = Chooser(tuple(frontier["members"]), frontier["rule"])
    start, *_ = kept(run, START).values()
    *_, last = kept(run, POLICIES).values()
    scores = chooser.combine(start.scores)
    rise = (chooser.combine(last.scores).mean(-1) - scores.mean(-1)) / max(scores.std(), 1e-9)
    share = Interval(votes[0]["win_rate"], *votes[0]["ci"])
    watch = watch_win_rate(mean_interval(rise), share, "from sft to policy", "people")
    frontier["watch"] = watch.as_dict()
    run.write_json("summary.json", summary)


@contextmanager
def kept_policies(session: Session) -> Iterator[dict[int, str]]:
    """The run's kept policies on the backbone for the block, round -> adapter name.

    Without any the final policy stands alone, at the round it was taken from.
    """
    adapters, run = session.backbone.adapters, session.run
    there = run.kept_policies()
    if not there:
        step = int(run.summary().get("ppo", {}).get("best_step", 1))
        yield {max(step, 1): "policy"} if "policy" in adapters.names else {}
        return
    names = {step: f"kept_{step}" for step in there}
    try:
        for step, path in there.items():
            adapters.load(names[step], path)
            adapters.freeze(names[step])
        yield names
    finally:
        for name in names.values():
            if name in adapters.names:
                adapters.delete(name)
