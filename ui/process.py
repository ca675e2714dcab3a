"""Training as a process of its own: started, watched, interrupted, and found again.

It is a session of its own, so that it outlives the app, a closed terminal and a Ctrl-C in it. What
it has to say it writes into its run directory.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_NICENESS = 10  # people who chat meanwhile come first
_LOOK_SECONDS = 0.1
_BARS = 10


class Training:
    """One process and its group.

    Args:
        pid: of the process, which leads its group.
        started: when the system says that it began, in the system's own words; "" where it does
            not say. Another process that got the same pid later began at another time.
        child: where this app has started it.
    """

    def __init__(
        self, pid: int, started: str, child: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        self.pid = pid
        self.started = started
        self._child = child

    @classmethod
    def start(cls, command: Sequence[str], log: Path) -> "Training":
        """Start a command whose output is appended to a file.

        Raises:
            OSError: it cannot be started.
        """
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        with suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
        return cls(child.pid, _began(child.pid), child)

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs, and where an earlier app has started it."""
        return self._child.poll() if self._child is not None else None

    @property
    def runs(self) -> bool:
        """Whether it is still at work."""
        if self._child is not None:
            return self._child.poll() is None
        return _exists(self.pid) and (not self.started or _began(self.pid) == self.started)

    def wait(self, seconds: float) -> bool:
        """Wait for its end, at most so long; whether it has ended."""
        ends_at = time.monotonic() + seconds
        while self.runs and time.monotonic() < ends_at:
            time.sleep(_LOOK_SECONDS)
        return not self.runs

    def interrupt(self) -> None:
        """As Ctrl-C: it finishes its step, writes a checkpoint and ends."""
        self._send(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, with whatever it has started."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.runs:  # else the pid may be somebody else's
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def command(run: Path, only: str | None, force: bool) -> list[str]:
    """The ordinary command line that trains what a run directory still lacks.

    Args:
        run: holds recipe.yaml; stages that are complete there are passed over.
        only: this stage alone.
        force: go on where a check would stop.
    """
    line = [sys.executable, "-m", "lora_rlhf", "run", str(run / "recipe.yaml")]
    line += ["--name", run.name, "--runs-dir", str(run.parent), "--resume"]
    line += ["--only", only] if only else []
    return [*line, "--force"] if force else line


def tail(path: Path, size: int) -> str:
    """The last `size` characters of a log as a terminal shows it, whole lines; "" without a file.

    Of a line that was written over and over, as progress bars are, its last state is left.
    """
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        # Bars take many times the room of what is left of them.
        start = max(0, file.seek(0, os.SEEK_END) - _BARS * size)
        file.seek(start)
        written = file.read()
    if start:
        written = written.partition(b"\n")[2] or written
    lines = written.decode("utf-8", errors="replace").split("\n")
    found = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
    if len(found) > size:
        found = found[-size:].partition("\n")[2] or found[-size:]
    return found


def _exists(pid: int) -> bool:
    if pid <= 0 or _field(pid, 0) == "Z":  # a zombie has ended, and waits for its parent to look
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _began(pid: int) -> str:
    return _field(pid, 19)


def began_at(pid: int) -> float:
    """When a process began, in seconds since 1970; infinity where the system does not say."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        booted = next(float(line.split()[1]) for line in lines if line.startswith("btime "))
        return booted + float(_began(pid)) / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, ValueError):
        return math.inf


def _field(pid: int, number: int) -> str:
    """A field of Linux's /proc/PID/stat, counted from the one after the name; "" elsewhere."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return fields[number] if len(fields) > number else ""
