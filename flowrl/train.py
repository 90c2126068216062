"""Training: one iteration is eight named, timed phases, and this page tells them in order.

prompts -> plan -> collect -> score -> gather -> credit -> update -> log / checkpoint / evaluate

Symbols: P prompts and K samples each an iteration (all processes), B samples, R rows (stored edges or draws).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from flowrl import checkpoint
from flowrl.algorithms.advantages import group_advantages
from flowrl.algorithms.schedule import credit_of, plans_of
from flowrl.checkpoint import Checkpoint, CheckpointError, RunLock, flatten_optimizer, restore_optimizer
from flowrl.collect import (
    Conditions,
    Geometry,
    StoredSamples,
    check_sources,
    check_stored,
    decode_and_submit,
    example_of,
    roll_out,
)  # fmt: skip
from flowrl.config import Config, ModelConfig, diff, dump, identity, stored_per_prompt
from flowrl.costs import expected_cost
from flowrl.curriculum import curriculum
from flowrl.data import PromptSampler, fingerprint, load_prompts, shard
from flowrl.engine import EngineError, connect, together
from flowrl.evaluate import Evaluation, evaluate, evaluation_prompts
from flowrl.faults import fault
from flowrl.hacking import TOTAL, look
from flowrl.history import PromptHistory
from flowrl.log import RunLog, plain, write_atomic
from flowrl.memory import explained, fit, loading_options
from flowrl.metrics import PhaseTimer
from flowrl.models.pipeline import ModelError, load
from flowrl.policy import Policy
from flowrl.record import Recorder
from flowrl.report import headline, save_grid, table_lines, write_report
from flowrl.resolve import resolve
from flowrl.rollouts import forget_after, write_rollout
from flowrl.types import Algorithm, Batch, Prompt
from flowrl.update import Updater, deal, learning_rate_factor
from rewards import HubResult, RewardHub
from rewards.combine import Rule, normalised
from rewards.scorer import NanWatch
from rewards.types import RewardError
from samplers import Plan, stable_seed

RATIO_TOLERANCE = 1e-4
"""Deviation of the first update's ratio from 1 that rounding in fp32 does not explain."""


MEMORY_SHARE = 0.5
"""Share of the free memory that the graphs of a single-pass update may take where nobody asked for it."""


class Interrupted(SystemExit):
    """The run was asked to stop and has saved its state; the exit code is 128 + the signal's number."""


class Trainer:
    """A run: everything that lives through its iterations. `Trainer(config).run()` is `flowrl train`."""

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        self.engine = connect(config.engine.name, config.engine.device)
        self.main = self.engine.rank == 0
        self.lock = RunLock(self.folder, resume=resume) if self.main else None
        try:
            self._build(resume)
        except BaseException:
            # A notebook keeps the exception and so this object: without this its next try finds the folder taken.
            self._let_go()
            raise

    def _build(self, resume: bool) -> None:
        """Everything that can fail for a reason that a person can mend."""
        config = self.config
        self.algorithm: Algorithm = config.algorithm.build()
        # Prompts and rewards come before the model: their mistakes are common, and loading weights can take minutes.
        data = config.data
        if data.prompts_per_iteration < self.engine.world:
            raise EngineError(
                f"{self.engine.world} processes share the prompts of an iteration, but there are only "
                f"{data.prompts_per_iteration}: raise data.prompts_per_iteration, or launch fewer processes."
            )
        prompts = load_prompts(data.prompts, "train")
        self.sampler = PromptSampler(prompts, data.prompts_per_iteration, config.seed, data.balance, data.together)
        self.prompts = prompts
        if hasattr(self.algorithm, "check_prompts"):
            self.algorithm.check_prompts(prompts)
        if wanted := stored_per_prompt(config):
            check_stored(prompts, wanted)
        self.history = PromptHistory(data.history, len(prompts))
        self.curriculum = curriculum(data.curriculum) if data.curriculum else None
        self._prompts_of(0)  # refuses a curriculum's weights before anything is loaded
        self.eval_prompts = evaluation_prompts(
            load_prompts(data.eval_prompts or data.prompts, "held_out"), data.evaluation.num_samples
        )
        self.identity = identity(config) | {
            "data.prompts (contents)": fingerprint(prompts),
            "data.eval_prompts (contents)": fingerprint(self.eval_prompts),
        }
        """What must be the same when the run is resumed."""
        self.hub = RewardHub([entry.entry() for entry in config.rewards], device=self.engine.device, max_nan_frac=None)
        self.held_out = _held_out(config, self.hub, self.engine.device)
        needs = self.algorithm.needs
        if needs.gradient:
            self.hub.check_differentiable()
        if needs.features:
            self.hub.embedder()
        self.watches = {
            name: NanWatch(name=name, max_nan_frac=data.max_no_verdict, key="data.max_no_verdict")
            for name, rule in self.hub.rules.items()
            if rule.counts
        }
        self.measures = [resolve(name, "flowrl.shapes") for name in data.evaluation.measures]
        state = self._resumable() if resume else None
        with explained(config, "loading"):
            self.policy = self._build_policy()
        self.geometry = geometry_of(config, self.policy.model)
        check_sources(self.policy.model, [*prompts, *self.eval_prompts])
        self.stored = StoredSamples(policy=self.policy, geometry=self.geometry) if data.samples == "stored" else None
        """Where samples come from instead of a rollout."""
        self.critic = None
        if needs.gradient:
            from flowrl.critic import Critic

            self.critic = Critic(self.policy, self.hub, decode_batch=config.model.decode_micro_batch)
            self.critic.fps = self.geometry.fps
        self.conditions = Conditions(encode=self.policy.encode, device=self.policy.device)
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.policy.trainable_parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )
        self.updater = Updater(
            policy=self.policy, algorithm=self.algorithm, optimizer=self.optimizer, engine=self.engine,
            updates=o.updates_per_iteration, micro_batch=o.micro_batch, max_grad_norm=o.max_grad_norm,
            max_skipped=o.max_skipped,
        )  # fmt: skip
        self.iteration = self.saved = 0
        """Iterations done, and iterations in the newest checkpoint."""
        self.seconds = 0.0
        """Training time of all iterations so far, evaluations and checkpoints excluded."""
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.best: dict[str, Tensor] = {}
        """The policy's state at its best evaluation, where that is kept."""
        self.signal: int | None = None
        self.warned = False
        if state is not None:
            self._take_up(state)
        self.log = RunLog(self.folder, config.log, resume_at=self.iteration, total=config.iterations, main=self.main)

    # -------------------------------------------------------------------------------------------- the story

    def run(self) -> dict[str, Any]:
        """Train to the last iteration; returns the summary, which is also written to `summary.json`."""
        with self._running():
            self._agree()
            for line in self.in_effect:
                self.log.say(line)
            with together(self.engine):
                self.hub.warmup(gradient=self.algorithm.needs.gradient)
                if self.held_out is not None and self.main:
                    self.held_out.warmup()
            self._evaluate_if_due()
            while not self._done():
                self.log.write(self.iteration, self.step(self.iteration))
                self.iteration += 1
                if self._asked_to_stop() and self.iteration < self.config.iterations:
                    self._save()
                    self._leave()
                self._evaluate_if_due()
                if self._done() or due(self.iteration, self.config.checkpoint_every):
                    self._save()
            return self._finish()

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration; returns its metrics."""
        config, phase = self.config, PhaseTimer()
        calls_before = dict(self.policy.calls)

        with self._saving_what_is_done(), phase("prompts"):
            prompts = self._prompts_of(iteration)
            slots = shard(list(range(len(prompts))), self.engine.rank, self.engine.world)
            mine = [prompts[slot] for slot in slots]

        with phase("plan"):
            times = self._times()
            per_prompt = config.data.samples_per_prompt
            plans = plans_of(self.algorithm, times, iteration, per_prompt, config.seed)
            rate = self._set_learning_rate(iteration)

        with self._saving_what_is_done():
            with phase("collect"):
                with explained(config, "rollout"):
                    batch = self._collect(plans, mine, slots, iteration)
                judged = self.stored is None and self.algorithm.needs.rewards
                with explained(config, "decode"):
                    tickets = decode_and_submit(self.policy, batch, self.hub, self.geometry) if judged else []
            with phase("score"):
                result = _join([self.hub.result(ticket) for ticket in tickets]) if judged else _unjudged(batch)
        fault("train.scored")

        with phase("gather"):
            table, scores = self._gather(batch, result)
        with self._saving_what_is_done():
            if judged and self.main and due(iteration, self.config.log.rollouts_every):
                write_rollout(self.folder / "rollouts", iteration, batch, result)
        with self._saving_what_is_done():
            for name in scores.keys() & self.watches.keys():
                told = [row[name]["error"] for row in result.info if "error" in row[name]]
                self.watches[name].see(scores[name], told)

        with self._saving_what_is_done(), phase("credit"):
            for prompt, rewards in zip(prompts, table.view(len(prompts), per_prompt), strict=True):
                self.history.add(prompt.id, rewards, iteration)
            batch = replace(
                batch, rewards=result.total.double(), times=times, place=leaf_places(batch, per_prompt),
                critic=self.critic,
            )  # fmt: skip
            batch = replace(batch, draws=self.algorithm.draws(batch))
            everyone = self._with_everyones_rewards(batch, prompts, table, scores)
            advantages = credit_of(self.algorithm, replace(everyone, history=self.history))
            batch = credited(batch, advantages)

        with phase("update"):
            key = stable_seed(config.seed, iteration, -2)
            whole = self.algorithm.needs.whole_samples
            update_of = deal(batch, slots, len(prompts), per_prompt, self.updater.updates, key, whole)
            with explained(config, "update"):
                metrics = self.updater.run(batch, update_of)
            self._check_ratio(metrics.get("ratio_first_update", 0.0))
            self.policy.follow(self.algorithm.old_decay(iteration))
        fault("train.updated")

        with self._saving_what_is_done():
            self._watch_verdicts(metrics)
        self.seconds += phase.total
        roles = ("rollout", "train", "old", "reference", "teacher")
        calls = {role: self._total(self.policy.calls[role] - calls_before.get(role, 0)) for role in roles}
        rewards = reward_metrics(table, scores, per_prompt) if self.algorithm.needs.rewards else {}
        rewards |= gate_metrics(scores, self.hub.rules)
        rewards |= {f"time/reward/{name}": seconds for name, seconds in result.seconds.items()}
        return (
            metrics
            | rewards
            | {"single_pass": float(batch.velocity is not None)}
            | {f"calls/{role}": float(count) for role, count in calls.items()}
            | {f"time/{name}": seconds for name, seconds in phase.seconds.items()}
            | {"time/iteration": phase.total, "time/total": self.seconds, "lr": rate}
        )

    # -------------------------------------------------------------------------------------------- parts of it

    def _prompts_of(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration; a curriculum weighs them by what their samples got so far."""
        weights = None if self.curriculum is None else self.curriculum(self.history, self.prompts, iteration)
        return self.sampler(iteration, weights)

    def _build_policy(self) -> Policy:
        config = self.config
        needs = self.algorithm.needs
        model = self._load_model()
        self.in_effect = fit(model, config.model, self.engine.device)
        return Policy(
            model, lora=config.model.lora and config.model.lora.model_dump(),
            guidance=config.model.guidance, ema_decay=config.optimizer.ema_decay,
            reference=needs.reference or None in needs.teachers, old=needs.old,
            teachers=[t for t in needs.teachers if t is not None],
            largest_guidance=needs.guidance,
            device=self.engine.device, seed=config.seed,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )  # fmt: skip

    def _load_model(self) -> Any:
        return load_model(self.config)

    def _agree(self) -> None:
        """Refuse to go on where processes are at different iterations: their folders are not one shared folder."""
        told = self.engine.gather_text(str(self.iteration))
        if len(set(told)) > 1:
            raise EngineError(
                f"the processes found checkpoints of different iterations ({', '.join(told)}) in {self.folder}: "
                "each must see the same folder. Put output_dir on a disk that all machines share."
            )

    def _times(self) -> Tensor:
        """The grid of a training rollout that the model's own pipeline would take."""
        g = self.geometry
        return self.policy.model.times(self.algorithm.num_steps, g.height, g.width, g.frames)

    def _collect(self, plans: tuple[Plan, ...], prompts: list[Prompt], slots: list[int], iteration: int) -> Batch:
        """Samples of the policy, or those that the prompts' rows name."""
        config = self.config
        if self.stored is not None:
            return self.stored(prompts, slots, self.conditions, iteration=iteration, seed=config.seed)
        return roll_out(
            self.policy, self.algorithm, plans, prompts, slots, self.conditions, self.geometry,
            samples_per_prompt=config.data.samples_per_prompt, iteration=iteration, seed=config.seed,
            recorder=self._recorder(plans, iteration),
        )  # fmt: skip

    def _recorder(self, plans: tuple[Plan, ...], iteration: int) -> Recorder | None:
        """What keeps the rollout's graphs where the update takes them; see `optimizer.update`."""
        expected = expected_cost(self.config, self.algorithm, plans, iteration)
        if not expected.single_pass:
            return None
        asked = self.config.optimizer.update == "single_pass"
        states = math.ceil(expected.stored / self.engine.world)
        return Recorder(policy=self.policy, states=states, memory_share=None if asked else MEMORY_SHARE)

    def _check_ratio(self, deviation: float) -> None:
        """Warn, once, where the policy that is trained is not the one that made the samples."""
        if deviation > RATIO_TOLERANCE and not self.warned:
            self.warned = True
            self.log.say(
                f"warning: ratio_first_update is {deviation:.1e} where it should be 0: the update computes other "
                "log-probs than the rollout. Use model.dtype=float32, or equal rollout_micro_batch and micro_batch; a "
                "clip_range near this number clips noise."
            )

    def _watch_verdicts(self, metrics: Mapping[str, float]) -> None:
        """Of methods that ask their rewards in the loss: the run stops where most pictures get no verdict."""
        if "no_verdict" in metrics:
            without = round(1000 * metrics["no_verdict"])
            for watch in self.watches.values():
                watch.see(torch.tensor([math.nan] * without + [0.0] * (1000 - without)), [])

    def _set_learning_rate(self, iteration: int) -> float:
        o = self.config.optimizer
        update, updates = (i * o.updates_per_iteration for i in (iteration, self.config.iterations))
        rate = o.lr * learning_rate_factor(update, updates, o.schedule, o.warmup, o.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _gather(self, batch: Batch, result: HubResult) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards of all processes as one dense table [P*K] in the order of the prompts, and every score's."""
        per_prompt = self.config.data.samples_per_prompt
        size = self.config.data.prompts_per_iteration * per_prompt
        place = leaf_places(batch, per_prompt)
        columns = [result.total.double(), *(score.double() for score in result.scores.values())]
        table = torch.zeros(2, len(columns), size, dtype=torch.float64)
        for i, column in enumerate(columns):
            valid = column.isfinite()
            table[0, i, place[valid]] = column[valid]
            table[1, i, place[valid]] = 1.0
        value, seen = self.engine.sum(table)
        value[seen == 0] = math.nan
        return value[0], dict(zip(result.scores, value[1:], strict=True))

    def _with_everyones_rewards(
        self, batch: Batch, prompts: list[Prompt], table: Tensor, scores: Mapping[str, Tensor]
    ) -> Batch:
        """The batch as `credit` sees it: this process's edges over the samples of all processes."""
        per_prompt = self.config.data.samples_per_prompt
        rules = {name: rule for name, rule in self.hub.rules.items() if rule.weight != 0 and name in scores}
        trajectory = batch.trajectory
        leaves = torch.zeros(len(trajectory), len(table), dtype=torch.bool, device=trajectory.leaves.device)
        assert batch.place is not None
        leaves[:, batch.place.to(leaves.device)] = trajectory.leaves
        # Scores are normalised by prompt; credit may compare the prompts that came together.
        own = torch.arange(len(prompts)).repeat_interleave(per_prompt)
        group = families(prompts, self.config.data.together).repeat_interleave(per_prompt).to(leaves.device)
        trajectory = replace(trajectory, leaves=leaves, group=group)
        return replace(
            batch, trajectory=trajectory, rewards=table,
            scores={name: normalised(scores[name], rule, own).double() for name, rule in rules.items()},
            weights={name: rule.weight for name, rule in rules.items()},
            groups=[prompts[first] for first in group.unique().tolist()],
        )  # fmt: skip

    def _total(self, count: int) -> int:
        return int(self.engine.sum(torch.tensor(count, dtype=torch.float64)).item())

    def _done(self) -> bool:
        """After the last iteration, or where `patience` evaluations in a row did not raise the best headline score."""
        patience = self.config.data.evaluation.patience
        if patience is None or self.iteration == self.config.iterations:
            return self.iteration == self.config.iterations
        best = self._best_evaluation()
        later = 0 if best is None else sum(int(k) > best for k in self.evaluations)
        return self._total(int(self.main and later >= patience)) > 0  # the main process alone evaluates

    def _best_evaluation(self) -> int | None:
        """After how many iterations the headline score was highest, the first time; None where it has no verdict."""
        name = self._headline()
        scores = {int(k): e["scores"].get(name, {}).get("mean") for k, e in self.evaluations.items()}
        known = {k: score for k, score in scores.items() if score is not None}
        return max(sorted(known), key=lambda k: known[k]) if known else None

    def _evaluate_if_due(self) -> None:
        """Before the first iteration, every so often, and after the last, unless it was done before a resume."""
        done = self.iteration == self.config.iterations
        if due(self.iteration, self.config.evaluate_every, done) and str(self.iteration) not in self.evaluations:
            with self._saving_what_is_done(), explained(self.config, "evaluation"):
                self._evaluate()

    def _evaluate(self) -> None:
        """Score the held-out prompts (main process), save the picture, and remember the summary under the iteration."""
        if self.main:
            settings = self.config.data.evaluation
            found = evaluate(
                self.policy, self.eval_prompts, self.hub, self.conditions, self.geometry, num_steps=settings.num_steps,
                seed=settings.seed, measures=self.measures, batch=settings.batch_size,
                held_out=self.held_out,
            )  # fmt: skip
            summary = found.summary() | {"train_seconds": self.seconds}
            grid = self.folder / "samples" / f"{self.iteration:06d}.png"
            save_grid(found, grid, settings.grid_prompts, fps=self.geometry.fps)
            self._remember_scores(found)
            if self.held_out is not None:
                done = [*map(int, self.evaluations), self.iteration]
                summary["alarms"] = [str(alarm) for alarm in look(self.folder, done, self.held_out.rules)]
            self.log.evaluation(self.iteration, summary)
            self.log.say(f"evaluation after {self.iteration} iterations: {headline(summary)}")
            for alarm in summary.get("alarms", []):
                self.log.say(f"warning: {alarm}")
            if found.total is not None and found.total.isnan().all():
                self.log.say(
                    "warning: no evaluation sample has a verdict by the rewards that are trained on: nothing is learnt "
                    "from such prompts. rollouts/ has the reason for each sample."
                )
            self.evaluations[str(self.iteration)] = summary  # from here on a checkpoint says that it is done
            if settings.keep == "best" and self._best_evaluation() == self.iteration:
                self.best = self.policy.state_dict()

    def _remember_scores(self, found: Evaluation) -> None:
        """Per-sample scores beside the picture: what paired standard errors are made of."""
        total = {} if found.total is None else {TOTAL: found.total}
        rows = {name: [None if math.isnan(x) else x for x in s.tolist()] for name, s in (found.scores | total).items()}
        texts = [p.text for p in found.prompts]
        categories = [str(p.metadata.get("category", "")) for p in found.prompts]
        path = self.folder / "samples" / f"{self.iteration:06d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        top = {name: rows.pop(name) for name in total}
        path.write_text(json.dumps({"prompts": texts, "categories": categories, "scores": rows} | top))

    # -------------------------------------------------------------------------------------------- stopping, going on

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Takes the folder and the signals; however the run ends, lanes, files, signals and lock are given back."""
        before = self._listen()
        try:
            if self.main:
                write_atomic(self.folder / "config.yaml", dump(self.config))
                self._forget_later_samples()
            yield
            self.engine.close()  # not after an error: the other processes may be gone
        finally:
            for number, old in before.items():
                signal.signal(number, old or signal.SIG_DFL)
            self._let_go()

    def _let_go(self) -> None:
        """Close what is open and give the folder back, however far construction came."""
        for part in (getattr(self, name, None) for name in ("hub", "held_out", "log")):
            if part is not None:
                part.close()
        if self.lock is not None:
            self.lock.release()

    @contextmanager
    def _saving_what_is_done(self) -> Iterator[None]:
        """What fails in here stops all processes, but the weights, which it did not touch, are saved before."""
        try:
            with together(self.engine):
                yield
        except Exception:
            if self.iteration > self.saved:
                self._save()
            raise

    def _forget_later_samples(self) -> None:
        """Evaluations of a history that was left, as `log` forgets its rows: the report takes the last for the end."""
        forget_after(self.folder / "rollouts", self.iteration)
        for path in (self.folder / "samples").glob("[0-9]*"):
            if path.stem.isdigit() and int(path.stem) > self.iteration:
                path.unlink()

    def _listen(self) -> dict[int, Any]:
        """The first Ctrl-C or SIGTERM ends the run after the iteration at hand; the second ends it now.

        Returns the handlers that were there before. Outside the main thread Python has no signals to listen to.
        """

        def handler(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                os._exit(128 + number)
            self.signal = number
            if self.main:
                name = signal.Signals(number).name
                text = f"\n{name}: finishing this iteration, then saving. Once more quits now.\n"
                os.write(2, text.encode())  # print() is not reentrant, and may be what the signal interrupted

        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def _asked_to_stop(self) -> bool:
        return self._total(0 if self.signal is None else 1) > 0

    def _leave(self) -> None:
        number = self.signal or signal.SIGTERM
        if self.main:
            self._status("interrupted")
            command = f"flowrl train {self.folder}/config.yaml --resume"
            self.log.say(f"saved at iteration {self.iteration}; go on with: {command}")
        self.engine.close()
        raise Interrupted(128 + number)

    def _status(self, state: str) -> None:
        write_atomic(self.folder / "status.json", json.dumps({"state": state, "iteration": self.iteration}) + "\n")

    def _save(self) -> None:
        """The state after `iteration` iterations; noise and prompts are functions of it, and of the history."""
        with together(self.engine):
            if self.main:
                self._write_checkpoint()
        self.saved = self.iteration

    def _write_checkpoint(self) -> None:
        tensors, optimizer = flatten_optimizer(self.optimizer)
        tensors = {f"optimizer.{k}": v for k, v in tensors.items()}
        tensors |= {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        tensors |= {f"history.{k}": v for k, v in self.history.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        meta = {
            "optimizer": optimizer, "skipped": self.updater.skipped,
            "evaluations": self.evaluations, "seconds": self.seconds, "identity": self.identity,
        }  # fmt: skip
        keep = self.config.keep_checkpoints
        checkpoint.save(self.folder / "checkpoints", self.iteration, tensors, meta, keep=keep)

    def _resumable(self) -> Checkpoint:
        """The newest valid checkpoint; everything must be as it was, or the run stops here and says why."""
        state = checkpoint.latest_valid(self.folder / "checkpoints")
        pairs = diff(state.meta["identity"], self.identity)
        if changed := [f"{key}: {then!r} then, {now!r} now" for key, (then, now) in pairs.items()]:
            raise CheckpointError(
                f"{state.path} belongs to a run with another config: " + "; ".join(changed) + ". "
                "Put the old values back, or start a new run with another output_dir (or name)."
            )
        return state

    def _take_up(self, state: Checkpoint) -> None:
        """Go on from a checkpoint."""
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in ("policy", "optimizer", "history", "best")}
        for key, tensor in state.tensors.items():
            part, _, rest = key.partition(".")
            tensors[part][rest] = tensor
        self.policy.load_state_dict(tensors["policy"])
        restore_optimizer(self.optimizer, tensors["optimizer"], state.meta["optimizer"])
        self.history.load_state_dict(tensors["history"])
        self.best = tensors["best"]
        self.iteration = self.saved = state.iteration
        self.updater.skipped = state.meta["skipped"]
        self.evaluations, self.seconds = state.meta["evaluations"], state.meta["seconds"]

    def _finish(self) -> dict[str, Any]:
        """Weights, summary and report."""
        numbers = sorted(int(k) for k in self.evaluations)
        exported = self._best_evaluation() if self.config.data.evaluation.keep == "best" else None
        exported = numbers[-1] if exported is None and numbers else exported
        summary: dict[str, Any] = {
            "iterations": self.iteration, "train_seconds": self.seconds, "seed": self.config.seed,
            "headline": self._headline(),
            "base": self.evaluations.get(str(numbers[0])) if numbers else None,
            "final": self.evaluations.get(str(exported)) if numbers else None,
            "exported": exported,
        }  # fmt: skip
        summary = plain(summary)
        with together(self.engine):
            if self.main:
                self._write_results(summary)
        return summary

    def _headline(self) -> str:
        """The score that tables show first; the first reward where the one asked for does not exist."""
        asked, first = self.config.data.evaluation.headline, next(iter(self.hub.rules))
        scores = {name for evaluation in self.evaluations.values() for name in evaluation["scores"]}
        return first if not asked or (scores and asked not in scores) else asked

    def _write_results(self, summary: dict[str, Any]) -> None:
        asked, name = self.config.data.evaluation.headline, summary["headline"]
        if asked not in (None, name):
            known = ", ".join(sorted(summary["final"]["scores"]))
            self.log.say(f"note: data.evaluation.headline is {asked!r}, but there are only {known}; showing {name!r}.")
        if self.best:
            self.policy.load_state_dict(self.best)
        shutil.rmtree(self.folder / "weights", ignore_errors=True)  # what a killed or another attempt left there
        example = example_of(self.policy, self.eval_prompts, self.geometry, self.config.data.evaluation.seed)
        self.policy.export(self.folder / "weights", inference=inference_settings(self.config), example=example)
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(self.folder)
        self._status("finished")
        for line in table_lines(self.folder):
            self.log.say(line)
        self.log.say(
            f"wrote {self.folder}: weights/ (for diffusers), samples/, before_after.png, report.html, summary.json"
        )


def _held_out(config: Config, trained: RewardHub, device: Any) -> RewardHub | None:
    """The rewards that are not trained on. One that fails stops nothing, and its mean is missing."""
    if not config.eval_rewards:
        return None
    # Each has a weight, which has no meaning here but that it is no mistake.
    hub = RewardHub([e.entry() | {"weight": 1.0} for e in config.eval_rewards], device=device, max_nan_frac=None)
    if both := sorted(set(hub.rules) & set(trained.rules)):
        raise RewardError(
            f"rewards and eval_rewards both have scores called {', '.join(both)}; give those of eval_rewards a `name:`"
        )
    return hub


def options_of(section: ModelConfig) -> dict[str, Any]:
    """What a config says to the constructor of a family's class."""
    names = ("height", "width", "frames", "fps", "max_sequence_length", "embedded_guidance", "negative_prompt")
    return {name: getattr(section, name) for name in names if getattr(section, name) is not None}


def load_model(config: Config, device: torch.device | str | None = None) -> Any:
    """The generator of a config, still on the CPU; with `device` it is made to fit there (`flowrl.memory.fit`)."""
    section = config.model
    model = load(
        section.path, family=section.family, dtype=getattr(torch, section.dtype), loading=loading_options(section),
        inference=section.inference, **options_of(section),
    )  # fmt: skip
    own = getattr(model, "guidance_argument", "")
    if own and own in (section.inference or {}):
        raise ModelError(f"model.inference sets {own}, which is model.guidance here. Set that, and leave this out.")
    if config.model.decode_tiling:
        model.enable_tiling()
    if device is not None:
        fit(model, section, device)
    return model


def geometry_of(config: Config, model: Any) -> Geometry:
    """What a config generates, where it says nothing the model's own size."""
    return Geometry(
        height=config.model.height or model.height, width=config.model.width or model.width,
        frames=config.model.frames or getattr(model, "frames", 1), fps=config.model.fps or getattr(model, "fps", None),
        rollout_batch=config.model.rollout_micro_batch,
        decode_batch=config.model.decode_micro_batch, store="cpu" if config.model.offload_trajectory else None,
    )  # fmt: skip


def inference_settings(config: Config) -> dict[str, Any]:
    """What the weights of a run should be used with: the steps and the size of its evaluations."""
    size = {"height": config.model.height, "width": config.model.width, "num_frames": config.model.frames}
    given = {key: value for key, value in size.items() if value is not None}
    return {"num_inference_steps": config.data.evaluation.num_steps, **given}


def due(iteration: int, every: int, last: bool = False) -> bool:
    """Whether something that happens every so many iterations (0 = never) happens after this one, or as the last."""
    return every > 0 and (last or iteration % every == 0)


def families(prompts: Sequence[Prompt], key: str | None) -> Tensor:
    """The group of each prompt [P]: the place of the first prompt that has the same metadata `key`, or its own."""
    names = [str(place) if key is None else str(prompt.metadata[key]) for place, prompt in enumerate(prompts)]
    return torch.tensor([names.index(name) for name in names])


def leaf_places(batch: Batch, samples_per_prompt: int) -> Tensor:
    """Where each sample [B] stands in the iteration's table of all samples: prompt by prompt, in order within each."""
    slot = batch.trajectory.group.cpu()
    place = torch.empty_like(slot)
    for s in slot.unique():
        rows = torch.nonzero(slot == s).flatten()
        place[rows] = s * samples_per_prompt + torch.arange(len(rows))
    return place


def credited(batch: Batch, advantages: Tensor) -> Batch:
    """With the credit of its rows [R], and without those whose credit is NaN: they are not trained on."""
    return replace(batch, advantages=advantages).select(~advantages.isnan())


def reward_metrics(table: Tensor, scores: Mapping[str, Tensor], samples_per_prompt: int) -> dict[str, float]:
    """Mean and spread of the reward and of every score over the samples with a verdict."""
    group = torch.arange(len(table) // samples_per_prompt).repeat_interleave(samples_per_prompt)
    known = table[table.isfinite()]
    spread = [g[g.isfinite()].std(correction=0) for g in table.view(-1, samples_per_prompt) if g.isfinite().sum() > 1]
    out = {
        "reward/mean": known.mean().item(),
        "reward/std": known.std(correction=0).item() if len(known) else math.nan,
        "reward/group_std": torch.stack(spread).mean().item() if spread else math.nan,
    }
    out |= {name: float(value) for name, value in group_advantages(table, group).metrics.items()}
    for name, score in scores.items():
        own = [g[g.isfinite()].std(correction=0) for g in score.view(-1, samples_per_prompt) if g.isfinite().sum() > 1]
        out[f"score/{name}"] = score.nanmean().item()
        out[f"score_group_std/{name}"] = torch.stack(own).mean().item() if own else math.nan
        out[f"score_no_verdict/{name}"] = score.isnan().double().mean().item()
    return out


def gate_metrics(scores: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> dict[str, float]:
    """Share of the samples whose total each gate cuts."""
    gates = {name: rule.gate for name, rule in rules.items() if rule.gate is not None and name in scores}
    return {f"gate_cut/{name}": (scores[name] < gate.min).double().mean().item() for name, gate in gates.items()}


def _unjudged(batch: Batch) -> HubResult:
    """What samples that no reward has seen are worth: what was recorded with them, or no verdict."""
    total = torch.full((len(batch.leaf_prompt),), math.nan) if batch.rewards is None else batch.rewards
    return HubResult(total=total.float(), scores={}, parts={}, info=[{} for _ in total], seconds={})


def _join(results: list[HubResult]) -> HubResult:
    """The results of several tickets under each other; a part that a ticket lacks, where a reward failed, is NaN."""
    names = {name: dict.fromkeys(part for r in results for part in r.parts[name]) for name in results[0].scores}
    return HubResult(
        total=torch.cat([r.total for r in results]),
        scores={name: torch.cat([r.scores[name] for r in results]) for name in names},
        parts={
            name: {
                part: torch.cat([r.parts[name].get(part, torch.full_like(r.total, math.nan)) for r in results])
                for part in parts
            }
            for name, parts in names.items()
        },
        info=[row for r in results for row in r.info],
        seconds={name: sum(r.seconds[name] for r in results) for name in names},
    )
