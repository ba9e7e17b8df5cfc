"""An evaluation: everything that the sources of a run are scored with alike, and the scoring of one source."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from data.prompts import Prompt
from models.pipeline import pipeline_hash
from trainer.distributed.world import from_main
from trainer.errors import UserError
from trainer.evaluation.generate import canvas_of, fill
from trainer.evaluation.keep import check_layout, keeper, prompt_of
from trainer.evaluation.networks import (
    COMPARED,
    FRECHET,
    Networks,
    compared_blocks,
    load_networks,
    needed_networks,
    pixel_rows,
)
from trainer.evaluation.protocols import OURS, Protocol, resolve
from trainer.evaluation.references import (
    RealImages,
    RealStatistics,
    Reference,
    find_prompts,
    find_reference,
)
from trainer.evaluation.results_folder import ResultsFolder
from trainer.evaluation.rows import Rows
from trainer.evaluation.scores import scores
from trainer.evaluation.sources import OpenSource, PipelineSource, Source, find_source
from trainer.evaluation.weights import find_weights, require
from trainer.path.manifest import file_hash
from trainer.training.run import Run

STATISTICS = ("fid",)  # what an .npz of mean and covariance suffices for


TEACHER_SEED = 1 << 40  # of the teacher's images in "fid-teacher": far from any number of an image


@dataclass
class Evaluation:
    """Protocol, prompts, networks and reference of an evaluation. images: how many each source makes. own_weights: networks
    whose weights are not the published ones. warnings: what a reader of the numbers must know."""

    run: Run
    protocol: Protocol
    metrics: tuple[str, ...]
    images: int
    prompts: list[Prompt]
    networks: Networks
    hash: str
    own_weights: dict[str, str]
    reference: Reference | None = None
    warnings: list[str] = field(default_factory=list)
    _pipelines: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, run: Run) -> "Evaluation":
        """Finds, checks and loads everything, then reads the real images. Every rank must call it. Raises UserError,
        DataError and ModelError before any image is made."""
        settings = run.settings.evaluate
        protocol = resolve(settings)
        metrics = tuple(settings.metrics) or protocol.metrics
        weights = find_weights(run, protocol, needed_networks(protocol, metrics))
        require(weights)
        prompts = find_prompts(run, protocol)
        check_layout(settings.keep, prompts, settings.images_per_prompt)
        images = _number_of_images(run, protocol, prompts)
        real = None
        if compared_blocks(metrics) and protocol.reference != "teacher":
            real = find_reference(run, protocol)
        if isinstance(real, RealStatistics) and (more := [m for m in metrics if m in COMPARED and m not in STATISTICS]):
            raise UserError(
                f"evaluate.reference: {real.name} holds statistics for fid only: leave {', '.join(more)} out of "
                "evaluate.metrics, or name a folder of images"
            )
        networks = load_networks(run, protocol, metrics, weights)
        warnings = _check_counts(run, protocol, metrics, networks, images, real)
        compared_with = {
            "reference": real.identity if real else _teacher_identity(run) if compared_blocks(metrics) else None,
            "resolution": run.settings.data.resolution,
        }
        if run.settings.data.buckets:
            compared_with["size"] = list(run.settings.data.size)
        made_of = {
            "prompts": hashlib.sha256(json.dumps([p.identity for p in prompts]).encode()).hexdigest(),
            "images": [images, settings.images_per_prompt],
        }
        own = {name: found.identity for name, found in weights.items() if not found.published}
        if networks.accuracies:
            own["classifier"] = from_main(file_hash(networks.file) if run.world.main else None, run.world)
        named = protocol.hash(own, **compared_with, **made_of)
        found = cls(run, protocol, metrics, images, prompts, networks, named, own, warnings=warnings)
        found._check_folder()
        if compared_blocks(metrics):
            # Real images are the same rows for other prompts and other numbers of generated images.
            key = protocol.hash(own, **compared_with, **({} if real else made_of))
            found._read_reference(real, key)
        return found

    @property
    def results(self) -> ResultsFolder:
        return ResultsFolder(self.run.folder / self.run.settings.evaluate.folder)

    @property
    def faithful(self) -> bool:
        """Whether the protocol was followed to the letter, so that published numbers may stand beside ours."""
        exact = self.protocol.resolution in (0, self.run.settings.data.resolution)
        return exact and self.images == self.protocol.images and not self.own_weights

    def _check_folder(self) -> None:
        """A folder holds the results of one protocol: its numbers stand in one table."""
        folder, mine = self.results.folder, (self.protocol.name, self.hash)
        other = None
        if self.run.world.main:
            for name, found in self.results.finished():
                if (found.get("protocol"), found.get("protocol_hash")) != mine:
                    other = f"{folder / name} was scored under {found.get('protocol') or 'no protocol'}"
                    other += f" ({found.get('protocol_hash') or 'an earlier version'})"
        if other := from_main(other, self.run.world):
            raise UserError(
                f"{other}, and this job under {mine[0]} ({mine[1]}): their numbers do not compare. Name another folder with "
                f"evaluate.folder=eval-{mine[0]}, or remove {folder}"
            )

    def _read_reference(self, real: RealImages | RealStatistics | None, key: str) -> None:
        run, settings, networks = self.run, self.run.settings.evaluate, self.networks
        if isinstance(real, RealStatistics):
            self.reference = Reference(real.name, None, run.world, real.statistics)
            return
        count = real.count if real else self.images
        about = {"key": key, "blocks": sorted(networks.images), "rows": [count, settings.chunk]}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        folder = Path(settings.cache) if settings.cache else self.results.folder / "references"
        rows = Rows.shared(folder / name, count, settings.chunk)
        label, credit = (real.name, real.credit) if real else ("the teacher", None)
        fill(
            rows,
            run.world,
            (lambda numbers: [real.image(number) for number in numbers]) if real else self._teacher_images(),
            lambda images, numbers: networks.rows_of_real(images),
            settings.batch,
            f"reference {label}",
        )
        self.reference = Reference(label, rows, run.world, credit=credit)
        if "pixels" in networks.images:
            components = self.reference.components.to(run.world.device)
            self.networks = networks.with_pixels(
                lambda images: components.project(pixel_rows(images).to(run.world.device))
            )

    def _teacher_images(self) -> Callable[[list[int]], list[Tensor]]:
        """The teacher's images of the same prompts, with noise of other numbers than the generated ones."""
        return self._images(self.opener(find_source(self.run, "teacher")), TEACHER_SEED)

    def _images(self, opened: Callable[[], OpenSource], seed: int) -> Callable[[list[int]], list[Tensor]]:
        """A source's images by number."""
        per_prompt = self.run.settings.evaluate.images_per_prompt

        def images(numbers: list[int]) -> list[Tensor]:
            prompts = {number: prompt_of(self.prompts, number, per_prompt) for number in numbers}
            made: dict[int, Tensor] = {}
            for size in dict.fromkeys(prompt.size for prompt in prompts.values()):
                part = [number for number in numbers if prompts[number].size == size]
                captions = [prompts[number].text for number in part]
                made |= zip(part, opened().images(captions, seed, part, size), strict=True)
            return [made[number] for number in numbers]

        return images

    def opener(self, source: Source | PipelineSource) -> Callable[[], OpenSource]:
        """A function that loads a source when it is first called: a resumed job may not need it."""
        return cache(partial(source.open, self.run, self.protocol.sampling))

    def identity(self, source: Source | PipelineSource) -> str:
        """What a source's numbers are a function of, besides the protocol. Every rank must call it."""
        sample, settings = self.run.settings.sample, self.run.settings.evaluate
        steps = [list(source.timesteps)] if source.timesteps else [sample.steps, sample.guidance_scale]
        parts = [self.run.weights_hash(source.weights), self._rest(source.pipeline), *steps]
        parts += [settings.seed, self.run.settings.precision]
        if getattr(source, "base", None):
            parts.append(self.run.weights_hash(source.base))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def _rest(self, pipeline: Path) -> str:
        """The hash of a pipeline without its denoiser. Every rank must call it."""
        if pipeline not in self._pipelines:
            settings = self.run.settings
            mine = pipeline_hash(pipeline, settings.variant, self.run.digest) if self.run.world.main else None
            self._pipelines[pipeline] = from_main(mine, self.run.world)
        return self._pipelines[pipeline]

    def score(self, source: Source | PipelineSource, opened: Callable[[], OpenSource]) -> tuple[Rows, dict[str, float]]:
        """Makes a source's images, unless a killed job has made them, and scores them. Every rank must call it. opened: as of
        `opener`."""
        run, settings, keep, place = self.run, self.run.settings.evaluate, None, None
        key = {"protocol": self.hash, "source": self.identity(source), "metrics": sorted(self.metrics)}
        if settings.keep:
            place = self.results.folder / f"{source.name}-images"
            keep = keeper(settings.keep, place, self.prompts, settings.images_per_prompt)
        chunk = max(1, settings.chunk // settings.images_per_prompt) * settings.images_per_prompt
        folder = self.rows_folder(source.name)
        rows = Rows.open(folder, self.images, chunk, key | {"keep": settings.keep}, run.world, place)

        def measure(images: list[Tensor], numbers: list[int]) -> dict[str, Tensor]:
            prompts = [prompt_of(self.prompts, number, settings.images_per_prompt) for number in numbers]
            return self.networks.rows(images, prompts)

        fill(
            rows,
            run.world,
            self._images(opened, settings.seed),
            measure,
            settings.batch,
            source.name,
            show=True,
            keep=keep,
            canvas=canvas_of(prompt.size or run.settings.data.size for prompt in self.prompts),
        )
        return rows, scores(rows, self.reference, self.metrics, self.networks.accuracies, run.world)

    def rows_folder(self, name: str) -> Path:
        return self.results.folder / f"{name}.rows"


def _number_of_images(run: Run, protocol: Protocol, prompts: list[Prompt]) -> int:
    settings = run.settings.evaluate
    available = len(prompts) * settings.images_per_prompt
    benchmark = settings.keep in ("geneval", "dpg")  # every prompt, and each as often as the benchmark wants
    images = settings.images or (available if benchmark else protocol.images)
    if benchmark and images != available:
        raise UserError(
            f"evaluate.images={images}: evaluate.keep={settings.keep} needs all {len(prompts)} prompts x "
            f"{settings.images_per_prompt} images: leave evaluate.images out"
        )
    if protocol.name not in OURS and available < images:
        raise UserError(
            f"evaluate.prompts: {settings.prompts} has {len(prompts)} captions, and protocol {protocol.name} makes {images} "
            "images of as many: use the protocol's own prompts, or set evaluate.images for a first look"
        )
    return images


def _check_counts(
    run: Run,
    protocol: Protocol,
    metrics: tuple[str, ...],
    networks: Networks,
    images: int,
    real: RealImages | RealStatistics | None,
) -> list[str]:
    """Refuses what cannot be computed soundly; what the user computes all the same becomes a warning."""
    widths, found = networks.widths(run.settings.data.resolution), []
    counts = {"evaluate.images": images}
    if isinstance(real, RealImages):
        counts[f"the reference {real.name}"] = real.count
    few = next(((name, count) for name, count in counts.items() if count < 4), None)  # recall looks at 3 neighbours
    if few and compared_blocks(metrics):
        raise UserError(f"{few[1]} images of {few[0]} are too few to compare with")
    for metric in [m for m in metrics if m in FRECHET]:
        width = widths[COMPARED[metric]]
        name, count = min(counts.items(), key=lambda item: item[1])
        if isinstance(real, RealStatistics) and len(real.statistics.mean) != width:
            raise UserError(
                f"{real.name}: has {len(real.statistics.mean)} features, and {networks.name} {width}: use statistics of the "
                "same network"
            )
        if count <= width:
            text = f"{metric} from {count} images of {name}, fewer than its {width} features + 1, comes out too high"
            if not run.settings.evaluate.few_images:
                raise UserError(
                    f"{text}: use more images, other evaluate.metrics (kid and clip_score need no covariance), or "
                    "evaluate.few_images=true, which marks the number"
                )
            found.append(text)
    return found


def _teacher_identity(run: Run) -> str:
    """What the teacher's images are a function of. Every rank must call it."""
    sample = run.settings.sample
    rest = pipeline_hash(run.pipeline_folder, run.settings.variant, run.digest) if run.world.main else None
    hashes = run.weights_hash(run.teacher_folder), from_main(rest, run.world)
    return f"teacher {hashes} {sample.steps} {sample.guidance_scale} {run.settings.precision}"
