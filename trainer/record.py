"""`disback record`: stage 1, degradation recording (DisBack, algorithm 1)."""

import os
import shutil
import sys

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.flops import forward_flops
from models.lora import check_targets
from models.networks import denoising_loss, generate, predict
from models.pipeline import check_pipeline
from trainer.command import run_verb
from trainer.distributed import barrier, mean_over_ranks
from trainer.loop import train
from trainer.path import MANIFEST, Node, choose_nodes, file_hash, generator_hash, write_manifest
from trainer.run import Run
from trainer.runstate import step_name
from trainer.schedules import learning_rate
from trainer.stage import TrainStage
from trainer.telemetry import Meters, log


class Recording(TrainStage):
    """Fine-tunes a copy of the teacher on samples of the untrained generator, and keeps candidates for nodes.

    A candidate is saved when the score distance to the teacher has grown by 1 / (2 nodes) of itself, so that their
    number grows with the logarithm of the distance; beyond twice the nodes the ones nearest to a neighbour are let go.
    """

    def __init__(self, run: Run):
        settings = run.settings.record
        super().__init__("record", run, settings, images=False)
        s, adapter = run.settings, None
        teacher_folder = s.pipeline_folder / "unet"
        if s.lora.rank:
            check_targets(teacher_folder, s.lora)
            adapter = "new"
        self.sampler = run.sampler(s.pipeline_folder)
        self.schedule = self.sampler.schedule
        self.timestep = s.conditioning_timestep
        self.generator = self.role("generator", s.start_folder, settings.teacher_ds_config)
        self.fake_score = self.role("fake_score", teacher_folder, settings.ds_config, settings.optimizer, adapter)
        tokens = self.sampler.text.tokens
        flops = forward_flops(self.fake_score.config, self.sampler.latent_shape, tokens)
        self.flops = (1 + self.trained_passes) * flops * self.micro * settings.accumulation  # 1: sampling
        self.hashes = self.hash(teacher_folder), generator_hash(self.hash(s.start_folder), self.timestep)
        self.identity |= {"teacher": self.hashes[0], "generator": self.hashes[1]}
        self.candidates = s.path_folder / "candidates"
        self.steps_kept: list[int] = []
        self.distances: list[float] = []
        self.predictions: list[Tensor] = []  # of the candidates, on this rank's probe samples
        self.origin: Tensor | None = None  # the teacher's
        self.distance = 0.0

    def begin(self, step: int) -> None:
        super().begin(step)
        self.probe = self._make_probe()
        if self.origin is None:
            self.origin = self._probe_prediction()  # the fake score still is the teacher
        if self.world.main:
            self.candidates.mkdir(parents=True, exist_ok=True)

    def _generate(self, captions: list[str], z: Tensor) -> tuple[Tensor, Conditioning]:
        cond = self.sampler.text.encode(captions, self.sampler.resolution)
        with torch.no_grad():
            return generate(self.generator, z, cond, self.schedule, self.timestep), cond

    def _make_probe(self) -> list[tuple[Tensor, Tensor, Conditioning]]:
        """This rank's fixed (x_t, t, conditioning) of the probe, in micro-batches. The same set for every world size
        that divides it."""
        mine = -(-self.settings.probe // self.world.size)
        first, parts = self.world.rank * mine, []
        shape = self.sampler.latent_shape
        for low in range(first, first + mine, self.micro):
            index = list(range(low, min(low + self.micro, first + mine)))
            captions = [self.dataset[i % len(self.dataset)]["caption"] for i in index]
            x0, cond = self._generate(captions, self.noise.normal("probe z", 0, index, shape))
            t = self.schedule.timesteps(self.noise.uniform("probe t", 0, index), 0.02, 0.98)
            eps = self.noise.normal("probe eps", 0, index, shape)
            parts.append((self.schedule.add_noise(x0, eps, t), t, cond))
        return parts

    @torch.no_grad()
    def _probe_prediction(self) -> Tensor:
        return torch.cat([predict(self.fake_score, *part) for part in self.probe])

    def _between(self, one: Tensor, other: Tensor) -> float:
        """Mean squared distance of predictions over the whole probe."""
        return float(mean_over_ranks((one - other).square().mean().double(), self.world))

    def update(self, step: int, meters: Meters, until_log: int) -> None:
        self.rate = learning_rate(self.settings.optimizer, step, self.steps)
        shape = self.sampler.latent_shape
        for batch in self.micro_batches(meters):
            x0, cond = self._generate(batch.captions, self.noise.normal("z", step, batch.index, shape))
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
        self.save_weights(self.fake_score, self.candidates / step_name(step), torch.bfloat16)
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
        settings = self.run.settings.sample
        z = self.preview_noise(self.sampler.latent_shape)
        return self.grid(self.sampler.many_steps(self.fake_score, self.preview_captions(), z, settings.steps, 1.0))

    def state_dict(self) -> dict:
        own = ("steps_kept", "distances", "predictions", "origin", "distance")
        return super().state_dict() | {name: getattr(self, name) for name in own}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name in ("steps_kept", "distances", "predictions", "distance"):
            setattr(self, name, state[name])
        self.origin = state["origin"].to(self.world.device)

    def saved(self) -> None:
        """Deletes the candidates that the checkpoint just written no longer needs; not earlier, since a resumed run
        goes back to it."""
        if self.world.main:
            kept = {step_name(step) for step in self.steps_kept}
            for folder in self.candidates.glob("step-*"):
                if folder.name not in kept:
                    shutil.rmtree(folder)

    def finish(self) -> list[Node]:
        """Turns the chosen candidates into nodes and writes the manifest."""
        root = self.candidates.parent
        chosen = choose_nodes(self.distances, self.settings.nodes)
        if len(chosen) < self.settings.nodes:
            log.warning(f"record: only {len(chosen)} distinct nodes were found, {self.settings.nodes} were asked for")
        teacher = self.run.settings.pipeline_folder / "unet"
        nodes = [Node(0, 0, os.path.relpath(teacher, root), self.hashes[0], 0, 0.0, 0.0)]
        before = self.origin.cpu()
        for index, i in enumerate(chosen, 1):
            gap = self._between(self.predictions[i].to(self.world.device), before.to(self.world.device))
            before = self.predictions[i]
            if self.world.main:
                target = root / f"node-{index:04d}"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(self.candidates / step_name(self.steps_kept[i]), target)
                file = next(target.glob("*.safetensors"))
                about = (str(file.relative_to(root)), file_hash(file), file.stat().st_size)
                nodes.append(Node(index, self.steps_kept[i], *about, self.distances[i], gap))
        if self.world.main:
            write_manifest(root, teacher, self.hashes, self.timestep, nodes, self.run.settings.lora)
            shutil.rmtree(self.candidates)
        barrier(self.world)
        return nodes


def record(run: Run) -> None:
    """Records the degradation path and writes `path/`. Does nothing if that is there already."""
    check_pipeline(run.settings.pipeline_folder)
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
