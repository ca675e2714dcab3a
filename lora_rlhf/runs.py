"""The run directory: the only contract between stages, command line, app and report.

    runs/<name>/  recipe.yaml  status.json  summary.json  environment.json  train.log  report.html
      <stage>/    metrics.jsonl  samples.jsonl  adapter/  checkpoints/step-000200/

Every JSON file is replaced atomically, so a reader never sees half of one and a crash never
leaves one. A stage is complete exactly when `summary.json` holds its seconds.
"""

import difflib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_rlhf.errors import CheckpointError, ConfigError

Json = dict[str, Any]

TRAINED_ON = "trained_on_heldout"
"""In summary.json under `retraining`: hashes of held-out prompts that the run's adapters know."""

# Keys of summary.json besides a stage's own name and seconds that do not outlive it: what it writes
# itself, and what was measured on its adapter.
_ALSO_OF = {
    "sft": ("suites", "labelers"),
    "reward": ("health", "labelers"),
    "ppo": ("suites",),
    "evaluate": ("win_rates", "arms", "rounds", "frontier"),
}


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that no web server could read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def directory_atomically(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield making
        for file in making.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        making.chmod(0o755)
        if path.exists():
            stale = making.with_name(making.name + ".old")
            os.replace(path, stale)
            os.replace(making, path)
            shutil.rmtree(stale)
        else:
            os.replace(making, path)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


class Run:
    """One run directory.

    Args:
        path: the directory; made when it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    def stage(self, name: str) -> Path:
        """The directory of a stage, made when it does not exist."""
        directory = self.path / name
        directory.mkdir(exist_ok=True)
        return directory

    def adapter(self, role: str) -> Path:
        """Where the adapter of a role lies: sft, reward, policy or value."""
        return self.path / {
            "sft": "sft/adapter",
            "reward": "reward/adapter",
            "policy": "ppo/adapter",
            "value": "ppo/value",
        }.get(role, role)

    def adapters(self) -> list[str]:
        """Roles whose adapter has been saved, in the order of the pipeline."""
        roles = ("sft", "reward", "policy", "value")
        return [r for r in roles if (self.adapter(r) / "adapter_config.json").exists()]

    def trained_on_heldout(self) -> set[str]:
        """Hashes of held-out prompts that this run, or one it goes on from, was let train on."""
        return set(self.summary().get("retraining", {}).get(TRAINED_ON, ()))

    def kept_policy(self, step: int) -> Path:
        """Where the policy of a round lies that `ppo.keep_policies_every` keeps."""
        return self.path / "ppo" / "policies" / f"step-{step:06d}"

    def kept_policies(self) -> dict[int, Path]:
        """Those that there are, by round."""
        found = sorted(self.path.glob("ppo/policies/step-*/adapter_config.json"))
        return {int(file.parent.name.removeprefix("step-")): file.parent for file in found}

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> Json:
        """`status.json`, or {} before the first stage."""
        return self._read("status.json")

    def set_status(
        self, state: str, stage: str = "", step: int = 0, total: int = 0, error: str = ""
    ) -> None:
        """Say where the run stands: running, stopped, failed or finished."""
        self._write(
            "status.json",
            {
                "state": state,
                "stage": stage,
                "step": step,
                "total": total,
                "pid": os.getpid(),
                "error": error,
                "time": time.time(),
            },
        )

    # -- summary --------------------------------------------------------------------------------

    def summary(self) -> Json:
        """`summary.json`, or {} before the first stage has ended."""
        return self._read("summary.json")

    def is_complete(self, stage: str) -> bool:
        """Whether the stage has ended and its results are in place."""
        return stage in self.summary().get("seconds", {})

    def finish_stage(self, stage: str, seconds: float, **results: Any) -> None:
        """Mark a stage complete and merge its results into the summary, in one replacement."""
        summary = self.summary()
        summary.setdefault("seconds", {})[stage] = round(seconds, 1)
        for key, value in results.items():
            if isinstance(value, dict) and isinstance(summary.get(key), dict):
                summary[key] |= value
            else:
                summary[key] = value
        self._write("summary.json", summary)

    def forget_from(self, stages: list[str]) -> None:
        """Drop the results of the given stages, so that they run again."""
        summary = self.summary()
        for stage in stages:
            summary.get("seconds", {}).pop(stage, None)
            for key in (stage, *_ALSO_OF.get(stage, ())):
                summary.pop(key, None)
        # First the summary: a crash in between must not leave a complete stage without its files.
        self._write("summary.json", summary)
        for stage in stages:
            shutil.rmtree(self.path / stage, ignore_errors=True)

    # -- lines ----------------------------------------------------------------------------------

    def append(self, file: str, record: Json) -> None:
        """Add one JSON line to a file of the run, such as `ppo/metrics.jsonl`."""
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")

    def lines(self, file: str) -> list[Json]:
        """All whole JSON lines of a file; a last line cut by a crash is left out."""
        path = self.path / file
        if not path.exists():
            return []
        whole = path.read_bytes().split(b"\n")[:-1]  # bytes: the cut may lie within a letter
        return [json.loads(line) for line in whole if line]

    def cut_lines_after(self, file: str, step: int) -> None:
        """Drop the lines whose step is greater, which a resumed stage writes again."""
        if (self.path / file).exists():
            kept = [r for r in self.lines(file) if r.get("step", 0) <= step]
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            write_atomically(self.path / file, text)

    # -- files ----------------------------------------------------------------------------------

    def write_json(self, file: str, content: Json) -> None:
        """Replace a JSON file of the run atomically."""
        self._write(file, content)

    def _write(self, file: str, content: Json) -> None:
        write_atomically(self.path / file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _read(self, file: str) -> Json:
        path = self.path / file
        if not path.exists():
            return {}
        try:
            content: Json = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{path}: not valid JSON ({error}). The run directory is damaged; restore the file "
                f"or start the run again under another name."
            ) from error
        return content


def find_run(name: str, runs_dir: Path) -> Run:
    """The run of a name or a directory.

    Raises:
        ConfigError: there is none; names those that are.
    """
    for path in (runs_dir / name, Path(name)):
        if (path / "recipe.yaml").is_file():
            return Run(path)
    there = sorted(p.parent.name for p in runs_dir.glob("*/recipe.yaml"))
    found = f"{runs_dir}{os.sep} has: {', '.join(there)}" if there else f"{runs_dir} has none yet"
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else " Make one: lora-rlhf run quickstart"
    raise ConfigError(f"{name} is not a run. {found}.{hint}")
