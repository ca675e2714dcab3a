"""Loading, quantisation, the CPU gradient trap, padding and checksums of the backbone."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.errors import ConfigError, HardwareError
from lora_rlhf.model.backbone import Backbone, load_config, pick_device
from lora_rlhf.model.generation import Sampling, generate
from lora_rlhf.recipe import Base
from lora_rlhf.training.rollout import policy_forward
from tests.small import LORA, PAD, model_directory, random_prompts, randomise, small_backbone


def float_reference(backbone):
    """The same adapters over the dequantised weights in plain fp32 linears."""
    dense = small_backbone(quantized=False)
    for name, module in backbone.causal_lm.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = dense.causal_lm.get_submodule(name.replace(".base_layer", ""))
            target.weight.data = weight.float()
    dense.adapters.add("sft", LORA)
    for key, value in backbone.adapters.parameters("sft").items():
        dense.adapters.parameters("sft")[key].data = value.detach().clone()
    return dense


def lora_gradient(backbone):
    sequences = make_sequences(random_prompts(4), [[7, 9, 2]] * 4, PAD)
    with backbone.adapters.use("sft", train=True), backbone.training():
        logprobs, _, _ = policy_forward(backbone, sequences, 1.0)
        logprobs.sum().backward()
    parameters = backbone.adapters.parameters("sft").values()
    flat = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat


def test_lora_gradients_after_a_rollout_equal_a_dequantised_float_reference():
    """bitsandbytes on AVX512-BF16 hosts repacks weights in the first no-grad forward; not here."""
    backbone = small_backbone()
    backbone.adapters.add("sft", LORA)
    randomise(backbone, "sft")
    reference = lora_gradient(float_reference(backbone))
    before = lora_gradient(backbone)
    with backbone.adapters.use("sft"):
        generate(backbone, random_prompts(4), [1, 2, 3, 4], Sampling(5))
        with torch.no_grad():
            backbone.hidden_states(torch.tensor([[1, 5, 9]]))
    after = lora_gradient(backbone)
    for gradient in (before, after):
        cosine = torch.nn.functional.cosine_similarity(gradient, reference, dim=0)
        assert cosine >= 0.9999
        assert abs(float(gradient.norm() / reference.norm()) - 1) < 1e-3
    assert torch.equal(before, after)


def test_the_guard_is_on_every_4bit_layer():
    layers = [m for m in small_backbone().causal_lm.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_without_the_guard_this_host_may_corrupt_gradients():
    """The mutant: where the CPU has the instructions, the trap must show, or the test is blind."""
    backbone = small_backbone(guarded=False)
    layers = [m for m in backbone.causal_lm.modules() if isinstance(m, Linear4bit)]
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack here")
    backbone.adapters.add("sft", LORA)
    randomise(backbone, "sft")
    reference = lora_gradient(float_reference(backbone))
    with torch.no_grad():
        backbone.hidden_states(torch.tensor([[1, 5, 9]]))
    cosine = torch.nn.functional.cosine_similarity(lora_gradient(backbone), reference, dim=0)
    assert cosine < 0.999


@pytest.mark.parametrize(("hidden", "intermediate"), [(56, 100), (40, 172)])
def test_sizes_that_4bit_blocks_do_not_divide_still_work(hidden, intermediate):
    backbone = small_backbone(hidden=hidden, intermediate=intermediate)
    dense = small_backbone(quantized=False, hidden=hidden, intermediate=intermediate)
    for name, module in backbone.causal_lm.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.causal_lm.get_submodule(name).weight.data = weight.float()
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.hidden_states(ids), dense.hidden_states(ids), rtol=1e-4, atol=1e-4
        )
    backbone.adapters.add("sft", LORA)
    with backbone.adapters.use("sft", train=True), backbone.training():
        backbone.hidden_states(ids).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in backbone.adapters.parameters("sft").values())


def test_right_padding_changes_no_real_position():
    backbone = small_backbone()
    short, long = [1, 5, 9], [1, 5, 9, 80, 3, 44, 21]
    alone = make_sequences([short], [[2]], PAD)
    padded = make_sequences([short, long], [[2], [2]], PAD)
    with torch.no_grad():
        one = backbone.hidden_states(alone.input_ids)[0]
        two = backbone.hidden_states(padded.input_ids)[0, :4]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_model_whose_head_caps_its_logits_is_refused(tmp_path):
    from transformers import Gemma2Config

    Gemma2Config(final_logit_softcapping=30.0).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        load_config(str(tmp_path), None)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        Backbone.load(Base(model=str(tmp_path)))


def test_an_unknown_builtin_lists_what_is_built_in():
    with pytest.raises(ConfigError, match="builtin:tiny"):
        Backbone.load(Base(model="builtin:huge"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there_says_so():
    with pytest.raises(HardwareError, match=r"device=auto"):
        pick_device("cuda")


def test_dropout_of_the_base_is_off_for_good():
    backbone = small_backbone()
    model = copy.deepcopy(backbone.causal_lm)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            assert module.attention_dropout == 0.0
    assert model_directory().is_dir()
