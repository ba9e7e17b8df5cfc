"""What a planned step sends, encodes and takes."""

import io
import json
import tarfile

import pytest
import support

from models.architecture import find_architecture
from trainer.config.load import load_settings
from trainer.plan import table
from trainer.planner.flops import PEAK_TFLOPS, card_peak
from trainer.planner.images import encodes_images
from trainer.planner.search import changed
from trainer.planner.stages import BacktrackPlan
from trainer.planner.summary import Cluster, make_plan

CONFIGS = support.REPOSITORY / "configs"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def test_traffic_is_what_two_ranks_send(root):
    """Every collective of an update at each ZeRO stage and of whole cycles of backtracking, counted as it is executed."""
    support.ranks("traffic", root)
    counts = json.loads((root / "traffic" / "counts.json").read_text())
    assert len(counts) == 8
    for label, (executed, planned) in counts.items():
        assert executed == pytest.approx(planned, rel=0.02), (label, executed / planned)


def test_traffic_of_sdxl():
    """64 GPUs at ZeRO-2: 3 units of 5.1 GB per update of either network; their seconds stand beside the compute."""
    plan = make_plan(load_settings(CONFIGS / "sdxl.yaml", []), Cluster(nodes=8, bandwidth_gb=20))
    stage = plan["stages"]["backtrack"]
    assert stage["network_gb_per_step"] == pytest.approx(18.2, abs=0.05)
    assert stage["network_seconds"] == stage["network_gb_per_step"] / 20
    assert f"{stage['network_seconds']:.2f} s of network at 20 GB/s" in table(plan)


def test_real_images_are_counted(tmp_path):
    """4.88 TFLOP and 2.7 GB for each of SDXL's images that the autoencoder encodes; nothing if the shards hold latents."""
    plain, encoded = (
        make_plan(load_settings(CONFIGS / "sdxl_gan.yaml", flags), Cluster(nodes=8))
        for flags in (["data.cached=off"], ["data.cached=require"])
    )
    mine, theirs = plain["stages"]["backtrack"], encoded["stages"]["backtrack"]
    assert mine["image_tflop_per_step"] == pytest.approx(2 * 4.88, rel=0.01) and not theirs["image_tflop_per_step"]
    assert mine["tflop_per_step"] == mine["image_tflop_per_step"] + theirs["tflop_per_step"]
    speed = PEAK_TFLOPS["A100"] * 0.35
    extra = (mine["step_seconds"] - theirs["step_seconds"]) * speed  # TF32 has half of the peak
    assert extra == pytest.approx(2 * mine["image_tflop_per_step"])
    assert mine["activations"]["real images, encoded"] == pytest.approx(2.7, rel=0.01)
    assert "fake-score turn: real images" in mine["moments"] and "fake-score turn: real images" not in theirs["moments"]
    assert "disback shards --encode" in table(plain) and "disback shards --encode" not in table(encoded)


def test_shards_tell_whether_images_are_encoded(shards):
    train = f"data.train={shards}/shards/train-*.tar"
    settings = support.tiny(shards, "plan", train, "gan.enabled=true")
    assert encodes_images(settings) and not encodes_images(changed(settings, {"gan.enabled": False}))
    member = io.BytesIO(json.dumps({"cache": {"resolution": 8}}).encode())
    with tarfile.open(shards / "encoded.tar", "w") as tar:
        for name, content in (("a.json", member), ("a.safetensors", io.BytesIO(b"x")), ("a.txt", io.BytesIO(b"x"))):
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            tar.addfile(info, content)
    assert not encodes_images(changed(settings, {"data.train": str(shards / "encoded.tar")}))


def test_zero3_is_not_the_first_advice_at_small_micro_batches():
    """Where ZeRO-3's Python takes longer than the GPU's work, checkpointing comes first, and the plan says why."""
    flags = [f"backtrack.{r}_ds_config=zero2" for r in ("generator", "fake_score")]
    flags += ["network.checkpointing=false", "record.batch=8"]
    small = load_settings(CONFIGS / "sdxl.yaml", [*flags, "backtrack.batch=16"])
    plan = make_plan(small, Cluster(gpu="H100", gpu_memory_gb=38))
    stage = plan["stages"]["backtrack"]
    sharded = changed(small, dict.fromkeys([f"backtrack.{r}_ds_config" for r in ("generator", "fake_score")], "zero3"))
    assert BacktrackPlan(sharded, find_architecture(SDXL), 8).peak[1] < 38e9  # it would fit, too
    assert not stage["fits"] and stage["change"] == ["network.checkpointing=true"]
    assert "ZeRO-3 is slow at 2 samples per micro-batch" in stage["zero3"] and stage["zero3"] in table(plan)
    large = load_settings(CONFIGS / "sdxl.yaml", [*flags, "backtrack.batch=64"])
    stage = make_plan(large, Cluster(gpu="A100", gpu_memory_gb=60))["stages"]["backtrack"]
    assert not stage["fits"] and stage["zero3"] is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Tesla V100-PCIE-32GB", 112.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_every_card_has_its_own_peak(name, peak):
    assert card_peak(name) == peak
