"""The tasks of a suite by name: what each needs, and how it is measured."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_rlhf.evaluation.suites import (
    entropies,
    ifeval,
    lm_eval_tasks,
    perplexity,
    xquad,
    xstest,
)
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.evaluation.suites.files import read_rows, spread_out, why_missing
from lora_rlhf.evaluation.suites.shares import Measures
from lora_rlhf.training.session import Session


@dataclass(frozen=True)
class Setting:
    """What every task of a suite is given.

    Attributes:
        session: of the run.
        engine: over the arms.
        folder: of the public sets' files; None: none was given.
        limit: most documents of a task; None: all of them.
    """

    session: Session
    engine: Engine
    folder: Path | None
    limit: int | None


@dataclass(frozen=True)
class Task:
    """One public set.

    Attributes:
        why_not: why it cannot run here and what to do, in one sentence; None: it can.
        measure: metric -> arm -> what it saw.
    """

    why_not: Callable[[Setting], str | None]
    measure: Callable[[Setting], Measures]


def _needs(file: str, setting: Setting, with_lm_eval: bool = False) -> str | None:
    if with_lm_eval and not lm_eval_tasks.is_installed():
        return lm_eval_tasks.NOT_INSTALLED
    return why_missing(setting.folder, file)


def _pairs(setting: Setting, file: str, make: Callable[..., list[entropies.Pair]]) -> Measures:
    pairs = make(read_rows(setting.folder, file))
    return entropies.pair_measures(setting.engine, spread_out(pairs, setting.limit))


def _perplexity(setting: Setting) -> Measures:
    texts = perplexity.documents(setting.session, setting.folder, setting.limit)
    return perplexity.measures(setting.engine, texts)


def _xstest(setting: Setting) -> Measures:
    rows = read_rows(setting.folder, _XSTEST)
    return xstest.measures(setting.engine, spread_out(rows, setting.limit))


def _xquad(setting: Setting) -> Measures:
    asked = xquad.questions(read_rows(setting.folder, _XQUAD))
    return xquad.measures(setting.engine, spread_out(asked, setting.limit))


def _ifeval(setting: Setting) -> Measures:
    rows, left_out = ifeval.checkable(read_rows(setting.folder, _IFEVAL))
    for what in left_out:
        setting.session.tell(what)
    return ifeval.measures(setting.engine, spread_out(rows, setting.limit))


def _local(name: str) -> Task:
    """A task of lm-eval with its documents in the folder."""

    def measure(setting: Setting) -> Measures:
        task = lm_eval_tasks.local_task(name, setting.folder, setting.limit)
        return lm_eval_tasks.evaluate(setting.engine, name, task)

    file = lm_eval_tasks.LOCAL_TASKS[name].file
    return Task(partial(_needs, file, with_lm_eval=True), measure)


def hub(name: str) -> Task:
    """A task, group or tag of lm-eval with its documents on the hub."""

    def measure(setting: Setting) -> Measures:
        found: Measures = {}
        tasks = lm_eval_tasks.hub_tasks(name)
        for own, task in tasks.items():
            prefix = "" if len(tasks) == 1 else f"{own} "
            measured = lm_eval_tasks.evaluate(setting.engine, own, task, setting.limit)
            found |= {prefix + metric: arms for metric, arms in measured.items()}
        return found

    def why_not(_: Setting) -> str | None:
        if not lm_eval_tasks.is_installed():
            return lm_eval_tasks.NOT_INSTALLED
        if name == "realtoxicityprompts" and not os.environ.get(_PERSPECTIVE):
            return f"its answers are scored by Perspective. Set {_PERSPECTIVE} to a key of its API."
        return None

    return Task(why_not, measure)


_PERSPECTIVE = "PERSPECTIVE_API_KEY"
_CROWS = "crows_pairs/crows_pairs_anonymized.csv"
_WINOGENDER = "winogender/all_sentences.tsv"
_XQUAD = "xquad_en/xquad.en.json"
_XSTEST = "xstest/xstest_prompts.csv"
_IFEVAL = "ifeval/input_data.jsonl"

PUBLIC: dict[str, Task] = {
    "perplexity": Task(lambda s: perplexity.why_no_text(s.session, s.folder), _perplexity),
    "truthfulqa_mc1": _local("truthfulqa_mc1"),
    "truthfulqa_mc2": _local("truthfulqa_mc2"),
    "crows_pairs_entropy": Task(
        partial(_needs, _CROWS), lambda s: _pairs(s, _CROWS, entropies.crows_pairs)
    ),
    "crows_pairs_english": _local("crows_pairs_english"),
    "winogender_entropy": Task(
        partial(_needs, _WINOGENDER), lambda s: _pairs(s, _WINOGENDER, entropies.winogender_pairs)
    ),
    "winogender_all": _local("winogender_all"),
    "xquad_en": Task(partial(_needs, _XQUAD), _xquad),
    "xstest": Task(partial(_needs, _XSTEST), _xstest),
    "ifeval": Task(partial(_needs, _IFEVAL, with_lm_eval=True), _ifeval),
}
HUB: dict[str, Task] = {name: hub(name) for name in lm_eval_tasks.HUB_TASKS}
SUITES: dict[str, dict[str, Task]] = {"public": PUBLIC, "hub": HUB}


def tasks_of(name: str) -> dict[str, Task]:
    """The tasks of a suite; of a task's name that task, of another name lm-eval's task."""
    if name in SUITES:
        return SUITES[name]
    known = PUBLIC | HUB
    return {name: known[name] if name in known else hub(name)}
