"""IFEval: every instruction with answers that follow it and that just do not, strictly checked."""

import json
import random

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lora-rlhf[lm-eval]'")

from lora_rlhf.evaluation.suites import ifeval
from lora_rlhf.evaluation.suites.files import read_rows
from tests.evaluation.answering import Answering

PUNKT = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """NLTK's sentence model, untrained: it knows no abbreviations, and ends at . ? and !"""
    import nltk

    folder = tmp_path / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    for name in PUNKT:
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    yield from _forgotten()


@pytest.fixture
def no_punkt(tmp_path, monkeypatch):
    """A machine without that model."""
    import nltk

    ifeval._checks()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    yield from _forgotten()


def _forgotten():
    util = ifeval._checks().instructions_registry.instructions.instructions_util
    util._get_sentence_tokenizer.cache_clear()
    yield
    util._get_sentence_tokenizer.cache_clear()


def row(*instructions, prompt="Say it."):
    """A row of the file: (instruction, its settings) each."""
    ids, kwargs = zip(*instructions, strict=True)
    return {"key": 1, "prompt": prompt, "instruction_id_list": list(ids), "kwargs": list(kwargs)}


def strict(instruction, settings, answer):
    found = ifeval.measures(Answering({"x": [answer]}), [row((instruction, settings))])
    (whole,), part = found["prompt_level_strict"]["x"].values, found["inst_level_strict"]["x"]
    assert (part.values, part.weights) == ([whole], [1.0])
    return whole


PROMPT = "Write a poem. Use two lines."
LOWER = "this is a plain english sentence about the weather and the sea"
CASES = {
    "keywords:existence": (
        {"keywords": ["fox", "lake"]},
        "A Fox by the LAKE.",
        "A fox by the river.",
    ),
    "keywords:frequency": (
        {"keyword": "fox", "frequency": 2, "relation": "at least"},
        "Fox and fox.",
        "One fox, no more.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rock"]}, "A stone, rocky.", "A Rock."),
    "keywords:letter_frequency": (
        {"letter": "o", "let_frequency": 3, "let_relation": "less than"},
        "Oh no.",
        "Oh no, no.",
    ),
    "language:response_language": (
        {"language": "de"},
        "Heute ist das Wetter sehr schön und wir gehen in den Wald.",
        "Today the weather is very fine and we walk into the woods.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "One here. Two here!",
        "One here. Two here! Is this three?",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        "First.\n***\nSecond.",
        "First.\n***\nSecond.\n***\nThird.",
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"},
        "four words are here",
        "three words here",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "Once it was.\n\nThen, it went.",
        "Then it was.\n\nIt went.",
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        "Dear [name], of [town].",
        "Dear [name].",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        "Bye.\nP.S. Come soon.",
        "Bye. Come soon.",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        "* one\n* two",
        "* one\n* two\n* three",
    ),
    "detectable_format:constrained_response": (
        {},
        "My answer is maybe.",
        "Perhaps it is.",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*one* and *two*",
        "*one* and two",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "PART", "num_sections": 2},
        "PART 1\na\nPART 2\nb",
        "PART 1\na\nPart two\nb",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<A title>>\nText.", "<A title>\nText."),
    "combination:two_responses": ({}, "One.\n******\nTwo.", "One.\n******\nOne."),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": PROMPT},
        f"{PROMPT} Roses are red.",
        f"Sure! {PROMPT} Roses are red.",
    ),
    "startend:end_checker": (
        {"end_phrase": "That is all."},
        "Hello. That is all.",
        "That is all. Bye.",
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "THE fox SAW it.",
        "THE fox saw it.",
    ),
    "change_case:english_capital": ({}, LOWER.upper(), LOWER.upper() + " x"),
    "change_case:english_lowercase": ({}, LOWER, LOWER.capitalize()),
    "punctuation:no_comma": ({}, "No comma here.", "One, here."),
    "startend:quotation": ({}, '"All of it."', '"All" of it.'),
}


@pytest.mark.parametrize("instruction", CASES)
def test_an_instruction_is_followed_or_just_not(instruction, punkt):
    settings, follows, fails = CASES[instruction]
    assert strict(instruction, settings, follows) == 1.0
    assert strict(instruction, settings, fails) == 0.0
    assert strict(instruction, settings, " \n") == 0.0, "no answer follows nothing"


def test_no_instruction_of_lm_evals_is_without_a_case():
    assert set(CASES) == set(ifeval._checks().instructions_registry.INSTRUCTION_DICT)


def test_a_prompt_is_followed_when_all_its_instructions_are():
    """Three prompts of 2, 1 and 3 instructions, of which 1, 1 and 2 are followed."""
    quoted, title, no_comma = (
        ("startend:quotation", {}),
        ("detectable_format:title", {}),
        ("punctuation:no_comma", {}),
    )
    rows = [row(quoted, no_comma, prompt="a"), row(title, prompt="b")]
    rows.append(row(quoted, title, no_comma, prompt="c"))
    good = ['"A, b."', "<<A>>", '"<<A>> b.']
    engine = Answering({"sft": good, "base": ["none"] * 3})
    found = ifeval.measures(engine, rows)
    assert engine.asked == [(["<user>a", "<user>b", "<user>c"], 1280, ())]
    assert found["prompt_level_strict"]["sft"].values == [0.0, 1.0, 0.0]
    part = found["inst_level_strict"]["sft"]
    assert (part.values, part.weights) == ([1.0, 1.0, 2.0], [2.0, 1.0, 3.0])
    assert part.share()["value"] == pytest.approx(4 / 6, abs=1e-12)
    # `base` has no comma in either of two, and nothing else.
    assert found["prompt_level_strict"]["base"].share()["value"] == 0.0
    assert found["inst_level_strict"]["base"].share()["value"] == pytest.approx(2 / 6, abs=1e-12)


def test_loosely_a_first_line_that_chats_is_forgiven():
    one = row(("startend:quotation", {}))
    found = ifeval.measures(Answering({"sft": ['Sure, here it is:\n"All of it."']}), [one])
    assert found["prompt_level_strict"]["sft"].values == [0.0]
    assert found["prompt_level_loose"]["sft"].values == [1.0]
    assert found["inst_level_loose"]["sft"].values == [1.0]


def test_without_the_sentence_model_what_needs_it_is_left_out_and_told(no_punkt):
    title = row(("detectable_format:title", {}))
    two = [("detectable_format:title", {}), ("length_constraints:number_sentences", {})]
    rows = [title, row(*two), row(("change_case:capital_word_frequency", {}))]
    kept, told = ifeval.checkable(rows)
    assert kept == [title]
    assert len(told) == 1
    assert "2 prompts" in told[0]
    assert "punkt_tab" in told[0]


def test_with_it_nothing_is(punkt):
    rows = [row(("length_constraints:number_sentences", {}))]
    assert ifeval.checkable(rows) == (rows, [])


@pytest.mark.parametrize("letter", ["#", "!", "ab", "é"])
def test_what_would_be_checked_by_chance_is_left_out_and_told(letter, punkt):
    settings = {"letter": letter, "let_frequency": 1, "let_relation": "at least"}
    plain = row(("keywords:letter_frequency", settings | {"letter": "Q"}))
    kept, told = ifeval.checkable([row(("keywords:letter_frequency", settings)), plain])
    assert kept == [plain]
    assert "1 prompts are left out" in told[0]
    assert "by chance" in told[0]


@pytest.mark.shared
def test_no_verdict_on_the_real_prompts_is_by_chance(shared, punkt):
    """541 prompts, of which two ask for #s and !s; lm-eval draws a letter for those alone."""
    rows = read_rows(shared / "data", "ifeval/input_data.jsonl")
    kept, _ = ifeval.checkable(rows)
    assert (len(rows), len(kept)) == (541, 539)
    before = random.getstate()
    ifeval.measures(Answering({"sft": ["Hello there, my friend. It is a day."] * len(kept)}), kept)
    assert random.getstate() == before
    assert json.dumps(kept[0]) == json.dumps(rows[0])
