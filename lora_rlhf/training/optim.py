"""Optimizer, schedule and the one place where a step is taken."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_rlhf.errors import HardwareError, TrainingError
from lora_rlhf.recipe import Optimizer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and are clipped together.

    Attributes:
        name: of the role, for metrics.
        parameters: in a fixed order.
        learning_rate: its peak.
    """

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float


def make_optimizer(
    groups: Sequence[Group], weight_decay: float, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95), as InstructGPT's appendix C.

    eps is 1e-5 for PPO: torch's first updates with 1e-8 are several times more aggressive than
    the reference implementation's (checklist G8).
    """
    for group in groups:
        for parameter in group.parameters:
            assert parameter.dtype == torch.float32, f"{group.name} must train in fp32"
    settings = [{"params": g.parameters, "lr": g.learning_rate} for g in groups]
    return torch.optim.AdamW(settings, betas=(0.9, 0.95), eps=eps, weight_decay=weight_decay)


def schedule_factor(settings: Optimizer, step: int, total: int) -> float:
    """What the peak learning rate is multiplied by at a step counted from 0.

    Warm-up rises linearly to 1; then cosine falls to a tenth (InstructGPT), linear to 0, and
    constant stays.
    """
    warmup = math.ceil(settings.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if settings.schedule == "linear" else 1.0


def clip_and_step(
    optimizer: torch.optim.AdamW,
    groups: Sequence[Group],
    factor: float,
    max_grad_norm: float,
    where: str,
) -> dict[str, float]:
    """Clip each group's gradient by its own norm, take the step, clear the gradients.

    Args:
        optimizer: from `make_optimizer` on the same groups.
        groups: in the optimizer's order.
        factor: of `schedule_factor`.
        max_grad_norm: of each group.
        where: stage and step, for the error.

    Returns:
        Gradient norms before clipping, by group name.

    Raises:
        TrainingError: a gradient that is not finite; no step is taken.
    """
    norms: dict[str, float] = {}
    for group, settings in zip(groups, optimizer.param_groups, strict=True):
        norm = nn.utils.clip_grad_norm_(group.parameters, max_grad_norm)
        norms[group.name] = float(norm)
        settings["lr"] = group.learning_rate * factor
    for name, value in norms.items():
        require_finite(value, f"gradient norm of {name}", where)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def require_finite(value: float, metric: str, where: str) -> None:
    """Stop a run whose numbers are no longer numbers.

    Raises:
        TrainingError: naming step and metric.
    """
    if not math.isfinite(value):
        raise TrainingError(
            f"{where}: {metric} is {value}. Nothing was updated and the last checkpoint is intact. "
            f"Lower the learning rate, or look at the samples and the data of that step; then go "
            f"on with --resume."
        )


class TokenBudget:
    """Most tokens in one training forward; halved when the device runs out of memory.

    Attributes:
        tokens: the present limit.
        tell: called with a sentence for the user each time it is halved.
    """

    def __init__(self, tokens: int, tell: Callable[[str], None]) -> None:
        self.tokens = tokens
        self.tell = tell

    def retry(self, work: Callable[[int], Result], clear: Callable[[], None]) -> Result:
        """Run `work(tokens)`; out of memory, clear, halve the budget and run the same work again.

        Losses are sums over the optimizer step's own count, so the smaller split gives the same
        gradient: only time is lost.

        Raises:
            HardwareError: a single row no longer fits.
        """
        while True:
            try:
                return work(self.tokens)
            except torch.cuda.OutOfMemoryError as error:
                # The traceback holds the failed forward's tensors alive until it is dropped.
                error.__traceback__ = None
                clear()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if self.tokens < 2 * _SMALLEST_BUDGET:
                    raise HardwareError(
                        f"out of memory even with {self.tokens} tokens in a forward. Shorten "
                        f"data.max_prompt_tokens and data.max_response_tokens, set "
                        f"base.gradient_checkpointing=true, or take a smaller base."
                    ) from None
                self.tokens //= 2
                self.tell(
                    f"out of memory: micro-batches halved to {self.tokens} tokens, the same step "
                    f"is done again with twice as many of them"
                )


_SMALLEST_BUDGET = 16


def clear_gradients(groups: Iterable[Group]) -> None:
    """Forget the gradients of a step that is done again."""
    for group in groups:
        for parameter in group.parameters:
            parameter.grad = None


def ema_update(mean: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    """Mean = decay * mean + (1 - decay) * parameters, in place.

    A and B of one trajectory may be averaged each by itself (P14); adapters of different runs may
    not, since the mean of products is not the product of means.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            mean[name].lerp_(parameter, 1.0 - decay)
