"""The hidden utility of the toy world: what its one human likes, judged from text alone.

The rules know nothing of how a text was made, so they hold for samples of a model,
for garbage and for the empty string as well.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from lora_rlhf.tiny import words as w

GOLD_PARTS: tuple[str, ...] = (
    "character", "object", "courtesy", "vivid", "ending", "clean", "length",
)  # fmt: skip

# Points of a part in full. `vivid` is graded and so spreads less per point than a yes or no.
WEIGHTS: dict[str, float] = {
    "character": 1.0, "object": 1.0, "courtesy": 1.0, "vivid": 1.2, "ending": 1.0,
    "clean": 0.5, "length": 2.0,
}  # fmt: skip
VIVID_ENOUGH = 4  # distinct vivid words; more earn nothing
TARGET_WORDS = 52
TOLERANCE = 0.3  # of the target, free of charge to either side
MOST_FAULTS = 4

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_CHARACTERS, _OBJECTS, _VIVID = frozenset(w.CHARACTERS), frozenset(w.OBJECTS), frozenset(w.VIVID)
_SEEN_TOO_OFTEN = 6  # a word of at least four letters, in one answer


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _sentences(text: str) -> list[str]:
    found = (sentence.strip().lower() for sentence in _SENTENCE.findall(text))
    return [sentence for sentence in found if _words(sentence)]


def _names(prompt: list[str], response: list[str], nouns: frozenset[str]) -> float:
    """Share of the nouns asked for that the response names (0 where none is asked for)."""
    asked = nouns.intersection(prompt)
    return len(asked.intersection(response)) / len(asked) if asked else 0.0


def _faults(text: str, sentences: list[str]) -> int:
    """Counts repetitions, a missing full stop and lines that belong to another text."""
    said = _words(text)
    faults = len(sentences) - len(set(sentences))
    faults += sum(1 for one, two in pairwise(said) if one == two)
    often = Counter(word for word in said if len(word) > 3)
    faults += sum(1 for count in often.values() if count >= _SEEN_TOO_OFTEN)
    faults += not text.rstrip().endswith((".", "!", "?"))
    faults += len(re.findall(r"\b(?:Request|Answer|Review):", text))
    return min(faults, MOST_FAULTS)


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """Judges a response part by part.

    Args:
        prompt: The request, plain text.
        response: The answer, plain text; any string.

    Returns:
        Weighted points by part, in the order of `GOLD_PARTS`. `clean` and `length` are
        zero at best and negative otherwise, the others run from zero to their weight.
        The sum is the utility.
    """
    asked, said, sentences = _words(prompt), _words(response), _sentences(response)
    first, last = (sentences[0], sentences[-1]) if sentences else ("", "")
    finished = response.rstrip().endswith((".", "!", "?"))
    excess = abs(len(said) - TARGET_WORDS) / TARGET_WORDS - TOLERANCE
    raw = {
        "character": _names(asked, said, _CHARACTERS),
        "object": _names(asked, said, _OBJECTS),
        "courtesy": float(any(mark in first for mark in w.COURTESY_MARKS)),
        "vivid": min(len(_VIVID.intersection(said)), VIVID_ENOUGH) / VIVID_ENOUGH,
        "ending": float(finished and last.startswith(w.ENDING_MARKS)),
        "clean": -float(_faults(response, sentences)),
        "length": -min(max(excess, 0.0), 1.0),
    }
    return {part: WEIGHTS[part] * raw[part] for part in GOLD_PARTS}


def gold(prompt: str, response: str) -> float:
    """The utility of a response: the sum of `gold_parts`."""
    return sum(gold_parts(prompt, response).values())
