"""A PostgreSQL server of our own, on a socket in a temporary folder."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRED = "LORA_RLHF_REQUIRE_SERVICES"


def programs() -> Path | None:
    """The folder of initdb and postgres, or None."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "postgres").exists()), None)


def unavailable(reason: str) -> None:
    """Skip, or fail where services are required."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED}=1")
    pytest.skip(reason)


@contextmanager
def server() -> Iterator[str]:
    """URL of a running server; it is gone afterwards."""
    bin_folder = programs()
    if bin_folder is None:
        unavailable("no PostgreSQL server is installed (initdb, postgres)")
    assert bin_folder is not None
    # Short, since a socket's path has at most 107 characters; not pytest's, which is root's alone.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user = None
    if os.geteuid() == 0:  # the server refuses to run as root
        try:
            entry = pwd.getpwnam("postgres")
        except KeyError:
            shutil.rmtree(folder)
            unavailable("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        user = "postgres"
    data = folder / "data"

    def run(*command: str) -> None:
        subprocess.run(command, user=user, cwd=folder, check=True, timeout=60, capture_output=True)

    try:
        flags = ("--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale")
        run(str(bin_folder / "initdb"), "--no-sync", *flags, "-D", str(data))
        options = f"-c listen_addresses='' -k {folder} -c max_connections=60"
        log = str(folder / "log")
        start = (str(bin_folder / "pg_ctl"), "-D", str(data), "-l", log, "-o", options, "-w")
        run(*start, "start")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            run(str(bin_folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
