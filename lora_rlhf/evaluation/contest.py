"""One evaluation: arms answer, judges judge, figures and files come out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_rlhf.data.records import prompt_key, prompt_text
from lora_rlhf.evaluation import rounds
from lora_rlhf.evaluation.arms import ReadyArm, default_arms, parse_arms, ready
from lora_rlhf.evaluation.choosing import OWN, Chooser
from lora_rlhf.evaluation.drawing import Drawn, draw
from lora_rlhf.evaluation.endpoint import CACHE, Endpoint, Verdict
from lora_rlhf.evaluation.facts import Arm, describe
from lora_rlhf.evaluation.judging import (
    JudgeSpec,
    give_utilities,
    human_outcomes,
    no_scores,
    parse_judge,
    read_votes,
)
from lora_rlhf.evaluation.winrates import Outcome, outcomes_of, win_rate
from lora_rlhf.model.generation import Sampling
from lora_rlhf.recipe import Evaluate
from lora_rlhf.runs import Json, Run
from lora_rlhf.training.material import TokenisedPrompt, heldout_prompts
from lora_rlhf.training.rollout import adapter_logprobs, to_sequences
from lora_rlhf.training.session import Session

_SHOWN = 8
SAMPLES = "evaluate/samples.jsonl"
KEYS = ("win_rates", "arms", "rounds", "evaluate")
"""Keys of summary.json that an evaluation writes."""


@dataclass
class Contest:
    """What one evaluation is about.

    Attributes:
        session: with the adapters of the run in place.
        settings: of the recipe, or of the command line.
        judges: the first is the one whose utilities stand with the answers.
        arms: with their adapters on the backbone; one is the reference.
        prompts: held out.
        chooser: gives the scores, and best-of-n; None: the run's reward adapter, if it has one.
    """

    session: Session
    settings: Evaluate
    judges: list[JudgeSpec]
    arms: list[ReadyArm]
    prompts: list[TokenisedPrompt]
    chooser: Chooser | None = None

    @property
    def reference(self) -> int:
        """The place of the arm that all others are compared with."""
        return [arm.name for arm in self.arms].index(self.settings.reference)

    @property
    def keys(self) -> list[str]:
        """Of the prompts."""
        return [prompt_key(prompt.messages) for _, prompt in self.prompts]


def open_contest(
    session: Session,
    settings: Evaluate,
    arms: Sequence[str] | None = None,
    judges: Sequence[str] = (),
    chooser: Chooser | None = None,
) -> Contest:
    """Check and prepare all that an evaluation needs, before anything is decoded.

    Args:
        session: with the adapters of the run in place.
        settings: of the recipe.
        arms: as a person writes them, instead of the recipe's; paths are allowed.
        judges: instead of the recipe's.
        chooser: instead of the run's reward adapter.

    Raises:
        ConfigError: an arm or a judge that means nothing.
        CheckpointError: an adapter that is not there, or not of this backbone.
        DataError: fewer held-out prompts than asked for.
    """
    adapters = session.backbone.adapters
    specs = [parse_judge(text) for text in judges or [settings.judge or "reward"]]
    if arms is None:
        has = chooser is not None or OWN in adapters.heads, "policy" in adapters.names
        texts = settings.arms or default_arms(settings, *has)
        wanted = parse_arms(texts, settings.reference, paths=False)
    else:
        wanted = parse_arms(arms, settings.reference)
    _require_judges(specs, has_scores=chooser is not None or OWN in adapters.heads)
    prompts = heldout_prompts(session, settings.prompts)
    return Contest(session, settings, specs, ready(session, wanted, chooser), prompts, chooser)


def _require_judges(specs: Sequence[JudgeSpec], *, has_scores: bool) -> None:
    """Find what could not judge before anything is decoded.

    Raises:
        ConfigError: the reward adapter is to judge, and there is none.
        PreferenceError: a store that cannot be read.
    """
    for spec in specs:
        if spec.kind == "reward" and not has_scores:
            raise no_scores()
        if spec.kind == "human":
            read_votes(spec.store)


def check(settings: Evaluate, run: Run | None = None) -> None:
    """Find what no evaluation could use, before the stages that come first have taken hours.

    Args:
        settings: of the recipe.
        run: whose evaluation is to come; an endpoint is asked one question. None: there is none.

    Raises:
        ConfigError: an arm or a judge that means nothing.
        JudgeError: an endpoint that does not answer.
    """
    judge = parse_judge(settings.judge or "reward")
    parse_arms(settings.arms or (), settings.reference, paths=False)
    if run is not None and judge.kind == "endpoint":
        _endpoint(judge, run).try_out()


def _endpoint(judge: JudgeSpec, run: Run) -> Endpoint:
    return Endpoint(judge.model, judge.url, run.path / CACHE)


def hold(contest: Contest) -> None:
    """Run an evaluation; its results are in the run's files and summary when this returns.

    Stopped, it goes on where it was: answers and the replies of an endpoint are kept.
    """
    started = time.monotonic()
    session = contest.session
    session.run.stage("evaluate")
    for judge in contest.judges:
        if judge.kind == "endpoint":
            _endpoint(judge, session.run).try_out()
    # People have judged what they saw; nothing is decoded for them alone.
    decoded = any(judge.kind != "human" for judge in contest.judges)
    arms = answer(contest) if decoded else [Arm(a.name, [], []) for a in contest.arms]
    for judge in contest.judges:
        if judge.gives_utilities:
            give_utilities(judge, contest.prompts, arms)
    for arm in arms:
        arm.utilities = next(iter(arm.by_judge.values()), [])
    if decoded:
        _write(contest, arms)
    win_rates = [row for judge in contest.judges for row in _win_rates(contest, judge, arms)]
    main = contest.judges[0]
    results: dict[str, Any] = {
        "win_rates": win_rates,
        "arms": {arm.name: describe(arm) for arm in arms if arm.answers},
        "rounds": {"arms": _rounds(contest, main), "judge": main.name},
        "evaluate": {"prompts": len(contest.prompts), "judge": main.name},
    }
    policy = next((a for a in arms if a.name == "policy"), None)  # no other arm may have its name
    if policy is not None and policy.answers:
        facts = describe(policy)
        keys = {"kl": "kl", "eos_rate": "eos_rate", "mean_length": "mean_length"}
        results["ppo"] = {k: facts[v] for k, v in keys.items() if v in facts}
    _forget(session)
    session.run.finish_stage("evaluate", time.monotonic() - started, **results)


def _forget(session: Session) -> None:
    """Drop the results of an earlier evaluation, of which merging would leave stale arms."""
    summary = session.run.summary()
    stale = [key for key in KEYS if key in summary]
    for key in stale:
        del summary[key]
    if stale:
        summary.get("seconds", {}).pop("evaluate", None)
        session.run.write_json("summary.json", summary)


# -- answers ------------------------------------------------------------------------------------


def answer(contest: Contest) -> list[Arm]:
    """The answers of every arm to every prompt, with scores and KL."""
    session, arms = contest.session, contest.arms
    sampling = Sampling(session.recipe.data.max_response_tokens, contest.settings.temperature)
    drawn = draw(session, arms, contest.prompts, sampling, chooser=contest.chooser)
    found = []
    for arm, own in zip(arms, drawn, strict=True):
        chosen = [best(draws) for draws in own]
        answers = [d.answer for d in chosen]
        texts = [session.backbone.format.decode(a.ids) for a in answers]
        scores = [d.score for d in chosen if d.score is not None]
        made = Arm(arm.name, answers, texts, scores, identity=arm.identity)
        made.kl = _kl(contest, arm, made)
        found.append(made)
    return found


def best(draws: Sequence[Drawn]) -> Drawn:
    """The draw that the reward model scores highest, the first of equals."""
    if len(draws) == 1:
        return draws[0]
    return max(draws, key=lambda d: -math.inf if d.score is None else d.score)


def _kl(contest: Contest, arm: ReadyArm, made: Arm) -> float | None:
    """Nats a sequence from `sft`; None for the base, and after shots, whose prompt is another.

    Measured on the answers, mean of log p(arm) - log p(sft). Best-of-n adds the exact
    ln n - (n - 1) / n of its own against the arm that it chooses from (ALGORITHMS.md 3).
    """
    if (
        arm.adapter is None
        or arm.spec.shots
        or "sft" not in contest.session.backbone.adapters.names
    ):
        return None
    n = arm.spec.best_of
    chosen = math.log(n) - (n - 1) / n
    if arm.adapter == "sft":
        return chosen
    backbone, budget = contest.session.backbone, contest.session.budget
    ids = [tokens for tokens, _ in contest.prompts]
    sequences, _ = to_sequences(backbone, ids, made.answers)

    def logprobs(adapter: str) -> Tensor:
        return adapter_logprobs(
            backbone, adapter, sequences, contest.settings.temperature, budget.tokens
        )

    return chosen + float((logprobs(arm.adapter) - logprobs("sft")).sum(-1).mean())


# -- judging ------------------------------------------------------------------------------------


def _win_rates(contest: Contest, judge: JudgeSpec, arms: Sequence[Arm]) -> list[Json]:
    """Every arm against the reference by one judge; of people's votes those that there are."""
    reference = contest.reference
    others = [i for i in range(len(arms)) if i != reference]
    judged = _outcomes(contest, judge, arms, others)
    return [
        {"a": arms[i].name, "b": arms[reference].name}
        | win_rate(outcomes)
        | {"judge": judge.name}
        | more
        for i, (outcomes, more) in zip(others, judged, strict=True)
        if outcomes
    ]


def _outcomes(
    contest: Contest, judge: JudgeSpec, arms: Sequence[Arm], others: Sequence[int]
) -> list[tuple[list[Outcome], Json]]:
    """Outcomes of each of the arms against the reference, and what else there is to say."""
    reference = arms[contest.reference]
    if judge.kind == "human":
        votes = read_votes(judge.store)
        own = contest.arms
        return [(human_outcomes(votes, own[i], own[contest.reference]), {}) for i in others]
    if judge.kind == "endpoint":
        return _asked(contest, judge, [arms[i] for i in others], reference)
    return [(compare_utilities(contest.keys, arms[i], reference, judge.name), {}) for i in others]


def compare_utilities(keys: Sequence[str], arm: Arm, reference: Arm, judge: str) -> list[Outcome]:
    """Outcomes where a judge gives each answer a utility."""
    ours, theirs = arm.by_judge[judge], reference.by_judge[judge]
    return outcomes_of(keys, ours, theirs, _longer(arm, reference))


def _longer(arm: Arm, reference: Arm) -> list[float]:
    return [float(len(a) - len(b)) for a, b in zip(arm.texts, reference.texts, strict=True)]


def _asked(
    contest: Contest, judge: JudgeSpec, arms: Sequence[Arm], reference: Arm
) -> list[tuple[list[Outcome], Json]]:
    """An endpoint's verdicts on every arm against the reference, both orders of each pair."""
    session, keys = contest.session, contest.keys
    texts = [prompt_text(prompt.messages) for _, prompt in contest.prompts]
    pairs = [pair for arm in arms for pair in zip(texts, arm.texts, reference.texts, strict=True)]
    endpoint = _endpoint(judge, session.run)
    with session.steps("evaluate", 0, len(pairs)) as steps:

        def tell(done: int) -> None:
            steps.done(done)
            if steps.interrupted:
                steps.leave()

        verdicts = endpoint.judge(pairs, tell)
    found = []
    for number, arm in enumerate(arms):
        own = verdicts[number * len(keys) : (number + 1) * len(keys)]
        longer = _longer(arm, reference)
        outcomes = [Outcome(k, v.value, g) for k, v, g in zip(keys, own, longer, strict=True)]
        _write_comparisons(contest, judge, arm, reference, outcomes)
        found.append((outcomes, _reliability(own)))
    return found


def _reliability(verdicts: Sequence[Verdict]) -> Json:
    """How often both orders gave one verdict, and replies that held none."""
    return {
        "orders_agree": sum(v.agreed for v in verdicts) / len(verdicts),
        "unreadable": sum(v.unreadable for v in verdicts),
    }


def _rounds(contest: Contest, judge: JudgeSpec) -> list[Json]:
    if judge.kind == "human":
        return rounds.of_votes(read_votes(judge.store))
    return rounds.of_project(contest.session.run, judge.name)


# -- files --------------------------------------------------------------------------------------


def _write(contest: Contest, arms: Sequence[Arm]) -> None:
    """samples.jsonl (a few), answers.jsonl (all) and what other evaluations compare with."""
    run, session = contest.session.run, contest.session
    for file in (SAMPLES, rounds.ANSWERS, rounds.COMPARISONS, rounds.FACTS):
        (run.path / file).unlink(missing_ok=True)
    fingerprint = {
        key: value
        for key, value in session.backbone.fingerprint.as_dict().items()
        if key != "model"
    }
    facts = {
        "fingerprint": fingerprint,
        "temperature": contest.settings.temperature,
        "max_new_tokens": session.recipe.data.max_response_tokens,
    }
    run.append(rounds.FACTS, facts)
    keys = contest.keys
    for row, (_, prompt) in enumerate(contest.prompts):
        for arm in arms:
            record = {
                "step": 0,
                "arm": arm.name,
                "prompt": prompt_text(prompt.messages),
                "response": arm.texts[row],
                "score": arm.scores[row] if arm.scores else None,
                "utility": arm.utilities[row] if arm.utilities else None,
            }
            if row < _SHOWN:
                run.append(SAMPLES, record)
            more = {
                "prompt_key": keys[row],
                "identity": arm.identity,
                "utilities": {judge: own[row] for judge, own in arm.by_judge.items()},
            }
            run.append(rounds.ANSWERS, record | more)


def _write_comparisons(
    contest: Contest, judge: JudgeSpec, arm: Arm, reference: Arm, outcomes: Sequence[Outcome]
) -> None:
    for outcome in outcomes:
        record = {
            "judge": judge.name,
            "a": arm.name,
            "b": reference.name,
            "a_identity": arm.identity,
            "b_identity": reference.identity,
            "prompt_key": outcome.prompt,
            "value": outcome.value,
        }
        contest.session.run.append(rounds.COMPARISONS, record)
