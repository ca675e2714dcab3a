"""Debian's Chromium on the app: one browser, three servers, a fresh context for every person."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.conftest import CHROMIUM
from tests.ui.browser.people import Heard, Visitor
from tests.ui.browser.serving import PASSWORDS, InLine, Served, serve
from ui.server import prepare_environment
from ui.users import add_user

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 40_000  # of every wait; the machine may be shared
_WATCH = """
window.__violations = [];
document.addEventListener('securitypolicyviolation', (event) =>
  window.__violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


# For the package and not the session: while Playwright's loop is there, no test can start its own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One Chromium for all."""
    assert CHROMIUM, "LORA_RLHF_REQUIRE_SERVICES=1 is set, and there is no Chromium on the PATH"
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


# -- servers ------------------------------------------------------------------------------------


@pytest.fixture(scope="package", autouse=True)
def _environment() -> None:
    prepare_environment()


@pytest.fixture(scope="package")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A fast fake engine, for whoever opens the page."""
    with serve(InLine(), tmp_path_factory.mktemp("fake")) as served:
        yield served


@pytest.fixture
def fake(fake_server: Served) -> Iterator[Served]:
    """As `fake_server`, as fast as it was whatever a test makes of it."""
    yield fake_server
    fake_server.engine.seconds_a_word, fake_server.engine.words = 0.0, 12


@pytest.fixture(scope="package")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real engine on builtin:tiny, with adapters that are random."""
    from tests.small_run import small_run
    from ui.engine import StudioEngine

    folder = tmp_path_factory.mktemp("real")
    run = small_run(folder / "runs" / "small", roles=("sft", "reward", "policy"))
    recipe = run.path / "recipe.yaml"
    longer = recipe.read_text().replace("max_response_tokens: 12", "max_response_tokens: 120")
    recipe.write_text(longer)
    with serve(StudioEngine([run]).start(), folder) as served:
        served.engine.ready()
        yield served


@pytest.fixture(scope="package")
def login_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As `fake_server`, for ana, the admin, and ben, who labels."""
    folder = tmp_path_factory.mktemp("login")
    users = folder / "users"
    for name, password in PASSWORDS.items():
        add_user(users, name, password, admin=name == "ana")
    with serve(InLine(), folder, users=users) as served:
        yield served


@pytest.fixture
def logins(login_server: Served) -> Iterator[Served]:
    """As `login_server`, as fast as it was whatever a test makes of it."""
    yield login_server
    login_server.engine.seconds_a_word, login_server.engine.words = 0.0, 12


# -- people -------------------------------------------------------------------------------------


Visit = Callable[..., Visitor]
PASSED = pytest.StashKey[bool]()


def enter(browser: Browser, served: Served, who: str = "", **context: Any) -> Visitor:
    """A browser of somebody's own, without a page in it yet."""
    context.setdefault("viewport", {"width": 1280, "height": 900})
    fresh = browser.new_context(base_url=served.url, **context)
    fresh.set_default_timeout(PATIENCE_MS)
    fresh.add_init_script(_WATCH)
    heard = Heard()
    heard.listen(fresh)
    if who:
        answer = fresh.request.post("login", form={"username": who, "password": PASSWORDS[who]})
        assert answer.ok, answer.text()
    return Visitor(fresh.new_page(), heard, served, since=served.studio.store.version())


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens the page for somebody new; at the end no page may have had an error."""
    visitors: list[Visitor] = []

    def open_page(served: Served, tab: str = "", query: str = "/", **settings: Any) -> Visitor:
        visitor = enter(browser, served, **settings)
        visitors.append(visitor)
        visitor.open(query)
        if tab:
            visitor.tab(tab)
        return visitor

    yield open_page
    problems = [visitor.problems() for visitor in visitors]
    for visitor in visitors:
        visitor.context.close()
    assert not any(problems), problems


@pytest.fixture(scope="package")
def _regular(browser: Browser, fake_server: Served) -> Iterator[list[Visitor]]:
    kept: list[Visitor] = []
    yield kept
    for visitor in kept:
        visitor.context.close()


@pytest.fixture
def me(
    request: pytest.FixtureRequest, browser: Browser, fake: Served, _regular: list[Visitor]
) -> Iterator[Visitor]:
    """Somebody whose page on the fake engine stays open from test to test: opening takes long.

    After a failure the next test gets somebody new.
    """
    if not _regular:
        _regular.append(enter(browser, fake))
        _regular[0].open()
    visitor = _regular[0]
    visitor.since = fake.studio.store.version()
    yield visitor
    problems = visitor.problems()
    if problems or not request.node.stash.get(PASSED, False):
        _regular.clear()
        visitor.context.close()
    assert not problems


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A second try, which the summary names: browser and server share the machine with others."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Leave a word for `me` on how the test went."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report
