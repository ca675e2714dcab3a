"""An engine without a model: every answer is a function of its ask, as the real one's is."""

import hashlib
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.runs import Run
from ui.asking import BASE, Ask, Facts, PoolPrompt, Prompts, Registered, Row, Waiting

TEXT = "the owl sings under a silver moon and finds the old blue boat by the quiet river"
WORDS = TEXT.split()


class FakeEngine:
    """Satisfies `ui.asking.Engine`.

    Args:
        seconds_a_word: how slowly it streams.
        words: length of an answer.
        prompts: of each pool.
        run: whose adapters it pretends to have.
    """

    def __init__(
        self,
        seconds_a_word: float = 0.0,
        words: int = 12,
        prompts: int = 40,
        run: Path = Path("runs/quick"),
    ) -> None:
        self.seconds_a_word = seconds_a_word
        self.words = words
        self.paused = ""
        self.asked: list[Ask] = []
        self.considered: set[Path] = set()
        self._version = 1
        self._entries = [
            Registered(f"{run.name}/{role}", run, role, run / role, role * 8)
            for role in ("sft", "reward", "policy")
        ]
        self._pools = {
            kind: [
                PoolPrompt(user(f"Describe the {kind} thing number {i}."), f"pool:{kind}#{i}")
                for i in range(prompts)
            ]
            for kind in ("train", "heldout")
        }

    def facts(self) -> Facts:
        return Facts(model="fake", template_sha256="t", most_new_tokens=64, default_new_tokens=16)

    def state(self) -> str:
        return self.paused or "ready"

    def answerers(self) -> list[str]:
        return [BASE, *(e.name for e in self._entries if e.role != "reward")]

    def registered(self) -> list[Registered]:
        return list(self._entries)

    def version(self) -> int:
        return self._version

    def reward_adapter(self) -> str | None:
        return [e.name for e in self._entries if e.role == "reward"][-1]

    def answer(self, ask: Ask) -> str:
        """The whole text that it will stream."""
        return answer_of(ask, self.words)

    def stream(
        self,
        asks: Sequence[Ask],
        *,
        who: str,
        cancel: threading.Event,
        background: bool = False,
    ) -> Generator[Waiting | list[Row], None, None]:
        for ask in asks:
            if ask.adapter not in self.answerers():
                raise ConfigError(f"No adapter {ask.adapter!r}.")
        self.asked += asks
        texts = [self.answer(ask) for ask in asks]
        rows = [Row(ask.adapter) for ask in asks]
        for count in range(1, self.words + 1):
            if cancel.is_set():
                yield [replace(row, finish="stopped") for row in rows]
                return
            if self.seconds_a_word:
                time.sleep(self.seconds_a_word)
            rows = [
                replace(row, text=" ".join(text.split()[:count]), n_tokens=count)
                for row, text in zip(rows, texts, strict=True)
            ]
            yield rows
        yield [
            replace(
                row,
                finish="eos",
                score=score_of(row.text),
                kl=0.5,
                logprob=-10.0,
                rm_adapter=self.reward_adapter(),
            )
            for row in rows
        ]

    def score(self, items: Sequence[tuple[tuple, str]], adapter: str | None = None) -> list[float]:
        return [score_of(text) for _, text in items]

    def pool(self, kind: str) -> list[PoolPrompt]:
        return self._pools[kind]

    def prompts_of(self, run: Path) -> Prompts:
        """The pools, of whatever run; what its summary says was trained on is known."""
        keys = {k: {prompt_key(p.messages) for p in pool} for k, pool in self._pools.items()}
        known = frozenset(Run(run).trained_on_heldout())
        unseen, trained = keys["heldout"] - known, keys["train"] | known
        return Prompts(frozenset(unseen), known, frozenset(trained))

    def adopt(self, run: Path) -> list[str]:
        fresh = self._made_of(run)
        self.considered.discard(run)
        self._entries += fresh
        self._version += 1
        return [entry.name for entry in fresh]

    def consider(self, run: Path) -> list[str]:
        self.considered.add(run)
        return [entry.name for entry in self._made_of(run)]

    def forget(self, run: Path) -> None:
        self.considered.discard(run)

    @staticmethod
    def _made_of(run: Path) -> list[Registered]:
        if not run.is_dir():
            raise CheckpointError(f"{run} is not a run.")
        return [
            Registered(f"{run.name}/{role}", run, role, run / role, role * 8)
            for role in ("sft", "reward", "policy")
        ]

    def release(self) -> None:
        self.paused = "Training has the device."

    def restore(self) -> None:
        self.paused = ""

    def close(self) -> None:
        self.paused = "closed"


def answer_of(ask: Ask, words: int = 12) -> str:
    """What the fake answers: decided by adapter, prompt, sampling and seed alone."""
    key = f"{ask.adapter}|{ask.messages}|{ask.temperature}|{ask.seed}"
    digest = hashlib.sha256(key.encode()).digest()
    return " ".join(WORDS[digest[i % len(digest)] % len(WORDS)] for i in range(words)) + "."


def score_of(text: str) -> float:
    """A reward that is a function of the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] / 64 - 2
