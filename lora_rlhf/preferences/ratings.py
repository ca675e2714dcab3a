"""What the judgements say: win rates with intervals, and how much to believe them.

A ranking of K answers gives all its pairs, which together weigh as much as one vote. Ties are left
out of win rates and shown apart: they mean an easy prompt more than equal models
(arXiv:2510.02306). Intervals are 95 %, over prompts: pairs of one prompt may be as alike as they
want.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_rlhf.preferences.agreement import (
    annotator_agreement,
    median_seconds,
    position_bias,
    reward_agreement,
    reward_agreement_by_view,
    self_consistency,
)
from lora_rlhf.preferences.bradley_terry import Comparison, Fit, fit
from lora_rlhf.preferences.counting import counts_for_win_rate, pairs_of, why_not_counted
from lora_rlhf.preferences.events import Response
from lora_rlhf.preferences.intervals import Rate, wilson
from lora_rlhf.preferences.store import Judged

BASE = "base"
"""Name of the arm that has no adapter."""
ArmKey = tuple[str | None, str | None]
_CLAIM = 0.6
_QUADRATIC = 0.25  # largest variance of a vote

__all__ = [
    "Arm",
    "HeatMap",
    "Leaderboard",
    "PairRate",
    "Rate",
    "annotator_agreement",
    "arm_key",
    "arm_names",
    "counts_for_win_rate",
    "heat_map",
    "leaderboard",
    "median_seconds",
    "position_bias",
    "reward_agreement",
    "reward_agreement_by_view",
    "self_consistency",
    "votes_needed",
    "votes_still_needed",
    "why_not_counted",
]


@dataclass(frozen=True, slots=True)
class Arm:
    """One adapter, or the bare base.

    Attributes:
        name: of the adapter, with the start of its hash where several share a name.
        strength: Bradley-Terry, mean 0 over the arms it is connected to; None without comparisons.
        rate: chance to win against another arm of those it is connected to, each as likely.
        votes: judgements that compare it with another arm, ties counted.
        decisive: those that prefer one to the other somewhere.
        ties: comparisons that ended in a tie.
        both_bad: comparisons of two answers called bad.
    """

    name: str
    strength: float | None
    rate: Rate
    votes: int
    decisive: int
    ties: int
    both_bad: int


@dataclass(frozen=True, slots=True)
class PairRate:
    """Two arms that were compared directly.

    Attributes:
        a: name of the first.
        b: name of the second.
        rate: chance that a beats b, from all comparisons (others' answers count through third
            arms); `count` is the direct decisive votes.
        wins: comparisons that a won.
        losses: comparisons that b won.
        ties: comparisons that ended in a tie.
        both_bad: comparisons of two answers called bad.
        needed: decisive votes still needed to tell 60 % from 50 %.
    """

    a: str
    b: str
    rate: Rate
    wins: int
    losses: int
    ties: int
    both_bad: int
    needed: int

    def turned(self) -> "PairRate":
        """The same, of b against a."""
        return replace(
            self,
            a=self.b,
            b=self.a,
            rate=self.rate.turned(),
            wins=self.losses,
            losses=self.wins,
        )


@dataclass(frozen=True)
class Leaderboard:
    """All arms and what is known of them.

    Attributes:
        arms: strongest first within each set that comparisons connect; those without any last.
        pairs: all that were compared directly.
        counted: judgements behind the win rates.
        left_out: reason -> judgements that do not count.
        separated: some side never wins; its rate is a cautious guess (half a vote each way added).
        groups: sets of names that comparisons connect; rates of different sets cannot be compared.
    """

    arms: tuple[Arm, ...]
    pairs: tuple[PairRate, ...]
    counted: int
    left_out: dict[str, int]
    separated: bool
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class HeatMap:
    """Who was compared with whom.

    Attributes:
        names: of the arms, sorted.
        votes: [i][j] judgements that compare i with j, ties counted; symmetric.
        wins: [i][j] how often i was preferred to j; a judgement's pairs weigh 1 together.
    """

    names: tuple[str, ...]
    votes: tuple[tuple[int, ...], ...]
    wins: tuple[tuple[float, ...], ...]


def votes_needed(win_rate: float = _CLAIM, power: float = 0.8, level: float = 0.05) -> int:
    """Decisive votes at which a win rate is told from 50 % with this power, two-sided.

    n = (z_(1 - level/2) + z_power)^2 / 4 / (win_rate - 1/2)^2

    Args:
        win_rate: in [0, 1], not 1/2.
        power: chance to find it.
        level: chance to find it where there is none.
    """
    from scipy.stats import norm

    assert win_rate != 0.5, "no number of votes tells 50 % from 50 %"
    z = norm.ppf(1 - level / 2) + norm.ppf(power)
    return max(1, round(float(z * z * _QUADRATIC / (win_rate - 0.5) ** 2)))


def votes_still_needed(decisive: int, win_rate: float = _CLAIM) -> int:
    """How many decisive votes are missing to `votes_needed`."""
    return max(0, votes_needed(win_rate) - decisive)


# -- the leaderboard ----------------------------------------------------------------------------


def leaderboard(judged: Sequence[Judged]) -> Leaderboard:
    """Win rates by Bradley-Terry over the judgements that count.

    Args:
        judged: of the store; those that do not count are left out and counted.
    """
    left_out = Counter(reason for j in judged if (reason := why_not_counted(j)))
    tally = _Tally([j for j in judged if counts_for_win_rate(j)])
    left_out["one adapter alone"] += tally.alone
    fits = fit(tally.comparisons, len(tally.names))
    found = {arm: (each, i) for each in fits for i, arm in enumerate(each.arms)}
    order = sorted(
        range(len(tally.names)),
        key=lambda a: (
            (fits.index(found[a][0]), -found[a][0].strengths[found[a][1]], tally.names[a])
            if a in found
            else (len(fits), 0.0, tally.names[a])
        ),
    )
    return Leaderboard(
        arms=tuple(_arm(tally, a, *found.get(a, (None, 0))) for a in order),
        pairs=tuple(
            _pair(tally, a, b, found[a][0] if a in found else None)
            for n, a in enumerate(order)
            for b in order[n + 1 :]
            if tally.voters[a, b]
        ),
        counted=len(tally.counted),
        left_out={reason: n for reason, n in left_out.items() if n},
        separated=any(each.separated for each in fits),
        groups=tuple(tuple(sorted(tally.names[a] for a in each.arms)) for each in fits),
    )


def heat_map(judged: Sequence[Judged]) -> HeatMap:
    """Votes and wins between every two arms, of the judgements that count for win rates."""
    tally = _Tally([j for j in judged if counts_for_win_rate(j)])
    size = range(len(tally.names))
    wins = np.zeros((len(size), len(size)))
    for c in tally.comparisons:
        wins[c.winner, c.loser] += c.weight
    return HeatMap(
        tuple(tally.names),
        tuple(tuple(len(tally.voters[i, j]) for j in size) for i in size),
        tuple(map(tuple, wins.tolist())),
    )


class _Tally:
    """The comparisons of judgements, and counts of them by pair of arms.

    Attributes:
        names: of the arms, sorted.
        counted: judgements that compare two arms.
        alone: how many others there are, whose answers are all of one arm.
        comparisons: strict ones.
        voters: (a, b) -> ids of judgements that compare them, both ways round.
        decisive: (a, b) -> ids of those that prefer one of them.
        outcomes: (a, b, outcome) -> comparisons; outcome is wins (of a), ties or both_bad.
    """

    def __init__(self, judged: Sequence[Judged]) -> None:
        labels = arm_names({arm_key(r) for j in judged for r in j.task.responses})
        self.names = sorted(set(labels.values()))
        self.alone = 0
        self.counted: list[Judged] = []
        self.comparisons: list[Comparison] = []
        self.voters: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        self.decisive: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        self.outcomes: Counter[tuple[int, int, str]] = Counter()
        index = {key: self.names.index(label) for key, label in labels.items()}
        for each in judged:
            self._count(each, index)

    def _count(self, judged: Judged, index: dict[ArmKey, int]) -> None:
        strict, tied = pairs_of(judged)
        who = {r.rid: index[arm_key(r)] for r in judged.task.responses}
        if len(set(who.values())) < 2:
            self.alone += 1
            return
        self.counted.append(judged)
        won = [(who[w], who[x]) for w, x in strict if who[w] != who[x]]
        for winner, loser in won:
            weight = 1 / len(won)
            cluster = judged.task.prompt_sha256
            self.comparisons.append(Comparison(winner, loser, weight, cluster))
            self.outcomes[winner, loser, "wins"] += 1
            for pair in ((winner, loser), (loser, winner)):
                self.voters[pair].add(judged.judgement.id)
                self.decisive[pair].add(judged.judgement.id)
        kind = "both_bad" if judged.judgement.outcome == "both_bad" else "ties"
        for one, other in ((who[x], who[y]) for x, y in tied if who[x] != who[y]):
            for pair in ((one, other), (other, one)):
                self.voters[pair].add(judged.judgement.id)
                self.outcomes[(*pair, kind)] += 1

    def of(self, arm: int, outcome: str) -> int:
        """How many comparisons of an arm ended so."""
        return sum(n for (a, _, kind), n in self.outcomes.items() if (a, kind) == (arm, outcome))

    def judgements(self, arm: int, pairs: dict[tuple[int, int], set[str]]) -> int:
        """How many judgements stand in the pairs of an arm."""
        return len(set().union(*(ids for (a, _), ids in pairs.items() if a == arm)))


def arm_key(response: Response) -> ArmKey:
    """(adapter, its hash) of an answer; (None, None) for the bare base."""
    return response.adapter, response.adapter_sha256 if response.adapter else None


def arm_names(keys: Collection[ArmKey]) -> dict[ArmKey, str]:
    """`arm_key` -> the name of the arm; a hash is shown where one name has several."""
    several = {name for name, n in Counter(name for name, _ in set(keys)).items() if n > 1}
    return {
        (name, sha): (name or BASE) + (f" ({(sha or 'unknown')[:8]})" if name in several else "")
        for name, sha in keys
    }


def _arm(tally: _Tally, arm: int, fitted: Fit | None, place: int) -> Arm:
    rate, strength = Rate(None), None
    votes = tally.judgements(arm, tally.voters)
    decisive = tally.judgements(arm, tally.decisive)
    if fitted is not None:
        strength = float(fitted.strengths[place])
        chances = 1 / (1 + np.exp(fitted.strengths - strength))
        others = np.arange(len(chances)) != place
        slopes = chances * (1 - chances)
        gradient = -slopes * others
        gradient[place] = slopes[others].sum()
        number = others.sum()
        rate = _rate(fitted, float(chances[others].mean()), gradient / number, decisive)
    return Arm(
        tally.names[arm],
        strength,
        rate,
        votes,
        decisive,
        tally.of(arm, "ties"),
        tally.of(arm, "both_bad"),
    )


def _pair(tally: _Tally, a: int, b: int, fitted: Fit | None) -> PairRate:
    decisive, rate = len(tally.decisive[a, b]), Rate(None)
    if fitted is not None and b in fitted.arms:
        i, j = fitted.arms.index(a), fitted.arms.index(b)
        chance = float(1 / (1 + np.exp(fitted.strengths[j] - fitted.strengths[i])))
        gradient = np.zeros(len(fitted.arms))
        gradient[[i, j]] = chance * (1 - chance), -chance * (1 - chance)
        rate = _rate(fitted, chance, gradient, decisive)
    return PairRate(
        a=tally.names[a],
        b=tally.names[b],
        rate=rate,
        wins=tally.outcomes[a, b, "wins"],
        losses=tally.outcomes[b, a, "wins"],
        ties=tally.outcomes[a, b, "ties"],
        both_bad=tally.outcomes[a, b, "both_bad"],
        needed=votes_still_needed(decisive),
    )


def _rate(fitted: Fit, share: float, gradient: Any, count: int) -> Rate:
    """A share with Wilson's interval at the votes its variance is worth (delta method)."""
    variance = float(gradient @ fitted.covariance @ gradient)
    clusters = fitted.clusters
    known = variance > 0 and clusters > 1
    votes = share * (1 - share) / variance if known else 1.0
    low, high = wilson(share, votes, clusters)
    return Rate(share, low, high, count, clusters)
