"""Models that write as the acting half of a run: answers to questions about pictures, graded by verifiers.

The other half, `flowrl.train`, is the one that media have too: prompts, filters, credit, updates, checkpoints.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowrl.actor import watched
from flowrl.config import Config, GenerationConfig, ModelConfig, curriculum_problems, filter_problems, folder_problems
from flowrl.configfile import Key
from flowrl.data import VIDEOS, DataError, PromptSampler, fingerprint
from flowrl.engine import Engine
from flowrl.evaluate import Evaluation, evaluation_prompts
from flowrl.memory import explained
from flowrl.models.pipeline import ModelError
from flowrl.replay import Replayed
from flowrl.report import sheet_of, spread
from flowrl.resolve import nearest
from flowrl.rollouts import write_rollout
from flowrl.tiny import PREFIX
from flowrl.types import AnyBatch, Besides, Prompt, TokenBatch, Tokens, padded_places
from flowrl.vlm.augment import hook, shuffled
from flowrl.vlm.continuations import state_values
from flowrl.vlm.data import load_questions
from flowrl.vlm.export import FORMS, Form, is_peft
from flowrl.vlm.generate import Row
from flowrl.vlm.metrics import REFLECTS, reflection, text_metrics
from flowrl.vlm.model import ImageTextModel, check_path
from flowrl.vlm.policy import TextPolicy
from flowrl.vlm.rollout import Writer, Written
from flowrl.vlm.server import Server
from flowrl.vlm.tools import ToolError, build_tools
from rewards import HubResult
from rewards.combine import Rule
from rewards.types import RewardError
from rewards.verifiers import Answer, Verifiers, names
from rewards.verifiers.adapter import KEYS
from samplers import stable_seed

SOURCE = "data_source"
"""Metadata: where a question is from."""
EVALUATION = -1
"""The iteration that keys the draws of answers which are not trained on."""
_BESIDES = -15
"""Keeps the draws of answers besides those that are trained on apart."""
RIGHT = 1 - 1e-6
"""Total from which on an answer is right."""
READERS: dict[Form, str] = {"peft": "for peft", "full": "for transformers"}
_CAPTION = 72
"""Characters of an answer under a picture."""
ACCURACY = "accuracy"
"""Score of an evaluation: the share of answers that are right."""


class TextActor:
    """`flowrl.actor.Actor` of a Hugging Face image-text-to-text model."""

    per_call = False
    judges = True
    denoises = False
    guide = None

    def __init__(self, config: Config, algorithm: Any, engine: Engine) -> None:
        assert config.generation is not None
        self.config, self.algorithm, self.engine, self.settings = config, algorithm, engine, config.generation
        data = config.data
        self.prompts = questions(config, data.prompts, "train")
        held_out = questions(config, data.eval_prompts or data.prompts, "held_out")
        self.eval_prompts = evaluation_prompts(held_out, data.evaluation.num_samples)
        self.hub = Verifiers([verifier_entry(entry) for entry in config.rewards], max_nan_frac=None)
        self._held_out = _held_out(config, self.hub)
        self.revived = hook(data.on_dead_group) if data.on_dead_group else None
        self.in_effect: list[str] = []

    @staticmethod
    def problems(config: Config) -> Iterator[tuple[Key, str]]:
        """Verifiers, questions, curriculum, hook, tools and the model's folder, before weights are loaded."""
        assert config.generation is not None
        sound = True
        for key in ("rewards", "eval_rewards"):
            for index, entry in enumerate(getattr(config, key)):
                try:
                    Verifiers([verifier_entry(entry) | {"weight": 1.0, "only_where": None}]).close()
                except RewardError as error:
                    sound = False
                    yield (key, index), str(error)
        hub: Verifiers | None = None
        if sound:
            try:
                hub = Verifiers([verifier_entry(entry) for entry in config.rewards])
                hub.close()  # it is asked for routes and names alone
                yield from _headline_problems(config, hub)
            except RewardError as error:
                yield ("rewards",), str(error)
        data, missing = config.data, list[str]()
        try:
            asked = questions(config, data.prompts, "train")
            sampler = PromptSampler(asked, data.prompts_per_iteration, balance=data.balance, together=data.together)
        except DataError as error:
            yield ("data", "prompts"), str(error)
        else:
            yield from curriculum_problems(config, sampler, asked)
            missing = _gaps(hub, asked)
            yield from ((("data", "prompts"), text) for text in missing)
        try:
            held_out = questions(config, data.eval_prompts or data.prompts, "held_out")
        except DataError as error:
            yield ("data", "eval_prompts"), str(error)
        else:
            if not missing:
                yield from ((("data", "eval_prompts"), text) for text in _gaps(hub, held_out))
        try:
            build_tools(config.generation.tools.use if config.generation.tools else ())
        except ToolError as error:
            yield ("generation", "tools"), str(error)
        try:
            if data.on_dead_group:
                hook(data.on_dead_group)
        except ValueError as error:
            yield ("data", "on_dead_group"), str(error)
        yield from filter_problems(config)
        yield from _path_problems(config)

    @staticmethod
    def notes(config: Config) -> Iterator[str]:
        """Packages that verifiers do without here."""
        for entry in (*config.rewards, *config.eval_rewards):
            for package, mend in getattr(names.resolve(entry.use), "better_with", {}).items():
                if importlib.util.find_spec(package) is None:
                    yield f"verifier {entry.use!r} does without {package} here, and understands fewer answers: {mend}"

    @staticmethod
    def small(config: Config) -> dict[str, Any]:
        """Short answers; a tiny model has a precision of its own."""
        assert config.generation is not None
        found: dict[str, Any] = {"generation.max_new_tokens": min(32, config.generation.max_new_tokens)}
        return found | ({"model.dtype": "float32"} if config.model.path.startswith(PREFIX) else {})

    @staticmethod
    def forms(config: Config) -> tuple[str, ...]:
        """Those of `flowrl.vlm.export`: without LoRA there are no adapters."""
        return FORMS if config.model.lora is not None else FORMS[1:]

    @staticmethod
    def forecast(
        config: Config, devices: int, tflops: float | None, memory: float | None
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """From a model without weights and the first questions (`flowrl.vlm.estimate`)."""
        from flowrl.vlm import estimate

        policy, length = estimate.sketch(config)
        return described(config, policy, devices), estimate.lines(config, policy, length, devices, tflops, memory)

    @property
    def held_out(self) -> dict[str, Rule]:
        """Verifiers that are only watched."""
        return {} if self._held_out is None else dict(self._held_out.rules)

    def fingerprint(self, prompts: Sequence[Prompt]) -> str:
        """A hash of texts, metadata and pictures."""
        return fingerprint(prompts)

    def load(self) -> None:
        """The model with its processor, the policy, and what writes."""
        section, needs, server = self.config.model, self.algorithm.needs, self.settings.server
        with explained(self.config, "loading"):
            self._take(
                reference=needs.reference, old=needs.old, ema_decay=self.config.optimizer.ema_decay,
                gradient_checkpointing=section.gradient_checkpointing,
            )  # fmt: skip
        if server is not None:
            self.writer.server = Server(
                self.policy.model, server.url, server.model, timeout=server.timeout, concurrency=server.concurrency
            )

    def load_finished(self, weights: Path | None) -> None:
        """The model with exported weights, or without; it answers itself, no server does."""
        self.policy = finished_of(self.config.model, self.settings, self.engine.device, weights)
        self.writer = Writer(self.policy, self.settings)

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """The policy of a checkpoint, without its reference and old policy."""
        self._take(ema_decay=self.config.optimizer.ema_decay)
        self.policy.load_state_dict(state)

    def _take(self, **trained: Any) -> None:
        self.policy = policy_of(
            self.config.model, self.settings, self.engine.device, value_head=self.algorithm.needs.value,
            seed=self.config.seed, **trained,
        )  # fmt: skip
        self.writer = Writer(self.policy, self.settings)

    def describe(self) -> list[tuple[str, str]]:
        """Answers, turns and updates of an iteration."""
        return described(self.config, self.policy, self.engine.world)

    def warmup(self, everywhere: bool) -> None:
        """Verifiers have nothing to try."""

    # -------------------------------------------------------------------------------------------- samples

    def plan(self, iteration: int) -> float:
        """How far the run is: what changes along it (a dynamic IoU, noise on pictures) reads this."""
        return iteration / self.config.iterations

    def collect(self, plan: float, prompts: Sequence[Prompt], slots: Sequence[int], iteration: int) -> TokenBatch:
        """K answers to each of these prompts."""
        members = self.config.data.samples_per_prompt
        needs = self.algorithm.needs
        drawing = self.policy.old() if needs.old and not needs.on_policy else nullcontext()
        with explained(self.config, "rollout"), drawing, self.policy.role("rollout"):
            written = self.writer(
                prompts, slots, members=members, seed=self.config.seed, iteration=iteration, progress=plan,
                needs=needs, judge=lambda draft: self._are_wrong(draft, prompts, plan),
            )  # fmt: skip
            if needs.continuations:
                written = self._continued(written, prompts, slots, iteration, plan)
            if needs.besides is not None:
                besides = self._judged(needs.besides, prompts, slots, iteration, plan)
                written = replace(written, facts=written.facts | {needs.besides.name: besides[written.tokens.prompt]})
        slot = torch.tensor(list(slots), dtype=torch.long)
        group = slot[written.tokens.prompt]
        return TokenBatch(
            prompts=list(prompts), tokens=written.tokens, group=group, iteration=iteration, seed=self.config.seed,
            facts=written.facts | {REFLECTS: reflection(written.texts)}, progress=plan, values=written.values,
            reference=written.reference,
            samples=tuple(answers_of(written, prompts, group)),
        )  # fmt: skip

    def _are_wrong(self, written: Written, prompts: Sequence[Prompt], progress: float) -> list[bool]:
        """Which answers get less than `data.passing`; not those without a verdict."""
        found = self.hub(answers_of(written, prompts, written.tokens.prompt), progress)
        return (found.total < self.config.data.bar).tolist()

    def _continued(
        self, written: Written, prompts: Sequence[Prompt], slots: Sequence[int], iteration: int, progress: float
    ) -> Written:
        """With the values of the answers' states, by answers that go on from them."""
        needs, settings, tokens = self.algorithm.needs, self.settings, written.tokens

        def grade(rows: Sequence[Row], index: Sequence[int]) -> Tensor:
            answers = [
                Answer(
                    self.policy.text(row), prompt=prompts[p].text, group=p, meta=prompts[p].metadata,
                    tokens=int(row.mask.sum()), truncated=row.truncated,
                )
                for row, p in zip(rows, index, strict=True)
            ]  # fmt: skip
            return self.hub(answers, progress).total

        values, count = state_values(
            self.policy, tokens, [(self.config.seed, iteration, slots[p]) for p in tokens.prompt.tolist()], grade,
            continuations=needs.continuations, every=needs.state_every, limit=settings.max_new_tokens,
            batch=settings.batch_size or len(tokens),
        )  # fmt: skip
        return replace(written, values=values, facts=written.facts | {"continuations": count})

    def _judged(
        self, besides: Besides, prompts: Sequence[Prompt], slots: Sequence[int], iteration: int, progress: float
    ) -> Tensor:
        """The mean reward of more answers to each prompt, float64 [P]; NaN where there is none, or no verdict."""
        key = stable_seed(self.config.seed, iteration, _BESIDES)
        asked = [p for p, prompt in enumerate(prompts) if not besides.shuffled or prompt.metadata.get(VIDEOS)]
        found = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
        if not asked:
            return found
        shown = [shuffled(prompts[p], key=(key, slots[p])) if besides.shuffled else prompts[p] for p in asked]
        written = self.writer(
            shown, [slots[p] for p in asked], members=besides.answers, seed=key, iteration=EVALUATION,
            temperature=0.0 if besides.greedy else None, batch_size=self.settings.batch_size,
        )  # fmt: skip
        rewards = self.hub(answers_of(written, shown, written.tokens.prompt), progress).total.double()
        return found.index_copy(0, torch.tensor(asked), rewards.view(len(asked), -1).nanmean(1))

    def submit(self, batch: AnyBatch) -> Callable[[], HubResult]:
        """Verifiers answer at once, or wait for judges themselves."""
        assert isinstance(batch, TokenBatch)
        return lambda: self.hub(batch.samples, batch.progress)

    def prepared(self, batch: AnyBatch) -> AnyBatch:
        """Nothing is added."""
        return batch

    def facts(self, batch: AnyBatch) -> dict[str, Tensor]:
        """Lengths, truncation, calls of tools and the like."""
        assert isinstance(batch, TokenBatch)
        return batch.facts

    def metrics(
        self, prompts: Sequence[Prompt], batch: AnyBatch, table: Tensor, scores: Mapping[str, Tensor],
        facts: Mapping[str, Tensor], seconds: float,
    ) -> dict[str, float]:  # fmt: skip
        """What the answers were like: rewards by source, lengths, truncation, pass@k, tools, tokens a second."""
        per_prompt = self.config.data.samples_per_prompt
        group = torch.arange(len(table)) // per_prompt
        known = [str(prompt.metadata.get(SOURCE, "")) for prompt in prompts]
        sources = [name for name in known for _ in range(per_prompt)] if all(known) else None
        return text_metrics(table, group, facts, sources=sources, threshold=RIGHT, seconds=seconds)

    def join(self, batches: Sequence[AnyBatch]) -> AnyBatch:
        """The answers of several tries under each other."""
        parts = [batch for batch in batches if isinstance(batch, TokenBatch)]
        offsets = [sum(len(part.prompts) for part in parts[:i]) for i in range(len(parts))]
        return replace(
            parts[0], prompts=[prompt for part in parts for prompt in part.prompts],
            tokens=Tokens.cat([part.tokens for part in parts], offsets),
            group=torch.cat([part.group for part in parts]),
            facts={name: torch.cat([part.facts[name] for part in parts]) for name in parts[0].facts},
            samples=tuple(sample for part in parts for sample in part.samples),
            values=_under_each_other([part.values for part in parts]),
            reference=_under_each_other([part.reference for part in parts]),
        )  # fmt: skip

    def revive(self, batch: AnyBatch, dead: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Prompts with a hint, where `data.on_dead_group` gives one."""
        return [] if self.revived is None else [made for prompt in dead if (made := self.revived(prompt)) is not None]

    def replayed(self, batch: TokenBatch, again: Replayed[Tokens], mine: Tensor) -> TokenBatch:
        """The batch with answers of earlier iterations behind it; their prompts are read again."""
        rows = again.rows.select(mine)
        asked = [self.prompts[int(i) % len(self.prompts)] for i in again.prompts[mine]]
        number = torch.arange(len(asked))
        rows = replace(rows, prompt=number, inputs=tuple(self.writer.inputs(prompt) for prompt in asked))
        assert batch.advantages is not None
        return replace(
            batch, prompts=[*batch.prompts, *asked], tokens=Tokens.cat([batch.tokens, rows], [0, len(batch.prompts)]),
            group=torch.cat([batch.group, -1 - number]), reference=None, facts={}, samples=(), place=None, rewards=None,
            advantages=torch.cat([batch.advantages, again.advantages[mine].to(batch.advantages)]),
        )  # fmt: skip

    def record(self, folder: Path, iteration: int, batch: AnyBatch, result: HubResult) -> None:
        """The first groups, a line an answer."""
        write_rollout(folder, iteration, batch, result)

    # -------------------------------------------------------------------------------------------- for people

    def evaluate(self) -> Evaluation:
        """One answer to each held-out question with the averaged weights, the same draws every time."""
        settings = self.config.data.evaluation
        with self.policy.averaged(), self.policy.role("eval"):
            written = self.writer(
                self.eval_prompts, range(len(self.eval_prompts)), members=1, seed=settings.seed, iteration=EVALUATION,
                temperature=self.settings.evaluation_temperature, batch_size=settings.batch_size,
            )  # fmt: skip
        answers = answers_of(written, self.eval_prompts, torch.arange(len(self.eval_prompts)))
        result, *others = [hub(answers, 1.0) for hub in (self.hub, self._held_out) if hub is not None]
        scores: dict[str, Tensor] = {}
        for answer in (result, *others):
            scores |= answer.scores
            scores |= {f"{name}.{part}": value for name, parts in answer.parts.items() for part, value in parts.items()}
        right = (result.total >= RIGHT).float().where(result.total.isfinite(), torch.nan)
        lengths = written.facts["tokens"]
        return Evaluation(
            prompts=list(self.eval_prompts), scores={ACCURACY: right} | scores, total=result.total,
            measures={"answer_tokens": (lengths.mean().item(), _error_of_mean(lengths))},
            media=None, texts=written.texts,
        )  # fmt: skip

    def show(self, found: Evaluation, path: Path) -> None:
        """A grid of pictures above questions and answers."""
        chosen = spread(len(found.prompts), self.config.data.evaluation.grid_prompts)
        if chosen:
            pictures = [self.writer.picture(found.prompts[i]) for i in chosen]
            captions = [f"{found.prompts[i].text} -> {_ending(found.texts[i])}" for i in chosen]
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet_of(pictures, captions, lines=5).save(path, optimize=True)

    def export(self, folder: Path, *, form: str | None = None, averaged: bool = True) -> str:
        """Weights: an adapter for peft, or a whole folder for transformers."""
        chosen = form or self.forms(self.config)[0]
        self.policy.export(folder, averaged=averaged, form=cast(Form, chosen))
        return READERS[cast(Form, chosen)]

    def check_export(self, folder: Path) -> None:
        """Load them into a model of their own, and answer the first held-out question."""
        policy = finished_of(self.config.model, self.settings, self.engine.device, folder)
        written = Writer(policy, self.settings)(self.eval_prompts[:1], [0], members=1, seed=0, iteration=EVALUATION)
        if not bool(written.tokens.logprob.isfinite().all()):
            raise ModelError(f"the exported weights in {folder} give log-probabilities that are not finite.")

    def close(self) -> None:
        """Close verifiers and tools."""
        for part in (self.hub, self._held_out, getattr(self, "writer", None)):
            if part is not None:
                part.close()


def finished_of(
    section: ModelConfig, settings: GenerationConfig, device: torch.device, weights: Path | None
) -> TextPolicy:
    """A config's model to be used and not trained: with exported weights of a run of it, or as it is."""
    if weights is not None and is_peft(weights):
        policy = policy_of(section, settings, device)
        policy.load_weights(weights)
        return policy
    path = section.path if weights is None else str(weights)
    return policy_of(section.model_copy(update={"path": path, "lora": None}), settings, device, frozen=True)


def policy_of(
    section: ModelConfig, settings: GenerationConfig, device: torch.device, *, value_head: bool = False, **trained: Any
) -> TextPolicy:
    """A config's model with what learns of it; `trained` are further arguments of `flowrl.policy.Trained`."""
    model = ImageTextModel.load(
        section.path, dtype=getattr(torch, section.dtype), freeze_vision=section.freeze_vision, value_head=value_head,
        attention=section.attention,
    )  # fmt: skip
    lora = None if section.lora is None else section.lora.model_dump()
    return TextPolicy(model, lora=lora, temperature=settings.temperature, device=device, **trained)


def described(config: Config, policy: TextPolicy, world: int) -> list[tuple[str, str]]:
    """Answers, turns and updates of an iteration, as (what, how much) lines."""
    data, generation, updates = config.data, config.generation, config.optimizer.updates_per_iteration
    assert generation is not None
    asked, each, tools = data.prompts_per_iteration, data.samples_per_prompt, generation.tools
    needs = config.algorithm.build().needs
    more = "" if needs.besides is None else _others(needs.besides)
    if needs.continuations:
        more = f", and {needs.continuations} that go on from every {needs.state_every} tokens of one"
    turns = f", {tools.max_turns} turns with {', '.join(build_tools(tools.use))}" if tools else ""
    writer = f"; a server writes them: {generation.server.url}" if generation.server else ""
    return [
        ("model", f"{config.model.path}, {'LoRA' if policy.lora else 'full weights'}"),
        ("algorithm", config.algorithm.name),
        ("samples", f"{asked} questions x {each} = {asked * each} answers an iteration{more}{writer}"),
        ("answers", f"up to {generation.max_new_tokens} tokens at temperature {generation.temperature:g}{turns}"),
        ("updates", f"{updates} an iteration"),
        ("trainable", f"{policy.num_trainable:,} parameters"),
        ("length", f"{config.iterations} iterations on {world} process{'es' if world > 1 else ''}"),
    ]


def _others(besides: Besides) -> str:
    to = "video with shuffled frames" if besides.shuffled else "question"
    return f", and {besides.answers} to each {to}{', the likeliest' if besides.greedy else ''}"


def _path_problems(config: Config) -> Iterator[tuple[Key, str]]:
    """A model's path that can be none."""
    if absent := list(folder_problems(config)):
        yield from absent
        return
    try:
        check_path(config.model.path)
    except ModelError as error:
        yield ("model", "path"), str(error)


def _gaps(hub: Verifiers | None, asked: Sequence[Prompt]) -> list[str]:
    """What is missing in the questions' metadata, before anything is answered."""
    if hub is None:
        return []
    return hub.gaps([Answer("", prompt=question.text, meta=question.metadata) for question in asked])


def _headline_problems(config: Config, hub: Verifiers) -> Iterator[tuple[Key, str]]:
    """A score that no evaluation will have."""
    asked, watched_only = config.data.evaluation.headline, _held_out(config, hub)
    known = [ACCURACY, *hub.rules, *(watched_only.rules if watched_only else ())]
    if asked is not None and asked.partition(".")[0] not in known:
        text = f"there is no score {asked!r}{nearest(asked, known)}; there are {', '.join(known)}, and parts of them"
        yield ("data", "evaluation", "headline"), text


def questions(config: Config, source: Any, split: str) -> list[Prompt]:
    """The questions of a source as a config asks them."""
    data = config.data
    return load_questions(
        source, split, fields=data.fields, template=data.template, system=data.system, drop_options=data.drop_options,
        video_frames=data.video_frames,
    )  # fmt: skip


def answers_of(written: Written, prompts: Sequence[Prompt], group: Tensor) -> list[Answer]:
    """The answers as verifiers see them."""
    return [
        Answer(text, prompt=prompts[p].text, group=g, meta=prompts[p].metadata, tokens=int(count), truncated=bool(cut))
        for text, p, g, count, cut in zip(
            written.texts,
            written.tokens.prompt.tolist(),
            group.tolist(),
            written.facts["tokens"].tolist(),
            written.facts["truncated"].tolist(),
            strict=True,
        )  # fmt: skip
    ]


def _ending(text: str) -> str:
    """The end of an answer, where its conclusion is."""
    return text if len(text) <= _CAPTION else f"... {text[-_CAPTION:]}"


def verifier_entry(entry: Any) -> dict[str, Any]:
    """A reward's entry as the verifiers read it: without what is for rewards of media."""
    given = {key: value for key, value in entry.model_dump(exclude_unset=True).items()}
    return {key: given[key] for key in given if key in KEYS or key in entry.options}


def _error_of_mean(values: Tensor) -> float:
    """Its standard error; 0 where there is one value [1]."""
    return (values.std(correction=0) / max(1, len(values) - 1) ** 0.5).item()


def _under_each_other(tables: Sequence[Tensor | None]) -> Tensor | None:
    """Tables [n,S] of places under each other; None where there is none."""
    there = [table for table in tables if table is not None]
    return padded_places(there) if there else None


def _held_out(config: Config, trained: Verifiers) -> Verifiers | None:
    """Verifiers that are not trained on."""
    if not config.eval_rewards:
        return None
    hub = Verifiers([verifier_entry(entry) | {"weight": 1.0} for entry in config.eval_rewards], max_nan_frac=None)
    return watched(hub, trained)
