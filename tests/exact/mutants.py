"""Wrong PPOs, each a classic bug, applied to the library one by one.

    python -m tests.exact.mutants

prints, for each, KL(pi || pi*), the share of the optimum reached, and whether T3 kills it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_rlhf.losses import ppo as losses
from lora_rlhf.model import generation
from lora_rlhf.training import experience
from tests.exact.exact import train, tree_passes
from tests.exact.table import World

Patch = tuple[object, str, Callable[..., object]]


def last_live(mask: Tensor) -> Tensor:
    """True on each row's last live token."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def rewards_with(
    penalty: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Callable[..., Tensor]:
    """kl_rewards with another penalty, written out anew."""

    def mutant(scores, logprobs, ref_logprobs, response_mask, kl_coef):
        end = last_live(response_mask).float()
        rewards = -kl_coef * penalty(logprobs - ref_logprobs, end) + scores[:, None] * end
        return rewards * scale * response_mask

    return mutant


def reward_one_step_early(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    """The score lands on the token before the last one."""
    end = last_live(response_mask)
    early = torch.cat([end[:, 1:], torch.zeros_like(end[:, :1])], 1)
    early = torch.where(end.float().argmax(-1, keepdim=True) == 0, end, early)
    return (-kl_coef * (logprobs - ref_logprobs) + scores[:, None] * early) * response_mask


def rescaled(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    """Scores blown up to three of their standard deviations, so that beta means another thing."""
    right = rewards_with(lambda d, end: d)
    return right(3 * scores / scores.std(), logprobs, ref_logprobs, response_mask, kl_coef)


def bootstrapped(rewards, values, response_mask, gamma, gae_lambda):
    """GAE that takes the last value as the value of what would follow the end."""
    advantages = torch.zeros_like(rewards)
    ends = last_live(response_mask)
    running = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else values[:, t]
        following = torch.where(ends[:, t], values[:, t], after)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(response_mask[:, t], delta + gamma * gae_lambda * running, 0.0)
        advantages[:, t] = running
    return advantages, (advantages + values) * response_mask


def discounted(rewards, values, response_mask, gamma, gae_lambda):
    """gamma 0.9 where the objective has none."""
    return losses.gae(rewards, values, response_mask, 0.9, gae_lambda)


def top_k(logits, uniforms, sampling):
    """Sampling from the three likeliest tokens alone."""
    cut = logits.topk(3).values[:, -1:]
    return ORIGINAL_NEXT(logits.masked_fill(logits < cut, -1e9), uniforms, sampling)


def colder(logits, uniforms, sampling):
    """Sampling at 0.7, scoring at 1."""
    return ORIGINAL_NEXT(logits / 0.7, uniforms, sampling)


ORIGINAL_NEXT = generation.next_tokens
MUTANTS: dict[str, Patch] = {
    "KL sign flipped": (experience, "kl_rewards", rewards_with(lambda d, end: -d)),
    "no KL": (experience, "kl_rewards", rewards_with(lambda d, end: 0 * d)),
    "KL clamped at 0": (experience, "kl_rewards", rewards_with(lambda d, end: d.clamp(min=0))),
    "k3 in the reward": (
        experience,
        "kl_rewards",
        rewards_with(lambda d, end: torch.expm1(-d) + d),
    ),
    "KL of the end token dropped": (
        experience,
        "kl_rewards",
        rewards_with(lambda d, end: d * (1 - end)),
    ),
    "reward one step early": (experience, "kl_rewards", reward_one_step_early),
    "reward rescaled": (experience, "kl_rewards", rescaled),
    "bootstrap past the end": (experience, "gae", bootstrapped),
    "gamma 0.9": (experience, "gae", discounted),
    "top-k sampling": (generation, "next_tokens", top_k),
    "sampled at 0.7, scored at 1": (generation, "next_tokens", colder),
}


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Run the block with one mutant in the library."""
    module, attribute, wrong = MUTANTS[name]
    right = getattr(module, attribute)
    setattr(module, attribute, wrong)
    try:
        yield
    finally:
        setattr(module, attribute, right)


def survives(name: str | None) -> tuple[bool, float, float]:
    """Whether T3 passes under a mutant (None: the library as it is), with its two numbers."""
    world = World(seed=0)
    if name is None:
        train(world, beta=1.0)
    else:
        with applied(name):
            train(world, beta=1.0)
    return tree_passes(world), *world.measure(1.0)


def main() -> int:
    """Print the table; 1 if any mutant survives or the library itself fails."""
    wrong = 0
    for name in [None, *MUTANTS]:
        passes, kl, share = survives(name)
        verdict = "passes" if passes else "killed"
        wrong += passes != (name is None)
        line = f"{name or 'the library':30s} KL {kl:9.2e}  J {share:7.3f}  {verdict}"
        print(line, flush=True)  # noqa: T201
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
