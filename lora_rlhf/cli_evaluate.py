"""The command `lora-rlhf evaluate RUN`: is it better, by how much, and at what cost?"""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lora_rlhf.evaluating import Wanted
    from lora_rlhf.runs import Json

EPILOG = (
    "Try:\n\nlora-rlhf evaluate quickstart\n\n"
    "lora-rlhf evaluate quickstart --arms base,few_shot_3,sft,policy,best_of_16 --prompts 200\n\n"
    "lora-rlhf evaluate quickstart-2 --arms policy,before=runs/quickstart --judge builtin:gold\n\n"
    "lora-rlhf evaluate quickstart --judge openai:llama-3.3-70b@http://localhost:8000/v1\n\n"
    "lora-rlhf evaluate quickstart --judge human:rankings.db --json\n\n"
    "lora-rlhf evaluate quickstart --frontier 16\n\n"
    "lora-rlhf evaluate quickstart --arms sft,best_of_16 --reward reward --reward runs/other "
    "--rule worst\n\n"
    "lora-rlhf evaluate quickstart --suite public\n\n"
    "lora-rlhf evaluate quickstart --labelers rankings.db --groups 5"
)


RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run: its name, or its directory.")]
Arms = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ARM,...",
        help="base, sft, policy, few_shot_K, best_of_N[:ARM], ppo@STEP, the directory of an "
        "adapter or run; NAME=ARM. Unset: the recipe's.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        metavar="JUDGE",
        help="reward, builtin:gold, vader, package.module:function, human[:STORE], "
        "openai:MODEL[@URL]; repeatable. Unset: the recipe's.",
    ),
]
Reference = Annotated[
    str | None, typer.Option(metavar="ARM", help="Whom all are compared with; unset: sft.")
]
Prompts = Annotated[int | None, typer.Option(min=2, help="Held-out prompts; unset: the recipe's.")]
Suite = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Public sets instead of win rates: public, or a task."),
]
Data = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the files of public sets lie.")
]
Limit = Annotated[
    int | None, typer.Option(min=2, help="Most documents of a public set; unset: all.")
]
Labelers = Annotated[
    str | None,
    typer.Option(
        metavar="STORE",
        help="Train reward models without some of its annotators, and hold them against both.",
    ),
]
Groups = Annotated[int, typer.Option(min=2, help="Groups of annotators.")]
Frontier = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=2, max=64, help="Reward against KL: best-of-n up to N, and PPO's path."
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="DIR",
        help="A reward adapter, or a run, that scores and chooses the best of n; `reward` is the "
        "run's own; repeatable: an ensemble. Unset: the run's own.",
    ),
]
Rule = Annotated[
    str, typer.Option(help="Of an ensemble: mean, worst, or uncertainty (mean - variance / 2).")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")
]
RunsDir = Annotated[Path, typer.Option(help="Where runs lie.")]
Force = Annotated[
    bool, typer.Option("--force", help="Although another process seems to hold the run.")
]


def evaluate(
    ctx: typer.Context,
    run: RunName,
    arms: Arms = None,
    judge: Judges = None,
    reference: Reference = None,
    prompts: Prompts = None,
    suite: Suite = None,
    data: Data = None,
    limit: Limit = None,
    labelers: Labelers = None,
    groups: Groups = 5,
    frontier: Frontier = None,
    reward: Rewards = None,
    rule: Rule = "mean",
    as_json: AsJson = False,
    runs_dir: RunsDir = Path("runs"),
    force: Force = False,
) -> None:
    """Compare a run's adapters on held-out prompts, and look at what they forgot.

    Stopped, the same command goes on where it was.
    """
    from lora_rlhf.runs import find_run

    opened = find_run(run, runs_dir)
    ctx.meta["resume"] = shlex.join(["lora-rlhf", *sys.argv[1:]])
    from rich.console import Console

    from lora_rlhf.evaluating import Wanted, evaluate_run

    wanted = Wanted(
        arms=_texts(arms),
        judges=judge or (),
        reference=reference,
        prompts=prompts,
        suite=suite,
        suite_data=data,
        limit=limit,
        labelers=labelers,
        groups=groups,
        frontier=frontier,
        rewards=reward or (),
        rule=rule,
    )
    console = Console(stderr=as_json, highlight=False)
    found = evaluate_run(opened, wanted, console, force)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    _show(console, wanted, found)
    console.print(f"\nReport: {opened.path / 'report.html'}", markup=False, soft_wrap=True)


def _show(console: "Console", wanted: "Wanted", found: "Json") -> None:
    """Print what was asked for."""
    if wanted.win_rates:
        show_win_rates(console, found)
    if wanted.frontier is not None:
        show_frontier(console, found["frontier"])
    if wanted.suite is not None:
        from lora_rlhf.evaluation.suites.public import suite_table

        console.print(suite_table(found["suites"]))
    if wanted.labelers is not None:
        show_labelers(console, found["labelers"]["groups"])


def _texts(given: list[str] | None) -> list[str] | None:
    """Arms, given once with commas between them, or several times."""
    if not given:
        return None
    return [part.strip() for each in given for part in each.split(",") if part.strip()]


# -- tables -------------------------------------------------------------------------------------


def show_win_rates(console: "Console", found: "Json") -> None:
    """Print win rates, then all arms in one table of ratings."""
    from rich.markup import escape
    from rich.table import Table

    from lora_rlhf import display
    from lora_rlhf.results import Row, arm_name, judge_name, percent, reliability

    for judge in dict.fromkeys(win["judge"] for win in found["win_rates"]):
        console.print(f"\nby {judge_name(judge)}:", markup=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("win rates", ratio=1)
        table.add_column("wins", justify="right", no_wrap=True)
        for heading in ("95% interval", "same length", "n", "ties"):
            table.add_column(heading, justify="right", no_wrap=True)
        for win in (w for w in found["win_rates"] if w["judge"] == judge):
            low, high = win["ci"]
            fair = win["length_controlled"]
            table.add_row(
                escape(f"{arm_name(win['a'])} vs {arm_name(win['b'])}"),
                f"{percent(win['win_rate'])} ({100 * low:.0f}-{100 * high:.0f})",
                display.interval_line(Row("", "", (low, high), win["win_rate"]), console),
                percent(fair["win_rate"]) if fair else "",
                str(win["prompts"]),
                str(win["ties"]),
            )
        console.print(table)
        for sentence in reliability(found["win_rates"], judge):
            console.print(sentence, markup=False, soft_wrap=True)
    if not found["win_rates"]:
        console.print("Nobody has compared these arms yet: lora-rlhf ui", markup=False)
    needed = max((win["prompts_needed_55"] or 0 for win in found["win_rates"]), default=0)
    if needed:
        line = f"{needed} prompts tell 55% from 50% four times out of five."
        console.print(line, style="dim", markup=False)
    _show_rounds(console, found["rounds"]["arms"])


def _show_rounds(console: "Console", arms: "list[Json]") -> None:
    from rich.markup import escape
    from rich.table import Table

    from lora_rlhf.results import arm_name

    if not arms:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("all rounds", "Elo", "95% interval", "prompts"):
        table.add_column(heading, justify="left" if heading == "all rounds" else "right")
    for arm in arms:
        low, high = arm["ci"]
        name = escape(arm_name(arm["name"]))
        table.add_row(name, f"{arm['elo']:.0f}", f"{low:.0f} to {high:.0f}", str(arm["prompts"]))
    console.print(table)


def show_frontier(console: "Console", found: "Json") -> None:
    """Print the points of best-of-n and of PPO, and what the watch says."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("reward against distance", "KL", "score", "95% interval", "gold", "interval"):
        table.add_column(heading, justify="left" if "against" in heading else "right")
    for point in found["points"]:
        name = f"best of {point['n']}" if "n" in point else f"PPO, round {point['step']}"
        cells = [_with_interval(point[key], point[f"{key}_ci"]) for key in ("proxy", "gold")]
        table.add_row(name, f"{point['kl']:.2f}", *cells[0], *cells[1])
    console.print(table)
    for law, fits in found["fits"].items():
        for height, fit in fits.items():
            if fit is not None:
                line = f"{law}, {height}: alpha {fit['alpha']:.3f}, beta {fit['beta']:.3f}"
                line += f", R2 {fit['r2']:.3f} on {fit['points']} points"
                console.print(line, style="dim", markup=False)
    console.print(found["watch"]["sentence"], markup=False, soft_wrap=True)


def _with_interval(value: float | None, interval: "list[float] | None") -> tuple[str, str]:
    if value is None or interval is None:
        return "", ""
    return f"{value:.3f}", f"{interval[0]:.3f} to {interval[1]:.3f}"


def show_labelers(console: "Console", groups: "list[Json]") -> None:
    """Print what a reward model makes of people whom it has learned nothing from."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("held out", "pairs", "agree within", "across", "on its own", "on held out"):
        table.add_column(heading, justify="left" if heading == "held out" else "right")
    for row in groups:
        keys = ("agreement_within", "agreement_across", "own", "others")
        shares = [_share(row[key]) for key in keys]
        table.add_row(escape(", ".join(row["annotators"])), str(row["n"]), *shares)
    console.print(table)


def _share(share: "Json | None") -> str:
    if share is None:
        return ""
    return f"{100 * share['value']:.0f}% ({100 * share['low']:.0f}-{100 * share['high']:.0f})"
