"""What the Retrain tab does: dry run, start, cancel, decide. Knows no browser; admins alone."""

import shlex
from dataclasses import dataclass
from typing import Any

from lora_rlhf.errors import ConfigError
from ui.people import Person, require_admin
from ui.retrain_views import job_sentence, plan_html, progress_html, refusal_html, result_html
from ui.retraining import SCOPES, Wishes, why_too_little
from ui.studio import Studio

OVERRIDES_HINT = "such as reward.epochs=3 ppo.steps=40 seed=1"
FOR_ADMINS = "Retraining is for the admin alone. Your rankings count in it all the same."
_MOST_OVERRIDES = 2000


@dataclass(frozen=True)
class View:
    """What the tab shows of the retraining there is.

    Attributes:
        status: a sentence.
        tone: of the status: "", good or bad.
        bar: progress, as HTML.
        log: the end of what the process has said.
        result: before and after, as HTML.
        busy: it is worth looking again soon.
        can_start: nothing is at work and nothing waits for a decision.
        can_cancel: something trains.
        can_resume: something was stopped and can go on.
        can_adopt: something is finished.
        can_discard: something has ended and is not adopted.
    """

    status: str
    tone: str = ""
    bar: str = ""
    log: str = ""
    result: str = ""
    busy: bool = False
    can_start: bool = False
    can_cancel: bool = False
    can_resume: bool = False
    can_adopt: bool = False
    can_discard: bool = False


def view(studio: Studio, person: Person) -> View:
    """How things stand; whoever is no admin is told whose business it is, and nothing else."""
    if not person.is_admin:
        return View(FOR_ADMINS)
    job, progress = studio.jobs.job(), studio.jobs.progress()
    status, tone = job_sentence(job, progress)
    return View(
        status=status,
        tone=tone,
        bar=progress_html(job, progress),
        log=studio.jobs.log_tail(),
        result=result_html(job),
        busy=job.is_at_work,
        can_start=not job.is_at_work and job.state != "done",
        can_cancel=job.state in ("preparing", "running") and not job.cancelling,
        can_resume=job.state in ("failed", "cancelled"),
        can_adopt=job.state == "done",
        can_discard=job.state in ("done", "failed", "cancelled"),
    )


def wishes_of(
    base: Any,
    scope: Any,
    go_on: Any,
    earlier: Any,
    heldout: Any,
    fast: Any,
    force: Any,
    overrides: Any,
) -> Wishes:
    """What the panel asks for.

    Raises:
        ConfigError: values that no panel sends.
    """
    if scope not in SCOPES:
        raise ConfigError(f"How far: {str(scope)[:40]!r}. Allowed: {', '.join(SCOPES)}.")
    text = str(overrides or "")
    if len(text) > _MOST_OVERRIDES:
        raise ConfigError(f"The settings have over {_MOST_OVERRIDES} characters. Give fewer.")
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"The settings cannot be read ({error}). Close the quotes.") from error
    return Wishes(
        base=str(base or ""),
        scope=scope,
        go_on=bool(go_on),
        earlier=bool(earlier),
        heldout=bool(heldout),
        fast=bool(fast),
        force=bool(force),
        overrides=words,
    )


@dataclass(frozen=True)
class DryRun:
    """What would be trained on and how.

    Attributes:
        shown: as HTML; where the judgements are too few, how many are missing and why.
        can_start: they are enough.
    """

    shown: str
    can_start: bool


def dry_run(studio: Studio, person: Person, wishes: Wishes) -> DryRun:
    """Count and plan; nothing is changed.

    Raises:
        UserError: no admin, or it cannot be done; in a sentence.
    """
    require_admin(person, "Retraining")
    plan = studio.jobs.plan(wishes)
    refusal = why_too_little(plan.material, wishes)
    if refusal:
        return DryRun(refusal_html(plan, refusal), can_start=False)
    memory, sha256 = studio.jobs.memory(plan), plan.snapshot_sha256(studio.store)
    return DryRun(plan_html(plan, memory, sha256), can_start=True)


def start(studio: Studio, person: Person, wishes: Wishes) -> View:
    """Begin.

    Raises:
        UserError: no admin, or it cannot be done; in a sentence.
    """
    require_admin(person, "Retraining")
    studio.jobs.start(person.name, wishes)
    return view(studio, person)


def resume(studio: Studio, person: Person, force: Any = False) -> View:
    """Go on with what was cancelled or has failed; with force, past a weak reward model.

    Raises:
        UserError: no admin, or there is none.
    """
    require_admin(person, "Retraining")
    studio.jobs.resume(person.name, bool(force))
    return view(studio, person)


def cancel(studio: Studio, person: Person) -> View:
    """Stop after this step.

    Raises:
        UserError: no admin, or nothing trains.
    """
    require_admin(person, "Retraining")
    studio.jobs.cancel()
    return view(studio, person)


def adopt(studio: Studio, person: Person) -> View:
    """Offer what was trained to everybody.

    Raises:
        UserError: no admin, or nothing is finished.
    """
    require_admin(person, "Retraining")
    studio.jobs.adopt()
    return view(studio, person)


def discard(studio: Studio, person: Person) -> View:
    """Move what was trained out of the way.

    Raises:
        UserError: no admin, or there is nothing to discard.
    """
    require_admin(person, "Retraining")
    where = studio.jobs.discard()
    shown = where.relative_to(studio.runs_dir) if where.is_relative_to(studio.runs_dir) else where
    return View(
        f"Discarded. Its directory is now {shown} in the folder of runs.", "good", can_start=True
    )
