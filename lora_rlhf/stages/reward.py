"""The reward model: rankings -> the adapter `reward` and its scalar head."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_rlhf.data.batches import make_sequences, tokenise_rankings
from lora_rlhf.data.readers import OF_APP, name_of
from lora_rlhf.data.records import Ranking, prompt_key, prompt_text
from lora_rlhf.data.sources import load_rankings, require
from lora_rlhf.data.splits import deduplicate, leak_check, split_rankings
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.probes import examine_health
from lora_rlhf.losses.outputs import LossOutput, merge
from lora_rlhf.losses.reward import ranking_loss
from lora_rlhf.preferences.files import sha256_of
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Source, is_store
from lora_rlhf.training.checkpoint import drop_checkpoints
from lora_rlhf.training.material import RANKINGS, demonstrations
from lora_rlhf.training.offline import Task, fit
from lora_rlhf.training.reward_report import (
    Group,
    coin_warning,
    examine,
    score_groups,
    tells_answers_apart,
)
from lora_rlhf.training.rollout import score_answers, score_forward
from lora_rlhf.training.session import Session
from lora_rlhf.training.starting import start_adapter

Judged = dict[tuple[str, ...], tuple[float, ...]]
_HELDOUT = 256  # held-out prompts whose loss is followed during training


def run(session: Session) -> None:
    """Train `reward` from rankings, normalise its scores, and save it under `reward/adapter`.

    Raises:
        DataError: no usable rankings.
        TrainingError: a loss that is not finite.
    """
    recipe, backbone = session.recipe, session.backbone
    settings = recipe.reward
    assert settings is not None
    started = time.monotonic()
    train, heldout = rankings(session)
    begin(session)
    task = Task(
        stage="reward",
        lengths=[g.tokens for g in train],
        counts=[1] * len(train),
        loss=lambda items: group_loss(session, [train[i] for i in items]),
        evaluate=lambda: heldout_metrics(session, heldout[:_HELDOUT]),
    )
    best = fit(session, settings, task)
    normalise(session, heldout)
    backbone.adapters.freeze("reward")
    data = describe_rankings(session) | {"train": len(train), "heldout": len(heldout)}
    path = session.run.adapter("reward")
    backbone.adapters.save("reward", path, role="reward", stage="reward", data=data)
    scores = [s.tolist() for s in score_groups(session, heldout)]
    report = examine(session, heldout, scores)
    report |= {"best_step": best["step"], "prompts": len(train), "data": data}
    health = examine_health(session, heldout, scores)
    seconds = time.monotonic() - started
    session.run.finish_stage("reward", seconds, reward=report, health=health)
    drop_checkpoints(session.run, "reward")
    if not tells_answers_apart(report) and (recipe.ppo is None or session.force):
        session.tell(coin_warning(report))


def begin(session: Session) -> None:
    """Put in place what will train: a copy of `sft` with a fresh head, or an earlier `reward`.

    Raises:
        CheckpointError: `reward.start_from` is no reward adapter of this backbone.
    """
    settings, adapters = session.recipe.reward, session.backbone.adapters
    assert settings is not None
    start_adapter(session, "reward", "sft", settings.start_from)
    if settings.start_from is None:
        adapters.add_head("reward", seed=session.recipe.seed)


# -- data ---------------------------------------------------------------------------------------


def rankings(session: Session) -> tuple[list[Group], list[Group]]:
    """The rankings of the run or of the recipe, (train, held out), split by prompt.

    Raises:
        DataError: none are usable, or a prompt stands in both parts.
    """
    source = _source(session)
    loaded = load_rankings(source)
    records, _ = deduplicate(require(loaded))
    if OF_APP in loaded.dropped:
        session.tell(
            f"reward: {loaded.dropped[OF_APP]} rankings left out ({OF_APP}); "
            f"data.rankings.heldout=true trains on them, too"
        )
    sampled = session.recipe.rank is not None or is_store(source.path or "")
    train, heldout = split_rankings(
        records, session.recipe.data.heldout_fraction, of_training_prompts=sampled
    )
    leak_check(train, heldout)
    judged = _judge_scores(session)
    return _tokenise(session, train, judged), _tokenise(session, heldout, judged)


def _source(session: Session) -> Source:
    if session.recipe.rank is not None:
        return Source(path=str(session.run.path / RANKINGS))
    assert session.recipe.data.rankings is not None
    return session.recipe.data.rankings


def describe_rankings(session: Session) -> dict[str, object]:
    """Where the rankings come from, and hashes that tell whether they are still the same.

    Of a file the SHA-256 of its bytes; of a store that of its events, which its copies share.
    """
    source = _source(session)
    facts: dict[str, object] = {"rankings": name_of(source)}
    if source.path is None:
        return facts
    if Path(source.path).is_relative_to(session.run.path):
        # A run says the same wherever it lies.
        facts["rankings"] = str(Path(source.path).relative_to(session.run.path))
    if is_store(source.path):
        with Store.open(source.path, create=False, read_only=True) as store:
            facts["rankings_digest"] = store.digest()
    path = Path(source.path).expanduser()
    if path.is_file():
        facts["rankings_sha256"] = sha256_of(path)
    return facts


def _judge_scores(session: Session) -> Judged:
    """The simulated judge's scores by prompt and answers; {} for real rankings."""
    if session.recipe.rank is None:
        return {}
    lines = session.run.lines(RANKINGS)
    return {(prompt_key(r["prompt"]), *r["responses"]): tuple(r["judge"]) for r in lines}


def _tokenise(
    session: Session,
    records: Sequence[Ranking],
    judged: Judged,
) -> list[Group]:
    data = session.recipe.data
    tokens, dropped = tokenise_rankings(
        records, session.backbone.format, data.max_prompt_tokens, data.max_response_tokens
    )
    for reason, count in dropped.items():
        session.tell(f"reward: {count} of {len(records)} rankings dropped ({reason})")
    if not tokens:
        raise DataError(
            f"reward: none of {len(records)} rankings fits data.max_prompt_tokens="
            f"{data.max_prompt_tokens} and data.max_response_tokens={data.max_response_tokens}. "
            f"Raise them, or give more rankings."
        )
    return [
        Group(
            prompt,
            responses,
            record.groups,
            judged.get((prompt_key(record.prompt), *record.responses)),
            prompt_text(record.prompt),
            record.tag,
        )
        for prompt, responses, record in tokens
    ]


# -- training -----------------------------------------------------------------------------------


def group_loss(session: Session, groups: Sequence[Group]) -> LossOutput:
    """One forward an answer; each prompt's pairs are one term (1a.8), under the adapter in use."""
    scores = _forward(session, groups)
    outputs = []
    for group, own in zip(groups, scores.split([len(g.responses) for g in groups]), strict=True):
        output = ranking_loss(own, group.groups)
        pairs = output.metrics["pairs"].clamp(min=1)
        shares = {
            "train/accuracy": output.metrics["correct"] / pairs,
            "train/margin": output.metrics["margin"] / pairs,
        }
        outputs.append(output._replace(metrics=shares))
    return merge(outputs)


def _forward(session: Session, groups: Sequence[Group]) -> torch.Tensor:
    backbone = session.backbone
    prompts = [g.prompt for g in groups for _ in g.responses]
    responses = [r for g in groups for r in g.responses]
    sequences = make_sequences(prompts, responses, backbone.format.pad_id, backbone.device)
    return score_forward(backbone, sequences, backbone.adapters.heads["reward"], raw=True)


def heldout_metrics(session: Session, groups: Sequence[Group]) -> dict[str, float]:
    """Mean loss a prompt and share of strict pairs in the right order."""
    outputs = [
        ranking_loss(s, g.groups)
        for s, g in zip(score_groups(session, groups, raw=True), groups, strict=True)
    ]
    merged = merge(outputs)
    return {
        "heldout/loss": float(merged.total / merged.count.clamp(min=1)),
        "heldout/accuracy": float(merged.metrics["correct"] / merged.metrics["pairs"].clamp(min=1)),
    }


def normalise(session: Session, heldout: Sequence[Group]) -> None:
    """Held-out demonstrations score 0 on average, sampled answers spread by 1 (1a.11, RM3)."""
    settings = session.recipe.reward
    assert settings is not None
    if settings.normalize_on == "none":
        return
    spread = float(torch.cat(score_groups(session, heldout, raw=True)).std())
    if session.recipe.data.demonstrations is None:
        mean = float(torch.cat(score_groups(session, heldout, raw=True)).mean())
    else:
        _, demos = demonstrations(session)
        demos = demos[:_HELDOUT]
        raw = score_answers(
            session.backbone,
            [p for p, _ in demos],
            [r for _, r in demos],
            session.budget.tokens,
            raw=True,
        )
        mean = float(raw.mean())
    session.backbone.adapters.heads["reward"].normalise(mean, max(spread, 1e-6))
