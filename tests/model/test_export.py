"""What is exported computes what was trained, in plain transformers and PEFT."""

from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.data.records import user
from lora_rlhf.data.template import DEFAULT_TEMPLATE, ChatFormat
from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.model.backbone import Backbone, guard_cpu_kernels
from lora_rlhf.model.export import export_adapter
from lora_rlhf.runs import Run
from lora_rlhf.tiny import BASE_PATH
from tests.small_run import small_recipe, small_run

IDS = torch.tensor([[0, 5, 9, 133, 7, 60, 400, 1], [0, 80, 4, 4, 17, 3, 900, 1]])
BOTH = pytest.mark.parametrize("quantization", ["nf4", "none"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("runs") / "small")


@cache
def trained(run: Run) -> Backbone:
    backbone = Backbone.load(small_recipe().base)
    for role in run.adapters():
        backbone.adapters.load(role, run.adapter(role))
    return backbone


def logits_of(backbone: Backbone, role: str) -> torch.Tensor:
    with torch.no_grad(), backbone.adapters.use(role):
        return backbone.causal_lm(IDS).logits


def raw_scores(backbone: Backbone, role: str) -> torch.Tensor:
    with torch.no_grad(), backbone.adapters.use(role):
        return backbone.adapters.heads[role].raw(backbone.hidden_states(IDS))[:, -1]


def export(run: Run, role: str, to: Path, merge: bool = False) -> str:
    said = StringIO()
    export_adapter(run, role, merge, to, Console(file=said))
    return said.getvalue()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def plain_base(quantized: bool, kind: type = AutoModelForCausalLM, **options) -> torch.nn.Module:
    if quantized:
        config = Backbone.load(small_recipe().base).causal_lm.config.quantization_config
        options["quantization_config"] = config
    model = kind.from_pretrained(BASE_PATH, dtype=torch.float32, **options)
    guard_cpu_kernels(model)
    return model


# -- a PEFT directory -----------------------------------------------------------------------------


def test_an_exported_adapter_loads_in_plain_peft_with_the_same_logits(run, tmp_path):
    export(run, "policy", tmp_path / "out")
    model = PeftModel.from_pretrained(plain_base(quantized=True), tmp_path / "out")
    torch.testing.assert_close(logits(model), logits_of(trained(run), "policy"), **CLOSE)


def test_an_exported_reward_adapter_loads_as_a_classifier_with_the_same_raw_scores(run, tmp_path):
    export(run, "reward", tmp_path / "out")
    base = plain_base(True, AutoModelForSequenceClassification, num_labels=1)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(model)[:, 0], raw_scores(trained(run), "reward"), **CLOSE)


def test_the_card_says_what_it_is_its_base_and_how_scores_are_normalised(run, tmp_path):
    export(run, "reward", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n")
    assert "Reward model" in card
    assert "builtin:tiny" in card
    assert "nf4" in card
    assert "num_labels=1" in card
    assert "score = 0.5 * logit -0.35" in card


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("role", ["policy", "reward"])
def test_the_python_of_the_card_runs_as_it_stands(role, merge, run, tmp_path):
    export(run, role, tmp_path / "out", merge)
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("PATH OF THIS DIRECTORY", str(tmp_path / "out"))
    found: dict = {}
    exec(compile(code, "card", "exec"), found)
    assert logits(found["model"]).isfinite().all()
    assert len(found["tokenizer"]) > 1000


# -- merged ---------------------------------------------------------------------------------------


def test_a_merged_policy_gives_the_logits_of_the_adapter_over_the_4_bit_backbone(run, tmp_path):
    export(run, "policy", tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits_of(trained(run), "policy"), **CLOSE)


def test_merging_into_the_original_weights_gives_another_model(run):
    """The mutant (checklist P5): PEFT's merge on the 16-bit checkpoint is off by far more."""
    mutant = PeftModel.from_pretrained(plain_base(False), run.adapter("policy")).merge_and_unload()
    assert float((logits(mutant) - logits_of(trained(run), "policy")).abs().max()) > 0.1


@BOTH
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_dora_and_rslora_merge_right(lora, quantization, tmp_path):
    base = {"quantization": quantization}
    made = small_run(tmp_path / "run", ("sft",), base=base, lora=lora)
    export(made, "sft", tmp_path / "out", merge=True)
    backbone = Backbone.load(small_recipe(base).base)
    backbone.adapters.load("sft", made.adapter("sft"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits_of(backbone, "sft"), **CLOSE)
    with torch.no_grad():
        assert not torch.allclose(logits(merged), backbone.causal_lm(IDS).logits, atol=1e-2)


def test_layers_without_an_adapter_are_dequantised_too(tmp_path):
    made = small_run(tmp_path / "run", ("sft",), lora={"target_modules": ["q_proj"]})
    export(made, "sft", tmp_path / "out", merge=True)
    backbone = trained(made)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits_of(backbone, "sft"), **CLOSE)


@pytest.mark.parametrize("role", ["reward", "value"])
def test_a_merged_head_is_a_classifier_with_the_same_raw_scores(role, run, tmp_path):
    export(run, role, tmp_path / "out", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 1
    torch.testing.assert_close(logits(merged)[:, 0], raw_scores(trained(run), role), **CLOSE)


def test_a_merged_classifier_scores_a_padded_row_as_it_does_the_row_alone(run, tmp_path):
    export(run, "reward", tmp_path / "out", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    pad = torch.full((2, 3), merged.config.pad_token_id)
    with torch.no_grad():
        padded = merged(torch.cat([IDS, pad], 1)).logits
    torch.testing.assert_close(padded, logits(merged), **CLOSE)


def test_a_merged_model_holds_no_trace_of_quantisation_and_is_of_the_compute_dtype(tmp_path):
    base = {"dtype": "bfloat16"}
    made = small_run(tmp_path / "run", ("sft",), base=base)
    export(made, "sft", tmp_path / "out", merge=True)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert not hasattr(config, "quantization_config")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert not [k for k in file.keys() if "lora" in k or "quant" in k]  # noqa: SIM118


def test_a_merged_policy_ends_and_is_prompted_as_in_the_run(run, tmp_path):
    export(run, "policy", tmp_path / "out", merge=True)
    ours = trained(run).format
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert tuple(settings.eos_token_id) == ours.stop_ids
    assert (settings.temperature, settings.max_new_tokens) == (1.0, 12)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = tokenizer.apply_chat_template(
        list(user("Tell of the owl.")), add_generation_prompt=True, return_dict=False
    )
    assert theirs == ours.prompt_ids(user("Tell of the owl."))


def test_plain_generate_of_a_merged_policy_draws_what_the_run_would(run, tmp_path):
    """Greedily, so that no random numbers are compared; under the run's own decode loop."""
    from lora_rlhf.model.generation import Sampling, generate

    export(run, "policy", tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    backbone = trained(run)
    ids = backbone.format.prompt_ids(user("Tell of the owl."))
    with backbone.adapters.use("policy"):
        (ours,) = generate(backbone, [ids], [0], Sampling(12, temperature=0.0))
    row = merged.generate(torch.tensor([ids]), do_sample=False, temperature=None)[0]
    assert row[len(ids) :].tolist() == ours.ids


@pytest.mark.parametrize(("mode", "template"), [("default", DEFAULT_TEMPLATE), ("none", None)])
def test_the_template_of_the_run_goes_with_the_merged_model(mode, template, tmp_path):
    made = small_run(tmp_path / "run", ("sft",), base={"chat_template": mode})
    export(made, "sft", tmp_path / "out", merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    if mode == "default":
        backbone = Backbone.load(small_recipe({"chat_template": mode}).base)
        found = ChatFormat(tokenizer).prompt_ids(user("Hello"))
        assert found == backbone.format.prompt_ids(user("Hello"))


# -- what is said and what is refused ------------------------------------------------------------


def test_the_reason_for_the_dequantised_weights_is_told(run, tmp_path):
    assert "dequantised 4-bit weights" in export(run, "sft", tmp_path / "out", merge=True)


def test_the_command_says_why_and_where(run, tmp_path):
    arguments = ["export", str(run.path), "--adapter", "sft", "--merge", "--to"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "dequantised 4-bit weights" in result.output
    assert f"Wrote {tmp_path / 'out'}" in result.output.replace("\n", "")


def test_what_exists_is_not_overwritten(run, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export(run, "sft", tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


def test_an_adapter_the_run_does_not_have_is_refused_with_those_it_has(tmp_path):
    made = small_run(tmp_path / "run", ("sft",))
    with pytest.raises(ConfigError, match=r"no adapter policy.*has: sft"):
        export(made, "policy", tmp_path / "out")


def test_a_failed_export_leaves_nothing_behind(run, tmp_path):
    made = small_run(tmp_path / "run", ("sft",))
    text = (made.path / "recipe.yaml").read_text()
    (made.path / "recipe.yaml").write_text(text.replace("nf4", "none"))
    with pytest.raises(CheckpointError, match="quantization differ"):
        export(made, "sft", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
