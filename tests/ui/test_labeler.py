"""The scripted labeler: prefers as it says, and only through the app's own handlers."""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_rlhf.preferences.store import Store
from tests.ui.training import TRAINING, Watched, base_run
from ui.jobs import Jobs
from ui.labeler import Loop, arms_of, main
from ui.people import Person
from ui.preparing import Memory
from ui.scripted import Labeler, measured_noise, reading_ms
from ui.studio import Settings, Studio


def worth(prompt: str, answer: str) -> float:
    """A judge that likes many different words."""
    return float(len(set(answer.split())))


def silent(what: str, done: int, total: int) -> None:
    """Hears of progress."""


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    runs = tmp_path / "runs"
    base_run(runs / "quick")
    script = tmp_path / "training.py"
    script.write_text(TRAINING)

    def command(run: Path, only: str | None, force: bool) -> list[str]:
        return [sys.executable, str(script), str(run), "3", "well"]

    monkeypatch.setattr("ui.jobs.command", command)
    memory = Memory("a card", needs=1.0, usable=10.0, held=2.0)
    with Store.open(tmp_path / "votes.db") as store:
        engine = Watched(runs / "quick")
        jobs = Jobs(engine, store, runs, predict=lambda recipe: memory, look=0.02)
        opened = Studio(engine, store, runs, jobs, Settings(overlap=0.0, repeats=0.0))
        yield opened
        opened.close()


def labeler(studio: Studio, noise: float = 0.0) -> Labeler:
    return Labeler(studio, Person("gold", False, "s"), worth, noise, random.Random(3))


def test_rankings_are_the_judges_order_with_ties_where_it_sees_no_difference(studio) -> None:
    labeler(studio).rank("quick/policy", 4, 8, silent)
    judged = studio.store.judged()
    assert len(judged) == 8
    assert len({j.task.prompt_sha256 for j in judged}) == 8
    for each in judged:
        groups = [
            [worth("", each.task.response(rid).text) for rid in group]
            for group in each.judgement.ranking
        ]
        assert all(len(set(group)) == 1 for group in groups)
        best = [group[0] for group in groups]
        assert best == sorted(set(best), reverse=True)
        assert each.task.prompt_source.startswith("pool:train")
        assert {r.adapter for r in each.task.responses} == {"quick/policy"}
        assert each.judgement.annotator == "gold"


def test_ranking_goes_on_where_it_was(studio) -> None:
    labeler(studio).rank("quick/policy", 3, 2, silent)
    labeler(studio).rank("quick/policy", 3, 5, silent)
    assert studio.store.counts()["live"] == 5


def test_comparisons_are_blind_on_held_out_prompts_and_count_for_win_rates(studio) -> None:
    from lora_rlhf.preferences.ratings import counts_for_win_rate

    labeler(studio).compare("quick/policy", "quick/sft", 10, "x", silent)
    judged = studio.store.judged()
    assert len(judged) == 10
    for each in judged:
        assert counts_for_win_rate(each)
        assert each.task.prompt_source.startswith("pool:heldout")
        assert {r.adapter for r in each.task.responses} == {"quick/policy", "quick/sft"}
        utilities = {r.rid: worth("", r.text) for r in each.task.responses}
        if each.judgement.outcome == "tie":
            assert len(set(utilities.values())) == 1
        else:
            ((best,), (other,)) = each.judgement.ranking
            assert utilities[best] > utilities[other]
    assert "fast" not in {flag for j in judged for flag in j.judgement.flags}


def test_noise_is_gumbels_so_that_the_better_wins_as_often_as_a_logistic_says(studio) -> None:
    """P(a over b) = 1 / (1 + exp(-(u_a - u_b) / spread))."""
    person = labeler(studio, noise=1.5)
    wins = 0
    for _ in range(4000):
        better, worse = person.utility("", "one two three"), person.utility("", "one two")
        wins += better > worse
    expected = 1 / (1 + math.exp(-1 / 1.5))
    # Four standard deviations of a binomial share of 4000.
    assert abs(wins / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_the_measured_noise_gives_the_wanted_agreement(studio) -> None:
    noise = measured_noise(studio, worth, "quick/policy", 4, 0.75, silent)
    person = labeler(studio, noise)
    agree = pairs = 0
    for prompt in studio.engine.pool("train")[:32]:
        # The fake answers by adapter, prompt, sampling and seed alone.
        from tests.ui.fakes import answer_of
        from ui.asking import Ask

        texts = [answer_of(Ask("quick/policy", prompt.messages, seed=s)) for s in range(40)]
        for a, b in zip(texts[::2], texts[1::2], strict=True):
            if worth("", a) != worth("", b):
                pairs += 1
                noisy = person.utility("", a) > person.utility("", b)
                agree += noisy == (worth("", a) > worth("", b))
    # About 500 pairs, and a spread that was measured on some 150 others.
    assert abs(agree / pairs - 0.75) < 0.08


def test_reading_takes_as_long_as_it_takes_people() -> None:
    assert reading_ms(["word " * 119, "word " * 119]) == 60_000


def test_the_whole_loop_makes_runs_votes_and_rates_and_goes_on_where_it_was(
    studio, tmp_path
) -> None:
    report = tmp_path / "report.json"

    def loop() -> Loop:
        found = json.loads(report.read_text()) if report.exists() else {}
        return Loop(studio, "quick", worth, report, 0, found)

    first = loop()
    first.rank(6, 3, 0.75, silent)
    wishes = arms_of("quick", 0)["votes"]
    name = first.train("votes", wishes, silent)
    assert name == "quick-2"
    first.contest("votes", "old", 7, silent)
    found = json.loads(report.read_text())
    assert found["runs"] == {"votes": "quick-2"}
    assert found["choosing"]["votes"]["after_adapter"] == "quick-2/reward"
    assert found["accuracies"]["votes"] is None  # nobody has compared anything before
    for manner in ("judge", "labeler"):
        rate = found["win_rates"][f"votes against old, {manner}"]
        assert rate["wins"] + rate["losses"] + rate["ties"] == 7
        assert rate["ci"][0] < rate["win_rate"] < rate["ci"][1]
    before = studio.store.version()
    again = loop()
    again.rank(6, 3, 0.75, silent)
    assert again.train("votes", wishes, silent) == "quick-2"
    again.contest("votes", "old", 7, silent)
    assert studio.store.version() == before


def test_a_win_rate_is_the_new_ones_whatever_its_name_sorts_like(studio, tmp_path) -> None:
    """The judge sees through the answers: the new adapter always wins."""
    engine = studio.engine
    assert isinstance(engine, Watched)
    loop = Loop(studio, "quick", worth, tmp_path / "r.json", 0, {})
    for new, old in (("quick/policy", "quick/sft"), ("quick/sft", "quick/policy")):
        person = Labeler(studio, Person(f"for-{new}", False, "s"), worth)
        person.utility = lambda prompt, text, new=new: float(_by(studio, prompt, text) == new)
        person.compare(new, old, 12, "x", silent)
        rate = loop.rate(f"for-{new}", new)
        assert (rate["wins"], rate["losses"]) == (12, 0)
        assert rate["win_rate"] > 0.8


def _by(studio: Studio, prompt: str, text: str) -> str:
    """Who gave the answer last asked for."""
    from tests.ui.fakes import answer_of

    engine = studio.engine
    assert isinstance(engine, Watched)
    return next(a.adapter for a in reversed(engine.asked) if answer_of(a, engine.words) == text)


def test_the_control_goes_on_as_long_without_votes_by_the_reward_model_as_it_was() -> None:
    arms = arms_of("quick", 4)
    votes, control, fresh = arms["votes"], arms["control"], arms["fresh"]
    assert (votes.votes, votes.earlier, votes.go_on) == (True, False, True)
    assert (control.votes, control.earlier, control.go_on) == (False, True, True)
    assert (fresh.votes, fresh.earlier, fresh.go_on) == (True, True, False)
    assert control.scope == votes.scope
    assert set(control.overrides) - set(votes.overrides) == {
        "reward.epochs=0.01",
        "reward.learning_rate=1e-12",
    }


def test_an_unknown_arm_is_refused(tmp_path) -> None:
    app = typer.Typer()
    app.command()(main)
    base_run(tmp_path / "quick")
    call = ["--run", "quick", "--runs-dir", str(tmp_path), "--arms", "everything"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 2
    assert "Allowed: any of votes, control, fresh" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["--run", "none", *call[2:]])
    assert result.exit_code == 2
    assert "none is not a run" in " ".join(result.output.split())
