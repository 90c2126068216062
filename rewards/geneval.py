"""Are the objects that the prompt asks for there: how many, in which colour, where? GenEval (arXiv:2310.11513).

A detector finds objects (rewards/_detectors.py), CLIP names their colours, rules decide (rewards/_geneval.py). What is
asked stands in the metadata, as in the rows of the benchmark's evaluation_metadata.jsonl, which is not shipped here:

    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 2}]}

either in `meta["geneval"]` or at the top level of `meta`, where a `.jsonl` data set puts it. A position names the
clause that it is a position to. Three scores are made, and `mode` says which is the reward:

    strict    GenEval's `correct`, 0 or 1. At least `count` objects a class; the `count` surest must all have the colour
              and all be in the relation to all objects of the other clause; and nothing is excluded.
    exact     Flow-GRPO's `strict_correct`, 0 or 1: the same with `==` for `at least`.
    dense     Flow-GRPO's `score`, in [0,1]: the mean of the credits of all clauses,
                  count       max(1 - |found - count| / count, 0)
                  color       share of objects that have it, 0 unless the count is right
                  position    1 if it holds, 0 otherwise and unless count and colour are right
                  excluded    1 or 0, where a clause of `include` does not settle it already

Dense is 1 where exact is, and only there; and where exact is 1, strict is. The converse fails: two cats for "a cat" are
strict 1, exact 0, dense 0.

The rules, the constants and the scoring of masks follow GenEval's and mmdetection's code, dense that of Flow-GRPO's
reward server, as read in 2026. What differs:

Note: the detector is the Mask2Former Swin-S that its authors published (COCO instances), not mmdetection's; nobody has
shown that they agree. GenEval's has a picture's shorter side at 800 pixels: `side: 800` does so here too; by default it
is what the checkpoint's preprocessor says.
Note: Flow-GRPO's credit for a count goes below 0 (to -14 for 16 cats instead of one); here it ends at 0, so that one
picture cannot decide over its whole group.
Note: Flow-GRPO adds a 1 behind the 0 for a wrong position, which makes it worth 1/2; here it is 0. It leaves out or
merges credits after an unmet one in clauses with both colour and position (the benchmark has none), and does not look
at `exclude`; here each condition counts once.
Note: detectors by name (OWLv2, Grounding DINO) are no part of GenEval. Their limits here (score 0.3 for all tags,
overlap 0.5) are a guess to tune: `threshold`, `counting_threshold`, `max_overlap`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rewards._clip import Encoder, chosen, encoder, unit
from rewards._detectors import MASK2FORMER, Detector, load_detector
from rewards._geneval import COLORS, Found, Spec, Verdict, crop, judge, keep, read_spec
from rewards.card import Card
from rewards.files import Weights
from rewards.types import MediaKind, RewardError, Sample, Scores, no_verdict

__all__ = ["GenEval"]

Mode = Literal["strict", "exact", "dense"]
MODES: tuple[Mode, ...] = ("strict", "exact", "dense")

_CLIP = Weights(
    "openai/clip-vit-large-patch14",
    ("config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
)
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Colors(Protocol):
    """What names colours: CLIP, or an object of yours, given as `clip`."""

    def name(self, crops: Sequence[Tensor], names: Sequence[str], /) -> list[str]:
        """One of COLORS for each crop [3,h,w] of an object of the class `names[i]`."""
        ...


# ------------------------------------------------------------------------------------------------ reward


class GenEval:
    """Are the asked-for objects there, in number, colour and place? GenEval (arXiv:2310.11513), strict or dense.

    Parts: strict, exact and dense, whichever of them is the reward. No verdict without a readable spec, or with a class
    that the detector does not know. A video is judged by its frames.
    """

    name = "geneval"
    media: frozenset[MediaKind] = frozenset({"image"})
    range = (0.0, 1.0)
    deterministic = True
    card = Card(
        source="GenEval, arXiv:2310.11513; dense: Flow-GRPO, arXiv:2505.05470",
        licence="see the cards of detector and CLIP",
        weights=(MASK2FORMER, _CLIP),
        memory_gb=2.0,
        note="Needs GenEval's specs as metadata. Finds COCO's 80 classes, or any where `detector` is an OWLv2 or a "
        "Grounding DINO. That its detector agrees with the benchmark's own is not shown.",
    )

    def __init__(
        self,
        mode: Mode = "strict",
        detector: str | Detector | None = None,
        detector_revision: str | None = None,
        clip: str | Colors | None = None,
        clip_revision: str | None = None,
        threshold: float | None = None,
        counting_threshold: float | None = None,
        max_overlap: float | None = None,
        max_objects: int = 16,
        position_threshold: float = 0.1,
        side: int | None = None,
    ) -> None:
        """`mode`: the score that is the reward; the others are logged.

        detector              folder or hub id of a Mask2Former for instances, an OWLv2 or a Grounding DINO
        clip                  folder or hub id of a CLIP, for colours; by default OpenAI's ViT-L/14, as in GenEval
        threshold             a find counts if its score exceeds this; None: 0.3
        counting_threshold    the same for the tag "counting"; None: 0.9 for Mask2Former, 0.3 for the others
        max_overlap           a find of a class is dropped if it overlaps with a surer one by this much (intersection
                              over union); None: 1 for Mask2Former, which is never, and 0.5 for the others
        max_objects           of a class, only this many of the surest finds count
        position_threshold    share of both objects' sizes by which they must be apart; GenEval's is 0.1
        side                  shorter side in pixels that Mask2Former sees a picture with, the longer at most 5/3 of it;
                              None: as its preprocessor says
        """
        if mode not in MODES:
            raise RewardError(f'geneval: mode is {mode!r}; expected "strict", "exact" or "dense"')
        for key, value in (("max_objects", max_objects), ("side", 1 if side is None else side)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RewardError(f"geneval: {key} is {value!r}; expected a whole number of at least 1")
        limits = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
        self._limits: dict[str, Any] = {key: value for key, value in limits.items() if value is not None}
        for key, share in (*self._limits.items(), ("position_threshold", position_threshold)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise RewardError(f"geneval: {key} is {share!r}; expected a number from 0 to 1")
        self._mode, self._max_objects, self._position_threshold = mode, max_objects, position_threshold
        self._detector_source, self._detector_revision, self._side = detector, detector_revision, side
        self._clip_source, self._clip_revision = clip, clip_revision
        self._detector: Detector | None = None
        self._colors: Colors | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read detector and CLIP; the detector stays in fp32, because its scores are held against thresholds."""
        detector, clip = self._detector_source, self._clip_source
        if detector is None or isinstance(detector, str):
            detector = load_detector(chosen(MASK2FORMER, detector, self._detector_revision), device, self._side)
        if clip is None or isinstance(clip, str):
            clip = _ClipColors(encoder(chosen(_CLIP, clip, self._clip_revision), self.name, device, dtype))
        self._detector, self._colors = detector, clip

    def unload(self) -> None:
        """Let both networks go."""
        self._detector = self._colors = None

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        """Scores [N] in [0,1]; NaN where the metadata has no spec that can be judged."""
        if self._detector is None:
            raise RewardError("geneval has no weights yet; call load(device, dtype) first (a RewardHub does)")
        info: list[dict[str, Any]] = [{} for _ in samples]
        specs = self._specs(samples, info)
        objects = self._painted(samples, specs, self._find(samples, specs))
        parts: dict[str, Tensor] = {mode: no_verdict(len(samples)) for mode in MODES}
        for row, spec in specs.items():
            verdict = judge(spec, objects[row], self._position_threshold)
            for mode in MODES:
                parts[mode][row] = float(getattr(verdict, mode))
            info[row] = self._told(spec, verdict, objects[row])
        return Scores(value=parts[self._mode], parts=parts, info=info)

    # -------------------------------------------------------------------------------------------- steps

    def _specs(self, samples: Sequence[Sample], info: list[dict[str, Any]]) -> dict[int, Spec]:
        """The specs that can be judged, by row; why the others cannot goes into `info`."""
        assert self._detector is not None
        specs: dict[int, Spec] = {}
        for row, sample in enumerate(samples):
            try:
                spec = read_spec(sample.meta)
            except ValueError as error:
                info[row]["error"] = str(error)
                continue
            unknown = self._detector.unknown(spec.names)
            if unknown:
                info[row]["error"] = f"the detector does not know {', '.join(map(repr, unknown))}"
            else:
                specs[row] = spec
        return specs

    def _find(self, samples: Sequence[Sample], specs: dict[int, Spec]) -> dict[int, dict[str, list[Found]]]:
        """What counts of what is seen, by row and class; pictures that can be are looked at together."""
        assert self._detector is not None
        limits = replace(self._detector.limits, **self._limits)
        batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for row, spec in specs.items():
            threshold = limits.counting_threshold if spec.tag == "counting" else limits.threshold
            asked = spec.names if self._detector.open else ()
            batches[samples[row].media.shape, threshold, asked].append(row)
        objects: dict[int, dict[str, list[Found]]] = {}
        for (_, threshold, _), rows in batches.items():
            names = tuple(dict.fromkeys(name for row in rows for name in specs[row].names))
            seen = self._detector.detect(torch.stack([samples[row].media for row in rows]), names, threshold)
            for row, found in zip(rows, seen, strict=True):
                objects[row] = {
                    name: keep([f for f in found if f.name == name], threshold, self._max_objects, limits.max_overlap)
                    for name in specs[row].names
                }
        return objects

    def _painted(
        self, samples: Sequence[Sample], specs: dict[int, Spec], objects: dict[int, dict[str, list[Found]]]
    ) -> dict[int, dict[str, list[Found]]]:
        """The same objects, with the colours of those whose colour a clause may depend on."""
        assert self._colors is not None
        places = [
            (row, clause.name, index)
            for row, spec in specs.items()
            for clause in spec.include
            if clause.color and len(objects[row][clause.name]) >= clause.count
            for index in range(clause.count)
        ]
        places = list(dict.fromkeys(places))
        if not places:
            return objects
        crops = [crop(samples[row].media, objects[row][name][index]) for row, name, index in places]
        colors = self._colors.name(crops, [name for _, name, _ in places])
        for (row, name, index), color in zip(places, colors, strict=True):
            objects[row][name][index] = replace(objects[row][name][index], color=color)
        return objects

    def _told(self, spec: Spec, verdict: Verdict, objects: dict[str, list[Found]]) -> dict[str, Any]:
        """What was found and what is wrong with it, for the log."""
        reasons = verdict.strict_reasons if self._mode == "strict" else verdict.exact_reasons
        found = {
            name: [
                {"score": round(each.score, 3), "box": [round(edge, 1) for edge in each.box]}
                | ({"color": each.color} if each.color else {})
                for each in finds
            ]
            for name, finds in objects.items()
        }
        return {"tag": spec.tag, "reason": "; ".join(reasons), "credits": verdict.credits, "found": found}


# ------------------------------------------------------------------------------------------------ colours


class _ClipColors:
    """The colour that CLIP (arXiv:2103.00020) finds likeliest, by GenEval's three templates. D = width of features."""

    def __init__(self, clip: Encoder) -> None:
        self._clip = clip
        self._tables: dict[str, Tensor] = {}

    def name(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """The likeliest of COLORS for each crop."""
        features = self._clip.image_features(crops)
        tables = torch.stack([self._table(name) for name in names])
        return [COLORS[index] for index in (tables @ features[..., None])[..., 0].argmax(-1).tolist()]

    def _table(self, name: str) -> Tensor:
        """Features [10,D] of the colours of a class: the mean over the templates, of length 1 again."""
        if name not in self._tables:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            features = self._clip.text_features(texts)
            self._tables[name] = unit(features.view(len(COLORS), len(_TEMPLATES), -1).mean(1))
        return self._tables[name]
