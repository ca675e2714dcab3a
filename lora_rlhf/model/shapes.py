"""The shape of a base model, from its config alone: nothing is loaded or allocated."""

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_rlhf.errors import ConfigError
from lora_rlhf.model.backbone import load_config, resolve_source
from lora_rlhf.recipe import Base, Lora

# hub organisation -> name -> (model_type, hidden, intermediate, layers, query heads, key-value
# heads, head_dim, vocabulary rows, tied embeddings), from each model's published config.json, so
# that a plan needs no network. A derived model (-Instruct, -Base) has the shape of its stem.
_QWEN3 = {
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
}
_QWEN2_5 = {
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
}
_LLAMA = {
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
_SMOL = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, 64, 49152, True),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
    "SmolLM3-3B": ("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, True),
}
_MISTRAL = {
    "Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
    "Mistral-7B-Instruct-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
}
KNOWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "Qwen": _QWEN3 | _QWEN2_5,
    "meta-llama": _LLAMA,
    "HuggingFaceTB": _SMOL,
    "mistralai": _MISTRAL,
    "unsloth": _QWEN3 | _QWEN2_5 | _LLAMA | _SMOL,
}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Shape:
    """What the memory arithmetic needs to know of a causal language model.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        layers: number of decoder layers.
        vocabulary: rows of the embedding.
        query: query heads times head width.
        key_value: key-value heads times head width.
        normalises_queries: whether queries and keys pass a norm of their own (Qwen3).
        linears: elements of each linear layer but the output head.
        other: all other parameters, tied ones once: embeddings, head, norms, biases.
        adapter: trainable parameters of one adapter.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    query: int
    key_value: int
    normalises_queries: bool
    linears: tuple[int, ...]
    other: int
    adapter: int

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(self.linears) + self.other


def base_config(base: Base) -> Any:
    """The config of a recipe's base: its files, else the table above, else the hub.

    Raises:
        ConfigError: no such model, or one that this project cannot train.
    """
    source, revision = resolve_source(base)
    known = None if _is_at_hand(source, revision) else known_config(source)
    return load_config(source, revision) if known is None else known


def _is_at_hand(source: str, revision: str | None) -> bool:
    if Path(source).is_dir():
        return True
    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:
        return False  # not a possible hub id; load_config says so in the user's words
    return isinstance(cached, str)


def known_config(hub_id: str) -> Any | None:
    """The config of a model in the table, by hub id; None for any other.

    `-Instruct`, `-Base` and the like share the shape of their stem: Qwen/Qwen3-4B-Instruct-2507
    is Qwen3-4B.
    """
    organisation, _, name = hub_id.partition("/")
    for stem, (model_type, *numbers) in KNOWN.get(organisation, {}).items():
        plain = name.removeprefix("Meta-")
        if plain == stem or plain.startswith(stem + "-"):
            return AutoConfig.for_model(model_type, **dict(zip(_FIELDS, numbers, strict=True)))
    return None


def read_shape(config: Any, lora: Lora) -> Shape:
    """The shape of the model a config describes, counted on the meta device.

    The adapter is counted by PEFT itself, so that names and DoRA mean here what they mean in
    training.

    Raises:
        ConfigError: the target modules name nothing in the model.
    """
    return _count(cast(Hashable, type(config)), config.to_json_string(use_diff=False), lora)


@lru_cache(maxsize=32)
def _count(config_class: Hashable, config_json: str, lora: Lora) -> Shape:
    assert isinstance(config_class, type)
    config = config_class.from_dict(json.loads(config_json))  # type: ignore[attr-defined]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # making the weights empty has untied them
    head = model.get_output_embeddings()
    linears = tuple(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    total = sum(p.numel() for p in model.parameters())
    normalises_queries = any(name.endswith(".q_norm") for name, _ in model.named_modules())
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        query=text.num_attention_heads * head_dim,
        key_value=key_value_heads * head_dim,
        normalises_queries=normalises_queries,
        linears=linears,
        other=total - sum(linears),
        adapter=_adapter_parameters(model, lora),
    )


def _adapter_parameters(model: nn.Module, lora: Lora) -> int:
    """Trainable parameters of one adapter; puts PEFT's layers into `model`."""
    targets: str | list[str] = "all-linear"
    if lora.target_modules != "all-linear":
        named = lora.target_modules
        targets = [named] if isinstance(named, str) else list(named)
    settings = LoraConfig(r=lora.rank, target_modules=targets, use_dora=lora.use_dora)
    try:
        inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
