"""Rows of one batch with an adapter each: PEFT's own layer, one adapter at a time, is the truth."""

import time
from contextlib import contextmanager
from statistics import median

import pytest
import torch
from peft import LoraConfig, TaskType
from torch import nn

from lora_rlhf.model import adapters as adapters_module
from lora_rlhf.model import generation, mixed
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Sampling, generate
from lora_rlhf.model.mixed import NotByRowError, Rows
from lora_rlhf.recipe import Base, Lora
from lora_rlhf.training.rollout import sample
from tests.small import random_prompts, randomise, small_backbone

# Ranks, scalings and places all differ.
SHAPES = {
    "sft": Lora(rank=4, alpha=8.0),
    "policy": Lora(rank=16, alpha=16.0, use_rslora=True, target_modules=("q_proj", "v_proj")),
    "other": Lora(rank=6, alpha=20.0, target_modules=("v_proj", "down_proj", "gate_proj")),
}
NAMES = ["policy", None, "sft", "other", "sft", "policy", "other", None]


def with_adapters(backbone, scale=0.1, shapes=SHAPES):
    for number, (name, lora) in enumerate(shapes.items()):
        backbone.adapters.add(name, lora)
        randomise(backbone, name, seed=number, scale=scale)
    return backbone


@pytest.fixture(scope="module")
def small():
    return with_adapters(small_backbone())


@pytest.fixture(scope="module")
def tiny():
    return with_adapters(Backbone.load(Base(model="builtin:tiny", device="cpu")))


def alone(backbone, names, prompts, seeds, sampling):
    """Every answer by itself, under the ordinary switch."""
    answers = []
    for name, prompt, seed in zip(names, prompts, seeds, strict=True):
        with backbone.adapters.use(name):
            answers += generate(backbone, [prompt], [seed], sampling)
    return answers


def ids(answers):
    return [answer.ids for answer in answers]


def state(backbone):
    """All that a block could leave behind."""
    hooks = [
        (key, name)
        for key, module in backbone.causal_lm.named_modules()
        for name in [*module._forward_hooks, *module._forward_pre_hooks, *vars(module)]
        if name == "forward" or isinstance(name, int)
    ]
    flags = {key: p.requires_grad for key, p in backbone.causal_lm.named_parameters()}
    disabled = [layer.disable_adapters for layer in backbone.adapters._layers]
    return hooks, flags, disabled, backbone.adapters.active, backbone.checksum()


# -- products -----------------------------------------------------------------------------------


def logits_by_row(backbone, names, tokens):
    with torch.no_grad(), backbone.adapters.mixed(names), backbone.autocast():
        return backbone.causal_lm(input_ids=tokens, use_cache=False).logits


def logits_by_use(backbone, names, tokens):
    rows = []
    for name, row in zip(names, tokens, strict=True):
        with torch.no_grad(), backbone.adapters.use(name), backbone.autocast():
            rows.append(backbone.causal_lm(input_ids=row[None], use_cache=False).logits)
    return torch.cat(rows)


def some_tokens(length=7, highest=96, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, highest, (len(NAMES), length), generator=generator).to(device)


@pytest.mark.parametrize("quantized", [True, False])
def test_logits_equal_those_of_the_ordinary_layers_one_adapter_at_a_time(quantized):
    backbone = with_adapters(small_backbone(quantized))
    tokens = some_tokens()
    by_use = logits_by_use(backbone, NAMES, tokens)
    torch.testing.assert_close(logits_by_row(backbone, NAMES, tokens), by_use, rtol=1e-5, atol=1e-5)
    plain = logits_by_use(backbone, [None] * len(NAMES), tokens)
    moved = (by_use - plain).abs().amax((1, 2))
    assert all((moved[i] > 0.1) == (name is not None) for i, name in enumerate(NAMES))


def wrong_scaling(monkeypatch):
    class Unscaled(mixed._Delta):
        def __init__(self, rows, layer, names, dtype):
            before, layer.scaling = layer.scaling, dict.fromkeys(layer.scaling, 1.0)
            super().__init__(rows, layer, names, dtype)
            layer.scaling = before

    monkeypatch.setattr(mixed, "_Delta", Unscaled)


def wrong_row(monkeypatch):
    class Shifted(Rows):
        def __init__(self, names):
            super().__init__([*names[1:], names[0]])

    monkeypatch.setattr(mixed, "Rows", Shifted)


def wrong_rank(monkeypatch):
    """Blocks as if all adapters of a layer had the first one's rank."""

    class Even(Rows):
        def mask(self, blocks, like):
            total = sum(rank for _, rank in blocks)
            share = total // len(blocks)
            ranks = [share] * (len(blocks) - 1) + [total - share * (len(blocks) - 1)]
            even = tuple((n, r) for (n, _), r in zip(blocks, ranks, strict=True))
            return super().mask(even, like)

    monkeypatch.setattr(mixed, "Rows", Even)


def wrong_rows_kept(monkeypatch):
    keep = Rows.keep
    monkeypatch.setattr(Rows, "keep", lambda self, kept: keep(self, torch.arange(len(kept))))


def no_rows_dropped(monkeypatch):
    monkeypatch.setattr(Rows, "keep", lambda self, kept: None)


@pytest.mark.parametrize("mutate", [wrong_scaling, wrong_row, wrong_rank])
def test_the_check_above_rejects_mutants(small, monkeypatch, mutate):
    tokens = some_tokens()
    by_use = logits_by_use(small, NAMES, tokens)
    mutate(monkeypatch)
    assert (logits_by_row(small, NAMES, tokens) - by_use).abs().max() > 0.05


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_products_are_those_of_the_ordinary_layers_up_to_their_rounding(device):
    """At rest in bf16 or in fp32, under autocast; the fp32 model says how far rounding goes."""
    backbone, exact = (
        with_adapters(Backbone.load(Base(model="builtin:tiny", device=device, dtype=dtype)))
        for dtype in ("bfloat16", "float32")
    )
    backbone.adapters.freeze("other")
    assert {p.dtype for p in backbone.adapters.parameters("other").values()} == {torch.bfloat16}
    tokens = some_tokens(length=24, highest=1400, device=device)
    truth = logits_by_use(exact, NAMES, tokens)
    by_use = logits_by_use(backbone, NAMES, tokens)
    by_row = logits_by_row(backbone, NAMES, tokens)
    assert by_row.dtype == by_use.dtype
    rounding = (by_use - truth).abs().mean((1, 2))
    assert bool(((by_row - truth).abs().mean((1, 2)) <= 1.1 * rounding).all())
    swapped = logits_by_row(backbone, [*NAMES[1:], NAMES[0]], tokens)
    assert bool(((swapped - truth).abs().mean((1, 2)) > 3 * rounding).all())


# -- answers ------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_its_neighbours_and_their_adapters(tiny):
    """Five batches of eight rows: adapters, lengths of prompts and company all differ."""
    sampling = Sampling(10)
    prompts = random_prompts(40, seed=5, shortest=2, longest=30)
    seeds = list(range(40))
    names = [NAMES[(3 * i + i // 8) % len(NAMES)] for i in range(40)]
    single = ids(alone(tiny, names, prompts, seeds, sampling))
    together = [
        answer
        for start in range(0, 40, 8)
        for answer in ids(
            generate(
                tiny,
                prompts[start : start + 8],
                seeds[start : start + 8],
                sampling,
                adapters=names[start : start + 8],
            )
        )
    ]
    assert together == single
    all_at_once = generate(tiny, prompts, seeds, sampling, adapters=names)
    assert ids(all_at_once) == single


def test_the_same_seed_and_prompt_answer_differently_under_each_adapter(tiny):
    """Without this, rows that got each other's adapter could go unseen above."""
    prompt = random_prompts(1, seed=9)[0]
    names = [None, *SHAPES]
    answers = generate(tiny, [prompt] * 4, [7] * 4, Sampling(12), adapters=names)
    assert len({tuple(answer.ids) for answer in answers}) == 4


def many(count):
    prompts = random_prompts(count, seed=2)
    return [NAMES[i % len(NAMES)] for i in range(count)], prompts, list(range(count))


@pytest.fixture(scope="module")
def ending():
    """A backbone on which rows end at every step, and its 24 answers alone."""
    backbone = with_adapters(small_backbone())
    backbone.format.stop_ids = tuple(range(2, 96, 8))
    return backbone, ids(alone(backbone, *many(24), Sampling(14)))


def test_rows_keep_their_adapters_when_others_end_and_when_turns_are_taken(ending, monkeypatch):
    backbone, single = ending
    names, prompts, seeds = many(24)
    kept = []
    keep = Rows.keep
    monkeypatch.setattr(
        Rows, "keep", lambda self, rows: (kept.append(rows.tolist()), keep(self, rows))
    )
    together = generate(backbone, prompts, seeds, Sampling(14), adapters=names)
    assert sum(rows != list(range(len(rows))) for rows in kept) > 3
    turns = generate(backbone, prompts, seeds, Sampling(14), max_rows=7, adapters=names)
    monkeypatch.setattr(generation, "_COMPACT_BELOW", -1.0)
    never = generate(backbone, prompts, seeds, Sampling(14), adapters=names)
    assert ids(together) == ids(turns) == ids(never) == single
    assert {answer.ended for answer in together} == {True, False}


@pytest.mark.parametrize("mutate", [wrong_scaling, wrong_row, wrong_rank, wrong_rows_kept])
def test_the_check_above_rejects_mutants_too(ending, monkeypatch, mutate):
    backbone, single = ending
    names, prompts, seeds = many(24)
    mutate(monkeypatch)
    assert ids(generate(backbone, prompts, seeds, Sampling(14), adapters=names)) != single


def test_rows_that_do_not_follow_compaction_are_an_error_and_no_fallback(ending, monkeypatch):
    names, prompts, seeds = many(24)
    no_rows_dropped(monkeypatch)
    with pytest.raises(NotByRowError):
        generate(ending[0], prompts, seeds, Sampling(14), adapters=names)


def test_log_probs_of_mixed_rows_equal_those_alone(small):
    names, prompts, seeds = many(16)
    answers = generate(small, prompts, seeds, Sampling(16), adapters=names)
    single = alone(small, names, prompts, seeds, Sampling(16))
    for answer, other in zip(answers, single, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert answer.ended == other.ended


def test_a_callback_sees_every_token_of_its_row_and_stops_that_row_alone(small):
    names, prompts, seeds = many(9)
    full = ids(alone(small, names, prompts, seeds, Sampling(12)))
    long = [i for i in range(9) if len(full[i]) > 5]
    stopped, seen = long[1], {}

    def watch(row, token):
        seen.setdefault(row, []).append(token)
        return row == stopped and len(seen[row]) == 3

    answers = generate(
        small, prompts, seeds, Sampling(12), max_rows=4, on_token=watch, adapters=names
    )
    assert [seen[i] for i in range(9)] == ids(answers)
    assert answers[stopped].ids == full[stopped][:3]
    assert not answers[stopped].ended
    assert [a.ids for i, a in enumerate(answers) if i != stopped] == [
        row for i, row in enumerate(full) if i != stopped
    ]


def test_rollouts_take_one_adapter_or_one_a_prompt(small):
    names, prompts, seeds = many(8)
    single = ids(alone(small, names, prompts, seeds, Sampling(10)))
    assert ids(sample(small, names, prompts, seeds, Sampling(10), max_rows=3)) == single
    shared = ids(alone(small, ["sft"] * 8, prompts, seeds, Sampling(10)))
    assert ids(sample(small, "sft", prompts, seeds, Sampling(10))) == shared != single


# -- nothing is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(small, error):
    """Neither after an answer, nor after an error or Ctrl-C in mid-answer."""
    names, prompts, seeds = many(6)
    calls = []

    def watch(row, token):
        calls.append(row)
        if error is not None and len(calls) == 14:
            raise error

    with small.adapters.use("sft", train=True):
        before = state(small)
        try:
            generate(small, prompts, seeds, Sampling(8), on_token=watch, adapters=names)
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert type(raised) is error  # noqa: PT017
        assert state(small) == before
        assert small.adapters.active == "sft"
        assert any(before[1].values())
    assert len(calls) >= 14


def test_the_check_above_sees_a_hook_and_a_flag(small):
    before = state(small)
    handle = small.adapters._layers[0].register_forward_hook(lambda *_: None)
    assert state(small) != before
    handle.remove()
    assert state(small) == before
    with small.adapters.mixed(["sft", "policy"]):
        inside = state(small)
        assert inside[0] != before[0]
        assert not any(inside[1].values())
        assert inside[4] == before[4]
    assert state(small) == before


def test_no_adapter_is_switched_to_while_rows_have_their_own(small):
    before = state(small)
    with small.adapters.mixed(["sft", None]):
        with pytest.raises(AssertionError, match="each their own"), small.adapters.use("policy"):
            pass
        with pytest.raises(AssertionError, match="each their own"), small.adapters.mixed(["sft"]):
            pass
    with pytest.raises(AssertionError, match="no adapter nobody"), small.adapters.mixed(["nobody"]):
        pass
    assert state(small) == before


# -- what cannot share a batch ------------------------------------------------------------------


@contextmanager
def counted_batches(monkeypatch):
    """Whether each batch that was decoded to its end had rows of their own."""
    batches = []
    run = generation._Decode.run

    def counting(self, on_token, rows=None):
        answers = run(self, on_token, rows)
        batches.append(rows is not None)
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(generation._Decode, "run", counting)
        yield batches


def same_in_turns(backbone, names, monkeypatch):
    """Decode and compare with answers alone; how many batches it took, none by row."""
    prompts, seeds = random_prompts(len(names), seed=8), list(range(len(names)))
    single = alone(backbone, names, prompts, seeds, Sampling(10))
    before, seen = state(backbone), {}
    with counted_batches(monkeypatch) as batches:
        answers = generate(
            backbone,
            prompts,
            seeds,
            Sampling(10),
            on_token=lambda row, token: seen.setdefault(row, []).append(token),
            adapters=names,
        )
    assert ids(answers) == ids(single)
    assert [seen[i] for i in range(len(names))] == ids(single)
    assert state(backbone) == before
    assert not any(batches)
    return len(batches)


def test_plain_adapters_share_one_batch(small, monkeypatch):
    names, prompts, seeds = many(8)
    with counted_batches(monkeypatch) as batches:
        generate(small, prompts, seeds, Sampling(4), adapters=names)
        generate(small, prompts, seeds, Sampling(4), adapters=["sft"] * 8)
        generate(small, prompts, seeds, Sampling(4), adapters=[None] * 8)
    assert batches == [True, False, False]


def test_dora_is_decoded_in_turns(monkeypatch):
    backbone = with_adapters(small_backbone(), shapes={"sft": SHAPES["sft"]})
    backbone.adapters.add("dora", Lora(rank=4, alpha=8.0, use_dora=True))
    for key, parameter in backbone.adapters.parameters("dora").items():
        if "magnitude" not in key:
            parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    names = ["dora", "sft", None, "dora", "sft"]
    assert same_in_turns(backbone, names, monkeypatch) == 3
    with pytest.raises(NotByRowError), backbone.adapters.mixed(names):
        pass


def test_an_adapter_with_a_bias_is_decoded_in_turns(monkeypatch):
    backbone = with_adapters(small_backbone())
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_bias=True,
        bias="none",
        target_modules=["q_proj"],
        task_type=TaskType.CAUSAL_LM,
    )
    with pytest.warns(UserWarning, match="lora_bias"):
        backbone.adapters._attach("biased", config)
    randomise(backbone, "biased", seed=4)
    assert same_in_turns(backbone, ["biased", "sft", "biased"], monkeypatch) == 2


def test_an_adapter_that_is_not_finite_does_not_reach_the_others(monkeypatch):
    backbone = with_adapters(small_backbone())
    next(iter(backbone.adapters.parameters("policy").values())).data[0, 0] = float("nan")
    prompts, seeds = random_prompts(2, seed=8), [1, 2]
    single = alone(backbone, ["sft"], prompts[1:], seeds[1:], Sampling(8))
    answers = generate(backbone, prompts, seeds, Sampling(8), adapters=["policy", "sft"])
    assert answers[1].ids == single[0].ids


def test_a_model_that_flattens_its_rows_is_decoded_in_turns(monkeypatch):
    """As mixtures of experts do: which row a token is of can no longer be seen."""
    backbone = with_adapters(small_backbone())
    for layer in backbone.trunk.layers:
        layer.mlp = _Flattened(layer.mlp)
    backbone.adapters._index()
    assert same_in_turns(backbone, ["sft", "other", "sft", None], monkeypatch) == 3


class _Flattened(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x.flatten(0, 1)).view_as(x)


# -- speed --------------------------------------------------------------------------------------

SPEED_LORA = Lora(rank=16, alpha=32.0)
TOKENS = 16


@pytest.fixture
def endless(monkeypatch):
    """The embedded base with three full adapters, whose answers all have the same length."""
    names = dict.fromkeys(("sft", "policy", "other"), SPEED_LORA)
    backbone = with_adapters(Backbone.load(Base(model="builtin:tiny", device="cpu")), shapes=names)
    monkeypatch.setattr(backbone.format, "stop_ids", ())
    return backbone


def time_ratios(backbone, cases, repeats):
    """Seconds of each list of adapters over those of one answer, taken in turns: (wall, CPU).

    The fastest of each by the wall clock, which others on the machine make slower but never
    faster; the median ratio of neighbours by the process's own.
    """
    prompt = random_prompts(1, seed=1, shortest=24, longest=25)[0]

    def seconds(names):
        wall, cpu = time.perf_counter(), time.process_time()
        prompts, seeds = [prompt] * len(names), list(range(len(names)))
        answers = generate(backbone, prompts, seeds, Sampling(TOKENS), adapters=names)
        assert [len(answer.ids) for answer in answers] == [TOKENS] * len(names)
        return time.perf_counter() - wall, time.process_time() - cpu

    every = [["sft"], *cases]
    for names in every:
        seconds(names)
    taken = [[seconds(names) for names in every] for _ in range(repeats)]
    walls, cpus = ([[both[i] for both in turn] for turn in taken] for i in (0, 1))
    fastest = [min(column) for column in zip(*walls, strict=True)]
    return [
        (fastest[i] / fastest[0], median(turn[i] / turn[0] for turn in cpus))
        for i in range(1, len(every))
    ]


def test_both_sides_of_a_comparison_take_the_time_of_one(endless):
    """At most 1.3 times, for two answers with two adapters and for four with three.

    On a crowded machine one answer may find an idle moment that the others do not: then again.
    """
    cases = [["sft", "policy"], ["sft", "policy", "other", "sft"]]
    rounds = []
    while len(rounds) < 3 and (not rounds or min(rounds) > 1.3):
        rounds.append(max(max(both) for both in time_ratios(endless, cases, repeats=9)))
    assert min(rounds) <= 1.3, rounds


def test_the_measure_above_rejects_answers_in_turns(endless, monkeypatch):
    @contextmanager
    def refused(*_):
        raise NotByRowError
        yield

    monkeypatch.setattr(adapters_module, "mix", refused)
    [both] = time_ratios(endless, [["sft", "policy"]], repeats=3)
    assert max(both) > 1.5
