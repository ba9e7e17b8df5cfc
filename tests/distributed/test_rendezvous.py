"""The check of all nodes at the start: a node that does not answer, cannot compute or hangs is named within the limit."""

import os
import socket
import subprocess
import sys
import time

import pytest
import support

from trainer.distributed.interface import interface_toward
from trainer.distributed.job import write_exit_status
from trainer.distributed.rendezvous import join_process_group
from trainer.errors import UserError

# One rank, without DeepSpeed, which is slow to import: all that is asked of it is the accelerator's name.
RANK = """
import time
from trainer.distributed import rendezvous

class Cpu:
    def device_name(self):
        return "cpu"

if {hangs}:
    rendezvous.dist.init_process_group = lambda *a, **k: time.sleep(60)
rendezvous.set_environment()
try:
    rendezvous.join_process_group(Cpu(), "gloo")
except (rendezvous.UserError, rendezvous.NodeTrouble) as error:
    print(type(error).__name__, getattr(error, "speaks", ""), error)
"""


def ranks(folder, size: int, *started: int, broken: tuple = (), hangs: tuple = (), seconds: int = 20) -> list[str]:
    """The kind of error, who prints it, and the message, of each started rank of `size`; every rank is on its own node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = support.environment() | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_RANK": "0",
        "DISBACK_NODES": " ".join(f"node{r}" for r in range(size)), "DISBACK_PEERS": "127.0.0.1 127.0.0.1",
        "DISBACK_JOB_FOLDER": str(folder), "DISBACK_START_SECONDS": str(seconds),
    }  # fmt: skip
    processes = {
        r: subprocess.Popen(
            [sys.executable, "-c", RANK.format(hangs=r in hangs)],
            env=env
            | {"RANK": str(r), "SLURMD_NODENAME": f"node{r}", "SLURM_NODEID": str(r)}
            | ({"SLURM_GPUS_ON_NODE": "8"} if r in broken else {}),  # a job on GPUs that torch does not see
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in started
    }
    found = [process.communicate(timeout=120)[0] for r, process in processes.items() if r not in hangs]
    for r in hangs:
        processes[r].kill()
        processes[r].communicate()
    return found


def test_a_rank_that_never_comes(tmp_path):
    (said,) = ranks(tmp_path, 2, 0, seconds=3)
    assert said == (
        "NodeTrouble True rank 1 (node node1) did not answer within 3 s of the start (`unset RANK LOCAL_RANK WORLD_SIZE` "
        "runs one process)\n"
    )
    assert (tmp_path / "bad-nodes").read_text() == "node1\n"


def test_rank_0_never_comes(tmp_path):
    (said,) = ranks(tmp_path, 2, 1, seconds=3)
    assert "NodeTrouble True node node1, rank 1: rank 0 on node node0 did not answer at 127.0.0.1:" in said
    assert (tmp_path / "bad-nodes").read_text() == "node0\n"


@pytest.mark.parametrize(("broken", "kind"), [((1,), "one node"), ((0, 1), "all nodes")])
def test_one_node_that_cannot_compute_is_not_the_users_mistake_but_all_are(tmp_path, broken, kind):
    said = ranks(tmp_path, 2, 0, 1, broken=broken)
    if kind == "one node":
        expected = "node node1: the job asked for GPUs (8 a node), but torch sees none"
        assert all(text.startswith(f"NodeTrouble {rank == 0} {expected}") for rank, text in enumerate(said)), said
        assert (tmp_path / "bad-nodes").read_text() == "node1\n"
    else:
        expected = "UserError  every node: the job asked for GPUs (8 a node), but torch sees none"
        assert all(text.startswith(expected) for text in said), said
        assert not (tmp_path / "bad-nodes").exists()


def test_a_rank_that_hangs_in_the_process_group(tmp_path):
    (said,) = ranks(tmp_path, 2, 0, 1, hangs=(1,), seconds=10)
    assert "disback: all ranks answered, but they did not join the process group within 10 s over lo" in said
    assert (tmp_path / "exit").read_text().startswith("1 all ranks answered") and not (tmp_path / "bad-nodes").exists()


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        values = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"port {port} cannot be used on node .*set another MASTER_PORT"):
            join_process_group(type("Cpu", (), {"device_name": lambda self: "cpu"})(), "gloo")


def test_the_first_exit_status_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("DISBACK_JOB_FOLDER", str(tmp_path))
    write_exit_status(0, "fine")
    assert not os.listdir(tmp_path)
    write_exit_status(2, "the cause")
    write_exit_status(1, "the consequence")
    assert (tmp_path / "exit").read_text() == "2 the cause\n"


def test_the_interface_toward_an_address():
    assert interface_toward("127.0.0.1") == "lo"
    began = time.monotonic()
    assert interface_toward("no.such.host.invalid") is None and time.monotonic() - began < 20
