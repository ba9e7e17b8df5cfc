"""Global random generators in a checkpoint. Only libraries draw from them: our own noise is per sample (models.noise)."""

import hashlib
import random

import numpy as np
import torch

from trainer.distributed.world import seed_everything


def global_generators(device: torch.device) -> dict:
    """State of this rank's global generators, as tensors and plain containers."""
    kind, words, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(words.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def reseed_generators(seed: int, step: int, rank: int) -> None:
    """For a rank that the saved run did not have: seeds that depend on (seed, step, rank) only."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    seed_everything(int.from_bytes(digest, "little") >> 1)
