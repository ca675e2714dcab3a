"""The quickstart recipe, made very small, through the command line."""

import hashlib
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_rlhf.cli import app
from lora_rlhf.recipe import STAGES
from lora_rlhf.runs import Run

SMALL = (
    "data.demonstrations.limit=96",
    "data.prompts.limit=96",
    "data.heldout_prompts.limit=16",
    "sft.epochs=0.4",
    "sft.batch_size=8",
    "rank.prompts=24",
    "rank.answers=3",
    "reward.epochs=1",
    "ppo.steps=3",
    "ppo.batch_size=8",
    "ppo.minibatch_size=4",
    "ppo.value_warmup_steps=1",
    "ppo.sample_prompts=4",
    "evaluate.prompts=16",
    "evaluate.best_of=2",
    "evaluate.expect_win_rate=null",
)


def command(directory: Path, *arguments: str):
    """`lora-rlhf run quickstart ...` in this process."""
    call = ["run", "quickstart", "--runs-dir", str(directory), "--force", *arguments]
    return CliRunner().invoke(app, call, catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    result = command(directory, *SMALL)
    assert result.exit_code == 0, result.output
    return directory, result.output


@pytest.fixture
def run(finished):
    return Run(finished[0] / "quickstart")


def adapter_files(run):
    return {
        str(f.relative_to(run.path)): f.read_bytes()
        for f in sorted(run.path.rglob("*.safetensors"))
    }


def test_ppo_says_first_what_is_known_of_its_reward_model(finished, run):
    health = run.summary()["health"]
    output = finished[1]
    words = " ".join(output.split())
    assert health["verdict"]["sentence"] in words
    assert words.index(health["verdict"]["sentence"]) < words.index("ppo 1/3")
    assert health["accuracy"]["value"] == run.summary()["reward"]["accuracy"]
    assert {d["name"] for d in health["degenerate"]} == {
        "nothing",
        "three words repeated",
        "many answers in one",
        "prompt copied back",
    }
    scores = health["scores"]
    assert sum(scores["sft"]) == sum(scores["policy"]) == 16
    assert sum(scores["demonstrations"]) > 0


def test_every_stage_finishes_and_the_status_says_so(run):
    assert run.status()["state"] == "finished"
    assert run.status()["error"] == ""
    assert list(run.summary()["seconds"]) == list(STAGES)
    assert run.adapters() == ["sft", "reward", "policy", "value"]
    assert not list(run.path.rglob("checkpoints"))
    assert not [p for p in run.path.rglob(".*") if p.is_file()], "no half-written file is left"


def test_the_run_directory_is_laid_out_as_promised(run):
    expected = """recipe.yaml status.json summary.json environment.json train.log report.html
        sft/metrics.jsonl sft/adapter/adapter_model.safetensors sft/adapter/adapter_config.json
        sft/adapter/lora_rlhf.json rank/rankings.jsonl reward/metrics.jsonl
        reward/adapter/adapter_model.safetensors ppo/metrics.jsonl ppo/samples.jsonl
        ppo/adapter/adapter_model.safetensors ppo/value/adapter_model.safetensors
        evaluate/samples.jsonl"""
    missing = [name for name in expected.split() if not (run.path / name).is_file()]
    assert not missing
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    assert {"versions", "device", "commit", "seed"} <= set(environment)


def test_the_summary_has_the_names_that_other_tools_read(run):
    summary = run.summary()
    assert "heldout_loss" in summary["sft"]
    assert {"accuracy", "accuracy_ci", "longer_baseline", "bayes_accuracy"} <= set(
        summary["reward"]
    )
    assert {"kl", "eos_rate", "mean_length", "score"} <= set(summary["ppo"])
    for found in summary["win_rates"]:
        assert {"a", "b", "judge", "win_rate", "ci", "prompts"} <= set(found)
        assert found["b"] == "sft"
        assert found["prompts"] == 16
        low, high = found["ci"]
        assert 0 <= low <= found["win_rate"] <= high <= 1
    assert [w["a"] for w in summary["win_rates"]] == ["base", "best_of_2", "policy"]
    for phase in ("load", "rollout", "score", "train"):
        assert set(summary["memory"][phase]) == {"predicted_gib", "measured_gib"}


def test_every_number_of_every_stage_is_finite_and_every_step_is_there(run):
    steps = {}
    for stage in ("sft", "reward", "ppo"):
        lines = run.lines(f"{stage}/metrics.jsonl")
        assert all(math.isfinite(v) for line in lines for v in line.values())
        steps[stage] = [line["step"] for line in lines if "train/lr" in line]
        assert steps[stage] == list(range(1, len(steps[stage]) + 1))
    assert len(steps["sft"]) >= 4
    assert len(steps["ppo"]) == 3
    promised = """rollout/score rollout/kl rollout/objective rollout/entropy rollout/eos_rate
        rollout/response_length rollout/sampler_gap ppo/approx_kl ppo/clip_fraction ppo/ratio_mean
        ppo/ratio_max ppo/explained_variance ppo/kl_coef loss/policy loss/value train/lr
        train/grad_norm train/value_grad_norm train/tokens_per_second"""
    assert set(promised.split()) <= set(run.lines("ppo/metrics.jsonl")[0])


def test_ppo_starts_at_the_reference_and_samples_what_it_scores(run):
    first = run.lines("ppo/metrics.jsonl")[0]
    assert first["rollout/kl"] == 0.0
    assert first["rollout/sampler_gap"] < 1e-4
    samples = run.lines("ppo/samples.jsonl")
    assert {s["step"] for s in samples} == {0, 3}
    assert all({"prompt", "response", "score", "kl"} <= set(s) for s in samples)
    assert all(s["kl"] == 0.0 for s in samples if s["step"] == 0)


def test_the_adapters_name_their_role_parent_and_backbone(run):
    parents = {"sft": None, "reward": "sft", "policy": "sft", "value": "reward"}
    prints = set()
    for role, parent in parents.items():
        facts = json.loads((run.adapter(role) / "lora_rlhf.json").read_text(encoding="utf-8"))
        assert (facts["role"], facts["parent"]) == (role, parent)
        assert ("score" in facts) == (role in ("reward", "value"))
        prints.add(json.dumps(facts["fingerprint"], sort_keys=True))
    assert len(prints) == 1
    assert "builtin:tiny" in prints.pop()


def test_what_was_trained_on_rankings_says_which_by_their_hash(run):
    rankings = (run.path / "rank" / "rankings.jsonl").read_bytes()
    for role in ("reward", "policy", "value"):
        data = json.loads((run.adapter(role) / "lora_rlhf.json").read_text())["data"]
        assert data["rankings_sha256"] == hashlib.sha256(rankings).hexdigest()
        assert data["train"] + data["heldout"] == len(rankings.splitlines())
    assert "data" not in json.loads((run.adapter("sft") / "lora_rlhf.json").read_text())


def test_the_end_says_what_came_out_and_what_to_type_next(finished, run):
    output = finished[1].replace("\n", "")
    assert "SFT" in output
    for line in (f"lora-rlhf chat {run.path}", "--adapter policy"):
        assert line.replace(" ", "") in output.replace(" ", "")
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().startswith("<!")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert str(run.path) in output or run.path.name in output


def test_resume_of_a_finished_run_trains_nothing(finished, run):
    before, summary = adapter_files(run), run.summary()
    result = command(finished[0], "--resume")
    assert result.exit_code == 0, result.output
    assert adapter_files(run) == before
    assert run.summary()["seconds"] == summary["seconds"]
    assert run.status()["state"] == "finished"


def test_only_runs_that_stage_alone_again(finished, run):
    before, summary = adapter_files(run), run.summary()
    result = command(finished[0], "--only", "evaluate", "evaluate.best_of=0", "evaluate.prompts=8")
    assert result.exit_code == 0, result.output
    assert adapter_files(run) == before
    again = run.summary()
    assert [w["a"] for w in again["win_rates"]] == ["base", "policy"]
    assert set(again["arms"]) == {"base", "sft", "policy"}, "nothing of the former arms is left"
    assert {w["prompts"] for w in again["win_rates"]} == {8}
    for stage in ("sft", "rank", "reward"):
        assert again[stage] == summary[stage]
    assert set(again["seconds"]) == set(STAGES)


def test_from_runs_that_stage_and_all_later_ones_again(finished, run):
    """And PPO leaves the files of sft and reward bit for bit as they were."""
    before = adapter_files(run)
    result = command(finished[0], "--from", "ppo", "ppo.steps=2", "ppo.kl_coef=0.2")
    assert result.exit_code == 0, result.output
    after = adapter_files(run)
    changed = {name for name in before if after[name] != before[name]}
    assert after.keys() == before.keys()
    assert changed
    assert all(name.startswith("ppo/") for name in changed)
    lines = run.lines("ppo/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert {line["ppo/kl_coef"] for line in lines} == {0.2}
    assert run.is_complete("evaluate")
    assert "kl_coef: 0.2" in (run.path / "recipe.yaml").read_text(encoding="utf-8")


def test_what_is_done_cannot_be_changed_afterwards(finished):
    result = command(finished[0], "--from", "ppo", "sft.epochs=3")
    assert result.exit_code == 2
    assert "comes too late" in result.output.replace("\n", " ")


def test_a_weak_reward_model_stops_ppo_unless_forced(finished, run):
    """Its interval is put across 0.5 by hand; without --force PPO is refused."""
    summary = run.summary()
    summary["reward"] |= {"accuracy": 0.5, "accuracy_ci": [0.4, 0.6]}
    run.write_json("summary.json", summary)
    call = ["run", "quickstart", "--runs-dir", str(finished[0]), "--only", "ppo"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 2
    assert "does not exclude a coin" in result.output.replace("\n", " ")
    assert run.status()["state"] == "failed"
    assert command(finished[0], "--only", "ppo", "ppo.steps=2").exit_code == 0
