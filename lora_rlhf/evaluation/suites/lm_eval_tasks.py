"""Tasks of lm-eval on the live backbone: its definitions, documents from local files or the hub."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_rlhf.errors import ConfigError, DataError
from lora_rlhf.evaluation.suites.engine import Engine
from lora_rlhf.evaluation.suites.files import read_rows, spread_out
from lora_rlhf.evaluation.suites.shares import Measures, Observed, Pooled

NOT_INSTALLED = "needs lm-eval. Install it: pip install 'lora-rlhf[lm-eval]'"
HUB_TASKS = {
    "hellaswag": "Rowan/hellaswag",
    "drop": "EleutherAI/drop",
    "squadv2": "rajpurkar/squad_v2",
    "wmt14-fr-en": "wmt/wmt14",
    "realtoxicityprompts": "allenai/real-toxicity-prompts",
}
_PRONOUNS = {
    "male": ("he", "him", "his"),
    "female": ("she", "her", "hers"),
    "neutral": ("they", "them", "their"),
}
_FIRST_ONLY = "none"  # lm-eval's name for answers that no filter has changed

Doc = dict[str, Any]


def is_installed() -> bool:
    """Whether lm-eval can be imported; does not import it."""
    return find_spec("lm_eval") is not None


# -- documents from the sets' own files ----------------------------------------------------------


def truthfulqa(rows: Sequence[Doc]) -> list[Doc]:
    """mc_task.json in the fields of the hub's data set.

    Blank choices, of which the file has a few, are no answers and have no tokens: left out.
    """
    docs = []
    for row in rows:
        doc: Doc = {"question": row["question"]}
        for key in ("mc1_targets", "mc2_targets"):
            choices = {text: label for text, label in row[key].items() if text.strip()}
            doc[key] = {"choices": list(choices), "labels": list(choices.values())}
        docs.append(doc)
    return docs


def crows_pairs(rows: Sequence[Doc]) -> list[Doc]:
    """The CSV's rows; the more stereotyping sentence is always `sent_more`."""
    return [{key: row[key] for key in ("sent_more", "sent_less", "bias_type")} for row in rows]


def winogender(rows: Sequence[Doc]) -> list[Doc]:
    """all_sentences.tsv; label 0: the pronoun means the occupation, 1: the participant."""
    docs = []
    for row in rows:
        occupation, participant, answer, gender = row["sentid"].split(".")[:4]
        words = re.findall(r"[a-z]+", row["sentence"].lower())
        docs.append(
            {
                "sentence": row["sentence"],
                "pronoun": next(word for word in words if word in _PRONOUNS[gender]),
                "occupation": occupation,
                "participant": participant,
                "label": int(answer),
                "gender": gender,
            }
        )
    return docs


@dataclass(frozen=True)
class Local:
    """A task of lm-eval whose documents lie in the folder of public sets.

    Attributes:
        folder: of the definition, among lm-eval's own.
        file: in the folder of public sets.
        docs: rows of the file -> documents.
        split: under which the definition looks for them.
    """

    folder: str
    file: str
    docs: Callable[[Sequence[Doc]], list[Doc]]
    split: str


_TRUTHFULQA = Local("truthfulqa", "truthfulqa/mc_task.json", truthfulqa, "validation")
LOCAL_TASKS = {
    "truthfulqa_mc1": _TRUTHFULQA,
    "truthfulqa_mc2": _TRUTHFULQA,
    "crows_pairs_english": Local(
        "crows_pairs", "crows_pairs/crows_pairs_anonymized.csv", crows_pairs, "test"
    ),
    "winogender_all": Local("winogender", "winogender/all_sentences.tsv", winogender, "test"),
}


# -- tasks --------------------------------------------------------------------------------------


def local_task(name: str, folder: Path | None, limit: int | None) -> Any:
    """One of `LOCAL_TASKS`, its documents read from the folder.

    Raises:
        DataError: the file is missing or is not what its name says.
    """
    with _quiet():
        import datasets
        import lm_eval
        from lm_eval.tasks import TaskManager

        local = LOCAL_TASKS[name]
        try:
            docs = local.docs(read_rows(folder, local.file))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise DataError(
                f"{folder}/{local.file} has not the fields of its set ({error!r}). Use the file "
                f"as it is published."
            ) from error
        table = {local.split: datasets.Dataset.from_list(spread_out(docs, limit))}
        definitions = Path(lm_eval.__file__).parent / "tasks" / local.folder
        manager = TaskManager(include_defaults=False, include_path=str(definitions))
        # A member of a group takes overrides of its definition; a task by itself does not.
        member = {"task": name, "custom_dataset": lambda **_: table}
        return manager.load([{"group": "local", "task": [member]}])["tasks"][name]


def hub_tasks(name: str) -> dict[str, Any]:
    """A task, group or tag of lm-eval by its name, as tasks whose documents come from the hub.

    Raises:
        ConfigError: lm-eval knows no such name, or the task needs a key or a package.
        DataError: the hub cannot be reached.
    """
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        if name not in manager.all_tasks:
            raise ConfigError(
                f"suite {name}: lm-eval has no task of this name. Allowed: public, hub, a task of "
                f"either, or any name that `lm-eval ls tasks` shows."
            )
        try:
            return dict(manager.load([name])["tasks"])
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            data = HUB_TASKS.get(name, "its data set")
            first = str(error).strip().split("\n")[0]
            raise DataError(
                f"{name}: {data} cannot be had from the hub ({first}). Without a network, run it "
                f"once on a machine that has one and copy that machine's HF_HOME here, or take "
                f"--suite public, which reads local files."
            ) from error


def evaluate(engine: Engine, name: str, task: Any, limit: int | None = None) -> Measures:
    """Every metric of a task for every arm, document by document.

    Args:
        engine: over the arms.
        name: the task's.
        task: of lm-eval.
        limit: first documents of a hub's task; a local one is cut when it is read.
    """
    found: Measures = {}
    for arm in engine.arms:
        with _quiet():
            from lm_eval.evaluator import evaluate as lm_evaluate

            from lora_rlhf.evaluation.suites.lm_eval_model import ArmModel

            results = lm_evaluate(
                ArmModel(engine, arm),
                {"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        for metric, values in _by_metric(results["samples"][name]).items():
            figure = task.aggregation()[metric.split(",")[0]]
            found.setdefault(metric, {})[arm] = _measured(values, figure)
    return found


def _by_metric(samples: Sequence[Doc]) -> dict[str, list[Any]]:
    """Metric -> what each document gave; of a filter's answers, metric,filter."""
    found: dict[str, list[Any]] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == _FIRST_ONLY else f",{sample['filter']}"
        for metric in sample["metrics"]:
            found.setdefault(metric + suffix, []).append(sample[metric])
    return found


def _measured(values: Sequence[Any], figure: Callable[[list[Any]], float]) -> Observed | Pooled:
    """A mean where lm-eval takes one, else its own figure."""
    numbers = all(isinstance(v, bool | int | float) or hasattr(v, "__float__") for v in values)
    if numbers and getattr(figure, "__name__", "") == "mean":
        return Observed([float(v) for v in values])
    return Pooled(values, figure)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log and bars from the terminal; its errors come as exceptions."""
    import lm_eval.api.task as building

    logger, bar = logging.getLogger("lm_eval"), building.tqdm
    before = logger.level
    logger.setLevel(logging.ERROR)
    building.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.setLevel(before)
        building.tqdm = bar
