"""lm-eval over an arm of the backbone gives what lm-eval's own HFLM gives on the plain model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rlhf.evaluation.suites import lm_eval_tasks
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe_io import recipe_from
from tests.sessions import session
from tests.small import randomise

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lora-rlhf[lm-eval]'")

DOCUMENTS = 4


@pytest.fixture(scope="module")
def model() -> str:
    path = Path(__file__).resolve().parents[3] / "shared/models/stories260K"
    if not path.is_dir():
        pytest.skip("needs the folder `shared` beside the checkout (real models and data)")
    return str(path)


@pytest.fixture(scope="module")
def engine(model: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The bare base and a random adapter, unquantised."""
    base = {"model": model, "device": "cpu", "quantization": "none", "chat_template": "none"}
    raw = {"name": "s", "base": base, "lora": {"rank": 4, "alpha": 8}, "sft": {}}
    demonstrations = {"builtin": "demonstrations", "limit": 10}
    recipe = recipe_from(raw | {"data": {"demonstrations": demonstrations}})
    backbone = Backbone.load(recipe.base)
    backbone.adapters.add("sft", recipe.lora)
    randomise(backbone, "sft", seed=1, scale=0.05)
    folder = tmp_path_factory.mktemp("suites")
    made = session(recipe, folder, backbone, tokens=4096)
    return Engine(made, {"base": None, "sft": "sft"}, folder / "requests")


@pytest.fixture(scope="module")
def plain(model: str):
    """lm-eval's own model over a second, plainly loaded copy."""
    from lm_eval.models.huggingface import HFLM

    copy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return HFLM(pretrained=copy, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=3)


@pytest.mark.shared
@pytest.mark.parametrize("name", list(lm_eval_tasks.LOCAL_TASKS))
def test_figures_are_those_of_lm_evals_own_model(name, engine, plain, shared) -> None:
    from lm_eval.evaluator import evaluate

    task = lm_eval_tasks.local_task(name, shared / "data", DOCUMENTS)
    wanted = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    theirs = evaluate(plain, wanted, bootstrap_iters=0)["results"][name]
    ours = lm_eval_tasks.evaluate(engine, name, task)
    for metric, arms in ours.items():
        assert arms["base"].share()["value"] == pytest.approx(theirs[f"{metric},none"], abs=1e-4)
    assert ours.keys() == {k.split(",")[0] for k in theirs if k.endswith(",none")} - {
        k.split(",")[0] for k in theirs if "stderr" in k
    }


@pytest.mark.shared
def test_requests_are_answered_as_by_lm_evals_own_model(engine, plain, shared) -> None:
    """Log-likelihoods to a rounding, windows of a long text, and greedy answers to the letter."""
    from lm_eval.api.instance import Instance

    from lora_rlhf.evaluation.suites.lm_eval_model import ArmModel

    def requests(kind: str, *arguments: tuple) -> list:
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    ours = ArmModel(engine, "base")
    pairs = requests("loglikelihood", ("Once upon a time", ", there was"), ("", "Lily ran."))
    found, wanted = ours.loglikelihood(pairs), plain.loglikelihood(pairs, disable_tqdm=True)
    assert [f[0] for f in found] == pytest.approx([w[0] for w in wanted], abs=1e-3)
    assert [f[1] for f in found] == [w[1] for w in wanted]
    other = ArmModel(engine, "sft").loglikelihood(pairs)
    assert abs(other[0][0] - found[0][0]) > 1e-2  # ten roundings: the adapter answers for it

    text = (shared / "data/tinystories/tinystories_v2_1700.txt").read_text()[:3000]
    rolling = requests("loglikelihood_rolling", (text,))
    assert len(ours.tok_encode(text)) > 2 * engine.max_length
    wanted_rolling = plain.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(wanted_rolling, rel=1e-5)

    settings = {"until": ["\n", "."], "max_gen_toks": 40}
    prompts = requests(
        "generate_until", ("Once upon a time, there was a", settings), ("Lily went", settings)
    )
    assert ours.generate_until(prompts) == plain.generate_until(prompts, disable_tqdm=True)


def test_blank_choices_are_no_answers() -> None:
    targets = {"mc1_targets": {"Yes": 1, "": 0}, "mc2_targets": {"Yes": 1, " ": 0, "No": 0}}
    (doc,) = lm_eval_tasks.truthfulqa(json.loads(json.dumps([{"question": "Q?"} | targets])))
    assert doc["mc1_targets"] == {"choices": ["Yes"], "labels": [1]}
    assert doc["mc2_targets"] == {"choices": ["Yes", "No"], "labels": [1, 0]}
