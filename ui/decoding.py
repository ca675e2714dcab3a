"""What the engine does with torch: load adapters, decode a batch, score it, read prompts."""

import gc
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lora_rlhf.chat.engine import Engine as Dialogue
from lora_rlhf.chat.engine import TextStream
from lora_rlhf.data.batches import make_sequences
from lora_rlhf.data.records import Messages
from lora_rlhf.errors import HardwareError
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Sampling, generate
from lora_rlhf.quiet import hush
from lora_rlhf.recipe import Recipe
from lora_rlhf.runs import Run
from lora_rlhf.training.material import (
    RunData,
    all_heldout_prompts,
    sort_prompts,
    training_prompts,
)
from lora_rlhf.training.rollout import adapter_logprobs, score_answers
from ui.asking import BASE, Ask, Finish, PoolPrompt, Prompts, Registered, Row
from ui.registry import Registry

_FORWARD_TOKENS = 8192  # of one forward that scores
_log = logging.getLogger(__name__)


class Decoder:
    """A loaded backbone under the adapters' public names.

    Args:
        recipe: of the run; its base is loaded.
    """

    def __init__(self, recipe: Recipe) -> None:
        hush()
        self.recipe = recipe
        self.backbone = Backbone.load(recipe.base)
        self._dialogue = Dialogue(recipe, self.backbone)
        # PEFT keeps adapters under names without dots, which run names may have.
        self._keys: dict[str, str | None] = {BASE: None}
        self._loaded = 0

    # -- what it is -----------------------------------------------------------------------------

    @property
    def template_sha256(self) -> str:
        """Of template and tokenizer."""
        return self.backbone.format.sha256

    @property
    def continues(self) -> bool:
        """Whether the base continues plain text."""
        return self._dialogue.continues

    @property
    def most_new_tokens(self) -> int | None:
        """What the context leaves after the longest prompt, if the model says."""
        return self._dialogue.most_new_tokens

    @property
    def device(self) -> str:
        """For people."""
        device = self.backbone.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def load(self, entry: Registered) -> None:
        """Put an adapter on the backbone under its public name (again, if it is there).

        Raises:
            CheckpointError: of `Adapters.load`; what was there under the name stays.
        """
        adapters = self.backbone.adapters
        self._loaded += 1
        key = f"a{self._loaded}"
        try:
            adapters.load(key, entry.path)
        except BaseException:
            if key in adapters.names:
                adapters.delete(key)
            raise
        adapters.freeze(key)
        self.unload(entry.name)
        self._keys[entry.name] = key

    def load_all(self, entries: Sequence[Registered]) -> None:
        """Load several, or none of those that were not there before.

        Raises:
            CheckpointError: of `load`.
        """
        fresh = [entry.name for entry in entries if entry.name not in self._keys]
        try:
            for entry in entries:
                self.load(entry)
        except BaseException:
            for name in fresh:
                self.unload(name)
            raise

    def unload(self, name: str) -> None:
        """Take an adapter off the backbone, if it is on it."""
        key = self._keys.pop(name, None)
        if key is not None:
            self.backbone.adapters.delete(key)

    def free(self) -> None:
        """Let the weights go; the object is of no use afterwards."""
        del self.backbone, self._dialogue
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- answers --------------------------------------------------------------------------------

    def batch(self, asks: Sequence[Ask], must_stop: Callable[[], bool]) -> "Batch":
        """Tokenise what is asked.

        Raises:
            DataError: a prompt over the limit.
        """
        prompts = [self._dialogue.prompt_ids(ask.messages) for ask in asks]
        lines = [
            _Line(ask, ids, dropped, TextStream(self.backbone.format))
            for ask, (ids, dropped) in zip(asks, prompts, strict=True)
        ]
        return Batch(self.backbone, [self._keys[a.adapter] for a in asks], lines, must_stop)

    def judged(self, batch: "Batch", registry: Registry) -> list[Row]:
        """The finished rows with the reward model's score and the KL to `sft`.

        Where memory does not suffice for that, without.
        """
        try:
            return self._judged(batch, registry)
        except (torch.cuda.OutOfMemoryError, HardwareError) as error:
            _log.warning("answers are shown without scores: %s", error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return batch.rows()

    def _judged(self, batch: "Batch", registry: Registry) -> list[Row]:
        rows, reward = batch.rows(), registry.reward
        whole = [i for i, row in enumerate(rows) if row.finish in ("eos", "length")]
        whole = [i for i in whole if batch.lines[i].stream.ids]
        if not whole:
            return rows
        prompts = [batch.lines[i].prompt for i in whole]
        responses = [batch.lines[i].stream.ids for i in whole]
        if reward is not None:
            scores = self._scores(reward, prompts, responses)
            unit = 1.0 / float(self.backbone.adapters.heads[self._keys[reward] or ""].gain)
            for i, score in zip(whole, scores, strict=True):
                found = replace(rows[i], score=_finite(score), score_unit=unit)
                rows[i] = replace(found, rm_adapter=reward)
        names = [rows[i].adapter for i in whole]
        own = self._logprobs(names, prompts, responses)
        # Measured once where both are one adapter: in another batch it would differ by rounding.
        references = [registry.reference_of(name) for name in names]
        others = [None if r == n else r for r, n in zip(references, names, strict=True)]
        theirs = self._logprobs(others, prompts, responses)
        for n, i in enumerate(whole):
            mine, other = own[n], own[n] if references[n] == names[n] else theirs[n]
            kl = None if mine is None or other is None else _finite(mine - other)
            rows[i] = replace(rows[i], logprob=_finite(mine), kl=kl)
        return rows

    def _scores(
        self, reward: str, prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> list[float]:
        key = self._keys[reward]
        assert key is not None
        scores = score_answers(self.backbone, prompts, responses, _FORWARD_TOKENS, adapter=key)
        return [float(s) for s in scores]

    def _logprobs(
        self,
        names: Sequence[str | None],
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
    ) -> list[float | None]:
        """Nats of each answer under its named adapter (None: unknown), one forward an adapter."""
        found: list[float | None] = [None] * len(names)
        for name in dict.fromkeys(n for n in names if n is not None):
            rows = [i for i, other in enumerate(names) if other == name]
            sequences = make_sequences(
                [prompts[i] for i in rows],
                [responses[i] for i in rows],
                self.backbone.format.pad_id,
                self.backbone.device,
            )
            logprobs = adapter_logprobs(
                self.backbone,
                self._keys[name],
                sequences,
                self._dialogue.temperature,
                _FORWARD_TOKENS,
            )
            for i, total in zip(rows, logprobs.sum(-1).tolist(), strict=True):
                found[i] = total
        return found

    def score(self, reward: str, items: Sequence[tuple[Messages, str]]) -> list[float]:
        """Scores of texts as answers that ended by themselves, in the order given."""
        if not items:
            return []
        prompts = [self.backbone.format.prompt_ids(messages) for messages, _ in items]
        responses = [self.backbone.format.response_ids(text) for _, text in items]
        return self._scores(reward, prompts, responses)

    # -- prompts --------------------------------------------------------------------------------

    def pool(self, run: Run, kind: Literal["train", "heldout"]) -> list[PoolPrompt]:
        """Prompts of a run's data, tokenisable within the limit of its recipe."""
        read = {"train": training_prompts, "heldout": all_heldout_prompts}[kind]
        return [
            PoolPrompt(prompt.messages, f"pool:{kind}#{number}")
            for number, (_, prompt) in enumerate(read(RunData.of(run, self.backbone)))
        ]

    def prompts_of(self, run: Run) -> Prompts:
        """Which prompts a run holds out and which it knows, by its own recipe."""
        return Prompts(*map(frozenset, sort_prompts(RunData.of(run, self.backbone))))


@dataclass
class _Line:
    ask: Ask
    prompt: list[int]
    dropped: int
    stream: TextStream
    ended: bool = False


class Batch:
    """Answers decoded together by `run`, in a thread, while `rows` is read in another."""

    def __init__(
        self,
        backbone: Backbone,
        adapters: list[str | None],
        lines: list[_Line],
        must_stop: Callable[[], bool],
    ) -> None:
        self.lines = lines
        self._backbone = backbone
        self._adapters = adapters
        self._must_stop = must_stop
        self._lock = threading.Lock()
        self._over = False

    def run(self) -> None:
        """Decode.

        Raises:
            HardwareError: out of memory.
        """
        try:
            for rows in self._alike():
                self._decode(rows)
        except torch.cuda.OutOfMemoryError:
            raise HardwareError(
                "The device has no memory left for this answer. Shorten the dialogue or the "
                "length, or ask for fewer answers at once."
            ) from None
        finally:
            with self._lock:
                self._over = True

    def _alike(self) -> list[list[int]]:
        """Rows that share a Sampling; in practice all of them."""
        groups: dict[Sampling, list[int]] = {}
        for i, line in enumerate(self.lines):
            groups.setdefault(_sampling(line.ask), []).append(i)
        return list(groups.values())

    def _decode(self, rows: list[int]) -> None:
        lines = [self.lines[i] for i in rows]

        def on_token(row: int, token: int) -> bool:
            with self._lock:
                lines[row].stream.add(token)
            return self._must_stop()

        if self._must_stop():
            return
        answers = generate(
            self._backbone,
            [line.prompt for line in lines],
            [line.ask.seed for line in lines],
            _sampling(lines[0].ask),
            on_token=on_token,
            adapters=[self._adapters[i] for i in rows],
        )
        with self._lock:
            for line, answer in zip(lines, answers, strict=True):
                line.ended = answer.ended
                line.stream.finish()

    def rows(self) -> list[Row]:
        """What there is of every answer."""
        with self._lock:
            return [
                Row(
                    line.ask.adapter,
                    line.stream.shown,
                    len(line.stream.ids),
                    self._finish_of(line),
                    dropped=line.dropped,
                )
                for line in self.lines
            ]

    def _finish_of(self, line: _Line) -> Finish | None:
        ids = line.stream.ids
        if line.ended or (ids and ids[-1] in self._backbone.format.stop_ids):
            return "eos"
        if len(ids) >= line.ask.max_new_tokens:
            return "length"
        return "stopped" if self._over else None


def _finite(value: float | None) -> float | None:
    """A number that a record may hold: a broken adapter may give others."""
    return value if value is not None and math.isfinite(value) else None


def _sampling(ask: Ask) -> Sampling:
    return Sampling(ask.max_new_tokens, ask.temperature, ask.top_p)
