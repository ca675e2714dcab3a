"""The look at all sources of a recipe at once."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_rlhf.data.sources import check_data
from lora_rlhf.recipe import Recipe
from lora_rlhf.tiny import BASE_PATH
from tests.data.fakes import STRICT_TEMPLATE, llama3, qwen, sentencepiece


def recipe(base: dict | None = None, **data) -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "base": {"model": "builtin:tiny"} | (base or {}), "data": data}
    )


def file(path: Path, rows: list[dict]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def demos(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"question {i}", "response": "Paris"} for i in range(start, start + count)]


def test_builtin_data_has_no_problem():
    wanted = recipe(
        demonstrations={"builtin": "demonstrations", "limit": 100},
        prompts={"builtin": "prompts", "limit": 100},
        heldout_prompts={"builtin": "prompts", "limit": 50},
        text={"builtin": "text", "limit": 20},
    )
    problems, notes = check_data(wanted, AutoTokenizer.from_pretrained(BASE_PATH))
    assert problems == []
    assert [n for n in notes if "usable" in n] == [
        "data.demonstrations: 100 usable rows in builtin:demonstrations",
        "data.prompts: 100 usable rows in builtin:prompts",
        "data.heldout_prompts: 50 usable rows in builtin:prompts",
        "data.text: 20 usable rows in builtin:text",
    ]


def test_the_problems_of_all_sources_come_at_once(tmp_path):
    wanted = recipe(
        demonstrations=file(tmp_path / "d.jsonl", [*demos(3), {"prompt": "p", "response": ""}]),
        rankings=file(tmp_path / "r.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}]),
        prompts={"path": str(tmp_path / "none.jsonl")},
    )
    problems, notes = check_data(wanted)
    assert not [note for note in notes if "none.jsonl" in note]  # as if it had been read
    assert [p.kind for p in problems] == ["empty response", "one class only", "no such file"]
    assert [p.line for p in problems] == [4, 0, 0]


def test_a_held_out_prompt_that_training_holds_is_a_leak(tmp_path):
    wanted = recipe(
        demonstrations=file(tmp_path / "d.jsonl", demos(20)),
        heldout_prompts=file(tmp_path / "h.jsonl", demos(20, start=18)),
    )
    problems, _ = check_data(wanted)
    assert [p.kind for p in problems] == ["leak"]
    assert problems[0].found.startswith("2 prompts are in data.demonstrations too")
    clean = recipe(
        demonstrations=file(tmp_path / "d.jsonl", demos(20)),
        heldout_prompts=file(tmp_path / "h.jsonl", demos(20, start=20)),
    )
    assert check_data(clean)[0] == []


def test_what_is_over_the_limits_is_counted_and_all_of_it_is_a_problem(tmp_path):
    rows = [*demos(20), {"prompt": "What is the story? " * 40, "response": "Paris"}]
    data = {"demonstrations": file(tmp_path / "d.jsonl", [*rows, rows[0]])}
    problems, notes = check_data(recipe(**data, max_prompt_tokens=60), llama3())
    assert problems == []
    assert "data.demonstrations: 1 repeated rows are dropped" in notes
    assert "data.demonstrations: 1 of 21 dropped (prompt over 60 tokens)" in notes
    problems, _ = check_data(recipe(**data, max_prompt_tokens=5), llama3())
    assert [p.kind for p in problems] == ["too long"]
    assert "21 x prompt over 5 tokens" in problems[0].found


def test_one_prompt_alone_is_too_few(tmp_path):
    wanted = recipe(demonstrations=file(tmp_path / "d.jsonl", demos(1)))
    assert [p.kind for p in check_data(wanted)[0]] == ["too few prompts"]


def test_a_pad_token_equal_to_eos_is_a_problem(tmp_path):
    tokenizer = qwen(eos="<|endoftext|>", template=None)
    data = {"demonstrations": file(tmp_path / "d.jsonl", demos(20))}
    problems, _ = check_data(recipe(**data), tokenizer)
    assert [p.kind for p in problems] == ["tokenizer"]
    assert "base.pad_token" in str(problems[0])
    assert check_data(recipe({"pad_token": "<|fim_pad|>"}, **data), tokenizer)[0] == []


def test_a_template_that_refuses_all_prompts_is_a_problem(tmp_path):
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{role} {i}"} for role in ("system", "user", "assistant")
            ]
        }
        for i in range(9)
    ]
    wanted = recipe(demonstrations=file(tmp_path / "d.jsonl", rows))
    problems, _ = check_data(wanted, sentencepiece(template=STRICT_TEMPLATE))
    assert [p.kind for p in problems] == ["chat template"]


@pytest.mark.parametrize("field", ["demonstrations", "prompts"])
def test_what_cannot_be_looked_at_is_said_and_is_no_problem(monkeypatch, tmp_path, field):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    problems, (note,) = check_data(recipe(**{field: {"hub": "a/b"}}))
    assert problems == []
    assert note.startswith(f"data.{field}: not checked: a/b cannot be reached")
    (tmp_path / "x.txt").write_text("one two three")
    split = {"path": str(tmp_path / "x.txt"), "prompt_tokens": 1}
    problems, (note,) = check_data(recipe(**{field: split}))
    assert problems == []
    assert note == f"data.{field}: not checked, since the base's tokenizer is not at hand"
