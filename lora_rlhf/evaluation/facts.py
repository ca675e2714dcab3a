"""An arm's answers to the held-out prompts, and means over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from lora_rlhf.model.generation import Answer


@dataclass
class Arm:
    """One way to answer the held-out prompts.

    Attributes:
        name: base, sft, best_of_n, policy, or as it was named.
        answers: one a prompt.
        texts: the same, decoded.
        scores: of the reward model, (n,); empty without one.
        utilities: of the judge; empty where it gives none.
        parts: of the utility, by name, means over prompts; {} unless the judge has parts.
        kl: mean nats a sequence from `sft`, or None where it has no meaning.
        by_judge: utilities of every judge that gives them, by its name.
        identity: as `ReadyArm`'s.
    """

    name: str
    answers: list[Answer]
    texts: list[str]
    scores: list[float] = field(default_factory=list)
    utilities: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    by_judge: dict[str, list[float]] = field(default_factory=dict)
    identity: str = ""


def describe(arm: Arm) -> dict[str, object]:
    """Means over the arm's answers."""
    lengths = [len(a.ids) for a in arm.answers]
    facts: dict[str, object] = {}
    if arm.utilities:
        spread = torch.tensor(arm.utilities, dtype=torch.float64).std().item()
        facts["utility"] = sum(arm.utilities) / len(arm.utilities)
        facts["utility_std"] = spread
    facts |= {
        "eos_rate": sum(a.ended for a in arm.answers) / len(arm.answers),
        "mean_length": sum(lengths) / len(lengths),
        "distinct_2": distinct_2(arm.texts),
    }
    if arm.scores:
        facts["score"] = sum(arm.scores) / len(arm.scores)
    if arm.kl is not None:
        facts["kl"] = arm.kl
    if arm.parts:
        facts["parts"] = arm.parts
    return facts


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, in all texts together.

    Falls when answers come to resemble each other. It falls with the number of texts too, so
    compare arms of one size alone.

    Source: Li et al. 2016, arXiv:1510.03055. Deviation: none; words are split at white space.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pairs += pairwise(text.lower().split())
    return len(set(pairs)) / len(pairs) if pairs else 1.0
