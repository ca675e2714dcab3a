"""PPO for language models: rewards with a KL penalty, GAE, the two clipped losses, KL control."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_rlhf.losses.masked import (
    at_least_float32,
    fill_masked,
    masked_sum,
    masked_var,
)
from lora_rlhf.losses.outputs import LossOutput


class KlEstimates(NamedTuple):
    """Three estimators of KL(policy || reference) for each sampled token."""

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimators(logprobs: Float[Tensor, "*s"], ref_logprobs: Float[Tensor, "*s"]) -> KlEstimates:
    """Schulman's estimators for tokens sampled from the policy, in nats.

    d = logprobs - ref_logprobs;   k1 = d;   k2 = d^2 / 2;   k3 = exp(-d) - 1 + d

    k1 (signed) and k3 (never negative) are unbiased, k2 is biased. k1 belongs into a reward, k2
    into a loss: k1 has no expected gradient there, k3 has that of the forward KL (P2, P3).

    Source: Schulman 2020, joschu.net/blog/kl-approx.html. Deviation: none.
    """
    d = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    return KlEstimates(k1=d, k2=0.5 * d.square(), k3=torch.expm1(-d) + d)


@torch.no_grad()
def kl_rewards(
    scores: Float[Tensor, " b"],
    logprobs: Float[Tensor, "b r"],
    ref_logprobs: Float[Tensor, "b r"],
    response_mask: Bool[Tensor, "b r"],
    kl_coef: float,
) -> Float[Tensor, "b r"]:
    """Reward of each token: a KL penalty everywhere, the score on the last live token.

    rewards[t] = -kl_coef * (logprobs[t] - ref_logprobs[t]) + score * [t is the last live token]

    The penalty is k1: signed, not clamped, the end token's own included (P1, P2).

    Args:
        scores: of whole responses, any scale.
        logprobs: of the policy that sampled, temperature applied, nats.
        ref_logprobs: of the frozen `sft` adapter, same temperature.
        response_mask: True on live tokens; a row without any gets no reward at all.
        kl_coef: >= 0.

    Returns:
        fp32, without a gradient, 0 where the mask is False.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2. Deviation: none; TRL puts the score one
    position later, on the first pad.
    """
    kl = kl_estimators(logprobs, ref_logprobs).k1
    rewards = -kl_coef * kl + at_least_float32(scores).unsqueeze(-1) * _last_live(response_mask)
    return fill_masked(rewards, response_mask)


def _last_live(response_mask: Tensor) -> Tensor:
    """True on the last live token of each row: one live token from there to the end."""
    remaining = response_mask.flip(-1).cumsum(-1).flip(-1)
    return response_mask & (remaining == 1)


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "b r"],
    values: Float[Tensor, "b r"],
    response_mask: Bool[Tensor, "b r"],
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r"]]:
    """Generalised advantage estimates, and the returns the value model learns.

    delta[t] = rewards[t] + gamma * values[t+1] - values[t]
    advantages[t] = delta[t] + gamma * gae_lambda * advantages[t+1];   returns = advantages + values

    Beyond the last live token value and advantage are 0: a response ends, nothing is bootstrapped.
    Tokens that are not live inside a response are stepped over: no delta, no decay (P7).

    Args:
        rewards: of each token; from `kl_rewards`.
        values: of the state before each token is taken, in reward units.
        response_mask: True on live tokens.
        gamma: discount a token, in [0, 1]; 1 for language.
        gae_lambda: in [0, 1]; 0 gives delta (TD), 1 the reward-to-go minus the value.

    Returns:
        advantages (not whitened) and returns, fp32, no gradient, 0 where the mask is False.

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16. Deviation: none.
    """
    rewards, values = at_least_float32(rewards), at_least_float32(values)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        live = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = fill_masked(advantage, live)
        next_value = torch.where(live, values[:, t], next_value)
        next_advantage = torch.where(live, advantage, next_advantage)
    return advantages, advantages + fill_masked(values, response_mask)


def policy_loss(
    logprobs: Float[Tensor, "b r"],
    old_logprobs: Float[Tensor, "b r"],
    advantages: Float[Tensor, "b r"],
    response_mask: Bool[Tensor, "b r"],
    clip_range: float | None,
) -> LossOutput:
    """PPO's clipped surrogate loss, summed over live tokens.

    ratio = exp(logprobs - old_logprobs)
    total = sum max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))

    Args:
        logprobs: of the policy being trained, with a gradient.
        old_logprobs: of the same tokens at rollout, by the same forward (G7).
        advantages: whitened or not; no gradient goes into them.
        response_mask: True on live tokens.
        clip_range: in (0, 1); None: no clipping, which in a first epoch (ratio 1) is A2C.

    Returns:
        count is the number of live tokens. metrics: `approx_kl` (k2 of new against old, nats),
        `clip_fraction` (tokens whose gradient the clip cuts off), `ratio_mean` and `ratio_max`.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7. Deviation: negated; a sum, not a mean.
    """
    # Padding is filled before exp: there the ratio is 1, whatever the two log-probs hold (P9).
    log_ratio = fill_masked(at_least_float32(logprobs) - old_logprobs, response_mask)
    ratio = log_ratio.exp()
    advantages = fill_masked(at_least_float32(advantages), response_mask).detach()
    plain = -advantages * ratio
    clipped = (
        plain if clip_range is None else -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    )
    still = ratio.detach()
    return LossOutput(
        total=masked_sum(torch.maximum(plain, clipped), response_mask),
        count=response_mask.sum(),
        metrics={
            "approx_kl": masked_sum(0.5 * log_ratio.detach().square(), response_mask),
            "clip_fraction": _count((clipped > plain) & response_mask, still),
            "ratio_mean": masked_sum(still, response_mask),
            # The added 0 is below every ratio, and the maximum where there is no live token.
            "ratio_max": torch.cat(
                [fill_masked(still, response_mask).flatten(), still.new_zeros(1)]
            ).amax(),
        },
    )


def value_loss(
    values: Float[Tensor, "b r"],
    old_values: Float[Tensor, "b r"],
    returns: Float[Tensor, "b r"],
    response_mask: Bool[Tensor, "b r"],
    clip_range: float | None,
) -> LossOutput:
    """Squared error of the value model, clipped about its rollout values, summed over live tokens.

    total = sum 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)

    Args:
        values: of the model being trained, with a gradient.
        old_values: at rollout.
        returns: from `gae`; no gradient goes into them.
        response_mask: True on live tokens.
        clip_range: in reward units, so it means something only where rewards are normalised
            (P10); None: no clipping.

    Returns:
        count is the number of live tokens. metrics: `clip_fraction` (clipped error the larger).

    Source: OAI19 (openai/lm-human-preferences, `train_policy.py`). Deviation: a sum, not a mean.
    """
    values = fill_masked(at_least_float32(values), response_mask)
    old_values = fill_masked(at_least_float32(old_values), response_mask).detach()
    returns = fill_masked(at_least_float32(returns), response_mask).detach()
    plain = clipped = (values - returns).square()
    if clip_range is not None:
        near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        clipped = (near - returns).square()
    return LossOutput(
        total=0.5 * masked_sum(torch.maximum(plain, clipped), response_mask),
        count=response_mask.sum(),
        metrics={"clip_fraction": _count((clipped > plain) & response_mask, plain)},
    )


def _count(chosen: Tensor, like: Tensor) -> Tensor:
    """Number of True entries, as a float of the dtype of `like`."""
    return chosen.sum().to(like.dtype)


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "b r"],
    returns: Float[Tensor, "b r"],
    response_mask: Bool[Tensor, "b r"],
) -> Float[Tensor, ""]:
    """Share of the returns' variance that the values explain: 1 - Var(R - V) / Var(R).

    1 is perfect, 0 no better than a constant, below 0 worse; 0 where the returns do not vary. A
    constant offset of the values costs nothing.
    """
    spread = masked_var(returns, response_mask)
    residual = masked_var(at_least_float32(returns) - values, response_mask)
    return torch.where(spread > 0, 1 - residual / spread, torch.zeros_like(spread))


class AdaptiveKL:
    """A KL coefficient that follows a target KL (P12).

    value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon

    Args:
        coef: start, > 0 (0 would stay 0 for ever).
        target: nats a sequence, > 0.
        horizon: episodes over which the coefficient can move by 20 %.

    Source: OAI19 (openai/lm-human-preferences, `train_policy.py: AdaptiveKLController`).
    Deviation: none.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        assert min(coef, target, horizon) > 0
        self.value = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Move the coefficient after `n` episodes with a mean KL of `kl` nats a sequence."""
        # From 5 horizons on, a step would take the coefficient to 0 or below.
        assert n < 5 * self.horizon, f"{n} episodes at once are too many for horizon {self.horizon}"
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold; target and horizon come from the recipe."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict()`."""
        self.value = state["value"]
