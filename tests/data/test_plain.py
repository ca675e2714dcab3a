"""Cutting documents: prompt ids and response ids, joined, are the document's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from lora_rlhf.data.plain import Continuation, adds_prefix_space, encode, split_document
from lora_rlhf.data.records import user
from lora_rlhf.data.sources import load_demonstrations, load_text
from lora_rlhf.data.template import ChatFormat
from lora_rlhf.recipe import Source
from tests.data.fakes import gpt2, llama3, sentencepiece

GPT2, LLAMA3, SENTENCEPIECE = gpt2(), llama3(), sentencepiece()
KINDS = pytest.mark.parametrize(
    "tokenizer", [GPT2, LLAMA3, SENTENCEPIECE], ids=["gpt2", "llama3", "sentencepiece"]
)
words = st.lists(
    st.sampled_from(["Once", "upon", "a", "time", "rain", "France", "42!", "Ben.\nSo", "the"]),
    min_size=2,
    max_size=30,
)


def naive(tokenizer, prompt: str, response: str) -> list[int]:
    """The mutant: a response tokenised as if it began a document."""
    return encode(tokenizer, prompt) + encode(tokenizer, response.strip())


@KINDS
@given(words=words, cut=st.integers(1, 29))
def test_a_continuation_from_a_word_border_has_the_documents_own_ids(tokenizer, words, cut):
    cut = min(cut, len(words) - 1)
    prompt, response = " ".join(words[:cut]), " " + " ".join(words[cut:])
    chat = ChatFormat(tokenizer, "none")
    joined = chat.prompt_ids(user(prompt)) + chat.response_ids(response, end=False)
    assert joined[1:] == encode(tokenizer, prompt + response)
    assert chat.decode(chat.response_ids(response)) == response


@pytest.mark.parametrize(
    ("tokenizer", "response"),
    [(GPT2, " there was"), (SENTENCEPIECE, "\nSo Ben"), (SENTENCEPIECE, "me there")],
)
def test_naive_tokens_of_a_continuation_are_not_the_documents(tokenizer, response):
    prompt = "Once upon a ti"
    document = encode(tokenizer, prompt + response)
    assert naive(tokenizer, prompt, response) != document


def test_a_prefix_space_is_recognised():
    assert adds_prefix_space(SENTENCEPIECE)
    assert not adds_prefix_space(GPT2)
    # In the middle of a document "rain" after "t" and after "the " are two things.
    middle = Continuation(SENTENCEPIECE)
    assert middle.encode("rain") != middle.encode(" rain")
    assert encode(SENTENCEPIECE, "rain")[-1:] == middle.encode(" rain")[-1:]
    assert [middle.decode(middle.encode(t)) for t in ("rain", " rain", "\nrain", "")] == [
        "rain",
        " rain",
        "\nrain",
        "",
    ]


@KINDS
@given(words=words, tokens=st.integers(1, 12))
def test_a_document_is_cut_exactly_at_a_word_border_within_the_limit(tokenizer, words, tokens):
    text = " ".join(words).strip()
    parts = split_document(tokenizer, text, tokens)
    ids = encode(tokenizer, text)
    if len(ids) <= tokens:
        assert parts is None
        return
    assert parts is not None
    prompt, rest = parts
    assert prompt + rest == text
    assert 1 <= len(encode(tokenizer, prompt)) <= tokens
    assert encode(tokenizer, prompt) + Continuation(tokenizer).encode(rest) == ids


def test_a_cut_stands_at_the_last_word_border_and_leaves_the_space_to_the_rest():
    text = "Once upon a time there was a little boy"
    for tokenizer in (GPT2, SENTENCEPIECE):
        limit = len(encode(tokenizer, "Once upon a time")) + 1
        assert split_document(tokenizer, text, limit) == (
            ("Once upon a time", " there was a little boy")
            if len(encode(tokenizer, "Once upon a time there")) > limit
            else ("Once upon a time there", " was a little boy")
        )


def test_a_cut_leaves_the_space_to_the_rest_where_a_token_does_not_own_it():
    tokenizer = gpt2()
    # As GPT-2 and Llama 3 really have it: the offsets of a word leave its space out.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "Once upon a time"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert all(not text[start].isspace() for start, _ in offsets)
    prompt, rest = split_document(tokenizer, text, len(offsets) - 1) or ("", "")
    assert rest[0] == " "
    assert prompt + rest == text


def test_text_without_word_borders_is_cut_between_tokens():
    text = "Onceuponatimetherewasalittleboy" * 2
    prompt, rest = split_document(GPT2, text, 8) or ("", "")
    assert prompt + rest == text
    assert len(encode(GPT2, prompt)) <= 8
    assert encode(GPT2, prompt) + encode(GPT2, rest) == encode(GPT2, text)


@pytest.mark.parametrize("tokens", [4, 16, 48])
def test_a_real_tokenizer_reproduces_95_percent_of_real_documents(shared, tokens):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    path = str(shared / "data/tinystories/tinystories_v2_1700.txt")
    separator = "<|endoftext|>"
    texts = load_text(Source(path=path, separator=separator)).records
    # The folder's own count of the documents, in SOURCES.md.
    assert len(texts) == 1728
    source = Source(path=path, separator=separator, prompt_tokens=tokens, limit=400)
    loaded = load_demonstrations(source, tokenizer)
    assert not loaded.problems
    assert len(loaded.records) == 400
    chat = ChatFormat(tokenizer, "none", extra_stop_ids=(1, 2))
    exact = mutant = 0
    for text, record in zip(texts, loaded.records, strict=False):
        prompt = chat.prompt_ids(record.prompt)
        assert len(prompt) <= tokens  # BOS counted
        document = tokenizer.encode(text.text, verbose=False)
        exact += prompt + chat.response_ids(record.response, end=False) == document
        beginning = tokenizer.decode(document[1:tokens])
        mutant += [1, *naive(tokenizer, beginning, text.text[len(beginning) :])] == document
    assert exact / 400 >= 0.95
    assert mutant / 400 < 0.95  # a cut after the first tokens, whatever they are
