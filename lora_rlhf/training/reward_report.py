"""What the held-out rankings say of a reward model: accuracy, baselines, calibration (RM5)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from scipy import stats

from lora_rlhf.losses.reward import strict_pairs
from lora_rlhf.training.rollout import score_answers
from lora_rlhf.training.session import Session

_FEW_PROMPTS = 30


@dataclass(frozen=True)
class Group:
    """One prompt with its ranked answers, tokenised.

    Attributes:
        prompt: ids.
        responses: ids of each answer, the end token included.
        groups: tie groups, best first.
        judge: the simulated judge's own scores, where there was one.
        question: the prompt as people read it.
        tag: use case, where the record has one.
    """

    prompt: list[int]
    responses: list[list[int]]
    groups: tuple[tuple[int, ...], ...]
    judge: tuple[float, ...] | None = None
    question: str = ""
    tag: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all its rows, padded to the longest."""
        longest = max(len(r) for r in self.responses)
        return len(self.responses) * (len(self.prompt) + longest)


def score_groups(
    session: Session, groups: Sequence[Group], raw: bool = False
) -> list[torch.Tensor]:
    """Scores of every answer of every group, (k,) each, on the CPU."""
    prompts = [g.prompt for g in groups for _ in g.responses]
    responses = [r for g in groups for r in g.responses]
    scores = score_answers(session.backbone, prompts, responses, session.budget.tokens, raw)
    return list(scores.split([len(g.responses) for g in groups]))


def examine(
    session: Session, groups: Sequence[Group], scores: Sequence[list[float]]
) -> dict[str, object]:
    """Held-out accuracy with its interval, baselines, calibration, margins and length (RM5)."""
    raw_gain = float(session.backbone.adapters.heads["reward"].gain)
    margins, longer, per_prompt = [], [], []
    for group, own in zip(groups, scores, strict=True):
        pairs = strict_pairs(group.groups)
        if not pairs:
            continue
        gaps = [own[better] - own[worse] for better, worse in pairs]
        lengths = [len(r) for r in group.responses]
        margins += gaps
        longer += [_share(lengths[better] - lengths[worse]) for better, worse in pairs]
        per_prompt.append((sum(_share(g) for g in gaps), len(gaps)))
    flat = [s for own in scores for s in own]
    flat_lengths = [len(r) for g in groups for r in g.responses]
    low, high = cluster_interval(per_prompt)
    report: dict[str, object] = {
        "accuracy": sum(_share(m) for m in margins) / len(margins),
        "accuracy_ci": [low, high],
        "pairs": len(margins),
        "longer_baseline": sum(longer) / len(longer),
        "length_correlation": rank_correlation(flat, flat_lengths),
        "by_margin": accuracy_by_margin(margins),
        "calibration": calibration([m / raw_gain for m in margins]),
        "score_std": float(torch.tensor(flat).std()),
    }
    return report | _against_judge(groups, scores)


def _against_judge(groups: Sequence[Group], scores: Sequence[list[float]]) -> dict[str, object]:
    """Where a simulated judge is known: its own accuracy on the noisy pairs, and ours on its."""
    bayes: list[float] = []
    gold: list[float] = []
    for group, own in zip(groups, scores, strict=True):
        if group.judge is None:
            continue
        judge = group.judge
        pairs = strict_pairs(group.groups)
        bayes += [_share(judge[better] - judge[worse]) for better, worse in pairs]
        for i, j in combinations(range(len(own)), 2):
            gap = judge[i] - judge[j]
            if gap != 0:
                gold.append(_share((own[i] - own[j]) * gap))
    if not bayes:
        return {}
    return {
        "bayes_accuracy": sum(bayes) / len(bayes),
        "judge_accuracy": sum(gold) / max(1, len(gold)),
    }


def _share(gap: float) -> float:
    """1 for the right order, 0 for the wrong one, half for a tie."""
    return 0.5 if gap == 0 else float(gap > 0)


def rank_correlation(scores: Sequence[float], lengths: Sequence[int]) -> float:
    """Spearman's; 0 where one of both is constant, as lengths are where no answer ends."""
    if len(set(scores)) < 2 or len(set(lengths)) < 2:
        return 0.0
    return float(stats.spearmanr(scores, lengths).statistic)


def cluster_interval(per_prompt: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """95 % interval of a pair accuracy, by prompts: pairs of one prompt are not independent.

    A bootstrap of few prompts is too narrow (of one prompt it is a point), so that below 30 it is
    joined with Wilson's interval over prompts.

    Args:
        per_prompt: (right pairs, pairs) of each prompt.
    """
    right = torch.tensor([r for r, _ in per_prompt], dtype=torch.float64)
    pairs = torch.tensor([n for _, n in per_prompt], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(right), (2000, len(right)), generator=generator)
    means = right[rows].sum(-1) / pairs[rows].sum(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if len(per_prompt) < _FEW_PROMPTS:
        share = sum(r / n for r, n in per_prompt)
        wide = stats.binomtest(round(share), len(per_prompt)).proportion_ci(method="wilson")
        low, high = min(low, wide.low), max(high, wide.high)
    return low, high


def accuracy_by_margin(margins: Sequence[float]) -> list[dict[str, float]]:
    """Accuracy in quarters of |score difference|, smallest first."""
    ranked = sorted(margins, key=abs)
    borders = [len(ranked) * i // 4 for i in range(5)]
    parts = [ranked[a:b] for a, b in pairwise(borders)]
    return [
        {
            "margin": sum(abs(m) for m in part) / len(part),
            "accuracy": sum(_share(m) for m in part) / len(part),
        }
        for part in parts
        if part
    ]


def calibration(raw_margins: Sequence[float]) -> dict[str, float]:
    """Mean predicted chance of the likelier answer against how often it really was preferred.

    Args:
        raw_margins: unnormalised score differences, better minus worse, so that
            sigmoid(|margin|) is the model's own probability.
    """
    confidence = [1.0 / (1.0 + math.exp(-min(abs(m), 500.0))) for m in raw_margins]
    return {
        "predicted": sum(confidence) / len(confidence),
        "observed": sum(_share(m) for m in raw_margins) / len(raw_margins),
    }


def tells_answers_apart(report: dict[str, object]) -> bool:
    """Whether the accuracy's interval lies above one half."""
    interval = report["accuracy_ci"]
    assert isinstance(interval, list)
    return bool(interval[0] > 0.5)


def coin_warning(report: dict[str, object]) -> str:
    """What to say of a reward model that a coin may equal."""
    interval = report["accuracy_ci"]
    assert isinstance(interval, list)
    low, high = interval
    return (
        f"reward: held-out accuracy {report['accuracy']:.3f} with 95 % interval {low:.3f} to "
        f"{high:.3f} does not exclude a coin's 0.5. PPO would chase noise. Collect more rankings, "
        f"or pass --force to go on."
    )
