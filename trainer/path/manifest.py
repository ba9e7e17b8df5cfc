"""The degradation path on disk: nodes from the teacher (node 0) to what fits the untrained generator (node N)."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from models.pipeline import files_hash
from models.settings import LoraSettings
from trainer.checkpoint.files import write_text
from trainer.distributed.world import World, from_main
from trainer.errors import UserError

MANIFEST = "path.json"
FORMAT = 1


@dataclass(frozen=True)
class Node:
    """index: 0 is the teacher. step: recording step. file: weights file, relative to the path's folder (the teacher's
    own file for node 0, not a copy). distances: mean squared distance of predictions on the recording's probe samples,
    to node 0 and to the node before."""

    index: int
    step: int
    file: str
    sha256: str
    bytes: int
    distance_to_node_0: float
    distance_to_neighbour: float


@dataclass(frozen=True)
class DegradationPath:
    """A verified path. folder(i) is a weights folder that the denoiser's class loads with from_pretrained; of a path of LoRA
    nodes, for i > 0, a LoRA folder that `load_lora_adapter(folder, prefix=PART, use_safetensors=True)` puts on the
    teacher (PART: "unet" or "transformer")."""

    root: Path
    teacher: Path
    nodes: list[Node]

    def folder(self, index: int) -> Path:
        return self.root / f"node-{index:04d}" if index else self.teacher


def file_hash(file: Path) -> str:
    """The sha256 (hexadecimal) of a file."""
    return files_hash([file])


def generator_hash(start_hash: str, timesteps: tuple[int, ...]) -> str:
    """The identity of the untrained generator: its weights and the timesteps that they are evaluated at."""
    return hashlib.sha256(f"{start_hash}@{_joined(timesteps)}".encode()).hexdigest()


def _joined(timesteps: Sequence[int]) -> str:
    return ",".join(str(t) for t in timesteps)


def write_manifest(
    root: Path,
    teacher: Path,
    hashes: tuple[str, str],
    timesteps: tuple[int, ...],
    nodes: list[Node],
    lora: LoraSettings,
) -> None:
    """Writes path.json, last of all and atomically: a path without it is not a path."""
    reference = root / "node-0000"
    reference.mkdir(exist_ok=True)
    (reference / "teacher.json").write_text(json.dumps({"teacher": str(teacher), "sha256": hashes[0]}, indent=2) + "\n")
    record = {
        "format": FORMAT,
        "teacher": hashes[0],
        "generator": hashes[1],
        "conditioning_timestep": timesteps[0],
        "timesteps": timesteps,
        **_kind(lora),
        "nodes": [asdict(node) for node in nodes],
    }
    write_text(json.dumps(record, indent=2) + "\n", root / MANIFEST)


def _kind(lora: LoraSettings) -> dict:
    """What the manifest says of the nodes' kind."""
    return {"kind": "lora", "lora": lora.identity()} if lora.rank else {"kind": "full"}


def open_path(
    root: Path,
    teacher: Path,
    hashes: tuple[str, str],
    timesteps: tuple[int, ...],
    world: World,
    lora: LoraSettings,
    digest: Callable[[Sequence[Path]], str] = files_hash,
) -> DegradationPath:
    """Reads and verifies a recorded path: it must be this teacher's and this generator start's, its nodes of the kind
    that the run trains, and every node must be there to the byte. hashes: `weights_hash` of the teacher's folder and of
    the generator start's. digest: hashes files, or remembers their hashes. Rank 0 alone calls it; all ranks raise the same
    UserError."""
    problem = nodes = None
    if world.main:
        try:
            nodes = _verified(root, *hashes, timesteps, lora, digest)
        except UserError as error:
            problem = str(error)
    problem, nodes = from_main((problem, nodes), world)
    if problem:
        raise UserError(problem)
    return DegradationPath(root, teacher, nodes)


def _verified(
    root: Path,
    teacher: str,
    start: str,
    timesteps: tuple[int, ...],
    lora: LoraSettings,
    digest: Callable[[Sequence[Path]], str],
) -> list[Node]:
    file = root / MANIFEST
    try:
        record = json.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"path {root}: {MANIFEST} cannot be read ({error.strerror}): record it first with `disback record`, or set `path`"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"path {file}: not JSON ({error}): record the path again") from error
    if record.get("format") != FORMAT:
        raise UserError(
            f"path {file}: format {record.get('format')}, this version reads {FORMAT}: record the path again"
        )
    if record["teacher"] != teacher:
        raise UserError(
            f"path {root} was recorded from another teacher (sha256 {record['teacher'][:12]}..., this one has "
            f"{teacher[:12]}...): set `pipeline` to its teacher, or record a path for this one"
        )
    if record["generator"] != generator_hash(start, timesteps):
        recorded = _joined(record.get("timesteps", [record["conditioning_timestep"]]))
        raise UserError(
            f"path {root} was recorded for another generator start (timestep {recorded}, this run {_joined(timesteps)}; "
            "or other weights): set `conditioning_timestep`, `backtrack.student_timesteps` and `generator_start` as they "
            "were recorded, or record again"
        )
    _check_kind(root, {key: record[key] for key in ("kind", "lora") if key in record}, _kind(lora))
    nodes = [Node(**node) for node in record["nodes"]]
    if [node.index for node in nodes] != list(range(len(nodes))) or len(nodes) < 2:
        raise UserError(f"path {file}: nodes {[n.index for n in nodes]} are not 0, 1, ..., N: record the path again")
    for node in nodes[1:]:
        weights = root / node.file
        if not weights.is_file():
            raise UserError(f"path {root}: node {node.index} is missing ({weights}): record the path again")
        if weights.stat().st_size != node.bytes or digest([weights]) != node.sha256:
            raise UserError(
                f"path {root}: node {node.index} is damaged ({weights} has not the size and sha256 of {MANIFEST}): "
                "copy it again from where it was recorded, or record the path again"
            )
    return nodes


def _check_kind(root: Path, recorded: dict, wanted: dict) -> None:
    recorded = {"kind": "full"} | recorded
    if recorded == wanted:
        return
    if recorded["kind"] != wanted["kind"]:
        has = "whole networks" if recorded["kind"] == "full" else f"LoRA of rank {recorded['lora']['rank']}"
        wants = "whole networks (lora.rank=0)" if wanted["kind"] == "full" else f"lora.rank={wanted['lora']['rank']}"
        what = f"its nodes are {has}, this run trains {wants}"
    else:
        keys = [key for key in wanted["lora"] if recorded["lora"][key] != wanted["lora"][key]]
        what = "; ".join(f"lora.{key} was {recorded['lora'][key]}, is now {wanted['lora'][key]}" for key in keys)
    raise UserError(f"path {root}: {what}: set `lora` as it was recorded, or record a path for this one (path=...)")
