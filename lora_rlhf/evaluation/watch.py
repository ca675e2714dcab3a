"""Over-optimisation: the reward model's score goes up while what it stands for does not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NEGLIGIBLE = 0.1  # standard deviations of single answers; 0.2 is called small (Cohen 1988)
# The win rate of an arm that is NEGLIGIBLE better, Phi(0.1 / sqrt 2): as good as a draw.
NEGLIGIBLE_WIN_RATE = 0.528
_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Watch:
    """What the watch has to say.

    Attributes:
        warned: the proxy is up and the truth is flat or down.
        sentence: why, or why not.
    """

    warned: bool
    sentence: str

    def as_dict(self) -> dict[str, object]:
        """As summary.json holds it."""
        return {"warned": self.warned, "sentence": self.sentence}


@dataclass(frozen=True)
class Stage:
    """A policy on the way: what proxy and truth say of its answers, one value a prompt, (p,).

    Attributes:
        name: such as `step 12`.
        proxy: score of the reward model.
        truth: gold utility.
    """

    name: str
    proxy: Floats
    truth: Floats


def mean_interval(values: Floats | Sequence[float]) -> Interval:
    """The mean over prompts with its 95 % percentile interval by bootstrap."""
    given = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(0).integers(len(given), size=(_DRAWS, len(given)))
    low, high = np.quantile(given[rows].mean(-1), [0.025, 0.975])
    return Interval(float(given.mean()), float(low), float(high))


@dataclass(frozen=True)
class Change:
    """What happened from the height of the truth to the last policy, in standard deviations.

    Attributes:
        proxy: rise of the reward model's score.
        truth: rise of the truth; below 0 it fell.
        between: `from step 8 to step 24`.
    """

    proxy: Interval
    truth: Interval
    between: str


def since_the_peak(stages: Sequence[Stage], proxy_spread: float, truth_spread: float) -> Change:
    """The change from the policy whose truth is highest to the last one.

    Which that is, half of the prompts say for the other half, so that the best of many by chance is
    not taken for a height that was lost.

    Args:
        stages: in order, on the same prompts; the first is the start.
        proxy_spread: standard deviation of the start's single answers by the proxy, the unit.
        truth_spread: the same by the truth.
    """
    half = np.arange(len(stages[0].truth)) % 2 == 0
    proxy, gained = np.zeros(len(half)), np.zeros(len(half))
    peaks = []
    for mine in (half, ~half):
        peak = max(stages, key=lambda stage: float(stage.truth[~mine].mean()))
        peaks.append(peak.name)
        proxy[mine] = (stages[-1].proxy - peak.proxy)[mine] / proxy_spread
        gained[mine] = (stages[-1].truth - peak.truth)[mine] / truth_spread
    between = f"from {' or '.join(dict.fromkeys(peaks))} to {stages[-1].name}"
    return Change(mean_interval(proxy), mean_interval(gained), between)


def watch_stages(
    stages: Sequence[Stage], proxy_spread: float, truth_spread: float, truth: str = "gold"
) -> Watch:
    """Whether the last of several policies has been over-optimised.

    Args:
        stages: as in `since_the_peak`.
        proxy_spread: as there.
        truth_spread: as there.
        truth: what to call it.
    """
    if len(stages) < 2 or len(stages[0].truth) < 2:
        return Watch(False, "There is one policy or prompt alone: nothing to hold it against.")
    change = since_the_peak(stages, proxy_spread, truth_spread)
    return verdict(change.proxy, change.truth, change.between, truth)


def verdict(proxy: Interval, gained: Interval, between: str, truth: str = "gold") -> Watch:
    """Judge a rise of the proxy by what the truth did meanwhile, both in standard deviations."""
    facts = f"{between} the reward model's score moved by {proxy} sd and {truth} by {gained} sd"
    if proxy.low <= NEGLIGIBLE:
        return Watch(False, f"No sign of over-optimisation: {facts}.")
    if gained.high < NEGLIGIBLE:
        fell = "fell" if gained.high < 0 else "did not rise"
        return Watch(
            True,
            f"Over-optimised: {facts}; it {fell}. Keep the earlier policy, raise ppo.kl_coef, or "
            f"collect rankings of the newest answers.",
        )
    if gained.low > 0:
        return Watch(False, f"No sign of over-optimisation: {facts}.")
    return Watch(False, f"Not enough prompts to tell: {facts}. Evaluate on more.")


def watch_win_rate(proxy: Interval, win_rate: Interval, between: str, judge: str) -> Watch:
    """The same where people have compared two arms: their win rate in place of the truth.

    Args:
        proxy: rise of the score from the older to the newer arm, in standard deviations.
        win_rate: of the newer over the older, in [0, 1].
        between: `from A to B`.
        judge: who compared.
    """
    share = f"{win_rate.value:.1%} ({win_rate.low:.1%} to {win_rate.high:.1%})"
    facts = f"{between} the reward model's score moved by {proxy} sd, and {judge} prefer the newer"
    facts += f" on {share}"
    if proxy.low <= NEGLIGIBLE or win_rate.low > 0.5:
        return Watch(False, f"No sign of over-optimisation: {facts}.")
    if win_rate.high < NEGLIGIBLE_WIN_RATE:
        return Watch(
            True,
            f"Over-optimised: {facts}. Keep the older one, or train the reward model on these "
            f"votes.",
        )
    return Watch(False, f"Not enough votes to tell: {facts}. Collect more.")
