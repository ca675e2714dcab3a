"""From forty rankings to adapters that can be chosen, in one page and without a restart."""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.runs import write_atomically
from lora_rlhf.training.reward_report import coin_warning
from tests.preferences.making import task, vote
from tests.small_run import small_run
from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor
from tests.ui.browser.serving import InLine, Served, serve
from tests.ui.training import base_run
from ui.engine import StudioEngine
from ui.people import Person
from ui.ranking import Sheet, next_sheet, plan_of, submit
from ui.retrain_views import FORCE

pytestmark = [pytest.mark.ui, pytest.mark.slow]

VOTES = 40
# As little training as there can be: what is learnt is the business of other tests.
SETTINGS = "reward.epochs=1 reward.normalize_on=none ppo.steps=2 ppo.value_warmup_steps=0"
RECIPE = (
    "data.demonstrations.limit=120",
    "data.max_response_tokens=96",
    "rank={judge: 'builtin:gold'}",
    "reward.batch_size=8",
    "ppo.batch_size=4",
    "ppo.minibatch_size=4",
)
MINUTES = 3


@pytest.fixture
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real engine on a run whose recipe can be trained again."""
    folder = tmp_path_factory.mktemp("trainable")
    run = small_run(folder / "runs" / "quick", roles=("sft", "reward", "policy"))
    recipe = load_recipe(str(run.path / "recipe.yaml"), RECIPE)
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    with serve(StudioEngine([run]).start(), folder) as served:
        served.engine.ready()
        yield served


def rank(served: Served, me: Visitor, count: int) -> None:
    """As the Rank tab does, by somebody who reads fast and does not care."""
    person, dice = Person(me.name, True, "s"), random.Random(0)
    plan = plan_of(served.studio, person, ["quick/policy", "quick/sft"], 4, 1.0, 1.0, 12)
    sheet = Sheet()
    for _ in range(count):
        *_, sheet = next_sheet(served.studio, person, plan, sheet)
        letters = [answer["letter"] for answer in sheet.answers]
        dice.shuffle(letters)
        order = [[letter] for letter in letters]
        sheet = submit(
            served.studio, person, sheet, {"order": order, "outcome": "decided", "ms": 60_000}
        )


# Stands for `lora-rlhf run`: loads something with a bar, and refuses a weak reward model.
REFUSES = """
import json, os, pathlib, sys
run, error = pathlib.Path(sys.argv[1]), sys.argv[2]
for loaded in range(0, 101, 10):
    print(f"Loading weights: {loaded}%", end="\\r", flush=True)
print("\\nThe reward model is trained.", flush=True)
facts = {"state": "failed", "stage": "ppo", "step": 0, "total": 1, "pid": os.getpid(), "time": 0}
(run / "status.json").write_text(json.dumps(facts | {"error": error}))
sys.exit(2)
"""


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The fake engine on a run that can be trained from, and a training that refuses."""
    script, run = tmp_path / "training.py", tmp_path / "runs" / "quick"
    script.write_text(REFUSES)
    base_run(run)
    error = coin_warning({"accuracy": 0.5, "accuracy_ci": [0.4, 0.6]})
    line = [sys.executable, str(script)]
    monkeypatch.setattr("ui.jobs.command", lambda run, only, force: [*line, str(run), error])
    with serve(InLine(run=run), tmp_path) as served:
        yield served


def test_what_is_refused_is_said_on_the_page_in_its_own_words(
    refusing: Served, visit: Visit
) -> None:
    store = refusing.studio.store
    for i in range(3):
        made = task(prompt=f"prompt {i}", prompt_source=f"pool:train#{i}")
        store.add_many([made, vote(made, client_ms=1)])
    me = visit(refusing, tab="Retrain")
    plan = me.at("#train-plan")
    for button in ("#train-dry", "#train-start"):
        me.at(button).click()
        expect(plan.get_by_role("alert")).to_contain_text("Rank answers to 4 more.")
        left_out = plan.get_by_role("row", name="Left out")
        expect(left_out).to_contain_text("3 faster than anybody reads")
        expect(me.at("#train-yes")).to_be_hidden()
        me.tab("Votes")
        me.tab("Retrain")
    for i in range(3, 23):
        made = task(prompt=f"prompt {i}", prompt_source=f"pool:train#{i}")
        store.add_many([made, vote(made)])
    me.at("#train-start").click()
    expect(plan).to_contain_text("20 judgements of 20 prompts")
    expect(plan.get_by_role("alert")).to_have_count(0)
    me.at("#train-yes").click()
    status = me.at("#train-status")
    expect(status).to_contain_text(f"tick '{FORCE}' under More and press Go on with it.")
    assert not re.search("--|exit code|resume", status.inner_text())
    me.page.get_by_role("button", name="More").click()
    expect(me.page.get_by_role("checkbox", name=FORCE)).to_be_visible()
    expect(me.page.get_by_role("button", name="Go on with it", exact=True)).to_be_visible()
    log = me.at("#train-log textarea")
    expect(log).to_have_value("Loading weights: 100%\nThe reward model is trained.\n")


def test_from_forty_rankings_to_a_new_adapter_in_the_picker(
    trainable: Served, visit: Visit
) -> None:
    me = visit(trainable)
    rank(trainable, me, VOTES)
    assert trainable.engine.answerers() == ["base", "quick/sft", "quick/policy"]
    me.tab("Retrain")
    me.at("#train-more").get_by_role("button").click()
    me.at("#train-force").get_by_role("checkbox").check()
    me.at("#train-overrides textarea").fill(SETTINGS)
    me.at("#train-start").click()
    expect(me.at("#train-plan")).to_contain_text(str(VOTES))
    expect(me.at("#train-yes")).to_be_in_viewport()  # below the plan, which is long
    expect(me.at("#train-yes")).to_be_focused()
    me.at("#train-yes").click()
    expect(me.at("#train-cancel")).to_be_visible()
    expect(me.at("#train-adopt")).to_be_visible(timeout=MINUTES * 60_000)
    me.at("#train-adopt").click()
    expect(me.at("#train-status")).to_contain_text("quick-2")
    me.tab("Chat")
    me.at("#chat-adapter input").click()
    me.page.get_by_role("option", name="quick-2/policy").click()
    me.chat("Please describe a telescope.")
    expect(me.at("#chat-status")).to_contain_text("quick-2/policy")
    me.page.get_by_role("button", name="Like", exact=True).click()
    liked = me.wait_for_votes(VOTES + 1)[-1]
    assert liked.task.responses[0].adapter == "quick-2/policy"
    assert liked.task.responses[0].rm_adapter == "quick-2/reward"
