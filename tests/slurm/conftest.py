"""One cluster and one set of runs shared by all tests, since starting a job takes ten seconds on two cores.

`make test-slurm` runs these tests; `make test` does not.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cluster as slurm
import pytest
import support

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "slurm"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
SETTINGS = (
    "record.loop.log_every=1 backtrack.loop.log_every=1 backtrack.loop.save_every=1 backtrack.loop.keep_weights_every=0 "
    "backtrack.steps=20"  # long enough for a test to interrupt it three times
)


def pytest_configure() -> None:
    if packages := slurm.missing():
        raise pytest.UsageError(f"these tests need Slurm: apt-get install {' '.join(packages)} (make test-slurm does)")


@dataclass
class Site:
    """A user's working folder on the cluster, with shards and a teacher. Commands run in it."""

    cluster: slurm.Cluster
    folder: Path

    def sbatch(self, script: str | Path, *arguments: str, **env: str) -> str:
        """Submits a script of slurm/ on two nodes; returns the job id. Arguments that begin with - are sbatch options."""
        flags = [a for a in arguments if a.startswith("-")]
        words = [a for a in arguments if not a.startswith("-")]
        return self.call("sbatch", "--parsable", *TWO_NODES, *flags, str(SCRIPTS / script), *words, **env).strip()

    def call(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            command,
            env=self.env | env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout if check else f"{done.returncode} {done.stdout}{done.stderr}"

    @property
    def env(self) -> dict[str, str]:
        mine = {"CONFIG": "tiny.yaml", "VENV": sys.prefix, "PYTHONPATH": str(support.STARTUP)}
        mine |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        return {k: v for k, v in self.cluster.env.items() if k not in ("RANK", "WORLD_SIZE")} | mine

    def verb(self, name: str, *arguments: str) -> str:
        """What a verb prints that is run in this process, which has torch already."""
        with contextlib.chdir(self.folder):
            done = support.call(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def without_slurm(self, *verbs: list[str]) -> None:
        """Runs [verb, config, overrides...] in two processes that nobody but this one started, and that stay for the next."""
        (self.folder / "verbs.json").write_text(json.dumps(verbs))
        support.ranks("verbs", self.folder)

    def log(self, job: str) -> str:
        """The job's log; empty until the node has opened the file, which may be after the job is shown as running."""
        file = Path(self.cluster.show(job)["StdOut"])
        return file.read_text() if file.exists() else ""

    def last_line(self, job: str) -> str:
        return self.log(job).rstrip().splitlines()[-1]

    def ends(self, job: str, state: str, seconds: float = 500) -> str:
        """Waits until the job has ended in this state; returns its log."""
        found = self.cluster.wait(job, seconds=seconds)["JobState"]
        assert found == state, f"job {job} is {found}, not {state}:\n{self.log(job)[-6000:]}"
        return self.log(job)

    def weights(self, run: str) -> bytes:
        return (self.folder / "runs" / run / "generator/unet/diffusion_pytorch_model.safetensors").read_bytes()

    def wrapper(self, name: str, body: str) -> str:
        """An executable for PYTHON that runs a bash body before the real interpreter ($REAL)."""
        file = self.folder / name
        file.write_text(f'#!/bin/bash\nREAL={sys.executable}\n{body}\nexec $REAL "$@"\n')
        file.chmod(0o755)
        return str(file)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The cluster, and a folder in which slurm/pretrain.sh has trained a teacher on two nodes."""
    folder = tmp_path_factory.mktemp("site")
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with slurm.Cluster() as cluster:
        site = Site(cluster, folder)
        (folder / "tiny.yaml").write_text(f"extends: {REPOSITORY}/configs/tiny_sdxl.yaml\n")
        site.verb("shards", "--digits")
        log = site.ends(site.sbatch("pretrain.sh"), "COMPLETED")
        assert "n0: rank 0: 1 x cpu" in log and "n1: rank 1: 1 x cpu" in log and "all-reduce" in log
        yield site


@pytest.fixture(scope="session")
def reference(site) -> str:
    """Record and backtrack in two processes without Slurm."""
    flags = ["run=runs/reference", "path=runs/reference/path", *SETTINGS.split()]
    site.without_slurm(["record", "tiny.yaml", *flags], ["backtrack", "tiny.yaml", *flags])
    return "reference"
