"""Where the files of the public sets lie, and their rows."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.errors import DataError

VARIABLE = "LORA_RLHF_DATA"
_SETS = {
    "truthfulqa/mc_task.json": "sylinrl/TruthfulQA, data/mc_task.json",
    "crows_pairs/crows_pairs_anonymized.csv": "nyu-mll/crows-pairs, data/",
    "winogender/all_sentences.tsv": "rudinger/winogender-schemas, data/",
    "xquad_en/xquad.en.json": "google-deepmind/xquad, xquad.en.json",
    "ifeval/input_data.jsonl": "google-research/google-research, instruction_following_eval/data/",
    "xstest/xstest_prompts.csv": "paul-rottger/xstest, xstest_prompts.csv",
}


def data_folder(given: Path | None) -> Path | None:
    """The folder of the sets: as given, else $LORA_RLHF_DATA, else None.

    Raises:
        DataError: there is no such folder.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        return None
    folder = named.expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder. Give the one that holds the public sets' files."
        )
    return folder


def why_missing(folder: Path | None, name: str) -> str | None:
    """Why a set's file cannot be read and what to do; None: it is there."""
    if folder is None:
        return f"no folder of public sets was given. Name it with --data or {VARIABLE}."
    if (folder / name).is_file():
        return None
    return f"{folder / name} is not there. It is in the GitHub repository {_SETS[name]}."


def read_rows(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """All rows of a set's file: csv, tsv, jsonl, or a json list.

    Raises:
        DataError: it is missing or cannot be read as what its name says.
    """
    reason = why_missing(folder, name)
    if reason is not None or folder is None:
        raise DataError(reason or "")
    path = folder / name
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix == ".json":
            found = json.loads(text)
            return found["data"] if isinstance(found, dict) else found
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return list(csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter))
    except (ValueError, KeyError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Allowed: the file of {_SETS[name]} as it is."
        ) from error


def spread_out(rows: Sequence[Any], limit: int | None) -> list[Any]:
    """At most so many rows, evenly over the whole: files are sorted by kind."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]
