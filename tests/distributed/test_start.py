"""The start of one and two ranks on a machine that can compile nothing."""

import subprocess
import sys

import pytest
import support

# The smallest run: the process group, and one collective of DeepSpeed's.
START = """
import trainer.distributed.logs  # before DeepSpeed, whose messages it filters
import deepspeed, torch
from trainer.distributed.world import finish, start

world = start()
total = torch.ones(3)
deepspeed.comm.all_reduce(total)
assert total.tolist() == [world.size] * 3
if world.main:
    print("reduced over", world.size)
finish()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_compiled_and_no_lock_is_waited_for(tmp_path, ranks):
    """A killed process has left torch's lock on the build of DeepSpeed's CPU kernel, and there is neither a compiler nor
    ninja: the start does not look at them."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"  # where torch would build it
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "start.py").write_text(START)
    env = support.environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "PATH": str(tmp_path / "bin")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    call = [sys.executable] if ranks == 1 else launcher
    done = subprocess.run([*call, tmp_path / "start.py"], capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"reduced over {ranks}\n"), done.stderr
    assert list((tmp_path / "extensions").rglob("*")) == [lock.parent, lock]
