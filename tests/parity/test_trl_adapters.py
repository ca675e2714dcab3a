"""Adapters that TRL 1.12 trained and saved compute here what they computed there."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.errors import CheckpointError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.recipe import Base
from lora_rlhf.training.rollout import score_forward

trl = pytest.importorskip("trl", reason="needs trl")

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["tell", "me", "of", "the", "owl", "fox", "cat", "frog", "walks", "sleeps", "no"],
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ANIMALS = ("owl", "fox", "cat", "frog")
PROMPTS = [[1, 4, 5, 6, 7, 8], [1, 4, 5, 9]]
RESPONSES = [[7, 8, 12, 2], [14, 9, 2]]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer, in the Hugging Face layout."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def settings(out: Path) -> dict:
    return {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def trained_policy(base: Path, out: Path, lora: LoraConfig) -> torch.nn.Module:
    rows = [
        {
            "prompt": turn("user", f"tell me of the {a}"),
            "completion": turn("assistant", f"the {a} walks"),
        }
        for a in ANIMALS
    ]
    return trained(
        trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=trl.SFTConfig(**settings(out)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=lora,
        )
    )


def trained_reward(base: Path, out: Path, lora: LoraConfig) -> torch.nn.Module:
    rows = [
        {
            "prompt": turn("user", f"tell me of the {a}"),
            "chosen": turn("assistant", f"the {a} walks"),
            "rejected": turn("assistant", f"no {a} sleeps"),
        }
        for a in ANIMALS
    ]
    model = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=1
    )
    return trained(
        trl.RewardTrainer(
            model=model,
            args=trl.RewardConfig(**settings(out)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=lora,
        )
    )


def trained(trainer) -> torch.nn.Module:
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


def backbone_with(base: Path, name: str, adapter: Path) -> Backbone:
    backbone = Backbone.load(Base(model=str(base), quantization="none", device="cpu"))
    backbone.adapters.load(name, adapter)
    return backbone


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),
        LoraConfig(),
        LoraConfig(r=4, target_modules="all-linear", use_dora=True, use_rslora=True),
    ],
    ids=["all-linear", "default", "dora"],
)
def test_an_adapter_of_trls_sft_trainer_gives_the_same_logits(lora, base, tmp_path):
    theirs = trained_policy(base, tmp_path / "out", lora)
    backbone = backbone_with(base, "sft", tmp_path / "out")
    ids = torch.tensor([PROMPTS[0] + RESPONSES[0]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        bare = backbone.causal_lm(ids).logits
        with backbone.adapters.use("sft"):
            found = backbone.causal_lm(ids).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert float((bare - expected).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
        LoraConfig(modules_to_save=["score"]),
    ],
    ids=["all-linear", "as in TRL's documentation"],
)
def test_an_adapter_of_trls_reward_trainer_gives_the_same_scores(lora, base, tmp_path):
    theirs = trained_reward(base, tmp_path / "out", lora)
    backbone = backbone_with(base, "reward", tmp_path / "out")
    rows = make_sequences(PROMPTS, RESPONSES, backbone.format.pad_id)
    mask = torch.arange(rows.input_ids.shape[1])[None] < rows.lengths[:, None]
    head = backbone.adapters.heads["reward"]
    with torch.no_grad():
        expected = theirs(input_ids=rows.input_ids, attention_mask=mask).logits[:, 0]
        without = score_forward(backbone, rows, head)
        with backbone.adapters.use("reward"):
            found = score_forward(backbone, rows, head)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert float((without - expected).abs().max()) > 1e-2


def test_a_reward_adapter_whose_head_trl_did_not_save_is_refused_with_the_way_out(base, tmp_path):
    """With `all-linear` and no task type PEFT puts a LoRA on the random head and drops the head."""
    trained_reward(base, tmp_path / "out", LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(CheckpointError, match=r"score.*task_type=SEQ_CLS"):
        backbone_with(base, "reward", tmp_path / "out")


def test_an_adapter_that_trained_the_output_head_too_is_refused(base, tmp_path):
    trained_policy(base, tmp_path / "out", LoraConfig(modules_to_save=["lm_head"]))
    with pytest.raises(CheckpointError, match=r"lm_head.*frozen"):
        backbone_with(base, "sft", tmp_path / "out")
