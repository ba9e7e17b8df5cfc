"""Rendezvous of a run's processes, with a check of every node before any weight is loaded.

Every rank writes who it is, and what is wrong with it, to the key-value store of rank 0. Within a time limit rank 0 calls the
roll, prints one line per node and publishes a verdict that all ranks share. A node that does not answer is thus named early,
instead of hanging a collective for half an hour.
"""

import datetime
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.distributed.group import ALONE, seconds, set_environment
from trainer.distributed.interface import choose_interface
from trainer.distributed.job import node_name, report_bad_nodes, write_exit_status
from trainer.errors import NodeTrouble, UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
PATIENCE_SECONDS = 30.0  # before rank 0 says for whom it waits
START_SECONDS = 600.0  # 64 nodes that import torch from one file system at the same time are slow, not dead


def find_device(accelerator) -> tuple[torch.device, str, str]:
    """This rank's device, the device's name, and a GPU's UUID ("" on CPUs). Raises UserError if the job asked for GPUs that
    torch does not see."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        asked = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_GPUS_PER_NODE") or "0"
        if asked != "0" and os.environ.get("DS_ACCELERATOR") != "cpu":
            raise UserError(
                f"the job asked for GPUs ({asked} a node), but torch sees none: check nvidia-smi and "
                f"`python -c 'import torch; print(torch.version.cuda)'` on the node, or submit with --gpus-per-node=0 to run on CPUs"
            )
        return torch.device("cpu"), f"cpu, {torch.get_num_threads()} threads", ""
    count = accelerator.device_count()
    if count == 1 and local > 0:
        local = 0  # srun --gpus-per-task: each task sees its own GPU only
        os.environ["LOCAL_RANK"] = "0"  # from which DeepSpeed derives its device
    if local >= count:
        raise UserError(f"local rank {local} has no GPU: torch sees {count}; start one process per GPU")
    accelerator.set_device(local)
    device = torch.device(accelerator.device_name(local))
    if device.type != "cuda":
        return device, device.type, ""
    about = torch.cuda.get_device_properties(device)
    return device, about.name, str(about.uuid)


def _store(rank: int, size: int, limit: float) -> dist.Store:
    """Key-value store of rank 0, or of torchrun's agent. Raises UserError if the port is in use, NodeTrouble if rank 0 does
    not answer."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise UserError(
                    f"port {port} cannot be used on node {node_name()} ({error.strerror}): set another MASTER_PORT"
                ) from error
    timeout = datetime.timedelta(seconds=limit)
    try:
        store = dist.TCPStore(address, port, size, serves, timeout, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        first = (os.environ.get("DISBACK_NODES", "").split() or [address])[0]
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one message per node
        if speaks:
            report_bad_nodes([first])
        raise NodeTrouble(
            f"node {node_name()}, rank {rank}: rank 0 on node {first} did not answer at {address}:{port} within "
            f"{limit:.0f} s: it has not started, or a firewall blocks the connection",
            speaks,
        ) from error
    return dist.PrefixStore("disback", store)


def _node_of(rank: int, size: int) -> str:
    """The node of a rank that has not reported: Slurm assigns ranks node by node."""
    nodes = os.environ.get("DISBACK_NODES", "").split()
    return nodes[rank * len(nodes) // size] if nodes else "unknown"


def _missing(ranks: list[int], size: int) -> tuple[str, list[str]]:
    nodes = list(dict.fromkeys(_node_of(r, size) for r in ranks))
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} (node {', '.join(nodes)})", nodes


@dataclass(frozen=True)
class Verdict:
    """What rank 0 finds at the roll call. No problem: training can start. mistake: it is the user's, not that of `nodes`."""

    problem: str = ""
    nodes: tuple[str, ...] = ()
    mistake: bool = False


def _roll_call(store: dist.Store, size: int, limit: float) -> Verdict:
    """Rank 0: waits for all ranks and prints one line per node."""
    began, told = time.monotonic(), False
    keys = [f"rank/{rank}" for rank in range(size)]
    while not store.check(keys) and time.monotonic() < began + limit:
        if not told and time.monotonic() > began + PATIENCE_SECONDS:
            told = True
            who, _ = _missing([rank for rank, key in enumerate(keys) if not store.check([key])], size)
            print(f"waiting up to {limit:.0f} s for {who}; {ALONE}", file=sys.stderr, flush=True)
        time.sleep(0.1)
    absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
    if absent:
        who, nodes = _missing(absent, size)
        alone = f" ({ALONE})" if len(absent) == size - 1 else ""
        return Verdict(f"{who} did not answer within {limit:.0f} s of the start{alone}", tuple(nodes))
    answers = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys)}
    by_node: dict[str, list[int]] = {}
    for rank, answer in answers.items():
        by_node.setdefault(answer["node"], []).append(rank)
    bad = {node: answers[r]["problem"] for node, ranks in by_node.items() for r in ranks if answers[r]["problem"]}
    if bad:
        node, problem = next(iter(bad.items()))
        everywhere = len(bad) == len(by_node)
        where = "every node" if everywhere and len(by_node) > 1 else f"node {', '.join(bad) if len(bad) < 9 else node}"
        return Verdict(f"{where}: {problem}", tuple(bad), mistake=everywhere)
    for node, ranks in by_node.items():
        gpus = [answers[r]["gpu"] for r in ranks if answers[r]["gpu"]]
        if len(set(gpus)) < len(gpus):
            problem = f"node {node}: several of the ranks {ranks} share one GPU: start one process per GPU"
            return Verdict(problem, (node,), mistake=True)
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        names = ", ".join(sorted({answers[r]["device"] for r in ranks}))
        print(f"{node}: {span}: {len(ranks)} x {names}", file=sys.stderr, flush=True)
    return Verdict()


def _verdict(store: dist.Store, rank: int, size: int, limit: float) -> Verdict:
    """The verdict of rank 0's roll call, on every rank."""
    if rank > 0:
        try:
            store.wait(["verdict"], datetime.timedelta(seconds=2 * limit))
            verdict = Verdict(**json.loads(store.get("verdict")))
            store.set(f"heard/{rank}", "")
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise NodeTrouble("rank 0 ended during the check of the nodes", speaks=False) from error
        return verdict
    verdict = _roll_call(store, size, limit) if size > 1 else Verdict()
    store.set("verdict", json.dumps(vars(verdict)))
    if verdict.problem:
        if not verdict.mistake:
            report_bad_nodes(verdict.nodes)
        present = [r for r in range(1, size) if store.check([f"rank/{r}"])]
        try:  # the store ends with this process: let the others read the verdict first
            store.wait([f"heard/{r}" for r in present], datetime.timedelta(seconds=5))
        except (dist.DistNetworkError, dist.DistStoreError):
            pass
    return verdict


def _watch(done: threading.Event, size: int, limit: float) -> None:
    """Rank 0's watchdog thread: if the process group or the first all-reduce hangs, says which ranks are missing and ends
    the process."""
    if done.wait(limit):
        return
    # A second connection: the main thread may be blocked in the first one.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False)
    store = dist.PrefixStore("disback", store)
    what = "did not join the process group"
    absent = [r for r in range(size) if not store.check([f"joined/{r}"])]
    if not absent:
        what = "did not finish the first all-reduce"
        absent = [r for r in range(size) if not store.check([f"reduced/{r}"])]
    who, nodes = _missing(absent, size)
    if len(absent) < size:
        report_bad_nodes(nodes)
    else:
        who = "all ranks answered, but they"  # each waits for the others: no node is to blame
    over = os.environ.get("GLOO_SOCKET_IFNAME", "any interface")
    text = f"{who} {what} within {limit:.0f} s over {over}: a firewall between the nodes, or the wrong interface: set "
    text += "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO shows more"
    write_exit_status(1, text)
    print(f"disback: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def _meet(rank: int, size: int, device: str, gpu: str, problem: str) -> dist.Store:
    """The roll call, with what this rank says about itself. Raises UserError or NodeTrouble for its verdict."""
    limit = seconds("DISBACK_START_SECONDS", START_SECONDS)
    store = _store(rank, size, limit)
    store.set(f"rank/{rank}", json.dumps({"node": node_name(), "device": device, "gpu": gpu, "problem": problem}))
    verdict = _verdict(store, rank, size, limit)
    if verdict.problem:
        raise UserError(verdict.problem) if verdict.mistake else NodeTrouble(verdict.problem, speaks=rank == 0)
    return store


def check_group(device: str) -> tuple[int, int, int]:
    """Rank, number of processes and local rank of a process that only takes its share of some work: it joins no process
    group. device: its name.

    Raises UserError or NodeTrouble unless all processes are there: nobody else would do their share.
    """
    rank, size, local = set_environment()
    if size > 1:
        store = _meet(rank, size, device, "", "")
        if rank == 0:  # the store may end with this process: let the others read the verdict first
            store.wait([f"heard/{r}" for r in range(1, size)], datetime.timedelta(seconds=START_SECONDS))
    return rank, size, local


def join_process_group(accelerator, backend: str) -> torch.device:
    """Checks all nodes, joins the process group and times an all-reduce. Returns this rank's device.

    accelerator: DeepSpeed's. Raises UserError if no node can compute, NodeTrouble if some nodes cannot, or do not answer
    within DISBACK_START_SECONDS (default 600).
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = seconds("DISBACK_START_SECONDS", START_SECONDS)
    if size > 1:
        choose_interface()
    device, name, gpu, problem = torch.device("cpu"), "", "", ""
    try:
        device, name, gpu = find_device(accelerator)
    except UserError as error:
        if size == 1:
            raise
        problem = str(error)
    store = _meet(rank, size, name, gpu, problem)
    done = threading.Event()
    if rank == 0:
        threading.Thread(target=_watch, args=(done, size, limit), daemon=True).start()
    binding = {"device_id": device} if device.type == "cuda" and size > 1 else {}
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
        **binding,
    )
    store.set(f"joined/{rank}", "")
    if size > 1:
        _time_all_reduce(device, rank, size)
        store.set(f"reduced/{rank}", "")
    done.set()
    return device


def _time_all_reduce(device: torch.device, rank: int, size: int) -> None:
    """Prints the times of two all-reduces: the first opens the connections, the second shows their bandwidth."""
    data = torch.ones(2**26 if device.type == "cuda" else 2**20, device=device)
    spent = []
    for _ in range(2):
        began = time.monotonic()
        dist.all_reduce(data)
        value = float(data[0])  # synchronises the device
        data.fill_(1.0)
        spent.append(time.monotonic() - began)
    if value != size:
        raise NodeTrouble(f"the first all-reduce of {size} ones gave {value} on node {node_name()}", speaks=True)
    if rank == 0:
        megabytes = data.numel() * 4 / 1e6
        over = os.environ.get("GLOO_SOCKET_IFNAME")
        print(
            f"all-reduce of {megabytes:.0f} MB over {size} ranks{f' on {over}' if over else ''}: {spent[0]:.3f} s at first, "
            f"then {spent[1]:.3f} s ({megabytes / 1e3 / spent[1]:.1f} GB/s)",
            file=sys.stderr,
            flush=True,
        )
