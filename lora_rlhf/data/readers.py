"""Files and hub data sets -> rows with their line numbers.

Text formats are read here rather than by `datasets`, which gives no line of a fault and makes one
type of each column; Parquet and the hub go through `datasets`.
"""

import csv
import gzip
import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lora_rlhf.data.problems import BadRow, UselessRow
from lora_rlhf.errors import PreferenceError
from lora_rlhf.recipe import Source, is_store

Row = dict[str, Any]
Numbered = tuple[int, Row | BadRow | UselessRow]
FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_NOT_JSON = "invalid JSON"
_A_LINE = "one JSON object a line"
_A_LIST = 'a list of JSON objects, {"data": [...]} with such a list, or one object a line'
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_CELL = 2**27
OF_APP = "on a prompt that the app holds out"
"""Why a store's row is left out unless `Source.heldout`."""
_GAP = re.compile(r"[\s,]*")  # between two items of a JSON list


class Unreachable(Exception):
    """A hub data set that cannot be had now: no network, or offline by choice."""


def read_rows(source: Source) -> Iterator[Numbered]:
    """(line, row) of a path or hub source, at most `source.limit`; a BadRow where none is readable.

    A .txt file gives {"text": ...} a document, a store of rankings a judgement; of a prompt that
    the app holds out, only with `source.heldout`. Line 0 stands for the file as a whole; a BadRow
    there is the last item.

    Raises:
        Unreachable: a hub data set, without a network.
    """
    rows = _hub_rows(source) if source.path is None else _file_rows(source, source.path)
    some = False
    for item in islice(rows, source.limit):
        some = True
        yield item
    if not some:
        yield 0, BadRow("empty file", "no rows: the file is empty", "at least one row")


def name_of(source: Source) -> str:
    """Path, hub id or builtin name, for messages."""
    return source.path or source.hub or f"builtin:{source.builtin}"


# -- files --------------------------------------------------------------------------------------


def _file_rows(source: Source, name: str) -> Iterator[Numbered]:
    if is_store(name):
        yield from _store_rows(name, source.heldout)
        return
    path = Path(name).expanduser()
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[:-1][-1:] if packed else suffixes[-1:])
    if not path.is_file():
        yield 0, _no_file(path)
    elif kind not in FORMATS:
        found = f"the name ends in {kind or 'no extension'}{' before .gz' if packed else ''}"
        allowed = f"{', '.join(FORMATS)}, each also with .gz; .db of a store of rankings"
        yield 0, BadRow("unknown format", found, allowed)
    elif kind == ".parquet":
        yield from _parquet_rows(path, packed)
    else:
        yield from _guarded(path, packed, kind, source.separator)


def _guarded(path: Path, packed: bool, kind: str, separator: str | None) -> Iterator[Numbered]:
    """Rows of a text format; what cannot be decompressed or read is a BadRow."""
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            if kind == ".jsonl":
                yield from _json_lines(file)
                return
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        yield 0, BadRow("not readable", f"it cannot be read ({error})", "a readable, whole file")
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield raw[: error.start].count(b"\n") + 1, _not_utf8(error)
        return
    if kind == ".txt":
        yield from _documents(text, separator or "\n")
    else:
        yield from (_json_rows if kind == ".json" else _csv_rows)(text)


def _no_file(path: Path) -> BadRow:
    kinds = set(path.suffixes) & set(FORMATS) or set(FORMATS)
    beside = sorted(p.name for p in path.parent.glob("*") if set(p.suffixes) & kinds)
    holds = f"; {path.parent} holds {', '.join(beside[:5])}" if beside else ""
    found = "this is a directory" if path.is_dir() else f"there is no {path.absolute()}"
    return BadRow("no such file", found, f"an existing file{holds}")


def _not_utf8(error: UnicodeDecodeError) -> BadRow:
    raw, start = error.object, error.start
    column = start - (raw.rfind(b"\n", 0, start) + 1) + 1
    looks = "; it looks like UTF-16" if raw.startswith(_UTF16) else ""
    return BadRow(
        "wrong encoding",
        f"byte 0x{raw[start]:02x} at column {column} is not UTF-8{looks}",
        "UTF-8 text (to convert: iconv -f latin1 -t utf-8)",
    )


def _json_lines(lines: Iterable[bytes]) -> Iterator[Numbered]:
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, _not_utf8(error)
            if raw.startswith(_UTF16):
                return  # every other line would be one more of the same fault
            continue
        if line:
            yield number, _json_line(line)


def _json_line(line: str) -> Row | BadRow:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(_NOT_JSON, f"no valid JSON at column {error.colno} ({error.msg})", _A_LINE)
    return row if isinstance(row, dict) else BadRow(_NOT_JSON, f"JSON {_type(row)}", _A_LINE)


def _json_rows(text: str) -> Iterator[Numbered]:
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # one object a line
            yield from _json_lines(line.encode() for line in text.split("\n"))
            return
        found = f"no valid JSON at column {error.colno} ({error.msg})"
        yield error.lineno, BadRow(_NOT_JSON, found, _A_LIST)
        return
    start = text.find("[")
    if isinstance(whole, dict):
        whole, start = _wrapped(whole, text)
    if not isinstance(whole, list):
        yield 1, BadRow(_NOT_JSON, f"JSON {_type(whole)}", _A_LIST)
        return
    for line, row in zip(_lines_of_items(text, start), whole, strict=False):
        if isinstance(row, dict):
            yield line, row
        else:
            yield line, BadRow(_NOT_JSON, f"JSON {_type(row)} in the list", "JSON objects")


def _wrapped(whole: Row, text: str) -> tuple[Any, int]:
    """The list in {"data": [...]} and where it starts; a lone object is a list of one."""
    found = re.search(r'"data"\s*:\s*\[', text)
    if isinstance(whole.get("data"), list) and found is not None:
        return whole["data"], found.end() - 1
    return [whole], -1


def _lines_of_items(text: str, start: int) -> Iterator[int]:
    """Line on which each item of a valid JSON list begins; `start` is where its bracket stands."""
    decoder, position, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        gap = _GAP.match(text, position)
        assert gap is not None
        position = gap.end()
        if position >= len(text) or text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        yield line
        _, position = decoder.raw_decode(text, position)


def _csv_rows(text: str) -> Iterator[Numbered]:
    csv.field_size_limit(_LONGEST_CELL)  # the default refuses documents over 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = f"no valid CSV ({error})"
            yield line, BadRow("invalid CSV", found, "cells in double quotes, quotes doubled")
            return
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        else:
            found = f"a row of {len(cells)} cells"
            yield line, BadRow("invalid CSV", found, f"{len(header)} cells, as the header has")


def _documents(text: str, separator: str) -> Iterator[Numbered]:
    line = 1
    for document in text.split(separator):
        if document.strip():
            above = document[: len(document) - len(document.lstrip())].count("\n")
            yield line + above, {"text": document.strip()}
        line += (document + separator).count("\n")


def _parquet_rows(path: Path, packed: bool) -> Iterator[Numbered]:
    if packed:  # Parquet is read from its end, which a stream of .gz cannot give
        with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
            try:
                plain.write(gzip.decompress(path.read_bytes()))
            except (OSError, EOFError, zlib.error) as error:
                yield 0, BadRow("not readable", f"it cannot be unpacked ({error})", "a whole .gz")
                return
            plain.flush()
            yield from _parquet_rows(Path(plain.name), packed=False)
        return
    from datasets import load_dataset

    try:
        # Streaming reads the file itself; otherwise a copy stays in the cache for good.
        found = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(found, 1)
    except ValueError as error:  # pyarrow's own error is one
        yield 0, BadRow("not readable", f"no valid Parquet ({_first_line(error)})", "a whole file")


# -- a store of rankings ------------------------------------------------------------------------


def _store_rows(location: str, heldout: bool) -> Iterator[Numbered]:
    """A row for each judgement that orders answers; the others say why they do not."""
    from lora_rlhf.preferences.rows import heldout_prompts, ranking_row, why_no_order
    from lora_rlhf.preferences.store import Store

    try:
        with Store.open(location, create=False, read_only=True) as store:
            unseen = set() if heldout else heldout_prompts(store)
            for judged in store.each_judged(retracted=True):
                reason = "retracted" if judged.retracted else why_no_order(judged)
                if reason is None and judged.task.prompt_sha256 in unseen:
                    reason = OF_APP
                yield judged.seq, UselessRow(reason) if reason else ranking_row(judged)
    except PreferenceError as error:
        found = str(error).removeprefix(str(Path(location).expanduser())).lstrip(": ")
        yield 0, BadRow("store of rankings", found, "a store that the app or an import has written")


# -- the hub ------------------------------------------------------------------------------------


def _hub_rows(source: Source) -> Iterator[Numbered]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    assert source.hub is not None
    try:
        rows = load_dataset(source.hub, source.name, split=source.split)
    except ConnectionError as error:
        raise Unreachable(
            f"{source.hub} cannot be reached on the hub ({_first_line(error)}). Check the network; "
            f"or download it elsewhere and give the file: path instead of hub."
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        found = f"it cannot be loaded from the hub ({_first_line(error)})"
        allowed = f"an id, name (found: {source.name}) and split (found: {source.split}) that exist"
        yield 0, BadRow("hub data set", found, allowed)
        return
    yield from enumerate(rows, 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _type(value: Any) -> str:
    names = {list: "list", str: "text", bool: "true or false", dict: "object", type(None): "null"}
    return names.get(type(value), "number")
