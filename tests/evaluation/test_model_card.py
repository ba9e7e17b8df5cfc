"""The model card of an exported generator, and its upload to a hub: a real HTTP server on this machine."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import support
import torch
import yaml
from hub import Hub, hashes
from huggingface_hub import ModelCard, get_token
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from torchvision.io import read_image, write_png

from models.errors import ModelError
from models.files import ADAPTER_CONFIG, LORA_FILE
from models.lora import adapter_metadata, adapter_parameters, add_adapter
from models.pipeline import load_network
from models.settings import LoraSettings
from trainer.config.load import load_settings
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.evaluation.model_card import data_names, escape, without_folders, write_card
from trainer.export import export, upload
from trainer.training.run import Run

CPU = World(0, 1, 0, torch.device("cpu"))
PROMPT = "a `seven` | <b>three</b> *stars*"
SCORES = {"fid": 12.3456, "kid": None, "precision": 0.5, "images": 64, "seed": 3, "features": "Inception (/w/net.pt)"}


def overrides(root: Path, folder: Path, pipeline: Path | str, *flags: str) -> list[str]:
    own = [
        f"run={folder}",
        f"pipeline={pipeline}",
        f"path={folder / 'path'}",
        "precision=fp32",
        "conditioning_timestep=749",
    ]
    return [*support.places(root, "card"), *own, f"sample.prompts={json.dumps([PROMPT])}", *flags]


def make_run(root: Path, folder: Path, pipeline: Path | str, *flags: str, steps: tuple[int, ...] = (4,)) -> Run:
    """A run with checkpoints, whose generators are the untrained teacher, and sample grids; without training."""
    run = Run(load_settings(support.TINY, overrides(root, folder, pipeline, *flags)), CPU)
    stage = run.stage_folder("backtrack")
    (stage / "samples").mkdir()
    for step in steps:
        shutil.copytree(run.teacher_folder, stage / "checkpoints" / f"step-{step:08d}" / "weights")
        picture = torch.full((3, 4, 4), step, dtype=torch.uint8)
        write_png(picture, str(stage / "samples" / f"step-{step:08d}.png"))
    (stage / "LATEST").write_text(f"step-{steps[-1]:08d}\n")
    return run


def exporting(run: Run, **changes: object) -> Run:
    settings = run.settings.export.model_copy(update=changes)
    return Run(run.settings.model_copy(update={"export": settings}), CPU)


def evaluated(run: Run, what: str, results: str = "eval", **changes: object) -> Path:
    """Results of an evaluation, as `disback evaluate` writes them."""
    folder = run.folder / results / what
    folder.mkdir(parents=True, exist_ok=True)
    heldout = f"{run.settings.data.heldout} (64 images)"
    (folder / "metrics.json").write_text(json.dumps(SCORES | {"reference": heldout} | changes))
    write_png(torch.full((3, 4, 4), 200, dtype=torch.uint8), str(folder / "grid.png"))
    return folder


def run_code(card: str, where: Path) -> np.ndarray:
    """The image that the card's own code makes, run beside the pipeline folder, on the CPU and with fixed noise."""
    (code,) = re.findall(r"^(`{3,})python\n(.*?)\n\1$", card, flags=re.DOTALL | re.MULTILINE)
    code = code[1].replace('.to("cuda")', '.to("cpu")').replace(" = pipe(prompt, ", " = pipe(prompt, **options, ")
    scope = {"options": {"generator": torch.Generator().manual_seed(5), "output_type": "np"}}
    before = Path.cwd()
    os.chdir(where)
    try:
        exec(code, scope)
    finally:
        os.chdir(before)
    assert scope["prompt"] == PROMPT and "`" * 4 not in card
    return scope["image"]


def test_a_card_of_a_teacher_from_the_hub(shards, pipeline, tmp_path, monkeypatch, capsys):
    """Everything but scores: front matter, licence, code that runs, the sample grid, the recipe, and no local path."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    teacher = shutil.copytree(pipeline, cache / "snapshots" / ("a" * 40))
    about = "---\nlicense: other\nlicense_name: tiny-1.0\nlicense_link: LICENSE.md\ntags: [x]\n---\n# Tiny\n"
    (teacher / "README.md").write_text(about)
    (teacher / "LICENSE.md").write_text("Do as you like.\n")
    run = make_run(shards, tmp_path / "run", "someone/tiny", "precision=bf16", steps=(4, 8))
    (run.folder / "path").mkdir()
    (run.folder / "path" / "path.json").write_text('{"nodes": [{}, {}, {}, {}]}')
    export(exporting(run, checkpoint="step-00000004"))
    folder = run.folder / "generator"
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/tiny", "library_name": "diffusers", "license": "other", "license_name": "tiny-1.0",
        "license_link": "LICENSE.md", "pipeline_tag": "text-to-image", "tags": ["one-step", "distillation", "disback"],
    }  # fmt: skip
    assert yaml.safe_load(text.split("---")[1]) == card.data.to_dict()
    assert (folder / "LICENSE.md").read_text() == "Do as you like.\n"
    assert read_image(str(folder / "grid.png"))[0, 0, 0] == 4 and "at step 4, not selected" in text
    assert "| path | walk, 3 nodes before the teacher, fixed: 2 generator updates per node |" in text
    assert "| steps | 4 of 8 fake-score updates, a generator update every 1 |" in text
    assert "| data | train-\\*.tar |" in text and "| conditioning timesteps | 749 |" in text and "## Scores" not in text
    for private in (str(tmp_path), str(shards), str(pipeline), str(Path.home())):
        assert private not in text
    image = run_code(text, run.folder)
    expected = support.plain(folder, torch_dtype=torch.float16)(
        PROMPT, num_inference_steps=1, guidance_scale=0.0, generator=torch.Generator().manual_seed(5), output_type="np"
    ).images[0]
    assert np.array_equal(image, expected) and image.std() > 0
    # The prompt is shown as it is, and makes no markup.
    assert "a `seven` | &lt;b&gt;three&lt;/b&gt; *stars*" in MarkdownIt("commonmark").render(card.text)
    assert not list(run.folder.glob("generator.*"))


def test_scores_of_the_exported_weights_only(shards, pipeline, tmp_path):
    """Scores need their protocol and must be of the exported checkpoint; an evaluation's refresh shows them."""
    run = make_run(shards, tmp_path / "run", pipeline, steps=(4, 8))
    evaluated(run, "step-00000004", fid=99.0)  # another checkpoint
    export(run)
    folder = run.folder / "generator"

    def card() -> str:
        write_card(run.folder, folder)
        return (folder / "README.md").read_text()

    assert "FID" not in card() and read_image(str(folder / "grid.png"))[0, 0, 0] == 8
    found = evaluated(run, "generator", protocol="heldout", protocol_hash="0123abcd", credit="Anna | Co")
    few = {"features": "CLIP", "protocol": "dmd2-coco10k", "warnings": ["few images", "weights in /w/x.pt"]}
    evaluated(run, "generator", "eval-coco", fid=7.0, **few)
    evaluated(run, "generator", "eval-old", fid=8.25, features=None, reference=None)  # says nothing of a protocol
    evaluated(run, "step-00000008", precision=0.75, fid=5.5)  # "generator" of the same folder comes first
    text = card()
    assert "| FID | 12.35 | lower |\n| precision | 0.5 | higher |" in text and "KID" not in text
    assert (
        "- protocol: heldout (hash 0123abcd)\n- images: 64 generated, seeds from 3\n- features: Inception (net.pt)"
        in text
    )
    assert "- reference: heldout-\\*.tar (64 images)\n- credit: Anna \\| Co" in text and str(shards) not in text
    assert "| FID | 7 | lower |" in text and "- protocol: dmd2-coco10k\n" in text
    assert "- warnings: few images; weights in x.pt" in text and text.count("- warnings") == 1
    assert "8.25" not in text and "0.75" not in text
    assert read_image(str(folder / "grid.png"))[0, 0, 0] == 200
    export(run)  # the same command again: the same card
    assert (folder / "README.md").read_text() == text
    # Elsewhere it is not "generator", but still the checkpoint.
    export(exporting(run, out=str(tmp_path / "out")))
    elsewhere = (tmp_path / "out" / "README.md").read_text()
    assert "| FID | 5.5 | lower |" in elsewhere and "12.35" not in elsewhere and 'from_pretrained("out")' in elsewhere
    # Evaluations of another export, and from before these weights.
    evaluated(run, "generator", exported_from="step-00000004", fid=66.0)
    assert "| 66 |" not in card() and "| FID | 5.5 |" in card()
    for file in run.folder.glob("eval*/*/metrics.json"):
        os.utime(file, (1, 1))
    (found / "metrics.json").write_text("{")  # damaged
    assert "## Scores" not in card()
    (run.folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        write_card(run.folder, folder)
    with pytest.raises(ModelError, match=r"disback\.json: cannot be read"):
        write_card(run.folder, folder / "vae")


def test_a_lora_and_several_steps(shards, pipeline, tmp_path):
    """The card's code loads an unmerged LoRA, and makes the image of the merged one; without a licence it says so."""
    run = make_run(
        shards, tmp_path / "run", pipeline, "backtrack.student_timesteps=[999, 399]", "lora.rank=4", "lora.alpha=2"
    )
    weights = run.folder / "backtrack" / "checkpoints" / "step-00000004" / "weights"
    shutil.rmtree(weights)
    weights.mkdir()
    net = load_network(run.teacher_folder)
    add_adapter(net, LoraSettings(rank=4, alpha=2), "card")
    rng = torch.Generator().manual_seed(0)
    state = {k: p.detach() + 0.1 * torch.randn(p.shape, generator=rng) for k, p in adapter_parameters(net).items()}
    metadata, config = adapter_metadata(net)
    save_file(state, weights / LORA_FILE, metadata)
    (weights / ADAPTER_CONFIG).write_text(config)
    export(run)
    export(exporting(run, merge=False, out=str(run.folder / "beside")))
    merged, beside = ((run.folder / name / "README.md").read_text() for name in ("generator", "beside"))
    assert "timesteps=[999, 399]" in merged and "2 calls of its denoiser" in merged and "load_lora" not in merged
    data = ModelCard(beside).data
    assert data.tags == ["few-step", "distillation", "disback", "lora"] and data.license == "other"
    assert data.base_model is None and "**To be filled in by the owner**" in beside
    assert "| LoRA | rank 4, alpha 2 |" in beside
    one, other = run_code(merged, run.folder), run_code(beside, run.folder)
    start = re.sub(r"pipe\.load_lora_weights.*\n", "", beside)
    assert np.abs(one - other).max() < 1e-4 < 0.02 < np.abs(one - run_code(start, run.folder)).max()
    export(exporting(run, license="openrail++"))
    named = ModelCard.load(run.folder / "generator" / "README.md")
    assert named.data.license == "openrail++" and "To be filled in" not in named.text


def test_texts():
    assert (
        without_folders("/a/b c") == "b c" and without_folders("['/d 1/x-*.tar', '~/y/'] (2)") == "['x-*.tar', 'y'] (2)"
    )
    for kept in ("https://a.b/c/d", "steps / image", "images/s", "someone/tiny", "1/2"):
        assert without_folders(kept) == kept
    assert data_names(["/a/x-{0..1}.tar", "b/c/"]) == "x-{0..1}.tar, c" and data_names("") == ""
    assert escape("a\n_b_  [c](d) $e$") == "a \\_b\\_ \\[c\\](d) \\$e\\$"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A running hub of our own, without proxies, and a token for it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    huggingface_hub.close_session()  # it has read the proxies
    with Hub.running() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        yield server
    huggingface_hub.close_session()


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_upload(shards, pipeline, tmp_path, hub, monkeypatch, capsys, mode):
    """Every file arrives with its bytes: inside the commit, by the command that a user types; or the weights as LFS objects,
    by the protocol before xet."""
    hub.mode = mode
    run = make_run(shards, tmp_path / "run", pipeline)
    if mode == "lfs":  # xet's storage protocol has no server that could run here
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        export(exporting(run, push_to_hub="me/tiny"))
        printed = capsys.readouterr().out
    else:
        call = ["--config", str(support.TINY), "--push-to-hub", "me/tiny", *overrides(shards, run.folder, pipeline)]
        done = support.verb("export", *call, HF_ENDPOINT=hub.address)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    folder = run.folder / "generator"
    here = hashes(folder)
    assert {"README.md", "grid.png", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= here.keys()
    assert hub.hashes == here
    assert bool(hub.objects) == (mode == "lfs")
    (created,) = hub.created
    assert (created["organization"], created["name"], created["token"]) == ("me", "tiny", "Bearer hf_ours")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert hub.commits and all("Step 4, DisBack Trainer 0.1.0" in commit for commit in hub.commits)
    assert f"uploaded to {hub.address}/me/tiny: Step 4" in printed
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("me/tiny")' in text and "hf_ours" not in text and text.splitlines().count("# tiny") == 1


def test_failed_uploads_leave_the_export_whole(shards, pipeline, tmp_path, hub, monkeypatch):
    run = make_run(shards, tmp_path / "run", pipeline)
    for name, problem in (("a b/c", "not a repository's name"), ("tiny", "OWNER/tiny")):
        with pytest.raises(UserError, match=f"push_to_hub={name}: .*{problem}"):
            export(exporting(run, push_to_hub=name))
    with monkeypatch.context() as without:
        without.delenv("HF_TOKEN")
        assert get_token() is None
        with pytest.raises(UserError, match="no token .*`hf auth login` or set HF_TOKEN"):
            export(exporting(run, push_to_hub="me/tiny"))
    with monkeypatch.context() as offline, pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        export(exporting(run, push_to_hub="me/tiny"))
    folder = run.folder / "generator"
    assert not folder.exists()  # refused before anything was written
    hub.answers = {"create": (403, {"error": "You don't have the rights to create a model under this namespace"})}
    with pytest.raises(UserError, match=r"may not write to me/tiny.*write access .* for me; .*generator is complete"):
        export(exporting(run, push_to_hub="me/tiny"))
    here = hashes(folder)
    assert support.plain(folder) and "README.md" in here
    cases = {
        "create": (401, "does not accept this token"),
        "commit/main": (403, "may not write to me/tiny"),
        "preupload/main": (404, "the hub answered 404"),
        "validate-yaml": (400, "the upload failed .*license.*the hub answered 400"),
    }
    for end, (status, message) in cases.items():
        hub.answers = {end: (status, {"error": "no", "errors": [{"message": '"license" must be one of'}]})}
        with monkeypatch.context() as before_xet, pytest.raises(UserError, match=message) as caught:
            before_xet.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", end == "validate-yaml")
            upload(folder, "me/tiny", True, "again")
        assert "\n" not in str(caught.value) and "hf_ours" not in str(caught.value)
    hub.stop()
    with pytest.raises(UserError, match=r"check the network, and HF_ENDPOINT \(http://127\.0\.0\.1:\d+\); .* complete"):
        upload(folder, "me/tiny", True, "again")
    assert hashes(folder) == here and not hub.files
