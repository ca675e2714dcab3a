"""What the store does for a person grows with their votes and no faster, on both databases."""

from collections.abc import Callable, Iterator

from sqlalchemy import event

from lora_rlhf.preferences.store import Store
from tests.preferences.making import task, vote

FEW, MANY = 50, 200


def test_work_grows_with_the_votes_and_no_faster(store):
    """Without statistics PostgreSQL once compared all with all: seconds for a thousand votes."""
    work: dict[int, dict[str, int]] = {}
    for number in (FEW, MANY):
        while store.counts()["live"] < number:
            made = [task() for _ in range(50)]
            store.add_many([e for shown in made for e in (shown, vote(shown))])
        calls: dict[str, Callable[[], object]] = {
            "open_task": lambda: store.open_task("ana", "pair"),
            "judged": store.judged,
            "judged_prompts": lambda: store.judged_prompts("ana"),
            "last": lambda: store.last("ana"),
            "version": store.version,
        }
        work[number] = {name: measured(store, call) for name, call in calls.items()}
    for name in work[FEW]:
        least, most = work[FEW][name], work[MANY][name]
        assert most < 1.5 * MANY / FEW * least, (name, work)
    assert work[MANY]["version"] < 50
    if "://" not in store.location:
        assert work[MANY]["last"] < 200, "the newest is found without reading all"


def measured(store: Store, call: Callable[[], object]) -> int:
    call()  # whatever is done once
    return (_rows_of_server if "://" in store.location else _steps_of_sqlite)(store, call)


def _steps_of_sqlite(store: Store, call: Callable[[], object]) -> int:
    """Steps of its machine."""
    counted = [0]

    def count() -> int:
        counted[0] += 1
        return 0

    with store._database.alone() as driver:
        driver.set_progress_handler(count, 1)
    call()
    with store._database.alone() as driver:
        driver.set_progress_handler(None, 1)
    assert counted[0] > 0, "it was another connection"
    return counted[0]


def _rows_of_server(store: Store, call: Callable[[], object]) -> int:
    """Rows that the nodes of its plans have handled, rejected ones too."""
    handled = [1]

    def explain(connection, cursor, statement, parameters, context, many) -> None:
        if statement.startswith("SELECT"):
            with connection.connection.driver_connection.cursor() as other:
                other.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
                handled[0] += sum(map(_rows, _nodes(other.fetchone()[0][0]["Plan"])))

    engine = store._database.engine
    event.listen(engine, "before_cursor_execute", explain)
    call()
    event.remove(engine, "before_cursor_execute", explain)
    return handled[0]


def _nodes(plan: dict) -> Iterator[dict]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from _nodes(inner)


def _rows(node: dict) -> int:
    rejected = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
    return int(node["Actual Loops"] * (node["Actual Rows"] + rejected))
