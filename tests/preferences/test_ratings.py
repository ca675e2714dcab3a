"""Win rates against closed forms, another fit and simulated truths."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from lora_rlhf.preferences.bradley_terry import Comparison, fit
from lora_rlhf.preferences.events import Sampler, Task
from lora_rlhf.preferences.ratings import (
    counts_for_win_rate,
    heat_map,
    leaderboard,
    votes_needed,
    votes_still_needed,
    why_not_counted,
)
from tests.preferences.making import judged, task


def pair(winner: str, loser: str, **changes):
    """A uniform blind vote: `winner` stands second and wins."""
    return judged(task([{"adapter": loser}, {"adapter": winner}], **changes))


def votes(*counts: tuple[str, str, int]):
    return [pair(winner, loser) for winner, loser, n in counts for _ in range(n)]


def arms_of(board):
    return {arm.name: arm for arm in board.arms}


# -- which count --------------------------------------------------------------------------------

UNCOUNTED = {
    "actively chosen": lambda: pair("a", "b", sampler=Sampler(strategy="active")),
    "a repeat": lambda: pair("a", "b", sampler=Sampler(strategy="repeat")),
    "imported": lambda: pair("a", "b", sampler=Sampler(strategy="import")),
    "not blind": lambda: pair("a", "b", blind=False),
    "scores were shown": lambda: judged(task(), scores_visible=True),
    "skipped": lambda: judged(task(), ranking=(), outcome="skip"),
    "unfinished answer": lambda: judged(task([{"finish_reason": "stopped"}, {}])),
    "a like": lambda: judged(task(1), ("r0",), strength=1),
}


@pytest.mark.parametrize("reason", UNCOUNTED)
def test_only_uniform_blind_judgements_of_finished_answers_count(reason):
    wrong = UNCOUNTED[reason]()
    assert why_not_counted(wrong) == reason
    assert not counts_for_win_rate(wrong)
    board = leaderboard([*votes(("a", "b", 3), ("b", "a", 2)), wrong])
    assert board.counted == 5
    assert board.left_out == {reason: 1}
    assert arms_of(board)["a"].rate.share == pytest.approx(3 / 5)


def test_who_asked_for_the_names_before_voting_was_not_blind():
    assert why_not_counted(judged(task(), blind=False)) == "not blind"


def test_a_retracted_judgement_does_not_count():
    assert why_not_counted(replace(pair("a", "b"), retracted=True)) == "retracted"
    assert counts_for_win_rate(pair("a", "b"))
    assert counts_for_win_rate(judged(task([{"finish_reason": "length"}, {}])))


# -- Bradley-Terry ------------------------------------------------------------------------------


def test_of_two_arms_the_rate_is_the_share_of_decided_votes():
    board = leaderboard(votes(("new", "old", 30), ("old", "new", 18)))
    new = arms_of(board)["new"]
    assert new.rate.share == pytest.approx(30 / 48)
    assert new.strength - arms_of(board)["old"].strength == pytest.approx(math.log(30 / 18))
    # Wilson's interval in its textbook form; with 48 clusters Student's quantile is 2.012.
    low, high = wilson_textbook(30 / 48, 48, 1.96)
    assert new.rate.low == pytest.approx(low, abs=0.006)
    assert new.rate.high == pytest.approx(high, abs=0.006)
    assert [a.name for a in board.arms] == ["new", "old"]
    (only,) = board.pairs
    assert (only.a, only.b, only.wins, only.losses) == ("new", "old", 30, 18)
    assert only.rate.share == new.rate.share
    assert only.needed == 196 - 48


def wilson_textbook(p: float, n: float, z: float) -> tuple[float, float]:
    root = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return tuple((p + z * z / (2 * n) + sign * root) / (1 + z * z / n) for sign in (-1, 1))


def independent_fit(comparisons: list[Comparison], arms: int) -> np.ndarray:
    """The same likelihood, written as worths that multiply, and left to a general optimiser."""

    def loss(logs: np.ndarray) -> float:
        worth = np.exp(np.append(logs, 0.0))
        return -sum(
            c.weight * math.log(worth[c.winner] / (worth[c.winner] + worth[c.loser]))
            for c in comparisons
        )

    found = minimize(loss, np.zeros(arms - 1), method="BFGS", options={"gtol": 1e-9})
    strengths = np.append(found.x, 0.0)
    return strengths - strengths.mean()


def test_strengths_are_those_of_another_optimiser():
    chance = np.random.default_rng(1)
    truth = np.array([1.0, 0.2, -0.3, -0.9])
    comparisons = []
    for number in range(150):
        a, b = chance.choice(4, 2, replace=False)
        if chance.random() > 1 / (1 + math.exp(truth[b] - truth[a])):
            a, b = b, a
        weight = float(chance.choice([1.0, 0.5, 1 / 6]))
        comparisons.append(Comparison(int(a), int(b), weight, str(number // 3)))
    (found,) = fit(comparisons, 4)
    assert not found.separated
    assert found.strengths == pytest.approx(independent_fit(comparisons, 4), abs=1e-5)
    unweighted = [Comparison(c.winner, c.loser, 1.0, c.cluster) for c in comparisons]
    assert np.abs(found.strengths - independent_fit(unweighted, 4)).max() > 0.05, "weights matter"


def test_a_ranking_weighs_as_much_as_one_vote():
    """Two new answers above two old ones are four comparisons and one vote."""
    shown = [{"adapter": name} for name in ("new", "new", "old", "old")]
    better = [judged(task(shown), ("r0", "r1"), ("r2", "r3")) for _ in range(3)]
    worse = votes(("old", "new", 5))
    board = leaderboard([*better, *worse])
    assert arms_of(board)["new"].rate.share == pytest.approx(3 / 8)
    assert arms_of(board)["new"].decisive == 8
    mixed = [judged(task(shown), ("r0",), ("r2",), ("r1",), ("r3",))]  # 3 of 4 pairs
    board = leaderboard([*mixed, *worse])
    assert arms_of(board)["new"].rate.share == pytest.approx(0.75 / 6)
    (only,) = board.pairs
    assert (only.a, only.wins, only.losses) == ("old", 6, 3)


def test_ties_are_shown_and_left_out_of_rates():
    tied = [
        judged(task([{"adapter": "a"}, {"adapter": "b"}]), ("r0", "r1"), outcome=outcome)
        for outcome in ("tie", "tie", "both_bad")
    ]
    board = leaderboard([*votes(("a", "b", 3), ("b", "a", 1)), *tied])
    a = arms_of(board)["a"]
    assert a.rate.share == pytest.approx(3 / 4)
    assert (a.votes, a.decisive, a.ties, a.both_bad) == (7, 4, 2, 1)
    (only,) = board.pairs
    assert (only.ties, only.both_bad) == (2, 1)


def test_arms_that_nothing_connects_are_rated_apart_or_not_at_all():
    tie = judged(task([{"adapter": "e"}, {"adapter": "f"}]), ("r0", "r1"))
    board = leaderboard([*votes(("a", "b", 2), ("b", "a", 1), ("c", "d", 1), ("d", "c", 4)), tie])
    assert sorted(board.groups) == [("a", "b"), ("c", "d")]
    arms = arms_of(board)
    assert arms["d"].rate.share == pytest.approx(0.8)
    for name in ("e", "f"):
        rate = arms[name].rate
        assert (arms[name].strength, rate.share, rate.low, rate.high) == (None, None, 0.0, 1.0)
    assert [p.rate.share for p in board.pairs if p.a in "ef"] == [None]
    assert leaderboard([]).arms == ()


def test_answers_of_one_arm_alone_compare_nothing():
    board = leaderboard([judged(task([{"adapter": "a"}, {"adapter": "a"}]))])
    assert (board.counted, board.left_out, board.pairs) == (0, {"one adapter alone": 1}, ())


def test_who_always_wins_gets_a_finite_sane_interval():
    for wins in (1, 5, 40):
        board = leaderboard(votes(("a", "b", wins)))
        rate = arms_of(board)["a"].rate
        assert board.separated
        assert rate.share == pytest.approx((wins + 0.5) / (wins + 1))
        assert 0 < rate.low < rate.share < rate.high <= 1
        # The exact interval of Clopper and Pearson: all wins exclude p where p^n < 2.5 %.
        assert rate.low < 0.025 ** (1 / wins) + 0.06
        mirrored = arms_of(board)["b"].rate
        assert (mirrored.low, mirrored.high) == pytest.approx((1 - rate.high, 1 - rate.low))
    assert rate.low > 0.85, "forty wins of forty say something"
    assert arms_of(leaderboard(votes(("a", "b", 1))))["a"].rate.low < 0.3, "one says nothing"


def test_a_chain_is_connected_through_its_middle():
    """a beats b and b beats c: a against c is known without a vote between them."""
    counts = (("a", "b", 30), ("b", "a", 10), ("b", "c", 20), ("c", "b", 10))
    board = leaderboard(votes(*counts))
    strength = {name: arm.strength for name, arm in arms_of(board).items()}
    assert strength["a"] - strength["c"] == pytest.approx(math.log(3) + math.log(2), abs=1e-6)
    assert {(p.a, p.b) for p in board.pairs} == {("a", "b"), ("b", "c")}
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    of_a = (sigmoid(math.log(3)) + sigmoid(math.log(6))) / 2
    assert arms_of(board)["a"].rate.share == pytest.approx(of_a)


def test_two_models_of_one_name_are_two_arms():
    old, new = (
        {"adapter": "ppo", "adapter_sha256": "1" * 64},
        {
            "adapter": "ppo",
            "adapter_sha256": "2" * 64,
        },
    )
    base = {"adapter": None}
    board = leaderboard([judged(task([old, new])), judged(task([base, new]))])
    assert set(arms_of(board)) == {"ppo (11111111)", "ppo (22222222)", "base"}


def test_the_heat_map_counts_judgements_and_their_wins():
    shown = [{"adapter": name} for name in ("b", "a", "a")]
    ranked = judged(task(shown), ("r1",), ("r0",), ("r2",))
    tie = judged(task([{"adapter": "a"}, {"adapter": "c"}]), ("r0", "r1"))
    found = heat_map([*votes(("a", "b", 2), ("b", "a", 1)), ranked, tie])
    assert found.names == ("a", "b", "c")
    assert found.votes == ((0, 4, 1), (4, 0, 0), (1, 0, 0))
    assert found.wins == ((0.0, 2.5, 0.0), (1.5, 0.0, 0.0), (0.0, 0.0, 0.0))


# -- votes needed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.55, 785), (0.60, 196), (0.65, 87), (0.70, 49), (0.75, 31)]
)
def test_votes_needed_are_those_of_the_study_and_have_the_power_they_promise(rate, needed):
    assert votes_needed(rate) == needed == votes_needed(1 - rate)
    assert votes_still_needed(needed - 7, rate) == 7
    assert votes_still_needed(needed + 7, rate) == 0
    # Independently: the chance that a normal share of that many votes leaves 1/2's interval.
    spread = 0.5 / math.sqrt(needed)
    power = norm.sf((0.5 + norm.isf(0.025) * spread - rate) / spread)
    assert power == pytest.approx(0.8, abs=0.006)


# -- coverage -----------------------------------------------------------------------------------


def rankings(chance: np.random.Generator, tasks: list[Task], effect: float, spread: float):
    """K = 4, two answers an arm; how much better `new` is varies from prompt to prompt."""
    found = []
    for shown in tasks:
        of_prompt = effect + spread * chance.standard_normal()
        utility = np.array([of_prompt, of_prompt, 0.0, 0.0]) + chance.gumbel(size=4)
        order = np.argsort(-utility)
        found.append(judged(shown, *[(f"r{i}",) for i in order]))
    return found


def test_intervals_cover_the_truth_though_pairs_of_a_prompt_are_alike():
    """Truth: the mean over prompts of sigmoid(effect), by quadrature; 200 runs of 40 rankings."""
    chance, effect, spread, runs, prompts = np.random.default_rng(3), 0.6, 1.5, 200, 40
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    truth = float((weights / weights.sum()) @ (1 / (1 + np.exp(-effect - spread * points))))
    shown = [{"adapter": name} for name in ("new", "new", "old", "old")]
    tasks = [task(shown) for _ in range(prompts)]
    covered = naive = 0
    for _ in range(runs):
        rate = arms_of(leaderboard(rankings(chance, tasks, effect, spread)))["new"].rate
        covered += rate.low <= truth <= rate.high
        # The mutant: four pairs a ranking as if each were a vote of its own.
        low, high = wilson_textbook(rate.share, 4 * prompts, 1.96)
        naive += low <= truth <= high
    assert 0.92 <= covered / runs <= 0.985
    assert naive / runs < 0.85


def test_intervals_of_three_arms_cover_the_truth():
    chance, truth = np.random.default_rng(4), {"a": 0.7, "b": 0.1, "c": -0.8}
    runs, covered = 200, 0
    pairs = [p for p in product(truth, truth) if p[0] < p[1]]
    wanted = np.mean([1 / (1 + math.exp(truth[x] - truth["b"])) for x in "ac"])
    tasks = [task([{"adapter": one}, {"adapter": other}]) for one, other in pairs * 30]
    for _ in range(runs):
        made = []
        for shown in (tasks[i] for i in chance.choice(90, 75, replace=False)):
            one, other = (r.adapter for r in shown.responses)
            wins = chance.random() < 1 / (1 + math.exp(truth[other] - truth[one]))
            made.append(judged(shown, *((("r0",), ("r1",)) if wins else (("r1",), ("r0",)))))
        rate = arms_of(leaderboard(made))["b"].rate
        covered += rate.low <= wanted <= rate.high
    assert 0.92 <= covered / runs <= 0.985
