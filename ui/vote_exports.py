"""Judgements as one file to take away, for the admin alone."""

import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rlhf.preferences.exports import EXPORTS, FILTERS, Exported
from lora_rlhf.preferences.exports import export as export_kind
from ui.downloads import Downloads
from ui.people import Person, require_admin
from ui.vote_rates import plural

if TYPE_CHECKING:
    from ui.studio import Studio

EVERYTHING = "everything"


def export(
    studio: "Studio", person: Person, downloads: Downloads, kind: Any, filters: Any = FILTERS
) -> tuple[Path, str]:
    """A zip of one kind of export, or of all, with manifests; and what is in it, in words.

    Args:
        studio: whose store.
        person: an admin.
        downloads: where the file is put, for a short while.
        kind: of EXPORTS, or `EVERYTHING`.
        filters: what to leave out, of FILTERS.

    Raises:
        NotAllowed: the person is no admin.
        PreferenceError: an unknown kind or filter.
    """
    require_admin(person, "Exporting")
    kinds = EXPORTS if kind == EVERYTHING else (str(kind),)
    wanted = tuple(map(str, filters)) if isinstance(filters, list | tuple) else FILTERS
    made: list[Exported] = []

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # mode 0700
            made.extend(export_kind(studio.store, k, folder, filters=wanted) for k in kinds)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in (file for one in made for file in one.files):
                    archive.write(file, file.name)

    name = kind if kind in EXPORTS else "votes"
    path = downloads.put(f"{name}.zip", write)
    return path, _export_words(made)


def _held_out(one: Exported) -> str:
    """How many of the rows are held out, where a file keeps them apart."""
    held = sum(facts["rows"] for facts in one.manifest["files"][1:])
    return f" ({held:,} held out)" if held else ""


def _export_words(made: Sequence[Exported]) -> str:
    rows = ", ".join(f"{one.kind} {plural(one.rows, 'row')}{_held_out(one)}" for one in made)
    if len(made) > 1:
        return f"{rows}. The manifests say what was left out."
    (one,) = made
    out: Counter[str] = Counter()
    for name, facts in one.manifest["filters"].items():
        out[name] += facts["removed"]
    out.update(one.manifest["left_out"])
    left = ", ".join(f"{n:,} {reason}" for reason, n in out.most_common() if n)
    kept = plural(one.manifest["judgements"], "judgement")
    return f"{rows} of {kept}." + (f" Left out: {left}." if left else "")
