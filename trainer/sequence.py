"""Verbs one after another, each in processes of its own as a user would start it, with one line of progress.

The process that runs them reads their progress from the run folders, and imports neither torch nor DeepSpeed. What is done is
not done again, so that the same command goes on after a stop.
"""

import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from trainer.checkpoint.directory import CheckpointDirectory
from trainer.config.load import load_settings
from trainer.distributed.launch import Children, command
from trainer.distributed.lock import locked
from trainer.distributed.logs import duration
from trainer.entry import FAILED, STOPPED, USER_MISTAKE, Parser, guarded
from trainer.errors import Stopped, UserError
from trainer.training.progress import Progress

PRIOR_SECONDS = 30.0  # of work at the reference pace, assumed on top of what was seen: a start says little
LINE_SECONDS = 20.0  # between lines about the same part where a line cannot be rewritten, as in a CI log


@dataclass(frozen=True)
class Part:
    """What the progress line names: a verb, or a training of `pretrain`. seconds: on the reference machine. count: how much
    is done, and of how much; (0, 0) if unknown."""

    name: str
    seconds: float
    count: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def fraction(self) -> float:
        done, total = self.count()
        return done / total if total else 0.0


@dataclass
class Task:
    """A verb to run. written: whether its results exist. done: it has run, now or in an earlier call. alone: as one process.
    prints: what it writes to stdout is shown at its end."""

    verb: str
    arguments: list[str]
    parts: list[Part]
    written: Callable[[], bool] = lambda: True
    done: bool = False
    alone: bool = False
    prints: bool = False

    def seconds_done(self) -> float:
        return sum(part.seconds * (1.0 if self.done else part.fraction()) for part in self.parts)

    def current(self) -> Part:
        return next((part for part in self.parts if part.fraction() < 1), self.parts[-1])


class Experiment:
    """A run: its configuration, and what is on disk. kind: its name in the progress line."""

    def __init__(self, kind: str, file: Path, overrides: list[str]):
        self.kind, self.file, self.overrides = kind, file, overrides
        self.settings = load_settings(file, overrides)
        self.folder = self.settings.folder
        written = self.folder / "config.yaml"
        before = yaml.safe_load(written.read_text()) if written.exists() else None
        self.unchanged = {**(before or {}), "about": None} == {**self.settings.model_dump(mode="json"), "about": None}

    def task(self, verb: str, written: Callable[[], bool], *parts: Part, more: tuple[str, ...] = ()) -> Task:
        """A verb on this run. It is skipped if it has written its results from what is there now, with these settings; if in
        doubt it runs, and decides itself what is left to do."""
        arguments = ["--config", str(self.file), *more, *self.overrides]
        done = self.unchanged and written() and all(part.fraction() in (0, 1) for part in parts)
        return Task(verb, arguments, list(parts), written, done)

    # The files that are written last with teacher, path and generator.

    @property
    def teacher(self) -> Path:
        return Path(self.settings.pipeline, "disback.json")

    @property
    def path(self) -> Path:
        return self.settings.path_folder / "path.json"

    @property
    def generator(self) -> Path:
        return self.folder / "generator" / "disback.json"

    def training(self, name: str, seconds: float, stage: str, steps: int) -> Part:
        def count() -> tuple[int, int]:
            progress = Progress.read(self.folder / stage) or {"step": 0, "state": ""}
            return steps if progress.get("state") == "finished" else min(progress["step"], steps), steps

        return Part(name, seconds, count)

    def backtrack(self, seconds: float) -> Task:
        part = self.training(f"backtrack {self.kind}", seconds, "backtrack", self.settings.backtrack.steps)
        sources = [self.teacher] if self.settings.backtrack.path == "none" else [self.teacher, self.path]

        def written() -> bool:  # only `pretrain` writes the teacher's note: other pipelines have none to be older than
            return is_made(self.generator, *(source for source in sources if source.exists()))

        return self.task("backtrack", written, part)

    def evaluate(self, seconds: float, *more: str) -> Task:
        """Evaluates the checkpoints that have weights, and `evaluate.what`. more: overrides that the user's can replace."""
        what = load_settings(self.file, [*more, *self.overrides]).evaluate.what
        names = [Path(name).name for name in ([what] if isinstance(what, str) else what)]
        part = Part(f"evaluate {self.kind}", seconds, partial(self._evaluated, names))

        def written() -> bool:
            return part.fraction() == 1 and all(is_made(self.scores(name), self.generator) for name in names)

        return self.task("evaluate", written, part, more=(*more, "--watch"))

    def scores(self, name: str) -> Path:
        return self.folder / "eval" / name / "metrics.json"

    def _evaluated(self, what: list[str]) -> tuple[int, int]:
        names = {*what, *CheckpointDirectory(self.folder / "backtrack").with_weights()}
        return sum(self.scores(name).exists() for name in names), len(names)


def is_made(result: Path, *sources: Path) -> bool:
    """Whether a result exists and is newer than its sources."""
    times = [file.stat().st_mtime if file.exists() else None for file in (result, *sources)]
    return None not in times and times[0] == max(times)


class TimeLeft:
    """Seconds that remain: reference seconds times this machine's pace, counted down between two signs of progress."""

    def __init__(self, total: float, done: float, now: float):
        self.total, self.first, self.began = total, done, now
        self.done, self.changed = done, now

    def at(self, done: float, now: float) -> float:
        if done != self.done:
            self.done, self.changed = done, now
        worked = max(self.done - self.first, 0.0)
        pace = (self.changed - self.began + PRIOR_SECONDS) / (worked + PRIOR_SECONDS)
        return max((self.total - self.done) * pace - (now - self.changed), 0.0)


class ProgressLine:
    """One line on stderr: rewritten on a terminal; elsewhere a new one for each part, and now and then."""

    def __init__(self) -> None:
        self.terminal, self.part, self.shown = sys.stderr.isatty(), "", 0.0

    def show(self, part: str, text: str) -> None:
        now = time.monotonic()
        if part != self.part or now - self.shown > (1.0 if self.terminal else LINE_SECONDS):
            self.part, self.shown = part, now
            start, end = ("\r", "\x1b[K") if self.terminal else ("", "\n")
            print(start + text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal and self.shown:
            print(file=sys.stderr)
        self.shown = 0.0


class Sequence:
    """Runs the tasks that are not done yet. title: the first word of the progress line."""

    def __init__(self, title: str, log: Path, tasks: list[Task], args: Namespace, children: Children):
        self.title, self.log, self.tasks, self.args, self.children = title, log, tasks, args, children
        self.signals: list[int] = []
        self.line, self.total = ProgressLine(), sum(part.seconds for task in tasks for part in task.parts)
        self.began = time.monotonic()
        self.left = TimeLeft(self.total, sum(task.seconds_done() for task in tasks), self.began)

    def run(self) -> int:
        """Returns 0, or the exit code of the verb that failed. Raises Stopped."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, frame: self.signals.append(number))
        for task in self.tasks:
            if not task.done and (code := self._run(task)):
                return code
            task.done = True
        return 0

    def _run(self, task: Task) -> int:
        arguments = task.arguments + ["--debug"] * self.args.debug
        processes = 1 if task.alone else self.args.processes
        with self.log.open("a") as log:
            print(f"\n{time.strftime('%F %T')} disback {task.verb} {' '.join(arguments)}", file=log, flush=True)
            start = log.tell()
            line = command(task.verb, arguments, processes, self.args.launcher)
            child = self.children.start(line, subprocess.PIPE if task.prints else log, log)
        while child.poll() is None and not self.signals:
            self._show(task.current())
            time.sleep(0.5)
        if self.signals:
            self.line.close()
            print(f"stopping {task.current().name}; a second Ctrl-C does not wait until it has saved", file=sys.stderr)
        self.children.end(hurry=lambda: self.signals.count(signal.SIGINT) > 1)
        code, message = self.children.outcome(child.wait())
        code = code if code in (0, USER_MISTAKE, STOPPED) else FAILED
        if code == STOPPED or (self.signals and code != USER_MISTAKE):  # a mistake, such as a full disk, is shown below
            self.line.close()
            raise Stopped("stopped; run the same command again to go on")
        if code == 0 and not task.written():  # DeepSpeed's launcher answers 0 when it was killed itself
            code, message = FAILED, "it was killed"
        if code:
            self.line.close()
            tail = self.log.read_bytes()[start:].decode(errors="replace").splitlines()[-15:]
            problem = f"disback: {task.verb} failed: {message or f'exit code {code}'}"
            print("\n".join([*tail, problem, f"log: {self.log}"]), file=sys.stderr)
        elif child.stdout:
            self.line.show("", f"{self.title} 100%  done in {duration(time.monotonic() - self.began)}")
            self.line.close()
            print(child.stdout.read().decode(), end="", flush=True)
        return code

    def _show(self, part: Part) -> None:
        done, (count, total) = sum(task.seconds_done() for task in self.tasks), part.count()
        name = f"{part.name} {count}/{total}" if total else part.name
        left = duration(self.left.at(done, time.monotonic()))
        self.line.show(part.name, f"{self.title} {100 * done / self.total:.0f}%  {name}  {left} left")


def verbs_parser(verb: str, about: str) -> Parser:
    """The parser of a verb that runs others, with the options that all of these have."""
    parser = Parser(prog=f"disback {verb}", description=about)
    parser.add_argument(
        "--processes", type=int, default=2, help="number of processes that train and evaluate (default 2)"
    )
    parser.add_argument(
        "--launcher",
        choices=("deepspeed", "torchrun"),
        default="deepspeed",
        help="launcher of these processes (default deepspeed)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    return parser


def exit_code(verb: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """What a verb that runs others ends with: its own code, or that of what it raised."""
    argv, codes = sys.argv[1:] if argv is None else argv, []
    return guarded(lambda: codes.append(verb(argv)), "--debug" in argv) or codes[0]


def run_tasks(title: str, folder: Path, tasks: list[Task], args: Namespace) -> int:
    """Runs the tasks of a verb named `title`, with its log and lock in a run folder; returns 0 or the exit code of the verb that
    failed. Raises UserError and Stopped."""
    if args.processes < 1:
        raise UserError(f"--processes {args.processes}: at least one process trains")
    if not Path("/proc/self/environ").exists():
        raise UserError(
            f"`disback {title}` finds its processes in /proc, which only Linux has: run its verbs one by one (docs/demo.md)"
        )
    with locked(folder / f"{title}.lock", f"the {title}"), Children(folder / f"{title}.job") as children:
        return Sequence(title, folder / f"{title}.log", tasks, args, children).run()
