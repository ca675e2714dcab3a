"""Best-of-n against enumeration: of tuples, of subsets, and of answers drawn one by one."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from lora_rlhf import tiny
from lora_rlhf.data.batches import tokenise_prompts
from lora_rlhf.data.records import Prompt, prompt_text, user
from lora_rlhf.errors import CheckpointError
from lora_rlhf.evaluation import best_of_n
from lora_rlhf.evaluation.best_of_n import (
    Plan,
    best_of_n_kl,
    best_of_n_weights,
    draw,
    expected_best,
)
from lora_rlhf.evaluation.choosing import Chooser
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.model.generation import Sampling, generate
from lora_rlhf.training.ppo import row_seed
from tests.sessions import session
from tests.small_run import ROLES, small_recipe, small_run

# -- closed forms -------------------------------------------------------------------------------


def best_by_enumeration(p: np.ndarray, n: int) -> np.ndarray:
    """The distribution of the highest of n draws from atoms 0 < 1 < 2 ..., by every tuple."""
    tuples = np.indices((len(p),) * n).reshape(n, -1)
    return np.bincount(tuples.max(0), weights=p[tuples].prod(0), minlength=len(p))


def kl(q: np.ndarray, p: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0))


@pytest.mark.parametrize(("atoms", "n"), [(2, 2), (5, 3), (9, 4), (300, 2)])
def test_the_kl_bounds_that_of_every_discrete_distribution(atoms: int, n: int) -> None:
    p = np.random.default_rng(atoms).dirichlet(np.ones(atoms))
    assert kl(best_by_enumeration(p, n), p) < best_of_n_kl(n)


def test_the_kl_is_what_many_atoms_come_to() -> None:
    """Equality for scores that never tie: the gap shrinks with every finer distribution."""
    gaps = []
    for atoms in (10, 100, 1000):
        p = np.full(atoms, 1 / atoms)
        gaps.append(best_of_n_kl(2) - kl(best_by_enumeration(p, 2), p))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] > 0
    assert gaps[2] < 1e-5
    assert abs(math.log(2) - best_of_n_kl(2)) > 0.1  # the mutant without the second term


def test_the_kl_of_sixty_four() -> None:
    """Of 16 atoms 2.88 nats at most (ln 16 bounds it); of 4,096 as many as the form says."""
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(64) == pytest.approx(3.1745, abs=1e-3)
    for atoms in (16, 4096):
        p = np.full(atoms, 1 / atoms)
        below = np.concatenate([[0.0], p.cumsum()])
        found = kl(below[1:] ** 64 - below[:-1] ** 64, p)
        assert found < best_of_n_kl(64)
        if atoms == 16:
            assert found < math.log(16)
        else:
            assert found == pytest.approx(best_of_n_kl(64), abs=1e-3)


def best_of_subsets(scores: list[float], values: list[float], n: int) -> float:
    """The mean over every subset of n answers; equal ones are drawn by a fair coin."""
    found = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        ties = [values[i] for i in subset if scores[i] == top]
        found.append(sum(ties) / len(ties))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "scores",
    [
        [0.3, -1.0, 2.0, 0.1, 0.9, -0.4, 1.5],
        [1.0, 1.0, 1.0, 0.0, 2.0, 2.0, -1.0],
        [5.0] * 7,
    ],
    ids=["distinct", "ties", "all equal"],
)
def test_every_n_is_estimated_as_all_subsets_would(scores: list[float]) -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0]
    for n in range(1, 8):
        found = expected_best(np.array([scores]), np.array([values]), n)
        assert found.shape == (1,)
        assert found[0] == pytest.approx(best_of_subsets(scores, values, n), abs=1e-12)


def test_drawing_with_replacement_would_be_biased() -> None:
    """The mutant (i/N)^n - ((i-1)/N)^n: each answer may be drawn more than once."""
    scores = np.arange(6.0)
    n, ranks = 3, np.arange(1, 7) / 6
    mutant = (ranks**n - (ranks - 1 / 6) ** n) @ scores
    truth = best_of_subsets(list(scores), list(scores), n)
    assert expected_best(scores[None], scores[None], n)[0] == pytest.approx(truth, abs=1e-12)
    assert abs(mutant - truth) > 0.1


def test_the_estimate_is_unbiased() -> None:
    """Against the exact mean of the best of n normal draws, over 4,000 prompts of 16 answers."""
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(4000, 16))
    grid = np.linspace(-8, 8, 20001)
    step = grid[1] - grid[0]
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    below = density.cumsum() * step
    for n in (2, 4, 16):
        exact = float((grid * n * density * below ** (n - 1)).sum() * step)
        found = expected_best(scores, scores, n)
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - exact) < 4 * error + 1e-3  # 1e-3: of the grid
    weights = best_of_n_weights(scores, 4)
    assert weights.sum(-1) == pytest.approx(1.0, abs=1e-12)


# -- ensembles ----------------------------------------------------------------------------------


def test_ensembles_choose_as_coste_says() -> None:
    """Three members, three answers: each rule has its own favourite."""
    scores = np.array([[4.0, 1.1, 2.0], [0.0, 1.1, 2.0], [2.9, 1.1, 0.9]])
    three = ("a", "b", "c")
    mean = Chooser(three).combine(scores)
    assert mean.tolist() == pytest.approx([2.3, 1.1, 4.9 / 3])
    assert Chooser(three).choose(scores) == 0
    worst = Chooser(three, "worst")
    assert worst.combine(scores).tolist() == [0.0, 1.1, 0.9]
    assert worst.choose(scores) == 1
    careful = Chooser(three, "uncertainty", weight=0.5)
    # Variances over three members: (1.7^2 + 2.3^2 + 0.6^2) / 3, 0, and that of 2, 2, 0.9.
    expected = [2.3 - 0.5 * 8.54 / 3, 1.1, 4.9 / 3 - 0.5 * (2 * 0.3667**2 + 0.7333**2) / 3]
    assert careful.combine(scores).tolist() == pytest.approx(expected, abs=1e-3)
    assert careful.choose(scores) == 2
    assert Chooser(three, "uncertainty", weight=0.0).choose(scores) == 0


# -- drawing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    run = small_run(tmp_path_factory.mktemp("run") / "small")
    made = Backbone.load(small_recipe().base)
    for role in ROLES:
        made.adapters.load(role, run.adapter(role))
        made.adapters.freeze(role)
    made.adapters.copy("reward", "second")
    with torch.no_grad():
        made.adapters.heads["second"].weight.mul_(-0.5)
    return made


@pytest.fixture(scope="module")
def prompts(backbone: Backbone) -> list:
    records = [Prompt(user(row["prompt"])) for row in tiny.prompts(5, 0, heldout=True)]
    return tokenise_prompts(records, backbone.format, 64)[0]


def open_session(backbone: Backbone, path):
    return session(small_recipe(), path, backbone)


BOTH = Plan({"sft": "sft", "policy": "policy"}, 3, 1.0, ("reward", "second"), "builtin:gold")


def test_answers_drawn_together_are_those_drawn_one_by_one(backbone, prompts, tmp_path) -> None:
    made = open_session(backbone, tmp_path)
    drawn = draw(made, "evaluate/draws.jsonl", BOTH, prompts, "evaluate")
    assert list(drawn) == ["sft", "policy"]
    differing = 0
    for name, found in drawn.items():
        assert found.scores.shape == (2, 5, 3)
        for p, (ids, prompt) in enumerate(prompts):
            for k in range(3):
                seed = row_seed(made.recipe.seed, best_of_n._SEED - k, p)
                with backbone.adapters.use(name):
                    (answer,) = generate(backbone, [ids], [seed], Sampling(12))
                    nats = nats_of(backbone, ids, answer.ids)
                assert found.texts[p][k] == backbone.format.decode(answer.ids)
                assert found.tokens[p, k] == len(answer.ids)
                assert found.ended[p, k] == answer.ended
                with backbone.adapters.use("sft"):
                    nats -= nats_of(backbone, ids, answer.ids)
                # fp32 sums of 12 log-probabilities, in other batches
                assert found.kl[p, k] == pytest.approx(nats, abs=1e-3)
                differing += abs(nats) > 0.01
                asked = prompt_text(prompt.messages)
                assert found.gold is not None
                assert found.gold[p, k] == tiny.gold(asked, found.texts[p][k])
    assert differing > 10
    assert (drawn["sft"].kl == 0).all()
    assert drawn["sft"].first(2).scores.shape == (2, 5, 2)


def nats_of(backbone, prompt: list[int], response: list[int]) -> float:
    """By the model's own logits."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logprobs = backbone.causal_lm(ids).logits[0].float().log_softmax(-1)
    at = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(float(logprobs[i, ids[0, i + 1]]) for i in at)


def test_members_score_each_by_their_own_head(backbone, prompts, tmp_path) -> None:
    found = draw(open_session(backbone, tmp_path), "d.jsonl", BOTH, prompts, "evaluate")["sft"]
    head = backbone.adapters.heads["reward"]
    assert head.bias.item() == 0.0
    # The second is the first with its weight times -0.5, and the same normalisation.
    raw, other = ((found.scores[m] - float(head.shift)) / float(head.gain) for m in (0, 1))
    assert other == pytest.approx(-0.5 * raw, abs=1e-4)
    assert raw.std() > 1e-3


def test_a_killed_drawing_goes_on_and_ends_the_same(
    backbone, prompts, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(best_of_n, "_ROWS", 6)  # a prompt a block
    whole = draw(open_session(backbone, tmp_path / "whole"), "d.jsonl", BOTH, prompts, "evaluate")
    made, block = open_session(backbone, tmp_path / "cut"), best_of_n._block
    starts: list[int] = []

    def killed(*given):
        starts.append(given[3])
        if given[3] == 3 and len(starts) < 5:
            raise KeyboardInterrupt
        return block(*given)

    monkeypatch.setattr(best_of_n, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(made, "d.jsonl", BOTH, prompts, "evaluate")
    file = made.run.path / "d.jsonl"
    with file.open("a") as half:
        half.write('{"step": 3, "policy": "sft", "te')  # what a crash leaves of a line
    again = draw(made, "d.jsonl", BOTH, prompts, "evaluate")
    assert starts == [0, 1, 2, 3, 3, 4]
    for name in whole:
        assert again[name].texts == whole[name].texts
        assert (again[name].scores == whole[name].scores).all()
    draw(made, "d.jsonl", BOTH, prompts, "evaluate")
    assert len(starts) == 6, "what is whole is not drawn again"


def test_another_plan_or_another_adapter_is_drawn_anew(backbone, prompts, tmp_path) -> None:
    made = open_session(backbone, tmp_path)
    one = Plan({"sft": "sft"}, 2, 1.0, ("reward",))
    first = draw(made, "d.jsonl", one, prompts, "evaluate")["sft"]
    assert first.gold is None
    cold = draw(made, "d.jsonl", Plan({"sft": "sft"}, 2, 0.1, ("reward",)), prompts, "evaluate")
    assert cold["sft"].texts != first.texts
    head = backbone.adapters.heads["reward"]
    with torch.no_grad():
        head.weight.mul_(2)
    try:
        other = draw(made, "d.jsonl", one, prompts, "evaluate")["sft"]
    finally:
        with torch.no_grad():
            head.weight.div_(2)
    assert other.texts == first.texts
    assert (other.scores != first.scores).all()


def test_without_a_reward_adapter_nothing_is_chosen(backbone, prompts, tmp_path) -> None:
    made = open_session(backbone, tmp_path)
    for members in (("nobody",), ("sft",), ("value",)):
        plan = Plan({"sft": "sft"}, 2, 1.0, members)
        with pytest.raises(CheckpointError, match=rf"{members[0]} is not one here\. There are: re"):
            draw(made, "d.jsonl", plan, prompts, "evaluate")
    assert not (tmp_path / "d.jsonl").exists()
