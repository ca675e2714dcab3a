"""Sample responses, and read log-probabilities, values and scores off them.

Every pass goes through `Sequences`: prompt and response contiguous, padded on the right, so that
no pass needs an attention mask. The state before response token j of a row sits at position
prompt_length + j - 1; its log-probability and its value are both read there.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_rlhf.data.batches import Sequences, make_sequences, plan_batches
from lora_rlhf.errors import HardwareError
from lora_rlhf.losses.logprobs import token_logprobs
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Answer, Sampling, generate
from lora_rlhf.model.heads import ScalarHead
from lora_rlhf.model.memory import measure_phase

_log = logging.getLogger(__name__)


@dataclass
class Rollout:
    """A batch of sampled responses and all that PPO reads off them once.

    Attributes:
        sequences: prompt + response ids, n rows.
        ended: (n,) bool, the response has its end token.
        response_mask: (n, r) bool, True on live response tokens, the end token included.
        logprobs: (n, r) nats at the sampling temperature, by the training forward (G7).
        ref_logprobs: (n, r) of the frozen `sft` adapter.
        entropy: (n, r) nats, of the policy.
        values: (n, r), V of the state before each token.
        scores: (n,) normalised reward, before any missing-EOS rule.
        sampler_gap: mean |log-prob when drawn - logprobs| of a token, nats; 0 but for rounding.
    """

    sequences: Sequences
    ended: Tensor
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    sampler_gap: float


def sample(
    backbone: Backbone,
    adapter: str | Sequence[str | None] | None,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_rows: int = 128,
) -> list[Answer]:
    """Answers of an adapter (None: the bare base), or of one a prompt, to prompts, one a seed.

    Out of memory, fewer rows are decoded at once; the answers are the same, since none depends on
    its batch.

    Raises:
        HardwareError: a single row does not fit.
    """
    adapters = [adapter] * len(prompts) if isinstance(adapter, str | None) else adapter
    rows = min(max_rows, len(prompts), backbone.rows_that_fit or max_rows)
    while True:
        try:
            with measure_phase("rollout", backbone.device):
                return generate(backbone, prompts, seeds, sampling, rows, adapters=adapters)
        except torch.cuda.OutOfMemoryError as error:
            # The traceback would keep the failed batch's cache alive.
            error.__traceback__ = None
            if rows == 1:
                raise HardwareError(
                    "out of memory while a single answer is decoded. Lower "
                    "data.max_response_tokens, or take a smaller base."
                ) from None
            rows = backbone.rows_that_fit = rows // 2
            torch.cuda.empty_cache()
            _log.warning("out of memory: answers are decoded %d at a time from here on", rows)


def to_sequences(
    backbone: Backbone, prompts: Sequence[list[int]], answers: Sequence[Answer]
) -> tuple[Sequences, Tensor]:
    """Prompts and their answers as padded rows, and which of them ended, (n,)."""
    responses = [a.ids for a in answers]
    sequences = make_sequences(list(prompts), responses, backbone.format.pad_id, backbone.device)
    ended = torch.tensor([a.ended for a in answers], device=backbone.device)
    return sequences, ended


def micro_batches(sequences: Sequences, max_tokens: int) -> list[list[int]]:
    """Rows sorted by length into batches of at most so many padded tokens."""
    return plan_batches(sequences.lengths.tolist(), max_tokens)


def response_hidden(backbone: Backbone, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Hidden states before each live response token, (n_tokens, d), and the targets, (n_tokens,).

    Rows are flattened in order; `sequences.response_mask` scatters results back.
    """
    hidden = backbone.hidden_states(sequences.input_ids)
    response = sequences.token_mask
    return hidden[:, :-1][response[:, 1:]], sequences.input_ids[:, 1:][response[:, 1:]]


def policy_forward(
    backbone: Backbone, sequences: Sequences, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and hidden states of the adapter in use.

    Returns:
        logprobs (n, r) with gradient, entropy (n, r) without, hidden (n_tokens, d).
    """
    hidden, targets = response_hidden(backbone, sequences)
    logprobs, entropy = token_logprobs(
        hidden, backbone.head_weight, targets, temperature, head_bias=backbone.head_bias
    )
    mask = sequences.response_mask
    return spread(logprobs, mask), spread(entropy, mask), hidden


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Flat values of live tokens, (n_tokens,), to (n, r) with zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def value_forward(backbone: Backbone, sequences: Sequences, head: ScalarHead) -> Tensor:
    """V of the state before each response token under the adapter in use, (n, r), no LM head."""
    hidden, _ = response_hidden(backbone, sequences)
    return spread(head(hidden), sequences.response_mask)


def with_known_end(backbone: Backbone, sequences: Sequences) -> Sequences:
    """The same rows, each that ended doing so with the one end token of the training data.

    A model may stop with another (Qwen with <|endoftext|> for <|im_end|>); read there, the reward
    model would say what nothing has taught it (RM1).
    """
    rows = torch.arange(len(sequences), device=sequences.lengths.device)
    ends, ids = sequences.lengths - 1, sequences.input_ids.clone()
    stops = torch.tensor(backbone.format.stop_ids, device=ids.device)
    last = ids[rows, ends]
    ids[rows, ends] = torch.where(torch.isin(last, stops), backbone.format.end_id, last)
    return replace(sequences, input_ids=ids)


def score_forward(
    backbone: Backbone, sequences: Sequences, head: ScalarHead, raw: bool = False
) -> Tensor:
    """The head at the last real token, (n,): at the end token where there is one (RM1)."""
    hidden = backbone.hidden_states(sequences.input_ids)
    last = hidden[torch.arange(len(hidden), device=hidden.device), sequences.lengths - 1]
    return head.raw(last) if raw else head(last)


def map_rows(
    sequences: Sequences,
    max_tokens: int,
    forward: Callable[[Sequences], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Run a forward without gradients over micro-batches and put its rows back in order.

    Args:
        sequences: n rows.
        max_tokens: padded tokens in one forward.
        forward: micro-batch -> tensors of shape (m,) or (m, its own longest response).

    Returns:
        The same tensors for all rows, (n,) or (n, r) fp32, zeros past each response.
    """
    width = sequences.response_mask.shape[1]
    results: list[Tensor] = []
    todo = micro_batches(sequences, max_tokens)[::-1]
    while todo:
        rows = todo.pop()
        try:
            with torch.no_grad(), measure_phase("score", sequences.lengths.device):
                parts = forward(sequences.select(rows))
        except torch.cuda.OutOfMemoryError as error:
            error.__traceback__ = None  # it would keep the failed forward's tensors alive
            todo += _halves(rows)
            continue
        if not results:
            shapes = [(len(sequences), width)[: part.dim()] for part in parts]
            results = [torch.zeros(s, device=sequences.lengths.device) for s in shapes]
        for result, part in zip(results, parts, strict=True):
            if part.dim() == 1:
                result[rows] = part.float()
            else:
                result[rows, : part.shape[1]] = part.float()
    return tuple(results)


def _halves(rows: list[int]) -> list[list[int]]:
    """Half the rows each, for a forward that did not fit.

    Raises:
        HardwareError: a single row does not fit.
    """
    if len(rows) == 1:
        raise HardwareError(
            "out of memory while a single answer is scored. Lower data.max_prompt_tokens and "
            "data.max_response_tokens, or take a smaller base."
        )
    torch.cuda.empty_cache()
    _log.warning("out of memory: %d answers are scored in two halves", len(rows))
    return [rows[len(rows) // 2 :], rows[: len(rows) // 2]]


def score_answers(
    backbone: Backbone,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    max_tokens: int,
    raw: bool = False,
    adapter: str = "reward",
) -> Tensor:
    """Scores of a reward adapter for responses, (n,) on the CPU."""
    sequences = make_sequences(
        list(prompts), list(responses), backbone.format.pad_id, backbone.device
    )
    sequences = with_known_end(backbone, sequences)
    head = backbone.adapters.heads[adapter]
    with backbone.adapters.use(adapter):
        (scores,) = map_rows(
            sequences, max_tokens, lambda s: (score_forward(backbone, s, head, raw),)
        )
    return scores.cpu()


def adapter_logprobs(
    backbone: Backbone, adapter: str | None, sequences: Sequences, temperature: float, tokens: int
) -> Tensor:
    """Log-probabilities of the responses under an adapter, (n, r), without gradients."""
    with backbone.adapters.use(adapter):
        (logprobs,) = map_rows(
            sequences, tokens, lambda s: policy_forward(backbone, s, temperature)[:1]
        )
    return logprobs
