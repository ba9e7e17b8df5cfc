"""The whole configuration of a run: one typed section an owner."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data.config import DataConfig
from models.gan import GanSettings
from models.lora import LoraSettings
from models.miniature import MiniatureSettings
from trainer.health import HealthSettings
from trainer.loop import LoopSettings
from trainer.schedules import OptimizerSettings
from trainer.walk import WalkSettings


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TrainSettings(Strict):
    """What every training stage has. batch: samples an optimizer step over all processes and accumulation steps.
    clip: largest gradient norm; 0 does not clip."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    accumulation: int = Field(1, ge=1)
    clip: float = Field(10.0, ge=0)
    loop: LoopSettings = LoopSettings()


class NetworkSettings(Strict):
    """How the networks of training stages compute; nothing here changes what they compute. attention: the kernel; "auto"
    takes the first that runs on this device and the network's shapes, and the log says why each other one does not.
    checkpointing: trained networks keep the inputs of their blocks only and compute the rest again in the backward pass:
    about a third more time, several times less memory for activations. channels_last: memory format of convolutions, for
    frozen roles at zero0 only (DeepSpeed keeps all other weights flat). compile: torch.compile of each repeated block, up
    to ZeRO-2; the first steps then take minutes. tf32: what is float32 on an NVIDIA GPU (decoder, `precision: fp32`)
    multiplies in TF32."""

    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "math"] = "auto"
    checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    tf32: bool = True


class AutoencoderSettings(TrainSettings):
    """Training of the miniature's autoencoder. kl: weight of the KL term a latent element; it keeps latents near unit
    scale and centred."""

    steps: int = Field(600, ge=1)
    batch: int = Field(64, ge=1)
    clip: float = Field(1.0, ge=0)
    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-3)
    kl: float = Field(1e-4, ge=0)


class PretrainSettings(TrainSettings):
    """Training of a teacher. start: a pipeline folder or hub model to go on from, or "miniature" to build one.
    caption_dropout: share of captions replaced by the empty one (classifier-free guidance needs it)."""

    steps: int = Field(1500, ge=1)
    batch: int = Field(64, ge=1)
    start: str = "miniature"
    miniature: MiniatureSettings = MiniatureSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-5)
    ema: float = Field(0.999, ge=0, lt=1)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    ds_config: str = "zero1"


class RecordSettings(TrainSettings):
    """Stage 1. nodes: recorded nodes, the teacher not counted. spacing: "distance" spreads them evenly in score
    distance from the teacher, "steps" evenly in steps. probe: samples that the distance is measured on, every
    `probe_every` steps."""

    steps: int = Field(1000, ge=1)
    batch: int = Field(128, ge=1)
    optimizer: OptimizerSettings = OptimizerSettings(lr=5e-7)
    nodes: int = Field(10, ge=1)
    spacing: Literal["distance", "steps"] = "distance"
    probe: int = Field(64, ge=1)
    probe_every: int = Field(10, ge=1)
    teacher_ds_config: str = "zero0"
    ds_config: str = "zero1"


class BacktrackSettings(TrainSettings):
    """Stage 2. path: "walk" is the method, "warm" starts the fake score at the far node but keeps the teacher as the
    target, "none" is plain distillation. fake_updates: fake-score updates a generator update; a step is one fake-score
    update. reuse_x0: the fake updates between two generator turns see the last turn's samples instead of new ones; captions
    are then read for turns only, except with the GAN term, which wants images. student_timesteps: falling timesteps of a student of several steps, such as [999, 749, 499, 249]; empty: one step at
    `conditioning_timestep`. generator_split: pieces that a micro-batch is cut into for the generator's turn, for memory;
    the result is the same. guidance_batch: one call of the target with a doubled batch; false: two calls, with half the
    memory for activations, and under ZeRO-3 twice the traffic for the target."""

    steps: int = Field(24_000, ge=1)
    batch: int = Field(128, ge=1)
    objective: Literal["dmd", "vsd"] = "dmd"
    path: Literal["walk", "warm", "none"] = "walk"
    walk: WalkSettings = WalkSettings()
    fake_updates: int = Field(5, ge=1)
    reuse_x0: bool = False
    student_timesteps: list[int] = []
    generator_split: int = Field(1, ge=1)
    guidance_scale: float = 8.0
    guidance_batch: bool = True
    timesteps: tuple[float, float] = (0.02, 0.98)
    generator: OptimizerSettings = OptimizerSettings(lr=5e-7)
    fake_score: OptimizerSettings = OptimizerSettings(lr=5e-7)
    ema: float = Field(0.999, ge=0, lt=1)
    teacher_ds_config: str = "zero0"
    generator_ds_config: str = "zero1"
    fake_score_ds_config: str = "zero1"

    @field_validator("student_timesteps")
    @classmethod
    def _falling(cls, value: list[int]) -> list[int]:
        if any(t < 1 for t in value) or value != sorted(set(value), reverse=True):
            raise ValueError(f"{value} must fall from step to step and stay above 0")
        return value


class SampleSettings(Strict):
    """prompts: captions; empty: the first of the training shards. steps and guidance_scale are a diffusion model's; a
    one-step generator needs neither. source: what to sample from, as in `evaluate.what`. out: a folder (default:
    samples/ in the run folder). enlarge: pixels a pixel in grids, for tiny images."""

    prompts: list[str] = []
    images: int = Field(16, ge=1)
    batch: int = Field(16, ge=1)
    columns: int = Field(8, ge=1)
    enlarge: int = Field(1, ge=1)
    steps: int = Field(25, ge=1)
    guidance_scale: float = 7.5
    source: str = "generator"
    out: str = ""
    seed: int = 0


class EvaluateSettings(Strict):
    """what: "generator", "teacher", "start", a checkpoint such as "step-00000500", or a pipeline or denoiser folder.
    features: "digits" is the demo's classifier, trained once and kept in `classifier`."""

    what: str | list[str] = "generator"
    watch: bool = False
    poll_seconds: float = Field(60.0, gt=0)
    images: int = Field(10_000, ge=2)
    batch: int = Field(16, ge=1)
    seed: int = 0
    features: Literal["digits"] = "digits"
    classifier: str = ""


class ExportSettings(Strict):
    """checkpoint: such as step-00000500 (default: the last). out: the folder to write (default: generator/ of the run).
    merge: of a LoRA run, writes the sum of base and LoRA as the denoiser; false keeps the base and puts the LoRA beside
    it, in lora/, for `pipe.load_lora_weights`."""

    checkpoint: str = ""
    merge: bool = True
    out: str = ""


class ReportSettings(Strict):
    """compare: run folders whose results stand beside this run's, such as the ablations without the path."""

    compare: list[str] = []


class RunSettings(Strict):
    """run: the run's folder. pipeline: the teacher, a diffusers pipeline folder or a model of the Hugging Face hub such as
    stabilityai/stable-diffusion-xl-base-1.0, with @REVISION if need be (default: the run's own). variant: the pipeline's
    weight files to use, such as fp16 for *.fp16.safetensors (default: the plain ones). path: the recorded path (default:
    the run's own). generator_start: denoiser's folder that the generator starts from (default: the teacher's).
    conditioning_timestep: the timestep that the one-step generator is told; 1000, pure noise, for flow models.
    timestep_shift: s in u <- s u / (1 + (s - 1) u) for every u that a training timestep is drawn from; above 1 more of
    the training is at high noise, which large images need (SD3's value at 1024 px is 3)."""

    run: str
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    pipeline: str = ""
    variant: str = ""
    path: str = ""
    generator_start: str = ""
    conditioning_timestep: int = Field(399, ge=1)
    timestep_shift: float = Field(1.0, gt=0)
    network: NetworkSettings = NetworkSettings()
    data: DataConfig = DataConfig()
    lora: LoraSettings = LoraSettings()
    pretrain: PretrainSettings = PretrainSettings()
    record: RecordSettings = RecordSettings()
    backtrack: BacktrackSettings = BacktrackSettings()
    gan: GanSettings = GanSettings()
    sample: SampleSettings = SampleSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()
    report: ReportSettings = ReportSettings()
    health: HealthSettings = HealthSettings()

    @property
    def folder(self) -> Path:
        return Path(self.run)

    @property
    def student_timesteps(self) -> tuple[int, ...]:
        """Timesteps of the generator's steps: one for the one-step generator."""
        return tuple(self.backtrack.student_timesteps) or (self.conditioning_timestep,)

    @property
    def path_folder(self) -> Path:
        return Path(self.path) if self.path else self.folder / "path"
