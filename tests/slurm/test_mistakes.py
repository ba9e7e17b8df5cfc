"""Mistakes of users and broken nodes: the job fails at once, and its log ends with one clear line."""

import socket
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SCRIPTS

PORT = 11987


@pytest.fixture(scope="module")
def jobs(site) -> dict[str, str]:
    """All mistakes, submitted at once: the jobs are independent of each other."""
    # On one of the two nodes, a Python with YAML but without DeepSpeed.
    base = f"{sys.base_prefix}/bin/python3.{sys.version_info.minor}"
    told = f'echo "$SLURM_DISTRIBUTION $PYTORCH_CUDA_ALLOC_CONF" >>{site.folder}/environment'
    bare = site.wrapper("bare", f'{told}\n[ "$SLURMD_NODENAME" = n1 ] && exec {base} -I "$@"')
    taken = socket.socket()
    taken.bind(("127.0.0.1", PORT))
    taken.listen()

    def record(name: str, *flags: str, **env: str) -> str:
        return site.sbatch("record.sh", f"run=runs/{name}", f"path=runs/{name}/path", *flags, **env)

    found = {
        "config": record("a", CONFIG="none.yaml"),
        "launcher": record("b", LAUNCHER="mpirun"),
        "key": site.sbatch("backtrack.sh", "run=runs/c", "path"),
        "path": site.sbatch("backtrack.sh", "run=runs/d", "path=runs/nowhere"),
        "gpus": record("e", "--gpus-per-node=1"),
        "port": record("f", MASTER_PORT=str(PORT)),
        "deepspeed": record("g", PYTHON=bare, VENV=""),
        "venv": record("h", VENV="none"),
    }
    for job in found.values():
        site.ends(job, "FAILED")
    taken.close()
    return found


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("config", ["CONFIG=none.yaml", "no such file"]),
        ("launcher", ["LAUNCHER=mpirun", "srun, deepspeed or torchrun"]),
        ("key", ["'path' is not understood", "key.sub=value"]),
        ("path", ["path runs/nowhere", "record it first"]),
        ("gpus", ["every node", "asked for GPUs (1 a node)", "torch sees none", "--gpus-per-node=0"]),
        ("port", [f"MASTER_PORT={PORT} is in use on node n"]),
        ("deepspeed", ["node n1", "is missing", "deepspeed", "VENV"]),
        ("venv", ["VENV=none has no bin/python"]),
    ],
)
def test_the_last_line_names_the_mistake(site, jobs, what, words):
    log, line = site.log(jobs[what]), site.last_line(jobs[what])
    assert line.startswith(f"disback: job {jobs[what]} (") and all(word in line for word in words), log
    assert "Traceback" not in log and "terminate called" not in log, log
    about = site.cluster.show(jobs[what])
    assert about["ExitCode"] == "2:0" and about["Restarts"] == "0"


def test_ranks_fill_the_sockets_and_memory_grows_in_segments(site, jobs):
    """What every task of the job without DeepSpeed saw."""
    assert set((site.folder / "environment").read_text().splitlines()) == {"block:block expandable_segments:True"}


@pytest.mark.parametrize("signal, code", [("TERM", 143), ("KILL", 137), ("SEGV", 2)])
def test_a_task_that_ends_with_its_step_reports_no_mistake(site, tmp_path, signal, code):
    """Slurm may stop a task, for another that died, while it still looks for its packages. A crash is its own mistake."""
    dying = site.wrapper(f"dying-{signal}", f"kill -{signal} $$")
    env = {"PYTHON": dying, "VENV": "", "DISBACK_HOME": str(REPOSITORY), "DISBACK_JOB_FOLDER": str(tmp_path)}
    ended = site.call("bash", str(SCRIPTS / "task.sh"), "srun", "record", check=False, **env)
    assert ended.startswith(f"{code} ") and (tmp_path / "exit").exists() == (code == 2)


def test_pipeline_and_scripts_outside_of_slurm(site):
    assert "2 disback: CONFIG=none.yaml" in site.call("bash", f"{SCRIPTS}/pipeline.sh", check=False, CONFIG="none.yaml")
    plain = site.call("bash", f"{SCRIPTS}/record.sh", check=False, PATH="/usr/bin:/bin")
    assert plain.startswith("2 disback: submit this script with sbatch"), plain


def test_the_repository_is_found_from_its_own_folders(site):
    """Submitted by relative path, from the repository and from its slurm/ folder; each job gets as far as the bad CONFIG."""
    for folder, script in ((REPOSITORY, "slurm/record.sh"), (REPOSITORY / "slurm", "record.sh")):
        log = site.folder / f"from-{folder.name}.log"
        job = site.cluster.run(
            "env", "-C", str(folder), "CONFIG=none.yaml", "sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1",
            "--ntasks-per-node=1", f"--output={log}", script,
        ).strip()  # fmt: skip
        site.cluster.wait(job)
        assert f"CONFIG=none.yaml: no such file in {folder} or {REPOSITORY}\n" in Path(log).read_text()
