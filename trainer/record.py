"""`disback record`: stage 1, degradation recording (DisBack, algorithm 1)."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from data.loader import collate
from data.sampling_order import Split
from models.conditioning import Conditioning
from models.denoise import denoising_loss, predict
from models.multistep import Student
from models.pipeline import weight_files
from models.profile_flops import forward_flops
from trainer.checkpoint.directory import step_name
from trainer.distributed.logs import log
from trainer.distributed.world import barrier, sum_over_ranks
from trainer.engine.optimizer import learning_rate
from trainer.engine.save_weights import ABOUT, FolderWriter
from trainer.entry import run_verb
from trainer.errors import UserError
from trainer.path.manifest import MANIFEST, Node, choose_nodes, generator_hash, write_manifest
from trainer.planner.flops import sample_passes, trained_pass
from trainer.training.loop import train
from trainer.training.metrics import Meters
from trainer.training.run import Run
from trainer.training.stage import TrainStage


class Recording(TrainStage):
    """Fine-tunes a copy of the teacher on samples of the untrained generator, and keeps candidates for nodes.

    A candidate is saved when the score distance to the teacher has grown by 1 / (2 nodes) of itself, so that their
    number grows with the logarithm of the distance; beyond twice the nodes the ones nearest to a neighbour are let go.
    """

    def __init__(self, run: Run):
        settings = run.settings.record
        super().__init__("record", run, settings, images=False, pipeline=run.pipeline_folder)
        s = run.settings
        self.check_lora(run.teacher_folder)
        self.sampler = self.open_sampler(run.pipeline_folder)
        self.schedule = self.sampler.schedule
        self.student = Student(self.schedule, s.student_timesteps)
        self.generator = self.role("generator", run.start_folder, settings.teacher_ds_config)
        adapter = "new" if s.lora.rank else None
        self.fake_score = self.role(
            "fake_score", run.teacher_folder, settings.ds_config, settings.optimizer, adapter=adapter
        )
        tokens = self.sampler.text.tokens
        flops = forward_flops(self.fake_score.config, self.sampler.latent_shape, tokens)
        passes = sample_passes(len(s.student_timesteps)) + trained_pass(s.lora)
        self.flops = passes * flops * self.micro * settings.accumulation
        self.hashes = self.hash(run.teacher_folder), generator_hash(self.hash(run.start_folder), self.student.timesteps)
        self.identity |= {"teacher": self.hashes[0], "generator": self.hashes[1]}
        self.candidates = s.path_folder / "candidates"
        self.writer = FolderWriter(run.world)
        self.steps_kept: list[int] = []
        self.distances: list[float] = []
        self.predictions: list[Tensor] = []  # of the candidates, on this rank's probe samples
        self.origin: Tensor | None = None  # the teacher's
        self.distance = 0.0

    @property
    def mine(self) -> list[int]:
        """This rank's numbers of probe samples. Every rank has as many, since a forward pass is common work under
        ZeRO-3; numbers from `probe` on repeat the first ones and count for nothing."""
        count = -(-self.settings.probe // self.world.size)
        return list(range(self.world.rank * count, (self.world.rank + 1) * count))

    def begin(self, step: int) -> None:
        super().begin(step)
        self.probe = self._make_probe()
        if self.origin is None:
            self.origin = self._probe_prediction()  # the fake score still is the teacher
        if self.world.main:
            self.candidates.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def _make_probe(self) -> list[tuple[Tensor, Tensor, Conditioning]]:
        """This rank's fixed (x_t, t, conditioning) of the probe, in micro-batches: the same samples for every world
        size."""
        numbers, parts = [i % self.settings.probe for i in self.mine], []
        shape = self.sampler.latent_shape
        for low in range(0, len(numbers), self.micro):
            index = numbers[low : low + self.micro]
            samples = collate([self.dataset[i % len(self.dataset)] for i in index])
            cond = self.encode(samples["captions"], samples["cached"])
            x0 = self.student.every_step(self.generator, cond, self.noise, "probe z", index, shape)
            t = self.schedule.timesteps(self.noise.uniform("probe t", 0, index), 0.02, 0.98)
            eps = self.noise.normal("probe eps", 0, index, shape)
            parts.append((self.schedule.add_noise(x0, eps, t), t, cond))
        return parts

    @torch.no_grad()
    def _probe_prediction(self) -> Tensor:
        return torch.cat([predict(self.fake_score, *part) for part in self.probe])

    def _between(self, one: Tensor, other: Tensor) -> float:
        """Mean squared distance of predictions over the whole probe."""
        count = sum(i < self.settings.probe for i in self.mine)
        squares = (one[:count] - other[:count]).square().sum(dtype=torch.float64)
        return float(sum_over_ranks(squares, self.world)) / (self.settings.probe * one[0].numel())

    def update(self, step: int, meters: Meters, until_log: int) -> None:
        self.rate = learning_rate(self.settings.optimizer, step, self.steps)
        shape = self.sampler.latent_shape
        for batch in self.micro_batches(meters):
            cond = self.encode(batch.captions, batch.cached)
            with torch.no_grad():
                x0 = self.student.training_sample(self.generator, cond, self.noise, step, batch.index, shape)
            t = self.schedule.timesteps(self.noise.uniform("t", step, batch.index))
            eps = self.noise.normal("eps", step, batch.index, shape)
            loss = denoising_loss(self.fake_score, self.schedule, x0, eps, t, cond)
            meters.add("loss/fake_score", loss)
            norm = self.fake_score.step(loss, self.rate, want_norm=until_log == 0)
            if norm is not None:
                self.norm = norm
        self._consider(step + 1)

    def _consider(self, step: int) -> None:
        """Saves a candidate after `step` finished steps, if it is one."""
        settings, last = self.settings, step == self.steps
        if settings.spacing == "steps":
            wanted = step * settings.nodes // self.steps > (step - 1) * settings.nodes // self.steps
            due = wanted
        else:
            due = last or step % settings.probe_every == 0
        if not due:
            return
        prediction = self._probe_prediction()
        self.distance = self._between(prediction, self.origin)
        before = self.distances[-1] if self.distances else 0.0
        if (
            settings.spacing == "distance"
            and not last
            and self.distance - before <= self.distance / (2 * settings.nodes)
        ):
            return
        state = self.fake_score.state_dict(dtype=torch.bfloat16)
        if state is not None:
            write = self.saver(self.fake_score)
            self.writer.begin(write, state, self.candidates / step_name(step), {"step": step})
        self.steps_kept.append(step)
        self.distances.append(self.distance)
        self.predictions.append(prediction.cpu())
        while len(self.steps_kept) > 2 * settings.nodes:
            around = [0.0, *self.distances]
            # Never the newest: it may be the end. The candidate whose two gaps together are smallest goes.
            gone = min(range(len(self.distances) - 1), key=lambda i: abs(around[i + 2] - around[i]))
            for kept in (self.steps_kept, self.distances, self.predictions):
                del kept[gone]

    def metrics(self) -> dict:
        return super().metrics() | {
            "lr/fake_score": self.rate, "grad_norm/fake_score": self.norm, "distance": self.distance,
        }  # fmt: skip

    def preview(self) -> Tensor | None:
        """What the fake score has become: samples of it, at teacher's settings."""
        steps = self.run.settings.sample.steps
        return self.preview_grid(
            lambda captions, noise: self.sampler.many_steps(self.fake_score, captions, noise.draw(), steps, 1.0)
        )

    def state_dict(self) -> dict:
        self.writer.join()  # a checkpoint names only candidates that are on the disk
        own = ("steps_kept", "distances", "predictions", "origin", "distance")
        return super().state_dict() | {name: getattr(self, name) for name in own}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name in ("steps_kept", "distances", "predictions", "distance"):
            setattr(self, name, state[name])
        self.origin = state["origin"].to(self.world.device)
        missing = [name for name in self.needs if not (self.candidates / name).is_dir()]
        ended = bool(self.steps_kept) and self.steps_kept[-1] == self.steps  # then `finish` may have moved some of them
        if missing and not ended:
            raise UserError(
                f"{self.candidates}: {', '.join(missing)} is missing, and recording cannot go on without: set `path` to "
                "where it was recorded, or record again in another run folder"
            )

    def regroup(self, states: list[dict], saved: Split) -> dict:
        """Predictions on the probe are rows a sample: all ranks' rows in order, and of them this rank's."""
        probe = self.settings.probe

        def mine(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts)[:probe][[i % probe for i in self.mine]]

        predictions = [mine(list(parts)) for parts in zip(*(s["predictions"] for s in states), strict=True)]
        origin = mine([s["origin"] for s in states])
        return super().regroup(states, saved) | {"predictions": predictions, "origin": origin}

    @property
    def needs(self) -> list[str]:
        """The candidates' folders: the checkpoint only names them."""
        return [step_name(step) for step in self.steps_kept]

    def saved(self, needed: set[str]) -> None:
        """Deletes the candidates that no checkpoint needs any more; not earlier, since a resumed run goes back to one."""
        if self.world.main:
            for folder in self.candidates.glob("step-*"):
                if folder.name not in needed:
                    shutil.rmtree(folder)

    def close(self) -> None:
        super().close()
        self.writer.close()

    def finish(self) -> list[Node]:
        """Turns the chosen candidates into nodes and writes the manifest."""
        root = self.candidates.parent
        chosen = choose_nodes(self.distances, self.settings.nodes)
        if len(chosen) < self.settings.nodes:
            log.warning(f"record: only {len(chosen)} distinct nodes were found, {self.settings.nodes} were asked for")
        teacher = self.run.teacher_folder
        nodes = [Node(0, 0, os.path.relpath(teacher, root), self.hashes[0], 0, 0.0, 0.0)]
        before = self.origin.cpu()
        for index, i in enumerate(chosen, 1):
            gap = self._between(self.predictions[i].to(self.world.device), before.to(self.world.device))
            before = self.predictions[i]
            if self.world.main:
                about = _move(self.candidates / step_name(self.steps_kept[i]), root / f"node-{index:04d}")
                nodes.append(Node(index, self.steps_kept[i], *about, self.distances[i], gap))
        if self.world.main:
            write_manifest(root, teacher, self.hashes, self.student.timesteps, nodes, self.run.settings.lora)
            shutil.rmtree(self.candidates)
        barrier(self.world)
        return nodes


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


def record(run: Run) -> None:
    """Records the degradation path and writes `path/`. Does nothing if that is there already."""
    run.require_pipeline()
    root = run.settings.path_folder
    if (root / MANIFEST).exists():
        print(f"{root / MANIFEST} is there: nothing to do (set another `path` or `run` to record again)")
        return
    folder = run.stage_folder("record")
    stage = Recording(run)
    seconds = train(stage, run.settings.record.loop, run.settings.health, folder, run.world)
    nodes = stage.finish()
    if run.world.main:
        spots = ", ".join(f"{n.index}: step {n.step}, distance {n.distance_to_node_0:.4f}" for n in nodes)
        log.info(f"record: {len(nodes)} nodes ({spots}) in {root} after {seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    return run_verb("record", "Stage 1: records the degradation path; writes RUN/path.", record, argv)


if __name__ == "__main__":
    sys.exit(main())
