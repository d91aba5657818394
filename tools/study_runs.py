"""Doing the runs of a study, several at a time, until they are done or time is up."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import Interrupted, UserError
from projects.study.cells import Cell, Preset
from tools.study_folder import Configs, RunFolder
from tools.study_plan import BACKBONE_SEED, Run, needs
from tools.study_process import STOPPED_CODES, Signals, WorkLock, start, training_environment
from tools.study_results import Facts, Results, rows_of_run

__all__ = ["Settings", "Study"]

POLL_SECONDS = 0.2
STOP_SECONDS = 180.0  # an evaluation is finished before a training stops
SHOWN_LINES = 5


@dataclass(frozen=True)
class Settings:
    """What does not depend on the single run.

    Attributes:
        work: the folder of all runs.
        datasets: the folder of the data sets.
        device: "cpu" or "cuda".
        jobs: trainings at a time.
        deadline: when to stop, by ``time.monotonic()``; infinite without a limit.
    """

    work: Path
    datasets: Path
    device: str
    jobs: int
    deadline: float


class Study:
    """The runs of one call.

    Args:
        preset: the matrix.
        plan: what is to be done, in order.
        settings: of the call.
        configs: of the cells.
        results: where finished runs go.
        facts: what their rows have in common.

    Attributes:
        failed: runs that ended with an error, or that need one which did, and why.
    """

    def __init__(
        self,
        preset: Preset,
        plan: Sequence[Run],
        settings: Settings,
        configs: Configs,
        results: Results,
        facts: Facts,
    ) -> None:
        self.failed: dict[Run, str] = {}
        self._preset = preset
        self._pending = list(plan)
        self._running: dict[Run, subprocess.Popen] = {}
        self._settings = settings
        self._configs = configs
        self._results = results
        self._facts = facts
        self._begun: dict[Run, float] = {}
        self._stopping = False

    @property
    def left(self) -> int:
        """How many runs are neither finished nor failed."""
        return len(self._pending) + len(self._running)

    def execute(self, lock: WorkLock) -> None:
        """Do the runs.

        Raises:
            Interrupted: a signal came; the trainings have stopped with a checkpoint.
        """
        with Signals() as signals:
            while self.left and not signals.received and not self._is_late():
                self._launch(lock)
                time.sleep(POLL_SECONDS)
                self._collect()
            self._stop(signals)
        if signals.received:
            say(f"stopped: {count(self.left, 'run')} left, the same command goes on")
            raise Interrupted(signals.last)
        if self.left:
            say(f"the budget is over: {count(self.left, 'run')} left, the same command goes on")

    def _is_late(self) -> bool:
        return time.monotonic() >= self._settings.deadline

    # --- one run --------------------------------------------------------------------------------

    def _launch(self, lock: WorkLock) -> None:
        """Start what can be started."""
        for run in list(self._pending):
            if len(self._running) >= self._settings.jobs:
                return
            needed = self._needed_by(run)
            if any(other in self._running or other in self._pending for other in needed):
                continue
            self._pending.remove(run)
            broken = [other for other in needed if other in self.failed]
            if broken:
                self._fail(run, f"it needs {broken[0]}, which failed")
                continue
            try:
                self._start(run, lock)
            except (UserError, OSError) as error:
                self._fail(run, str(error))

    def _needed_by(self, run: Run) -> list[Run]:
        """The runs of this call whose weights this one starts from."""
        names = {cell.name for cell in needs(self._preset, run.cell)}
        known = [*self._pending, *self._running, *self.failed]
        return [
            other
            for other in known
            if other.cell.name in names and other.seed == self._seed_of(other.cell, run)
        ]

    def _seed_of(self, needed: Cell, run: Run) -> int:
        return BACKBONE_SEED if needed is self._preset.backbone else run.seed

    def _starts(self, run: Run) -> dict[str, Path]:
        """The checkpoints that a run starts from, by the keys of its config."""
        starts = {}
        for cell in needs(self._preset, run.cell):
            folder = RunFolder(self._settings.work, cell.name, self._seed_of(cell, run))
            if cell is self._preset.backbone:
                starts["train.init_checkpoint"] = folder.backbone()
            else:
                starts["teacher.init_checkpoint"] = folder.weights
        return starts

    def _folder(self, run: Run) -> RunFolder:
        return RunFolder(self._settings.work, run.cell.name, run.seed)

    def _start(self, run: Run, lock: WorkLock) -> None:
        folder, digest = self._folder(run), self._configs.digest(run.cell)
        resumes = folder.is_begun(digest)
        if folder.begin(self._configs.of(run.cell), digest, run.seed, self._starts(run)):
            say(f"{run}: settings have changed, what was there is now in {folder.path}.previous-*")
        self._running[run] = start(folder.config, folder.console, self._environment(run), lock)
        self._begun[run] = time.monotonic()
        how = f"goes on after iteration {folder.iterations_done()}" if resumes else "starts"
        why = " (again: others need its weights)" if run.again else ""
        say(f"{run}: {how}{why}")

    def _environment(self, run: Run) -> dict[str, str]:
        """The backbone, which all others wait for, has all cores."""
        settings = self._settings
        at_a_time = 1 if run.cell is self._preset.backbone else settings.jobs
        return training_environment(settings.device, settings.datasets, at_a_time)

    def _collect(self) -> None:
        """Deal with the trainings that have ended."""
        for run, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[run]
            folder = self._folder(run)
            folder.end()
            if code == 0:
                self._finish(run, folder)
            elif self._stopping and code in STOPPED_CODES:
                say(f"{run}: stopped at iteration {folder.iterations_done()}")
                self._pending.append(run)
            else:
                self._fail(run, f"exit code {code}", folder)

    def _finish(self, run: Run, folder: RunFolder) -> None:
        digest = self._configs.digest(run.cell)
        minutes = (time.monotonic() - self._begun[run]) / 60
        ended = f"done in {minutes:.1f} min"
        if not run.again:
            try:
                row, curves = rows_of_run(folder, run.cell, run.seed, digest, self._facts)
            except UserError as error:
                self._fail(run, str(error), folder)
                return
            self._results.add(row, curves)
            ended = f"AP {row.AP:.1f}, AP50 {row.AP50:.1f}, {row.wall_s / 60:.1f} min"
        say(f"{run}: {ended}; {self._outlook()}")

    def _fail(self, run: Run, reason: str, folder: RunFolder | None = None) -> None:
        lines = folder.last_lines(SHOWN_LINES) if folder else []
        self.failed[run] = ": ".join([reason, *lines[-1:]])
        where = f"; the end of {folder.console}:" if folder else ""
        say("\n    ".join([f"{run}: FAILED, {reason}{where}", *lines]))

    def _outlook(self) -> str:
        """How many runs are left and for about how long."""
        if not self.left:
            return "no run left"
        now = time.monotonic()
        running = [max(0.0, self._expected(r) - now + self._begun[r]) for r in self._running]
        seconds = sum(running) + sum(map(self._expected, self._pending))
        minutes = seconds / 60 / min(self._settings.jobs, self.left)
        return f"{count(self.left, 'run')} left, about {minutes:.0f} min"

    def _expected(self, run: Run) -> float:
        """Seconds that a run will take: as its cell's others have, or all others."""
        rows = self._results.runs
        known = [row.wall_s for row in rows if row.cell == run.cell.name]
        known = known or [row.wall_s for row in rows]
        return sum(known) / len(known) if known else 0.0

    # --- the end --------------------------------------------------------------------------------

    def _stop(self, signals: Signals) -> None:
        """Let trainings save a checkpoint and end; a second signal, or patience, ends them now."""
        self._stopping = True
        for process in self._running.values():
            process.terminate()
        if self._running:
            say(f"stopping {count(len(self._running), 'training')} with a checkpoint")
        deadline = time.monotonic() + STOP_SECONDS
        received = signals.received
        while self._running:
            if signals.received > received or time.monotonic() > deadline:
                for process in self._running.values():
                    process.kill()
            time.sleep(POLL_SECONDS)
            self._collect()


def count(number: int, what: str) -> str:
    """Return "1 run", "2 runs"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
