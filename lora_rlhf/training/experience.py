"""From sampled answers to advantages: what a PPO round reads off its rollout, and what it means."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_rlhf.data.batches import Sequences
from lora_rlhf.losses.masked import masked_mean, whiten
from lora_rlhf.losses.ppo import explained_variance, gae, kl_rewards
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Answer
from lora_rlhf.model.heads import ScalarHead
from lora_rlhf.recipe import Ppo
from lora_rlhf.training.rollout import (
    Rollout,
    adapter_logprobs,
    map_rows,
    policy_forward,
    spread,
    to_sequences,
    value_forward,
)

Scorer = Callable[[Sequences], Tensor]


@dataclass
class Experience:
    """What the update of one round reads.

    Attributes:
        rollout: as collected.
        advantages: (n, r), whitened over the round's live tokens.
        returns: (n, r), what the value learns.
    """

    rollout: Rollout
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Reader:
    """Reads log-probs, reference, values and scores off sampled answers, without gradients.

    Args:
        backbone: with the adapters `sft`, `policy` and, unless shared, `value`.
        head: of the value.
        shared: the value reads the policy's trunk.
        temperature: of sampling and of every log-probability (G5).
        score: sequences -> (n,).
    """

    backbone: Backbone
    head: ScalarHead
    shared: bool
    temperature: float
    score: Scorer

    def read(
        self, prompts: Sequence[list[int]], answers: Sequence[Answer], max_tokens: int
    ) -> Rollout:
        """A rollout of these answers; at most `max_tokens` padded tokens in one forward."""
        backbone = self.backbone
        sequences, ended = to_sequences(backbone, prompts, answers)
        # Old log-probs come from the training forward, never from the sampler (G7); where the
        # trunk is shared the same pass gives the values.
        with backbone.adapters.use("policy"):
            logprobs, entropy, *rest = map_rows(sequences, max_tokens, self._policy_pass)
        ref_logprobs = adapter_logprobs(backbone, "sft", sequences, self.temperature, max_tokens)
        if not self.shared:
            with backbone.adapters.use("value"):
                rest = [*map_rows(sequences, max_tokens, self._value_pass)]
        mask = sequences.response_mask
        return Rollout(
            sequences=sequences,
            ended=ended,
            response_mask=mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            entropy=entropy,
            values=rest[0],
            scores=self.score(sequences).to(logprobs.device),
            sampler_gap=float(masked_mean((_drawn(answers, logprobs) - logprobs).abs(), mask)),
        )

    def _policy_pass(self, sequences: Sequences) -> tuple[Tensor, ...]:
        logprobs, entropy, hidden = policy_forward(self.backbone, sequences, self.temperature)
        if not self.shared:
            return logprobs, entropy
        return logprobs, entropy, spread(self.head(hidden), sequences.response_mask)

    def _value_pass(self, sequences: Sequences) -> tuple[Tensor, ...]:
        return (value_forward(self.backbone, sequences, self.head),)


def _drawn(answers: Sequence[Answer], like: Tensor) -> Tensor:
    """Log-probs as the sampler had them, (n, r)."""
    drawn = torch.zeros_like(like)
    for row, answer in enumerate(answers):
        drawn[row, : len(answer.ids)] = torch.tensor(answer.logprobs, device=like.device)
    return drawn


def final_scores(rollout: Rollout, settings: Ppo) -> Tensor:
    """Scores after the rule for responses without an end token (P6), (n,)."""
    return apply_missing_eos(rollout.scores, rollout.ended, settings)


def apply_missing_eos(scores: Tensor, ended: Tensor, settings: Ppo) -> Tensor:
    """Scores (n,) of responses, changed by the recipe's rule where `ended` (n,) is False."""
    penalty = settings.missing_eos_score
    if settings.missing_eos == "none":
        return scores
    if settings.missing_eos == "penalty":
        return torch.where(ended, scores, scores + penalty)
    return torch.where(ended, scores, torch.full_like(scores, penalty))


def to_experience(rollout: Rollout, settings: Ppo, kl_coef: float) -> Experience:
    """Token rewards (P1, P2), then advantages and the returns the value learns (P7, P8)."""
    mask = rollout.response_mask
    scores = final_scores(rollout, settings)
    rewards = kl_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask, settings.gamma, settings.gae_lambda)
    return Experience(rollout, whiten(advantages, mask), returns)


def rollout_metrics(experience: Experience, settings: Ppo, kl_coef: float) -> dict[str, float]:
    """What a round's rollout says, before its update (P16)."""
    rollout, mask = experience.rollout, experience.rollout.response_mask
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(-1).mean()
    explained = explained_variance(rollout.values, experience.returns, mask)
    return {
        "rollout/score": float(rollout.scores.mean()),
        "rollout/score_std": float(rollout.scores.std(unbiased=False)),
        "rollout/kl": float(kl),
        "rollout/objective": float(final_scores(rollout, settings).mean() - kl_coef * kl),
        "rollout/entropy": float(masked_mean(rollout.entropy, mask)),
        "rollout/response_length": float(mask.sum(-1).float().mean()),
        "rollout/eos_rate": float(rollout.ended.float().mean()),
        "rollout/sampler_gap": rollout.sampler_gap,
        "ppo/explained_variance": float(explained),
        "ppo/kl_coef": kl_coef,
    }


def random_scores(sequences: Sequences, seed: int) -> Tensor:
    """A control's score: standard normal noise, a function of the row's ids and the seed alone."""
    scores = []
    for ids, length in zip(sequences.input_ids.tolist(), sequences.lengths.tolist(), strict=True):
        text = " ".join(map(str, ids[:length]))
        generator = torch.Generator().manual_seed(_text_seed(text, seed))
        scores.append(float(torch.randn((), generator=generator)))
    return torch.tensor(scores, device=sequences.lengths.device)


def _text_seed(text: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
