"""Reward adapters from elsewhere, alone or as an ensemble: who scores, chooses, is refused.

What a member gives is compared with a second session, in which it is the run's own adapter.
"""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.data.records import prompt_text
from lora_rlhf.evaluation.choosing import chooser_of
from lora_rlhf.runs import Run
from lora_rlhf.training.material import heldout_prompts
from lora_rlhf.training.rollout import score_answers
from tests.evaluation.contests import run_to_evaluate, session_of

PROMPTS = 5


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Run, Run]:
    """Runs on one backbone whose reward adapters differ."""
    folder = tmp_path_factory.mktemp("runs")
    return tuple(
        run_to_evaluate(folder / name, first_seed=n) for name, n in {"a": 0, "b": 50}.items()
    )


def evaluated(run: Run, *arguments: str) -> dict[str, dict[str, tuple[str, float]]]:
    """(text, score) of every arm to every prompt of a command."""
    line = ["evaluate", str(run.path), "--prompts", str(PROMPTS), "--json", *arguments]
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["run"] == run.name
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for row in run.lines("evaluate/answers.jsonl"):
        found.setdefault(row["arm"], {})[row["prompt"]] = (row["response"], row["score"])
    return found


def scores_by(run: Run, other: Run) -> dict[str, list[tuple[str, float]]]:
    """Every draw of best-of-4 as `run` keeps it, with the score of the own adapter of `other`."""
    session = session_of(other)
    held = heldout_prompts(session, PROMPTS)
    arms = evaluated(run, "--arms", "best_of_4")
    assert set(arms) == {"sft", "best_of_4"}
    rows = [row for line in run.lines("evaluate/draws.jsonl")[1:] for row in line["rows"]]
    by_prompt: dict[str, list[tuple[str, float]]] = {}
    decode = session.backbone.format.decode
    # Longest prompts first, each followed by all its streams: sft's own, then four draws.
    order = sorted(range(PROMPTS), key=lambda i: -len(held[i][0]))
    for place, number in enumerate(order):
        ids, prompt = held[number]
        answers = [row[0] for row in rows[5 * place + 1 : 5 * place + 5]]
        scores = score_answers(session.backbone, [ids] * 4, answers, 4096).tolist()
        texts = [decode(answer) for answer in answers]
        by_prompt[prompt_text(prompt.messages)] = list(zip(texts, scores, strict=True))
    return by_prompt


@pytest.mark.parametrize(
    ("rule", "combine"),
    [
        ("mean", lambda a, b: (a + b) / 2),
        ("worst", min),
        ("uncertainty", lambda a, b: (a + b) / 2 - ((a - b) / 2) ** 2 / 2),
    ],
)
def test_an_ensemble_gives_the_best_of_n_of_its_rule(two, rule, combine):
    run, other = two
    mine, theirs = scores_by(run, run), scores_by(run, other)
    found = evaluated(
        run,
        "--arms",
        "best_of_4",
        "--reward",
        "reward",
        "--reward",
        str(other.path),
        "--rule",
        rule,
    )
    chosen_otherwise = 0
    for prompt, draws in mine.items():
        both = [
            (text, combine(score, also))
            for (text, score), (_, also) in zip(draws, theirs[prompt], strict=True)
        ]
        text, score = max(both, key=lambda each: each[1])
        assert found["best_of_4"][prompt][0] == text
        # fp32; other batches round otherwise.
        assert found["best_of_4"][prompt][1] == pytest.approx(score, abs=1e-4)
        chosen_otherwise += text != max(draws, key=lambda each: each[1])[0]
    assert chosen_otherwise, "the run's own adapter alone would have done"


def test_one_from_elsewhere_takes_the_place_of_the_runs_own(two):
    run, other = two
    theirs = scores_by(run, other)
    found = evaluated(run, "--arms", "best_of_4", "--reward", str(other.adapter("reward")))
    for prompt, draws in theirs.items():
        text, score = max(draws, key=lambda each: each[1])
        # fp32; other batches round otherwise.
        assert found["best_of_4"][prompt] == (text, pytest.approx(score, abs=1e-4))


def test_the_frontier_is_of_the_ensemble(two):
    run, other = two
    line = ["evaluate", str(run.path), "--frontier", "4", "--json", "--rule", "worst"]
    line += ["--reward", "reward", "--reward", str(other.path)]
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["frontier"]
    assert (found["rule"], len(found["members"])) == ("worst", 2)
    scores = np.array([row["scores"] for row in run.lines("evaluate/best_of_n.jsonl")[1:]])
    assert scores.shape[1:] == (2, 4)
    by_one = next(point for point in found["points"] if point.get("n") == 1)
    assert by_one["proxy"] == pytest.approx(scores.min(1).mean())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward", "nowhere"], "--reward nowhere: there is no reward adapter"),
        (["--reward", "SFT"], "has no head that scores"),
        (["--reward", "reward", "--reward", "reward"], "names one adapter twice"),
        (["--reward", "reward", "--reward", "OWN"], "has the weights of reward"),
        (["--reward", "reward", "--rule", "best"], "--rule is best. Allowed: mean, worst, unc"),
    ],
)
def test_what_cannot_choose_is_refused_in_a_sentence(two, arguments, words):
    run, _ = two
    places = {"SFT": str(run.adapter("sft")), "OWN": str(run.path)}
    line = ["evaluate", str(run.path), *(places.get(a, a) for a in arguments)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_order_of_members_and_what_they_are_called_change_nothing(two):
    run, other = two
    session = session_of(run)
    names = ["reward", str(other.path)]
    one = chooser_of(session.backbone, run, names, "worst")
    apart = session_of(run)
    again = chooser_of(apart.backbone, run, [str(other.path), str(run.path)], "worst")
    assert one.members != again.members
    assert one.identity(session.backbone) == again.identity(apart.backbone)
    for rewards, rule in ((names, "mean"), (names[:1], "worst"), (names[1:], "worst")):
        differs = chooser_of(apart.backbone, run, rewards, rule)
        assert differs.identity(apart.backbone) != one.identity(session.backbone)
