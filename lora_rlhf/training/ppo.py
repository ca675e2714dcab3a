"""The trainer of a PPO round: collect, judge, update. The loop is in stages/ppo.py.

Letters and numbers in comments are those of the checklist this follows (DESIGN and README).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_rlhf.data.batches import Sequences
from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.losses.ppo import (
    AdaptiveKL,
    policy_loss,
    value_loss,
)
from lora_rlhf.losses.sft import sft_loss
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Sampling
from lora_rlhf.model.heads import ScalarHead
from lora_rlhf.model.memory import measure_phase
from lora_rlhf.recipe import Ppo
from lora_rlhf.training.checkpoint import role_state, set_role_state
from lora_rlhf.training.experience import Experience, Reader, Scorer, to_experience
from lora_rlhf.training.optim import (
    Group,
    TokenBudget,
    clear_gradients,
    clip_and_step,
    ema_update,
    make_optimizer,
    require_finite,
    schedule_factor,
)
from lora_rlhf.training.rollout import (
    Rollout,
    micro_batches,
    policy_forward,
    sample,
    spread,
    value_forward,
)

PtxBatch = Callable[[int], Sequences]


@dataclass
class PpoTrainer:
    """Policy, value, optimizer and KL coefficient, and what one round does with them.

    The adapters `sft` (reference), `policy` and, unless the trunk is shared, `value` must exist,
    and the head `value`.

    Args:
        backbone: with those adapters.
        settings: the recipe's ppo section.
        sampling: pure, at the settings' temperature (G4, G5).
        budget: most tokens in a forward.
        score: sequences -> (n,) normalised scores.
        seed: of rows and minibatches.
        ptx: index -> a batch of texts for the ptx mix, or None.
        rollout_rows: most rows decoded at once.
    """

    backbone: Backbone
    settings: Ppo
    sampling: Sampling
    budget: TokenBudget
    score: Scorer
    seed: int = 0
    ptx: PtxBatch | None = None
    rollout_rows: int = 128
    groups: list[Group] = field(init=False)

    def __post_init__(self) -> None:
        assert self.sampling.is_pure, "rollouts are pure samples (G4)"
        settings, adapters = self.settings, self.backbone.adapters
        self.shared = settings.value == "shared"
        self.head: ScalarHead = adapters.heads["value"]
        policy = list(adapters.parameters("policy").values())
        value: list[torch.nn.Parameter] = [self.head.weight, self.head.bias]
        if not self.shared:
            value = list(adapters.parameters("value").values()) + value
        value_rate = settings.learning_rate if self.shared else settings.value_learning_rate
        self.groups = [
            Group("policy", policy, settings.learning_rate),
            Group("value", value, value_rate),
        ]
        self.optimizer = make_optimizer(self.groups, settings.weight_decay, eps=1e-5)  # G8
        self.kl = None
        if settings.adaptive_kl_target is not None:
            self.kl = AdaptiveKL(
                settings.kl_coef, settings.adaptive_kl_target, settings.adaptive_kl_horizon
            )
        self.ema: dict[str, Tensor] | None = None
        if settings.ema_decay is not None:
            parameters = adapters.parameters("policy")
            self.ema = {k: p.detach().clone() for k, p in parameters.items()}
        self.ptx_batches = 0

    @property
    def kl_coef(self) -> float:
        """The KL coefficient of this round."""
        return self.kl.value if self.kl is not None else self.settings.kl_coef

    # -- 1, 2: rollout --------------------------------------------------------------------------

    def collect(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Rollout:
        """Sample a response a prompt and read everything off it once, without gradients."""
        answers = sample(self.backbone, "policy", prompts, seeds, self.sampling, self.rollout_rows)
        reader = Reader(
            self.backbone, self.head, self.shared, self.settings.temperature, self.score
        )
        return self.budget.retry(lambda tokens: reader.read(prompts, answers, tokens), lambda: None)

    def judge(self, rollout: Rollout) -> Experience:
        """Token rewards, advantages and returns of a rollout."""
        return to_experience(rollout, self.settings, self.kl_coef)

    # -- 5: update ------------------------------------------------------------------------------

    def update(self, experience: Experience, step: int, total: int) -> dict[str, float]:
        """All inner epochs of a round; returns the metrics, means over its optimizer steps.

        Raises:
            TrainingError: a loss or gradient that is not finite.
        """
        settings = self.settings
        # The missing-EOS rule may hide a score that is no number from the losses.
        score = float(experience.rollout.scores.mean())
        require_finite(score, "mean score", f"ppo step {step + 1}")
        factor = schedule_factor(settings, step, total)
        train_policy = step >= settings.value_warmup_steps
        taken: list[dict[str, float]] = []
        for epoch in range(settings.ppo_epochs):
            for number, rows in enumerate(self._minibatches(step, epoch)):
                where = f"ppo step {step + 1}, epoch {epoch + 1}, minibatch {number + 1}"
                taken.append(self._optimizer_step(experience, rows, factor, train_policy, where))
                if _beyond(taken[-1]["ppo/approx_kl"], settings.target_kl):
                    break
            if _beyond(taken[-1]["ppo/approx_kl"], settings.target_kl):
                break
        if self.ema is not None and settings.ema_decay is not None:
            policy = self.backbone.adapters.parameters("policy")
            ema_update(self.ema, policy, settings.ema_decay)
        means = {k: sum(t[k] for t in taken) / len(taken) for k in taken[0]}
        means["ppo/ratio_max"] = max(t["ppo/ratio_max"] for t in taken)
        return means | {
            "ppo/optimizer_steps": len(taken),
            "train/lr": factor * settings.learning_rate,
        }

    def _minibatches(self, step: int, epoch: int) -> Iterator[list[int]]:
        """Rows of each minibatch, shuffled anew each inner epoch (P11)."""
        settings = self.settings
        generator = torch.Generator().manual_seed(row_seed(self.seed, step, epoch))
        order = torch.randperm(settings.batch_size, generator=generator).tolist()
        for start in range(0, len(order), settings.minibatch_size):
            yield order[start : start + settings.minibatch_size]

    def _optimizer_step(
        self,
        experience: Experience,
        rows: list[int],
        factor: float,
        train_policy: bool,
        where: str,
    ) -> dict[str, float]:
        with measure_phase("train", self.backbone.device):
            metrics = self.budget.retry(
                lambda tokens: self._gradients(experience, rows, train_policy, tokens),
                lambda: clear_gradients(self.groups),
            )
        require_finite(metrics["loss/policy"], "policy loss", where)
        require_finite(metrics["loss/value"], "value loss", where)
        if not train_policy:
            clear_gradients(self.groups[:1])
        norms = clip_and_step(
            self.optimizer, self.groups, factor, self.settings.max_grad_norm, where
        )
        return metrics | {
            "train/grad_norm": norms["policy"],
            "train/value_grad_norm": norms["value"],
        }

    def _gradients(
        self, experience: Experience, rows: list[int], train_policy: bool, tokens: int
    ) -> dict[str, float]:
        """Gradients of one minibatch, summed over its micro-batches.

        The denominator is the whole minibatch's token count, not each micro-batch's (P11), so
        that the split changes nothing.
        """
        sequences = experience.rollout.sequences.select(rows)
        count = float(sequences.response_mask.sum())
        sums: dict[str, float] = {}
        for part in micro_batches(sequences, tokens):
            chosen = [rows[i] for i in part]
            for output, prefix in self._losses(experience, chosen, sequences.select(part), count):
                _add(sums, output, prefix, count)
        if self.ptx is not None and train_policy:
            sums |= self._ptx_gradients(tokens)
        return sums

    def _losses(
        self, experience: Experience, rows: list[int], sequences: Sequences, count: float
    ) -> Iterator[tuple[LossOutput, str]]:
        """Forward and backward of one micro-batch, each role inside its own adapter block."""
        adapters = self.backbone.adapters
        if self.shared:
            with adapters.use("policy", train=True), self.backbone.training():
                logprobs, _, hidden = policy_forward(
                    self.backbone, sequences, self.settings.temperature
                )
                policy = self._policy_loss(experience, rows, logprobs, count)
                values = spread(self.head(hidden), sequences.response_mask)
                value = self._value_loss(experience, rows, values)
                total = policy.total + self.settings.value_coef * value.total
                (total / count).backward()
            yield policy, "policy"
            yield value, "value"
            return
        with adapters.use("policy", train=True), self.backbone.training():
            logprobs, _, _ = policy_forward(self.backbone, sequences, self.settings.temperature)
            policy = self._policy_loss(experience, rows, logprobs, count)
            (policy.total / count).backward()
        yield policy, "policy"
        with adapters.use("value", train=True), self.backbone.training():
            values = value_forward(self.backbone, sequences, self.head)
            value = self._value_loss(experience, rows, values)
            (value.total / count).backward()
        yield value, "value"

    def _policy_loss(
        self, experience: Experience, rows: list[int], logprobs: Tensor, count: float
    ) -> LossOutput:
        width = slice(0, logprobs.shape[1])
        rollout = experience.rollout
        mask = rollout.response_mask[rows, width]
        advantages = experience.advantages[rows, width]
        if self.settings.loss_aggregation == "sequence-mean":
            # The loss is proportional to the advantage, and its sum is divided by the tokens of
            # the minibatch: with this factor each response's mean weighs the same.
            per_row = count / self.settings.minibatch_size
            advantages = advantages * per_row / mask.sum(-1, keepdim=True)
        return policy_loss(
            logprobs,
            rollout.logprobs[rows, width],
            advantages,
            mask,
            self.settings.clip_range,
        )

    def _value_loss(self, experience: Experience, rows: list[int], values: Tensor) -> LossOutput:
        width = slice(0, values.shape[1])
        rollout = experience.rollout
        return value_loss(
            values,
            rollout.values[rows, width],
            experience.returns[rows, width],
            rollout.response_mask[rows, width],
            self.settings.value_clip_range,
        )

    def _ptx_gradients(self, tokens: int) -> dict[str, float]:
        """Add the language-model gradient of one ptx batch to the policy's (InstructGPT eq. 2)."""
        assert self.ptx is not None
        parameters = self.groups[0].parameters
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        texts = self.ptx(self.ptx_batches)
        count = float(texts.response_mask.sum())
        total = 0.0
        for part in micro_batches(texts, tokens):
            chosen = texts.select(part)
            with self.backbone.adapters.use("policy", train=True), self.backbone.training():
                # ptx is plain likelihood: the sampling temperature does not enter (G5).
                logprobs, _, _ = policy_forward(self.backbone, chosen, 1.0)
                output = sft_loss(logprobs, chosen.response_mask)
                (self.settings.ptx_coef * output.total / count).backward()
            total += float(output.total.detach())
        # Last, so that a step done again after out-of-memory reads the same texts.
        self.ptx_batches += 1
        return {"loss/ptx": total / count, "ppo/ptx_grad_ratio": _ratio(parameters, before)}

    # -- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint must hold of this trainer."""
        state: dict[str, Any] = {
            "policy": role_state(self.backbone, "policy"),
            "head": {k: v.cpu().clone() for k, v in self.head.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "ptx_batches": self.ptx_batches,
        }
        if not self.shared:
            state["value"] = role_state(self.backbone, "value")
        if self.kl is not None:
            state["kl"] = self.kl.state_dict()
        if self.ema is not None:
            state["ema"] = {k: v.cpu().clone() for k, v in self.ema.items()}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        set_role_state(self.backbone, "policy", state["policy"])
        if not self.shared:
            set_role_state(self.backbone, "value", state["value"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ptx_batches = state["ptx_batches"]
        if self.kl is not None:
            self.kl.load_state_dict(state["kl"])
        if self.ema is not None:
            self.ema = {k: v.to(self.backbone.device) for k, v in state["ema"].items()}


def row_seed(seed: int, step: int, row: int) -> int:
    """A seed of one row of one round: neither its batch nor a restart changes it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _add(sums: dict[str, float], output: LossOutput, prefix: str, count: float) -> None:
    """Collect a micro-batch's metrics as shares of the minibatch's mean."""
    sums[f"loss/{prefix}"] = sums.get(f"loss/{prefix}", 0.0) + float(output.total.detach()) / count
    for name, value in output.metrics.items():
        key = f"ppo/{name}" if prefix == "policy" else f"ppo/{prefix}_{name}"
        if name.endswith("_max"):
            sums[key] = max(sums.get(key, 0.0), float(value))
        else:
            sums[key] = sums.get(key, 0.0) + float(value) / count


def _beyond(approx_kl: float, target_kl: float | None) -> bool:
    return target_kl is not None and approx_kl > target_kl


def _ratio(parameters: Sequence[Tensor], before: Sequence[Tensor | None]) -> float:
    """Norm of what was added to the gradients over the norm of what was there."""
    added = there = 0.0
    for parameter, old in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        if old is None:
            added += float(parameter.grad.square().sum())
        else:
            added += float((parameter.grad - old).square().sum())
            there += float(old.square().sum())
    return (added / there) ** 0.5 if there > 0 else 0.0
