"""Launchers' variables: whose they are is checked before any work is split by them."""

import os
import subprocess
import sys

import pytest
import support

from trainer.distributed import group
from trainer.errors import RankError, UserError

COMPLETE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def given(monkeypatch):
    """Sets the variables of a launcher, and no others."""
    monkeypatch.setattr(group, "_rank", 0)
    for name in (*COMPLETE, *SLURM):  # also undoes what the code under test sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_them(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_a_process_without_a_launcher_is_alone(given):
    given({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"})  # a batch script, or an interactive shell
    assert group.set_environment() == (0, 1, 0) and os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert group.set_environment() == (0, 1, 0)  # what it has set itself


def test_complete_variables(given):
    given(COMPLETE)
    assert group.set_environment() == (1, 8, 1) and group.this_rank() == 1 and not group.started_by_srun()


def test_srun(given):
    given({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(UserError, match="srun starts 4 tasks but MASTER_ADDR is not set: export it in the job script"):
        group.set_environment()
    given({"MASTER_ADDR": "n0", "MASTER_PORT": "1234"})
    assert group.set_environment() == (3, 4, 1) and group.started_by_srun()


def test_one_process_needs_no_more_than_its_number(given):
    given({"RANK": "0", "WORLD_SIZE": "1"})
    assert group.set_environment() == (0, 1, 0) and os.environ["LOCAL_RANK"] == "0" and int(os.environ["MASTER_PORT"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "0"}, "RANK=0: LOCAL_RANK is not set, WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "8"}, "RANK=0, WORLD_SIZE=8: LOCAL_RANK is not set, MASTER_ADDR is not set"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: RANK is not set"),
        ({**COMPLETE, "WORLD_SIZE": ""}, "RANK=1, LOCAL_RANK=1: WORLD_SIZE is empty"),
        ({**COMPLETE, "MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
        ({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, "launcher variables: RANK is empty"),
        ({**COMPLETE, "RANK": "8"}, "RANK=8 is not one of WORLD_SIZE=8 processes, 0 to 7"),
        ({**COMPLETE, "LOCAL_RANK": "9"}, "LOCAL_RANK=9 is not one of WORLD_SIZE=8"),
        ({**COMPLETE, "RANK": "-1"}, "RANK=-1 is not a whole number from 0 on"),
        ({**COMPLETE, "WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a whole number from 1 on"),
        ({**COMPLETE, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        ({"SLURM_PROCID": "", "SLURM_STEP_NUM_TASKS": "2"}, "srun starts 2 tasks but SLURM_PROCID is not set"),
    ],
)
def test_incomplete_and_impossible_variables_are_one_line(given, values, message):
    given(values)
    with pytest.raises(UserError, match=message) as caught:
        group.set_environment()
    assert "\n" not in str(caught.value) and group.this_rank() == 0


def test_each_process_tells_what_is_wrong_with_its_own_variables(given, tmp_path):
    """Rank 3 too: there may be no rank 0. Before the configuration is read, which has a mistake of its own."""
    given({"RANK": "3", "WORLD_SIZE": "8"})
    with pytest.raises(RankError):
        group.set_environment()
    for verb in ("record", "evaluate", "report"):
        done = support.call(verb, "--config", str(support.TINY), f"run={tmp_path}")
        assert done.returncode == 2 and done.stderr.startswith("disback: launcher variables RANK=3, WORLD_SIZE=8: ")
    assert not list(tmp_path.iterdir())


def test_a_verb_that_splits_nothing_does_not_care(given, tmp_path):
    given({"RANK": "3", "WORLD_SIZE": "nonsense"})
    done = support.call("plan", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "none.yaml: cannot be read" in done.stderr


def test_a_home_that_cannot_be_written(tmp_path):
    """Neither of the libraries that keep something there says a word."""
    code = "from trainer.entry import spare_home; spare_home(); import os, matplotlib; print(os.environ['TRITON_CACHE_DIR'])"
    env = support.environment() | {"HOME": "/dev/null/home", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith(f"{tmp_path}/disback-")


def test_a_time_limit_that_is_none(monkeypatch):
    monkeypatch.setenv("DISBACK_START_SECONDS", "ten")
    with pytest.raises(UserError, match="DISBACK_START_SECONDS=ten: must be a number of seconds"):
        group.seconds("DISBACK_START_SECONDS", 600.0)
    monkeypatch.setenv("DISBACK_START_SECONDS", "")
    assert group.seconds("DISBACK_START_SECONDS", 600.0) == 600.0
