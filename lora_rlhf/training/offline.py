"""`fit`: the one loop of the stages that learn from a fixed set of records."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_rlhf.data.batches import plan_batches
from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.model.memory import measure_phase
from lora_rlhf.recipe import Reward, Sft
from lora_rlhf.training.checkpoint import (
    load_checkpoint,
    role_state,
    save_checkpoint,
    set_role_state,
)
from lora_rlhf.training.optim import (
    Group,
    clear_gradients,
    clip_and_step,
    make_optimizer,
    require_finite,
    schedule_factor,
)
from lora_rlhf.training.session import Session, Steps

_SORT_WINDOW = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Task:
    """What differs between the offline stages.

    Attributes:
        stage: `sft` or `reward`; also the name of the adapter (and head) that trains.
        lengths: tokens of each item; a group of answers counts them all.
        counts: terms each item adds to the loss (tokens, or 1 a prompt), the denominator.
        loss: item indices -> a sum over them, with gradient.
        evaluate: held-out metrics; `heldout/score` (higher is better) where there is one, else
            `heldout/loss`, chooses the adapter that is kept.
    """

    stage: str
    lengths: Sequence[int]
    counts: Sequence[int]
    loss: Callable[[list[int]], LossOutput]
    evaluate: Callable[[], dict[str, float]]


@dataclass
class Best:
    """The best held-out point so far."""

    metrics: dict[str, float] = field(default_factory=dict)
    step: int = -1
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def improves(self, metrics: dict[str, float]) -> bool:
        """Whether the new score is higher, or without a score the loss lower, than the kept one."""
        if "heldout/score" in metrics:
            return metrics["heldout/score"] > self.metrics.get("heldout/score", -math.inf)
        return metrics["heldout/loss"] < self.metrics.get("heldout/loss", math.inf)


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch: shuffled, sorted by length inside windows, and shuffled again.

    Sorting inside a window saves padding and keeps every batch a random one to the eye of the
    optimizer. A function of its arguments alone, so that a resumed run draws the same batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = batch_size * _SORT_WINDOW
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def fit(session: Session, settings: Sft | Reward, task: Task) -> dict[str, float]:
    """Train one adapter (and its head) on fixed records, and leave the best held-out one in place.

    Args:
        session: the adapter exists in its backbone and is freshly made.
        settings: learning rate, schedule, epochs, batch size.
        task: what is learned.

    Returns:
        Held-out metrics of the adapter that was kept, and `step`.

    Raises:
        TrainingError: a loss or gradient that is not finite.
    """
    trainer = _Trainer(session, settings, task)
    start = trainer.resume()
    per_epoch = math.ceil(len(task.lengths) / settings.batch_size)
    total = max(1, round(settings.epochs * per_epoch))
    batches: list[list[int]] = []
    with session.steps(task.stage, start, total) as steps:
        if start == 0:
            trainer.evaluate(0)
        for step in range(start, total):
            if step == start or step % per_epoch == 0:
                seed = session.recipe.seed
                batches = epoch_order(task.lengths, settings.batch_size, seed, step // per_epoch)
            trainer.step(step, total, batches[step % per_epoch], steps)
            done = step + 1
            if done % settings.evaluate_every == 0 or done == total:
                trainer.evaluate(done)
            if done % settings.checkpoint_every == 0 or done == total or steps.interrupted:
                trainer.save(done)
            if steps.interrupted:
                steps.leave()
    return trainer.keep_best()


class _Trainer:
    def __init__(self, session: Session, settings: Sft | Reward, task: Task) -> None:
        self.session, self.settings, self.task = session, settings, task
        self.log = session.metrics(task.stage)
        self.best = Best()
        self.heldout: dict[str, float] = {}
        adapters = session.backbone.adapters
        parameters = list(adapters.parameters(task.stage).values())
        head = adapters.heads.get(task.stage)
        # The head's bias is left out: a ranking loss cannot see it.
        parameters += [head.weight] if head is not None else []
        self.groups = [Group(task.stage, parameters, settings.learning_rate)]
        self.optimizer = make_optimizer(self.groups, settings.weight_decay)

    def step(self, step: int, total: int, items: list[int], steps: Steps) -> None:
        """One optimizer step over `items`, split into micro-batches by the token budget."""
        where = f"{self.task.stage} step {step + 1}"
        started = time.monotonic()
        with measure_phase("train", self.session.backbone.device):
            loss = self.session.budget.retry(
                lambda tokens: self._gradients(items, tokens), lambda: clear_gradients(self.groups)
            )
        require_finite(loss["loss"], "loss", where)
        factor = schedule_factor(self.settings, step, total)
        norms = clip_and_step(
            self.optimizer, self.groups, factor, self.settings.max_grad_norm, where
        )
        seconds = time.monotonic() - started
        shown = {f"loss/{self.task.stage}": loss.pop("loss")} | loss
        rate = sum(self.task.lengths[i] for i in items) / seconds
        self.log.write(
            step + 1,
            shown
            | {
                "train/lr": self.settings.learning_rate * factor,
                "train/grad_norm": norms[self.task.stage],
                "train/tokens_per_second": rate,
            },
        )
        bar = {"loss": shown[f"loss/{self.task.stage}"]}
        if step >= self.settings.evaluate_every:  # before, it is that of the untrained adapter
            bar |= _short(self.heldout)
        steps.done(step + 1, **bar, tokens_per_second=rate)

    def _gradients(self, items: list[int], max_tokens: int) -> dict[str, float]:
        """Backward over all items; the denominator is the whole step's (P11)."""
        backbone = self.session.backbone
        denominator = sum(self.task.counts[i] for i in items)
        sums: dict[str, float] = {"loss": 0.0}
        lengths = [self.task.lengths[i] for i in items]
        for rows in plan_batches(lengths, max_tokens):
            with backbone.adapters.use(self.task.stage, train=True), backbone.training():
                output = self.task.loss([items[r] for r in rows])
                (output.total / denominator).backward()
            sums["loss"] += float(output.total.detach()) / denominator
            for key, value in output.metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value) / denominator
        return sums

    def evaluate(self, step: int) -> None:
        """Held-out metrics; keeps the adapter when they are the best so far."""
        self.heldout = self.task.evaluate()
        where = f"{self.task.stage} step {step}"
        require_finite(self.heldout["heldout/loss"], "held-out loss", where)
        self.log.write(step, self.heldout)
        if self.best.improves(self.heldout):
            tensors = role_state(self.session.backbone, self.task.stage)
            self.best = Best(self.heldout, step, tensors)

    def save(self, step: int) -> None:
        """A checkpoint of everything this loop holds."""
        state: dict[str, Any] = {
            "role": role_state(self.session.backbone, self.task.stage),
            "optimizer": self.optimizer.state_dict(),
            "best": vars(self.best),
            "heldout": self.heldout,
        }
        save_checkpoint(self.session.run, self.task.stage, step, state)

    def resume(self) -> int:
        """Go back to the newest checkpoint, if any; returns the steps taken."""
        state = load_checkpoint(self.session.run, self.task.stage)
        if state is None:
            self.log.cut_after(-1)
            torch.manual_seed(self.session.recipe.seed)  # dropout is all that draws from it
            return 0
        set_role_state(self.session.backbone, self.task.stage, state["role"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = Best(**state["best"])
        self.heldout = state["heldout"]
        self.log.cut_after(state["step"])
        return int(state["step"])

    def keep_best(self) -> dict[str, float]:
        """Put the best adapter in place."""
        set_role_state(self.session.backbone, self.task.stage, self.best.tensors)
        return self.best.metrics | {"step": self.best.step}


def _short(heldout: dict[str, float]) -> dict[str, float]:
    return {k.replace("/", "_"): v for k, v in heldout.items() if k == "heldout/accuracy"}


__all__ = ["Task", "epoch_order", "fit"]
