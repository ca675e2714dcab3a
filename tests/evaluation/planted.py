"""Rankings with planted scores: what a reward model of a known kind would have given."""

import math
import random
from collections.abc import Callable

from lora_rlhf.evaluation.health import Scored

Score = Callable[[float, int, random.Random], float]


def planted(
    score: Score,
    seed: int = 0,
    prompts: int = 120,
    answers: int = 4,
    taste_in_length: float = 0.0,
    noise: float = 0.6,
) -> list[Scored]:
    """Rankings by people whose utility is a standard normal, plus a taste in length.

    Args:
        score: of an answer's utility, its length and a generator.
        seed: of everything.
        prompts: rankings.
        answers: a ranking.
        taste_in_length: what people add to the utility for a length one deviation above the mean.
        noise: scale of their Gumbel noise, which makes them Bradley-Terry with slope 1 / noise.
    """
    rng = random.Random(seed)
    made = []
    for number in range(prompts):
        lengths = [rng.randint(10, 90) for _ in range(answers)]
        likes = [rng.gauss(0, 1) + taste_in_length * (n - 50) / 23.4 for n in lengths]
        felt = [u - noise * math.log(rng.expovariate(1.0)) for u in likes]
        order = sorted(range(answers), key=lambda i: -felt[i])
        made.append(
            Scored(
                prompt=f"prompt {number}",
                answers=[f"answer {i} of {number}" for i in range(answers)],
                groups=[(i,) for i in order],
                scores=[score(u, n, rng) for u, n in zip(likes, lengths, strict=True)],
                lengths=lengths,
                tag=("chat", "rewrite", None)[number % 3],
            )
        )
    return made


def good(utility: float, length: int, rng: random.Random) -> float:
    """Sees the utility through some noise."""
    return utility + rng.gauss(0, 0.5)


def loves_length(utility: float, length: int, rng: random.Random) -> float:
    """Reads nothing but the number of tokens."""
    return length / 20 + rng.gauss(0, 0.3)


def loves_brevity(utility: float, length: int, rng: random.Random) -> float:
    """The same, the other way round."""
    return -loves_length(utility, length, rng)


def flipped(utility: float, length: int, rng: random.Random) -> float:
    """Trained with chosen and rejected swapped."""
    return -good(utility, length, rng)


def noise(utility: float, length: int, rng: random.Random) -> float:
    """Knows nothing."""
    return rng.gauss(0, 1)
