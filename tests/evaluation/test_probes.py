"""Degenerate answers are what they are called, and are placed among real ones."""

from itertools import pairwise

import pytest

from lora_rlhf.evaluation.probes import degenerate_answers, histogram, judge_degenerate
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe import Base

LIMIT = 24
PROMPTS = ["Tell a story about a fox.", "Describe a lake."]
ANSWERS = ["Once a fox met a kind cook by the blue lake.", "It is a quiet lake."]


@pytest.fixture(scope="module")
def chat_format():
    return Backbone.load(Base(model="builtin:tiny", device="cpu")).format


@pytest.fixture(scope="module")
def probes(chat_format):
    return degenerate_answers(chat_format, PROMPTS, ANSWERS, LIMIT)


def texts(probes, chat_format, name):
    return [chat_format.decode(p.ids) for p in probes if p.name == name]


def test_each_prompt_gets_each_kind_and_every_answer_ends(probes, chat_format):
    assert len(probes) == 8
    assert len({(p.name, p.row) for p in probes}) == 8
    assert all(p.ids[-1] == chat_format.end_id for p in probes)
    assert all(len(p.ids) <= LIMIT for p in probes)
    assert all(i not in chat_format.stop_ids for p in probes for i in p.ids[:-1])


def test_the_kinds_are_what_they_are_called(probes, chat_format):
    assert texts(probes, chat_format, "nothing") == ["", ""]
    assert texts(probes, chat_format, "prompt copied back") == PROMPTS
    first, second = texts(probes, chat_format, "three words repeated")
    assert first.startswith("Once a fox Once a fox Once a fox")
    assert second.startswith("It is a It is a It is a It is a")
    long = [p for p in probes if p.name == "many answers in one"]
    assert [len(p.ids) for p in long] == [LIMIT, LIMIT]
    assert "quiet lake" in chat_format.decode(long[0].ids)


def test_an_empty_real_answer_still_gives_every_probe(chat_format):
    made = degenerate_answers(chat_format, PROMPTS, ["", ""], LIMIT)
    repeated = texts(made, chat_format, "three words repeated")
    assert repeated[0].startswith("Tell a story Tell a story")
    assert len(made) == 8


def test_a_probe_is_placed_among_the_real_answers(probes, chat_format):
    """Of real scores 0, 1, 2, 3: a score of 2 beats two and ties one, 2.5 of 4."""
    of = {"nothing": (-1.0, 9.0), "prompt copied back": (2.0, 0.0)}
    scores = [of.get(p.name, (0.5, 0.5))[p.row] for p in probes]
    rows = judge_degenerate(probes, scores, [0.0, 1.0, 2.0, 3.0], PROMPTS, chat_format)
    found = {r["name"]: r for r in rows}
    assert found["nothing"]["percentile"] == 0.5
    assert found["nothing"]["score"] == 4.0
    assert found["nothing"]["best_score"] == 9.0
    assert found["nothing"]["prompt"] == PROMPTS[1]
    assert found["prompt copied back"]["percentile"] == pytest.approx((2.5 + 0.5) / 8, abs=1e-12)
    assert found["prompt copied back"]["text"] == PROMPTS[0]
    assert found["three words repeated"]["percentile"] == 0.25


def test_histograms_share_bins_and_lose_nothing():
    sets = {"demonstrations": [], "sft": [-1.0, -0.5, 0.0, 0.5, 1.0], "policy": [0.9, 7.0]}
    found = histogram(sets)
    edges = found["bins"]
    assert "demonstrations" not in found
    assert (sum(found["sft"]), sum(found["policy"])) == (5, 2)
    assert len(found["sft"]) == len(found["policy"]) == len(edges) - 1 <= 60
    for name in ("sft", "policy"):
        inside = [sum(a <= v < b for v in sets[name]) for a, b in pairwise(edges)]
        assert inside == found[name]


def test_equal_scores_and_no_scores_have_a_histogram_too():
    assert sum(histogram({"sft": [1.0] * 4})["sft"]) == 4
    assert histogram({"sft": []}) == {"bins": []}


def test_one_far_score_does_not_make_thousands_of_bins():
    found = histogram({"sft": [0.0, 0.1, 0.2], "policy": [1e6]})
    assert len(found["bins"]) <= 61
    assert sum(found["policy"]) == 1


def test_repeated_words_are_as_many_as_the_answers_and_bins_a_quarter_of_its_spread(chat_format):
    answer = "one two three four five six seven eight nine ten a b c d e f"
    made = degenerate_answers(chat_format, ["Say."], [answer], 200)
    (repeated,) = texts(made, chat_format, "three words repeated")
    assert len(repeated.split()) == 16
    edges = histogram({"sft": [-2.0, 2.0]})["bins"]
    assert edges[1] - edges[0] == pytest.approx(0.5, abs=1e-12)
