"""How well can a model that sees the picture guess its prompt? The generation reward of SUDER (arXiv:2506.07963).

    reward = 1/|T| log p(T | picture) = 1/|T| sum_k log p(T_k | picture, T_<k)        T = the tokens of the prompt

In the paper one model draws and describes, and judges its own pictures: a *self*-reward, without labels or a judge from
outside. It is that here only if `model` is the understanding half of the model that is trained; with any other model it
is a caption likelihood, as good as that model sees.

Two kinds of model are understood:

    captioner     BLIP, GIT: the prompt is the caption
    chat model    whatever AutoModelForImageTextToText loads and comes with a chat template: the user shows the picture
                  and gives the `instruction`, and the prompt is the assistant's answer

Known pitfalls. A prompt that is *written* in the picture is easy to guess. A generator that is judged by its own half
can agree with itself on pictures that nobody else would describe so: log another reward with weight 0 beside it. And a
score depends on how likely a prompt is without any picture, and on its length, since late tokens are easier than early
ones: compare pictures of one prompt, as groups do, not prompts with each other.

Note: the paper samples discrete picture tokens and has a second, understanding reward 1/|V| log p(picture | text). A
flow model has no such likelihood, so there is only the one above.
Note: the paper's model judges by the current weights; here they are read once and stay as they are.
Note: the end of the text is not scored: a prompt need not be all there is to say about a picture.
Note: with a captioner there is no instruction; with a chat model the words around the prompt are its template's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards._vlm import answered, asked, chats, control_token, encode, load_vlm, render
from rewards.card import Card
from rewards.types import MediaKind, RewardContractError, RewardError, Sample, Scores, no_verdict

__all__ = ["SUDER"]

_CAPTIONERS = ("BlipForConditionalGeneration", "GitForCausalLM")
_MEND = (
    "Give in `model` the folder or hub id of a captioner such as Salesforce/blip-image-captioning-large, or of a chat "
    "model that sees pictures such as Qwen/Qwen2.5-VL-3B-Instruct, with its processor and safetensors weights"
)


class SUDER:
    """Mean log-probability of the prompt's tokens given the picture (SUDER, arXiv:2506.07963); at most 0.

    Parts: tokens, how many were scored. No verdict for a prompt without text, or with a control token of the model in
    it. Scores have no lower bound, so no range is declared: `norm: unit` is `{unit: [low, 0]}` here.
    """

    name = "suder"
    media: frozenset[MediaKind] = frozenset({"image"})
    deterministic = True
    card = Card(
        source="SUDER (arXiv:2506.07963)",
        licence="that of your model",
        options=("model",),
        note="a self-reward only with the understanding half of the model that is trained",
    )

    def __init__(
        self,
        model: str | None = None,
        revision: str = "main",
        instruction: str = "Describe this image in one sentence.",
        prefix: str = "",
        max_tokens: int = 256,
        normalise: bool = True,
    ) -> None:
        """`model`: needed; folder or hub id of a captioner or a chat model, as this file's head says.

        revision      branch, tag or commit on the hub
        instruction   what a chat model is asked; a captioner is asked nothing
        prefix        what caption or answer begins with, such as "a picture of"; it is given, not scored
        max_tokens    of a longer prompt only this many first tokens are scored
        normalise     True: the mean over the tokens, as in the paper; False: their sum, log p(prompt | picture)
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise RewardError(f"suder: max_tokens is {max_tokens!r}; expected a whole number of at least 1")
        self._source, self._revision = model, revision
        self._instruction, self._prefix = instruction, prefix.strip()
        self._max_tokens, self._normalise = max_tokens, normalise
        self._model: Any = None
        self._processor: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read processor and weights; RewardError if they are missing, or are of no model that could judge."""
        model, processor = load_vlm("suder", self._source, self._revision, device, dtype, f"{_MEND}.")
        self._check(model, processor)
        self._model, self._processor = model, processor

    def unload(self) -> None:
        """Let model and processor go."""
        self._model = self._processor = None

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> Scores:
        """Log-probabilities [N] in nats, per token or in all; one forward pass for all samples."""
        if self._model is None:
            raise RewardError("suder has no weights yet; call load(device, dtype) first (a RewardHub does)")
        value, tokens = no_verdict(len(samples)), no_verdict(len(samples))
        info: list[dict[str, Any]] = [{} for _ in samples]
        readable: dict[int, str] = {}
        for row, sample in enumerate(samples):
            try:
                readable[row] = self._readable(sample.prompt)
            except ValueError as error:
                info[row]["error"] = str(error)
        if readable:
            rows = list(readable)
            logprob, scored = self._logprob([samples[row].media for row in rows], list(readable.values()))
            count = scored.sum(1)
            total = logprob.where(scored, 0).sum(1)
            value[rows] = (total / count if self._normalise else total).cpu()
            tokens[rows] = count.float().cpu()
        return Scores(value=value, parts={"tokens": tokens}, info=info)

    # -------------------------------------------------------------------------------------------- text

    def _readable(self, prompt: str) -> str:
        """The prompt's first `max_tokens` tokens, ending with a character that has one; ValueError if that is empty."""
        text = prompt.strip()
        tokenizer = self._processor.tokenizer
        control = control_token(tokenizer, text)
        if control is not None:
            raise ValueError(f"the prompt has {control!r} in it, which the model reads as a control token")
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        read = text[: spans[: self._max_tokens][-1][1]] if text and spans else ""
        if not read:
            raise ValueError("the prompt has no text whose likelihood could be taken")
        return read

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        """What the model reads, up to the last character of each prompt."""
        answers = [f"{self._prefix} {prompt}" if self._prefix else prompt for prompt in prompts]
        if not self._chats:
            return answers
        texts = render(self._processor, [[asked(self._instruction), answered(answer)] for answer in answers])
        for text, prompt in zip(texts, prompts, strict=True):
            if not text.endswith(prompt):
                raise RewardContractError(
                    f"suder: the chat template of {self._source!r} rewrites the answer {prompt!r}: it gives "
                    f"{text[-len(prompt) - 40 :]!r}. Mend: use a model whose template leaves an answer as it is."
                )
        return texts

    # -------------------------------------------------------------------------------------------- model

    def _logprob(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N,L], fp32, of the tokens from the first that is scored on, and which are scored [N,L]."""
        inputs = self._inputs(pictures, prompts)
        offsets: Tensor = inputs.pop("offset_mapping")
        scored = _last_characters(offsets, [len(prompt) for prompt in prompts]).to(self._model.device)
        ids: Tensor = inputs["input_ids"]
        first = int(scored.any(0).nonzero()[0])
        kept = ids.shape[1] - first + 1  # each place has the logits of the next token, so they start one place earlier
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            inputs["logits_to_keep"] = kept  # those of the picture's places alone can be gigabytes
        logits: Tensor = self._model(**inputs, use_cache=False).logits[:, -kept:-1]
        loss = F.cross_entropy(logits.float().transpose(1, 2), ids[:, first:], reduction="none")
        return -loss, scored[:, first:]

    def _inputs(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        """The processor's tensors on the model's device, with `offset_mapping` [N,L,2]."""
        inputs = encode(
            self._processor,
            [[picture] for picture in pictures],
            self._texts(prompts),
            padding_side="right",  # behind all that is scored: a causal model never sees it, and places stay the same
            return_offsets_mapping=True,
        ).to(self._model.device, self._model.dtype)
        if not self._chats:
            inputs["input_ids"][:, 0] = self._start
        return inputs

    @property
    def _chats(self) -> bool:
        return type(self._model).__name__ not in _CAPTIONERS

    @property
    def _start(self) -> int:
        """What a caption starts with: BLIP has a token of its own for that, which its tokenizer does not write."""
        start: int = self._model.config.get_text_config().bos_token_id
        return start

    # -------------------------------------------------------------------------------------------- checks

    def _check(self, model: Any, processor: Any) -> None:
        kind = type(model).__name__
        if not processor.tokenizer.is_fast:
            raise RewardError(
                f"suder: the tokenizer of {self._source!r} ({type(processor.tokenizer).__name__}) cannot say which "
                "characters a token covers. Mend: use a model that has a fast tokenizer (a tokenizer.json)"
            )
        if model.config.is_encoder_decoder:
            raise RewardError(f"suder: {self._source!r} ({kind}) reads text and writes another; expected one. {_MEND}")
        if kind not in _CAPTIONERS and not chats(processor):
            raise RewardError(
                f"suder: {self._source!r} ({kind}) has no chat template, and is none of the captioners "
                f"{', '.join(_CAPTIONERS)}. {_MEND}"
            )


def _last_characters(offsets: Tensor, lengths: Sequence[int]) -> Tensor:
    """Which tokens [N,L] cover any of the last `lengths` characters of their row, by `offsets` [N,L,2] (start, end).

    Counted from the end, because a processor puts many tokens where the text had one picture. And by characters, not
    by the tokens in front: a token may reach over the border, as " a" does in "ASSISTANT: " + "a", and is scored then.
    """
    ends = offsets[..., 1]
    border = ends.amax(1) - torch.tensor(lengths, device=ends.device)
    return ends > border[:, None]
