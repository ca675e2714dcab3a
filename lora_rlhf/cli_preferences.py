"""The commands `lora-rlhf preferences ...`: rankings in, out, counted and kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lora_rlhf.preferences.intervals import Rate
    from lora_rlhf.preferences.ratings import Leaderboard, PairRate
    from lora_rlhf.preferences.store import Judged, Store

EPILOG = (
    "Try:\n\nlora-rlhf preferences stats\n\nlora-rlhf preferences export pairs\n\n"
    "lora-rlhf preferences import hh-rlhf.jsonl.gz"
)
app = typer.Typer(
    help="People's rankings: import, export, count and keep them.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
)
StoreOption = Annotated[
    str, typer.Option("--store", metavar="PATH|URL", help="An SQLite file, or postgresql://...")
]
_DEFAULT = "rankings.db"
_FEW = 20  # votes under which nobody should look at a win rate


@app.command(
    "import",
    epilog="Try:\n\nlora-rlhf preferences import pairs.jsonl\n\n"
    "lora-rlhf preferences import hh-rlhf.jsonl.gz --annotator anthropic --store hh.db",
)
def import_(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Pairs, HH dialogues or rankings: .jsonl, .json, .csv, .parquet, also .gz.",
        ),
    ],
    store: StoreOption = _DEFAULT,
    annotator: Annotated[
        str, typer.Option(metavar="NAME", help="Who judged, where the file does not say so.")
    ] = "import",
) -> None:
    """Add the rankings of a file; what is there already is not added again."""
    from lora_rlhf import display
    from lora_rlhf.preferences.imports import import_file
    from lora_rlhf.preferences.store import Store

    console = _console()
    with Store.open(store) as opened:
        with display.progress(console, "import", 0) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done)

            found = import_file(opened, file, annotator, tell)
        known = found.rankings - found.new
        line = f"{found.new} rankings added to {opened.location}; {known} were there already."
    console.print(line, markup=False, soft_wrap=True)
    for reason, count in found.dropped.items():
        console.print(f"{count} rows dropped ({reason})", markup=False, soft_wrap=True)
    console.print(f"Train on them: data: {{rankings: {store}}}", markup=False, soft_wrap=True)


@app.command(
    epilog="Try:\n\nlora-rlhf preferences export\n\n"
    "lora-rlhf preferences export pairs rankings --to exports --keep non-blind --heldout 0.2"
)
def export(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND]...",
            help="pairs, rankings, battles, kto, leaderboard; unset: all.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = _DEFAULT,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = Path("exports"),
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILTER",
            help="Do not leave these out: retracted, unfinished, non-blind, too-fast, identical.",
        ),
    ] = None,
    heldout: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Of prompts, into pairs-eval.jsonl. What the app holds out stands in *-eval.jsonl "
            "in any case.",
        ),
    ] = 0.1,
    margin: Annotated[
        bool, typer.Option("--margin", help="A column margin in pairs: 1 for much better.")
    ] = False,
) -> None:
    """Write rankings as files for TRL and other tools, each with a manifest."""
    from lora_rlhf.errors import ConfigError
    from lora_rlhf.preferences.exports import EXPORTS, FILTERS
    from lora_rlhf.preferences.exports import export as write

    unknown = [k for k in keep or [] if k not in FILTERS]
    if unknown:
        raise ConfigError(f"--keep is {unknown[0]}. Allowed: {', '.join(FILTERS)}.")
    console = _console()
    filters = [f for f in FILTERS if f not in (keep or [])]
    with _read(store) as opened:
        for kind in kinds or EXPORTS:
            done = write(opened, kind, to, filters=filters, heldout_fraction=heldout, margin=margin)
            removed = {f: n["removed"] for f, n in done.manifest["filters"].items()}
            gone = {f: n for f, n in (removed | done.manifest["left_out"]).items() if n}
            without = f"; without {', '.join(f'{n} {f}' for f, n in gone.items())}" if gone else ""
            train, *others = done.manifest["files"]
            held = f", {others[0]['rows']} in {others[0]['name']}" if others else ""
            line = f"{done.files[0]}: {train['rows']} rows{held}{without}"
            console.print(line, markup=False, soft_wrap=True)


@app.command(epilog="Try:\n\nlora-rlhf preferences stats --store rankings.db")
def stats(store: StoreOption = _DEFAULT) -> None:
    """Show counts, win rates with intervals, agreement and bias."""
    from lora_rlhf.preferences import ratings

    console = _console()
    with _read(store) as opened:
        judged, counts = opened.judged(), opened.counts()
        location = opened.location
    console.print(_counts_line(location, judged, counts), markup=False, soft_wrap=True)
    if not judged:
        console.print("Rank answers in the app: lora-rlhf ui", markup=False)
        return
    board = ratings.leaderboard(judged)
    if board.pairs:
        console.print(_win_rates(board, console))
    quality = _quality(judged, console)
    if quality.row_count:
        console.print(quality)
    for line in _remarks(board):
        console.print(line, style="dim", markup=False, soft_wrap=True)


@app.command(epilog="Try:\n\nlora-rlhf preferences backup rankings-monday.db --store rankings.db")
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new SQLite file.")],
    store: StoreOption = _DEFAULT,
) -> None:
    """Write a consistent copy, while the app may go on."""
    with _read(store) as opened:
        sha256 = opened.snapshot(file)
        line = f"Wrote {file} (SHA-256 {sha256}); it can be used as a store: --store {file}"
    _console().print(line, markup=False, soft_wrap=True)


@app.command(epilog="Try:\n\nlora-rlhf preferences erase ana --store rankings.db")
def erase(
    annotator: Annotated[str, typer.Argument(metavar="NAME", help="Whose judgements.")],
    store: StoreOption = _DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove all judgements of a person for good; a trace with their number stays."""
    from lora_rlhf.preferences.store import Store

    with Store.open(store, create=False) as opened:
        found = len(opened.judged(annotator, retracted=True))
        if found and not yes:
            typer.confirm(f"Erase {found} judgements of {annotator} for good?", abort=True)
        count = opened.erase(annotator)
    line = f"{count} judgements of {annotator} erased. Backups and exports still hold them."
    if opened.owes_erasure:  # the last try was when it was closed
        line += (
            f" The text of erased judgements is still in the files of {opened.location}, because "
            f"somebody is reading them. It goes with the next vote, or when the store is next "
            f"opened: run this command again to see."
        )
    _console().print(line, markup=False, soft_wrap=True)


# -- parts --------------------------------------------------------------------------------------


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def _read(location: str) -> "Store":
    """Reads a store without touching it, unless its format must be brought up to date."""
    from lora_rlhf.preferences.faults import OldFormat
    from lora_rlhf.preferences.store import Store

    try:
        return Store.open(location, create=False, read_only=True)
    except OldFormat:
        return Store.open(location, create=False)


def _counts_line(location: str, judged: "list[Judged]", counts: dict[str, int]) -> str:
    from lora_rlhf.preferences.counting import is_too_fast

    fast = sum(is_too_fast(j.task, j.judgement) for j in judged)
    return (
        f"{location}: {counts['live']} judgements on {counts['tasks']} tasks; annotators: "
        f"{counts['annotators']}; retracted: {counts['retracted']}; faster than anybody reads: "
        f"{fast}"
    )


def _table(*headings: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        right = heading in ("wins", "won-lost-tied", "needed", "value", "n")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right)
    return table


def _win_rates(board: "Leaderboard", console: "Console") -> "Table":
    from rich.markup import escape

    table = _table("win rates", "wins", "95% interval", "won-lost-tied", "needed")
    for pair in map(_better_first, board.pairs):
        needed = f"{pair.needed} more" if pair.needed else "enough"
        table.add_row(
            escape(f"{pair.a} vs {pair.b}"),
            *_cells(pair.rate, console),
            f"{pair.wins}-{pair.losses}-{pair.ties + pair.both_bad}",
            needed,
        )
    return table


def _better_first(pair: "PairRate") -> "PairRate":
    """The same with the one that wins more as `a`, as people say it."""
    return pair.turned() if pair.rate.share is not None and pair.rate.share < 0.5 else pair


def _quality(judged: "list[Judged]", console: "Console") -> "Table":
    from lora_rlhf.preferences import ratings

    table = _table("judgements", "value", "95% interval", "n")
    rates = {
        "first answer wins": ratings.position_bias(judged),
        "annotators agree": ratings.annotator_agreement(judged),
        "same answer twice": ratings.self_consistency(judged),
        "reward model agrees": ratings.reward_agreement(judged),
    }
    for name, rate in rates.items():
        if rate.share is not None:
            table.add_row(name, *_cells(rate, console), str(rate.count))
    seconds = ratings.median_seconds(judged)
    if seconds is not None:
        table.add_row("median time", f"{seconds:.1f} s", "", "")
    return table


def _cells(rate: "Rate", console: "Console") -> "tuple[str, Text | str]":
    """The share in percent with its interval in figures, and the interval drawn."""
    from lora_rlhf import display
    from lora_rlhf.results import Row, percent

    if rate.share is None:
        return "", ""
    figures = f"{percent(rate.share)} ({100 * rate.low:.0f}-{100 * rate.high:.0f})"
    row = Row("", figures, (rate.low, rate.high), rate.share)
    return figures, display.interval_line(row, console)


def _remarks(board: "Leaderboard") -> list[str]:
    lines = [f"Win rates count {board.counted} judgements: uniform, blind, of finished answers."]
    if any(pair.needed for pair in board.pairs):
        lines.append("Needed: decisive votes that tell 60% from 50% four times out of five.")
    if board.left_out:
        reasons = ", ".join(f"{n} {reason}" for reason, n in board.left_out.items())
        lines.append(f"Left out of win rates: {reasons}.")
    if board.separated:
        lines.append("One side never wins: its rate is a cautious guess until it does.")
    if 0 < board.counted < _FEW:
        lines.append(f"Under {_FEW} votes the intervals say little. Rank more: lora-rlhf ui")
    return lines
