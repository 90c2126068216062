"""What the command line does apart from training: evaluate, sample, export, diagnose."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl import checkpoint
from flowrl.actor import Actor
from flowrl.collect import Conditions, Geometry, Guidance, sample
from flowrl.config import Config, load_config
from flowrl.data import BUILT_IN, SOURCE
from flowrl.engine import connect, default_device
from flowrl.evaluate import Evaluation, mean_and_error, paired_gain
from flowrl.latent_reward import LatentReward, guided_by
from flowrl.media import load_model
from flowrl.models.pipeline import INDEX, INFERENCE, LORA_WEIGHTS, load, read_json
from flowrl.policy import Policy, load_weights
from flowrl.report import save_grid
from flowrl.resolve import resolve
from flowrl.tiny import PREFIX
from flowrl.types import Prompt

if TYPE_CHECKING:
    from rich.console import Console


VIDEO = ".mp4"


class RunError(ValueError):
    """A run folder lacks what a command needs."""


def run_config(run: Path) -> Config:
    """The config that a run was started with."""
    path = run / "config.yaml"
    if not path.is_file():
        raise RunError(f"{run} is not a run folder: it has no config.yaml. Give the output_dir of a `flowrl train`.")
    return load_config(path, [])


def weights_of(folder: Path) -> Path:
    """The exported weights of a run, or the folder itself when it is one."""
    for candidate in (folder / "weights", folder):
        if (candidate / "inference.json").is_file():
            return candidate
    raise RunError(
        f"{folder} has no exported weights (weights/inference.json). A run writes them when it ends; "
        f"for one that has not: flowrl export {folder} --output WEIGHTS"
    )


ASK = "Ask it something: flowrl vlm ask {model} 'How many circles are there?' picture.png{more}"


def _check_model_draws(path: str) -> None:
    """RunError for the path of a model that writes."""
    from flowrl.vlm import tiny as tiny_vlm
    from flowrl.vlm.model import BUILT_IN as WRITERS
    from flowrl.vlm.model import CONFIG

    folder = Path(path).expanduser()
    is_folder = bool(path) and (folder / CONFIG).is_file() and not (folder / INDEX).is_file()
    if is_folder or path in {*WRITERS, *(f"{PREFIX}{name}" for name in tiny_vlm.names())}:
        raise RunError(f"{path!r} is a model that writes; it draws nothing. {ASK.format(model=path, more='')}")


def _config_of(weights: Path) -> Config | None:
    """The config of the run that exported these weights, where they still lie in its folder."""
    return run_config(weights.parent) if (weights.parent / "config.yaml").is_file() else None


def guidance_of(
    guides: Sequence[str], model: Any, t_range: tuple[float, float], max_ratio: float | None
) -> Guidance | None:
    """The latent rewards that `--guide DIR=WEIGHT` names, as one guide; None without any."""
    found = []
    if not 0 <= t_range[0] < t_range[1] <= 1:
        raise RunError(f"--guide-range {t_range[0]:g} {t_range[1]:g}: expected 0 <= lowest < highest <= 1.")
    for guide in guides:
        folder, _, weight = guide.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            folder, value = "", 0.0
        if not folder:
            raise RunError(f"--guide {guide!r}: expected FOLDER=WEIGHT, for example latent/shapes=0.5.")
        found.append((LatentReward.load(folder, model), value))
    return guided_by(found, t_range=t_range, max_ratio=max_ratio) if found else None


def evaluate_run(
    run: Path, *, num_samples: int | None, num_steps: int | None, seed: int | None, with_base: bool, console: Console,
    guides: Sequence[str] = (), t_range: tuple[float, float] = (0.0, 1.0), max_ratio: float | None = None,
) -> dict[str, Evaluation]:  # fmt: skip
    """Score a run's weights (and the base model, on the same prompts and noise), and print the table.

    With `guides` (FOLDER=WEIGHT) the run's weights are scored once more, guided by these latent rewards.
    """
    config, weights = run_config(run), weights_of(run)
    actor = actor_of(config, {"num_samples": num_samples, "num_steps": num_steps, "seed": seed})
    if (num_steps or guides) and not actor.denoises:
        raise RunError(f"{run} trained a model that writes, which takes no steps: leave --num-steps and --guide out.")
    console.print(f"scoring {weights}{' and its base model' if with_base else ''} ...", highlight=False)
    found: dict[str, Evaluation] = {}
    try:
        for name in [*(["base"] if with_base else []), "tuned", *(["guided"] if guides else [])]:
            actor.load_finished(None if name == "base" else weights)
            if name == "guided":
                actor.guide = guidance_of(guides, actor.policy.model, t_range, max_ratio)
            found[name] = actor.evaluate()
    finally:
        actor.close()
    _print(found, console)
    return found


def actor_of(config: Config, evaluation: Mapping[str, Any] | None = None) -> Actor:
    """What makes the samples of a config, in this process; of `evaluation` what is not None replaces its settings."""
    given = {key: value for key, value in (evaluation or {}).items() if value is not None}
    settings = config.data.evaluation.model_copy(update=given)
    config = config.model_copy(update={"data": config.data.model_copy(update={"evaluation": settings})})
    actor: Actor = resolve(config.actor, "flowrl")(
        config, config.algorithm.build(), connect("local", config.engine.device)
    )
    return actor


def check_draws(config: Config, instead: str) -> None:
    """RunError for a config of a model that writes, where a command is about pictures; `instead` says what is not."""
    if not resolve(config.actor, "flowrl").denoises:
        raise RunError(f"{config.name!r} is about a model that writes, and this command is about pictures. {instead}")


def _print(found: dict[str, Evaluation], console: Console) -> None:
    from rich.table import Table

    gain = {1: [], 2: ["gain"]}.get(len(found), [f"gain over {next(iter(found))}"])
    table = Table("score", *found, *gain)
    first, last = list(found.values())[0], list(found.values())[-1]
    for name in (n for n in last.scores if all(n in e.scores for e in found.values())):
        cells = [_cell(*mean_and_error(e.scores[name])) for e in found.values()]
        if len(found) > 1:
            cells.append(_cell(*paired_gain(first.scores[name], last.scores[name])))
        table.add_row(name, *cells)
    for name in (n for n in last.measures if all(n in e.measures for e in found.values())):
        table.add_row(name, *(_cell(*e.measures[name]) for e in found.values()))
    console.print(table)


def _cell(mean: float | None, error: float | None) -> str:
    return "–" if mean is None else f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


def sample_grid(
    prompts: Sequence[str], *, model: str, weights: Path | None, count: int, num_steps: int | None,
    guidance: float | None, seed: int, output: Path | None, tuned_share: float = 1.0, guides: Sequence[str] = (),
    t_range: tuple[float, float] = (0.0, 1.0), max_ratio: float | None = None, sources: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Draw every prompt `count` times into one picture, or of a model of videos into one video; returns its path.

    A video is an MP4 with a PNG that moves beside it, or that alone where PyAV is not installed.

    `tuned_share` in [0,1] of the steps, noisiest first and rounded to whole ones, go with `weights`, the rest with the
    base model. A second copy of the network is in memory only where the weights are a full export. `guides` are latent
    rewards, as FOLDER=WEIGHT, that guide the steps at times in `t_range`, with pulls of `max_ratio` |v| at most.
    `sources` are the source pictures of every prompt, for models that take them.
    """
    if tuned_share != 1 and weights is None:
        raise RunError(
            f"--tuned-share {tuned_share:g} divides the steps between tuned weights and their base model, but no "
            "weights are given: add --from RUN, or leave --tuned-share out."
        )
    exported = weights_of(weights) if weights else None
    _check_model_draws(model)
    loaded, settings = _as_trained(model, exported)
    target = _output(output, loaded)
    steps = num_steps or settings["num_inference_steps"]
    tuned_steps = round(tuned_share * steps)
    keep_base = exported is not None and tuned_steps < steps and not (exported / LORA_WEIGHTS).is_file()
    policy = Policy(
        loaded, frozen=True, guidance=settings[GUIDANCE] if guidance is None else guidance,
        device=default_device(), reference=keep_base,
    )  # fmt: skip
    if exported:
        load_weights(policy, exported)
    metadata = _sources(sources, loaded)
    wanted = [Prompt(id=i, text=t, metadata=metadata) for i, t in enumerate(p for p in prompts for _ in range(count))]
    media = sample(
        policy, wanted, range(len(wanted)), Conditions(encode=policy.encode, device=policy.device),
        Geometry(height=settings["height"], width=settings["width"], frames=settings.get("num_frames", 1)),
        num_steps=steps, seed=seed, tuned_steps=tuned_steps, guide=guidance_of(guides, loaded, t_range, max_ratio),
    )  # fmt: skip
    drawn = Evaluation(prompts=wanted, scores={}, measures={}, media=media)
    picture = target.with_suffix(".png") if target.suffix == VIDEO else target
    save_grid(drawn, picture, len(wanted), fps=getattr(loaded, "fps", None))
    return target


GUIDANCE = "guidance"
"""Key of classifier-free guidance in `_as_trained`'s settings, whatever the pipeline's call names it."""


def _as_trained(path: str, exported: Path | None) -> tuple[Any, dict[str, Any]]:
    """The model to draw with, and the settings: those of the weights' run, else of their folder, else the model's."""
    config = None if exported is None else _config_of(exported)
    if config is not None:
        check_draws(config, ASK.format(model=config.model.path, more=f" --from {exported}"))
    config = None if path else config
    own = (read_json(str(exported), INFERENCE, required=False) or {}) if exported else {}
    if config is None:
        loaded: Any = load(path or BUILT_IN, inference=own)
        return loaded, {**loaded.inference, GUIDANCE: loaded.guidance}
    loaded = load_model(config, default_device())
    return loaded, {**loaded.inference, **own, GUIDANCE: config.model.guidance}


def _output(given: Path | None, model: Any) -> Path:
    """Where the samples go; RunError for a video that a model of pictures cannot make, or nobody here can write."""
    if given is not None and given.suffix not in (".png", VIDEO):
        raise RunError(f"--output {given}: samples are written as .png, or as {VIDEO} of videos. Name one of them.")
    video, writes = getattr(model, "video", False), importlib.util.find_spec("av") is not None
    if given is not None and given.suffix == VIDEO and not (video and writes):
        reason = 'writing MP4 needs PyAV: pip install -e ".[video]"' if video else f"{model.path!r} makes pictures"
        raise RunError(f"--output {given}: {reason}. Or name a .png.")
    return given or Path("sample").with_suffix(VIDEO if video and writes else ".png")


def _sources(pictures: Sequence[Path], model: Any) -> dict[str, Any]:
    """Metadata of a prompt with these source pictures; RunError for more or fewer than the model takes."""
    fewest, most = getattr(model, "num_sources", (0, 0))
    if not fewest <= len(pictures) <= most:
        wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise RunError(
            f"{model.path!r} takes {wanted} source pictures, and {len(pictures)} are given: --source PICTURE gives one."
        )
    return {SOURCE: [str(picture) for picture in pictures]} if pictures else {}


def export_run(run: Path, output: Path | None, *, averaged: bool, form: str | None = None) -> Path:
    """The weights of the newest checkpoint, the best so far where the run keeps those, in one of the formats.

    Formats are those that the run's actor names, None: its usual one. Without `output` they go to RUN/export_FORMAT;
    returns the folder. The base model is loaded as it is on disk, so that a run with a quantised one needs no
    accelerator here, and is merged without loss.
    """
    config = run_config(run)
    forms = resolve(config.actor, "flowrl").forms(config)
    if form is not None and form not in forms:
        raise RunError(f"{run}: its weights cannot be written as {form!r}. Take --format {' or '.join(forms)}.")
    model = config.model.model_copy(update={"quantization": None})
    engine = config.engine.model_copy(update={"device": "cpu"})
    actor = actor_of(config.model_copy(update={"model": model, "engine": engine}))
    state = checkpoint.latest_valid(run / "checkpoints")
    part = "best." if any(k.startswith("best.") for k in state.tensors) else "policy."  # what the run itself exports
    tensors = {k.removeprefix(part): v for k, v in state.tensors.items() if k.startswith(part)}
    tensors = {k: v for k, v in tensors.items() if not k.startswith("old.")}  # follows the weights in training alone
    target = output or run / f"export_{form or forms[0]}"
    try:
        actor.load_checkpoint(tensors)
        actor.export(target, form=form, averaged=averaged)
    finally:
        actor.close()
    return target


def ratio_rows() -> list[tuple[str, str, str]]:
    """(what, found, advice) rows: how far the ratio of an untouched policy is from 1 here."""
    from flowrl.numerics import deviations

    advice = "deviation of the ratio before anything is learnt: keep algorithm.clip_range well above it"
    return [
        (f"ratio in {d.dtype}", f"off by {d.same_batch:.1e}; one sample at a time {d.one_by_one:.1e}",
         advice if d.dtype == "bfloat16" else "")
        for d in deviations(device=default_device())
    ]  # fmt: skip


def diagnose() -> list[tuple[str, str, str]]:
    """(what, found, advice) rows about this machine and installation."""
    rows = [("python", platform.python_version(), ""), ("platform", platform.platform(), "")]
    for package in ("flowrl", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors"):
        try:
            rows.append((package, version(package), ""))
        except PackageNotFoundError:
            rows.append((package, "missing", 'pip install -e "."'))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    rows.append(("device", str(accelerator or "cpu"), "" if accelerator else "CPU is enough for the built-in world"))
    rows.append(("threads", str(torch.get_num_threads()), ""))
    extras = {
        "ocr": "rapidocr", "video": "av", "quant": "torchao", "xformers": "xformers", "serve": "uvicorn",
        "data": "pyarrow", "vlm": "math_verify", "wandb": "wandb", "tensorboard": "tensorboard",
    }  # fmt: skip
    for extra, module in extras.items():
        found, advice = ("installed", "") if importlib.util.find_spec(module) else ("not installed", extra)
        rows.append((f"extra {extra}", found, advice and f'pip install -e ".[{extra}]"'))
    return rows


def draw_scenes(prompts: Sequence[str], seed: int, output: Path) -> None:
    """True scenes of the built-in world."""
    from flowrl.shapes import scenes
    from rewards.shapes import CATEGORIES, parse

    specs = [parse(p) for p in prompts]
    for prompt, spec in zip(prompts, specs, strict=True):
        if spec is None:
            example = "a red circle and a blue star"
            raise RunError(f"{prompt!r} is no sentence of the built-in world; it knows, for example, {example!r}.")
    chosen = [s for s in specs if s] or [
        s for c in CATEGORIES for s in [p for p in scenes.prompts("train") if p.category == c][:3]
    ]
    media = scenes.render(scenes.draw(chosen, seed))[:, None]
    wanted = [Prompt(id=i, text=s.prompt) for i, s in enumerate(chosen)]
    save_grid(Evaluation(prompts=wanted, scores={}, measures={}, media=media), output, len(wanted))
