"""Questions about pictures: where they come from, how they are asked, and how hard they are.

    questions = load_questions("geometry3k/", fields={"prompt": "problem", "answer": "solution"}, system="Think first.")
    model.prepare(messages(questions[0]))

A question is a `Prompt`: its text, and metadata with `images` (paths, or PIL images), `answer`, and whatever else its
row has. Rows come from

    questions.jsonl     {"prompt": "...", "images": ["a.png"], "answer": 3, "data_source": "clevr", ...} a line
    a Hugging Face data set on the disk: a folder of `save_to_disk`, a folder of .parquet files, or one such file
    shapes_questions    the built-in world's questions

The text is the field `prompt`, else `problem`, else `question`; the pictures are `images`, else `image`: paths beside
the file, or the columns of a table that hold pictures, which are written into the cache folder once, by their content.
`<image>` in a text is where a picture stands; without it all of them stand in front. `videos` is a list of videos, each
the path of an .mp4, .gif or the like, or a list of pictures, its frames; `<video>` is where one stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.data import IMAGES, VIDEOS, DataError, prompt_row, read_lines, short
from flowrl.resolve import nearest
from flowrl.vlm.augment import SHUFFLED, out_of_order
from flowrl.vlm.rows import PICTURES, Row, first_of, images_of, read_rows, videos_of
from flowrl.vlm.videos import Clip, clip_of

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL.Image import Image

    from flowrl.types import Prompt

MARK = "<image>"
"""Where a picture stands in a text."""
VIDEO_MARK = "<video>"
"""Where a video stands in a text."""
FRAMES = "video_frames"
"""Metadata: how many frames of each of its videos are shown."""
_MOST_FRAMES = 8
SYSTEM = "system"
"""Metadata: the system message."""
BLANK = "blank"
"""Metadata, where options are dropped: whether this question lost them (`drop_options`)."""
_TEXTS = ("prompt", "problem", "question")


# ------------------------------------------------------------------------------------------------ from row to question


def load_questions(
    source: str | Path | Sequence[str | Mapping[str, Any]], split: str = "train", *,
    fields: Mapping[str, str | None] | None = None, template: str | None = None, system: str | None = None,
    drop_options: bool = False, video_frames: int = _MOST_FRAMES,
) -> list[Prompt]:  # fmt: skip
    """The questions of a source, numbered from 0 in its order; DataError names the file, the line and the mend.

    fields          {our name: the file's name} of fields that are called otherwise: {answer: solution}
    template        jinja text (or a .jinja file) that makes the prompt of a row: its fields by name, `prompt`, and
                    `options | lettered`, which lists them as "A. ..." lines; it runs in jinja's sandbox
    system          the system message of all questions
    drop_options    turn multiple choice into open questions, see `without_options`
    video_frames    frames of a video that are shown at most, evenly spaced
    """
    from flowrl.types import Prompt

    made = None if template is None else _template(template)
    prompts = []
    names = {ours: theirs for ours, theirs in dict(fields or {}).items() if theirs is not None}
    for number, row in enumerate(read_rows(source, split)):
        text, metadata = _question(row, names)
        if drop_options:
            text, metadata = without_options(row.place, text, metadata)
        if made is not None:
            text, _ = prompt_row(row.place, _rendered(made, row.place, text, metadata))
        _check_marks(row.place, text, metadata)
        metadata |= {} if system is None else {SYSTEM: system}
        metadata |= {FRAMES: video_frames} if VIDEOS in metadata else {}
        prompts.append(Prompt(id=number, text=text, metadata=metadata))
    if not prompts:
        raise DataError(f"{source} holds no questions; give at least one.")
    return prompts


def _question(row: Row, names: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    fields = _renamed(row, names)
    text = first_of(fields, _TEXTS)
    if text is None:
        near = nearest(_TEXTS[0], fields) or f"; it has {', '.join(fields) or 'nothing'}"
        raise DataError(f"{row.place}: none of the fields {', '.join(_TEXTS)}{near}. Name it: fields: {{prompt: ...}}.")
    column = first_of(fields, PICTURES)
    shown = [] if column is None or fields[column] is None else images_of(row, column, fields[column])
    clips = {} if fields.get(VIDEOS) is None else {VIDEOS: videos_of(row, VIDEOS, fields[VIDEOS])}
    kept = {key: value for key, value in fields.items() if key not in (text, column, VIDEOS)}
    return prompt_row(row.place, fields[text], {**kept, IMAGES: shown, **clips})


def _renamed(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in names.items():
        if theirs not in row.fields:
            raise DataError(
                f"{row.place}: fields names {theirs!r} as {ours}, which is no field{nearest(theirs, row.fields)}; "
                f"there are {', '.join(row.fields) or 'none'}."
            )
    named = {ours: row.fields[theirs] for ours, theirs in names.items()}
    return named | {key: value for key, value in row.fields.items() if key not in named and key not in names.values()}


def _check_marks(place: str, text: str, metadata: Mapping[str, Any]) -> None:
    for mark, what, shown in (
        (MARK, "picture", len(metadata[IMAGES])), (VIDEO_MARK, "video", len(metadata.get(VIDEOS, ()))),
    ):  # fmt: skip
        marks = text.count(mark)
        if marks not in (0, shown):
            raise DataError(
                f"{place}: {marks} times {mark} in the text, and {shown} {what}s; write it once a {what}, or leave it "
                "out: then they stand in front."
            )


# ------------------------------------------------------------------------------------------------ how it is asked


def messages(prompt: Prompt, shown: Sequence[Image] | None = None) -> list[dict[str, Any]]:
    """The chat that asks a question, as `ImageTextModel.prepare` and a processor's chat template read it.

    `shown` are other pictures than its own, as many: distorted ones.
    """
    media: dict[str, list[dict[str, Any]]] = {
        VIDEO_MARK: [{"type": "video", "video": clip.frames, "fps": clip.fps} for clip in clips(prompt)],
        MARK: [{"type": "image", "image": image} for image in (pictures(prompt) if shown is None else shown)],
    }
    pieces = re.split(f"({MARK}|{VIDEO_MARK})", prompt.text)
    content = [part for mark, parts in media.items() if mark not in pieces for part in parts]
    for piece in pieces:
        content += [media[piece].pop(0)] if media.get(piece) else _said(piece)
    system = prompt.metadata.get(SYSTEM)
    before = [] if system is None else [{"role": "system", "content": _said(system)}]
    return [*before, {"role": "user", "content": content}]


def _said(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text.strip() else []


def pictures(prompt: Prompt) -> list[Image]:
    """A question's pictures, RGB, turned as their EXIF data say and on white where transparent; read anew each time."""
    return [_opened(f"prompt {prompt.id}: images", image) for image in prompt.metadata.get(IMAGES, ())]


def clips(prompt: Prompt) -> list[Clip]:
    """What is shown of a question's videos; read anew each time."""
    place, most = f"prompt {prompt.id}: {VIDEOS}", prompt.metadata.get(FRAMES, _MOST_FRAMES)
    found = [
        clip_of(place, video, most, lambda frame: _opened(place, frame)) for video in prompt.metadata.get(VIDEOS, ())
    ]
    seed = prompt.metadata.get(SHUFFLED)
    if seed is None:
        return found
    return [clip._replace(frames=out_of_order(clip.frames, seed, number)) for number, clip in enumerate(found)]


def _opened(place: str, image: Any) -> Image:
    from rewards.folder import picture
    from rewards.media import from_pil, to_pil

    if not isinstance(image, str):
        return to_pil(from_pil(image))
    try:
        return to_pil(picture(Path(image).read_bytes()))
    except Exception as error:  # PIL raises what it likes about damaged files
        raise DataError(
            f"{place}: {image} cannot be read ({error}). Replace the file, or take its line out; a run that it stopped "
            "goes on with --resume if the file was replaced."
        ) from error


def lettered(options: Sequence[Any] | Mapping[str, Any] | None) -> str:
    """Options as lines `A. red`; their own letters where they have some."""
    return "\n".join(f"{letter}. {text}" for letter, text in _options(options))


_LETTER = re.compile(r"\(?([A-Z])[.):]\)?\s+")


def _options(options: Sequence[Any] | Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(letter, text without it) of each option."""
    if isinstance(options, Mapping):
        return [(str(letter), str(options[letter]).strip()) for letter in sorted(options)]
    listed = [str(option).strip() for option in options or ()]
    return [(chr(ord("A") + place), _LETTER.sub("", text, count=1)) for place, text in enumerate(listed)]


def _template(given: str) -> Template:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    is_file = given.endswith((".jinja", ".j2"))
    if is_file and not Path(given).expanduser().is_file():
        raise DataError(f"template: there is no file {given!r}; looked for {Path(given).expanduser().absolute()}.")
    text = "\n".join(read_lines(Path(given).expanduser())) if is_file else given
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    environment.filters["lettered"] = lettered
    try:
        return environment.from_string(text)
    except TemplateError as error:
        line = getattr(error, "lineno", "?")
        raise DataError(f"template, line {line}: {error}; see jinja's syntax: {{{{ prompt }}}}.") from error


def _rendered(template: Template, place: str, text: str, metadata: Mapping[str, Any]) -> str:
    row = {"options": None, **metadata, "prompt": text}
    try:
        return template.render(**row, row=row)
    except Exception as error:  # a template is code: it may divide by zero
        unknown = next(iter(re.findall(r"'(\w+)' is undefined", str(error))), "")
        raise DataError(
            f"{place}: data.template fails: {type(error).__name__}: {error}{nearest(unknown, row)}. The row has "
            f"{', '.join(row)}; write {{% if NAME is defined %}} around a field that only some rows have."
        ) from error


# ------------------------------------------------------------------------------------------------ multiple choice

_REFERS = re.compile(r"\b(?:above|below|all of|none of|neither|both|either|options?|cannot be determined)\b", re.I)
_HEADER = re.compile(r"^[ \t]*(?:options|choices|answer choices)[ \t]*:?[ \t]*$", re.IGNORECASE | re.MULTILINE)
_ASKS_LETTER = re.compile(r"\b(?:letter|which of the following|one of the following)\b", re.IGNORECASE)


def without_options(place: str, text: str, metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A multiple choice question as an open one, so that guessing does not pay (GLM-4.5V; Ovis2.5, arXiv:2508.11737).

    `options` go, from the text as well, and the right one's text becomes the answer; `metadata["blank"]` is True. It is
    False, and nothing changes, where the question has no options or cannot be asked without them: one of them speaks
    about the others ("none of the above"), the question does, or the text lists them in a way that is not recognised.
    """
    options = _options(metadata.get("options"))
    closed = (text, {**metadata, BLANK: False})
    if not options:
        return closed
    answer = _right_text(place, str(metadata.get("answer", "")).strip(), options)
    bare = text
    for letter, option in options:
        listed = rf"(?:^|(?<=\s))\(?{re.escape(letter)}[.):]\)?[ \t]*{re.escape(option)}(?=[\s,;]|$)[ \t,;]*"
        bare = re.sub(listed, "", bare)
    bare = re.sub(r"\n\s*\n+", "\n", _HEADER.sub("", bare)).strip()
    refers = any(_REFERS.search(option) for _, option in options) or _ASKS_LETTER.search(bare)
    if refers or not bare or re.search(r"(?:^|\s)\(?[AB][.):]\)?\s", bare):
        return closed
    kept = {key: value for key, value in metadata.items() if key != "options"}
    return bare, {**kept, "answer": answer, BLANK: True}


def _right_text(place: str, answer: str, options: Sequence[tuple[str, str]]) -> str:
    letter = re.fullmatch(r"\(?([A-Za-z])[.):]?\)?", answer)
    by_letter = [text for key, text in options if letter and key == letter[1].upper()]
    by_text = [text for _, text in options if text.casefold() == _LETTER.sub("", answer, count=1).casefold()]
    found = by_text or by_letter
    if not found:
        raise DataError(f"{place}: the answer {short(answer)} is none of the options {[text for _, text in options]}.")
    return found[0]
