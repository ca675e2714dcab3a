"""Small tokenizers of the kinds that models come with, trained in milliseconds."""

from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Once upon a time there was a little boy named Ben. Ben loved to explore the world.",
    "The shopkeeper smiled and said, of course you can. You can take it home.\nSo Ben took it.",
    "What is the capital of France? The capital of France is Paris. That is 7 times 6 = 42!",
    "User: Assistant: Human: system user assistant think answer question story rain train",
]
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(special: tuple[str, ...], bos: str | None = None) -> Tokenizer:
    """BPE over bytes without a prefix space, as GPT-2, Llama 3 and Qwen have it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return inner


@cache
def llama3() -> PreTrainedTokenizerFast:
    """BOS by the template and by plain encoding; ends turns with <|eot_id|>; no pad token."""
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    special = tuple(f"<|{name}|>" for name in (*names, "finetune_right_pad_id"))
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(special, bos="<|begin_of_text|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        chat_template=LLAMA3_TEMPLATE,
    )


def qwen(eos: str = "<|im_end|>", template: str | None = QWEN_TEMPLATE) -> PreTrainedTokenizerFast:
    """No BOS; pads with <|endoftext|>; a template with a thinking switch."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|fim_pad|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(special), eos_token=eos, pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def gpt2() -> PreTrainedTokenizerFast:
    """One special token for everything but the pad; no template."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level((end,)), bos_token=end, eos_token=end, unk_token=end
    )


def sentencepiece(template: str | None = None) -> PreTrainedTokenizerFast:
    """A space before every text, as Llama 2 and Mistral have it; BOS by plain encoding."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    # While training, a break before each word, so that no token spans two words.
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581|\n"), "merged_with_next")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=220,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n"],
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer
