"""The real engine on random adapters of builtin:tiny in NF4: answers, stopping, queue, scores."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rlhf.chat.engine import Engine as Dialogue
from lora_rlhf.data.records import Messages, prompt_key, user
from lora_rlhf.errors import CheckpointError, ConfigError, DataError, HardwareError, UserError
from lora_rlhf.model.generation import Sampling
from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.runs import TRAINED_ON, Run, write_atomically
from tests.small_run import small_run
from tests.ui.scripted import eventually
from ui.asking import Ask, Busy, Paused, Row, Waiting
from ui.engine import Limits, StudioEngine

# Names with dots, which PEFT's own would not take.
FIRST, SECOND = "my.run-1.2", "second.run"
SFT, POLICY, REWARD = (f"{FIRST}/{role}" for role in ("sft", "policy", "reward"))
OTHER = f"{SECOND}/policy"
PROMPTS = [user("Tell of the owl."), user("Why?"), user("Please describe the harbour at night.")]
NEVER = threading.Event()
SHORT, LONG = 8, 64
HALF_A_SECOND = 0.5


def run_at(path: Path, **of_the_run: Any) -> Run:
    """A small run that may answer at some length, so that there is time to stop it."""
    run = small_run(path, **of_the_run)
    recipe = run.path / "recipe.yaml"
    text = recipe.read_text()
    assert "max_response_tokens: 12" in text
    recipe.write_text(text.replace("max_response_tokens: 12", f"max_response_tokens: {LONG}"))
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    second = run_at(folder / SECOND, roles=("sft", "policy"), lora={"rank": 2}, scale=0.15)
    return [run_at(folder / FIRST, scale=0.1), second]


@pytest.fixture(scope="module")
def loaded(runs: list[Run]) -> Iterator[StudioEngine]:
    engine = StudioEngine(runs).start().ready()
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: StudioEngine) -> Iterator[StudioEngine]:
    """The one engine, which every test must leave as it was: nothing waits, nothing decodes."""
    yield loaded
    assert len(loaded.turns) == 0
    assert not decoding()
    assert loaded.state() == "ready"


@pytest.fixture(scope="module")
def dialogue(runs: list[Run]) -> Dialogue:
    """The engine of the command line, on a backbone of its own: what answers should be."""
    return Dialogue.open(runs[0])


def decoding() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("decode")]


def ask(adapter: str = POLICY, messages: Messages = PROMPTS[0], **more: Any) -> Ask:
    return replace(Ask(adapter, messages, max_new_tokens=SHORT, seed=3), **more)


def endless(adapter: str = POLICY, seed: int = 3) -> Ask:
    """So hot that nearly any token is as likely, so that the end token does not come soon."""
    return ask(adapter, temperature=5.0, max_new_tokens=LONG, seed=seed)


def stream(engine: StudioEngine, *asks: Ask, who: str = "ana", **more: Any) -> Any:
    return engine.stream(asks, who=who, cancel=more.pop("cancel", NEVER), **more)


def answers(engine: StudioEngine, *asks: Ask, **more: Any) -> list[Row]:
    *_, last = stream(engine, *asks, **more)
    return last


def begun(items: Any, tokens: int = 3) -> None:
    """Read a stream until its first row has some tokens."""
    for item in items:
        if isinstance(item, list) and item[0].n_tokens >= tokens:
            assert item[0].finish is None, "it ended before it could be stopped"
            return
    raise AssertionError("it never began")


def timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


# -- answers ------------------------------------------------------------------------------------


def test_what_there_is(engine: StudioEngine, runs: list[Run]) -> None:
    assert engine.answerers() == ["base", SFT, POLICY, f"{SECOND}/sft", OTHER]
    assert [e.name for e in engine.registered()] == [
        *(f"{FIRST}/{role}" for role in ("sft", "reward", "policy")),
        f"{SECOND}/sft",
        OTHER,
    ]
    assert engine.reward_adapter() == REWARD
    facts = engine.facts()
    assert (facts.model, facts.quantization, facts.device) == ("builtin:tiny", "nf4", "CPU")
    assert (facts.max_prompt_tokens, facts.default_new_tokens) == (64, LONG)
    assert facts.most_new_tokens <= 2 * LONG
    assert len(facts.template_sha256) == 64


def test_each_row_has_its_own_adapter_and_no_neighbour_matters(
    engine: StudioEngine, dialogue: Dialogue
) -> None:
    asks = [ask(n, PROMPTS[i % 3], seed=i) for i, n in enumerate([*engine.answerers(), POLICY])]
    together = answers(engine, *asks)
    alone = [answers(engine, one)[0] for one in asks]
    assert [(r.adapter, r.text, r.n_tokens, r.finish) for r in together] == [
        (r.adapter, r.text, r.n_tokens, r.finish) for r in alone
    ]
    roles = {"base": "base", SFT: "sft", POLICY: "policy"}
    sampling = Sampling(SHORT)
    for one, row in zip(asks, together, strict=True):
        if one.adapter in roles:  # and they are what the command line answers
            reply = dialogue.answer(roles[one.adapter], one.messages, sampling, one.seed)
            assert (row.text, row.n_tokens) == (reply.text, len(reply.ids))


def test_adapters_prompts_and_seeds_all_matter(engine: StudioEngine) -> None:
    """Else a row could have a neighbour's adapter, prompt or seed and pass for its own."""
    by_adapter = answers(engine, *(ask(n, temperature=1.5) for n in engine.answerers()))
    by_seed = answers(engine, *(ask(seed=seed) for seed in range(5)))
    by_prompt = answers(engine, *(ask(messages=p) for p in PROMPTS))
    for rows in (by_adapter, by_seed, by_prompt):
        assert len({row.text for row in rows}) == len(rows)
    assert answers(engine, ask(seed=4))[0].text == by_seed[4].text


def test_rows_may_be_sampled_differently(engine: StudioEngine) -> None:
    asks = [ask(temperature=0.0), ask(temperature=1.5), ask(top_p=0.5), ask(max_new_tokens=2)]
    together = answers(engine, *asks)
    assert [r.text for r in together] == [answers(engine, one)[0].text for one in asks]
    assert (together[3].n_tokens, together[3].finish) == (2, "length")
    greedy = answers(engine, ask(temperature=0.0, seed=99))[0]
    assert greedy.text == together[0].text


def test_a_dialogue_over_the_limit_loses_its_oldest_turns(engine: StudioEngine) -> None:
    old: Any = ({"role": "user", "content": "word " * 55}, {"role": "assistant", "content": "Yes."})
    (row,) = answers(engine, ask(messages=(*old, *old, *PROMPTS[0])))
    assert row.dropped == 4
    assert row.text == answers(engine, ask())[0].text


def test_it_streams_growing_prefixes_at_most_twenty_a_second(engine: StudioEngine) -> None:
    """Yielded a token, as a mutant would, it is several times as often."""
    began = time.monotonic()
    items = list(stream(engine, endless(), endless(SFT)))
    seconds = time.monotonic() - began
    assert len(items) <= 20 * seconds + 3  # the first, the last, and the scored ones
    assert len(items) >= 4
    for place in (0, 1):
        texts = [rows[place].text for rows in items]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        tokens = [rows[place].n_tokens for rows in items]
        assert tokens == sorted(tokens)
    assert all(row.finish in ("eos", "length") for row in items[-1])
    # Whole answers come with their scores, so that none can be judged before them.
    assert all(any(row.finish is None for row in rows) for rows in items[:-1])
    assert all(row.score is not None for row in items[-1])


# -- stopping -----------------------------------------------------------------------------------


def test_stop_ends_it_within_half_a_second_and_marks_it(engine: StudioEngine) -> None:
    times = []
    whole = answers(engine, endless(), endless(SFT))
    for _ in range(3):  # the quickest of three, since the machine may be shared
        cancel = threading.Event()
        items = stream(engine, endless(), endless(SFT), cancel=cancel)
        begun(items)
        cancel.set()
        rest: list[Any] = []
        times.append(timed(lambda items=items, rest=rest: rest.extend(items)))
        assert [row.finish for row in rest[-1]] == ["stopped", "stopped"]
        for stopped, row in zip(rest[-1], whole, strict=True):
            assert 0 < stopped.n_tokens < row.n_tokens
            assert row.text.startswith(stopped.text)
            assert (stopped.score, stopped.kl, stopped.rm_adapter) == (None, None, None)
    assert min(times) < HALF_A_SECOND


def test_closing_the_iterator_stops_the_thread_and_frees_the_turn(engine: StudioEngine) -> None:
    times = []
    for _ in range(3):
        items = stream(engine, endless(), endless(SFT))
        begun(items)
        assert decoding()
        times.append(timed(items.close))
        assert not decoding()
        assert len(engine.turns) == 0
    assert min(times) < HALF_A_SECOND


def test_stop_before_the_first_token(engine: StudioEngine) -> None:
    cancel = threading.Event()
    cancel.set()
    assert answers(engine, ask(), ask(SFT), cancel=cancel) == [
        Row(POLICY, finish="stopped"),
        Row(SFT, finish="stopped"),
    ]


def test_the_wall_clock_limit_marks_it_stopped(
    engine: StudioEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "limits", Limits(seconds=0.05))
    stopped = answers(engine, endless())[0]
    assert stopped.finish == "stopped"
    assert stopped.n_tokens < LONG


# -- the queue ----------------------------------------------------------------------------------


def test_one_job_at_a_time_and_the_place_is_told(engine: StudioEngine) -> None:
    first, second = stream(engine, endless()), stream(engine, ask(), who="ben")
    third = stream(engine, ask(), who="cyd")
    begun(first)
    assert (next(second), next(third)) == (Waiting(1), Waiting(2))
    assert len(decoding()) == 1
    second.close()  # somebody leaves the line
    assert next(third) == Waiting(1)
    first.close()
    *_, last = third
    assert last[0].text == answers(engine, ask())[0].text


def test_two_threads_never_decode_together(
    engine: StudioEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the queue's own test: a decode must also have ended when the turn is given on."""
    from ui.decoding import Batch

    inside, peak, run = [0], [0], Batch.run

    def counted(batch: Batch) -> None:
        inside[0] += 1
        peak[0] = max(peak[0], inside[0])
        run(batch)
        inside[0] -= 1

    monkeypatch.setattr(Batch, "run", counted)

    def person(name: str) -> None:
        for number in range(3):
            items = stream(engine, endless(seed=number), who=name)
            next(item for item in items if isinstance(item, list))
            items.close()  # leaving in the middle

    threads = [threading.Thread(target=person, args=(name,)) for name in ("ana", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert (inside[0], peak[0]) == (0, 1)


def test_too_many_jobs_are_refused(engine: StudioEngine) -> None:
    with closing(stream(engine, endless())) as first, closing(stream(engine, ask())) as second:
        begun(first)
        assert next(second) == Waiting(1)
        with pytest.raises(Busy, match="2 of your answers"):
            next(stream(engine, ask()))
        with closing(stream(engine, ask(), who="ben")) as other:
            assert next(other) == Waiting(2)


def test_background_work_gives_way(engine: StudioEngine) -> None:
    ahead = stream(engine, endless(), who="ana", background=True)
    begun(ahead)
    mine = stream(engine, ask())
    assert next(mine) == Waiting(1)
    *_, last = ahead
    assert last[0].finish == "stopped"
    *_, answered = mine
    assert answered[0].finish in ("eos", "length")


# -- limits -------------------------------------------------------------------------------------

NO_NUMBERS: list[Any] = ["1", None, [], {}, True, False, math.nan, math.inf, -math.inf]


def refused(engine: StudioEngine, *asks: Ask) -> str:
    with pytest.raises(ConfigError) as error:
        next(stream(engine, *asks))
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "name", "values"),
    [
        ("temperature", "temperature", [-0.1, 5.01, 1e-320, 0.009, 10**5000, -(10**5000)]),
        ("top_p", "top-p", [0, -1, 0.009, 1.0001, 2, 10**5000]),
        ("max_new_tokens", "length", [0, -1, 2 * LONG + 1, 1.5, 12.0, 10**5000]),
        ("seed", "seed", [-1, 2**63, 1.0, 10**5000]),
    ],
)
def test_settings_out_of_range_are_refused(
    engine: StudioEngine, field: str, name: str, values: list[Any]
) -> None:
    for value in [*NO_NUMBERS, "x" * 10**6, *values]:
        said = refused(engine, ask(), ask(**{field: value}))
        assert said.startswith(f"{name} is ")
        assert "Allowed" in said


def test_the_ends_of_the_ranges_are_allowed(engine: StudioEngine) -> None:
    for more in (
        {"temperature": 0},
        {"temperature": 0.01},
        {"temperature": 5},
        {"top_p": 0.01},
        {"top_p": 1},
        {"max_new_tokens": 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
    ):
        assert answers(engine, ask(**({"max_new_tokens": 2} | more)))[0].finish is not None


def test_rows_prompts_and_adapters_are_limited(engine: StudioEngine) -> None:
    assert "0 answers" in refused(engine)
    assert "10 answers" in refused(engine, *[ask()] * 10)
    for forged in ("", REWARD, "policy", "../policy", None, 7, ["base"], "x" * 10**6):
        assert "No adapter" in refused(engine, ask(forged))  # type: ignore[arg-type]
    assert "characters" in refused(engine, ask(messages=user("x" * 20_001)))
    for messages in ((), ({"role": "assistant", "content": "Hi"},)):
        assert "no question" in refused(engine, ask(messages=messages))


def test_a_prompt_of_too_many_tokens_is_refused_and_the_turn_given_on(
    engine: StudioEngine,
) -> None:
    with pytest.raises(DataError, match="at most 64"):
        list(stream(engine, ask(), ask(messages=user("owl " * 200))))
    assert len(engine.turns) == 0
    assert answers(engine, ask())[0].finish is not None


# -- scores and KL ------------------------------------------------------------------------------


def test_scores_and_kl_are_those_of_the_command_line(
    engine: StudioEngine, dialogue: Dialogue
) -> None:
    asks = [ask(n, p, seed=s) for s, (n, p) in enumerate(zip(["base", SFT, POLICY], PROMPTS))]  # noqa: B905
    rows = answers(engine, *asks)
    found = []
    for role, one, row in zip(("base", "sft", "policy"), asks, rows, strict=True):
        truth = dialogue.judge(dialogue.answer(role, one.messages, Sampling(SHORT), one.seed))
        assert row.score == pytest.approx(truth.score, abs=1e-4)
        assert row.kl == pytest.approx(truth.kl, abs=1e-3)
        assert row.rm_adapter == REWARD
        assert row.score_unit == pytest.approx(2.0)  # the spread its head was normalised by
        assert row.logprob is not None
        assert row.logprob < 0
        found.append((row.score, row.kl))
    # Scores and KL of other rows would not pass.
    assert min(abs(a[0] - b[0]) for a, b in pairwise(found)) > 0.01  # type: ignore[operator]
    assert abs(found[0][1]) > 0.05  # type: ignore[arg-type]
    assert abs(found[2][1]) > 0.05  # type: ignore[arg-type]


def test_kl_of_sft_to_itself_is_exactly_nothing_in_whatever_batch(engine: StudioEngine) -> None:
    rows = answers(engine, ask("base", PROMPTS[2]), ask(SFT), ask(POLICY, PROMPTS[1]), ask(SFT))
    assert [row.kl == 0.0 for row in rows] == [False, True, False, True]
    other = answers(engine, ask(f"{SECOND}/sft"), ask(OTHER))
    assert other[0].kl == 0.0  # measured from the sft beside it, not from the first run's
    assert other[1].kl not in (0.0, None)


def test_texts_are_scored_as_answers_in_their_order(
    engine: StudioEngine, dialogue: Dialogue
) -> None:
    from lora_rlhf.training.rollout import score_answers

    items = [(PROMPTS[n % 3], f"The owl says {'no ' * n}so.") for n in range(40)]
    scores = engine.score(items)
    chat_format = dialogue.backbone.format
    for place in (0, 7, 31, 32, 39):  # the last two are scored in a turn of their own
        prompt, text = items[place]
        ids = [chat_format.prompt_ids(prompt)], [chat_format.response_ids(text)]
        (truth,) = score_answers(dialogue.backbone, *ids, 10_000)
        assert scores[place] == pytest.approx(float(truth), abs=1e-4)
    assert len({round(s, 3) for s in scores}) > 30
    assert engine.score([]) == []
    for forged in (SFT, "unknown", "x" * 10**5):
        with pytest.raises(CheckpointError, match="no reward adapter"):
            engine.score(items, forged)


def test_scoring_lets_others_in_between(engine: StudioEngine) -> None:
    first = stream(engine, endless())
    begun(first)
    scores: list[float] = []
    items = [(PROMPTS[0], f"word {n}") for n in range(70)]  # three turns
    scorer = threading.Thread(target=lambda: scores.extend(engine.score(items)))
    scorer.start()
    eventually(lambda: len(engine.turns) == 2)
    mine = stream(engine, ask(), who="ben")
    assert next(mine) == Waiting(2)
    first.close()
    next(item for item in mine if isinstance(item, list))
    assert scores == []  # it has scored a part and waits for the device again
    mine.close()
    scorer.join(60)
    assert len(scores) == 70


def test_a_broken_reward_model_gives_no_score(
    engine: StudioEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ui.decoding.score_answers", lambda *_, **__: torch.tensor([math.nan, math.inf])
    )
    rows = answers(engine, ask(), ask(SFT))
    assert [row.score for row in rows] == [None, None]
    assert all(row.kl is not None for row in rows)


def test_prompts_of_the_run_are_read_once(engine: StudioEngine) -> None:
    train, heldout = engine.pool("train"), engine.pool("heldout")
    assert train
    assert heldout
    assert not {str(p.messages) for p in train} & {str(p.messages) for p in heldout}
    assert heldout[0].source == "pool:heldout#0"
    assert engine.pool("train") is train


def test_what_a_run_holds_out_is_said_by_its_own_recipe(
    engine: StudioEngine, runs: list[Run], tmp_path: Path
) -> None:
    pools = {
        kind: {prompt_key(p.messages) for p in engine.pool(kind)} for kind in ("train", "heldout")
    }
    own = engine.prompts_of(runs[0].path)
    assert (own.unseen, own.known, own.trained) == (pools["heldout"], set(), pools["train"])
    texts = [f"Say the number {i}." for i in range(8)]
    rows = [json.dumps({"prompt": text, "response": "No."}) + "\n" for text in texts]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    data = f"data.demonstrations={{path: {tmp_path / 'data.jsonl'}}}"
    changes = [data, "data.heldout_fraction=0.5"]
    recipe = load_recipe(str(runs[0].path / "recipe.yaml"), changes)
    other = Run(tmp_path / "other")
    write_atomically(other.path / "recipe.yaml", dump_recipe(recipe))
    gone = prompt_key(user(texts[0]))
    other.write_json("summary.json", {"retraining": {TRAINED_ON: [gone]}})
    theirs = engine.prompts_of(other.path)
    assert theirs.unseen | theirs.trained == {prompt_key(user(text)) for text in texts}
    assert not theirs.unseen & theirs.trained
    assert len(theirs.unseen) >= 1
    assert theirs.known == {gone}


# -- errors -------------------------------------------------------------------------------------


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_is_told_and_the_next_job_works(
    engine: StudioEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(engine, ask(), ask(SFT))
    with monkeypatch.context() as patch:
        patch.setattr("ui.decoding.generate", out_of_memory)
        with pytest.raises(HardwareError, match="no memory left"):
            list(stream(engine, ask(), ask(SFT)))
    assert answers(engine, ask(), ask(SFT)) == before


def test_out_of_memory_for_scores_leaves_the_answers(
    engine: StudioEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(engine, ask(), ask(SFT))
    for place in ("score_answers", "adapter_logprobs"):
        with monkeypatch.context() as patch:
            patch.setattr(f"ui.decoding.{place}", out_of_memory)
            rows = answers(engine, ask(), ask(SFT))
        assert [r.text for r in rows] == [r.text for r in before]
        assert [(r.score, r.kl) for r in rows] == [(None, None)] * 2
        assert [r.finish for r in rows] == [r.finish for r in before]


@pytest.mark.parametrize("asked", [1, 2], ids=["one adapter", "rows of their own"])
def test_a_bug_in_the_decode_reaches_the_caller_and_wedges_nothing(
    engine: StudioEngine, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """In the middle of a forward, so that the adapters' switch must be put back, too."""
    from lora_rlhf.model import generation

    asks = [ask(), ask(SFT)][:asked]
    before, draw, count = answers(engine, *asks), generation.next_tokens, iter(range(1000))

    def breaks(*args: Any) -> Any:
        if next(count) == 3:
            raise ZeroDivisionError("a bug")
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "next_tokens", breaks)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            list(stream(engine, *asks))
    assert len(engine.turns) == 0
    assert answers(engine, *asks) == before


def test_every_refusal_is_a_sentence(engine: StudioEngine) -> None:
    with pytest.raises(UserError) as error:
        engine.score([(PROMPTS[0], "text")], "unknown")
    assert REWARD in str(error.value)  # what there is
    with pytest.raises(Paused, match="still being loaded"):
        next(stream(StudioEngine([Run(engine.registered()[0].run)]), ask()))
