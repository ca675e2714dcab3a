"""Rankings out of files into the store: pairs, HH dialogues, K-way rankings.

Ids are hashes of the content, so that importing a file twice, or after an interruption, adds
nothing. Imported judgements never count in win rates: nobody knows which models answered.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lora_rlhf.data.records import Message, Ranking, prompt_key
from lora_rlhf.data.sources import load_rankings, require
from lora_rlhf.preferences.events import Judgement, Response, Sampler, Task
from lora_rlhf.preferences.rows import TAG
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Source

_AT_ONCE = 250
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        rankings: usable ones in the file.
        new: of them, those the store did not have.
        dropped: reason -> rows of no use.
    """

    rankings: int
    new: int
    dropped: dict[str, int]


def import_file(
    store: Store,
    path: str | Path,
    annotator: str = "import",
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Store all rankings of a file that `data.rankings` of a recipe could name.

    Args:
        store: to write.
        path: .jsonl, .json, .csv or .parquet, also with .gz; or another store.
        annotator: who judged, for rows that name nobody.
        progress: told (done, of) after each part.

    Raises:
        DataError: rows that cannot be read, with their lines; nothing was stored.
        PreferenceError: the store cannot be written; what was told to `progress` is in it.
    """
    loaded = load_rankings(Source(path=str(path)))
    records = require(loaded)
    new = done = 0
    left = iter(records)
    source = f"import:{Path(path).name}"
    while part := list(islice(left, _AT_ONCE)):
        events = [event for record in part for event in to_events(record, source, annotator)]
        new += store.add_many(events)
        done += len(part)
        if progress is not None:
            progress(done, len(records))
    return Imported(len(records), new // 2, loaded.dropped)


def to_events(record: Ranking, source: str, annotator: str) -> tuple[Task, Judgement]:
    """A ranking as a task and the judgement of it.

    Args:
        record: as the loaders give it.
        source: `Task.prompt_source`.
        annotator: where the record names nobody.
    """
    prompt: tuple[Message, ...] = tuple(
        {"role": m["role"], "content": _clean(m["content"])} for m in record.prompt
    )
    who = _name(record.annotator or annotator)
    texts = [_clean(text) for text in record.responses]
    ident = _digest(prompt_key(prompt), texts, record.groups, record.tag, who)
    task = Task(
        task_id=f"import-{ident}",
        mode="pair" if len(texts) == 2 else "rank",
        annotator=who,
        blind=True,  # no adapter's name was shown, since none is known
        prompt=prompt,
        prompt_source=source,
        prompt_sha256=prompt_key(prompt),
        sampler=Sampler(strategy="import"),
        responses=tuple(
            Response(rid=f"r{i}", pos=i, text=text, finish_reason="import")
            for i, text in enumerate(texts)
        ),
        app={} if record.tag is None else {TAG: _clean(record.tag)},
    )
    ranking = tuple(tuple(f"r{i}" for i in group) for group in record.groups)
    judgement = Judgement(
        id=f"import-judgement-{ident}",
        task_id=task.task_id,
        annotator=who,
        blind=True,
        type="pair" if len(texts) == 2 else "rank",
        ranking=ranking,
        outcome="decided" if len(ranking) > 1 else "tie",
        shown_ts=task.ts,
        done_ts=task.ts,
    )
    return task, judgement


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]


def _clean(text: str) -> str:
    """Without the halves of characters that JSON can spell and no encoding has."""
    return text.encode("utf-8", "replace").decode()


def _name(text: str) -> str:
    return _CONTROL.sub(" ", _clean(text))[:_LONGEST_NAME].strip() or "import"
