"""All rounds of a project in one Bradley-Terry table.

A project is a directory of runs on one backbone. An arm that two of its evaluations share (the same
weights, shots and n) is one arm; where a judge gives each answer a utility, arms of different
evaluations are compared prompt by prompt as if they had met.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from lora_rlhf.preferences.bradley_terry import Comparison, fit
from lora_rlhf.preferences.counting import counts_for_win_rate, pairs_of
from lora_rlhf.preferences.intervals import quantile
from lora_rlhf.preferences.ratings import arm_key, arm_names
from lora_rlhf.preferences.store import Judged
from lora_rlhf.runs import Json, Run

FACTS = "evaluate/contest.jsonl"
ANSWERS = "evaluate/answers.jsonl"
COMPARISONS = "evaluate/comparisons.jsonl"
ELO_MEAN = 1000.0
ELO_A_NAT = 400 / math.log(10)
_SAME = ("fingerprint", "temperature", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class Met:
    """Two arms' answers to one prompt, and what the judge says.

    Attributes:
        a: an arm.
        b: another.
        value: 1 where a wins, 0 where b does, in between for ties.
        prompt: its key.
        weight: those of one ranking sum to 1.
    """

    a: str
    b: str
    value: float
    prompt: str
    weight: float = 1.0


def table(met: Sequence[Met], names: Mapping[str, str] | None = None) -> list[Json]:
    """Elo ratings with 95 % intervals, best first: 1000 is the mean of arms that met.

    elo = 1000 + 400 / ln 10 * strength. A tie is half a win for each. The covariance of the
    strengths is clustered by prompt, so that many arms on one prompt are not taken for many
    prompts; the interval is of the arm against that mean.

    Args:
        met: comparisons, in any order.
        names: of the arms, where they are to be called otherwise.

    Returns:
        name, elo, ci, prompts and comparisons of each arm; `group` numbers the sets of arms that
        nothing connects, whose ratings cannot be compared; `separated` where some side never wins.

    Source: of the fit, `bradley_terry.fit`; the Elo scale is that of ALGORITHMS.md 1c.
    """
    arms = sorted({m.a for m in met} | {m.b for m in met})
    place = {arm: i for i, arm in enumerate(arms)}
    comparisons = []
    for m in met:
        for winner, loser, share in ((m.a, m.b, m.value), (m.b, m.a, 1 - m.value)):
            if share > 0:
                weight = share * m.weight
                comparisons.append(Comparison(place[winner], place[loser], weight, m.prompt))
    prompts, count = _counts(met)
    rows = []
    for group, found in enumerate(fit(comparisons, len(arms))):
        z = quantile(found.clusters)
        for i, number in enumerate(found.arms):
            arm = arms[number]
            elo = ELO_MEAN + ELO_A_NAT * float(found.strengths[i])
            half = z * ELO_A_NAT * math.sqrt(max(float(found.covariance[i, i]), 0.0))
            rows.append(
                {
                    "name": (names or {}).get(arm, arm),
                    "elo": elo,
                    "ci": [elo - half, elo + half],
                    "prompts": len(prompts[arm]),
                    "comparisons": count[arm],
                    "group": group,
                    "separated": found.separated,
                }
            )
    return sorted(rows, key=lambda row: (row["group"], -row["elo"]))


def _counts(met: Sequence[Met]) -> tuple[dict[str, set[str]], dict[str, int]]:
    prompts: defaultdict[str, set[str]] = defaultdict(set)
    count: defaultdict[str, int] = defaultdict(int)
    for m in met:
        for arm in (m.a, m.b):
            prompts[arm].add(m.prompt)
            count[arm] += 1
    return prompts, count


# -- of utilities -------------------------------------------------------------------------------


def met_by_utility(answers: Iterable[tuple[str, str, float]]) -> list[Met]:
    """Every two arms on every prompt that both have answered.

    Args:
        answers: (arm, prompt, utility); the first of an arm and a prompt counts.
    """
    by_prompt: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for arm, prompt, utility in answers:
        by_prompt[prompt].setdefault(arm, utility)
    return [
        Met(a, b, 0.5 if x == y else float(x > y), prompt)
        for prompt, utilities in by_prompt.items()
        for (a, x), (b, y) in combinations(sorted(utilities.items()), 2)
    ]


def of_project(run: Run, judge: str) -> list[Json]:
    """The table of a run's evaluation and of those of the runs beside it that fit.

    They fit where backbone, temperature and length limit are the same and the same judge has
    judged. Arms of other runs are called RUN/NAME, and arms they share go by this run's names.

    Args:
        run: evaluated.
        judge: by its name; `reward` judges within a run alone, since each has its own.
    """
    names: dict[str, str] = {}
    answers: list[tuple[str, str, float]] = []
    met: list[Met] = []
    others = [] if judge == "reward" else _beside(run)
    for each in [run, *others]:
        prefix = "" if each is run else f"{each.name}/"
        for line in each.lines(ANSWERS):
            utility = line.get("utilities", {}).get(judge)
            if utility is not None and "identity" in line:
                names.setdefault(line["identity"], prefix + line["arm"])
                answers.append((line["identity"], line["prompt_key"], utility))
        for line in each.lines(COMPARISONS):
            same = line["a_identity"] == line["b_identity"]  # which says nothing of either
            if line["judge"] == judge and not same:
                for side in "ab":
                    names.setdefault(line[f"{side}_identity"], prefix + line[side])
                met.append(
                    Met(line["a_identity"], line["b_identity"], line["value"], line["prompt_key"])
                )
    return table([*met_by_utility(answers), *met], names)


def _beside(run: Run) -> list[Run]:
    """Runs in the same directory whose evaluation can be compared, by name."""
    mine = _facts(run)
    if mine is None:
        return []
    found = []
    for file in sorted(run.path.resolve().parent.glob(f"*/{FACTS}")):
        path = file.parents[1]
        if path == run.path.resolve():
            continue
        theirs = Run(path)
        if _facts(theirs) == mine:
            found.append(theirs)
    return found


def _facts(run: Run) -> Json | None:
    """What two evaluations must share; None where a kill has left no line of it."""
    lines = run.lines(FACTS)
    if not lines:
        return None
    line = lines[0]
    return {key: line.get(key) for key in _SAME}


# -- of votes -----------------------------------------------------------------------------------


def of_votes(judged: Sequence[Judged]) -> list[Json]:
    """The table of all adapters that people have compared, ties half.

    Judgements count that count for win rates. A ranking's pairs weigh as one vote together.
    """
    counted = [j for j in judged if counts_for_win_rate(j)]
    labels = arm_names({arm_key(r) for j in counted for r in j.task.responses})
    met = []
    for each in counted:
        strict, tied = pairs_of(each)
        who = {r.rid: labels[arm_key(r)] for r in each.task.responses}
        pairs = [(who[w], who[x], 1.0) for w, x in strict]
        pairs += [(who[x], who[y], 0.5) for x, y in tied]
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        prompt, weight = each.task.prompt_sha256, 1 / max(len(pairs), 1)
        met += [Met(a, b, value, prompt, weight) for a, b, value in pairs]
    return table(met)
