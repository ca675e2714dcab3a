"""The arms of the gold protocol: which run each one is, and what it measures when it has ended.

    FOLDER/  recipe.yaml   seed-0-base/   seed-0-ppo/   seed-0-ppo-ptx/ ...   protocol.json

Each is an ordinary run directory. `base` holds what all arms of a seed share: SFT, rankings, reward
model, and the answers of `sft` that every best-of-n is estimated from.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_rlhf.data.batches import tokenise_texts
from lora_rlhf.data.records import Text
from lora_rlhf.evaluation.frontier import START, run_frontier
from lora_rlhf.recipe import Recipe
from lora_rlhf.recipe_io import load_recipe
from lora_rlhf.runs import Run, directory_atomically
from lora_rlhf.tiny import plain_text
from lora_rlhf.training.material import as_sequences, heldout_prompts
from lora_rlhf.training.rollout import adapter_logprobs
from lora_rlhf.training.session import Session

BASE = "base"
TRAINED = ("ppo", "ppo-ptx", "ppo-gold", "ppo-random", "ppo-free")
ARMS = (BASE, *TRAINED)
BEST_OF = (4, 16, 64)
ANSWERS = 2  # of a trained policy a held-out prompt
_TEXT_SEED = 1  # of plain text that no training reads: the ptx mix is of seed 0

# A whole seed in a minute or two, for tests: it shows that the table is made of the runs.
REDUCED = (
    "data.demonstrations={builtin: demonstrations, limit: 80}",
    "data.prompts={builtin: prompts, limit: 60}",
    "data.heldout_prompts={builtin: prompts, limit: 4}",
    "rank.prompts=16",
    "reward.epochs=1.0",
    "ppo.steps=2",
    "ppo.batch_size=8",
    "ppo.minibatch_size=8",
    "ppo.value_warmup_steps=0",
    "ppo.sample_prompts=2",
    "evaluate.prompts=4",
)


@dataclass(frozen=True)
class Job:
    """One arm of one seed."""

    seed: int
    arm: str

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"seed-{self.seed}-{self.arm}"

    @classmethod
    def parse(cls, name: str) -> "Job":
        """Of its name, which must be one."""
        _, seed, arm = name.split("-", 2)
        assert arm in ARMS
        return cls(int(seed), arm)

    @property
    def needs(self) -> "Job | None":
        """What must have ended before."""
        return None if self.arm == BASE else Job(self.seed, BASE)


def jobs_of(seeds: Sequence[int]) -> list[Job]:
    """All arms of all seeds, in the order in which they are begun."""
    bases = [Job(seed, BASE) for seed in seeds]
    return bases + [Job(seed, arm) for seed in seeds for arm in TRAINED]


def own_stages(job: Job) -> tuple[str, ...]:
    """The stages that a job runs itself; an arm has the others from its base."""
    return ("sft", "rank", "reward") if job.arm == BASE else ("ppo",)


def overrides_of(arm: str, recipe: Recipe) -> list[str]:
    """What an arm changes in the protocol's recipe.

    ppo-free has no KL penalty, five thirds of the rounds and no bound, so that a reward model that
    can be over-optimised is. The coefficient of ppo-ptx was chosen among .05, .15 and 1 on seed 0.
    """
    assert recipe.ppo is not None
    steps = math.ceil(recipe.ppo.steps * 5 / 3)
    return {
        BASE: ["ppo=null"],
        "ppo": [],
        "ppo-ptx": ["ppo.ptx_coef=0.05", "data.text={builtin: text, limit: 2000}"],
        "ppo-gold": ["ppo.judge=builtin:gold"],
        "ppo-random": ["ppo.random_reward=true"],
        "ppo-free": [
            "ppo.kl_coef=0",
            f"ppo.steps={steps}",
            f"ppo.keep_policies_every={max(1, steps // 10)}",
            "ppo.keep=last",
            "ppo.max_kl=1000000",
            "ppo.max_length_drift=1000000",
        ],
    }[arm]


def recipe_of(folder: Path, job: Job) -> Recipe:
    """The recipe of a job: the folder's, with the job's seed and what its arm changes."""
    whole = load_recipe(str(folder / "recipe.yaml"))
    changes = [f"seed={job.seed}", "evaluate=null", *overrides_of(job.arm, whole)]
    return load_recipe(str(folder / "recipe.yaml"), changes)


def is_done(folder: Path, job: Job) -> bool:
    """Whether a job has ended and has been measured."""
    path = folder / job.name
    return path.is_dir() and "protocol" in Run(path).summary()


def prepare(folder: Path, job: Job) -> Run:
    """The run directory of a job; an arm's holds its seed's `sft` and `reward` from the start."""
    path, shared = folder / job.name, folder / Job(job.seed, BASE).name
    if job.arm == BASE or (path / "summary.json").exists():
        return Run(path)
    summary = Run(shared).summary()
    for key in ("protocol", "frontier"):
        summary.pop(key, None)
    with directory_atomically(path) as making:
        for stage in ("sft", "reward"):
            shutil.copytree(shared / stage / "adapter", making / stage / "adapter")
        # The answers of `sft` that best-of-n is estimated from: the same, so not drawn again.
        (making / START).parent.mkdir()
        shutil.copyfile(shared / START, making / START)
        Run(making).write_json("summary.json", summary)
    return Run(path)


def measure(session: Session, whole: Recipe, job: Job) -> None:
    """Answer the held-out prompts and mark the job as done.

    Args:
        session: of the job's run, with its adapters on the backbone.
        whole: the protocol's recipe, whose `evaluate` says on how many prompts.
        job: which.
    """
    began, settings = time.monotonic(), whole.evaluate
    assert settings is not None
    run_frontier(
        session,
        heldout_prompts(session, settings.prompts),
        settings.best_of,
        judge=settings.judge,
        temperature=settings.temperature,
        answers=ANSWERS,
    )
    role = "sft" if job.arm == BASE else "policy"
    found = {
        "nats_a_token": nats_a_token(session, role, 2 * settings.prompts),
        "measured_seconds": round(time.monotonic() - began, 1),
    }
    session.run.write_json("summary.json", session.run.summary() | {"protocol": found})


def nats_a_token(session: Session, adapter: str, texts: int) -> float:
    """Mean negative log-likelihood of held-out plain text; its exponential is the perplexity.

    Args:
        session: whose backbone has the adapter.
        adapter: which.
        texts: how many.
    """
    backbone, data = session.backbone, session.recipe.data
    records = [Text(row["text"]) for row in plain_text(texts, _TEXT_SEED)]
    limit = data.max_prompt_tokens + data.max_response_tokens
    ids = [row for row in tokenise_texts(records, backbone.format, limit) if len(row) > 1]
    rows = as_sequences(backbone, [(row[:1], row[1:]) for row in ids])
    logprobs = adapter_logprobs(backbone, adapter, rows, 1.0, session.budget.tokens)
    return float(-logprobs.sum() / rows.response_mask.sum())
