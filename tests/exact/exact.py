"""The real PPO trainer on a table world, and the check that it has found the optimum."""

from lora_rlhf.model.generation import Sampling
from lora_rlhf.recipe import Ppo
from lora_rlhf.training.optim import TokenBudget
from lora_rlhf.training.ppo import PpoTrainer, row_seed
from lora_rlhf.training.rollout import map_rows, score_forward
from tests.exact.table import BOS, World

MANY = 10**6
# KL(pi || pi*) below, share of the way from J(ref) to J* above. The tree's bound is a fifth of the
# prototype's, because sampling at 0.7 and scoring at 1 ends at 2e-4 (the library: 3e-6).
BANDIT = (1e-3, 0.99)
TREE = (1e-4, 0.995)


def train(
    world: World,
    beta: float,
    rounds: int = 150,
    batch: int = 512,
    learning_rate: float = 0.02,
    seed: int = 0,
    **changes: object,
) -> PpoTrainer:
    """PPO on a world's own reward adapter, at KL coefficient beta, for so many rounds."""
    backbone = world.backbone
    head = backbone.adapters.heads["reward"]

    def score(sequences):
        with backbone.adapters.use("reward"):
            return map_rows(sequences, MANY, lambda s: (score_forward(backbone, s, head),))[0]

    fields: dict[str, object] = {
        "kl_coef": beta,
        "batch_size": batch,
        "minibatch_size": batch // 2,
        "ppo_epochs": 2,
        "steps": rounds,
        "learning_rate": learning_rate,
        "value_learning_rate": learning_rate,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "max_grad_norm": 1e9,
        "missing_eos": "none",
        "value_warmup_steps": 0,
        "value_clip_range": None,
    }
    settings = Ppo.model_validate(fields | changes)
    trainer = PpoTrainer(
        backbone,
        settings,
        Sampling(world.depth, settings.temperature),
        TokenBudget(MANY, lambda text: None),
        score,
        seed=seed,
        rollout_rows=batch,
    )
    for step in range(rounds):
        seeds = [row_seed(seed, step, i) for i in range(batch)]
        rollout = trainer.collect([[BOS]] * batch, seeds)
        trainer.update(trainer.judge(rollout), step, rounds)
    return trainer


def tree_passes(world: World, beta: float = 1.0, threshold: tuple[float, float] = TREE) -> bool:
    """Whether the trained policy of a world is at the optimum."""
    kl, share = world.measure(beta)
    return kl < threshold[0] and share > threshold[1]
