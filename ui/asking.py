"""What the app asks of an engine, and what it gets back. Imports no torch.

`ui.engine.StudioEngine` is the real one; tests inject another that satisfies `Engine`.
"""

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lora_rlhf.data.records import Messages
from lora_rlhf.errors import UserError

BASE = "base"  # answers without any adapter
Finish = Literal["eos", "length", "stopped", "error"]


class Busy(UserError):
    """The device has more to do than it may promise; the message says how much."""


class Paused(UserError):
    """Nothing can be answered now, and why: still loading, or training has the device."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted.

    Attributes:
        adapter: one of `Engine.answerers()`.
        messages: the dialogue, the user's turn last.
        temperature: 0 takes the likeliest token.
        top_p: keep the smallest set of tokens with this much probability.
        max_new_tokens: the end token counted.
        seed: the same ask with the same seed gives the same answer, whatever is asked with it.
    """

    adapter: str
    messages: Messages
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """An answer as far as it has come.

    Attributes:
        adapter: who answers.
        text: so far.
        n_tokens: so far, the end token counted.
        finish: why it ended; None while it goes on. A "stopped" answer is not the model's whole
            answer and is never judged.
        score: of the reward adapter, once finished; None without one.
        kl: nats, log p(answer) under its adapter minus that under `sft`; None without `sft`.
        logprob: nats of the whole answer under its adapter, at the temperature of training.
        rm_adapter: whose score it is.
        score_unit: of `score`, in log-odds of being preferred: what the model's head was divided by
            when it was normalised.
        dropped: old turns left out for the prompt limit.
    """

    adapter: str
    text: str = ""
    n_tokens: int = 0
    finish: Finish | None = None
    score: float | None = None
    kl: float | None = None
    logprob: float | None = None
    rm_adapter: str | None = None
    score_unit: float = 1.0
    dropped: int = 0


def finished(rows: Sequence[Row]) -> bool:
    """Whether every answer is whole: ended by itself or at its length."""
    return all(row.finish in ("eos", "length") for row in rows)


@dataclass(frozen=True)
class Waiting:
    """Yielded while others have the device.

    Attributes:
        ahead: jobs before this one.
    """

    ahead: int


@dataclass(frozen=True)
class Facts:
    """What does not change while the app runs.

    Attributes:
        model: of the backbone, for people.
        revision: of a hub id.
        quantization: nf4 or none.
        template_sha256: of the chat format; "" until the backbone is loaded.
        max_prompt_tokens: of the run; longer prompts are refused.
        most_new_tokens: the longest answer that may be asked for.
        default_new_tokens: what a new tab starts with.
        temperature: of training.
        continues: the base continues plain text, so that every message is a new beginning.
        device: for people.
    """

    model: str
    revision: str | None = None
    quantization: str = "nf4"
    template_sha256: str = ""
    max_prompt_tokens: int = 256
    most_new_tokens: int = 256
    default_new_tokens: int = 96
    temperature: float = 1.0
    continues: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class PoolPrompt:
    """A prompt of the run's data.

    Attributes:
        messages: all turns before the answer.
        source: such as `pool:heldout#12`, for the record.
    """

    messages: Messages
    source: str


@dataclass(frozen=True)
class Prompts:
    """Hashes of the prompts of one run's own data.

    Attributes:
        unseen: held out, and known to none of its adapters.
        known: held out, and trained on all the same: in this run, or in one it goes on from.
        trained: all that its adapters know.
    """

    unseen: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Registered:
    """An adapter that the app knows.

    Attributes:
        name: RUN/ROLE, such as quickstart/policy; it is what votes are stored under.
        run: directory of its run.
        role: sft, reward or policy.
        path: its PEFT directory.
        sha256: of its weights.
    """

    name: str
    run: Path
    role: str
    path: Path
    sha256: str = field(default="", compare=False)


class Engine(Protocol):
    """One backbone with the adapters of one or several runs on it."""

    def facts(self) -> Facts:
        """What does not change."""

    def state(self) -> str:
        """The word ready, or a sentence on why nothing can be answered now."""

    def answerers(self) -> list[str]:
        """Names that can answer: base, then RUN/sft and RUN/policy of each run, oldest first."""

    def registered(self) -> list[Registered]:
        """Every adapter, reward adapters included."""

    def version(self) -> int:
        """Grows whenever the adapters change."""

    def reward_adapter(self) -> str | None:
        """The name of the reward adapter that scores: of the run adopted last."""

    def stream(
        self,
        asks: Sequence[Ask],
        *,
        who: str,
        cancel: threading.Event,
        background: bool = False,
    ) -> Generator[Waiting | list[Row], None, None]:
        """Decode all asks in one batch, yielding all rows as they grow, at most 20 times a second.

        The last item has every `finish` set, and scores where they can be had. Setting `cancel`
        ends it within a token, the unfinished rows as "stopped"; so does closing the iterator.

        Args:
            asks: what is wanted.
            who: the person, for the limit on jobs a person.
            cancel: set by whoever wants it to stop.
            background: give way to everybody else; may end early as "stopped".

        Raises:
            Busy: too many jobs wait, or this person has too many.
            Paused: of `state`.
            UserError: a prompt over the limit, an unknown adapter, a setting that is not allowed.
        """

    def score(
        self, items: Sequence[tuple[Messages, str]], adapter: str | None = None
    ) -> list[float]:
        """Scores of finished answers by a reward adapter (unset: `reward_adapter()`).

        Raises:
            UserError: there is none.
        """

    def pool(self, kind: Literal["train", "heldout"]) -> list[PoolPrompt]:
        """Prompts of the first run: those training may see, or those no stage has seen."""

    def prompts_of(self, run: Path) -> Prompts:
        """Which prompts a run holds out and which it knows, by its own recipe.

        Raises:
            UserError: its data cannot be read, or the backbone is not there.
        """

    def adopt(self, run: Path) -> list[str]:
        """Put the adapters of another run beside those there are; returns their names.

        Raises:
            UserError: made on another backbone, or it has none.
        """

    def consider(self, run: Path) -> list[str]:
        """As `adopt`, but the adapters are offered to nobody: `score` alone takes their names.

        Raises:
            UserError: as `adopt`.
        """

    def forget(self, run: Path) -> None:
        """Let go of what was considered and not adopted."""

    def release(self) -> None:
        """Give the device's memory back, for training; `stream` raises Paused until `restore`."""

    def restore(self) -> None:
        """Load again what `release` gave back."""

    def close(self) -> None:
        """Cancel what runs and free everything."""
