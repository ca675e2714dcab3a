"""IFEval: instructions that a program can check, answered in chat and checked by lm-eval."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

from lora_rlhf.data.records import user
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.evaluation.suites.shares import Measures, Observed

_MAX_NEW_TOKENS = 1280  # that of lm-eval's task
# Checked with NLTK's English sentence model, which NLTK downloads.
_NEEDS_PUNKT = frozenset(
    ("length_constraints:number_sentences", "change_case:capital_word_frequency")
)
_METRICS = ("strict", "loose")


def checkable(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows whose every instruction can be checked here, what is left out and why)."""
    sure = [r for r in rows if not _is_by_chance(r)]
    kept = sure if _has_punkt() else [r for r in sure if not _needs_punkt(r)]
    told = []
    if len(sure) < len(rows):
        told.append(
            f"ifeval: {len(rows) - len(sure)} prompts are left out, which count a character that "
            f"is no letter: lm-eval counts a letter that it draws by chance instead"
        )
    if len(kept) < len(sure):
        told.append(
            f"ifeval: {len(sure) - len(kept)} prompts are left out, whose sentences NLTK counts "
            f"with data that is not here. Get it: python -m nltk.downloader punkt_tab"
        )
    return kept, told


def _is_by_chance(row: dict[str, Any]) -> bool:
    """Whether it asks for #s or !s: two arms with the same answer would get two verdicts."""
    letters = [kwargs["letter"] for kwargs in row["kwargs"] if kwargs.get("letter")]
    return any(len(one) != 1 or not "a" <= one.lower() <= "z" for one in letters)


def _needs_punkt(row: dict[str, Any]) -> bool:
    return bool(_NEEDS_PUNKT & set(row["instruction_id_list"]))


def _has_punkt() -> bool:
    checks = _checks()
    try:
        checks.instructions_registry.instructions.instructions_util.count_sentences("One. Two.")
    except LookupError:
        return False
    return True


def _checks() -> Any:
    """lm-eval's checks; importing them tries a download, whose messages nobody needs to read."""
    import nltk

    download = nltk.download
    # Its default streams are those of its own import, which no redirection reaches.
    nltk.download = partial(download, quiet=True, print_error_to=StringIO())
    try:
        with redirect_stdout(StringIO()):
            from lm_eval.tasks.ifeval import utils
    finally:
        nltk.download = download
    # The language of an answer is guessed by chance otherwise.
    utils.instructions_registry.instructions.langdetect.DetectorFactory.seed = 0
    return utils


def measures(engine: Engine, rows: Sequence[dict[str, Any]]) -> Measures:
    """prompt_level_*: all of a prompt's instructions followed; inst_level_*: share of them all.

    Source: Zhou et al. 2023, arXiv:2311.07911, by lm-eval's task. Deviation: the prompt is a user
    turn in the format of the run's own stages.
    """
    utils = _checks()
    prompts = [engine.backbone.format.prompt_ids(user(row["prompt"])) for row in rows]
    found: Measures = {}
    for arm, texts in engine.answers(prompts, _MAX_NEW_TOKENS).items():
        checked = [utils.process_results(r, [t]) for r, t in zip(rows, texts, strict=True)]
        for kind in _METRICS:
            whole = [float(c[f"prompt_level_{kind}_acc"]) for c in checked]
            parts = [c[f"inst_level_{kind}_acc"] for c in checked]
            found.setdefault(f"prompt_level_{kind}", {})[arm] = Observed(whole)
            found.setdefault(f"inst_level_{kind}", {})[arm] = Observed(
                [float(sum(p)) for p in parts], [float(len(p)) for p in parts]
            )
    return found
