"""The embedded base model and the small world that it comes from.

Light to import: no torch here. `BASE_PATH` is a model directory in the Hugging Face
format; ``python -m lora_rlhf.tiny.pretrain`` is the program that made it.
"""

from __future__ import annotations

from pathlib import Path

from lora_rlhf.tiny.gold import GOLD_PARTS, gold, gold_parts
from lora_rlhf.tiny.world import demonstrations, plain_text, prompts

BASE_PATH: Path = Path(__file__).resolve().parent / "base"

__all__ = [
    "BASE_PATH",
    "GOLD_PARTS",
    "demonstrations",
    "gold",
    "gold_parts",
    "plain_text",
    "prompts",
]
