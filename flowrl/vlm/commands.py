"""What is done with a model that writes apart from training it: asking it, and grading questions by it."""

from __future__ import annotations

import json
import math
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl.config import Config, GenerationConfig, ModelConfig, ToolsConfig, identity
from flowrl.data import DataError
from flowrl.engine import default_device
from flowrl.log import plain
from flowrl.make_pairs import digest
from flowrl.models.pipeline import ModelError
from flowrl.standalone import RunError, actor_of, run_config, weights_of
from flowrl.vlm.actor import EVALUATION, SOURCE, TextActor, answers_of, finished_of
from flowrl.vlm.data import MARK, load_questions
from flowrl.vlm.grading import Grade, grade, write_graded
from flowrl.vlm.model import ImageTextModel, resolve
from flowrl.vlm.rollout import Writer
from flowrl.weights import exported_weights

if TYPE_CHECKING:
    from rich.console import Console

_GRADING = -3
"""The iteration that keys the draws of graded answers."""
_MATTERS = ("model.", "rewards", "generation", "seed", "data.prompts", "data.fields", "data.template", "data.system",
            "data.drop_options", "data.passing")  # fmt: skip
_DOES_NOT = ("data.prompts_per_iteration",)
_BAR = 40
"""Characters of the longest bar of a histogram."""
_LINES = 20
"""Lines that tell how far it is."""
_FEW_WORDS = 200
"""Words of a vocabulary that is listed whole."""


# ------------------------------------------------------------------------------------------------ asking


def ask(
    model: str, question: str, pictures: Sequence[Path], *, weights: Path | None = None, tools: Sequence[str] = (),
    max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0,
    warn: Callable[[str], None] = warnings.warn,
) -> str:  # fmt: skip
    """One answer, what tools said included; temperature 0 takes the likeliest token each time.

    `weights` are a run's: it is asked as that run asks, with its system message, template, tools and forced answers.
    RunError where the run's model draws, or is another one than `model`. `warn` is told of words of the question that
    the model does not know.
    """
    config = None if weights is None else run_config(weights_of(weights).parent)
    if config is not None and config.generation is None:
        raise RunError(f"{weights} trained a model that draws: flowrl sample --from {weights} 'a red circle'.")
    if config is not None and not _same_model(model, config.model.path):
        again = ["flowrl", "vlm", "ask", config.model.path, question, *map(str, pictures), "--from", str(weights)]
        raise RunError(
            f"{weights} was trained on {config.model.path!r}, and its weights fit no other model than that, but "
            f"{model!r} is named. Name the run's: {shlex.join(again)}"
        )
    section = ModelConfig(path=model) if config is None else config.model.model_copy(update={"path": model})
    settings = (None if config is None else config.generation) or GenerationConfig()
    changes: dict[str, Any] = {"tools": ToolsConfig(use=tuple(tools))} if tools else {}
    changes |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    settings = settings.model_copy(update=changes)
    template, system = (None, None) if config is None else (config.data.template, config.data.system)
    row = {"prompt": question, "images": [str(picture) for picture in pictures]}
    (prompt,) = load_questions([row], template=template, system=system)
    policy = finished_of(section, settings, default_device(), weights and weights_of(weights))
    if text := unknown_words(policy.model, question, model):
        warn(text)
    written = Writer(policy, settings)(
        [prompt], [0], members=1, seed=seed, iteration=EVALUATION, temperature=temperature
    )
    tokens = written.tokens
    return policy.text(tokens.ids[0][tokens.present[0]])


def _same_model(named: str, trained: str) -> bool:
    """Whether two paths stand for one model; a run's whose folder is gone may have moved to the one that is named."""
    try:
        folder = resolve(trained)
    except ModelError:
        return True
    return Path(resolve(named)).resolve() == Path(folder).resolve()


def unknown_words(model: ImageTextModel, question: str, name: str) -> str | None:
    """A warning of the words that a tokenizer reads as its one token for what it does not know; None without any."""
    tokenizer = model.tokenizer
    asked = dict.fromkeys(question.replace(MARK, " ").split())
    unknown = [] if tokenizer.unk_token_id is None else [w for w in asked if tokenizer.unk_token_id in model.encode(w)]
    if not unknown:
        return None
    by_number = sorted((number, word) for word, number in tokenizer.get_vocab().items())
    words = [word for _, word in by_number if model.harmless(word)]  # not those that are control tokens
    listed = f": {' '.join(words)}" if len(words) <= _FEW_WORDS else ""
    return (
        f"{name} does not know {', '.join(map(repr, unknown))}, and reads each as {tokenizer.unk_token}. Write it in "
        "words that it knows, perhaps in small letters or with spaces around signs. It knows "
        f"{len(words)} words{listed}"
    )


# ------------------------------------------------------------------------------------------------ grading


def grade_questions(
    config: Config, output: Path, *, answers: int, weights: Path | None, console: Console
) -> dict[int, Grade]:
    """Let a model answer a config's training questions, and write their rows with `pass_rate` and `difficulty`.

    The model is the config's, with a run's `weights` or as it is. An answer is right from `data.passing` on. What is
    judged is kept in a file beside `output` until all is: after a stop the same arguments go on. DataError where there
    is an `output`, or the file is one of other arguments.
    """
    if config.generation is None:
        raise DataError(f"{config.name!r} trains a model that draws; give a config with a section `generation:`.")
    if output.exists():
        raise DataError(f"{output} is there already; give another name, or delete it.")
    actor = actor_of(config)
    assert isinstance(actor, TextActor)
    try:
        exported = exported_weights(weights) if weights else None
        journal = _Journal(output.with_name(f"{output.name}.part"), _arguments(config, actor, answers, exported))
        todo = [prompt for prompt in actor.prompts if prompt.id not in journal.rewards]
        if todo:
            actor.load_finished(exported)
        at_once = max(1, (config.generation.batch_size or config.data.evaluation.batch_size) // answers)
        for start in range(0, len(todo), at_once):
            chunk = todo[start : start + at_once]
            written = actor.writer(
                chunk, [prompt.id for prompt in chunk], members=answers, seed=config.seed, iteration=_GRADING
            )
            verdicts = actor.hub(answers_of(written, chunk, written.tokens.prompt), 1.0).total.view(-1, answers)
            journal.add({prompt.id: row for prompt, row in zip(chunk, verdicts.tolist(), strict=True)})
            before, done, total = len(journal.rewards) - len(chunk), len(journal.rewards), len(actor.prompts)
            if done * _LINES // total > before * _LINES // total:
                console.print(f"{done}/{total} questions", highlight=False)
    finally:
        actor.close()
    rewards = torch.tensor([value for row in journal.rewards.values() for value in row], dtype=torch.float64)
    number = torch.tensor(list(journal.rewards)).repeat_interleave(answers)
    grades = grade(rewards, number, threshold=config.data.bar)
    write_graded(config.data.prompts, grades, output, fields=config.data.fields)
    journal.path.unlink()
    sources = {prompt.id: str(prompt.metadata.get(SOURCE, "")) for prompt in actor.prompts}
    for line in histogram(grades, sources, answers):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"wrote {output}; in a config: data: {{prompts: {output}}}", soft_wrap=True, highlight=False)
    return grades


def histogram(grades: Mapping[int, Grade], sources: Mapping[int, str], answers: int) -> Iterator[str]:
    """How many questions have how many right answers, and the pass rate of each source, as lines of text.

    A question some of whose answers have no verdict counts where its pass rate is nearest; `sources` names all.
    """
    counts = Counter(round(found.pass_rate * answers) for found in grades.values())
    most = max(counts.values(), default=1)
    yield f"right of {answers}   questions"
    for right in range(answers + 1):
        bar = "█" * math.ceil(_BAR * counts[right] / most)
        yield f"{right:>{len(f'right of {answers}')}}   {counts[right]:>9}  {bar}".rstrip()
    if unjudged := len(sources) - len(grades):
        yield f"without a verdict: {unjudged}"
    names = sorted({sources[number] for number in grades})
    for name in names if len(names) > 1 else ():
        rates = [found.pass_rate for number, found in grades.items() if sources[number] == name]
        yield f"{name or 'no data_source'}: {len(rates)} questions, {math.fsum(rates) / len(rates):.1%} right"


def _arguments(config: Config, actor: TextActor, answers: int, weights: Path | None) -> dict[str, Any]:
    """What decides which answers are drawn and how they are judged."""
    known = {k: v for k, v in identity(config).items() if k.startswith(_MATTERS) and not k.startswith(_DOES_NOT)}
    told: dict[str, Any] = plain({
        **known, "data.prompts (contents)": actor.fingerprint(actor.prompts), "weights (contents)": digest(weights),
        "answers": answers,
    })  # fmt: skip
    return told


class _Journal:
    """What is judged so far, on the disk: a line of arguments, then one a question."""

    def __init__(self, path: Path, arguments: Mapping[str, Any]) -> None:
        """Starts one, or goes on with that of the same arguments, without what a broken line left."""
        self.path = path
        self.rewards: dict[int, list[float]] = {}
        """{question: the rewards of its answers}; NaN = no verdict."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.is_file() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        first, *rows = whole.decode().splitlines() or [""]
        if first:
            self._check(json.loads(first), dict(arguments))
        for row in map(json.loads, rows):
            self.rewards[row["question"]] = [math.nan if value is None else value for value in row["rewards"]]
        self._file = path.open("r+b" if path.is_file() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not first:
            self._write([dict(arguments)])

    def add(self, rewards: Mapping[int, Sequence[float]]) -> None:
        """Questions with their rewards, on the disk when this returns."""
        rows = {number: [None if math.isnan(value) else value for value in row] for number, row in rewards.items()}
        self._write([{"question": number, "rewards": row} for number, row in rows.items()])
        self.rewards |= {number: list(row) for number, row in rewards.items()}

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        other = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
        if other:
            listed = "; ".join(f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in other)
            raise DataError(
                f"{self.path} holds answers of other arguments: {listed}. Give those again to go on with them, give "
                "another output, or delete the file."
            )
