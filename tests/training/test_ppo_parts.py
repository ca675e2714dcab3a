"""The parts of a PPO run, each against a hand-made case, a closed form or a simulation."""

import math
import random
from collections import Counter
from statistics import NormalDist

import pytest
import torch

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.errors import ConfigError
from lora_rlhf.preferences.judges import noise_for_agreement
from lora_rlhf.recipe import Ppo
from lora_rlhf.stages.ppo import runaway
from lora_rlhf.stages.rank import noisy_ranking
from lora_rlhf.training.experience import final_scores, random_scores, to_experience
from lora_rlhf.training.offline import epoch_order
from lora_rlhf.training.order import batch_of_prompts, take
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.reward_report import (
    accuracy_by_margin,
    calibration,
    cluster_interval,
    coin_warning,
    tells_answers_apart,
)
from lora_rlhf.training.rollout import (
    Rollout,
    map_rows,
    score_answers,
    score_forward,
    value_forward,
    with_known_end,
)
from tests.small import EOS, LORA, PAD, randomise, small_backbone


def rollout(scores, ended, live=((1, 1, 1), (1, 1, 0))):
    mask = torch.tensor(live).bool()
    zeros = torch.zeros(mask.shape)
    return Rollout(
        sequences=make_sequences([[1], [1]], [[5, 6, 7], [5, 6]], PAD),
        ended=torch.tensor(ended),
        response_mask=mask,
        logprobs=zeros,
        ref_logprobs=zeros,
        entropy=zeros,
        values=zeros,
        scores=torch.tensor(scores),
        sampler_gap=0.0,
    )


# -- missing end tokens -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "score", "expected"),
    [
        ("penalty", -1.0, [0.5, 1.0]),  # 2 - 1
        ("penalty", -0.25, [0.5, 1.75]),
        ("replace", -1.0, [0.5, -1.0]),
        ("replace", 0.0, [0.5, 0.0]),
        ("none", -1.0, [0.5, 2.0]),
    ],
)
def test_the_rule_for_a_missing_end_token(rule, score, expected):
    settings = Ppo(missing_eos=rule, missing_eos_score=score)
    found = final_scores(rollout([0.5, 2.0], [True, False]), settings)
    assert found.tolist() == expected


@pytest.mark.parametrize("rule", ["penalty", "replace", "none"])
def test_the_score_falls_on_the_last_live_token_alone(rule):
    """V = 0, gamma = 1, lambda = 1: every return of a row is the row's final score."""
    settings = Ppo(missing_eos=rule, missing_eos_score=-3.0, gae_lambda=1.0)
    found = to_experience(rollout([0.5, 2.0], [True, False]), settings, 0.1)
    second = {"penalty": -1.0, "replace": -3.0, "none": 2.0}[rule]
    assert found.returns.tolist() == [[0.5, 0.5, 0.5], [second, second, 0.0]]


def test_whitened_rewards_keep_their_mean_and_have_spread_one():
    """Rewards of live tokens 0 0 4, 0 -2: mean .4, variance 3.84, so 4 becomes .4 + 3.6/1.96."""
    settings = Ppo(missing_eos="none", whiten_rewards=True, gae_lambda=0.0)
    found = to_experience(rollout([4.0, -2.0], [True, True]), settings, 0.1)
    # lambda 0 and V 0: the return of a token is its own reward.
    expected = [0.4 + (r - 0.4) / math.sqrt(3.84) for r in (0, 0, 4, 0, -2)]
    live = found.returns[found.rollout.response_mask].tolist()
    assert live == pytest.approx(expected, abs=1e-5)


def test_advantages_are_white_over_live_tokens():
    found = to_experience(rollout([4.0, -2.0], [True, True]), Ppo(), 0.1)
    live = found.advantages[found.rollout.response_mask]
    assert float(live.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(live.var(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert float(found.advantages[1, 2]) == 0.0


# -- order of prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (5, 5), (3, 7)])
def test_prompts_are_drawn_without_replacement_within_each_pass(count, size):
    items = list(range(count))
    stream = [x for index in range(2 * count) for x in take(items, size, 3, index)]
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == items
    passes = {tuple(stream[s : s + count]) for s in range(0, 10 * count, count)}
    assert len(passes) > 1, "every pass has an order of its own"


def test_a_round_draws_its_prompts_as_a_function_of_the_step_alone():
    items = [([i], None) for i in range(20)]
    forward = [batch_of_prompts(items, 8, 5, step) for step in range(6)]
    backward = [batch_of_prompts(items, 8, 5, step) for step in reversed(range(6))]
    assert forward == backward[::-1]
    assert forward[0] != batch_of_prompts(items, 8, 6, 0)


@pytest.mark.parametrize(("count", "size"), [(12, 4), (50, 3), (17, 8)])
def test_an_epoch_of_an_offline_stage_holds_every_item_once(count, size):
    lengths = [(7 * i) % 13 for i in range(count)]
    batches = epoch_order(lengths, size, 0, 2)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert max(map(len, batches)) <= size
    assert len(batches) == math.ceil(count / size)
    assert batches == epoch_order(lengths, size, 0, 2)
    assert batches != epoch_order(lengths, size, 0, 3)
    assert batches != epoch_order(lengths, size, 1, 2)


def test_batches_are_of_like_length_and_not_in_order_of_length():
    lengths = [random.Random(i).randrange(100) for i in range(320)]
    batches = epoch_order(lengths, 8, 0, 0)
    spreads = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spreads) / len(spreads) < 15  # random batches of eight: about 78
    firsts = [lengths[b[0]] for b in batches]
    assert firsts != sorted(firsts)


def test_row_seeds_differ_by_row_step_and_seed():
    seeds = [row_seed(s, t, r) for s in range(3) for t in range(-2, 20) for r in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert row_seed(1, 2, 3) == row_seed(1, 2, 3)


# -- when a run stops itself --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "length", "said"),
    [
        (10.0, 40.0, ""),
        (10.1, 40.0, "ppo.max_kl=10.0"),
        (0.0, 59.9, ""),
        (0.0, 60.1, "40 to 60 tokens"),
        (0.0, 20.1, ""),
        (0.0, 19.9, "ppo.max_length_drift=0.5"),
    ],
)
def test_a_run_stops_when_kl_or_length_leaves_its_bounds(kl, length, said):
    settings = Ppo(max_kl=10.0, max_length_drift=0.5)
    found = runaway(settings, {"rollout/kl": kl, "rollout/response_length": length}, 40.0)
    assert said in found
    assert bool(found) == bool(said)


# -- the control --------------------------------------------------------------------------------


def many_rows(count, width=6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (count, width), generator=generator).tolist()
    return make_sequences([row[:2] for row in ids], [row[2:] for row in ids], PAD)


def test_a_random_score_is_a_function_of_the_text_and_the_seed():
    rows = many_rows(20)
    whole = random_scores(rows, 0)
    some = random_scores(rows.select([7, 3]), 0)
    assert some.tolist() == [whole[7].item(), whole[3].item()]
    assert not torch.isin(random_scores(rows, 1), whole).any()


def test_random_scores_do_not_see_padding():
    rows = make_sequences([[1], [1]], [[5], [5, 6, 7]], PAD)
    assert random_scores(rows, 0)[0] == random_scores(rows.select([0]), 0)[0]


def test_random_scores_are_standard_normal():
    """Kolmogorov-Smirnov distance of 2000 draws: below 1.36 / sqrt(n) at 5 %, fixed seed."""
    scores = sorted(random_scores(many_rows(2000), 0).tolist())
    normal, n = NormalDist(), len(scores)
    gap = max(abs(normal.cdf(s) - (i + 0.5) / n) for i, s in enumerate(scores))
    assert gap < 1.36 / math.sqrt(n)


# -- values that start as the reward model ------------------------------------------------------


def backbone_with_reward():
    backbone = small_backbone()
    backbone.adapters.add("sft", LORA)
    randomise(backbone, "sft", 1)
    backbone.adapters.copy("sft", "reward")
    randomise(backbone, "reward", 2)
    head = backbone.adapters.add_head("reward", seed=4)
    head.normalise(mean=0.3, spread=1.7)
    return backbone


PROMPTS, RESPONSES = [[1, 5, 9], [1, 80], [1]], [[33, 7, EOS], [4, 17, 60, 8, EOS], [EOS]]


def test_the_value_of_a_fresh_copy_at_the_end_token_is_the_reward_score_exactly():
    backbone = backbone_with_reward()
    backbone.adapters.copy("reward", "value")
    scores = score_answers(backbone, PROMPTS, RESPONSES, 10_000)
    sequences = make_sequences(PROMPTS, RESPONSES, PAD)
    head = backbone.adapters.heads["value"]
    with torch.no_grad(), backbone.adapters.use("value"):
        (at_end,) = map_rows(sequences, 10_000, lambda s: (score_forward(backbone, s, head),))
        before_end = value_forward(backbone, sequences, head)
    assert torch.equal(at_end, scores)
    # What PPO reads is the state before each token, so the end token's own state is not among it.
    last = before_end[torch.arange(3), sequences.response_mask.sum(-1) - 1]
    assert not torch.isclose(last, scores).any()


def test_the_copied_value_head_is_its_own():
    backbone = backbone_with_reward()
    before = score_answers(backbone, PROMPTS, RESPONSES, 10_000)
    backbone.adapters.copy("reward", "value")
    with torch.no_grad():
        backbone.adapters.heads["value"].weight.add_(1.0)
        for parameter in backbone.adapters.parameters("value").values():
            parameter.add_(1.0)
    assert torch.equal(score_answers(backbone, PROMPTS, RESPONSES, 10_000), before)


def test_a_score_does_not_depend_on_its_batch():
    backbone = backbone_with_reward()
    together = score_answers(backbone, PROMPTS, RESPONSES, 10_000)
    alone = score_answers(backbone, PROMPTS, RESPONSES, 1)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_normalised_scores_are_the_raw_ones_moved_and_scaled():
    backbone = backbone_with_reward()
    sequences = make_sequences(PROMPTS, RESPONSES, PAD)
    head = backbone.adapters.heads["reward"]
    with torch.no_grad(), backbone.adapters.use("reward"):
        raw = score_forward(backbone, sequences, head, raw=True)
        scores = score_forward(backbone, sequences, head)
    torch.testing.assert_close(scores, (raw - 0.3) / 1.7, rtol=1e-5, atol=1e-6)


# -- the simulated labeler ----------------------------------------------------------------------


def test_two_answers_one_apart_have_the_noise_of_the_logistic_law():
    """sigmoid(gap / s) = p, so s = gap / ln(p / (1 - p))."""
    for gap, share in ((1.0, 0.75), (3.0, 0.6), (0.2, 0.95)):
        expected = gap / math.log(share / (1 - share))
        found = noise_for_agreement([[0.0, gap], [5.0, 5.0 - gap], [2.0, 2.0]], share)
        assert found == pytest.approx(expected, rel=1e-5)


def test_full_agreement_has_no_noise_and_no_difference_is_refused():
    assert noise_for_agreement([[0.0, 1.0]], 1.0) == 0.0
    with pytest.raises(ConfigError, match="nothing to rank"):
        noise_for_agreement([[1.0, 1.0], [2.0]], 0.75)


def test_without_noise_the_ranking_is_the_judges():
    assert noisy_ranking([0.5, 3.0, -1.0, 2.0], 0.0, 9) == [1, 3, 0, 2]


@pytest.mark.parametrize("agreement", [0.6, 0.75, 0.9])
def test_noisy_rankings_agree_with_the_judge_as_often_as_asked(agreement):
    generator = random.Random(0)
    utilities = [[generator.gauss(0, 1) for _ in range(4)] for _ in range(2000)]
    noise = noise_for_agreement(utilities, agreement)
    right = total = 0
    for seed, own in enumerate(utilities):
        ranking = noisy_ranking(own, noise, seed)
        for place, winner in enumerate(ranking):
            for loser in ranking[place + 1 :]:
                right += own[winner] > own[loser]
                total += 1
    # 12000 pairs, six a prompt: three standard errors of independent pairs, doubled.
    margin = 6 * math.sqrt(agreement * (1 - agreement) / total)
    assert abs(right / total - agreement) < margin < 0.03


def test_noisy_rankings_are_plackett_luce():
    """P(i first) = exp(u_i / s) / sum, by 20000 draws to 4 standard errors."""
    utilities, noise, draws = [0.0, 1.0, 2.0], 1.5, 20_000
    firsts = Counter(noisy_ranking(utilities, noise, row_seed(0, 0, i))[0] for i in range(draws))
    weights = [math.exp(u / noise) for u in utilities]
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        error = 4 * math.sqrt(share * (1 - share) / draws)
        assert abs(firsts[i] / draws - share) < error
    assert noisy_ranking(utilities, noise, 5) == noisy_ranking(utilities, noise, 5)


# -- numbers of the report ----------------------------------------------------------------------


def test_the_interval_of_an_accuracy_covers_the_truth():
    """120 data sets of 150 prompts x 6 pairs that share a prompt's luck: 95 % +- 6 are covered."""
    generator, covered, naive = random.Random(3), 0, 0
    for _ in range(120):
        data = []
        for _ in range(150):
            luck = generator.choice((0.4, 0.9))  # of this prompt's pairs; mean .65
            data.append((sum(generator.random() < luck for _ in range(6)), 6))
        low, high = cluster_interval(data)
        covered += low <= 0.65 <= high
        mean = sum(r for r, _ in data) / 900
        naive += abs(mean - 0.65) <= 1.96 * math.sqrt(mean * (1 - mean) / 900)
    assert covered >= 0.89 * 120
    assert naive < covered, "pairs taken as independent give too narrow an interval"


def test_the_interval_of_many_sure_things_is_a_point():
    assert cluster_interval([(3, 3)] * 40) == (1.0, 1.0)


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_few_lucky_prompts_do_not_exclude_a_coin(prompts):
    """Wilson for n of n: the lower end is n / (n + 1.96^2), .21 for one and .44 for three."""
    low, high = cluster_interval([(1, 1)] * prompts)
    assert low == pytest.approx(prompts / (prompts + 1.959964**2), abs=1e-6)
    assert high == 1.0
    assert not tells_answers_apart({"accuracy_ci": [low, high]})


def test_a_reward_model_counts_when_its_whole_interval_is_above_a_half():
    assert tells_answers_apart({"accuracy_ci": [0.501, 0.7]})
    assert not tells_answers_apart({"accuracy_ci": [0.5, 0.7]})
    said = coin_warning({"accuracy": 0.53, "accuracy_ci": [0.48, 0.58]})
    assert "0.530" in said
    assert "--force" in said


@pytest.mark.parametrize("count", [1, 3, 4, 7, 100])
def test_accuracy_by_margin_holds_every_pair_once(count):
    margins = [(-1) ** i * (i + 1) for i in range(count)]
    parts = accuracy_by_margin([float(m) for m in margins])
    assert len(parts) == min(count, 4)
    assert parts[-1]["margin"] > 0.8 * count, "the surest pairs are not left out"
    assert [p["margin"] for p in parts] == sorted(p["margin"] for p in parts)
    if count == 4:
        assert [p["accuracy"] for p in parts] == [1.0, 0.0, 1.0, 0.0]
        assert [p["margin"] for p in parts] == [1.0, 2.0, 3.0, 4.0]


def test_calibration_compares_the_models_own_chance_with_what_happened():
    """Margins ln 3 and -ln 3: the model says .75 twice, and was right once."""
    found = calibration([math.log(3), -math.log(3)])
    assert found == pytest.approx({"predicted": 0.75, "observed": 0.5}, abs=1e-12)


def test_scores_are_read_at_the_one_end_token_of_the_training_data():
    """Whatever stop token ended an answer; an answer that did not end stays as it is."""
    backbone = small_backbone()
    backbone.format.stop_ids = (EOS, 50)
    rows = make_sequences([[1, 5]] * 3, [[7, 50], [7, EOS], [7, 9]], PAD)
    known = with_known_end(backbone, rows)
    assert known.input_ids.tolist() == [[1, 5, 7, EOS], [1, 5, 7, EOS], [1, 5, 7, 9]]
    assert rows.input_ids[0, -1] == 50, "log-probs must keep the token that was drawn"
