"""A judgement as a row of a file; a text instead says why it gives none."""

from collections.abc import Mapping
from typing import Any

from lora_rlhf.preferences.counting import pairs_of
from lora_rlhf.preferences.events import Response
from lora_rlhf.preferences.ratings import ArmKey, arm_key
from lora_rlhf.preferences.store import Judged, Store

Row = dict[str, Any]
TAG = "tag"
"""Key of `Task.app` for what the file of an imported ranking called its kind."""
HELDOUT_POOL = "pool:heldout"
"""How `Task.prompt_source` begins where the app gave a prompt that nothing may train on."""
_MUCH_BETTER = 2


def heldout_prompts(store: Store) -> set[str]:
    """Hashes of the prompts that the app held out when it asked for judgements of them.

    Whoever types such a prompt has it of there; votes that were taken back count, too.
    """
    return {
        judged.task.prompt_sha256
        for judged in store.each_judged(retracted=True)
        if judged.task.prompt_source.startswith(HELDOUT_POOL)
    }


def is_identical(judged: Judged) -> bool:
    """Whether all that is preferred to something else has the same text as it."""
    texts = {r.rid: r.text.strip() for r in judged.task.responses}
    strict, _ = pairs_of(judged)
    return bool(strict) and all(texts[a] == texts[b] for a, b in strict)


def why_no_order(judged: Judged) -> str | None:
    """Why a judgement orders no answers: skipped, a like, a tie, all bad; None when it does."""
    if judged.judgement.outcome == "skip":
        return "skipped"
    if judged.judgement.type == "like":
        return "a like of one answer"
    return {"tie": "all answers tie", "both_bad": "all answers are bad"}.get(
        judged.judgement.outcome
    )


def ranking_row(judged: Judged) -> Row:
    """What the readers of recipes call a ranking, of a judgement that orders answers."""
    place = {r.rid: i for i, r in enumerate(judged.task.responses)}
    return {
        "prompt": list(judged.task.prompt),
        "responses": [r.text for r in judged.task.responses],
        "ranking": [[place[rid] for rid in group] for group in judged.judgement.ranking],
        "tag": judged.task.app.get(TAG),
        "annotator": judged.judgement.annotator,
    }


def ranking_export(judged: Judged) -> Row | str:
    """`ranking_row` with where it comes from."""
    reason = why_no_order(judged)
    if reason is not None:
        return reason
    responses = judged.task.responses
    facts = {
        "adapters": [r.adapter for r in responses],
        "scores": [r.rm_score for r in responses],
    }
    return ranking_row(judged) | facts | _provenance(judged)


def pair_rows(judged: Judged, margin: bool = False) -> list[Row] | str:
    """All strict pairs, conversational as TRL reads them; their weights sum to 1.

    Pairs of identical texts are left out: they can only teach noise.

    Args:
        judged: of any kind.
        margin: add the column `margin`: 1 for much better, else 0.
    """
    reason = why_no_order(judged)
    if reason is not None:
        return reason
    task, judgement = judged.task, judged.judgement
    both = [(task.response(w), task.response(x)) for w, x in pairs_of(judged)[0]]
    kept = [(w, x) for w, x in both if w.text.strip() != x.text.strip()]
    if not kept:
        return "identical texts"
    shared = {"weight": 1 / len(kept), "group_id": judgement.id}
    if margin:
        shared["margin"] = float(judgement.strength == _MUCH_BETTER)
    return [
        {
            "prompt": list(task.prompt),
            "chosen": _answer(chosen),
            "rejected": _answer(rejected),
            **shared,
            "chosen_adapter": chosen.adapter,
            "rejected_adapter": rejected.adapter,
            "chosen_score": chosen.rm_score,
            "rejected_score": rejected.rm_score,
            "strength": judgement.strength,
            "annotator": judgement.annotator,
            "tag": task.app.get(TAG),
            **_provenance(judged),
        }
        for chosen, rejected in kept
    ]


def battle_row(judged: Judged, names: Mapping[ArmKey, str]) -> Row | str:
    """A comparison of two in the layout of the Chatbot Arena; A is what stood first.

    Args:
        judged: of any kind.
        names: of the arms.
    """
    task, judgement = judged.task, judged.judgement
    if judgement.outcome == "skip":
        return "skipped"
    if judgement.type == "like":
        return "a like of one answer"
    if task.sampler.strategy == "import":
        return "imported: no known models"
    if len(task.responses) != 2:
        return "more than two answers"
    a, b = sorted(task.responses, key=lambda r: r.pos)
    winner = {"tie": "tie", "both_bad": "tie (bothbad)"}.get(judgement.outcome)
    if winner is None:
        winner = "model_a" if judgement.ranking[0] == (a.rid,) else "model_b"
    prompt = list(task.prompt)
    return {
        "question_id": task.id,
        "model_a": names[arm_key(a)],
        "model_b": names[arm_key(b)],
        "winner": winner,
        "judge": judgement.annotator,
        "conversation_a": [*prompt, *_answer(a)],
        "conversation_b": [*prompt, *_answer(b)],
        "turn": sum(m["role"] == "user" for m in prompt),
        "anony": task.blind and judgement.blind,
        "tstamp": judgement.ts,
        "strategy": task.sampler.strategy,
        "propensity": task.sampler.propensity,
    }


def kto_row(judged: Judged) -> Row | str:
    """A like or dislike as prompt, completion, label."""
    task, judgement = judged.task, judged.judgement
    if judgement.outcome == "skip":
        return "skipped"
    if judgement.type != "like":
        return "no like"
    (response,) = task.responses
    return {
        "prompt": list(task.prompt),
        "completion": _answer(response),
        "label": judgement.strength == 1,
        "adapter": response.adapter,
        "annotator": judgement.annotator,
        **_provenance(judged),
    }


def _answer(response: Response) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": response.text}]


def _provenance(judged: Judged) -> Row:
    task, judgement = judged.task, judged.judgement
    return {
        "task_id": task.id,
        "judgement_id": judgement.id,
        "prompt_source": task.prompt_source,
        "strategy": task.sampler.strategy,
        "blind": task.blind and judgement.blind,
        "ts": judgement.ts,
    }
