"""Evaluations end to end with the smallest CLIP model as the network: the numbers against the same things done by hand, jobs
that are killed, and what is refused before an image is made."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from cleanfid.fid import frechet_distance as clean_frechet
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.io import read_image

from models.image_metrics import kernel_distance, precision_recall
from models.scorers.clip import ClipImages, ClipScore
from models.scorers.preprocess import Prepare
from trainer.distributed.world import World
from trainer.evaluation import generate
from trainer.evaluation.job import Evaluation
from trainer.evaluation.protocols import PROTOCOLS
from trainer.evaluation.sources import find_source
from trainer.training.run import Run

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
FEW = ["evaluate.what=start", "evaluate.images=40", "evaluate.chunk=8", "evaluate.batch=5", "evaluate.node_images=0"]
SCORES = "fid patch_fid kid precision recall clip_score".split()


@pytest.fixture(scope="module")
def clip(root) -> list[str]:
    return support.tiny_clip(root / "clip")


def evaluate(root, name: str, *overrides: str):
    return support.call("evaluate", "--config", str(support.TINY), *support.places(root, name), *overrides)


def scores(root, name: str, what: str = "start", folder: str = "eval") -> dict:
    return json.loads((root / name / folder / what / "metrics.json").read_text())


def refused(done, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds the words."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("disback:")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def scored(root, clip) -> dict:
    done = evaluate(root, "scored", *clip, *FEW, "evaluate.keep=folder")
    assert done.returncode == 0, done.stderr
    return scores(root, "scored")


def test_scores_are_those_of_the_same_images_by_hand(root, clip, scored):
    """Generated and real images through open_clip, clean-fid's distance, and the plain functions of models.image_metrics."""
    run = support.single(root, "by-hand", ALONE, *clip)
    heldout = run.dataset("heldout", ("image", "caption"))
    captions = [heldout.read_text(i)["caption"] for i in range(40)]
    made = find_source(run, "start").open(run).images(captions, 0, list(range(40)))
    real = [((heldout.read(i)["image"] + 1) * 127.5).round().to(torch.uint8) for i in range(len(heldout))]
    model = f"local-dir:{root / 'clip'}"
    network, score = ClipImages(model, "", CPU), ClipScore(model, "", CPU)
    fake, true = network(list(made)), network(real)

    def distance(a, b):
        a, b = a.double().numpy(), b.double().numpy()
        return clean_frechet(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))

    patch = Prepare("patch", 6)
    assert scored["fid"] == pytest.approx(distance(fake, true), rel=1e-4)
    assert scored["patch_fid"] == pytest.approx(
        distance(network([patch(i) for i in made]), network([patch(i) for i in real])), rel=1e-4
    )
    assert scored["kid"] == pytest.approx(kernel_distance(fake, true), rel=1e-4)
    assert (scored["precision"], scored["recall"]) == precision_recall(fake, true)
    assert scored["clip_score"] == pytest.approx(float(score(list(made), captions).mean()), abs=1e-5)
    assert scored["clip_score_x100"] == 100 * scored["clip_score"]
    assert scored["protocol"] == "heldout" and len(scored["protocol_hash"]) == 12 and scored["images"] == 40
    assert scored["warnings"] == [] and "(sha256 " in scored["features"]
    kept = sorted((root / "scored" / "eval" / "start-images").glob("*.png"))
    assert len(kept) == 40 and torch.equal(read_image(str(kept[7])), made[7])
    assert kept[7].with_suffix(".txt").read_text() == captions[7] + "\n"


def test_a_killed_job_goes_on(root, clip, scored, monkeypatch):
    """It keeps whole chunks, makes a chunk again whose file is cut short, and ends with the same numbers."""
    write, written = generate.Rows.write, []

    def die_after_three(self, number, blocks):
        if len(written) == 3 and self.total == 40:
            raise KeyboardInterrupt
        write(self, number, blocks)
        if self.total == 40:
            written.append(number)

    monkeypatch.setattr(generate.Rows, "write", die_after_three)
    assert evaluate(root, "killed", *clip, *FEW).returncode == 130
    rows = root / "killed" / "eval" / "start.rows"
    assert not (rows.parent / "start").exists() and len(list(rows.glob("rows-*.safetensors"))) == 3
    broken = rows / "rows-000001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-50])
    monkeypatch.setattr(generate.Rows, "write", lambda self, n, b: (written.append(n), write(self, n, b))[1])
    written.clear()
    done = evaluate(root, "killed", *clip, *FEW)
    assert done.returncode == 0 and written == [1, 3, 4] and "2 of 5 chunks are there already" in done.stderr
    found = scores(root, "killed")
    assert [found[key] for key in SCORES] == [scored[key] for key in SCORES]
    assert found["protocol_hash"] == scored["protocol_hash"] and not rows.exists()


def test_a_job_that_was_killed_while_it_replaced_results(root, clip, scored):
    """The results stay: a new folder that was not finished is removed, an old one that was moved away comes back."""
    folder = shutil.copytree(root / "scored" / "eval", root / "torn" / "eval")
    shutil.copytree(folder / "start", folder / "start.old")
    shutil.rmtree(folder / "start")
    (folder / "start.tmp").mkdir()
    (folder / "start.tmp" / "metrics.json").write_text('{"fid": 1')
    done = evaluate(root, "torn", *clip, *FEW)
    assert done.returncode == 0 and "scored already" in done.stderr, done.stderr
    assert scores(root, "torn") == scored
    assert not any(path.name.endswith((".tmp", ".old")) for path in folder.iterdir())
    (folder / "start" / "metrics.json").write_text('{"fid": 1')
    refused(evaluate(root, "torn", *clip, *FEW), "start/metrics.json is damaged")


def test_the_same_weights_are_scored_once(root, clip, scored, monkeypatch):
    """Under their own name, and under another: the last checkpoint is often the generator."""
    start = find_source(Run(support.tiny(root, "scored"), ALONE), "start").weights
    copy = shutil.copytree(start, root / "copied-weights")
    monkeypatch.setattr(generate.Rows, "write", None)  # no image may be made
    flags = [*clip, *FEW, f"evaluate.what=[start, {copy}]"]
    done = evaluate(root, "scored", *flags)
    assert done.returncode == 0, done.stderr
    found = scores(root, "scored", "copied-weights")
    assert found["fid"] == scored["fid"] and found["checkpoint"] == str(copy)
    assert (root / "scored" / "eval" / "copied-weights" / "grid.png").exists()


def test_other_parts_of_a_pipeline_are_other_images(root, clip, scored):
    """The same denoiser with another autoencoder; and two folders of one name."""
    a = shutil.copytree(root / "base" / "pipeline", root / "a" / "same")
    b = shutil.copytree(a, root / "b" / "same")
    for file in (b / "vae").glob("*.safetensors"):
        weights = load_file(file)
        save_file({key: value * 1.1 for key, value in weights.items()}, file)
    few = [*clip, *FEW[1:], "sample.steps=1", "evaluate.metrics=[fid]"]
    assert evaluate(root, "parts", *few, f"evaluate.what={a}").returncode == 0
    refused(evaluate(root, "parts", *few, f"evaluate.what={b}"), "eval/same has the results of", "rename")
    other = b.rename(b.with_name("other"))
    assert evaluate(root, "parts", *few, f"evaluate.what={other}").returncode == 0
    assert scores(root, "parts", "same")["fid"] != scores(root, "parts", "other")["fid"]
    foreign = shutil.copytree(a, root / "elsewhere" / "generator")
    assert find_source(support.single(root, "parts", ALONE), str(foreign)).name == "elsewhere-generator"


def test_more_metrics_join_those_that_are_there(root, clip, scored):
    first, later = ([*clip, *FEW, f"evaluate.metrics=[{metric}]"] for metric in ("fid", "kid"))
    assert evaluate(root, "joined", *first).returncode == 0 and scores(root, "joined")["kid"] is None
    assert evaluate(root, "joined", *later).returncode == 0
    found = scores(root, "joined")
    assert found["fid"] == pytest.approx(scored["fid"]) and found["kid"] == pytest.approx(scored["kid"])


def test_kept_images_are_of_one_evaluation(root, clip):
    few = [*clip, *FEW, "evaluate.images=10", "evaluate.metrics=[clip_score]"]
    assert evaluate(root, "kept", *few, "evaluate.keep=folder").returncode == 0
    assert evaluate(root, "kept", *few, "evaluate.keep=shards", "evaluate.seed=1").returncode == 0
    names = sorted(file.name for file in (root / "kept" / "eval" / "start-images").iterdir())
    assert [name for name in names if name.endswith(".tar")] == ["images-000000.tar", "images-000001.tar"]
    assert not [name for name in names if name.endswith(".png")]
    assert scores(root, "kept")["fid"] is None and scores(root, "kept")["reference"] is None


def test_published_numbers_stand_beside_faithful_runs_only(root):
    """Not beside a smaller run, nor one with other weights or another size of images."""
    protocol = PROTOCOLS["dmd2-coco10k"]
    run = support.single(root, "x", ALONE, "data.resolution=1024")
    job = Evaluation(run, protocol, (), 10_000, [], None, "", {})
    assert job.faithful
    assert not dataclasses.replace(job, images=3000).faithful
    assert not dataclasses.replace(job, own_weights={"inception": "sha256 1"}).faithful
    assert not dataclasses.replace(job, run=support.single(root, "x", ALONE)).faithful


def test_two_ranks(root, clip, scored):
    """Two processes, the second of which continues a job that one began: the numbers of one process. Results that cannot
    be written end both."""
    support.ranks("evaluation", root)
    for name in ("ranks", "ranks-continued"):
        found = scores(root, name)
        assert [found[key] for key in SCORES] == pytest.approx([scored[key] for key in SCORES], rel=1e-6, abs=1e-9)
        assert found["protocol_hash"] == scored["protocol_hash"]


def test_other_protocols_have_a_folder_of_their_own(root, clip, scored):
    """A folder, and so a table, holds one protocol; the teacher's images are a reference, too."""
    other = evaluate(root, "scored", *clip, *FEW, "evaluate.protocol=fid-teacher")
    refused(other, "was scored under heldout", "evaluate.folder=eval-fid-teacher")
    flags = [
        *clip,
        *FEW,
        "evaluate.protocol=fid-teacher",
        "evaluate.folder=eval-teacher",
        "evaluate.what=[start, teacher]",
    ]
    done = evaluate(root, "scored", *flags)
    assert done.returncode == 0, done.stderr
    start, teacher = (scores(root, "scored", what, "eval-teacher") for what in ("start", "teacher"))
    assert start["reference"] == "the teacher (40 images)" and start["protocol"] == "fid-teacher"
    assert 0 < teacher["fid"] < start["fid"]  # other noise: the teacher is not at 0
    done = evaluate(root, "scored", *flags, "evaluate.seed=40")
    assert done.returncode == 0 and 0 < scores(root, "scored", "teacher", "eval-teacher")["fid"] != teacher["fid"]
    assert start["protocol_hash"] != scored["protocol_hash"]


def statistics(file: Path, width: int) -> Path:
    np.savez(file, mu=np.zeros(width), sigma=np.eye(width))
    return file


def test_what_is_refused_before_an_image_is_made(root, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(generate.Rows, "write", None)
    for key in ("TORCH_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(key, str(tmp_path))
    photo = tmp_path / "real" / "photo.png"
    photo.parent.mkdir()
    Image.new("RGB", (20, 10)).save(photo)
    (tmp_path / "no-captions.jsonl").write_text('{"caption": null}\n')
    (tmp_path / "one.txt").write_text("a caption\n")
    (tmp_path / "inception.safetensors").write_bytes(b"not weights")
    wrong = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    wrong.write_bytes(b"another file")
    npz, legacy = statistics(tmp_path / "a.npz", 8), statistics(tmp_path / "coco_legacy_tensorflow_train.npz", 8)
    cases = [
        (["evaluate.features=inception", "evaluate.metrics=[fid]"], "weights of inception: not found in", "get pt_inception"),
        (["evaluate.features=inception", "evaluate.metrics=[fid]", f"evaluate.weights={tmp_path}"], "has sha256", "damaged"),
        ([*clip, "evaluate.clip_model=local-dir:/nowhere"], "evaluate.clip_model: /nowhere is not a folder"),
        ([*clip, f"evaluate.networks={{inception: {tmp_path}/none}}", "evaluate.features=inception"], "none does not exist"),
        (
            [f"evaluate.networks={{inception: {tmp_path}/inception.safetensors}}", "evaluate.features=inception", "evaluate.metrics=[fid]"],
            "inception.safetensors: cannot be read",
        ),
        ([*clip, "evaluate.images=6"], "fid from 6 images of evaluate.images, fewer than its 8 features", "few_images"),
        ([*clip, f"evaluate.reference={photo.parent}"], "1 images of the reference"),
        ([*clip, f"evaluate.reference={npz}"], "statistics for fid only: leave patch_fid, kid"),
        ([*clip, f"evaluate.reference={legacy}", "evaluate.metrics=[fid]"], "another resize"),
        ([*clip, f"evaluate.reference={statistics(tmp_path / 'b.npz', 9)}", "evaluate.metrics=[fid]"], "has 9 features", "8"),
        ([*clip, f"evaluate.prompts={tmp_path}/no-captions.jsonl"], "no-captions.jsonl", "line 1"),
        ([*clip, f"evaluate.prompts={tmp_path}/absent.txt"], "absent.txt"),
        ([*clip, "evaluate.keep=geneval"], "no GenEval metadata"),
        ([*clip, "evaluate.keep=dpg"], "needs all 450 prompts x 1 images"),
        ([*clip, "evaluate.keep=dpg", "evaluate.images_per_prompt=3"], "DPG-Bench reads 1 or 4"),
        ([*clip, "evaluate.protocol=dmd2-coco10k"], "evaluate.features: protocol dmd2-coco10k fixes it"),
        ([*clip, "evaluate.what=nothing"], "'nothing' is not generator"),
        ([*clip, "evaluate.folder=../elsewhere"], "not the name of a folder"),
        (["evaluate.metrics=[fid, patch_fid]"], "patch_fid needs a network, not the classifier"),
    ]  # fmt: skip
    for flags, *words in cases:
        refused(evaluate(root, "refused", *FEW, *flags), *words)
    text = evaluate(root, "refused", *FEW[1:], "evaluate.features=inception", "evaluate.list_weights=true").stdout
    assert "protocol heldout: fid, patch_fid" in text and "wanted: pt_inception" in text and "ViT-g-14" in text


def test_a_number_from_too_few_images_is_marked(root, clip):
    flags = [*clip, *FEW, "evaluate.images=6", "evaluate.metrics=[fid]", "evaluate.few_images=true"]
    assert evaluate(root, "few", *flags).returncode == 0
    assert scores(root, "few")["warnings"] == [
        "fid from 6 images of evaluate.images, fewer than its 8 features + 1, comes out too high"
    ]


def test_statistics_as_reference(root, clip, scored, tmp_path):
    """The FID against an .npz is that against the images that it was made of."""
    rows = next((root / "scored" / "eval" / "references").iterdir())
    features = torch.cat([generate.Rows(rows, 450, 8).chunk_block(i, "features") for i in range(57)]).double().numpy()
    file = tmp_path / "stats.npz"
    np.savez(file, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    flags = [*clip, *FEW, f"evaluate.reference={file}", "evaluate.metrics=[fid]"]
    assert evaluate(root, "npz", *flags).returncode == 0
    assert scores(root, "npz")["fid"] == pytest.approx(scored["fid"], rel=1e-6)
    assert scores(root, "npz")["reference"].endswith("stats.npz (statistics)")


def test_watch_scores_averaged_and_raw_weights_and_draws_the_path(root, clip):
    """Each checkpoint once, under its own name; the nodes' rows for the report."""
    flags = ["backtrack.steps=4", "backtrack.loop.save_every=2", "backtrack.loop.keep_weights_every=2"]
    done = support.call(
        "backtrack", "--config", str(support.TINY), *support.places(root, "watched"), *flags, "backtrack.save_raw=true"
    )
    assert done.returncode == 0, done.stderr
    few = [*FEW[1:-1], "evaluate.node_images=2", "evaluate.metrics=[fid]"]
    done = evaluate(root, "watched", *clip, *few, "--watch")
    assert done.returncode == 0, done.stderr
    names = [f"step-0000000{step}{kind}" for step in (2, 4) for kind in ("", "-raw")]
    found = {name: scores(root, "watched", name) for name in [*names, "generator"]}
    assert [found[name]["weights"] for name in names] == ["ema", "raw", "ema", "raw"]
    assert found["generator"]["fid"] == found[names[2]]["fid"] != found[names[3]]["fid"]
    assert found["generator"]["exported_from"] == names[2]
    nodes = sorted((root / "watched" / "eval" / "nodes").iterdir())
    assert [node.name for node in nodes] == [f"node-000{i}.png" for i in range(4)]
    assert read_image(str(nodes[0])).shape == (3, 8, 16)
    assert "heldout" in (root / "watched" / "generator" / "README.md").read_text()
    again = evaluate(root, "watched", *clip, *few, "--watch")
    assert again.returncode == 0 and "scored already" in again.stderr and "drew node" not in again.stderr
