"""The answers of all arms, decoded together and scored in one pass a batch."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_rlhf.evaluation.arms import ReadyArm, with_shots
from lora_rlhf.evaluation.choosing import OWN, Chooser
from lora_rlhf.model.generation import Answer, Sampling
from lora_rlhf.runs import write_atomically
from lora_rlhf.training.material import TokenisedPrompt
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import sample
from lora_rlhf.training.session import Session

DRAWS = "evaluate/draws.jsonl"
METRICS = "evaluate/metrics.jsonl"
_SEED = -1000  # a "step" that no training round has
_AGAIN = 100  # so many streams further draws an arm that repeats another one


@dataclass(frozen=True)
class Drawn:
    """An answer and what the reward model gives it; None without one."""

    answer: Answer
    score: float | None


@dataclass(frozen=True)
class _Job:
    """One row to decode: `stream` tells the draws of one adapter to one prompt apart."""

    adapter: str | None
    shots: int
    stream: int
    row: int
    ids: list[int]
    seed: int

    @property
    def key(self) -> tuple[str | None, int, int, int]:
        return self.adapter, self.shots, self.stream, self.row


def streams(arms: Sequence[ReadyArm]) -> list[list[int]]:
    """Which streams of random numbers each arm draws from, one an answer.

    All single-answer arms share stream 0, which makes their differences more exact; one that
    repeats another's adapter and shots draws anew. Best-of-n uses 1 to n, so that its first answer
    is not the single arm's own and that the answers of a smaller n are among those of a larger.
    """
    seen: dict[tuple[str | None, int, int], int] = {}
    found = []
    for arm in arms:
        key = (arm.adapter, arm.spec.shots, arm.spec.best_of)
        again = seen.get(key, 0)
        seen[key] = again + 1
        first = _AGAIN * again
        many = arm.spec.best_of
        found.append([first] if many == 1 else [first + n for n in range(1, many + 1)])
    return found


def draw(
    session: Session,
    arms: Sequence[ReadyArm],
    prompts: Sequence[TokenisedPrompt],
    sampling: Sampling,
    mixed: bool = True,
    chooser: Chooser | None = None,
) -> list[list[list[Drawn]]]:
    """Answers of every arm to every prompt, [arm][prompt][draw].

    Rows of all arms share the batches, each under its own adapter, longest prompts first; what two
    arms have in common is drawn once. A batch that is complete is on disk, and whoever asks for the
    same again after a kill gets it from there.

    Args:
        session: its reward adapter scores the answers, where there is one and no `chooser`.
        arms: with their adapters on the backbone.
        prompts: held out.
        sampling: of all answers.
        mixed: False decodes one arm after another, for comparison.
        chooser: scores the answers instead.
    """
    if chooser is None and OWN in session.backbone.adapters.heads:
        chooser = Chooser()
    wanted = streams(arms)
    jobs = _jobs(session, arms, wanted, prompts)
    batches = _batches(jobs, session.rollout_rows, mixed)
    plan = _describe(session, arms, prompts, sampling, mixed, chooser)
    found = _kept(session, plan, batches)
    done = len(found)
    keys = [job.key for batch in batches[:done] for job in batch]
    drawn = dict(zip(keys, (d for batch in found for d in batch), strict=True))
    plain = [ids for ids, _ in prompts]
    with session.steps("evaluate", done, len(batches)) as steps:
        for number, batch in enumerate(batches[done:], done + 1):
            answers = _decode(session, batch, plain, sampling, chooser, number)
            drawn |= dict(zip([job.key for job in batch], answers, strict=True))
            steps.done(number)
            if steps.interrupted:
                steps.leave()
    return [
        [[drawn[arm.adapter, arm.spec.shots, s, row] for s in own] for row in range(len(prompts))]
        for arm, own in zip(arms, wanted, strict=True)
    ]


def _jobs(
    session: Session,
    arms: Sequence[ReadyArm],
    wanted: Sequence[Sequence[int]],
    prompts: Sequence[TokenisedPrompt],
) -> list[_Job]:
    """Every row once, prompt by prompt."""
    prefixed = {
        shots: with_shots(session, prompts, shots) for shots in {a.spec.shots for a in arms}
    }
    jobs = {}
    for row in range(len(prompts)):
        for arm, own in zip(arms, wanted, strict=True):
            for stream in own:
                seed = row_seed(session.recipe.seed, _SEED - stream, row)
                ids = prefixed[arm.spec.shots][row]
                job = _Job(arm.adapter, arm.spec.shots, stream, row, ids, seed)
                jobs[job.key] = job
    return list(jobs.values())


def _batches(jobs: Sequence[_Job], rows: int, mixed: bool) -> list[list[_Job]]:
    """At most so many rows each, longest prompts first, so that little is padding."""
    if mixed:
        groups = [list(jobs)]
    else:
        keys = dict.fromkeys((j.adapter, j.shots, j.stream) for j in jobs)
        groups = [[j for j in jobs if (j.adapter, j.shots, j.stream) == key] for key in keys]
    batches = []
    for group in groups:
        ordered = sorted(group, key=lambda job: -len(job.ids))
        batches += [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    return batches


def _decode(
    session: Session,
    batch: Sequence[_Job],
    plain: Sequence[list[int]],
    sampling: Sampling,
    chooser: Chooser | None,
    number: int,
) -> list[Drawn]:
    """Decode and score one batch, and put it on disk as one line."""
    started = time.monotonic()
    answers = sample(
        session.backbone,
        [job.adapter for job in batch],
        [job.ids for job in batch],
        [job.seed for job in batch],
        sampling,
        session.rollout_rows,
    )
    decoded = time.monotonic()
    scores: list[float | None] = [None] * len(batch)
    if chooser is not None:
        # The judge reads the prompt as it was asked, not the demonstrations before it.
        asked, responses = [plain[job.row] for job in batch], [a.ids for a in answers]
        budget = session.budget.tokens
        each = chooser.score(session.backbone, asked, responses, budget)
        scores = list(chooser.combine(each).tolist())
    tokens = sum(len(a.ids) for a in answers)
    spent = {"decode": decoded - started, "score": time.monotonic() - decoded}
    rows = [[a.ids, a.ended, s] for a, s in zip(answers, scores, strict=True)]
    session.run.append(DRAWS, {"batch": number, "rows": rows})
    speed = tokens / max(spent["decode"] + spent["score"], 1e-9)
    facts = {f"seconds/{part}": round(seconds, 4) for part, seconds in spent.items()}
    facts |= {"rows": len(batch), "tokens": tokens, "tokens_per_second": round(speed, 1)}
    session.run.append(METRICS, {"step": number} | facts)
    return [Drawn(a, s) for a, s in zip(answers, scores, strict=True)]


# -- what is on disk ----------------------------------------------------------------------------


def _describe(
    session: Session,
    arms: Sequence[ReadyArm],
    prompts: Sequence[TokenisedPrompt],
    sampling: Sampling,
    mixed: bool,
    chooser: Chooser | None,
) -> str:
    """A hash of all that the answers and their batches depend on."""
    facts = {
        "arms": [
            [arm.identity, arm.adapter, own] for arm, own in zip(arms, streams(arms), strict=True)
        ],
        "prompts": [ids for ids, _ in prompts],
        "sampling": [sampling.max_new_tokens, sampling.temperature, sampling.top_p],
        "seed": session.recipe.seed,
        "rows": session.rollout_rows,
        "mixed": mixed,
        "chooser": chooser and chooser.identity(session.backbone),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _kept(session: Session, plan: str, batches: Sequence[Sequence[_Job]]) -> list[list[Drawn]]:
    """The first batches, as far as an evaluation of the same plan got; else a new beginning."""
    lines = session.run.lines(DRAWS)
    if not lines or lines[0].get("plan") != plan:
        header: dict[str, Any] = {"plan": plan}
        write_atomically(session.run.path / DRAWS, json.dumps(header) + "\n")
        write_atomically(session.run.path / METRICS, "")
        return []
    # What a crash has cut off the last line must not stand before the next one.
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(session.run.path / DRAWS, text)
    session.run.cut_lines_after(METRICS, len(lines) - 1)
    found = []
    for line, batch in zip(lines[1:], batches, strict=False):
        assert len(line["rows"]) == len(batch)
        found.append([Drawn(Answer(ids, ended, []), score) for ids, ended, score in line["rows"]])
    if found:
        session.tell(f"evaluate: {len(found)} of {len(batches)} batches of answers are there")
    return found
