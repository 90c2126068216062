"""`flowrl plan` of a model that writes: memory and work from its configuration and the first questions alone.

The language model is built without storage (torch's meta device) and walked once over a question and an answer of the
largest length, as `flowrl.estimate` walks a generator. The vision tower counts as two operations a weight and patch.
No weights are read.

Note: an estimate, and an upper one: answers end before their limit. It leaves out temporary buffers and fragmentation.

Symbols: L places of a prompt, S of an answer, P questions and K answers each an iteration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowrl.config import Config
from flowrl.estimate import (
    GIB,
    MFU,
    NumbersAndShapes,
    Walk,
    duration,
    flop,
    gib,
    numbers,
    savings,
    size_of,
    speed_of,
    storage,
)
from flowrl.vlm.actor import questions
from flowrl.vlm.collate import Inputs
from flowrl.vlm.data import messages
from flowrl.vlm.model import ImageTextModel, explained, quiet, resolve
from flowrl.vlm.policy import TextPolicy

_ASKED = 4
"""Questions whose length is looked at."""
_LOGITS = 1 << 26
"""Log-probabilities that an update makes at a time (`flowrl.vlm.policy`)."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What an answer takes, at most."""

    prompt: int
    """Tokens of a question with its pictures, the mean of the first ones."""
    answer: int
    patches: float
    """Of a question's pictures, as the vision tower counts them."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by what they are for."""

    network: float
    training: float
    """What learns, in float32, with gradients and the optimiser's two moments."""
    copies: float
    """Averaged weights, old policy, reference."""
    activations: float
    logits: float
    cache: float
    """Keys and values of the answers that are written at a time."""

    @property
    def total(self) -> float:
        """Of an update or a rollout, whichever takes more."""
        return self.network + self.training + self.copies + max(self.activations + self.logits, self.cache)


def sketch(config: Config) -> tuple[TextPolicy, Lengths]:
    """The policy of a config without weights, and the lengths of its questions and answers.

    ModelError where the configuration or the processor of its model cannot be read.
    """
    section, generation = config.model, config.generation
    assert generation is not None
    source = resolve(section.path)
    with explained(section.path), quiet():
        import transformers

        auto: Any = transformers  # most of its functions have no types
        reader = auto.AutoProcessor.from_pretrained(source)
        with torch.device("meta"):
            network = auto.AutoModelForImageTextToText.from_config(auto.AutoConfig.from_pretrained(source))
    needs = config.algorithm.build().needs
    model = ImageTextModel(
        network, reader, path=section.path, freeze_vision=section.freeze_vision, value_head=needs.value
    )
    policy = TextPolicy(model, lora=None if section.lora is None else section.lora.model_dump())
    asked = [model.prepare(messages(prompt)) for prompt in questions(config, config.data.prompts, "train")[:_ASKED]]
    forced = generation.forced_answer
    turns = generation.tools.max_turns if generation.tools else 1
    return policy, Lengths(
        prompt=round(sum(len(inputs.ids) for inputs in asked) / len(asked)),
        answer=turns * (generation.max_new_tokens + (forced.tokens if forced else 0)),
        patches=sum(_patches(model, inputs) for inputs in asked) / len(asked),
    )


def _patches(model: ImageTextModel, inputs: Inputs) -> float:
    """Patches of a question's pictures; 0 where the vision tower begins with something else than a convolution."""
    tower = model.trainable.get_encoder(modality="image")
    first = next((part for part in tower.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)), None)
    pixels = max((tensor.numel() for tensor in inputs.media.values() if tensor.is_floating_point()), default=0)
    return 0.0 if first is None else pixels / first.weight[0].numel()


def walk(model: ImageTextModel, length: int) -> Walk:
    """The language model, walked over one row of `length` places; what learns is what asks for gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    network = model.trainable
    head = network.get_output_embeddings()
    embedded = torch.zeros(1, length, head.weight.shape[1], device="meta", dtype=torch.float32, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(storage(tensor), tensor)
        return tensor

    fused = NumbersAndShapes()
    with FlopCounterMode(display=False) as counter:
        with fused, saved_tensors_hooks(keep, lambda tensor: tensor):
            states = network.get_decoder()(
                inputs_embeds=embedded, position_ids=torch.arange(length)[None], use_cache=False, return_dict=True
            ).last_hidden_state
        forward = counter.get_total_flops() + fused.flops
        states.backward(torch.empty_like(states))
        network.zero_grad()
        backward = counter.get_total_flops() + fused.flops - forward
    logits = 2.0 * length * head.weight.numel()
    weights = {storage(tensor): tensor for tensor in network.parameters()}
    saved = size_of(kept, weights)
    layers = _text(network).num_hidden_layers
    return Walk(
        forward=forward + logits,
        backward=backward + 2 * logits,
        saved=saved,
        checkpointed=saved / layers + layers * embedded.numel(),
    )


def memory(config: Config, policy: TextPolicy, length: Lengths, walked: Walk, world: int) -> Memory:
    """Bytes that a run takes on each device."""
    section, o, needs = config.model, config.optimizer, config.algorithm.build().needs
    assert config.generation is not None
    wide = 2 if section.dtype == "bfloat16" else 4
    trained, network = policy.num_trainable, policy.model.trainable
    answers = config.data.prompts_per_iteration * config.data.samples_per_prompt / world
    updated = min(o.micro_batch or answers, answers / o.updates_per_iteration)
    written = min(config.generation.batch_size or answers, answers)
    text = _text(network)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = 2 * text.num_hidden_layers * text.num_key_value_heads * head
    kept = walked.checkpointed if section.gradient_checkpointing else walked.saved
    copies = (o.ema_decay is not None) + needs.old + (needs.reference and section.lora is None)
    vocabulary = network.get_output_embeddings().weight.shape[0]
    return Memory(
        network=(numbers(network) - trained) * wide,
        training=trained * (4 * 4 + (wide if wide < 4 else 0)),  # autocast makes a copy of what learns
        copies=trained * 4 * copies,
        activations=updated * wide * kept,
        logits=3 * 4 * min(_LOGITS, updated * length.answer * vocabulary),
        cache=written * (length.prompt + length.answer) * keys * wide,
    )


def operations(config: Config, policy: TextPolicy, length: Lengths, walked: Walk, prompt: Walk) -> float:
    """Floating-point operations of an iteration over all devices; `prompt` is the walk over a question alone."""
    asked, data, needs = config.data.prompts_per_iteration, config.data, config.algorithm.build().needs
    answers = asked * data.samples_per_prompt
    seeing = 2.0 * numbers(policy.model.trainable.get_encoder(modality="image")) * length.patches
    again = walked.forward if config.model.gradient_checkpointing else 0.0
    writing = asked * (prompt.forward + seeing) + answers * (walked.forward - prompt.forward)
    scoring = answers * (walked.forward + seeing) * (needs.reference + needs.moving_reference + _served(config))
    updating = answers * (walked.forward + seeing + walked.backward + again)
    return writing * (not _served(config)) + _more_writing(config, length, walked, prompt, seeing) + scoring + updating


def _more_writing(config: Config, length: Lengths, walked: Walk, prompt: Walk, seeing: float) -> float:
    """Of answers that are not trained on, and of those that go on from states: at most, since equal states are one."""
    asked, data, needs = config.data.prompts_per_iteration, config.data, config.algorithm.build().needs
    one = walked.forward - prompt.forward
    besides = 0.0 if needs.besides is None else asked * (prompt.forward + seeing + needs.besides.answers * one)
    if not needs.continuations:
        return besides
    states = asked * data.samples_per_prompt * math.ceil(length.answer / needs.state_every)
    # On average half of an answer stands before a state, and half of one is written behind it.
    return besides + states * (prompt.forward + seeing + one / 2 + needs.continuations * one / 2)


def _served(config: Config) -> bool:
    return config.generation is not None and config.generation.server is not None


def lines(
    config: Config, policy: TextPolicy, length: Lengths, world: int, tflops: float | None, limit: float | None
) -> list[str]:
    """The estimate in sentences; where the memory of `limit` GiB does not suffice, what needs less."""
    told = [f"answers, estimated: questions of {length.prompt} tokens, answers of up to {length.answer}"]
    try:
        walked, prompt = walk(policy.model, length.prompt + length.answer), walk(policy.model, length.prompt)
    except Exception as error:  # a network of any family: what it cannot do without numbers is not known beforehand
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        return [*told, f"no memory and no time: this network cannot be walked without numbers ({reason})"]
    found = memory(config, policy, length, walked, world)
    parts = ", ".join(f"{name} {gib(getattr(found, name))}" for name in found.__dataclass_fields__)
    told.append(f"memory, estimated: {gib(found.total)} GiB a device, of an update or a rollout ({parts})")
    work, speed = operations(config, policy, length, walked, prompt), speed_of(config, tflops)
    seconds = work / (speed * MFU * world)
    told.append(
        f"work, estimated: {flop(work)} an iteration: {duration(seconds)}, if {MFU:.0%} of {flop(speed)}/s a device is "
        f"reached, which writing token by token does not; {duration(seconds * config.iterations)} in all"
    )
    if limit is not None and found.total > limit * GIB:
        told.append(f"that is more than {limit:g} GiB. What needs less, the cheapest first:")
        told += list(savings(config, found.total, lambda other: memory(other, policy, length, walked, world).total))
    return told


def _text(network: Any) -> Any:
    return network.config.get_text_config()
