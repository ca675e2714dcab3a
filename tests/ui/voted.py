"""A store of judgements few enough to be counted by hand."""

from lora_rlhf.preferences.events import Sampler, Task
from tests.preferences.making import like, skip, task, vote
from ui.people import Person
from ui.studio import Studio
from ui.tabs.votes import take_back

SFT, POLICY = "quick/sft", "quick/policy"
TWO = (
    {"adapter": SFT, "rm_adapter": "quick/reward", "rm_score": 0.0},
    {"adapter": POLICY, "rm_adapter": "quick/reward", "rm_score": 1.0},
)
SFT_WINS = (["r0"], ["r1"])


def repeat(of: Task, who: str) -> Task:
    """The same answers, sides swapped."""
    places = {r.rid: 1 - r.pos for r in of.responses}
    return of.model_copy(
        update={
            "task_id": f"{of.task_id}-{who}",
            "annotator": who,
            "repeat_of": of.task_id,
            "sampler": Sampler(strategy="repeat"),
            "responses": tuple(r.model_copy(update={"pos": places[r.rid]}) for r in of.responses),
        }
    )


def fill(studio: Studio) -> Studio:
    """Fifteen judgements, one of them taken back; r0 is of SFT and stands first, r1 of the policy.

    Of eleven that could count: three decided (the policy wins two), a tie, both bad.
    """
    add = studio.store.add
    tasks = [task(TWO, prompt=f"prompt {i}") for i in range(9)]
    tasks[6] = tasks[6].model_copy(update={"blind": False})
    tasks[7] = tasks[7].model_copy(update={"sampler": Sampler(strategy="active", propensity=0.5)})
    for one in tasks:
        add(one)
    add(vote(tasks[0], client_ms=10_000, flags=("too_long", "harmful")))
    add(vote(tasks[1], client_ms=20_000))
    add(vote(tasks[2], *SFT_WINS, client_ms=60_000, flags=("too_long",)))
    add(vote(tasks[3], ["r0", "r1"], client_ms=30_000))
    add(vote(tasks[4], ["r0", "r1"], outcome="both_bad", client_ms=100, flags=("fast",)))
    add(skip(tasks[5], client_ms=10))
    add(vote(tasks[6], client_ms=20_000))
    add(vote(tasks[7], client_ms=20_000))
    add(vote(tasks[8], client_ms=20_000))
    take_back(studio, Person("ana", True, ""), studio.store.last("ana").judgement.id)
    for first, who, groups in ((0, "ben", ()), (2, "ana", ())):
        again = repeat(tasks[first], who)
        add(again)
        add(vote(again, *groups, client_ms=20_000))
    for up in (True, True, False):
        chat = task([{"adapter": POLICY}], annotator="ben", blind=False)
        add(chat)
        add(like(chat, up))
    return studio
