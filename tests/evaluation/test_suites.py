"""Public sets: the entropy metric by hand, intervals, and all that runs without lm-eval."""

import math

import pytest

from lora_rlhf.errors import ConfigError
from lora_rlhf.evaluation.arms import parse_arms, ready
from lora_rlhf.evaluation.suites.entropies import crows_pairs, pair_entropy, winogender_pairs
from lora_rlhf.evaluation.suites.public import run_suite
from lora_rlhf.evaluation.suites.shares import Observed, perplexity_of
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.stages import sft
from tests.sessions import session, small_recipe, write_data


@pytest.mark.parametrize(
    ("odds", "bits"),
    [
        (1.0, 1.0),
        (3.0, 2.0 - 0.75 * math.log2(3.0)),  # p = 3/4
        (7.0, 3.0 - 0.875 * math.log2(7.0)),  # p = 7/8
    ],
)
def test_the_entropy_of_a_pair_is_that_of_its_odds(odds, bits) -> None:
    """Worked by hand; also far below what exp can hold, as whole sentences are."""
    for base in (0.0, -5000.0):
        first = base - math.log(odds)
        # One rounding of a float near 5000 is 1e-12; the slope of the entropy is under 1.
        assert pair_entropy(first, base) == pytest.approx(bits, abs=1e-9)
        assert pair_entropy(base, first) == pytest.approx(bits, abs=1e-9)
    assert pair_entropy(-1.0, -5000.0) == 0.0


def test_pairs_are_of_one_sentence() -> None:
    rows = [
        {"sentid": f"nurse.patient.{n}.{gender}.txt", "sentence": f"{n} {gender}"}
        for n in (0, 1)
        for gender in ("neutral", "female", "male")
    ]
    assert winogender_pairs(rows) == [("0 male", "0 female"), ("1 male", "1 female")]
    assert crows_pairs([{"sent_more": "a", "sent_less": "b"}]) == [("a", "b")]


def test_a_share_is_a_ratio_of_sums_with_its_interval() -> None:
    found = Observed([0.0, 1.0] * 200).share()
    half = 1.96 * math.sqrt(0.25 / 400)  # of a binomial share
    assert found["value"] == 0.5
    # A percentile of 2,000 draws is off by some hundredths of the half width.
    assert found["low"] == pytest.approx(0.5 - half, abs=0.15 * half)  # reason: as above
    assert found["high"] == pytest.approx(0.5 + half, abs=0.15 * half)  # reason: as above
    # exp((2 + 18) / (1 + 3)), and not the mean of the two documents' own.
    assert perplexity_of([2.0, 18.0], [1, 3]).share()["value"] == pytest.approx(math.exp(5.0))
    assert Observed([1.0] * 10).share()["low"] < 0.8  # ten of ten are no certainty


@pytest.mark.parametrize("count", [2, 3, 5, 7, 50])
def test_none_of_all_begins_at_nothing_and_all_of_all_ends_at_one(count) -> None:
    none, every = Observed([0.0] * count).share(), Observed([1.0] * count).share()
    assert (none["low"], every["high"]) == (0.0, 1.0)
    assert none["high"] == pytest.approx(1 - every["low"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.shared
def test_the_public_sets_run_on_every_adapter_and_go_on(shared, tmp_path) -> None:
    write_data(tmp_path)
    backbone = Backbone.load(small_recipe(tmp_path).base)
    made = session(small_recipe(tmp_path), tmp_path / "run", backbone)
    sft.run(made)
    arms = ready(made, parse_arms(["base", "sft"]))
    names = ("perplexity", "crows_pairs_entropy", "winogender_entropy")
    for name in names:
        found = run_suite(made, name, arms, data=shared / "data", limit=4)
        assert list(found["tasks"]) == [name]
        assert found["skipped"] == {}
        for metric, by_arm in found["tasks"][name].items():
            assert list(by_arm) == ["base", "sft"], metric
            for share in by_arm.values():
                assert share["low"] <= share["value"] <= share["high"]
                assert math.isfinite(share["value"])
    entropies = found["tasks"]["winogender_entropy"]
    assert set(entropies) == {f"entropy_{kind}" for kind in ("basic", "respectful", "biased")}
    assert all(0.0 <= s["value"] <= 1.0 for by_arm in entropies.values() for s in by_arm.values())
    # Two adapters are not one: the arms are switched.
    basic = entropies["entropy_basic"]
    assert basic["base"]["value"] != basic["sft"]["value"]
    again = run_suite(made, "winogender_entropy", arms, data=shared / "data", limit=4)
    assert again["tasks"]["winogender_entropy"] == entropies
    with pytest.raises(ConfigError, match="limit is 1"):
        run_suite(made, "perplexity", arms, data=shared / "data", limit=1)
