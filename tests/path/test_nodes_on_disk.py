"""Nodes that break while a run trains, and candidates whose rename to a node was interrupted."""

import shutil

import pytest
import support
import torch

from models.files import WEIGHTS_FILE
from trainer.backtrack import Backtracking
from trainer.engine.save_weights import Snapshot
from trainer.errors import UserError
from trainer.path.candidates import _move
from trainer.path.manifest import file_hash
from trainer.training.run import Run


def test_a_node_that_breaks_during_training(root, world, tmp_path):
    """Nodes are verified when training starts; what happens to them later ends in one clear message."""
    shutil.copytree(root / "base" / "path", tmp_path / "path")
    stage = Backtracking(Run(support.tiny(root, "breaks", f"path={tmp_path / 'path'}"), world))
    file = tmp_path / "path" / "node-0002" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(
        UserError, match=rf"target node 2 cannot be loaded at generator update 0: {file}: not a complete"
    ):
        stage.begin(0)
    stage.close()


def test_candidates_are_renamed_once(tmp_path):
    candidate, node = tmp_path / "candidates" / "step-00000004", tmp_path / "node-0001"
    Snapshot.of_network({"a": torch.zeros(2)}, {}).write(candidate, {"step": 4})
    about = _move(candidate, node)
    assert about[1:] == (file_hash(tmp_path / about[0]), (tmp_path / about[0]).stat().st_size)
    assert not candidate.exists() and _move(candidate, node) == about  # killed after the rename, and started again
    with pytest.raises(UserError, match=r"step-00000005 is missing"):
        _move(candidate.with_name("step-00000005"), node)
