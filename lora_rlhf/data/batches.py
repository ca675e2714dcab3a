"""Records as token rows, rows as padded tensors, and micro-batches by token budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lora_rlhf.data.records import Demonstration, Messages, Prompt, Ranking, Text
from lora_rlhf.data.template import ChatFormat, RefusedMessages


@dataclass(frozen=True)
class Sequences:
    """Prompt and response contiguous, padded on the right: no pass needs an attention mask.

    Attributes:
        input_ids: (n, t).
        lengths: (n,) live tokens of a row.
        prompt_lengths: (n,) how many of them are the prompt.
    """

    input_ids: Int[Tensor, "n t"]
    lengths: Int[Tensor, " n"]
    prompt_lengths: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def token_mask(self) -> Bool[Tensor, "n t"]:
        """True on response tokens, at their place in the row."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None]
        return (positions >= self.prompt_lengths[:, None]) & (positions < self.lengths[:, None])

    @property
    def response_mask(self) -> Bool[Tensor, "n r"]:
        """True on live response tokens, counted from each response's own start."""
        counts = self.lengths - self.prompt_lengths
        positions = torch.arange(int(counts.max()), device=counts.device)[None]
        return positions < counts[:, None]

    def select(self, rows: Sequence[int]) -> "Sequences":
        """These rows, trimmed to the longest of them."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Sequences(self.input_ids[rows, :width], lengths, self.prompt_lengths[rows])


def make_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Sequences:
    """Join prompts (not empty) and responses (not empty) into padded rows."""
    assert len(prompts) == len(responses) > 0
    rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    padded = [row + [pad_id] * (width - len(row)) for row in rows]
    return Sequences(
        torch.tensor(padded, device=device),
        torch.tensor([len(r) for r in rows], device=device),
        torch.tensor([len(p) for p in prompts], device=device),
    )


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices sorted by length, cut so that padded tokens stay within the budget.

    A row longer than the budget stands alone. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for index in order:
        # Ascending order makes the newest row the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# -- records to tokens --------------------------------------------------------------------------

Dropped = dict[str, int]


def tokenise_prompts(
    records: Sequence[Prompt], chat_format: ChatFormat, max_prompt_tokens: int
) -> tuple[list[tuple[list[int], Prompt]], Dropped]:
    """(ids, record) of each prompt within the limit, and how many were dropped, by reason.

    Raises:
        DataError: the chat template refuses every one of them.
    """
    fitter = _Fitter(chat_format, len(records), max_prompt_tokens)
    rows = []
    for record in records:
        ids = fitter.prompt(record.messages)
        if ids is not None:
            rows.append((ids, record))
    return rows, fitter.dropped


def tokenise_demonstrations(
    records: Sequence[Demonstration],
    chat_format: ChatFormat,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[list[tuple[list[int], list[int]]], Dropped]:
    """(prompt ids, response ids with the end token) of each record that fits.

    Over-long prompts and responses are dropped and counted, never cut; a plain continuation (mode
    `none`) is cut at the limit, without an end token, since it may stop anywhere.

    Returns:
        The rows, and reason -> count of what was dropped.

    Raises:
        DataError: the chat template refuses every prompt.
    """
    fitter = _Fitter(chat_format, len(records), max_prompt_tokens, max_response_tokens)
    rows = []
    for record in records:
        prompt = fitter.prompt(record.prompt)
        response = None if prompt is None else fitter.response(record.response)
        if prompt is not None and response is not None:
            rows.append((prompt, response))
    return rows, fitter.dropped


def tokenise_rankings(
    records: Sequence[Ranking],
    chat_format: ChatFormat,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[list[tuple[list[int], list[list[int]], Ranking]], Dropped]:
    """(prompt ids, ids of each response, record) of each ranking that fits as a whole.

    One over-long response drops its whole ranking: an answer cut short is not the one that was
    judged. In mode `none` it is cut, as in demonstrations.

    Raises:
        DataError: the chat template refuses every prompt.
    """
    fitter = _Fitter(chat_format, len(records), max_prompt_tokens, max_response_tokens)
    rows = []
    for record in records:
        prompt = fitter.prompt(record.prompt)
        responses = None if prompt is None else fitter.responses(record.responses)
        if prompt is not None and responses is not None:
            rows.append((prompt, responses, record))
    return rows, fitter.dropped


def tokenise_texts(
    records: Sequence[Text], chat_format: ChatFormat, max_tokens: int
) -> list[list[int]]:
    """Ids of plain texts with BOS and EOS; a longer one is cut at the limit, without EOS."""
    return [chat_format.text_ids(record.text)[:max_tokens] for record in records]


class _Fitter:
    """Ids of what fits; None for what does not, counted by reason."""

    def __init__(
        self, chat_format: ChatFormat, rows: int, max_prompt: int, max_response: int = 0
    ) -> None:
        self.dropped: Dropped = {}
        self._format, self._rows = chat_format, rows
        self._max_prompt, self._max_response = max_prompt, max_response

    def _drop(self, reason: str) -> int:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return self.dropped[reason]

    def prompt(self, messages: Messages) -> list[int] | None:
        try:
            ids = self._format.prompt_ids(messages)
        except RefusedMessages:
            # Odd rows are left out; a template that fits none of the data is the user's to mend.
            if self._drop("prompt refused by the chat template") == self._rows:
                raise
            return None
        if len(ids) <= self._max_prompt:
            return ids
        self._drop(f"prompt over {self._max_prompt} tokens")
        return None

    def response(self, text: str) -> list[int] | None:
        ids = self._format.response_ids(text)
        if len(ids) == 1:  # the end token alone: the tokenizer has nothing for this text
            self._drop("response without tokens")
        elif len(ids) <= self._max_response:
            return ids
        elif self._format.mode == "none":
            return ids[: self._max_response]
        else:
            self._drop(f"response over {self._max_response} tokens")
        return None

    def responses(self, texts: Sequence[str]) -> list[list[int]] | None:
        found = []
        for text in texts:
            ids = self.response(text)
            if ids is None:
                return None
            found.append(ids)
        return found
