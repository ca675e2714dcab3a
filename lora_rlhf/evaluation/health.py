"""The health card of a reward model: what its held-out rankings say of it, and a verdict."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from scipy.optimize import brentq
from scipy.special import expit

from lora_rlhf.losses.reward import strict_pairs
from lora_rlhf.results import percent
from lora_rlhf.training.reward_report import cluster_interval, rank_correlation

Json = dict[str, Any]

MOST_DISAGREEMENTS = 20
_MOST_LETTERS = 1000  # of a text in the card
_BIN_WIDTH = 0.05  # of predicted chances
_STEEPEST = 50.0  # a slope beyond this is as good as infinite
# When the verdict is against it, or has a doubt.
FOLLOWS_LENGTH = 0.5  # |rank correlation|: half of what a model that reads nothing else has
LIKES_DEGENERATE = 0.9  # of SFT's answers score lower than an answer that is none
OVERCONFIDENT = 0.5  # slope


@dataclass(frozen=True)
class Scored:
    """A prompt's ranked answers with their scores.

    Attributes:
        prompt: as people read it.
        answers: texts.
        groups: indices of answers in tie groups, best first, by people.
        scores: normalised, one an answer.
        lengths: tokens of each.
        tag: use case, where the record has one.
    """

    prompt: str
    answers: Sequence[str]
    groups: Sequence[Sequence[int]]
    scores: Sequence[float]
    lengths: Sequence[int]
    tag: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers of one prompt of which people prefer one.

    Attributes:
        row: of the prompt.
        better: index of the preferred answer.
        worse: index of the other.
        margin: score of the better minus the worse.
        longer: tokens of the better minus the worse.
    """

    row: int
    better: int
    worse: int
    margin: float
    longer: int


def pairs_of(rankings: Sequence[Scored]) -> list[Pair]:
    """All strict pairs of all rankings."""
    found = []
    for row, one in enumerate(rankings):
        for better, worse in strict_pairs(tuple(map(tuple, one.groups))):
            margin = one.scores[better] - one.scores[worse]
            longer = one.lengths[better] - one.lengths[worse]
            found.append(Pair(row, better, worse, margin, longer))
    return found


def health_card(rankings: Sequence[Scored], gain: float = 1.0, extra: Json | None = None) -> Json:
    """The card as summary.json holds it under `health`.

    Shares are {"value", "low", "high", "n"}: of n pairs, with a 95 % interval by bootstrap over
    prompts. `by_margin` goes by quarters of |margin|.

    Args:
        rankings: held out, with at least one strict pair among them.
        gain: of the score's normalisation, so that sigmoid(margin / gain) is the model's own
            probability.
        extra: what needs a model: `scores` and `degenerate`.
    """
    pairs = pairs_of(rankings)
    assert pairs, "rankings without a preference"
    card: Json = {
        "accuracy": share((p.row, _won(p.margin)) for p in pairs),
        "always_longer": share((p.row, _won(p.longer)) for p in pairs),
        "length_correlation": length_correlation(rankings),
        "lead_over_length": _lead_over_length(pairs, length_correlation(rankings)),
        "calibration": calibration(pairs, gain),
        "calibration_slope": calibration_slope([p.margin / gain for p in pairs]),
        "by_margin": by_margin(pairs),
        "by_tag": by_tag(rankings, pairs),
        "disagreements": disagreements(rankings, pairs),
        **(extra or {}),
    }
    return card | {"verdict": verdict(card)}


# -- shares -------------------------------------------------------------------------------------


def share(observed: Iterable[tuple[int, float]]) -> Json:
    """The mean of values in [0, 1] with its interval over prompts.

    Args:
        observed: (prompt, value); at least one.
    """
    sums: dict[int, list[float]] = defaultdict(list)
    for row, value in observed:
        sums[row].append(value)
    low, high = cluster_interval([(sum(v), len(v)) for v in sums.values()])
    count = sum(map(len, sums.values()))
    return {"value": sum(map(sum, sums.values())) / count, "low": low, "high": high, "n": count}


def _won(gap: float) -> float:
    """1 for the right order, 0 for the wrong one, half for a tie."""
    return 0.5 if gap == 0 else float(gap > 0)


def length_correlation(rankings: Sequence[Scored]) -> float:
    """Spearman's rank correlation of score and length over all answers; 0 where one is constant."""
    scores = [s for one in rankings for s in one.scores]
    lengths = [n for one in rankings for n in one.lengths]
    return rank_correlation(scores, lengths)


def _lead_over_length(pairs: Sequence[Pair], correlation: float) -> Json:
    """How much more of the pairs it orders as people do than its own taste in length would.

    The rule is the longer answer, or the shorter one where its scores fall with length. The
    interval is of the difference within prompts.
    """
    sign = 1 if correlation >= 0 else -1
    sums: dict[int, list[float]] = defaultdict(list)
    for p in pairs:
        sums[p.row].append(_won(p.margin) - _won(sign * p.longer))
    # cluster_interval is of shares: (1 + difference) / 2 lies in [0, 1].
    scaled = [(sum((1 + d) / 2 for d in own), len(own)) for own in sums.values()]
    low, high = cluster_interval(scaled)
    value = sum(map(sum, sums.values())) / len(pairs)
    return {"value": value, "low": 2 * low - 1, "high": 2 * high - 1, "n": len(pairs)}


def by_margin(pairs: Sequence[Pair]) -> list[Json]:
    """Accuracy in quarters of |score difference|, smallest first."""
    ranked = sorted(pairs, key=lambda p: abs(p.margin))
    borders = [len(ranked) * i // 4 for i in range(5)]
    parts = [ranked[a:b] for a, b in pairwise(borders) if b > a]
    return [
        {
            "low": abs(part[0].margin),
            "high": abs(part[-1].margin),
            "share": share((p.row, _won(p.margin)) for p in part),
        }
        for part in parts
    ]


def by_tag(rankings: Sequence[Scored], pairs: Sequence[Pair]) -> Json:
    """Accuracy by use case, the most frequent first; {} where no record has a tag."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        groups[rankings[p.row].tag or "untagged"].append(p)
    if set(groups) == {"untagged"}:
        return {}
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {tag: share((p.row, _won(p.margin)) for p in own) for tag, own in ordered}


def disagreements(rankings: Sequence[Scored], pairs: Sequence[Pair]) -> list[Json]:
    """The pairs it is most sure of and people order the other way, at most one a prompt."""
    worst: dict[int, Pair] = {}
    for p in pairs:
        if p.margin < 0 and (p.row not in worst or p.margin < worst[p.row].margin):
            worst[p.row] = p
    found = sorted(worst.values(), key=lambda p: p.margin)[:MOST_DISAGREEMENTS]
    return [
        {
            "prompt": cut(rankings[p.row].prompt),
            "chosen": cut(rankings[p.row].answers[p.better]),
            "rejected": cut(rankings[p.row].answers[p.worse]),
            "margin": p.margin,
        }
        for p in found
    ]


def cut(text: str) -> str:
    """Its first thousand letters: a card is read by eye and sent around."""
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


# -- calibration --------------------------------------------------------------------------------


def calibration(pairs: Sequence[Pair], gain: float = 1.0) -> list[Json]:
    """Predicted chance of the likelier answer against how often people do prefer it, by bins.

    Bins are 0.05 wide from 0.5 to 1, and empty ones are left out. `predicted` is the mean of
    sigmoid(|margin| / gain) within a bin, `ci` the 95 % interval of `observed` over prompts.
    """
    bins: dict[int, list[tuple[Pair, float]]] = defaultdict(list)
    last = round(0.5 / _BIN_WIDTH) - 1
    for p in pairs:
        chance = float(expit(abs(p.margin) / gain))
        bins[min(last, int((chance - 0.5) / _BIN_WIDTH + 1e-9))].append((p, chance))
    rows = []
    for number, own in sorted(bins.items()):
        observed = share((p.row, _won(p.margin)) for p, _ in own)
        rows.append(
            {
                "low": 0.5 + _BIN_WIDTH * number,
                "high": 0.5 + _BIN_WIDTH * (number + 1),
                "predicted": sum(chance for _, chance in own) / len(own),
                "observed": observed["value"],
                "ci": [observed["low"], observed["high"]],
                "n": len(own),
            }
        )
    return rows


def calibration_slope(margins: Sequence[float]) -> float:
    """The factor by which margins must be multiplied to be the likeliest log-odds.

    1 is calibrated, below 1 too sure of itself, 0 knows nothing, below 0 the wrong way round. It
    solves sum m sigmoid(-s m) = 0, the logistic regression of the preference on the margin without
    an intercept; at most 50 in size, which margins that are all right or all wrong run to.

    Args:
        margins: unnormalised score differences, preferred minus other.
    """

    def gradient(slope: float) -> float:
        return sum(m * float(expit(-slope * m)) for m in margins)

    if not any(margins):
        return 0.0
    if gradient(_STEEPEST) >= 0:
        return _STEEPEST
    if gradient(-_STEEPEST) <= 0:
        return -_STEEPEST
    return float(brentq(gradient, -_STEEPEST, _STEEPEST, xtol=1e-9))


# -- verdict ------------------------------------------------------------------------------------


def verdict(card: Mapping[str, Any]) -> Json:
    """Whether PPO may climb this reward, and why, in one sentence.

    Against it: orders pairs the wrong way round; follows length and does no better than length
    alone; no better than a coin; an answer that is none beats nine in ten of SFT's.
    """
    accuracy, longer = card["accuracy"], card["always_longer"]
    correlation = card["length_correlation"]
    orders = (
        f"orders {percent(accuracy['value'])} of {accuracy['n']} held-out pairs as they were "
        f"ranked (95% interval {percent(accuracy['low'])} to {percent(accuracy['high'])})"
    )
    taste = "longer" if correlation >= 0 else "shorter"
    rule = longer["value"] if correlation >= 0 else 1 - longer["value"]
    no_lead = card["lead_over_length"]["low"] <= 0
    if accuracy["high"] < 0.5:
        return _no(f"it {orders}: the wrong way round. Are chosen and rejected swapped?")
    if no_lead and abs(correlation) >= FOLLOWS_LENGTH:
        return _no(
            f"it has learned length and little else: its score goes with length (rank correlation "
            f"{correlation:+.2f}), and it {orders}, where always choosing the {taste} answer "
            f"gets {percent(rule)}."
        )
    if accuracy["low"] <= 0.5:
        return _no(f"it {orders}, which does not exclude a coin. PPO would chase noise.")
    loved = [d for d in card.get("degenerate", []) if d["percentile"] >= LIKES_DEGENERATE]
    if loved:
        most = max(loved, key=lambda d: float(d["percentile"]))
        return _no(
            f"it {orders}, but gives answers like '{most['name']}' a higher score than "
            f"{percent(most['percentile'])} of SFT's own answers: PPO will find them."
        )
    doubts = []
    if no_lead:
        doubts.append(f"always choosing the {taste} answer may do as well ({percent(rule)})")
    elif abs(correlation) >= FOLLOWS_LENGTH:
        doubts.append(f"its score goes with length (rank correlation {correlation:+.2f})")
    if card["calibration_slope"] < OVERCONFIDENT:
        doubts.append("it is surer of itself than it should be")
    doubt = f", but {' and '.join(doubts)}" if doubts else ""
    against = f", against {percent(longer['value'])} for always choosing the longer answer"
    sentence = f"It {orders}{'' if no_lead else against}{doubt}."
    return {"ok": True, "sentence": sentence}


def _no(reason: str) -> Json:
    return {"ok": False, "sentence": f"Do not trust this reward model: {reason}"}
