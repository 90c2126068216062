"""`flowrl vlm`: models that see and write, apart from training them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

vlm_app = typer.Typer(no_args_is_help=True, help="Models that see and write: ask them, and grade questions by them.")
console = Console()

Weights = Annotated[Path | None, typer.Option("--from", help="A run, or its weights folder; default: the base model.")]


@vlm_app.command()
def ask(
    model: Annotated[str, typer.Argument(help="Built-in name (shapes_vlm), folder or hub id.")],
    question: Annotated[str, typer.Argument(help="In quotes; <image> in it is where a picture stands.")],
    pictures: Annotated[list[Path] | None, typer.Argument(help="Pictures that it is about.")] = None,
    from_: Weights = None,
    tool: Annotated[
        list[str] | None, typer.Option(help="zoom, calculator, ./file.py:attr; may be repeated; default: of --from.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of a turn; default: of --from, else 512.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 = the likeliest token each time.", min=0)] = 0.0,
    seed: int = 0,
) -> None:
    """Ask a model about pictures, or a run's weights on it as that run asks; with tools where they are named."""
    from flowrl.vlm.commands import ask as answer

    said = answer(
        model, question, pictures or [], weights=from_, tools=tool or [], max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, warn=_warn,
    )  # fmt: skip
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    Console(stderr=True).print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)


@vlm_app.command()
def grade(
    config: Annotated[Path, typer.Argument(help="A YAML config of a model that writes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .jsonl; run again to continue after a stop.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config.")] = None,
    answers: Annotated[int, typer.Option(help="Answers to each question.", min=1)] = 8,
    from_: Weights = None,
) -> None:
    """Answer a config's questions with its model, judge by its rewards, and write them again with how hard they are."""
    from flowrl.config import ConfigError, check, load_config
    from flowrl.vlm.commands import grade_questions

    changes = [*(overrides or []), "optimizer.warmup=0"]  # nothing is trained: no iterations are too few for it
    if problems := check(config, changes):
        raise ConfigError(problems)
    grade_questions(load_config(config, changes), output, answers=answers, weights=from_, console=console)
