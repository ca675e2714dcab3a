"""Bad input: each fault with its file, its line, what was found and what is allowed."""

import gzip
import json
from pathlib import Path

import pytest

from lora_rlhf.data import readers
from lora_rlhf.data.problems import Loaded, Problem, describe
from lora_rlhf.data.sources import (
    load_demonstrations,
    load_prompts,
    load_rankings,
    load_text,
    require,
)
from lora_rlhf.errors import DataError
from lora_rlhf.recipe import Source

GOOD = '{"prompt": "p", "response": "r"}\n'
RANKED = {"prompt": "p", "responses": ["a", "b", "c"]}


def problems(load, path: Path, content: str | bytes, **fields) -> list[Problem]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    loaded = load(Source(path=str(path), **fields))
    assert all(p.file in (str(path), "") for p in loaded.problems)
    if loaded.problems:
        with pytest.raises(DataError, match="problem"):
            require(loaded)
    return loaded.problems


def lines_of(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "line", "kind"),
    [
        # invalid JSON
        ("a.jsonl", GOOD + GOOD + '{"prompt": "p",\n' + GOOD, 3, "invalid JSON"),
        ("a.jsonl", GOOD + "\n\n[1, 2]\n", 4, "invalid JSON"),
        ("a.json", '[\n {"prompt": "p", "response": "r"},\n {"prompt" "q"}\n]', 3, "invalid JSON"),
        ("a.json", '[{"prompt": "p", "response": "r"},\n\n 3]', 3, "invalid JSON"),
        ("a.json", '"text"', 1, "invalid JSON"),
        ("a.json", GOOD + GOOD + '{"prompt":\n', 3, "invalid JSON"),
        # wrong encoding
        ("a.jsonl", GOOD.encode() + b'{"prompt": "caf\xe9", "response": "r"}\n', 2, "wrong encod"),
        ("a.csv", b"prompt,response\np,r\np,caf\xe9\n", 3, "wrong encoding"),
        ("a.json", b'[\n"\xff"]', 2, "wrong encoding"),
        ("a.jsonl", GOOD.encode("utf-16"), 1, "wrong encoding"),
        # nothing in it
        ("a.jsonl", "", 0, "empty file"),
        ("a.json", " \n", 0, "empty file"),
        ("a.json", "[]", 0, "empty file"),
        ("a.csv", "prompt,response\n", 0, "empty file"),
        ("a.jsonl.gz", gzip.compress(b"\n\n", mtime=0), 0, "empty file"),
        # damage
        ("a.jsonl.gz", b"not gzip", 0, "not readable"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 999, mtime=0)[:-9], 0, "not readable"),
        ("a.parquet", b"not parquet", 0, "not readable"),
        ("a.parquet.gz", b"not gzip", 0, "not readable"),
        ("a.csv", 'prompt,response\np,r\np,"r\n', 3, "invalid CSV"),
        ("a.csv", 'prompt,response\n"p\nq",r\np,r,s\n', 4, "invalid CSV"),
        # kinds of file
        ("a.tsv", "prompt\tresponse\n", 0, "unknown format"),
        ("a.xlsx.gz", b"", 0, "unknown format"),
        ("data", GOOD, 0, "unknown format"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_with_its_line(tmp_path, name, content, line, kind):
    found = problems(load_demonstrations, tmp_path / name, content)
    assert (found[-1].line, found[-1].kind[: len(kind)]) == (line, kind)
    where = f"{tmp_path / name}:{line}:" if line else f"{tmp_path / name}:"
    assert str(found[-1]).startswith(where)


@pytest.mark.parametrize(
    ("load", "row", "found"),
    [
        (load_demonstrations, {"prompt": "p", "response": " "}, "an empty response"),
        (load_demonstrations, {"prompt": "p", "response": None}, "an empty response"),
        (load_demonstrations, {"prompt": "\n", "response": "r"}, "an empty prompt"),
        (load_demonstrations, {"prompt": "p", "response": 3}, "response: 3"),
        (load_demonstrations, {"instruction": "p", "output": ""}, "an empty response (output)"),
        (load_demonstrations, {"messages": []}, "messages: []"),
        (load_demonstrations, {"messages": "hello"}, 'messages: "hello"'),
        (
            load_demonstrations,
            {"messages": [{"role": "tool", "content": "x"}]},
            'messages: a turn with the role "tool"',
        ),
        (
            load_demonstrations,
            {"messages": [{"role": "assistant", "content": "x"}]},
            "before the answer: no turn",
        ),
        (load_prompts, {"prompt": ""}, "an empty prompt"),
        (load_text, {"text": ""}, "an empty text"),
        (load_rankings, {"prompt": "p", "chosen": "a", "rejected": ""}, "an empty response"),
        (load_rankings, {"chosen": "a", "rejected": "b"}, "no column prompt, and chosen is not"),
        (load_rankings, RANKED | {"ranking": [[0], [1], [3]]}, "names no answer by 3"),
        (load_rankings, RANKED | {"ranking": [[0], [1], [-1]]}, "names no answer by -1"),
        (load_rankings, RANKED | {"ranking": ["best", 1, 2]}, "names no answer by best"),
        (load_rankings, RANKED | {"ranking": [[0], [1, 0], [2]]}, "names 0 more than once"),
        (load_rankings, RANKED | {"ranking": [[0], [2]]}, "leaves out 1"),
        (load_rankings, RANKED | {"ranking": [[0], [], [1, 2]]}, "has an empty group"),
        (load_rankings, RANKED | {"ranking": 2}, "ranking: 2"),
        (load_rankings, {"prompt": "p", "responses": ["a"], "ranking": [0]}, 'responses: ["a"]'),
        (
            load_rankings,
            {"prompt": "p", "responses": ["a", None], "ranking": [0, 1]},
            "an empty response",
        ),
    ],
)
def test_a_bad_row_is_reported_with_what_it_holds(tmp_path, load, row, found):
    good = {"prompt": "q", "response": "r", "chosen": "c", "rejected": "d", "text": "t"}
    all_found = problems(load, tmp_path / "a.jsonl", lines_of(good, row, good))
    assert [p.line for p in all_found] == [2]
    assert found in all_found[0].found
    assert all_found[0].allowed


def test_all_faults_of_a_file_are_found_at_once_and_counted(tmp_path):
    rows = GOOD + '{"prompt": "p", "response": ""}\n' * 23 + "{\n" + GOOD + "{\n"
    path = tmp_path / "a.jsonl"
    found = problems(load_demonstrations, path, rows)
    assert [p.line for p in found] == [*range(2, 25), 25, 27]
    text = describe(found)
    start = "25 problems with the data (23 x empty response, 2 x invalid JSON):"
    start = "25 problems with the data (23 x empty response, 2 x invalid JSON):"
    assert text.startswith(f"{start}\n{path}:2: an empty response. Allowed: text with")
    assert len(text.split("\n")) == 1 + 20 + 1
    assert text.endswith("... and 5 more.")


def test_a_column_that_lacks_in_every_row_is_one_problem_with_a_suggestion(tmp_path):
    rows = lines_of(*[{"question": "p", "answer": "r"}] * 30)
    (problem,) = problems(load_demonstrations, tmp_path / "a.jsonl", rows)
    assert problem.line == 1
    assert "in 30 rows" in problem.found
    assert "did you mean columns: {prompt: question, response: answer}?" in problem.found
    (problem,) = problems(load_demonstrations, tmp_path / "a.jsonl", lines_of({"promt": "p"}))
    assert "did you mean columns: {prompt: promt}?" in problem.found


def test_a_mapped_column_that_is_not_there_is_suggested(tmp_path):
    rows = lines_of({"question": "p", "response": "r"})
    columns = {"prompt": "qestion"}
    (problem,) = problems(load_demonstrations, tmp_path / "a.jsonl", rows, columns=columns)
    assert "no column qestion, which columns maps to prompt; did you mean question?" in str(problem)
    assert problem.allowed == "question, response"


def test_a_field_that_no_record_has_is_refused(tmp_path):
    columns = {"promt": "question"}
    (problem,) = problems(load_demonstrations, tmp_path / "a.jsonl", GOOD, columns=columns)
    assert "promt, which is not one of our fields; did you mean prompt?" in problem.found


def test_a_missing_file_names_what_lies_beside_it(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "constraints.txt").write_text("torch")
    (problem,) = load_demonstrations(Source(path=str(tmp_path / "tain.jsonl"))).problems
    assert problem.found == f"there is no {tmp_path / 'tain.jsonl'}"
    assert problem.allowed.endswith("holds train.jsonl")
    (problem,) = load_demonstrations(Source(path=str(tmp_path))).problems
    assert problem.found == "this is a directory"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "a "},
        RANKED | {"ranking": [[0, 1, 2]]},
        RANKED | {"responses": ["a", "a", "a"], "ranking": [0, 1, 2]},
        RANKED | {"responses": ["a", "b", " "], "ranking": [0, 1, 2]},
    ],
)
def test_rankings_of_one_class_only_are_refused_and_a_few_are_dropped(tmp_path, row):
    (problem,) = problems(load_rankings, tmp_path / "a.jsonl", lines_of(row, row))
    assert problem.kind == "one class only"
    assert "(2 x " in problem.found
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = tmp_path / "b.jsonl"
    path.write_text(lines_of(row, good))
    loaded = load_rankings(Source(path=str(path)))
    assert len(require(loaded)) == 1
    assert list(loaded.dropped.values()) == [1]


def test_dialogues_of_no_use_are_counted_not_refused(tmp_path):
    start = "\n\nHuman: p\n\nAssistant:"
    rows = [
        {"chosen": f"{start} a", "rejected": f"{start} b"},
        {"chosen": f"{start} a", "rejected": start},
        {"chosen": f"{start} a", "rejected": f"{start} b\n\nHuman: q\n\nAssistant: c"},
        {"chosen": f"{start} a", "rejected": f"{start} a"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(*rows))
    loaded = load_rankings(Source(path=str(path)))
    assert len(require(loaded)) == 1
    assert loaded.dropped == {
        "an empty answer in a dialogue": 1,
        "the dialogues part before the last answer": 1,
        "chosen and rejected are the same": 1,
    }


def test_plain_text_needs_prompt_tokens_to_be_a_demonstration(tmp_path):
    (problem,) = problems(load_demonstrations, tmp_path / "a.txt", "one\n")
    assert problem.allowed.startswith("prompt_tokens: N")


def test_a_source_without_a_usable_row_says_why():
    with pytest.raises(DataError, match="no usable row: 3 x too short"):
        require(Loaded(dropped={"too short": 3}))


# -- the hub ------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    loaded = load_demonstrations(Source(hub="a/b"))
    assert not loaded.problems
    with pytest.raises(DataError, match=r"a/b cannot be reached .* path instead of hub"):
        require(loaded)


def test_hub_rows_are_read_and_empty_ones_which_nobody_can_mend_are_counted(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        rows = [{"prompt": "p", "response": r} for r in ("a", "", "b", "c")]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_demonstrations(Source(hub="a/b", name="en", split="test", limit=3))
    assert [r.response for r in require(loaded)] == ["a", "b"]
    assert loaded.dropped == {"an empty response": 1}
    assert asked == [(("a/b", "en"), {"split": "test"})]


def test_a_hub_id_that_is_wrong_is_a_problem(monkeypatch):
    import datasets

    def unknown(*args, **kwargs):
        raise ValueError("Unknown split 'tran'. Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    (problem,) = load_demonstrations(Source(hub="a/b", split="tran")).problems
    assert "Unknown split 'tran'" in problem.found
    assert "split (found: tran)" in problem.allowed


def test_reading_stops_at_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3 + "{\n")
    parsed = []
    original = readers._json_line
    monkeypatch.setattr(readers, "_json_line", lambda line: parsed.append(1) or original(line))
    assert len(require(load_demonstrations(Source(path=str(path), limit=3)))) == 3
    assert len(parsed) == 3
