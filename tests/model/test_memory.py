"""The memory plan against storage, PEFT, autograd, published numbers and itself."""

import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from lora_rlhf.errors import ConfigError, HardwareError
from lora_rlhf.losses.logprobs import default_chunk, token_logprobs
from lora_rlhf.model import memory
from lora_rlhf.model.footprint import GIB, Card, Footprint, nf4_bytes
from lora_rlhf.model.generation import Sampling, next_tokens
from lora_rlhf.model.memory import measure_phase, memory_report, plan
from lora_rlhf.model.shapes import KNOWN, base_config, known_config, read_shape
from lora_rlhf.recipe import Base, Data, Lora, Ppo, Rank, Recipe, Reward, Sft

ROOT = Path(__file__).parents[2]
LLAMA_8B = "meta-llama/Llama-3.1-8B"


def recipe(model: str = LLAMA_8B, **sections: Any) -> Recipe:
    base = Base(model=model, **sections.pop("base", {}))
    data = Data(max_prompt_tokens=256, max_response_tokens=sections.pop("response", 256))
    defaults: dict[str, Any] = {"sft": Sft(), "reward": Reward(), "ppo": Ppo()}
    return Recipe(name="test", base=base, data=data, **(defaults | sections))


def footprint(of: Recipe, gib: float = 24.0, width: int = 2) -> Footprint:
    shape = read_shape(base_config(of.base), of.lora)
    return Footprint(of, shape, Card("test", gib, True, width))


# -- storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (172, 64), (1024, 768), (96, 40)])
def test_nf4_bytes_are_those_of_a_quantised_layer(rows: int, columns: int) -> None:
    layer = Linear4bit(columns, rows, bias=False, compress_statistics=True, quant_type="nf4").to(
        "cpu"
    )
    state = layer.weight.quant_state
    held = [layer.weight.data, *state.as_dict(packed=False).values()]
    stored = sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
    # as_dict turns the fp32 offset of the scales into a Python number.
    assert nf4_bytes(rows * columns) == stored + state.offset.nbytes


def test_nf4_takes_4_127_bit_an_element() -> None:
    assert 8 * nf4_bytes(2**30) / 2**30 == pytest.approx(4.127, abs=5e-4)


# -- shapes --------------------------------------------------------------------------------------

PUBLISHED = {  # parameters as the hub's pages state them, counted from the published weights
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}


def test_every_known_model_has_its_published_size() -> None:
    known = {f"{owner}/{n}" for owner, names in KNOWN.items() if owner != "unsloth" for n in names}
    assert known == set(PUBLISHED)
    for hub_id, parameters in PUBLISHED.items():
        assert read_shape(known_config(hub_id), Lora()).parameters == parameters, hub_id


def test_another_family_is_read_too() -> None:
    """GPT-2 small: 124,439,808 published parameters, 4 maps a layer that are no nn.Linear."""
    shape = read_shape(AutoConfig.for_model("gpt2"), Lora(target_modules=("c_attn",)))
    assert shape.parameters == 124_439_808
    assert len(shape.linears) == 4 * 12
    assert (shape.intermediate, shape.query, shape.key_value) == (3072, 768, 768)
    assert shape.adapter == 12 * 16 * (768 + 3 * 768)


def test_derived_names_share_the_shape_of_their_stem() -> None:
    stem = known_config("Qwen/Qwen3-4B")
    for name in ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Base", "unsloth/Qwen3-4B"):
        assert known_config(name).to_dict() == stem.to_dict()
    for name in ("Qwen/Qwen3-4Bx", "someone/Qwen3-4B", "Qwen3-4B", "Qwen/Qwen3-30B-A3B"):
        assert known_config(name) is None


def test_a_known_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    assert base_config(Base(model="Qwen/Qwen3-0.6B-Base")).hidden_size == 1024


def tiny_config(kind: str = "llama", layers: int = 3, width: int = 128) -> Any:
    return AutoConfig.for_model(
        kind,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 2,
        vocab_size=512,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize(
    "lora",
    [Lora(rank=4), Lora(rank=8, target_modules=("q_proj", "down_proj")), Lora(use_dora=True)],
)
def test_adapter_parameters_are_those_of_a_real_peft_model(lora: Lora) -> None:
    targets = lora.target_modules
    settings = LoraConfig(
        r=lora.rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    real = get_peft_model(AutoModelForCausalLM.from_config(tiny_config()), settings)
    trainable = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert read_shape(tiny_config(), lora).adapter == trainable


def test_adapter_parameters_follow_the_closed_form() -> None:
    """L r [(h+q) + 2(h+k) + (q+h) + 3(h+I)] with h 128, q 256, k 128, I 384."""
    h, q, k, i = 128, 256, 128, 384
    expected = 3 * 16 * ((h + q) + 2 * (h + k) + (q + h) + 3 * (h + i))
    assert read_shape(tiny_config(), Lora(rank=16)).adapter == expected


def test_a_target_that_names_nothing_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        read_shape(tiny_config(), Lora(target_modules=("no_such_proj",)))


@pytest.mark.parametrize(
    ("model", "nf4", "embeddings", "adapter", "cache_kib"),
    [
        (LLAMA_8B, 3.35, 1.96, 41.9, 128),
        ("Qwen/Qwen2.5-7B", 3.14, 2.03, 40.4, 56),
        ("meta-llama/Llama-3.2-3B", 1.35, 0.73, 24.3, 112),
        ("Qwen/Qwen2.5-1.5B", 0.63, 0.43, 18.5, 28),
    ],
)
def test_terms_of_well_known_models(
    model: str, nf4: float, embeddings: float, adapter: float, cache_kib: float
) -> None:
    """Worked by hand from the configs; the tolerance is the rounding of the last digit."""
    parts = footprint(recipe(model))
    assert parts.weights() / GIB == pytest.approx(nf4, abs=0.0051)
    assert parts.embeddings() / GIB == pytest.approx(embeddings, abs=0.0051)
    millions = parts.shape.adapter / 1e6
    assert millions == pytest.approx(adapter, abs=0.051)  # reason: one decimal was worked out
    assert parts.cache(1) / parts.sequence / 1024 == cache_kib


def test_adapters_of_ppo_are_two_trained_and_two_at_rest() -> None:
    """16 bytes and a bf16 copy for each of policy and value; 2 bytes for each of sft and reward."""
    parts = footprint(recipe())
    assert parts.adapters("ppo") == (2 * 18 * 41_943_040, 2 * 2 * 41_943_040)
    shared = footprint(recipe(ppo=Ppo(value="shared", ema_decay=0.99)))
    assert shared.adapters("ppo") == ((18 + 4) * 41_943_040, 2 * 2 * 41_943_040)


# -- activations against autograd ----------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensor storages, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: Any = weakref.WeakKeyDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def adapted(config: Any, dtype: torch.dtype) -> nn.Module:
    """A model with LoRA in fp32 on every linear map; frozen plain linears save nothing either."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return wrapped


def saved_bytes(config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that one forward keeps for its backward pass, weights not counted."""
    model = adapted(config, dtype).train()
    fixed = [*model.parameters(), *model.buffers()]
    frozen = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 512, (2, tokens // 2))
    body = model.base_model.model.model
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        body(ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("width", [2, 4])
def test_saved_bytes_are_those_autograd_keeps(kind: str, width: int) -> None:
    """Bytes a token and layer, from 1 and 3 layers; the tables round by less than 2.5 %."""
    dtype = torch.bfloat16 if width == 2 else torch.float32
    config = tiny_config(kind, width=256)
    few, many = (saved_bytes(tiny_config(kind, n, 256), dtype, 256) for n in (1, 3))
    of = recipe(lora=Lora(rank=8))
    parts = Footprint(of, read_shape(config, of.lora), Card("test", 24.0, True, width))
    measured = (many - few) / 2 / 256
    assert parts.saved_token() == pytest.approx(measured, rel=0.025)  # reason: bytes, not numerics


def peak_bytes(config: Any, dtype: torch.dtype, tokens: int, checkpointing: bool = False) -> int:
    model = adapted(config, dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(0, 512, (4, tokens // 4))
    counter = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers(), ids]:
        counter.add(tensor)
    before = counter.now
    body = model.base_model.model.model
    with counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = body(ids, use_cache=False).last_hidden_state
        if hidden.requires_grad:
            hidden.float().sum().backward()
    return counter.peak - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sampling_step_holds_what_the_real_one_does(dtype: torch.dtype) -> None:
    """Per row and vocabulary entry: 22 bytes from bf16 logits, 24 from fp32; planned for 24."""
    logits, uniforms = torch.randn(4, 20_000, dtype=dtype), torch.rand(4, dtype=torch.float64)
    counter = LiveBytes()
    counter.add(logits)
    with counter:
        next_tokens(logits, uniforms, Sampling(max_new_tokens=1))
    of = recipe()
    shape = replace(read_shape(tiny_config(), of.lora), vocabulary=20_000, query=0, hidden=0)
    shape = replace(shape, intermediate=0, key_value=0)
    planned = Footprint(of, shape, Card("test", 24.0, True, dtype.itemsize)).sampling(4)
    assert counter.peak <= planned <= 1.1 * counter.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_of_logits_is_what_the_real_loss_holds(dtype: torch.dtype) -> None:
    """Rows beyond one block add nothing but their own few bytes."""
    vocabulary = 40_000
    rows = 2 * default_chunk(vocabulary)
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    head, targets = torch.randn(vocabulary, 8, dtype=dtype), torch.randint(0, vocabulary, (rows,))
    counter = LiveBytes()
    for tensor in (hidden, head, targets):
        counter.add(tensor)
    before = counter.now
    with counter:
        token_logprobs(hidden, head, targets)[0].sum().backward()
    of = recipe()
    shape = replace(read_shape(tiny_config(), of.lora), vocabulary=vocabulary)
    planned = Footprint(of, shape, Card("test", 24.0, True, dtype.itemsize)).logits(rows)
    measured = counter.peak - before
    assert planned == pytest.approx(measured, rel=0.02)  # reason: bytes, not numerics


@pytest.mark.parametrize("mlp", [128, 1024])
@pytest.mark.parametrize("width", [2, 4])
def test_a_pass_without_gradients_holds_one_layer(width: int, mlp: int) -> None:
    """Within 5 %: the tables hold whole numbers."""
    dtype = torch.bfloat16 if width == 2 else torch.float32
    config = tiny_config(layers=3, width=256)
    config.intermediate_size = mlp
    with torch.no_grad():
        peaks = [peak_bytes(config, dtype, tokens) for tokens in (256, 512)]
    parts = Footprint(recipe(), read_shape(config, Lora()), Card("test", 24.0, True, width))
    expected = parts.score("sft", 20_000) - parts.score("sft", 19_999)
    measured = (peaks[1] - peaks[0]) / 256
    assert expected == pytest.approx(measured, rel=0.05)  # reason: bytes a token, not numerics


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("width", [2, 4])
def test_activations_are_the_bytes_autograd_holds(
    kind: str, width: int, checkpointing: bool
) -> None:
    """Bytes a token, from two lengths, so that what does not grow with tokens drops out.

    Within 10 %: the tables hold whole numbers, and leave out the softmax statistics of attention.
    """
    config = tiny_config(kind, layers=4, width=256)
    dtype = torch.bfloat16 if width == 2 else torch.float32
    peaks = [peak_bytes(config, dtype, tokens, checkpointing) for tokens in (256, 512)]
    measured = (peaks[1] - peaks[0]) / 256
    of = recipe(lora=Lora(rank=8))
    parts = Footprint(of, read_shape(config, of.lora), Card("test", 24.0, True, width))
    predicted = parts.activations(1.0, checkpointing)
    assert predicted == pytest.approx(measured, rel=0.1)  # reason: bytes a token, not numerics


# -- the plan ------------------------------------------------------------------------------------


def test_every_gpu_recipe_fits_the_card_in_its_name() -> None:
    named = {f: re.search(r"-(\d+)gb$", f.stem) for f in sorted(ROOT.glob("recipes/*.yaml"))}
    sized = {file: float(match[1]) for file, match in named.items() if match}
    assert len(sized) >= 4
    for file, gib in sized.items():
        loaded = Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        chosen = plan(loaded, gib)
        assert chosen.fits, f"{file.name} needs {chosen.needs_gib:.1f} of {gib} GB"
        assert chosen.rollout_rows >= 8, file.name


@pytest.mark.parametrize(
    "larger",
    [
        {"response": 512},
        {"lora": Lora(rank=64)},
        {"base": {"micro_batch_tokens": 4096, "gradient_checkpointing": True}},
        {"base": {"micro_batch_tokens": 1024, "gradient_checkpointing": False}},
        {"ppo": Ppo(ema_decay=0.99)},
        {"base": {"micro_batch_tokens": 1024, "quantization": "none"}},
    ],
)
def test_more_of_anything_needs_more(larger: dict[str, Any]) -> None:
    fixed = {"micro_batch_tokens": 1024, "gradient_checkpointing": True}
    base = fixed | larger.pop("base", {})
    small = plan(recipe(base=fixed), 80.0)
    large = plan(recipe(base=base, **larger), 80.0)
    assert sum(large.phases.values()) > sum(small.phases.values()) + 0.1
    assert all(large.phases[p] >= small.phases[p] - 1e-9 for p in small.phases)


def test_a_larger_card_never_trains_slower() -> None:
    """The cost of a token: 3 passes with checkpointing, 2 without, each unpacking the weights."""
    costs = []
    for gib in (10.0, 12.0, 16.0, 24.0, 48.0, 80.0):
        chosen = plan(recipe(), gib)
        assert chosen.fits
        passes = 3 if chosen.gradient_checkpointing else 2
        costs.append(passes * (1 + 368 / chosen.micro_batch_tokens))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("gib", [12.0, 16.0, 24.0])
def test_the_micro_batch_is_half_of_what_would_fit(gib: float) -> None:
    chosen = plan(recipe(), gib)
    fixed = {"gradient_checkpointing": chosen.gradient_checkpointing}
    twice = fixed | {"micro_batch_tokens": 2 * chosen.micro_batch_tokens}
    thrice = fixed | {"micro_batch_tokens": 3 * chosen.micro_batch_tokens}
    assert plan(recipe(base=twice), gib).phases["train"] < plan(recipe(), gib).usable_gib
    assert plan(recipe(base=twice, ppo=None), gib).fits
    assert not plan(recipe(base=thrice), gib).fits


@pytest.mark.parametrize("gib", [10.0, 12.0])
def test_rollout_rows_leave_a_quarter_to_spare(gib: float) -> None:
    """A quarter more rows still fit; 8 rows and a quarter more do not."""
    rows = plan(recipe(), gib).rollout_rows
    assert rows % 8 == 0
    assert rows < 64
    parts = footprint(recipe(), gib)
    assert parts.needs(parts.rollout("ppo", 1.25 * rows)) <= parts.budget
    assert parts.needs(parts.rollout("ppo", 1.25 * (rows + 8))) > parts.budget


def test_activations_are_kept_where_there_is_room_and_recomputed_where_there_is_none() -> None:
    """Keeping them saves one pass in three."""
    assert not plan(recipe(), 80.0).gradient_checkpointing
    assert plan(recipe(), 10.0).gradient_checkpointing


def test_settings_of_the_recipe_are_taken_as_they_are() -> None:
    base = {"micro_batch_tokens": 640, "gradient_checkpointing": True}
    chosen = plan(recipe(base=base), 80.0)
    assert (chosen.micro_batch_tokens, chosen.gradient_checkpointing) == (640, True)


def test_a_recipe_that_does_not_fit_says_what_would() -> None:
    too_much = recipe(base={"quantization": "none"})
    chosen = plan(too_much, 12.0)
    assert not chosen.fits
    first = chosen.advice[0]
    assert first.startswith("base.quantization=nf4: needs ")
    assert first.endswith("fits.")
    assert plan(recipe(), 12.0).fits
    assert "smaller base.model" in chosen.advice[-1]


def test_all_answers_of_a_prompt_are_one_item_of_the_reward_stage() -> None:
    """Four answers of 512 tokens: 2048 tokens pass at once, whatever the budget."""
    parts = footprint(recipe(rank=Rank(judge="vader", answers=4)))
    grows = parts.train("reward", 2049, False) - parts.train("reward", 2048, False)
    assert parts.train("reward", 1024, False) == parts.train("reward", 2048, False)
    assert grows == pytest.approx(parts.activations(1.0, False))


def test_phases_are_those_of_the_stages_there_are() -> None:
    only_sft = recipe(reward=None, ppo=None)
    assert set(plan(only_sft, 24.0).phases) == {"load", "score", "train"}
    assert set(plan(recipe(), 24.0).phases) == {"load", "rollout", "score", "train"}


def test_a_stage_peaks_where_its_own_phases_do() -> None:
    """SFT trains one adapter of 18 bytes a parameter; PPO two, with two more at rest."""
    chosen = plan(recipe(), 24.0)
    assert set(chosen.stages) == {"sft", "reward", "ppo"}
    assert chosen.stages["ppo"] == max(chosen.phases.values())
    gap = (chosen.phases["train"] - chosen.stages["sft"]) * GIB
    assert gap == pytest.approx((18 + 2 * 2) * chosen.adapter_parameters)


def test_the_terms_of_the_train_phase_add_up() -> None:
    chosen = plan(recipe(), 24.0)
    moving = ("KV cache", "sampling")
    total = sum(size for name, size in chosen.terms.items() if name not in moving)
    assert chosen.phases["train"] == pytest.approx(total, rel=1e-9)
    assert chosen.needs_gib == pytest.approx(0.75 + 1.05 * max(chosen.phases.values()), rel=1e-9)


def test_without_a_gpu_the_card_is_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = plan(recipe("Qwen/Qwen3-0.6B"))
    assert chosen.card_gib == memory.machine_memory() / GIB
    assert chosen.micro_batch_tokens <= 4096
    with pytest.raises(HardwareError, match="doctor"):
        plan(recipe(base={"device": "cuda"}))


# -- measuring -----------------------------------------------------------------------------------


def test_measured_memory_stands_beside_the_predicted() -> None:
    memory.forget_measurements()
    device = torch.device("cpu")
    with measure_phase("load", device):
        pass
    before = memory_report(None)["load"]["measured_gib"]
    with measure_phase("train", device):
        held = torch.ones(int((before + 0.2) * GIB / 4))
    del held
    with measure_phase("train", device):
        pass
    report = memory_report(plan(recipe(), 24.0))
    assert report["train"]["measured_gib"] >= before + 0.2
    assert set(report["train"]) == {"predicted_gib", "measured_gib"}
    assert set(report["rollout"]) == {"predicted_gib"}
    memory.forget_measurements()
    assert memory_report(None) == {}


def test_a_phase_inside_another_is_counted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks 1 (train), 5 (rollout), 2 (train again): the 5 belongs to the rollout alone."""
    peaks = iter([1.0, 5.0, 2.0])
    monkeypatch.setattr(memory, "peak_memory_gib", lambda device: next(peaks))
    memory.forget_measurements()
    with measure_phase("train", torch.device("cpu")), measure_phase("rollout", torch.device("cpu")):
        pass
    measured = {name: part["measured_gib"] for name, part in memory_report(None).items()}
    memory.forget_measurements()
    assert measured == {"train": 2.0, "rollout": 5.0}
