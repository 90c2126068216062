"""VideoReward (VideoAlign, arXiv:2501.13918): visual quality, motion quality and text alignment of a video.

    d       = (head(hidden state at <|d_reward|>) - mean_d) / std_d      d = VQ, MQ, TA; head W -> 1 without bias, fp32
    Overall = VQ + MQ + TA

mean_d and std_d are those of `inference_config` in the checkpoint's model_config.json; released: VQ 3.6757, 2.2476, MQ
1.1646, 1.3811, TA 2.8105, 2.5121. A head with three outputs, as upstream's training script makes one, gives VQ the
first at its token, MQ the second and TA the third.

Frames are sampled evenly, from the first to the last, at 2 a second but at least 4 and always an even number of them,
and resized to 128 to 256 x 28 x 28 pixels each.

Published numbers need upstream's template (there called detailed_special): it is a part of the input that the network
was trained on, byte by byte with its white space. Ours is another wording, so that its scores are not VideoReward's.
`template` takes the user's copy.

Known pitfalls. A video that does not move keeps its VQ: log a measure of motion beside it. And motion is judged at two
frames a second, so that what flickers between them is not seen.

Note: released weights keep their LoRA apart; it is added to them when they are read: W + scale * B A.
Note: whether scores with the real weights equal those of the authors' own code has not been checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewards._qwen2vl import PIXELS, HeadedQwen2VL, Plan, Template, base_weights
from rewards.card import Card
from rewards.files import Weights, read_tensors
from rewards.types import MediaKind, RewardError, Sample, Scores

__all__ = ["VideoReward"]

Dimension = Literal["Overall", "VQ", "MQ", "TA"]

_DIMENSIONS = ("VQ", "MQ", "TA")
_MARKS = tuple(f"<|{dimension}_reward|>" for dimension in _DIMENSIONS)
_CONFIG = "model_config.json"
_WEIGHTS = Weights("KwaiVGI/VideoReward", ("checkpoint-11352/model.pth", _CONFIG))
_BASE = base_weights("Qwen/Qwen2-VL-2B-Instruct")
_MIN_PIXELS = 128 * PIXELS
_MIN_FRAMES, _MAX_FRAMES = 4, 768
_WRAPPED = "base_model.model."
_QUESTION = """
A video was made from a text. Judge it on three scales that have nothing to do with each other; higher is better.

1. How does it look? Each frame should be sharp, rich in detail, well lit and well composed, free of impossible bodies
and places, and of anything harmful.
Picture: <|VQ_reward|>

2. How does it move? There should be motion, and it should be smooth, steady and physically possible, with nothing that
jumps, flickers, melts or tears off from what is behind it.
Motion: <|MQ_reward|>

3. Is it what the text asks for? Look for the things that are named, what they do, where, in which style, and for what
the camera does.
The text: {prompt}
Text: <|TA_reward|>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the checkpoint's model_config.json says."""

    fps: float
    frames: int | None
    """A fixed number instead of `fps`."""
    max_pixels: int
    lora_scale: float | None
    """None: there is no LoRA."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


class VideoReward:
    """Visual quality, motion quality and text alignment by VideoReward (VideoAlign, arXiv:2501.13918), or their sum.

    Parts: VQ, MQ, TA, Overall. Differentiable, at the price of much memory; frames not sampled get no gradient.
    No verdict for a video of one frame or without fps, or a prompt with a control token of the model in it. Published
    numbers need upstream's template: see `template`.
    """

    name = "videoreward"
    media: frozenset[MediaKind] = frozenset({"video"})
    deterministic = True
    differentiable = True
    card = Card(
        source="arXiv:2501.13918, KwaiVGI/VideoReward and Qwen/Qwen2-VL-2B-Instruct",
        licence="code MIT, weights Apache-2.0; Qwen2-VL: see its card",
        weights=(_WEIGHTS, _BASE),
        memory_gb=4.4,
        note="Published numbers need upstream's template (`template: <file>`); ours is the default.",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str = "main",
        base: str | None = None,
        template: str | None = None,
        dimension: Dimension = "Overall",
    ) -> None:
        """Where things are; nothing is read yet, but for the template.

        model       folder or hub id with model_config.json and checkpoint-*/model.pth (of several, the last step), or
                    the path of such a model.pth
        revision    branch, tag or commit of a hub id in `model`
        base        folder or hub id of the Qwen2-VL, of which config, tokenizer and chat template are used
        template    a text file with {prompt} and the three tokens in it: your copy of upstream's question
        dimension   which number is the score
        """
        if dimension not in ("Overall", *_DIMENSIONS):
            raise RewardError(f"videoreward: dimension is {dimension!r}; expected Overall, VQ, MQ or TA")
        self._weights, self._base, self._dimension = _WEIGHTS.at(model, revision), _BASE.at(base), dimension
        self._template = Template.read(self.name, template, _QUESTION, _MARKS)
        self._network: HeadedQwen2VL | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read settings, tokenizer and weights; the head stays fp32 whatever `dtype` is."""
        self._settings = settings = _read_settings(self._weights.file(self.name, _CONFIG))
        path = self._weights.file(self.name, _last_checkpoint(self._weights))
        tensors = _merged(read_tensors(path), settings.lora_scale)
        plan = Plan(
            reward=self.name,
            kind="video",
            template=self._template,
            min_pixels=_MIN_PIXELS,
            max_pixels=settings.max_pixels,
        )
        outputs = tensors["rm_head.weight"].shape[0] if "rm_head.weight" in tensors else 1
        if outputs not in (1, len(_DIMENSIONS)):
            raise RewardError(f"reward 'videoreward': the head in {path} has {outputs} outputs; expected 1 or 3")
        self._network = HeadedQwen2VL.load(
            plan, self._base, tensors, lambda width: nn.Linear(width, outputs, bias=False), device, dtype, str(path)
        )

    def unload(self) -> None:
        """Let network and tokenizer go."""
        self._network = None

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The chosen number [N], unbounded; its gradient reaches the frames that were sampled."""
        if self._network is None:
            raise RewardError(
                "reward 'videoreward' is not loaded; the hub does that, or call .load(device, dtype) first"
            )
        out, info = self._network.read(samples, self._sampled)
        raw = out.diagonal(dim1=1, dim2=2) if out.shape[-1] == len(_DIMENSIONS) else out[..., 0]
        values = (raw - raw.new_tensor(self._settings.mean)) / raw.new_tensor(self._settings.std)
        parts = dict(zip(_DIMENSIONS, values.float().unbind(1), strict=True))
        parts["Overall"] = values.sum(1).float()
        return Scores(
            value=parts[self._dimension], parts={key: part.detach() for key, part in parts.items()}, info=info
        )

    def _sampled(self, sample: Sample) -> Tensor:
        """The frames [F,3,H,W] that are looked at; ValueError if there are none."""
        count = len(sample.media)
        if count < 2:
            raise ValueError("a video of one frame has no motion to judge")
        if not sample.fps and self._settings.frames is None:
            raise ValueError("the video's frames per second are not known, and it is sampled by them: set Sample.fps")
        wanted = self._settings.frames or count / (sample.fps or 1.0) * self._settings.fps
        return sample.media[_frames(count, wanted, fixed=self._settings.frames is not None)]


def _frames(count: int, wanted: float, fixed: bool = False) -> list[int]:
    """Which of `count` frames are looked at when `wanted` are: an even number, evenly spread over first to last.

    At least 4 unless the number is `fixed`, at most 768, and never more than there are.
    """
    most = min(_MAX_FRAMES, count) // 2 * 2
    number = round(min(wanted if fixed else max(wanted, _MIN_FRAMES), most) / 2) * 2
    places: list[int] = torch.linspace(0, count - 1, max(number, 2)).round().long().tolist()
    return places


# ------------------------------------------------------------------------------------------------ checkpoint


def _read_settings(path: Path) -> _Settings:
    """model_config.json as upstream's training writes it; without an `inference_config` numbers stay as they are."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        data, model, lora, norm = (
            told.get(key) or {} for key in ("data_config", "model_config", "peft_lora_config", "inference_config")
        )
        _check_settings(path, data, model)
        rank = lora["lora_r"] if lora.get("lora_enable") else None
        return _Settings(
            fps=float(data.get("fps") or 2.0),
            frames=data.get("num_frames"),
            max_pixels=int(data.get("max_frame_pixels") or 256 * PIXELS),
            lora_scale=rank and lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank),
            mean=tuple(float(norm[f"{key}_mean"]) if norm else 0.0 for key in _DIMENSIONS),
            std=tuple(float(norm[f"{key}_std"]) if norm else 1.0 for key in _DIMENSIONS),
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise RewardError(
            f"reward 'videoreward': {path} is no model_config.json of VideoReward ({type(error).__name__}: {error}). "
            "Mend: fetch it again."
        ) from error


def _check_settings(path: Path, data: dict[str, Any], model: dict[str, Any]) -> None:
    expected = {"sample_type": (data, "uniform"), "use_special_tokens": (model, True)}
    for key, (told, value) in expected.items():
        if told.get(key, value) != value:
            raise RewardError(
                f"reward 'videoreward': {path} says {key} = {told[key]!r}; only checkpoints with {value!r}, as the "
                "released one, are understood."
            )


def _last_checkpoint(weights: Weights) -> str:
    """The name of the weights' file: in a folder that of the highest step, on the hub the released one."""
    if weights.local is None:
        return weights.names[0]
    steps = {int(path.parent.name.split("-")[-1]): path for path in weights.local.glob("checkpoint-*/model.pth")
             if path.parent.name.split("-")[-1].isdigit()}  # fmt: skip
    return str(steps[max(steps)].relative_to(weights.local)) if steps else weights.names[0]


def _merged(tensors: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """Weights with the LoRA added that upstream's training saves beside them: W + scale * B A, in fp32.

    What is no such pair keeps its name, and is refused as unexpected later.
    """
    plain = {name.removeprefix(_WRAPPED): value for name, value in tensors.items()}
    for layer in [name.removesuffix(".base_layer.weight") for name in plain if name.endswith(".base_layer.weight")]:
        pair = (f"{layer}.lora_B.default.weight", f"{layer}.lora_A.default.weight")
        weight = plain[f"{layer}.base_layer.weight"]
        if scale is not None and all(name in plain for name in pair):
            up, down = (plain.pop(name).float() for name in pair)
            plain[f"{layer}.base_layer.weight"] = (weight.float() + scale * up @ down).to(weight.dtype)
    return {name.replace(".base_layer.", "."): value for name, value in plain.items()}
