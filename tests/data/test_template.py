"""ChatFormat against what transformers makes of the same turns, on every kind of tokenizer."""

import pytest
from transformers import AutoTokenizer

from lora_rlhf.data.plain import encode
from lora_rlhf.data.records import Messages, user
from lora_rlhf.data.template import DEFAULT_TEMPLATE, ChatFormat, RefusedMessages
from lora_rlhf.errors import DataError
from lora_rlhf.tiny import BASE_PATH
from tests.data.fakes import STRICT_TEMPLATE, gpt2, llama3, qwen, sentencepiece

QUESTION = user("What is the capital of France?")
DIALOGUE: Messages = (
    {"role": "system", "content": "You can take it home."},
    {"role": "user", "content": "What is the story?"},
    {"role": "assistant", "content": "Once upon a time."},
    {"role": "user", "content": "So?"},
)
ANSWER = "The capital is Paris."


def tiny():
    return AutoTokenizer.from_pretrained(BASE_PATH)


def whole(tokenizer, prompt: Messages, answer: str, template: str | None = None) -> list[int]:
    """transformers' own ids of prompt and answer in one text."""
    turns = [*prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("make", [llama3, tiny], ids=["llama3", "tiny"])
@pytest.mark.parametrize("prompt", [QUESTION, DIALOGUE], ids=["one turn", "dialogue"])
def test_prompt_and_response_joined_are_the_ids_of_the_whole_dialogue(make, prompt):
    tokenizer = make()
    chat = ChatFormat(tokenizer)
    joined = chat.prompt_ids(prompt) + chat.response_ids(ANSWER)
    expected = whole(tokenizer, prompt, ANSWER)
    assert joined == expected[: len(joined)]
    # What the template writes after the end of turn, a line break say, is no part of the response.
    assert not set(expected[len(joined) :]) & {*chat.stop_ids, tokenizer.bos_token_id}


@pytest.mark.parametrize(
    "make", [llama3, tiny, gpt2, sentencepiece], ids=["llama3", "tiny", "gpt2", "sentencepiece"]
)
@pytest.mark.parametrize("mode", ["auto", "default", "none"])
def test_a_prompt_has_exactly_one_bos_and_has_it_first(make, mode):
    tokenizer = make()
    for prompt in (QUESTION, user("a"), user("What is the story?")):
        ids = ChatFormat(tokenizer, mode).prompt_ids(prompt)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    # The usual way, a template's text through a plain call, would give two.
    text = tokenizer.apply_chat_template(
        list(QUESTION), chat_template=DEFAULT_TEMPLATE, tokenize=False
    )
    if make in (llama3, sentencepiece):
        assert tokenizer.encode(text).count(tokenizer.bos_token_id) == 2


def test_a_template_without_bos_gets_the_one_that_plain_encoding_adds():
    tokenizer = sentencepiece(template=DEFAULT_TEMPLATE.replace("{{ bos_token }}", ""))
    ids = ChatFormat(tokenizer).prompt_ids(QUESTION)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_bos_stays_so_where_plain_encoding_adds_none():
    tokenizer = gpt2()
    tokenizer.chat_template = DEFAULT_TEMPLATE.replace("{{ bos_token }}", "")
    ids = ChatFormat(tokenizer).prompt_ids(QUESTION)
    assert tokenizer.bos_token_id not in ids


def test_a_tokenizer_without_bos_gets_none():
    for mode in ("auto", "default", "none"):
        ids = ChatFormat(qwen(), mode).prompt_ids(QUESTION)
        assert None not in ids
        assert not ids or ids[0] not in ChatFormat(qwen(), mode).stop_ids


def test_thinking_is_switched_off_in_the_prompt():
    tokenizer = qwen()
    text = tokenizer.decode(ChatFormat(tokenizer).prompt_ids(QUESTION))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_without_a_template_the_stated_default_is_used():
    tokenizer = sentencepiece()
    chat = ChatFormat(tokenizer)
    assert chat.mode == "default"
    text = "<s>User:\nWhat is the capital of France?\n\nAssistant:\n"
    assert chat.prompt_ids(QUESTION) == tokenizer.encode(text, add_special_tokens=False)
    joined = chat.prompt_ids(QUESTION) + chat.response_ids(ANSWER)
    assert joined == whole(tokenizer, QUESTION, ANSWER, DEFAULT_TEMPLATE)[: len(joined)]


# -- ends ---------------------------------------------------------------------------------------


def test_the_end_of_turn_is_the_templates_and_all_end_tokens_stop():
    tokenizer = llama3()
    chat = ChatFormat(tokenizer, extra_stop_ids=(77, tokenizer.eos_token_id))
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == "<|eot_id|>"
    assert chat.stop_ids == (chat.end_id, tokenizer.eos_token_id, 77)
    assert chat.response_ids("a")[-1] == chat.end_id
    assert chat.end_id not in chat.response_ids("a", end=False)


@pytest.mark.parametrize(
    ("make", "mode", "end"),
    [
        (qwen, "auto", "<|im_end|>"),
        (lambda: qwen(eos="<|fim_pad|>"), "auto", "<|im_end|>"),
        (tiny, "auto", "</s>"),
        (tiny, "none", "</s>"),
        (llama3, "default", "<|end_of_text|>"),
        (llama3, "none", "<|end_of_text|>"),
        (sentencepiece, "auto", "</s>"),
    ],
)
def test_a_response_ends_with(make, mode, end):
    tokenizer = make()
    assert tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer, mode).end_id) == end


def test_a_template_without_an_end_of_turn_ends_with_eos():
    tokenizer = sentencepiece(template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert ChatFormat(tokenizer).end_id == tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = sentencepiece()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("make", [llama3, tiny, sentencepiece])
def test_an_end_token_spelt_in_a_text_does_not_end_it(make):
    tokenizer = make()
    for mode in ("auto", "none"):
        chat = ChatFormat(tokenizer, mode)
        text = f"a {tokenizer.eos_token} b"
        ids = chat.response_ids(text, end=False)
        assert not set(ids) & set(chat.stop_ids)
        assert chat.decode(ids) == text
        assert tokenizer.eos_token_id in tokenizer.encode(text)  # the usual way would end it


def test_decoding_stops_at_the_first_end_token_and_leaves_special_tokens_out():
    tokenizer = llama3()
    chat = ChatFormat(tokenizer)
    ids = chat.response_ids("Once upon a time.")
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert chat.decode([header, *ids, *chat.response_ids("So?")]) == "Once upon a time."
    assert chat.decode([chat.end_id]) == ""


# -- padding ------------------------------------------------------------------------------------


def test_a_pad_token_equal_to_eos_is_refused_with_tokens_to_take_instead():
    tokenizer = qwen(eos="<|endoftext|>", template=None)
    with pytest.raises(DataError, match=r"pad token '<\|endoftext\|>' .* Set base\.pad_token") as e:
        ChatFormat(tokenizer)
    candidate = str(e.value).partition("one of: ")[2].split(",")[0].strip("'")
    assert candidate == "<|fim_pad|>"  # not <|image_pad|>, which stands for an embedding
    chat = ChatFormat(tokenizer, pad_token=candidate)
    assert chat.pad_id == tokenizer.convert_tokens_to_ids(candidate)


def test_a_pad_token_equal_to_the_end_of_turn_is_refused():
    tokenizer = qwen(eos="<|endoftext|>")
    tokenizer.pad_token = "<|im_end|>"
    with pytest.raises(DataError, match="end-of-turn"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("<|nothing|>", "is not in the vocabulary"), ("<|im_end|>", "ends a response")],
)
def test_a_pad_token_of_the_recipe_must_exist_and_end_nothing(wanted, message):
    with pytest.raises(DataError, match=rf"base\.pad_token: .*{message}.* one of: "):
        ChatFormat(qwen(), pad_token=wanted)


@pytest.mark.parametrize(
    ("make", "extra", "pad"),
    [
        (llama3, (), "<|finetune_right_pad_id|>"),
        (sentencepiece, (), "<unk>"),
        (qwen, (), "<|endoftext|>"),
        (qwen, (0,), "<|fim_pad|>"),  # its own pad is one of the generation config's ends
        (gpt2, (), None),
    ],
)
def test_without_a_usable_pad_token_one_is_chosen_that_ends_nothing(make, extra, pad):
    tokenizer = make()
    chat = ChatFormat(tokenizer, extra_stop_ids=extra)
    assert chat.pad_id not in chat.stop_ids
    assert chat.pad_id != tokenizer.bos_token_id
    assert 0 <= chat.pad_id < len(tokenizer)
    assert pad is None or tokenizer.convert_ids_to_tokens(chat.pad_id) == pad
    assert ChatFormat(make(), extra_stop_ids=extra).pad_id == chat.pad_id


# -- refusals and identity ----------------------------------------------------------------------


def test_turns_that_a_template_refuses_are_named():
    chat = ChatFormat(sentencepiece(template=STRICT_TEMPLATE))
    with pytest.raises(RefusedMessages, match=r"roles system, user, .*roles must alternate"):
        chat.prompt_ids(DIALOGUE)


def test_the_hash_follows_template_tokenizer_and_mode_and_nothing_else():
    same = {ChatFormat(llama3()).sha256, ChatFormat(llama3(), extra_stop_ids=(9,)).sha256}
    assert len(same) == 1
    different = {
        ChatFormat(t, mode).sha256
        for t in (llama3(), qwen(), sentencepiece(), gpt2(), tiny())
        for mode in ("auto", "default", "none")
    }
    # auto is default for the two tokenizers without a template
    assert len(different) == 3 * 3 + 2 * 2
    tokenizer = qwen()
    before = ChatFormat(tokenizer).sha256
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    assert ChatFormat(tokenizer).sha256 != before


# -- plain continuation -------------------------------------------------------------------------


def test_a_dialogue_without_a_template_is_written_in_paragraphs():
    tokenizer = gpt2()
    ids = ChatFormat(tokenizer, "none").prompt_ids(DIALOGUE)
    expected = (
        "You can take it home.\n\nHuman: What is the story?\n\nAssistant: Once upon a time.\n\n"
        "Human: So?\n\nAssistant:"
    )
    assert tokenizer.decode(ids[1:]) == expected


def test_a_text_alone_stands_between_bos_and_eos():
    tokenizer = sentencepiece()
    ids = ChatFormat(tokenizer, "none").text_ids("Once upon a time")
    assert ids == [1, *encode(tokenizer, "Once upon a time"), 2]
    assert ChatFormat(qwen(), "none").text_ids("a", end=False) == encode(qwen(), "a")
