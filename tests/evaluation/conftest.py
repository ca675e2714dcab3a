"""One backbone with random adapters for all tests of evaluations."""

import pytest

from lora_rlhf.training.session import Session
from tests.evaluation.contests import run_to_evaluate, session_of


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Of a run called `first`; a test that writes into a run takes one of its own."""
    return session_of(run_to_evaluate(tmp_path_factory.mktemp("runs") / "first"))
