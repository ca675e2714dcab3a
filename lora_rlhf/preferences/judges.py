"""Simulated labelers: a score of an answer that is not a trained model. Imports no torch."""

import importlib
import math
from collections.abc import Callable, Sequence

from lora_rlhf.errors import ConfigError

Judge = Callable[[str, str], float]


def find_judge(name: str) -> Judge:
    """The function a recipe's `judge` names.

    Args:
        name: `builtin:gold` (the toy world's hidden utility), `vader` (sentiment of the answer;
            needs vaderSentiment), or `package.module:function` taking (prompt, response).

    Raises:
        ConfigError: it cannot be imported.
    """
    if name == "builtin:gold":
        from lora_rlhf.tiny import gold

        return gold
    if name == "vader":
        return _vader()
    module_name, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"judge: {name} cannot be imported ({error}). Allowed: builtin:gold, vader, or "
            f"package.module:function, a function (prompt, response) -> float."
        ) from error
    judge: Judge = found
    return judge


def _vader() -> Judge:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError(
            "judge: vader needs the package vaderSentiment. Install it with "
            "`pip install lora-rlhf[sentiment]`."
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompt, response: float(analyzer.polarity_scores(response)["compound"])


def noise_for_agreement(utilities: Sequence[Sequence[float]], agreement: float) -> float:
    """Spread of Gumbel noise at which a labeler orders pairs as the judge does this often.

    With Gumbel(0, s) noise on each utility, P(i before j) = sigmoid((u_i - u_j) / s), and whole
    rankings are Plackett-Luce. Pairs of equal utility have no right order and are left out.

    Args:
        utilities: of the answers of each prompt.
        agreement: wanted mean over all pairs, in (0.5, 1]; 1 gives 0.

    Raises:
        ConfigError: no two answers differ, so that nothing can be ranked.
    """
    from scipy.optimize import brentq

    gaps = [abs(a - b) for us in utilities for i, a in enumerate(us) for b in us[:i] if a != b]
    if not gaps:
        raise ConfigError(
            "rank: the judge gives every answer of a prompt the same score, so there is nothing to "
            "rank. Raise rank.temperature or rank.answers, or use another judge."
        )
    if agreement >= 1.0:
        return 0.0

    def excess(log_spread: float) -> float:
        spread = math.exp(log_spread)
        return sum(_sigmoid(g / spread) for g in gaps) / len(gaps) - agreement

    largest = max(gaps)
    return math.exp(brentq(excess, math.log(min(gaps) / 100), math.log(largest * 1000), xtol=1e-6))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x < 700 else 1.0
