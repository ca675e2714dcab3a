"""How often a reward model orders answers as people did, before and after. No torch.

What may be said of it rests on people's votes on held-out prompts alone. The rankings that chose
the step to keep flatter the new model: of going on, the old one is among the steps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lora_rlhf.data.records import Message, Ranking, prompt_key
from lora_rlhf.preferences.intervals import clustered_rate, quantile
from lora_rlhf.runs import write_atomically
from ui.asking import Engine

FILE = "heldout.jsonl"  # of a run directory
CHOOSING = "choosing.jsonl"  # beside it: people's rankings that also choose the step
LEAST = 8  # prompts, under which no number is shown: the intervals are tested from there on


class Share(BaseModel):
    """A share of pairs in the right order (or a difference of two), with its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


class BeforeAfter(BaseModel):
    """Two reward models on the same judgements.

    Attributes:
        before_adapter: name of the old one; None where there was none.
        after_adapter: name of the new one.
        before: of the old one.
        after: of the new one.
        change: after minus before on the same pairs; its interval is narrower than either's.
        pairs: strict ones.
        prompts: that they come from.
    """

    model_config = ConfigDict(frozen=True)

    before_adapter: str | None
    after_adapter: str
    before: Share | None
    after: Share
    change: Share | None
    pairs: int
    prompts: int

    @property
    def verdict(self) -> str:
        """What may be said of votes on held-out prompts, in a sentence."""
        if self.change is None:
            return f"There was no reward model before, to compare {self.after_adapter} with."
        if self.change.low > 0 or self.change.high < 0:
            more, side = ("more", "above") if self.change.low > 0 else ("less", "below")
            return (
                f"The new reward model agrees with people {more} often: the interval of the change "
                f"lies {side} zero."
            )
        return (
            "No difference can be told: the interval of the change holds zero. More rankings of "
            "held-out prompts would narrow it."
        )


def prompts_in(rankings: Sequence[Ranking]) -> int:
    """How many prompts of them have an answer that is preferred to another one."""
    return len({prompt_key(r.prompt) for r in rankings if r.strict_pairs})


def too_few(prompts: int) -> str:
    """Why a reward model is not measured, and what to do, in sentences; "" where it can be.

    Args:
        prompts: of `prompts_in`, held out, which nothing was trained on.
    """
    if prompts >= LEAST:
        return ""
    there = {0: "there are none yet", 1: "there is 1"}.get(prompts, f"there are {prompts}")
    return (
        f"Nothing to measure on: that takes votes on {LEAST} held-out prompts that nothing was "
        f"trained on, and {there}. Compare some held-out prompts first (the tab Compare, with "
        f"Prompts on 'held-out prompts'); ties do not count. The next retraining is measured on "
        f"them."
    )


def measure_run(
    engine: Engine, run: Path, before: str | None, after: str
) -> tuple[BeforeAfter | None, BeforeAfter | None]:
    """Both reward models on the votes that measure them, and on the rankings that chose the step.

    None where `too_few` says so, or where there is none.

    Raises:
        UserError: nothing can be scored now.
    """
    measured = read_rankings(run / FILE)
    enough = not too_few(prompts_in(measured))
    result = measure(engine, measured, before, after) if enough else None
    return result, measure(engine, read_rankings(run / CHOOSING), before, after)


def write_rankings(path: Path, rankings: Sequence[Ranking]) -> None:
    """Keep what a reward model is measured on, as JSON lines."""
    lines = (
        json.dumps({"prompt": list(r.prompt), "responses": r.responses, "ranking": r.groups})
        for r in rankings
    )
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_rankings(path: Path) -> list[Ranking]:
    """What `write_rankings` kept; [] where there is none."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Ranking(
            tuple(Message(role=m["role"], content=m["content"]) for m in row["prompt"]),
            tuple(row["responses"]),
            tuple(tuple(group) for group in row["ranking"]),
        )
        for row in rows
    ]


def measure(
    engine: Engine, rankings: Sequence[Ranking], before: str | None, after: str
) -> BeforeAfter | None:
    """Score all answers with both adapters; None where nobody preferred anything.

    Args:
        engine: knows both adapters.
        rankings: of people.
        before: name of the old reward adapter.
        after: name of the new one.

    Raises:
        UserError: nothing can be scored now.
    """
    rankings = [r for r in rankings if r.strict_pairs]
    if not rankings:
        return None
    new = _by_prompt(rankings, _right(engine, rankings, after))
    old = None if before is None else _by_prompt(rankings, _right(engine, rankings, before))
    change = None
    if old is not None:
        change = change_of({k: [n - o for n, o in zip(new[k], old[k], strict=True)] for k in new})
    return BeforeAfter(
        before_adapter=before,
        after_adapter=after,
        before=None if old is None else _share(old),
        after=_share(new),
        change=change,
        pairs=sum(map(len, new.values())),
        prompts=len(new),
    )


def _right(engine: Engine, rankings: Sequence[Ranking], adapter: str) -> list[list[float]]:
    """Of each ranking's strict pairs: 1 in the right order, 0 in the wrong one, half for a tie."""
    items = [(r.prompt, text) for r in rankings for text in r.responses]
    scores = iter(engine.score(items, adapter))
    right = []
    for ranking in rankings:
        own = [next(scores) for _ in ranking.responses]
        right.append(
            [
                0.5 if own[better] == own[worse] else float(own[better] > own[worse])
                for better, worse in ranking.strict_pairs
            ]
        )
    return right


def _by_prompt(rankings: Sequence[Ranking], rows: Sequence[list[float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for ranking, row in zip(rankings, rows, strict=True):
        found.setdefault(prompt_key(ranking.prompt), []).extend(row)
    return found


def _share(clusters: dict[str, list[float]]) -> Share:
    rate = clustered_rate(clusters)
    assert rate.share is not None
    return Share(value=rate.share, low=rate.low, high=rate.high)


def change_of(clusters: Mapping[str, Sequence[float]]) -> Share:
    """The mean of all differences, each in [-1, 1], with an interval over clusters of them.

    The variance is the linearised one of a ratio, to which one cluster that changed wholly, half of
    it each way, is added: clusters that all changed alike do not prove that the next one would.

    Args:
        clusters: the differences of each prompt.

    Source: Agresti and Min 2005 for the added half. Deviation: clusters in the place of pairs, and
    the mean itself is not moved.
    """
    rows = [row for row in clusters.values() if row]
    count, number = sum(map(len, rows)), len(rows)
    value = sum(map(sum, rows)) / count
    if number < 2:
        return Share(value=value, low=-1.0, high=1.0)
    squares = sum((sum(row) - value * len(row)) ** 2 for row in rows) + (count / number) ** 2
    half = quantile(number) * math.sqrt(number / (number - 1) * squares) / count
    return Share(value=value, low=max(-1.0, value - half), high=min(1.0, value + half))
