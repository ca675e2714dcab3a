"""A simulated labeler: `sft` answers each prompt K times, a judge with noise ranks the answers."""

import json
import math
import random
import time

from lora_rlhf.data.records import prompt_text
from lora_rlhf.errors import DataError
from lora_rlhf.model.generation import Sampling
from lora_rlhf.preferences.judges import find_judge, noise_for_agreement
from lora_rlhf.runs import write_atomically
from lora_rlhf.training.material import RANKINGS, TokenisedPrompt, training_prompts
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import sample
from lora_rlhf.training.session import Session

_BLOCK = 128


def run(session: Session) -> None:
    """Write `rank/rankings.jsonl`: prompt, responses, ranking, and the judge's own scores.

    Each finished block of prompts is kept, so that a killed run goes on where it was.

    Raises:
        DataError: fewer prompts than asked for.
        ConfigError: a judge that cannot be imported or tells no two answers apart.
    """
    settings = session.recipe.rank
    assert settings is not None
    started = time.monotonic()
    judge = find_judge(settings.judge)
    prompts = training_prompts(session)
    if len(prompts) < settings.prompts:
        raise DataError(
            f"rank.prompts asks for {settings.prompts} prompts, but only {len(prompts)} usable "
            f"training prompts are there. Lower it, or give more demonstrations or data.prompts."
        )
    prompts = prompts[: settings.prompts]
    prompts, answers = _different(session, prompts, _sample_answers(session, prompts))
    texts = [prompt_text(p.messages) for _, p in prompts]
    utilities = [
        [judge(text, a) for a in group] for text, group in zip(texts, answers, strict=True)
    ]
    noise = noise_for_agreement(utilities, settings.agreement)
    lines = []
    for index, ((_, prompt), group, scores) in enumerate(
        zip(prompts, answers, utilities, strict=True)
    ):
        ranking = noisy_ranking(scores, noise, row_seed(session.recipe.seed, -1, index))
        record = {
            "prompt": list(prompt.messages),
            "responses": group,
            "ranking": [[i] for i in ranking],
            "judge": scores,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomically(session.run.path / RANKINGS, "".join(lines))
    session.run.finish_stage(
        "rank",
        time.monotonic() - started,
        rank={"prompts": len(prompts), "answers": settings.answers, "noise": noise},
    )


def _different(
    session: Session, prompts: list[TokenisedPrompt], answers: list[list[str]]
) -> tuple[list[TokenisedPrompt], list[list[str]]]:
    """Prompts with at least two different answers that are not empty, and those answers."""
    kept_prompts, kept_answers = [], []
    for prompt, group in zip(prompts, answers, strict=True):
        unique = [a for a in dict.fromkeys(group) if a.strip()]
        if len(unique) >= 2:
            kept_prompts.append(prompt)
            kept_answers.append(unique)
    fewer = sum(map(len, answers)) - sum(map(len, kept_answers))
    if fewer:
        session.tell(f"rank: {fewer} empty, repeated or unfinished answers left out")
    return kept_prompts, kept_answers


def noisy_ranking(utilities: list[float], noise: float, seed: int) -> list[int]:
    """Indices best first, after Gumbel noise of this spread on each utility."""
    generator = random.Random(seed)
    noisy = [u + noise * _gumbel(generator) for u in utilities]
    return sorted(range(len(utilities)), key=lambda i: -noisy[i])


def _gumbel(generator: random.Random) -> float:
    # -log of a standard exponential is a standard Gumbel.
    return -math.log(generator.expovariate(1.0))


def _sample_answers(session: Session, prompts: list[TokenisedPrompt]) -> list[list[str]]:
    """K answers a prompt, block by block; blocks on disk are not sampled again."""
    recipe, backbone = session.recipe, session.backbone
    settings = recipe.rank
    assert settings is not None
    part = "rank/answers.jsonl"
    done = [r["answers"] for r in session.run.lines(part)]
    # A block cut short by a crash is sampled again as a whole, from the same seeds.
    done = done[: len(done) // _BLOCK * _BLOCK]
    session.run.cut_lines_after(part, len(done) - 1)
    sampling = Sampling(recipe.data.max_response_tokens, settings.temperature)
    with session.steps("rank", len(done), len(prompts)) as steps:
        for start in range(len(done), len(prompts), _BLOCK):
            block = prompts[start : start + _BLOCK]
            ids = [tokens for tokens, _ in block for _ in range(settings.answers)]
            seeds = [row_seed(recipe.seed, -2 - start // _BLOCK, i) for i in range(len(ids))]
            found = sample(backbone, "sft", ids, seeds, sampling, session.rollout_rows)
            # Of an answer that the limit cut, the labeler would rank what no one wrote; PPO has a
            # rule of its own for those. A plain continuation may stop anywhere.
            plain = backbone.format.mode == "none"
            texts = [backbone.format.decode(a.ids) if a.ended or plain else "" for a in found]
            for i in range(len(block)):
                group = texts[i * settings.answers : (i + 1) * settings.answers]
                session.run.append(part, {"step": start + i, "answers": group})
                done.append(group)
            steps.done(len(done))
            if steps.interrupted:
                steps.leave()
    return done
