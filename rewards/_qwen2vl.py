"""Qwen2-VL (arXiv:2409.12191) with a small head instead of its vocabulary: what HPSv3 and VideoReward have in common.

    picture or frames -> patches \\
                                  Qwen2VLModel -> hidden states at the marked tokens -> head, fp32 -> [N, K, D]
    prompt in the template       /

Two things decide whether scores mean what was trained:

Positions are 1-D. The networks were trained by a forward that left out Qwen2-VL's three-dimensional rotary positions,
so every token, patches too, is counted 0, 1, 2, ... Today's transformers would compute the three-dimensional ones; they
are therefore given explicitly.

Pixels are resized as PIL does it (`rewards.preprocess`), in torch, so that a gradient reaches them.

Symbols: N samples, F frames, P patches, L tokens, K marked tokens, D outputs of the head, W = width of the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rewards.files import READING, Weights, fill, in_precision, read_tensors
from rewards.preprocess import CLIP_MEAN, CLIP_STD, resize, smart_size
from rewards.types import RewardError, Sample

PIXELS = 28 * 28
"""Of one token: 2 x 2 patches of 14 x 14. Upstream's limits are multiples of it."""

_BASE_FILES = (
    "config.json", "preprocessor_config.json", "chat_template.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
_SLOTS = ("{prompt}", "{text_prompt}")
_SHARDS = "model.safetensors.index.json"
# of a name in the file, old layout or new, to that of a Qwen2VLModel; the first that fits
_LAYOUTS = (("model.language_model.", "language_model."), ("model.visual.", "visual."), ("model.", "language_model."))


def base_weights(source: str) -> Weights:
    """The files of a Qwen2-VL that are needed besides the weights."""
    return Weights(source, _BASE_FILES)


# ------------------------------------------------------------------------------------------------ template


@dataclass(frozen=True, slots=True)
class Template:
    """The question around a prompt, with the tokens at which the answer is read."""

    text: str
    """Has `{prompt}` (or upstream's `{text_prompt}`) once or more, and each of `marks` once."""
    marks: tuple[str, ...]

    @classmethod
    def read(cls, reward: str, file: str | None, own: str, marks: tuple[str, ...]) -> Template:
        """The user's file, or `own`; RewardError says what it lacks."""
        if file is None:
            return cls(own, marks)
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(
                f"reward {reward!r}: template {file!r} cannot be read ({error}). Mend: give the path of a text file."
            ) from error
        if not any(slot in text for slot in _SLOTS):
            raise RewardError(
                f"reward {reward!r}: template {file!r} has no {{prompt}}. Mend: put it where that belongs."
            )
        wrong = {mark: text.count(mark) for mark in marks if text.count(mark) != 1}
        if wrong:
            raise RewardError(
                f"reward {reward!r}: template {file!r} has {_counted(wrong)}; expected each once, since the answer is "
                "read there."
            )
        return cls(text, marks)

    def about(self, prompt: str) -> str:
        """The question about a prompt, which is put in as it is: braces in it mean nothing."""
        slot = next(slot for slot in _SLOTS if slot in self.text)
        return prompt.join(self.text.split(slot))


def _counted(counts: dict[str, int]) -> str:
    return " and ".join(f"{mark} {count} times" for mark, count in counts.items())


# ------------------------------------------------------------------------------------------------ pixels


def resized(frames: Tensor, factor: int, min_pixels: int, max_pixels: int) -> Tensor:
    """Frames [F,3,H,W] in [0,1] with sides that are multiples of `factor`, and about that many pixels each."""
    height, width = frames.shape[-2:]
    return resize(frames, *smart_size(height, width, factor, min_pixels, max_pixels))


def normalised(frames: Tensor) -> Tensor:
    """Frames [F,3,H,W] in [0,1] with CLIP's mean and std taken out."""
    mean, std = (frames.new_tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return (frames - mean) / std


def patches(frames: Tensor, patch: int, merge: int, temporal: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames [F,3,H,W] as rows [P, 3 * temporal * patch * patch], and how many there are along time, height and width.

    Rows of one token (merge x merge patches) follow each other. A last frame is repeated until `temporal` divides F,
    which makes a picture a film of two equal frames.
    """
    lacking = -frames.shape[0] % temporal
    if lacking:
        frames = torch.cat([frames, frames[-1:].expand(lacking, -1, -1, -1)])
    count, _, height, width = frames.shape
    t, h, w = count // temporal, height // patch, width // patch
    split = frames.reshape(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
    rows = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * temporal * patch * patch)
    return rows, (t, h, w)


# ------------------------------------------------------------------------------------------------ weights


def read_checkpoint(weights: Weights, reward: str) -> dict[str, Tensor]:
    """All tensors: of the one file, or of a folder's shards where it has an index of them."""
    index = weights.local / _SHARDS if weights.local is not None else None
    if index is None or not index.is_file():
        return read_tensors(weights.file(reward))
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: value for shard in names for name, value in read_tensors(weights.file(reward, shard)).items()}


def split_head(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the network, named as Qwen2VLModel names them now, and those of the head; the vocabulary's are left.

    Understood are the layout of before transformers 4.52 (`model.layers.*`, `visual.*`) and the one since then.
    """
    head = {name.removeprefix("rm_head."): value for name, value in tensors.items() if name.startswith("rm_head.")}
    rest = (name for name in tensors if not name.startswith(("rm_head.", "lm_head.")))
    return {_renamed(name): tensors[name] for name in rest}, head


def _renamed(name: str) -> str:
    for old, new in _LAYOUTS:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _load_backbone(config: Any, tensors: dict[str, Tensor], dtype: torch.dtype, reward: str, where: str) -> Any:
    """A Qwen2VLModel that has exactly these weights; RewardError lists what is missing, too much or of another size."""
    import transformers

    auto: Any = transformers  # most of its functions have no types
    with READING, torch.device("meta"):
        # in fp32, whatever the config says: its dtype would be the default of the whole process meanwhile
        skeleton: nn.Module = auto.AutoModel.from_config(config, dtype=torch.float32)
    wanted = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    faults = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another size": [
            f"{name} {list(given[name])} instead of {list(wanted[name])}"
            for name in sorted(wanted.keys() & given.keys())
            if wanted[name] != given[name]
        ],
    }
    told = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in faults.items() if names]
    if told:
        raise RewardError(
            f"reward {reward!r}: the weights in {where} do not fit the network of `base` ({' and '.join(told)}). "
            "Mend: give in `base` the Qwen2-VL that they were trained from, or the file that the reward's card names."
        )
    with READING:
        read = auto.Qwen2VLModel.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    return in_precision(read, dtype)


# ------------------------------------------------------------------------------------------------ network


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one reward makes of Qwen2-VL."""

    reward: str
    kind: Literal["image", "video"]
    template: Template
    min_pixels: int
    max_pixels: int
    """Bounds of a picture or a frame, after resizing."""


class HeadedQwen2VL:
    """Qwen2-VL that is read by a head at marked tokens; everything is frozen, and differentiable in the pixels."""

    def __init__(self, plan: Plan, backbone: Any, head: nn.Module, processor: Any, marks: Sequence[int]) -> None:
        """`marks`: ids of the template's marks, in the order in which their outputs are wanted."""
        self._plan, self._backbone, self._head, self._processor = plan, backbone, head, processor
        self._marks = list(marks)
        self._pad = processor.image_token if plan.kind == "image" else processor.video_token
        self._control = {str(token) for token in processor.tokenizer.added_tokens_decoder.values()}

    @classmethod
    def load(
        cls,
        plan: Plan,
        base: Weights,
        tensors: dict[str, Tensor],
        make_head: Callable[[int], nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        where: str,
    ) -> HeadedQwen2VL:
        """The network of `base` with the weights `tensors`, of which `rm_head.*` are those of `make_head(W)`.

        The marks become new tokens at the end of the vocabulary, before anything is loaded: their embeddings were
        trained and are in the file. `where` is the file's name, for errors.
        """
        from transformers import Qwen2VLConfig, Qwen2VLProcessor

        processor: Any = base.pretrained(plan.reward, Qwen2VLProcessor.from_pretrained)
        if processor.chat_template is None:
            raise RewardError(
                f"reward {plan.reward!r}: {base.source!r} has no chat template. Mend: fetch its chat_template.json too "
                f"(`{base.command}`)."
            )
        config: Any = base.pretrained(plan.reward, Qwen2VLConfig.from_pretrained)
        tokenizer = processor.tokenizer
        tokenizer.add_tokens(list(plan.template.marks), special_tokens=True)
        text = config.get_text_config()
        text.vocab_size = len(tokenizer)
        body, head_tensors = split_head(tensors)
        head = make_head(text.hidden_size)
        fill(head, head_tensors, plan.reward, f"rm_head of {where}")
        head.to(device, torch.promote_types(dtype, torch.float32))  # the network may be bf16, its head never is
        backbone = _load_backbone(config, body, dtype, plan.reward, where).to(device)
        marks = tokenizer.convert_tokens_to_ids(list(plan.template.marks))
        return cls(plan, backbone.requires_grad_(False).eval(), head.requires_grad_(False).eval(), processor, marks)

    def read(
        self, samples: Sequence[Sample], frames_of: Callable[[Sample], Tensor]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Outputs [N,K,D] at the marks, at least fp32, and infos; NaN and a reason where a sample cannot be judged.

        `frames_of` gives the frames [F,3,H,W] of a sample, or raises ValueError with the reason.
        """
        info: list[dict[str, Any]] = [{} for _ in samples]
        shown: dict[int, tuple[Tensor, tuple[int, int, int]]] = {}
        for row, sample in enumerate(samples):
            try:
                self._check(sample.prompt)
                shown[row] = self._shown(frames_of(sample))
            except ValueError as error:
                info[row]["error"] = str(error)
        if not shown:
            return torch.full((len(samples), len(self._marks), 1), float("nan")), info
        read = self._outputs(list(shown.values()), [samples[row].prompt for row in shown])
        out = read.new_full((len(samples), *read.shape[1:]), float("nan"))
        out[list(shown)] = read
        return out, info

    def _check(self, prompt: str) -> None:
        found = sorted(token for token in self._control if token in prompt)
        if found:
            raise ValueError(f"the prompt has {found[0]!r} in it, which the model reads as a control token")

    def _shown(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches [P, ..] of frames [F,3,H,W], and their grid."""
        vision = self._backbone.config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        sized = resized(frames, patch * merge, self._plan.min_pixels, self._plan.max_pixels)
        return patches(normalised(sized), patch, merge, vision.temporal_patch_size)

    def _outputs(self, shown: Sequence[tuple[Tensor, tuple[int, int, int]]], prompts: Sequence[str]) -> Tensor:
        """Outputs [N,K,D] in one forward pass."""
        device = self._backbone.device
        grids = torch.tensor([grid for _, grid in shown], device=device)
        rows = [self._ids(prompt, grid) for prompt, (_, grid) in zip(prompts, shown, strict=True)]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._processor.tokenizer.pad_token_id).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        places = torch.arange(ids.shape[1], device=device)
        pixels = torch.cat([one for one, _ in shown])
        seen = (
            {"pixel_values": pixels, "image_grid_thw": grids}
            if self._plan.kind == "image"
            else {"pixel_values_videos": pixels, "video_grid_thw": grids}
        )
        hidden: Tensor = self._backbone(
            input_ids=ids,
            attention_mask=(places < lengths[:, None]).long(),
            position_ids=places.expand(3, len(rows), -1),  # 1-D: see the head of this file
            use_cache=False,
            **seen,
        ).last_hidden_state
        at = torch.stack([(ids == mark).int().argmax(1) for mark in self._marks], 1)
        marked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        with torch.autocast(device.type, enabled=False):
            return self._head(marked.to(torch.promote_types(marked.dtype, torch.float32)))

    def _ids(self, prompt: str, grid: tuple[int, int, int]) -> Tensor:
        """Token ids [L] of the chat that shows the picture and asks, with a place for each token of the picture."""
        asked = {"type": "text", "text": self._plan.template.about(prompt)}
        talk = [{"role": "user", "content": [{"type": self._plan.kind}, asked]}]
        text: str = self._processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        merge = self._backbone.config.vision_config.spatial_merge_size
        count = grid[0] * grid[1] * grid[2] // merge**2
        ids: list[int] = self._processor.tokenizer(text.replace(self._pad, self._pad * count))["input_ids"]
        return torch.tensor(ids)
