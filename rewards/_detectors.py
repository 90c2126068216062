"""Networks that find objects, for rewards that count and place them: Mask2Former, OWLv2, Grounding DINO.

    detector = load_detector(MASK2FORMER, device, side=None)
    found = detector.detect(images, ("cat", "dog"), 0.3)        what is in each image [N,3,H,W], in [0,1]

All run in fp32, because their scores are held against thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards._clip import Trunk, freeze, pretrained, share
from rewards._geneval import Box, Found
from rewards.files import Weights
from rewards.media import to_uint8
from rewards.types import RewardError

MASK2FORMER = Weights(
    "facebook/mask2former-swin-small-coco-instance", ("config.json", "preprocessor_config.json", "model.safetensors")
)

_SPELLINGS = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv", "hair dryer": "hair drier", "doughnut": "donut",
}  # fmt: skip
"""Label files of COCO disagree with each other and with GenEval on the names of these of its 80 classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """From when on a find counts; the defaults are GenEval's."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    """The threshold for the tag "counting"."""
    max_overlap: float = 1.0
    """Intersection over union with a surer object of the class from which on a find is dropped; 1: none is."""


class Detector(Protocol):
    """What finds objects: one of this file, or an object of yours."""

    limits: Limits
    open: bool
    """It finds whatever is named, and what is named changes what it finds: so each spec is looked for by itself."""

    def unknown(self, names: Sequence[str], /) -> list[str]:
        """Which of these classes it does not know."""
        ...

    def detect(self, images: Tensor, names: Sequence[str], threshold: float, /) -> list[list[Found]]:
        """For each of N images [N,3,H,W] the objects of these classes whose score exceeds the threshold."""
        ...


def load_detector(weights: Weights, device: torch.device, side: int | None = None) -> Detector:
    """The detector that a checkpoint's config says it is, frozen.

    `side`: the shorter side, in pixels, that Mask2Former sees a picture with; None: what its preprocessor says.
    RewardError for any other kind of network, or one without all its weights.
    """
    import transformers

    kind = weights.pretrained("geneval", transformers.AutoConfig.from_pretrained).model_type
    if kind == "mask2former":
        return _Mask2Former(weights, device, side)
    if kind in ("owlv2", "grounding-dino"):
        return _ByName(weights, device, kind)
    raise RewardError(
        f"reward 'geneval': {weights.source!r} is a {kind!r}, no detector that it can use. Mend: give in `detector` a "
        f"mask2former for instances such as {MASK2FORMER.source}, an owlv2 or a grounding-dino."
    )


class _Mask2Former:
    """Mask2Former (arXiv:2112.01527) for instances: the classes it was trained on, with masks.

    Symbols: N images, Q queries, C classes.
    """

    limits = Limits()
    open = False

    def __init__(self, weights: Weights, device: torch.device, side: int | None) -> None:
        import transformers

        self._processor: Any = weights.pretrained("geneval", transformers.AutoImageProcessor.from_pretrained)
        self._size = {"size": {"shortest_edge": side, "longest_edge": side * 5 // 3}} if side else {}
        self._trunk = share((_Mask2Former, weights, str(device)), lambda: _read_mask2former(weights, device))
        self._labels = {_canonical(label): index for index, label in self._trunk.model.config.id2label.items()}

    def unknown(self, names: Sequence[str]) -> list[str]:
        """Classes that it was not trained on."""
        return [name for name in names if _canonical(name) not in self._labels]

    def detect(self, images: Tensor, names: Sequence[str], threshold: float) -> list[list[Found]]:
        """Objects with masks; one forward pass."""
        inputs = self._processor(images=list(to_uint8(images)), return_tensors="pt", **self._size)
        classes, masks = self._trunk.model(self._trunk.place(inputs["pixel_values"]))
        padded = inputs["pixel_mask"].shape[-2:]
        asked = [self._labels[_canonical(name)] for name in names]
        found = []
        for row, seen in enumerate(inputs["pixel_mask"]):
            inner = int(seen.any(1).sum()), int(seen.any(0).sum())
            label, score, mask = instances(classes[row], masks[row], tuple(padded), inner, tuple(images.shape[-2:]),
                                           asked, threshold)  # fmt: skip
            found.append(
                [
                    Found(name=name, score=float(value), box=box_of(shape), mask=shape)
                    for index, value, shape in zip(label.tolist(), score, mask, strict=True)
                    for name, wanted in zip(names, asked, strict=True)  # two names may be one class
                    if wanted == index
                ]
            )
        return found


def instances(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, ...],
    inner: tuple[int, int],
    size: tuple[int, ...],
    wanted: Sequence[int],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """From Mask2Former's outputs for one image to its objects, as mmdetection does it: labels [K], scores, masks.

        score = p(class) * mean probability of the mask's pixels

    The Q best pairs of query and class are taken, so that one mask may have two classes. `classes` [Q,C+1] and `masks`
    [Q,h,w] are logits; the masks belong to an input of size `padded`, of which `inner` is the image, whose own size is
    `size`. Only labels of `wanted` with scores above the threshold are made, masks bool [K,H,W].

    transformers' own post-processing differs: it makes masks of 384 x 384 and blows them up without smoothing.
    """
    share = classes.softmax(-1)[:, :-1]
    best, place = share.flatten().topk(len(share))
    label, query = place % share.shape[1], place // share.shape[1]
    # a score is at most its first factor: the rest need not have their masks enlarged
    likely = (best > threshold) & torch.isin(label, torch.tensor(wanted, device=label.device))
    best, label, query = best[likely], label[likely], query[likely]
    if not len(label):
        return label, best, masks.new_zeros((0, *size), dtype=torch.bool)
    logits = F.interpolate(masks[query][None], padded, mode="bilinear", align_corners=False)
    logits = logits[..., : inner[0], : inner[1]]
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    area = inside.flatten(1).sum(1)
    score = best * (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    sure = score > threshold
    return label[sure], score[sure], inside[sure]


def box_of(mask: Tensor) -> Box:
    """The tight box of a mask [H,W] that is not empty."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _read_mask2former(weights: Weights, device: torch.device) -> Trunk:
    """transformers' Mask2FormerForUniversalSegmentation without its training loss, for which it asks for scipy."""
    import transformers

    auto: Any = transformers  # most of its functions have no types

    class Mask2Former(auto.Mask2FormerPreTrainedModel):  # type: ignore[misc]
        _keys_to_ignore_on_load_unexpected = ["criterion"]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = auto.Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
            """Logits of classes [N,Q,C+1] and of masks [N,Q,h,w]."""
            out = self.model(pixel_values, output_hidden_states=True)
            last = out.transformer_decoder_intermediate_states[-1]
            return self.class_predictor(last.transpose(0, 1)), out.masks_queries_logits[-1]

    return freeze(weights.network("geneval", Mask2Former, torch.float32), device, torch.float32)


class _ByName:
    """OWLv2 (arXiv:2306.09683) or Grounding DINO (arXiv:2303.05499): any classes, by their names, without masks.

    Symbols: N images, Q boxes, T tokens, K names.
    """

    limits = Limits(counting_threshold=0.3, max_overlap=0.5)
    open = True

    def __init__(self, weights: Weights, device: torch.device, kind: str) -> None:
        import transformers

        self._owl = kind == "owlv2"
        self._processor: Any = weights.pretrained("geneval", transformers.AutoProcessor.from_pretrained)
        self._trunk = pretrained(
            weights, "geneval", device, torch.float32, auto="AutoModelForZeroShotObjectDetection"
        )  # fmt: skip

    def unknown(self, names: Sequence[str]) -> list[str]:
        """None."""
        return []

    def detect(self, images: Tensor, names: Sequence[str], threshold: float) -> list[list[Found]]:
        """Boxes, each of the class that fits it best; one forward pass."""
        text = [f"a photo of a {name}" for name in names] if self._owl else _listed(names)
        inputs = self._processor(
            images=list(to_uint8(images)), text=[text] * len(images), return_tensors="pt"
        ).to(self._trunk.device)  # fmt: skip
        out = self._trunk.model(**inputs)
        if self._owl:
            logit, best = out.logits.float().max(-1)
            score = logit.sigmoid()
        else:
            score, best = self._by_phrase(out.logits.float().sigmoid(), inputs["input_ids"][0]).max(-1)
        height, width = images.shape[-2:]
        # OWLv2 pads a picture to a square, at the right or below
        across, down = (max(height, width),) * 2 if self._owl else (width, height)
        centre, half = out.pred_boxes.float().split(2, -1)
        corners = torch.cat([centre - half / 2, centre + half / 2], -1).clamp(0, 1)
        boxes = corners * corners.new_tensor([across, down, across, down])
        boxes = boxes.minimum(boxes.new_tensor([width, height, width, height]))
        return [
            [
                Found(name=names[int(best[row, q])], score=float(score[row, q]), box=tuple(boxes[row, q].tolist()))
                for q in (score[row] > threshold).nonzero()[:, 0]
            ]
            for row in range(len(images))
        ]

    def _by_phrase(self, share: Tensor, ids: Tensor) -> Tensor:
        """From scores of tokens [N,Q,T] to those of names [N,Q,K]: the mean over a name's tokens, as GLIP does it."""
        ends = (ids == self._processor.tokenizer.convert_tokens_to_ids(".")).nonzero()[:, 0].tolist()
        starts = [1, *(end + 1 for end in ends[:-1])]  # behind the token that begins the text
        return torch.stack([share[..., start:end].mean(-1) for start, end in zip(starts, ends, strict=True)], -1)


def _listed(names: Sequence[str]) -> str:
    """Names as Grounding DINO reads them, each with a dot behind it."""
    return " ".join(f"{name.lower().replace('.', ' ')}." for name in names)


def _canonical(label: str) -> str:
    """One spelling for a class, however a label file or a spec writes it."""
    label = label.strip().lower().replace("_", " ")
    return _SPELLINGS.get(label, label)
