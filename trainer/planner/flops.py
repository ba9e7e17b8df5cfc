"""Network passes of a backtracking step, counted: a pure function of the settings."""

from models.settings import GanSettings, LoraSettings
from trainer.config.schema import BacktrackSettings


def sample_passes(steps: int) -> float:
    """Average forward passes that make one sample of a student with `steps` steps: its step is drawn uniformly and the
    ones before it are simulated."""
    return (steps + 1) / 2


def trained_pass(lora: LoraSettings) -> int:
    """Forward passes that a trained pass costs: itself, the gradients on activations and, unless they are a LoRA's few, on
    weights."""
    return 2 if lora.rank else 3


def step_flops(
    settings: BacktrackSettings,
    gan: GanSettings,
    trained: int,
    forward: float,
    judging: float = 0.0,
    head: float = 0.0,
) -> float:
    """FLOP a sample of an average step (one fake-score update and its share of a generator turn).

    trained: see `trained_pass`. forward: of one pass of the network; judging: of its encoder with the GAN head; head: of the head alone. A backward
    pass is twice its forward pass, and as much as it where only the input's gradient is wanted. Text encoders and
    autoencoder are not counted.
    """
    sampling = sample_passes(len(settings.student_timesteps) or 1) * forward
    guided = 1 if settings.guidance_scale == 1 else 2
    # The generator's sample and its backward pass, the target, the fake score.
    turn = sampling + (trained - 1) * forward + guided * forward + forward
    update = trained * forward
    if gan.enabled:
        turn += judging + head if gan.shared_pass else 2 * judging  # the head, and back to the sample
        update += trained * judging + (3 * head if gan.shared_pass else trained * judging)  # real and generated samples
    fresh = 0 if settings.reuse_x0 else (settings.fake_updates - 1) * sampling
    return (turn + settings.fake_updates * update + fresh) / settings.fake_updates
