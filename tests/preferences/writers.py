"""Programs that write to a store and are killed, or run out of disk; run as `python -m`.

writers killed LOCATION    eight processes write; each is ended with SIGKILL; acknowledged ids
writers full FOLDER HOW    writes until the disk (tmpfs) or the limit on a file is full
writers copies FOLDER      copies, exports and opens a store that is larger than a file may be
"""

import json
import os
import random
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_rlhf.errors import PreferenceError
from lora_rlhf.preferences.exports import export
from lora_rlhf.preferences.store import Store
from tests.preferences.making import task, vote

WRITERS = 8
_ENOUGH = 3  # acknowledged by each writer before the first is killed
_PATIENCE = 30.0  # seconds, on a machine that others use too
_LONG = 3000  # characters of an answer: about 3 kB a task


def _pair() -> tuple:
    shown = task([{"text": "x" * _LONG}, {"text": "y"}], prompt=f"question {random.random()}")
    return shown, vote(shown)


def killed(location: str) -> None:
    """Fork writers that acknowledge each stored id on a pipe, and kill them at any moment."""
    store = Store.open(location)  # before the forks: its connections must not cross them
    store.counts()
    children = []
    for number in range(WRITERS):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            random.seed(number)
            os.close(read)
            while True:
                for event in _pair():
                    if store.add(event):
                        os.write(write, f"{event.id}\n".encode())
                time.sleep(random.random() * 0.01)  # one that never pauses starves the others
        os.close(write)
        children.append((pid, read))
    said = {read: b"" for _, read in children}
    until = time.monotonic() + _PATIENCE
    while min(s.count(b"\n") for s in said.values()) < _ENOUGH and time.monotonic() < until:
        for read in select.select([*said], [], [], 0.1)[0]:
            said[read] += os.read(read, 1 << 16)
    statuses = []
    for pid, read in children:
        os.kill(pid, signal.SIGKILL)
        statuses.append(os.waitpid(pid, 0)[1])
        while more := os.read(read, 1 << 16):
            said[read] += more
        time.sleep(random.random() * 0.02)
    acknowledged = [s.decode().split() for s in said.values()]
    json.dump({"acknowledged": acknowledged, "statuses": statuses}, sys.stdout)


def full(folder: str, how: str) -> None:
    """Fill what there is, free some, go on; says what was acknowledged and how it failed."""
    path = Path(folder) / "rankings.db"
    filler = Path(folder) / "filler"
    filler.write_bytes(b"0" * 200_000)
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
    store = Store.open(path)
    acknowledged, failed = [], ""
    while not failed:
        try:
            for event in _pair():
                store.add(event)
                acknowledged.append(event.id)
        except PreferenceError as error:
            failed = str(error)
    store.close()
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    filler.unlink()
    with Store.open(path) as again:
        lost = [i for i in acknowledged if again.task(i) is None and again.judgement(i) is None]
        events = again.version()
        again.add(_pair()[0])
    found = {"acknowledged": len(acknowledged), "lost": lost, "failed": failed, "events": events}
    json.dump(found, sys.stdout)


def copies(folder: str) -> None:
    """Says by what was tried which error came, and its text."""
    path = Path(folder) / "rankings.db"
    store = Store.open(path)
    store.add(task([{"text": "x" * 300_000}, {"text": "y"}]))
    store.close()
    store = Store.open(path)
    # No page of a new file, and no index of its log, may be written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    tried: dict[str, Callable[[], object]] = {
        "backup": lambda: store.backup(Path(folder) / "copy.db"),
        "snapshot": lambda: store.snapshot(Path(folder) / "copy.db"),
        "export": lambda: export(store, "pairs", Path(folder) / "exports"),
        "start": lambda: Store.open(path.with_name("new.db")),
    }
    found = {}
    for what, call in tried.items():
        try:
            call()
        except Exception as error:
            found[what] = (type(error).__name__, str(error))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    {"killed": killed, "full": full, "copies": copies}[sys.argv[1]](*sys.argv[2:])
