"""Vision-language models of transformers: finding, loading and asking them, whatever their class.

    model = ImageTextModel.load("shapes_vlm")
    inputs = model.prepare(asked("How many circles are there?", [picture]))
    states, _ = model.states(collate([inputs], ids, present, model.pad_id))
    logprobs = model.logprobs(states[:, -1], temperature=0.7)

A path is the built-in `shapes_vlm`, `tiny/<name>` of `flowrl.vlm.tiny`, a local folder, or a hub id.

Symbols: N rows, L places, H hidden size, V vocabulary, M places that are asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowrl.models.pipeline import ModelError, folder_or_id
from flowrl.resolve import nearest
from flowrl.tiny import PREFIX, cache_folder
from flowrl.vlm.collate import Inputs, Message, split
from flowrl.vlm.videos import LISTED_FPS

BUILT_IN = {"shapes_vlm": "flowrl.shapes/weights_vlm"}
"""Names of the models that lie inside this package, and the package/folder that each is in."""
CONFIG = "config.json"

_MEDIA_IDS = re.compile(r"(image|video|audio|vision).*_(id|ids|index)$")
_MARK = "\N{SECTION SIGN}"


def resolve(path: str | Path) -> str:
    """The local folder or hub id that a path stands for; ModelError where it can be neither."""
    name = str(path)
    return str(_tiny(name)) if name.startswith(PREFIX) else folder_or_id(name, BUILT_IN, CONFIG, _advice)


def check_path(path: str) -> None:
    """ModelError where a path can be no model; nothing is loaded, downloaded or built."""
    if path.startswith(PREFIX):
        _tiny_name(path)
    else:
        resolve(path)


def _advice(folder: Path) -> str:
    return "Give one that save_pretrained of a vision-language model of transformers wrote, with its processor."


def _tiny_name(path: str) -> str:
    from flowrl.vlm import tiny

    wanted, known = path.removeprefix(PREFIX), tiny.names()
    if wanted not in known:
        raise ModelError(
            f"model {path!r}: there is no such tiny vision-language model{nearest(wanted, known)}. "
            f"There are: {', '.join(PREFIX + each for each in known)}."
        )
    return wanted


def _tiny(name: str) -> Path:
    """A tiny model, built on first use in the cache folder; the same weights on every machine."""
    from flowrl.tiny import _text
    from flowrl.vlm import tiny

    wanted = _tiny_name(name)
    recipe = b"".join(Path(str(module.__file__)).read_bytes() for module in (tiny, _text))
    digest = hashlib.sha256(version("transformers").encode() + recipe).hexdigest()[:12]
    target = cache_folder() / "tiny_vlm" / f"{wanted}-{digest}"
    if not (target / CONFIG).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # In one step from nothing to complete: another process may be building it too.
        with tempfile.TemporaryDirectory(dir=target.parent) as made, quiet():
            part = tiny.build(wanted, Path(made) / "model")
            try:
                part.rename(target)
            except OSError:
                if not (target / CONFIG).is_file():
                    shutil.rmtree(target, ignore_errors=True)
                    part.rename(target)
    return target


class ImageTextModel:
    """A vision-language model and its processor: prompts to inputs, inputs to states, states to log-probabilities.

    Modules stay in evaluation mode, so that no dropout parts what was sampled from what is trained.
    """

    components = ("model",)

    def __init__(
        self,
        network: Any,
        processor: Any,
        *,
        path: str = "",
        freeze_vision: bool = True,
        freeze_projector: bool | None = None,
        value_head: bool = False,
        allow: Sequence[str] = (),
    ) -> None:
        """`network` is a ...ForConditionalGeneration.

        freeze_vision      the vision tower does not learn; where the projector is a part of it, neither does that
        freeze_projector   what lies between the vision tower and the language model does not learn; None = as the tower
        value_head         a linear layer on the last states, zero at first, for methods with a critic
        allow              special tokens that an answer may have besides those that end it
        """
        self.trainable, self.processor, self.path = network, processor, path
        self.dtype: torch.dtype = network.dtype
        self.freeze_vision = freeze_vision
        self.freeze_projector = freeze_vision if freeze_projector is None else freeze_projector
        network.requires_grad_(False).eval()
        if value_head:
            network.value_head = nn.Linear(_text_config(network).hidden_size, 1)
            nn.init.zeros_(network.value_head.weight)
            nn.init.zeros_(network.value_head.bias)
            network.value_head.requires_grad_(False)
        self.tokenizer = processor.tokenizer
        self.ends = _ends(network, self.tokenizer, path)
        self.pad_id = self.ends[0]
        """Stands where there is no token: one that never is a picture's."""
        self.banned = _banned(network, processor, set(self.ends), allow, path)
        """Tokens that are never sampled and have no probability, int64 [k]."""
        self._softcap: float | None = getattr(_text_config(network), "final_logit_softcapping", None)
        self._checked = False
        self.forgets = False
        """Whether layers keep no activations while a graph is made; they then heed no cache."""

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        attention: str = "native", processor: Mapping[str, Any] | None = None,
        loading: Mapping[str, Any] | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """The model at `path`, from safetensors only, frozen; `options` are those of the constructor.

        `attention` is a kernel as transformers names it (eager, flash_attention_2, ...); native = torch's own.
        `processor` are arguments of AutoProcessor.from_pretrained (the size of pictures, say), `loading` of
        AutoModelForImageTextToText.from_pretrained. ModelError for what is no such model, or has no chat template.
        """
        source, name = resolve(path), str(path)
        kernel = {} if attention == "native" else {"attn_implementation": attention}
        with explained(name), quiet():
            import transformers

            auto: Any = transformers  # most of its functions have no types
            reader = auto.AutoProcessor.from_pretrained(source, **(processor or {}))
            _check_processor(reader, name)
            network = auto.AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **kernel, **(loading or {})
            )
        made = cls(network, reader, path=name, **options)
        made.to(device)
        return made

    # ------------------------------------------------------------------------------------ what learns

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.trainable.get_input_embeddings().weight.device
        return device

    def to(self, device: str | torch.device) -> Self:
        """Moves it."""
        self.trainable.to(device)
        return self

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Every linear layer of the language model."""
        return self.layers(None)

    def layers(self, targets: Sequence[str] | None) -> tuple[str, ...]:
        """Full names of linear layers that may learn, matched at their end; None: all of the language model.

        The layer that makes the logits is not among them. ModelError where nothing matches.
        """
        head = self.trainable.get_output_embeddings()
        names = {module: name for name, module in self.trainable.named_modules()}
        inside = self.trainable.get_decoder() if targets is None else self.trainable
        frozen = {id(parameter) for parameter in self._frozen()}
        found = [
            names[module]
            for module in inside.modules()
            if isinstance(module, nn.Linear) and module is not head and id(module.weight) not in frozen
        ]
        if targets is not None:
            found = [name for name in found if any(f".{name}".endswith(f".{target}") for target in targets)]
        if not found:
            raise ModelError(
                f"lora.targets: no linear layer of {self.path!r} that may learn is called {', '.join(targets or ())}. "
                "Give names as the network has them (q_proj, ...), or null for all of the language model."
            )
        return tuple(found)

    def choose_trained(self, lora: bool) -> None:
        """Leaves out what is frozen, once a policy has set what learns; the value head always does."""
        for parameter in [] if lora else self._frozen():
            parameter.requires_grad_(False)
        if self.value_head is not None:
            self.value_head.requires_grad_(True)

    @property
    def value_head(self) -> nn.Linear | None:
        """The layer that expects a reward, if the model was loaded with one."""
        return getattr(self.trainable, "value_head", None)

    def _frozen(self) -> list[nn.Parameter]:
        """Parameters that never learn: of the vision tower, and of what joins it to the language model."""
        network = self.trainable
        tower = network.get_encoder(modality="image")
        vision = set() if tower is network else set(tower.parameters())
        language = {*network.get_decoder().parameters(), *network.get_output_embeddings().parameters()}
        joints = set(network.parameters()) - vision - language
        if self.value_head is not None:
            joints -= set(self.value_head.parameters())
        return [*(vision if self.freeze_vision else ()), *(joints if self.freeze_projector else ())]

    def enable_gradient_checkpointing(self) -> None:
        """Layers keep no activations while a graph is made; they are computed again in the backward pass."""
        self.forgets = True
        options = {"use_reentrant": False}
        if hasattr(self.trainable, "activation_checkpointing_enable"):
            self.trainable.activation_checkpointing_enable(options)
        else:  # transformers before 5.20
            self.trainable.gradient_checkpointing_enable(options)

    # ------------------------------------------------------------------------------------ what it reads and writes

    def prepare(self, messages: Sequence[Message], solution: str | None = None) -> Inputs:
        """A prompt, processed alone; an answer is to follow.

        ModelError where a text holds a control token, where there are videos and the model takes none, or where the
        solution holds tokens that an answer cannot have.
        """
        for text in _texts(messages):
            self._refuse_control(text)
        talk = [dict(message) for message in messages]  # transformers writes into them
        with explained(self.path):
            processed = self.processor.apply_chat_template(
                talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                **self._video_options(messages),
            )  # fmt: skip
        inputs = split(processed)
        gold = None if solution is None else torch.tensor([*self._writable(solution), self.ends[0]])
        return Inputs(ids=inputs.ids, places=inputs.places, media=inputs.media, messages=tuple(messages), solution=gold)

    def _video_options(self, messages: Sequence[Message]) -> dict[str, Any]:
        """What the processor is told of videos: that their frames have been chosen, and their times."""
        videos = [part for part in _parts(messages) if part["type"] == "video"]
        if videos and getattr(self.processor, "video_processor", None) is None:
            raise ModelError(
                f"model {self.path!r} takes no videos: {type(self.processor).__name__} has nothing that prepares them. "
                "Give pictures in `images`, or take a model that has (Qwen2-VL and later, InternVL)."
            )
        told = [
            {"fps": part.get("fps", LISTED_FPS), "total_num_frames": count, "frames_indices": [*range(count)]}
            for part in videos
            for count in [len(part["video"])]
        ]
        return {"processor_kwargs": {"do_sample_frames": False, "video_metadata": told}} if told else {}

    def foreign(self, text: str = "", pictures: Sequence[Any] = (), template: str = "{images}{text}") -> Inputs:
        """Tokens of an answer that its model did not choose: a tool's text and pictures, set in a template.

        Control tokens that are written out in `text` are taken away; the template's are kept.
        """
        filled = template.replace("{images}", self.picture * len(pictures)).replace("{text}", self.harmless(text))
        if not pictures:
            return Inputs(ids=torch.tensor(self.encode(filled), dtype=torch.int64))
        with explained(self.path):
            return split(
                self.processor(text=[filled], images=[list(pictures)], add_special_tokens=False, return_tensors="pt")
            )

    @cached_property
    def picture(self) -> str:
        """What stands for a picture in text: what the chat template writes for one."""
        text = {"type": "text", "text": _MARK}
        one, none = (
            self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in ([{"type": "image"}, text], [text])
        )
        before, _, after = none.partition(_MARK)
        return str(one[len(before) : len(one) - len(_MARK + after)])

    def encode(self, text: str) -> list[int]:
        """Token numbers of text inside an answer."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """An answer's text, without the tokens that end it and those of pictures."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text: str = self.tokenizer.decode(numbers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def harmless(self, text: str) -> str:
        """Text without control tokens: what a tool says must not end a turn or ask for pictures."""
        before = None
        while before != text:  # what is left may be one again
            before, text = text, self._control.sub("", text)
        return text

    @cached_property
    def _control(self) -> re.Pattern[str]:
        known = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        known |= set(self.tokenizer.convert_ids_to_tokens(sorted(_media_ids(self.trainable, self.processor))))
        return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or "(?!)")

    def _writable(self, solution: str) -> list[int]:
        """The tokens of a worked answer; ModelError where the model could not have written it."""
        ids, barred = self.encode(solution), {*self.banned.tolist(), *self.ends}
        if barred.isdisjoint(ids):
            return ids
        words = [word for word in solution.split() if not barred.isdisjoint(self.encode(word))]
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(barred.intersection(ids)))
        raise ModelError(
            f"model {self.path!r}: the solution {solution[:60]!r} cannot be learnt: {', '.join(words[:5]) or 'a part'} "
            f"is read as {', '.join(tokens)}, which an answer never has: a control token, or one for unknown words. "
            "Write it in words that the tokenizer knows, or leave the row's `solution` out."
        )

    def _refuse_control(self, text: str) -> None:
        found = self._control.search(text)
        if found:
            raise ModelError(
                f"model {self.path!r}: a prompt's text has {found[0]!r} in it, which is read as a control token. Give "
                "pictures in `images`, and write the text in another way."
            )

    # ------------------------------------------------------------------------------------ what it computes

    def states(self, batch: Mapping[str, Tensor], cache: Any = None, use_cache: bool = False) -> tuple[Tensor, Any]:
        """The last states [N,L,H] of a batch of `collate`, before the layer that makes the logits; and the cache.

        What is most of the memory, [N,L,V], is never made: `logprobs` projects the places that matter.
        """
        batch = self._placed(batch)
        if not self._checked and cache is None:
            self._checked = True
            self._check_head(batch)
        network = self.trainable
        with self._autocast(), _captured(network.get_output_embeddings()) as seen, self._checkpointing():
            out = network(**batch, past_key_values=cache, use_cache=use_cache, return_dict=True)
        return seen[0], out.past_key_values

    def logprobs(self, states: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [M,V] of the tokens after `states` [M,H], fp32, at a temperature; of banned ones -inf."""
        logits = self._logits(states) / temperature
        return logits.index_fill(-1, self.banned.to(logits.device), -torch.inf).log_softmax(-1)

    def values(self, states: Tensor) -> Tensor:
        """What the value head expects, fp32 [...], at `states` [...,H]; ModelError without one."""
        if self.value_head is None:
            raise ModelError("the method asks for values, and the model was loaded without value_head=True.")
        with torch.autocast(states.device.type, enabled=False):
            value: Tensor = self.value_head(states.float())[..., 0]
        return value

    def positions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The position of each place, [N,L], or [3,N,L] where pictures have rows and columns too; 0 in padding.

        Given, not left to the model: it remembers those of the last batch, and counts padding where they are missing.
        """
        there = batch["attention_mask"]
        text = (there.cumsum(1) - 1).clamp(min=0)
        if not self.places_by:
            return text
        told = {name: value for name, value in batch.items() if name in self.places_by}
        if not any(name.endswith("grid_thw") for name in told):
            return text.expand(3, -1, -1)
        found: Tensor = self.trainable.base_model.get_rope_index(**told)[0]
        return found.masked_fill(there == 0, 0)

    @cached_property
    def places_by(self) -> frozenset[str]:
        """Arguments that positions depend on, where pictures have rows and columns; else none."""
        index = getattr(self.trainable.base_model, "get_rope_index", None)
        return frozenset() if index is None else frozenset(inspect.signature(index).parameters)

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device, pictures in the model's dtype, with positions."""
        placed = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
        if "position_ids" not in placed:
            placed["position_ids"] = self.positions(placed)
        return placed

    def _logits(self, states: Tensor) -> Tensor:
        with self._autocast():
            logits = self.trainable.get_output_embeddings()(states)
        logits = logits.float()
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """While a graph is made, lets layers forget their activations that are to, which they do in training mode.

        The mode of these layers alone: what is inside them, dropout too, stays in evaluation mode.
        """
        layers = [m for m in self.trainable.modules() if getattr(m, "gradient_checkpointing", False)]
        asked = torch.is_grad_enabled()
        for layer in layers:
            layer.training = asked
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @torch.no_grad()
    def _check_head(self, batch: Mapping[str, Tensor]) -> None:
        """ModelError unless the model's own logits are those of its last layer, which `logprobs` takes them for."""
        with self._autocast():
            own = self.trainable(**batch, use_cache=False, return_dict=True).logits[:, -1].float()
            with _captured(self.trainable.get_output_embeddings()) as seen:
                self.trainable(**batch, use_cache=False, return_dict=True)
        if not torch.allclose(self._logits(seen[0][:, -1]), own, rtol=1e-2, atol=1e-2):
            raise ModelError(
                f"model {self.path!r}: {type(self.trainable).__name__} makes its logits by more than a linear layer on "
                "the last states, which flowrl does not know how to follow. Take another model."
            )


@contextmanager
def _captured(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within it the layer that makes the logits keeps what it is given, and makes next to nothing of it."""
    seen: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        seen.append(states)
        return states[..., :1]

    head.forward = keep
    try:
        yield seen
    finally:
        del head.forward


def _text_config(network: Any) -> Any:
    return network.config.get_text_config()


def _parts(messages: Sequence[Message]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    yield from (part["text"] for part in _parts(messages) if part["type"] == "text")


# ------------------------------------------------------------------------------------------------ tokens


def _ends(network: Any, tokenizer: Any, path: str) -> list[int]:
    """Tokens that end an answer: those of the generation config, else the tokenizer's."""
    told = getattr(network.generation_config, "eos_token_id", None)
    told = tokenizer.eos_token_id if told is None else told
    ends = told if isinstance(told, Iterable) else [told]
    found = [int(end) for end in ends if end is not None]
    if not found:
        raise ModelError(
            f"model {path!r}: neither generation_config.json nor the tokenizer says which token ends an answer. Set "
            "eos_token_id in its generation_config.json."
        )
    return found


def _media_ids(network: Any, processor: Any) -> set[int]:
    """Tokens that stand for pictures, videos and sounds, and what is around them."""
    named = [
        *((name, getattr(processor, name, None)) for name in ("image_token_ids", "video_token_ids", "audio_token_ids")),
        *((name, value) for name, value in network.config.to_dict().items() if _MEDIA_IDS.search(name)),
    ]
    values = [value if isinstance(value, list) else [value] for _, value in named]
    return {item for value in values for item in value if isinstance(item, int) and item >= 0}


def _banned(network: Any, processor: Any, ends: set[int], allow: Sequence[str], path: str) -> Tensor:
    """Special tokens and those of pictures, but for the ends; and rows of the embedding that no token has.

    A sampled picture token would be taken for a picture that is missing, and the next forward pass would fail.
    """
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    wrong = [token for token in allow if token not in known]
    if wrong:
        raise ModelError(f"model {path!r}: allow: the tokenizer has no token {wrong[0]!r}. Check its spelling.")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    allowed = {known[token] for token in allow} - _media_ids(network, processor)
    rows = network.get_output_embeddings().weight.shape[0]
    unused = set(range(rows)) - set(known.values())
    banned = ((special | unused) - ends - allowed) | _media_ids(network, processor)
    return torch.tensor(sorted(i for i in banned if i < rows), dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ loading


def _check_processor(processor: Any, name: str) -> None:
    lacking = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if lacking:
        raise ModelError(
            f"model {name!r} has no {' and no '.join(lacking)} (found {type(processor).__name__}): it is no model that "
            "sees pictures, or its processor was not saved with it. Fetch it again with all of its files."
        )
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(
            f"model {name!r} has no chat template, so that nobody knows how it is asked. Take an instruction-tuned "
            "model, or put the chat_template.jinja of its kind into its folder."
        )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what transformers says of files and inputs that do not fit into what, why and how to go on."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:600]
        raise ModelError(
            f"model {name!r} cannot be read or used as a vision-language model: {reason} Give a folder, or hub id, of "
            "what AutoModelForImageTextToText reads, in safetensors and with its processor. Where files are missing, "
            "fetch them (`hf download`)."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars."""
    import transformers.utils

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pictures_of(messages: Sequence[Message]) -> list[Any]:
    """The pictures of messages and the frames of their videos, in their order."""
    shown = ([part["image"]] if part["type"] == "image" else part.get("video", ()) for part in _parts(messages))
    return [picture for pictures in shown for picture in pictures]


def with_pictures(messages: Sequence[Message], pictures: Iterable[Any]) -> tuple[Message, ...]:
    """The same messages with other pictures and frames, in their order."""
    given = iter(pictures)

    def other(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] == "video":
            return {**part, "video": [next(given) for _ in part["video"]]}
        return {**part, "image": next(given)} if part["type"] == "image" else part

    def content_of(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [other(part) for part in content]

    return tuple({**message, "content": content_of(message["content"])} for message in messages)
