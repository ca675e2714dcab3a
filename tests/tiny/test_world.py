"""Truths about the toy world's corpora: determinism, the held-out split, the slots."""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import sys

import pytest

from lora_rlhf import tiny
from lora_rlhf.tiny import grammar, words, world
from lora_rlhf.tiny.grammar import Pair


def _heldout_pairs_in(text: str) -> list[Pair]:
    said = set(re.findall(r"[a-z]+", text.lower()))
    mixed = (Pair(c, o) for c in words.CHARACTERS for o in words.OBJECTS if {c, o} <= said)
    return [pair for pair in mixed if grammar.is_heldout(pair)]


def test_lists_are_deterministic_by_seed() -> None:
    assert tiny.demonstrations(20, 5) == tiny.demonstrations(20, 5)
    assert tiny.demonstrations(20, 5) != tiny.demonstrations(20, 6)
    assert tiny.plain_text(20, 5) == tiny.plain_text(20, 5)
    assert tiny.plain_text(20, 5) != tiny.plain_text(20, 6)
    assert tiny.prompts(20, 5, heldout=True) == tiny.prompts(20, 5, heldout=True)
    assert tiny.prompts(20, 5, heldout=True) != tiny.prompts(20, 6, heldout=True)
    assert tiny.demonstrations(30, 5)[:20] == tiny.demonstrations(20, 5)


def test_lists_do_not_depend_on_the_hash_seed_and_import_no_torch() -> None:
    program = (
        "import sys, hashlib; from lora_rlhf import tiny;"
        "rows = tiny.plain_text(50, 1) + tiny.demonstrations(50, 1) + tiny.prompts(9, 1, True);"
        "parts = tiny.gold_parts(rows[50]['prompt'], rows[50]['response']);"
        "assert 'torch' not in sys.modules;"
        "print(hashlib.sha256(repr((rows, parts)).encode()).hexdigest())"
    )
    digests = set()
    for hash_seed in ("0", "123"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        digests.add(done.stdout)
    assert len(digests) == 1


def test_a_fifth_of_the_pairs_is_held_out_and_each_word_loses_as_many() -> None:
    heldout, training = grammar.all_pairs(True), grammar.all_pairs(False)
    assert len(heldout) * 4 == len(training)
    share = len(words.OBJECTS) // 5
    for character in words.CHARACTERS:
        assert sum(pair.character == character for pair in heldout) == share
    for thing in words.OBJECTS:
        assert sum(pair.object == thing for pair in heldout) == len(words.CHARACTERS) // 5


def test_no_training_text_holds_a_heldout_pair() -> None:
    for row in tiny.plain_text(3000, 0):
        assert not _heldout_pairs_in(row["text"]), row
    for row in world.lessons(2000, 0):
        assert not _heldout_pairs_in(row["text"]), row
    for row in tiny.demonstrations(2000, 0):
        assert not _heldout_pairs_in(f"{row['prompt']} {row['response']}"), row
    for row in tiny.prompts(500, 0, heldout=False):
        assert not _heldout_pairs_in(row["prompt"]), row


def test_heldout_prompts_hold_only_heldout_pairs() -> None:
    for row in tiny.prompts(500, 0, heldout=True):
        assert len(_heldout_pairs_in(row["prompt"])) == 1, row


def test_prompts_are_distinct_and_finite() -> None:
    most = len(grammar.all_pairs(True)) * sum(map(len, words.REQUESTS.values()))
    everything = [row["prompt"] for row in tiny.prompts(most, 2, heldout=True)]
    assert len(set(everything)) == most
    with pytest.raises(ValueError, match=f"has {most}"):
        tiny.prompts(most + 1, 2, heldout=True)


def test_frames_do_not_spell_out_counted_words() -> None:
    counted = {*words.CHARACTERS, *words.OBJECTS, *words.VIVID}
    assert len(counted) == len(words.CHARACTERS) + len(words.OBJECTS) + len(words.VIVID)
    lists = [
        words.VAGUE_CHARACTERS, words.VAGUE_OBJECTS, words.BLAND, words.PLACES, words.TIMES,
        words.FEELINGS, words.ACTIONS, words.MANNERS, words.HELPERS, words.KIND_OPENINGS,
        words.CURT_OPENINGS, words.EXTRAS, words.GOOD_ENDINGS, words.POOR_ENDINGS,
        words.VIRTUES, words.LESSONS, words.BLAND_EVENTS, *words.WHAT.values(),
        *words.INTROS.values(), *words.MIDDLES.values(), *words.REQUESTS.values(),
    ]  # fmt: skip
    for frames in lists:
        for frame in frames:
            plain = re.sub(r"\{\w+\}", " ", frame).lower()
            assert not counted.intersection(re.findall(r"[a-z]+", plain)), frame


def test_quality_slots_say_nothing_about_length() -> None:
    drawn = [answer for _, answer in world.draw_demonstrations(3000, 4)]
    lengths = [len(answer.text.split()) for answer in drawn]
    for slot in grammar.SLOTS:
        kept = [answer.good[slot] for answer in drawn]
        assert abs(statistics.correlation(lengths, kept)) < 0.1, slot
    scores = [sum(answer.good.values()) for answer in drawn]
    assert abs(statistics.correlation(lengths, scores)) < 0.15
    assert min(lengths) >= 35
    assert max(lengths) <= 70


def test_demonstrations_leave_room_above_them() -> None:
    drawn = [answer for _, answer in world.draw_demonstrations(3000, 4)]
    assert sum(all(answer.good.values()) for answer in drawn) / len(drawn) < 0.15


def test_demonstrations_are_clearly_better_than_pretraining() -> None:
    rng = random.Random(0)
    pretraining = []
    for _ in range(1500):
        kind, prompt, pair = world._pick_request(rng, heldout=False)
        pretraining.append(tiny.gold(prompt, world.pretraining_answer(rng, kind, pair).text))
    shown = [tiny.gold(**row) for row in tiny.demonstrations(1500, 0)]
    spread = statistics.pstdev(pretraining)
    assert statistics.fmean(shown) > statistics.fmean(pretraining) + 0.8 * spread


def test_answers_are_practically_never_repeated() -> None:
    answers = [row["response"] for row in tiny.demonstrations(5000, 0)]
    assert len(set(answers)) > 0.999 * len(answers)


def test_flawed_answers_show_their_flaw() -> None:
    rng = random.Random(3)
    answer = grammar.draw_answer(rng, "story", Pair("fox", "kettle"), rate=1.0)
    repeated = grammar.spoil(rng, answer, "repeat")
    sentences = [part.strip() for part in repeated.text.split(".") if part.strip()]
    assert len(sentences) == len(set(sentences)) + 1
    cut = grammar.spoil(rng, answer, "unfinished")
    assert not cut.text.endswith(".")
    assert not cut.good["ending"]


def test_reviews_tell_the_truth() -> None:
    rng = random.Random(4)
    for _ in range(300):
        answer = grammar.draw_answer(rng, "news", Pair("owl", "map"), rate=0.5)
        text = grammar.review(rng, answer)
        for slot in grammar.SLOTS:
            praise, blame = (
                {frame.format(c="owl", o="map") for frame in side} for side in words.REVIEWS[slot]
            )
            untrue = blame if answer.good[slot] else praise
            assert not any(frame in text for frame in untrue), (answer, text)
        assert words.VERDICTS[sum(answer.good.values())] in text
