"""Log-probabilities of taken tokens, straight from hidden states, without the logits tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_rlhf.losses.masked import at_least_float32

# One block of logits: at most this many entries (128 MiB in fp32) and this many rows.
BLOCK_ENTRIES = 2**25
BLOCK_ROWS = 1024


def default_chunk(vocabulary: int) -> int:
    """Rows whose logits are held at once: 1024, or fewer where the vocabulary is above 32k."""
    return max(1, min(BLOCK_ROWS, BLOCK_ENTRIES // vocabulary))


def token_logprobs(
    hidden: Float[Tensor, "n d"],
    head_weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " n"],
    temperature: float = 1.0,
    chunk: int | None = None,
    head_bias: Float[Tensor, " v"] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probability of each target and the entropy of its distribution, in nats.

    logits = (hidden @ head_weight.T + head_bias) / temperature
    logprobs[i] = log_softmax(logits[i])[targets[i]];   entropy[i] = -sum_j p_ij log p_ij

    The head is frozen. Only `hidden`, `targets` and a log-sum-exp a row are kept for the backward
    pass, which computes the logits again; at most `chunk` rows of logits exist at a time.

    Args:
        hidden: last hidden states of the rows wanted (pick them first); any float dtype. The
            product is taken in the head's dtype, with autocast off, the softmax in fp32.
        head_weight: the LM head; must not require a gradient, for it would get none.
        targets: token ids, in [0, v).
        temperature: > 0; that of sampling (checklist G5).
        chunk: rows of logits at a time; unset: `default_chunk(v)`. It changes memory alone.
        head_bias: frozen too.

    Returns:
        logprobs, with a gradient for `hidden`, and entropy, without one; both fp32 (fp64 for an
        fp64 head), both (0,) for no rows.

    Source: selective log-softmax, chunked as in Liger's fused linear losses. Deviation: no
    gradient of the head, whose buffer (v, d) would cost more than all the rest.
    """
    assert temperature > 0.0, f"temperature {temperature}"
    frozen = not (head_weight.requires_grad or (head_bias is not None and head_bias.requires_grad))
    assert frozen or not torch.is_grad_enabled(), "the LM head must be frozen"
    rows = default_chunk(head_weight.shape[0]) if chunk is None else chunk
    assert rows > 0, f"chunk {chunk}"
    return _TokenLogprobs.apply(hidden, head_weight, head_bias, targets, temperature, rows)


def logprobs_from_logits(
    logits: Float[Tensor, "*s v"], targets: Int[Tensor, "*s"], temperature: float = 1.0
) -> Float[Tensor, "*s"]:
    """Log-probability of each target where the logits are at hand (the decode loop), in fp32.

    log_softmax(logits / temperature)[targets], without keeping the log-softmax.
    """
    assert temperature > 0.0, f"temperature {temperature}"
    scaled = at_least_float32(logits) / temperature
    taken = scaled.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return taken - scaled.logsumexp(dim=-1)


def _block_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    """One block of logits in fp32; shared, so that forward and backward agree bit for bit."""
    return at_least_float32(F.linear(hidden.to(weight.dtype), weight, bias)).div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """token_logprobs, with d logprob / d logits = (onehot(target) - p) / temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        targets = targets.long()
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, lse = torch.empty_like(logprobs), torch.empty_like(logprobs)
        # Under autocast the backward pass, which runs outside of it, would recompute other logits.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                block = _block_logits(hidden[rows], weight, bias, temperature)
                lse[rows] = block.logsumexp(dim=-1)
                block.sub_(lse[rows].unsqueeze(-1))
                logprobs[rows] = block.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
                entropy[rows] = block.exp().mul_(block).sum(dim=-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                block = _block_logits(hidden[rows], weight, bias, ctx.temperature)
                block.sub_(lse[rows].unsqueeze(-1)).exp_().neg_()
                one = torch.ones_like(targets[rows], dtype=block.dtype).unsqueeze(-1)
                block.scatter_add_(-1, targets[rows].unsqueeze(-1), one)
                block.mul_((grad_logprobs[rows] / ctx.temperature).unsqueeze(-1))
                grad_hidden[rows] = (block.to(weight.dtype) @ weight).to(hidden.dtype)
        return grad_hidden, None, None, None, None, None
