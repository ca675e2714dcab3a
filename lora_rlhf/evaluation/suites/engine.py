"""Log-likelihoods and greedy answers of every arm, over the one backbone, kept as they come."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_rlhf.data.batches import Sequences, make_sequences, plan_batches
from lora_rlhf.errors import HardwareError
from lora_rlhf.evaluation.suites.kept import Kept, Value, identity_of, key_of
from lora_rlhf.losses.logprobs import default_chunk, logprobs_from_logits
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Sampling, generate
from lora_rlhf.training.rollout import map_rows, spread
from lora_rlhf.training.session import Session, Steps

Row = tuple[list[int], list[int]]
"""Ids of a context, not empty, and of its continuation, not empty."""
Scored = tuple[float, bool]
_UNKNOWN_LENGTH = 2048
_TAIL = 16  # tokens in which a stop string is looked for; more than any has


class Engine:
    """What a suite asks of the arms; a request is computed for all of them at once, and once.

    Args:
        session: with the adapters of all arms on its backbone.
        arms: name -> adapter; None: the bare base.
        folder: where results are kept, so that an interrupted suite goes on.
    """

    def __init__(self, session: Session, arms: Mapping[str, str | None], folder: Path) -> None:
        self.session = session
        self.backbone = session.backbone
        self.arms = dict(arms)
        self.identities = {n: identity_of(self.backbone, a) for n, a in self.arms.items()}
        files = {i: Kept(folder / f"{i}.jsonl") for i in sorted(set(self.identities.values()))}
        self._kept = {name: files[self.identities[name]] for name in self.arms}
        # Arms of the same weights ask once.
        self._asked = list({self.identities[name]: name for name in self.arms}.values())
        self.max_length = max_length(self.backbone)

    # -- scoring --------------------------------------------------------------------------------

    def loglikelihoods(self, rows: Sequence[Row]) -> dict[str, list[Scored]]:
        """Log p(continuation | context) in nats, and whether greedy decoding gives it, by arm.

        A row longer than the model's context loses tokens on its left.
        """
        rows = [self._fit(*row) for row in rows]
        keys = [key_of("score", *row) for row in rows]
        work = dict(zip(keys, rows, strict=True))
        todo = {name: self._missing(name, work) for name in self._asked}
        with self._steps(sum(map(len, todo.values()))) as steps:
            for name in self._asked:
                for batch in self._batches(name, work):
                    found = score_rows(self.backbone, [work[k] for k in batch], self._budget)
                    self._keep(steps, name, list(zip(batch, found, strict=True)))
        return {name: self._collect(name, keys) for name in self.arms}

    def _fit(self, context: list[int], continuation: list[int]) -> Row:
        assert context, "an empty context: give it BOS"
        assert continuation, "an empty continuation has no likelihood"
        if len(context) + len(continuation) <= self.max_length + 1:
            return context, continuation
        # The last token is predicted and never read, so that one more than the context fits.
        continuation = continuation[-self.max_length :]
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _batches(self, name: str, work: Mapping[str, Row]) -> Iterator[list[str]]:
        """Keys of what an arm has not scored yet, in batches, with its adapter in use."""
        missing = self._missing(name, work)
        lengths = [sum(map(len, work[key])) for key in missing]
        with self.backbone.adapters.use(self.arms[name]):
            for batch in plan_batches(lengths, self._budget):
                yield [missing[i] for i in batch]

    # -- answers --------------------------------------------------------------------------------

    def answers(
        self, prompts: Sequence[list[int]], max_new_tokens: int, until: Sequence[str] = ()
    ) -> dict[str, list[str]]:
        """The greedy answer of every arm to every prompt, all arms decoded in one batch.

        Args:
            prompts: ids; one that leaves no room for the answer loses tokens on its left.
            max_new_tokens: at most half of the model's context is given to an answer.
            until: an answer ends before the first of these strings.
        """
        room = min(max_new_tokens, self.max_length // 2)
        kept_length = self.max_length - room
        prompts = [list(p)[-kept_length:] for p in prompts]
        keys = [key_of("answer", p, room, list(until)) for p in prompts]
        work = dict(zip(keys, prompts, strict=True))
        jobs = [(name, key) for name in self._asked for key in self._missing(name, work)]
        jobs.sort(key=lambda job: -len(work[job[1]]))
        with self._steps(len(jobs)) as steps:
            while jobs:
                rows = min(
                    self.session.rollout_rows, self.backbone.rows_that_fit or len(jobs), len(jobs)
                )
                batch = jobs[:rows]
                texts = self._decode([(self.arms[n], work[k]) for n, k in batch], room, until)
                if texts is None:
                    continue
                for name in self._asked:
                    own = [(k, t) for (n, k), t in zip(batch, texts, strict=True) if n == name]
                    self._keep(steps, name, own)
                jobs = jobs[rows:]
        return {name: self._collect(name, keys) for name in self.arms}

    def _decode(
        self, rows: Sequence[tuple[str | None, list[int]]], room: int, until: Sequence[str]
    ) -> list[str] | None:
        """Texts of a batch; None where it did not fit and a smaller one is to be tried.

        Raises:
            HardwareError: a single row does not fit.
        """
        watch = _Watch(self.backbone.tokenizer, until)
        sampling = Sampling(room, temperature=0.0)
        prompts, seeds = [ids for _, ids in rows], [0] * len(rows)
        adapters = [adapter for adapter, _ in rows]
        try:
            found = generate(
                self.backbone, prompts, seeds, sampling, len(rows), watch.ends, adapters
            )
        except torch.cuda.OutOfMemoryError as error:
            error.__traceback__ = None  # it would keep the failed batch's cache alive
            if len(rows) == 1:
                raise HardwareError(
                    "out of memory while a single answer of a suite is decoded. Leave its task "
                    "out, or take a smaller base."
                ) from None
            self.backbone.rows_that_fit = len(rows) // 2
            torch.cuda.empty_cache()
            return None
        return [self._text(answer.ids, until) for answer in found]

    def _text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """An answer as text, to its first stop token or string."""
        live: list[int] = []
        for token in ids:
            if token in self.backbone.format.stop_ids:
                break
            live.append(token)
        text: str = self.backbone.tokenizer.decode(live, skip_special_tokens=True)
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text

    # -- what is there --------------------------------------------------------------------------

    @property
    def _budget(self) -> int:
        return self.session.budget.tokens

    def _missing(self, name: str, work: Mapping[str, Any]) -> list[str]:
        return [key for key in work if key not in self._kept[name]]

    def _collect(self, name: str, keys: Sequence[str]) -> list[Any]:
        return [self._kept[name][key] for key in keys]

    def _keep(self, steps: "_Counted", name: str, found: Sequence[tuple[str, Value]]) -> None:
        self._kept[name].put(found)
        steps.add(len(found))

    def _steps(self, total: int) -> "_Counted":
        return _Counted(self.session, total)


class _Counted:
    """A bar over so many requests; Ctrl-C leaves after a batch, which is kept."""

    def __init__(self, session: Session, total: int) -> None:
        self._session, self._total, self._done = session, total, 0
        self._context: Any = None
        self._steps: Steps | None = None

    def __enter__(self) -> "_Counted":
        if self._total:
            self._context = self._session.steps("evaluate", 0, self._total)
            self._steps = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)

    def add(self, count: int) -> None:
        """So many more are on disk."""
        self._done = min(self._done + count, self._total)
        if self._steps is not None:
            self._steps.done(self._done)
            if self._steps.interrupted:
                self._steps.leave()


class _Watch:
    """Ends a row as soon as its text holds a stop string."""

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self._tokenizer, self._until = tokenizer, [stop for stop in until if stop]
        self._tails: dict[int, list[int]] = {}

    def ends(self, row: int, token: int) -> bool:
        """Whether this token ends the row; for `generate`."""
        if not self._until:
            return False
        tail = self._tails[row] = [*self._tails.get(row, []), token][-_TAIL:]
        text = self._tokenizer.decode(tail)
        return any(stop in text for stop in self._until)


# -- the forward --------------------------------------------------------------------------------


def score_rows(backbone: Backbone, rows: Sequence[Row], max_tokens: int) -> list[Scored]:
    """Log p(continuation | context) of each row under the adapter in use, and whether it is greedy.

    Logits exist for some rows of continuation tokens at a time, never for a whole batch.
    """
    contexts, continuations = [c for c, _ in rows], [r for _, r in rows]
    sequences = make_sequences(contexts, continuations, backbone.format.pad_id, backbone.device)

    def forward(part: Sequences) -> tuple[Tensor, Tensor]:
        # The last token is predicted and not read: it may lie past the model's last position.
        hidden = backbone.hidden_states(part.input_ids[:, :-1])
        mask = part.token_mask[:, 1:]
        logprobs, greedy = _target_logprobs(backbone, hidden[mask], part.input_ids[:, 1:][mask])
        live = part.response_mask
        misses = spread((~greedy).float(), live).sum(-1)
        return spread(logprobs, live).sum(-1), (misses == 0).float()

    totals, greedy = map_rows(sequences, max_tokens, forward)
    return [(t, g == 1.0) for t, g in zip(totals.tolist(), greedy.tolist(), strict=True)]


def _target_logprobs(backbone: Backbone, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and whether each is the likeliest token, (n,), in blocks."""
    weight, bias = backbone.head_weight, backbone.head_bias
    logprobs = torch.empty(len(hidden), device=hidden.device)
    greedy = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    rows = default_chunk(weight.shape[0])
    for start in range(0, len(hidden), rows):
        block = slice(start, start + rows)
        logits = F.linear(hidden[block].to(weight.dtype), weight, bias)
        logprobs[block] = logprobs_from_logits(logits, targets[block])
        greedy[block] = logits.argmax(-1) == targets[block]
    return logprobs, greedy


def max_length(backbone: Backbone) -> int:
    """Positions that the model has; 2048 where its config does not say."""
    config = backbone.causal_lm.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        found = getattr(config, name, None)
        if found:
            return int(found)
    return _UNKNOWN_LENGTH
