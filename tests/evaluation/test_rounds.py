"""All rounds in one table: planted strengths, another fit, and runs that meet by their arms."""

import math
import shutil

import numpy as np
import pytest

from lora_rlhf.evaluation import rounds
from lora_rlhf.evaluation.arms import parse_arms, ready
from lora_rlhf.evaluation.contest import hold, open_contest
from lora_rlhf.evaluation.judging import human_outcomes
from lora_rlhf.evaluation.rounds import Met, met_by_utility, of_votes, table
from lora_rlhf.evaluation.winrates import win_rate
from lora_rlhf.preferences.store import Store
from lora_rlhf.runs import Run
from tests.evaluation.contests import settings_of
from tests.evaluation.test_contest import in_run
from tests.preferences.making import judged, task, vote
from tests.preferences.test_ratings import independent_fit

ELO_A_NAT = 400 / math.log(10)


def by_name(rows):
    return {row["name"]: row for row in rows}


# -- the table ----------------------------------------------------------------------------------


def test_of_two_arms_the_difference_is_the_textbook_elo_of_the_win_rate():
    """30 wins, 8 ties, 10 losses: (30 + 4) / 48, and 400 log10 of its odds."""
    values = [1.0] * 30 + [0.5] * 8 + [0.0] * 10
    rows = by_name(table([Met("new", "old", v, str(i)) for i, v in enumerate(values)]))
    gap = rows["new"]["elo"] - rows["old"]["elo"]
    assert gap == pytest.approx(400 * math.log10(34 / 14), abs=1e-6)
    assert rows["new"]["elo"] + rows["old"]["elo"] == pytest.approx(2000, abs=1e-6)
    assert (rows["new"]["prompts"], rows["new"]["comparisons"]) == (48, 48)
    # Delta method: the variance of a mean is that of the values, of a logit that / (p (1 - p))^2;
    # each arm is half of the gap from their mean. Student's quantile of 48 prompts.
    p = 34 / 48
    spread = math.sqrt(np.var(values, ddof=1) / 48) / (p * (1 - p)) / 2
    half = (rows["new"]["ci"][1] - rows["new"]["ci"][0]) / 2
    assert half == pytest.approx(2.0117 * spread * ELO_A_NAT, rel=1e-3)


def test_strengths_are_those_of_another_optimiser():
    chance = np.random.default_rng(7)
    met = [
        Met(
            *chance.choice(list("abcd"), 2, replace=False),
            float(chance.choice([0, 0.5, 1])),
            str(i),
        )
        for i in range(120)
    ]
    rows = by_name(table(met))

    class Half:
        def __init__(self, winner, loser, weight):
            self.winner, self.loser, self.weight = winner, loser, weight

    pairs = [Half("abcd".index(m.a), "abcd".index(m.b), m.value) for m in met]
    pairs += [Half("abcd".index(m.b), "abcd".index(m.a), 1 - m.value) for m in met]
    expected = independent_fit(pairs, 4)
    found = [(rows[name]["elo"] - 1000) / ELO_A_NAT for name in "abcd"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_intervals_cover_planted_strengths():
    """200 simulations of four arms whose answers vary by prompt: Gumbel utilities, all pairs.

    Six comparisons of a prompt come from four utilities. Taken for independent prompts, they give
    intervals that are too narrow: the mutant.
    """
    truth = {"a": 0.9, "b": 0.2, "c": -0.3, "d": -0.8}
    chance, runs, prompts = np.random.default_rng(8), 200, 60
    covered, naive = (dict.fromkeys(truth, 0) for _ in range(2))
    for _ in range(runs):
        utilities = chance.gumbel(size=(prompts, 4)) + np.array(list(truth.values()))
        answers = [
            (arm, str(i), float(u))
            for i, row in enumerate(utilities)
            for arm, u in zip(truth, row, strict=True)
        ]
        met = met_by_utility(answers)
        apart = [Met(m.a, m.b, m.value, f"{m.prompt}/{i}") for i, m in enumerate(met)]
        for count, comparisons in ((covered, met), (naive, apart)):
            for row in table(comparisons):
                low, high = row["ci"]
                count[row["name"]] += low <= 1000 + ELO_A_NAT * truth[row["name"]] <= high
    # 95 % nominal; 200 simulations have a standard error of 1.5 points.
    assert all(0.9 <= n / runs <= 0.99 for n in covered.values()), covered
    assert sum(naive.values()) / (4 * runs) < 0.92 < sum(covered.values()) / (4 * runs)


def test_arms_that_nothing_connects_are_groups_apart():
    rows = table([Met("a", "b", 1.0, "p"), Met("a", "b", 0.0, "q"), Met("c", "d", 1.0, "p")])
    groups = {row["name"]: row["group"] for row in rows}
    assert groups["a"] == groups["b"] != groups["c"] == groups["d"]
    assert by_name(rows)["c"]["separated"]
    assert not by_name(rows)["a"]["separated"]
    assert table([]) == []


def test_utilities_meet_prompt_by_prompt_and_the_first_of_an_arm_counts():
    met = met_by_utility([("a", "p", 1.0), ("b", "p", 2.0), ("a", "q", 3.0), ("a", "p", 9.0)])
    assert met == [Met("a", "b", 0.0, "p")]
    assert met_by_utility([("a", "p", 1.0), ("b", "p", 1.0)]) == [Met("a", "b", 0.5, "p")]


# -- the runs of a project ----------------------------------------------------------------------


def test_rounds_of_one_directory_stand_in_one_table(session, tmp_path):
    """Three runs: the second one's policy is the first one's sft; the third has another length."""
    first = in_run(session, tmp_path / "one")
    second = in_run(session, tmp_path / "two")
    hold(open_contest(first, settings_of(first, prompts=8), ["sft", "policy"]))
    hold(open_contest(second, settings_of(second, prompts=8), ["base", "old=policy"]))
    rows = by_name(second.run.summary()["rounds"]["arms"])
    assert set(rows) == {"sft", "base", "old"}, "shared arms go by this run's names"
    shutil.copytree(second.run.path, tmp_path / "three", symlinks=True)
    other = Run(tmp_path / "three")
    text = (
        (other.path / rounds.FACTS)
        .read_text()
        .replace('"max_new_tokens": 12', '"max_new_tokens": 9')
    )
    (other.path / rounds.FACTS).write_text(text)
    again = by_name(rounds.of_project(first.run, second.run.summary()["evaluate"]["judge"]))
    assert set(again) == {"sft", "policy", "two/base"}
    assert {row["prompts"] for row in again.values()} == {8}
    assert {row["group"] for row in again.values()} == {0}
    assert set(by_name(rounds.of_project(first.run, "reward"))) == set()


def test_a_reward_adapter_judges_its_own_run_alone(session, tmp_path):
    first, second = in_run(session, tmp_path / "one"), in_run(session, tmp_path / "two")
    hold(open_contest(first, settings_of(first, prompts=4), ["base"], ["reward"]))
    hold(open_contest(second, settings_of(second, prompts=4), ["policy"], ["reward"]))
    assert set(by_name(second.run.summary()["rounds"]["arms"])) == {"sft", "policy"}


def test_best_of_n_by_another_reward_model_is_another_arm(session, tmp_path):
    """Of two runs with one sft: the first's reward model likes long answers, the other's short."""
    tables = {}
    for name, best in (("one", 3.0), ("two", -3.0)):
        fresh = in_run(session, tmp_path / name)
        head = session.backbone.adapters.heads["reward"]
        kept = head.weight.detach().clone()
        head.weight.data.mul_(math.copysign(1.0, best))
        try:
            hold(open_contest(fresh, settings_of(fresh, prompts=6), ["sft", "best_of_4"]))
        finally:
            head.weight.data.copy_(kept)
        tables[name] = by_name(fresh.run.summary()["rounds"]["arms"])
    assert set(tables["two"]) == {"sft", "best_of_4", "one/best_of_4"}
    assert tables["two"]["best_of_4"]["elo"] != tables["two"]["one/best_of_4"]["elo"]


def test_what_a_killed_neighbour_has_begun_is_no_round(session, tmp_path):
    fresh = in_run(session, tmp_path / "fresh")
    (tmp_path / "killed" / "evaluate").mkdir(parents=True)
    (tmp_path / "killed" / rounds.FACTS).write_text('{"fingerp')
    hold(open_contest(fresh, settings_of(fresh, prompts=4), ["sft", "policy"]))
    assert set(by_name(fresh.run.summary()["rounds"]["arms"])) == {"sft", "policy"}


def test_an_adapter_that_met_itself_stands_in_no_table(tmp_path):
    run = Run(tmp_path / "mine")
    run.append(rounds.FACTS, {"fingerprint": {}})
    for number, (a, b, value) in enumerate((("x", "x", 0.5), ("x", "y", 1.0), ("y", "y", 1.0))):
        record = {"judge": "j", "a": a, "b": b, "a_identity": a, "b_identity": b}
        run.append(rounds.COMPARISONS, record | {"prompt_key": str(number), "value": value})
    rows = by_name(rounds.of_project(run, "j"))
    assert {name: row["comparisons"] for name, row in rows.items()} == {"x": 1, "y": 1}


# -- people -------------------------------------------------------------------------------------


def shown(session):
    """(arms, how the app stores their answers)."""
    arms = ready(session, parse_arms(["base", "sft", "policy", "best_of_2"]))
    sha = {a.name: a.identity.partition("+")[0] + "0" * 48 for a in arms}
    facts = {
        "base": {"adapter": "base"},
        "sft": {"adapter": "first/sft", "adapter_sha256": sha["sft"]},
        "policy": {"adapter": "first/policy", "adapter_sha256": sha["policy"]},
    }
    return {a.name: a for a in arms}, facts


def test_votes_are_matched_by_the_weights_that_were_shown(session):
    arms, facts = shown(session)
    other = {"adapter": "first/policy", "adapter_sha256": "f" * 64}
    votes = [
        judged(task([facts["sft"], facts["policy"]])),  # the second wins
        judged(task([facts["policy"], facts["sft"]])),
        judged(task([facts["policy"], facts["sft"]]), ("r0", "r1"), outcome="tie"),
        judged(task([facts["sft"], other])),
        judged(task([facts["sft"], facts["policy"]], blind=False)),
        judged(task([facts["sft"], facts["policy"], facts["base"]]), ("r2",), ("r1",), ("r0",)),
    ]
    found = human_outcomes(votes, arms["policy"], arms["sft"])
    assert [o.value for o in found] == [1.0, 0.0, 0.5, 1.0]
    assert [o.value for o in human_outcomes(votes, arms["sft"], arms["policy"])] == [0, 1, 0.5, 0]
    assert [o.value for o in human_outcomes(votes, arms["base"], arms["sft"])] == [1.0]
    assert human_outcomes(votes, arms["best_of_2"], arms["sft"]) == []
    assert win_rate(found)["win_rate"] == 2.5 / 4


def test_a_ranking_that_shows_an_arm_twice_is_one_outcome(session):
    arms, facts = shown(session)
    four = [facts["policy"], facts["policy"], facts["sft"], facts["sft"]]
    ranked = judged(task(four), ("r0",), ("r2",), ("r1",), ("r3",))
    (found,) = human_outcomes([ranked], arms["policy"], arms["sft"])
    assert found.value == 3 / 4


def test_votes_on_one_adapter_say_nothing_of_it_against_itself(session):
    _, facts = shown(session)
    mine, again = ready(session, parse_arms(["sft", "again=sft"]))
    ranked = judged(task([facts["sft"]] * 3), ("r0",), ("r2",), ("r1",))
    assert human_outcomes([ranked], mine, again) == []


def test_people_alone_judge_without_a_word_decoded(session, tmp_path):
    _, facts = shown(session)
    location = str(tmp_path / "votes.db")
    with Store.open(location) as store:
        for winner in ("policy", "policy", "sft", "policy", "policy", "policy"):
            loser = "sft" if winner == "policy" else "policy"
            made = task([facts[loser], facts[winner]])
            store.add_many([made, vote(made)])
    fresh = in_run(session, tmp_path / "fresh")
    hold(open_contest(fresh, settings_of(fresh), ["policy", "base"], [f"human:{location}"]))
    summary = fresh.run.summary()
    (win,) = summary["win_rates"]
    assert (win["a"], win["win_rate"], win["prompts"]) == ("policy", 5 / 6, 6)
    assert summary["arms"] == {}
    names = {row["name"] for row in summary["rounds"]["arms"]}
    assert names == {"first/policy", "first/sft"}
    assert not (fresh.run.path / "evaluate" / "draws.jsonl").exists()


def test_the_table_of_votes_counts_ties_as_halves():
    votes = [judged(task([{"adapter": "a"}, {"adapter": "b"}])) for _ in range(3)]
    votes += [judged(task([{"adapter": "b"}, {"adapter": "a"}]))]
    votes += [judged(task([{"adapter": "a"}, {"adapter": "b"}]), ("r0", "r1"), outcome="tie")] * 2
    rows = by_name(of_votes(votes))
    gap = rows["b"]["elo"] - rows["a"]["elo"]
    assert gap == pytest.approx(400 * math.log10(4 / 2), abs=1e-6)
