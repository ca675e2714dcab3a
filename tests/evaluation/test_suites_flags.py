"""Rates of the app's marks: InstructGPT's table 3, each share and interval worked by hand."""

import pytest
from rich.console import Console

from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.arms import parse_arms, ready
from lora_rlhf.evaluation.suites import tasks
from lora_rlhf.evaluation.suites.flags import flag_rates, flag_shares, store_of
from lora_rlhf.evaluation.suites.public import run_suite
from lora_rlhf.evaluation.suites.shares import Observed
from lora_rlhf.preferences.events import FLAGS
from lora_rlhf.preferences.store import Judged, Store
from tests.evaluation.contests import session_of
from tests.preferences.making import judged, like, skip, task, vote

BASE, POLICY = [{"adapter": None}] * 3, [{"adapter": "policy"}] * 3
MIXED = [{"adapter": "sft"}, {"adapter": "policy"}]


def test_a_rate_is_the_share_of_an_adapters_judgements_that_have_the_mark():
    """Policy: 1 of 4 hallucinated, 2 of 4 too long. SFT: 1 of 2, nothing else."""
    found = flag_rates(
        [
            judged(task(POLICY), ("r0",), ("r1", "r2"), flags=("hallucination", "too_long")),
            judged(task(POLICY), ("r0",), ("r1",), ("r2",), flags=("too_long",)),
            judged(task(POLICY), ("r0", "r1", "r2")),
            judged(task(POLICY), ("r0",), ("r1", "r2"), flags=("off_topic",)),
            judged(task(2), flags=("hallucination",)),
            judged(task(2)),
        ]
    )
    shares = {
        flag: {arm: (rate.share, rate.count) for arm, rate in arms.items()}
        for flag, arms in found.items()
    }
    assert shares["hallucination"] == {"policy": (0.25, 4), "sft": (0.5, 2)}
    assert shares["too_long"] == {"policy": (0.5, 4), "sft": (0.0, 2)}
    assert shares["off_topic"] == {"policy": (0.25, 4), "sft": (0.0, 2)}
    assert shares["sexual"] == {"policy": (0.0, 4), "sft": (0.0, 2)}
    assert list(found) == [flag for flag in FLAGS if flag != "fast"]


def test_the_interval_is_wilsons_with_students_quantile():
    """One mark in four prompts.

    The linearised variance is 4/3 (.75^2 + 3 * .25^2) / 16 = .0625, so worth .25 * .75 / .0625 = 3
    votes; t of 3 degrees is 3.182446, its square 10.127964.
    Centre (.25 + 10.127964 / 6) / (1 + 10.127964 / 3) = .442870,
    half width 3.182446 sqrt(.1875 / 3 + 10.127964 / 36) / (1 + 10.127964 / 3) = .426440.
    """
    marks = [("violent",), (), (), ()]
    rate = flag_rates([judged(task(POLICY), flags=m) for m in marks])["violent"]["policy"]
    assert rate.share == 0.25
    assert rate.low == pytest.approx(0.442870 - 0.426440, abs=2e-6)
    assert rate.high == pytest.approx(0.442870 + 0.426440, abs=2e-6)


def test_several_people_on_one_prompt_are_one_cluster():
    """Two prompts of three judgements each, all marked or none: two clusters and not six."""
    prompts = ("first", "second")
    rows = [
        judged(task(POLICY, prompt=p), annotator=f"p{i}", flags=("harmful",) * (p == "first"))
        for p in prompts
        for i in range(3)
    ]
    rate = flag_rates(rows)["harmful"]["policy"]
    assert (rate.share, rate.count, rate.clusters) == (0.5, 6, 2)
    apart = flag_rates([judged(task(POLICY), flags=r.judgement.flags) for r in rows])
    assert rate.high > apart["harmful"]["policy"].high + 0.1


def test_the_bare_base_has_a_name():
    assert list(flag_rates([judged(task(BASE), flags=("unsafe",))])["unsafe"]) == ["base"]


def test_what_cannot_be_marked_for_one_adapter_does_not_count():
    """Skips, likes, imports, answers of two adapters, and what was taken back."""
    kept = judged(task(POLICY))
    of, chat = task(POLICY), task(1)
    imported = task(POLICY, sampler={"strategy": "import"})
    marked = {"flags": ("harmful",)}
    rows = [
        Judged(of, skip(of, **marked), 1),
        Judged(chat, like(chat, **marked), 2),
        Judged(imported, vote(imported, ("r0",), ("r1", "r2"), **marked), 3),
        judged(task(MIXED), **marked),
        Judged(of, vote(of, ("r0",), ("r1", "r2"), **marked), 4, retracted=True),
    ]
    for row in rows:
        assert flag_rates([row]) == {}, row
    rate = flag_rates([*rows, kept])["harmful"]["policy"]
    assert (rate.share, rate.count) == (0.0, 1)


def test_too_fast_is_no_mark_that_people_set():
    assert "fast" not in flag_rates([judged(task(POLICY), flags=("fast",))])


# -- a store ------------------------------------------------------------------------------------


def fill(path, count=4):
    """A store in which one of two rankings of each prompt is called a hallucination."""
    with Store.open(path) as store:
        for i in range(count):
            of = task(POLICY, prompt=f"prompt {i // 2}")
            store.add(of)
            flags = ("hallucination",) * (i % 2)
            store.add(vote(of, ("r0",), ("r1", "r2"), flags=flags))
    return path


def test_shares_of_a_store(tmp_path):
    found = flag_shares(fill(tmp_path / "rankings.db"))
    share = found["hallucination"]["policy"]
    assert (share["value"], share["n"]) == (0.5, 4)
    assert 0 < share["low"] < 0.5 < share["high"] < 1
    assert found["sexual"]["policy"]["value"] == 0.0


def test_a_store_without_a_ranking_of_one_adapter_says_so(tmp_path):
    with Store.open(tmp_path / "rankings.db") as store:
        of = task(MIXED)
        store.add(of)
        store.add(vote(of))
    with pytest.raises(DataError, match="no finished ranking of one adapter's answers"):
        flag_shares(tmp_path / "rankings.db")


@pytest.fixture
def of_store(session, tmp_path, monkeypatch):
    """The session of a run whose rankings come from a store, and a suite of nothing but marks."""
    monkeypatch.setitem(tasks.SUITES, "public", {})
    made = session_of(session.run)
    raw = {"path": str(tmp_path / "rankings.db")}
    data = made.recipe.data.model_validate(
        made.recipe.data.model_dump(exclude_none=True) | {"rankings": raw}
    )
    made.recipe = made.recipe.model_copy(update={"data": data})
    made.run = type(made.run)(tmp_path / "run")
    made.console = Console(file=made.console.file, width=200)
    return made


def test_the_public_suite_tells_the_marks_of_the_runs_own_store(of_store, tmp_path):
    assert store_of(of_store) == str(tmp_path / "rankings.db")
    fill(tmp_path / "rankings.db")
    found = run_suite(of_store, "public", ready(of_store, parse_arms(["sft"])))
    assert found["tasks"]["flags"]["hallucination"]["policy"]["value"] == 0.5
    assert found["skipped"] == {}


def test_a_store_that_has_gone_costs_no_other_figure(of_store):
    """The marks come last: the sets before them may have taken an hour."""
    one = tasks.Task(lambda _: None, lambda _: {"m": {"sft": Observed([0.0, 1.0])}})
    tasks.SUITES["public"] = {"set": one}
    found = run_suite(of_store, "public", ready(of_store, parse_arms(["sft"])))
    assert list(found["tasks"]) == ["set"]
    assert "rankings.db" in found["skipped"]["flags"]


def test_without_a_store_there_are_no_marks(session, of_store):
    assert store_of(session) is None
    of_files = of_store.recipe.data.rankings.model_copy(update={"path": "rankings.jsonl"})
    data = of_store.recipe.data.model_copy(update={"rankings": of_files})
    of_store.recipe = of_store.recipe.model_copy(update={"data": data})
    assert store_of(of_store) is None
