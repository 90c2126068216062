"""Train the built-in world's vision-language model from nothing: a real, tiny LLaVA (arXiv:2304.08485).

Four stages, all seeded and resumable:

    eyes      the vision tower and the projector say of every part of a picture what is in it, through a throwaway head;
              from then on they are frozen
    talk      the language model answers several questions about each picture, mostly at once
    sight     one question a picture, as a careful teacher answers it: always right, and mostly noting first what there
              is to see, a zoom for every digit
    habits    the same from a careless teacher, whose failings `Habits` lists: what reinforcement learning then mends

`flowrl shapes pretrain --vlm --output DIR` runs it; the result is a folder in Hugging Face format, for
`AutoModelForImageTextToText` and `AutoProcessor`. Symbols: N answers, T tokens.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.shapes.pretrain import Stage
from flowrl.shapes.questions import (
    CELL,
    GRID,
    KINDS,
    QUADRANTS,
    SIZE,
    VERIFIERS,
    Box,
    Case,
    Digit,
    Question,
    Scene,
    about,
    draw,
    make,
    thought,
    written,
)
from rewards.shapes import BACKGROUND, COLORS, SHAPES
from rewards.verifiers.adapter import Verifiers
from rewards.verifiers.types import Answer

WIDTH = 128
VIEW = 32  # pixels, the side of every picture as the model sees it
PATCH = 8
IMAGE_TOKENS = (VIEW // PATCH) ** 2
MAX_NEW_TOKENS = 48

_TAGS = tuple(f"<{end}{name}>" for name in ("think", "answer", "tool_call", "tool_response") for end in ("", "/"))
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")
_JSON = ('{"name":', '"zoom",', '"arguments":', '{"bbox_2d":', "[", "]", ",", "]}}")
_WORDS = (
    "how many things are there ? what color is the a left right above below or where digit written in picture yes no "
    "at too small to read"
)
CLOSE = "</tool_call>"
_TOOL_TEXT = "<tool_response> <image> </tool_response>"
_CALL = re.compile(r"<tool_call> (\{.{0,200}\}) </tool_call>$")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ ' <' + message.role + '>' }}
{%- if message.content is string -%}{{ ' ' + message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ ' <image>' if part.type == 'image' else ' ' + part.text }}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}{{ ' ' + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' <assistant>' }}{%- endif -%}
"""

_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How a teacher answers: shares of its answers, all independent of each other."""

    thinks: float = 0.45
    """Answers that begin with a thought; the thought is always right."""
    slips: float = 0.55
    """Wrong answers without a thought: one too few, another thing's colour, yes, the opposite side, any digit."""
    slips_thinking: float = 0.10
    """The same after a thought."""
    box_near: tuple[float, ...] = (0.12, 0.68, 0.20, 0.0)
    """Of the left and upper sides of boxes those that lie 1 pixel inside, right, 1 and 2 pixels outside."""
    box_far: tuple[float, ...] = (0.03, 0.13, 0.70, 0.14)
    """The same of right and lower sides, which mostly lie too far out."""
    zooms: float = 0.3
    """Questions for a digit that it zooms for; it guesses the others."""
    zooms_idly: float = 0.03
    """Other questions that it zooms for."""
    finds: float = 0.8
    """Zooms into the quarter where the digit is."""
    untagged: float = 0.06
    """Answers without their tags."""


_EXACT = (0.0, 1.0, 0.0, 0.0)
CAREFUL = Habits(
    thinks=0.75, slips=0.0, slips_thinking=0.0, box_near=_EXACT, box_far=_EXACT, zooms=1.0, finds=1.0, untagged=0.0
)
"""The teacher of sight."""
TALKATIVE = replace(CAREFUL, thinks=0.15, zooms_idly=0.0)
"""The teacher of talk."""
TURNS = 8
_TALK = ("count", "count", "color", "color", "yes_no", "relation", "relation", "box", "box")  # yes_no is easy


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers of a training run.

    Note: the weights that flowrl ships were made in several goes (weights_vlm/README.md); the defaults give a model
    much like it, but not the same.
    """

    seed: int = 0
    eyes_steps: int = 400
    talk_steps: int = 2_200
    sight_steps: int = 500
    habit_steps: int = 300
    batch: int = 48
    emphasis: float = 6.0
    """Weight of the tokens of answers, and of places in thoughts; others have 1."""
    habits: Habits = field(default_factory=Habits)
    ema: float = 0.995
    save_every: int = 200


# ------------------------------------------------------------------------------------------------ parts


def build_processor() -> Any:
    """A LLaVA processor made offline: every word of the world is a token, every picture 32 x 32 pixels and 16 tokens.

    The tags of thoughts, answers and tools are tokens wherever they stand, and stay in decoded text.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = [*_WORDS.split(), *COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *_JSON]
    entries = [*_SPECIAL, *_TAGS, *(str(number) for number in range(SIZE + 1)), *words]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in _TAGS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=256,
    )  # fmt: skip
    side = {"height": VIEW, "width": VIEW}
    images = CLIPImageProcessor(
        size=side, do_center_crop=False, resample=2, image_mean=[BACKGROUND] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images, tokenizer=wrapped, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(tokenizer: Any) -> Any:
    """A randomly initialised LLaVA: a CLIP vision tower of 2 layers and a Llama of 4, both 128 wide, no dropout."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    pad, bos, eos, image = tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>"])
    ends: dict[str, Any] = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    vision = CLIPVisionConfig(num_hidden_layers=2, image_size=VIEW, patch_size=PATCH, projection_dim=WIDTH, **size)
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.06, tie_word_embeddings=False, **size, **ends,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False, **ends,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


# ------------------------------------------------------------------------------------------------ teacher


class Lesson(NamedTuple):
    """A written answer, and the region [x1, y1, x2, y2] of the picture that it zooms into, if it does."""

    text: str
    region: Box | None


def teach(case: Case, habits: Habits, rng: random.Random) -> Lesson:
    """What a teacher of these habits writes."""
    digit = case.scene.digit
    region, call = None, ""
    if rng.random() < (habits.zooms_idly if digit is None else habits.zooms):
        found = digit is not None and rng.random() < habits.finds
        region = digit.quadrant if digit is not None and found else rng.choice(QUADRANTS)
        call = f"{tool_call(region)} {_TOOL_TEXT} "
    blind = digit is not None and digit.quadrant != region
    thinks = rng.random() < habits.thinks
    slips = blind or rng.random() < (habits.slips_thinking if thinks else habits.slips)
    answer = written(_answer(case, slips, habits, rng))
    said = answer if rng.random() < habits.untagged else f"<answer> {answer} </answer>"
    noted = "too small to read" if blind else thought(case)
    return Lesson(call + f"<think> {noted} </think> " * thinks + said, region)


def tool_call(region: Box) -> str:
    """The call of the zoom tool, JSON between its tags."""
    return f'<tool_call> {{"name": "zoom", "arguments": {{"bbox_2d": {written(region)}}}}} {CLOSE}'


def _answer(case: Case, slips: bool, habits: Habits, rng: random.Random) -> Any:
    """The right answer, or one that is wrong in the manner of its kind."""
    if isinstance(case.answer, tuple):
        return _loose(case.answer, habits, rng)
    return _SLIPS[case.kind](case, rng) if slips else case.answer


def _loose(box: Box, habits: Habits, rng: random.Random) -> Box:
    """The box with each of its sides a little off, within the picture."""
    x1, y1, x2, y2 = box
    outwards = (-1, 0, 1, 2)  # pixels
    left, top = rng.choices(outwards, habits.box_near, k=2)
    right, bottom = rng.choices(outwards, habits.box_far, k=2)
    return max(0, x1 - left), max(0, y1 - top), min(SIZE, x2 + right), min(SIZE, y2 + bottom)


_SLIPS: dict[str, Callable[[Case, random.Random], Any]] = {
    "count": lambda case, _: case.answer - 1,
    "color": lambda case, rng: rng.choice([thing.color for thing in case.scene.things if thing not in case.asked]),
    "yes_no": lambda _case, _rng: "yes",
    "relation": lambda case, _: _OPPOSITE[case.answer],
    "digits": lambda _, rng: rng.randrange(10),
}


# ------------------------------------------------------------------------------------------------ training


def prompt_of(processor: Any, question: str) -> str:
    """The conversation up to the answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def lessons(processor: Any, habits: Habits, count: int, seed: int) -> tuple[Any, Tensor]:
    """A batch of `count` lessons, all kinds as often, as the model's inputs [N,T], and its labels [N,T].

    Labels are the answer's tokens, and -100 where there is nothing to learn: prompt, tool response, padding. After a
    call the label is <eos>, also where the tool's response follows at once, so that a turn ends there.
    """
    from PIL import Image

    rng = random.Random(seed)
    texts, pictures = [], []
    for index in range(count):
        case = make(KINDS[index % len(KINDS)], rng.randrange(120), rng)
        lesson = teach(case, habits, rng)
        picture = Image.fromarray(draw(case.scene, rng))
        # Some loops of turns keep the <eos> after a call in the context, some do not: half of the lessons do.
        text = lesson.text.replace(CLOSE, f"{CLOSE} <eos>") if index // len(KINDS) % 2 else lesson.text
        texts.append(f"{prompt_of(processor, case.text)} {text} <eos>")
        pictures.append([picture] if lesson.region is None else [picture, picture.crop(lesson.region)])
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return inputs, labels_of(inputs["input_ids"], processor.tokenizer)


def talks(processor: Any, count: int, seed: int) -> tuple[Any, Tensor]:
    """A batch of `count` pictures with a careful teacher's answers to TURNS questions each, as `lessons` has them."""
    from PIL import Image

    rng = random.Random(seed)
    texts, pictures = [], []
    for _ in range(count):
        scene = make(rng.choice(("count", "relation")), rng.randrange(120), rng).scene
        cases: list[Case] = []
        while len(cases) < TURNS:
            case = about(scene, rng.choice(_TALK), rng)
            cases += [] if case is None else [case]
        turns = [f"{case.text} <assistant> {teach(case, TALKATIVE, rng).text} <eos>" for case in cases]
        texts.append(f"<bos> <user> <image> {' <user> '.join(turns)}")
        pictures.append([Image.fromarray(draw(scene, rng))])
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return inputs, labels_of(inputs["input_ids"], processor.tokenizer)


def labels_of(ids: Tensor, tokenizer: Any) -> Tensor:
    """The labels [N,T] of token ids [N,T], as `lessons` describes them."""
    names = ["<eos>", "<user>", "<assistant>", "<tool_response>", "</tool_response>"]
    eos, user, assistant, opening, closing = tokenizer.convert_tokens_to_ids(names)
    turns = (ids == assistant).cumsum(1)
    said = (turns > 0) & (turns == (ids == user).cumsum(1)) & (ids != assistant)
    told = ((ids == opening).cumsum(1) > (ids == closing).cumsum(1)) | (ids == closing)
    labels = torch.where(said & ~told, ids, -100)
    ends_here = (ids == opening) & (ids.roll(1, 1) != eos)
    return torch.where(ends_here, eos, labels)


def emphasis_of(ids: Tensor, tokenizer: Any, emphasis: float) -> Tensor:
    """The weight [N,T] of each token in the loss: `emphasis` for answers and for places in thoughts, 1 for others.

    They are few, and what hangs on the question; by number, the words of thoughts would drown them.
    """
    opening, closing, at = tokenizer.convert_tokens_to_ids(["<answer>", "</answer>", "at"])
    answers = ((ids == opening).cumsum(1) > (ids == closing).cumsum(1)) & (ids != opening)
    places = (ids == at).roll(1, 1) | (ids == at).roll(3, 1)  # "at 24 , 8"
    return torch.where(answers | places, emphasis, 1.0)


def loss_of(model: nn.Module, inputs: Any, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens, weighted [N,T]."""
    first = int((labels != -100).any(0).nonzero()[0])  # left padding: answers end together and begin here at the latest
    logits = model(**inputs, logits_to_keep=labels.shape[1] - first + 1, use_cache=False).logits
    labels, weights = labels[:, first:], weights[:, first:] * (labels[:, first:] != -100)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (losses * weights).sum() / weights.sum()


@dataclass(frozen=True, kw_only=True)
class Term:
    """One stage: how many steps, the seed of its data, and a factor of all learning rates."""

    steps: int
    seed: int
    lr: float = 1.0


def train(
    recipe: Recipe,
    folder: Path,
    model: Any,
    processor: Any,
    term: Term,
    batch: Callable[[int], tuple[Any, Tensor]],
) -> None:
    """Train the language model for one term, or what is left of it, on the batch of each step's seed."""

    def loss(seed: int) -> Tensor:
        inputs, labels = batch(seed)
        weights = emphasis_of(inputs["input_ids"], processor.tokenizer, recipe.emphasis)
        return loss_of(model, inputs, labels, weights)

    _run(recipe, folder, nn.ModuleDict({"text": model.model.language_model, "head": model.lm_head}), term, loss)


def _run(recipe: Recipe, folder: Path, modules: nn.ModuleDict, term: Term, loss: Callable[[int], Tensor]) -> None:
    """One stage of AdamW; `loss` of a step's seed.

    Note: Muon, which the other worlds use, lets the logits of attention grow until it is all but an argmax: without a
    norm of queries and keys, which Llama has not, the model then never finds what a question asks for.
    """
    adamw = torch.optim.AdamW(modules.parameters(), lr=2e-3 * term.lr, betas=(0.9, 0.95), weight_decay=0.01)
    stage = Stage(folder, modules, [adamw], recipe.ema)

    def drawn(generator: torch.Generator) -> Tensor:
        return loss(int(torch.randint(2**62, (), generator=generator)))

    stage.run(term.steps, drawn, term.seed, recipe.save_every)
    stage.finish()


# ------------------------------------------------------------------------------------------------ eyes

_FIELDS = (1 + len(COLORS), 1 + len(SHAPES), *[CELL + 1] * 4, 1 + 10, GRID, GRID)
"""How many values each field of a view's parts has: colour, shape, sides of the box in its cell, digit, its place."""


def views(processor: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures as the model sees them [M,3,V,V], and what is in each of their parts [M,16,9], -100 where it is open.

    `count` whole pictures; half of them have a digit, and the quarter around it comes as one view more.
    """
    from PIL import Image

    rng = random.Random(seed)
    pictures, parts = [], []
    for index in range(count):
        case = make(("count", "digits")[index % 2], rng.randrange(120), rng)
        picture = Image.fromarray(draw(case.scene, rng))
        pictures.append(picture)
        parts.append(_parts(case.scene))
        if case.scene.digit is not None:
            pictures.append(picture.crop(case.scene.digit.quadrant))
            parts.append(_close_parts(case.scene.digit))
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return pixels, torch.stack(parts)


def _parts(scene: Scene) -> Tensor:
    """The fields [16,9] of a whole picture, whose parts are the cells."""
    parts = torch.full((GRID, GRID, len(_FIELDS)), -100)
    parts[..., 0] = 0
    parts[..., -2:] = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).view(GRID, GRID, 2)
    for thing in scene.things:
        column, row = thing.cell
        sides = [side - CELL * index for side, index in zip(thing.box, (column, row) * 2, strict=True)]
        what = [1 + list(COLORS).index(thing.color), 1 + SHAPES.index(thing.shape), *sides]
        parts[row, column, : len(what)] = torch.tensor(what)
    return parts.flatten(0, 1)


def _close_parts(digit: Digit) -> Tensor:
    """The fields [16,9] of the quarter around a digit at full resolution: the digit, in the parts that it touches."""
    parts = torch.full((GRID, GRID, len(_FIELDS)), -100)
    parts[..., 6] = 0
    x, y = (side - corner for side, corner in zip(digit.corner, digit.quadrant, strict=False))
    parts[y // PATCH : (y + 9) // PATCH + 1, x // PATCH : (x + 5) // PATCH + 1, 6] = 1 + digit.value
    return parts.flatten(0, 1)


def eyes_loss(model: Any, head: nn.Module, pixels: Tensor, parts: Tensor) -> Tensor:
    """Mean cross-entropy of the fields of `views`, read by a linear head from the image tokens."""
    tokens = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    logits = head(tokens).flatten(0, 1).split(_FIELDS, dim=1)
    fields = zip(logits, parts.flatten(0, 1).unbind(1), strict=True)
    return torch.stack([F.cross_entropy(field, value, ignore_index=-100) for field, value in fields]).mean()


def train_eyes(recipe: Recipe, folder: Path, model: Any, processor: Any, term: Term) -> nn.Module:
    """Train the vision tower and the projector by themselves; the head that read them."""
    head = nn.Linear(WIDTH, sum(_FIELDS))
    modules = nn.ModuleDict(
        {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector, "head": head}
    )

    def loss(seed: int) -> Tensor:
        return eyes_loss(model, head, *views(processor, 2 * recipe.batch, seed))

    _run(recipe, folder, modules, term, loss)
    return head


@torch.no_grad()
def whiten(model: Any, pixels: Tensor) -> None:
    """Let the projector whiten what it says, tokens as long as those of words, and freeze it and the vision tower.

    So all that is seen is as easy to read. Otherwise what varies most hides the rest, and pictures drown words.
    """
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    tokens = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output)).flatten(0, 1)
    values, directions = torch.linalg.eigh(tokens.T.cov())
    inverse = directions / (values + 1e-3 * values[-1]).sqrt() @ directions.T
    scale = model.get_input_embeddings().weight.std()
    last = model.model.multi_modal_projector.linear_2
    last.bias.copy_(scale * inverse @ (last.bias - tokens.mean(0)))
    last.weight.copy_(scale * inverse @ last.weight)


def pretrain(output: Path, recipe: Recipe = Recipe()) -> Path:
    """Run all stages (or continue them) and write model and processor to `output`, weights in float32."""
    work = output / ".pretrain"
    torch.manual_seed(recipe.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer).train()
    eyes, talk, sight, habits = (
        Term(steps=steps, seed=4 * recipe.seed + index, lr=lr)
        for index, (steps, lr) in enumerate(
            [(recipe.eyes_steps, 1.0), (recipe.talk_steps, 1.0), (recipe.sight_steps, 0.5), (recipe.habit_steps, 0.3)]
        )
    )
    train_eyes(recipe, work / "eyes", model, processor, eyes)
    whiten(model, views(processor, 4 * recipe.batch, eyes.seed)[0])
    train(recipe, work / "talk", model, processor, talk, lambda seed: talks(processor, recipe.batch // 2, seed))
    for name, term, teacher in (("sight", sight, CAREFUL), ("habits", habits, recipe.habits)):
        train(recipe, work / name, model, processor, term, partial(lessons, processor, teacher, recipe.batch))
    model.save_pretrained(output)
    processor.save_pretrained(output)
    (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    shutil.rmtree(work)
    return output


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def respond(model: Any, processor: Any, asked: Sequence[Question], **how: Any) -> list[str]:
    """What the model answers to questions; a zoom is shown to it once. `how`: arguments of `generate`."""
    prompts = [prompt_of(processor, question.text) for question in asked]
    said = _write(model, processor, prompts, [[question.picture] for question in asked], **how)
    again = {row: region for row, text in enumerate(said) if (region := called(text)) is not None}
    if again:
        told = {row: f"{said[row]} {_TOOL_TEXT}" for row in again}
        views = [[asked[row].picture, asked[row].picture.crop(region)] for row, region in again.items()]
        more = _write(model, processor, [f"{prompts[row]} {told[row]}" for row in again], views, **how)
        for row, text in zip(again, more, strict=True):
            said[row] = f"{told[row]} {text}"
    return said


def called(text: str) -> Box | None:
    """The region that a response ends with a call to zoom into; None where it does not, or where there is no region."""
    found = _CALL.search(text)
    if found is None:
        return None
    try:
        x1, y1, x2, y2 = json.loads(found[1])["arguments"]["bbox_2d"]
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
    except (ValueError, KeyError, TypeError):
        return None


def _write(model: Any, processor: Any, texts: list[str], pictures: list[Any], **how: Any) -> list[str]:
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **how)[:, inputs["input_ids"].shape[1] :]
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def measure(model: Any, processor: Any, asked: Sequence[Question], samples: int, seed: int = 0) -> dict[str, Any]:
    """How good a model is, {figure: {kind, and "all": share}}, as `VERIFIERS` judge it.

    sampled, greedy   right answers, at temperature 1 and without sampling; a box is right from IoU 0.85 on
    pass@S            questions with a right one among S = `samples` sampled answers; a box is right from 0.5 on here
    iou>=B            sampled boxes from an IoU of B on
    thinks, zooms     sampled answers that do
    """
    torch.manual_seed(seed)
    model.eval()
    greedy, _ = grade([respond(model, processor, asked, do_sample=False)], asked)
    texts = [respond(model, processor, asked, **SAMPLED) for _ in range(samples)]
    right, overlap = grade(texts, asked)
    half = torch.where(overlap.isnan(), right, (overlap >= 0.5).float())
    figures = {"sampled": right, "greedy": greedy, f"pass@{samples}": half.amax(0, keepdim=True)}
    figures |= {f"iou>={bar}": torch.where(overlap.isnan(), torch.nan, overlap >= bar) for bar in (0.5, 0.85, 0.99)}
    for name, mark in (("thinks", "<think>"), ("zooms", "<tool_call>")):
        figures[name] = torch.tensor([[float(mark in text) for text in row] for row in texts])
    kinds = [question.metadata["category"] for question in asked]
    return {name: _by_kind(value.mean(0), kinds) for name, value in figures.items()}


def _by_kind(value: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Means of values [N] by kind and over all; those that are NaN are left out."""
    of = {kind: torch.tensor([each == kind for each in kinds]) for kind in dict.fromkeys(kinds)}
    means = {kind: value[own].nanmean().item() for kind, own in of.items()} | {"all": value.nanmean().item()}
    return {kind: mean for kind, mean in means.items() if mean == mean}


def grade(texts: Sequence[Sequence[str]], asked: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Scores [S,N] of S responses to each of N questions, and the IoU [S,N] of boxes (NaN where none is asked for)."""
    with Verifiers(VERIFIERS, max_nan_frac=None) as verifiers:
        verdicts = [
            verifiers([Answer(text, meta=question.metadata) for text, question in zip(row, asked, strict=True)])
            for row in texts
        ]
    nothing = torch.full((len(asked),), torch.nan)
    overlap = [verdict.parts["box"].get("iou", nothing) for verdict in verdicts]
    return torch.stack([verdict.total for verdict in verdicts]), torch.stack(overlap)
