"""Negative control for PPO: wrong rewards, advantages, losses and controllers.

The mutants of ALGORITHMS.md 5 that live in the losses are each rejected twice: by the numbers
worked out by hand, and by the exact gradient of the enumerated world.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rlhf.losses.masked import fill_masked, masked_mean, masked_sum, whiten
from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.losses.ppo import (
    AdaptiveKL,
    KlEstimates,
    _last_live,
    explained_variance,
    gae,
    kl_estimators,
    kl_rewards,
    policy_loss,
    value_loss,
)
from tests.losses import checks_ppo as checks
from tests.losses.tree import check_objective_gradient

# -- rewards ------------------------------------------------------------------------------------


def rewards_by(
    penalty: Callable[[Tensor], Tensor] = lambda d: d,
    place: Callable[[Tensor], Tensor] = _last_live,
    weight: Callable[[Tensor], Tensor] = lambda mask: mask,
) -> Callable[..., Tensor]:
    """kl_rewards with another penalty, another place for the score, or a weight on the penalty."""

    def mutant(scores: Tensor, new: Tensor, ref: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
        kl = penalty(fill_masked(new - ref, mask))
        rewards = -kl_coef * kl * weight(mask) + scores.unsqueeze(-1) * place(mask)
        return fill_masked(rewards, mask)

    return mutant


def one_early(mask: Tensor) -> Tensor:
    """The last but one live token; the only one where there is one."""
    early = torch.cat([_last_live(mask)[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return early | (_last_live(mask) & (mask.sum(-1, keepdim=True) == 1))


def one_late(mask: Tensor) -> Tensor:
    """TRL's place: the first pad, or the last token where there is none."""
    late = torch.cat([torch.zeros_like(mask[:, :1]), _last_live(mask)[:, :-1]], dim=1)
    return late | (_last_live(mask) & mask.all(-1, keepdim=True))


def last_column(mask: Tensor) -> Tensor:
    return (torch.arange(mask.shape[1]) == mask.shape[1] - 1).expand_as(mask)


def rescaled(scores: Tensor, *rest: Any) -> Tensor:
    return kl_rewards(3.0 * scores, *rest)


def score_with_the_coefficient(
    scores: Tensor, new: Tensor, ref: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    return kl_coef * kl_rewards(scores, new, ref, mask, 1.0)


REWARDS: dict[str, Callable[..., Tensor]] = {
    "KL sign flipped": rewards_by(lambda d: -d),
    "no KL": rewards_by(lambda d: 0.0 * d),
    "KL clamped at 0": rewards_by(lambda d: d.clamp(min=0.0)),
    "k2 in the reward": rewards_by(lambda d: 0.5 * d.square()),
    "k3 in the reward": rewards_by(lambda d: torch.expm1(-d) + d),
    "absolute KL": rewards_by(torch.abs),
    "the end token's own KL dropped": rewards_by(weight=lambda m: m & ~_last_live(m)),
    "the first token's KL dropped": rewards_by(weight=lambda m: m & (torch.arange(m.shape[1]) > 0)),
    "KL of the sequence on the last token twice": rewards_by(
        weight=lambda m: m * 1.0 + _last_live(m)
    ),
    "reward one step early": rewards_by(place=one_early),
    "reward one step late": rewards_by(place=one_late),
    "reward on the last column": rewards_by(place=last_column),
    "reward on every token": rewards_by(place=lambda mask: mask),
    "reward rescaled": rescaled,
    "the coefficient on the score too": score_with_the_coefficient,
}
each_reward = pytest.mark.parametrize("mutant", REWARDS.values(), ids=REWARDS.keys())


@each_reward
def test_wrong_rewards_fail_the_numbers_by_hand(mutant):
    with pytest.raises(AssertionError):
        checks.check_kl_rewards(mutant)


@each_reward
def test_wrong_rewards_do_not_climb_the_objective(mutant):
    with pytest.raises(AssertionError):
        check_objective_gradient(mutant, gae, policy_loss)


def test_the_right_reward_with_the_parts_of_the_mutants_passes():
    """The mutants differ from the right function in their mistake alone."""
    checks.check_kl_rewards(rewards_by())
    check_objective_gradient(rewards_by(), gae, policy_loss)


# -- advantages ---------------------------------------------------------------------------------


def gae_by(
    final: Callable[[Tensor, Tensor], Tensor] = lambda values, mask: torch.zeros_like(values[:, 0]),
    decay: Callable[[float, float], float] = lambda gamma, lam: gamma * lam,
    discount: Callable[[float], float] = lambda gamma: gamma,
    skip: bool = True,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """gae with another value after the end, another decay, or padding walked through."""

    def mutant(
        rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        advantages = torch.zeros_like(rewards)
        after, ahead = final(values, mask), torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            live = mask[:, t] | (not skip)
            delta = rewards[:, t] + discount(gamma) * after - values[:, t]
            advantages[:, t] = delta + decay(gamma, lam) * ahead
            after = torch.where(live, values[:, t], after)
            ahead = torch.where(live, advantages[:, t], ahead)
        return fill_masked(advantages, mask), fill_masked(advantages + values, mask)

    return mutant


def last_live_value(values: Tensor, mask: Tensor) -> Tensor:
    """Bootstrapping from the value of the last live token, as if the response went on."""
    return (values * _last_live(mask)).sum(-1)


def value_in_the_last_column(values: Tensor, mask: Tensor) -> Tensor:
    return values[:, -1]


def gae_forwards(rewards: Tensor, values: Tensor, mask: Tensor, *rest: float) -> tuple:
    flipped = (x.flip(-1) for x in (rewards, values, mask))
    return tuple(x.flip(-1) for x in gae(*flipped, *rest))


def gae_with_whitened_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *rest: float
) -> tuple[Tensor, Tensor]:
    advantages, returns = gae(rewards, values, mask, *rest)
    return whiten(advantages, mask), returns


def gae_with_returns_of_whitened_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *rest: float
) -> tuple[Tensor, Tensor]:
    advantages, _ = gae(rewards, values, mask, *rest)
    return advantages, fill_masked(whiten(advantages, mask) + values, mask)


def gae_with_rewards_to_go_as_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    to_go, _ = gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    return gae(rewards, values, mask, gamma, lam)[0], to_go


GAE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "bootstrap from the last live value": gae_by(final=last_live_value),
    "bootstrap from the last column": gae_by(final=value_in_the_last_column),
    "padding walked through": gae_by(skip=False),
    "gamma 0.9": gae_by(discount=lambda g: 0.9 * g, decay=lambda g, lam: 0.9 * g * lam),
    "no value of the next state": gae_by(discount=lambda gamma: 0.0),
    "forwards": gae_forwards,
    "advantages whitened inside": gae_with_whitened_advantages,
}
# Without effect on the expected gradient at gamma 1 and with true values, yet wrong.
OTHER_GAE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lambda forgotten": gae_by(decay=lambda gamma, lam: gamma),
    "gamma twice": gae_by(discount=lambda gamma: gamma * gamma),
    "gamma forgotten in the decay": gae_by(decay=lambda gamma, lam: lam),
    "returns of whitened advantages": gae_with_returns_of_whitened_advantages,
    "returns are rewards to go": gae_with_rewards_to_go_as_returns,
}


@pytest.mark.parametrize("mutant", (GAE | OTHER_GAE).values(), ids=(GAE | OTHER_GAE).keys())
def test_wrong_advantages_fail_the_double_sum(mutant):
    with pytest.raises(AssertionError):
        checks.check_gae(mutant)


@pytest.mark.parametrize("mutant", GAE.values(), ids=GAE.keys())
def test_wrong_advantages_do_not_climb_the_objective(mutant):
    with pytest.raises(AssertionError):
        check_objective_gradient(kl_rewards, mutant, policy_loss)


def test_right_advantages_with_the_parts_of_the_mutants_pass():
    checks.check_gae(gae_by())
    check_objective_gradient(kl_rewards, gae_by(), policy_loss)


# -- sampling -----------------------------------------------------------------------------------


def top_2_of_3(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == logits.amin(-1, keepdim=True), -torch.inf)


SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "top-k sampling": top_2_of_3,
    "sampled at 0.7, scored at 1": lambda logits: logits / 0.7,
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_samples_of_another_distribution_do_not_climb_the_objective(sampler):
    with pytest.raises(AssertionError):
        check_objective_gradient(kl_rewards, gae, policy_loss, sampler=sampler)


# -- losses -------------------------------------------------------------------------------------


def policy_by(
    choose: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
    ratio: Callable[[Tensor], Tensor] = torch.exp,
    clip: Callable[[Tensor, float], Tensor] = lambda x, c: x.clamp(1 - c, 1 + c),
    sign: float = -1.0,
) -> Callable[..., LossOutput]:
    """policy_loss with another choice of branch, ratio, clip or sign; right metrics."""

    def mutant(
        new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip_range: float | None
    ) -> LossOutput:
        out = policy_loss(new.detach(), old, advantages, mask, clip_range)
        x = ratio(fill_masked(new - old, mask))
        clipped = x if clip_range is None else clip(x, clip_range)
        losses = choose(sign * advantages * x, sign * advantages * clipped)
        return out._replace(total=masked_sum(losses, mask))

    return mutant


def policy_sequence_mean(*args: Any) -> LossOutput:
    """A mean for each sequence: long responses count for less (P17)."""
    rows = [policy_loss(*(x[i : i + 1] for x in args[:4]), args[4]) for i in range(len(args[0]))]
    out = policy_loss(*args)
    total = torch.stack([row.total / row.count for row in rows]).sum()
    return out._replace(total=total, count=torch.tensor(len(rows)))


def policy_mean(*args: Any) -> LossOutput:
    out = policy_loss(*args)
    return out._replace(total=out.total / out.count)


def policy_counting_the_shape(*args: Any) -> LossOutput:
    return policy_loss(*args)._replace(count=torch.tensor(args[3].numel()))


def policy_without_a_mask(*args: Any) -> LossOutput:
    return policy_loss(*args[:3], torch.ones_like(args[3]), args[4])


def policy_metric(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., LossOutput]:
    def mutant(*args: Any) -> LossOutput:
        out = policy_loss(*args)
        return out._replace(metrics=out.metrics | {name: change(out.metrics[name])})

    return mutant


def value_by(
    choose: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
    about_returns: bool = False,
    half: float = 0.5,
) -> Callable[..., LossOutput]:
    def mutant(
        values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip_range: float
    ) -> LossOutput:
        out = value_loss(values.detach(), old, returns, mask, clip_range)
        values, old, returns = (fill_masked(x, mask) for x in (values, old, returns))
        centre = returns if about_returns else old
        near = torch.clamp(values, centre - clip_range, centre + clip_range)
        losses = choose((values - returns).square(), (near - returns).square())
        return out._replace(total=half * masked_sum(losses, mask))

    return mutant


def value_mean(*args: Any) -> LossOutput:
    out = value_loss(*args)
    return out._replace(total=out.total / out.count)


LOSSES: list[tuple[str, Callable[..., None], Callable[..., Any]]] = [
    (f"policy: {name}", checks.check_policy_loss, mutant)
    for name, mutant in (
        ("min instead of max", policy_by(choose=torch.minimum)),
        ("no clip", policy_by(choose=lambda plain, _: plain)),
        ("clip without the pessimistic choice", policy_by(choose=lambda _, clipped: clipped)),
        ("sign", policy_by(sign=1.0)),
        ("ratio inverted", policy_by(ratio=lambda d: torch.exp(-d))),
        ("log-ratio for a ratio", policy_by(ratio=lambda d: 1.0 + d)),
        ("clip above alone", policy_by(clip=lambda x, c: x.clamp(max=1 + c))),
        ("clip in log space", policy_by(clip=lambda x, c: x.log().clamp(-c, c).exp())),
        ("sequence mean", policy_sequence_mean),
        ("mean instead of a sum", policy_mean),
        ("counts the shape", policy_counting_the_shape),
        ("no mask", policy_without_a_mask),
        ("approx_kl without a half", policy_metric("approx_kl", lambda x: 2.0 * x)),
        ("clip_fraction off by one", policy_metric("clip_fraction", lambda x: x + 1.0)),
        ("ratio_max over padding", policy_metric("ratio_max", lambda x: x + 1.0)),
    )
] + [
    (f"value: {name}", checks.check_value_loss, mutant)
    for name, mutant in (
        ("min instead of max", value_by(choose=torch.minimum)),
        ("no clip", value_by(choose=lambda plain, _: plain)),
        ("clip alone", value_by(choose=lambda _, clipped: clipped)),
        ("clip about the returns", value_by(about_returns=True)),
        ("no half", value_by(half=1.0)),
        ("mean instead of a sum", value_mean),
    )
]


@pytest.mark.parametrize(("check", "mutant"), [m[1:] for m in LOSSES], ids=[m[0] for m in LOSSES])
def test_wrong_losses_fail_the_branches_by_hand(check, mutant):
    with pytest.raises(AssertionError):
        check(mutant)


def test_right_losses_with_the_parts_of_the_mutants_pass():
    checks.check_policy_loss(policy_by())
    checks.check_value_loss(value_by())


# -- monitors and control -----------------------------------------------------------------------


def uncentred_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return 1 - masked_mean((returns - values).square(), mask) / masked_mean(returns.square(), mask)


def variance_of_all(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return explained_variance(values, returns, torch.ones_like(mask))


def variance_of_values(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return explained_variance(returns, values, mask)


def estimators_by(**change: Callable[[Tensor], Tensor]) -> Callable[..., KlEstimates]:
    def mutant(new: Tensor, ref: Tensor) -> KlEstimates:
        d = new - ref
        return kl_estimators(new, ref)._replace(**{k: f(d) for k, f in change.items()})

    return mutant


class Unclipped(AdaptiveKL):
    def update(self, kl: float, n: int) -> None:
        self.value *= 1.0 + (kl / self.target - 1.0) * n / self.horizon


class Backwards(AdaptiveKL):
    def update(self, kl: float, n: int) -> None:
        super().update(2 * self.target - kl, n)


class ForgetsEpisodes(AdaptiveKL):
    def update(self, kl: float, n: int) -> None:
        super().update(kl, 1)


class Adds(AdaptiveKL):
    def update(self, kl: float, n: int) -> None:
        before, self.value = self.value, 1.0
        super().update(kl, n)
        self.value = before + self.value - 1.0


class ForgetsItsState(AdaptiveKL):
    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


MONITORS: list[tuple[str, Callable[..., None], Any]] = [
    ("explained variance about zero", checks.check_explained_variance, uncentred_variance),
    ("explained variance with padding", checks.check_explained_variance, variance_of_all),
    ("explained variance of the values", checks.check_explained_variance, variance_of_values),
    ("k1 of the other sign", checks.check_kl_estimators, estimators_by(k1=lambda d: -d)),
    ("k1 without a sign", checks.check_kl_estimators, estimators_by(k1=torch.abs)),
    ("k2 without a half", checks.check_kl_estimators, estimators_by(k2=torch.square)),
    (
        "k3 of the other sign",
        checks.check_kl_estimators,
        estimators_by(k3=lambda d: d.exp() - 1 - d),
    ),
    ("k3 for k2", checks.check_kl_estimators, estimators_by(k2=lambda d: torch.expm1(-d) + d)),
    ("adaptive KL unclipped", checks.check_adaptive_kl, Unclipped),
    ("adaptive KL backwards", checks.check_adaptive_kl, Backwards),
    ("adaptive KL forgets the episodes", checks.check_adaptive_kl, ForgetsEpisodes),
    ("adaptive KL adds", checks.check_adaptive_kl, Adds),
    ("adaptive KL forgets its state", checks.check_adaptive_kl, ForgetsItsState),
]


@pytest.mark.parametrize(
    ("check", "mutant"), [m[1:] for m in MONITORS], ids=[m[0] for m in MONITORS]
)
def test_wrong_monitors_and_controllers_fail(check, mutant):
    with pytest.raises(AssertionError):
        check(mutant)
