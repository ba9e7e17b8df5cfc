"""`disback record`: stage 1, degradation recording (DisBack, algorithm 1)."""

import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from data.loader import collate
from models.denoise import denoising_loss
from models.multistep import Student
from trainer.distributed.logs import log
from trainer.distributed.world import barrier
from trainer.entry import exit_with, run_verb
from trainer.path.candidates import Candidates, Probe
from trainer.path.manifest import MANIFEST, Node, generator_hash, write_manifest
from trainer.planner.flops import record_flops
from trainer.training.loop import train
from trainer.training.run import Run
from trainer.training.stage import DenoiserStage


class Recording(DenoiserStage):
    """Fine-tunes a copy of the teacher on samples of the untrained generator, and saves candidates for nodes."""

    def update(self, step: int) -> None:
        rate = self.rates(step)["fake_score"]
        for batch in self.micro_batches():
            draws = self.noise.at(step, batch.index)
            cond, shape = self.encode(batch), self.latent_shape(batch)
            with torch.no_grad():
                x0 = self.student.training_sample(self.generator, cond, draws, shape)
            t = self.schedule.timesteps(draws.uniform("t"))
            eps = draws.normal("eps", shape)
            loss = denoising_loss(self.fake_score, self.schedule, x0, eps, t, cond)
            self.meters.add("loss/fake_score", loss)
            self.fake_score.step(loss, rate)
        self.candidates.consider(self.fake_score, step + 1)

    def __init__(self, run: Run):
        run_settings, settings = run.settings, run.settings.record
        run.check_lora(run.teacher_folder)
        super().__init__("record", run, settings, images=False, pipeline=run.pipeline_folder)
        self.student = Student(self.schedule, run_settings.student_timesteps)
        self.generator = self.add_role(self.builder.build("generator", run.start_folder, settings.teacher_ds_config))
        adapter = "new" if run_settings.lora.rank else None
        self.fake_score = self.add_role(
            self.builder.build(
                "fake_score", run.teacher_folder, settings.ds_config, settings.optimizer, adapter=adapter
            )
        )
        self.candidates = Candidates(run_settings.path_folder / "candidates", settings, self.steps, run.world)
        self.parts["candidates"] = self.candidates
        self.count_flops(record_flops, self.fake_score)
        start = generator_hash(run.weights_hash(run.start_folder), self.student.timesteps)
        self.hashes = run.weights_hash(run.teacher_folder), start
        self.identity |= {"teacher": self.hashes[0], "generator": self.hashes[1]}

    def begin(self, step: int) -> None:
        super().begin(step)
        self.candidates.open(self._probe(), self.fake_score)

    @torch.no_grad()
    def _probe(self) -> Probe:
        """The fixed samples that the score distance is measured on: the same for every number of processes. With buckets, all
        are of the one with most samples: a mean over shapes would be one over images of unequal weight."""
        probe, parts, data = self.settings.probe, [], self.dataset
        numbers, size = [i % probe for i in self.candidates.rows], self.sampler.size
        if self.run.settings.data.buckets:
            size = data.shapes[data.main_bucket]
        shape = self.sampler.shape_of(size)
        for low in range(0, len(numbers), self.micro):
            draws = self.noise.at(0, numbers[low : low + self.micro])
            samples = collate([data.example(i % len(data)) for i in draws.index])
            text = samples["captions"], samples["cached"]
            cond = self.sampler.text.encode_or_load(*text, size)
            x0 = self.student.every_step(self.generator, cond, draws, "probe z", shape)
            t = self.schedule.timesteps(draws.uniform("probe t"), 0.02, 0.98)
            parts.append((self.schedule.add_noise(x0, draws.normal("probe eps", shape), t), t, cond))
        return parts

    def host_values(self, step: int) -> dict:
        return super().host_values(step) | {"distance": self.candidates.distance}

    def compute(self, step: int) -> float:
        """With the passes of the probe: its samples, the teacher's predictions, and those of each measurement."""
        passes = len(self.student.timesteps) + 1 + self.candidates.measurements(step)
        return super().compute(step) + passes * self.settings.probe / self.run.settings.backtrack.batch

    def preview(self) -> Tensor:
        """Samples of the fine-tuned network, at the teacher's settings."""
        steps = self.run.settings.sample.steps
        return self.grid(
            lambda captions, noise: self.sampler.diffusion_images(self.fake_score, captions, noise.draw(), steps, 1.0)
        )

    def may_end(self, step: int) -> bool:
        return self.settings.spacing == "distance" and self.candidates.measures(step)

    @property
    def ended(self) -> bool:
        return self.candidates.settled

    @property
    def needs(self) -> Sequence[str]:
        """The candidates' folders, which a checkpoint only names."""
        return self.candidates.names

    def after_save(self, needed: set[str]) -> None:
        if self.world.main:
            self.candidates.delete_others(needed)

    def close(self) -> None:
        super().close()
        self.candidates.close()

    def write_path(self) -> list[Node]:
        """Turns the chosen candidates into nodes and writes the manifest; returns the nodes on rank 0."""
        teacher, root = self.run.teacher_folder, self.candidates.folder.parent
        nodes = self.candidates.become_nodes(teacher, self.hashes[0])
        if self.world.main:
            if len(nodes) <= self.settings.nodes:
                log.warning(f"record: found only {len(nodes) - 1} distinct nodes of {self.settings.nodes}")
            write_manifest(root, teacher, self.hashes, self.student.timesteps, nodes, self.run.settings.lora)
            shutil.rmtree(self.candidates.folder)
        barrier(self.world)
        return nodes


def record(run: Run) -> None:
    """Records the degradation path and writes `path/`. Does nothing if it exists."""
    run.require_pipeline()
    root = run.settings.path_folder
    if (root / MANIFEST).exists():
        if run.world.main:
            print(f"{root / MANIFEST} exists: nothing to do (set another `path` or `run` to record again)")
        return
    with run.training("record", root) as folder:
        stage = Recording(run)
        seconds = train(stage, run.settings.record.loop, run.settings.health, folder, run.world)
        nodes = stage.write_path()
    if run.world.main:
        if stage.ended:
            log.info(
                f"record: ended after {stage.candidates.steps[-1]} of {stage.steps} steps: the distance has settled"
            )
        spots = ", ".join(f"{n.index}: step {n.step}, distance {n.distance_to_node_0:.4f}" for n in nodes)
        log.info(f"record: {len(nodes)} nodes ({spots}) in {root} after {seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    return run_verb("record", "Stage 1: records the degradation path; writes RUN/path.", record, argv)


if __name__ == "__main__":
    exit_with(main)
