"""Very short runs on the embedded base, inside the test's own process: seconds for a pipeline."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lora_rlhf import tiny
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Answer
from lora_rlhf.recipe import Recipe
from lora_rlhf.recipe_io import parse_recipe
from lora_rlhf.runs import Run
from lora_rlhf.training.optim import TokenBudget
from lora_rlhf.training.session import Session

RECIPE = """
name: small
base: {model: builtin:tiny, device: cpu}
lora: {rank: 4, alpha: 8}
data:
  demonstrations: {path: DIR/demonstrations.jsonl}
  rankings: {path: DIR/rankings.jsonl}
  prompts: {path: DIR/prompts.jsonl}
  max_prompt_tokens: 32
  max_response_tokens: 16
  heldout_fraction: 0.25
sft: {learning_rate: 5.0e-3, batch_size: 8, epochs: 3}
reward: {learning_rate: 1.0e-3, batch_size: 8}
ppo:
  learning_rate: 1.0e-3
  value_learning_rate: 1.0e-3
  steps: 2
  batch_size: 8
  minibatch_size: 4
  value_warmup_steps: 0
  sample_prompts: 2
"""


# Few and plain, so that a handful of steps teaches the base to end its answers.
_SENTENCES = tuple(
    f"{start} {thing}."
    for start in ("It is", "I like", "Here is")
    for thing in (
        "a small cup",
        "the old road",
        "a kind cook",
        "the blue lake",
        "a quiet town",
        "the red hat",
    )
)


def write_data(directory: Path, count: int = 40) -> None:
    """Demonstrations of one short sentence, rankings of three such answers, prompts, texts."""
    rows = tiny.demonstrations(3 * count, 0)
    sentences = [_SENTENCES[i * 5 % len(_SENTENCES)] for i in range(len(rows))]
    demonstrations = [
        {"prompt": r["prompt"], "response": s} for r, s in zip(rows, sentences, strict=True)
    ]
    rankings = []
    for i in range(count):
        prompt, good = rows[i]["prompt"], sentences[i]
        poor, worst = sentences[i + 1], "no no no no no"
        ranking = [[1], [0], [2]] if i % 2 else [[1], [0, 2]]
        rankings.append({"prompt": prompt, "responses": [poor, good, worst], "ranking": ranking})
    files = {
        "demonstrations": demonstrations[:count],
        "rankings": rankings,
        "prompts": [{"prompt": p["prompt"]} for p in tiny.prompts(count, 0, heldout=False)],
        "text": [{"text": f"{r['prompt']} {s}"} for r, s in zip(rows, sentences, strict=True)],
    }
    for name, records in files.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def small_recipe(directory: Path, *overrides: str) -> Recipe:
    """The recipe above over `write_data`'s files."""
    return parse_recipe(RECIPE.replace("DIR", str(directory)), "small.yaml", overrides)


def session(recipe: Recipe | None, path: Path, backbone: Backbone, tokens: int = 512) -> Session:
    """A session that talks into a string, `session.console.file`."""
    made = Session(
        recipe=recipe,  # type: ignore[arg-type]
        run=Run(path),
        backbone=backbone,
        console=Console(file=io.StringIO(), width=200),
        budget=TokenBudget(tokens, lambda text: made.tell(text)),
        rollout_rows=64,
        force=True,
    )
    return made


def answers(lengths: Sequence[int], vocabulary: int, end: int, seed: int = 0) -> list[Answer]:
    """Random answers of these lengths; every other one has its end token."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        ended = row % 2 == 0
        made.append(Answer([*ids[:-1], end] if ended else ids, ended, [0.0] * length))
    return made


def gradients(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector, zeros where there are none; they are cleared."""
    parts = []
    for parameter in parameters:
        grad = parameter.grad
        parts.append(torch.zeros(parameter.numel()) if grad is None else grad.flatten().clone())
        parameter.grad = None
    return torch.cat(parts)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())
