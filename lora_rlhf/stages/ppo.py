"""PPO: prompts and the reward model -> the adapter `policy`, held to the frozen `sft` by a KL."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_rlhf import display
from lora_rlhf.data.batches import Sequences, tokenise_texts
from lora_rlhf.data.records import prompt_text
from lora_rlhf.data.sources import load_text, require
from lora_rlhf.errors import CheckpointError, DataError
from lora_rlhf.evaluation.probes import policy_scores
from lora_rlhf.model.generation import Sampling
from lora_rlhf.recipe import Ppo
from lora_rlhf.training.checkpoint import (
    drop_checkpoints,
    load_checkpoint,
    role_state,
    save_checkpoint,
    set_role_state,
)
from lora_rlhf.training.experience import (
    Scorer,
    apply_missing_eos,
    random_scores,
    rollout_metrics,
)
from lora_rlhf.training.material import (
    TokenisedPrompt,
    as_sequences,
    demonstrations,
    training_prompts,
)
from lora_rlhf.training.metrics import MetricLog
from lora_rlhf.training.order import batch_of_prompts, take
from lora_rlhf.training.ppo import PpoTrainer, PtxBatch, row_seed
from lora_rlhf.training.reward_report import coin_warning, tells_answers_apart
from lora_rlhf.training.rollout import adapter_logprobs, sample, to_sequences
from lora_rlhf.training.scoring import judge_scorer, reward_scorer
from lora_rlhf.training.session import Session
from lora_rlhf.training.starting import start_adapter

_SHOWN = 4  # fixed prompts whose answers are kept as samples
_LOOK = -1  # the "step" that seeds the fixed prompts' sampling, the same at every look


def run(session: Session) -> None:
    """Train `policy` and save it under `ppo/adapter`, and the value model under `ppo/value`.

    Raises:
        CheckpointError: the reward model is missing, or may be no better than a coin.
        DataError: fewer prompts than one batch.
        TrainingError: a loss or gradient that is not finite.
    """
    settings = session.recipe.ppo
    assert settings is not None
    started = time.monotonic()
    _require_reward_model(session, settings)
    _show_health(session, settings)
    prompts = training_prompts(session)
    if len(prompts) < settings.batch_size:
        raise DataError(
            f"ppo.batch_size is {settings.batch_size}, but there are only {len(prompts)} training "
            f"prompts. Lower it, or give more prompts in data.prompts."
        )
    trainer = _make_trainer(session, settings, prompts)
    log = session.metrics("ppo")
    best, reason = _rounds(session, settings, trainer, prompts, log)
    if settings.keep == "best":
        set_role_state(session.backbone, "policy", best.tensors)
    elif trainer.ema is not None:
        set_role_state(session.backbone, "policy", trainer.ema)
    _save(session, trainer)
    if settings.keep == "last":
        best = _look(session, trainer, prompts, int(log.last()["step"]), Best())
    results: dict[str, object] = {"ppo": _report(session, best, reason)}
    if "health" in session.run.summary() and "reward" in session.backbone.adapters.heads:
        results["health"] = {"scores": policy_scores(session)}
    session.run.finish_stage("ppo", time.monotonic() - started, **results)
    drop_checkpoints(session.run, "ppo")


def _rounds(
    session: Session,
    settings: Ppo,
    trainer: PpoTrainer,
    prompts: list[TokenisedPrompt],
    log: MetricLog,
) -> tuple["Best", str]:
    """The algorithm."""
    seed, now = session.recipe.seed, _resumed(session, trainer, log)
    with session.steps("ppo", now.step, settings.steps) as steps:
        if now.step == 0:
            now.best = _look(session, trainer, prompts, 0, now.best)
        # A run that stopped itself, and was killed before it was saved, stays stopped.
        for step in range(now.step, now.step if now.stopped else settings.steps):
            began = time.monotonic()
            # 1. prompts, without replacement within an epoch of them (P15)
            chosen = batch_of_prompts(prompts, settings.batch_size, seed, step)
            seeds = [row_seed(seed, step, row) for row in range(len(chosen))]
            # 2. pure samples, and everything read off them once: logprobs, reference, values, score
            rollout = trainer.collect([ids for ids, _ in chosen], seeds)
            # 3. token rewards: score at the end token, KL penalty everywhere. 4. GAE, whitened
            experience = trainer.judge(rollout)
            metrics = rollout_metrics(experience, settings, trainer.kl_coef)
            # 5. clipped policy and value updates over shuffled minibatches
            metrics |= trainer.update(experience, step, settings.steps)
            # 6. the KL coefficient follows its target
            if trainer.kl is not None:
                trainer.kl.update(metrics["rollout/kl"], settings.batch_size)
            # 7. log, look at the fixed prompts, stop what runs away, checkpoint
            done = now.step = step + 1
            tokens = float(rollout.sequences.lengths.sum())
            metrics["train/tokens_per_second"] = tokens / (time.monotonic() - began)
            log.write(done, metrics)
            now.start_length = now.start_length or metrics["rollout/response_length"]
            now.stopped = runaway(settings, metrics, now.start_length)
            if done % settings.sample_every == 0 or done == settings.steps:
                now.best = _look(session, trainer, prompts, done, now.best)
            if _is_kept(settings, done):
                _keep(session, trainer, done)
            if done % settings.checkpoint_every == 0 or steps.interrupted:
                now.save(session, trainer)
            shown = {k: metrics[f"rollout/{k}"] for k in ("score", "kl")}
            steps.done(done, **shown, tokens_per_second=metrics["train/tokens_per_second"])
            if steps.interrupted:
                steps.leave()
            if now.stopped:
                session.tell(f"ppo stopped at step {done}: {now.stopped}")
                break
    return now.best, now.stopped


# -- preparation --------------------------------------------------------------------------------


def _require_reward_model(session: Session, settings: Ppo) -> None:
    adapters = session.backbone.adapters
    if settings.random_reward or settings.judge is not None:
        return  # neither reads the reward model
    if "reward" not in adapters.heads:
        raise CheckpointError(
            f"ppo: {session.run.path} has no reward model at reward/adapter. Add a reward section "
            f"to the recipe, or put one there with --only reward."
        )
    report = session.run.summary().get("reward", {})
    if report and not tells_answers_apart(report) and not session.force:
        raise CheckpointError(coin_warning(report))


def _show_health(session: Session, settings: Ppo) -> None:
    """Say what is known of the reward model that the policy will climb."""
    if settings.random_reward or settings.judge is not None:
        return
    health = session.run.summary().get("health")
    if health:
        display.health_card(session.console, health)
    else:
        session.tell(
            f"ppo: this reward model has no health card, so nothing here says whether to trust "
            f"it. lora-rlhf run {session.recipe.name} --only reward trains it with one."
        )


def _make_trainer(session: Session, settings: Ppo, prompts: list[TokenisedPrompt]) -> PpoTrainer:
    """Start `policy`, copy `value` from `reward`, and put the trainer together."""
    recipe, backbone = session.recipe, session.backbone
    adapters = backbone.adapters
    start_adapter(session, "policy", "sft", settings.start_from)
    adapters.heads.pop("value", None)  # of an earlier run on this backbone
    if settings.value == "adapter":
        adapters.copy("reward" if "reward" in adapters.heads else "sft", "value")
    if "value" not in adapters.heads:
        head = adapters.add_head("value", seed=recipe.seed)
        with torch.no_grad():
            head.weight.zero_()  # a fresh value head says 0 (RM2)
    return PpoTrainer(
        backbone=backbone,
        settings=settings,
        sampling=Sampling(recipe.data.max_response_tokens, settings.temperature),
        budget=session.budget,
        score=_scorer(session, settings, prompts),
        seed=recipe.seed,
        ptx=_ptx_batches(session, settings),
        rollout_rows=session.rollout_rows,
    )


def _scorer(session: Session, settings: Ppo, prompts: list[TokenisedPrompt]) -> Scorer:
    if settings.random_reward:
        return lambda sequences: random_scores(sequences, session.recipe.seed)
    if settings.judge is not None:
        return judge_scorer(session, settings.judge, prompts)
    return reward_scorer(session)


def _ptx_batches(session: Session, settings: Ppo) -> PtxBatch | None:
    """Batches of the ptx mix by index: plain text where the recipe has it, else demonstrations."""
    if settings.ptx_coef == 0.0:
        return None
    data, backbone = session.recipe.data, session.backbone
    if data.text is not None:
        limit = data.max_prompt_tokens + data.max_response_tokens
        texts = tokenise_texts(require(load_text(data.text)), backbone.format, limit)
        # A text is all response but for its first token, which nothing predicts.
        items = [(ids[:1], ids[1:]) for ids in texts if len(ids) > 1]
    else:
        items, _ = demonstrations(session)
    if not items:
        raise DataError("ppo.ptx_coef is set, but data.text and data.demonstrations hold no text.")
    size = min(settings.ptx_batch_size, len(items))

    def batch(index: int) -> Sequences:
        return as_sequences(backbone, take(items, size, session.recipe.seed + 1, index))

    return batch


# -- looking ------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where the rounds stand, beside what the trainer itself holds.

    Attributes:
        step: rounds complete.
        best: so far.
        start_length: mean tokens of the first round's responses.
        stopped: why the run stopped itself, or "".
    """

    step: int
    best: "Best"
    start_length: float = 0.0
    stopped: str = ""

    def save(self, session: Session, trainer: PpoTrainer) -> None:
        """Write a checkpoint."""
        state = {
            "trainer": trainer.state(),
            "best": vars(self.best),
            "start_length": self.start_length,
            "stopped": self.stopped,
        }
        save_checkpoint(session.run, "ppo", self.step, state)


def _resumed(session: Session, trainer: PpoTrainer, log: MetricLog) -> Progress:
    """The newest checkpoint, its state put in place; the beginning where there is none."""
    state = load_checkpoint(session.run, "ppo")
    if state is None:
        log.cut_after(-1)
        return Progress(0, Best())
    trainer.load_state(state["trainer"])
    log.cut_after(state["step"])
    best = Best(**state["best"])
    return Progress(state["step"], best, state["start_length"], state["stopped"])


@dataclass
class Best:
    """The round that is kept: highest score minus kl_coef * KL on the fixed prompts."""

    step: int = -1
    objective: float = -math.inf
    score: float = 0.0
    kl: float = 0.0
    eos_rate: float = 0.0
    mean_length: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)


def _look(
    session: Session, trainer: PpoTrainer, prompts: list[TokenisedPrompt], step: int, best: Best
) -> Best:
    """Answer the fixed prompts from fixed seeds, and keep the policy if it is the best so far."""
    settings, backbone = trainer.settings, session.backbone
    fixed = prompts[: settings.sample_prompts]
    seeds = [row_seed(session.recipe.seed, _LOOK, i) for i in range(len(fixed))]
    ids = [tokens for tokens, _ in fixed]
    with _ema_in_place(trainer):
        answers = sample(backbone, "policy", ids, seeds, trainer.sampling, session.rollout_rows)
        sequences, ended = to_sequences(backbone, ids, answers)
        tokens, temperature = session.budget.tokens, settings.temperature
        policy = adapter_logprobs(backbone, "policy", sequences, temperature, tokens)
        reference = adapter_logprobs(backbone, "sft", sequences, temperature, tokens)
        tensors = role_state(backbone, "policy")
    kl = (policy - reference).sum(-1)
    scores = apply_missing_eos(trainer.score(sequences), ended, settings)
    for row, (_, prompt) in enumerate(fixed[:_SHOWN]):
        record = {
            "step": step,
            "prompt": prompt_text(prompt.messages),
            "response": backbone.format.decode(answers[row].ids),
            "score": float(scores[row]),
            "kl": float(kl[row]),
        }
        session.run.append("ppo/samples.jsonl", record)
    # The recipe's own coefficient, so that an adaptive one does not move the yardstick.
    objective = float(scores.mean() - settings.kl_coef * kl.mean())
    if not objective > best.objective:  # nor is what is no number
        return best
    return Best(
        step=step,
        objective=objective,
        score=float(scores.mean()),
        kl=float(kl.mean()),
        eos_rate=float(ended.float().mean()),
        mean_length=float(sequences.response_mask.sum(-1).float().mean()),
        tensors=tensors,
    )


@contextmanager
def _ema_in_place(trainer: PpoTrainer) -> Iterator[None]:
    """Run the block with the policy's exponential mean in its place, where there is one."""
    if trainer.ema is None:
        yield
        return
    live = role_state(trainer.backbone, "policy")
    set_role_state(trainer.backbone, "policy", trainer.ema)
    try:
        yield
    finally:
        set_role_state(trainer.backbone, "policy", live)


def runaway(settings: Ppo, metrics: dict[str, float], start_length: float) -> str:
    """Why the run must stop, or "": KL or length has left its bounds."""
    kl, length = metrics["rollout/kl"], metrics["rollout/response_length"]
    if kl > settings.max_kl:
        return (
            f"KL {kl:.1f} nats a sequence passed ppo.max_kl={settings.max_kl}. The best round so "
            f"far is kept. Raise kl_coef or lower learning_rate."
        )
    if abs(length / start_length - 1.0) > settings.max_length_drift:
        return (
            f"mean length went from {start_length:.0f} to {length:.0f} tokens, beyond "
            f"ppo.max_length_drift={settings.max_length_drift}. The best round so far is kept. The "
            f"reward model may be paying for length: see its length_correlation."
        )
    return ""


# -- results ------------------------------------------------------------------------------------


def _is_kept(settings: Ppo, step: int) -> bool:
    every = settings.keep_policies_every
    return every is not None and (step % every == 0 or step == settings.steps)


def _keep(session: Session, trainer: PpoTrainer, step: int) -> None:
    """Save the policy as it is after a round, beside the one that the run ends with."""
    with _ema_in_place(trainer):
        path = session.run.kept_policy(step)
        session.backbone.adapters.save("policy", path, role="policy", stage="ppo")


def _save(session: Session, trainer: PpoTrainer) -> None:
    adapters, run = session.backbone.adapters, session.run
    data = run.summary().get("reward", {}).get("data")  # what the reward model has learned from
    adapters.freeze("policy")
    adapters.save("policy", run.adapter("policy"), role="policy", stage="ppo", data=data)
    if not trainer.shared:
        adapters.save("value", run.adapter("value"), role="value", stage="ppo", data=data)


def _report(session: Session, best: Best, reason: str) -> dict[str, object]:
    last = session.run.lines("ppo/metrics.jsonl")[-1]
    return {
        "best_step": best.step,
        "score": best.score,
        "kl": best.kl,
        "eos_rate": best.eos_rate,
        "mean_length": best.mean_length,
        "last_kl": last["rollout/kl"],
        "last_score": last["rollout/score"],
        "stopped": reason,
    }
