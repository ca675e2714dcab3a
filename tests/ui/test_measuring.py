"""Held-out accuracy before and after: by hand, and its intervals by simulation."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from lora_rlhf.data.records import Ranking, user
from tests.ui.fakes import FakeEngine
from ui.measuring import (
    CHOOSING,
    FILE,
    LEAST,
    BeforeAfter,
    change_of,
    measure,
    measure_run,
    prompts_in,
    read_rankings,
    too_few,
    write_rankings,
)


class Scores(FakeEngine):
    """Each adapter scores a text by its place in the adapter's own list."""

    def __init__(self, **orders: str) -> None:
        super().__init__()
        self.orders = orders

    def score(self, items, adapter=None):
        return [float(self.orders[adapter].index(text)) for _, text in items]


def ranking(prompt: str, better_first: str, *, ties: int = 0) -> Ranking:
    order = tuple((i,) for i in range(len(better_first)))
    if ties:
        order = (tuple(range(ties)), *order[ties:])
    return Ranking(user(prompt), tuple(better_first), order)


def test_accuracy_is_the_share_of_strict_pairs_in_peoples_order() -> None:
    engine = Scores(old="abc", new="cab")  # the last scores highest
    rankings = [ranking("p", "cba"), ranking("q", "ab"), ranking("r", "ba", ties=2)]
    found = measure(engine, rankings, "old", "new")
    assert found is not None
    # old orders c > b > a: all three of p right, q wrong. new orders b > a > c: of p b > a alone
    # is right, and q is wrong. r prefers nothing.
    assert (found.pairs, found.prompts) == (4, 2)
    assert found.before is not None
    assert found.before.value == pytest.approx(3 / 4)
    assert found.after.value == pytest.approx(1 / 4)
    assert found.change is not None
    assert found.change.value == pytest.approx(-2 / 4)


def test_equal_scores_are_half_right() -> None:
    class Flat(FakeEngine):
        def score(self, items, adapter=None):
            return [0.0 for _ in items]

    found = measure(Flat(), [ranking("p", "abc"), ranking("q", "ab")], "old", "new")
    assert found is not None
    assert found.after.value == 0.5


def test_nothing_preferred_is_nothing_measured() -> None:
    assert measure(Scores(new="ab"), [ranking("p", "ab", ties=2)], None, "new") is None
    assert measure(Scores(new="ab"), [], None, "new") is None


def test_without_a_reward_model_before_there_is_no_change() -> None:
    found = measure(Scores(new="ab"), [ranking("p", "ba"), ranking("q", "ba")], None, "new")
    assert found is not None
    assert found.before is None
    assert found.change is None
    assert "There was no reward model before" in found.verdict


def test_the_same_scores_change_nothing_and_prove_nothing() -> None:
    engine = Scores(old="ab", new="ab")
    found = measure(engine, [ranking(f"p{i}", "ba") for i in range(50)], "old", "new")
    assert found is not None
    assert found.change is not None
    assert found.change.value == 0.0
    assert found.change.low < 0 < found.change.high
    assert "No difference can be told" in found.verdict


def test_few_prompts_that_all_improve_prove_little_and_many_prove_it() -> None:
    def verdict(count: int) -> BeforeAfter:
        engine = Scores(old="ab", new="ba")
        found = measure(engine, [ranking(f"p{i}", "ab") for i in range(count)], "old", "new")
        assert found is not None
        return found

    assert "No difference can be told" in verdict(2).verdict
    assert "agrees with people more often" in verdict(30).verdict


def test_the_verdict_names_the_side() -> None:
    engine = Scores(old="ba", new="ab")
    found = measure(engine, [ranking(f"p{i}", "ab") for i in range(30)], "old", "new")
    assert found is not None
    assert "agrees with people less often" in found.verdict


def test_one_prompt_says_nothing_of_others() -> None:
    found = change_of({"p": [1.0, 1.0, 1.0]})
    assert (found.low, found.high) == (-1.0, 1.0)


def test_the_interval_of_a_change_holds_the_truth_as_often_as_it_says() -> None:
    """Clusters that share a tendency of their own; the true mean is that of the tendencies."""
    chance = random.Random(5)
    for clusters, most in ((8, 600), (40, 595)):
        hits = 0
        for _ in range(600):
            rows = {}
            for key in range(clusters):
                tendency = chance.choice([0.0, 0.4])  # mean 0.2
                rows[str(key)] = [float(chance.random() < tendency) for _ in range(5)]
            found = change_of(rows)
            hits += found.low <= 0.2 <= found.high
        # Binomial(600, 0.95): three standard deviations are 16. Few prompts get a wide interval.
        assert 570 - 16 <= hits <= most


def test_pairs_of_one_prompt_count_as_one_observation() -> None:
    """The mutant takes every pair for a prompt of its own, and is too sure."""
    rows = {str(i): [float(i % 4 == 0)] * 10 for i in range(40)}
    clustered = change_of(rows)
    alone = change_of({f"{k}/{i}": [v] for k, row in rows.items() for i, v in enumerate(row)})
    values = np.array([row[0] for row in rows.values()])
    wald = 1.96 * values.std(ddof=1) / math.sqrt(40)
    half = (clustered.high - clustered.low) / 2
    assert half == pytest.approx(wald, rel=0.15)  # reason: Student's quantile, the added half
    assert (alone.high - alone.low) / 2 < 0.5 * half


def test_what_is_measured_on_survives_the_file(tmp_path: Path) -> None:
    rankings = [ranking("p \u2028 \u00e9", "ab"), ranking("q", "abc", ties=2)]
    write_rankings(tmp_path / "heldout.jsonl", rankings)
    assert read_rankings(tmp_path / "heldout.jsonl") == rankings
    assert read_rankings(tmp_path / "none.jsonl") == []


def test_a_run_is_measured_on_votes_that_choose_nothing_and_not_on_too_few(tmp_path: Path) -> None:
    """The new model turns the order of the choosing rankings right, and that of the votes wrong."""
    engine = Scores(old="abxy", new="baxy")
    write_rankings(tmp_path / CHOOSING, [ranking(f"c{i}", "ab") for i in range(30)])
    votes = [ranking(f"p{i}", "ba") for i in range(LEAST)]
    write_rankings(tmp_path / FILE, votes)
    result, choosing = measure_run(engine, tmp_path, "old", "new")
    assert result is not None
    assert choosing is not None
    assert (result.after.value, choosing.after.value) == (0.0, 1.0)
    assert (result.prompts, choosing.prompts) == (LEAST, 30)
    # One short: several votes on one prompt, and a tie, are no more prompts.
    few = [*votes[1:], votes[1], ranking("tie", "ab", ties=2)]
    write_rankings(tmp_path / FILE, few)
    result, choosing = measure_run(engine, tmp_path, "old", "new")
    assert result is None
    assert choosing is not None
    assert prompts_in(few) == LEAST - 1


def test_too_few_is_said_with_what_to_do() -> None:
    assert too_few(LEAST) == ""
    for count, said in ((0, "there are none yet"), (1, "there is 1."), (7, "there are 7.")):
        assert said in too_few(count)
        assert "Compare some held-out prompts first" in too_few(count)
