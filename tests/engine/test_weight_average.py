"""Weight averages: what is left of small updates when they are exported, and the same average at every ZeRO stage."""

import support
import torch
from ranks_average import MEMORYLESS, STAGES, Layers, averaged_role
from safetensors.torch import load_file

from models.ema import Ema
from models.generator_pipeline import copy_rounded
from trainer.config.deepspeed import deepspeed_config
from trainer.engine.role import Role
from trainer.training.state_parts import WeightAverage

UPDATES, RATE, DECAY = 5000, 5e-7, 0.999
SIZE = (64, 64)  # of a layer's weights
LIMITS = {"drift": 0.025, "walk": 0.15}  # largest error of the exported average, as a share of all movement


def test_an_exported_average_keeps_small_updates(world, tmp_path):
    """5,000 updates by DeepSpeed's own steps, in bf16, at a learning rate of 5e-7. Adam without memory moves every weight by
    the rate, against the gradient's sign, which is random in one layer; in the other, every tenth goes its weight's own way.
    The reference is the same average in float64. An average of bf16 copies that is exported in bf16 fails."""
    config = deepspeed_config("zero1", 1, 1, 0.0, "bf16", world.size)
    role = Role("generator", Layers(dict.fromkeys(LIMITS, SIZE)), config, world, MEMORYLESS)
    average, of_copies = WeightAverage(role, DECAY), Ema([t.float() for t in role.local()], DECAY)
    start = role.state_dict(dtype=torch.float64)
    exact, reference = ({f"{name}.weight": start[f"{name}.weight"].clone() for name in LIMITS} for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    direction = torch.randn(SIZE, generator=draw).sign()
    for _ in range(UPDATES):
        drift, walk = torch.randn((2, *SIZE), generator=draw).sign()
        drift = torch.where(torch.rand(SIZE, generator=draw) < 0.1, direction, drift)
        role.step(role({"drift": drift, "walk": walk}), RATE)
        average.update()
        of_copies.update([t.float() for t in role.local()])
        for key, sign in (("drift.weight", drift), ("walk.weight", walk)):
            exact[key] -= RATE * sign
            reference[key].lerp_(exact[key], 1 - DECAY)
    average.snapshot().write(tmp_path / "weights")
    copy_rounded(tmp_path / "weights", torch.float16, tmp_path / "exported")
    (file,) = (tmp_path / "exported").glob("*.safetensors")
    exported = load_file(file)
    assert all(value.dtype == torch.float16 for value in exported.values())

    def errors(state: dict[str, torch.Tensor]) -> dict[str, float]:
        found = {}
        for key, mean in reference.items():
            error = (state[key].double() - mean).norm() / (mean - start[key]).norm()
            found[key.removesuffix(".weight")] = float(error)
        return found

    before = role.weights.gather(of_copies.shadow, torch.bfloat16)
    print(f"exported average: {errors(exported)}; average of bf16 copies, exported in bf16: {errors(before)}")
    assert all(errors(exported)[name] <= limit for name, limit in LIMITS.items())
    assert all(errors(before)[name] > limit for name, limit in LIMITS.items())
    assert max(errors(average.snapshot().state).values()) < 0.005  # the rest is the export's rounding


def test_two_ranks_average_as_one_process_does(world, tmp_path):
    """In bf16, at every ZeRO stage, of whole networks and of adapters."""
    support.ranks("average", tmp_path)
    for lora in (False, True):
        _, average, start = averaged_role(world, "zero0", lora, tmp_path)
        expected = average.snapshot().state
        moved = max(float((value - start[key]).abs().max()) for key, value in expected.items())
        assert moved > 2e-6
        for stage in STAGES:
            theirs = torch.load(tmp_path / "average" / f"{stage}-{lora}.pt")
            assert all(value.dtype == torch.float32 for value in theirs.values())
            assert support.largest_difference(theirs, expected) < 1e-3 * moved, (stage, lora)
