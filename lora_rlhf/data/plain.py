"""Tokens of a text that goes on where another stopped, exact to the token."""

from typing import Any

# Stands before a continuation while it is tokenised and is cut off again. A line break merges
# with nothing in the tokenizers that need this.
_CONTEXT = "\n"
_WINDOW = 32


class Continuation:
    """Tokenises and decodes text as it stands in the middle of a document.

    Tokenizers of the SentencePiece kind put a space before every text they are given, and drop it
    when they decode. A response tokenised apart would then differ from the same words inside of a
    document: "rain" after "the " as well as after "t". With this class the ids of a beginning
    and of its continuation, joined, are the document's own, wherever no token spans the border.

    Args:
        tokenizer: any Hugging Face tokenizer.
        in_document: False gives the plain behaviour, for a continuation that begins a new segment.
    """

    def __init__(self, tokenizer: Any, in_document: bool = True) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        if in_document and adds_prefix_space(tokenizer):
            ids = encode(tokenizer, _CONTEXT)
            if ids and decode(tokenizer, ids) == _CONTEXT:
                self._context = ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens spelt in it taken as ordinary characters."""
        if self._context and text:
            ids = encode(self._tokenizer, _CONTEXT + text)
            known = len(self._context)
            if ids[:known] == self._context:
                return ids[known:]
        return encode(self._tokenizer, text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, its leading space kept, special tokens left out."""
        text = decode(self._tokenizer, self._context + ids)
        return text[len(_CONTEXT) :] if self._context else text


def split_document(tokenizer: Any, text: str, prompt_tokens: int) -> tuple[str, str] | None:
    """Cut a document into a prompt of at most `prompt_tokens` tokens and the rest.

    The cut is the last word border within the limit at which the ids of prompt and rest, joined,
    are the document's own; the white space goes with the rest. Text without word borders is cut
    between two tokens. Where a tokenizer allows no exact cut in the second half of the limit, the
    last word border, else the limit itself is taken.

    Args:
        tokenizer: a fast one, which knows where in the text its tokens lie.
        text: the document, without white space at its ends.
        prompt_tokens: at least 1, BOS not counted.

    Returns:
        (prompt, rest), or None for a document that has no more tokens than that.
    """
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=True,
        verbose=False,
    )
    spans: list[tuple[int, int]] = found["offset_mapping"]
    if len(spans) <= prompt_tokens:
        return None
    # Tokens far behind the cut do not depend on it.
    window = text[: spans[min(len(spans), prompt_tokens + _WINDOW) - 1][1]]
    starts = [spans[i][0] for i in range(prompt_tokens, prompt_tokens // 2, -1)]
    words = [len(text[:start].rstrip()) for start in starts]
    words = [cut for cut in dict.fromkeys(words) if text[cut : cut + 1].isspace()]
    borders = [cut for cut in [*words, *starts] if cut > 0]
    exact = (cut for cut in borders if _is_exact(tokenizer, window, cut))
    cut = next(exact, borders[0] if borders else 0)
    return (text[:cut], text[cut:]) if cut else None


def _is_exact(tokenizer: Any, text: str, cut: int) -> bool:
    joined = encode(tokenizer, text[:cut]) + Continuation(tokenizer).encode(text[cut:])
    return joined == encode(tokenizer, text)


def adds_prefix_space(tokenizer: Any) -> bool:
    """Whether a text without a leading space is tokenised as if it had one."""
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))
    return bool(tokens) and tokens[0].startswith(("\u2581", "\u0120"))  # SentencePiece's, GPT-2's


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone: nothing added, special tokens in it spelt out."""
    # Not verbose: texts over the model's length are dropped or cut later, and counted.
    ids: list[int] = tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids without special tokens, spaces before punctuation left as they are."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
