"""What the Retrain tab shows, as HTML made of escaped text."""

import html
import re
from collections.abc import Iterator, Sequence

from lora_rlhf.display import short_time
from ui.job import Job, Progress
from ui.measuring import BeforeAfter, Share, prompts_in, too_few
from ui.planning import Plan
from ui.preparing import Memory
from ui.retraining import removed_lines

FORCE = "Go on to PPO though the reward model may be no better than a coin"
RESUME = "Go on with it"
_GO_ON = f"press {RESUME}"
_MOST_ADAPTERS = 12
_TONES = {"done": "good", "adopted": "good", "failed": "bad"}


def plan_html(plan: Plan, memory: Memory, sha256: str) -> str:
    """What a retraining would do: the dry run."""
    rows = [*_material_rows(plan), *_training_rows(plan)]
    rows.append(("Memory", memory_sentence(memory)))
    rows.append(("Snapshot", f"SHA-256 {sha256}"))
    return _table(f"{plan.name}, from {plan.base.name}. Nothing is changed yet.", rows)


def refusal_html(plan: Plan, why: str) -> str:
    """Why there is too little to train on, and what of the votes was left out and why."""
    said = f'<p class="train-refusal" role="alert">! {html.escape(why)}</p>'
    left_out = ["Left out"] if plan.material.removed else []
    return said + _table("What there is.", [*_material_rows(plan)], left_out)


def _table(title: str, rows: Sequence[tuple[str, str]], marked: Sequence[str] = ()) -> str:
    cells = "".join(
        f'<tr{" class=marked" * (name in marked)}><th scope="row">{html.escape(name)}</th>'
        f"<td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return (
        f'<table class="train-plan"><caption>{html.escape(title)}</caption>'
        f"<tbody>{cells}</tbody></table>"
    )


def _material_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    found = plan.material
    yield (
        "New rankings",
        f"{_number(found.judgements, 'judgement')} of {_number(found.prompts, 'prompt')} by "
        f"{_number(found.annotators, 'annotator')}: {_number(found.pairs, 'strict pair')}",
    )
    if found.adapters:
        counts = sorted(found.adapters.items(), key=lambda item: -item[1])
        shown = [f"{name} {number}" for name, number in counts[:_MOST_ADAPTERS]]
        more = len(counts) - len(shown)
        yield "Answers by", ", ".join(shown) + (f" and {more} more" if more else "")
    yield "Left out", "; ".join(removed_lines(found.removed)) or "nothing"
    yield "Earlier rankings", f"{found.earlier} added" if found.earlier else "none"
    for name, side in (("To learn from", found.train), ("To choose the best step", found.heldout)):
        yield (
            name,
            f"{_number(side.rankings, 'ranking')} of {_number(side.prompts, 'prompt')}: "
            f"{_number(side.pairs, 'pair')}",
        )
    pairs = sum(len(r.strict_pairs) for r in found.measured)
    yield (
        "To measure before and after",
        too_few(prompts_in(found.measured))
        or f"{_number(len(found.measured), 'ranking')} by people on held-out prompts: "
        f"{_number(pairs, 'pair')}",
    )


def _training_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    assert recipe.reward is not None
    reward = recipe.reward
    yield "Reward model", _start_of(plan, reward.start_from, "reward")
    yield (
        "Its training",
        f"epochs {reward.epochs:g}, prompts a step {reward.batch_size}, learning rate "
        f"{reward.learning_rate:g}",
    )
    if "ppo" in plan.wishes.stages and recipe.ppo is not None:
        ppo = recipe.ppo
        yield (
            "PPO",
            f"{_start_of(plan, ppo.start_from, 'policy')}, {ppo.steps} rounds of "
            f"{ppo.batch_size} answers, KL coefficient {ppo.kl_coef:g}",
        )
    if "evaluate" in plan.wishes.stages and recipe.evaluate is not None:
        evaluate = recipe.evaluate
        judge = evaluate.judge or "the reward model itself"
        yield "Evaluation", f"{evaluate.prompts} held-out prompts, judged by {judge}"
    seconds = plan.seconds
    yield (
        "Time",
        "not known"
        if seconds is None
        else f"about {short_time(seconds)}, as {plan.base.name} took",
    )


def _start_of(plan: Plan, start_from: str | None, role: str) -> str:
    if start_from is None:
        return "starts as a copy of sft"
    return f"goes on from {plan.base.name}/{role}"


def memory_sentence(memory: Memory) -> str:
    """Whether chat stays loaded while it trains, and why."""
    numbers = (
        f"training needs {memory.needs:.1f} GB, {memory.held:.1f} GB are in use, "
        f"{memory.usable:.1f} GB can be used ({memory.card})"
    )
    if memory.fits_beside:
        return f"Chat stays loaded: {numbers}."
    alone = "" if memory.needs <= memory.usable else " Even alone it may not fit."
    return f"Chat is unloaded meanwhile and comes back afterwards: {numbers}.{alone}"


# -- a job --------------------------------------------------------------------------------------


def job_sentence(job: Job, progress: Progress) -> tuple[str, str]:
    """Where a retraining stands, and the tone to say it in."""
    name = job.name or "The new run"
    sentences = {
        "none": "Nothing is being retrained here.",
        "preparing": f"{name} is being prepared.",
        "running": _running(job, progress),
        "measuring": f"{name} is trained. Its reward model is being compared with the one before.",
        "done": f"{name} is trained. Adopt it to offer it to everybody, or discard it. {job.error}",
        "failed": f"{name} has failed: {in_the_page(job.error)}",
        "cancelled": f"{name} was cancelled. It can go on from its last checkpoint.",
        "adopted": f"{name} is adopted: its adapters are in every picker.",
        "discarded": f"{name} is discarded. Its directory lies under .discarded beside the runs.",
    }
    return sentences[job.state].strip(), _TONES.get(job.state, "")


def _running(job: Job, progress: Progress) -> str:
    """Without the step, which changes too often to be read aloud."""
    paused = " Chat is unloaded meanwhile." if job.released else ""
    stopping = " It stops after this step." if job.cancelling else ""
    if not progress.stage:
        return f"{job.name} is starting.{paused}{stopping}"
    number = job.stages.index(progress.stage) + 1 if progress.stage in job.stages else 1
    return (
        f"{job.name} is being trained: stage {number} of {len(job.stages)}, "
        f"{progress.stage}.{paused}{stopping}"
    )


def in_the_page(error: str) -> str:
    """What the command line advises, as somebody does it here."""
    forced = re.sub(
        r"(?:pass|add) --force(?: to go on)?", f"tick {FORCE!r} under More and {_GO_ON}", error
    )
    return re.sub(r"(?:go on with )?--resume(?: again)?", _GO_ON, forced)


def progress_html(job: Job, progress: Progress) -> str:
    """A bar with step and time left while something is trained; "" else."""
    if not job.is_at_work:
        return ""
    share = progress.step / progress.total if progress.total else 0.0
    words = "loading the backbone"
    if progress.total:
        words = f"step {progress.step} of {progress.total}"
    if progress.seconds_left is not None:
        words += f", {short_time(progress.seconds_left)} left of this stage"
    return (
        f'<div class="train-progress"><span class="train-bar" role="progressbar" '
        f'aria-label="progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></span>'
        f"<span>{html.escape(words)}</span></div>"
    )


# -- before and after ---------------------------------------------------------------------------


def result_html(job: Job) -> str:
    """What its reward model was measured to be, or why it was not; then what proves nothing."""
    parts = []
    if job.result is not None:
        parts.append(_measured_html(job.result))
    elif job.state in ("done", "adopted") and not job.error:
        parts.append(f'<p class="train-verdict">{html.escape(too_few(job.measurable))}</p>')
    if job.choosing is not None:
        parts.append(_choosing_html(job.choosing))
    return "".join(parts)


def _measured_html(result: BeforeAfter) -> str:
    """Accuracies with their intervals on one scale, the change on its own, and a verdict."""
    bars = _accuracies(result)
    if result.change is not None:
        bars += _bar("change", result.change, -1.0, 1.0, 0.0)
    about = (
        f"Pairs in the order people gave them: {_number(result.pairs, 'pair')} of "
        f"{_number(result.prompts, 'held-out prompt')}, 95 % intervals by prompt"
    )
    return (
        f'<figure class="train-result"><figcaption>{html.escape(about)}</figcaption>'
        f'{bars}<p class="train-verdict">{html.escape(_overlap(result))}</p></figure>'
    )


def _choosing_html(result: BeforeAfter) -> str:
    """Accuracies alone: where a step was chosen for them, they are no verdict."""
    about = (
        f"On the rankings that also chose the step: {_number(result.pairs, 'pair')} of "
        f"{_number(result.prompts, 'prompt')}. Training keeps the step that does best on these, "
        f"which flatters the new model: they show that it has learned, not that it is better."
    )
    return (
        f'<figure class="train-result"><figcaption>{html.escape(about)}</figcaption>'
        f"{_accuracies(result)}</figure>"
    )


def _accuracies(result: BeforeAfter) -> str:
    after = _bar(f"after: {result.after_adapter}", result.after, 0.0, 1.0, 0.5)
    if result.before is None or result.before_adapter is None:
        return after
    return _bar(f"before: {result.before_adapter}", result.before, 0.0, 1.0, 0.5) + after


def _overlap(result: BeforeAfter) -> str:
    before, after = result.before, result.after
    if before is None:
        return result.verdict
    overlap = before.low <= after.high and after.low <= before.high
    return f"{'The two intervals overlap. ' if overlap else ''}{result.verdict}"


def _bar(label: str, share: Share, low: float, high: float, middle: float) -> str:
    def at(value: float) -> float:
        return 100 * (min(high, max(low, value)) - low) / (high - low)

    signed = "+" if low < 0 else ""
    said = f"{share.value:{signed}.1%} ({share.low:{signed}.1%} to {share.high:{signed}.1%})"
    width = max(at(share.high) - at(share.low), 0.5)
    return (
        f'<div class="train-row"><span class="train-label">{html.escape(label)}</span>'
        f'<span class="train-track" aria-hidden="true">'
        f'<i class="middle" style="left:{at(middle):.1f}%"></i>'
        f'<i class="span" style="left:{at(share.low):.1f}%;width:{width:.1f}%"></i>'
        f'<i class="point" style="left:{at(share.value):.1f}%"></i></span>'
        f'<span class="train-number">{html.escape(said)}</span></div>'
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def hint_html(lines: Sequence[str]) -> str:
    """Small print."""
    return "".join(f'<p class="hint">{html.escape(line)}</p>' for line in lines)
