"""Adapters for other tools: a plain PEFT directory, or a whole model with the adapter merged in."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from lora_rlhf.data.template import DEFAULT_TEMPLATE, ChatFormat
from lora_rlhf.errors import ConfigError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.card import adapter_card, merged_card
from lora_rlhf.quiet import hush
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run, directory_atomically

_CARD = "README.md"


def export_adapter(
    run: Run, adapter: str, merge: bool, to: Path, console: Console | None = None
) -> None:
    """Write one adapter of a run for other tools, in one atomic step.

    Without `merge`, the PEFT directory of the run with a model card: it loads in plain
    transformers + peft, in vLLM, or in any other host of PEFT adapters. With it, a plain
    transformers model, dequantise(W4) + scale B A for every adapted layer; adapters with a head
    become a sequence classifier whose logit is the raw score.

    Args:
        run: with the adapter in it.
        adapter: sft, reward, policy or value.
        merge: write a whole model.
        to: a directory that does not exist yet, or is empty.
        console: where the user is told what is done and why.

    Raises:
        ConfigError: no such adapter, `to` exists, or transformers has no classifier of this kind.
        CheckpointError: the adapter was made on other weights than the recipe's base has now.
    """
    console = console or Console(highlight=False)
    if adapter not in run.adapters():
        there = ", ".join(run.adapters()) or "none yet"
        raise ConfigError(f"{run.path} has no adapter {adapter}. It has: {there}.")
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise ConfigError(f"{to} exists. Give a directory that does not.")
    recipe = load_recipe(str(run.path / "recipe.yaml"), finished=STAGES)
    if not merge:
        with directory_atomically(to) as making:
            shutil.copytree(run.adapter(adapter), making, dirs_exist_ok=True)
            (making / _CARD).write_text(adapter_card(run, recipe, adapter), encoding="utf-8")
        return
    hush()
    console.print(_reason(recipe), markup=False, soft_wrap=True)
    backbone = Backbone.load(recipe.base)
    backbone.adapters.load(adapter, run.adapter(adapter))
    model = merged_model(backbone, adapter)
    with directory_atomically(to) as making:
        model.save_pretrained(making)
        _save_tokenizer(backbone.format, making)
        if adapter not in backbone.adapters.heads:
            _generation_config(backbone.format, recipe).save_pretrained(making)
        (making / _CARD).write_text(merged_card(run, recipe, adapter), encoding="utf-8")


def _reason(recipe: Recipe) -> str:
    if recipe.base.quantization == "none":
        return f"Merging into the weights of {recipe.base.model}, which the run did not quantise."
    return (
        f"Merging into the dequantised 4-bit weights of {recipe.base.model}, not into its original "
        f"ones: the adapter was trained over the 4-bit weights and makes up for their rounding. On "
        f"the original weights it would be another model than the one that was trained."
    )


# -- merging --------------------------------------------------------------------------------------


def merged_model(backbone: Backbone, adapter: str) -> PreTrainedModel:
    """The adapter folded into the dequantised backbone, as a plain model on the CPU.

    Uses the backbone up: its layers are replaced one by one, so that at no time more than one of
    them is held both in 4 bits and in full.

    Args:
        backbone: with the adapter loaded.
        adapter: one with a head gives a sequence classifier, any other a causal LM.

    Returns:
        A model in the backbone's compute dtype. In fp32 its logits are the adapter's own but for
        rounding; in bf16 the merged weights are rounded once, from a sum taken in fp32.

    Raises:
        ConfigError: a head, but transformers has no sequence classifier for this architecture.
    """
    head = backbone.adapters.heads.get(adapter)
    config = deepcopy(backbone.causal_lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = _empty_model(config, backbone.compute_dtype, classifier=head is not None)
    _merge_in_place(backbone.causal_lm, adapter, backbone.compute_dtype)
    tensors = {key: tensor.cpu() for key, tensor in backbone.causal_lm.state_dict().items()}
    if head is not None:
        trunk = backbone.causal_lm.base_model_prefix + "."
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(trunk)}
        # The score is computed in fp32 here; a host in bf16 rounds its weight.
        tensors["score.weight"] = head.weight.detach().cpu()[None].to(backbone.compute_dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model


def _empty_model(config: Any, dtype: torch.dtype, classifier: bool) -> PreTrainedModel:
    """The model without memory for its weights, and without any trace of quantisation."""
    with torch.device("meta"):
        if not classifier:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
            return model.eval()
        config.num_labels = 1
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        except ValueError as error:
            raise _no_classifier(config) from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise _no_classifier(config)
    return model.eval()


def _no_classifier(config: Any) -> ConfigError:
    return ConfigError(
        f"transformers has no sequence classifier with a score head for {config.model_type} "
        f"models, so this adapter cannot be merged. Export it without --merge."
    )


def _merge_in_place(model: nn.Module, adapter: str, dtype: torch.dtype) -> None:
    """Replace every adapted or quantised layer by a plain one on the CPU."""
    for path in list(_layers_to_replace(model)):
        layer = model.get_submodule(path)
        if isinstance(layer, LoraLayer):
            plain = _merged(layer, adapter)
            layer.base_layer = nn.Identity()  # others still hold the layer; its weights may go
        else:
            plain = _dequantised(layer)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain.to("cpu", dtype))


def _layers_to_replace(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        inner = path.endswith(".base_layer")
        if isinstance(module, LoraLayer) or (isinstance(module, bnb.nn.Linear4bit) and not inner):
            yield path


def _merged(layer: Any, adapter: str) -> nn.Module:
    """The layer's dequantised base with the adapter merged into it, by PEFT's own arithmetic.

    PEFT merges a 4-bit layer only to quantise the sum again, which would round the adapter away;
    so the adapter is moved to a plain layer first, and merged there.
    """
    base = _dequantised(layer.get_base_layer())
    if adapter not in layer.lora_A:
        return base
    config = LoraConfig(
        r=layer.r[adapter],
        lora_alpha=layer.lora_alpha[adapter],
        use_dora=adapter in layer.lora_magnitude_vector,
        lora_bias=layer.lora_bias[adapter],
        target_modules=["linear"],
    )
    box = nn.ModuleDict({"linear": base})
    inject_adapter_in_model(config, box, adapter)
    moved: Any = box["linear"]
    own = {k: v for k, v in layer.state_dict().items() if k.startswith("lora_")}
    own = {k: v for k, v in own.items() if adapter in k.split(".")}
    missing, unexpected = moved.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(key.startswith("base_layer.") for key in missing)
    moved.scaling[adapter] = layer.scaling[adapter]  # of rsLoRA and of patterns, as it was trained
    moved.merge(safe_merge=True, adapter_names=[adapter])
    merged: nn.Module = moved.get_base_layer()
    return merged


def _dequantised(layer: nn.Module) -> nn.Linear:
    """A linear layer as a plain one in fp32 of the same function."""
    assert isinstance(layer, nn.Linear)
    weight: Tensor = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        weight = bnb.functional.dequantize_4bit(weight.data, state)
    plain = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return plain


# -- what stands beside the weights ---------------------------------------------------------------


def _save_tokenizer(chat_format: ChatFormat, directory: Path) -> None:
    """The tokenizer, with the template the run was trained on as its own."""
    tokenizer = chat_format.tokenizer
    if chat_format.mode == "default":
        tokenizer.chat_template = DEFAULT_TEMPLATE
    elif chat_format.mode == "none":
        tokenizer.chat_template = None
    # An ordinary word may serve as padding by its id; made a special token, it would no longer
    # be a word.
    if chat_format.pad_id in tokenizer.added_tokens_decoder:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat_format.pad_id)
    tokenizer.save_pretrained(directory)


def _generation_config(chat_format: ChatFormat, recipe: Recipe) -> GenerationConfig:
    """Samples as the run drew them, ended by every token that ended them there."""
    return GenerationConfig(
        do_sample=True,
        temperature=recipe.ppo.temperature if recipe.ppo is not None else 1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=recipe.data.max_response_tokens,
        eos_token_id=list(chat_format.stop_ids),
        bos_token_id=chat_format.tokenizer.bos_token_id,
        pad_token_id=chat_format.pad_id,
    )
