"""`lora-rlhf evaluate RUN`: what it prints, writes, refuses, and where it goes on."""

import json

import pytest
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.evaluation import best_of_n, contest, drawing
from lora_rlhf.runs import Run
from tests.evaluation import contests
from tests.evaluation.contests import run_to_evaluate

ARMS = "base,policy,best_of_2"


def call(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = run_to_evaluate(tmp_path_factory.mktemp("runs") / "mine")
    made.set_status("finished")
    return made


def test_json_is_all_that_is_printed_and_the_run_holds_the_same(run):
    result = call(run.path, "--arms", ARMS, "--prompts", 6, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["run"] == "mine"
    assert [(w["a"], w["b"], w["prompts"]) for w in found["win_rates"]] == [
        ("base", "sft", 6),
        ("policy", "sft", 6),
        ("best_of_2", "sft", 6),
    ]
    summary = run.summary()
    assert all(found[key] == summary[key] for key in found if key != "run")
    assert {"win_rates", "arms", "rounds", "evaluate"} <= set(found)
    assert run.status()["state"] == "finished"
    assert (run.path / "report.html").is_file()


def test_the_table_fits_80_columns_and_says_what_the_figures_are(run):
    result = call(run.path, "--arms", ARMS, "--prompts", 6, "--judge", "reward", "--judge", "vader")
    assert result.exit_code == 0, result.output
    text = result.output
    for words in ("policy", "PPO vs SFT", "by VADER sentiment", "all rounds", "tell 55% from 50%"):
        assert words in text or words == "policy"
    assert max(len(line) for line in text.splitlines() if "Report" not in line) <= 80


def test_stopped_it_says_how_to_go_on_and_goes_on(run, monkeypatch):
    run.set_status("finished")

    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "give_utilities", press)
    result = CliRunner().invoke(app, ["evaluate", str(run.path), "--prompts", "5"])
    assert result.exit_code == 130
    assert "Go on with" in result.output
    assert run.status()["state"] == "finished", "the run is what it was"
    lines = run.lines("evaluate/draws.jsonl")
    monkeypatch.undo()
    result = call(run.path, "--prompts", 5)
    assert result.exit_code == 0
    assert "batches of answers are there" in result.output
    assert run.lines("evaluate/draws.jsonl") == lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "polcy"], "there is no adapter and no run in polcy"),
        (["--judge", "gold"], "judge: gold is none"),
        (["--prompts", "9999"], "held-out prompts"),
        (["--judge", "human:nowhere.db"], "nowhere.db"),
        (["--arms", "ppo@7"], "has no checkpoint ppo@7"),
        (["--reference", "nobody"], "nobody"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_with_2(run, arguments, words):
    result = CliRunner().invoke(app, ["evaluate", str(run.path), *arguments])
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert run.status()["state"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "publc"], "publc"),
        (["--labelers", "nowhere.db"], "nowhere.db"),
        (["--arms", "policy=base"], "policy is the name of another arm"),
        (["--judge", "openai:m@http://[::1/v1"], "is no URL"),
        (["--prompts", "4", "--judge", "builtin:gold", "--judge", "human:none.db"], "none.db"),
    ],
)
def test_mistakes_are_found_before_anything_is_decoded(run, monkeypatch, arguments, words):
    for place in (drawing, best_of_n):
        monkeypatch.setattr(place, "sample", lambda *_: pytest.fail("decoded"))
    result = CliRunner().invoke(app, ["evaluate", str(run.path), *arguments])
    assert result.exit_code == 2, result.output
    assert words in result.output.replace("\n", " ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "much"])
def test_a_judge_that_gives_no_number_is_named(run, monkeypatch, value):
    monkeypatch.setattr(contests, "count_words", lambda prompt, response: value)
    result = CliRunner().invoke(app, ["evaluate", str(run.path), "--prompts", "4"])
    assert result.exit_code == 2, result.output
    assert f"count_words gives {value!r} for an answer to" in result.output.replace("\n", "")


def test_killed_the_run_is_still_what_it_was(run):
    run.finish_stage("rank", 1.0)  # all others have ended, too
    run.set_status("finished")
    status = run.status()
    run.write_json("status.json", status | {"state": "running", "pid": 2**22 + 1, "time": 0})
    assert call(run.path, "--prompts", 4).exit_code == 0
    assert run.status()["state"] == "finished"


def test_another_process_in_the_run_is_respected(run):
    run.write_json("status.json", {"state": "running", "stage": "ppo", "pid": 1})
    result = CliRunner().invoke(app, ["evaluate", str(run.path)])
    assert result.exit_code == 2
    assert "at work in process 1" in result.output.replace("\n", " ")
    run.set_status("finished")


def test_a_recipe_without_an_evaluation_gets_one_of_as_many_prompts_as_there_are(tmp_path):
    made = run_to_evaluate(tmp_path / "plain")
    text = (made.path / "recipe.yaml").read_text()
    start = text.index("evaluate:")
    (made.path / "recipe.yaml").write_text(text[:start])
    result = call(made.path, "--arms", "policy", "--json")
    assert result.exit_code == 0, result.output
    (win,) = json.loads(result.stdout)["win_rates"]
    assert (win["judge"], win["prompts"]) == ("reward", 64)
    assert Run(made.path).is_complete("evaluate")
