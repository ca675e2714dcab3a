"""All arms in mixed batches: the same answers, fewer forwards, known win rates, nothing lost."""

import json
import math
from contextlib import contextmanager

import pytest
import torch

from lora_rlhf.data.records import prompt_key
from lora_rlhf.errors import ConfigError
from lora_rlhf.evaluation import contest, drawing
from lora_rlhf.evaluation.arms import parse_arms, ready
from lora_rlhf.evaluation.contest import hold, open_contest
from lora_rlhf.evaluation.winrates import prompts_needed
from lora_rlhf.model.generation import Sampling, generate
from lora_rlhf.runs import Run
from lora_rlhf.stages import evaluate
from lora_rlhf.training.material import heldout_prompts
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import score_answers
from lora_rlhf.training.session import Session
from tests.evaluation.contests import PROMPTS, TOKENS, settings_of

ARMS = ("base", "sft", "policy", "best_of_2", "few_shot_1")


@pytest.fixture
def fresh(session, tmp_path):
    """The same backbone with a run directory of its own, which has the same adapters."""
    return in_run(session, tmp_path / "fresh")


def in_run(session: Session, path, **changes) -> Session:
    facts = {k: v for k, v in vars(session).items() if not k.startswith("_")}
    made = Session(**facts | {"run": Run(path)} | changes)
    for role in ("sft", "reward", "policy"):
        target = made.run.adapter(role)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(session.run.adapter(role).resolve(), target_is_directory=True)
    return made


def drawn(session, arms=ARMS, prompts=8, mixed=True):
    held = heldout_prompts(session, prompts)
    made = ready(session, parse_arms(arms))
    return drawing.draw(session, made, held, Sampling(TOKENS), mixed=mixed)


def ids_of(found):
    return [[[d.answer.ids for d in draws] for draws in arm] for arm in found]


def rows_of(found):
    return [ids for arm in ids_of(found) for draws in arm for ids in draws]


@contextmanager
def counted(session):
    """Forward passes of the backbone in the block, by whether they read a whole text."""
    seen = {"decode": 0, "score": 0}

    def note(module, args, kwargs, output):
        seen["decode" if kwargs.get("past_key_values") is not None else "score"] += 1

    handle = session.backbone.trunk.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# -- drawing ------------------------------------------------------------------------------------


def test_mixed_batches_give_each_arm_the_answers_that_it_gives_alone(session, fresh):
    """Against the decode loop itself, an adapter at a time, one prompt at a time."""
    found = ids_of(drawn(fresh))
    held = heldout_prompts(session, 8)[::3]
    found = [arm[::3] for arm in found]
    for arm, adapter in ((0, None), (1, "sft"), (2, "policy")):
        for row, (ids, _) in enumerate(held):
            seed = row_seed(session.recipe.seed, -1000, 3 * row)
            with session.backbone.adapters.use(adapter):
                (alone,) = generate(session.backbone, [ids], [seed], Sampling(TOKENS))
            assert found[arm][row] == [alone.ids]
    assert found[0] != found[1] != found[2]
    assert [len(draws) for draws in found[3]] == [2] * 3


def test_mixed_batches_take_fewer_forwards_and_one_reward_pass_a_batch(session, fresh, tmp_path):
    """Five arms of 8 prompts fill one batch; apart they are six, since best-of-2 draws twice."""
    with counted(fresh) as together:
        one = drawn(fresh)
    with counted(fresh) as apart:
        other = drawn(in_run(session, tmp_path / "apart"), mixed=False)
    pairs = zip(rows_of(one), rows_of(other), strict=True)
    # Other batches round otherwise, which turned 1 of 224 answers of 65 tokens in a real run.
    assert sum(a != b for a, b in pairs) <= 1
    lines = fresh.run.lines(drawing.DRAWS)[1:]
    assert [len(line["rows"]) for line in lines] == [6 * 8]
    # Random adapters seldom end: each batch takes the whole length limit, the prompt one more.
    assert together["decode"] == TOKENS
    assert 5 * TOKENS < apart["decode"] <= 6 * TOKENS
    # The reward pass is split by the token budget alone.
    rows = sum(len(d.answer.ids) for arm in one for draws in arm for d in draws)
    assert together["score"] <= math.ceil(2 * (rows + 48 * 64) / fresh.budget.tokens)
    assert apart["score"] == 6


def test_scores_are_those_of_the_reward_adapter_on_the_prompt_as_it_was_asked(session, fresh):
    found = drawn(fresh)
    held = heldout_prompts(session, 8)
    for arm in found:
        asked = [ids for ids, _ in held for _ in arm[0]]
        answers = [d.answer.ids for draws in arm for d in draws]
        expected = score_answers(session.backbone, asked, answers, 4096)
        got = torch.tensor([d.score for draws in arm for d in draws])
        # fp32; other batches round otherwise.
        assert torch.allclose(got, expected, atol=1e-4)


def test_an_arm_that_repeats_another_draws_anew_and_smaller_n_shares_with_larger(session, fresh):
    arms = ("sft", "again=sft", "best_of_2", "best_of_4")
    sft, again, two, four = ids_of(drawn(fresh, arms))
    assert all(a != b for a, b in zip(sft, again, strict=True))
    assert [draws[:2] for draws in four] == two
    assert all(one[0] not in draws for one, draws in zip(sft, four, strict=True))
    rows = sum(len(line["rows"]) for line in fresh.run.lines(drawing.DRAWS)[1:])
    assert rows == 8 * (1 + 1 + 4), "what two arms share is decoded once"


def test_killed_at_any_batch_it_goes_on_to_the_same_answers(session, tmp_path, monkeypatch):
    whole = in_run(session, tmp_path / "whole", rollout_rows=10)
    expected = ids_of(drawn(whole))
    lines = (whole.run.path / drawing.DRAWS).read_bytes().split(b"\n")[:-1]
    assert len(lines) == 1 + 5
    for number, kept in enumerate((lines[:3], [*lines[:3], lines[3][:100]], lines)):
        killed = in_run(session, tmp_path / f"killed-{number}", rollout_rows=10)
        killed.run.stage("evaluate")
        text = b"\n".join(kept) + b"\n" * (len(kept[-1]) != 100)
        (killed.run.path / drawing.DRAWS).write_bytes(text)
        with counted(killed) as seen:
            assert ids_of(drawn(killed)) == expected
        batches = 5 - (2 if number < 2 else 5)
        assert seen["decode"] <= batches * TOKENS
        assert (killed.run.path / drawing.DRAWS).read_bytes().split(b"\n")[:-1] == lines


def test_answers_of_another_question_are_not_taken(session, fresh):
    drawn(fresh, ("sft",))
    first = fresh.run.lines(drawing.DRAWS)
    found = drawn(fresh, ("sft", "policy"))
    assert fresh.run.lines(drawing.DRAWS)[0] != first[0]
    assert len(found) == 2


# -- known answers ------------------------------------------------------------------------------


def test_the_same_adapter_twice_gives_half_within_its_interval_and_best_of_n_its_closed_form(
    session, fresh
):
    """Judged by what chooses, the best of n beats one more draw with chance n / (n + 1)."""
    settings = settings_of(fresh, prompts=64)
    hold(open_contest(fresh, settings, ["sft", "again=sft", "best_of_4"], ["reward"]))
    again, best = fresh.run.summary()["win_rates"]
    low, high = again["ci"]
    assert low <= 0.5 <= high
    assert again["ties"] < 64, "two draws, not one shown twice"
    assert (best["a"], best["b"], best["judge"]) == ("best_of_4", "sft", "reward")
    assert abs(best["win_rate"] - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 64), "3 standard errors"
    # 22 prompts find it four times out of five, 64 always but for one time in 10^5.
    assert prompts_needed(0.8) == 22
    assert best["ci"][0] > 0.5
    assert fresh.run.summary()["arms"]["best_of_4"]["kl"] == math.log(4) - 3 / 4
    ratings = {arm["name"]: arm["elo"] for arm in fresh.run.summary()["rounds"]["arms"]}
    assert ratings["best_of_4"] > ratings["sft"]


def test_a_stage_writes_the_keys_that_others_read(fresh):
    evaluate.run(fresh)
    summary = fresh.run.summary()
    assert [w["a"] for w in summary["win_rates"]] == ["base", "best_of_2", "policy"]
    for win in summary["win_rates"]:
        assert set(win) == {
            *("a", "b", "judge", "win_rate", "ci", "prompts", "ties"),
            *("length_controlled", "prompts_needed_55"),
        }
    assert set(summary["arms"]) == {"base", "sft", "best_of_2", "policy"}
    assert {r["name"] for r in summary["rounds"]["arms"]} == set(summary["arms"])
    assert summary["arms"]["sft"]["kl"] == 0.0
    assert "kl" not in summary["arms"]["base"]
    lines = fresh.run.lines("evaluate/answers.jsonl")
    assert len(lines) == 4 * PROMPTS
    words = [float(len(line["response"].split())) for line in lines]
    assert [line["utility"] for line in lines] == words
    by_hand = [
        (ours > theirs) + 0.5 * (ours == theirs)
        for ours, theirs in zip(words[3::4], words[1::4], strict=True)
    ]
    policy = next(w for w in summary["win_rates"] if w["a"] == "policy")
    assert policy["win_rate"] == sum(by_hand) / PROMPTS
    assert policy["ties"] == by_hand.count(0.5)


def test_an_evaluation_leaves_nothing_of_the_one_before(fresh):
    evaluate.run(fresh)
    hold(open_contest(fresh, settings_of(fresh, prompts=4), ["policy"], ["reward", "vader"]))
    summary = fresh.run.summary()
    assert set(summary["arms"]) == {"sft", "policy"}
    assert [(w["judge"], w["prompts"]) for w in summary["win_rates"]] == [
        ("reward", 4),
        ("vader", 4),
    ]
    assert summary["evaluate"] == {"prompts": 4, "judge": "reward"}


def test_the_reference_may_be_any_arm(fresh):
    settings = settings_of(fresh, reference="base", prompts=6)
    hold(open_contest(fresh, settings, ["policy", "sft"]))
    assert [(w["a"], w["b"]) for w in fresh.run.summary()["win_rates"]] == [
        ("policy", "base"),
        ("sft", "base"),
    ]


@pytest.mark.parametrize("judge", ["gold", "builtin:silver", "openai:", "no.such:thing", "human2"])
def test_a_judge_that_means_nothing_is_refused(fresh, judge):
    with pytest.raises(ConfigError, match="Allowed"):
        open_contest(fresh, settings_of(fresh), ["policy"], [judge])


def test_a_recipe_is_checked_before_the_stages_that_come_first(fresh):
    contest.check(settings_of(fresh, arms=("few_shot_2", "ppo@100")))
    with pytest.raises(ConfigError, match="cannot stand in a recipe"):
        contest.check(settings_of(fresh, arms=("somewhere",)))


def test_what_was_drawn_is_told_by_prompt_and_by_arm(fresh):
    evaluate.run(fresh)
    held = heldout_prompts(fresh, PROMPTS)
    lines = fresh.run.lines("evaluate/answers.jsonl")
    assert [line["prompt_key"] for line in lines[::4]] == [prompt_key(p.messages) for _, p in held]
    assert len({line["identity"] for line in lines}) == 4
    assert json.dumps(fresh.run.summary()), "all of it is plain JSON"
