"""Agreement between people, with oneself and with the reward model; position bias; time."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from lora_rlhf.preferences.agreement import (
    annotator_agreement,
    median_seconds,
    position_bias,
    reward_agreement,
    reward_agreement_by_view,
    self_consistency,
)
from lora_rlhf.preferences.counting import is_too_fast
from lora_rlhf.preferences.events import Sampler
from lora_rlhf.preferences.intervals import clustered_rate
from tests.preferences.making import judged, skip, task, vote


def repeat(of, **changes):
    """The same answers with the sides swapped, for another person or the same."""
    swapped = tuple(r.model_copy(update={"pos": 1 - r.pos}) for r in of.responses)
    facts = {"responses": swapped, "repeat_of": of.id, "sampler": Sampler(strategy="repeat")}
    return task(len(swapped), of.prompt[0]["content"], **facts | changes)


# -- the interval -------------------------------------------------------------------------------


def test_one_observation_a_cluster_is_wilsons_interval():
    found = clustered_rate([[1.0]] * 60 + [[0.0]] * 40)
    assert (found.share, found.count, found.clusters) == (0.6, 100, 100)
    # scipy's own, of the binomial test.
    expected = binomtest(60, 100).proportion_ci(method="wilson")
    assert found.low == pytest.approx(expected.low, abs=0.003)
    assert found.high == pytest.approx(expected.high, abs=0.003)


def test_copies_of_observations_add_nothing():
    once = clustered_rate([[1.0]] * 12 + [[0.0]] * 8)
    copied = clustered_rate([[1.0] * 50] * 12 + [[0.0] * 50] * 8)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    apart = clustered_rate([[1.0]] * 600 + [[0.0]] * 400)
    assert apart.high - apart.low < 0.4 * (copied.high - copied.low)


@pytest.mark.parametrize("rows", [[], [[]], {}])
def test_nothing_observed_is_anything(rows):
    found = clustered_rate(rows)
    assert (found.share, found.low, found.high, found.count) == (None, 0.0, 1.0, 0)


def test_unanimous_clusters_still_leave_doubt():
    found = clustered_rate([[1.0, 1.0]] * 10)
    assert found.share == 1.0
    assert 0.6 < found.low < 0.75, "Clopper and Pearson: 0.69"
    assert found.high == 1.0
    assert clustered_rate([[1.0] * 30]).low < 0.25, "one prompt is one prompt"


def test_clustered_intervals_cover_the_truth():
    chance, runs, covered = np.random.default_rng(5), 200, 0
    for _ in range(runs):
        of_prompt = chance.beta(1.4, 0.6, size=40)  # mean 0.7, very different prompts
        rows = [(chance.random(6) < p).astype(float).tolist() for p in of_prompt]
        found = clustered_rate(rows)
        covered += found.low <= 0.7 <= found.high
    assert 0.92 <= covered / runs <= 0.985


# -- position and time --------------------------------------------------------------------------


def test_position_bias_is_the_share_of_votes_for_what_stood_first():
    first = [{"pos": 0}, {"pos": 1}]
    last = [{"pos": 1}, {"pos": 0}]

    def shown(places):
        made = task()
        rows = tuple(r.model_copy(update=p) for r, p in zip(made.responses, places, strict=True))
        return made.model_copy(update={"responses": rows})

    votes = [judged(shown(last)) for _ in range(3)]  # r1 wins, and stands first
    votes += [judged(shown(first)) for _ in range(1)]
    ties = [judged(task(), ("r0", "r1"))]
    others = [judged(task(3), ("r0",), ("r1",), ("r2",)), judged(task(blind=False))]
    found = position_bias([*votes, *ties, *others])
    assert (found.share, found.count) == (0.75, 4)
    assert found.low < 0.5 < found.high


def test_the_median_time_is_by_the_browser_and_else_by_the_server():
    votes = [judged(task(), client_ms=ms) for ms in (10_000, 30_000)]
    votes.append(judged(task(), client_ms=None, server_ms=50_000))
    others = [
        judged(task(), client_ms=None, server_ms=None),
        judged(task(), client_ms=1, ranking=(), outcome="skip"),
        judged(task(sampler=Sampler(strategy="import")), client_ms=1),
    ]
    assert median_seconds([*votes, *others]) == 30.0
    ranked = judged(task(3), ("r0",), ("r1",), ("r2",), client_ms=90_000)
    assert median_seconds([*votes, ranked], "rank") == 90.0
    assert median_seconds(others) is None


def test_too_fast_is_under_a_quarter_of_reading_at_300_words_a_minute():
    """98 words and a prompt of two: 20 s to read, so that 5 s is the border."""
    shown = task([{"text": "word " * 49}, {"text": "word " * 49}], prompt="two words")
    assert is_too_fast(shown, vote(shown, client_ms=4_999))
    assert not is_too_fast(shown, vote(shown, client_ms=5_000))
    assert not is_too_fast(shown, vote(shown, client_ms=None))
    assert is_too_fast(shown, vote(shown, client_ms=5_000, flags=("fast",)))
    assert not is_too_fast(shown, skip(shown, client_ms=1))


# -- people -------------------------------------------------------------------------------------


def test_agreement_is_counted_on_pairs_that_two_people_both_order():
    shared = task(4, annotator=None)
    votes = [
        judged(shared, ("r0",), ("r1",), ("r2",), ("r3",), annotator="ana"),
        judged(shared, ("r1",), ("r0",), ("r2", "r3"), annotator="bob"),
    ]
    found = annotator_agreement(votes)
    assert (found.count, found.share) == (5, pytest.approx(4 / 5))  # r2 = r3 is no order
    assert annotator_agreement(votes[:1]).share is None


def test_repeats_with_swapped_sides_are_the_same_task():
    first = task()
    again = repeat(first, annotator="bob")
    third = repeat(again, annotator="eve")  # a chain
    votes = [
        judged(first, ("r1",), ("r0",)),
        judged(again, ("r1",), ("r0",)),
        judged(third, ("r0",), ("r1",)),
    ]
    found = annotator_agreement(votes)
    assert (found.count, found.share) == (3, pytest.approx(1 / 3))
    assert self_consistency(votes).share is None


def test_of_a_person_who_judged_twice_the_newest_is_compared_with_others():
    first = task(annotator=None)
    own_again = repeat(first, annotator="ana")
    votes = [
        judged(first, ("r1",), ("r0",), annotator="ana"),
        judged(first, ("r0",), ("r1",), annotator="bob"),
        judged(own_again, ("r0",), ("r1",), annotator="ana"),
    ]
    assert annotator_agreement(votes).share == 1.0
    consistent = self_consistency(votes)
    assert (consistent.share, consistent.count) == (0.0, 1)


def test_imported_and_retracted_judgements_agree_with_nobody():
    shown = task(annotator=None)
    both = [judged(shown, annotator="ana"), judged(shown, annotator="bob")]
    assert annotator_agreement(both).share == 1.0
    assert annotator_agreement([both[0], replace(both[1], retracted=True)]).share is None
    imported = task(annotator=None, sampler=Sampler(strategy="import"))
    them = [judged(imported, annotator="ana"), judged(imported, annotator="bob")]
    assert annotator_agreement(them).share is None


# -- the reward model ---------------------------------------------------------------------------


def scored(*scores: float | None, rm: str = "rm-2", **changes):
    return task([{"rm_score": s, "rm_adapter": rm} for s in scores], **changes)


def test_the_reward_model_agrees_where_it_scores_the_preferred_answer_higher():
    votes = [
        judged(scored(0.1, 0.9)),  # r1 is preferred: agrees
        judged(scored(0.9, 0.1)),  # does not
        judged(scored(0.5, 0.5)),  # half
        judged(scored(3.0, 2.0, 1.0), ("r0",), ("r2",), ("r1",)),  # two of three pairs
    ]
    found = reward_agreement(votes)
    assert found.count == 6
    assert found.share == pytest.approx((1 + 0 + 0.5 + 2) / 6)
    assert found.clusters == 4
    nothing = [
        judged(scored(None, 1.0)),
        judged(scored(1.0, 2.0, blind=False)),
        judged(scored(1.0, 2.0, sampler=Sampler(strategy="active"))),
        judged(scored(1.0, 2.0), ("r0", "r1")),
    ]
    assert reward_agreement(nothing).share is None


def test_scores_of_two_reward_models_are_not_compared():
    two = task([{"rm_score": 1.0, "rm_adapter": "rm-1"}, {"rm_score": 2.0, "rm_adapter": "rm-2"}])
    assert reward_agreement([judged(two)]).share is None
    votes = [judged(scored(0, 1, rm="rm-1")), judged(scored(1, 0, rm="rm-2"))]
    assert reward_agreement(votes).share == 0.5
    assert reward_agreement(votes, "rm-1").share == 1.0
    assert reward_agreement(votes, "rm-2").share == 0.0


def test_agreement_is_told_apart_by_what_was_shown():
    votes = [
        judged(scored(0, 1)),
        judged(scored(1, 0)),
        judged(scored(0, 1, blind=False)),
        judged(scored(0, 1), scores_visible=True),
        judged(scored(0, 1, blind=False), scores_visible=True),
        judged(scored(1, 0, sampler=Sampler(strategy="active"))),
        judged(task([{"finish_reason": "stopped"}, {}]), ranking=(), outcome="skip"),
    ]
    found = reward_agreement_by_view(votes)
    assert {view: (rate.share, rate.count) for view, rate in found.items()} == {
        "blind": (0.5, 2),
        "names shown": (1.0, 1),
        "scores shown": (1.0, 2),
    }
