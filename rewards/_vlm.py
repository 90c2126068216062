"""Models that see pictures and write: loading, chat templates, the next token and greedy answers. For rewards only.

    model, processor = load_chat_model("judge", source, "main", device, dtype)
    inputs = prepare(processor, [[picture], ...], [[asked("Is it red?")], ...])
    next_token_logprobs(model, inputs)                     [N,V]
    answers(model, processor, inputs, max_tokens=64)       N texts, and whether each is whole

A talk is a list of messages `{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}`, or finished
text for a model without a chat template. N talks, V entries of the vocabulary, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from rewards.files import Weights
from rewards.media import to_pil
from rewards.types import RewardError

Message: TypeAlias = Mapping[str, Any]
Talk: TypeAlias = Sequence[Message] | str
Side: TypeAlias = Literal["left", "right"]

_WORD_STARTS = ("", "▁", "Ġ")
"""How vocabularies write a word: bare, after a space in SentencePiece, after a space in a byte-level BPE."""
_ROWS = 2**14
"""Of the vocabulary, brought to fp32 at a time: all of it would take gigabytes."""
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


# ------------------------------------------------------------------------------------------------ loading


def load_vlm(
    reward: str, source: str | None, revision: str, device: torch.device | str, dtype: torch.dtype, mend: str = ""
) -> tuple[Any, Any]:
    """Model (frozen, eval, safetensors only) and processor of a folder or hub id; RewardError, which ends in `mend`."""
    if not source:
        raise RewardError(f"reward {reward!r}: no model is given. {mend or 'Mend: set `model` to a folder or hub id.'}")
    import transformers

    auto: Any = transformers  # most of its functions have no types
    weights = Weights(source, revision=revision)
    try:
        processor = weights.pretrained(reward, auto.AutoProcessor.from_pretrained)
        _check_processor(reward, source, processor)
        model = weights.network(reward, auto.AutoModelForImageTextToText, dtype)
    except RewardError as error:
        raise RewardError(f"{error} {mend}".strip()) from error
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # masked wherever it stands, so any token will do
    reader = getattr(processor, "qformer_tokenizer", None)
    if reader is not None:  # which may not know how many places InstructBLIP's second reader has
        places = model.config.qformer_config.max_position_embeddings
        reader.model_max_length = min(reader.model_max_length, places)
    return model.to(device), processor


def load_chat_model(
    reward: str, source: str | None, revision: str, device: torch.device | str, dtype: torch.dtype, mend: str = ""
) -> tuple[Any, Any]:
    """`load_vlm`, where a model without a chat template is an error too."""
    model, processor = load_vlm(reward, source, revision, device, dtype, mend)
    if not chats(processor):
        raise RewardError(
            f"reward {reward!r}: {source!r} ({type(model).__name__}) has no chat template. "
            f"{mend or 'Mend: give an instruction-tuned model, with its processor.'}"
        )
    return model, processor


def chats(processor: Any) -> bool:
    """Whether it comes with a chat template."""
    return getattr(processor, "chat_template", None) is not None


def _check_processor(reward: str, source: str, processor: Any) -> None:
    lacking = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if lacking:
        raise RewardError(
            f"reward {reward!r}: {source!r} has no {' and no '.join(lacking)} (found {type(processor).__name__}): "
            "it is no model that sees pictures, or its processor was not saved with it."
        )


# ------------------------------------------------------------------------------------------------ what goes in


def asked(text: str, pictures: int = 1) -> dict[str, Any]:
    """A user's message: some pictures, then text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def answered(text: str) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def render(processor: Any, talks: Sequence[Sequence[Message]]) -> list[str]:
    """Talks as the text the model reads: up to where an answer starts, or to the end of an assistant's last message."""
    texts = []
    for talk in talks:
        begun = talk[-1]["role"] == "assistant"
        texts.append(
            processor.apply_chat_template(
                list(talk), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
            )
        )
    return texts


def prepare(
    processor: Any, pictures: Sequence[Sequence[Tensor]], talks: Sequence[Talk], padding_side: Side = "left"
) -> Any:
    """The model's inputs, one row a talk, padded; the pictures [3,H,W] of a talk are in the order of its messages."""
    texts = [talk if isinstance(talk, str) else render(processor, [talk])[0] for talk in talks]
    return encode(processor, pictures, texts, padding_side)


def encode(
    processor: Any,
    pictures: Sequence[Sequence[Tensor]],
    texts: Sequence[str],
    padding_side: Side = "left",
    **options: Any,
) -> Any:
    """`prepare` for finished texts; `options` go to the processor."""
    start = processor.tokenizer.bos_token
    written = start is not None and texts[0].startswith(start)  # by the chat template
    images, how = _images(processor, pictures)
    inputs = processor(
        images=images if any(images) else None,
        text=list(texts),
        padding=True,
        padding_side=padding_side,
        add_special_tokens=not written,
        return_tensors="pt",
        **how,
        **options,
    )
    reader = getattr(processor, "qformer_tokenizer", None)
    if reader is not None:  # InstructBLIP's second reader counts places from the left, whatever the side of the first
        read = reader(list(texts), padding=True, truncation=True, padding_side="right", return_tensors="pt")
        inputs.update({f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")})
    return inputs


def control_token(tokenizer: Any, text: str) -> str | None:
    """A control token of the model that is written out in `text`, where it would not be read as text."""
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return min((token for token in control if token in text), default=None)


def _images(
    processor: Any, pictures: Sequence[Sequence[Tensor]]
) -> tuple[list[list[Tensor]] | list[list[Image.Image]], dict[str, Any]]:
    """Pictures as the processor takes them: one that divides by 255 gets what comes of that, any other gets PIL."""
    own = processor.image_processor
    if getattr(own, "do_rescale", False) and math.isclose(getattr(own, "rescale_factor", 0) or 0, 1 / 255):
        return [[picture.clamp(0, 1) for picture in row] for row in pictures], {"do_rescale": False}
    return [[to_pil(picture) for picture in row] for row in pictures], {}


# ------------------------------------------------------------------------------------------------ what comes out


@torch.no_grad()
def next_token_logprobs(model: Any, inputs: Any) -> Tensor:
    """Log-probabilities [N,V], fp32, of the first token of each answer; the layer that makes them works in fp32 too.

    Through `generate`, which knows for each kind of model the places of a padded row and where an answer starts: after
    the text, or in a decoder of its own.
    """
    with _logits_in_full(model):
        made = model.generate(
            **inputs.to(model.device, model.dtype), **_GREEDY, max_new_tokens=1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return made.logits[0].float().log_softmax(-1)  # before any of the model's penalties


@contextmanager
def _logits_in_full(model: Any) -> Iterator[None]:
    """Within, logits are made in fp32: around 20, bf16 knows only steps of 1/8, a factor of 1.13 in a probability.

    A last layer that is not a plain linear one, such as a quantised one, stays as it is.
    """
    last = model.get_output_embeddings()
    if type(last) is not nn.Linear:
        yield
        return
    hook = last.register_forward_hook(_in_full)
    try:
        yield
    finally:
        hook.remove()


def _in_full(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """What a linear layer gives for the last place, [N,1,V], at least fp32: all that `generate` looks at."""
    state = inputs[0][:, -1:]
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    logits = torch.cat([state @ rows.to(state.dtype).T for rows in torch.split(layer.weight, _ROWS)], -1)
    return logits if layer.bias is None else logits + layer.bias


@torch.no_grad()
def answers(model: Any, processor: Any, inputs: Any, max_tokens: int) -> list[tuple[str, bool]]:
    """The most likely answers, token by token, and whether they came to their end within `max_tokens`.

    Only what is new, without special tokens.
    """
    made = model.generate(
        **inputs.to(model.device, model.dtype), **_GREEDY, max_new_tokens=max_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    new = made[:, 1 if is_encoder_decoder(model) else inputs["input_ids"].shape[1] :]
    known = (model.generation_config.eos_token_id, processor.tokenizer.eos_token_id, -1)
    ends = torch.tensor(next(each for each in known if each is not None), device=new.device).flatten()
    ended = torch.isin(new, ends).any(1) | (new.shape[1] < max_tokens)
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [(text.strip(), end) for text, end in zip(texts, ended.tolist(), strict=True)]


def is_encoder_decoder(model: Any) -> bool:
    """Whether it reads in one part and writes in another; such a model is padded on the right."""
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def token_ids(tokenizer: Any, word: str) -> list[int]:
    """All tokens that are `word` at the start of an answer, with a space before it or without; [] if there are none."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[start + word] for start in _WORD_STARTS if start + word in vocabulary]
