"""One role's updates: gradient norms, sums of gradients, and bf16 at ZeRO-0."""

import pytest
import support
import torch
from deepspeed.utils import safe_get_full_grad

from benchmarks.device_waits import Counts
from models.pipeline import empty_network, load_network
from trainer.checkpoint.reshard_optimizer import reshard
from trainer.config.deepspeed import deepspeed_config
from trainer.config.schema import OptimizerSettings
from trainer.engine.deepspeed_internals import MASTER, MOMENTS, Piece, live_pieces
from trainer.engine.role import Role
from trainer.errors import UserError


def loss_of(network, generator) -> torch.Tensor:
    x, states = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 16, 16, generator=generator)
    added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
    dtype = next((network.module if isinstance(network, Role) else network).parameters()).dtype
    x, states, added = x.to(dtype), states.to(dtype), {key: value.to(dtype) for key, value in added.items()}
    return network(x, torch.tensor([10, 700]), states, added_cond_kwargs=added)[0].float().square().mean()


@pytest.mark.parametrize("stage", ["zero0", "zero2", "sharded"])
def test_the_norm_is_kept_when_wanted(root, world, stage, tmp_path):
    """Before clipping, over both micro-steps of an accumulation, and part of what a resumed run remembers."""
    folder = root / "base" / "pipeline" / "unet"
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    config = deepspeed_config(name, 2, 2, 1e-3, "fp32", world.size)
    role = Role("generator", empty_network(folder), config, world, OptimizerSettings(lr=1e-5), folder)
    plain, generator = load_network(folder), torch.Generator().manual_seed(0)
    for keep in (False, True):
        before = role.last_norm
        role.keep_norm = keep
        for _ in range(2):
            (loss_of(plain, torch.Generator().set_state(generator.get_state())) / 2).backward()
            role.step(loss_of(role, generator), 0.0)
        if keep:
            expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
            assert float(role.last_norm) == pytest.approx(float(expected), rel=1e-4)
        else:
            assert role.last_norm is before is None
        plain.zero_grad()
    state, role.last_norm = role.watch_state(), None
    role.load_watch_state(state)
    assert role.last_norm == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "sharded"])
def test_gradients_are_summed_in_float32(root, world, stage, tmp_path):
    """Over micro-steps; and what ZeRO-1 then saves, with another optimizer of DeepSpeed's, is what it loads."""
    folder, steps = root / "base" / "pipeline" / "unet", 4
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    plain, expected, errors = load_network(folder).to(torch.bfloat16), {}, {}
    for fp32 in (True, False):
        config, generator = deepspeed_config(name, 2, steps, 1.0, "bf16", 1, fp32), torch.Generator().manual_seed(0)
        role = Role("generator", empty_network(folder), config, world, OptimizerSettings(lr=1e-3), folder)
        for step in range(steps):
            if fp32:
                (loss_of(plain, torch.Generator().set_state(generator.get_state())) / steps).backward()
                for key, p in plain.named_parameters():
                    expected[key] = expected.get(key, 0) + p.grad.float()
                plain.zero_grad()
            role.engine.backward(loss_of(role, generator))
            if step < steps - 1:
                role.engine.step()
        found = [safe_get_full_grad(p).float().flatten() for _, p in role.trained_parameters()]
        whole = torch.cat([expected[key].flatten() for key, _ in role.trained_parameters()])
        errors[fp32] = float((torch.cat(found) - whole).norm() / whole.norm())
        role.engine.step()
        if fp32 and stage == "zero1":
            role.save_engine(tmp_path, lambda state, file: (file.parent.mkdir(exist_ok=True), torch.save(state, file)))
            other = Role("generator", empty_network(folder), config, world, OptimizerSettings(lr=1e-3), folder)
            before, after = ([p.values[MASTER] for p in pieces(r)] for r in (other, role))
            assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert other.load_engine(tmp_path)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # ZeRO-3's linear layers round their gradients in another way than torch's.
    assert errors[True] < errors[False] * (0.7 if stage == "sharded" else 1e-3) and 1e-3 < errors[False] < 1e-2


def pieces(role) -> list[Piece]:
    return list(live_pieces(role.engine, dict(role.trained_parameters())))


@pytest.mark.parametrize("saved", ["zero0", "zero1", "sharded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_role_that_was_never_updated_changes_its_stage(root, world, saved, precision, tmp_path):
    """Saved before its first update it has no moments, or DeepSpeed's zeros: its masters arrive, and no moment."""
    folder, names = root / "base" / "pipeline" / "unet", {"sharded": support.sharded_zero3(tmp_path)}
    for loaded in {"zero0", "zero1", "sharded"} - {saved}:
        roles = []
        for name in (saved, loaded):
            config = deepspeed_config(names.get(name, name), 2, 1, 0.0, precision, world.size)
            roles.append(Role("generator", empty_network(folder), config, world, OptimizerSettings(lr=1e-3), folder))
        old, new = roles
        for piece in pieces(old):
            piece.values[MASTER].add_(1.0)  # what only the files know
        old.save_engine(tmp_path / loaded, lambda s, f: (f.parent.mkdir(parents=True, exist_ok=True), torch.save(s, f)))
        reshard(new, tmp_path / loaded / "generator", old.stage)
        expected = {p.name: p.values[MASTER] for p in pieces(old)}
        for piece in live_pieces(new.engine, dict(new.trained_parameters()), 0):
            assert torch.equal(piece.values[MASTER], expected[piece.name])
            assert not any(piece.values[key].any() for key in MOMENTS)
        new.step(loss_of(new, torch.Generator().manual_seed(0)), 1e-3)


def test_gradients_in_float32_need_a_stage_that_has_them():
    with pytest.raises(UserError, match=r"network.grad_accum_dtype=fp32 does not work with zero0: .*use zero1"):
        deepspeed_config("zero0", 1, 1, 0.0, "bf16", 1, True)
    assert "data_types" not in deepspeed_config("zero0", 1, 1, 0.0, "fp32", 1, True)  # it has them anyway


def test_a_bf16_update_at_zero_0_reads_nothing(root, world):
    """And is AdamW on the float32 masters with clipped gradients; the network gets them rounded."""
    folder = root / "base" / "pipeline" / "unet"
    config = deepspeed_config("zero0", 2, 1, 1e-3, "bf16", 1)
    role = Role("generator", empty_network(folder), config, world, OptimizerSettings(lr=1e-3), folder)
    plain, masters = load_network(folder).to(torch.bfloat16), load_network(folder)
    adam = torch.optim.AdamW(masters.parameters(), lr=1e-3)
    generator, counts, role.keep_norm = torch.Generator().manual_seed(0), Counts(), True
    for _ in range(3):
        loss_of(plain, torch.Generator().set_state(generator.get_state())).backward()
        for master, p in zip(masters.parameters(), plain.parameters(), strict=True):
            master.grad = p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), 1e-3)
        adam.step()
        plain.load_state_dict(masters.state_dict())
        plain.zero_grad()
        loss = loss_of(role, generator)
        with counts:
            role.step(loss, 1e-3)
        assert float(role.last_norm) == pytest.approx(float(norm), rel=1e-5)
    assert not counts.reads
    for piece, (key, master) in zip(pieces(role), masters.named_parameters(), strict=True):
        assert piece.name == key and torch.allclose(piece.values[MASTER], master.detach().flatten(), atol=1e-6)
        assert torch.equal(role.module.get_parameter(key).flatten(), piece.values[MASTER].to(torch.bfloat16))
