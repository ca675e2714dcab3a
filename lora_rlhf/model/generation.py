"""One lean decode loop: used by PPO, the simulated labeler, evaluation and chat."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.mixed import NotByRowError, Rows

# Below this share of live rows the finished ones are dropped from the batch and its cache.
_COMPACT_BELOW = 0.8


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the defaults are pure samples, which rollouts must be (G4).

    Attributes:
        max_new_tokens: the end token counted.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the smallest set of tokens with this much probability.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def is_pure(self) -> bool:
        """Whether log-probabilities at this temperature describe the samples exactly."""
        return self.top_p >= 1.0 and self.temperature > 0.0


@dataclass(frozen=True)
class Answer:
    """A sampled response.

    Attributes:
        ids: with its end token where it has one.
        ended: whether it stopped by itself rather than at the length limit.
        logprobs: nats of each token as it was drawn, by the decode forward. PPO recomputes them
            with the training forward (G7) and logs the gap.
    """

    ids: list[int]
    ended: bool
    logprobs: list[float]


class PreallocatedLayer(DynamicLayer):
    """A layer of KV cache that is allocated once: growing by `cat` took half of decode time.

    Args:
        capacity: most positions it will hold.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new positions in place; return all so far, (b, heads, length, head_dim)."""
        if not self.is_initialized:
            rows, heads, _, width = key_states.shape
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = key_states.new_empty(rows, heads, self.capacity, width)
            self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
            self.is_initialized = True
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (n,)."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


@torch.no_grad()
def generate(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_rows: int = 128,
    on_token: Callable[[int, int], bool | None] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[Answer]:
    """Sample one answer a prompt under the adapter in use, or each under its own.

    A row draws from its own seed alone, so its answer does not depend on its batch.

    Args:
        backbone: with the wanted adapter in use, where `adapters` does not say.
        prompts: token ids, not empty.
        seeds: one a prompt.
        sampling: temperature, top-p and the length limit.
        max_rows: rows decoded at once; more are decoded in turns, longest prompts first.
        on_token: called with (row, token id) as it comes; True ends that row, not `ended`.
        adapters: one a prompt (None: the bare base), decoded together; those that cannot share a
            batch (DoRA) in turns.

    Returns:
        One Answer a prompt, in the order of the prompts.
    """
    assert len(prompts) == len(seeds)
    assert adapters is None or len(adapters) == len(prompts)
    assert not backbone.causal_lm.training, "generation runs in evaluation mode alone"
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    todo = [order[start : start + max_rows] for start in range(0, len(order), max_rows)][::-1]
    while todo:
        rows = todo.pop()
        names = None if adapters is None else [adapters[i] for i in rows]
        callback = on_token and partial(_rename_row, on_token, rows)
        batch = _Decode(backbone, [prompts[i] for i in rows], [seeds[i] for i in rows], sampling)
        try:
            with _adapters_of_rows(backbone, names) as mixed:
                answers |= dict(zip(rows, batch.run(callback, mixed), strict=True))
        except NotByRowError:
            # Known before any token is drawn and shown; later it is an error of this loop.
            if names is None or any(batch.tokens):
                raise
            todo += [
                [i for i, own in zip(rows, names, strict=True) if own == name]
                for name in sorted(set(names), key=str)
            ]
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def _adapters_of_rows(
    backbone: Backbone, names: Sequence[str | None] | None
) -> Iterator[Rows | None]:
    """Use what the rows of a batch want; as rows of their own where they differ."""
    if names is None:
        yield None
    elif len(set(names)) == 1:
        with backbone.adapters.use(names[0]):
            yield None
    else:
        with backbone.adapters.mixed(names) as rows:
            yield rows


def _rename_row(
    on_token: Callable[[int, int], bool | None], rows: list[int], row: int, token: int
) -> bool | None:
    return on_token(rows[row], token)


def next_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token a row by inverting the distribution function at the row's own uniform number.

    Args:
        logits: (b, v).
        uniforms: (b,) in [0, 1), float64.
        sampling: temperature and top-p.

    Returns:
        Token ids, (b,), and their log-probabilities in nats, (b,).
    """
    if sampling.temperature == 0.0:
        likeliest = logits.argmax(-1)
        return likeliest, torch.zeros_like(likeliest, dtype=torch.float32)
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1.0:
        ranked, ids = probabilities.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= sampling.top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ranked)
    cumulative = probabilities.double().cumsum(-1)
    draws = uniforms[:, None] * cumulative[:, -1:]
    # right=True passes over tokens of probability zero, where the function is flat.
    drawn = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    taken = probabilities.gather(-1, drawn) / cumulative[:, -1:]
    return drawn[:, 0], taken.log().float()[:, 0]


def row_uniforms(seed: int, count: int) -> Tensor:
    """The uniform numbers a row draws from, (count,) float64: a function of its seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class _Decode:
    """The state of one batch while it is decoded."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: list[Sequence[int]],
        seeds: list[int],
        sampling: Sampling,
    ) -> None:
        self.backbone = backbone
        self.sampling = sampling
        width = max(len(p) for p in prompts)
        pad = backbone.format.pad_id
        device = backbone.device
        ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
        live = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        self.ids = torch.tensor(ids, device=device)
        self.mask = torch.zeros(
            len(prompts), width + sampling.max_new_tokens, dtype=torch.long, device=device
        )
        self.mask[:, :width] = torch.tensor(live, device=device)
        self.positions = (self.mask[:, :width].cumsum(-1) - 1).clamp_(min=0)
        draws = [row_uniforms(s, sampling.max_new_tokens) for s in seeds]
        self.uniforms = torch.stack(draws).to(device)
        self.stops = torch.tensor(sorted(backbone.format.stop_ids), device=device)
        self.rows = list(range(len(prompts)))
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)
        capacity = width + sampling.max_new_tokens
        self.cache = Cache(layer_class_to_replicate=partial(PreallocatedLayer, capacity))  # type: ignore[arg-type]

    def run(
        self, on_token: Callable[[int, int], bool | None] | None, mixed: Rows | None = None
    ) -> list[Answer]:
        """Decode until every row has ended or reached the limit; `mixed` follows the rows."""
        live = torch.ones(len(self.rows), dtype=torch.bool, device=self.backbone.device)
        length = self.ids.shape[1]
        for step in range(self.sampling.max_new_tokens):
            uniforms = self.uniforms[:, step]
            drawn, logprobs = next_tokens(self._logits(length), uniforms, self.sampling)
            stopped = torch.isin(drawn, self.stops)
            self._record(drawn.tolist(), logprobs.tolist(), live.tolist(), stopped.tolist())
            cancelled = self._show(live.tolist(), on_token)
            live = live & ~stopped & ~torch.tensor(cancelled, device=live.device)
            if not bool(live.any()):
                break
            self.ids = drawn[:, None]
            self.positions = self.positions[:, -1:] + 1
            self.mask[:, length] = 1
            length += 1
            if float(live.float().mean()) <= _COMPACT_BELOW:
                live = self._compact(live, mixed)
        parts = zip(self.tokens, self.ended, self.logprobs, strict=True)
        return [Answer(*part) for part in parts]

    def _logits(self, length: int) -> Tensor:
        """Logits of the next token, (b, v)."""
        with self.backbone.autocast():
            output = self.backbone.trunk(
                input_ids=self.ids,
                attention_mask=self.mask[:, :length],
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
            )
            head = self.backbone.causal_lm.get_output_embeddings()
            logits = head(output.last_hidden_state[:, -1])
        assert isinstance(logits, Tensor)
        return logits

    def _record(
        self, drawn: list[int], logprobs: list[float], live: list[bool], stopped: list[bool]
    ) -> None:
        for slot, row in enumerate(self.rows):
            if live[slot]:
                self.tokens[row].append(drawn[slot])
                self.logprobs[row].append(logprobs[slot])
                self.ended[row] = stopped[slot]

    def _show(
        self, live: list[bool], on_token: Callable[[int, int], bool | None] | None
    ) -> list[bool]:
        if on_token is None:
            return [False] * len(live)
        pairs = zip(self.rows, live, strict=True)
        return [on and bool(on_token(row, self.tokens[row][-1])) for row, on in pairs]

    def _compact(self, live: Tensor, mixed: Rows | None) -> Tensor:
        kept = live.nonzero()[:, 0]
        for layer in self.cache.layers:
            assert isinstance(layer, PreallocatedLayer)
            layer.keep(kept)
        if mixed is not None:
            mixed.keep(kept)
        self.ids, self.mask = self.ids[kept], self.mask[kept]
        self.positions, self.uniforms = self.positions[kept], self.uniforms[kept]
        self.rows = [self.rows[i] for i in kept.tolist()]
        return live[kept]
