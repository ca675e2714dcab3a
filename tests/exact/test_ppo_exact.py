"""T2 and T3: the real trainer reaches the enumerated optimum of KL-regularised RL."""

import pytest
import torch

from lora_rlhf.model.generation import Sampling
from lora_rlhf.training.rollout import sample
from tests.exact.exact import BANDIT, train, tree_passes
from tests.exact.mutants import MUTANTS, survives
from tests.exact.table import BOS, World


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_ppo_reaches_the_optimum_of_a_bandit(beta):
    """T2: pi* ~ ref exp(r / beta) over ten arms, each of which ends the response."""
    world = World(vocabulary=10, depth=1, ends=10, seed=3)
    train(world, beta, rounds=200)
    kl, share = world.measure(beta)
    assert kl < BANDIT[0]
    assert share > BANDIT[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_reaches_the_optimum_of_an_enumerated_tree(seed):
    """T3 at beta 1: token-level PPO with a critic over every sequence of up to four tokens."""
    world = World(seed=seed)
    before, _ = world.measure(1.0)
    train(world, 1.0, seed=seed)
    assert tree_passes(world)
    assert before > 0.1


def test_ppo_comes_close_where_the_penalty_is_weak():
    """T3 at beta 0.3: limited by exploration, so the share of J* alone is asserted."""
    world = World(seed=0)
    train(world, 0.3)
    assert world.measure(0.3)[1] > 0.97


def test_a_shared_trunk_reaches_it_too():
    world = World(seed=0)
    train(world, 1.0, value="shared")
    assert world.measure(1.0)[1] > 0.97


def test_a2c_reaches_it_too():
    """One epoch, one minibatch, no clipping."""
    world = World(seed=0)
    train(world, 1.0, rounds=300, ppo_epochs=1, minibatch_size=512, clip_range=None)
    assert world.measure(1.0)[1] > 0.99


def test_the_tables_probabilities_are_those_the_decoder_samples():
    """The world itself is checked: 20,000 samples of the reference against its enumeration."""
    world = World(seed=0)
    answers = sample(
        world.backbone, "sft", [[BOS]] * 20_000, range(20_000), Sampling(4), max_rows=20_000
    )
    expected = world.sequence_logprobs(world.ref_table).exp()
    index = {tokens: i for i, tokens in enumerate(world.sequences)}
    counts = torch.zeros(len(index))
    for answer in answers:
        counts[index[tuple(answer.ids)]] += 1
    common = expected * 20_000 > 5
    z = (counts - 20_000 * expected) / (20_000 * expected * (1 - expected)).sqrt()
    assert float(z[common].square().mean()) < 1.5


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_wrong_ppo_does_not_reach_it(name):
    passes, kl, share = survives(name)
    assert not passes, f"{name} survives: KL {kl:.1e}, J {share:.4f}"
