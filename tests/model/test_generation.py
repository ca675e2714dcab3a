"""The decode loop: its rows are independent, pure samples of what the training forward says."""

from collections import Counter

import pytest
import torch

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.model import generation
from lora_rlhf.model.generation import Sampling, generate, next_tokens
from lora_rlhf.training.rollout import policy_forward
from tests.small import EOS, LORA, PAD, random_prompts, randomise, small_backbone


@pytest.fixture(scope="module")
def backbone():
    made = small_backbone()
    made.adapters.add("sft", LORA)
    randomise(made, "sft")
    return made


def test_greedy_decoding_equals_transformers_generate(backbone):
    """HF's generate, alone a row without padding, is the outside truth."""
    prompts = random_prompts(6, seed=3)
    with backbone.adapters.use("sft"):
        ours = generate(backbone, prompts, [0] * 6, Sampling(12, temperature=0.0))
        for prompt, answer in zip(prompts, ours, strict=True):
            theirs = backbone.causal_lm.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=PAD,
            )
            assert answer.ids == theirs[0, len(prompt) :].tolist()


def test_an_answer_does_not_depend_on_its_batch(backbone):
    prompts, seeds = random_prompts(24, seed=1), list(range(100, 124))
    with backbone.adapters.use("sft"):
        together = generate(backbone, prompts, seeds, Sampling(20), max_rows=24)
        turns = generate(backbone, prompts, seeds, Sampling(20), max_rows=5)
        alone = [
            generate(backbone, [p], [s], Sampling(20))[0]
            for p, s in zip(prompts, seeds, strict=True)
        ]
    assert [a.ids for a in together] == [a.ids for a in turns] == [a.ids for a in alone]
    assert len({len(a.ids) for a in together}) > 3


def test_dropping_finished_rows_changes_no_answer(backbone, monkeypatch):
    prompts, seeds = random_prompts(24, seed=2), list(range(24))
    with backbone.adapters.use("sft"):
        with_compaction = generate(backbone, prompts, seeds, Sampling(20))
        monkeypatch.setattr(generation, "_COMPACT_BELOW", -1.0)
        without = generate(backbone, prompts, seeds, Sampling(20))
    assert [a.ids for a in with_compaction] == [a.ids for a in without]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_when_drawn_equal_those_of_the_training_forward(backbone, temperature):
    """G4, G5, G7: pure samples, the same temperature at sampling and at scoring."""
    prompts = random_prompts(12, seed=4)
    with backbone.adapters.use("sft"):
        answers = generate(backbone, prompts, list(range(12)), Sampling(16, temperature))
        sequences = make_sequences(prompts, [a.ids for a in answers], PAD)
        with torch.no_grad():
            logprobs, _, _ = policy_forward(backbone, sequences, temperature)
    drawn = torch.cat([torch.tensor(a.logprobs) for a in answers])
    torch.testing.assert_close(logprobs[sequences.response_mask], drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mutant", [{"temperature": 0.7}, {"top_p": 0.8}])
def test_the_check_above_rejects_other_samplers(backbone, mutant):
    prompts = random_prompts(12, seed=4)
    with backbone.adapters.use("sft"):
        answers = generate(backbone, prompts, list(range(12)), Sampling(16, **mutant))
        sequences = make_sequences(prompts, [a.ids for a in answers], PAD)
        with torch.no_grad():
            logprobs, _, _ = policy_forward(backbone, sequences, 1.0)
    drawn = torch.cat([torch.tensor(a.logprobs) for a in answers])
    assert (logprobs[sequences.response_mask] - drawn).abs().mean() > 0.02
    assert not Sampling(16, top_p=0.8).is_pure


def test_draws_follow_the_softmax():
    """Frequencies of 40,000 draws against the closed form; chi-square below its 0.1 % point."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0])
    expected = torch.softmax(logits.double() / 0.8, -1)
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn, _ = next_tokens(logits.expand(40_000, -1), uniforms, Sampling(1, temperature=0.8))
    counts = Counter(drawn.tolist())
    statistic = sum(
        (counts[i] - 40_000 * p) ** 2 / (40_000 * p) for i, p in enumerate(expected.tolist()[:4])
    )
    assert statistic < 16.3
    assert counts[4] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniforms = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    drawn, _ = next_tokens(logits.expand(200, -1), uniforms, Sampling(1, top_p=0.7))
    assert set(drawn.tolist()) == {0, 1}


def test_a_stopped_row_ends_with_its_end_token_and_a_cut_one_has_none(backbone):
    with backbone.adapters.use("sft"):
        answers = generate(backbone, random_prompts(32, seed=5), list(range(32)), Sampling(12))
    assert {a.ended for a in answers} == {True, False}
    for answer in answers:
        assert (answer.ids[-1] == EOS) == answer.ended
        assert EOS not in answer.ids[:-1]
        assert answer.ended or len(answer.ids) == 12


def test_a_callback_sees_every_token_and_can_stop_a_row(backbone):
    seen: dict[int, list[int]] = {}

    def watch(row, token):
        seen.setdefault(row, []).append(token)
        return row == 1 and len(seen[row]) == 3

    prompts = random_prompts(4, seed=6)
    with backbone.adapters.use("sft"):
        full = generate(backbone, prompts, [7, 8, 9, 10], Sampling(10))
        answers = generate(
            backbone, prompts, [7, 8, 9, 10], Sampling(10), max_rows=3, on_token=watch
        )
    assert all(seen[i] == answers[i].ids for i in range(4))
    assert len(answers[1].ids) <= 3
    assert not answers[1].ended or len(full[1].ids) <= 3
    for i in (0, 2, 3):
        assert answers[i].ids == full[i].ids


def test_generation_changes_no_mode_or_flag(backbone):
    before = {k: p.requires_grad for k, p in backbone.causal_lm.named_parameters()}
    with backbone.adapters.use("sft"):
        generate(backbone, random_prompts(2), [1, 2], Sampling(4))
    assert {k: p.requires_grad for k, p in backbone.causal_lm.named_parameters()} == before
    assert not backbone.causal_lm.training


def test_generation_in_training_mode_is_refused(backbone):
    with backbone.training(), pytest.raises(AssertionError, match="evaluation mode"):
        generate(backbone, [[1]], [0], Sampling(1))
