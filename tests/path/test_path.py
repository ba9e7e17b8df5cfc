"""The recorded path on disk, what is refused, and how nodes get into sharded engines."""

import json
import os
import shutil
from pathlib import Path

import pytest
import support
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from support import ROUNDING, prediction

from models.files import WEIGHTS_FILE
from models.pipeline import empty_network, files_hash, load_network, weights_hash
from trainer.backtrack import Backtracking
from trainer.config.deepspeed import deepspeed_config
from trainer.engine.role import Role
from trainer.errors import UserError
from trainer.path.candidates import choose_nodes, has_settled
from trainer.path.manifest import file_hash, open_path
from trainer.record import Recording, record
from trainer.training import weight_hashes
from trainer.training.loop import train
from trainer.training.run import Run


def opened(root, world, path=None, **changes):
    run = Run(support.tiny(root, "x", *[f"{k}={v}" for k, v in changes.items()]), world)
    where, hashes = path or run.settings.path_folder, (weights_hash(run.teacher_folder), weights_hash(run.start_folder))
    return open_path(where, run.teacher_folder, hashes, run.settings.student_timesteps, world, run.settings.lora)


@pytest.fixture
def copy(root, tmp_path):
    shutil.copytree(root / "base" / "path", tmp_path / "path")
    return tmp_path / "path"


def test_manifest_and_nodes(root, world):
    path = opened(root, world)
    folder = root / "base" / "path"
    assert [n.index for n in path.nodes] == [0, 1, 2, 3]
    assert path.nodes[0].step == 0 and path.nodes[-1].step == 8  # the last is what training ended with
    distances = [n.distance_to_node_0 for n in path.nodes]
    assert distances[0] == 0 and all(d > 0 for d in distances[1:])
    assert path.nodes[1].distance_to_neighbour == pytest.approx(path.nodes[1].distance_to_node_0)
    assert path.folder(0) == root / "base" / "pipeline" / "unet"
    assert not list((folder / "node-0000").glob("*.safetensors"))  # refers, does not copy
    teacher = load_network(path.folder(0)).state_dict()
    for node in path.nodes[1:]:
        assert node.sha256 == file_hash(folder / node.file)
        assert node.bytes == (folder / node.file).stat().st_size
        assert {v.dtype for v in load_file(folder / node.file).values()} == {torch.bfloat16}
        unet = UNet2DConditionModel.from_pretrained(path.folder(node.index))
        assert any(not torch.equal(v, teacher[k]) for k, v in unet.state_dict().items())
    assert not (folder / "candidates").exists()


def test_recording_again_does_nothing(root, world, capsys):
    before = (root / "base" / "path" / "path.json").stat().st_mtime_ns
    record(Run(support.tiny(root, "base"), world))
    assert "nothing to do" in capsys.readouterr().out
    assert (root / "base" / "path" / "path.json").stat().st_mtime_ns == before


def test_recording_that_was_killed_while_it_moved_its_nodes(root, world, tmp_path):
    run = support.single(root, "half-moved", world, "record.nodes=3", f"path={tmp_path / 'path'}")
    run.stage_folder("record")
    stage = Recording(run)
    train(stage, stage.settings.loop, run.settings.health, run.folder / "record", world)
    chosen = choose_nodes(stage.candidates.distances, 3)
    (stage.candidates.folder / stage.candidates.names[chosen[0]]).rename(tmp_path / "path" / "node-0001")
    record(run)
    assert len(opened(root, world, tmp_path / "path").nodes) == 4


def test_no_path(root, world, tmp_path):
    with pytest.raises(UserError, match=r"path.json cannot be read .*disback record"):
        opened(root, world, tmp_path)


def test_path_of_another_teacher(root, world, copy):
    record_ = json.loads((copy / "path.json").read_text())
    record_["teacher"] = "0" * 64
    (copy / "path.json").write_text(json.dumps(record_))
    with pytest.raises(UserError, match="was recorded from another teacher"):
        opened(root, world, copy)


def test_path_of_another_generator_start(root, world, copy):
    with pytest.raises(UserError, match="another generator start .*timestep 749, this run 299"):
        opened(root, world, copy, conditioning_timestep=299)
    with pytest.raises(UserError, match="another generator start"):
        opened(root, world, copy, generator_start=root / "base" / "path" / "node-0001")


def test_missing_node(root, world, copy):
    shutil.rmtree(copy / "node-0002")
    with pytest.raises(UserError, match="node 2 is missing"):
        opened(root, world, copy)


def test_damaged_node(root, world, copy):
    file = next((copy / "node-0001").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 255
    file.write_bytes(raw)
    with pytest.raises(UserError, match="node 1 is damaged"):
        opened(root, world, copy)


def test_unchanged_weights_are_hashed_once(root, world, copy, tmp_path, monkeypatch):
    """A start hashes what is new to the run folder or has changed since, and a restart nothing; a changed node is found."""
    read = []
    monkeypatch.setattr(weight_hashes, "files_hash", lambda files: read.extend(files) or files_hash(files))
    shutil.copytree(root / "base" / "pipeline", tmp_path / "pipeline")
    for file in tmp_path.rglob("*.safetensors"):
        os.utime(file, (1e9, 1e9))
    flags = (f"run={tmp_path / 'run'}", f"pipeline={tmp_path / 'pipeline'}", f"path={copy}")
    (tmp_path / "run").mkdir()

    def start() -> list[Path]:
        read.clear()
        run = Run(support.tiny(root, "x", *flags), world)
        hashes = run.weights_hash(run.teacher_folder), run.weights_hash(run.start_folder)
        assert hashes == (weights_hash(run.teacher_folder), weights_hash(run.start_folder))
        open_path(
            copy, run.teacher_folder, hashes, run.settings.student_timesteps, world, run.settings.lora, run.digest
        )
        return read

    nodes = [copy / f"node-000{i}" / WEIGHTS_FILE for i in (1, 2, 3)]
    assert start() == [tmp_path / "pipeline" / "unet" / WEIGHTS_FILE, *nodes] and not start()
    os.utime(nodes[1], (1e9 + 1, 1e9 + 1))
    assert start() == nodes[1:2] and not start()
    raw = bytearray(nodes[2].read_bytes())
    raw[-7] ^= 255
    nodes[2].write_bytes(raw)  # the same size
    for _ in range(2):
        with pytest.raises(UserError, match="node 3 is damaged"):
            start()
        assert read == nodes[2:]
    (tmp_path / "run" / weight_hashes.FILE).write_text("{")  # of no use: everything is hashed
    os.utime(nodes[0])
    with pytest.raises(UserError, match="node 3 is damaged"):
        start()
    assert len(read) == 4
    read.clear()
    hashes = weight_hashes.WeightHashes(tmp_path / "run")
    assert hashes(nodes[:1]) == hashes(nodes[:1]) == file_hash(nodes[0])
    assert len(read) == 2  # so young that it may change once more within its file system's unit of time


def test_manifest_that_is_not_json(root, world, copy):
    (copy / "path.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        opened(root, world, copy)


def test_spacing_by_steps(root, world, tmp_path):
    flags = ("record.spacing=steps", "record.nodes=4", f"path={tmp_path / 'p'}")
    record(Run(support.tiny(root, "by-steps", *flags), world))
    nodes = json.loads((tmp_path / "p" / "path.json").read_text())["nodes"]
    assert [n["step"] for n in nodes] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("ablation", ["walk", "warm", "none"])
def test_what_each_role_starts_from(root, world, ablation):
    """walk: fake score from node N, target node N-1. warm: fake score from node N, target the teacher. none: all the
    teacher. The generator always starts as the teacher."""
    stage = Backtracking(Run(support.tiny(root, f"start-{ablation}", f"backtrack.path={ablation}"), world))
    stage.begin(0)
    path = root / "base" / "path"
    teacher, far = root / "base" / "pipeline" / "unet", path / "node-0003"
    expected = {
        "generator": teacher,
        "fake_score": teacher if ablation == "none" else far,
        "teacher": path / "node-0002" if ablation == "walk" else teacher,
    }
    for role, folder in expected.items():
        weights = load_network(folder).state_dict()
        live = stage.roles[role].module.state_dict()
        assert all(torch.equal(live[k], v) for k, v in weights.items()), role
    stage.close()


@pytest.mark.parametrize("config", ["zero0", "teacher", "sharded"])
def test_nodes_into_a_frozen_engine_in_place(root, world, tmp_path, config):
    name = support.sharded_zero3(tmp_path) if config == "sharded" else config
    teacher, node = root / "base" / "pipeline" / "unet", root / "base" / "path" / "node-0002"
    settings = deepspeed_config(name, 2, 1, 0.0, "fp32", world.size)
    role = Role("teacher", empty_network(teacher), settings, world, folder=teacher)
    before = prediction(role)
    torch.testing.assert_close(before, prediction(load_network(teacher).eval()), **ROUNDING)
    role.weights.write(role.weights.read(node))
    expected = prediction(load_network(node).eval())
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(prediction(role), expected, **ROUNDING)
    role.weights.write(role.weights.read(teacher))
    assert torch.equal(prediction(role), before)
    whole = role.state_dict()
    assert all(torch.equal(whole[k], v) for k, v in load_network(teacher).state_dict().items())


def test_a_distance_that_has_settled():
    rising = [1 - 0.9**n for n in range(1, 60)]
    stops = next(n for n in range(len(rising)) if has_settled(rising[:n], 0.05))
    assert 0.9 < rising[stops - 1] < 1  # near its end, and not before
    assert not has_settled([0.5] * 7, 0.05) and has_settled([0.5] * 8, 0.05) and not has_settled([0.5] * 100, 0.0)
    assert has_settled([0.9, 1.1] * 4, 0.05)  # a single measurement decides nothing


def test_recording_ends_where_the_distance_has_settled(root, world, tmp_path):
    """The last node is what it ended with; one that was killed before its nodes were moved does not train on."""
    folder, flags = tmp_path / "path", ("record.steps=40", "record.probe_every=1", "record.settle=1000")
    run = Run(support.tiny(root, "settled", f"path={folder}", *flags), world)
    stage = Recording(run)
    train(stage, run.settings.record.loop, run.settings.health, run.stage_folder("record"), run.world)
    assert stage.ended and not (folder / "path.json").exists()
    record(run)
    nodes = json.loads((folder / "path.json").read_text())["nodes"]
    lines = [json.loads(line) for line in (run.folder / "record" / "metrics.jsonl").read_text().splitlines()]
    assert nodes[-1]["step"] == lines[-1]["step"] == 8 and lines[-1]["grad_norm/fake_score"] > 0
    assert lines[-1]["distance"] == pytest.approx(nodes[-1]["distance_to_node_0"])
    whole = Run(support.tiny(root, "unsettled", f"path={tmp_path / 'whole'}", *flags[:2], "record.settle=0"), world)
    record(whole)
    assert json.loads((tmp_path / "whole" / "path.json").read_text())["nodes"][-1]["step"] == 40
