"""Supervised fine-tuning: demonstrations -> the adapter `sft`, policy before RL and reference."""

import time
from collections.abc import Sequence

import torch

from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.losses.sft import sft_loss
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.training.checkpoint import drop_checkpoints
from lora_rlhf.training.material import Tokens, as_sequences, demonstrations
from lora_rlhf.training.offline import Task, fit
from lora_rlhf.training.rollout import micro_batches, policy_forward
from lora_rlhf.training.session import Session

_HELDOUT = 256  # held-out demonstrations whose loss is followed


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
        evaluate=lambda: {
            "heldout/loss": heldout_loss(backbone, heldout[:_HELDOUT], session.budget.tokens)
        },
    )
    best = fit(session, settings, task)
    backbone.adapters.freeze("sft")
    backbone.adapters.save("sft", session.run.adapter("sft"), role="sft", stage="sft")
    drop_checkpoints(session.run, "sft")
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
