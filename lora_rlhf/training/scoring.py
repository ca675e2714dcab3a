"""What PPO maximises: the reward adapter's score, a judge's, or the noise of a control."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_rlhf.data.batches import Sequences
from lora_rlhf.data.records import prompt_text
from lora_rlhf.model.generation import Sampling
from lora_rlhf.preferences.judges import find_judge
from lora_rlhf.training.experience import Scorer
from lora_rlhf.training.material import TokenisedPrompt
from lora_rlhf.training.ppo import row_seed
from lora_rlhf.training.rollout import map_rows, sample, score_forward, with_known_end
from lora_rlhf.training.session import Session

_BEFORE = -3  # the "step" that seeds the answers a judge's scale is taken from


def reward_scorer(session: Session) -> Scorer:
    """The normalised score of the adapter `reward`."""
    backbone = session.backbone
    head = backbone.adapters.heads["reward"]

    def score(sequences: Sequences) -> Tensor:
        known = with_known_end(backbone, sequences)
        with backbone.adapters.use("reward"):
            (scores,) = map_rows(
                known, session.budget.tokens, lambda s: (score_forward(backbone, s, head),)
            )
        return scores

    return score


def judge_scorer(session: Session, name: str, prompts: Sequence[TokenisedPrompt]) -> Scorer:
    """A judge's utility in units of `sft`'s own answers: mean 0, spread 1 (RM3).

    So `kl_coef` and `missing_eos_score` mean what they mean for a reward adapter. The scale is a
    function of the frozen `sft` and the seed, so that a resumed run finds the same one.

    Args:
        session: with the adapter `sft`.
        name: as in `ppo.judge`.
        prompts: all that are trained on; the first `ppo.sample_prompts` give the scale.
    """
    settings, backbone, recipe = session.recipe.ppo, session.backbone, session.recipe
    assert settings is not None
    judge = find_judge(name)
    texts = {tuple(ids): prompt_text(prompt.messages) for ids, prompt in prompts}

    def utilities(rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        found = [judge(texts[tuple(ids)], backbone.format.decode(answer)) for ids, answer in rows]
        return torch.tensor(found, dtype=torch.float32)

    ids = [tokens for tokens, _ in prompts[: settings.sample_prompts]]
    seeds = [row_seed(recipe.seed, _BEFORE, i) for i in range(len(ids))]
    sampling = Sampling(recipe.data.max_response_tokens, settings.temperature)
    answers = sample(backbone, "sft", ids, seeds, sampling, session.rollout_rows)
    first = utilities([(p, a.ids) for p, a in zip(ids, answers, strict=True)])
    mean, spread = float(first.mean()), max(float(first.std(unbiased=False)), 1e-6)

    def score(sequences: Sequences) -> Tensor:
        return ((utilities(_rows(sequences)) - mean) / spread).to(sequences.lengths.device)

    return score


def _rows(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of each row."""
    rows = zip(
        sequences.input_ids.tolist(),
        sequences.prompt_lengths.tolist(),
        sequences.lengths.tolist(),
        strict=True,
    )
    return [(ids[:start], ids[start:end]) for ids, start, end in rows]
