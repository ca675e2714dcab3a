"""What a retraining is made of before anything trains: directory, snapshot, recipe, refusals."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.data.sources import load_rankings, require
from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.preferences.events import Retract
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run, write_atomically
from tests.preferences.making import task, vote
from tests.ui.training import (
    ROOMY,
    WISHES,
    Watched,
    base_run,
    finished,
    scripted_jobs,
    twenty_votes,
)
from ui.asking import Prompts
from ui.jobs import Jobs
from ui.retraining import TooLittle, Wishes


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with one finished run, quick."""
    return base_run(tmp_path / "runs" / "quick").path.parent


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with twenty_votes(tmp_path / "votes.db") as opened:
        yield opened


@pytest.fixture
def engine(runs: Path) -> Watched:
    return Watched(runs / "quick")


@pytest.fixture
def make(runs, store, engine, tmp_path, monkeypatch) -> Iterator[Callable[..., Jobs]]:
    with scripted_jobs(tmp_path, runs, store, engine, monkeypatch) as made:
        yield made


def test_a_new_run_holds_snapshot_recipe_and_a_complete_sft(make, runs, store) -> None:
    job = finished(make()).job()
    new = Run(runs / "quick-2")
    assert (job.state, job.name, job.base, job.person) == ("done", "quick-2", "quick", "ana")
    assert new.is_complete("sft")
    assert new.summary()["sft"] == {"heldout_loss": 0.7}
    old = Run(runs / "quick")
    assert new.adapter("sft").joinpath("adapter_config.json").read_bytes() == (
        old.adapter("sft").joinpath("adapter_config.json").read_bytes()
    )
    recipe = load_recipe(str(new.path / "recipe.yaml"), finished=("sft",))
    assert recipe.name == "quick-2"
    assert recipe.rank is None
    assert recipe.data.rankings is not None
    assert recipe.data.rankings.path == str((new.path / "rankings.db").absolute())
    assert recipe.evaluate is not None
    assert recipe.evaluate.expect_win_rate is None
    with Store.open(new.path / "rankings.db", read_only=True) as snapshot:
        assert [j.judgement.id for j in snapshot.judged()] == [
            j.judgement.id for j in store.judged()
        ]


def test_the_snapshot_is_private_and_its_hash_is_recorded(make, runs) -> None:
    job = finished(make()).job()
    snapshot = runs / "quick-2" / "rankings.db"
    assert snapshot.stat().st_mode & 0o077 == 0
    assert job.snapshot_sha256 == hashlib.sha256(snapshot.read_bytes()).hexdigest()
    summary = Run(runs / "quick-2").summary()
    assert summary["retraining"]["rankings_sha256"] == job.snapshot_sha256
    assert not list(runs.glob("quick-2/.rankings*"))  # what it was filled in is gone


def test_the_dry_run_names_the_snapshot_that_start_makes_and_makes_none(make, runs, store) -> None:
    jobs = make()
    plan = jobs.plan(WISHES)
    promised = plan.snapshot_sha256(store)
    assert sorted(path.name for path in runs.iterdir()) == ["quick"]
    assert (plan.material.judgements, plan.material.prompts, plan.material.pairs) == (20, 20, 20)
    finished(jobs)
    assert jobs.job().snapshot_sha256 == promised


def test_a_retracted_vote_is_not_in_the_snapshot(make, runs, store) -> None:
    gone = store.judged()[3].judgement
    store.add(Retract(ref=gone.id, annotator="ana"))
    finished(make())
    with Store.open(runs / "quick-2" / "rankings.db", read_only=True) as snapshot:
        assert len(snapshot.judged()) == 19
        assert snapshot.judgement(gone.id) is None


def test_overrides_reach_the_recipe_and_others_are_refused(make) -> None:
    jobs = make()
    plan = jobs.plan(Wishes("quick", "reward", overrides=("reward.epochs=3", "seed=7")))
    assert plan.recipe.reward is not None
    assert (plan.recipe.reward.epochs, plan.recipe.seed) == (3.0, 7)
    for refused in (
        "data.prompts={path: /etc/passwd}",
        "base.model=somebody/model",
        "lora.rank=64",
        "tracker=wandb",
        "sft=null",
        "reward.start_from=/somewhere",
        "ppo.start_from=/somewhere",
        "reward",
        "rank.judge=os:system",
    ):
        with pytest.raises(ConfigError, match="cannot be changed here"):
            jobs.plan(Wishes("quick", overrides=(refused,)))
    for judge in ("os:system", "'os:system'", '"os:system"'):
        for section in ("evaluate", "ppo"):
            with pytest.raises(ConfigError, match="cannot name code to import"):
                jobs.plan(Wishes("quick", overrides=(f"{section}.judge={judge}",)))
    with pytest.raises(ConfigError, match=r"reward\.epochz is not a field"):
        jobs.plan(Wishes("quick", overrides=("reward.epochz=3",)))


@pytest.mark.parametrize(
    ("scope", "only", "sections"),
    [
        ("reward", "reward", ("sft", "reward", "ppo", "evaluate")),
        ("reward + PPO", "None", ("sft", "reward", "ppo")),
        ("reward + PPO + evaluate", "None", ("sft", "reward", "ppo", "evaluate")),
    ],
)
def test_the_command_and_the_recipe_run_the_wanted_stages(
    make, runs, scope, only, sections
) -> None:
    jobs = finished(make(), Wishes("quick", scope, force=True))
    assert load_recipe(str(runs / "quick-2" / "recipe.yaml"), finished=["sft"]).stages == sections
    assert jobs.log_tail().startswith(f"training {runs.absolute() / 'quick-2'} 3 well {only} True")


def with_reward(runs: Path, store: Store) -> None:
    """Give the base run a reward adapter and earlier rankings of its own."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        write_atomically(runs / "quick" / "reward" / "adapter" / file, "{}")
    row = {"prompt": "an old prompt", "responses": ["x", "y"], "ranking": [[1], [0]]}
    lines = [json.dumps(row | {"prompt": f"old {i}"}) for i in range(9)]
    write_atomically(runs / "quick" / "rank" / "rankings.jsonl", "\n".join(lines) + "\n")


def test_it_goes_on_from_a_copy_of_the_reward_model_more_gently(make, runs, store) -> None:
    with_reward(runs, store)
    jobs = finished(make())
    recipe = load_recipe(str(runs / "quick-2" / "recipe.yaml"), finished=("sft",))
    assert recipe.reward is not None
    copy = runs.absolute() / "quick-2" / "reward_before"
    assert recipe.reward.start_from == str(copy)
    assert (copy / "adapter_config.json").is_file()
    # Twenty rankings: a quarter of the default 1e-4, once over them.
    assert (recipe.reward.learning_rate, recipe.reward.epochs) == (pytest.approx(2.5e-5), 1.0)
    assert jobs.job().earlier == 0  # that model knows them


def test_the_policy_goes_on_too_unless_all_begins_anew(make, runs, store) -> None:
    with_reward(runs, store)
    shutil.rmtree(runs / "quick" / "ppo", ignore_errors=True)
    alone = make().plan(Wishes("quick")).recipe.ppo
    assert alone is not None
    assert alone.start_from is None
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        write_atomically(runs / "quick" / "ppo" / "adapter" / file, f'{{"of": "{file}"}}')
    jobs = finished(make())
    recipe = load_recipe(str(runs / "quick-2" / "recipe.yaml"), finished=("sft",))
    assert recipe.ppo is not None
    copy = runs.absolute() / "quick-2" / "policy_before"
    assert recipe.ppo.start_from == str(copy)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (copy / file).read_text() == f'{{"of": "{file}"}}'
    anew = jobs.plan(Wishes("quick", go_on=False)).recipe.ppo
    assert anew is not None
    assert anew.start_from is None


def test_going_on_again_is_as_gentle_as_the_first_time(make, runs, store) -> None:
    with_reward(runs, store)
    jobs = finished(make())
    jobs.adopt()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        write_atomically(runs / "quick-2" / "reward" / "adapter" / file, "{}")
        assert (runs / "quick-2" / "sft" / "adapter" / file).is_file()
    assert jobs.bases() == ["quick", "quick-2"]
    again = jobs.plan(Wishes("quick-2", "reward")).recipe.reward
    anew = jobs.plan(Wishes("quick-2", "reward", go_on=False, earlier=False)).recipe.reward
    assert again is not None
    assert anew is not None
    assert again.learning_rate == pytest.approx(2.5e-5)
    assert again.start_from == str(runs.absolute() / "quick-3" / "reward_before")
    assert (anew.learning_rate, anew.start_from) == (pytest.approx(1e-4), None)


def test_a_fresh_one_gets_the_earlier_rankings_unless_they_are_left_out(make, runs, store) -> None:
    with_reward(runs, store)
    jobs = make()
    fresh = jobs.plan(Wishes("quick", "reward", go_on=False))
    assert (fresh.material.judgements, fresh.material.earlier) == (20, 9)
    assert fresh.recipe.reward is not None
    assert fresh.recipe.reward.start_from is None
    assert jobs.plan(Wishes("quick", "reward", go_on=False, earlier=False)).material.earlier == 0
    control = jobs.plan(Wishes("quick", "reward", go_on=False, votes=False)).material
    assert (control.judgements, control.earlier) == (0, 9)
    finished(jobs, Wishes("quick", "reward", go_on=False))
    with Store.open(runs / "quick-2" / "rankings.db", read_only=True) as snapshot:
        imported = [j for j in snapshot.judged() if j.task.sampler.strategy == "import"]
        assert {j.task.prompt[0]["content"] for j in imported} == {f"old {i}" for i in range(9)}
        assert len(snapshot.judged()) == 29


def test_earlier_rankings_of_a_retrained_run_are_the_imported_ones_alone(make, runs, store) -> None:
    """What people judged stands in the app's store; what they took back since stays away."""
    with_reward(runs, store)
    jobs = finished(make(), Wishes("quick", "reward", go_on=False))
    jobs.adopt()
    gone = store.judged()[0].judgement
    store.add(Retract(ref=gone.id, annotator="ana"))
    again = jobs.plan(Wishes("quick-2", "reward", go_on=False))
    assert (again.material.judgements, again.material.earlier) == (19, 9)
    assert gone.id not in {event.id for event in again.events()}


def test_too_little_and_unknown_runs_are_refused_and_leave_nothing(runs, engine, tmp_path) -> None:
    with Store.open(tmp_path / "empty.db") as empty:
        jobs = Jobs(engine, empty, runs, predict=lambda recipe: ROOMY)
        with pytest.raises(TooLittle, match="Rank answers to 4 more"):
            jobs.start("ana", WISHES)
        with pytest.raises(ConfigError, match=r"'\.\./quick' is not a run to start from"):
            jobs.start("ana", Wishes("../quick"))
        assert jobs.job().state == "none"
        assert [path.name for path in runs.iterdir()] == ["quick"]


def test_a_base_without_sft_is_refused_and_leaves_nothing(make, runs) -> None:
    jobs = make()
    os.unlink(runs / "quick" / "sft" / "adapter" / "adapter_config.json")
    with pytest.raises(UserError, match="has no adapter sft to start from"):
        jobs.start("ana", WISHES)
    assert jobs.job().state == "none"
    assert [path.name for path in runs.iterdir()] == ["quick"]


def test_what_is_trained_on_does_not_evaluate(make, engine, store) -> None:
    """Of the 40 held-out prompts 3 are trained on, by choice; the recipe asks for 256."""
    for prompt in engine.pool("heldout")[:3]:
        text = prompt.messages[0]["content"]
        made = task(prompt=text, prompt_source=prompt.source)
        store.add_many([made, vote(made)])
    scope = "reward + PPO + evaluate"
    clean = make().plan(Wishes("quick", scope)).recipe.evaluate
    mixed = make().plan(Wishes("quick", scope, heldout=True)).recipe.evaluate
    assert clean is not None
    assert mixed is not None
    assert (clean.prompts, mixed.prompts) == (256, 37)


def test_the_reward_stage_reads_votes_on_held_out_prompts_where_they_are_wanted(
    make, engine, runs, store
) -> None:
    for prompt in engine.pool("heldout")[:3]:
        made = task(prompt=prompt.messages[0]["content"], prompt_source=prompt.source)
        store.add_many([made, vote(made)])
    jobs = finished(make(), Wishes("quick", "reward", heldout=True))
    source = load_recipe(str(runs / "quick-2" / "recipe.yaml"), finished=("sft",)).data.rankings
    assert source is not None
    assert len(require(load_rankings(source))) == 23
    usual = jobs.plan(Wishes("quick", "reward")).recipe.data.rankings
    assert usual is not None
    assert not usual.heldout


def test_votes_on_held_out_prompts_measure_and_do_not_train(make, runs, store) -> None:
    made = task(prompt="never seen", prompt_source="pool:heldout#3")
    store.add_many([made, vote(made)])
    finished(make())
    with Store.open(runs / "quick-2" / "rankings.db", read_only=True) as snapshot:
        assert made.prompt_sha256 not in {j.task.prompt_sha256 for j in snapshot.judged()}
    prompts = [
        json.loads(line)["prompt"][0]["content"]
        for line in (runs / "quick-2" / "heldout.jsonl").read_text().splitlines()
    ]
    assert prompts == ["never seen"]  # what chose the step stands in a file of its own
    choosing = (runs / "quick-2" / "choosing.jsonl").read_text()
    assert "never seen" not in choosing
    assert 1 < len(choosing.splitlines()) < 20


def test_held_out_prompts_that_were_trained_on_once_are_so_for_good(
    make, engine, runs, store
) -> None:
    """The second retraining goes on from the first, and has no wish of its own."""
    pool = engine.pool("heldout")
    for prompt in pool[:3]:
        made = task(prompt=prompt.messages[0]["content"], prompt_source=prompt.source)
        store.add_many([made, vote(made)])
    keys = [prompt_key(prompt.messages) for prompt in pool]
    jobs = finished(make(), Wishes("quick", "reward", heldout=True))
    assert Run(runs / "quick-2").trained_on_heldout() == set(keys[:3])
    assert jobs.job().measurable == 0
    jobs.adopt()
    for prompt in pool[3:5]:
        made = task(prompt=prompt.messages[0]["content"], prompt_source=prompt.source)
        store.add_many([made, vote(made)])
    plan = jobs.plan(Wishes("quick-2", "reward + PPO + evaluate"))
    assert {prompt_key(r.prompt) for r in plan.material.measured} == set(keys[3:5])
    assert plan.recipe.evaluate is not None
    assert plan.recipe.evaluate.prompts == 37
    finished(jobs, Wishes("quick-2", "reward"))
    assert Run(runs / "quick-3").trained_on_heldout() == set(keys[:3])
    # Another line of runs knows nothing of it.
    clean = jobs.plan(Wishes("quick", "reward"))
    assert {prompt_key(r.prompt) for r in clean.material.measured} == set(keys[:5])
    assert clean.known == set()


def test_what_a_run_holds_out_is_its_own_datas(make, engine, runs, store) -> None:
    """The app's first run is another one, with other data."""
    held = {prompt_key(user(f"prompt {i}")) for i in range(5)}
    theirs = {
        runs / "quick": Prompts(unseen=frozenset(held)),
        runs / "first": Prompts(trained=frozenset(held)),
    }
    engine.prompts_of = theirs.get
    plan = make().plan(Wishes("quick", "reward"))
    assert not held & {j.task.prompt_sha256 for j in plan.chosen.kept}
    assert len(plan.chosen.kept) == 15
    assert {prompt_key(r.prompt) for r in plan.material.measured} == held
    # The base run has no reward model: that of another run is compared with, which knows some.
    engine._entries = [
        replace(e, name="first/reward", run=runs / "first") if e.role == "reward" else e
        for e in engine._entries
    ]
    assert make().plan(Wishes("quick", "reward")).material.measured == []
