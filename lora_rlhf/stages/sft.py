"""Supervised fine-tuning: demonstrations -> the adapter `sft`, policy before RL and reference."""

import time
from collections.abc import Sequence

import torch

from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.losses.sft import sft_loss
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Sampling
from lora_rlhf.training.checkpoint import drop_checkpoints
from lora_rlhf.training.material import Tokens, as_sequences, demonstrations
from lora_rlhf.training.offline import Task, fit
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import micro_batches, policy_forward, sample, score_answers
from lora_rlhf.training.session import Session

_HELDOUT = 256  # held-out demonstrations whose loss is followed
_SAMPLED = 64  # of them, prompts that are answered where a reward model can score


def run(session: Session) -> None:
    """Train `sft` and save it under `sft/adapter`.

    Raises:
        DataError: no usable demonstrations.
        TrainingError: a loss that is not finite.
    """
    recipe, backbone = session.recipe, session.backbone
    settings = recipe.sft
    assert settings is not None
    started = time.monotonic()
    train, heldout = demonstrations(session)
    backbone.adapters.add("sft", recipe.lora, seed=recipe.seed)
    task = Task(
        stage="sft",
        lengths=[len(p) + len(r) for p, r in train],
        counts=[len(r) for _, r in train],
        loss=lambda items: demonstration_loss(backbone, [train[i] for i in items]),
        evaluate=lambda: heldout_metrics(session, heldout[:_HELDOUT]),
    )
    best = fit(session, settings, task)
    backbone.adapters.freeze("sft")
    backbone.adapters.save("sft", session.run.adapter("sft"), role="sft", stage="sft")
    first = session.run.lines("sft/metrics.jsonl")[0]
    session.run.finish_stage(
        "sft",
        time.monotonic() - started,
        sft={
            "heldout_loss": best["heldout/loss"],
            "heldout_loss_of_base": first["heldout/loss"],
            "best_step": best["step"],
            "demonstrations": len(train),
        },
    )
    drop_checkpoints(session.run, "sft")


def heldout_metrics(session: Session, heldout: Sequence[Tokens]) -> dict[str, float]:
    """Held-out loss, and the mean reward of samples where the run has a reward model already.

    InstructGPT chose its SFT models by reward-model score, which keeps improving after the
    held-out loss has begun to rise (1a.6).
    """
    backbone, recipe = session.backbone, session.recipe
    metrics = {"heldout/loss": heldout_loss(backbone, heldout, session.budget.tokens)}
    if "reward" in backbone.adapters.heads:
        prompts = [p for p, _ in heldout[:_SAMPLED]]
        seeds = [row_seed(recipe.seed, -3, i) for i in range(len(prompts))]
        sampling = Sampling(recipe.data.max_response_tokens)
        answers = sample(backbone, "sft", prompts, seeds, sampling, session.rollout_rows)
        responses = [a.ids for a in answers]
        scores = score_answers(backbone, prompts, responses, session.budget.tokens)
        metrics["heldout/score"] = float(scores.mean())
    return metrics


def demonstration_loss(backbone: Backbone, tokens: Sequence[Tokens]) -> LossOutput:
    """Loss on the response tokens alone, under the adapter in use."""
    sequences = as_sequences(backbone, tokens)
    logprobs, _, _ = policy_forward(backbone, sequences, temperature=1.0)
    return sft_loss(logprobs, sequences.response_mask)


@torch.no_grad()
def heldout_loss(
    backbone: Backbone, tokens: Sequence[Tokens], max_tokens: int, adapter: str | None = "sft"
) -> float:
    """Mean nats a response token under an adapter (None: the bare base)."""
    sequences = as_sequences(backbone, tokens)
    total = count = 0.0
    with backbone.adapters.use(adapter):
        for rows in micro_batches(sequences, max_tokens):
            output = demonstration_loss(backbone, [tokens[i] for i in rows])
            total += float(output.total)
            count += float(output.count)
    return total / count
