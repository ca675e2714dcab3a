"""The traps of one shared backbone, each measured to fail silently with plain PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.recipe import Lora
from lora_rlhf.training.rollout import score_forward
from tests.small import LORA, PAD, load_model, model_directory, randomise, small_backbone

IDS = torch.tensor([[1, 5, 9, 33, 7, 60], [1, 80, 4, 4, 17, 2]])


def backbone_with_roles(**options):
    backbone = small_backbone(**options)
    backbone.adapters.add("sft", LORA)
    randomise(backbone, "sft", 1)
    backbone.adapters.copy("sft", "policy")
    backbone.adapters.copy("sft", "value")
    randomise(backbone, "value", 2)
    return backbone


def flags(backbone):
    return {k: p.requires_grad for k, p in backbone.causal_lm.named_parameters()}


def test_use_restores_the_active_adapter_and_every_requires_grad_flag():
    backbone = backbone_with_roles()
    before = flags(backbone)
    with backbone.adapters.use("policy", train=True):
        inside = flags(backbone)
        assert backbone.adapters.active == "policy"
        with backbone.adapters.use("sft"):
            assert not any(flags(backbone).values())
        assert flags(backbone) == inside
    assert flags(backbone) == before
    assert backbone.adapters.active is None
    assert {k for k, on in inside.items() if on} == set(backbone.adapters.parameters("policy"))


def test_use_restores_after_an_exception():
    backbone = backbone_with_roles()
    before = flags(backbone)
    with pytest.raises(RuntimeError, match="inside"), backbone.adapters.use("value", train=True):
        raise RuntimeError("inside")
    assert flags(backbone) == before
    assert backbone.adapters.active is None


def test_peft_itself_makes_a_frozen_adapter_trainable():
    """The reason for the switch: if PEFT ever mends this, the switch may be simplified."""
    backbone = backbone_with_roles()
    for layer in backbone.adapters._layers:
        layer.set_adapter("sft")
    assert any(p.requires_grad for p in backbone.adapters.parameters("sft").values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_role_are_its_own_in_its_block(checkpointing):
    """Policy and value in turns give each the gradient it has alone, with checkpointing too."""
    backbone = backbone_with_roles()

    def backward(name):
        with backbone.adapters.use(name, train=True), backbone.training():
            backbone.hidden_states(IDS).square().sum().backward()

    def gradient_of_policy(*then):
        backward("policy")
        for name in then:
            backward(name)
        found = {k: p.grad.clone() for k, p in backbone.adapters.parameters("policy").items()}
        for parameter in backbone.causal_lm.parameters():
            parameter.grad = None
        return found

    alone = gradient_of_policy()
    backbone.gradient_checkpointing = checkpointing
    together = gradient_of_policy("value")
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-6)
    assert sum(float(v.abs().sum()) for v in alone.values()) > 0


def test_backward_outside_the_block_loses_the_gradient():
    """The mutant of the test above: the same forward, its backward one block too late."""
    backbone = backbone_with_roles()
    with backbone.adapters.use("policy", train=True):
        loss = backbone.hidden_states(IDS).square().sum()
    with backbone.adapters.use("value", train=True):
        loss = loss + backbone.hidden_states(IDS).square().sum()
    policy = backbone.adapters.parameters("policy")
    try:
        loss.backward()
    except RuntimeError:
        return
    lost = any(p.grad is None or not p.grad.abs().sum() for p in policy.values())
    assert lost or not any(p.requires_grad for p in policy.values())


def test_a_copy_computes_bit_for_bit_what_its_source_does():
    backbone = backbone_with_roles()
    with torch.no_grad(), backbone.adapters.use("sft"):
        reference = backbone.hidden_states(IDS)
    with torch.no_grad(), backbone.adapters.use("policy"):
        policy = backbone.hidden_states(IDS)
    with torch.no_grad(), backbone.adapters.use("value"):
        other = backbone.hidden_states(IDS)
    with torch.no_grad(), backbone.adapters.use(None):
        base = backbone.hidden_states(IDS)
    assert torch.equal(reference, policy)
    assert not torch.allclose(reference, other)
    assert not torch.allclose(reference, base)


def test_no_adapter_in_use_is_the_plain_base_bit_for_bit():
    backbone = backbone_with_roles()
    plain = small_backbone()
    with torch.no_grad():
        assert torch.equal(backbone.hidden_states(IDS), plain.hidden_states(IDS))


def test_training_an_adapter_leaves_the_base_and_all_others_as_they_were():
    backbone = backbone_with_roles()
    checksum = backbone.checksum()
    kept = {
        n: [p.clone() for p in backbone.adapters.parameters(n).values()] for n in ("sft", "value")
    }
    policy = list(backbone.adapters.parameters("policy").values())
    optimizer = torch.optim.AdamW(policy, lr=0.1)
    for _ in range(3):
        with backbone.adapters.use("policy", train=True), backbone.training():
            backbone.hidden_states(IDS).square().sum().backward()
        optimizer.step()
    assert backbone.checksum() == checksum
    for name, tensors in kept.items():
        for now, then in zip(backbone.adapters.parameters(name).values(), tensors, strict=True):
            assert torch.equal(now, then)


def test_the_checksum_sees_one_changed_scale_of_one_weight():
    backbone = backbone_with_roles()
    before = backbone.checksum()
    weight = next(p for p in backbone.causal_lm.parameters() if hasattr(p, "quant_state"))
    weight.quant_state.absmax[0] += 1
    assert backbone.checksum() != before


def test_dropout_of_sft_acts_in_training_alone_and_never_after_it_is_frozen():
    backbone = small_backbone()
    backbone.adapters.add("sft", Lora(rank=4, alpha=8.0, dropout=0.5))
    randomise(backbone, "sft")

    def differ():
        with torch.no_grad(), backbone.adapters.use("sft"), backbone.training():
            return not torch.equal(backbone.hidden_states(IDS), backbone.hidden_states(IDS))

    assert differ()
    backbone.adapters.copy("sft", "policy")
    backbone.adapters.freeze("sft")
    assert not differ()
    with torch.no_grad(), backbone.adapters.use("policy"), backbone.training():
        assert torch.equal(backbone.hidden_states(IDS), backbone.hidden_states(IDS))


def test_training_mode_and_checkpointing_end_with_the_block():
    backbone = backbone_with_roles()
    backbone.gradient_checkpointing = True
    with backbone.training():
        assert backbone.causal_lm.training
        assert checkpointed_layers(backbone)
    assert not backbone.causal_lm.training
    assert not checkpointed_layers(backbone)


def checkpointed_layers(backbone):
    return [m for m in backbone.trunk.modules() if getattr(m, "gradient_checkpointing", False)]


# -- files --------------------------------------------------------------------------------------


def saved_reward(backbone, tmp_path):
    backbone.adapters.copy("sft", "reward")
    randomise(backbone, "reward", 5)
    head = backbone.adapters.add_head("reward", seed=3)
    head.normalise(mean=0.7, spread=2.0)
    backbone.adapters.save("reward", tmp_path / "reward", role="reward", stage="reward")
    return head


def test_a_saved_adapter_comes_back_bit_for_bit_with_its_head(tmp_path):
    backbone = backbone_with_roles()
    saved_reward(backbone, tmp_path)
    other = small_backbone()
    other.adapters.load("reward", tmp_path / "reward")
    for name, value in backbone.adapters.parameters("reward").items():
        assert torch.equal(other.adapters.parameters("reward")[name], value)
    for mine, theirs in zip(
        backbone.adapters.heads["reward"].state_dict().values(),
        other.adapters.heads["reward"].state_dict().values(),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_an_adapter_of_another_backbone_is_refused_in_a_sentence_that_names_both(tmp_path):
    backbone = backbone_with_roles()
    backbone.adapters.save("sft", tmp_path / "sft", role="sft", stage="sft")
    facts = json.loads((tmp_path / "sft/lora_rlhf.json").read_text())
    facts["fingerprint"] |= {"model": "another/model", "weights": "w1"}
    (tmp_path / "sft/lora_rlhf.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"another/model.*small.*weights"):
        small_backbone().adapters.load("sft", tmp_path / "sft")


def test_an_adapter_whose_tensors_do_not_fit_is_refused(tmp_path):
    backbone = backbone_with_roles()
    backbone.adapters.save("sft", tmp_path / "sft", role="sft", stage="sft")
    with pytest.raises(CheckpointError, match="do not fit"):
        small_backbone(hidden=32, intermediate=64).adapters.load("sft", tmp_path / "sft")


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not an adapter"):
        small_backbone().adapters.load("sft", tmp_path)


def test_a_target_that_names_no_layer_lists_those_that_do():
    with pytest.raises(ConfigError, match=r"wq.*q_proj"):
        small_backbone().adapters.add("sft", Lora(target_modules=("wq",)))


def test_reward_scores_equal_those_of_plain_transformers_and_peft(tmp_path):
    """The saved reward adapter under AutoModelForSequenceClassification: raw scores to 1e-4."""
    backbone = backbone_with_roles()
    head = saved_reward(backbone, tmp_path)
    prompts, responses = [[1, 5, 9], [1, 80]], [[33, 7, 2], [4, 17, 60, 2]]
    sequences = make_sequences(prompts, responses, PAD)
    with torch.no_grad(), backbone.adapters.use("reward"):
        ours = score_forward(backbone, sequences, head, raw=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model_directory(),
        num_labels=1,
        dtype=torch.float32,
        quantization_config=load_model(model_directory()).config.quantization_config,
    )
    from lora_rlhf.model.backbone import guard_cpu_kernels

    guard_cpu_kernels(classifier)
    peft = PeftModel.from_pretrained(classifier, tmp_path / "reward").eval()
    mask = torch.arange(sequences.input_ids.shape[1])[None] < sequences.lengths[:, None]
    with torch.no_grad():
        theirs = peft(input_ids=sequences.input_ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    assert abs(float(ours[0] - ours[1])) > 1e-2


def test_a_sequence_classifier_trained_elsewhere_loads_with_the_same_scores(tmp_path):
    """The other way: plain PEFT saves a SEQ_CLS adapter, we load it."""
    from peft import LoraConfig, get_peft_model

    classifier = AutoModelForSequenceClassification.from_pretrained(
        model_directory(), num_labels=1, dtype=torch.float32
    )
    classifier.config.pad_token_id = PAD
    peft = get_peft_model(
        classifier, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft.save_pretrained(tmp_path / "theirs")
    backbone = small_backbone(quantized=False)
    backbone.adapters.load("reward", tmp_path / "theirs")
    sequences = make_sequences([[1, 5, 9], [1, 80]], [[33, 7, 2], [4, 17, 60, 2]], PAD)
    with torch.no_grad(), backbone.adapters.use("reward"):
        ours = score_forward(backbone, sequences, backbone.adapters.heads["reward"], raw=True)
    mask = torch.arange(sequences.input_ids.shape[1])[None] < sequences.lengths[:, None]
    with torch.no_grad():
        theirs = peft.eval()(input_ids=sequences.input_ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
