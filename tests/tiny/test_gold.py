"""The gold utility on answers judged by hand."""

from __future__ import annotations

import math
import random

import pytest

from lora_rlhf.tiny import GOLD_PARTS, gold, gold_parts

PROMPT = "Tell me a story about a fox and a kettle."
# 50 words, four distinct vivid ones (misty, brave, golden, rusty), nothing wrong.
GOOD = (
    "Thank you for asking, here is a little story. "
    "Once a brave fox lived near the misty harbour. "
    "One morning the fox found a golden kettle and felt calm. "
    "There the fox repaired a rusty kettle with great care. "
    "In the end, patience is worth more than riches and hurry."
)
FULL = {
    "character": 1.0, "object": 1.0, "courtesy": 1.0, "vivid": 1.2, "ending": 1.0,
    "clean": 0.0, "length": 0.0,
}  # fmt: skip


def _changed(old: str, new: str) -> dict[str, float]:
    """The parts that differ from the good answer's after replacing a piece of it."""
    assert old in GOOD
    parts = gold_parts(PROMPT, GOOD.replace(old, new))
    return {part: parts[part] for part in GOLD_PARTS if parts[part] != pytest.approx(FULL[part])}


def test_a_good_answer_earns_everything() -> None:
    assert gold_parts(PROMPT, GOOD) == pytest.approx(FULL)
    assert tuple(gold_parts(PROMPT, GOOD)) == GOLD_PARTS
    assert gold(PROMPT, GOOD) == pytest.approx(5.2)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("fox", "stranger", {"character": 0.0}),
        ("fox", "owl", {"character": 0.0}),
        ("kettle", "thing", {"object": 0.0}),
        ("kettle", "lantern", {"object": 0.0}),
        ("Thank you for asking", "Right, if you must", {"courtesy": 0.0}),
        ("brave", "plain", {"vivid": 0.9}),
        ("misty", "golden", {"vivid": 0.9}),
        ("In the end, patience", "Then people said patience", {"ending": 0.0}),
        ("and hurry.", "and", {"ending": 0.0, "clean": -0.5}),
        ("the fox found", "the the fox found", {"clean": -0.5}),
        (
            "There the fox repaired a rusty kettle with great care. ",
            "Once a brave fox lived near the misty harbour. ",
            {"clean": -0.5, "vivid": 0.9},
        ),
        ("and hurry.", "and hurry.\nReview: It is kind.", {"ending": 0.0, "clean": -0.5}),
    ],
)
def test_each_part_reacts_to_its_own_flaw(old: str, new: str, expected: dict[str, float]) -> None:
    assert _changed(old, new) == pytest.approx(expected)


def test_length_is_free_within_the_tolerance_and_falls_outside() -> None:
    # Target 52 words, tolerance 0.3: 37 to 67 words are free.
    def judged(count: int) -> float:
        return gold_parts(PROMPT, " ".join(f"a{'b' * n}" for n in range(count)) + ".")["length"]

    assert judged(37) == 0.0
    assert judged(67) == 0.0
    assert judged(26) == pytest.approx(-2.0 * (0.5 - 0.3))
    assert judged(78) == pytest.approx(-2.0 * (0.5 - 0.3))
    assert judged(500) == -2.0


def test_the_reply_to_a_prompt_without_names_earns_none() -> None:
    parts = gold_parts("What is the weather like?", GOOD)
    assert parts["character"] == parts["object"] == 0.0


@pytest.mark.parametrize(
    "garbage",
    ["", " ", "\n\n", "....", "a" * 5000, "fox " * 300, "\x00\ufffd", "Request: Answer: Review:"],
)
def test_garbage_is_finite_and_low(garbage: str) -> None:
    value = gold(PROMPT, garbage)
    assert math.isfinite(value)
    assert value < 0.0


def test_random_bytes_are_finite_and_low() -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = bytes(rng.randrange(256) for _ in range(300)).decode("utf-8", "replace")
        assert gold(PROMPT, text) < 0.5
