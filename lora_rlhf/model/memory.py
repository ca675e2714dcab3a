"""The memory plan: what a recipe needs on a card, before anything is loaded.

The run records the measured peak of each phase beside the predicted one: `measure_phase` around
the phase, `memory_report` at the end.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_rlhf.errors import HardwareError
from lora_rlhf.model.backbone import pick_device, pick_dtype
from lora_rlhf.model.footprint import FRAGMENTATION, GIB, USABLE, Card, Footprint
from lora_rlhf.model.shapes import base_config, read_shape
from lora_rlhf.recipe import Recipe

MOST_TOKENS = 8192
CPU_TOKENS = 4096  # more do not make a CPU faster
MOST_ROWS = 64  # decoded at once, where PPO's batch does not ask for more
# Each pass over a 4-bit layer unpacks it first, at the cost of about this many tokens' arithmetic
# (4.5 bytes of traffic a weight against 2 operations a token and weight, on an RTX 4090).
_UNPACK_TOKENS = 368
_TIGHT = 0.9
_SPARE = 1.25


@dataclass(frozen=True)
class MemoryPlan:
    """What a recipe needs on a card, and the settings chosen to make it fit.

    Attributes:
        card_name: the GPU, or the machine's memory where there is none.
        card_gib: its size.
        phases: predicted peak of load, rollout, score and train, in GiB, as they are measured:
            allocated tensors on a GPU, resident memory of the process on a CPU.
        needs_gib: what the card must have: the highest phase, fragmentation and the context.
        stages: predicted peak of each stage of the recipe, in GiB, over its own phases.
        terms: where the memory goes, in GiB; not all of them live at once.
        micro_batch_tokens: most tokens (padding counted) in one training forward.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        rollout_rows: answers decoded at once.
        adapter_parameters: trainable parameters of one adapter.
        fits: whether `needs_gib` is within the usable share of the card.
        advice: what to change, most useful first; empty when there is nothing to say.
    """

    card_name: str
    card_gib: float
    phases: dict[str, float]
    stages: dict[str, float]
    needs_gib: float
    terms: dict[str, float]
    micro_batch_tokens: int
    gradient_checkpointing: bool
    rollout_rows: int
    adapter_parameters: int
    fits: bool
    advice: tuple[str, ...] = ()

    @property
    def usable_gib(self) -> float:
        """The share of the card that is planned for."""
        return USABLE * self.card_gib


def plan(recipe: Recipe, vram_gib: float | None = None) -> MemoryPlan:
    """Predict the memory of every phase of a recipe, and choose what makes it fit.

    needs = context + 1.05 * max over phases of
        (weights + embeddings and head + adapters + what the phase itself holds)

    Args:
        recipe: its base.micro_batch_tokens and base.gradient_checkpointing are taken as they are
            where set.
        vram_gib: plan for a GPU of this size; unset: this machine's device.

    Returns:
        A plan, which may say that the recipe does not fit.

    Raises:
        ConfigError: the base model's config cannot be had.
        HardwareError: the recipe asks for a GPU that is not there and no size is given.

    Source: QLoRA (arXiv:2305.14314) for 4-bit storage; activation bytes were counted with
    autograd's saved-tensor hooks. Context and fragmentation are assumptions.
    """
    card = _card(recipe, vram_gib)
    config = base_config(recipe.base)
    chosen = _choose(Footprint(recipe, read_shape(config, recipe.lora), card))
    return replace(chosen, advice=tuple(_advice(recipe, card, config, chosen)))


def _card(recipe: Recipe, vram_gib: float | None) -> Card:
    if vram_gib is not None:
        width = 4 if recipe.base.dtype == "float32" else 2
        return Card(f"a GPU of {vram_gib:g} GB", vram_gib, True, width)
    device = pick_device(recipe.base.device)
    width = pick_dtype(recipe.base.dtype, device).itemsize
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return Card(facts.name, facts.total_memory / GIB, True, width)
    return Card("this machine's memory (no GPU)", machine_memory() / GIB, False, width)


def machine_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's if that is less.

    Raises:
        HardwareError: the system does not tell.
    """
    if not hasattr(os, "sysconf"):
        raise HardwareError(
            "The size of this machine's memory cannot be read on this system. Give a size to plan "
            "for, such as `lora-rlhf plan RECIPE --vram 16`."
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


# -- the choice ----------------------------------------------------------------------------------


def _choose(footprint: Footprint) -> MemoryPlan:
    """The plan with the cheapest settings that fit, or the smallest ones where none do."""
    checkpointing, tokens = _micro_batch(footprint)
    rows = _rollout_rows(footprint)
    peaks = {s: _peaks(footprint, s, tokens, checkpointing, rows) for s in footprint.recipe.stages}
    phases = {"load": footprint.load()}
    for name in ("rollout", "score", "train"):
        sizes = [own[name] for own in peaks.values() if name in own]
        if sizes:
            phases[name] = max(sizes)
    needs = footprint.needs(max(phases.values()))
    terms = footprint.terms(tokens, checkpointing, rows)
    return MemoryPlan(
        card_name=footprint.card.name,
        card_gib=footprint.card.gib,
        phases={name: peak / GIB for name, peak in phases.items()},
        stages={stage: max(own.values()) / GIB for stage, own in peaks.items()},
        needs_gib=needs / GIB,
        terms={name: size / GIB for name, size in terms.items()},
        micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing,
        rollout_rows=rows,
        adapter_parameters=footprint.shape.adapter,
        fits=needs <= footprint.budget,
    )


def _peaks(
    footprint: Footprint, stage: str, tokens: int, checkpointing: bool, rows: int
) -> dict[str, float]:
    """Peak bytes of each phase that a stage has."""
    peaks = {"score": footprint.score(stage, tokens)}
    if stage in footprint.sampled:
        peaks["rollout"] = footprint.rollout(stage, rows)
    if stage in footprint.trained:
        peaks["train"] = footprint.train(stage, tokens, checkpointing)
    return peaks


def _micro_batch(footprint: Footprint) -> tuple[bool, int]:
    """Whether to checkpoint, and the micro-batch, that cost the least time a token.

    A token costs a forward and a backward over the frozen weights (2 passes), 3 with
    checkpointing; every pass unpacks the weights once a micro-batch.
    """
    base = footprint.recipe.base
    unset = base.gradient_checkpointing is None
    options = (False, True) if unset else (bool(base.gradient_checkpointing),)
    unpacking = _UNPACK_TOKENS if footprint.quantised and footprint.card.is_gpu else 0
    fitting = []
    for checkpointing in options:
        tokens = base.micro_batch_tokens or _most_tokens(footprint, checkpointing)
        peaks = [footprint.train(s, tokens, checkpointing) for s in footprint.trained]
        if footprint.needs(max(peaks, default=0.0)) <= footprint.budget:
            cost = (3 if checkpointing else 2) * (1 + unpacking / tokens)
            fitting.append((cost, checkpointing, tokens))
    if fitting:
        _, checkpointing, tokens = min(fitting)
        return checkpointing, tokens
    return options[-1], base.micro_batch_tokens or footprint.sequence


def _most_tokens(footprint: Footprint, checkpointing: bool) -> int:
    """Half of the tokens the arithmetic allows, but no less than one whole sequence.

    Half, because the arithmetic has not been calibrated on real allocators near a card's edge.
    """
    most = MOST_TOKENS if footprint.card.is_gpu else CPU_TOKENS
    for stage in footprint.trained:
        longest = footprint.longest(stage)
        fixed = footprint.needs(footprint.train(stage, longest, checkpointing))
        each = FRAGMENTATION * footprint.activations(1.0, checkpointing)
        most = min(most, int(longest + (footprint.budget - fixed) / each) // 2)
    return max(most // 64 * 64, footprint.sequence)


def _rollout_rows(footprint: Footprint) -> int:
    """Rows whose cache and passes fit with a quarter to spare, in eights.

    An allocation that fails while sampling ends the run, where one in training halves the batch.
    """
    ppo = footprint.recipe.ppo
    rows = max(MOST_ROWS, ppo.batch_size if ppo else 0)
    for stage in footprint.sampled:
        none = footprint.needs(footprint.rollout(stage, 0.0))
        each = footprint.needs(footprint.rollout(stage, 1.0)) - none
        rows = min(rows, int((footprint.budget - none) / (_SPARE * each)))
    return max(1, rows // 8 * 8 if rows >= 8 else rows)


# -- advice --------------------------------------------------------------------------------------


def _advice(recipe: Recipe, card: Card, config: Any, chosen: MemoryPlan) -> Iterator[str]:
    if not chosen.fits:
        yield from _smaller(recipe, card, config, chosen)
        return
    if chosen.needs_gib > _TIGHT * chosen.card_gib:
        yield "It is tight: close what else uses the card (a browser and a desktop take 0.5-1 GB)."
    if recipe.ppo is not None and chosen.rollout_rows < recipe.ppo.batch_size:
        yield (
            f"Answers are decoded {chosen.rollout_rows} at a time, because ppo.batch_size="
            f"{recipe.ppo.batch_size} rows of cache do not fit; this costs time, not quality."
        )
    if recipe.lora.use_dora:
        yield "lora.use_dora keeps more activations than this plan counts; leave some room."


def _smaller(recipe: Recipe, card: Card, config: Any, chosen: MemoryPlan) -> Iterator[str]:
    """Single changes that save memory, those that make the recipe fit first."""
    found = []
    for words, changed in _changes(recipe):
        other = _choose(Footprint(changed, read_shape(config, changed.lora), card))
        if other.needs_gib < chosen.needs_gib - 0.05:
            verdict = "fits" if other.fits else "does not fit yet"
            line = f"{words}: needs {other.needs_gib:.1f} GB, {verdict}."
            found.append((not other.fits, other.needs_gib, line))
    yield from (line for _, _, line in sorted(found))
    yield "Or take a smaller base.model; `lora-rlhf recipes` lists one for each size of card."


def _changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Changes worth trying, each with its words for the user."""
    base = recipe.base
    if base.quantization == "none":
        yield "base.quantization=nf4", _with(recipe, "base", quantization="nf4")
    if base.gradient_checkpointing is False:
        free = _with(recipe, "base", gradient_checkpointing=None)
        yield "base.gradient_checkpointing=null", free
    if base.micro_batch_tokens is not None:
        yield "base.micro_batch_tokens=null", _with(recipe, "base", micro_batch_tokens=None)
    if recipe.ppo is not None and recipe.ppo.value == "adapter":
        yield "ppo.value=shared", _with(recipe, "ppo", value="shared")
    if recipe.lora.rank > 8:
        yield "lora.rank=8", _with(recipe, "lora", rank=8)
    half = recipe.data.max_response_tokens // 2
    if half >= 64:
        yield f"data.max_response_tokens={half}", _with(recipe, "data", max_response_tokens=half)


def _with(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    changed = getattr(recipe, section).model_copy(update=fields)
    return recipe.model_copy(update={section: changed})


# -- measuring -----------------------------------------------------------------------------------

_measured: dict[str, float] = {}
_open: list[str] = []


@contextmanager
def measure_phase(name: str, device: torch.device) -> Iterator[None]:
    """Record the peak memory of the block as a phase: load, rollout, score or train.

    On a GPU: torch's peak of allocated tensors. On a CPU: the process's peak resident memory so
    far, which never falls. A phase that is entered again keeps its highest peak; one inside
    another is counted as the inner one alone.
    """
    _close_peak(device)
    _open.append(name)
    try:
        yield
    finally:
        _close_peak(device)
        _open.pop()


def _close_peak(device: torch.device) -> None:
    """Credit the peak so far to the phase that is open, and start a new one."""
    if _open:
        _measured[_open[-1]] = max(_measured.get(_open[-1], 0.0), peak_memory_gib(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak of allocated tensors on a GPU since the last reset; of the whole process on a CPU.

    Zero on a system without `resource` (Windows) and without a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (GIB if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def memory_report(predicted: MemoryPlan | None) -> dict[str, dict[str, float]]:
    """What `summary.json` holds under `memory`: predicted beside measured GiB, a phase each."""
    report: dict[str, dict[str, float]] = {}
    if predicted is not None:
        for name, size in predicted.phases.items():
            report.setdefault(name, {})["predicted_gib"] = round(size, 3)
    for name, size in _measured.items():
        report.setdefault(name, {})["measured_gib"] = round(size, 3)
    return report


def forget_measurements() -> None:
    """Start measuring anew, for another run in the same process."""
    _measured.clear()
