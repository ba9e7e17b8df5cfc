"""Real images for evaluation, at their own size, and files of statistics of such images."""

import hashlib
import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.images import decode
from data.settings import DataSettings
from data.shard_index import load_index, usable_rows

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BMP = b"BM"
LEGACY = ("legacy_pytorch", "legacy_tensorflow")  # clean-fid's modes that are not `clean`
DEFAULTS = DataSettings()
THREADS = 8  # that decode ahead, at most: so many images are held


@dataclass(frozen=True)
class Place:
    """Where an image's bytes are: a file of its own, or `size` bytes from `offset` in a shard. name: without the folder."""

    name: str
    file: Path
    offset: int = 0
    size: int | None = None


class ReferenceImages(Sequence[Tensor]):
    """Images by number, decoded when asked for: uint8 [3, H, W], each at its own size. Whoever asks for them in order gets
    the next ones decoded meanwhile, on other threads."""

    def __init__(
        self,
        source: Path | Sequence[Path],
        protocol_decoding: bool = True,
        image_keys: list[str] = DEFAULTS.image_keys,
    ):
        """source: a folder (all images below it, sorted by path; hidden files and folders are skipped) or shards (the
        image of each sample, in the shards' order; samples without one are counted in `rejected`, by reason).

        protocol_decoding: decode as clean-fid, pytorch-fid and DMD2 do, by Pillow's convert("RGB"): EXIF orientation is
        ignored, and alpha dropped, not composited. Otherwise as training images are decoded (data/images.py). image_keys:
        file extensions in shards. Raises DataError if there are no images, or a folder or shard cannot be read.
        """
        self.protocol_decoding = protocol_decoding
        self.rejected: Counter[str] = Counter()
        self._ahead: dict[int, Future[Tensor]] = {}
        self._next = -1
        if isinstance(source, Path):
            self.places = _in_folder(source)
        else:
            self.places = [place for shard in source for place in _in_shard(shard, image_keys, self.rejected)]
            if not self.places:
                raise DataError(f"reference images: no image in the {len(source)} shards: name others")

    @cached_property
    def identity(self) -> str:
        """A hash of the images' relative names and sizes in bytes, in order, and of how they are decoded: 16 hex digits.
        The same after copying; reads no image."""
        digest = hashlib.sha256(f"protocol_decoding={self.protocol_decoding}\n".encode())
        for place in self.places:
            try:
                size = place.file.stat().st_size if place.size is None else place.size
            except OSError as error:
                raise _unreadable(place, error.strerror) from error
            digest.update(f"{place.name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tensor:
        """Image uint8 [3, H, W]. Raises DataError, which names its file, if it cannot be read or decoded."""
        in_order, self._next = number == self._next, number + 1
        made = self._ahead.pop(number, None)
        if in_order:
            for later in range(number + 1, min(number + 1 + self._threads, len(self))):
                if later not in self._ahead:
                    self._ahead[later] = self._pool.submit(self._decoded, later)
        else:
            skipped, self._ahead = self._ahead, {}
            for one in skipped.values():
                one.cancel()
        return made.result() if made else self._decoded(number)

    @cached_property
    def _threads(self) -> int:
        return min(THREADS, len(os.sched_getaffinity(0)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads)

    def _decoded(self, number: int) -> Tensor:
        place = self.places[number]
        raw = _read(place)
        try:
            if self.protocol_decoding or raw.startswith(BMP):  # torchvision does not read BMP
                with Image.open(io.BytesIO(raw)) as image:
                    image.load()
                    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
                # NumPy's copy: torch would start threads of its own on each of ours.
                return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
            return decode(raw)
        except Exception as error:  # Pillow's decoders raise nearly anything for damaged data
            raise _unreadable(place, f"does not decode ({' '.join(str(error).split())[:200]})") from error


def _in_folder(folder: Path) -> list[Place]:
    names = sorted(_image_names(folder))
    if not names:
        known = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"reference images {folder}: no image ({known}) in it: check the path, or name shards")
    return [Place(name, folder / name) for name in names]


def _in_shard(shard: Path, image_keys: list[str], rejected: Counter) -> Iterator[Place]:
    index = load_index(shard)
    rows, rejects = usable_rows(index, {"image": image_keys})
    rejected.update(rejects)
    offsets, sizes = index.locate(image_keys)
    for row in rows:
        key = index.keys[row].decode("utf-8", "replace")
        yield Place(f"{shard.name}/{key}", shard, int(offsets[row]), int(sizes[row]))


def _image_names(root: Path) -> Iterator[str]:
    """Names of images below a folder. Links to folders are followed, except to one that they are in."""

    def fail(error: OSError) -> None:
        raise DataError(f"reference images {error.filename}: {error.strerror}: check the folder") from error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        here = Path(folder)
        real = here.resolve()
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not ((here / name).is_symlink() and real.is_relative_to((here / name).resolve()))
        ]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield (here / name).relative_to(root).as_posix()


def _read(place: Place) -> bytes:
    try:
        with place.file.open("rb") as file:
            file.seek(place.offset)
            raw = file.read(-1 if place.size is None else place.size)
    except OSError as error:
        raise _unreadable(place, error.strerror) from error
    if place.size is not None and len(raw) < place.size:
        raise _unreadable(place, "the shard ends inside it")
    return raw


def _unreadable(place: Place, reason: str | None) -> DataError:
    where = place.file if place.size is None else f"{place.file}, {place.name.partition('/')[2]}"
    return DataError(f"reference image {where}: {reason}: copy it again, or remove it")


def read_statistics(file: Path) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D], float64, from the `mu` and `sigma` of an .npz as clean-fid, pytorch-fid and EDM
    write it. Nothing is unpickled. Raises DataError for anything else, and says what it is."""
    file = Path(file).expanduser()
    advice = "use an .npz with mu [D] and sigma [D, D]"
    try:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise DataError(f"statistics {file}: a single array of shape {list(found.shape)}, not an .npz: {advice}")
        with found:
            if not {"mu", "sigma"} <= set(found.files):
                raise DataError(f"statistics {file}: {_describe(found)}: {advice}")
            mu, sigma = found["mu"], found["sigma"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(f"statistics {file}: cannot be read as .npz ({reason}): {advice}") from error
    if problem := _problem(mu, sigma):
        raise DataError(f"statistics {file}: {problem}: {advice}")
    return torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64))


def _describe(found: np.lib.npyio.NpzFile) -> str:
    if "feats" in found:
        return "features for KID (clean-fid's `feats`), not statistics"
    if "arr_0" in found:
        return "an archive of images (`arr_0`), not statistics; unpack it to a folder"
    return f"holds {', '.join(found.files[:10]) or 'nothing'}, not mu and sigma"


def _problem(mu: np.ndarray, sigma: np.ndarray) -> str:
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        return f"mu is {mu.dtype} and sigma {sigma.dtype}, not floating point"
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        return f"mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}"
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "a value is not finite"
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        return "sigma is no covariance: not symmetric, or a variance is negative"
    return ""


def is_legacy(file: Path) -> bool:
    """Whether clean-fid made a statistics file with the resizing of another package, by its name ("legacy_pytorch" or
    "legacy_tensorflow" in it). Such statistics do not compare with features of `clean` resizing."""
    return any(mode in Path(file).name.lower() for mode in LEGACY)
