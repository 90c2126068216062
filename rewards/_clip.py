"""What the rewards with a CLIP have in common (arXiv:2103.00020): networks that several rewards share, and features.

    trunk      a frozen network and its device; rewards that ask for the same one hold one copy together
    encoder    a trunk with its preprocessing and tokenizer: pictures and texts to features of length 1

Symbols: N pictures, M texts, D = width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.files import Weights
from rewards.preprocess import Preprocess
from rewards.types import MediaKind, RewardError, Sample

# ------------------------------------------------------------------------------------------------ trunks


@dataclass(frozen=True, kw_only=True, eq=False)
class Trunk:
    """What one reward has of a frozen network, which other trunks may be of too."""

    model: Any
    device: torch.device
    """Where it computes."""
    dtype: torch.dtype
    scale: float = 1.0
    """exp(logit_scale) in full precision: bfloat16 rounds log 100 so that its exponential is off by 1 %."""
    holders: WeakSet[Trunk] = field(default_factory=WeakSet, repr=False)
    """The trunks of this network that rewards hold, in whatever hub; all of them have this one set."""

    def to(self, device: torch.device) -> None:
        """Move the network, away from its own device only if no other reward holds it: that may be computing."""
        with _MOVING:
            if device == self.device or len(self.holders) < 2:
                self.model.to(device)

    def place(self, pixels: Tensor) -> Tensor:
        """Pixels on the network's device, in its precision."""
        return pixels.to(self.device, self.dtype)


_SHARED: WeakValueDictionary[Hashable, WeakSet[Trunk]] = WeakValueDictionary()
"""The holders of every network that some reward holds; one that none holds any more is gone, also from memory."""
_LOADING, _MOVING = Lock(), Lock()


def share(key: Hashable, make: Callable[[], Trunk]) -> Trunk:
    """A trunk of the network of this key, which is made if no reward holds it yet, and on its device.

    One is made at a time: two rewards that want the same one must not both read it.
    """
    with _LOADING:
        held = next(iter(_SHARED.get(key, ())), None)
        trunk = make() if held is None else replace(held)
        trunk.holders.add(trunk)
        _SHARED[key] = trunk.holders
    trunk.to(trunk.device)  # where it is not if another reward had it alone and put it away
    return trunk


def freeze(model: Any, device: torch.device | str, dtype: torch.dtype) -> Trunk:
    """A network in full precision, made a trunk."""
    logit = getattr(model, "logit_scale", None)
    scale = 1.0 if logit is None else logit.double().exp().item()
    device = torch.device(device)
    return Trunk(
        model=model.requires_grad_(False).eval().to(device, dtype), device=device, dtype=dtype, scale=scale
    )  # fmt: skip


def pretrained(
    weights: Weights,
    reward: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    auto: str = "AutoModel",
    checkpoint: bool = False,
    unused: str | None = None,
) -> Trunk:
    """A network of `transformers`, shared; `auto` is the class that reads it, `checkpoint` saves memory for gradients.

    RewardError if it cannot be had, or if the files lack some of its weights: transformers makes those up. Those that
    match the pattern `unused` may be lacking.
    """

    def make() -> Trunk:
        import transformers

        model = weights.network(reward, getattr(transformers, auto), torch.float32, unused)
        trunk = freeze(model, device, dtype)
        if checkpoint:
            _checkpoint(model)
        return trunk

    source = str(weights.local.resolve()) if weights.local else weights.source
    return share((auto, source, weights.revision, str(device), dtype, checkpoint), make)


def _checkpoint(model: Any) -> None:
    """Have layers recomputed in the backward pass."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )  # its old name
    enable({"use_reentrant": False})
    for part in model.modules():
        if getattr(part, "gradient_checkpointing", False):
            part.training = True  # or transformers would not; its own parts, such as dropout, stay in evaluation mode


# ------------------------------------------------------------------------------------------------ encoders


class Encoder(Protocol):
    """Pictures and texts to features of length 1."""

    @property
    def scale(self) -> float:
        """exp(logit_scale): what a cosine is multiplied with in the contrastive loss."""
        ...

    def image_features(self, images: Sequence[Tensor], /) -> Tensor:
        """[N,D] of images [3,H,W] of any sizes in [0,1]; gradients reach the pixels."""
        ...

    def text_features(self, texts: Sequence[str], /) -> Tensor:
        """[M,D], without a graph."""
        ...


@dataclass(frozen=True, kw_only=True)
class TransformersEncoder:
    """CLIP or SigLIP as transformers has them.

    Texts are cut and padded to the length that the network has positions for. SigLIP was trained with padding that is
    seen, so it gets no mask.
    """

    trunk: Trunk
    prepare: Preprocess
    tokenizer: Any

    @property
    def scale(self) -> float:
        """exp(logit_scale); SigLIP's bias is the same for all pairs and left out."""
        return self.trunk.scale

    def image_features(self, images: Sequence[Tensor], /) -> Tensor:
        """[N,D] of images [3,H,W] of any sizes in [0,1]; gradients reach the pixels."""
        pixels = self.trunk.place(self.prepare(images))
        return unit(self.trunk.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], /) -> Tensor:
        """[M,D], without a graph."""
        config = self.trunk.model.config
        rows = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.trunk.device)
        sigmoid = hasattr(self.trunk.model, "logit_bias")  # SigLIP, which was trained to read its padding too
        mask = None if sigmoid else rows.get("attention_mask")
        features = self.trunk.model.get_text_features(input_ids=rows["input_ids"], attention_mask=mask)
        return unit(features.pooler_output)


def encoder(
    weights: Weights,
    reward: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tokenizer: Weights | None = None,
    own_preprocessing: bool = False,
    checkpoint: bool = False,
) -> TransformersEncoder:
    """A CLIP with its tokenizer (`tokenizer`, if that is kept elsewhere).

    Preprocessing is CLIP's own at the size that the network takes, or with `own_preprocessing` what its files say; only
    then it may be a SigLIP.
    """
    import transformers

    trunk = dual(weights, reward, device, dtype, checkpoint=checkpoint)
    return TransformersEncoder(
        trunk=trunk,
        prepare=preprocessing(weights, reward) if own_preprocessing else clip_preprocess(trunk, weights, reward),
        tokenizer=(tokenizer or weights).pretrained(reward, transformers.AutoTokenizer.from_pretrained),
    )


def dual(
    weights: Weights, reward: str, device: torch.device | str, dtype: torch.dtype, *, checkpoint: bool = False
) -> Trunk:
    """The trunk of a network with a tower for pictures and one for texts; RewardError if it is something else."""
    trunk = pretrained(weights, reward, device, dtype, checkpoint=checkpoint)
    asked = ("get_image_features", "get_text_features", "logit_scale")
    if not all(hasattr(trunk.model, each) for each in asked):
        raise RewardError(
            f"reward {reward!r}: {weights.source!r} is a {type(trunk.model).__name__}, which does not compare pictures "
            "with texts. Mend: give the folder or hub id of a CLIP or SigLIP, such as openai/clip-vit-large-patch14."
        )
    return trunk


def clip_preprocess(trunk: Trunk, weights: Weights, reward: str) -> Preprocess:
    """CLIP's preprocessing at the size of this network's pictures; RewardError for a SigLIP, which has another."""
    if hasattr(trunk.model, "logit_bias"):
        raise RewardError(
            f"reward {reward!r}: {weights.source!r} is a {type(trunk.model).__name__}; expected a CLIP, for whose "
            "preprocessing and tokenizer this reward is made. Mend: give a CLIP such as "
            "openai/clip-vit-large-patch14, or use `clipscore`, which takes both from the model's own files."
        )
    return Preprocess(size=trunk.model.config.vision_config.image_size)


def unit(features: Tensor) -> Tensor:
    """Features scaled to length 1, in float32 or better."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def chosen(default: Weights, model: str | None, revision: str | None) -> Weights:
    """The default files, or all of another model's: those may have other names."""
    return default.at(None, revision) if model is None else Weights(model, revision=revision or "main")


# ------------------------------------------------------------------------------------------------ preprocessing


def preprocessing(weights: Weights, reward: str) -> Preprocess:
    """What a checkpoint's own image processor does; RewardError if that is none of `Preprocess`' ways."""
    import transformers

    own = weights.pretrained(reward, transformers.AutoImageProcessor.from_pretrained).to_dict()
    read = _read(own)
    if read is None:
        told = {key: own.get(key) for key in ("size", "crop_size", "do_center_crop", "resample", "rescale_factor")}
        raise RewardError(
            f"reward {reward!r}: the preprocessing of {weights.source!r} is not supported: {told}. Expected a bicubic "
            "or bilinear resize to a square, or of the shorter side followed by a centre crop. Mend: give a checkpoint "
            "of a fixed picture size (for SigLIP 2 not a `naflex` one)."
        )
    return read


def _read(own: Mapping[str, Any]) -> Preprocess | None:
    """The settings of an image processor of transformers as a Preprocess, or None."""
    interpolation: Any = {2: "bilinear", 3: "bicubic"}.get(int(own.get("resample") or 0))  # PIL's numbers
    rescaled = own.get("do_rescale") and abs(255 * (own.get("rescale_factor") or 0) - 1) < 1e-6
    if interpolation is None or not (own.get("do_resize") and rescaled and own.get("do_normalize")):
        return None
    size = own.get("size") or {}
    crop = own.get("crop_size") if own.get("do_center_crop") else None
    short, side = size.get("shortest_edge"), (crop or size).get("height")
    if side is None or side != (crop or size).get("width"):
        return None
    look: Any = {"interpolation": interpolation, "mean": tuple(own["image_mean"]), "std": tuple(own["image_std"])}
    if short is None and (crop is None or dict(crop) == dict(size)):
        return Preprocess(size=side, mode="squash", **look)
    if short is not None and crop is not None and short >= side:
        return Preprocess(size=side, mode="shortest", resized=short, **look)
    return None


# ------------------------------------------------------------------------------------------------ rewards


class Contrast:
    """What all rewards share that compare a picture with its prompt, `rewards.types.Embeds` included.

    They differ in the encoder, which their `load` brings, and in how a cosine becomes a score.
    """

    name = "contrast"
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    differentiable = True
    _encoder: Encoder | None = None

    def unload(self) -> None:
        """Let go of the network; it leaves the memory when no other reward holds it."""
        self._encoder = None

    @property
    def scale(self) -> float:
        """exp(logit_scale): what a cosine is multiplied with in the contrastive loss."""
        return self._loaded.scale

    def image_features(self, media: Tensor) -> Tensor:
        """Features [N,D] of length 1 of images [N,3,H,W] in [0,1]; gradients reach the pixels."""
        return self._loaded.image_features(list(media))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features [M,D] of length 1 of the texts, without a graph."""
        return self._loaded.text_features(texts)

    def cosines(self, samples: Sequence[Sample]) -> Tensor:
        """Cosines [N] of pictures and their prompts; a prompt that several samples share is read once."""
        texts = list(dict.fromkeys(sample.prompt for sample in samples))
        images = self._loaded.image_features([sample.media for sample in samples])
        rows = [texts.index(sample.prompt) for sample in samples]
        return (images * self._loaded.text_features(texts)[rows]).sum(-1)

    @property
    def _loaded(self) -> Encoder:
        if self._encoder is None:
            raise RewardError(f"{self.name} has no weights yet; call load(device, dtype) first (a RewardHub does)")
        return self._encoder
