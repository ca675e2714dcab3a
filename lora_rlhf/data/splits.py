"""Held-out splits by prompt, duplicates, and the check that nothing leaks."""

import hashlib
from collections.abc import Sequence

from lora_rlhf.data.records import (
    Demonstration,
    Prompt,
    R,
    Ranking,
    Record,
    Text,
    key_of,
    prompt_text,
)
from lora_rlhf.errors import DataError


def split_by_prompt(
    records: Sequence[R], fraction: float, salt: str = "", least: int = 1
) -> tuple[list[R], list[R]]:
    """(train, held out), decided by each prompt's hash alone.

    All records of a prompt fall on one side, in every stage and whatever else the file holds: what
    SFT held out, the reward model and PPO hold out too. Where chance leaves a side fewer than
    `least` prompts, it gets those with the nearest hashes, as far as there are enough for both.

    Args:
        records: in any order; each part keeps it.
        fraction: share of the prompts to hold out; 0 holds out none.
        salt: another split, independent of the one without: for records whose prompts all come
            from its training side already.
        least: prompts of each side.
    """
    keys = [_salted(key_of(record), salt) for record in records]
    distinct = sorted(set(keys))
    count = sum(int(key[:16], 16) < fraction * 16**16 for key in distinct)
    if fraction > 0:
        room = min(least, len(distinct) // 2)
        count = min(max(count, room), len(distinct) - room)
    heldout = set(distinct[:count])
    sides: tuple[list[R], list[R]] = ([], [])
    for key, record in zip(keys, records, strict=True):
        sides[key in heldout].append(record)
    return sides


def split_rankings(
    records: Sequence[Ranking], fraction: float, of_training_prompts: bool
) -> tuple[list[Ranking], list[Ranking]]:
    """`split_by_prompt` for the reward model: two prompts a side, where there are four.

    One held-out prompt tells neither an accuracy nor an interval.

    Args:
        records: in any order.
        fraction: share of the prompts to hold out.
        of_training_prompts: their answers were sampled to prompts of the training side, by a
            simulated labeler or in the app; SFT's own split would hold out none of them.
    """
    return split_by_prompt(records, fraction, "rank" if of_training_prompts else "", least=2)


def _salted(key: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}/{key}".encode()).hexdigest() if salt else key


def deduplicate(records: Sequence[R]) -> tuple[list[R], int]:
    """Records without repeats, in order, and how many were dropped.

    White space at the ends of prompts and texts does not make a record another one.
    """
    unique: dict[object, R] = {}
    for record in records:
        unique.setdefault((key_of(record), _rest(record)), record)
    return list(unique.values()), len(records) - len(unique)


def _rest(record: Record) -> object:
    """What makes two records of one prompt differ."""
    if isinstance(record, Demonstration):
        return record.response.strip()
    if isinstance(record, Prompt | Text):
        return None
    return record.responses, record.groups, record.tag, record.annotator


def leak_check(train: Sequence[Record], heldout: Sequence[Record]) -> None:
    """Make sure that both parts hold records and share no prompt.

    Raises:
        DataError: an empty part, or a prompt on both sides.
    """
    for name, part in (("training", train), ("held-out", heldout)):
        if not part:
            raise DataError(
                f"The {name} part is empty: there are too few different prompts to split. Found: "
                f"{len(train)} training and {len(heldout)} held-out records. Allowed: at least one "
                f"of each. Give more prompts."
            )
    leaked = shared_prompts(train, heldout)
    if leaked:
        shown = "; ".join(repr(text[:60]) for text in leaked[:3])
        raise DataError(
            f"{len(leaked)} held-out prompts are trained on too, such as {shown}. Remove them from "
            f"one of the two sources, or leave data.heldout_prompts out: then a part of the "
            f"prompts is held out by itself."
        )


def shared_prompts(train: Sequence[Record], heldout: Sequence[Record]) -> list[str]:
    """The different prompts that stand on both sides, as text."""
    seen = {key_of(record) for record in train}
    return list({k: _shown(r) for r in heldout if (k := key_of(r)) in seen}.values())


def _shown(record: Record) -> str:
    if isinstance(record, Text):
        return record.text.strip()
    return prompt_text(record.messages if isinstance(record, Prompt) else record.prompt).strip()
