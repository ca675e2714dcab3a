"""Killed, interrupted or out of disk: a run goes on and ends bit for bit where it would have."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lora_rlhf.errors import CheckpointError, TrainingError
from lora_rlhf.pipeline import run_pipeline
from lora_rlhf.recipe import STAGES
from lora_rlhf.runs import Run
from lora_rlhf.stages import ppo, sft
from lora_rlhf.training.checkpoint import load_checkpoint, save_checkpoint
from lora_rlhf.training.ppo import PpoTrainer
from tests.sessions import small_recipe, write_data
from tests.stages.processes import Cli

WHOLE = """
name: small
base: {model: builtin:tiny, device: cpu}
lora: {rank: 4, alpha: 8, dropout: 0.1}
data:
  demonstrations: {path: DIR/demonstrations.jsonl}
  prompts: {path: DIR/prompts.jsonl}
  max_prompt_tokens: 32
  max_response_tokens: 20
  heldout_fraction: 0.2
sft:
  {learning_rate: 5.0e-3, batch_size: 8, epochs: 3, evaluate_every: 5, checkpoint_every: 3}
rank: {judge: builtin:gold, prompts: 32, answers: 4}
reward: {learning_rate: 1.0e-3, batch_size: 4, epochs: 3, evaluate_every: 4, checkpoint_every: 3}
ppo:
  learning_rate: 1.0e-3
  value_learning_rate: 1.0e-3
  steps: 8
  batch_size: 8
  minibatch_size: 4
  value_warmup_steps: 1
  adaptive_kl_target: 0.02
  adaptive_kl_horizon: 80
  ema_decay: 0.8
  ptx_coef: 0.5
  ptx_batch_size: 4
  max_length_drift: 10
  sample_every: 3
  sample_prompts: 4
  checkpoint_every: 2
  keep: last
evaluate: {judge: builtin:gold, prompts: 8, best_of: 2}
"""
# Where each kill falls: stage, and lines its file has (evaluate: arms done) when it is due.
FILE = {"rank": "rank/answers.jsonl"}
MOMENTS = [
    *(("sft", n) for n in (2, 7, 12)),
    *(("rank", n) for n in (8, 24)),
    *(("reward", n) for n in (2, 8, 16)),
    *(("ppo", n) for n in (1, 2, 5, 7)),
    ("evaluate", 0),
]
NOT_REPEATABLE = ("time", "train/tokens_per_second")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_data(directory, 80)
    path = directory / "small.yaml"
    path.write_text(WHOLE.replace("DIR", str(directory)), encoding="utf-8")
    return path


# -- kill -9 ------------------------------------------------------------------------------------


def uninterrupted(recipe_file, directory):
    cli = Cli(arguments_of(recipe_file, directory), directory / "small", directory / "log")
    assert cli.end() == 0, (directory / "log").read_text(encoding="utf-8")
    return Run(directory / "small")


def arguments_of(recipe_file, directory, *more):
    return ["run", str(recipe_file), "--runs-dir", str(directory), "--force", *more]


def killed_at(recipe_file, directory, moments):
    """Start, kill, resume, kill ... and at last let it end; how many kills landed."""
    chance, landed, more = random.Random(0), [], []
    directory.mkdir()
    for stage, lines in moments:
        cli = Cli(
            arguments_of(recipe_file, directory, *more), directory / "small", directory / "log"
        )
        file = directory / "small" / FILE.get(stage, f"{stage}/metrics.jsonl")
        if cli.wait_until(lambda c=cli, f=file, s=stage, n=lines: is_at(c, f, s, n)):
            time.sleep(chance.uniform(0.0, 0.25))
            if cli.process.is_alive():
                landed.append((cli.status().get("stage"), lines))
                cli.kill()
        cli.end()
        more = ["--resume"]
    cli = Cli(arguments_of(recipe_file, directory, *more), directory / "small", directory / "log")
    assert cli.end() == 0, (directory / "log").read_text(encoding="utf-8")
    return Run(directory / "small"), landed


def is_at(cli, file, stage, lines):
    at = cli.status().get("stage")
    if at not in STAGES or STAGES.index(at) < STAGES.index(stage):
        return False
    if at != stage or stage == "evaluate":
        return True
    return file.exists() and file.read_bytes().count(b"\n") >= lines


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_that_was_not(recipe_file, tmp_path):
    expected = uninterrupted(recipe_file, tmp_path)
    found, landed = killed_at(recipe_file, tmp_path / "killed", MOMENTS)
    assert len(landed) >= 10
    assert {stage for stage, _ in landed} == set(STAGES)
    same_run(found, expected)


def same_run(found, expected):
    for role in ("sft", "reward", "policy", "value"):
        for file in sorted(expected.adapter(role).glob("*.safetensors")):
            twin = found.adapter(role) / file.name
            assert twin.read_bytes() == file.read_bytes(), f"{role}: {file.name}"
    for stage in ("sft", "reward", "ppo"):
        lines, reference = (numbers(r, stage) for r in (found, expected))
        assert lines == reference
        steps = [line["step"] for line in lines if "train/lr" in line]
        assert steps == list(range(1, len(steps) + 1))
    for file in ("ppo/samples.jsonl", "evaluate/samples.jsonl", "rank/rankings.jsonl"):
        assert (found.path / file).read_bytes() == (expected.path / file).read_bytes()
    for summary in (mine := found.summary()), (theirs := expected.summary()):
        assert summary.pop("seconds").keys() == set(STAGES)
        summary.pop("memory")
    assert mine == theirs


def numbers(run, stage):
    lines = run.lines(f"{stage}/metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in NOT_REPEATABLE} for line in lines]


# -- Ctrl-C -------------------------------------------------------------------------------------


def test_ctrl_c_saves_at_the_border_of_a_step_and_exits_with_130(recipe_file, tmp_path):
    """A process of its own, as the shell starts it."""
    only_sft = ["rank=null", "reward=null", "ppo=null", "evaluate=null", "sft.epochs=40"]
    command = [sys.executable, "-m", "lora_rlhf", *arguments_of(recipe_file, tmp_path, *only_sft)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    run = tmp_path / "small"
    metrics = run / "sft/metrics.jsonl"
    end = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "--resume" in output
    opened = Run(run)
    assert opened.status()["state"] == "stopped"
    steps = [line["step"] for line in opened.lines("sft/metrics.jsonl") if "train/lr" in line]
    state = load_checkpoint(opened, "sft")
    assert state is not None
    assert state["step"] == steps[-1], "not a step is lost"
    assert not opened.is_complete("sft")


# -- the same in one process --------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    write_data(directory)
    return directory


FIELDS = (
    "base.quantization=none",
    "sft.checkpoint_every=2",
    "reward.epochs=0.5",
    "ppo.steps=4",
    "ppo.checkpoint_every=2",
    "ppo.ema_decay=0.5",
    "ppo.ptx_coef=0.5",
    "ppo.ptx_batch_size=4",
    "ppo.adaptive_kl_target=0.001",
    "ppo.adaptive_kl_horizon=40",
    "ppo.max_length_drift=10",
    "lora.dropout=0.2",
)


def pipeline(data, path, *overrides, resume=False):
    run = Run(path)
    recipe = small_recipe(data, *FIELDS, *overrides)
    with Path(os.devnull).open("w") as nowhere:
        run_pipeline(recipe, run, resume=resume, force=True, console=Console(file=nowhere))
    return run


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A run that nothing disturbs."""
    return pipeline(data, tmp_path_factory.mktemp("reference"))


class Cut(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def cut_in_ppo(data, tmp_path_factory):
    """A run that ends in round 3 of PPO, its checkpoint at round 2."""
    collect, rounds = PpoTrainer.collect, []

    def collect_twice(self, *args):
        if len(rounds) == 2:
            raise Cut
        rounds.append(1)
        return collect(self, *args)

    path = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PpoTrainer, "collect", collect_twice)
        with pytest.raises(Cut):
            pipeline(data, path)
    return path


def weights_of(run):
    return [
        (run.adapter(role) / "adapter_model.safetensors").read_bytes()
        for role in ("sft", "reward", "policy", "value")
    ]


def test_a_ppo_run_goes_on_from_its_checkpoint_bit_for_bit(data, reference, cut_in_ppo, tmp_path):
    shutil.copytree(cut_in_ppo, tmp_path / "again")
    run = pipeline(data, tmp_path / "again", resume=True)
    assert weights_of(run) == weights_of(reference)
    assert numbers(run, "ppo") == numbers(reference, "ppo")
    assert run.summary()["ppo"] == reference.summary()["ppo"]


@pytest.mark.parametrize("forgotten", ["ema", "kl", "ptx_batches", "optimizer", "value", "head"])
def test_a_checkpoint_that_forgets_a_part_is_seen(
    data, reference, cut_in_ppo, tmp_path, monkeypatch, forgotten
):
    """The mutants: without any one part the resumed run ends elsewhere."""
    load = PpoTrainer.load_state

    def forgetful(self, state):
        fresh = self.state()
        load(self, state | {forgotten: fresh[forgotten]})

    monkeypatch.setattr(PpoTrainer, "load_state", forgetful)
    shutil.copytree(cut_in_ppo, tmp_path / "again")
    run = pipeline(data, tmp_path / "again", resume=True)
    other = weights_of(run) != weights_of(reference)
    assert other or numbers(run, "ppo") != numbers(reference, "ppo")


def test_a_run_that_stopped_itself_stays_stopped_when_resumed(data, cut_in_ppo, tmp_path):
    """Killed between its last checkpoint and its end, it must not take another round."""
    shutil.copytree(cut_in_ppo, tmp_path / "again")
    run = Run(tmp_path / "again")
    state = load_checkpoint(run, "ppo")
    save_checkpoint(run, "ppo", 2, state | {"stopped": "KL ran away"})
    pipeline(data, run.path, resume=True)
    assert run.summary()["ppo"]["stopped"] == "KL ran away"
    assert [line["step"] for line in run.lines("ppo/metrics.jsonl")] == [1, 2]


# -- a full disk, numbers that are none, damaged files ------------------------------------------


def full_disk_after(monkeypatch, name, calls):
    """The function `name` of torch or os raises ENOSPC from its call number `calls` + 1 on."""
    module = {"save": torch, "fsync": os}[name]
    real, seen = getattr(module, name), []

    def full(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, full)


SFT_ALONE = ("reward=null", "data.rankings=null", "ppo=null", "data.prompts=null")


def small_sft(data, path, resume=False):
    recipe = small_recipe(data, "sft.checkpoint_every=1", "base.quantization=none")
    recipe = recipe.model_copy(update={"reward": None, "ppo": None})
    run = Run(path)
    with Path(os.devnull).open("w") as nowhere:
        run_pipeline(recipe, run, resume=resume, console=Console(file=nowhere))
    return run


@pytest.mark.parametrize("name", ["save", "fsync"])
def test_a_full_disk_leaves_the_checkpoint_before_it(data, tmp_path, monkeypatch, name):
    undisturbed = small_sft(data, tmp_path / "whole").adapter("sft") / "adapter_model.safetensors"
    with monkeypatch.context() as patch:
        # fsync also serves recipe, environment, status: the seventh is within a checkpoint or after
        full_disk_after(patch, name, 2 if name == "save" else 7)
        with pytest.raises(OSError, match="No space left"):
            small_sft(data, tmp_path / "full")
    run = Run(tmp_path / "full")
    state = load_checkpoint(run, "sft")
    assert state is not None
    assert state["step"] >= 1
    again = small_sft(data, run.path, resume=True).adapter("sft") / "adapter_model.safetensors"
    assert again.read_bytes() == undisturbed.read_bytes()
    assert not list((run.path / "sft").glob("checkpoints"))


def test_a_loss_that_is_no_number_names_stage_and_step_and_keeps_the_checkpoint(
    data, tmp_path, monkeypatch
):
    loss, calls = sft.demonstration_loss, []

    def broken(backbone, tokens):
        output = loss(backbone, tokens)
        calls.append(output.total.requires_grad)
        return output._replace(total=output.total * torch.nan) if sum(calls) == 3 else output

    monkeypatch.setattr(sft, "demonstration_loss", broken)
    with pytest.raises(TrainingError, match=r"^sft step 3: loss is nan.*--resume"):
        small_sft(data, tmp_path)
    run = Run(tmp_path)
    state = load_checkpoint(run, "sft")
    assert state is not None
    assert state["step"] == 2
    assert all(torch.isfinite(t).all() for t in state["role"].values())
    assert run.status()["state"] == "failed"
    assert "sft step 3" in run.status()["error"]


def test_a_score_that_is_no_number_stops_ppo_before_it_moves(
    data, cut_in_ppo, tmp_path, monkeypatch
):
    scorer = ppo._scorer

    def broken(*given):
        score = scorer(*given)
        return lambda sequences: score(sequences) * torch.nan

    monkeypatch.setattr(ppo, "_scorer", broken)
    shutil.copytree(cut_in_ppo, tmp_path / "again")
    with pytest.raises(TrainingError, match=r"^ppo step 3: mean score is nan"):
        pipeline(data, tmp_path / "again", resume=True)
    state = load_checkpoint(Run(tmp_path / "again"), "ppo")
    assert state is not None
    assert state["step"] == 2
    assert json.loads((tmp_path / "again/status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("damage", ["cut", "empty", "words", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, damage):
    run = Run(tmp_path)
    for step in (1, 2, 3):
        save_checkpoint(run, "sft", step, {"role": {"a": torch.full((50,), float(step))}})
    folder = tmp_path / "sft/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000003"]
    file = folder / "step-000003/state.pt"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "words": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=r"step-000003/state\.pt cannot be read.*Delete"):
        load_checkpoint(run, "sft")
    shutil.rmtree(folder / "step-000003")
    state = load_checkpoint(run, "sft")
    assert state is not None
    assert state["step"] == 2
    assert float(state["role"]["a"][0]) == 2.0
