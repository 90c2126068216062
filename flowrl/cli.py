"""The command line. Nothing heavy is imported before a command runs: `flowrl --help` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowrl.reward_cli import reward_app
from flowrl.vlm_cli import vlm_app

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fine-tune models that draw, and models that see and write, by RL."
)
config_app = typer.Typer(no_args_is_help=True, help="Look at configs without running them.")
shapes_app = typer.Typer(no_args_is_help=True, help="The built-in world: its scenes and its base model.")
app.add_typer(config_app, name="config")
app.add_typer(shapes_app, name="shapes")
pairs_app = typer.Typer(no_args_is_help=True, help="Pairs of samples to learn preferences from: make and look at them.")
app.add_typer(pairs_app, name="pairs")
app.add_typer(reward_app, name="reward")
app.add_typer(vlm_app, name="vlm")
console = Console()

ConfigPath = Annotated[Path, typer.Argument(help="A YAML config, e.g. configs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, e.g. seed=3 algorithm.clip_range=1e-4.")]
Guides = Annotated[
    list[str] | None,
    typer.Option("--guide", help="FOLDER=WEIGHT of a latent reward (flowrl reward train-latent); may be repeated."),
]
GuideRange = Annotated[
    tuple[float, float], typer.Option(help="Times at which guides pull: lowest and highest; 0 = data, 1 = noise.")
]

GuideCap = Annotated[
    float | None,
    typer.Option(help="Longest pull of guides, as a share of the velocity's norm; default: no limit.", min=0.001),
]


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence, not in a traceback (FLOWRL_TRACEBACK=1 shows it)."""
    try:
        app()
    except Exception as error:
        if os.environ.get("FLOWRL_TRACEBACK") == "1" or not _is_for_people(error):
            raise
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _is_for_people(error: Exception) -> bool:
    """Errors of ours say what, where and how to mend it; anything else is a bug and keeps its traceback."""
    return type(error).__module__.partition(".")[0] in ("flowrl", "rewards", "samplers") or isinstance(error, OSError)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest valid checkpoint of the output folder.")] = False,
    smoke: Annotated[
        bool,
        typer.Option(help="Only try it: two tiny iterations, saved, resumed and exported, in a folder of its own."),
    ] = False,
) -> None:
    """Train. Ctrl-C finishes the iteration, saves and exits."""
    if smoke:
        from flowrl.smoke import smoke as try_it

        _checked(config, overrides)
        try_it(config, overrides or [], lambda line: console.print(line, highlight=False))
        return
    loaded = _checked(config, overrides)
    from flowrl.train import Trainer

    trainer = Trainer(loaded, resume=resume)
    if trainer.main:
        _print_plan(trainer)
    trainer.run()


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(help="Processes, one a device.", min=1)] = 1,
    memory: Annotated[
        float | None, typer.Option(help="GiB of one device: what to change where it is too little.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Peak of one device; default: measured here, on a matmul.")
    ] = None,
) -> None:
    """Show what a run would do and cost, memory and time included, without starting it: no weights are read."""
    loaded = _checked(config, overrides)
    from flowrl.resolve import resolve

    table, lines = resolve(loaded.actor, "flowrl").forecast(loaded, devices, tflops, memory)
    _print_table(loaded.name, table)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    num_samples: Annotated[int | None, typer.Option(help="How many held-out samples; default as in the run.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps; default as in the run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise; default as in the run.")] = None,
    base: Annotated[bool, typer.Option(help="Evaluate the base model too, for comparison.")] = True,
    guide: Guides = None,
    guide_range: GuideRange = (0.0, 1.0),
    guide_cap: GuideCap = None,
) -> None:
    """Score a run's exported weights, and the base model, on the held-out prompts."""
    from flowrl.standalone import evaluate_run

    evaluate_run(
        run, num_samples=num_samples, num_steps=num_steps, seed=seed, with_base=base, console=console,
        guides=guide or [], t_range=guide_range, max_ratio=guide_cap,
    )  # fmt: skip


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    model: Annotated[str, typer.Option(help="Built-in name, folder or hub id; default: of --from, else shapes.")] = "",
    from_: Annotated[Path | None, typer.Option("--from", help="A run, or its weights folder.")] = None,
    count: Annotated[int, typer.Option(help="Samples a prompt.", min=1)] = 4,
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps; default: inference.json.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: inference.json.")] = None,
    tuned_share: Annotated[
        float, typer.Option(help="Share of the steps, noisiest first, by --from; the rest by its base.", min=0, max=1)
    ] = 1.0,
    guide: Guides = None,
    guide_range: GuideRange = (0.0, 1.0),
    guide_cap: GuideCap = None,
    source: Annotated[
        list[Path] | None, typer.Option(help="Source picture, where the model takes one; may be repeated.")
    ] = None,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="Picture or .mp4; default: sample.png, or sample.mp4 of a model of videos.")
    ] = None,
) -> None:
    """Draw prompts with a model, or with a run's weights on it, into one picture or video."""
    from flowrl.standalone import sample_grid

    written = sample_grid(
        prompts, model=model, weights=from_, count=count, num_steps=num_steps, guidance=guidance, seed=seed,
        output=output, tuned_share=tuned_share, guides=guide or [], t_range=guide_range, max_ratio=guide_cap,
        sources=source or [],
    )  # fmt: skip
    console.print(f"wrote {written}", soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder with a checkpoint.")],
    form: Annotated[
        Literal["diffusers", "peft", "comfyui", "merged", "full"] | None,
        typer.Option(
            "--format",
            help="A LoRA file or component, a PEFT folder, a ComfyUI file, a whole pipeline, or a whole model that "
            "writes; default: diffusers, or of a model that writes peft or full.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the weights go; default: RUN/export_FORMAT.")] = None,
    averaged: Annotated[bool, typer.Option(help="The averaged weights, where the run keeps an average.")] = True,
) -> None:
    """Write the weights of a run's newest checkpoint for diffusers, PEFT, ComfyUI or transformers, with code to use."""
    from flowrl.standalone import export_run

    console.print(f"wrote {export_run(run, output, averaged=averaged, form=form)}", soft_wrap=True)


@config_app.command("check")
def config_check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Say everything that is wrong with a config, or that nothing is."""
    from flowrl.config import check

    problems = check(config, overrides or [])
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(2)
    console.print(f"{config}: ok")
    from flowrl.config import load_config
    from flowrl.resolve import resolve

    loaded = load_config(config, overrides or [])
    for note in resolve(loaded.actor, "flowrl").notes(loaded):
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print a config with its bases and overrides merged and every default filled in."""
    from flowrl.config import dump, load_config

    print(dump(load_config(config, overrides or [])), end="")


@app.command()
def doctor(
    numerics: Annotated[bool, typer.Option(help="Also measure how far from 1 an untouched policy's ratio is.")] = True,
) -> None:
    """Versions, devices and extras: what to send with a bug report, and what to install for what is missing."""
    from flowrl.standalone import diagnose, ratio_rows

    table = Table("what")
    table.add_column("found", overflow="fold")
    table.add_column("advice", overflow="fold")
    for row in [*diagnose(), *(ratio_rows() if numerics else [])]:
        table.add_row(*(Text(cell) for cell in row))  # not markup: it would take the [ocr] of an advice for a style
    console.print(table)


@shapes_app.command("pretrain")
def shapes_pretrain(
    output: Annotated[Path, typer.Option(help="Folder of the finished pipeline; run again to continue after a stop.")],
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="Denoiser steps; default as for the shipped weights.")] = None,
    autoencoder_steps: Annotated[int | None, typer.Option(help="Autoencoder steps.")] = None,
    pool: Annotated[int | None, typer.Option(help="Scenes or clips to render.")] = None,
    video: Annotated[bool, typer.Option("--video", help="The world that moves, a Wan pipeline.")] = False,
    vlm: Annotated[
        bool, typer.Option("--vlm", help="A model that answers questions about the world, a LLaVA; --steps of sight.")
    ] = False,
) -> None:
    """Train the built-in base model from nothing (about an hour on two CPU cores); resumable."""
    if vlm:
        if video or autoencoder_steps is not None or pool is not None:
            raise typer.BadParameter("goes with --output, --seed and --steps alone", param_hint="--vlm")
        from flowrl.shapes import pretrain_vlm as eyes

        eyes.pretrain(output, eyes.Recipe(seed=seed) if steps is None else eyes.Recipe(seed=seed, sight_steps=steps))
        console.print(f"wrote {output}; try: flowrl vlm ask {output} 'how many things are there ?' picture.png")
        return
    world = importlib.import_module("flowrl.shapes.pretrain_video" if video else "flowrl.shapes.pretrain")
    given = {"denoiser_steps": steps, "autoencoder_steps": autoencoder_steps, "pool": pool}
    world.pretrain(output, world.Recipe(seed=seed, **{k: v for k, v in given.items() if v is not None}))
    example = "a red circle" + " moves left" * video
    console.print(f"wrote {output}; try: flowrl sample --model {output} '{example}'")


@shapes_app.command("meanflow")
def shapes_meanflow(
    output: Annotated[Path, typer.Option(help="Folder of the finished model; run again to continue after a stop.")],
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps; default as for the shipped weights.")] = None,
    trajectories: Annotated[int | None, typer.Option(help="Walks of the base model to learn from.")] = None,
) -> None:
    """Distil the built-in base model into a few-step generator (minutes on one CPU core); resumable."""
    from flowrl.shapes.meanflow import Recipe, train_meanflow

    given = {"steps": steps, "trajectories": trajectories}
    train_meanflow(output, Recipe(seed=seed, **{k: v for k, v in given.items() if v is not None}))
    console.print(f"wrote {output}; in a config: model: {{path: {output}, family: meanflow}}")


@shapes_app.command("train-scorer")
def shapes_train_scorer(
    output: Annotated[Path, typer.Option(help="Folder of the finished weights; run again to continue after a stop.")],
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps; default as for the shipped weights.")] = None,
) -> None:
    """Train the built-in scorer, the reward shapes_clip, from nothing (minutes); prints how often it is right."""
    from flowrl.shapes.scorer import Recipe, train_scorer

    for line in train_scorer(output, Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps)):
        print(line)
    console.print(f"wrote {output}; as a reward: {{use: shapes_clip, weights: {output}}}")


@shapes_app.command("draw")
def shapes_draw(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; default: some of each category.")] = None,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("scenes.png"),
) -> None:
    """Render true scenes of the built-in world (no model), to see what prompts ask for."""
    from flowrl.standalone import draw_scenes

    draw_scenes(prompts or [], seed, output)
    console.print(f"wrote {output}")


@reward_app.command("train-latent")
def reward_train_latent(
    config: ConfigPath,
    output: Annotated[Path, typer.Option(help="Folder of the finished reward.")],
    overrides: Overrides = None,
    reward: Annotated[str | None, typer.Option(help="Score to learn, such as shapes.strict; default: total.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Learn from a folder of pairs instead of own samples.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts to sample.", min=2)] = 128,
    samples_per_prompt: Annotated[int, typer.Option(help="Samples that are compared with each other.", min=2)] = 8,
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps; default as in evaluations.", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 300,
    blocks: Annotated[int, typer.Option(help="Blocks of the model that it begins with.", min=1)] = 2,
    objective: Annotated[str, typer.Option(help="bradley_terry (pairs), or mse (the reward's own values).")] = (
        "bradley_terry"
    ),
    lr: Annotated[float, typer.Option(help="Learning rate at the start; it falls linearly to 0.", min=0)] = 1e-3,
    seed: int = 0,
) -> None:
    """Train a small reward on noised latents of a config's model; `--guide` of sample and eval steers with it."""
    loaded = _checked(config, overrides)
    from flowrl.standalone import check_draws
    from flowrl.train_latent import train_latent

    check_draws(loaded, "Answers have no noised latents: verifiers are their rewards.")

    facts = train_latent(
        loaded, output, reward=reward, pairs=pairs, num_prompts=prompts, samples_per_prompt=samples_per_prompt,
        num_steps=num_steps, steps=steps, blocks=blocks, objective=objective, lr=lr, seed=seed,
    )  # fmt: skip
    for level, found in facts["pair_accuracy"].items():
        accuracy = "–" if found["accuracy"] is None else f"{found['accuracy']:.3f}"
        console.print(f"held-out pairs told apart at t = {level}: {accuracy} of {found['pairs']}", highlight=False)
    console.print(f"wrote {output}; try: flowrl sample --guide {output}=1 'a red circle'")


@pairs_app.command("make")
def pairs_make(
    config: ConfigPath,
    output: Annotated[Path, typer.Argument(help="Folder of the pairs; run again to continue after a stop.")],
    overrides: Overrides = None,
    num_prompts: Annotated[int | None, typer.Option(help="Prompts; default: each of data.prompts once.", min=1)] = None,
    samples_per_prompt: Annotated[int, typer.Option(help="Samples that are compared with each other.", min=2)] = 8,
    choose: Annotated[
        Literal["best_worst", "all", "margin"], typer.Option(help="One pair a prompt, all that differ, or by a margin.")
    ] = "best_worst",
    min_margin: Annotated[float, typer.Option(help="Rewards of a pair differ by more than this.", min=0)] = 0.0,
    from_: Annotated[Path | None, typer.Option("--from", help="A run, or its weights folder; default: base.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps; default as in evaluations.", min=1)] = None,
    seed: int = 0,
) -> None:
    """Sample a config's prompts, score them with its rewards, and store pairs of better and worse ones."""
    loaded = _checked(config, overrides)
    from flowrl.make_pairs import make_pairs
    from flowrl.standalone import check_draws

    check_draws(loaded, "Methods for pairs of answers, such as token_dpo, make theirs while they train.")

    summary = make_pairs(
        loaded, output, num_prompts=num_prompts, samples_per_prompt=samples_per_prompt, how=choose,
        min_margin=min_margin, weights=from_, num_steps=num_steps, seed=seed, console=console,
    )  # fmt: skip
    console.print(
        f"wrote {output}: {summary.pairs} pairs of {summary.prompts} prompts; without a pair: {summary.tied} tied (or "
        f"within --min-margin), {summary.unjudged} without verdicts ({summary.no_verdict} samples)", highlight=False,
    )  # fmt: skip


@pairs_app.command("show")
def pairs_show(folder: Annotated[Path, typer.Argument(help="A folder of pairs, or its pairs.jsonl.")]) -> None:
    """Check a folder of pairs, and say how many there are, how far apart, and what made them."""
    from flowrl.pairs import describe_pairs

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in describe_pairs(folder):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


@shapes_app.command("twins")
def shapes_twins(
    output: Annotated[Path, typer.Argument(help="Folder of the pairs.")],
    count: Annotated[int, typer.Option(help="Twins: two prompts that differ in one word.", min=1)] = 200,
    seed: int = 0,
) -> None:
    """Write twin prompts with true pictures, as pairs: what `inject` puts among the samples."""
    from flowrl.shapes.twins import write_twins

    write_twins(output, count, seed)
    console.print(f"wrote {output}: {2 * count} pairs")


@shapes_app.command("preferences")
def shapes_preferences(
    output: Annotated[Path, typer.Argument(help="Folder of the preferences.")],
    count: Annotated[int, typer.Option(help="Pairs of pictures, one of them right.", min=1)] = 400,
    seed: int = 0,
) -> None:
    """Write pairs of pictures of which one is better, and why: what `flowrl reward eval` measures rewards on."""
    from flowrl.shapes.preferences import write_preferences

    write_preferences(output, count, seed)
    console.print(f"wrote {output}; try: flowrl reward eval shapes shapes_clip ocr --data {output}")


def _checked(config: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    """The config, after everything that can be found wrong with it before weights are loaded."""
    from flowrl.config import ConfigError, check, load_config

    if problems := check(config, overrides or []):
        raise ConfigError(problems)
    return load_config(config, overrides or [])


def _print_plan(trainer) -> None:  # type: ignore[no-untyped-def]
    _print_table(trainer.config.name, trainer.actor.describe())


def _print_table(title: str, lines: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*line)
    console.print(table)
