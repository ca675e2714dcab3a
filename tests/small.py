"""A small random Llama in NF4 as a Backbone: real layers, no download, milliseconds a forward."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_rlhf.model.backbone import Backbone, guard_cpu_kernels
from lora_rlhf.model.fingerprint import Fingerprint
from lora_rlhf.recipe import Lora

VOCABULARY, PAD, EOS, BOS = 96, 0, 2, 1
LORA = Lora(rank=4, alpha=8.0)


@cache
def model_directory(hidden: int = 64, intermediate: int = 128, seed: int = 0) -> Path:
    """A random Llama saved in the Hugging Face layout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.2,  # logits far from uniform, so that wrong ones show
    )
    directory = Path(mkdtemp(prefix="small-llama-"))
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def load_model(directory: Path, quantized: bool = True) -> torch.nn.Module:
    """The plain transformers model, NF4 with double quantisation or fp32."""
    settings = {}
    if quantized:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings)


def small_backbone(quantized: bool = True, guarded: bool = True, **shape: int) -> Backbone:
    """A Backbone around it, with the format fields that generation reads."""
    model = load_model(model_directory(**shape), quantized)
    if guarded:
        guard_cpu_kernels(model)
    chat_format = SimpleNamespace(pad_id=PAD, stop_ids=(EOS,), end_id=EOS)
    fingerprint = Fingerprint("small", "w0", "nf4" if quantized else "none", "t0")
    return Backbone(
        model,
        None,
        chat_format,
        fingerprint,
        torch.device("cpu"),
        torch.float32,  # type: ignore[arg-type]
    )


def randomise(backbone: Backbone, name: str, seed: int = 0, scale: float = 0.1) -> None:
    """Give an adapter (and its head) weights that matter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.adapters.parameters(name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def random_prompts(
    count: int, seed: int = 0, shortest: int = 2, longest: int = 9
) -> list[list[int]]:
    """Prompts of varied length, BOS first."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    return [
        [BOS, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()]
        for n in lengths
    ]
