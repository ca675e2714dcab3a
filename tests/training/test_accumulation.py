"""However a step is split into micro-batches, and however often it is done again, one gradient."""

from types import SimpleNamespace

import pytest
import torch

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.errors import HardwareError
from lora_rlhf.losses.outputs import LossOutput
from lora_rlhf.model.generation import Sampling
from lora_rlhf.recipe import Ppo, Sft
from lora_rlhf.stages.reward import Group, group_loss
from lora_rlhf.stages.sft import demonstration_loss
from lora_rlhf.training.experience import Reader
from lora_rlhf.training.offline import Task, _Trainer
from lora_rlhf.training.optim import TokenBudget, clear_gradients
from lora_rlhf.training.ppo import PpoTrainer
from tests.sessions import answers, distance, gradients, session
from tests.small import EOS, LORA, PAD, VOCABULARY, random_prompts, randomise, small_backbone

ROW_BY_ROW, SOME, ALL = 1, 45, 10_000
LENGTHS = [1, 11, 3, 7, 7, 2, 12, 5]
TEXTS = ([[1], [1], [1]], [[9, 8, 7, 2], [5, 2], [44, 45, 46, 47, 48, 49, 2]])


def make_trainer(kind="adapter", tokens=ALL, trainer_class=PpoTrainer, **settings):
    """A trainer whose policy and value have moved on since the rollout, and that experience."""
    backbone = small_backbone()
    adapters = backbone.adapters
    adapters.add("sft", LORA)
    randomise(backbone, "sft", 1, 0.03)
    adapters.copy("sft", "policy")
    adapters.copy("sft", "value")
    adapters.add_head("value", seed=3)
    choices = Ppo(
        batch_size=len(LENGTHS),
        minibatch_size=len(LENGTHS),
        value="shared" if kind == "shared" else "adapter",
        ptx_coef=0.5 if kind == "ptx" else 0.0,
        **settings,
    )
    trainer = trainer_class(
        backbone=backbone,
        settings=choices,
        sampling=Sampling(12),
        budget=TokenBudget(tokens, lambda text: told.append(text)),
        score=lambda s: torch.linspace(-1.0, 1.0, len(s)),
        ptx=(lambda index: texts_of(backbone, index)) if kind == "ptx" else None,
    )
    told = trainer.told = []
    reader = Reader(backbone, trainer.head, trainer.shared, 1.0, trainer.score)
    prompts = random_prompts(len(LENGTHS), seed=4)
    rollout = reader.read(prompts, answers(LENGTHS, VOCABULARY, EOS), ALL)
    experience = trainer.judge(rollout)
    randomise(backbone, "policy", 2, 0.03)
    randomise(backbone, "value", 5, 0.03)
    return trainer, experience


def texts_of(backbone, index):
    prompts, responses = TEXTS
    turned = responses[index:] + responses[:index]
    return make_sequences(prompts, [*turned[:2], [11 + index] * 9], PAD)


def gradient_of(trainer, experience, tokens):
    trainer._gradients(experience, list(range(len(LENGTHS))), True, tokens)
    trainer.ptx_batches = 0
    return [gradients(group.parameters) for group in trainer.groups]


def same(gradient, reference):
    """Equal to 1e-6 in every entry, where the largest is of the order of a tenth."""
    assert float(reference.abs().max()) > 0.01
    torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adapter", "shared", "ptx"])
@pytest.mark.parametrize("tokens", [ROW_BY_ROW, SOME])
def test_a_ppo_gradient_does_not_depend_on_the_micro_batches(kind, tokens):
    trainer, experience = make_trainer(kind)
    whole = gradient_of(trainer, experience, ALL)
    for split, reference in zip(gradient_of(trainer, experience, tokens), whole, strict=True):
        same(split, reference)


class OwnCount(PpoTrainer):
    """The mutant: each micro-batch is divided by its own number of tokens."""

    def _losses(self, experience, rows, sequences, count):
        own = float(sequences.response_mask.sum())
        return super()._losses(experience, rows, sequences, own)


def test_dividing_by_the_micro_batchs_own_count_is_seen():
    trainer, experience = make_trainer(trainer_class=OwnCount)
    whole = gradient_of(trainer, experience, ALL)
    split = gradient_of(trainer, experience, SOME)
    assert min(distance(s, w) for s, w in zip(split, whole, strict=True)) > 0.1


@pytest.mark.parametrize("kind", ["adapter", "shared", "ptx"])
def test_ppo_metrics_do_not_depend_on_the_micro_batches(kind):
    trainer, experience = make_trainer(kind)
    found = []
    for tokens in (ALL, SOME, ROW_BY_ROW):
        trainer.ptx_batches = 0
        found.append(trainer._gradients(experience, list(range(len(LENGTHS))), True, tokens))
        clear_gradients(trainer.groups)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert found[0]["ppo/clip_fraction"] > 0
    assert found[0]["ppo/ratio_max"] > 1.0


@pytest.mark.parametrize("tokens", [ROW_BY_ROW, ALL])
def test_sequence_mean_is_the_mean_of_each_responses_own_mean(tokens):
    """Row by row the token mean is that row's own mean; their plain mean is the truth."""
    trainer, experience = make_trainer()
    own = []
    for row in range(len(LENGTHS)):
        trainer._gradients(experience, [row], True, ALL)
        own.append(gradients(trainer.groups[0].parameters))
    expected = torch.stack(own).mean(0)
    by_token, _ = gradient_of(trainer, experience, ALL)
    other, experience = make_trainer(loss_aggregation="sequence-mean")
    found, _ = gradient_of(other, experience, tokens)
    same(found, expected)
    assert float((by_token - expected).abs().max()) > 1e-3


def test_the_minibatch_of_ppo_takes_the_rows_it_names():
    """Rows given in another order, or as two halves, make up the same gradient."""
    trainer, experience = make_trainer()
    whole = gradient_of(trainer, experience, ALL)
    counts = torch.tensor(LENGTHS, dtype=torch.float32)
    parts = []
    for rows in ([6, 1, 4, 0], [3, 7, 5, 2]):
        trainer._gradients(experience, rows, True, SOME)
        share = float(counts[rows].sum() / counts.sum())
        parts.append([share * gradients(g.parameters) for g in trainer.groups])
    for first, second, reference in zip(*parts, whole, strict=True):
        same(first + second, reference)


# -- offline stages -----------------------------------------------------------------------------


def ragged(count=9):
    prompts = random_prompts(count, seed=6)
    return [
        (p, a.ids)
        for p, a in zip(
            prompts, answers([1, 9, 4, 12, 2, 7, 3, 5, 6], VOCABULARY, EOS), strict=True
        )
    ]


def sft_trainer(tmp_path, loss=None):
    backbone = small_backbone()
    backbone.adapters.add("sft", LORA)
    randomise(backbone, "sft", 1, 0.05)
    items = ragged()
    task = Task(
        stage="sft",
        lengths=[len(p) + len(r) for p, r in items],
        counts=[len(r) for _, r in items],
        loss=lambda rows: (loss or demonstration_loss)(backbone, [items[i] for i in rows]),
        evaluate=dict,
    )
    return _Trainer(session(None, tmp_path, backbone), Sft(), task)


def reward_trainer(tmp_path):
    backbone = small_backbone()
    backbone.adapters.add("reward", LORA)
    randomise(backbone, "reward", 1, 0.05)
    backbone.adapters.add_head("reward", seed=2)
    items = ragged()
    groups = [
        Group(items[i][0], [items[j][1] for j in own], ranking)
        for i, (own, ranking) in enumerate(
            [
                ((0, 1), ((1,), (0,))),
                ((2, 3, 4), ((0, 1), (2,))),
                ((5, 6, 7, 8), ((3,), (0,), (1, 2))),
            ]
        )
    ]
    made = session(None, tmp_path, backbone)
    task = Task(
        stage="reward",
        lengths=[g.tokens for g in groups],
        counts=[1] * len(groups),
        loss=lambda rows: group_loss(made, [groups[i] for i in rows]),
        evaluate=dict,
    )
    return _Trainer(made, Sft(), task)


@pytest.mark.parametrize("make", [sft_trainer, reward_trainer])
@pytest.mark.parametrize("tokens", [ROW_BY_ROW, SOME])
def test_an_offline_gradient_does_not_depend_on_the_micro_batches(tmp_path, make, tokens):
    trainer = make(tmp_path)
    items = list(range(len(trainer.task.lengths)))
    metrics = trainer._gradients(items, ALL)
    whole = gradients(trainer.groups[0].parameters)
    split_metrics = trainer._gradients(items[::-1], tokens)
    split = gradients(trainer.groups[0].parameters)
    same(split, whole)
    assert split_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_an_offline_loss_that_is_a_mean_is_seen(tmp_path):
    """The mutant: each micro-batch's loss is divided by its own count."""

    def mean(backbone, tokens):
        output = demonstration_loss(backbone, tokens)
        return LossOutput(output.total / output.count, output.count, output.metrics)

    trainer = sft_trainer(tmp_path, mean)
    items = list(range(len(trainer.task.lengths)))
    found = []
    for budget in (ALL, SOME):
        trainer._gradients(items, budget)
        found.append(gradients(trainer.groups[0].parameters))
    assert distance(found[1], found[0]) > 0.1


# -- out of memory ------------------------------------------------------------------------------


def fails_once(backbone, call):
    """Make the backbone's forward number `call` (from 1) run out of memory."""
    forward, calls = backbone.hidden_states, []

    def hidden_states(ids, **kwargs):
        calls.append(ids)
        if len(calls) == call:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(ids, **kwargs)

    backbone.hidden_states = hidden_states
    return calls


@pytest.mark.parametrize(("kind", "call"), [("adapter", 2), ("shared", 1), ("ptx", 1), ("ptx", 3)])
def test_a_ppo_step_out_of_memory_is_done_again_in_halves_with_the_same_gradient(kind, call):
    """Also when it happens after a part of the gradient is there, or inside the ptx batch."""
    trainer, _, expected, expected_metrics = step_that_fails(kind, 0)
    assert (trainer.budget.tokens, trainer.told) == (200, [])
    assert trainer.ptx_batches == (kind == "ptx")
    trainer, told, found, metrics = step_that_fails(kind, call)
    assert trainer.budget.tokens == 100
    assert len(told) == 1
    assert "out of memory: micro-batches halved to 100 tokens" in told[0]
    for again, reference in zip(found, expected, strict=True):
        same(again, reference)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
    assert trainer.ptx_batches == (kind == "ptx"), "the next step reads the next texts"


def step_that_fails(kind, call):
    trainer, experience = make_trainer(kind, tokens=200)
    fails_once(trainer.backbone, call)
    metrics = trainer.budget.retry(
        lambda tokens: trainer._gradients(experience, list(range(len(LENGTHS))), True, tokens),
        lambda: clear_gradients(trainer.groups),
    )
    return trainer, trainer.told, [gradients(g.parameters) for g in trainer.groups], metrics


def test_gradients_left_from_the_failed_attempt_would_be_seen():
    """The mutant: nothing is cleared before the step is done again."""
    trainer, experience = make_trainer(tokens=200)
    whole = gradient_of(trainer, experience, ALL)
    fails_once(trainer.backbone, 2)
    rows = list(range(len(LENGTHS)))
    trainer.budget.retry(lambda t: trainer._gradients(experience, rows, True, t), lambda: None)
    assert distance(gradients(trainer.groups[0].parameters), whole[0]) > 0.1


def test_a_rollout_out_of_memory_is_read_again_with_the_same_numbers(caplog):
    trainer, _ = make_trainer(tokens=200)
    drawn = answers(LENGTHS, VOCABULARY, EOS)
    reader = Reader(trainer.backbone, trainer.head, False, 1.0, trainer.score)
    prompts = random_prompts(len(LENGTHS), seed=4)
    first = reader.read(prompts, drawn, 200)
    fails_once(trainer.backbone, 3)
    again = trainer.budget.retry(lambda t: reader.read(prompts, drawn, t), lambda: None)
    assert "scored in two halves" in caplog.text
    for field in ("logprobs", "ref_logprobs", "values", "scores"):
        torch.testing.assert_close(getattr(again, field), getattr(first, field), rtol=0, atol=1e-5)


def test_an_offline_step_out_of_memory_is_done_again_and_the_user_is_told(tmp_path):
    steps = SimpleNamespace(done=lambda *args, **kwargs: None)
    found = []
    for call in (0, 1):
        trainer = sft_trainer(tmp_path / str(call))
        trainer.session.budget.tokens = 64
        fails_once(trainer.session.backbone, call)
        trainer.step(0, 1, list(range(9)), steps)
        found.append(torch.cat([p.detach().flatten() for p in trainer.groups[0].parameters]))
        told = trainer.session.console.file.getvalue()
        assert ("halved to 32 tokens" in told) == bool(call)
        norms = trainer.session.run.lines("sft/metrics.jsonl")[0]["train/grad_norm"]
        found.append(norms)
    assert found[3] == pytest.approx(found[1], rel=1e-6)
    # Adam's first step is the sign of the gradient: where that is nearly 0 rounding may turn it.
    close = torch.isclose(found[2], found[0], rtol=0, atol=1e-6)
    assert float(close.float().mean()) > 0.999


def test_a_single_row_that_does_not_fit_ends_in_advice():
    def work(tokens):
        tried.append(tokens)
        raise torch.cuda.OutOfMemoryError

    tried, told = [], []
    with pytest.raises(
        HardwareError, match=r"20 tokens.*max_prompt_tokens.*gradient_checkpointing"
    ):
        TokenBudget(80, told.append).retry(work, lambda: None)
    assert tried == [80, 40, 20]
    assert len(told) == 2
