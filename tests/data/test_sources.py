"""Every format and every kind of file gives the records that were written into it."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest

from lora_rlhf.data.readers import read_rows
from lora_rlhf.data.records import (
    Demonstration,
    Messages,
    Prompt,
    Ranking,
    Text,
    prompt_text,
    user,
)
from lora_rlhf.data.sources import (
    load_demonstrations,
    load_prompts,
    load_rankings,
    load_text,
    require,
)
from lora_rlhf.errors import DataError
from lora_rlhf.recipe import Source
from lora_rlhf.tiny.grammar import all_pairs

QUESTION, ANSWER = "What is it?", "A cat."
DEMO = Demonstration(user(QUESTION), ANSWER)
PAIR = Ranking(user(QUESTION), (ANSWER, "No."), ((0,), (1,)))
DIALOGUE: Messages = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": QUESTION},
)


def turns(messages: Messages, answer: str) -> list:
    return [*messages, {"role": "assistant", "content": answer}]


def sharegpt(messages: list) -> list:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def jsonl(path: Path, rows: list) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def one(load, tmp_path: Path, row: dict, **fields):
    source = jsonl(tmp_path / "data.jsonl", [row]).model_copy(update=fields)
    records = require(load(source))
    assert len(records) == 1
    return records[0]


# -- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": QUESTION, "response": ANSWER, "id": 7}, DEMO),
        ({"prompt": list(DIALOGUE), "response": ANSWER}, Demonstration(DIALOGUE, ANSWER)),
        ({"instruction": QUESTION, "output": ANSWER}, DEMO),
        ({"instruction": QUESTION, "input": " ", "output": ANSWER}, DEMO),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            Demonstration(user("Add.\n\n1, 2"), "3"),
        ),
        ({"messages": turns(DIALOGUE, ANSWER)}, Demonstration(DIALOGUE, ANSWER)),
        ({"conversations": sharegpt(turns(DIALOGUE, ANSWER))}, Demonstration(DIALOGUE, ANSWER)),
        # ultrachat and no_robots hold a prompt beside the messages, which say more
        ({"prompt": "x", "messages": turns(DIALOGUE, ANSWER)}, Demonstration(DIALOGUE, ANSWER)),
    ],
)
def test_demonstrations(tmp_path, row, expected):
    assert one(load_demonstrations, tmp_path, row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": "No."},
        # TRL's conversational form, with the prompt apart
        {
            "prompt": list(user(QUESTION)),
            "chosen": turns((), ANSWER),
            "rejected": turns((), "No."),
        },
        # UltraFeedback: a prompt as text, and whole dialogues
        {
            "prompt": QUESTION,
            "chosen": turns(user(QUESTION), ANSWER),
            "rejected": turns(user(QUESTION), "No."),
            "score_chosen": 8.0,
        },
        {"chosen": turns(user(QUESTION), ANSWER), "rejected": turns(user(QUESTION), "No.")},
        {
            "chosen": sharegpt(turns(user(QUESTION), ANSWER)),
            "rejected": sharegpt(turns(user(QUESTION), "No.")),
        },
        # HH
        {
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}",
            "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: No.",
        },
        {"prompt": QUESTION, "responses": [ANSWER, "No."], "ranking": [[0], [1]]},
        {"prompt": QUESTION, "responses": [ANSWER, "No."], "ranking": [0, 1]},
        {"prompt": QUESTION, "responses": [ANSWER, "No."], "ranking": ["0", "1"]},
    ],
)
def test_a_preference_in_any_form_is_the_same_ranking(tmp_path, row):
    assert one(load_rankings, tmp_path, row) == PAIR


def test_an_hh_dialogue_keeps_its_turns_and_the_answers_differ_last(tmp_path):
    before = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: What is it?\n\nAssistant:"
    row = {"chosen": f"{before} A cat.\n\nSmall.", "rejected": f"{before} No."}
    assert one(load_rankings, tmp_path, row) == Ranking(
        DIALOGUE, ("A cat.\n\nSmall.", "No."), ((0,), (1,))
    )


@pytest.mark.parametrize(
    ("responses", "ranking", "groups"),
    [
        (["a", "b", "c", "d"], [[2], [0, 3], [1]], ((2,), (0, 3), (1,))),
        (["a", "b", "c", "d"], [2, [0, 3], 1], ((2,), (0, 3), (1,))),
        (
            [{"rid": f"r{i}", "text": t} for i, t in enumerate("abcd")],
            [["r2"], ["r0", "r3"], ["r1"]],
            ((2,), (0, 3), (1,)),
        ),
    ],
)
def test_k_way_rankings_with_ties(tmp_path, responses, ranking, groups):
    row = {"prompt": QUESTION, "responses": responses, "ranking": ranking, "tag": "x"}
    expected = Ranking(user(QUESTION), ("a", "b", "c", "d"), groups, "x")
    assert one(load_rankings, tmp_path, row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": QUESTION}, user(QUESTION)),
        ({"prompt": list(DIALOGUE)}, DIALOGUE),
        ({"messages": list(DIALOGUE)}, DIALOGUE),
        ({"messages": turns(DIALOGUE, ANSWER)}, DIALOGUE),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, user("Add.\n\n1, 2")),
        ({"prompt": QUESTION, "chosen": ANSWER, "rejected": "No."}, user(QUESTION)),
        (
            {
                "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}",
                "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: No.",
            },
            user(QUESTION),
        ),
        ({"text": QUESTION}, user(QUESTION)),
    ],
)
def test_prompts(tmp_path, row, expected):
    assert one(load_prompts, tmp_path, row) == Prompt(expected)


def test_columns_map_a_files_names_to_ours(tmp_path):
    row = {"question": QUESTION, "answer": ANSWER, "response": "another", "instruction": "x"}
    columns = {"prompt": "question", "response": "answer"}
    assert one(load_demonstrations, tmp_path, row, columns=columns) == DEMO


# -- files --------------------------------------------------------------------------------------

ROWS = [{"prompt": f'"{i}", naïve\nline two?', "response": f"日本 {i}\u2028end"} for i in range(5)]
EXPECTED = [Demonstration(user(str(r["prompt"])), str(r["response"])) for r in ROWS]


def write(path: Path, rows: list[dict]) -> None:
    """Rows as a file of the kind its name says, by code that is not ours."""
    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_its_rows(tmp_path, suffix, packed):
    path = tmp_path / f"some.data{suffix}"
    write(path, ROWS)
    if packed:
        with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as zipped:
            shutil.copyfileobj(plain, zipped)
        path = Path(f"{path}.gz")
    assert require(load_demonstrations(Source(path=str(path)))) == EXPECTED
    assert require(load_demonstrations(Source(path=str(path), limit=2))) == EXPECTED[:2]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"version": 1, "data": ROWS}, indent=1),
        "\n".join(json.dumps(row) for row in ROWS),
        "\ufeff" + json.dumps(ROWS),
    ],
    ids=["under data", "one object a line", "with a byte order mark"],
)
def test_other_shapes_of_json(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    assert require(load_demonstrations(Source(path=str(path)))) == EXPECTED


def test_lists_in_cells_of_a_csv_are_json(tmp_path):
    path = tmp_path / "x.csv"
    cells = {"prompt": QUESTION, "responses": json.dumps(["a", "b", "c"]), "ranking": "[[1],[0,2]]"}
    write(path, [cells])
    expected = Ranking(user(QUESTION), ("a", "b", "c"), ((1,), (0, 2)))
    assert require(load_rankings(Source(path=str(path)))) == [expected]


def test_text_files_hold_a_document_a_line_or_between_separators(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n\n<|end|>\n\nthree <|end|>  \n", encoding="utf-8")
    assert require(load_text(Source(path=str(path)))) == [
        Text(t) for t in ("one", "two", "<|end|>", "three <|end|>")
    ]
    source = Source(path=str(path), separator="<|end|>")
    assert require(load_text(source)) == [Text("one\ntwo"), Text("three")]
    assert require(load_prompts(source))[1] == Prompt(user("three"))


def test_documents_keep_the_line_they_begin_on(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n--\n\n three\n--four", encoding="utf-8")
    found = list(read_rows(Source(path=str(path), separator="--")))
    assert found == [(1, {"text": "one\ntwo"}), (5, {"text": "three"}), (6, {"text": "four"})]


def test_a_judge_reads_the_last_question():
    assert prompt_text(DIALOGUE) == QUESTION
    assert prompt_text(user("Once upon")) == "Once upon"
    assert prompt_text(({"role": "system", "content": "x"},)) == "x"


# -- builtin and real ---------------------------------------------------------------------------


def test_builtin_sources_have_our_fields_and_held_out_prompts_are_others():
    demos = require(load_demonstrations(Source(builtin="demonstrations", limit=30)))
    assert len(demos) == 30
    prompts = require(load_prompts(Source(builtin="prompts", limit=200)))
    held = require(load_prompts(Source(builtin="prompts", limit=200), heldout=True))
    assert len(set(prompts)) == len(set(held)) == 200
    assert not set(prompts) & set(held)
    pairs = {(p.character, p.object) for p in all_pairs(heldout=True)}
    for prompt in held:
        text = prompt.messages[0]["content"]
        assert any(character in text and thing in text for character, thing in pairs)
    assert len(require(load_text(Source(builtin="text", limit=10)))) == 10
    assert len(require(load_prompts(Source(builtin="prompts")))) == 2000
    again = require(load_demonstrations(Source(builtin="demonstrations", limit=30), seed=1))
    assert again != demos


def test_more_builtin_prompts_than_there_are_is_an_error():
    loaded = load_prompts(Source(builtin="prompts", limit=10**7))
    with pytest.raises(DataError, match=r"builtin:prompts: limit is 10000000"):
        require(loaded)


def test_real_human_preferences_load_and_what_is_of_no_use_is_counted(shared):
    loaded = load_rankings(Source(path=str(shared / "data/hh-rlhf-harmless/test.jsonl.gz")))
    assert not loaded.problems
    # 2,312 pairs by SOURCES.md; 4 have an empty answer and 5 part earlier (counted by hand).
    assert len(loaded.records) == 2312 - 9
    assert sorted(loaded.dropped.values()) == [4, 5]
    assert all(r.prompt[-1]["role"] == "user" for r in loaded.records)
