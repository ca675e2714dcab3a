"""The one frozen model that every role shares, loaded once."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from lora_rlhf.data.template import ChatFormat
from lora_rlhf.errors import ConfigError, HardwareError
from lora_rlhf.model.adapters import Adapters
from lora_rlhf.model.fingerprint import Fingerprint, hash_weights
from lora_rlhf.recipe import Base

_HEAD_ARITHMETIC = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Backbone:
    """A frozen causal language model, its tokenizer and the adapters on it.

    Attributes:
        causal_lm: the transformers model; its parameters never train.
        trunk: `causal_lm` without its head: ids -> hidden states.
        tokenizer: the model's own.
        format: how prompts and responses become ids, the same in every stage.
        adapters: every role's adapter and scalar head.
        device: where all of it lies.
        compute_dtype: of matrix products; adapters and heads in training are fp32.
        fingerprint: what an adapter must agree with to be loaded.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: Any,
        chat_format: ChatFormat,
        fingerprint: Fingerprint,
        device: torch.device,
        compute_dtype: torch.dtype,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.format = chat_format
        self.fingerprint = fingerprint
        self.device = device
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.causal_lm.requires_grad_(False)
        self.causal_lm.eval()
        _remove_dropout(self.causal_lm)
        self.adapters = Adapters(self.causal_lm, fingerprint, compute_dtype)
        # Rows that fitted when decoding last ran out of memory; None: it never has.
        self.rows_that_fit: int | None = None

    @classmethod
    def load(cls, base: Base) -> "Backbone":
        """Load the model a recipe's `base` names: local directory, hub id or builtin:tiny.

        Raises:
            ConfigError: no such model, or one whose output head is not a plain linear map.
            DataError: a pad token equal to EOS.
            HardwareError: cuda asked for where there is none.
        """
        device = pick_device(base.device)
        compute_dtype = pick_dtype(base.dtype, device)
        source, revision = resolve_source(base)
        config = load_config(source, revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        causal_lm = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=compute_dtype,
            device_map={"": device},
            **_quantization(base, compute_dtype),
        )
        guard_cpu_kernels(causal_lm)
        require_plain_head(causal_lm, source)
        chat_format = ChatFormat(
            tokenizer,
            base.chat_template,
            base.pad_token,
            extra_stop_ids=_generation_stops(causal_lm),
        )
        causal_lm.config.pad_token_id = chat_format.pad_id
        fingerprint = Fingerprint(
            model=base.model,
            weights=hash_weights(source, revision),
            quantization=base.quantization,
            template=chat_format.sha256[:16],
        )
        return cls(causal_lm, tokenizer, chat_format, fingerprint, device, compute_dtype)

    # -- parts ----------------------------------------------------------------------------------

    @property
    def trunk(self) -> nn.Module:
        """The model without its language-model head."""
        trunk = self.causal_lm.base_model
        assert isinstance(trunk, nn.Module)
        return trunk

    @property
    def head_weight(self) -> Tensor:
        """The frozen language-model head, (v, d)."""
        weight = self.causal_lm.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        """Its bias, (v,), where the model has one."""
        return getattr(self.causal_lm.get_output_embeddings(), "bias", None)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.head_weight.shape[1]

    def hidden_states(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Last hidden states, (b, t, d), of right-padded ids under the active adapter.

        No mask is given: with causal attention a real token never sees the padding to its right,
        and attention without a mask takes the fast kernels.
        """
        with self.autocast():
            output = self.trunk(input_ids=input_ids, use_cache=False, **kwargs)
        hidden = output.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    # -- modes ----------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products over fp32 adapters on a GPU; nothing in fp32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode, with activation checkpointing where it is set; evaluation mode after.

        transformers checkpoints in training mode alone, and generation must do neither: outside
        of this block the model is always in evaluation mode without checkpointing.
        """
        was_training = self.causal_lm.training
        self.causal_lm.train()
        if self.gradient_checkpointing:
            _checkpointing(self.causal_lm, "enable")({"use_reentrant": False})
        try:
            yield
        finally:
            if self.gradient_checkpointing:
                _checkpointing(self.causal_lm, "disable")()
            self.causal_lm.train(was_training)

    # -- proof ----------------------------------------------------------------------------------

    def checksum(self) -> str:
        """SHA-256 of every frozen weight as it lies in memory, 4-bit codes and scales included."""
        digest = hashlib.sha256()
        # PEFT renames the layers it wraps, which changes no weight.
        named = {k.replace(".base_layer.", "."): p for k, p in self.causal_lm.named_parameters()}
        for name, parameter in sorted(named.items()):
            if self.adapters.owns(name):
                continue
            digest.update(name.encode())
            digest.update(_bytes(parameter))
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                for key, tensor in sorted(state.as_dict(packed=True).items()):
                    digest.update(key.encode())
                    digest.update(_bytes(tensor))
        return digest.hexdigest()


def _checkpointing(model: PreTrainedModel, what: str) -> Callable[..., None]:
    """Transformers' switch by its new name (5.23) or its old one (5.17)."""
    name = f"activation_checkpointing_{what}"
    switch: Callable[..., None] = getattr(model, name, None) or getattr(
        model, f"gradient_checkpointing_{what}"
    )
    return switch


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def pick_device(wanted: str) -> torch.device:
    """Auto takes a GPU when there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise HardwareError(
            "base.device is cuda, but torch sees no CUDA device. Set base.device=auto, or run "
            "`lora-rlhf doctor` to see what is missing."
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU that computes in it, fp32 elsewhere (fp16 would need loss scaling)."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_source(base: Base) -> tuple[str, str | None]:
    """Where the files of `base.model` lie: (directory or hub id, revision)."""
    if base.model == "builtin:tiny":
        from lora_rlhf.tiny import BASE_PATH

        return str(BASE_PATH), None
    if base.model.startswith("builtin:"):
        raise ConfigError(
            f"base.model: {base.model} is not built in. Built in: builtin:tiny. Or give a local "
            f"directory or a hub id."
        )
    looks_local = base.model.startswith((".", "/", "~"))
    directory = Path(base.model).expanduser()
    if looks_local and not (directory / "config.json").is_file():
        raise ConfigError(
            f"base.model: {base.model} is not a directory with a config.json. Give a directory in "
            f"the Hugging Face layout, a hub id such as Qwen/Qwen3-0.6B, or builtin:tiny."
        )
    return (str(directory), None) if directory.is_dir() else (base.model, base.revision)


def load_config(source: str, revision: str | None) -> Any:
    """The model's config, refused where log-probabilities would not be plain softmax.

    Raises:
        ConfigError: the config cannot be had, or the head scales or caps its logits.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except OSError as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"base.model: {source} cannot be loaded ({first}). Check the id and the network, or "
            f"give the directory of a downloaded model."
        ) from error
    text = config.get_text_config()
    for field in _HEAD_ARITHMETIC:
        if getattr(text, field, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"base.model: {source} sets {field}, so its logits are not hidden @ head. Such "
                f"models are not supported; use one without it (Llama, Qwen, Mistral, Phi, ...)."
            )
    kinds = set(getattr(text, "layer_types", None) or ())
    odd = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if odd:
        raise ConfigError(
            f"base.model: {source} has layers of kind {', '.join(sorted(odd))}, whose state the "
            f"decode loop does not keep. Use a model of attention layers alone (Llama, Qwen3, "
            f"Mistral, Phi, ...)."
        )
    return config


@torch.no_grad()
def require_plain_head(causal_lm: PreTrainedModel, source: str) -> None:
    """Refuse a model whose logits are not hidden @ head, by whatever name it changes them.

    Raises:
        ConfigError: log-probabilities read off the hidden states would not be the model's own.
    """
    ids = torch.tensor([[0, 1, 2, 3]], device=causal_lm.device)
    logits = causal_lm(input_ids=ids, use_cache=False).logits
    trunk = causal_lm.base_model
    assert isinstance(trunk, nn.Module)
    plain = causal_lm.get_output_embeddings()(trunk(input_ids=ids, use_cache=False)[0])
    if not torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"base.model: {source} changes its logits after the head, so its probabilities cannot "
            f"be read off its hidden states. Use a model that does not (Llama, Qwen, Mistral, ...)."
        )


def guard_cpu_kernels(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking CPU weights, which silently breaks LoRA gradients.

    On CPUs with AVX512-BF16 the first forward without gradients repacks the 4-bit weights for
    good, and every later backward through them is wrong with no error raised.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization(base: Base, compute_dtype: torch.dtype) -> dict[str, Any]:
    if base.quantization == "none":
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": settings}


def _generation_stops(causal_lm: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(causal_lm, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _remove_dropout(model: nn.Module) -> None:
    """Dropout of the frozen base off for good; only an adapter's own path may drop (G6)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
