"""The events of the store: what was shown, what a person said of it, and what was taken back.

Events are never updated. A pair is the ranking of two, so that there is one code path.
"""

import time
import uuid
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    model_validator,
)

from lora_rlhf.data.records import Message, prompt_key

Flag = Literal[
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "harmful",
    "sexual",
    "violent",
    "encourages_harm",
    "denigrates",
    "gives_harmful_advice",
    "expresses_opinion",
    "expresses_moral_judgment",
    "off_topic",
    "too_long",
    "unsafe",
    "fast",
]
"""Metadata of Ouyang et al. 2022, table 3, and the app's own."""
FLAGS: tuple[str, ...] = get_args(Flag)
ROLES = ("system", "user", "assistant")
UNFINISHED = frozenset({"stopped", "error"})
"""Finish reasons of answers that nobody may judge: the person never saw what the model meant."""

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,100}$")]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


def new_id() -> str:
    """A random id for an event."""
    return uuid.uuid4().hex


def _as_messages(turns: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    for turn in turns:
        if turn.keys() != {"role", "content"} or turn["role"] not in ROLES:
            raise ValueError(f"a turn has role ({', '.join(ROLES)}) and content, nothing else")
    if not turns:
        raise ValueError("a prompt has at least one turn")
    return turns


# Pydantic takes no typing.TypedDict before Python 3.12.
Turns = Annotated[
    tuple[Message, ...],
    GetPydanticSchema(
        lambda _, handler: handler(
            Annotated[tuple[dict[str, str], ...], AfterValidator(_as_messages)]
        )
    ),
]


class Part(BaseModel):
    """Frozen, and knows all its fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Sampler(Part):
    """How the task was chosen."""

    strategy: Literal["uniform", "active", "repeat", "import"] = "uniform"
    propensity: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Chance that this candidate was the one chosen, over all strategies in use."""
    score: float | None = None


class SamplingFacts(Part):
    """How an answer was sampled."""

    temperature: float
    top_p: float
    max_new_tokens: int


class Response(Part):
    """One answer as it was shown."""

    rid: Id
    pos: Count
    """Place on the screen, from 0."""
    adapter: str | None = None
    """Name of the adapter; None: the bare base."""
    adapter_sha256: str | None = None
    text: str
    sampling: SamplingFacts | None = None
    seed: int | None = None
    n_tokens: Count | None = None
    finish_reason: Literal["eos", "length", "stopped", "error", "import"]
    rm_adapter: str | None = None
    rm_score: float | None = None
    kl_to_ref: float | None = None
    """Nats of the whole answer."""
    logprob: float | None = None
    """Nats of the whole answer."""


class Event(Part):
    """What all events have."""

    schema_version: Literal[1] = 1
    ts: float = Field(default_factory=time.time)
    """Seconds since 1970."""


class Task(Event):
    """What was shown: a prompt and its answers."""

    kind: Literal["task"] = "task"
    task_id: Id = Field(default_factory=new_id)
    mode: Literal["pair", "rank", "chat"]
    annotator: Name | None = None
    """For whom it was made; None: for anyone."""
    blind: bool
    """Made to hide the adapters until the vote."""
    prompt: Turns
    prompt_source: str
    """typed, pool:<file>#<row>, import:<file>."""
    prompt_sha256: Hash
    """`data.records.prompt_key` of the prompt."""
    sampler: Sampler = Sampler()
    repeat_of: Id | None = None
    """An earlier task with the same answers under the same rids."""
    backbone: dict[str, str | None] = Field(default_factory=dict)
    template_sha256: str | None = None
    responses: tuple[Response, ...]
    app: dict[str, str] = Field(default_factory=dict)

    @property
    def id(self) -> str:
        """The task id, under the name other events have for theirs."""
        return self.task_id

    @property
    def rids(self) -> frozenset[str]:
        """Ids of its answers."""
        return frozenset(r.rid for r in self.responses)

    @property
    def unfinished(self) -> frozenset[str]:
        """Finish reasons of its answers that are not finished; none where it may be judged."""
        return frozenset(r.finish_reason for r in self.responses) & UNFINISHED

    def response(self, rid: str) -> Response:
        """The answer of a rid that it has."""
        return next(r for r in self.responses if r.rid == rid)

    @model_validator(mode="after")
    def _holds_together(self) -> "Task":
        count = len(self.responses)
        fits = {"pair": count == 2, "rank": count >= 2, "chat": count == 1}
        if not fits[self.mode]:
            raise ValueError(f"a task of mode {self.mode} cannot have {count} answers")
        if len(self.rids) != count:
            raise ValueError("two answers have the same rid")
        if {r.pos for r in self.responses} != set(range(count)):
            raise ValueError(f"the places of the answers are not 0 to {count - 1}")
        if prompt_key(self.prompt) != self.prompt_sha256:
            raise ValueError("prompt_sha256 is not the prompt's")
        return self


class Judgement(Event):
    """What a person said of a task."""

    kind: Literal["judgement"] = "judgement"
    id: Id = Field(default_factory=new_id)
    """Made when the task was shown, so that a vote sent twice is one vote."""
    task_id: Id
    annotator: Name
    session: str | None = None
    """A salted hash; never an address."""
    blind: bool
    """The adapters were hidden until the vote."""
    type: Literal["pair", "rank", "like"]
    ranking: tuple[tuple[Id, ...], ...] = ()
    """Tie groups of rids, best first; () for skip."""
    outcome: Literal["decided", "tie", "both_bad", "skip"]
    strength: Literal[-1, 1, 2] | None = None
    """Of a pair, 2: much better. Of a like, 1 or -1."""
    flags: tuple[Flag, ...] = ()
    note: Annotated[str, Field(max_length=4000)] = ""
    shown_ts: float
    done_ts: float
    client_ms: Count | None = None
    server_ms: Count | None = None
    keys: Count | None = None
    device: Literal["desktop", "mobile"] | None = None
    scores_visible: bool = False
    """Reward or KL stood beside the answers before the vote."""


class Retract(Event):
    """Takes a judgement back; the answer may then be judged again."""

    kind: Literal["retract"] = "retract"
    id: Id = Field(default_factory=new_id)
    ref: Id
    """Id of the judgement."""
    annotator: Name


class Erase(Event):
    """The trace that judgements were erased at a person's wish; only `Store.erase` makes it."""

    kind: Literal["erase"] = "erase"
    id: Id = Field(default_factory=new_id)
    annotator: Name
    count: Count
    """Judgements erased."""


AnyEvent = Task | Judgement | Retract | Erase
KINDS: dict[str, type[AnyEvent]] = {
    "task": Task,
    "judgement": Judgement,
    "retract": Retract,
    "erase": Erase,
}
_TYPE_OF_MODE = {"pair": "pair", "rank": "rank", "chat": "like"}


def why_refused(task: Task, judgement: Judgement) -> str | None:
    """What makes a judgement no judgement of this task, or None when it is one.

    It may not say that the adapters were hidden where the task shows them; the other way round is
    a person who asked for the names before voting.
    """
    if task.annotator not in (None, judgement.annotator):
        return "the task was made for somebody else"
    if judgement.type != _TYPE_OF_MODE[task.mode]:
        return f"a task of mode {task.mode} takes no judgement of type {judgement.type}"
    if judgement.blind and not task.blind:
        return "the task shows the adapters, and the judgement says it was blind"
    if judgement.outcome == "skip":
        empty = judgement.ranking == () and judgement.strength is None
        return None if empty else "a skip has neither a ranking nor a strength"
    if task.unfinished:
        reasons = ", ".join(sorted(task.unfinished))
        return f"an answer is not finished ({reasons}); it can be skipped"
    return _why_ranking_refused(task, judgement) or _why_strength_refused(judgement)


def _why_ranking_refused(task: Task, judgement: Judgement) -> str | None:
    groups = judgement.ranking
    named = [rid for group in groups for rid in group]
    if not all(groups) or len(set(named)) != len(named) or set(named) != task.rids:
        return "the ranking must name each of the task's answers once"
    decided = judgement.outcome == "decided"
    if judgement.type == "like":
        return None if decided else "a like is decided, or skipped"
    if decided and len(groups) == 1:
        return "decided needs one answer above another; all in one group is a tie or both_bad"
    if not decided and len(groups) > 1:
        return f"{judgement.outcome} needs all answers in one group"
    return None


def _why_strength_refused(judgement: Judgement) -> str | None:
    allowed: tuple[Any, ...] = (None,)
    if judgement.type == "like":
        allowed = (1, -1)
    elif judgement.type == "pair" and judgement.outcome == "decided":
        allowed = (None, 1, 2)
    if judgement.strength in allowed:
        return None
    return f"strength is {judgement.strength}; allowed here: {', '.join(map(str, allowed))}"
