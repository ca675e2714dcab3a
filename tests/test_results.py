"""What a summary is made to say, and that it never says more than it holds."""

from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.results import arm_name, reliability, result_rows, sample_pairs, verdict
from lora_rlhf.runs import Run
from tests.fabricated import finished_run


def won(rate: float, low: float, high: float, **policy: Any) -> dict[str, Any]:
    win = {"a": "policy", "b": "sft", "win_rate": rate, "ci": [low, high], "prompts": 200}
    sft = {"mean_length": 40.0, "eos_rate": 1.0, "parts": {"topic": 0.5, "kindness": 0.5}}
    arms = {"sft": sft, "policy": sft | policy}
    return {"win_rates": [win | {"judge": "builtin:gold"}], "arms": arms}


@pytest.mark.parametrize(
    ("low", "high", "tone", "words"),
    [
        (0.51, 0.6, "good", "PPO beats SFT"),
        (0.49, 0.6, "even", "cannot be told apart"),
        (0.4, 0.49, "bad", "made the answers worse"),
    ],
)
def test_the_verdict_follows_the_interval(low: float, high: float, tone: str, words: str) -> None:
    spoken = verdict(won(0.5, low, high))
    assert spoken.tone == tone
    assert words in spoken.text
    assert f"{100 * low:.0f}% to {100 * high:.0f}%" in spoken.text


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"kl": 40.0}, "KL of 40 nats"),
        ({"eos_rate": 0.5}, "only 50%"),
        ({"mean_length": 20.0}, "50% shorter"),
        ({"mean_length": 60.0}, "50% longer"),
    ],
)
def test_a_win_with_a_flaw_is_not_called_good(policy: dict[str, Any], words: str) -> None:
    assert verdict(won(0.9, 0.8, 0.95)).tone == "good"
    spoken = verdict(won(0.9, 0.8, 0.95, **policy))
    assert spoken.tone == "even"
    assert words in spoken.text


@pytest.mark.parametrize(("step", "told"), [(0, True), (1, False), (12, False)])
def test_a_policy_that_never_got_better_is_said_to_be_what_it_began_as(
    step: int, told: bool
) -> None:
    win = {"a": "policy", "b": "sft", "win_rate": 0.9, "ci": [0.8, 0.95], "prompts": 64}
    for summary in ({"ppo": {"best_step": step}}, {"ppo": {"best_step": step}, "win_rates": [win]}):
        found = verdict(summary)
        assert ("the one it started from" in found.text) is told
        assert (found.tone == "even") is (told or "win_rates" not in summary)


def test_a_part_of_the_utility_that_fell_is_named() -> None:
    spoken = verdict(won(0.9, 0.8, 0.95, parts={"topic": 0.6, "kindness": 0.4}))
    assert spoken.text.endswith("these fell: kindness.")


def test_a_score_that_nobody_judged_is_no_win() -> None:
    spoken = verdict({"ppo": {"score": 2.0, "kl": 3.0}})
    assert spoken.tone == "even"
    assert "Nothing has judged" in spoken.text


def test_every_prefix_of_a_pipeline_has_a_verdict_and_rows(tmp_path: Path) -> None:
    whole = finished_run(tmp_path / "run").summary()
    texts = {verdict({}).text}
    for keys in (["sft"], ["sft", "reward"], ["sft", "reward", "ppo"], list(whole)):
        part = {key: whole[key] for key in keys}
        texts.add(verdict(part).text)
        assert result_rows(part)
    assert len(texts) == 5
    assert result_rows({}) == []


def test_rows_hold_the_summarys_numbers(tmp_path: Path) -> None:
    rows = {row.name: row for row in result_rows(finished_run(tmp_path / "run").summary())}
    assert rows["PPO vs SFT"].value == "74% wins"
    assert rows["PPO vs SFT"].interval == (0.69, 0.79)
    assert rows["reward accuracy"].note == "Bayes limit 75%, always-longer 52%"
    assert rows["PPO KL from SFT"].value == "4.2 nats"
    assert rows["PPO mean length"].value == "40 tokens"
    assert rows["PPO mean length"].note == "SFT 42 tokens"
    assert rows["PPO distinct-2"].value == "91%"
    assert rows["SFT held-out loss"].value == "1.234"


def test_samples_are_paired_by_prompt(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (pair,) = sample_pairs(run)
    assert (pair.before_name, pair.after_name) == ("SFT", "PPO")
    assert pair.before.startswith("sft says")
    assert pair.after.startswith("policy says")
    assert pair.after_score == 1.25


def test_without_an_evaluation_the_first_look_is_paired_with_the_last(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run.path / "evaluate" / "samples.jsonl").unlink()
    (pair,) = sample_pairs(run)
    assert (pair.before_name, pair.after_name) == ("step 0", "step 60")
    assert pair.before.startswith("look 0")
    assert pair.after.startswith("look 60")
    assert sample_pairs(Run(tmp_path / "empty")) == []


def test_a_judge_that_says_nothing_is_not_to_be_believed() -> None:
    def win(judge: str, agree: float, unreadable: int) -> dict[str, Any]:
        return {"judge": judge, "prompts": 50, "orders_agree": agree, "unreadable": unreadable}

    wins = [win("mute", 0.5, 30), win("mute", 0.7, 0), win("fine", 0.9, 1), {"judge": "reward"}]
    orders, replies = reliability(wins, "mute")
    assert "both orders of 60% of pairs" in orders
    assert "30 of 200 of its replies (15%)" in replies
    assert "Do not believe" in replies
    orders, replies = reliability(wins, "fine")
    assert "90%" in orders
    assert "1 of 100" in replies
    assert "Do not believe" not in replies
    assert reliability(wins, "reward") == []


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("policy", "PPO"),
        ("best_of_4", "best of 4"),
        ("best_of_16:policy", "best of 16 of PPO"),
        ("best_of_4:few_shot_2", "best of 4 of base after 2 examples"),
        ("few_shot_3", "base after 3 examples"),
        ("few_shot_1", "base after 1 example"),
        ("few_shot_3:sft", "SFT after 3 examples"),
        ("quickstart/best_of_4:policy", "quickstart: best of 4 of PPO"),
        ("quickstart-2/policy", "quickstart-2: PPO"),
        ("quickstart-2/reward", "quickstart-2/reward"),
        ("best_of_4:runs/other", "best of 4 of runs/other"),
        ("best_of_4x", "best_of_4x"),
    ],
)
def test_arms_are_called_as_people_call_them(arm: str, name: str) -> None:
    assert arm_name(arm) == name
