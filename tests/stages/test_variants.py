"""Every setting of PPO and of the adapters for a round or two on the embedded base."""

import json
import math

import pytest
import torch

from lora_rlhf.data.batches import make_sequences
from lora_rlhf.losses.ppo import AdaptiveKL
from lora_rlhf.model.backbone import Backbone
from lora_rlhf.stages import ppo, reward, sft
from lora_rlhf.stages.reward import score_groups
from lora_rlhf.training.checkpoint import role_state
from lora_rlhf.training.material import demonstrations
from lora_rlhf.training.ppo import PpoTrainer
from lora_rlhf.training.rollout import adapter_logprobs, score_answers
from tests.sessions import session, small_recipe, write_data

FIXED = (
    ["What does the brush look like?", "Tell me of a cup."],
    ["It is a small brush.", "The cup is blue and old."],
)


class Trained:
    """`sft` and `reward` on one backbone, and what they said of fixed texts then."""

    def __init__(self, directory, *overrides):
        self.directory = directory
        write_data(directory)
        recipe = small_recipe(directory, *overrides)
        self.backbone = Backbone.load(recipe.base)
        self.loaded = self.backbone.checksum()
        made = session(recipe, directory / "first", self.backbone)
        sft.run(made)
        reward.run(made)
        self.run = made.run
        self.session = made

    def ppo(self, path, *overrides):
        """A PPO run of two rounds in a run directory of its own."""
        made = session(small_recipe(self.directory, *overrides), path, self.backbone)
        ppo.run(made)
        return made.run

    def fixed(self):
        """Scores of the reward model and log-probs of sft on fixed texts."""
        form = self.backbone.format
        prompts = [form.prompt_ids(({"role": "user", "content": text},)) for text in FIXED[0]]
        responses = [form.response_ids(text) for text in FIXED[1]]
        sequences = make_sequences(prompts, responses, form.pad_id)
        return (
            score_answers(self.backbone, prompts, responses, 10_000),
            adapter_logprobs(self.backbone, "sft", sequences, 1.0, 10_000),
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def minibatches(monkeypatch):
    """Metrics of every optimizer step of PPO, in order."""
    seen, step = [], PpoTrainer._optimizer_step

    def spied(self, *args):
        seen.append(step(self, *args))
        return seen[-1]

    monkeypatch.setattr(PpoTrainer, "_optimizer_step", spied)
    return seen


def finite(run, stage="ppo"):
    lines = run.lines(f"{stage}/metrics.jsonl")
    assert lines
    for line in lines:
        assert all(math.isfinite(v) for v in line.values()), line
    return lines


def weights(trained, name):
    return torch.cat([v.flatten() for v in role_state(trained.backbone, name).values()])


# -- what must not change -----------------------------------------------------------------------


def test_sft_and_reward_leave_the_backbone_bit_for_bit(trained):
    assert trained.backbone.checksum() == trained.loaded


def test_sft_learned_something_and_keeps_its_best(trained):
    report, lines = trained.run.summary()["sft"], finite(trained.run, "sft")
    losses = [line["heldout/loss"] for line in lines if "heldout/loss" in line]
    assert report["heldout_loss"] == min(losses) < losses[0] == report["heldout_loss_of_base"]


def test_demonstrations_score_zero_and_answers_spread_by_one(trained):
    """The reward model is normalised on what it was held out from (1a.11, RM3)."""
    _, heldout = demonstrations(trained.session)
    scores = score_answers(trained.backbone, [p for p, _ in heldout], [r for _, r in heldout], 512)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    _, groups = reward.rankings(trained.session)
    answers = torch.cat(score_groups(trained.session, groups))
    assert float(answers.std()) == pytest.approx(1.0, abs=1e-5)


def test_ppo_changes_the_policy_and_nothing_else(trained, tmp_path):
    scores, logprobs = trained.fixed()
    kept = {name: weights(trained, name) for name in ("sft", "reward")}
    files = {f: f.read_bytes() for f in sorted(trained.run.path.rglob("*.safetensors"))}
    run = trained.ppo(tmp_path, "ppo.keep=last")
    finite(run)
    again = trained.fixed()
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], logprobs)
    for name, before in kept.items():
        assert torch.equal(weights(trained, name), before)
    assert trained.backbone.checksum() == trained.loaded
    assert len(files) >= 3
    assert all(f.read_bytes() == content for f, content in files.items())
    assert not torch.equal(weights(trained, "policy"), kept["sft"])
    assert not torch.equal(weights(trained, "value"), kept["reward"])


def test_the_first_round_starts_at_the_reference(trained, tmp_path, minibatches):
    """KL exactly 0; the sampler's log-probs are the training forward's; the first ratio is 1."""
    run = trained.ppo(tmp_path)
    first, second = finite(run)
    assert first["rollout/kl"] == 0.0
    assert second["rollout/kl"] != 0.0
    assert max(first["rollout/sampler_gap"], second["rollout/sampler_gap"]) < 1e-4
    assert len(minibatches) == 2 * 2 * 2  # rounds, inner epochs, minibatches
    for at in (0, 4):  # the first minibatch of each round
        assert minibatches[at]["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        assert minibatches[at]["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert minibatches[1]["ppo/approx_kl"] > 1e-9


def test_value_warm_up_leaves_the_policy_where_it_was(trained, tmp_path):
    first, second, third = finite(
        trained.ppo(tmp_path, "ppo.value_warmup_steps=2", "ppo.steps=3", "ppo.keep=last")
    )
    assert first["rollout/kl"] == second["rollout/kl"] == third["rollout/kl"] == 0.0
    assert first["train/grad_norm"] == 0.0 < third["train/grad_norm"]
    assert min(line["train/value_grad_norm"] for line in (first, second, third)) > 0
    assert not torch.equal(weights(trained, "policy"), weights(trained, "sft"))


def test_the_same_run_twice_is_the_same_bit_for_bit(trained, tmp_path):
    policies = []
    for part in ("a", "b"):
        run = trained.ppo(tmp_path / part, "ppo.steps=1", "ppo.keep=last")
        policies.append((run.adapter("policy") / "adapter_model.safetensors").read_bytes())
    assert policies[0] == policies[1]
    run = trained.ppo(tmp_path / "c", "seed=1", "ppo.steps=1", "ppo.keep=last")
    assert (run.adapter("policy") / "adapter_model.safetensors").read_bytes() != policies[0]


# -- settings -----------------------------------------------------------------------------------


def test_shared_trunk(trained, tmp_path):
    run = trained.ppo(
        tmp_path,
        "ppo={value: shared, steps: 2, batch_size: 8, minibatch_size: 4, learning_rate: 1.0e-3,"
        " value_warmup_steps: 1, sample_prompts: 2}",
    )
    lines = finite(run)
    assert lines[0]["rollout/kl"] == 0.0
    assert lines[0]["train/grad_norm"] == 0.0 < lines[0]["train/value_grad_norm"]
    assert not run.adapter("value").exists()
    # A fresh value head says 0, which explains nothing.
    assert lines[0]["ppo/explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_the_saved_policy_is_the_exponential_mean_of_the_rounds(trained, tmp_path, monkeypatch):
    """Closed form over the policies that each round ended with."""
    ends, update = [weights(trained, "sft")], PpoTrainer.update

    def spied(self, *args):
        metrics = update(self, *args)
        ends.append(weights(trained, "policy"))
        return metrics

    monkeypatch.setattr(PpoTrainer, "update", spied)
    finite(trained.ppo(tmp_path, "ppo.ema_decay=0.9", "ppo.keep=last", "ppo.steps=3"))
    decay, (start, *rounds) = 0.9, ends
    n = len(rounds)
    expected = decay**n * start
    for k, end in enumerate(rounds, 1):
        expected = expected + (1 - decay) * decay ** (n - k) * end
    found = weights(trained, "policy")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((rounds[-1] - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("text", [False, True])
def test_ptx_mixes_in_the_likelihood_of_demonstrations_or_text(trained, tmp_path, text):
    """The first ptx loss is sft's own mean negative log-likelihood of that batch, by HF's loss."""
    source = {"path": str(trained.directory / "text.jsonl")}
    extra = [f"data.text={json.dumps(source)}"] if text else []
    batches, ptx = [], ppo._ptx_batches

    def spied(made, settings):
        batch = ptx(made, settings)
        return lambda index: batches.append(batch(index)) or batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "_ptx_batches", spied)
        run = trained.ppo(
            tmp_path,
            "ppo.ptx_coef=0.7",
            "ppo.ptx_batch_size=4",
            "ppo.ppo_epochs=1",
            "ppo.minibatch_size=8",
            "ppo.target_kl=null",
            *extra,
        )
    lines = finite(run)
    labels = torch.where(batches[0].token_mask, batches[0].input_ids, -100)
    with torch.no_grad(), trained.backbone.adapters.use("sft"):
        expected = trained.backbone.causal_lm(batches[0].input_ids, labels=labels).loss
    assert lines[0]["loss/ptx"] == pytest.approx(float(expected), rel=1e-5)
    assert lines[0]["ppo/ptx_grad_ratio"] > 0
    assert len(batches) == 2
    assert batches[0].input_ids.tolist() != batches[1].input_ids.tolist()
    assert bool((batches[0].prompt_lengths == 1).all()) == text


def test_the_kl_coefficient_follows_its_target(trained, tmp_path):
    lines = finite(
        trained.ppo(
            tmp_path,
            "ppo.adaptive_kl_target=0.001",
            "ppo.adaptive_kl_horizon=40",
            "ppo.kl_coef=0.1",
            "ppo.steps=4",
        )
    )
    expected = 0.1
    for line in lines:
        assert line["ppo/kl_coef"] == pytest.approx(expected, rel=1e-6)
        error = min(max(line["rollout/kl"] / 0.001 - 1.0, -0.2), 0.2)
        expected *= 1.0 + error * 8 / 40
    assert lines[1]["ppo/kl_coef"] == pytest.approx(0.1 * 0.96, rel=1e-6)  # from KL 0
    assert AdaptiveKL(0.1, 0.001, 40).value == 0.1


def test_a_control_needs_no_reward_model(trained, tmp_path):
    recipe = small_recipe(trained.directory, "ppo.random_reward=true", "reward=null")
    backbone = Backbone.load(recipe.base)
    backbone.adapters.load("sft", trained.run.adapter("sft"))
    made = session(recipe, tmp_path, backbone)
    ppo.run(made)
    lines = finite(made.run)
    assert abs(lines[0]["rollout/score"]) < 1.5
    assert lines[0]["rollout/kl"] == 0.0


def test_a_judge_takes_the_place_of_the_reward_model_in_units_of_sft(trained, tmp_path):
    """Longer answers are better: the scores are lengths in words, shifted and scaled once."""
    recipe = small_recipe(
        trained.directory,
        "ppo.judge=tests.stages.test_variants:count_words",
        "ppo.sample_prompts=30",
        "reward=null",
    )
    backbone = Backbone.load(recipe.base)
    backbone.adapters.load("sft", trained.run.adapter("sft"))
    made = session(recipe, tmp_path, backbone)
    prompts = ppo.training_prompts(made)
    score = ppo._scorer(made, recipe.ppo, prompts)
    texts = ["one", "one two three", "one two three four five six seven"]
    form = backbone.format
    rows = make_sequences(
        [ids for ids, _ in prompts[:3]], [form.response_ids(t) for t in texts], form.pad_id
    )
    one, three, seven = score(rows).tolist()
    assert (seven - one) / (three - one) == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(ppo._scorer(made, recipe.ppo, prompts)(rows), score(rows))
    ppo.run(made)
    first = finite(made.run)[0]
    assert first["rollout/kl"] == 0.0
    # Eight answers of sft, whose scores have mean 0 and spread 1: 4 standard errors.
    assert abs(first["rollout/score"]) < 4 / math.sqrt(8)


def count_words(prompt, response):
    assert prompt
    return float(len(response.split()))


def test_policies_of_chosen_rounds_are_kept(trained, tmp_path):
    run = trained.ppo(tmp_path, "ppo.keep_policies_every=2", "ppo.steps=3", "ppo.keep=last")
    kept = run.kept_policies()
    assert list(kept) == [2, 3]
    second, third = ((path / "adapter_model.safetensors").read_bytes() for path in kept.values())
    assert second != third
    assert third == (run.adapter("policy") / "adapter_model.safetensors").read_bytes()
    assert trained.ppo(tmp_path / "none", "ppo.steps=1").kept_policies() == {}


def test_a2c_is_one_step_a_round_with_nothing_clipped(trained, tmp_path):
    run = trained.ppo(
        tmp_path,
        "ppo={preset: a2c, steps: 2, batch_size: 8, learning_rate: 1.0e-2,"
        " value_learning_rate: 1.0e-3, value_warmup_steps: 0, sample_prompts: 2}",
    )
    for line in finite(run):
        assert line["ppo/optimizer_steps"] == 1
        assert line["ppo/clip_fraction"] == line["ppo/value_clip_fraction"] == 0.0
        assert line["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        # With every ratio 1 and white advantages the surrogate is minus their mean, which is 0.
        assert line["loss/policy"] == pytest.approx(0.0, abs=1e-5)


def test_instructgpt_preset(trained, tmp_path):
    run = trained.ppo(
        tmp_path,
        "ppo={preset: instructgpt, steps: 2, batch_size: 8, minibatch_size: 2, keep: last,"
        " learning_rate: 1.0e-3, value_learning_rate: 1.0e-3, value_warmup_steps: 0,"
        " sample_prompts: 2}",
    )
    for line in finite(run):
        assert line["ppo/optimizer_steps"] == 4  # one inner epoch
        assert line["ppo/kl_coef"] == 0.02
    assert run.lines("ppo/metrics.jsonl")[0]["train/lr"] == pytest.approx(5e-4, rel=1e-6)  # warm-up


@pytest.mark.parametrize(
    "override",
    [
        "ppo.whiten_rewards=true",
        "ppo.temperature=0.7",
        "ppo.missing_eos=none ppo.clip_range=null ppo.value_clip_range=null",
        "ppo.missing_eos=penalty ppo.gamma=0.95 ppo.kl_coef=0 ppo.schedule=cosine",
    ],
)
def test_a_setting_runs_and_starts_at_the_reference(trained, tmp_path, override, minibatches):
    lines = finite(trained.ppo(tmp_path, *override.split(), "ppo.steps=1"))
    assert lines[0]["rollout/kl"] == 0.0
    assert lines[0]["rollout/sampler_gap"] < 1e-4
    assert minibatches[0]["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_the_target_kl_stops_the_inner_epochs(trained, tmp_path):
    lines = finite(
        trained.ppo(tmp_path, "ppo.target_kl=1e-12", "ppo.ppo_epochs=3", "ppo.learning_rate=1e-2")
    )
    # The first minibatch is still at the old policy; the second is beyond the target.
    assert [line["ppo/optimizer_steps"] for line in lines] == [2, 2]


def test_a_run_that_runs_away_says_so_and_keeps_its_best(trained, tmp_path):
    run = trained.ppo(tmp_path, "ppo.max_kl=1e-9", "ppo.steps=8")
    stopped = run.summary()["ppo"]["stopped"]
    assert "ppo.max_kl=1e-09" in stopped
    *before, last = [line["rollout/kl"] for line in run.lines("ppo/metrics.jsonl")]
    assert before[0] == 0.0
    assert max(before) <= 1e-9 < last
    assert stopped in (run.path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.use_rslora=true",),
        ("lora.use_dora=true",),
        ("base.quantization=none",),
        ("lora.target_modules=[q_proj, v_proj]", "lora.dropout=0.1"),
        ("base.gradient_checkpointing=true", "data.max_response_tokens=16"),
    ],
    ids=["rslora", "dora", "unquantised", "dropout", "checkpointing"],
)
def test_every_shape_of_adapter_goes_through_all_stages(tmp_path, overrides, minibatches):
    made = Trained(tmp_path, *overrides, "sft.epochs=0.5", "reward.epochs=0.5")
    made.backbone.gradient_checkpointing = "base.gradient_checkpointing=true" in overrides
    run = made.ppo(tmp_path / "ppo", *overrides, "ppo.steps=1")
    for stage in ("sft", "reward"):
        finite(made.run, stage)
    lines = finite(run)
    assert lines[0]["rollout/kl"] == 0.0
    assert lines[0]["rollout/sampler_gap"] < 1e-4
    assert minibatches[0]["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert made.backbone.checksum() == made.loaded
    again = Backbone.load(made.session.recipe.base)
    again.adapters.load("policy", run.adapter("policy"))
    for key, tensor in role_state(made.backbone, "policy").items():
        assert torch.equal(role_state(again, "policy")[key], tensor)


def test_a_look_whose_score_is_no_number_is_never_the_best(trained, tmp_path):
    """NaN compares as false with everything: written as `<=`, it would replace the best."""
    made = session(small_recipe(trained.directory), tmp_path, trained.backbone)
    prompts = ppo.training_prompts(made)
    trainer = ppo._make_trainer(made, made.recipe.ppo, prompts)
    first = ppo._look(made, trainer, prompts, 0, ppo.Best())
    assert first.step == 0
    trainer.score = lambda sequences: torch.full((len(sequences),), torch.nan)
    assert ppo._look(made, trainer, prompts, 1, first) is first
