"""Helpers of the tests of the Rank tab: a plan, a ranking as the page sends it, what was stored."""

from typing import Any

from lora_rlhf.preferences.events import Judgement, Task
from ui.ahead import Plan
from ui.people import Person
from ui.ranking import Sheet, next_sheet, plan_of
from ui.studio import Studio

POLICY, SFT = "quick/policy", "quick/sft"


def plan(studio: Studio, who: Person, answers: Any = 4, **more: Any) -> Plan:
    knobs = {"adapters": [POLICY, SFT], "temperature": 1.0, "top_p": 1.0, "length": 16} | more
    adapters, temperature, top_p, length = knobs.values()
    return plan_of(studio, who, adapters, answers, temperature, top_p, length)


def deal(
    studio: Studio, who: Person, before: Sheet | None = None, active: bool = False, **more: Any
) -> Sheet:
    """The next sheet of a person, waited for."""
    *_, last = next_sheet(studio, who, plan(studio, who, **more), before or Sheet(), active)
    return last


def letters(sheet: Sheet) -> list[list[str]]:
    return [[a["letter"]] for a in sheet.answers]


def decided(sheet: Sheet, order: Any = None, **more: Any) -> dict[str, Any]:
    return {"outcome": "decided", "order": order or letters(sheet), "ms": 4000, "keys": 5} | more


def task_of(studio: Studio, sheet: Sheet) -> Task:
    task = studio.store.task(sheet.task_id or "")
    assert task is not None
    return task


def votes(studio: Studio) -> list[Judgement]:
    return [j.judgement for j in studio.store.judged()]
