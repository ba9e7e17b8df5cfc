"""Interrupted jobs restart by themselves and finish with the weights of an uninterrupted run."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from conftest import REPOSITORY, SETTINGS


class Training:
    """A backtracking job that a test can pause in the middle of training."""

    def __init__(self, site, name: str, job: str):
        self.site, self.job = site, job
        self.folder = site.folder / "runs" / name / "backtrack"

    def lines(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def hold(self, restarts: int = 0) -> dict[int, int]:
        """Waits for a new metrics line after the given number of restarts and stops rank 1 there, so that the other ranks
        wait for it; returns rank -> pid."""
        self.site.cluster.wait(self.job, {"RUNNING"}, restarts=restarts)
        # A resumed run first truncates its metrics at the checkpoint, so only a line beyond the old ones is new.
        before, limit = self.lines(), time.monotonic() + 400
        while self.lines() <= before:
            assert time.monotonic() < limit, self.site.log(self.job)
            time.sleep(0.02)
        ranks = self.site.cluster.ranks(self.job)
        os.kill(ranks[max(ranks)], signal.SIGSTOP)
        return ranks

    def release(self, ranks: dict[int, int], asked: int = 1) -> None:
        """Continues the paused rank once the job has been asked to stop `asked` times and the ranks have the signal."""
        self.until("stop requested, saving", times=asked)
        time.sleep(3)
        os.kill(ranks[max(ranks)], signal.SIGCONT)

    def until(self, words: str, times: int = 1, seconds: float = 300) -> None:
        """Waits until these words are in the log `times` times."""
        limit = time.monotonic() + seconds
        while self.site.log(self.job).count(words) < times:
            assert time.monotonic() < limit, self.site.log(self.job)
            time.sleep(0.1)


def test_time_limit_then_a_killed_rank_then_preemption(site, reference):
    places = ["run=runs/hard", f"path=runs/{reference}/path", *SETTINGS.split()]
    job = site.sbatch("backtrack.sh", "--time=60", *places)
    training = Training(site, "hard", job)
    ranks = training.hold()
    # The scripts ask for the signal two minutes before the limit: with less time left, Slurm sends it at its next check.
    hours, minutes, _ = map(int, site.cluster.show(job)["RunTime"].split(":"))
    site.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    training.release(ranks)
    training.until("restarting (")
    site.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    ranks = training.hold(restarts=1)
    status = json.loads(site.verb("status", "runs/hard", "--json"))
    assert status["stage"] == "backtrack" and status["state"] == "running" and status["restarts"] == 1
    assert 0 < status["step"] < status["steps"] == 20 and status["checkpoint"].startswith("step-000000")
    os.kill(ranks[1], signal.SIGKILL)
    training.until("restarting (", times=2)
    assert "srun: error: n1: task 1: Killed" in site.log(job)

    ranks = training.hold(restarts=2)
    site.cluster.run("scancel", "--signal=USR1", "--batch", job)  # as PreemptParameters=send_user_signal does
    training.release(ranks, asked=2)

    log = site.ends(job, "COMPLETED")
    assert site.cluster.show(job)["Restarts"] == "3" and log.count("resumed from") == 3
    assert log.count("stop requested, saving") == 2
    assert site.weights("hard") == site.weights(reference)
    assert "3 restarts" in site.verb("status", "runs/hard")


def test_without_requeueing_the_job_submits_itself_again_and_dependents_follow(site, reference):
    """With torchrun, which turns every exit code into 1, so the cause comes from the exit file."""
    places = ["run=runs/chained", f"path=runs/{reference}/path", *SETTINGS.split()]
    job = site.sbatch("backtrack.sh", "--no-requeue", *places, SELF_CHAIN="1", LAUNCHER="torchrun")
    last = site.call(
        "sbatch", "--parsable", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--output=last.log",
        "--wrap", "ls runs/chained/generator",
    ).strip()  # fmt: skip
    training = Training(site, "chained", job)
    ranks = training.hold()
    site.cluster.run("scancel", "--signal=USR1", "--batch", job)
    training.release(ranks)
    log = site.ends(job, "FAILED")
    new = re.search(r"continues as job (\d+)", log)[1]
    assert f"job {last} now waits for job {new}" in log
    assert "resumed from" in site.ends(new, "COMPLETED")
    assert site.cluster.show(new)["StdOut"] == site.cluster.show(job)["StdOut"]  # one log for the chain
    site.cluster.wait(last)
    assert site.cluster.show(last)["JobState"] == "COMPLETED"
    assert "model_index.json" in (site.folder / "last.log").read_text()
    assert site.weights("chained") == site.weights(reference)


def test_a_job_without_progress_gives_up(site):
    """Also covers a container and a setup file, with a stand-in for apptainer that runs the command without one."""
    kills = site.wrapper("kills", '[[ "$*" == *trainer.record* && $SITE_SETUP = yes ]] && kill -9 $$')
    (site.folder / "apptainer").write_text(
        '#!/bin/bash\necho "in $*" >>apptainer.log\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
    )
    (site.folder / "apptainer").chmod(0o755)
    (site.folder / "setup.sh").write_text("export SITE_SETUP=yes\n")
    job = site.sbatch(
        "record.sh", "run=runs/stuck", "path=runs/stuck/path", PYTHON=kills, MAX_STALLED="2", CONTAINER="disback.sif",
        CONTAINER_FLAGS="--cleanenv", DISBACK_SETUP="setup.sh", PATH=f"{site.folder}:{site.env['PATH']}",
    )  # fmt: skip
    log = site.ends(job, "FAILED")
    reason = (
        r"giving up after 2 starts without progress \(no checkpoint\): a rank was killed \(n[01]: task [01]: Killed\)$"
    )
    assert re.search(reason, site.last_line(job)), log
    assert site.cluster.show(job)["Restarts"] == "1" and log.count("restarting (") == 1
    started = (site.folder / "apptainer.log").read_text()
    assert (
        f"exec --nv --bind {site.folder} --bind {REPOSITORY} --cleanenv disback.sif bash {REPOSITORY}/slurm/task.sh"
        in started
    )


def test_a_node_that_does_not_answer_is_named_and_excluded_after_the_second_time(site):
    hangs = site.wrapper("hangs", '[[ "$*" == *trainer.record* && $SLURMD_NODENAME = n1 ]] && exec sleep 300')
    job = site.sbatch("record.sh", "run=runs/deaf", "path=runs/deaf/path", PYTHON=hangs, DISBACK_START_SECONDS="3")
    site.cluster.wait(job, {"RUNNING"}, restarts=1)
    Training(site, "deaf", job).until("restarting (", times=2)
    limit = time.monotonic() + 60
    while site.cluster.show(job)["ExcNodeList"] != "n1":  # the job then cannot start any more: there are only two nodes
        assert time.monotonic() < limit, site.log(job)
        time.sleep(0.2)
    assert site.log(job).count("disback: rank 1 (node n1) did not answer within 3 s of the start") == 2
    assert "excluding n1, which failed the startup check twice" in site.log(job)
    site.cluster.run("scancel", job)


def test_a_cancelled_job_stays_cancelled(site):
    sleeps = site.wrapper("sleeps", '[[ "$*" == *trainer.record* ]] && exec sleep 300')
    job = site.sbatch("record.sh", "run=runs/unwanted", "path=runs/unwanted/path", PYTHON=sleeps)
    site.cluster.wait(job, {"RUNNING"})
    Training(site, "unwanted", job).until("with srun")
    site.cluster.run("scancel", job)
    site.ends(job, "CANCELLED")
    limit = time.monotonic() + 30
    while "COMPLETING" in site.call("squeue", "--noheader", f"--jobs={job}", "--format=%T"):
        assert time.monotonic() < limit
        time.sleep(0.2)
    assert site.cluster.show(job)["JobState"] == "CANCELLED" and site.cluster.show(job)["Restarts"] == "0"


def test_a_job_that_slurm_preempts_is_left_to_slurm(site):
    """Preemption without a prior signal: Slurm requeues the job itself, so the script must neither requeue nor resubmit it."""
    sleeps = site.wrapper("sleeps", '[[ "$*" == *trainer.record* ]] && exec sleep 300')
    job = site.sbatch("record.sh", "run=runs/preempted", "path=runs/preempted/path", PYTHON=sleeps)
    site.cluster.wait(job, {"RUNNING"})
    Training(site, "preempted", job).until("with srun")
    waiting = site.call("sbatch", "--parsable", f"--dependency=afterok:{job}", "--output=waits.log", "--wrap", "true")
    urgent = site.call("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 3")
    Training(site, "preempted", job).until("Slurm has already requeued it")
    site.cluster.wait(urgent.strip())
    about = site.cluster.show(job)
    assert about["Restarts"] == "1" and about["JobState"] in ("PENDING", "COMPLETING", "RUNNING")
    assert site.cluster.show(waiting.strip())["JobState"] == "PENDING" and not (site.folder / "waits.log").exists()
    assert "continues as job" not in site.log(job)
    site.cluster.run("scancel", job, waiting.strip())


@pytest.mark.parametrize(
    "script", ["pretrain", "record", "backtrack", "evaluate", "encode", "pipeline", "common", "task"]
)
def test_shellcheck(script):
    done = subprocess.run(
        ["shellcheck", "-x", f"slurm/{script}.sh"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout
