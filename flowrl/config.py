"""The config of a run: what may be set, what it means, and what is refused, before any weights are loaded.

    config = load_config("configs/quickstart.yaml", ["optimizer.lr=1e-4"])
    config.algorithm.build()          the algorithm's own record, from the rest of its section
    [entry.entry() for entry in config.rewards]          what `rewards.RewardHub` reads

Every section is frozen and refuses keys that it does not know. Importing this module does not import torch; checking a
config does, because an algorithm is asked about its own section.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from flowrl.configerrors import explain
from flowrl.configfile import ConfigError, Key, Source, dotted, dump_yaml, read_source
from flowrl.resolve import ResolveError, check_name, nearest, resolve

__all__ = [
    "AlgorithmConfig", "Config", "ConfigError", "DataConfig", "EngineConfig", "EvaluationConfig", "GateConfig",
    "LogConfig", "LoraConfig", "ModelConfig", "OptimizerConfig", "RewardEntry",
    "check", "diff", "dump", "identity", "load_config", "make_config",
]  # fmt: skip


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Share = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
Word = Annotated[str, Field(min_length=1)]
Pair = tuple[Number, Number]


class Section(BaseModel):
    """A part of the config: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class LoraConfig(Section):
    """Low-rank adapters instead of all weights; the frozen base then is the reference model too."""

    rank: Count = 32
    """Rank of the two factors; trainable parameters grow with it."""
    alpha: Positive = 64
    """The adapter is scaled by alpha / rank."""
    targets: tuple[Word, ...] | None = None
    """Names of the layers that get an adapter; null = the attention projections of the model family."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """First values of the down factor; the up factor starts at zero, so training starts at the base model."""


class ModelConfig(Section):
    """Which generator is trained, and at what size it generates."""

    path: Word
    """`shapes` (the built-in world), a folder in diffusers format, or a hub id such as owner/name."""
    family: Word | None = None
    """File in flowrl.models that knows the architecture (or ./file.py:Name); null = what model_index.json says."""
    lora: LoraConfig | None = None
    """null trains all weights."""
    freeze_vision: bool = True
    """Of a model that writes: what sees the pictures stays as it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward passes and frozen weights; log-probs, latents and what learns are float32 always.

    There is no float16: the gradients of this loss are so small that it would round them to 0.
    """
    guidance: Annotated[float, BeforeValidator(_no_bool), Field(ge=1)] = 1.0
    """Classifier-free guidance in rollout, training and evaluation; 1 = off, more than 1 doubles the calls."""
    height: Count | None = None
    """Pixels; null = the model's own default."""
    width: Count | None = None
    """Pixels; null = the model's own default."""
    frames: Count | None = None
    """Frames of a video; null = the model's own default, 1 for an image model."""
    fps: Positive | None = None
    """Frames per second that rewards and saved clips are told; null = those that the family was trained with."""
    embedded_guidance: NonNegative | None = None
    """Guidance that a distilled network takes as an input (FLUX.1-dev, HunyuanVideo); null = the pipeline's default."""
    negative_prompt: str | None = None
    """The other branch of classifier-free guidance; null = the empty prompt of the family."""
    inference: dict[str, Any] | None = None
    """Further arguments of the pipeline's call that a model asks for, such as {guidance_scale_2: 3.0} of Wan 2.2."""
    max_sequence_length: Natural | None = None
    """Tokens of a prompt; null = what the folder's inference.json says, else the pipeline's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time per trained step."""
    rollout_micro_batch: Count | None = None
    """Latents in one forward pass of a rollout; null = all of one step. Memory only, up to rounding."""
    decode_tiling: bool = False
    """Decode in overlapping tiles, where the VAE can: less memory for large pictures, and hardly visible seams."""
    decode_micro_batch: Count | None = None
    """Latents decoded at a time; null = as many as the rollout makes. Memory only, the result is the same."""
    attention: Word = "native"
    """Kernel of attention: native, xformers, flash, sage, flex or a name of diffusers; the run says what it got."""
    quantization: dict[Word, Literal["bnb_4bit", "bnb_8bit", "torchao_int8", "torchao_float8"]] | None = None
    """Frozen weights in fewer bits, by component, such as {transformer: bnb_4bit}; what learns must be LoRA."""
    layerwise_casting: bool = False
    """Frozen weights in float8 between their uses, which rounds them; LoRA, with gradient checkpointing."""
    offload: Literal["none", "group"] = "none"
    """`group`: frozen weights in main memory, fetched layer by layer; slow; LoRA, with gradient checkpointing."""
    offload_text_encoders: bool = False
    """Text encoders in main memory; they come to the device when new prompts are encoded."""
    offload_trajectory: bool = False
    """The rollout's states wait in main memory for the update."""
    compile: bool = False
    """Compile the network's repeated blocks: minutes at the start, faster steps later. Up to rounding the same."""


def _norm(value: Any) -> Any:
    """One message for a value that pydantic would describe once for each kind that it is not."""
    if value is None or value in ("none", "rank", "unit"):
        return value
    kind, pair = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else ("", ())
    if isinstance(pair, list | tuple) and [type(x) in (int, float) for x in pair] == [True, True]:
        if (kind == "unit" and pair[0] < pair[1]) or (kind == "affine" and pair[1] > 0):
            return value
    raise ValueError("should be none, rank, unit, {unit: [low, high]}, or {affine: [shift, scale]} with scale > 0")


Norm = Annotated[Literal["none", "rank", "unit"] | dict[Literal["unit", "affine"], Pair] | None, BeforeValidator(_norm)]


class GateConfig(Section):
    """A condition instead of a summand."""

    min: Number
    """Raw score below which the total is cut."""
    floor: Number = 0.0
    """What a total is cut to; a gate never raises a total."""


class RewardEntry(BaseModel):
    """One reward and how it enters the total; every key that is not listed here is an option of the reward itself."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    use: Word
    """Name in `rewards` (shapes, ocr, pixel.jpeg_size), package.module:attr, or ./file.py:attr."""
    name: Word | None = None
    """Key of its scores in logs; null = what `use` says. Needed when one reward is used twice."""
    weight: Number = 1.0
    """Factor in the total; 0 = computed and logged, not trained on."""
    norm: Annotated[
        Literal["none", "rank", "unit"] | dict[Literal["unit", "affine"], Pair] | None, BeforeValidator(_norm)
    ] = None
    """What happens to a score before its weight: none, rank, unit, {unit: [low, high]}, {affine: [shift, scale]}."""
    gate: GateConfig | None = None
    """{min, floor}: where the raw score is below `min`, the total is at most `floor`."""
    min_std: NonNegative = 0.0
    """Spread of a group's raw scores below which they count as equal: the reward's own noise teaches nothing."""
    on_error: Literal["nan", "raise"] = "nan"
    """When it fails on a sample: no verdict (the sample is not trained on), or stop. Never 0."""
    device: Word | None = None
    """Where it runs, such as cuda:1 or cpu; null = where the run runs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of its weights."""
    batch_size: Count | None = None
    """Samples scored at a time; null = all that come."""
    frames: Count = 4
    """How many frames of a video a reward for images sees."""
    offload: Literal["none", "cpu", "drop"] = "none"
    """Where its weights are between calls: on its device, in main memory (unless others share them), or read again."""
    cache: Natural = 0
    """Verdicts to remember, for rewards that are dear and deterministic."""

    @property
    def options(self) -> dict[str, Any]:
        """What the reward's constructor (or function) gets."""
        return dict(self.model_extra or {})

    def entry(self) -> dict[str, Any]:
        """The entry as `rewards.RewardHub` reads it."""
        return self.model_dump()


class EvaluationConfig(Section):
    """How often-compared figures are made: always the same prompts, noise and steps."""

    num_samples: Count = 600
    """Samples scored in one evaluation, spread evenly over the evaluation prompts."""
    num_steps: Count = 20
    """ODE steps of a sample; may be more than training takes."""
    batch_size: Count = 100
    """Samples generated at a time. Memory and speed only."""
    grid_prompts: Natural = 8
    """Pictures in the grid, one a prompt; 0 = no grid."""
    seed: Natural = 0
    """Seed of the evaluation's noise; apart from the run's, so that runs with other seeds can be compared."""
    headline: Word | None = None
    """Score that tables show first and by category, such as shapes.strict; null = the first reward."""
    keep: Literal["last", "best"] = "last"
    """Weights that are exported: the last, or those of the evaluation with the highest headline score."""
    patience: Count | None = None
    """The run ends after so many evaluations in a row that did not raise the best headline score; null = never."""
    measures: tuple[Word, ...] = ()
    """Numbers about the set of samples as a whole, as package.module:function or ./file.py:function."""


def _prompts(value: Any) -> Any:
    texts = isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
    if texts or (isinstance(value, str) and value):
        return value
    raise ValueError("should be `shapes`, the name of a .txt or .jsonl file, or a list of texts")


Prompts = Annotated[str | tuple[str, ...], BeforeValidator(_prompts)]


class FilterEntry(BaseModel):
    """One filter of groups or samples; every key that is not listed here is an option of the filter itself."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    use: Word
    """Name in flowrl.filters (informative, band, top_std, ...), package.module:attr, or ./file.py:attr."""

    def entry(self) -> dict[str, Any]:
        """The entry as `flowrl.filters` reads it."""
        return self.model_dump()


class ReplayConfig(Section):
    """Answers of earlier iterations in the places of those that teach nothing (SSB of Skywork R1V2)."""

    size: Count = 512
    """Answers that are remembered, those with an advantage only."""
    max_age: Count = 4
    """Iterations after which an answer is forgotten."""


class DataConfig(Section):
    """Prompts, and how many samples an iteration makes of them, on however many devices."""

    prompts: Prompts
    """`shapes` (built in), a .txt file (one a line), a .jsonl file ({"prompt": ..., ...}), or a list."""
    eval_prompts: Prompts | None = None
    """Prompts of the evaluation, same forms; null = the held-out prompts of `shapes`, else the training prompts."""
    prompts_per_iteration: Count = 12
    """P: groups in one iteration, all devices together."""
    samples: Literal["rollout", "stored"] = "rollout"
    """`stored`: samples and their rewards come from disk, as the prompts' rows name them (a folder of pairs)."""
    samples_per_prompt: Count = 12
    """K: samples of a group, compared with each other; 2 or more for a method with group advantages."""
    max_no_verdict: Share = 0.5
    """The run stops when a reward gives no verdict on more than this share of the samples, three iterations running."""
    balance: Word | None = None
    """Metadata key, such as `category`, whose values every iteration covers evenly; null = plain shuffling."""
    together: Word | None = None
    """Metadata key whose equal values make prompts come together and be one group for credit; null = each by itself."""
    curriculum: Word | dict[str, Any] | None = None
    """Which prompts are drawn more: learnable, easy_first, rlcs, greso, history_resampling, staged, package.module:a,
    ./file.py:a, or {use: ..., option: value}; null = all in turn."""
    history: Natural = 32
    """Rewards remembered of each prompt, best a few groups' worth; 0 = none."""
    filters: tuple[FilterEntry, ...] = ()
    """Which groups and samples are trained on, each filter after the other; () = all."""
    passing: Number = 0.5
    """Reward from which on a sample counts as right, for curricula and the figures of filters."""
    replay: ReplayConfig | None = None
    """Of a model that writes; null = each answer is trained on in its own iteration only."""
    max_tries: Count = 1
    """Rollouts of an iteration until prompts_per_iteration groups pass the filters; 1 = what is left is trained on."""
    on_dead_group: Word | None = None
    """What is done where all answers to a prompt are wrong, in the next try: hint, ...; null = nothing."""
    template: str | None = None
    """Jinja template of a question's text, from the columns of its row; null = the prompt itself."""
    system: str | None = None
    """System message of every conversation with a model that writes."""
    fields: dict[Word, Word] | None = None
    """Columns of questions that are called otherwise: {answer: solution} reads `answer` from `solution`."""
    video_frames: Count = 8
    """Frames that a model is shown of a question's video, evenly spaced; all, where it has fewer."""
    drop_options: bool = False
    """Multiple choice becomes an open question, where that is possible: nothing is won by guessing (Ovis2.5)."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Sizes of an evaluation."""

    @property
    def bar(self) -> float:
        """`passing`, less what float32 rounds off: weights of .65, .15 and .2 add up to a little under 1."""
        return self.passing - 1e-6


class ForcedAnswerConfig(Section):
    """What happens to an answer that is cut off while it thinks (GLM-4.1V): it is made to answer."""

    text: Word = " </think> <answer>"
    """Tokens that are put behind it; no loss is taken of them."""
    unless: Word = "</think>"
    """Answers that hold this text are left as they are."""
    tokens: Count = 32
    """How many more the model may write then."""


class ToolsConfig(Section):
    """Tools that a model may call while it answers; what they say is not trained on."""

    use: tuple[Word | dict[str, Any], ...]
    """zoom, calculator, package.module:attr, ./file.py:attr; or {use: zoom, option: value, ...}."""
    max_turns: Count = 2
    """Turns of the model, the last one included."""
    timeout: Positive = 10.0
    """Seconds that a call may take."""
    response: Word = " <tool_response> {images}{text} </tool_response> "
    """What is put behind a call; {images} and {text} are the tool's."""


class ServerConfig(Section):
    """A server that makes the answers instead (vLLM's OpenAI-compatible API); see algorithm.correction."""

    url: Word
    """Its address, such as http://127.0.0.1:8000/v1."""
    model: Word | None = None
    """The name that it serves the model under; null = its first."""
    timeout: Positive = 600.0
    """Seconds that a request may take."""
    concurrency: Count = 8
    """Requests at a time."""


class NoisyConfig(Section):
    """Distorted pictures in a part of the rollouts (NoisyRollout, arXiv:2504.13055)."""

    share: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)] = 0.5
    """Of a group's answers, those that see the distorted picture; the update shows all of them the clean one."""
    strength: NonNegative = 0.5
    """Of the distortion at the start; it falls along the run: std of pixels in [0, 1], or radius or margin in sides."""
    kind: Literal["noise", "blur", "crop"] = "noise"
    """What is done to the picture."""
    midpoint: Share = 2 / 3
    """Share of the run after which half of the strength is left."""
    steepness: Positive = 30.0
    """How suddenly it falls."""


def _sampled(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        raise ValueError("should be above 0, since likeliest answers are all alike; evaluation_temperature may be 0")
    return _no_bool(value)


class GenerationConfig(Section):
    """How a model that writes is sampled; a config with this section trains one."""

    max_new_tokens: Count = 512
    """Tokens of a turn; longer answers are cut off, and known to be."""
    temperature: Annotated[float, BeforeValidator(_sampled), Field(gt=0)] = 1.0
    """Of sampling and of the log-probs. There is no top_p or top_k: with them log-probs would not be those sampled."""
    batch_size: Count | None = None
    """Answers written at a time; null = all. Memory and speed only, up to rounding."""
    forced_answer: ForcedAnswerConfig | None = None
    """null = answers that are cut off stay so."""
    tools: ToolsConfig | None = None
    """null = one turn."""
    server: ServerConfig | None = None
    """null = the policy writes its answers itself."""
    noisy: NoisyConfig | None = None
    """null = all answers see the picture as it is."""
    evaluation_temperature: NonNegative | None = None
    """Of evaluations; 0 = the likeliest token each time, null = as in training."""


class OptimizerConfig(Section):
    """AdamW and its schedule; an update is one optimiser step."""

    lr: Positive = 1e-4
    """Peak learning rate; LoRA usually wants 3 to 10 times that of full fine-tuning."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, a share of lr per update."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null = never."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up, over all updates of the run."""
    warmup: Natural = 0
    """Updates over which the learning rate rises from 0."""
    min_lr_ratio: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)] = 0.0
    """Last learning rate as a share of lr; for linear and cosine."""
    updates_per_iteration: Count = 1
    """Optimiser steps made of one rollout; the first is on policy, the rest rely on the clipped ratio."""
    update: Literal["auto", "single_pass", "recompute"] = "auto"
    """`single_pass` keeps the rollout's graphs: an update needs no second forward pass. For one update an iteration.

    `recompute` evaluates the stored states again. auto = single_pass where it gives the same gradient (one update an
    iteration, no micro_batch, no gradient checkpointing), its graphs fit into half of the free memory, and two thirds
    of the states are trained on: it walks back through all of them.
    """
    micro_batch: Count | None = None
    """Distinct states in one forward and backward pass; null = all of an update. Memory only, up to rounding."""
    max_skipped: Natural = 3
    """Optimiser steps in a row that may be left out because a gradient was not finite, before the run stops."""
    ema_decay: Share | None = None
    """Decay per update of the averaged weights, which then are evaluated and exported; null = none."""

    def update_of(self, checkpointing: bool) -> Literal["auto", "single_pass", "recompute"]:
        """`update`, where `auto` is left only if a single pass gives the same gradient."""
        possible = self.updates_per_iteration == 1 and self.micro_batch is None and not checkpointing
        return "recompute" if self.update == "auto" and not possible else self.update


class EngineConfig(Section):
    """Where the run runs."""

    name: Word = "local"
    """`local` (one process) or `accelerate` (several, started by torchrun), or ./file.py:Name."""
    device: Word = "auto"
    """auto = the accelerator where there is one; or cpu, cuda, cuda:1, mps."""
    threads: Count | None = None
    """CPU threads of torch; null = torch's own choice. Results do not depend on it beyond rounding."""


class LogConfig(Section):
    """What is recorded besides metrics.jsonl, which always is."""

    tensorboard: bool = False
    """Write TensorBoard event files into the output folder."""
    trackers: tuple[Word, ...] = ()
    """Services known to accelerate, such as wandb or swanlab; one that fails is switched off, training goes on."""
    rollouts_every: Natural = 10
    """Iterations between records of single samples, scores and reasons with a picture, in rollouts/; 0 = never."""


class AlgorithmConfig(BaseModel):
    """Which method; the rest of the section is that method's own record, complete with its defaults."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[Word, Field(description="File in flowrl.algorithms, package.module:Class or ./file.py:Class.")]

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, section: Any) -> Any:
        """Check the section against the method's own fields, and write its defaults down."""
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str) or not section["name"]:
            return section
        record = algorithm_class(section["name"]).model_validate({k: v for k, v in section.items() if k != "name"})
        return {"name": section["name"], **record.model_dump(mode="json")}

    def build(self) -> Any:
        """The algorithm: its frozen record of hyperparameters with `plan`, `credit` and `loss`."""
        return algorithm_class(self.name)(**(self.model_extra or {}))


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the run is called; letters, digits, and . _ - since a folder is named after it."""
    seed: Natural = 0
    """All randomness is a function of it: with the iteration, prompt, sample and step it gives the same noise again."""
    output_dir: Word = ""
    """Folder for everything that the run writes; default runs/<name>."""
    iterations: Count = 300
    """Rounds of sampling, scoring and updating."""
    checkpoint_every: Count = 50
    """Iterations between checkpoints; the last iteration always makes one."""
    keep_checkpoints: Count = 3
    """How many checkpoints stay; older ones go when a newer one is complete."""
    evaluate_every: Count = 50
    """Iterations between evaluations; there always is one before the first and one after the last."""
    model: ModelConfig
    """Which generator."""
    algorithm: AlgorithmConfig
    """Which method, and its hyperparameters."""
    rewards: tuple[RewardEntry, ...]
    """What is good; their weighted sum is trained on."""
    eval_rewards: tuple[RewardEntry, ...] = ()
    """Held out: scored in evaluations alone. Where one falls while the trained reward rises, the run says so."""
    data: DataConfig
    """Prompts and group sizes."""
    generation: GenerationConfig | None = None
    """How answers are written; null = the model makes pictures or videos."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Learning rate and batches."""
    engine: EngineConfig = EngineConfig()
    """Processes and devices."""
    log: LogConfig = LogConfig()
    """Records."""

    @property
    def actor(self) -> str:
        """What makes the samples: see `flowrl.actor`."""
        return "flowrl.media:MediaActor" if self.generation is None else "flowrl.vlm.actor:TextActor"

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, tree: Any) -> Any:
        """`rewards: {ocr: 0.5}` and `rewards: [ocr]` are short for entries; the output folder follows the name."""
        if not isinstance(tree, Mapping):
            return tree
        tree = dict(tree)
        data = tree.get("data")
        if isinstance(data, Mapping) and isinstance(data.get("filters"), list):
            filters = [{"use": entry} if isinstance(entry, str) else entry for entry in data["filters"]]
            tree["data"] = {**data, "filters": filters}
        if isinstance(section := tree.get("algorithm"), Mapping):
            tree["algorithm"] = _with_horizon(section, tree.get("generation"))
        if not tree.get("output_dir") and isinstance(tree.get("name"), str):
            tree["output_dir"] = f"runs/{tree['name']}"
        for key in ("rewards", "eval_rewards"):
            rewards = tree.get(key)
            if isinstance(rewards, Mapping) and "use" not in rewards:
                tree[key] = [{"use": use, "weight": weight} for use, weight in rewards.items()]
            elif isinstance(rewards, list):
                tree[key] = [{"use": entry} if isinstance(entry, str) else entry for entry in rewards]
        return tree

    @model_validator(mode="after")
    def _possible(self) -> Config:
        """What no single key can tell: every conflict at once."""
        conflicts = list(_conflicts(self))
        if conflicts:
            raise ValidationError.from_exception_data("Config", [_conflict(key, text) for key, text in conflicts])
        return self


def _with_horizon(section: Mapping[str, Any], generation: Any) -> Mapping[str, Any]:
    """Where a method divides sums over tokens by a constant and nobody says which, it is the longest turn."""
    try:
        known = algorithm_class(section["name"]).model_fields
    except (ValidationError, KeyError, TypeError):
        return section  # told where the section is read
    mode = section.get("aggregate", known["aggregate"].default) if "aggregate" in known else None
    if mode != "seq_mean_token_sum_norm" or "horizon" in section or not isinstance(generation, Mapping):
        return section
    longest = generation.get("max_new_tokens", GenerationConfig.model_fields["max_new_tokens"].default)
    return {**section, "horizon": longest} if isinstance(longest, int) else section


# ------------------------------------------------------------------------------------------------ cross-checks


def _conflict(key: Key, text: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("conflict", "{text}", {"text": text}), loc=key, input=None)


def algorithm_class(name: str) -> type[Any]:
    """The record of hyperparameters that `algorithm.name` stands for."""
    text = f"{name!r} is no algorithm: expected a subclass of flowrl.types.Hyperparameters with a loss()"
    try:
        found = resolve(name, "flowrl.algorithms")
    except ResolveError as error:
        found, text = None, str(error)
    if isinstance(found, type) and issubclass(found, BaseModel) and callable(getattr(found, "loss", None)):
        if not (absent := getattr(found, "__abstractmethods__", None)):
            return found
        text = f"{name!r} has no {', '.join(sorted(absent))} of its own; see flowrl.types.Algorithm"
    raise ValidationError.from_exception_data("algorithm", [_conflict(("name",), text)])


def _conflicts(config: Config) -> Iterator[tuple[Key, str]]:
    """(key, message) of everything that cannot be meant, though every value is fine by itself."""
    for key, name, package in (
        (("model", "family"), config.model.family, "flowrl.models"),
        (("engine", "name"), config.engine.name, "flowrl.engine"),
    ):
        try:
            check_name(name or "any.py", package)
        except ResolveError as error:
            yield key, str(error)
    yield from _memory_conflicts(config.model)
    yield from _reward_conflicts(config.rewards, config.eval_rewards)
    updates = config.iterations * config.optimizer.updates_per_iteration
    if config.optimizer.warmup >= updates:
        yield (
            ("optimizer", "warmup"),
            f"{config.optimizer.warmup} updates of warm-up, but the run has only iterations x updates_per_iteration = "
            f"{updates}; choose fewer, or more iterations",
        )
    if config.optimizer.min_lr_ratio and config.optimizer.schedule == "constant":
        yield ("optimizer", "min_lr_ratio"), "has no effect on a constant schedule; set schedule=cosine or leave it out"
    if config.optimizer.update == "single_pass":
        for key, value in (("updates_per_iteration", config.optimizer.updates_per_iteration > 1),
                           ("micro_batch", config.optimizer.micro_batch is not None)):  # fmt: skip
            if value:
                text = "takes all of a rollout in one step, on the weights that made it; "
                yield ("optimizer", "update"), f"single_pass {text}leave optimizer.{key} out, or set update=recompute"
    settings = config.data.evaluation
    if settings.grid_prompts > settings.num_samples:
        yield (
            ("data", "evaluation", "grid_prompts"),
            f"a grid of {settings.grid_prompts} pictures out of num_samples={settings.num_samples}; "
            "make the grid smaller or num_samples larger",
        )
    yield from _plan_conflicts(config)


def _memory_conflicts(model: ModelConfig) -> Iterator[tuple[Key, str]]:
    """Weights that are stored otherwise than they are computed with cannot learn, nor be stored in two ways."""
    text = [name for name in model.quantization or () if name.startswith("text_encoder")]
    quantised = len(model.quantization or ()) > len(text)
    moving = [key for key, asked in (("layerwise_casting", model.layerwise_casting),
                                     ("offload", model.offload != "none")) if asked]  # fmt: skip
    for key in moving + ["quantization"] * quantised:
        if model.lora is None:
            yield ("model", key), "is for frozen weights, but all weights learn; set model.lora, or leave it out"
    for key in moving:
        if not model.gradient_checkpointing:
            kept = "saves nothing while a backward pass waits for the weights it has used; "
            yield ("model", key), kept + "set model.gradient_checkpointing=true, or leave it out"
        if quantised:
            yield ("model", key), "is for weights that are not quantised; leave out one of the two"
        if model.compile:
            yield (
                ("model", "compile"),
                f"compiled blocks and {key}, which changes weights on the way, do not go together",
            )
    if text and model.offload_text_encoders:
        yield ("model", "offload_text_encoders"), f"{', '.join(text)} is quantised and stays; leave out one of the two"


def _reward_conflicts(rewards: Sequence[RewardEntry], held_out: Sequence[RewardEntry]) -> Iterator[tuple[Key, str]]:
    if not rewards:
        yield ("rewards",), "the list is empty, so there is nothing to train on; add for example {use: shapes}"
    elif all(entry.weight == 0 and entry.gate is None for entry in rewards):
        yield ("rewards",), "every reward has weight 0, so there is nothing to train on; give one of them a weight"
    seen: dict[str, str] = {}
    places = [(key, i, entry) for key, entries in (("rewards", rewards), ("eval_rewards", held_out))
              for i, entry in enumerate(entries)]  # fmt: skip
    for key, index, entry in places:
        name, place = entry.name or entry.use, f"{key}.{index}"
        if name in seen:
            yield (key, index), f"{seen[name]} and {place} are both called {name!r}; give one of them another `name:`"
        seen.setdefault(name, place)


OF_MEDIA = (
    "family", "guidance", "height", "width", "frames", "fps", "embedded_guidance", "negative_prompt", "inference",
    "max_sequence_length", "rollout_micro_batch", "decode_tiling", "decode_micro_batch", "quantization",
    "layerwise_casting", "offload", "offload_text_encoders", "offload_trajectory", "compile",
)  # fmt: skip
OF_TEXT = {
    "model": ("freeze_vision",),
    "data": ("replay", "on_dead_group", "template", "system", "fields", "video_frames", "drop_options"),
}


def _media_conflicts(config: Config) -> Iterator[tuple[Key, str]]:
    """Keys of a model that writes, set for one that makes media."""
    for section, keys in OF_TEXT.items():
        given = getattr(config, section)
        for key in keys:
            if getattr(given, key) != type(given).model_fields[key].default:
                yield (section, key), "is of models that write, and has no effect on one that makes media; leave it out"


def _text_conflicts(config: Config, algorithm: Any) -> Iterator[tuple[Key, str]]:
    """A model that writes, and a method for tokens: neither goes without the other."""
    name = config.algorithm.name
    if config.generation is None:
        yield (
            ("algorithm", "name"),
            f"{name} trains a model that writes; add the section `generation:`, or choose"
            " a method for media, such as flow_grpo",
        )
        return
    if not algorithm.needs.tokens:
        yield (
            ("algorithm", "name"),
            f"{name} trains a model that makes media, and `generation:` is for one that "
            "writes; choose a method for tokens, such as grpo, or leave the section out",
        )
        return
    for key in OF_MEDIA:
        if getattr(config.model, key) != ModelConfig.model_fields[key].default:
            yield ("model", key), "is of models that make media, and has no effect on one that writes; leave it out"
    yield from _combine_conflicts(config, algorithm)
    if config.data.samples == "stored":
        yield ("data", "samples"), "stored samples are media; a model that writes answers makes its own: rollout"
    if config.optimizer.update == "single_pass":
        yield ("optimizer", "update"), "single_pass is for media; leave it out"
    yield from _replay_conflicts(config, algorithm.needs)
    yield from _server_conflicts(config.generation)
    yield from _more_answers_conflicts(config, algorithm.needs)
    if config.data.on_dead_group is not None and (config.data.max_tries == 1 or not config.data.filters):
        text = "helps in a further try, and there is none; set data.max_tries=2 and data.filters=[informative]"
        yield ("data", "on_dead_group"), text
    smallest = getattr(algorithm, "fewest_samples", 1)
    if config.data.samples_per_prompt < smallest:
        text = f"{name} compares the answers to a prompt, so it needs {smallest} of them; draw more"
        yield ("data", "samples_per_prompt"), text


def _replay_conflicts(config: Config, needs: Any) -> Iterator[tuple[Key, str]]:
    """What is remembered of an answer are its tokens, one advantage, and which question it belongs to."""
    if config.data.replay is None:
        return
    assert config.generation is not None
    for what, given in (
        ("values", needs.value or needs.continuations > 0),
        (f"{config.algorithm.name}, whose tokens have an advantage each: of an answer one is kept", needs.token_credit),
        ("pairs of answers", needs.whole_groups),
        ("tools, whose pictures are not remembered", config.generation.tools is not None),
        ("data.on_dead_group, whose changed questions are not remembered", config.data.on_dead_group is not None),
    ):
        if given:
            yield ("data", "replay"), f"does not go together with {what}; leave it out"


def _server_conflicts(generation: GenerationConfig) -> Iterator[tuple[Key, str]]:
    """What a server that begins answers cannot do."""
    if generation.server is None:
        return
    if generation.tools is not None:
        text = "a server can begin answers, and not go on with them after a tool has spoken; leave one of the two out"
        yield ("generation", "server"), text
    if generation.noisy is not None:
        text = "a server's log-probs are those after the distorted picture, and the update's after the clean one: "
        yield ("generation", "noisy"), text + "one cannot be weighed against the other; leave noisy or server out"


def _more_answers_conflicts(config: Config, needs: Any) -> Iterator[tuple[Key, str]]:
    """What answers that go on from a state cannot have, nor others than those that are trained on."""
    for key in ("tools", "forced_answer") if needs.continuations else ():
        if getattr(config.generation, key) is not None:
            text = "continuations are answers of one turn, that end by themselves; leave it out, or set values=head"
            yield ("generation", key), text
    for index, entry in enumerate(config.rewards if needs.continuations or needs.besides else ()):
        if entry.norm == "rank":
            text = f"ranks the answers of a group, and {config.algorithm.name} judges others too; leave it out"
            yield ("rewards", index, "norm"), text


def _combine_conflicts(config: Config, algorithm: Any) -> Iterator[tuple[Key, str]]:
    """What changes the total is nothing to a method that takes each of several rewards by itself."""
    if not algorithm.needs.scores or sum(entry.weight != 0 for entry in config.rewards) < 2:
        return
    for index, entry in enumerate(config.rewards):
        for key, given in (("gate", entry.gate), ("only_where", entry.options.get("only_where"))):
            if given is not None:
                text = f"cuts the total, but this method takes each reward alone; drop the {key}, or set combine=sum"
                yield ("rewards", index, key), text


def _plan_conflicts(config: Config) -> Iterator[tuple[Key, str]]:
    """What the algorithm itself says to the group size and to its first and last plan."""
    import torch

    from flowrl.algorithms.schedule import plans_of

    algorithm = config.algorithm.build()
    if algorithm.needs.tokens or config.generation is not None:
        yield from _text_conflicts(config, algorithm)
        return
    yield from _media_conflicts(config)
    absent = [name for name in ("num_steps", "eta", "kernel", "plan", "credit", "loss") if not hasattr(algorithm, name)]
    if absent:
        yield ("algorithm", "name"), f"{config.algorithm.name} has no {', '.join(absent)}; see flowrl.types.Algorithm"
        return
    yield from _combine_conflicts(config, algorithm)
    if config.data.samples == "stored" and (algorithm.needs.logprobs or algorithm.needs.own_rollout):
        text = f"stored samples were not drawn step by step, and {config.algorithm.name} trains on steps; "
        yield ("data", "samples"), text + "choose a method of the forward process, such as flow_dpo, or samples=rollout"
    if config.optimizer.update == "single_pass" and not algorithm.needs.logprobs:
        text = f"single_pass keeps the graphs of stochastic steps, and {config.algorithm.name} has none; "
        yield ("optimizer", "update"), text + "leave it out"
    if config.data.samples_per_prompt <= algorithm.needs.stored:
        text = f"{algorithm.needs.stored} samples of a prompt may be stored ones; draw at least one more"
        yield ("data", "samples_per_prompt"), text
    if config.data.together and getattr(algorithm, "share_draws", False):
        text = f"{config.algorithm.name} compares samples of one prompt at shared draws, not of several prompts; "
        yield ("data", "together"), text + "leave it out, or take a method without share_draws, such as diffusion_nft"
    if config.data.history < algorithm.needs.history:
        text = (
            f"{config.algorithm.name} compares with a prompt's last {algorithm.needs.history} rewards; remember as many"
        )
        yield ("data", "history"), text
    of_teachers = "teachers" in type(algorithm).model_fields
    if of_teachers and algorithm.needs.teachers == (None,) and algorithm.needs.guidance <= config.model.guidance:
        text = (
            "the only teacher is the initial model with no more guidance than model.guidance, so there is nothing to "
        )
        yield ("algorithm", "teachers"), text + "teach; raise algorithm.teacher_guidance, or name a teacher's weights"
    times = torch.linspace(1.0, 0.0, algorithm.num_steps + 1)
    for iteration in dict.fromkeys((0, config.iterations - 1)):
        try:
            plans_of(algorithm, times, iteration, config.data.samples_per_prompt, config.seed)
        except ValueError as error:
            about_group = "samples_per_prompt" in str(error)
            yield ("data", "samples_per_prompt") if about_group else ("algorithm",), f"{config.algorithm.name}: {error}"
            return


# ------------------------------------------------------------------------------------------------ reading and writing


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with its `base:` files and `a.b=c` overrides; ConfigError names every problem."""
    return _validated(read_source(path, overrides))


def make_config(values: Mapping[str, Any], name: str = "config") -> Config:
    """A config from plain values, with the same messages as one from a file."""
    return _validated(Source(values=dict(values), name=name))


def check(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Every problem that can be found without loading weights; [] = the config can be run.

    Beyond `load_config` it builds the rewards (which loads nothing), reads the prompts, and looks for the teachers.
    """
    try:
        source = read_source(path, overrides)
        config = _validated(source)
    except ConfigError as error:
        return error.problems
    found = resolve(config.actor, "flowrl").problems(config)
    return [f"{source.where(key)}: {dotted(key)}: {text.rstrip('.')}." for key, text in found]


def media_problems(config: Config) -> Iterator[tuple[Key, str]]:
    """What a run of a generator would find before it loads weights: rewards, prompts, teachers, the model's folder."""
    import torch

    from flowrl.data import DataError, PromptSampler, load_prompts
    from rewards import RewardHub
    from rewards.entries import read_entries
    from rewards.types import RewardError

    sound = True
    places = [("rewards", i, entry) for i, entry in enumerate(config.rewards)]
    places += [("eval_rewards", i, entry) for i, entry in enumerate(config.eval_rewards)]
    for key, index, entry in places:
        try:
            # Weight 1 and the CPU: a reward that is only logged, or a GPU that is elsewhere, is no problem.
            read_entries([{**entry.entry(), "weight": 1.0, "device": "cpu"}], torch.device("cpu"))
        except RewardError as error:
            sound = False
            yield (key, index), str(error)
    if sound and config.algorithm.build().needs.gradient:
        try:
            with RewardHub([entry.entry() | {"device": "cpu"} for entry in config.rewards], device="cpu") as hub:
                hub.check_differentiable()
                if config.algorithm.build().needs.features:
                    hub.embedder()
        except RewardError as error:
            yield ("rewards",), str(error)
    try:
        prompts = load_prompts(config.data.prompts)
        data = config.data
        sampler = PromptSampler(prompts, data.prompts_per_iteration, balance=data.balance, together=data.together)
    except DataError as error:
        yield ("data", "prompts"), str(error)
    else:
        yield from curriculum_problems(config, sampler, prompts)
        yield from _stored_problems(config, prompts)
    try:
        load_prompts(config.data.eval_prompts or "shapes", "held_out")
    except DataError as error:
        yield ("data", "eval_prompts"), str(error)
    yield from _teacher_problems(config)
    yield from filter_problems(config)
    yield from folder_problems(config)


def filter_problems(config: Config) -> Iterator[tuple[Key, str]]:
    """Filters that do not exist, or whose options cannot be meant."""
    from flowrl.filters import FilterError, build

    try:
        build([entry.entry() for entry in config.data.filters])
    except FilterError as error:
        yield ("data", "filters"), str(error)


def folder_problems(config: Config) -> Iterator[tuple[Key, str]]:
    """A model's folder that does not exist."""
    path = Path(config.model.path).expanduser()
    looks_local = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") > 1
    if looks_local and not path.is_dir():
        known = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        yield ("model", "path"), f"the folder {path} does not exist{nearest(path.name, known)}"


def curriculum_problems(config: Config, sampler: Any, prompts: Any) -> Iterator[tuple[Key, str]]:
    """A curriculum that does not exist, or that these prompts do not suit."""
    from flowrl.curriculum import curriculum
    from flowrl.history import PromptHistory

    if config.data.curriculum:
        try:
            weights = curriculum(config.data.curriculum)(PromptHistory(config.data.history, len(prompts)), prompts, 0)
            sampler(0, weights)
        except ValueError as error:  # DataError and ResolveError are such
            yield ("data", "curriculum"), str(error)


def _stored_problems(config: Config, prompts: Any) -> Iterator[tuple[Key, str]]:
    """Prompts that do not name the stored samples that are trained on."""
    from flowrl.collect import check_stored

    try:
        if wanted := stored_per_prompt(config):
            check_stored(prompts, wanted)
    except ValueError as error:
        yield ("data", "prompts"), str(error)


def stored_per_prompt(config: Config) -> int | None:
    """How many stored samples each prompt must name; None = nobody asks for them."""
    data = config.data
    return data.samples_per_prompt if data.samples == "stored" else config.algorithm.build().needs.stored or None


def _teacher_problems(config: Config) -> Iterator[tuple[Key, str]]:
    """Teachers that are not there, and prompts that a method with a `check_prompts` cannot teach."""
    from flowrl.data import DataError, load_prompts
    from flowrl.models.pipeline import ModelError
    from flowrl.policy import exported_weights

    algorithm = config.algorithm.build()
    for folder in (teacher for teacher in algorithm.needs.teachers if teacher is not None):
        try:
            exported_weights(folder)
        except ModelError as error:
            yield ("algorithm", "teachers"), str(error)
    if hasattr(algorithm, "check_prompts"):
        try:
            algorithm.check_prompts(load_prompts(config.data.prompts, "train"))
        except DataError:
            pass  # told under data.prompts
        except ValueError as error:
            yield ("algorithm", "teachers"), str(error)


def dump(config: Config) -> str:
    """The whole config as YAML, every default written out; `load_config` gives an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


# ------------------------------------------------------------------------------------------------ resuming

_FREE = (
    "name", "output_dir", "checkpoint_every", "keep_checkpoints", "evaluate_every", "engine", "log", "eval_rewards",
    "model.decode_micro_batch", "model.decode_tiling", "model.rollout_micro_batch", "model.gradient_checkpointing",
    "model.offload", "model.offload_text_encoders", "model.offload_trajectory", "model.compile",
    "optimizer.micro_batch",
    "optimizer.update", "generation.batch_size", "generation.server.url", "generation.server.timeout",
    "generation.server.concurrency", "data.max_no_verdict", "data.evaluation.batch_size",
    "data.evaluation.grid_prompts", "data.evaluation.headline", "data.evaluation.patience",
)  # fmt: skip
_FREE_REWARD = ("device", "batch_size", "cache", "offload")


def identity(config: Config) -> dict[str, Any]:
    """What makes a run that run, as {dotted key: plain value}; on resuming it must not have changed.

    Everything but where, how fast and how often: folders, devices, portions, records. The number of iterations belongs
    to it only where something is scheduled over them: the learning rate, or what a model that writes is judged by.
    """
    tree = config.model_dump(mode="json")
    for entry in tree["rewards"]:
        for key in _FREE_REWARD:
            del entry[key]
    flat = dict(_flat(tree, ()))
    scheduled = config.optimizer.schedule != "constant" or config.generation is not None
    free = _FREE + (() if scheduled else ("iterations",))
    return {key: value for key, value in flat.items() if not any(key == f or key.startswith(f + ".") for f in free)}


def diff(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of the identities of two configs (or of identities, as checkpoints keep them)."""
    a, b = (identity(x) if isinstance(x, Config) else dict(x) for x in (old, new))
    keys = dict.fromkeys([*a, *b])
    absent = "(absent)"
    pairs = {key: (a.get(key, absent), b.get(key, absent)) for key in keys}
    return {key: (x, y) for key, (x, y) in pairs.items() if json.dumps(x) != json.dumps(y)}


def _flat(value: Any, key: Key) -> Iterator[tuple[str, Any]]:
    """Leaves of sections and of the list of rewards; other lists are values."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, (*key, name))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, (*key, index))
    else:
        yield dotted(key), value


# ------------------------------------------------------------------------------------------------ what keys there are


def _validated(source: Source) -> Config:
    try:
        return Config.model_validate(source.values)
    except ValidationError as error:
        every_key = list(_all_keys(Config, source.values))
        raise ConfigError(explain(error, source, lambda key: _fields(key, source.values), every_key)) from None


def _fields(key: Key, tree: Any) -> dict[str, str]:
    """{key: description} of the section at `key`."""
    section: type[BaseModel] | None = Config
    for name in key:
        if isinstance(name, str) and section is not None:
            found = section.model_fields.get(name)
            section = _section_in(found.annotation) if found else None
    if section is AlgorithmConfig:
        names = {"name": "which method"}
        try:
            section = algorithm_class(tree["algorithm"]["name"])
        except (ValidationError, KeyError, TypeError):
            return names
        return names | {name: info.description or "" for name, info in section.model_fields.items()}
    return {name: info.description or "" for name, info in section.model_fields.items()} if section else {}


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)


def _all_keys(section: type[BaseModel], tree: Any, prefix: Key = ()) -> Iterator[str]:
    for name in _fields(prefix, tree):
        yield dotted((*prefix, name))
        info = section.model_fields.get(name)
        inner = _section_in(info.annotation) if info else None
        if inner is not None and inner is not RewardEntry:
            yield from _all_keys(inner, tree, (*prefix, name))
