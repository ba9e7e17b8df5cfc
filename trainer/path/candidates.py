"""Candidates for nodes: saved while the path is recorded; the most evenly spread ones become the nodes."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from data.sampling_order import BatchSplit
from models.conditioning import Conditioning
from models.denoise import predict
from models.files import weight_files
from trainer.checkpoint.directory import by_step, step_name
from trainer.config.schema import RecordSettings
from trainer.distributed.world import World, first_problem, sum_over_ranks
from trainer.engine.role import Role
from trainer.engine.save_weights import ABOUT, FolderWriter
from trainer.errors import UserError
from trainer.path.manifest import Node

Probe = list[tuple[Tensor, Tensor, Conditioning]]  # micro-batches of x_t, t and conditioning


def choose_nodes(distances: list[float], count: int) -> list[int]:
    """Indices of `count` candidates, the last one included, whose distances to the teacher are the most evenly spread
    between 0 and the last one's. Fewer if there are fewer candidates.

    Half of the distance is covered in the first few recording steps, so that nodes evenly spaced in steps would mostly
    repeat the far end.
    """
    last = len(distances) - 1
    chosen: list[int] = []
    for j in range(1, count):
        low = chosen[-1] + 1 if chosen else 0
        high = last - (count - j)  # leave one candidate for each node that is still to come
        options = range(low, max(high, low) + 1)
        options = [i for i in options if i < last]
        if options:
            chosen.append(min(options, key=lambda i: abs(distances[i] - distances[last] * j / count)))
    return [*chosen, last]


def has_settled(distances: list[float], share: float) -> bool:
    """Whether the distance no longer grows: its mean over the last quarter of the measurements, but at least four, is at most
    `share` above that over as many before. A single distance varies by some percent from step to step."""
    part = max(len(distances) // 4, 4)
    if not share or len(distances) < 2 * part:
        return False
    before, last = sum(distances[-2 * part : -part]), sum(distances[-part:])
    return last <= (1 + share) * before


class Candidates:
    """Copies of the fine-tuned network, with their score distances to the teacher; part of the run state.

    A candidate is saved when the distance to the teacher has grown by a share 1 / (2 nodes) of itself, so that their number
    grows with the logarithm of the distance. Beyond twice the wanted nodes, those nearest to a neighbour are dropped.
    """

    def __init__(self, folder: Path, settings: RecordSettings, steps: int, world: World):
        self.folder, self.settings, self.last_step, self.world = folder, settings, steps, world
        # This rank's probe samples. A forward pass is collective under ZeRO-3, so every rank has the same number of them;
        # numbers from `probe` on repeat the first samples and are not counted.
        count = -(-settings.probe // world.size)
        self.rows = list(range(world.rank * count, (world.rank + 1) * count))
        self.writer = FolderWriter(world)
        self.steps: list[int] = []
        self.distances: list[float] = []  # to the teacher
        self.predictions: list[Tensor] = []  # on this rank's probe samples
        self.teacher: Tensor | None = None  # the teacher's predictions there
        self.measured: list[float] = []  # every distance so far
        self.probe: Probe = []

    def open(self, probe: Probe, network: Role) -> None:
        """Sets the probe samples. network: still the teacher if recording starts here."""
        self.probe = probe
        if self.teacher is None:
            self.teacher = self._predict(network)
        problem = None
        try:
            if self.world.main:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{self.folder}: cannot be created: {error.strerror}: set another `path`"
        if problem := first_problem(problem, self.world):
            raise UserError(problem)

    @torch.no_grad()
    def _predict(self, network: Role) -> Tensor:
        return torch.cat([predict(network, *part) for part in self.probe])

    def score_distance(self, one: Tensor, other: Tensor) -> float:
        """The mean squared difference of two networks' predictions over the whole probe."""
        count = sum(i < self.settings.probe for i in self.rows)
        one, other = one[:count].to(self.world.device), other[:count].to(self.world.device)
        squares = (one - other).square().sum(dtype=torch.float64)
        return float(sum_over_ranks(squares, self.world)) / (self.settings.probe * self.teacher[0].numel())

    def consider(self, network: Role, step: int) -> None:
        """Saves the network as a candidate after `step` finished steps, if it is one. Every rank must call it."""
        if not self.measures(step):
            return
        prediction = self._predict(network)
        self.measured.append(self.score_distance(prediction, self.teacher))
        last = step == self.last_step or self.settled
        grown = self.distance - (self.distances[-1] if self.distances else 0.0)
        if self.settings.spacing == "distance" and not last and grown <= self.distance / (2 * self.settings.nodes):
            return
        self.writer.begin(network.snapshot(dtype=torch.bfloat16), self.folder / step_name(step), {"step": step})
        self.steps.append(step)
        self.distances.append(self.distance)
        self.predictions.append(prediction.cpu())
        while len(self.steps) > 2 * self.settings.nodes:
            self._drop_nearest()

    @property
    def distance(self) -> float:
        """As last measured."""
        return self.measured[-1] if self.measured else 0.0

    @property
    def settled(self) -> bool:
        """Whether recording has ended before its last step."""
        return self.settings.spacing == "distance" and has_settled(self.measured, self.settings.settle)

    def measures(self, step: int) -> bool:
        """Whether the distance is measured after `step` finished steps."""
        return self.measurements(step) > self.measurements(step - 1)

    def measurements(self, step: int) -> int:
        """How often the distance has been measured after `step` finished steps."""
        if self.settings.spacing == "steps":
            return step * self.settings.nodes // self.last_step
        extra = step == self.last_step and step % self.settings.probe_every != 0
        return step // self.settings.probe_every + extra

    def _drop_nearest(self) -> None:
        """Drops the candidate whose two gaps together are smallest; never the newest, which may be the last node."""
        around = [0.0, *self.distances]
        nearest = min(range(len(self.distances) - 1), key=lambda i: abs(around[i + 2] - around[i]))
        for values in (self.steps, self.distances, self.predictions):
            del values[nearest]

    @property
    def names(self) -> list[str]:
        return [step_name(step) for step in self.steps]

    def delete_others(self, needed: set[str]) -> None:
        """Deletes the candidates that no checkpoint needs any more. Rank 0 only."""
        for folder in by_step(self.folder).values():
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)  # the next save tries again

    def state_dict(self) -> dict:
        self.writer.join()  # a checkpoint only names candidates that are on the disk
        return {name: getattr(self, name) for name in ("steps", "distances", "predictions", "teacher", "measured")}

    def load_state_dict(self, state: dict) -> None:
        for name in ("steps", "distances", "predictions"):
            setattr(self, name, state[name])
        self.measured = state.get("measured", [])  # checkpoints of earlier versions do not have it
        self.teacher = state["teacher"].to(self.world.device)
        missing = [name for name in self.names if not (self.folder / name).is_dir()]
        ended = self.settled or (
            bool(self.steps) and self.steps[-1] == self.last_step
        )  # `become_nodes` may have moved some of them
        if missing and not ended:
            raise UserError(
                f"{self.folder}: {', '.join(missing)} is missing, and recording cannot resume without it: set `path` to "
                "where it was recorded, or record again in another run folder"
            )

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """Predictions have one row per probe sample: all ranks' rows in order, and of them this rank's."""
        probe = self.settings.probe

        def mine(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts)[:probe][[i % probe for i in self.rows]]

        predictions = [mine(list(parts)) for parts in zip(*(s["predictions"] for s in states), strict=True)]
        return states[0] | {"predictions": predictions, "teacher": mine([s["teacher"] for s in states])}

    def become_nodes(self, teacher: Path, teacher_hash: str) -> list[Node]:
        """Renames the chosen candidates to the nodes' folders; returns the nodes, node 0 (the teacher) included, on rank
        0. Every rank must call it. Raises UserError on all ranks."""
        root, chosen = self.folder.parent, choose_nodes(self.distances, self.settings.nodes)
        predictions = [self.teacher, *(self.predictions[i] for i in chosen)]
        gaps = [self.score_distance(one, other) for one, other in pairwise(predictions)]
        nodes, problem = [Node(0, 0, os.path.relpath(teacher, root), teacher_hash, 0, 0.0, 0.0)], None
        try:
            for index, (i, gap) in enumerate(zip(chosen, gaps, strict=True) if self.world.main else (), 1):
                file = _move(self.folder / step_name(self.steps[i]), root / f"node-{index:04d}")
                nodes.append(Node(index, self.steps[i], *file, self.distances[i], gap))
        except (UserError, OSError) as error:
            problem = str(error)
        if problem := first_problem(problem, self.world):
            raise UserError(problem)
        return nodes

    def close(self) -> None:
        self.writer.close()


def _move(candidate: Path, node: Path) -> tuple[str, str, int]:
    """Renames a candidate to a node, unless an earlier, killed attempt did; returns its weights file (relative to the
    path's folder), that file's sha256, and its size in bytes, as they were when it was written."""
    if candidate.exists():
        shutil.rmtree(node, ignore_errors=True)
        os.replace(candidate, node)
    about = json.loads((node / ABOUT).read_text()) if (node / ABOUT).exists() else {"step": -1}
    if step_name(about["step"]) != candidate.name:
        raise UserError(f"{candidate} is missing: remove {node.parent} and record again")
    return f"{node.name}/{weight_files(node)[0].name}", about["sha256"], about["bytes"]
