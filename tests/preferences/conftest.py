"""Stores on both databases: each test that takes `location` runs on either."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from lora_rlhf.preferences.store import Store
from tests.preferences.servers import server

_schemas = count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A server for the whole session; `location` makes a schema on it for each test."""
    with server() as url:
        yield url


@pytest.fixture
def server_location(postgres: str) -> str:
    """The URL of an empty schema: cheaper than a database."""
    schema = f"test{next(_schemas)}"
    admin = create_engine(postgres.replace("postgresql://", "postgresql+psycopg://"))
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    admin.dispose()
    return f"{postgres}&options=-csearch_path%3D{schema}"


@pytest.fixture(params=["sqlite", "postgres"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty store can be opened: a file, or a new schema of a real server."""
    if request.param == "sqlite":
        return str(tmp_path / "rankings.db")
    found: str = request.getfixturevalue("server_location")
    return found


@pytest.fixture
def store(location: str) -> Iterator[Store]:
    """An empty open store."""
    with Store.open(location) as opened:
        yield opened
