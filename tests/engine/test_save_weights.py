"""Weights folders written in the background."""

import json

import pytest
import torch

from trainer.engine.save_weights import FolderWriter, Snapshot
from trainer.errors import UserError


def test_a_folder_that_cannot_be_written(world, tmp_path):
    writer = FolderWriter(world)
    (tmp_path / "file").write_text("in the way")
    snapshot = Snapshot.of_network({"a": torch.zeros(2)}, {})
    writer.begin(snapshot, tmp_path / "good", {"step": 1})
    writer.begin(None, tmp_path / "nothing", {"step": 1})  # what ranks other than 0 have
    writer.begin(snapshot, tmp_path / "file" / "bad", {"step": 2})
    with pytest.raises(UserError, match="weights could not be written"):
        writer.join()
    assert (
        json.loads((tmp_path / "good" / "node.json").read_text())["step"] == 1 and not (tmp_path / "nothing").exists()
    )
    writer.join()
    writer.close()
