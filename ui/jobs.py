"""Retraining, one at a time: prepared here, trained by a process of its own, adopted or discarded.

The run directory is all that a job is: the app may be closed or killed meanwhile, and finds it
again. Imports no torch.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.preferences.store import Store
from lora_rlhf.recipe import Recipe
from lora_rlhf.runs import Run
from ui.asking import Engine, Prompts
from ui.finding import is_stale, process_of, status_of, why_it_ended
from ui.job import LOG, Job, Pace, Progress, find_jobs
from ui.measuring import BeforeAfter, measure_run
from ui.planning import Plan, prepare_run
from ui.preparing import DISCARDED, Memory, predict_memory
from ui.process import Training, command, tail
from ui.retraining import Wishes, require_enough

_log = logging.getLogger(__name__)
_LOG_BYTES = 20_000
_LOADING_SECONDS = 900.0  # for the backbone to come back, before accuracies are measured


class Jobs:
    """The retrainings of one app.

    Args:
        engine: gives the device up where the memory plan says so; scores the result.
        store: of judgements.
        runs_dir: where new runs are made.
        predict: what a recipe needs, and what there is.
        grace: seconds from an interrupt to a kill.
        look: seconds between two looks at the process.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        runs_dir: Path,
        *,
        predict: Callable[[Recipe], Memory] = predict_memory,
        grace: float = 60.0,
        look: float = 0.5,
    ) -> None:
        self.engine, self.store, self.runs_dir = engine, store, runs_dir
        self._predict, self._grace, self._look = predict, grace, look
        self._job, self._folder = Job(), runs_dir
        self._training: Training | None = None
        self._released = False
        self._pace = Pace()
        self._writes = threading.Lock()
        self._acts = threading.Lock()  # start, cancel, adopt and discard exclude each other
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._find_again()

    # -- what there is --------------------------------------------------------------------------

    def job(self) -> Job:
        """The retraining that runs, or the last one that was not decided on."""
        return self._job

    @property
    def folder(self) -> Path:
        """The run directory of `job`."""
        return self._folder

    @property
    def has_device(self) -> bool:
        """Whether training has the device now, so that no backbone should be loaded beside it."""
        return self._job.released and self._job.state in ("preparing", "running")

    def bases(self) -> list[str]:
        """Names of the runs that a retraining may start from, oldest first."""
        return list(self._base_paths())

    def _base_paths(self) -> dict[str, Path]:
        entries = self.engine.registered()
        return {e.run.name: e.run for e in entries if e.role == "sft" and e.run.is_dir()}

    def progress(self) -> Progress:
        """How far the process is."""
        if self._job.state != "running":
            return Progress()
        return self._pace.look(status_of(Run(self._folder), self._job))

    def log_tail(self, size: int = _LOG_BYTES) -> str:
        """The end of what the process has said."""
        return tail(self._folder / LOG, size) if self._job.name else ""

    # -- before ---------------------------------------------------------------------------------

    def plan(self, wishes: Wishes) -> Plan:
        """What `start` would train on and how, be it too little; changes nothing.

        Raises:
            UserError: no such run, an override that cannot be, or the engine is not ready.
        """
        paths = self._base_paths()
        if wishes.base not in paths:
            raise ConfigError(
                f"{wishes.base!r} is not a run to start from. There are: {', '.join(paths)}."
            )
        base = paths[wishes.base]
        return Plan.make(self.store, Run(base), self.runs_dir, wishes, self._prompts_of(base))

    def _prompts_of(self, base: Path) -> Prompts:
        """Of its own data; what a reward model of another run knows does not measure it."""
        own, before = self.engine.prompts_of(base), self._reward_of(base)
        runs = {e.run for e in self.engine.registered() if e.name == before} - {base}
        others = [self.engine.prompts_of(run) for run in runs]
        return replace(own, trained=own.trained.union(*(o.trained | o.known for o in others)))

    def memory(self, plan: Plan) -> Memory:
        """What the plan's training needs beside what is loaded now."""
        return self._predict(plan.recipe)

    # -- starting -------------------------------------------------------------------------------

    def start(self, person: str, wishes: Wishes) -> Job:
        """Prepare a run directory and begin to train in it.

        Args:
            person: who wants it, for the record.
            wishes: what.

        Raises:
            UserError: of `plan`; too few judgements; or another retraining is at work, or waits
                for a decision.
        """
        with self._acts:
            self._require_free()
            self._set(Job(state="preparing", person=person, base=wishes.base))
            try:
                plan = self.plan(wishes)
                require_enough(plan.material, wishes)
                memory = self.memory(plan)
                before = self._reward_of(plan.base.path)
                job, folder = prepare_run(plan, self.store, person, before, self.runs_dir)
            except BaseException:
                self._set(Job())
                raise
            self._folder = folder
            with self._writes:  # somebody may have cancelled it meanwhile
                more = {"released": not memory.fits_beside, "cancelling": self._job.cancelling}
                self._set(job.model_copy(update=more))
            self._work(self._launch_and_watch)
            return self._job

    def resume(self, person: str, force: bool = False) -> Job:
        """Go on with a retraining that was cancelled or has failed, from its last checkpoint.

        Args:
            person: who wants it.
            force: go on to PPO though the reward model may be no better than a coin.

        Raises:
            UserError: there is none.
        """
        with self._acts:
            if self._job.state not in ("cancelled", "failed"):
                raise ConfigError("There is no retraining that was stopped. Start one.")
            self._require_free()
            again = Job(state="preparing", person=person, started_at=time.time())
            fields = ("state", "person", "started_at", "ended_at", "error", "cancelling")
            fresh = again.model_dump(include={*fields, "exit_code", "pid", "process_began"})
            self._change(**fresh, force=force or self._job.force)
            self._work(self._launch_and_watch)
            return self._job

    def _require_free(self) -> None:
        job = self._job
        if job.is_at_work:
            raise ConfigError(f"{job.name or 'A retraining'} is at work. Wait for it or cancel it.")
        if job.state == "done":
            raise ConfigError(f"{job.name} waits for a decision. Adopt it or discard it first.")
        for path, other in find_jobs(self.runs_dir):
            begins = other.state == "preparing" and not is_stale(other)
            if begins or (other.is_at_work and process_of(path, other) is not None):
                raise ConfigError(f"{other.name} is being trained by another app. Wait for it.")

    def _reward_of(self, run: Path) -> str | None:
        names = [e.name for e in self.engine.registered() if (e.run, e.role) == (run, "reward")]
        return names[0] if names else self.engine.reward_adapter()

    # -- the thread -----------------------------------------------------------------------------

    def _work(self, target: Callable[[], None]) -> None:
        self._pace = Pace()
        self._thread = threading.Thread(
            target=self._guard, args=(target,), name="retraining", daemon=True
        )
        self._thread.start()

    def _guard(self, target: Callable[[], None]) -> None:
        """Whatever happens in the thread, the job ends in a state from which somebody can go on."""
        try:
            target()
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            if self._job.state == "measuring":
                self._over("done", f"It could not be measured: {why}")
            elif self._job.is_at_work:
                self._over("failed", f"It cannot be watched any more: {why}")
            raise

    def _launch_and_watch(self) -> None:
        try:
            self._release()
            if self._closed.is_set():
                return  # the next app says that it can go on
            if self._job.cancelling:
                self._over("cancelled")
                return
            only = "reward" if self._job.stages == ("reward",) else None
            line = command(self._folder.absolute(), only, self._job.force)
            training = Training.start(line, self._folder / LOG)
        except BaseException as error:
            self._over("failed", f"Training could not be started: {error}")
            raise
        self._training = training
        self._change(state="running", pid=training.pid, process_began=training.started)
        self._watch()

    def _watch(self) -> None:
        """Look at the process until it has ended; an app that closes leaves it alone."""
        training = self._training
        assert training is not None
        kill_at = None
        while training.runs:
            if self._closed.wait(self._look):
                return
            if self._job.cancelling and kill_at is None:
                training.interrupt()
                kill_at = time.monotonic() + self._grace
            elif kill_at is not None and time.monotonic() > kill_at:
                training.kill()
        self._training = None
        self._change(exit_code=training.exit_code)
        run, job = Run(self._folder), self._job
        if all(run.is_complete(stage) for stage in job.stages):
            self._restore()
            self._measure()
        elif job.cancelling:
            self._over("cancelled")
        else:
            self._over("failed", why_it_ended(run, job))

    def _measure(self) -> None:
        """Score the held-out judgements with the old and the new reward model."""
        self._change(state="measuring")
        error, result, choosing = "", None, None
        try:
            if not self._engine_is_back():
                return
            self.engine.consider(self._folder)
            after = f"{self._folder.name}/reward"
            result, choosing = measure_run(self.engine, self._folder, self._job.before, after)
        except UserError as problem:
            error = f"It could not be measured: {problem}"
        self._over("done", error, result, choosing)

    def _engine_is_back(self) -> bool:
        """Wait for the backbone; False where the app closes first.

        Raises:
            UserError: it does not come.
        """
        ends_at = time.monotonic() + _LOADING_SECONDS
        while self.engine.state() != "ready":
            if time.monotonic() > ends_at:
                raise ConfigError(self.engine.state())
            if self._closed.wait(self._look):
                return False
        return True

    def _over(
        self,
        state: str,
        error: str = "",
        result: BeforeAfter | None = None,
        choosing: BeforeAfter | None = None,
    ) -> None:
        self._restore()
        found = {"result": result, "choosing": choosing}
        self._change(state=state, error=error, ended_at=time.time(), **found)

    def _release(self) -> None:
        if self._job.released:
            self._released = True
            self.engine.release()

    def _restore(self) -> None:
        if self._released:
            self._released = False
            self.engine.restore()

    def _set(self, job: Job) -> None:
        if job.name and self._folder.name == job.name:
            try:
                job.save(self._folder)
            except OSError as error:  # the disk is full: the next app finds the state before
                _log.warning("%s is %s, which cannot be written: %s", job.name, job.state, error)
        self._job = job

    def _change(self, **fields: Any) -> None:
        with self._writes:
            self._set(Job.model_validate(self._job.model_dump() | fields))

    # -- after ----------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Interrupt training, so that it writes a checkpoint; it is killed if it takes too long.

        Raises:
            UserError: nothing trains.
        """
        if self._job.state not in ("preparing", "running"):
            raise ConfigError("Nothing is being trained.")
        self._change(cancelling=True)

    def adopt(self) -> list[str]:
        """Offer the new adapters to everybody; their names.

        Raises:
            UserError: nothing is finished, or it was made on another backbone.
        """
        with self._acts:
            if self._job.state != "done":
                raise ConfigError("There is no finished retraining to adopt. Start one.")
            names = self.engine.adopt(self._folder)
            self._change(state="adopted")
            return names

    def discard(self) -> Path:
        """Move the run out of the way, and say where to.

        Raises:
            UserError: nothing is finished, or it is adopted: votes know it by its name.
        """
        with self._acts:
            if self._job.state not in ("done", "failed", "cancelled"):
                raise ConfigError("There is no retraining to discard that has ended.")
            self.engine.forget(self._folder)
            target = self.runs_dir / DISCARDED / self._folder.name
            target.parent.mkdir(exist_ok=True)
            shutil.move(self._folder, target)
            self._folder = target
            self._change(state="discarded")
            return target

    def close(self) -> None:
        """Stop watching; the process goes on."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(5.0)

    # -- another app's beginnings ---------------------------------------------------------------

    def _find_again(self) -> None:
        """Take up the newest retraining of these runs where an earlier app has left it."""
        bases = self.bases()
        for path, job in reversed(find_jobs(self.runs_dir)):
            if job.base not in bases:
                continue
            if job.state == "preparing" and not (path / "recipe.yaml").is_file():
                if is_stale(job):
                    shutil.rmtree(path)  # that app ended before it was a run
                continue
            self._folder, self._job = path, job
            self._take_up()
            return

    def _take_up(self) -> None:
        job = self._job
        if job.state in ("adopted", "discarded"):
            self._job = Job()
        elif job.state == "measuring":
            self._work(self._measure)
        elif job.is_at_work:
            self._training = process_of(self._folder, job)
            if self._training is None:
                self._training = Training(0, "")
            else:
                self._change(state="running", pid=self._training.pid)
            if self.has_device:
                self._release()
            self._work(self._watch)
