"""An engine whose arms answer with given texts: what a set makes of answers, without a model."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lora_rlhf.evaluation.suites.engine import Engine


class Answering(Engine):
    """Each arm gives its texts in the order of the prompts; `asked` is what it was called with.

    A prompt's ids are the letters of its text, so that a test reads what was asked.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self.texts = {arm: list(own) for arm, own in texts.items()}
        self.asked: list[tuple[list[str], int, tuple[str, ...]]] = []
        ids = SimpleNamespace(encode=_letters, prompt_ids=_turns)
        self.backbone: Any = SimpleNamespace(tokenizer=ids, format=ids)

    def answers(
        self, prompts: Sequence[list[int]], max_new_tokens: int, until: Sequence[str] = ()
    ) -> dict[str, list[str]]:
        """The given texts."""
        asked = ["".join(map(chr, ids)) for ids in prompts]
        assert all(len(own) == len(asked) for own in self.texts.values())
        self.asked.append((asked, max_new_tokens, tuple(until)))
        return self.texts


def _letters(text: str, **_: Any) -> list[int]:
    return [ord(c) for c in text]


def _turns(messages: Sequence[Mapping[str, str]]) -> list[int]:
    return _letters("".join(f"<{m['role']}>{m['content']}" for m in messages))
