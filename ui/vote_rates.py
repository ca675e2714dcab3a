"""Win rates and how far to believe them, as HTML. Names of adapters are escaped here."""

from collections.abc import Mapping
from html import escape

from lora_rlhf.preferences.ratings import (
    BASE,
    Arm,
    HeatMap,
    Leaderboard,
    PairRate,
    Rate,
    votes_still_needed,
)
from lora_rlhf.results import percent
from ui.charts import interval, tone_of
from ui.vote_numbers import Numbers

ALL_OTHERS = ""  # reference of a win rate: every other arm, each as likely
_FINER = 0.55
_ENOUGH = 20  # observations below which a share is hardly worth a look

# Reasons of `ratings.why_not_counted`, as they go after a number.
_LEFT_OUT = {
    "imported": "imported",
    "a like": "likes",
    "skipped": "skipped",
    "unfinished answer": "on an unfinished answer",
    "a repeat": "repeats, which measure agreement",
    "actively chosen": "on prompts that were chosen actively",
    "not blind": "not blind",
    "scores were shown": "with scores in sight",
    "one adapter alone": "between answers of one adapter",
}


def plural(number: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


# -- win rates ------------------------------------------------------------------------------------


def references(board: Leaderboard) -> list[str]:
    """What win rates can be taken against."""
    return [ALL_OTHERS, *(arm.name for arm in board.arms)]


def usual_reference(board: Leaderboard) -> str:
    """What people ask first: against SFT, else against the base, else against all others."""
    names = [arm.name for arm in board.arms]
    wanted = [n for n in names if n.endswith("/sft")] + [n for n in names if n == BASE]
    return wanted[0] if wanted else ALL_OTHERS


def board_html(board: Leaderboard, reference: str) -> str:
    """Win rates with their intervals, and in words what they say.

    Args:
        board: of the judgements.
        reference: one of `references`.
    """
    if not board.counted:
        return f"{_nothing_counts()}{_left_out(board)}"
    if reference == ALL_OTHERS:
        rows = "".join(_arm_row(arm, board) for arm in board.arms)
    else:
        found = {_other(p, reference): p for p in board.pairs if reference in (p.a, p.b)}
        rows = "".join(
            _pair_row(arm.name, reference, found.get(arm.name), board)
            for arm in board.arms
            if arm.name != reference
        )
    against = "any other adapter" if reference == ALL_OTHERS else reference
    return (
        f'<p class="lr-soft">How often each wins against <b>{escape(against)}</b>: Bradley-Terry, '
        "95% interval over prompts; the dashed line is 50%.</p>"
        f"{_rate_table('lr-board', ('adapter', 'wins', 'decided votes'), rows)}"
        f"{_left_out(board)}{_warnings(board)}"
    )


def _rate_table(kind: str, heads: tuple[str, str, str], rows: str) -> str:
    what, share, number = heads
    return (
        f'<table class="lr-table {kind}"><thead><tr><th scope="col">{what}</th>'
        f'<th scope="col">{share}</th><th scope="col">interval, from 0 to 100%</th>'
        f'<th scope="col" class="lr-number">{number}</th><th scope="col">in words</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _other(pair: PairRate, name: str) -> str:
    return pair.b if pair.a == name else pair.a


def _arm_row(arm: Arm, board: Leaderboard) -> str:
    if arm.rate.share is None:
        words = "never met another adapter in a decided vote"
    else:
        words = {
            "above": "above the average of the others",
            "below": "below the average of the others",
            "even": "cannot be told from the average yet",
        }[tone_of(arm.rate.low, arm.rate.high)]
    if arm.ties or arm.both_bad:
        words += f"; {plural(arm.ties, 'tie')}, {arm.both_bad:,} both bad"
    return _board_row(arm.name, arm.rate, f"{arm.votes:,}", words)


def _pair_row(name: str, reference: str, pair: PairRate | None, board: Leaderboard) -> str:
    if pair is None:
        together = any({name, reference} <= set(group) for group in board.groups)
        words = "never met it directly"
        words += ", only through others" if together else ", not through others either"
        return _board_row(name, Rate(None), "0", words)
    mine = pair.rate if pair.a == name else pair.rate.turned()
    votes = f"{pair.rate.count:,}"
    return _board_row(name, mine, votes, needed_words(mine, pair.needed))


def needed_words(rate: Rate, needed: int) -> str:
    """What a win rate says, and how many votes it still needs to say something.

    Args:
        rate: of direct comparisons.
        needed: decisive votes to tell 60% from 50%.
    """
    if rate.share is None:
        return f"no decided vote yet; about {plural(needed, 'vote')} tell 60% from 50%"
    tone = tone_of(rate.low, rate.high)
    if tone != "even":
        few = ", on few votes" if rate.count < _ENOUGH else ": no more votes needed to say so"
        return ("better" if tone == "above" else "worse") + few
    if needed:
        return f"cannot be told apart yet: about {needed:,} more decisive votes tell 60% from 50%"
    finer = votes_still_needed(rate.count, _FINER)
    more = f"; about {finer:,} more tell {percent(_FINER)} from 50%" if finer else ""
    return f"no difference as large as 60%{more}"


def _board_row(name: str, rate: Rate, votes: str, words: str) -> str:
    share = bar = ""
    if rate.share is not None:
        share = f"<b>{percent(rate.share)}</b>"
        bar = interval(rate.share, rate.low, rate.high, name)
        bar += f'<span class="lr-range">{percent(rate.low)} to {percent(rate.high)}</span>'
    return (
        f'<tr><th scope="row">{escape(name)}</th><td>{share}</td><td>{bar}</td>'
        f'<td class="lr-number">{votes}</td><td class="lr-soft">{escape(words)}</td></tr>'
    )


def _nothing_counts() -> str:
    return (
        '<div class="lr-empty"><h3>No vote counts for a win rate yet</h3><p>Only blind votes '
        "between different adapters, on prompts that chance chose, say something unbiased. "
        "<b>Compare</b> with Blind on makes them.</p></div>"
    )


def _left_out(board: Leaderboard) -> str:
    total = board.counted + sum(board.left_out.values())
    reasons = sorted(board.left_out.items(), key=lambda item: (-item[1], item[0]))
    said = ", ".join(f"{n:,} {_LEFT_OUT.get(reason, reason)}" for reason, n in reasons)
    rest = f" Left out: {said}." if said else ""
    note = f"{board.counted:,} of {plural(total, 'judgement')} count.{rest}"
    return f'<p class="lr-note">{escape(note)}</p>'


def _warnings(board: Leaderboard) -> str:
    words = []
    if board.separated:
        words.append("Somebody never wins so far; such a rate is a cautious guess.")
    if len(board.groups) > 1:
        words.append("Not all adapters are connected by votes; compare rates within a group alone.")
    return f'<p class="lr-note"><b>Mind:</b> {escape(" ".join(words))}</p>' if words else ""


# -- how far to believe it ------------------------------------------------------------------------


def checks_html(numbers: Numbers) -> str:
    """Position bias and agreement, each with its interval and in words."""
    rows = [
        _check(
            "The first of two wins",
            numbers.bias,
            {
                "above": "a lean to the first",
                "below": "a lean to the second",
                "even": "no lean seen",
            },
            "no decided blind pair yet",
        ),
        _check(
            "Two people agree",
            numbers.people,
            _AGREEMENT,
            "nobody has judged what somebody else did; Rank hands some tasks to two people",
        ),
        _check(
            "A person agrees with themself",
            numbers.oneself,
            _AGREEMENT,
            "nobody was asked twice yet; Rank repeats some tasks in another order",
        ),
    ]
    for view, rate in numbers.reward.items():
        if rate.count or view == "blind":
            nothing = "no scored answers were ordered yet"
            rows.append(_check(f"The reward model agrees ({view})", rate, _AGREEMENT, nothing))
    return _rate_table("lr-checks", ("check", "share", "pairs"), "".join(rows))


_AGREEMENT = {
    "above": "more than chance",
    "below": "less than chance",
    "even": "not yet above chance",
}


def _check(name: str, rate: Rate, words: Mapping[str, str], nothing: str) -> str:
    if rate.share is None:
        return _board_row(name, rate, "0", nothing)
    said = words[tone_of(rate.low, rate.high)]
    if rate.count < _ENOUGH:
        said += ", on few pairs"
    return _board_row(name, rate, f"{rate.count:,}", said)


def heat_html(heat: HeatMap) -> str:
    """Who met whom: how often the row wins, and on how many votes; more votes are darker."""
    if len(heat.names) < 2:
        return '<p class="lr-note">Two adapters have to meet first.</p>'
    most = max(max(row) for row in heat.votes) or 1
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heat.names)
    rows = []
    for i, name in enumerate(heat.names):
        cells = "".join(
            _heat_cell(heat, i, j, most) if i != j else '<td class="lr-self">\u2013</td>'
            for j in range(len(heat.names))
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<p class="lr-soft">How often the row beats the column in decided votes; below it, all '
        'votes, ties too. More votes have more colour.</p><div class="lr-wide" tabindex="0">'
        '<table class="lr-table lr-heat" aria-label="Who met whom">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heat_cell(heat: HeatMap, i: int, j: int, most: int) -> str:
    votes, wins, losses = heat.votes[i][j], heat.wins[i][j], heat.wins[j][i]
    if not votes:
        return '<td><span class="lr-soft">never met</span></td>'
    share = percent(wins / (wins + losses)) if wins + losses else "ties"
    weight = f"{10 + 35 * votes / most:.0f}%"
    return (
        f'<td style="--lr-weight:{weight}"><b>{share}</b>'
        f'<span class="lr-soft">{plural(votes, "vote")}</span></td>'
    )
