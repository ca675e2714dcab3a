"""README.md of an exported adapter or model: what it is, and how to load it."""

import json
from typing import Any

from safetensors.torch import load_file

from lora_rlhf.model.adapters import HEAD_FILE
from lora_rlhf.recipe import Recipe
from lora_rlhf.runs import Run

_WHAT = {
    "sft": "Policy after supervised fine-tuning on demonstrations",
    "reward": "Reward model: a scalar score of a prompt and its response",
    "policy": "Policy after PPO against a reward model",
    "value": "Value function of PPO: the score to be expected at each token",
}
_PROMPTS = {
    "auto": "in the tokenizer's own chat template (lora_rlhf's default where it has none), "
    "thinking off",
    "default": "in lora_rlhf's default template, `User:` and `Assistant:` paragraphs",
    "none": "as plain text that the response continues, without a chat template",
}
_FOUR_BITS = """quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.{dtype},
    ),
    """


def adapter_card(run: Run, recipe: Recipe, adapter: str) -> str:
    """The card of a PEFT directory.

    Args:
        run: where the adapter lies.
        recipe: of the run.
        adapter: its role.
    """
    facts = _facts(run, adapter)
    four_bits = recipe.base.quantization == "nf4"
    kind = _kind(facts)
    note = (
        "The adapter was trained over the 4-bit weights, so load the base in the same 4 bits; on "
        "16-bit weights it gives slightly other answers.\n"
        if four_bits
        else ""
    )
    labels = "num_labels=1,\n    " if "score" in facts else ""
    dtype = _dtype(run, recipe)
    bits = _FOUR_BITS.format(dtype=dtype) if four_bits else ""
    imports = f"{kind}, AutoTokenizer" + (", BitsAndBytesConfig" if four_bits else "")
    return "\n".join(
        [
            *_head(run, recipe, adapter, "peft"),
            f"A LoRA adapter in PEFT's format. {note}",
            "```python",
            "import torch",
            "from peft import PeftModel",
            f"from transformers import {imports}",
            "",
            *_base_lines(recipe),
            f"model = {kind}.from_pretrained(",
            f"    base,\n    {labels}{bits}dtype=torch.{dtype},\n)",
            'model = PeftModel.from_pretrained(model, "PATH OF THIS DIRECTORY").eval()',
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            "```",
            *_score_lines(facts, adapter),
        ]
    )


def merged_card(run: Run, recipe: Recipe, adapter: str) -> str:
    """The card of a merged model; arguments as of `adapter_card`."""
    facts = _facts(run, adapter)
    kind = _kind(facts)
    what = "the dequantised 4-bit weights" if recipe.base.quantization == "nf4" else "the weights"
    more = (
        " It was trained over the 4-bit weights; merged into the original ones it would be another "
        "model. Quantised again, it differs by that rounding."
        if recipe.base.quantization == "nf4"
        else ""
    )
    return "\n".join(
        [
            *_head(run, recipe, adapter, "transformers"),
            f"A whole model: the LoRA adapter merged into {what} of the base.{more}",
            "",
            "```python",
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f'model = {kind}.from_pretrained("PATH OF THIS DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS DIRECTORY")',
            "```",
            *_score_lines(facts, adapter),
        ]
    )


def _facts(run: Run, adapter: str) -> dict[str, Any]:
    file = run.adapter(adapter) / "lora_rlhf.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else "{}"  # made by PEFT or TRL
    facts: dict[str, Any] = json.loads(text)
    head = run.adapter(adapter) / HEAD_FILE
    if head.is_file():
        facts["score"]["bias"] = load_file(head)["bias"].item()
    return facts


def _dtype(run: Run, recipe: Recipe) -> str:
    """What the run computed in."""
    environment = run.path / "environment.json"
    on_cpu = environment.is_file() and json.loads(environment.read_text())["device"] == "cpu"
    if recipe.base.dtype == "auto":
        return "float32" if on_cpu else "bfloat16"
    return recipe.base.dtype


def _kind(facts: dict[str, Any]) -> str:
    return "AutoModelForSequenceClassification" if "score" in facts else "AutoModelForCausalLM"


def _is_hub_id(model: str) -> bool:
    return not model.startswith(("builtin:", ".", "/", "~")) and model.count("/") <= 1


def _head(run: Run, recipe: Recipe, adapter: str, library: str) -> list[str]:
    model = recipe.base.model
    named = [f"base_model: {model}"] if _is_hub_id(model) else []
    revision = f" at revision `{recipe.base.revision}`" if recipe.base.revision else ""
    return [
        "---",
        *named,
        f"library_name: {library}",
        "tags: [lora_rlhf, rlhf, lora]",
        "---",
        "",
        f"# {run.name}: {adapter}",
        "",
        f"{_WHAT[adapter]}. Trained by lora_rlhf, recipe `{recipe.name}`.",
        "",
        f"- Base: `{model}`{revision}, quantisation {recipe.base.quantization}.",
        f"- Prompts are written {_PROMPTS[recipe.base.chat_template]}.",
        *_results(run, adapter),
        "",
    ]


def _results(run: Run, adapter: str) -> list[str]:
    """The run's own measurements of this adapter, where it made any."""
    summary = run.summary()
    lines = []
    reward = summary.get("reward", {})
    if adapter == "reward" and "accuracy" in reward:
        low, high = reward.get("accuracy_ci", (float("nan"), float("nan")))
        lines.append(
            f"- Held-out pairs ordered as the labeler did: {reward['accuracy']:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%})."
        )
    for win in summary.get("win_rates", []):
        if win["a"] == adapter:
            low, high = win["ci"]
            lines.append(
                f"- Wins against {win['b']} on {win['prompts']} held-out prompts: "
                f"{win['win_rate']:.2f} (95 % interval {low:.2f} to {high:.2f}; judge: "
                f"{win['judge']})."
            )
    return lines


def _base_lines(recipe: Recipe) -> list[str]:
    if recipe.base.model == "builtin:tiny":
        return ["from lora_rlhf.tiny import BASE_PATH", "", "base = str(BASE_PATH)"]
    return [f'base = "{recipe.base.model}"']


def _score_lines(facts: dict[str, Any], adapter: str) -> list[str]:
    """How logits become scores of lora_rlhf."""
    if "score" not in facts:
        return [""]
    gain, shift = facts["score"]["gain"], facts["score"]["shift"]
    bias = facts["score"].get("bias", 0.0)  # trained in PPO alone; classifiers have none
    raw = "logit" if not bias else f"(logit {bias:+.6g})"
    formula = f"{gain:.6g} * {raw} {shift:+.6g}"
    where = "read at the last real token (the end token where there is one)"
    if adapter == "value":
        told = (
            f"The head gives a value at every token; the classifier's logit is the one {where}. "
            f"`value = {formula}`."
        )
    elif (gain, shift) == (1.0, 0.0):
        told = f"The logit, {where}, is the score; it was not normalised."
    else:
        told = (
            f"The logit, {where}, is the raw score. Scores in lora_rlhf are normalised, so that "
            f"demonstrations have mean 0 and spread 1: `score = {formula}`."
        )
    return ["", told, ""]
