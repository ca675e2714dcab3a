"""What the data files hold, after reading: plain records without tokens."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict, TypeVar


class Message(TypedDict):
    """One turn of a dialogue; `role` is system, user or assistant."""

    role: str
    content: str


Messages = tuple[Message, ...]


def user(text: str) -> Messages:
    """A prompt of one user turn; also the beginning of a plain text."""
    return ({"role": "user", "content": text},)


# Messages are dicts, so that they go to a chat template and into JSON as they are. Dicts have no
# hash, therefore each record that holds them brings its own.


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response to imitate."""

    prompt: Messages
    response: str

    def __hash__(self) -> int:
        return hash((prompt_key(self.prompt), self.response))


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt with K >= 2 responses and their order.

    Attributes:
        prompt: all turns before the response.
        responses: in any order.
        groups: tie groups best first; each index into `responses` stands in exactly one.
        tag: whatever the file calls this row's kind.
        annotator: who ranked, where the file says so: the same order by two people is two rankings.
    """

    prompt: Messages
    responses: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    tag: str | None = None
    annotator: str | None = None

    def __hash__(self) -> int:
        rest = self.responses, self.groups, self.tag, self.annotator
        return hash((prompt_key(self.prompt), *rest))

    @property
    def strict_pairs(self) -> tuple[tuple[int, int], ...]:
        """(winner, loser) indices of all pairs that are not ties, best groups first."""
        return tuple(
            (winner, loser)
            for above, group in enumerate(self.groups)
            for winner in group
            for below in self.groups[above + 1 :]
            for loser in below
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt alone: PPO and evaluation make the responses."""

    messages: Messages

    def __hash__(self) -> int:
        return hash(prompt_key(self.messages))


@dataclass(frozen=True, slots=True)
class Text:
    """A document without a prompt."""

    text: str


Record = Demonstration | Ranking | Prompt | Text
R = TypeVar("R", Demonstration, Ranking, Prompt, Text)


def prompt_key(messages: Iterable[Message]) -> str:
    """SHA-256 of a prompt's roles and contents, white space at the ends of contents aside."""
    turns = [[m["role"], m["content"].strip()] for m in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def key_of(record: Record) -> str:
    """The key a split goes by: of the prompt, or of a text itself."""
    if isinstance(record, Prompt):
        return prompt_key(record.messages)
    if isinstance(record, Text):
        return prompt_key(user(record.text))
    return prompt_key(record.prompt)


def prompt_text(messages: Iterable[Message]) -> str:
    """What a judge reads: the last user turn; of a plain text, the given beginning."""
    turns = list(messages)
    assert turns
    asked = [m["content"] for m in turns if m["role"] == "user"]
    return asked[-1] if asked else turns[-1]["content"]
