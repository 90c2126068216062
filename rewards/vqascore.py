"""Does the picture show what the prompt says? The probability that a model answers Yes (VQAScore, arXiv:2404.01291).

    reward = P("Yes" | picture, question about the prompt)        eq. 1, for each sample by itself

Any model that sees pictures and answers will do: a chat model (whatever AutoModelForImageTextToText loads and has a
chat template), or InstructBLIP, whose FlanT5 variant is the nearest thing in transformers to the paper's CLIP-FlanT5.
The paper's own checkpoint, zhiqiulin/clip-flant5-xxl, has a network of its own, which is not loaded.

P(Yes) = exp(-cross-entropy) of the answer's first token. Where a model prefers other words altogether, both P(Yes) and
P(No) are small, and their ratio P(Yes) / (P(Yes) + P(No)) still says which way it leans; it is logged beside it.

Note: the question is in our words. For published numbers give the paper's in `template`.
Note: only "Yes" counts, with a space before it or without. The paper's code seems to take the token that ends the
answer into the cross-entropy as well, which would make its numbers smaller; this has not been checked.
Note: InstructBLIP's Q-Former reads as much of a question as it has places for (512 tokens); what answers reads all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards._vlm import (
    asked,
    chats,
    control_token,
    is_encoder_decoder,
    load_vlm,
    next_token_logprobs,
    prepare,
    token_ids,
)
from rewards.card import Card
from rewards.preprocess import pad_to_square
from rewards.types import MediaKind, RewardError, Sample, Scores, no_verdict

__all__ = ["VQAScore"]

QUESTION = 'Look at the picture. Is "{prompt}" what it shows? Say Yes or No.'
_MEND = (
    "Mend: give in `model` the folder or hub id of a model that answers questions about pictures, such as "
    "Salesforce/instructblip-flan-t5-xl or Qwen/Qwen2.5-VL-3B-Instruct, with its processor and safetensors weights."
)


class VQAScore:
    """Probability in [0, 1] that a model says the picture shows the prompt (VQAScore, arXiv:2404.01291).

    Parts: yes, P(Yes); ratio, P(Yes) / (P(Yes) + P(No)). No verdict for an empty prompt, or for one with a control
    token of the model in it.
    """

    name = "vqascore"
    media: frozenset[MediaKind] = frozenset({"image"})
    range = (0.0, 1.0)
    deterministic = True
    card = Card(
        source="VQAScore, arXiv:2404.01291",
        licence="see its card",
        options=("model",),
        note="As good as the model that answers. Scores of two models, or of two questions, do not compare.",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str = "main",
        template: str = QUESTION,
        ratio: bool = False,
        square: bool = False,
    ) -> None:
        """`model`: needed; folder or hub id, as this file's head says.

        revision   branch, tag or commit on the hub
        template   the question; {prompt} in it is replaced, other braces stay as they are
        ratio      True: the score is P(Yes) / (P(Yes) + P(No)); False: P(Yes)
        square     True: the picture is padded to a square with the processor's mean colour, as the paper's model wants
                   it. For processors that would cut the sides off; one that keeps the shape needs nothing
        """
        if "{prompt}" not in template:
            raise RewardError(f"vqascore: template is {template!r}; expected a question with {{prompt}} in it")
        self._source, self._revision = model, revision
        self._template, self._ratio, self._square = template, ratio, square
        self._model: Any = None
        self._processor: Any = None
        self._yes: list[int] = []
        self._no: list[int] = []

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read processor and weights; RewardError if they are missing, or cannot say Yes or No in one token."""
        model, processor = load_vlm("vqascore", self._source, self._revision, device, dtype, _MEND)
        self._yes, self._no = (token_ids(processor.tokenizer, word) for word in ("Yes", "No"))
        if not (self._yes and self._no):
            raise RewardError(
                f"reward 'vqascore': the tokenizer of {self._source!r} ({type(processor.tokenizer).__name__}) has no "
                f"token for {'No' if self._yes else 'Yes'}, so that the answer's first token says nothing. {_MEND}"
            )
        self._model, self._processor = model, processor

    def unload(self) -> None:
        """Let model and processor go."""
        self._model = self._processor = None

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        """Probabilities [N]; one forward pass for all samples."""
        if self._model is None:
            raise RewardError("vqascore has no weights yet; call load(device, dtype) first (a RewardHub does)")
        info = [self._trouble(sample.prompt) for sample in samples]
        rows = [row for row, trouble in enumerate(info) if not trouble]
        parts = {"yes": no_verdict(len(samples)), "ratio": no_verdict(len(samples))}
        if rows:
            yes, no = self._answers([samples[row] for row in rows])
            parts["yes"][rows] = yes.exp()
            parts["ratio"][rows] = (yes - no).sigmoid()
        return Scores(value=parts["ratio" if self._ratio else "yes"].clone(), parts=parts, info=info)

    def _trouble(self, prompt: str) -> dict[str, Any]:
        """`{"error": why nothing can be asked}`, or {}."""
        if not prompt.strip():
            return {"error": "the prompt is empty: there is nothing to ask for"}
        control = control_token(self._processor.tokenizer, prompt)
        if control is not None:
            return {"error": f"the prompt has {control!r} in it, which the model reads as a control token"}
        return {}

    def _answers(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """log P(Yes) and log P(No), [N] each, fp32 on the CPU."""
        questions = [self._template.replace("{prompt}", sample.prompt.strip()) for sample in samples]
        inputs = prepare(
            self._processor,
            [[self._framed(sample.media)] for sample in samples],
            [[asked(question)] for question in questions] if chats(self._processor) else questions,
            padding_side="right" if is_encoder_decoder(self._model) else "left",
        )
        logprobs = next_token_logprobs(self._model, inputs).cpu()
        return logprobs[:, self._yes].logsumexp(1), logprobs[:, self._no].logsumexp(1)

    def _framed(self, picture: Tensor) -> Tensor:
        """The picture [3,H,W] as it is, or on a square of the mean colour."""
        if not self._square:
            return picture
        colour = picture.new_tensor(self._processor.image_processor.image_mean).view(3, 1, 1)
        return pad_to_square(picture - colour, max(picture.shape[-2:])) + colour
