"""Perplexity of plain text that no stage has trained on."""

import math
from pathlib import Path

from lora_rlhf.data.records import prompt_text
from lora_rlhf.data.sources import load_text, require
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.suites.engine import Engine, Row
from lora_rlhf.evaluation.suites.files import spread_out
from lora_rlhf.evaluation.suites.shares import Measures, Observed, perplexity_of
from lora_rlhf.recipe import Source
from lora_rlhf.tiny.world import heldout_text
from lora_rlhf.training.material import split_demonstrations
from lora_rlhf.training.session import Session

DOCUMENTS = 256
_FOLDERS = ("text", "tinystories")
_SEED = 1  # of the embedded world's held-out documents; the base's own check has another
_SAME = 100  # letters by which a document is known again


def why_no_text(session: Session, folder: Path | None) -> str | None:
    """Why there is no text to read, and what to do; None: there is."""
    if session.recipe.base.model == "builtin:tiny" or _files(folder):
        return None
    where = folder if folder is not None else "the folder of public sets (--data)"
    return (
        f"there is no plain text. Put documents that no stage trains on into {where} as "
        f"text/NAME.txt or text/NAME.jsonl (a field text)."
    )


def documents(session: Session, folder: Path | None, limit: int | None) -> list[str]:
    """Texts that neither SFT nor the ptx mix has seen; 256 where no limit is given.

    Of builtin:tiny the documents of its world that pretraining held out; else the files under
    text/ and tinystories/ of the folder.

    Raises:
        DataError: all of them are trained on.
    """
    count = limit or DOCUMENTS
    if session.recipe.base.model == "builtin:tiny":
        return [row["text"] for row in heldout_text(count, _SEED)]
    found = [r.text for path in _files(folder) for r in require(load_text(Source(path=str(path))))]
    trained = _trained_on(session)
    kept = [text for text in found if _mark(text) not in trained]
    if not kept:
        raise DataError(
            f"perplexity: all {len(found)} documents under {folder} are trained on by this "
            f"recipe. Add others as text/NAME.txt."
        )
    if len(kept) < len(found):
        session.tell(f"perplexity: {len(found) - len(kept)} documents are trained on and left out")
    return spread_out(kept, count)


def measures(engine: Engine, texts: list[str]) -> Measures:
    """Perplexity a token, and bits a byte, which two tokenizers can be compared by."""
    rows: list[Row] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        windows = text_windows(engine.backbone.format.text_ids(text, end=False), engine.max_length)
        rows += windows
        owners += [number] * len(windows)
    found: Measures = {"perplexity": {}, "bits_per_byte": {}}
    for arm, scored in engine.loglikelihoods(rows).items():
        nats, tokens = [0.0] * len(texts), [0] * len(texts)
        for number, row, (logprob, _) in zip(owners, rows, scored, strict=True):
            nats[number] -= logprob
            tokens[number] += len(row[1])
        # Of documents alone that have a token to predict.
        live = [i for i, count in enumerate(tokens) if count]
        bits = [nats[i] / math.log(2.0) for i in live]
        sizes = [float(len(texts[i].encode())) for i in live]
        found["perplexity"][arm] = perplexity_of([nats[i] for i in live], [tokens[i] for i in live])
        found["bits_per_byte"][arm] = Observed(bits, sizes)
    return found


def text_windows(ids: list[int], length: int) -> list[Row]:
    """A document in windows of a model's length; each token but the first is predicted once.

    The last window reads as far back as it can, so that its tokens have the longest context.
    """
    rows: list[Row] = []
    done = 1
    while done < len(ids):
        end = min(done + length, len(ids))
        start = max(0, end - length - 1)
        rows.append((ids[start:done], ids[done:end]))
        done = end
    return rows


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    kinds = (".txt", ".jsonl")
    return [p for n in _FOLDERS for p in sorted((folder / n).glob("*")) if p.suffix in kinds]


def _trained_on(session: Session) -> set[str]:
    """Marks of the texts of the ptx mix and of the demonstrations."""
    data = session.recipe.data
    found: set[str] = set()
    if data.text is not None and data.text.builtin is None:
        found |= {_mark(record.text) for record in require(load_text(data.text))}
    if data.demonstrations is not None:
        train, _ = split_demonstrations(session)
        found |= {_mark(prompt_text(d.prompt) + d.response) for d in train}
    return found


def _mark(text: str) -> str:
    return " ".join(text.split())[:_SAME]
