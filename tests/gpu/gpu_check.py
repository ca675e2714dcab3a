"""One step of every stage at full size on random weights: peak memory against the plan.

    python -m tests.gpu.gpu_check --out gpu.json                  # the recipes below, in order
    python -m tests.gpu.gpu_check --out gpu.json qwen3-4b-16gb    # one recipe
    python -m tests.gpu.gpu_check --out tiny.json --tiny          # the embedded base, CPU, seconds

A backbone of the recipe's own shape gets random 4-bit weights, so nothing is downloaded, and every
sequence has the full length the recipe allows, which is what the plan promises room for. torch may
allocate no more than the card in the recipe's name has: a recipe that passes fits that card's
bytes. It says nothing of that card's speed. The JSON is written after every recipe.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rlhf.data.batches import Sequences
from lora_rlhf.data.template import ChatFormat
from lora_rlhf.errors import UserError
from lora_rlhf.model.backbone import Backbone, guard_cpu_kernels, pick_device, pick_dtype
from lora_rlhf.model.fingerprint import Fingerprint
from lora_rlhf.model.generation import Sampling
from lora_rlhf.model.memory import (
    GIB,
    MemoryPlan,
    forget_measurements,
    measure_phase,
    memory_report,
    plan,
)
from lora_rlhf.model.shapes import base_config
from lora_rlhf.recipe import Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run, write_atomically
from lora_rlhf.stages.reward import Group, group_loss
from lora_rlhf.stages.sft import demonstration_loss
from lora_rlhf.tiny import BASE_PATH
from lora_rlhf.training.offline import Task, fit
from lora_rlhf.training.optim import TokenBudget
from lora_rlhf.training.ppo import PpoTrainer
from lora_rlhf.training.rollout import map_rows, score_forward
from lora_rlhf.training.session import Session

RECIPES = (
    "qwen3-1.7b-12gb",
    "llama-3.1-8b-24gb",
    "llama-3.1-8b-24gb base.model=Qwen/Qwen2.5-7B base.pad_token=null",
    "qwen3-8b-24gb",
    "qwen3-4b-16gb",
    "llama-3.2-3b-12gb",
    "qwen3-0.6b-8gb",
    "qwen2.5-0.5b-6gb",
)
TINY = (
    "quickstart data.max_prompt_tokens=16 data.max_response_tokens=16 sft.batch_size=4 "
    "reward.batch_size=2 ppo.batch_size=4 ppo.minibatch_size=2 ppo.ppo_epochs=1"
)
_SPREAD = 0.02  # of random weights, as transformers initialises them


def random_backbone(recipe: Recipe, device: torch.device) -> Backbone:
    """A backbone of the recipe's shape with random NF4 weights, made layer by layer on the device.

    The embedded base's tokenizer stands in for the model's own; its ids exist in every vocabulary.
    """
    dtype = pick_dtype(recipe.base.dtype, device)
    with init_empty_weights():
        causal_lm = AutoModelForCausalLM.from_config(base_config(recipe.base))
    head = causal_lm.get_output_embeddings()
    linears = [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        if linear is not head:
            causal_lm.set_submodule(name, _quantised(linear, device, dtype))
    for module in causal_lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=dtype, device=device)
                made = made.normal_(0.0, _SPREAD) if made.dim() > 1 else made.fill_(1.0)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    causal_lm.tie_weights()
    causal_lm.to(device)  # buffers, such as the rotary frequencies, were never empty
    causal_lm.is_loaded_in_4bit = True  # what PEFT asks before it chooses its 4-bit layer
    guard_cpu_kernels(causal_lm)
    assert not any(p.is_meta for p in causal_lm.parameters())
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    chat_format = ChatFormat(tokenizer)
    fingerprint = Fingerprint(recipe.base.model, "random", "nf4", chat_format.sha256[:16])
    return Backbone(causal_lm, tokenizer, chat_format, fingerprint, device, dtype)


def _quantised(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> Linear4bit:
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0.0, _SPREAD)
    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    ).to(device)
    return made


class Check:
    """One recipe's steps, with their memory and time."""

    def __init__(self, recipe: Recipe, memory: MemoryPlan, folder: Path, console: Console) -> None:
        self.recipe = recipe
        self.device = pick_device(recipe.base.device)
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.frozen = ""
        forget_measurements()
        with self.timed("load"), measure_phase("load", self.device):
            backbone = random_backbone(recipe, self.device)
        backbone.gradient_checkpointing = memory.gradient_checkpointing
        self.session = Session(
            recipe=recipe,
            run=Run(folder),
            backbone=backbone,
            console=console,
            budget=TokenBudget(memory.micro_batch_tokens, console.print),
            rollout_rows=memory.rollout_rows,
        )
        self.generator = torch.Generator().manual_seed(0)
        stops = backbone.format.stop_ids
        self.usable = [i for i in range(len(backbone.tokenizer)) if i not in stops]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds of the block, the device's own work included."""
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = round(time.monotonic() - started, 2)

    def ids(self, length: int) -> list[int]:
        """Random token ids without an end token."""
        drawn = torch.randint(len(self.usable), (length,), generator=self.generator)
        return [self.usable[i] for i in drawn.tolist()]

    def row(self) -> tuple[list[int], list[int]]:
        """A prompt and a response of the recipe's full length."""
        data = self.recipe.data
        return self.ids(data.max_prompt_tokens), self.ids(data.max_response_tokens)

    def sft(self) -> None:
        """One optimizer step of SFT."""
        settings, backbone = self.recipe.sft, self.session.backbone
        assert settings is not None
        backbone.adapters.add("sft", self.recipe.lora)
        self.frozen = backbone.checksum()  # taken here, as PEFT renames what it wraps
        rows = [self.row() for _ in range(settings.batch_size)]
        task = Task(
            stage="sft",
            lengths=[len(p) + len(r) for p, r in rows],
            counts=[len(r) for _, r in rows],
            loss=lambda items: demonstration_loss(backbone, [rows[i] for i in items]),
            evaluate=lambda: {"heldout/loss": 1.0},
        )
        with self.timed("sft"):
            fit(self.session, settings.model_copy(update={"epochs": 1.0}), task)
        backbone.adapters.freeze("sft")

    def reward(self) -> None:
        """One optimizer step of the reward model."""
        settings, adapters = self.recipe.reward, self.session.backbone.adapters
        assert settings is not None
        answers = self.recipe.rank.answers if self.recipe.rank else 2
        adapters.copy("sft", "reward")
        adapters.add_head("reward")
        ranking = tuple((i,) for i in range(answers))
        groups = [
            Group(self.row()[0], [self.row()[1] for _ in range(answers)], ranking)
            for _ in range(settings.batch_size)
        ]
        task = Task(
            stage="reward",
            lengths=[g.tokens for g in groups],
            counts=[1] * len(groups),
            loss=lambda items: group_loss(self.session, [groups[i] for i in items]),
            evaluate=lambda: {"heldout/loss": 1.0},
        )
        with self.timed("reward"):
            fit(self.session, settings.model_copy(update={"epochs": 1.0}), task)
        adapters.freeze("reward")

    def ppo(self) -> None:
        """One round of PPO; the KL before its first update must be exactly 0."""
        settings, backbone = self.recipe.ppo, self.session.backbone
        assert settings is not None
        backbone.adapters.copy("sft", "policy")
        if settings.value == "adapter":
            backbone.adapters.copy("reward", "value")
        else:
            backbone.adapters.add_head("value")
        trainer = PpoTrainer(
            backbone=backbone,
            settings=settings,
            sampling=Sampling(self.recipe.data.max_response_tokens, settings.temperature),
            budget=self.session.budget,
            score=self._score,
            rollout_rows=self.session.rollout_rows,
        )
        prompts = [self.row()[0] for _ in range(settings.batch_size)]
        with self.timed("ppo collect"):
            rollout = trainer.collect(prompts, list(range(len(prompts))))
        experience = trainer.judge(rollout)
        with self.timed("ppo update"):
            # Past the warm-up of the value, so that policy and value both train.
            metrics = trainer.update(experience, settings.value_warmup_steps, 100)
        tokens = int(rollout.sequences.lengths.sum())
        self.facts |= {
            "ppo tokens": tokens,
            "ppo rows": len(prompts),
            "kl before the first update": _kl(rollout.logprobs, rollout.ref_logprobs),
            "sampler gap, nats a token": rollout.sampler_gap,
            "ppo metrics": metrics,
        }

    def _score(self, sequences: Sequences) -> Tensor:
        backbone = self.session.backbone
        head = backbone.adapters.heads["reward"]
        with backbone.adapters.use("reward"):
            (scores,) = map_rows(
                sequences, self.session.budget.tokens, lambda s: (score_forward(backbone, s, head),)
            )
        return scores


def _kl(logprobs: Tensor, ref_logprobs: Tensor) -> float:
    return float((logprobs - ref_logprobs).abs().max())


def run_check(name: str, gib: float | None, folder: Path, console: Console) -> dict[str, Any]:
    """Everything measured for one recipe; an error is a result too."""
    recipe_name, *overrides = name.split()
    recipe = load_recipe(recipe_name, overrides)
    memory = plan(recipe, gib)
    result: dict[str, Any] = {"plan": asdict(memory)}
    if gib is not None:
        whole = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - 0.75) / whole))
    check = Check(recipe, memory, folder, console)
    steps: tuple[Callable[[], None], ...] = (check.sft, check.reward, check.ppo)
    for step in steps:
        step()
    result |= {
        "memory": memory_report(memory),
        "seconds": check.seconds,
        "micro_batch_tokens at the end": check.session.budget.tokens,
        "frozen weights unchanged": check.session.backbone.checksum() == check.frozen,
        **check.facts,
    }
    if check.device.type == "cuda":
        result |= _card_facts(check.device)
    return result


def _card_facts(device: torch.device) -> dict[str, float | str]:
    """What the allocator keeps, and what the process takes beside it (context and libraries)."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "reserved_gib": reserved / GIB,
        "context_gib": (total - free - reserved) / GIB,
    }


def card_of(name: str) -> float:
    """The card a recipe is named for: qwen3-4b-16gb is 16."""
    return float(name.split()[0].rsplit("-", 1)[-1].removesuffix("gb"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; 0 when every one ran and fitted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="names, each with its overrides in one string")
    parser.add_argument("--out", type=Path, required=True, help="JSON, rewritten after each recipe")
    parser.add_argument("--tiny", action="store_true", help="the embedded base on the CPU")
    options = parser.parse_args(arguments)
    console = Console()
    results: dict[str, Any] = {}
    for name in [TINY] if options.tiny else options.recipes or RECIPES:
        console.rule(name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                gib = None if options.tiny else card_of(name)
                results[name] = run_check(name, gib, Path(folder), console)
            except (torch.cuda.OutOfMemoryError, UserError) as error:
                results[name] = {"error": str(error)}
        console.print_json(data=results[name].get("memory", results[name]))
        write_atomically(options.out, json.dumps(results, indent=1) + "\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
