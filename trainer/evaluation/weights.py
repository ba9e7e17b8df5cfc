"""Finds the weights of the metrics' networks on disk. Nothing is downloaded: compute nodes often have no network.

They are looked for where `evaluate.networks` says, in the folder `evaluate.weights`, and in the caches that other tools
download to: TORCH_HOME, HF_HOME.
"""

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache

from models.scorers import published
from models.scorers.clip import LOCAL, cached_clip, tag_config
from models.scorers.published import WeightsFile
from trainer.distributed.world import first_problem, from_main
from trainer.errors import UserError
from trainer.evaluation.protocols import Protocol
from trainer.training.run import Run

FILES = {
    "inception": published.INCEPTION,
    "dinov2": published.DINOV2,
    "cmmd": published.CMMD,
    "pick_score": published.PICK_SCORE,
    "hps_v2_1": published.HPS_V2_1,
}
FOLDERS = ("cmmd", "pick_score")  # networks that are a folder: weights, configuration, tokenizer


@dataclass(frozen=True)
class Weights:
    """A network's weights. path: the file or folder, if there is one. published: whether published numbers come from
    them. identity: what they are, for the protocol's hash. looked: where they were looked for. problem: why they cannot be
    used. tag: open_clip's name for them."""

    name: str
    wanted: str
    path: Path | None = None
    published: bool = True
    identity: str = "published"
    looked: tuple[str, ...] = ()
    problem: str = ""
    tag: str = ""

    @property
    def pretrained(self) -> str:
        """For open_clip: a tag, which says how images are prepared, or a file. A local-dir: model has its weights itself."""
        return self.tag or str(self.path or "")

    def line(self) -> str:
        """One line for a person."""
        state = self.problem or f"found: {self.path or self.identity}"
        return f"{self.name:10} {state}" + (f"\n{'':10} wanted: {self.wanted}" if self.problem else "")


def find_weights(run: Run, protocol: Protocol, names: list[str]) -> dict[str, Weights]:
    """The weights of networks, by name. Rank 0 looks, and hashes what has a published hash. Every rank must call it. Raises
    UserError if a file that rank 0 found is not on all nodes."""
    found = from_main({name: _find(run, protocol, name) for name in names} if run.world.main else None, run.world)
    absent = next((w.path for w in found.values() if w.path and not w.problem and not w.path.exists()), None)
    problem = f"{absent} is on the first node but not on {socket.gethostname()}: put it on a file system that all share"
    if problem := first_problem(problem if absent else None, run.world):
        raise UserError(problem)
    return found


def require(found: dict[str, Weights]) -> None:
    """Raises UserError if any weights are missing or wrong."""
    if bad := [weights for weights in found.values() if weights.problem]:
        first = bad[0]
        more = f" (and {len(bad) - 1} more: `disback evaluate --weights` lists all)" if len(bad) > 1 else ""
        raise UserError(f"weights of {first.name}: {first.problem}: get {first.wanted}{more}")


def _find(run: Run, protocol: Protocol, name: str) -> Weights:
    settings = run.settings.evaluate
    if name == "clip":
        return _find_clip(run, protocol)
    file = FILES[name]
    wanted = _wanted(file)
    if given := settings.networks.get(name):
        path = Path(given)
        if not path.exists():
            return Weights(name, wanted, problem=f"evaluate.networks.{name}: {path} does not exist")
        return Weights(name, wanted, path, published=False, identity=_identity(run, path))
    places = [folder / part for folder in _folders(run, file) for part in _parts(name, file)]
    path = next((place for place in places if place.exists()), None) or _cached(name, file)
    looked = tuple(str(place.parent) for place in places)
    if path is None:
        cache = [constants.HF_HUB_CACHE] if file.repository else []
        return Weights(
            name, wanted, looked=looked, problem=f"not found in {', '.join(dict.fromkeys([*looked, *cache]))}"
        )
    if file.sha256 and (digest := run.digest([path])) != file.sha256:
        text = f"{path} has sha256 {digest[:12]}..., not {file.sha256[:12]}...: it is damaged, or another file"
        return Weights(name, wanted, path, problem=text)
    return Weights(name, wanted, path, looked=looked)


def _find_clip(run: Run, protocol: Protocol) -> Weights:
    settings, model, pretrained = run.settings.evaluate, protocol.clip.model, protocol.clip.pretrained
    tag = tag_config(model, pretrained)
    repository = tag.get("hf_hub", "").rpartition("/")[0]
    wanted = f"open_clip's {model} {pretrained}" + (f" (`hf download {repository}`)" if repository else "")
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        if not folder.is_dir():
            return Weights("clip", wanted, problem=f"evaluate.clip_model: {folder} is not a folder")
        return Weights("clip", wanted, published=False, identity=_identity(run, folder))
    given = settings.networks.get("clip", "" if tag else pretrained)
    if given:
        path = Path(given)
        if not path.is_file():
            return Weights("clip", wanted, problem=f"{path} is neither a file nor a tag of open_clip's {model}")
        return Weights("clip", wanted, path, published=False, identity=f"{model}, {_identity(run, path)}")
    names = published.CLIP_G.names
    own = [Path(settings.weights) / Path(repository).name / part for part in names if settings.weights]
    path = next((place for place in own if place.is_file()), None) or cached_clip(model, pretrained)
    looked = (*(str(place.parent) for place in own[:1]), constants.HF_HUB_CACHE)
    if path is None:
        return Weights("clip", wanted, looked=looked, problem=f"{model} {pretrained}: not found in {', '.join(looked)}")
    return Weights("clip", wanted, path, identity=f"{model} {pretrained}", looked=looked, tag=pretrained)


def _folders(run: Run, file: WeightsFile) -> list[Path]:
    own = run.settings.evaluate.weights
    hub = [] if file.repository else [Path(torch.hub.get_dir()) / "checkpoints"]
    return [Path(own), *hub] if own else hub


def _parts(name: str, file: WeightsFile) -> list[str]:
    """What the weights may be called in a folder."""
    return [Path(file.repository).name] if name in FOLDERS else list(file.names)


def _cached(name: str, file: WeightsFile) -> Path | None:
    """A file, or the folder around it, in the hub's cache."""
    for part in file.names if file.repository else ():
        found = try_to_load_from_cache(file.repository, part)
        if isinstance(found, str):
            return Path(found).parent if name in FOLDERS else Path(found)
    return None


def _wanted(file: WeightsFile) -> str:
    if file.repository:
        return f"{file.names[0]} of {file.repository} (`hf download {file.repository}`)"
    size = f", {file.bytes / 1e6:.0f} MB" if file.bytes else ""
    return f"{file.names[0]}{size}, from {file.url}, into evaluate.weights or {torch.hub.get_dir()}/checkpoints"


def _identity(run: Run, path: Path) -> str:
    """A file's hash, or that of a folder's weights."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")) if path.is_dir() else [path]
    return f"sha256 {' '.join(run.digest([file])[:12] for file in files)}"
