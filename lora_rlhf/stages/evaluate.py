"""Arms against each other on held-out prompts: base, sft, best-of-n, policy."""

from lora_rlhf.evaluation.contest import hold, open_contest
from lora_rlhf.evaluation.frontier import frontier_of_contest, watch_votes
from lora_rlhf.training.session import Session


def run(session: Session) -> None:
    """Sample every arm on the same held-out prompts and compare each with the reference.

    Writes `win_rates`, `arms`, `rounds` and, by setting, `frontier` into the summary, and
    evaluate/samples.jsonl and answers.jsonl. Killed and resumed, it goes on after the last batch of
    answers.

    Raises:
        ConfigError: an arm or a judge that means nothing.
        CheckpointError: an adapter that is not there, or not of this backbone.
        DataError: fewer held-out prompts than asked for.
    """
    settings = session.recipe.evaluate
    assert settings is not None
    contest = open_contest(session, settings)
    if settings.frontier:
        frontier_of_contest(contest, settings.frontier)
    hold(contest)
    watch_votes(session.run)
