"""The toy world's corpora: pretraining documents, demonstrations and prompts.

Deterministic by seed and independent of the hash seed: every list is drawn from its
own `random.Random`, which hashes string seeds with SHA-512.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lora_rlhf.tiny import grammar
from lora_rlhf.tiny import words as w
from lora_rlhf.tiny.grammar import Answer, Pair

PRETRAINING_RATE = 0.4
DEMONSTRATION_RATE = 0.65
REVIEWED = 0.5
FLAWED = 0.06  # of the pretraining answers


def _pick_pair(rng: random.Random, heldout: bool) -> Pair:
    while True:
        pair = Pair(rng.choice(w.CHARACTERS), rng.choice(w.OBJECTS))
        if grammar.is_heldout(pair) is heldout:
            return pair


def _pick_request(rng: random.Random, heldout: bool) -> tuple[str, str, Pair]:
    """Returns kind, request text and pair."""
    pair, kind = _pick_pair(rng, heldout), rng.choice(w.KINDS)
    return kind, grammar.request(kind, rng.randrange(len(w.REQUESTS[kind])), pair), pair


def pretraining_answer(rng: random.Random, kind: str, pair: Pair) -> Answer:
    """An answer of pretraining quality; a few are about the wrong character or spoiled."""
    if rng.random() >= FLAWED:
        return grammar.draw_answer(rng, kind, pair, PRETRAINING_RATE)
    flaw = rng.choice(("wrong", "repeat", "unfinished"))
    if flaw != "wrong":
        answer = grammar.draw_answer(rng, kind, pair, PRETRAINING_RATE)
        return grammar.spoil(rng, answer, flaw)
    others = [c for c in w.CHARACTERS if c != pair.character]
    same_side = [c for c in others if not grammar.is_heldout(Pair(c, pair.object))]
    return grammar.draw_answer(
        rng, kind, pair, PRETRAINING_RATE, wrong_character=rng.choice(same_side)
    )


def request_document(rng: random.Random, heldout: bool = False) -> str:
    """A request with its answer, half of the time followed by a review."""
    kind, prompt, pair = _pick_request(rng, heldout)
    answer = pretraining_answer(rng, kind, pair)
    text = f"Request: {prompt}\nAnswer:\n{answer.text}"
    return f"{text}\n{grammar.review(rng, answer)}" if rng.random() < REVIEWED else text


def _story(rng: random.Random) -> str:
    """A free text: the middle of an answer, without a request and without manners."""
    pair, kind = _pick_pair(rng, heldout=False), rng.choice(w.KINDS)
    given = {"c": pair.character, "o": pair.object}
    frames = [rng.choice(w.INTROS[kind]), *rng.sample(w.MIDDLES[kind], 2), rng.choice(w.EXTRAS)]
    vivid = rng.choice((0.1, 0.5, 0.9))
    return " ".join(grammar.fill(frame, rng, given, vivid) for frame in frames)


def _facts(rng: random.Random) -> str:
    pair = _pick_pair(rng, heldout=False)
    given = {"c": pair.character, "o": pair.object}
    return " ".join(grammar.fill(frame, rng, given) for frame in rng.sample(w.FACTS, 3))


def _market(rng: random.Random) -> str:
    """Who took what, then questions about it: practice in looking names up."""
    count = rng.randrange(2, 5)
    while True:
        people, goods = rng.sample(w.CHARACTERS, count), rng.sample(w.OBJECTS, count)
        mixed = (Pair(c, o) for c in people for o in goods)
        if not any(grammar.is_heldout(pair) for pair in mixed):
            break
    verb = rng.choice(("bought", "sold", "lost", "found"))
    deals = list(zip(people, goods, strict=True))
    told = " ".join(
        grammar.fill("The {c} {verb} a {o}.", rng, {"c": c, "o": o, "verb": verb}) for c, o in deals
    )
    rng.shuffle(deals)
    asked = " ".join(
        f"Who {verb} the {o}? The {c}."
        if rng.random() < 0.5
        else grammar.fill("What was {verb} by the {c}? A {o}.", rng, {"c": c, "o": o, "verb": verb})
        for c, o in deals
    )
    return f"{told} {asked}"


_DOCUMENTS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (request_document, 0.64),
    (_story, 0.12),
    (_facts, 0.10),
    (_market, 0.14),
)


def _lesson(rng: random.Random) -> str:
    """A request with one or two sentences that name what it asks about."""
    kind, prompt, pair = _pick_request(rng, heldout=False)
    frames = rng.choice(
        (rng.sample(w.MIDDLES[kind], 1), [rng.choice(w.INTROS[kind]), rng.choice(w.MIDDLES[kind])])
    )
    given = {"c": pair.character, "o": pair.object}
    text = " ".join(grammar.fill(frame, rng, given) for frame in frames)
    return f"Request: {prompt}\nAnswer:\n{text}"


def lessons(count: int, seed: int) -> list[dict[str, str]]:
    """Short documents in which looking names up always pays.

    A model of this size that meets only the plain mix, where most answers leave a name
    out, learns to guess names by their frequency and may never learn to copy them.

    Args:
        count: Number of documents.
        seed: Any integer; the same one gives the same documents.

    Returns:
        Rows ``{"text": str}`` without special tokens.
    """
    rng = random.Random(f"lessons-{seed}")
    return [{"text": _lesson(rng)} for _ in range(count)]


def plain_text(count: int, seed: int) -> list[dict[str, str]]:
    """Pretraining-style documents, free of held-out pairs.

    Args:
        count: Number of documents.
        seed: Any integer; the same one gives the same documents.

    Returns:
        Rows ``{"text": str}`` without special tokens.
    """
    rng = random.Random(f"plain-{seed}")
    makers, weights = zip(*_DOCUMENTS, strict=True)
    return [{"text": rng.choices(makers, weights)[0](rng)} for _ in range(count)]


def heldout_text(count: int, seed: int) -> list[dict[str, str]]:
    """Request documents about held-out pairs only, for measuring the base."""
    rng = random.Random(f"heldout-{seed}")
    return [{"text": request_document(rng, heldout=True)} for _ in range(count)]


def draw_demonstrations(count: int, seed: int) -> list[tuple[str, Answer]]:
    """Requests of the training side with flawless answers of demonstration quality."""
    rng = random.Random(f"demonstrations-{seed}")
    drawn = []
    for _ in range(count):
        kind, prompt, pair = _pick_request(rng, heldout=False)
        drawn.append((prompt, grammar.draw_answer(rng, kind, pair, DEMONSTRATION_RATE)))
    return drawn


def demonstrations(count: int, seed: int) -> list[dict[str, str]]:
    """Demonstrations for SFT, free of held-out pairs.

    Args:
        count: Number of demonstrations.
        seed: Any integer; the same one gives the same demonstrations.

    Returns:
        Rows ``{"prompt": str, "response": str}``.
    """
    drawn = draw_demonstrations(count, seed)
    return [{"prompt": prompt, "response": answer.text} for prompt, answer in drawn]


def prompts(count: int, seed: int, heldout: bool) -> list[dict[str, str]]:
    """Distinct requests.

    Args:
        count: Number of requests.
        seed: Any integer; the same one gives the same requests.
        heldout: Only pairs that training never saw, or else only the other ones.

    Returns:
        Rows ``{"prompt": str}``, none twice.

    Raises:
        ValueError: If more are asked for than exist.
    """
    every = [
        grammar.request(kind, phrasing, pair)
        for pair in grammar.all_pairs(heldout)
        for kind in w.KINDS
        for phrasing in range(len(w.REQUESTS[kind]))
    ]
    if count > len(every):
        side = "held-out" if heldout else "training"
        raise ValueError(f"asked for {count} {side} prompts; the toy world has {len(every)}")
    rng = random.Random(f"prompts-{seed}-{heldout}")
    return [{"prompt": text} for text in rng.sample(every, count)]
