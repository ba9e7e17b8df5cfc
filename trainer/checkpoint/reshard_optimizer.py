"""Optimizer state for another number of processes or another ZeRO stage.

Every rank looks up the elements that it now holds in the files of all ranks that saved them. The files are mapped, so a rank
reads its own part only; nothing is converted on disk, and no rank waits for another. (DeepSpeed's universal checkpoint would
first write one file per parameter, state and rank: 400,000 for SDXL on 64 GPUs.)

Master weights and moments are copied bit for bit; only the cuts between ranks move.
"""

from pathlib import Path

from trainer.engine.deepspeed_internals import Piece, SavedEngine, live_pieces, masters_rewritten, swaps_to_nvme
from trainer.engine.role import Role
from trainer.errors import UserError


def reshard(role: Role, folder: Path, saved_stage: int) -> None:
    """Loads a trained role from files of another number of processes or another ZeRO stage. Every rank must call it. Raises
    UserError if the trained parameters differ, or if the optimizer is on NVMe."""
    if swaps_to_nvme(role.engine):
        raise UserError(f"{role.name}: an optimizer on NVMe resumes on the saved number of processes and stage only")
    trained = dict(role.trained_parameters())
    saved = SavedEngine(folder, saved_stage, list(trained))
    if wrong := sorted(saved.pieces.keys() ^ trained.keys()):
        raise UserError(f"{role.name}: trained parameters differ from the checkpoint's: {wrong[:3]}")
    with masters_rewritten(role.engine):
        for piece in live_pieces(role.engine, trained, saved.step):
            _fill(piece, saved.pieces[piece.name])
    saved.restore_counters(role.engine)


def _fill(live: Piece, saved: list[Piece]) -> None:
    """Copies a live piece's values from the saved pieces of its parameter. Raises UserError if they do not cover it."""
    filled = 0
    for piece in saved:
        low, high = max(live.start, piece.start), min(live.end, piece.end)
        if low < high:
            for key, value in live.values.items():
                value[low - live.start : high - live.start].copy_(
                    piece.values[key][low - piece.start : high - piece.start]
                )
            filled += high - low
    if filled != live.end - live.start:
        raise UserError(
            f"{live.name}: the checkpoint has {filled} of the {live.end - live.start} elements from {live.start} to {live.end}"
        )
