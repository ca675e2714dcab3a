"""Our SFT loss against the loss that a Hugging Face causal LM gives for labels."""

import pytest
import torch

from lora_rlhf.losses.logprobs import token_logprobs
from lora_rlhf.losses.sft import sft_loss
from tests.losses.checks import close, ragged_mask

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def test_loss_and_gradient_equal_those_of_a_llama_with_labels(model):
    g = torch.Generator().manual_seed(1)
    prompt_lengths, lengths = torch.tensor([3, 5, 2]), torch.tensor([9, 7, 4])
    live = ragged_mask(lengths.tolist(), 9)
    input_ids = torch.randint(1, 53, (3, 9), generator=g).masked_fill(~live, 0)
    in_response = live & (torch.arange(9) >= prompt_lengths.unsqueeze(1))
    labels = input_ids.masked_fill(~in_response, -100)
    inner = model.get_input_embeddings()(input_ids)

    theirs = inner.clone().requires_grad_()
    loss = model(inputs_embeds=theirs, attention_mask=live.long(), labels=labels).loss

    ours = inner.clone().requires_grad_()
    hidden = model.model(inputs_embeds=ours, attention_mask=live.long()).last_hidden_state
    # The hidden state at t predicts the token at t + 1.
    mask = in_response[:, 1:]
    logprobs, _ = token_logprobs(
        hidden[:, :-1][mask], model.lm_head.weight, input_ids[:, 1:][mask], chunk=4
    )
    out = sft_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool))

    assert int(out.count) == 6 + 2 + 2
    close(out.means()["loss"], loss.detach().double())
    (gradient,) = torch.autograd.grad(out.total / out.count, ours)
    close(gradient, torch.autograd.grad(loss, theirs)[0].double())


def test_logprobs_of_padded_positions_add_nothing(model):
    """The same through a mask instead of a selection."""
    g = torch.Generator().manual_seed(2)
    input_ids = torch.randint(1, 53, (2, 6), generator=g)
    mask = ragged_mask([5, 2], 5)
    hidden = model.model(input_ids).last_hidden_state[:, :-1]
    targets = input_ids[:, 1:]
    flat, _ = token_logprobs(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())
    out = sft_loss(flat.unflatten(0, (2, 5)), mask)
    labels = torch.cat([input_ids[:, :1], targets.masked_fill(~mask, -100)], dim=1)
    loss = model(input_ids, labels=labels).loss
    close(out.means()["loss"], loss.double())
