"""From forty rankings to adapters that can be chosen, in one page and without a restart."""

import random
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from lora_rlhf.recipe_io import dump_recipe, load_recipe
from lora_rlhf.runs import write_atomically
from tests.small_run import small_run
from tests.ui.browser.conftest import Visit
from tests.ui.browser.people import Visitor
from tests.ui.browser.serving import Served, serve
from ui.engine import StudioEngine
from ui.people import Person
from ui.ranking import Sheet, next_sheet, plan_of, submit

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
