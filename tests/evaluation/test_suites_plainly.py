"""Perplexity and greedy answers of arms against a second, plainly loaded copy of the model."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rlhf import tiny
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.suites import perplexity
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe_io import recipe_from
from lora_rlhf.training.material import split_demonstrations
from tests.sessions import session
from tests.small import randomise

TINY = Path(tiny.__file__).parent / "base"
STORIES = Path(__file__).resolve().parents[3] / "shared/models/stories260K"
NO_STORIES = "needs the folder `shared` beside the checkout (real models and data)"
TEXTS = ["Tell a story about a fox.", "A quiet lake lay by the old road. " * 60, "It rains."]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(TINY, id="tiny"),
        pytest.param(
            STORIES,
            id="stories260K",
            marks=pytest.mark.skipif(not STORIES.is_dir(), reason=NO_STORIES),
        ),
    ],
)
def model(request):
    return str(request.param)


def made(model, folder, **data):
    """A session over the unquantised model, with a random adapter."""
    base = {"model": model, "device": "cpu", "quantization": "none", "chat_template": "none"}
    raw = {"name": "s", "base": base, "lora": {"rank": 4, "alpha": 8}, "sft": {}}
    shown = {"demonstrations": {"builtin": "demonstrations", "limit": 10}}
    recipe = recipe_from(raw | {"data": data or shown})
    backbone = Backbone.load(recipe.base)
    backbone.adapters.add("sft", recipe.lora)
    randomise(backbone, "sft", seed=1, scale=0.05)
    return session(recipe, folder, backbone, tokens=4096)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    return Engine(made(model, folder), {"base": None, "sft": "sft"}, folder / "requests")


@pytest.fixture(scope="module")
def plain(model):
    copy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return copy, AutoTokenizer.from_pretrained(model)


def plain_nats(plain, text, length):
    """(nats, tokens) of a text after BOS, a token at a time, each with all the context that fits.

    Of a text in one window that is a single forward. A longer one is read in blocks of `length`
    tokens; the last block reads as far back as it can.
    """
    copy, tokenizer = plain
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(done + length, len(ids))
        start = max(0, end - 1 - length)
        with torch.no_grad():
            logits = copy(torch.tensor([ids[start : end - 1]])).logits[0].double()
        for position in range(done, end):
            row = logits[position - 1 - start]
            nats += float(torch.logsumexp(row, 0) - row[ids[position]])
        done = end
    return nats, len(ids) - 1


def test_perplexity_is_that_of_a_direct_forward(engine, plain):
    wanted = [plain_nats(plain, text, engine.max_length) for text in TEXTS]
    nats, tokens = (sum(column) for column in zip(*wanted, strict=True))
    assert wanted[1][1] > engine.max_length, "one text is longer than the model's context"
    found = perplexity.measures(engine, TEXTS)
    base = found["perplexity"]["base"]
    assert base.weights == [float(n) for _, n in wanted]
    assert base.values == pytest.approx([n for n, _ in wanted], rel=1e-5)
    assert base.share()["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    bits = found["bits_per_byte"]["base"].share()["value"]
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    other = found["perplexity"]["sft"].share()["value"]
    assert abs(other / base.share()["value"] - 1) > 1e-2  # the adapter answers for itself


def test_bytes_are_no_letters_and_a_document_without_a_token_is_none(engine):
    text = "Où est le café ?"
    found = perplexity.measures(engine, [text, ""])
    assert found["bits_per_byte"]["base"].weights == [len(text) + 2.0]
    assert len(found["perplexity"]["base"].values) == 1


def test_greedy_answers_are_those_of_transformers(engine, plain):
    copy, tokenizer = plain
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "Tell", "It is a")]
    eos = sorted(engine.backbone.format.stop_ids)
    for until in ((), ("e",)):
        found = engine.answers(prompts, 24, until)["base"]
        for ids, text in zip(prompts, found, strict=True):
            whole = copy.generate(
                torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=eos
            )
            wanted = tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
            assert text == (wanted.split("e")[0] if until else wanted)
            assert wanted


# -- windows and documents ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 11, 12, 23])
def test_windows_predict_each_token_once_and_fit(count):
    ids = list(range(100, 100 + count))
    rows = perplexity.text_windows(ids, 5)
    assert [t for _, own in rows for t in own] == ids[1:]
    for context, own in rows:
        assert len(context) + len(own) - 1 <= 5, "the last token is not read"
        start = ids.index(context[0])
        assert ids[start : start + len(context) + len(own)] == context + own
    if count > 6:
        context, own = rows[-1]
        assert len(context) + len(own) == 6, "the last window reads as far back as it can"


def write(folder, **files):
    for name, text in files.items():
        path = folder / "text" / name.replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_documents_that_a_stage_trains_on_are_left_out(tmp_path):
    """SFT's, cut into prompt and response, and those of the ptx mix; held-out ones are read."""
    seen = [f"The {n} fox met a cook. " * 9 for n in ("old", "red", "sly", "odd", "shy", "big")]
    (tmp_path / "demonstrations.txt").write_text("\n<>\n".join(seen))
    (tmp_path / "mix.txt").write_text("The sea is calm. " * 9)
    new = "It rained. " * 20
    one = made(
        str(TINY),  # by its path, so that files are read and not its own world
        tmp_path / "run",
        demonstrations={
            "path": str(tmp_path / "demonstrations.txt"),
            "separator": "<>",
            "prompt_tokens": 4,
        },
        text={"path": str(tmp_path / "mix.txt")},
    )
    train, heldout = split_demonstrations(one)
    assert (len(train) + len(heldout), len(heldout) > 0) == (6, True)
    documents = [*seen, "The  sea is\ncalm. " * 9, new]  # laid out otherwise, and still the same
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    found = perplexity.documents(one, write(tmp_path, a_jsonl=rows), None)
    unseen = {text.strip() for text in seen} - {found_in(d) for d in train}
    assert len(unseen) == len(heldout)
    assert {text.strip() for text in found} == unseen | {new.strip()}
    assert f"{len(train) + 1} documents are trained on" in one.console.file.getvalue()
    write(tmp_path, a_jsonl=json.dumps({"text": documents[-2]}))
    with pytest.raises(DataError, match="all 1 documents"):
        perplexity.documents(one, tmp_path, None)


def found_in(demonstration):
    """A demonstration's whole text."""
    return (demonstration.prompt[-1]["content"] + demonstration.response).strip()


def test_the_limit_spreads_over_the_files_and_other_kinds_are_not_read(tmp_path):
    folder = write(tmp_path, a_jsonl="".join(f'{{"text": "t{i}"}}\n' for i in range(10)), b_md="x")
    one = made(str(TINY), tmp_path / "run")
    assert perplexity.documents(one, folder, 3) == ["t0", "t3", "t6"]
    assert perplexity.why_no_text(one, folder) is None
    assert "text/NAME.txt" in str(perplexity.why_no_text(one, tmp_path / "run"))
    assert "--data" in str(perplexity.why_no_text(one, None))
