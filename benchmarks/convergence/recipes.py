"""What a run of the study trains: the recipe, and the methods that differ in what the fake score and the target are."""

from dataclasses import asdict, dataclass

METHODS = {
    "none": "plain distillation: the fake score starts from the teacher",
    "warm": "the fake score starts from the path's far node, the target is the teacher",
    "walk": "DisBack: the same start, the target walks the nodes in reverse order",
    "fine": "as walk, with the nodes' weights interpolated between switches",
    "blend": "DynaDG: target = teacher + lambda (fake score - teacher) in weights, lambda falling to 0; no recording",
}


ENCODER = 0.4  # the part of a pass before the head, as it is for SDXL's UNet


@dataclass(frozen=True)
class Recipe:
    """One run but for its problem and seed. Rates are AdamW's; compute is in forward passes of the teacher on a batch.

    budget: compute of the whole run, recording and its probes included. start: the generator's weights: "teacher",
    "random", or "small" (random, half of the channels). early: share of the generator's updates over which DynaRS draws
    noisier timesteps (0: never). blend, blend_share: lambda at the start, and the share of the run after which it is 0.
    ida: share by which the fake score is pulled to the generator after each generator update (SenseFlow).
    guidance_start: guidance at the first update, from which it goes to `guidance` over half of the run (0: constant).
    apart: guidance's part of the gradient has a noise level of its own (Decoupled DMD). fake_text: False trains the fake score
    without captions (SiD's Zero-CFG). node_guidance: scale of the guidance away from the path's far node. gan, head: weights
    of the GAN term and of its head (models.gan). divergence: f-distill's, "forward-kl" or "jensen-shannon" ("": the reverse
    KL); needs the head. refit: recording steps of the better fitted fake score of the diagnostics (0: no diagnostics).
    ema_warmup: the average's decay after n updates is at most (n + 1) / (n + 10).
    """

    method: str = "none"
    objective: str = "dmd"
    lr: float = 2.4e-4
    fake_lr: float = 6e-4
    decay: str = "cosine"
    betas: tuple[float, float] = (0.0, 0.99)
    fake_updates: int = 1
    guidance: float = 1.25
    level: float = 749
    student: tuple[int, ...] = ()
    ema: float = 0.9
    budget: float = 603
    start: str = "teacher"
    record_steps: int = 16
    record_lr: float = 2e-4
    nodes: int = 4
    interval: int = 2
    blend: float = 0.25
    blend_share: float = 0.5
    early: float = 0.0
    ida: float = 0.0
    guidance_start: float = 0.0
    apart: bool = False
    fake_text: bool = True
    node_guidance: float = 0.0
    gan: float = 0.0
    head: float = 1e-2
    divergence: str = ""
    refit: int = 0
    ema_warmup: bool = False

    def __post_init__(self):
        if self.objective in ("sid", "difference") and (
            self.has_head or self.apart or self.node_guidance or self.guidance_start
        ):
            raise ValueError(f"{self.objective} has no such variant")

    @property
    def records(self) -> bool:
        return self.method in ("warm", "walk", "fine") or self.node_guidance > 0

    @property
    def has_head(self) -> bool:
        return self.gan > 0 or bool(self.divergence)

    @property
    def recording_cost(self) -> float:
        """A recording step is a sample and a denoising step; the path is measured on one batch after each step, and once
        on the teacher, whose samples cost another pass."""
        return self.record_steps * (self._sample + 3 + 1) + self._sample + 1 if self.records else 0

    @property
    def _sample(self) -> float:
        """A sample of the generator: of several steps it is drawn at a random one, after those before it. Half of the
        channels cost a quarter."""
        steps = (len(self.student) + 1) / 2 if self.student else 1
        return steps * self._own

    @property
    def _own(self) -> float:
        return 0.25 if self.start == "small" else 1

    @property
    def update_cost(self) -> float:
        """Of a generator update with its fake updates: forward 1, backward 2, and back to the input alone 1."""
        guided = self.guidance != 1 or self.guidance_start not in (0, 1)
        target = 1 + guided + (self.node_guidance > 0)
        generator = self._sample + 2 * self._own + target + self.apart + 1
        if self.objective == "sid":
            generator += target + 1
        fake = 3.0
        if self.has_head:
            generator += ENCODER if self.gan else 0  # from the head back to the sample
            fake += 3 * ENCODER  # the head on real samples
        return generator + fake * self.fake_updates + self._sample * (self.fake_updates - 1)

    @property
    def updates(self) -> int:
        """Generator updates that the budget pays for."""
        return int((self.budget - self.recording_cost) / self.update_cost)

    def as_json(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict) -> "Recipe":
        """Of a line that an earlier version may have written: fields that it lacks have their defaults."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
