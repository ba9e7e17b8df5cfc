"""DeepSpeed's communication layer on torch's process group.

Touches one internal of DeepSpeed (tested with 0.19.8); trainer.engine.deepspeed_internals, a floor above, has the others.
"""

import datetime

import deepspeed


def init_communication(timeout: datetime.timedelta) -> None:
    """Puts DeepSpeed on top of torch's process group, without the kernel that it would compile on CPUs.

    On a machine without GPUs DeepSpeed compiles a shared-memory all-reduce at its first start. That needs a C++ compiler
    and ninja, and if the process is killed meanwhile, torch's build lock stays and every later start waits for it
    silently. Only `inference_all_reduce` uses the kernel, which training never calls.
    """
    deepspeed.ops.__compatible_ops__ = {}  # DeepSpeed builds the kernel only if this table says that it can
    deepspeed.init_distributed(verbose=False, timeout=timeout)
