"""The report's win rates, rounds and held-out labelers."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from lora_rlhf.charts import span_bar
from lora_rlhf.report_parts import note, result_table, row, table
from lora_rlhf.results import Row, arm_name, judge_name, percent, reliability

Json = dict[str, Any]
_NEEDED = "prompts_needed_55"


def win_section(wins: Sequence[Json]) -> str:
    """Every comparison by every judge, best known first; "" where there is none."""
    parts = []
    judges = list(dict.fromkeys(win.get("judge", "") for win in wins))
    for judge in judges:
        own = [win for win in wins if win.get("judge", "") == judge]
        if judge:
            parts.append(f"<h3>Judge: {escape(judge_name(judge))}</h3>")
        parts.append(result_table([_win_row(win) for win in own]))
        parts += [note(sentence) for sentence in reliability(own, judge)]
    if not parts:
        return ""
    words = ["Ties count half."]
    needed = [win[_NEEDED] for win in wins if win.get(_NEEDED)]
    if needed:
        most = max(needed)
        words.append(f"To tell 55% from 50% in four of five tries takes {most} prompts.")
    if any(win.get("length_controlled") for win in wins):
        words.append("At equal lengths: what the win rate would be if answers were as long.")
    return "".join(parts) + note(" ".join(words))


def _win_row(win: Json) -> Row:
    low, high = win["ci"]
    name = f"{arm_name(win['a'])} vs {arm_name(win['b'])}"
    notes = [f"{win['prompts']} prompts"]
    if win.get("ties"):
        notes.append(f"{win['ties']} ties")
    even = win.get("length_controlled")
    if even:
        least, most = even["ci"]
        interval = f"{percent(least)} to {percent(most)}"
        notes.append(f"at equal lengths {percent(even['win_rate'])} ({interval})")
    share = f"{percent(win['win_rate'])} wins"
    return Row(name, share, (low, high), win["win_rate"], ", ".join(notes))


def rounds_section(rounds: Json) -> str:
    """All arms in one Bradley-Terry table, the strongest first; "" where there is none."""
    arms = sorted(rounds.get("arms", []), key=lambda arm: -arm["elo"])
    if not arms:
        return ""
    low, high = min(a["ci"][0] for a in arms), max(a["ci"][1] for a in arms)
    ends = (low, high) if high > low else (low - 1, high + 1)
    rows = []
    for arm in arms:
        least, most = arm["ci"]
        about = f"Elo {arm['elo']:.0f}, 95% interval {least:.0f} to {most:.0f}"
        bar = span_bar(arm["elo"], least, most, ends, about)
        words = f'<span class="range">{least:.0f} to {most:.0f}</span>'
        rows.append(row((escape(arm_name(arm["name"])), f"{arm['elo']:.0f}", bar + words, "")))
    judge = rounds.get("judge")
    words = f"Judge: {judge_name(judge)}. " if judge else ""
    words += "400 points more win ten times in eleven."
    return table(("", "Elo", "95% interval", ""), rows, "results") + note(words)


def labelers_section(labelers: Json) -> str:
    """Agreement within and across groups of people; "" where there is none."""
    parts = []
    for group in labelers.get("groups", []):
        parts.append(f"<h3>Held out: {escape(_people(group['annotators']))}</h3>")
        parts.append(result_table(list(_labeler_rows(group))))
    if not parts:
        return ""
    words = "Model: a reward model trained on the others' rankings, on prompts it has not seen."
    return "".join(parts) + note(words)


def _people(annotators: Any) -> str:
    return ", ".join(map(str, annotators)) if isinstance(annotators, list) else str(annotators)


def _labeler_rows(group: Json) -> Iterator[Row]:
    names = {
        "agreement_within": "agree among themselves",
        "agreement_across": "agree with the others",
        "own": "model, on those it knows",
        "others": "model, on the held out",
    }
    for key, name in names.items():
        share = group.get(key)
        if not share or share.get("value") is None:
            continue
        interval = (share["low"], share["high"])
        words = f"{share['n']} pairs" if share.get("n") else ""
        yield Row(name, percent(share["value"]), interval, share["value"], words)
