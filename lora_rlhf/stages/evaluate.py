"""Arms against each other on held-out prompts: base, sft, best-of-n, policy."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lora_rlhf.data.records import prompt_text
from lora_rlhf.model.generation import Answer, Sampling
from lora_rlhf.preferences.judges import find_judge
from lora_rlhf.recipe import Evaluate
from lora_rlhf.training.material import TokenisedPrompt, heldout_prompts
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import adapter_logprobs, sample, score_answers, to_sequences
from lora_rlhf.training.session import Session

_SHOWN = 8
_SEED = -1000  # a "step" that no training round has


@dataclass
class Arm:
    """One way to answer the held-out prompts.

    Attributes:
        name: base, sft, best_of_n or policy.
        answers: one a prompt.
        texts: the same, decoded.
        scores: of the reward model, (n,); empty without one.
        utilities: of the judge; the scores where there is none.
        parts: of the utility, by name, means over prompts; {} unless the judge has parts.
        kl: mean nats a sequence from `sft`, or None where it has no meaning.
    """

    name: str
    answers: list[Answer]
    texts: list[str]
    scores: list[float] = field(default_factory=list)
    utilities: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    kl: float | None = None


def run(session: Session) -> None:
    """Sample every arm on the same held-out prompts and compare each with `sft`.

    Writes `win_rates`, `arms` and `comparison samples` into the summary and evaluate/samples.jsonl.

    Raises:
        DataError: fewer held-out prompts than asked for.
    """
    settings = session.recipe.evaluate
    assert settings is not None
    started = time.monotonic()
    prompts = heldout_prompts(session, settings.prompts)
    arms = sample_arms(session, settings, prompts)
    for arm in arms:
        _judge(session, settings, prompts, arm)
    reference = next(a for a in arms if a.name == "sft")
    judge = settings.judge or "reward"
    win_rates = [compare(arm, reference) | {"judge": judge} for arm in arms if arm is not reference]
    _write_samples(session, prompts, arms)
    results: dict[str, object] = {
        "win_rates": win_rates,
        "arms": {arm.name: describe(arm) for arm in arms},
        "evaluate": {"prompts": len(prompts), "judge": judge},
    }
    policy = next((a for a in arms if a.name == "policy"), None)
    if policy is not None:
        facts = describe(policy)
        keys = {"kl": "kl", "eos_rate": "eos_rate", "mean_length": "mean_length"}
        results["ppo"] = {k: facts[v] for k, v in keys.items() if v in facts}
    session.run.finish_stage("evaluate", time.monotonic() - started, **results)


def sample_arms(session: Session, settings: Evaluate, prompts: list[TokenisedPrompt]) -> list[Arm]:
    """Answers of every arm there is; each arm draws from the same seeds."""
    backbone, recipe = session.backbone, session.recipe
    ids = [tokens for tokens, _ in prompts]
    sampling = Sampling(recipe.data.max_response_tokens, settings.temperature)
    with_reward = "reward" in backbone.adapters.heads
    n = settings.best_of if with_reward else 0
    plan: list[tuple[str, str | None, int]] = [("sft", "sft", 1)]
    if settings.base:
        plan.insert(0, ("base", None, 1))
    if n > 1:
        plan.append((f"best_of_{n}", "sft", n))
    if "policy" in backbone.adapters.names:
        plan.append(("policy", "policy", 1))
    arms = []
    with session.steps("evaluate", 0, len(plan)) as steps:
        for number, (name, adapter, draws) in enumerate(plan):
            groups: list[list[Answer]] = [[] for _ in ids]
            for draw in range(draws):
                # best-of-n draws anew, so that its first answer is not sft's own arm.
                offset = 0 if draws == 1 else draw + 1
                seeds = [row_seed(recipe.seed, _SEED - offset, i) for i in range(len(ids))]
                found = sample(backbone, adapter, ids, seeds, sampling, session.rollout_rows)
                for group, answer in zip(groups, found, strict=True):
                    group.append(answer)
            answers = groups_best(session, ids, groups)
            texts = [backbone.format.decode(a.ids) for a in answers]
            arms.append(Arm(name, answers, texts, kl=_kl(session, name, ids, answers, draws)))
            steps.done(number + 1)
            if steps.interrupted:
                steps.leave()
    return arms


def groups_best(
    session: Session, ids: Sequence[list[int]], groups: Sequence[list[Answer]]
) -> list[Answer]:
    """The answer of each group that the reward model scores highest."""
    if all(len(g) == 1 for g in groups):
        return [g[0] for g in groups]
    prompts = [p for p, g in zip(ids, groups, strict=True) for _ in g]
    responses = [a.ids for g in groups for a in g]
    scores = score_answers(session.backbone, prompts, responses, session.budget.tokens)
    split = scores.split([len(g) for g in groups])
    return [g[int(s.argmax())] for g, s in zip(groups, split, strict=True)]


def _kl(
    session: Session, name: str, ids: Sequence[list[int]], answers: Sequence[Answer], n: int
) -> float | None:
    """Nats a sequence from `sft`: measured for the policy, exact for best-of-n."""
    if n > 1:
        return math.log(n) - (n - 1) / n
    if name == "sft":
        return 0.0
    if name == "base":
        return None
    settings = session.recipe.evaluate
    assert settings is not None
    sequences, _ = to_sequences(session.backbone, ids, answers)

    def logprobs(adapter: str) -> Tensor:
        return adapter_logprobs(
            session.backbone, adapter, sequences, settings.temperature, session.budget.tokens
        )

    return float((logprobs(name) - logprobs("sft")).sum(-1).mean())


def _judge(session: Session, settings: Evaluate, prompts: list[TokenisedPrompt], arm: Arm) -> None:
    if "reward" in session.backbone.adapters.heads:
        ids, responses = [tokens for tokens, _ in prompts], [a.ids for a in arm.answers]
        scores = score_answers(session.backbone, ids, responses, session.budget.tokens)
        arm.scores = scores.tolist()
    if settings.judge is None:
        arm.utilities = arm.scores
        return
    judge = find_judge(settings.judge)
    texts = [prompt_text(p.messages) for _, p in prompts]
    arm.utilities = [judge(t, a) for t, a in zip(texts, arm.texts, strict=True)]
    if settings.judge == "builtin:gold":
        from lora_rlhf.tiny import gold_parts

        totals: Counter[str] = Counter()
        for text, answer in zip(texts, arm.texts, strict=True):
            totals.update(gold_parts(text, answer))
        arm.parts = {k: v / len(texts) for k, v in totals.items()}


# -- numbers ------------------------------------------------------------------------------------


def compare(arm: Arm, reference: Arm) -> dict[str, object]:
    """Win rate of an arm over a reference, ties half, with a bootstrap interval over prompts."""
    wins = [
        0.5 if a == b else float(a > b)
        for a, b in zip(arm.utilities, reference.utilities, strict=True)
    ]
    low, high = bootstrap_mean(wins)
    return {
        "a": arm.name,
        "b": reference.name,
        "win_rate": sum(wins) / len(wins),
        "ci": [low, high],
        "prompts": len(wins),
        "ties": sum(w == 0.5 for w in wins),
    }


def bootstrap_mean(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """95 % percentile interval of a mean."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.tensor(values, dtype=torch.float64)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(tensor[rows].mean(-1), quantiles).tolist()
    return low, high


def describe(arm: Arm) -> dict[str, object]:
    """Means over the arm's answers."""
    lengths = [len(a.ids) for a in arm.answers]
    spread = torch.tensor(arm.utilities, dtype=torch.float64).std().item()
    facts: dict[str, object] = {
        "utility": sum(arm.utilities) / len(arm.utilities),
        "utility_std": spread,
        "eos_rate": sum(a.ended for a in arm.answers) / len(arm.answers),
        "mean_length": sum(lengths) / len(lengths),
        "distinct_2": distinct_2(arm.texts),
    }
    if arm.scores:
        facts["score"] = sum(arm.scores) / len(arm.scores)
    if arm.kl is not None:
        facts["kl"] = arm.kl
    if arm.parts:
        facts["parts"] = arm.parts
    return facts


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, in all texts together.

    Falls when answers come to resemble each other. It falls with the number of texts too, so
    compare arms of one size alone.

    Source: Li et al. 2016, arXiv:1510.03055. Deviation: none; words are split at white space.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pairs += pairwise(text.lower().split())
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _write_samples(session: Session, prompts: list[TokenisedPrompt], arms: Sequence[Arm]) -> None:
    (session.run.path / "evaluate").mkdir(exist_ok=True)
    for file in ("samples", "answers"):
        (session.run.path / "evaluate" / f"{file}.jsonl").unlink(missing_ok=True)
    for row, (_, prompt) in enumerate(prompts):
        for arm in arms:
            record = {
                "step": 0,
                "arm": arm.name,
                "prompt": prompt_text(prompt.messages),
                "response": arm.texts[row],
                "score": arm.scores[row] if arm.scores else None,
                "utility": arm.utilities[row],
            }
            session.run.append("evaluate/answers.jsonl", record)
            if row < _SHOWN:
                session.run.append("evaluate/samples.jsonl", record)
