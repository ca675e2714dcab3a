"""A run directory as a finished pipeline leaves it, without running one."""

import math
import random
from pathlib import Path

from lora_rlhf.runs import Run

NASTY = "<script>alert(1)</script> & <b>bold</b>"


def finished_run(path: Path, steps: int = 60) -> Run:
    """All stages, metrics of every kind, samples with markup in them, results that PPO won."""
    run = Run(path)
    noise = random.Random(0)
    for stage, write in (("sft", _sft), ("reward", _reward), ("ppo", _ppo)):
        for step in range(1, steps + 1):
            metrics = {"step": step, "time": 1e9 + step, "train/lr": 1e-3}
            metrics |= {"train/grad_norm": noise.uniform(0.5, 1.0)} | write(step, noise)
            run.append(f"{stage}/metrics.jsonl", metrics)
            if stage != "ppo" and step % 10 == 0:
                held = {"heldout/loss": 0.6, "heldout/accuracy": 0.7, "step": step, "time": 0.0}
                run.append(f"{stage}/metrics.jsonl", held)
    _samples(run)
    _results(run)
    return run


def _sft(step: int, noise: random.Random) -> dict[str, float]:
    return {"loss/sft": 1.0 + math.exp(-step / 20) + noise.gauss(0, 0.05)}


def _reward(step: int, noise: random.Random) -> dict[str, float]:
    return {"loss/reward": 0.6 + noise.gauss(0, 0.02), "train/accuracy": 0.7}


def _ppo(step: int, noise: random.Random) -> dict[str, float]:
    return {
        "rollout/score": step / 60,
        "rollout/kl": step / 15,
        "rollout/objective": step / 90,
        "rollout/response_length": 40 + noise.gauss(0, 1),
        "rollout/entropy": 1.4 - step / 200,
        "rollout/eos_rate": 0.98,
        "ppo/explained_variance": 0.6,
        "ppo/clip_fraction": 0.08,
        "ppo/approx_kl": 0.004,
        "train/value_grad_norm": noise.uniform(1, 2),
        "loss/policy": 0.0,
        "loss/value": 0.2,
        "ppo/kl_coef": 0.05,
        "train/tokens_per_second": 900.0,
    }


def _samples(run: Run) -> None:
    for step in (0, 30, 60):
        record = {"step": step, "prompt": "Tell of the fox.", "score": step / 60, "kl": 0.0}
        run.append("ppo/samples.jsonl", record | {"response": f"look {step} {NASTY}"})
    for arm, score in (("base", -1.0), ("sft", 0.0), ("policy", 1.25)):
        record = {"step": 0, "arm": arm, "prompt": f"Tell of [the] owl {NASTY}", "score": score}
        run.append(
            "evaluate/samples.jsonl", record | {"response": f"{arm} says [red]hoo[/red] {NASTY}"}
        )


def _results(run: Run) -> None:
    parts = {"topic": 0.5, "kindness": 0.4}
    arms = {
        "base": {"utility": 0.2, "eos_rate": 0.3, "mean_length": 80.0, "distinct_2": 0.99},
        "sft": {"utility": 1.0, "eos_rate": 0.98, "mean_length": 42.0, "distinct_2": 0.93},
        "policy": {"utility": 1.5, "eos_rate": 0.99, "mean_length": 40.0, "distinct_2": 0.91},
    }
    arms["sft"] |= {"kl": 0.0, "score": 0.0, "parts": parts}  # type: ignore[dict-item]
    better = {name: value + 0.1 for name, value in parts.items()}
    arms["policy"] |= {"kl": 4.2, "score": 1.2, "parts": better}  # type: ignore[dict-item]
    win = {"b": "sft", "judge": "builtin:gold", "prompts": 256}
    run.finish_stage("sft", 62.0, sft={"heldout_loss": 1.234, "heldout_loss_of_base": 1.9})
    run.finish_stage("rank", 30.0, rank={"prompts": 1200})
    run.finish_stage(
        "reward",
        45.0,
        reward={
            "accuracy": 0.714,
            "accuracy_ci": [0.69, 0.74],
            "longer_baseline": 0.52,
            "bayes_accuracy": 0.75,
            "length_correlation": -0.03,
            "by_margin": [{"margin": 0.2, "accuracy": 0.61}, {"margin": 1.1, "accuracy": 0.83}],
            "calibration": {"predicted": 0.7, "observed": 0.72},
        },
    )
    run.finish_stage("ppo", 130.0, ppo={"kl": 4.2, "score": 1.2, "eos_rate": 0.99, "stopped": ""})
    run.finish_stage(
        "evaluate",
        20.0,
        evaluate={"prompts": 256, "judge": "builtin:gold"},
        arms=arms,
        win_rates=[
            win | {"a": "base", "win_rate": 0.21, "ci": [0.17, 0.26]},
            win | {"a": "policy", "win_rate": 0.74, "ci": [0.69, 0.79]},
        ],
        memory={"train": {"predicted_gib": 0.8, "measured_gib": 0.84}, "load": {}},
    )
    run.write_json("environment.json", {"versions": {"torch": "2.13.0"}, "device": "cpu"})
    (run.path / "recipe.yaml").write_text("name: fabricated\nbase: {model: builtin:tiny}\n")
    run.set_status("finished")
