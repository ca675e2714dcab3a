"""Tasks and judgements for the tests."""

from collections.abc import Sequence
from itertools import count
from typing import Any

from lora_rlhf.data.records import prompt_key, user
from lora_rlhf.preferences.events import Judgement, Response, Task
from lora_rlhf.preferences.store import Judged

_numbers = count()


def response(rid: str, pos: int, **changes: Any) -> Response:
    facts = {"text": f"answer {rid}", "finish_reason": "eos", "adapter": "sft"}
    return Response(rid=rid, pos=pos, **facts | changes)


def task(answers: int | Sequence[dict[str, Any]] = 2, prompt: str = "", **changes: Any) -> Task:
    """A task of K answers r0, r1, ...; of one, a chat; a new prompt unless one is given."""
    rows = [{}] * answers if isinstance(answers, int) else answers
    turns = user(prompt or f"question {next(_numbers)}")
    facts: dict[str, Any] = {
        "mode": {1: "chat", 2: "pair"}.get(len(rows), "rank"),
        "annotator": "ana",
        "blind": True,
        "prompt": turns,
        "prompt_source": "typed",
        "prompt_sha256": prompt_key(turns),
        "responses": tuple(response(f"r{i}", i, **row) for i, row in enumerate(rows)),
    }
    return Task(**facts | changes)


def vote(of: Task, *groups: Sequence[str], **changes: Any) -> Judgement:
    """A judgement; of two answers r1 over r0 unless tie groups are given, best first."""
    ranking = tuple(map(tuple, groups)) or (("r1",), ("r0",))
    facts: dict[str, Any] = {
        "task_id": of.task_id,
        "annotator": of.annotator or "ana",
        "blind": of.blind,
        "type": {"pair": "pair", "rank": "rank", "chat": "like"}[of.mode],
        "ranking": ranking,
        "outcome": "decided" if len(ranking) > 1 or of.mode == "chat" else "tie",
        "shown_ts": 1000.0,
        "done_ts": 1020.0,
        "client_ms": 20_000,
        "server_ms": 20_100,
    }
    return Judgement(**facts | changes)


def skip(of: Task, **changes: Any) -> Judgement:
    return vote(of, ranking=(), outcome="skip", **changes)


def like(of: Task, up: bool = True, **changes: Any) -> Judgement:
    return vote(of, ("r0",), strength=1 if up else -1, **changes)


def judged(of: Task, *groups: Sequence[str], **changes: Any) -> Judged:
    """A judgement with its task, as the store gives it."""
    return Judged(of, vote(of, *groups, **changes), next(_numbers))
