"""The configuration of a run, as typed sections: pydantic only, no torch, so that login nodes can read it.

Every field has one line of documentation under it; docs/configuration.md is made of these lines.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data.paths import EXPANDED, PathText
from data.settings import DataSettings
from models.settings import GanSettings, LoraSettings, MiniatureSettings
from trainer.config.evaluation import EvaluateSettings


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class LoopSettings(Settings):
    """The training loop. Intervals are in steps."""

    log_every: int = Field(10, ge=1)
    """interval of the lines in metrics.jsonl and of the progress line"""
    sample_every: int = Field(500, ge=0)
    """interval of the sample grids; 0 makes none"""
    save_every: int = Field(500, ge=1)
    """interval of the checkpoints"""
    keep_last: int = Field(2, ge=1)
    """checkpoints that are kept whole"""
    keep_every: int = Field(0, ge=0)
    """of older checkpoints, those at every `keep_every`-th step stay whole; 0 keeps none"""
    keep_weights_every: int = Field(0, ge=0)
    """of older checkpoints, those at every `keep_weights_every`-th step keep their plain weights; 0 keeps none"""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet", "swanlab"]] = ["tensorboard"]
    """where metrics and sample grids go besides metrics.jsonl and samples/"""


class OptimizerSettings(Settings):
    """AdamW and its learning rate."""

    lr: float = Field(gt=0)
    """learning rate, after warm-up and before decay"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of the first and second moments"""
    eps: float = Field(1e-8, gt=0)
    """added to the root of the second moment"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay"""
    warmup: int = Field(0, ge=0)
    """steps over which the rate rises linearly from 0"""
    decay: Literal["constant", "cosine"] = "constant"
    """"cosine" falls to 0 along a half cosine by the end of training"""


class TrainSettings(Settings):
    """What every training stage has."""

    steps: int = Field(ge=1)
    """training steps"""
    batch: int = Field(ge=1)
    """samples per optimizer step, over all processes and accumulation steps"""
    accumulation: int = Field(1, ge=1)
    """micro-batches per optimizer step"""
    clip: float = Field(10.0, ge=0)
    """largest gradient norm; 0 does not clip"""
    loop: LoopSettings = LoopSettings()


class NetworkSettings(Settings):
    """How the networks of training stages compute. Nothing here changes what they compute, but for rounding."""

    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "math"] = "auto"
    """attention kernel; "auto" takes the first that runs on this device with the network's shapes, and the log says why the
    others do not"""
    checkpointing: bool = False
    """activation checkpointing in trained networks: about a third more time, several times less memory for activations"""
    channels_last: bool = False
    """channels-last convolutions, for frozen roles at zero0 only (DeepSpeed keeps all other weights flat)"""
    compile: bool = False
    """torch.compile of each repeated block, up to ZeRO-2; the first steps then take minutes"""
    tf32: bool = True
    """float32 matrix products on an NVIDIA GPU (VAE decoder, `precision: fp32`) run in TF32"""
    deterministic: bool = False
    """a GPU computes the same bits each time, with slower algorithms; otherwise cuDNN picks the fastest ones by timing them"""
    grad_accum_dtype: Literal["auto", "fp32"] = "auto"
    """precision in which gradients are summed over micro-batches and ranks: "auto" is that of the networks; "fp32" doubles a
    bf16 run's gradient traffic and, at ZeRO-1, keeps all of the gradients on each GPU in float32: zero2 needs less"""

    @model_validator(mode="after")
    def _kernels_that_can_be_deterministic(self) -> "NetworkSettings":
        if self.deterministic and self.attention in ("xformers", "cudnn"):
            raise ValueError(
                f"deterministic=true does not go with attention={self.attention}, which PyTorch cannot make deterministic: "
                "use auto, flash, efficient or math"
            )
        return self


class AutoencoderSettings(TrainSettings):
    """Training of the miniature's autoencoder."""

    steps: int = Field(600, ge=1)
    """training steps"""
    batch: int = Field(64, ge=1)
    """samples per optimizer step, over all processes and accumulation steps"""
    clip: float = Field(1.0, ge=0)
    """largest gradient norm; 0 does not clip"""
    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-3)
    kl: float = Field(1e-4, ge=0)
    """weight of the KL term per latent element; it keeps latents centred and near unit scale"""


class PretrainSettings(TrainSettings):
    """Training of a teacher."""

    steps: int = Field(1500, ge=1)
    """training steps"""
    batch: int = Field(64, ge=1)
    """samples per optimizer step, over all processes and accumulation steps"""
    start: PathText = "miniature"
    """a pipeline folder or hub model to fine-tune, or "miniature" to build and train one"""
    miniature: MiniatureSettings = MiniatureSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-5)
    ema: float = Field(0.999, ge=0, lt=1)
    """decay of the weight average per step"""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """share of captions replaced by the empty one, which classifier-free guidance needs"""
    ds_config: PathText = "zero1"
    """DeepSpeed configuration of the teacher"""


class RecordSettings(TrainSettings):
    """Stage 1, degradation recording."""

    steps: int = Field(1000, ge=1)
    """training steps"""
    batch: int = Field(128, ge=1)
    """samples per optimizer step, over all processes and accumulation steps"""
    optimizer: OptimizerSettings = OptimizerSettings(lr=5e-7)
    nodes: int = Field(10, ge=1)
    """recorded nodes, not counting the teacher"""
    spacing: Literal["distance", "steps"] = "distance"
    """nodes evenly spaced in score distance from the teacher, or in steps"""
    probe: int = Field(64, ge=1)
    """samples that the score distance is measured on"""
    probe_every: int = Field(10, ge=1)
    """interval of these measurements, in steps"""
    settle: float = Field(0.05, ge=0)
    """with nodes spaced by distance, recording ends before `steps` when the mean distance over the last quarter of the
    measurements (at least four) is not more than this share above that over the quarter before; 0 records all `steps`"""
    teacher_ds_config: PathText = "zero0"
    """DeepSpeed configuration of the frozen generator"""
    ds_config: PathText = "zero1"
    """DeepSpeed configuration of the network that is fine-tuned"""


class WalkSettings(Settings):
    """When the target moves on to the next node."""

    mode: Literal["fixed", "adaptive"] = "fixed"
    """"fixed": every `interval` generator updates; "adaptive": when the mismatch has fallen far enough"""
    interval: int = Field(1000, ge=1)
    """generator updates per node; for an adaptive walk the fewest"""
    share: float = Field(0.7, gt=0, lt=1)
    """an adaptive walk, which looks every `interval` updates, moves on when the mean mismatch has fallen below this share of
    that of the first interval on the node"""
    most: int = Field(2000, ge=1)
    """an adaptive walk moves on when it looks after this many updates in any case"""


class BacktrackSettings(TrainSettings):
    """Stage 2, distribution backtracking. A step is one fake-score update."""

    steps: int = Field(24_000, ge=1)
    """training steps, one fake-score update each"""
    batch: int = Field(128, ge=1)
    """samples per optimizer step, over all processes and accumulation steps"""
    objective: Literal["dmd", "vsd"] = "dmd"
    """score-distillation objective: normalised (DMD) or with an explicit w(t) (VSD, Diff-Instruct)"""
    path: Literal["walk", "warm", "none"] = "walk"
    """"walk" is the method; "warm" starts the fake score at the far node but keeps the teacher as the target; "none" is
    plain distillation"""
    walk: WalkSettings = WalkSettings()
    fake_updates: int = Field(5, ge=1)
    """fake-score updates per generator update"""
    reuse_x0: bool = False
    """fake-score updates between two generator updates reuse the last update's samples; captions are then only read for
    generator updates, except with the GAN term, which needs images"""
    student_timesteps: list[int] = []
    """falling timesteps of a generator of several steps, such as [999, 749, 499, 249]; empty: one step at
    `conditioning_timestep`"""
    generator_split: int = Field(1, ge=1)
    """pieces that a micro-batch is cut into for the generator's update, to save memory; the result is the same"""
    guidance_scale: float = 8.0
    """classifier-free guidance scale of the target"""
    guidance_batch: bool = True
    """guidance in one call with a doubled batch; false makes two calls: half the memory for activations, and under ZeRO-3
    twice the traffic for the target"""
    timesteps: tuple[float, float] = (0.02, 0.98)
    """range of timesteps of the score difference, as shares of the schedule"""
    generator: OptimizerSettings = OptimizerSettings(lr=5e-7)
    fake_score: OptimizerSettings = OptimizerSettings(lr=5e-7)
    ema: float = Field(0.999, ge=0, lt=1)
    """decay of the generator's weight average per generator update"""
    ema_warmup: bool = False
    """the decay is at most (n + 1) / (n + 10) after n updates: the average forgets the untrained generator sooner, and reaches
    `ema` after about 9 / (1 - ema) updates"""
    save_raw: bool = False
    """checkpoints also hold the generator's weights before averaging, for `disback evaluate`"""
    teacher_ds_config: PathText = "zero0"
    """DeepSpeed configuration of the teacher, which is also the target"""
    generator_ds_config: PathText = "zero1"
    """DeepSpeed configuration of the generator"""
    fake_score_ds_config: PathText = "zero1"
    """DeepSpeed configuration of the fake score"""

    @field_validator("student_timesteps")
    @classmethod
    def _falling(cls, value: list[int]) -> list[int]:
        if any(t < 1 for t in value) or value != sorted(set(value), reverse=True):
            raise ValueError(f"{value} must fall from step to step and stay above 0")
        return value

    @model_validator(mode="after")
    def _whole_updates(self) -> "BacktrackSettings":
        if self.steps % self.fake_updates:
            raise ValueError(
                f"steps={self.steps} is not a multiple of fake_updates={self.fake_updates}: the last generator update would "
                "lack fake-score updates"
            )
        return self


class SampleSettings(Settings):
    """Images from prompts, for `disback sample` and the grids of training."""

    prompts: list[str] = []
    """captions; empty: the first ones of the training shards"""
    images: int = Field(16, ge=1)
    """images that `disback sample` makes"""
    batch: int = Field(16, ge=1)
    """images per network call"""
    columns: int = Field(8, ge=1)
    """columns of the grid"""
    enlarge: int = Field(1, ge=1)
    """factor by which tiny images are enlarged in grids"""
    steps: int = Field(25, ge=1)
    """sampling steps of a diffusion model; a one-step generator ignores them"""
    guidance_scale: float = 7.5
    """guidance scale of a diffusion model; a one-step generator ignores it"""
    source: PathText = "generator"
    """what to sample from, named as in `evaluate.what`"""
    out: PathText = ""
    """output folder (default: samples/ in the run folder)"""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """image i is drawn with seed + i"""

    @field_validator("prompts")
    @classmethod
    def _characters(cls, value: list[str]) -> list[str]:
        for number, prompt in enumerate(value):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"prompt {number}: half a surrogate pair at character {error.start}, which no tokenizer takes: fix it"
                ) from error
        return value


class ExportSettings(Settings):
    """Export of a checkpoint as a diffusers pipeline, with a model card, and its upload."""

    checkpoint: str = ""
    """such as step-00000500 (default: the last one)"""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """what the denoiser's weights, kept in float32, are rounded to; "auto": float16, as published pipelines are, but float32
    if a weight is beyond float16's range or the run has `precision: fp32`"""
    merge: bool = True
    """of a LoRA run, writes base plus LoRA as the denoiser; false keeps the base and puts the LoRA beside it, in lora/, for
    `pipe.load_lora_weights`"""
    out: PathText = ""
    """output folder (default: generator/ in the run folder)"""
    license: str = ""
    """licence in the model card, an identifier of the hub such as openrail++ (default: that of the teacher's pipeline folder,
    if it has one)"""
    push_to_hub: str = ""
    """repository of the Hugging Face hub, OWNER/NAME, that `disback export` uploads the folder to"""
    private: bool = True
    """a repository that the upload creates is private; an existing one stays as it is"""


class ReportSettings(Settings):
    """The HTML page of a run."""

    compare: Annotated[list[str], EXPANDED] = []
    """run folders whose results stand beside this run's, such as the ablations without the path; runs that differ only in
    `seed` are one row, with their mean and standard deviation"""


class HealthSettings(Settings):
    """Early warnings. Each condition is checked once per logging interval."""

    stop_after: int = Field(100, ge=1)
    """the run stops after this many skipped updates (gradient not finite) without a clean interval in between"""
    spread: float = Field(0.5, ge=0)
    """warns of collapse when the spread of the samples falls below this share of its highest value"""
    rising: float = Field(4.0, gt=1)
    """warns of divergence when the mismatch rises to this many times its lowest value on the current target"""
    error: float = Field(1.0, gt=0)
    """warns that the fake score is wrecked when its loss exceeds this share of the loss of predicting zero"""
    slow: float = Field(1.5, gt=1)
    """warns when a step takes this many times its median time"""
    waiting: float = Field(0.3, gt=0)
    """warns when this share of a step is spent waiting for data"""
    patience: int = Field(3, ge=1)
    """consecutive logging intervals that a condition must hold"""


class RunSettings(Settings):
    """One run."""

    run: PathText
    """the run folder"""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """every random draw is a function of it"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """precision of the networks; optimizers keep float32 master weights"""
    pipeline: PathText = ""
    """the teacher: a diffusers pipeline folder, or a model of the Hugging Face hub such as
    stabilityai/stable-diffusion-xl-base-1.0, with @REVISION if need be (default: pipeline/ in the run folder)"""
    variant: str = ""
    """which of the pipeline's weight files to use, such as fp16 for *.fp16.safetensors (default: the plain ones)"""
    path: PathText = ""
    """the recorded path (default: path/ in the run folder)"""
    generator_start: PathText = ""
    """weights folder that the generator starts from (default: the teacher's)"""
    conditioning_timestep: int = Field(399, ge=1)
    """timestep that the one-step generator is evaluated at; 1000, pure noise, for flow models"""
    timestep_shift: float = Field(1.0, gt=0)
    """s in u <- s u / (1 + (s - 1) u) for every u that a training timestep is drawn from; above 1 more of the training is at
    high noise, which large images need (SD3's value at 1024 px is 3)"""
    network: NetworkSettings = NetworkSettings()
    data: DataSettings = DataSettings()
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
