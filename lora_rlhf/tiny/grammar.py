"""Turns the frames of `lora_rlhf.tiny.words` into requests, answers and reviews.

Every answer is drawn slot by slot: each of the five quality slots is good or poor
independently of the others and a poor slot is replaced, never left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_rlhf.tiny import words as w

SLOTS: tuple[str, ...] = ("character", "object", "courtesy", "vivid", "ending")

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
# Even a vivid writer uses a plain adjective now and then, and the other way round.
_VIVID_RATE = {True: 0.9, False: 0.1}


@dataclass(frozen=True)
class Pair:
    """What a request is about: a character and an object of the toy world."""

    character: str
    object: str


@dataclass(frozen=True)
class Answer:
    """A drawn answer with the truth about how it was drawn."""

    kind: str
    pair: Pair
    text: str
    good: dict[str, bool]
    flaw: str = ""
    wrong_character: str = ""


def is_heldout(pair: Pair) -> bool:
    """Whether no training text may hold this pair.

    The rule is a Latin pattern: each character misses an equal fifth of the objects and
    the other way round, so every single word is still seen in training.
    """
    column = w.CHARACTERS.index(pair.character) + 2 * w.OBJECTS.index(pair.object)
    return column % 5 == 0


def all_pairs(heldout: bool) -> list[Pair]:
    """All (character, object) pairs of one side of the split, in a fixed order."""
    pairs = (Pair(c, o) for c in w.CHARACTERS for o in w.OBJECTS)
    return [pair for pair in pairs if is_heldout(pair) is heldout]


def fill(frame: str, rng: random.Random, given: Mapping[str, str], vivid: float = 0.5) -> str:
    """Fills the slots of a frame, then mends "a" before a vowel.

    Args:
        frame: Text with ``{name}`` slots, see `lora_rlhf.tiny.words`.
        rng: Source of the free choices.
        given: Fixed values by slot name; the other slots are drawn.
        vivid: Probability that an adjective is a vivid one.
    """
    free: dict[str, Sequence[str]] = {
        "p": w.PLACES, "t": w.TIMES, "f": w.FEELINGS, "v": w.ACTIONS, "m": w.MANNERS,
        "w": w.HELPERS, "bland": w.BLAND_EVENTS,
    }  # fmt: skip

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in given:
            return given[name]
        if name == "a":
            return rng.choice(w.VIVID if rng.random() < vivid else w.BLAND)
        if name == "lesson":
            return f"{rng.choice(w.VIRTUES)} {rng.choice(w.LESSONS)}"
        return rng.choice(free[name])

    return _ARTICLE.sub(r"\1n ", _SLOT.sub(value, frame))


def request(kind: str, phrasing: int, pair: Pair) -> str:
    """The request of a kind in one of its phrasings about a pair."""
    frame = w.REQUESTS[kind][phrasing]
    text = frame.replace("{c}", pair.character).replace("{o}", pair.object)
    return _ARTICLE.sub(r"\1n ", text)


def draw_answer(
    rng: random.Random,
    kind: str,
    pair: Pair,
    rate: float,
    naming: float | None = None,
    wrong_character: str = "",
) -> Answer:
    """Draws an answer of four to six sentences, 35 to 65 words.

    Args:
        rng: Source of all choices.
        kind: One of `words.KINDS`.
        pair: The requested pair.
        rate: Probability of each quality slot to be good.
        naming: The same for the two names, if it is another.
        wrong_character: Name to use in place of the requested one (a flawed answer).
    """
    named = rate if naming is None else naming
    good = {
        slot: rng.random() < (named if slot in ("character", "object") else rate) for slot in SLOTS
    }
    if wrong_character:
        good["character"] = False
    character = pair.character if good["character"] else rng.choice(w.VAGUE_CHARACTERS)
    given = {
        "c": wrong_character or character,
        "o": pair.object if good["object"] else rng.choice(w.VAGUE_OBJECTS),
        "what": rng.choice(w.WHAT[kind]),
    }
    frames = [rng.choice(w.KIND_OPENINGS if good["courtesy"] else w.CURT_OPENINGS)]
    frames.append(rng.choice(w.INTROS[kind]))
    frames.extend(rng.sample(w.MIDDLES[kind], 2))
    if rng.random() < 0.5:
        frames.append(rng.choice(w.EXTRAS))
    frames.append(rng.choice(w.GOOD_ENDINGS if good["ending"] else w.POOR_ENDINGS))
    vivid = _VIVID_RATE[good["vivid"]]
    text = " ".join(fill(frame, rng, given, vivid) for frame in frames)
    return Answer(kind, pair, text, good, "wrong" if wrong_character else "", wrong_character)


def spoil(rng: random.Random, answer: Answer, flaw: str) -> Answer:
    """Returns the answer with one sentence said twice or with its end cut off.

    Args:
        rng: Source of the choices.
        answer: A flawless answer.
        flaw: ``"repeat"`` or ``"unfinished"``.
    """
    sentences = re.findall(r"[^.]+\.", answer.text)
    if flaw == "repeat":
        at = rng.randrange(1, len(sentences) - 1)
        text = "".join([*sentences[: at + 1], sentences[at], *sentences[at + 1 :]])
        return replace(answer, text=text, flaw=flaw)
    last = sentences[-1].split()
    kept = " ".join(last[: rng.randrange(2, len(last) - 1)])
    good = {**answer.good, "ending": False}
    return replace(answer, text="".join(sentences[:-1]) + " " + kept, good=good, flaw=flaw)


def review(rng: random.Random, answer: Answer) -> str:
    """A reader's remarks on an answer: what it did, what it missed, and a verdict."""
    names = {"c": answer.pair.character, "o": answer.pair.object}
    remarks = []
    for slot in SLOTS:
        praise, blame = w.REVIEWS[slot]
        frame = rng.choice(praise if answer.good[slot] else blame)
        remarks.append(fill(frame, rng, names))
    if answer.flaw:
        frame = rng.choice(w.FLAW_REVIEWS[answer.flaw])
        remarks.append(fill(frame, rng, {"x": answer.wrong_character}))
    rng.shuffle(remarks)
    remarks = remarks[: rng.randrange(3, len(remarks) + 1)]
    score = sum(answer.good.values()) - (answer.flaw in ("repeat", "unfinished"))
    verdict = f"The answer is {w.VERDICTS[max(score, 0)]}."
    # Said first, the verdict has to be felt before it can be reasoned out.
    remarks.insert(0 if rng.random() < 0.5 else len(remarks), verdict)
    return "Review: " + " ".join(remarks)
