"""Adapters that come and go, and a backbone that is loaded, given back, loaded again, closed."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.errors import CheckpointError, HardwareError, UserError
from lora_rlhf.model import generation
from lora_rlhf.recipe import STAGES
from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.runs import TRAINED_ON, Run, write_atomically
from tests.small_run import small_run
from tests.ui.scripted import eventually
from ui.asking import Ask, Paused, Row
from ui.engine import StudioEngine

PROMPT = user("Tell of the owl.")
NEVER = threading.Event()
SOON = 20.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one backbone; the second is the retrained one."""
    folder = tmp_path_factory.mktemp("runs")
    small_run(folder / "one", ("sft", "policy"), scale=0.1)
    small_run(folder / "two", ("reward", "policy"), scale=0.15)
    return folder


@pytest.fixture(scope="module")
def engine(runs: Path) -> Iterator[StudioEngine]:
    engine = StudioEngine([Run(runs / "one")]).start().ready()
    yield engine
    engine.close()


def answer(engine: StudioEngine, adapter: str = "one/policy", length: int = 6) -> Row:
    ask = Ask(adapter, PROMPT, temperature=1.5, max_new_tokens=length, seed=3)
    *_, last = engine.stream([ask], who="ana", cancel=NEVER)
    return last[0]


def copied(runs: Path, name: str, source: str = "two") -> Path:
    return Path(shutil.copytree(runs / source, runs / name))


def on_backbone(engine: StudioEngine) -> list[str]:
    assert engine._decoder is not None
    return engine._decoder.backbone.adapters.names


# -- adopting -----------------------------------------------------------------------------------


def test_adopting_scoring_forgetting(engine: StudioEngine, runs: Path) -> None:
    """One story, since each step begins where the one before has ended."""
    before, version, kept = answer(engine), engine.version(), on_backbone(engine)
    assert (before.score, before.rm_adapter) == (None, None)
    with pytest.raises(CheckpointError, match="reward"):
        engine.score([(PROMPT, "text")])

    # Considered: it scores by its name, and nobody is offered it.
    assert engine.consider(runs / "two") == ["two/reward", "two/policy"]
    assert engine.answerers() == ["base", "one/sft", "one/policy"]
    assert (engine.version(), engine.reward_adapter()) == (version, None)
    scores = engine.score([(PROMPT, "one"), (PROMPT, "two")], "two/reward")
    assert scores[0] != scores[1]
    with pytest.raises(UserError, match="No adapter 'two/policy'"):
        answer(engine, "two/policy")
    assert answer(engine) == before  # and it scores no answer of anybody's

    # Forgotten: as if it had never been there.
    engine.forget(runs / "two")
    engine.forget(runs / "two")
    assert on_backbone(engine) == kept
    with pytest.raises(CheckpointError, match="no reward adapter"):
        engine.score([(PROMPT, "text")], "two/reward")

    # Adopted: beside those there are, which answer as before.
    engine.consider(runs / "two")
    assert engine.adopt(runs / "two") == ["two/reward", "two/policy"]
    assert engine.answerers() == ["base", "one/sft", "one/policy", "two/policy"]
    assert engine.version() > version
    assert engine.score([(PROMPT, "one"), (PROMPT, "two")]) == pytest.approx(scores, abs=1e-5)
    fresh, old = answer(engine, "two/policy"), answer(engine)
    assert fresh.text != old.text == before.text
    assert (fresh.rm_adapter, old.rm_adapter) == ("two/reward", "two/reward")
    assert fresh.kl is not None  # to one/sft, since its own run has none

    # Twice is harmless: the same answers, and not one adapter more on the backbone.
    count = len(on_backbone(engine))
    assert engine.adopt(runs / "two") == ["two/reward", "two/policy"]
    assert len(on_backbone(engine)) == count == len(kept) + 2
    assert answer(engine, "two/policy") == fresh
    engine.forget(runs / "two")  # it was adopted, so there is nothing to forget
    assert answer(engine, "two/policy") == fresh


def test_another_backbone_is_refused_in_one_sentence(engine: StudioEngine, runs: Path) -> None:
    other = copied(runs, "other")
    for file in other.rglob("lora_rlhf.json"):
        facts = json.loads(file.read_text())
        facts["fingerprint"] |= {"model": "somebody/else", "weights": "0" * 64}
        file.write_text(json.dumps(facts))
    before = (engine.answerers(), engine.version(), on_backbone(engine))
    for take_in in (engine.adopt, engine.consider):
        with pytest.raises(CheckpointError, match="somebody/else") as refused:
            take_in(other)
        assert "builtin:tiny" in str(refused.value)
        assert "weights differ" in str(refused.value)
    assert (engine.answerers(), engine.version(), on_backbone(engine)) == before
    with pytest.raises(CheckpointError, match="somebody/else"):
        StudioEngine([Run(runs / "one"), Run(other)])


def test_a_damaged_run_leaves_everything_as_it_was(engine: StudioEngine, runs: Path) -> None:
    damaged = copied(runs, "damaged")
    weights = damaged / "ppo/adapter/adapter_model.safetensors"  # the second one that is loaded
    save_file({k: v[..., :1].contiguous() for k, v in load_file(weights).items()}, weights)
    before = (engine.answerers(), engine.version(), on_backbone(engine), answer(engine))
    for take_in in (engine.adopt, engine.consider):
        with pytest.raises(CheckpointError, match="do not fit"):
            take_in(damaged)
    after = (engine.answerers(), engine.version(), on_backbone(engine), answer(engine))
    assert after == before


def test_a_damaged_retrained_run_leaves_its_old_adapters(engine: StudioEngine, runs: Path) -> None:
    again = copied(runs, "again", "one")
    engine.adopt(again)
    before, count = answer(engine, "again/policy"), len(on_backbone(engine))
    weights = again / "ppo/adapter/adapter_model.safetensors"
    whole = load_file(weights)
    save_file({k: v[..., :1].contiguous() for k, v in whole.items()}, weights)
    with pytest.raises(CheckpointError, match="do not fit"):
        engine.adopt(again)
    assert answer(engine, "again/policy") == before
    assert len(on_backbone(engine)) == count
    save_file(whole, weights)


def test_what_is_no_run_is_refused(engine: StudioEngine, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run"):
        engine.adopt(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no adapter yet"):
        engine.adopt(tmp_path / "empty")


def test_adopting_waits_for_the_job_that_runs_and_tells_nobody_before(
    engine: StudioEngine, runs: Path
) -> None:
    late = copied(runs, "late")
    items = engine.stream([Ask("one/policy", PROMPT, 5.0, 1.0, 24, 3)], who="ana", cancel=NEVER)
    next(items)
    adopter = threading.Thread(target=engine.adopt, args=(late,))
    adopter.start()
    eventually(lambda: len(engine.turns) == 2)
    assert "late/policy" not in engine.answerers()  # a name that cannot answer yet
    list(items)
    adopter.join(SOON)
    assert engine.answerers()[-1] == "late/policy"
    assert answer(engine, "late/policy").finish is not None


@pytest.mark.parametrize("is_there", [True, False])
def test_the_pool_loses_what_an_adopted_run_was_trained_on(
    runs: Path, tmp_path: Path, is_there: bool
) -> None:
    """By its own data, or, where they are gone, by what it says itself."""
    engine = StudioEngine([Run(runs / "one")]).start().ready()
    before, train = engine.pool("heldout"), engine.pool("train")
    assert before
    source = tmp_path / "own.jsonl"
    rows = [{"prompt": p.messages[-1]["content"], "response": "No."} for p in before]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.demonstrations={{path: {source}}}", "data.heldout_prompts={builtin: prompts}"]
    run = Run(Path(shutil.copytree(runs / "two", tmp_path / "knows")))
    recipe = load_recipe(str(run.path / "recipe.yaml"), data, finished=STAGES)
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    if not is_there:
        source.unlink()
        keys = [prompt_key(prompt.messages) for prompt in before]
        run.write_json("summary.json", run.summary() | {"retraining": {TRAINED_ON: keys}})
    engine.consider(run.path)
    assert engine.pool("heldout") == before  # nobody is offered it yet
    engine.adopt(run.path)
    assert engine.pool("heldout") == []
    assert engine.pool("train") is train
    engine.close()


# -- giving back, and closing -------------------------------------------------------------------


def test_release_and_restore_change_no_answer(engine: StudioEngine) -> None:
    before, facts = answer(engine), engine.facts()
    train = engine.pool("train")
    engine.release()
    assert "Training has the device" in engine.state()
    assert engine._decoder is None
    for action in (
        lambda: answer(engine),
        lambda: engine.score([(PROMPT, "text")], engine.registry.scorers[0]),
        lambda: engine.pool("heldout"),
    ):
        with pytest.raises(Paused, match="Training has the device"):
            action()
    assert engine.facts() == facts
    assert engine.pool("train") is train  # what is known stays known
    engine.release()  # twice is harmless
    engine.restore()
    engine.restore()
    engine.ready()
    assert engine.state() == "ready"
    assert answer(engine) == before


def test_close_ends_the_job_that_runs_and_those_that_wait(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, slowly = generation.next_tokens, threading.Event()
    monkeypatch.setattr(generation, "next_tokens", lambda *a: slowly.wait(0.03) or draw(*a))
    engine = StudioEngine([Run(runs / "one")]).start().ready()
    ask = Ask("one/policy", PROMPT, 5.0, 1.0, 24, 3)
    ends: list[Any] = []
    begun = threading.Event()

    def read(who: str) -> None:
        last = None
        try:
            for item in engine.stream([ask], who=who, cancel=NEVER):
                last = item
                begun.set()
        except Paused as error:
            last = error
        ends.append(last)

    first = in_thread(lambda: read("ana"))
    assert begun.wait(SOON)
    second = in_thread(lambda: read("ben"))
    eventually(lambda: len(engine.turns) == 2)
    engine.close()
    for reader in (first, second):
        reader.join(SOON)
        assert not reader.is_alive()
    assert [row.finish for row in ends[0]] == ["stopped"]
    assert "closing" in str(ends[1])
    assert engine._decoder is None  # everything is freed
    with pytest.raises(Paused, match="closing"):
        list(engine.stream([ask], who="ben", cancel=NEVER))
    engine.close()
    engine.restore()
    assert engine._decoder is None


def test_close_does_not_wait_for_a_reader_who_never_comes_back(
    runs: Path, monkeypatch: pytest.MonkeyPatch, decoders: "Decoders"
) -> None:
    monkeypatch.setattr("ui.engine._CLOSE_SECONDS", 0.05)
    engine = StudioEngine([Run(runs / "one")])
    with engine.turns.ticket("ana"):  # as a stream does whose reader is gone
        engine.close()
    assert "closing" in engine.state()


# -- loading, on a decoder of no weights ---------------------------------------------------------


class Decoders:
    """Makes decoders that load when they are let, and counts them."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.made: list[Any] = []
        self.errors: list[BaseException] = []

    def __call__(self, recipe: Any) -> Any:
        self.begun.set()
        assert self.gate.wait(SOON)
        if self.errors:
            raise self.errors.pop()
        names: list[str] = []
        decoder = SimpleNamespace(
            names=names,
            freed=[],
            load=lambda entry: names.append(entry.name),
            load_all=lambda entries: names.extend(e.name for e in entries),
            unload=names.remove,
            most_new_tokens=10,
            template_sha256="t",
            continues=False,
            device="CPU",
        )
        decoder.free = lambda: decoder.freed.append(True)
        self.made.append(decoder)
        return decoder


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Decoders:
    made = Decoders()
    monkeypatch.setattr("ui.decoding.Decoder", made)
    return made


@pytest.fixture
def loading(runs: Path, decoders: Decoders) -> Iterator[StudioEngine]:
    """An engine in the middle of its loading."""
    engine = StudioEngine([Run(runs / "one")]).start()
    decoders.begun.wait(SOON)
    yield engine
    decoders.gate.set()
    engine.close()


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_while_it_loads_everything_says_so(loading: StudioEngine, decoders: Decoders) -> None:
    assert "still being loaded" in loading.state()
    assert loading.facts().most_new_tokens == 24  # of the recipe
    with pytest.raises(Paused, match="still being loaded"):
        answer(loading)
    with pytest.raises(Paused, match="still being loaded"):
        loading.pool("train")  # at once, not after the loading
    decoders.gate.set()
    loading.ready()
    assert loading.state() == "ready"
    assert loading.facts().most_new_tokens == 10  # what the context leaves
    assert loading.facts().default_new_tokens == 10
    assert decoders.made[0].names == ["one/sft", "one/policy"]


def test_released_while_it_loads_it_stays_released(
    loading: StudioEngine, decoders: Decoders
) -> None:
    releasing = in_thread(loading.release)
    eventually(lambda: len(loading.turns) == 1)
    decoders.gate.set()
    releasing.join(SOON)
    loading.ready()
    assert "Training has the device" in loading.state()
    assert loading._decoder is None
    assert decoders.made[0].freed


def test_released_before_its_loader_ran_it_does_not_load(runs: Path, decoders: Decoders) -> None:
    decoders.gate.set()
    engine = StudioEngine([Run(runs / "one")])
    engine.release()  # as an app does that finds training at work
    engine.start().ready()
    assert decoders.made == []
    assert "Training has the device" in engine.state()
    engine.restore()
    engine.ready()
    assert (len(decoders.made), engine.state()) == (1, "ready")


def test_restored_twice_it_loads_once(loading: StudioEngine, decoders: Decoders) -> None:
    loading.restore()
    loading.start()
    decoders.gate.set()
    eventually(lambda: loading.state() == "ready")
    for thread in threading.enumerate():
        if thread.name == "load-backbone":
            thread.join(SOON)
    assert len(decoders.made) == 1


def test_an_adapter_adopted_while_it_loads_is_loaded_too(
    loading: StudioEngine, decoders: Decoders, runs: Path
) -> None:
    adopting = in_thread(lambda: loading.adopt(runs / "two"))
    eventually(lambda: len(loading.turns) == 1)
    decoders.gate.set()
    adopting.join(SOON)
    assert loading.answerers()[-1] == "two/policy"
    assert sorted(decoders.made[0].names) == ["one/policy", "one/sft", "two/policy", "two/reward"]


def test_an_adapter_adopted_while_training_has_the_device_is_loaded_afterwards(
    loading: StudioEngine, decoders: Decoders, runs: Path
) -> None:
    decoders.gate.set()
    loading.ready()
    loading.release()
    loading.adopt(runs / "two")
    loading.restore()
    loading.ready()
    assert "two/policy" in decoders.made[1].names


def test_closed_while_it_loads_it_keeps_nothing(
    loading: StudioEngine, decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.engine._CLOSE_SECONDS", 0.05)
    loading.close()
    decoders.gate.set()
    loading.ready()
    assert loading._decoder is None
    assert "closing" in loading.state()


def test_what_cannot_be_loaded_is_told_and_tried_again(
    loading: StudioEngine, decoders: Decoders
) -> None:
    decoders.errors.append(HardwareError("There is no memory for that base."))
    decoders.gate.set()
    with pytest.raises(HardwareError, match="no memory"):
        loading.ready()
    assert "no memory" in loading.state()
    with pytest.raises(Paused, match="no memory"):
        answer(loading)
    loading.restore()
    loading.ready()
    assert loading.state() == "ready"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_while_loading_is_told(loading: StudioEngine, decoders: Decoders) -> None:
    decoders.errors.append(ZeroDivisionError("a bug"))
    decoders.gate.set()
    with pytest.raises(UserError, match="could not be loaded: a bug"):
        loading.ready()
    assert "a bug" in loading.state()


def test_release_waits_for_the_job_that_runs(loading: StudioEngine, decoders: Decoders) -> None:
    decoders.gate.set()
    loading.ready()
    with loading.turns.ticket("ana"):
        releasing = in_thread(loading.release)
        eventually(lambda: len(loading.turns) == 2)
        assert loading.state() == "ready"
        assert not decoders.made[0].freed
    releasing.join(SOON)
    assert decoders.made[0].freed


def test_the_app_itself_is_never_refused_for_a_crowd(
    loading: StudioEngine, decoders: Decoders
) -> None:
    decoders.gate.set()
    loading.ready()
    loading.turns._most_waiting = 1
    with loading.turns.ticket("ana"):
        releasing = in_thread(loading.release)
        eventually(lambda: len(loading.turns) == 2)
    releasing.join(SOON)
    assert loading._decoder is None
