"""The pipeline of three jobs, and the other launchers: the weights equal those of two plain processes."""

import json
import re

import pytest
from conftest import REPOSITORY, SCRIPTS, SETTINGS, TWO_NODES
from support import tiny_clip


def submit_pipeline(site, *arguments: str, **env: str) -> dict[str, str]:
    """verb -> job."""
    printed = site.call("bash", str(SCRIPTS / "pipeline.sh"), *TWO_NODES, *arguments, **env)
    assert "squeue --jobs=" in printed and "disback status" in printed
    return dict(re.findall(r"^(\w+): job (\d+), log /", printed, re.M))


@pytest.fixture(scope="module")
def jobs(site, reference) -> dict[str, str]:
    """Jobs that are independent of each other, submitted at once."""
    jobs = submit_pipeline(site, "run=runs/line", "path=runs/line/path", *SETTINGS.split())
    flags = ["run=runs/deepspeed", f"path=runs/{reference}/path", *SETTINGS.split()]
    return jobs | {"deepspeed": site.sbatch("backtrack.sh", *flags, LAUNCHER="deepspeed")}


def test_record_backtrack_evaluate(site, reference, jobs):
    for verb in ("record", "backtrack", "evaluate"):
        log = site.ends(jobs[verb], "COMPLETED")
        assert log.rstrip().endswith(f"disback: job {jobs[verb]} ({verb}): done")
    run = site.folder / "runs" / "line"
    assert len(json.loads((run / "path" / "path.json").read_text())["nodes"]) == 4
    assert "world_size: 2" in (run / "config.yaml").read_text()
    scores = json.loads((run / "eval" / "generator" / "metrics.json").read_text())
    assert scores["images"] == 64 and scores["fid"] > 0
    assert site.weights("line") == site.weights(reference)


# The demo's own configuration, cut short: its ZeRO stages, networks, data and scores.
SHORT = f"""
extends: {REPOSITORY}/configs/emoji.yaml
pretrain: {{steps: 2, loop: {{sample_every: 0}}, autoencoder: {{steps: 2, loop: {{sample_every: 0}}}}}}
record: {{steps: 3, nodes: 2, loop: {{sample_every: 0}}}}
backtrack: {{steps: 4, loop: {{log_every: 1, sample_every: 0, save_every: 4, keep_weights_every: 0}}}}
evaluate: {{images: 64, batch: 32, chunk: 16}}
"""


def test_the_demo(site):
    """From shards to scores on two nodes, as `make demo` does on one; the same training as without Slurm. The colour images
    are scored as SDXL's are, by a network's features at two scales and by CLIP: with the smallest CLIP model for all."""
    (site.folder / "emoji.yaml").write_text(SHORT)
    site.verb("shards", "--emoji")
    site.ends(site.sbatch("pretrain.sh", CONFIG="emoji.yaml"), "COMPLETED")
    jobs = submit_pipeline(site, *tiny_clip(site.folder / "clip"), "evaluate.patch=16", CONFIG="emoji.yaml")
    plain = ["emoji.yaml", "run=runs/plain", "path=runs/plain/path"]
    site.without_slurm(["record", *plain], ["backtrack", *plain])
    for verb in ("record", "backtrack", "evaluate"):
        site.ends(jobs[verb], "COMPLETED")
    assert site.weights("emoji") == site.weights("plain")
    scores = json.loads((site.folder / "runs/emoji/eval/generator/metrics.json").read_text())
    assert scores["protocol"] == "heldout" and "(sha256 " in scores["features"] and scores["images"] == 64
    assert scores["fid"] > 0 and scores["patch_fid"] > 0 and scores["kid"] > 0 and -1 <= scores["clip_score"] <= 1
    assert "CC BY-SA" in scores["credit"] and len(list((site.folder / "runs/emoji/eval/nodes").iterdir())) == 3


def test_the_deepspeed_launcher(site, reference, jobs):
    """One launcher per node, `deepspeed.launcher.launch --node_rank`, as `deepspeed --hostfile` starts them over ssh."""
    assert "with deepspeed" in site.ends(jobs["deepspeed"], "COMPLETED")
    assert site.weights("deepspeed") == site.weights(reference)


def test_a_recording_that_fails_cancels_the_rest(site):
    jobs = submit_pipeline(site, "run=runs/broken", "path=runs/broken/path", "record.stepz=3")
    site.ends(jobs["record"], "FAILED")
    reason = "unknown key 'record.stepz': did you mean 'record.steps'?"
    assert reason in site.last_line(jobs["record"])
    for verb in ("backtrack", "evaluate"):
        about = site.cluster.wait(jobs[verb])
        assert about["JobState"] == "CANCELLED" and about["Reason"] == "DependencyNeverSatisfied"
        assert site.log(jobs[verb]).count("\n") == 1
        assert f"job {jobs['record']} (record) failed" in site.log(jobs[verb]) and reason in site.log(jobs[verb])
