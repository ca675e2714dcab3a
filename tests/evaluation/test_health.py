"""The health card finds what was planted, and its figures are those of closed forms."""

import math
import random

import pytest

from lora_rlhf.evaluation import health
from lora_rlhf.evaluation.health import (
    Pair,
    Scored,
    by_margin,
    calibration,
    calibration_slope,
    health_card,
    pairs_of,
    share,
)
from tests.evaluation.planted import (
    flipped,
    good,
    loves_brevity,
    loves_length,
    noise,
    planted,
)

SEEDS = range(3)


def told(score, seed=0, **kinds):
    return health_card(planted(score, seed, **kinds))["verdict"]


# -- the verdict --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_good_reward_model_passes(seed):
    for taste in (0.0, 0.5):
        verdict = told(good, seed, taste_in_length=taste)
        assert verdict["ok"], verdict
        assert "held-out pairs as they were ranked" in verdict["sentence"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("taste", [0.0, 1.0])
def test_a_length_lover_is_caught_even_where_people_love_length_too(seed, taste):
    """With a taste of 1 it orders two pairs in three as they do, far from a coin."""
    card = health_card(planted(loves_length, seed, taste_in_length=taste))
    assert not card["verdict"]["ok"]
    assert "has learned length" in card["verdict"]["sentence"]
    assert (card["accuracy"]["low"] > 0.6) == (taste > 0)
    shorter = told(loves_brevity, seed, taste_in_length=-taste)
    assert "has learned length" in shorter["sentence"]
    assert "the shorter answer" in shorter["sentence"]


def test_it_is_the_length_rule_that_catches_the_length_lover(monkeypatch):
    monkeypatch.setattr(health, "FOLLOWS_LENGTH", 2.0)
    assert told(loves_length, taste_in_length=1.0)["ok"]


@pytest.mark.parametrize("seed", SEEDS)
def test_flipped_labels_are_caught(seed):
    verdict = told(flipped, seed)
    assert not verdict["ok"]
    assert "swapped" in verdict["sentence"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_reward_model_is_caught(seed):
    verdict = told(noise, seed)
    assert not verdict["ok"]
    assert "does not exclude a coin" in verdict["sentence"]


@pytest.mark.parametrize(("percentile", "ok"), [(0.89, True), (0.95, False)])
def test_whoever_pays_for_nothing_is_caught(percentile, ok):
    rows = [{"name": "nothing", "percentile": percentile}, {"name": "other", "percentile": 0.1}]
    verdict = health_card(planted(good), extra={"degenerate": rows})["verdict"]
    assert verdict["ok"] == ok
    assert ("'nothing'" in verdict["sentence"]) == (not ok)


def test_who_is_far_too_sure_passes_with_a_doubt():
    assert "surer" not in told(good)["sentence"]
    verdict = told(lambda u, n, rng: 6 * good(u, n, rng))
    assert verdict["ok"]
    assert "surer of itself" in verdict["sentence"]


def test_a_handful_of_rankings_is_not_enough_to_trust():
    assert not told(good, prompts=3, answers=2)["ok"]


def made_card(**changes):
    """A card that passes without a doubt: 70 % of 400 pairs, always longer 55 %, slope 1."""
    share = {"value": 0.7, "low": 0.65, "high": 0.75, "n": 400}
    lead = {"value": 0.15, "low": 0.1, "high": 0.2, "n": 400}
    card = {
        "accuracy": share,
        "always_longer": share | {"value": 0.55},
        "length_correlation": 0.0,
        "lead_over_length": lead,
        "calibration_slope": 1.0,
    }
    return card | changes


NO_LEAD = {"value": 0.02, "low": 0.0, "high": 0.04, "n": 400}
COIN = {"value": 0.55, "low": 0.5, "high": 0.6, "n": 400}
LOVED = [{"name": "nothing", "percentile": 0.9}, {"name": "echo", "percentile": 0.95}]


@pytest.mark.parametrize(
    ("changes", "ok", "said", "not_said"),
    [
        ({}, True, "55% for always choosing the longer answer.", ", but"),
        ({"length_correlation": 0.5}, True, "goes with length (rank correlation +0.50)", "surer"),
        ({"length_correlation": 0.49}, True, "70%", "goes with length"),
        ({"length_correlation": -0.5}, True, "goes with length (rank correlation -0.50)", "surer"),
        ({"calibration_slope": 0.49}, True, "surer of itself than it should be", "length (rank"),
        ({"calibration_slope": 0.5}, True, "70%", "surer"),
        ({"lead_over_length": NO_LEAD}, True, "longer answer may do as well (55%)", "against 55%"),
        (
            {"lead_over_length": NO_LEAD, "length_correlation": -0.2},
            True,
            "shorter answer may do as well (45%)",
            "longer",
        ),
        (
            {"lead_over_length": NO_LEAD, "length_correlation": -0.5},
            False,
            "where always choosing the shorter answer gets 45%",
            "longer",
        ),
        (
            {"lead_over_length": NO_LEAD, "length_correlation": 0.5},
            False,
            "where always choosing the longer answer gets 55%",
            "shorter",
        ),
        ({"accuracy": COIN}, False, "does not exclude a coin", "swapped"),
        ({"accuracy": COIN | {"low": 0.501}}, True, "55% of 400", "coin"),
        ({"accuracy": COIN | {"low": 0.4, "high": 0.49}}, False, "swapped", "coin"),
        ({"degenerate": LOVED}, False, "'echo' a higher score than 95%", "nothing"),
        ({"degenerate": LOVED[:1]}, False, "'nothing' a higher score than 90%", "echo"),
        ({"degenerate": [{"name": "echo", "percentile": 0.89}]}, True, "70%", "echo"),
    ],
)
def test_the_verdict_at_each_of_its_borders(changes, ok, said, not_said):
    found = health.verdict(made_card(**changes))
    assert found["ok"] == ok
    assert found["sentence"].startswith("It orders" if ok else "Do not trust")
    assert said in found["sentence"]
    assert not_said not in found["sentence"]


def test_the_lead_over_length_is_over_its_own_taste():
    """Scores fall with length: always shorter orders two of three pairs, the model all."""
    rankings = [
        Scored("p", ["a", "b"], [(0,), (1,)], [2.0, 1.0], [5, 9]),
        Scored("q", ["a", "b"], [(0,), (1,)], [1.5, 0.5], [8, 7]),
        Scored("r", ["a", "b"], [(0,), (1,)], [3.0, 0.0], [1, 20]),
    ]
    card = health_card(rankings)
    assert card["length_correlation"] < 0
    assert card["lead_over_length"]["value"] == pytest.approx(1 / 3, abs=1e-12)


# -- shares -------------------------------------------------------------------------------------


def test_the_accuracy_is_that_of_counting():
    rankings = planted(good, 3, prompts=40)
    right = total = 0
    for one in rankings:
        order = [group[0] for group in one.groups]
        for place, better in enumerate(order):
            for worse in order[place + 1 :]:
                right += one.scores[better] > one.scores[worse]
                total += 1
    card = health_card(rankings)
    assert card["accuracy"]["value"] == pytest.approx(right / total, abs=1e-12)
    assert card["accuracy"]["n"] == total == 240
    assert card["accuracy"]["low"] < right / total < card["accuracy"]["high"]


def test_ties_of_people_make_no_pair_and_ties_of_scores_count_half():
    one = Scored("p", ["a", "b", "c"], [(2,), (0, 1)], [1.0, 3.0, 1.0], [5, 5, 9])
    assert [(p.better, p.worse, p.margin, p.longer) for p in pairs_of([one])] == [
        (2, 0, 0.0, 4),
        (2, 1, -2.0, 4),
    ]
    card = health_card([one])
    assert card["accuracy"]["value"] == 0.25
    assert card["always_longer"]["value"] == 1.0
    assert [d["margin"] for d in card["disagreements"]] == [-2.0]


def test_the_interval_goes_by_prompts_and_not_by_pairs():
    """Prompts of six pairs that are all right or all wrong: as wide as that of single pairs."""
    rng = random.Random(1)
    rows = [(row, float(rng.random() < 0.6)) for row in range(100)]
    one, six = share(rows), share([r for r in rows for _ in range(6)])
    assert six["n"] == 600
    assert (six["low"], six["high"]) == pytest.approx((one["low"], one["high"]), abs=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scores", "lengths", "wanted"),
    [
        ([1.0, 2.0, 3.0, 4.0], [5, 9, 7, 20], 0.8),  # 1 - 6 (0 + 1 + 1 + 0) / (4 * 15)
        ([4.0, 3.0, 2.0, 1.0], [1, 2, 3, 400], -1.0),  # by ranks, however far the last one is
        ([1.0, 2.0, 3.0, 4.0], [64, 64, 64, 64], 0.0),  # no answer ended
        ([2.0, 2.0, 2.0, 2.0], [5, 9, 7, 20], 0.0),
    ],
)
def test_score_and_length_are_correlated_by_rank_over_all_answers(scores, lengths, wanted):
    rankings = [
        Scored("p", ["a", "b"], [(0,), (1,)], scores[i : i + 2], lengths[i : i + 2]) for i in (0, 2)
    ]
    card = health_card(rankings)
    assert card["length_correlation"] == pytest.approx(wanted, abs=1e-12)


def test_quarters_of_the_margin_hold_every_pair_once_and_the_surest_are_right():
    pairs = [Pair(i, 0, 1, float(i + 1) if i >= 20 else float(-i - 1), 0) for i in range(40)]
    found = by_margin(pairs)
    assert [(q["low"], q["high"]) for q in found] == [(1, 10), (11, 20), (21, 30), (31, 40)]
    assert [q["share"]["value"] for q in found] == [0.0, 0.0, 1.0, 1.0]
    assert sum(q["share"]["n"] for q in found) == 40


def test_tags_are_told_apart():
    """A model that knows utility in chat alone."""
    rankings = planted(good, prompts=150)
    blind = planted(noise, prompts=150)
    mixed = [g if g.tag == "chat" else b for g, b in zip(rankings, blind, strict=True)]
    tags = health_card(mixed)["by_tag"]
    assert set(tags) == {"chat", "rewrite", "untagged"}
    assert tags["chat"]["low"] > 0.6
    assert tags["rewrite"]["low"] < 0.5 < tags["rewrite"]["high"]
    assert tags["chat"]["n"] == 300


def test_the_most_frequent_tag_comes_first():
    tags = ["b", "c", "a", "c", "a", "c", None]
    rankings = [Scored("p", ["a", "b"], [(0,), (1,)], [1.0, 0.0], [5, 5], tag) for tag in tags]
    found = health_card(rankings)["by_tag"]
    assert [(tag, share["n"]) for tag, share in found.items()] == [
        ("c", 3),
        ("a", 2),
        ("b", 1),
        ("untagged", 1),
    ]


def test_long_texts_of_a_disagreement_are_cut():
    one = Scored("p" * 1000, ["a" * 1001, "b"], [(0,), (1,)], [0.0, 1.0], [5, 5])
    (found,) = health_card([one])["disagreements"]
    assert found["prompt"] == "p" * 1000
    assert found["chosen"] == "a" * 999 + "…"
    assert found["rejected"] == "b"


def test_without_tags_there_is_no_table_of_tags():
    one = Scored("p", ["a", "b"], [(0,), (1,)], [1.0, 0.0], [5, 5])
    assert health_card([one])["by_tag"] == {}


def test_the_worst_disagreements_come_first_and_one_a_prompt():
    rankings = planted(noise, prompts=60)
    found = health_card(rankings)["disagreements"]
    assert len(found) == 20
    assert len({d["prompt"] for d in found}) == 20
    margins = [d["margin"] for d in found]
    assert margins == sorted(margins)
    assert margins[0] == min(p.margin for p in pairs_of(rankings))
    row = int(found[0]["prompt"].removeprefix("prompt "))
    one = rankings[row]
    by_text = dict(zip(one.answers, one.scores, strict=True))
    gap = by_text[found[0]["chosen"]] - by_text[found[0]["rejected"]]
    assert gap == pytest.approx(margins[0], abs=1e-12)
    order = [one.answers[g[0]] for g in one.groups]
    assert order.index(found[0]["chosen"]) < order.index(found[0]["rejected"])


def test_a_reward_model_that_agrees_with_everyone_has_no_disagreements():
    rankings = [Scored("p", ["a", "b"], [(0,), (1,)], [1.0, 0.0], [5, 5])] * 3
    assert health_card(rankings)["disagreements"] == []


# -- calibration --------------------------------------------------------------------------------


def pairs_with(margin, right, wrong, start=0):
    """Pairs whose |margin| is the same, so many of them in the right order."""
    signs = [1.0] * right + [-1.0] * wrong
    return [Pair(start + i, 0, 1, margin * s, 0) for i, s in enumerate(signs)]


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_calibration_against_its_closed_form(gain):
    """sigmoid(ln 3) = 3/4 and sigmoid(ln 9) = 9/10; the gain of the score must not move them."""
    pairs = [
        *pairs_with(gain * math.log(3), 30, 10),
        *pairs_with(gain * math.log(9), 15, 15, start=40),
        *pairs_with(0.0, 5, 0, start=70),
    ]
    found = calibration(pairs, gain)
    assert [b["n"] for b in found] == [5, 40, 30]
    assert [b["predicted"] for b in found] == pytest.approx([0.5, 0.75, 0.9], abs=1e-12)
    assert [b["observed"] for b in found] == pytest.approx([0.5, 0.75, 0.5], abs=1e-12)
    assert [b["low"] for b in found] == pytest.approx([0.5, 0.75, 0.9], abs=1e-12)
    low, high = found[1]["ci"]
    # 30 of 40 independent pairs: .75 +- 1.96 sqrt(.75 .25 / 40), to the bootstrap's own steps.
    assert (low, high) == pytest.approx((0.616, 0.884), abs=0.03)  # reason: the steps of 40 pairs


@pytest.mark.parametrize("stretch", [1.0, 3.0])
def test_a_calibrated_model_is_on_the_diagonal_and_a_stretched_one_is_not(stretch):
    """Margins m are right with chance sigmoid(m); stretched by c they predict sigmoid(c m)."""
    rng = random.Random(5)
    pairs = []
    for row in range(8000):
        m = abs(rng.gauss(0, 1.5))
        right = rng.random() < 1 / (1 + math.exp(-m))
        pairs.append(Pair(row, 0, 1, stretch * (m if right else -m), 0))
    off = max(abs(b["predicted"] - b["observed"]) for b in calibration(pairs) if b["n"] > 200)
    # Five standard errors of 200 observations at one half are .18; of a bin at .9, .1.
    assert off < 0.1 if stretch == 1 else off > 0.15
    slope = calibration_slope([p.margin for p in pairs])
    # 8000 E[m^2 s(1-s)] = 8000 * .2095 is the Fisher information: 4 standard errors are .098.
    assert slope == pytest.approx(1 / stretch, abs=0.1 / stretch)  # reason: 4 standard errors


@pytest.mark.parametrize(("right", "wrong"), [(3, 1), (1, 3), (1, 1), (9, 1)])
def test_the_slope_of_equal_margins_has_a_closed_form(right, wrong):
    """With all |margins| m and k of n right, sigmoid(s m) = k / n."""
    for margin in (0.5, 2.0):
        found = calibration_slope([margin] * right + [-margin] * wrong)
        assert found == pytest.approx(math.log(right / wrong) / margin, abs=1e-6)


def test_slopes_that_run_away_are_bounded():
    assert calibration_slope([1.0, 2.0]) == 50.0
    assert calibration_slope([-1.0, -2.0]) == -50.0
    assert calibration_slope([0.0, 0.0]) == 0.0
