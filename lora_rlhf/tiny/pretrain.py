"""Makes the embedded base: corpus, tokenizer, a small Llama, files.

    python -m lora_rlhf.tiny.pretrain --out DIR

Deterministic by seed for one version of torch and one number of threads. About twelve
minutes on one to two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_rlhf.tiny import world
from lora_rlhf.tiny.tokenizer import EOS, build_tokenizer, save_tokenizer

IGNORED = -100
HELDOUT_DOCUMENTS = 400
HELDOUT_SEED = 1


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of a pretraining run; the counts of documents set its length.

    Three phases follow each other: the plain mix, lessons in looking names up, and a
    closing mix of both. The mix alone taught this size to copy objects and left it
    guessing the characters; a minute of lessons cures that.
    """

    documents: int = 80_000
    lessons: int = 12_000
    closing_documents: int = 14_000
    closing_lessons: int = 3_000
    tokenizer_documents: int = 12_000
    vocabulary: int = 1408
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 384
    positions: int = 512
    row: int = 256
    batch: int = 8
    lesson_batch: int = 32
    learning_rate: float = 3e-3
    later_learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Phase:
    """A stretch of training over rows of token ids, with its own optimizer and schedule."""

    name: str
    rows: list[list[int]]
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float
    decays: bool = True


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model; every linear layer reads a multiple of 64 features (NF4 blocks)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of documents, each with one BOS before and one EOS behind."""
    start = tokenizer.bos_token or ""
    whole = [f"{start}{text}{EOS}" for text in texts]
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def pack(documents: Sequence[list[int]], row: int, window: int = 64) -> Iterator[list[int]]:
    """Packs whole documents into rows of at most `row` tokens, first fit.

    A document is never cut: a tail without its request would teach the model to invent
    names in place of copying them.

    Args:
        documents: Token ids by document; longer ones than `row` are left out.
        row: Tokens a row.
        window: Open rows kept; the oldest is closed when another is needed.
    """
    open_rows: list[list[int]] = []
    for ids in documents:
        if len(ids) > row:
            continue
        home = next((held for held in open_rows if len(held) + len(ids) <= row), None)
        if home is not None:
            home.extend(ids)
            continue
        if len(open_rows) == window:
            yield open_rows.pop(0)
        open_rows.append(list(ids))
    yield from open_rows


def collate(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pads to the right; returns input ids and labels, both ``[rows, longest]``."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    for at, held in enumerate(rows):
        ids[at, : len(held)] = labels[at, : len(held)] = torch.tensor(held)
    return ids, labels


def loss_of(
    model: LlamaForCausalLM, ids: Tensor, labels: Tensor, reduction: str = "mean"
) -> Tensor:
    """Next-token cross-entropy in nats; right padding needs no attention mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def heldout_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = HELDOUT_DOCUMENTS
) -> float:
    """Mean loss by token over documents about held-out pairs, one document a row."""
    texts = [row["text"] for row in world.heldout_text(count, HELDOUT_SEED)]
    documents = encode(texts, tokenizer)
    total, tokens = 0.0, 0
    for at in range(0, len(documents), 32):
        ids, labels = collate(documents[at : at + 32], tokenizer.pad_token_id)
        total += loss_of(model, ids, labels, "sum").item()
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / tokens


def build_phases(
    texts: Sequence[str], settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast
) -> list[Phase]:
    """The phases of a run, those without rows left out.

    Args:
        texts: The plain documents of the first phase.
        settings: Sizes and schedule.
        tokenizer: The base's tokenizer.
    """
    seed, peak, later = settings.seed, settings.learning_rate, settings.later_learning_rate
    mix = list(pack(encode(texts, tokenizer), settings.row))
    random.Random(seed).shuffle(mix)
    # One lesson a row: other documents in sight would only offer names to confuse.
    lessons = [row["text"] for row in world.lessons(settings.lessons, seed)]
    drills = encode(lessons, tokenizer) if lessons else []
    last = [row["text"] for row in world.plain_text(settings.closing_documents, seed + 1)]
    last += [row["text"] for row in world.lessons(settings.closing_lessons, seed + 1)]
    random.Random(seed + 1).shuffle(last)
    closing = list(pack(encode(last, tokenizer), settings.row)) if last else []
    random.Random(seed).shuffle(closing)
    phases = (
        Phase("mix", mix, settings.batch, peak, 100, settings.weight_decay),
        Phase("lessons", drills, settings.lesson_batch, later, 20, 0.0, decays=False),
        Phase("closing", closing, settings.batch, later, 20, 0.0),
    )
    return [phase for phase in phases if phase.rows]


def _schedule(step: int, steps: int, phase: Phase) -> float:
    """The share of the phase's learning rate that a step takes: warm-up, then cosine."""
    if step < phase.warmup:
        return (step + 1) / phase.warmup
    if not phase.decays:
        return 1.0
    done = (step - phase.warmup) / max(1, steps - phase.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def train(model: LlamaForCausalLM, phase: Phase, pad: int, report: Callable[[str], None]) -> int:
    """Trains one pass over a phase's rows with AdamW; returns the number of steps."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=phase.weight_decay
    )
    steps = len(phase.rows) // phase.batch
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * _schedule(step, steps, phase)
        ids, labels = collate(phase.rows[step * phase.batch : (step + 1) * phase.batch], pad)
        loss = loss_of(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == steps - 1:
            minutes = (time.monotonic() - started) / 60
            report(f"{phase.name} {step + 1}/{steps}  loss {loss.item():.3f}  {minutes:.1f} min")
    return steps


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes half-precision weights, configurations and tokenizer files."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(
        **ends, eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=1.0, top_k=0
    )
    model.half().save_pretrained(out)
    save_tokenizer(tokenizer, out)


def pretrain(
    out: Path, settings: PretrainSettings, report: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the whole program.

    Args:
        out: Directory for the model; made if missing.
        settings: Sizes and schedule.
        report: Receives lines of progress.

    Returns:
        The record that is written to ``pretrain.json``.
    """
    started = time.monotonic()
    texts = [row["text"] for row in world.plain_text(settings.documents, settings.seed)]
    tokenizer = build_tokenizer(texts[: settings.tokenizer_documents], settings.vocabulary)
    phases = build_phases(texts, settings, tokenizer)
    model = build_model(settings, tokenizer)
    size = sum(p.numel() for p in model.parameters())
    tokens = sum(len(row) for phase in phases for row in phase.rows)
    report(f"{size} parameters, {tokens} tokens")
    steps = sum(train(model, phase, tokenizer.pad_token_id, report) for phase in phases)
    out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, out)
    # Measured on the weights as saved, so that a reader of the files can repeat it.
    loss = heldout_loss(model.float().eval(), tokenizer)
    record = {
        "settings": asdict(settings),
        "parameters": size,
        "steps": steps,
        "tokens": tokens,
        "heldout": {"documents": HELDOUT_DOCUMENTS, "seed": HELDOUT_SEED, "loss": round(loss, 4)},
        "heldout_perplexity": round(math.exp(loss), 3),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    report(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded base.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--seed", type=int, default=PretrainSettings.seed)
    given = parser.parse_args()
    settings = PretrainSettings(seed=given.seed)
    pretrain(given.out, settings, lambda line: print(line, flush=True))  # noqa: T201


if __name__ == "__main__":
    main()
