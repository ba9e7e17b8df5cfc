"""`disback demo`: stopping and going on, the lock, and what it shows."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
import yaml

from trainer.demo import CONFIGS, SECONDS, plan
from trainer.distributed.launch import Children, command
from trainer.distributed.lock import locked
from trainer.errors import UserError
from trainer.sequence import PRIOR_SECONDS, TimeLeft


def flat(values: dict, prefix: str = "") -> Iterator[str]:
    """A mapping of settings as overrides."""
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={json.dumps(value)}"]


PLACES = ("extends", "run", "pipeline", "path", "report")
TINY = list(flat({key: value for key, value in yaml.safe_load(support.TINY.read_text()).items() if key not in PLACES}))
TINY += [f"{stage}.loop.sample_every=0" for stage in ("pretrain.autoencoder", "pretrain", "record", "backtrack")]
# Steps enough to be stopped in; the autoencoder's stay few.
TINY += ["pretrain.steps=200", "pretrain.loop.log_every=2", "pretrain.loop.save_every=200"]
TINY += ["backtrack.steps=4", "evaluate.classifier=classifier"]


def test_time_left():
    left = TimeLeft(100.0, 0.0, 1000.0)
    assert left.at(0.0, 1000.0) == 100
    assert left.at(0.0, 1010.0) == 90  # nothing is known but the time
    slow = left.at(10.0, 1030.0)  # three times the reference
    assert slow == pytest.approx(90 * (30 + PRIOR_SECONDS) / (10 + PRIOR_SECONDS))
    assert left.at(10.0, 1031.0) == pytest.approx(slow - 1)
    assert 100 < left.at(50.0, 1150.0) < 150 and left.at(50.0, 2000.0) == 0
    resumed = TimeLeft(100.0, 80.0, 1000.0)
    assert resumed.at(80.0, 1005.0) == 15 and resumed.at(100.0, 1020.0) == 0


@pytest.mark.parametrize("name", SECONDS)
def test_a_new_demo_runs_every_verb(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, tasks = plan(name, [])
    verbs = "shards pretrain record backtrack backtrack backtrack evaluate evaluate evaluate report".split()
    assert [task.verb for task in tasks] == verbs and folder == Path("runs", name)
    assert not any(task.done or task.seconds_done() for task in tasks)
    assert sum(part.seconds for task in tasks for part in task.parts) > 60
    with pytest.raises(UserError, match="three run folders"):
        plan(name, ["run=elsewhere"])


def test_what_is_done_is_skipped_with_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/digits")
    results = [run / name for name in ("pipeline/disback.json", "path/path.json", "generator/disback.json")]
    for time_made, file in enumerate(results):
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time_made, time_made))
    settings = support.load_settings(CONFIGS / "digits.yaml", ["pretrain.steps=9"]).model_dump(mode="json")
    (run / "config.yaml").write_text(yaml.safe_dump({"about": {"disback": "0"}} | settings))

    def done(*overrides: str) -> list[str]:
        return [task.verb for task in plan("digits", list(overrides))[1] if task.done]

    assert done("pretrain.steps=9") == ["pretrain", "record", "backtrack"] and not done()
    (run / "backtrack").mkdir()
    (run / "backtrack" / "status.json").write_text('{"step": 30}')  # went on for more steps, and was stopped
    assert done("pretrain.steps=9") == ["pretrain", "record"]
    os.utime(results[0], (9, 9))  # another teacher
    assert done("pretrain.steps=9") == ["pretrain"]


def test_the_first_rank_to_fail_has_the_exit_code(tmp_path):
    assert command("record", ["x"], 1, "deepspeed") == [sys.executable, "-m", "trainer.record", "x"]
    children = Children(tmp_path)
    assert children.outcome(0) == (0, "") and children.outcome(1) == (1, "") and children.outcome(-9) == (-9, "")
    (tmp_path / "exit").write_text("75 saved\n")
    assert children.outcome(1) == (75, "saved")


HOLDER = """
import os, signal, sys, time
from pathlib import Path
from trainer.distributed.lock import locked
with locked(Path(sys.argv[1]), "the demo"):
    if os.fork() == 0:
        time.sleep(2)  # as the process that ends a killed demo's ranks does
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_demo_is_waited_for(tmp_path, capsys):
    file = tmp_path / "demo.lock"
    held = subprocess.run([sys.executable, "-c", HOLDER, file], env=support.environment(), stdout=subprocess.DEVNULL)
    assert held.returncode == -signal.SIGKILL
    with locked(file, "the demo"):
        assert "the demo was killed" in capsys.readouterr().err
        with (
            pytest.raises(UserError, match=f"still running in {tmp_path} .process {os.getpid()} of .* on node "),
            locked(file, "the demo"),
        ):
            pass


def test_help_needs_no_torch():
    call = [sys.executable, "-X", "importtime", "-m", "trainer.cli", "demo", "pictures"]
    done = subprocess.run(call, capture_output=True, text=True, env=support.environment())
    assert done.returncode == 2 and "disback: the demos are emoji and digits" in done.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "yaml" in imported and not imported & {"torch", "deepspeed", "diffusers"}


def wait_for(what, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_stopped_in_pretraining_and_started_again(tmp_path, monkeypatch):
    """Two processes until the signal; then some verbs here, which is faster and ends soon, and the rest by a second demo."""
    monkeypatch.chdir(tmp_path)
    run, children = Path("runs/digits"), Children(Path("runs/digits/demo.job"))
    line = [sys.executable, "-m", "trainer.cli", "demo", "digits", *TINY]
    first = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=support.environment())

    def step() -> int:
        file = run / "pretrain" / "status.json"
        return json.loads(file.read_text())["step"] if file.exists() else 0

    wait_for(step)
    refused = support.call("demo", "digits", *TINY)
    assert refused.returncode == 2 and f"still running in runs/digits (process {first.pid} of " in refused.stderr
    first.send_signal(signal.SIGTERM)
    shown = first.communicate(timeout=120)[1]
    assert first.returncode == 75 and "  teacher 0/200  " in shown and "run the same command again" in shown
    status = json.loads((run / "pretrain" / "status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["saved_step"] == status["step"] < 200
    assert not children.running()
    few = [*TINY, f"pretrain.steps={status['step'] + 2}"]

    verbs = (
        "pretrain",
        "record",
        "backtrack",
        "backtrack _none",
        "backtrack _warm",
        "evaluate _none",
        "evaluate _warm",
    )
    for name, _, suffix in (text.partition(" ") for text in verbs):
        flags = ["--watch"] if name == "evaluate" else []
        done = support.call(name, "--config", str(CONFIGS / f"digits{suffix}.yaml"), *few, *flags)
        assert done.returncode == 0, done.stderr
    before = os.path.getsize(run / "demo.log")
    again = support.verb("demo", "digits", "--processes", "1", *few, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    rows = json.loads((run / "summary.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["teacher", "start", "none", "warm", "path"]
    assert again.stdout.lstrip().startswith("steps/image") and "demo 100%  done in" in again.stderr
    log = (run / "demo.log").read_text()[before:]
    ran = [text.split()[3] for text in log.splitlines() if " disback " in text and text.startswith("20")]
    assert ran == ["shards", "evaluate", "report"]
