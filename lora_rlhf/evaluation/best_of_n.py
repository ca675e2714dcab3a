"""Best-of-n: N answers a prompt drawn once, and what the best of any n of them would be worth."""

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from lora_rlhf.data.records import prompt_text
from lora_rlhf.evaluation.choosing import Floats, digest, member_scores, require_scorers
from lora_rlhf.model.generation import Answer, Sampling
from lora_rlhf.preferences.judges import find_judge
from lora_rlhf.runs import Run
from lora_rlhf.training.material import TokenisedPrompt
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import adapter_logprobs, sample, to_sequences
from lora_rlhf.training.session import Session

MOST = 64
_SEED = -2000  # a "step" that no training round has
_ROWS = 256  # answers between two lines of the file, about


# -- closed forms -------------------------------------------------------------------------------


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || policy) = ln n - (n - 1)/n, nats a response; n >= 1.

    Exact where no two responses tie in score; with ties (two equal texts) an upper bound.

    Source: Stiennon et al. 2020, arXiv:2009.01325; Gao et al. 2022, arXiv:2210.10760.
    """
    assert n >= 1
    return math.log(n) - (n - 1) / n


def best_of_n_weights(scores: Floats, n: int) -> Floats:
    """The chance of each of N answers to be the best of n taken from them without replacement.

    With C the binomial coefficient and i the rank of an answer, 1 the lowest, it is
    C(i - 1, n - 1) / C(N, n); answers of one score share theirs evenly, as a fair coin would.

    Args:
        scores: (..., N), what the best is chosen by.
        n: 1 to N.

    Returns:
        (..., N); each row sums to 1. The weighted mean of any quantity of the answers is the
        unbiased estimate, of least variance, of its mean over the best of n fresh draws.

    Source: Nakano et al. 2021 (WebGPT), arXiv:2112.09332, appendix I. Deviation: ties.
    """
    count = scores.shape[-1]
    assert 1 <= n <= count, f"best of {n} from {count} answers"
    assert np.isfinite(scores).all(), "a score that is no number has no rank"
    # chance[k] = C(k, n) / C(count, n): that all n lie among the k lowest.
    chance = np.zeros(count + 1)
    chance[count] = 1.0
    for k in range(count, n, -1):
        chance[k - 1] = chance[k] * (k - n) / k
    low, high = (rankdata(scores, method=end, axis=-1).astype(int) for end in ("min", "max"))
    weights: Floats = (chance[high] - chance[low - 1]) / (high - low + 1)
    return weights


def expected_best(scores: Floats, values: Floats, n: int) -> Floats:
    """The mean of `values` at the best of n by `scores`, a prompt: (p, N), (p, N) -> (p,)."""
    result: Floats = (best_of_n_weights(scores, n) * values).sum(-1)
    return result


# -- drawing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """N answers to each of p prompts by one policy, and what was said of them.

    Attributes:
        texts: (p, N).
        scores: (k, p, N) of the reward adapters.
        gold: (p, N) of the judge; None without one.
        kl: (p, N) nats, log p(answer) under the policy minus that under `sft`.
        tokens: (p, N), the end token counted.
        ended: (p, N), 1 where the answer has its end token.
    """

    texts: list[list[str]]
    scores: Floats
    gold: Floats | None
    kl: Floats
    tokens: Floats
    ended: Floats

    @property
    def count(self) -> int:
        """N."""
        return int(self.kl.shape[1])

    def first(self, count: int) -> "Drawn":
        """The first so many answers of each prompt."""
        return replace(
            self,
            texts=[row[:count] for row in self.texts],
            scores=self.scores[..., :count],
            gold=None if self.gold is None else self.gold[:, :count],
            kl=self.kl[:, :count],
            tokens=self.tokens[:, :count],
            ended=self.ended[:, :count],
        )


@dataclass(frozen=True)
class Plan:
    """What is drawn.

    Attributes:
        policies: name -> adapter (None: the bare base); all are decoded in the same batches.
        count: N answers a prompt and policy; policies draw from the same seeds.
        temperature: of sampling and of every log-probability.
        members: reward adapters that score.
        judge: of `find_judge`, or None.
    """

    policies: Mapping[str, str | None]
    count: int
    temperature: float = 1.0
    members: tuple[str, ...] = ("reward",)
    judge: str | None = None


def draw(
    session: Session, file: str, plan: Plan, prompts: Sequence[TokenisedPrompt], stage: str
) -> dict[str, Drawn]:
    """Draw and score every answer of a plan, keeping each block of prompts in a file of the run.

    A run that was killed goes on after the last whole block; a file of another plan, of other
    adapters or of other prompts is begun anew.

    Args:
        session: whose backbone has the adapters.
        file: of the run, such as `evaluate/best_of_n.jsonl`.
        plan: what is wanted.
        prompts: p of them.
        stage: that the progress is shown under.

    Raises:
        CheckpointError: a reward adapter that is not there.
        ConfigError: of `find_judge`.
    """
    if plan.members:
        require_scorers(session.backbone, plan.members)
    names, run = list(plan.policies), session.run
    header = {"step": -1, "plan": _identity(session, plan, prompts)}
    lines = run.lines(file)
    if not lines or lines[0] != header:
        (run.path / file).unlink(missing_ok=True)
        run.append(file, header)
        lines = [header]
    block = max(1, _ROWS // (plan.count * len(names)))
    done = (len(lines) - 1) // len(names)
    done = len(prompts) if done >= len(prompts) else done // block * block
    run.cut_lines_after(file, done - 1)
    with session.steps(stage, done, len(prompts)) as steps:
        for start in range(done, len(prompts), block):
            for line in _block(session, plan, prompts[start : start + block], start):
                run.append(file, line)
            steps.done(min(start + block, len(prompts)))
            if steps.interrupted:
                steps.leave()
    return kept(run, file)


def kept(run: Run, file: str) -> dict[str, Drawn]:
    """What `draw` has kept in a file of a run, by policy, in the plan's order."""
    header, *records = run.lines(file)
    names = header["plan"]["policies"]
    return {name: _collect([r for r in records if r["policy"] == name]) for name in names}


def _identity(session: Session, plan: Plan, prompts: Sequence[TokenisedPrompt]) -> dict[str, Any]:
    """All that decides the answers and what is said of them, as JSON keeps it."""
    adapters = {a for a in plan.policies.values() if a is not None} | {*plan.members}
    return {
        "policies": dict(plan.policies),
        "count": plan.count,
        "temperature": plan.temperature,
        "members": list(plan.members),
        "judge": plan.judge,
        "judge_source": None if plan.judge is None else _source_of(plan.judge),
        "seed": session.recipe.seed,
        "longest": session.recipe.data.max_response_tokens,
        "prompts": hashlib.sha256(repr([ids for ids, _ in prompts]).encode()).hexdigest(),
        "adapters": {name: digest(session.backbone, name) for name in sorted(adapters)},
    }


def _source_of(judge: str) -> str | None:
    """SHA-256 of the file that a judge is written in: the same name may judge otherwise now."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(find_judge(judge)))
    except TypeError:  # not a function of Python's
        return None
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _block(
    session: Session, plan: Plan, prompts: Sequence[TokenisedPrompt], start: int
) -> list[dict[str, Any]]:
    """A line for each prompt and policy, prompt by prompt."""
    backbone, recipe, n = session.backbone, session.recipe, plan.count
    rows = [(p, name, k) for p in range(len(prompts)) for name in plan.policies for k in range(n)]
    ids = [prompts[p][0] for p, _, _ in rows]
    adapters = [plan.policies[name] for _, name, _ in rows]
    seeds = [row_seed(recipe.seed, _SEED - k, start + p) for p, _, k in rows]
    sampling = Sampling(recipe.data.max_response_tokens, plan.temperature)
    answers = sample(backbone, adapters, ids, seeds, sampling, session.rollout_rows)
    texts = [backbone.format.decode(a.ids) for a in answers]
    scores: Floats = np.zeros((0, len(rows)))
    if plan.members:
        responses = [a.ids for a in answers]
        tokens = session.budget.tokens
        scores = member_scores(backbone, plan.members, ids, responses, tokens)
    kl = _kl_of_answers(session, plan.temperature, adapters, ids, answers)
    judge = None if plan.judge is None else find_judge(plan.judge)
    lines = []
    for first in range(0, len(rows), n):
        (p, name, _), some = rows[first], slice(first, first + n)
        asked = prompt_text(prompts[p][1].messages)
        line: dict[str, Any] = {
            "step": start + p,
            "policy": name,
            "texts": texts[some],
            "scores": scores[:, some].tolist(),
            "gold": None if judge is None else [float(judge(asked, t)) for t in texts[some]],
            "kl": kl[some],
            "tokens": [len(a.ids) for a in answers[some]],
            "ended": [int(a.ended) for a in answers[some]],
        }
        lines.append(line)
    return lines


def _kl_of_answers(
    session: Session,
    temperature: float,
    adapters: Sequence[str | None],
    prompts: Sequence[list[int]],
    answers: Sequence[Answer],
) -> list[float]:
    """Nats of each answer from `sft`, one sample of the KL; 0 for `sft` itself."""
    found = [0.0] * len(adapters)
    for name in dict.fromkeys(adapters):
        if name == "sft":
            continue
        mine = [i for i, adapter in enumerate(adapters) if adapter == name]
        rows, _ = to_sequences(
            session.backbone, [prompts[i] for i in mine], [answers[i] for i in mine]
        )
        own, reference = (
            adapter_logprobs(session.backbone, each, rows, temperature, session.budget.tokens)
            for each in (name, "sft")
        )
        for i, nats in zip(mine, (own - reference).sum(-1).tolist(), strict=True):
            found[i] = nats
    return found


def _collect(lines: Sequence[dict[str, Any]]) -> Drawn:
    def stack(key: str) -> Floats:
        return np.array([line[key] for line in lines], dtype=np.float64)

    return Drawn(
        texts=[line["texts"] for line in lines],
        scores=stack("scores").transpose(1, 0, 2),
        gold=None if lines[0]["gold"] is None else stack("gold"),
        kl=stack("kl"),
        tokens=stack("tokens"),
        ended=stack("ended"),
    )
