"""What a reward model says of answers that are none, and of demonstrations, SFT and policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from lora_rlhf import display
from lora_rlhf.data.records import prompt_text
from lora_rlhf.data.template import ChatFormat
from lora_rlhf.evaluation.health import Scored, cut, health_card
from lora_rlhf.model.generation import Sampling
from lora_rlhf.training.material import TokenisedPrompt, all_heldout_prompts, demonstrations
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.reward_report import Group
from lora_rlhf.training.rollout import sample, score_answers
from lora_rlhf.training.session import Session

Json = dict[str, Any]

SAMPLES = 128  # answers of sft and of the policy whose scores are shown
_PROBED = 32  # prompts with degenerate answers
_BLOCK = 64  # prompts between two steps of the bar
_SEED = -5000  # the "step" that seeds these samples, which no other sampling uses
_WORDS = 3  # that the repeated answer repeats
_SCORES = "reward/scores.jsonl"


@dataclass(frozen=True)
class Probe:
    """A degenerate answer to a prompt.

    Attributes:
        name: as a person calls it.
        row: of the prompt.
        ids: the response, ended.
    """

    name: str
    row: int
    ids: list[int]


def degenerate_answers(
    chat_format: ChatFormat, prompts: Sequence[str], answers: Sequence[str], limit: int
) -> list[Probe]:
    """For each prompt: nothing, three words again and again, far too much, the prompt itself.

    The repeated words are the real answer's first ones, in as many words as it has, so that length
    does not speak; the very long answer is that of this prompt and of the next ones up to the
    limit. All end with the end token, which an honest answer of that kind would.

    Args:
        chat_format: of the backbone.
        prompts: as people read them.
        answers: a real one to each.
        limit: tokens, the end token included.
    """
    found = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        words = answer.split() or prompt.split()
        again = islice(cycle(words[:_WORDS]), max(len(words), 4 * _WORDS))
        following = [*answers[row:], *answers[:row]]
        texts = {
            "nothing": "",
            "three words repeated": " ".join(again),
            "many answers in one": " ".join(_fill(following, limit)),
            "prompt copied back": prompt,
        }
        for name, text in texts.items():
            ids = chat_format.response_ids(text, end=False)[: limit - 1]
            found.append(Probe(name, row, [*ids, chat_format.end_id]))
    return found


def _fill(answers: Sequence[str], limit: int) -> list[str]:
    """Answers in turn, until they have surely more tokens than the limit."""
    words, parts = 0, []
    for answer in cycle(answers):
        parts.append(answer)
        words += max(1, len(answer.split()))
        if words >= limit:
            return parts
    return parts


def judge_degenerate(
    probes: Sequence[Probe],
    scores: Sequence[float],
    real: Sequence[float],
    prompts: Sequence[str],
    chat_format: ChatFormat,
) -> list[Json]:
    """Each kind's mean score and mean percentile among real answers, with its best-scored text.

    Args:
        probes: of `degenerate_answers`.
        scores: one a probe.
        real: scores of real answers; a tie counts half.
        prompts: as people read them.
        chat_format: of the backbone.
    """
    rows = []
    for name in dict.fromkeys(p.name for p in probes):
        own = [(s, p) for s, p in zip(scores, probes, strict=True) if p.name == name]
        score, best = max(own, key=lambda item: item[0])
        rows.append(
            {
                "name": name,
                "prompt": cut(prompts[best.row]),
                "text": cut(chat_format.decode(best.ids)),
                "score": sum(s for s, _ in own) / len(own),
                "percentile": sum(_percentile(s, real) for s, _ in own) / len(own),
                "best_score": score,
            }
        )
    return rows


def _percentile(score: float, real: Sequence[float]) -> float:
    return sum(0.5 if score == r else float(score > r) for r in real) / len(real)


def histogram(scores: dict[str, Sequence[float]]) -> Json:
    """Counts of each set of scores in shared bins: {"bins": edges, name: counts}.

    Bins are a quarter of the first set's spread wide, at most 60 in all, and start at a multiple of
    their width.
    """
    known = {name: list(values) for name, values in scores.items() if values}
    if not known:
        return {"bins": []}
    every = [s for values in known.values() for s in values]
    low, high = min(every), max(every)
    width = max(_spread(next(iter(known.values()))) / 4, (high - low) / 50, 1e-6)
    first = math.floor(low / width)
    count = math.floor(high / width) - first + 1
    bins: Json = {"bins": [(first + i) * width for i in range(count + 1)]}
    for name, values in known.items():
        counts = [0] * count
        for value in values:
            counts[min(count - 1, max(0, math.floor(value / width) - first))] += 1
        bins[name] = counts
    return bins


def _spread(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


# -- on a backbone ------------------------------------------------------------------------------


def examine_health(
    session: Session, groups: Sequence[Group], scores: Sequence[list[float]]
) -> Json:
    """The health card of the adapter `reward`, for summary.json's `health`.

    Samples answers of `sft` to held-out prompts, and scores those, demonstrations and degenerate
    answers; the scores stay in reward/scores.jsonl for the histogram that PPO's answers join.

    Args:
        session: with `sft` and `reward` in place.
        groups: held-out rankings.
        scores: of their answers, normalised.
    """
    chat_format = session.backbone.format
    prompts = heldout_questions(session) or list({g.question: g.prompt for g in groups}.items())
    prompts = prompts[:SAMPLES]
    texts, sft = sampled_scores(session, "sft", prompts)
    asked = [question for question, _ in prompts[:_PROBED]]
    limit = session.recipe.data.max_response_tokens
    probes = degenerate_answers(chat_format, asked, texts[:_PROBED], limit)
    given = _scores(session, [prompts[p.row][1] for p in probes], [p.ids for p in probes])
    demos: list[float] = []
    if session.recipe.data.demonstrations is not None:
        _, heldout = demonstrations(session)
        demos = _scores(session, *zip(*heldout[:SAMPLES], strict=True))
    _keep(session, {"demonstrations": demos, "sft": sft})
    extra = {
        "scores": histogram({"demonstrations": demos, "sft": sft}),
        "degenerate": judge_degenerate(probes, given, sft, asked, chat_format),
    }
    rankings = [_scored(session, g, s) for g, s in zip(groups, scores, strict=True)]
    gain = float(session.backbone.adapters.heads["reward"].gain)
    return health_card(rankings, gain, extra)


def policy_scores(session: Session) -> Json:
    """The card's `scores` with those of the adapter `policy` on the same prompts and seeds."""
    prompts = heldout_questions(session)[:SAMPLES]
    _, policy = sampled_scores(session, "policy", prompts)
    before: dict[str, list[float]] = {"demonstrations": [], "sft": []}
    for line in session.run.lines(_SCORES):
        before.setdefault(line["of"], []).append(line["score"])
    return histogram({**before, "policy": policy})


def heldout_questions(session: Session) -> list[tuple[str, list[int]]]:
    """(text, ids) of prompts that no training has seen; [] where the recipe names no prompts."""
    data = session.recipe.data
    if data.heldout_prompts is data.prompts is data.demonstrations is None:
        return []
    found: list[TokenisedPrompt] = all_heldout_prompts(session)
    return [(prompt_text(prompt.messages), ids) for ids, prompt in found]


def sampled_scores(
    session: Session, adapter: str, prompts: Sequence[tuple[str, list[int]]]
) -> tuple[list[str], list[float]]:
    """An adapter's answers to prompts, and what `reward` gives them."""
    backbone, recipe = session.backbone, session.recipe
    temperature = 1.0 if recipe.ppo is None else recipe.ppo.temperature
    sampling = Sampling(recipe.data.max_response_tokens, temperature)
    ids = [tokens for _, tokens in prompts]
    seeds = [row_seed(recipe.seed, _SEED, i) for i in range(len(ids))]
    texts: list[str] = []
    scores: list[float] = []
    with display.progress(session.console, "health card", len(ids)) as bar:
        for start in range(0, len(ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            answers = sample(
                backbone, adapter, ids[block], seeds[block], sampling, session.rollout_rows
            )
            texts += [backbone.format.decode(a.ids) for a in answers]
            scores += _scores(session, ids[block], [a.ids for a in answers])
            bar.update(len(texts))
    return texts, scores


def _scores(
    session: Session, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> list[float]:
    if not prompts:
        return []
    found: list[float] = score_answers(
        session.backbone, prompts, responses, session.budget.tokens
    ).tolist()
    return found


def _scored(session: Session, group: Group, scores: list[float]) -> Scored:
    answers = [session.backbone.format.decode(ids) for ids in group.responses]
    lengths = [len(ids) for ids in group.responses]
    return Scored(group.question, answers, group.groups, scores, lengths, group.tag)


def _keep(session: Session, sets: dict[str, list[float]]) -> None:
    (session.run.path / _SCORES).unlink(missing_ok=True)
    for name, values in sets.items():
        for value in values:
            session.run.append(_SCORES, {"of": name, "score": value})
