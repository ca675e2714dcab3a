"""Held-out splits: by prompt, stable, and never on both sides."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.data.records import Demonstration, Prompt, Ranking, Record, Text, key_of, user
from lora_rlhf.data.splits import deduplicate, leak_check, split_by_prompt, split_rankings
from lora_rlhf.errors import DataError

demonstrations = st.lists(
    st.builds(
        Demonstration,
        st.integers(0, 30).map(lambda i: user(f"question {i}")),
        st.sampled_from(["a", "b", "c"]),
    ),
    min_size=1,
    max_size=60,
)
fractions = st.floats(0.01, 0.89)


def by_row(records: list, fraction: float) -> tuple[list, list]:
    """The mutant: every n-th row is held out."""
    every = max(2, round(1 / fraction))
    return [r for i, r in enumerate(records) if i % every], records[::every]


def keys(records: list) -> set[str]:
    return {key_of(r) for r in records}


@given(demonstrations, fractions, st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_rows_and_never_leaks(records, fraction, random):
    train, heldout = split_by_prompt(records, fraction)
    assert len(train) + len(heldout) == len(records)
    assert not keys(train) & keys(heldout)
    assert train == [r for r in records if r in train]  # in the order of the rows
    shuffled = random.sample(records, len(records))
    assert keys(split_by_prompt(shuffled, fraction)[1]) == keys(heldout)
    if len(keys(records)) > 1:
        leak_check(train, heldout)  # both sides hold something


def test_a_split_by_row_leaks():
    records = [Demonstration(user(f"question {i % 5}"), str(i)) for i in range(20)]
    train, heldout = by_row(records, 0.3)
    with pytest.raises(DataError, match="held-out prompts are trained on"):
        leak_check(train, heldout)
    leak_check(*split_by_prompt(records, 0.3))


def test_all_kinds_of_record_of_a_prompt_fall_on_one_side():
    prompts = [Prompt(user(f"question {i}")) for i in range(300)]
    demos = [Demonstration(p.messages, "a") for p in prompts[::2]]
    rankings = [Ranking(p.messages, ("a", "b"), ((0,), (1,))) for p in prompts[1::3]]
    heldout: set[str] = set()
    train: set[str] = set()
    parts: list[list[Record]] = [list(prompts), list(demos), list(rankings)]
    for records in parts:
        a, b = split_by_prompt(records, 0.2)
        train, heldout = train | keys(a), heldout | keys(b)
    assert not train & heldout


def test_the_share_of_prompts_is_the_one_asked_for():
    records = [Prompt(user(f"question {i}")) for i in range(4000)]
    for fraction in (0.05, 0.1, 0.5):
        held = len(split_by_prompt(records, fraction)[1]) / 4000
        # Four standard deviations of a binomial share; the hash is a fixed one.
        assert abs(held - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5
    assert split_by_prompt(records, 0.0)[1] == []


def test_white_space_at_the_ends_makes_no_other_prompt():
    a, b = Demonstration(user("what? "), "x"), Demonstration(user("\nwhat?"), "x ")
    assert key_of(a) == key_of(b)
    assert deduplicate([a, b]) == ([a], 1)
    system = Prompt(({"role": "system", "content": "what?"},))
    assert key_of(system) != key_of(a)  # roles count


def test_repeats_go_and_the_first_of_each_stays_in_place():
    a, b, c = (Demonstration(user(p), r) for p, r in [("p", "x"), ("p", "y"), ("q", "x")])
    assert deduplicate([a, b, a, c, b]) == ([a, b, c], 2)
    texts = [Text("one"), Text("two"), Text(" one\n")]
    assert deduplicate(texts) == (texts[:2], 1)
    pair = Ranking(user("p"), ("x", "y"), ((0,), (1,)))
    turned = Ranking(user("p"), ("x", "y"), ((1,), (0,)))
    assert deduplicate([pair, turned, pair]) == ([pair, turned], 1)


def test_one_prompt_alone_cannot_be_split():
    records = [Demonstration(user("p"), r) for r in "abc"]
    train, heldout = split_by_prompt(records, 0.5)
    with pytest.raises(DataError, match="too few different prompts"):
        leak_check(train, heldout)


def test_a_leak_is_named():
    with pytest.raises(DataError, match="1 held-out prompts are trained on too, such as 'p'"):
        leak_check([Prompt(user("p"))], [Demonstration(user(" p"), "a")])


def test_strict_pairs_are_all_pairs_across_tie_groups():
    ranking = Ranking(user("p"), ("a", "b", "c", "d"), ((2,), (0, 3), (1,)))
    # By hand: 2 beats 0, 3, 1; 0 and 3 tie and beat 1.
    assert set(ranking.strict_pairs) == {(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)}
    assert len(ranking.strict_pairs) == 5
    assert Ranking(user("p"), ("a", "b"), ((0, 1),)).strict_pairs == ()


def test_a_salted_split_is_independent_of_the_plain_one():
    """Of what the plain split trains on, the salted one holds out its own share again."""
    prompts = [Prompt(user(f"prompt {i}")) for i in range(2000)]
    train, _ = split_by_prompt(prompts, 0.2)
    again_train, again_heldout = split_by_prompt(train, 0.2, salt="rank")
    assert not set(again_train) & set(again_heldout)
    # Binomial(1600, 0.2): five standard deviations are 80.
    assert abs(len(again_heldout) - 0.2 * len(train)) < 80


@given(st.integers(1, 12), fractions)
def test_rankings_of_few_prompts_leave_two_on_each_side_and_never_move_one_across(count, fraction):
    """The held-out prompts are those with the lowest hashes, found here by sorting."""
    rankings = [Ranking(user(f"p{i}"), ("x", "y"), ((0,), (1,))) for i in range(count)]
    for of_training_prompts in (False, True):
        salt = "rank" if of_training_prompts else ""
        train, heldout = split_rankings(rankings, fraction, of_training_prompts)
        plain = split_by_prompt(rankings, fraction, salt)[1]
        order = sorted(rankings, key=lambda r: _hash_of(key_of(r), salt))
        assert keys(heldout) == keys(order[: len(heldout)])
        assert min(len(train), len(heldout)) >= min(2, count // 2)
        if 2 <= len(plain) <= count - 2:
            assert keys(heldout) == keys(plain)


def _hash_of(key: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}/{key}".encode()).hexdigest() if salt else key
