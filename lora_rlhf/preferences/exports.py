"""Judgements as files for other tools, each with a manifest of what is in it and what is not.

    pairs.jsonl        prompt, chosen, rejected for TRL and the like
    rankings.jsonl     a row a judgement: prompt, responses, ranking; our own recipes read it
    battles.jsonl      model_a, model_b, winner: the layout of the Chatbot Arena
    kto.jsonl          prompt, completion, label, from likes
    leaderboard.csv    win rates with intervals

What is on a prompt that the app holds out never stands in one of the three that train, but in
pairs-eval.jsonl, rankings-eval.jsonl, kto-eval.jsonl; of pairs, so does a part of all others.
Battles and win rates measure, and hold everything. All are made from one state of the store. Files
are readable by their owner alone.
"""

import csv
import io
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf import __version__
from lora_rlhf.data.records import Prompt
from lora_rlhf.data.splits import split_by_prompt
from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences import ratings, rows
from lora_rlhf.preferences.counting import is_too_fast
from lora_rlhf.preferences.files import sha256_of
from lora_rlhf.preferences.rows import Row
from lora_rlhf.preferences.store import Judged, Store

EXPORTS = ("pairs", "rankings", "battles", "kto", "leaderboard")
FILTERS = ("retracted", "unfinished", "non-blind", "too-fast", "identical")
_SALT = "export"  # the app's own prompts all come from one side of the split without it
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        kind: of EXPORTS.
        files: data files, first what may be trained on, then what is held out, then the manifest.
        rows: in all data files.
        manifest: the content of the manifest.
    """

    kind: str
    files: tuple[Path, ...]
    rows: int
    manifest: dict[str, Any]


@dataclass
class _Selection:
    """Filters in use, and what they have removed."""

    filters: tuple[str, ...]
    removed: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    judgements: int = 0

    def keeps(self, judged: Judged) -> bool:
        """Whether a judgement passes; the first filter that removes it counts it."""
        for name in self.filters:
            if _REMOVES[name](judged):
                self.removed[name] += 1
                return False
        self.judgements += 1
        return True


def _is_non_blind(judged: Judged) -> bool:
    """A like is of a chat, which is never blind."""
    blind = judged.task.blind and judged.judgement.blind
    return judged.judgement.type != "like" and not blind


_REMOVES: dict[str, Callable[[Judged], bool]] = {
    "retracted": lambda j: j.retracted,
    "unfinished": lambda j: bool(j.task.unfinished),
    "non-blind": _is_non_blind,
    "too-fast": lambda j: is_too_fast(j.task, j.judgement),
    "identical": rows.is_identical,
}
assert set(_REMOVES) == set(FILTERS)


def export(
    store: Store,
    kind: str,
    folder: str | Path,
    *,
    filters: Collection[str] = FILTERS,
    heldout_fraction: float = 0.1,
    margin: bool = False,
) -> Exported:
    """Write one kind of export and its manifest into a folder, replacing older ones.

    Args:
        store: to read; votes may go on arriving.
        kind: of EXPORTS.
        folder: made when it does not exist.
        filters: what to leave out, of FILTERS.
        heldout_fraction: of the prompts of `pairs`, into the file of what is held out; with 0, that
            holds what the app holds out, as those of `rankings` and `kto` do.
        margin: add a column `margin` to `pairs`: 1 for much better, else 0.

    Raises:
        PreferenceError: an unknown kind or filter, or a folder that cannot be written.
    """
    unknown = [f for f in filters if f not in FILTERS]
    if kind not in EXPORTS or unknown or not 0 <= heldout_fraction < 1:
        found = kind if kind not in EXPORTS else unknown[0] if unknown else heldout_fraction
        raise PreferenceError(
            f"export: {found} is not known. Allowed: one of {', '.join(EXPORTS)}; filters "
            f"{', '.join(FILTERS)}; a held-out fraction from 0 to under 1."
        )
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _frozen(store) as copy:
            selection = _Selection(tuple(f for f in FILTERS if f in filters))
            files, facts = _write(copy, kind, folder, selection, heldout_fraction, margin)
            manifest = {
                "kind": kind,
                **facts,
                "judgements": selection.judgements,
                "filters": {
                    f: {"on": f in filters, "removed": selection.removed[f]} for f in FILTERS
                },
                "left_out": dict(selection.left_out),
                "store": {
                    "location": store.location,
                    "version": copy.version(),
                    "sha256": copy.digest(),
                },
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "lora_rlhf": __version__,
            }
        told = folder / f"{kind}.manifest.json"
        _write_whole(told, json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise PreferenceError(f"{folder} cannot be written: {error.strerror}.") from error
    return Exported(kind, (*files, told), sum(f["rows"] for f in facts["files"]), manifest)


def export_all(store: Store, folder: str | Path, **options: Any) -> list[Exported]:
    """Every kind of export; options as `export`."""
    return [export(store, kind, folder, **options) for kind in EXPORTS]


@contextmanager
def _frozen(store: Store) -> Iterator[Store]:
    """One state of the store, whatever arrives meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.db"
        store.backup(path)
        with Store.open(path, read_only=True) as copy:
            yield copy


# -- the kinds ----------------------------------------------------------------------------------


def _write(
    store: Store,
    kind: str,
    folder: Path,
    selection: _Selection,
    heldout_fraction: float,
    margin: bool,
) -> tuple[list[Path], dict[str, Any]]:
    """The data files, and what the manifest says of them."""
    everything = store.each_judged(retracted=True)
    kept = (j for j in everything if selection.keeps(j))
    if kind == "leaderboard":
        content, count = _leaderboard(list(kept), selection)
        path = folder / "leaderboard.csv"
        _write_whole(path, content)
        return [path], {"files": [_file_facts(path, count)]}
    if kind == "battles":
        shown = store.each_judged(retracted=True)
        names = ratings.arm_names({ratings.arm_key(r) for j in shown for r in j.task.responses})
        path = folder / "battles.jsonl"
        made = (rows.battle_row(judged, names) for judged in kept)
        count = _write_lines(path, _useful(made, selection))
        return [path], {"files": [_file_facts(path, count)]}
    to_rows: dict[str, Callable[[Judged], list[Row] | str]] = {
        "pairs": lambda judged: rows.pair_rows(judged, margin),
        "rankings": lambda judged: _one(rows.ranking_export(judged)),
        "kto": lambda judged: _one(rows.kto_row(judged)),
    }
    heldout = _heldout_prompts(store, heldout_fraction if kind == "pairs" else 0.0)
    return _write_split(folder, kind, kept, selection, heldout, to_rows[kind])


def _one(row: Row | str) -> list[Row] | str:
    return row if isinstance(row, str) else [row]


def _useful(made: Iterable[Row | str], selection: _Selection) -> Iterator[Row]:
    """The rows; reasons why a judgement gives none are counted."""
    for row in made:
        if isinstance(row, str):
            selection.left_out[row] += 1
        else:
            yield row


def _write_split(
    folder: Path,
    kind: str,
    kept: Iterable[Judged],
    selection: _Selection,
    heldout: set[str],
    to_rows: Callable[[Judged], list[Row] | str],
) -> tuple[list[Path], dict[str, Any]]:
    """What may be trained on and what is held out, each into a file of its own."""
    train, held = folder / f"{kind}.jsonl", folder / f"{kind}-eval.jsonl"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as aside:

        def of_training() -> Iterator[Row]:
            for judged in kept:
                found = to_rows(judged)
                if isinstance(found, str):
                    selection.left_out[found] += 1
                elif judged.task.prompt_sha256 in heldout:
                    aside.writelines(json.dumps(row) + "\n" for row in found)
                else:
                    yield from found

        counts = [_write_lines(train, of_training())]
        aside.seek(0)
        counts.append(_write_lines(held, map(json.loads, aside)))
    files = [_file_facts(path, n) for path, n in zip((train, held), counts, strict=True)]
    return [train, held], {"files": files, "heldout_prompts": len(heldout)}


def _heldout_prompts(store: Store, fraction: float) -> set[str]:
    """Hashes of the prompts to hold out: all that the app itself does, and a fraction by hash."""
    held = rows.heldout_prompts(store)
    if not fraction:
        return held
    prompts = {j.task.prompt_sha256: Prompt(j.task.prompt) for j in store.each_judged()}
    hashes = {id(prompt): sha for sha, prompt in prompts.items()}
    _, out = split_by_prompt(list(prompts.values()), fraction, _SALT)
    return held | {hashes[id(prompt)] for prompt in out}


def _leaderboard(kept: list[Judged], selection: _Selection) -> tuple[str, int]:
    board = ratings.leaderboard(kept)
    selection.left_out.update(board.left_out)
    selection.judgements = board.counted
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["adapter", "win_rate", "low", "high", "votes", "decisive", "ties", "both_bad", "group"]
    )
    groups = {name: number for number, each in enumerate(board.groups, 1) for name in each}
    for arm in board.arms:
        share = arm.rate.share
        numbers = ["", "", ""] if share is None else [share, arm.rate.low, arm.rate.high]
        counts = [arm.votes, arm.decisive, arm.ties, arm.both_bad, groups.get(arm.name, "")]
        writer.writerow([csv_cell(arm.name), *numbers, *counts])
    return text.getvalue(), len(board.arms)


def csv_cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


# -- files --------------------------------------------------------------------------------------


def _file_facts(path: Path, count: int) -> dict[str, Any]:
    return {"name": path.name, "rows": count, "sha256": sha256_of(path)}


def _write_lines(path: Path, content: Iterable[Row]) -> int:
    count = 0
    with _replacing(path) as file:
        for row in content:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_whole(path: Path, text: str) -> None:
    with _replacing(path) as file:
        file.write(text)


@contextmanager
def _replacing(path: Path) -> Iterator[io.TextIOWrapper]:
    """A private file that takes the path's place once it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
