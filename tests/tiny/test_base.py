"""Facts about the shipped base: its tokenizer, its template, its size, its record."""

from __future__ import annotations

import json
import math
import re

import pytest

from lora_rlhf import tiny
from lora_rlhf.tiny import world

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lora_rlhf.tiny import pretrain  # noqa: E402
from lora_rlhf.tiny.tokenizer import BOS, EOS, PAD, build_tokenizer  # noqa: E402

RECORD = json.loads((tiny.BASE_PATH / "pretrain.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny.BASE_PATH)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny.BASE_PATH, dtype=torch.float32).eval()


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _rendered(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_special_tokens_are_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3


def test_rendered_prompts_hold_exactly_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    text = _rendered(tokenizer, "Describe a fox holding a kettle.")
    assert text == "<s>Request: Describe a fox holding a kettle.\nAnswer:\n"
    for added in (True, False):
        ids = tokenizer(text, add_special_tokens=added)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
    direct = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Describe a fox holding a kettle."}],
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    assert list(direct) == _ids(tokenizer, text)


def test_several_turns_render_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "ABC", strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Request: A\nAnswer:\nB</s>Request: C\nAnswer:\n"


def test_prompt_and_response_tokenise_apart_as_in_one_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for row in tiny.demonstrations(300, 9):
        whole = f"Request: {row['prompt']}\nAnswer:\n{row['response']}"
        pretraining = pretrain.encode([whole], tokenizer)[0]
        prompt = _ids(tokenizer, _rendered(tokenizer, row["prompt"]))
        response = _ids(tokenizer, row["response"])
        assert prompt + response + [tokenizer.eos_token_id] == pretraining
        assert tokenizer.decode(response) == row["response"]


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("Zażółć gęślą jaźń", "日本語 🙂", "  two  spaces\n\n", "x = {1: 'a'}", ""):
        assert tokenizer.decode(_ids(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_most_words_of_the_world_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tiny.demonstrations(200, 11)
    tokens = sum(len(_ids(tokenizer, row["response"])) for row in rows)
    # Full stops and commas are tokens too, so words alone would not come to 1.0.
    pieces = sum(len(re.findall(r"\w+|[^\w\s]", row["response"])) for row in rows)
    assert tokens / pieces < 1.1


def test_the_base_is_small_and_fits_four_bit_blocks(model: LlamaForCausalLM) -> None:
    files = [path for path in tiny.BASE_PATH.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert sum(p.numel() for p in model.parameters()) == RECORD["parameters"] <= 1_600_000
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(layer.in_features % 64 == 0 for layer in layers)
    with safe_open(tiny.BASE_PATH / "model.safetensors", "pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert kinds == {torch.float16}


def test_vocabularies_and_ends_agree(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_recorded_perplexity_is_the_one_measured(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    few = pretrain.heldout_loss(model, tokenizer, count=100)
    assert few == pytest.approx(RECORD["heldout"]["loss"], abs=0.05)  # reason: 100 of 400 documents
    assert RECORD["heldout_perplexity"] == pytest.approx(
        math.exp(RECORD["heldout"]["loss"]), abs=2e-3
    )


def test_the_base_answers_in_sentences(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    asked = [row["prompt"] for row in tiny.prompts(16, 21, heldout=True)]
    batch = tokenizer(
        [_rendered(tokenizer, prompt) for prompt in asked],
        return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False,
    )  # fmt: skip
    made = model.generate(**batch, do_sample=True, max_new_tokens=96)
    texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(len(text.split()) for text in texts) / len(texts) > 30
    assert len(set(texts)) == len(texts)
    # Better than nothing at all, short of what a demonstration earns.
    mean = sum(map(tiny.gold, asked, (text.split("\nReview:")[0] for text in texts))) / len(asked)
    assert 0.8 < mean < 3.2


def test_the_tokenizer_is_trained_deterministically() -> None:
    texts = [row["text"] for row in world.plain_text(300, 0)]
    first, second = (build_tokenizer(texts, 600) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_packing_loses_and_cuts_nothing() -> None:
    documents = [[n] * (1 + n * 7 % 50) for n in range(200)]
    rows = list(pretrain.pack(documents, row=64, window=4))
    assert max(map(len, rows)) <= 64
    assert sorted(token for row in rows for token in row) == sorted(
        token for document in documents for token in document
    )
    for document in documents:
        home = [row for row in rows if document[0] in row]
        assert len(home) == 1
        assert home[0].count(document[0]) == len(document)


def test_pretraining_runs_and_records(tmp_path) -> None:
    settings = pretrain.PretrainSettings(
        documents=120,
        lessons=64,
        closing_documents=40,
        closing_lessons=40,
        vocabulary=400,
        hidden=64,
        layers=1,
        heads=2,
        kv_heads=2,
        mlp=64,
    )
    lines: list[str] = []
    record = pretrain.pretrain(tmp_path, settings, lines.append)
    assert json.loads((tmp_path / "pretrain.json").read_text()) == record
    assert record["steps"] > 0
    assert lines
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loss = pretrain.heldout_loss(reloaded, AutoTokenizer.from_pretrained(tmp_path))
    assert loss == pytest.approx(record["heldout"]["loss"], abs=1e-3)
