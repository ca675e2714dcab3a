"""What the judge writes into summary.json, fabricated: every key, with markup in every text."""

import math
from typing import Any

from lora_rlhf.evaluation.health import health_card
from tests.evaluation.planted import good, planted
from tests.fabricated import NASTY

Json = dict[str, Any]


def share(value: float, width: float = 0.03, count: int = 256) -> Json:
    """A share with its interval."""
    return {"value": value, "low": value - width, "high": value + width, "n": count}


def judged(text: str = NASTY) -> Json:
    """All keys that `evaluate` and the reward stage add, hostile text wherever text may stand."""
    return {
        "win_rates": [_win(text, "builtin:gold"), _win("policy", text)],
        "rounds": {
            "judge": text,
            "arms": [
                {"name": "sft", "elo": 1000.0, "ci": [1000.0, 1000.0]},
                {"name": f"policy {text}", "elo": 1340.4, "ci": [1280.0, 1400.0]},
            ],
        },
        "labelers": {
            "groups": [
                {
                    "annotators": ["ann", text],
                    "n": 320,
                    "agreement_within": None,
                    "agreement_across": share(0.71),
                    "own": share(0.724),
                    "others": share(0.696),
                }
            ]
        },
        "health": health(text),
        "frontier": frontier(text),
        "suites": {
            "tasks": {
                f"truthfulqa {text}": {
                    f"mc1 {text}": {"base": share(0.22), text: share(0.31), "policy": share(0.25)}
                },
                "text": {"perplexity": {"base": share(12.1, 0.4), "policy": share(14.0, 0.4)}},
            },
            "seconds": {"truthfulqa": 40.0},
            "skipped": {text: f"needs {text}"},
        },
    }


def _win(arm: str, judge: str) -> Json:
    return {
        "a": arm,
        "b": "sft",
        "judge": judge,
        "win_rate": 0.74,
        "ci": [0.69, 0.79],
        "prompts": 256,
        "ties": 12,
        "length_controlled": {"win_rate": 0.66, "ci": [0.61, 0.71]},
        "prompts_needed_55": 748,
    }


def health(text: str = NASTY) -> Json:
    """A good reward model's card with hostile prompts, answers, tags and probes."""
    rankings = planted(good, prompts=60)
    hostile = [
        type(r)(
            f"{r.prompt} {text}",
            [f"{a} {text}" for a in r.answers],
            r.groups,
            r.scores,
            r.lengths,
            text if r.tag == "chat" else r.tag,
        )
        for r in rankings
    ]
    counts = [1, 5, 9, 4, 1]
    extra = {
        "scores": {
            "bins": [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5],
            "demonstrations": counts,
            "sft": counts[::-1],
            "policy": [0, 0, 1, 9, 10],
        },
        "degenerate": [
            {
                "name": f"nothing {text}",
                "prompt": text,
                "text": text,
                "score": -2.1,
                "percentile": 0.04,
                "best_score": -1.5,
            }
        ],
    }
    return health_card(hostile, extra=extra)


def frontier(text: str = NASTY, warned: bool = True) -> Json:
    """Best-of-n and PPO on Gao's laws, alpha 1 and beta 0.1, from 0.7; gold at half of it."""
    points = []
    for n in (1, 2, 4, 8, 16):
        kl = math.log(n) - (n - 1) / n
        d = math.sqrt(kl)
        points.append(_point("best_of_n", "sft", kl, d * (1 - 0.1 * d)) | {"n": n})
    for step in (0, 6, 12, 24):
        d = math.sqrt(step / 4)
        gain = d * (1 - 0.1 * math.log(d)) if d else 0.0
        points.append(_point("ppo", text, d * d, gain) | {"step": step})
    fit = {"alpha": 1.0, "beta": 0.1, "r2": 1.0, "peak": 5.0}
    half = {"alpha": 0.5, "beta": 0.05, "r2": 1.0, "peak": None}
    return {
        "points": points,
        "fits": {kind: {"proxy": fit, "gold": half} for kind in ("best_of_n", "ppo")},
        "watch": {"warned": warned, "sentence": f"Over-optimised: {text}"},
        "judge": text,
    }


def _point(kind: str, arm: str, kl: float, gain: float) -> Json:
    return {
        "kind": kind,
        "arm": arm,
        "kl": kl,
        "proxy": 0.7 + gain,
        "gold": gain / 2,
        "proxy_ci": [0.6 + gain, 0.8 + gain],
        "gold_ci": [gain / 2 - 0.1, gain / 2 + 0.1],
    }
