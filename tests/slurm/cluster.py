"""A real two-node Slurm on this machine: munged, slurmctld and two slurmd in a temporary folder, as child processes that end
with this one.

No systemd, cgroups or accounting database. Nodes n0 and n1 have four CPUs (on paper), an address and one GPU that does not
exist. Their names do not resolve, as on clusters without DNS for nodes. Jobs in partition `urgent` preempt those in `main`.
"""

import ctypes
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
MinJobAge=3600
KillWait=10
OverTimeLimit=0
InactiveLimit=0
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000 Gres=gpu:1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000 Gres=gpu:1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n0,n1 PriorityTier=10 MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The Debian packages of the programs that are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    return sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Cluster:
    """A context manager that runs the cluster. `env` is the environment for Slurm commands."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged runs as another user
        self.env = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        }
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", "spool", "spool/n0", "spool/n1"):
            (self.folder / name).mkdir()
        values = {
            "host": socket.gethostname(),
            "ports": _free_ports(3),
            "user": getpass.getuser(),
            "folder": self.folder,
        }
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self._munge()
        self._spawn("slurmctld", "-D", "-c")
        self._spawn("slurmd", "-D", "-N", "n0")
        self._spawn("slurmd", "-D", "-N", "n1")
        self._until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60, "two idle nodes")

    def _munge(self) -> None:
        """Starts a private munged with its own key; as user munge if we are root, which munged refuses to run as."""
        folder = self.folder / "munge"
        folder.mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        as_user = {}
        if os.getuid() == 0:
            owner = pwd.getpwnam("munge")
            as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            for path in (folder, folder / "key"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        places = [f"--{name}-file={folder / name}" for name in ("key", "pid", "seed", "log")]
        self._spawn("munged", "-F", "--force", f"--socket={folder / 'socket'}", *places, **as_user)
        self._until((folder / "socket").exists, 20, "munged's socket")
        (self.folder / "munge.socket").symlink_to(folder / "socket")

    def _spawn(self, *call: str, **options: object) -> None:
        log = (self.folder / f"{call[0]}.out").open("ab")
        self.daemons.append(
            subprocess.Popen(
                call, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent,
                process_group=0, **options,
            )
        )  # fmt: skip

    def _until(self, true, seconds: float, what: str) -> None:
        limit = time.monotonic() + seconds
        while not true():
            if time.monotonic() > limit:
                logs = "".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in self.folder.glob("*.[lo][ou][gt]"))
                raise TimeoutError(f"no {what} within {seconds:.0f} s\n{logs}")
            time.sleep(0.1)

    def run(self, *call: str, check: bool = True, **env: str) -> str:
        """A Slurm command's stdout. Raises with its stderr if it fails."""
        done = subprocess.run(call, env=self.env | env, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(call)}: {done.stderr}")
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ranks(self, job: str) -> dict[int, int]:
        """The trainer processes of a job on this machine: rank -> pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"SLURM_JOB_ID={job}".encode() in variables and b"-m\0trainer." in command and b"status" not in command:
                rank = next((v for v in variables if v.startswith(b"SLURM_PROCID=")), b"=0")
                found[int(rank.partition(b"=")[2])] = int(folder.name)
        return found

    def wait(self, job: str, states: set[str] = FINAL, seconds: float = 500, restarts: int = 0) -> dict[str, str]:
        """Waits until a job with at least this many restarts is in one of the states. Releases a requeued job from the two
        minutes for which Slurm holds it back."""
        limit = time.monotonic() + seconds
        resting = 0.0
        while True:
            about = self.show(job)
            if about["JobState"] in states and int(about["Restarts"]) >= restarts:
                return about
            if about["JobState"] == "PENDING" and about["Restarts"] != "0" and about["Reason"] == "BeginTime":
                resting = resting or time.monotonic()
                # Not right after it ended: the nodes would mistake the new start for the remains of the old one.
                if time.monotonic() > resting + 3:
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
                    resting = 0.0
            if time.monotonic() > limit:
                raise TimeoutError(f"job {job} is {about['JobState']} ({about['Reason']}) after {seconds:.0f} s")
            time.sleep(0.2)

    def __exit__(self, *exception: object) -> None:
        if (self.folder / "slurm.conf").exists() and len(self.daemons) == 4:
            self.run("scancel", "--state=PENDING", f"--user={getpass.getuser()}", check=False)
            self.run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}", check=False)
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            try:
                self._until(lambda: not self.run("squeue", "-h", check=False).strip(), 30, "empty queue")
            except TimeoutError as error:
                print(error)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
