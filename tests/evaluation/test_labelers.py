"""Annotators in groups: agreement by hand, and reward models that never saw some of them."""

import json

import pytest

from lora_rlhf.data.records import Ranking, user
from lora_rlhf.errors import DataError
from lora_rlhf.evaluating import _fit_reward
from lora_rlhf.evaluation.labelers import agreement, cross_validate, split_annotators
from tests.evaluation.test_contest import in_run
from tests.sessions import _SENTENCES


def ranking(annotator, *groups, prompt="q", responses=("one", "two", "three")):
    order = groups or ((0,), (1,), (2,))
    return Ranking(user(prompt), responses, order, annotator=annotator)


def test_annotators_are_split_evenly_by_what_they_have_ranked():
    made = [
        ranking(name, prompt=str(i))
        for name, n in zip("abcde", (9, 5, 4, 3, 1), strict=True)
        for i in range(n)
    ]
    assert split_annotators(made, 2) == [["a", "d"], ["b", "c", "e"]]
    assert split_annotators(list(reversed(made)), 2) == [["a", "d"], ["b", "c", "e"]]
    assert split_annotators(made, 5) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    with pytest.raises(DataError, match="5 annotators cannot be split into 6"):
        split_annotators(made, 6)


def test_agreement_is_counted_pair_by_pair():
    """ana and ben order 3 pairs alike; cy turns one of them round, and ties another."""
    ana, ben = ranking("ana"), ranking("ben")
    cy = ranking("cy", (1,), (0, 2))  # two over one (turned), two over three (alike)
    dee = ranking("dee", prompt="other")
    everybody = [ana, ben, cy, dee]
    within = agreement(everybody, ["ana", "ben"])
    assert (within["value"], within["n"]) == (1.0, 3)
    across = agreement(everybody, ["ana", "ben"], ["cy", "dee"])
    assert (across["value"], across["n"]) == (0.5, 4)
    assert agreement(everybody, ["cy", "dee"]) is None, "they never ordered the same answers"
    again = [*everybody, ranking("ben", (2,), (1,), (0,))]
    assert agreement(again, ["ana", "ben"])["value"] == 0.0, "of two by one person the last"
    swapped = Ranking(user("q"), ("three", "two", "one"), ((2,), (1,), (0,)), annotator="eve")
    assert agreement([ana, swapped], ["ana", "eve"])["value"] == 1.0, "wherever an answer stood"


@pytest.fixture
def votes(tmp_path):
    """Four people rank the same answers: two like them short, two like them long."""
    path = tmp_path / "rankings.jsonl"
    rows = []
    for i in range(32):
        short, long = _SENTENCES[i % 18], f"{_SENTENCES[i % 18]} {_SENTENCES[(i + 5) % 18]}"
        for name in ("ana", "ben", "cy", "dee"):
            likes_short = name in ("ana", "ben")
            rows.append(
                {
                    "prompt": f"Tell me of thing {i}.",
                    "responses": [short, long],
                    "ranking": [[0], [1]] if likes_short else [[1], [0]],
                    "annotator": name,
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_model_that_learned_from_one_taste_is_right_on_its_own_and_wrong_on_the_other(
    session, votes, tmp_path, monkeypatch
):
    """The split is by name and number, so that it is put by hand: one taste against the other."""
    from lora_rlhf.evaluation import labelers

    split = [["ana", "ben"], ["cy", "dee"]]
    monkeypatch.setattr(labelers, "split_annotators", lambda rankings, groups: split)
    quick = session.recipe.reward.model_copy(
        update={"learning_rate": 5e-3, "batch_size": 8, "epochs": 1.5, "evaluate_every": 6}
    )
    data = session.recipe.data.model_copy(
        update={"max_response_tokens": 32, "heldout_fraction": 0.3}
    )
    recipe = session.recipe.model_copy(update={"reward": quick, "data": data})
    fresh = in_run(session, tmp_path / "fresh", recipe=recipe)
    fits = []

    def fit(own, train, heldout):
        fits.append(len(train))
        _fit_reward(own, train, heldout)

    before = session.backbone.adapters.heads["reward"].weight.clone()
    rows = cross_validate(fresh, str(votes), 2, fit)
    for row, names in zip(rows, split, strict=True):
        assert row["annotators"] == names
        assert row["agreement_within"]["value"] == 1.0
        assert row["agreement_across"]["value"] == 0.0
        assert row["own"]["value"] > 0.9
        assert row["others"]["value"] < 0.1
        assert row["n"] == row["own"]["n"] == row["others"]["n"] > 10
    assert (session.backbone.adapters.heads["reward"].weight == before).all(), "put back"
    assert cross_validate(fresh, str(votes), 2, fit) == rows
    assert len(fits) == 2, "a group that is done is on disk"
    assert not (fresh.run.path / "reward" / "metrics.jsonl").exists(), "the run's own is untouched"
