"""CLIP image features and CLIP scores, with the networks of open_clip."""

import json
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.nn import functional

from models.errors import ModelError
from models.scorers.preprocess import Prepare, over_threads, to_pil
from models.scorers.weights import frozen, reason

LOCAL = "local-dir:"


def tag_config(model: str, tag: str) -> dict:
    """open_clip's settings of a tag of published weights, {} for an unknown tag. A model and its -quickgelu variant are
    the same network but for its activation, so a tag of one is found for the other too."""
    plain = model.removesuffix("-quickgelu")
    return open_clip.get_pretrained_cfg(model, tag) or open_clip.get_pretrained_cfg(plain, tag)


def cached_clip(model: str, tag: str, cache_dir: Path | None = None) -> Path | None:
    """The file of a tag's weights in the cache of the Hugging Face hub, where open_clip puts them, or None if it is not
    there or the tag is unknown. cache_dir: another cache than the user's. Does not contact the hub."""
    repository, name = os.path.split(tag_config(model, tag).get("hf_hub", ""))
    if not repository:
        return None
    name = name or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if name == HF_WEIGHTS_NAME else str(Path(name).with_suffix(".safetensors"))
    for candidate in (safe, name):  # open_clip's order
        found = try_to_load_from_cache(repository, candidate, cache_dir=cache_dir)
        if isinstance(found, str):  # otherwise None, or a mark that the repository has no such file
            return Path(found)
    return None


def model_config(model: str) -> dict:
    """open_clip's configuration of a network. Raises ModelError for an unknown one, or one that needs the hub."""
    if model.startswith("hf-hub:"):
        raise ModelError(f"CLIP model {model!r}: would be downloaded: use {LOCAL} with a folder of that repository")
    try:
        config = open_clip.get_model_config(model)
        text = config if config is None else config["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"CLIP model {model!r}: its {HF_CONFIG_NAME} {reason(error)}") from error
    if config is None:
        near = ", ".join(get_close_matches(model, open_clip.list_models())) or "a name of open_clip.list_models()"
        raise ModelError(f"CLIP model {model!r}: unknown to open_clip: use {near}, or {LOCAL} with a folder")
    if "hf_model_name" in text:
        raise ModelError(f"CLIP model {model!r}: its text network comes from the hub: use one with open_clip's own")
    return config


def check_activation(model: str, config: dict, tag: str, file: Path | None) -> None:
    """Raises ModelError if the weights were trained with the other kind of GELU than the network has.

    Such scores look plausible and are wrong, and open_clip only warns. A tag tells; a file tells only if the
    open_clip_config.json of its repository lies beside it. Without one nothing can be checked: OpenAI's weights, and
    those of DFN and MetaCLIP, mostly need the -quickgelu model, LAION's the plain one.
    """
    if file is None:
        trained = tag_config(model, tag).get("quick_gelu", False)
    else:
        try:
            trained = json.loads((file.parent / HF_CONFIG_NAME).read_text())["model_cfg"]["quick_gelu"]
        except (OSError, ValueError, KeyError, TypeError):
            return
    if trained != config.get("quick_gelu", False):
        plain = model.removesuffix("-quickgelu")
        raise ModelError(
            f"CLIP model {model!r}: weights {tag!r} were trained with {'QuickGELU' if trained else 'plain GELU'}: use "
            f"{plain + '-quickgelu' if trained else plain!r}"
        )


def find_weights(model: str, pretrained: str, config: dict) -> Path:
    """The file of weights that a tag or a path names. Raises ModelError if it is not on disk or does not fit."""
    if tag_config(model, pretrained):
        check_activation(model, config, pretrained, None)
        file = cached_clip(model, pretrained)
        if file is None:
            repository = tag_config(model, pretrained).get("hf_hub", "").rpartition("/")[0]
            raise ModelError(
                f"CLIP model {model!r}: the weights {pretrained!r} are not in the cache of the hub: run `hf download "
                f"{repository}` where there is a network, or give the path of a file"
            )
        return file
    file = Path(pretrained).absolute()  # not resolved: the cache's links have suffixes, what they point at has none
    if not pretrained or not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ModelError(f"CLIP model {model!r}: {pretrained!r} is neither a file nor a tag of its weights ({tags})")
    check_activation(model, config, pretrained, file)
    return file


def load_clip(
    model: str, pretrained: str, device: torch.device, file: Path | None = None
) -> tuple[nn.Module, Callable]:
    """An open_clip network in float32, and its preprocessing: a Pillow image to a tensor [3, S, S].

    model: a name of open_clip, or "local-dir:" and a folder with open_clip_config.json and weights. pretrained: a tag,
    whose weights are in the hub's cache, or a file; empty for a folder. file: where a tag's weights are, if not in the
    cache. Raises ModelError for all that is missing or unfit.
    """
    config = model_config(model)
    if model.startswith(LOCAL):
        if pretrained:
            raise ModelError(f"CLIP model {model!r}: a folder has its own weights: leave {pretrained!r} out")
        source, weights, preprocess = model, None, {}
    else:
        if file and tag_config(model, pretrained):
            check_activation(model, config, pretrained, None)
            weights = file
        else:
            weights = find_weights(model, pretrained, config)
        source = weights
        preprocess = {key: value for key, value in tag_config(model, pretrained).items() if key != "size"}
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights come from the global generator
            network = open_clip.create_model(
                model,
                weights and str(weights),
                force_preprocess_cfg=preprocess,
                require_pretrained=True,
                weights_only=True,
            )
    except Exception as error:  # of several libraries, see weights.read_weights
        raise ModelError(f"CLIP weights {source}: {reason(error)}") from error
    transform = image_transform_v2(PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
    # Weights that could have gradients, which `inference_mode` never makes: only with those does torch's matmul multiply
    # attention's transposed batch at once, not sample by sample, which takes a text a sixth longer. The bits are the same.
    return frozen(network, device).requires_grad_(), transform


class ClipImages:
    """Image features [B, D] of a CLIP model, not normalised. The arguments and errors are those of `load_clip`."""

    def __init__(self, model: str, pretrained: str, device: torch.device, file: Path | None = None):
        self.device = device
        self.network, self.transform = load_clip(model, pretrained, device, file)

    @torch.inference_mode()
    def __call__(self, images: list[Tensor]) -> Tensor:
        pixels = torch.stack(over_threads(lambda image: self.transform(to_pil(image)), images))
        return self.network.encode_image(pixels.to(self.device), normalize=False)


class ClipScore:
    """Cosines [B] between images and prompts in CLIP space, neither scaled nor clipped at 0.

    prefix: text before every prompt. Its tokens go after the start token of the tokenised and truncated prompt, as in
    GigaGAN's and DMD2's evaluators, where it is "A photo depicts ". prepare: a crop and resize before the model's own
    preprocessing; theirs is Prepare("square", 256). The other arguments and errors are those of `load_clip`.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        device: torch.device,
        file: Path | None = None,
        prefix: str = "",
        prepare: Prepare | None = None,
    ):
        named = model_config(model)["text_cfg"].get("hf_tokenizer_name")
        if named and not model.startswith(LOCAL):  # a folder has its own
            raise ModelError(f"CLIP model {model!r}: its tokenizer {named} is on the hub: use {LOCAL} with a folder")
        self.images = ClipImages(model, pretrained, device, file)
        self.prepare = prepare or Prepare()
        self.tokenizer = open_clip.get_tokenizer(model)
        if prefix and not isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            raise ModelError(f"CLIP model {model!r}: prefix {prefix!r} needs CLIP's own tokenizer: use another model")
        self.prefix = torch.tensor(self.tokenizer.encode(prefix)) if prefix else None

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids [B, L] of prompts, with the prefix."""
        tokens = self.tokenizer(prompts)
        if self.prefix is None:
            return tokens
        length = tokens.shape[1]
        tokens = torch.cat([tokens[:, :1], self.prefix.expand(len(tokens), -1), tokens[:, 1:]], 1)[:, :length]
        tokens[:, -1] = torch.where(tokens[:, -1] > 0, self.tokenizer.eot_token_id, 0)  # a cut prompt lost its own
        return tokens

    @torch.inference_mode()
    def __call__(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        image_features = self.images(over_threads(self.prepare, images))
        tokens = self.tokens(prompts).to(self.images.device)
        return cosines(image_features, self.images.network.encode_text(tokens, normalize=False))


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines [B] between the rows of two sets of features [B, D]."""
    if len(images) != len(texts):  # one would be broadcast over the other
        raise ValueError(f"{len(images)} images and {len(texts)} prompts")
    return functional.cosine_similarity(images, texts, dim=1)
