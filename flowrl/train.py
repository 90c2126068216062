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
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowrl import checkpoint
from flowrl.actor import Actor
from flowrl.algorithms.advantages import group_advantages
from flowrl.algorithms.schedule import credit_of
from flowrl.checkpoint import Checkpoint, CheckpointError, RunLock, flatten_optimizer, restore_optimizer
from flowrl.config import Config, diff, dump, identity
from flowrl.curriculum import curriculum
from flowrl.data import PromptSampler, shard
from flowrl.engine import EngineError, connect, together
from flowrl.evaluate import Evaluation
from flowrl.faults import fault
from flowrl.filters import Kept, Refill, build, times
from flowrl.hacking import TOTAL, look
from flowrl.history import PromptHistory
from flowrl.log import RunLog, plain, write_atomic
from flowrl.memory import explained
from flowrl.metrics import PhaseTimer
from flowrl.replay import ReplayBuffer, answers, gathered
from flowrl.report import headline, table_lines, write_report
from flowrl.resolve import resolve
from flowrl.rollouts import forget_after
from flowrl.types import AnyBatch, Prompt, TokenBatch
from flowrl.update import Updater, deal, learning_rate_factor
from rewards import HubResult
from rewards.combine import Rule, normalised
from rewards.scorer import NanWatch
from samplers import stable_seed

RATIO_TOLERANCE = 1e-4
"""Deviation of the first update's ratio from 1 that rounding in fp32 does not explain."""


B = TypeVar("B", bound=AnyBatch)


@dataclass(frozen=True, kw_only=True)
class Try:
    """Prompts and their judged samples; tables are of all processes, in the order of the prompts."""

    prompts: list[Prompt]
    slots: list[int]
    """Where this process's prompts stand in the iteration, all tries counted on."""
    batch: AnyBatch
    """The samples of this process."""
    table: Tensor
    """Rewards float64 [P*K]; NaN = no verdict."""
    scores: dict[str, Tensor]
    asked: dict[str, Tensor]
    """Whether a reward was asked about a sample, bool [P*K] each."""
    facts: dict[str, Tensor]
    seconds: dict[str, float]

    @staticmethod
    def joined(tries: Sequence[Try], actor: Actor) -> Try:
        """Several of them under each other."""
        batch = actor.join([t.batch for t in tries])
        rewards, place = (torch.cat([getattr(t.batch, name) for t in tries]) for name in ("rewards", "place"))

        def stacked(tables: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}

        return Try(
            prompts=[prompt for t in tries for prompt in t.prompts], slots=[slot for t in tries for slot in t.slots],
            batch=replace(batch, rewards=rewards, place=place), table=torch.cat([t.table for t in tries]),
            scores=stacked([t.scores for t in tries]), asked=stacked([t.asked for t in tries]),
            facts=stacked([t.facts for t in tries]),
            seconds={name: sum(t.seconds[name] for t in tries) for name in tries[0].seconds},
        )  # fmt: skip


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
        self.algorithm = config.algorithm.build()
        # Prompts and rewards come before the model: their mistakes are common, and loading weights can take minutes.
        data = config.data
        if data.prompts_per_iteration < self.engine.world:
            raise EngineError(
                f"{self.engine.world} processes share the prompts of an iteration, but there are only "
                f"{data.prompts_per_iteration}: raise data.prompts_per_iteration, or launch fewer processes."
            )
        actor: Actor = resolve(config.actor, "flowrl")(config, self.algorithm, self.engine)
        self.actor = actor
        self.prompts, self.hub = actor.prompts, actor.hub
        self.sampler = PromptSampler(
            actor.prompts, data.prompts_per_iteration, config.seed, data.balance, data.together
        )
        self.history = PromptHistory(data.history, len(actor.prompts), data.bar)
        self.curriculum = curriculum(data.curriculum) if data.curriculum else None
        self.filters = build([entry.entry() for entry in data.filters], data.bar) if data.filters else None
        self.replay = ReplayBuffer(data.replay.size, data.replay.max_age, answers) if data.replay else None
        self._prompts_of(0, 0)  # refuses a curriculum's weights before anything is loaded
        self.identity = identity(config) | {
            "data.prompts (contents)": actor.fingerprint(actor.prompts),
            "data.eval_prompts (contents)": actor.fingerprint(actor.eval_prompts),
        }
        """What must be the same when the run is resumed."""
        self.watches = {
            name: NanWatch(name=name, max_nan_frac=data.max_no_verdict, key="data.max_no_verdict")
            for name, rule in self.hub.rules.items()
            if rule.counts
        }
        state = self._resumable() if resume else None
        actor.load()
        self.policy = actor.policy
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
            for line in self.actor.in_effect:
                self.log.say(line)
            with together(self.engine):
                self.actor.warmup(self.main)
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
        per_prompt = config.data.samples_per_prompt
        rate = self._set_learning_rate(iteration)

        tries: list[Try] = []
        refill = Refill(wanted=config.data.prompts_per_iteration, max_tries=config.data.max_tries)
        while refill.wants():
            tries.append(self._try(iteration, tries, phase))
            refill.saw(len(tries[-1].prompts), self._groups_kept(tries[-1], iteration))
        found = tries[0] if len(tries) == 1 else Try.joined(tries, self.actor)
        batch, prompts, table, scores = found.batch, found.prompts, found.table, found.scores
        sampled = phase.total

        with self._saving_what_is_done(), phase("credit"):
            batch = self.actor.prepared(batch)
            kept = self._kept(found, iteration)
            among = table if kept is None else table.where(self._compared(kept, iteration), math.nan)
            everyone = self._with_everyones_rewards(batch, prompts, among, scores, found.facts)
            advantages = credit_of(self.algorithm, replace(everyone, history=self.history))
            whole = self.algorithm.needs.whole_units
            batch = credited(batch, advantages, None if kept is None else times(batch, kept.counts, whole))
            filtered = {} if kept is None else kept.metrics | refill.metrics
            if refill.warning and self.filters is not None:
                self.log.say(refill.warning)

        with phase("update"):
            key = stable_seed(config.seed, iteration, -2)
            needs = self.algorithm.needs
            update_of = deal(
                batch, found.slots, len(prompts), per_prompt, self.updater.updates, key,
                needs.whole_samples or needs.whole_groups,
            )  # fmt: skip
            if self.replay is not None:
                batch, update_of = self._with_replay(batch, update_of, found)
            with explained(config, "update"):
                metrics = self.updater.run(batch, update_of)
            if self.replay is not None or not self.algorithm.starts_at_one(batch):
                metrics.pop("ratio_first_update", None)  # not 1 by right: it says nothing
            self._check_ratio(metrics.get("ratio_first_update", 0.0))
            self.policy.follow(self.algorithm.old_decay(iteration))
            if self.algorithm.resets_optimizer(iteration):
                self.optimizer.state.clear()
        fault("train.updated")

        with self._saving_what_is_done():
            self._watch_verdicts(metrics)
        self.seconds += phase.total
        roles = ("rollout", "train", "old", "reference", "teacher")
        calls = {role: self._total(self.policy.calls[role] - calls_before.get(role, 0)) for role in roles}
        rewards = reward_metrics(table, scores, per_prompt, found.asked) if self.algorithm.needs.rewards else {}
        rewards |= gate_metrics(scores, self.hub.rules)
        rewards |= {f"time/reward/{name}": seconds for name, seconds in found.seconds.items()}
        return (
            metrics
            | rewards
            | filtered
            | self.actor.metrics(prompts, batch, table, scores, found.facts, sampled)
            | {f"calls/{role}": float(count) for role, count in calls.items()}
            | {f"time/{name}": seconds for name, seconds in phase.seconds.items()}
            | {"time/iteration": phase.total, "time/total": self.seconds, "lr": rate}
        )

    def _try(self, iteration: int, before: Sequence[Try], phase: PhaseTimer) -> Try:
        """Prompts, samples and their rewards: once an iteration, or until enough groups pass the filters."""
        config, number = self.config, len(before)
        per_prompt, size = config.data.samples_per_prompt, config.data.prompts_per_iteration
        with self._saving_what_is_done(), phase("prompts"):
            again = self._revived(before[-1], iteration) if before else []
            prompts = [*again, *self._prompts_of(iteration, number)][:size]
            slots = shard(list(range(size)), self.engine.rank, self.engine.world)
            mine = [prompts[slot] for slot in slots]

        with phase("plan"):
            plan = self.actor.plan(iteration)

        with self._saving_what_is_done():
            with phase("collect"):
                places = [number * size + slot for slot in slots]
                batch = replace(
                    self.actor.collect(plan, mine, places, iteration), progress=iteration / config.iterations
                )
                wait = self.actor.submit(batch)
            with phase("score"):
                result = wait()
        fault("train.scored")

        with phase("gather"):
            place = leaf_places(batch.group, per_prompt)
            batch = replace(batch, rewards=result.total.double(), place=place)
            table, scores, asked, facts = self._gather(batch, result, number * size * per_prompt)
        with self._saving_what_is_done():
            if not before and self.actor.judges and self.main and due(iteration, config.log.rollouts_every):
                self.actor.record(self.folder / "rollouts", iteration, batch, result)
        with self._saving_what_is_done():
            for name in scores.keys() & self.watches.keys():
                told = [row[name]["error"] for row in result.info if "error" in row.get(name, {})]
                self.watches[name].see(asked_of(result, name), told)
            for prompt, rewards in list(zip(prompts, table.view(size, per_prompt), strict=True))[len(again) :]:
                self.history.add(prompt.id, rewards, iteration)
        return Try(
            prompts=prompts, slots=places, batch=batch, table=table, scores=scores, asked=asked, facts=facts,
            seconds=dict(result.seconds),
        )  # fmt: skip

    def _kept(self, found: Try, iteration: int) -> Kept | None:
        """What the filters leave of the samples of all processes; None without filters."""
        if self.filters is None:
            return None
        group = torch.arange(len(found.table)) // self.config.data.samples_per_prompt
        key = stable_seed(self.config.seed, iteration, -5)
        kept = self.filters.keep(found.table, group, found.facts | found.scores, key=key)
        return kept.first(self.config.data.prompts_per_iteration)

    def _compared(self, kept: Kept, iteration: int) -> Tensor:
        """Samples [B] that credit compares: what filters take out of a group stays in its statistics, in no pair."""
        return kept.samples if self.algorithm.pairs_answers(iteration) else kept.in_groups

    def _groups_kept(self, found: Try, iteration: int) -> int:
        kept = self._kept(found, iteration)
        return len(found.prompts) if kept is None else len(kept.groups)

    def _with_replay(self, batch: AnyBatch, update_of: Tensor, found: Try) -> tuple[AnyBatch, Tensor]:
        """With answers of earlier iterations in the places of those that teach nothing; then the new ones are kept."""
        assert self.replay is not None and isinstance(batch, TokenBatch) and batch.place is not None
        assert batch.advantages is not None and batch.advantages.dim() == 1
        size, iteration = len(found.table), batch.iteration
        worth = torch.zeros(size, dtype=torch.float64)
        worth[batch.place] = batch.advantages.double()
        worth = self.engine.sum(worth)
        per_prompt = self.config.data.samples_per_prompt
        places = self.config.data.prompts_per_iteration * per_prompt  # further tries bring more answers, not places
        taken = self._total(int((batch.advantages != 0).sum()))
        again = self.replay.draw(places - taken, iteration, self.config.seed)
        rows = gathered(batch.tokens, batch.place, size, self.engine.sum)
        ids = torch.tensor([prompt.id for prompt in found.prompts]).repeat_interleave(per_prompt)
        self.replay.add(rows, worth, ids, iteration)
        if again is None:
            return batch, update_of
        mine = torch.arange(self.engine.rank, len(again.prompts), self.engine.world)
        more = self.actor.replayed(batch, again, mine)
        return more, torch.cat([update_of, mine % self.updater.updates])

    def _revived(self, last: Try, iteration: int) -> list[Prompt]:
        """Prompts of the last try whose samples were all wrong, made easier."""
        rows = last.table.view(len(last.prompts), -1)
        wrong = (~(rows >= self.config.data.bar)).all(1) & rows.isfinite().any(1)
        dead = [prompt for prompt, is_it in zip(last.prompts, wrong.tolist(), strict=True) if is_it]
        return self.actor.revive(last.batch, dead, iteration)

    # -------------------------------------------------------------------------------------------- parts of it

    def _prompts_of(self, iteration: int, number: int) -> list[Prompt]:
        """The prompts of an iteration's try; a curriculum weighs them by what their samples got so far."""
        weights = None if self.curriculum is None else self.curriculum(self.history, self.prompts, iteration)
        return self.sampler(iteration * self.config.data.max_tries + number, weights)

    def _agree(self) -> None:
        """Refuse to go on where processes are at different iterations: their folders are not one shared folder."""
        told = self.engine.gather_text(str(self.iteration))
        if len(set(told)) > 1:
            raise EngineError(
                f"the processes found checkpoints of different iterations ({', '.join(told)}) in {self.folder}: "
                "each must see the same folder. Put output_dir on a disk that all machines share."
            )

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

    def _gather(
        self, batch: AnyBatch, result: HubResult, first: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Of all processes' samples, in the order of the prompts [P*K]: rewards, scores, who was asked, facts."""
        size = self.config.data.prompts_per_iteration * self.config.data.samples_per_prompt
        assert batch.place is not None
        place = batch.place - first
        facts = self.actor.facts(batch)
        columns = [result.total.double(), *(score.double() for score in result.scores.values()), *facts.values()]
        told = getattr(result, "asked", {})
        table = torch.zeros(2, len(columns), size, dtype=torch.float64)
        rows = torch.zeros(len(result.scores), size, dtype=torch.float64)
        for i, column in enumerate(columns):
            valid = column.isfinite()
            table[0, i, place[valid]] = column[valid]
            table[1, i, place[valid]] = 1.0
        for row, name in zip(rows, result.scores, strict=True):
            row[place] = told[name].double() if name in told else 1.0
        value, seen = self.engine.sum(table)
        asked = self.engine.sum(rows) > 0
        value[seen == 0] = math.nan
        last = 1 + len(result.scores)
        scores = dict(zip(result.scores, value[1:last], strict=True))
        return value[0], scores, dict(zip(scores, asked, strict=True)), dict(zip(facts, value[last:], strict=True))

    def _with_everyones_rewards(
        self, batch: AnyBatch, prompts: list[Prompt], table: Tensor, scores: Mapping[str, Tensor],
        facts: Mapping[str, Tensor],
    ) -> AnyBatch:  # fmt: skip
        """The batch as `credit` sees it: this process's rows over the samples of all processes."""
        per_prompt = self.config.data.samples_per_prompt
        rules = {name: rule for name, rule in self.hub.rules.items() if rule.weight != 0 and name in scores}
        # Scores are normalised by prompt; credit may compare the prompts that came together.
        own = torch.arange(len(prompts)).repeat_interleave(per_prompt)
        group = families(prompts, self.config.data.together).repeat_interleave(per_prompt)
        everyone = batch.among(len(table), group, facts)
        values = {name: normalised(scores[name], rule, own).double() for name, rule in rules.items()}
        return replace(
            everyone, rewards=table,
            # What a sample with a total has no score of was not asked about it: it adds nothing there.
            scores={name: value.masked_fill(value.isnan() & table.isfinite(), 0.0) for name, value in values.items()},
            weights={name: rule.weight for name, rule in rules.items()},
            groups=[prompts[first] for first in group.unique().tolist()],
            total=self.engine.sum,
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
            found = self.actor.evaluate()
            summary = found.summary() | {"train_seconds": self.seconds}
            self.actor.show(found, self.folder / "samples" / f"{self.iteration:06d}.png")
            self._remember_scores(found)
            if self.actor.held_out:
                done = [*map(int, self.evaluations), self.iteration]
                summary["alarms"] = [str(alarm) for alarm in look(self.folder, done, self.actor.held_out)]
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
        """Per-sample scores beside the picture: what paired standard errors are made of; answers in full."""
        total = {} if found.total is None else {TOTAL: found.total}
        rows = {name: [None if math.isnan(x) else x for x in s.tolist()] for name, s in (found.scores | total).items()}
        texts = [p.text for p in found.prompts]
        categories = [str(p.metadata.get("category", "")) for p in found.prompts]
        path = self.folder / "samples" / f"{self.iteration:06d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        top: dict[str, Any] = {name: rows.pop(name) for name in total}
        if found.texts:
            top["answers"] = list(found.texts)
            top["right"] = [str(p.metadata.get("answer", "")) for p in found.prompts]
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
        for part in (getattr(self, name, None) for name in ("actor", "log")):
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
        if self.replay is not None:
            tensors |= {f"replay.{k}": v for k, v in self.replay.state_dict().items()}
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
        tensors: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("policy", "optimizer", "history", "best", "replay")
        }
        for key, tensor in state.tensors.items():
            part, _, rest = key.partition(".")
            tensors[part][rest] = tensor
        self.policy.load_state_dict(tensors["policy"])
        restore_optimizer(self.optimizer, tensors["optimizer"], state.meta["optimizer"])
        self.history.load_state_dict(tensors["history"])
        self.best = tensors["best"]
        if self.replay is not None:
            self.replay.load_state_dict(tensors["replay"])
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
        readers = self.actor.export(self.folder / "weights")
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(self.folder)
        self._status("finished")
        for line in table_lines(self.folder):
            self.log.say(line)
        self.log.say(
            f"wrote {self.folder}: weights/ ({readers}), samples/, before_after.png, report.html, summary.json"
        )


def due(iteration: int, every: int, last: bool = False) -> bool:
    """Whether something that happens every so many iterations (0 = never) happens after this one, or as the last."""
    return every > 0 and (last or iteration % every == 0)


def families(prompts: Sequence[Prompt], key: str | None) -> Tensor:
    """The group of each prompt [P]: the place of the first prompt that has the same metadata `key`, or its own."""
    names = [str(place) if key is None else str(prompt.metadata[key]) for place, prompt in enumerate(prompts)]
    return torch.tensor([names.index(name) for name in names])


def leaf_places(group: Tensor, samples_per_prompt: int) -> Tensor:
    """Where each sample [B] stands in the iteration's table of all samples: prompt by prompt, in order within each.

    `group` [B] is the place of its prompt in the iteration.
    """
    slot = group.cpu()
    place = torch.empty_like(slot)
    for s in slot.unique():
        rows = torch.nonzero(slot == s).flatten()
        place[rows] = s * samples_per_prompt + torch.arange(len(rows))
    return place


def credited(batch: B, advantages: Tensor, counts: Tensor | None = None) -> B:
    """With the credit of its rows [R] (or [R,S]), and without those whose credit is NaN: they are not trained on.

    `counts` [R] says how often each of the others is.
    """
    unknown = advantages.isnan()
    known = ~(unknown if unknown.dim() == 1 else unknown.any(1))
    if counts is not None:
        known = torch.arange(len(known)).repeat_interleave(counts * known.cpu()).to(known.device)
    return replace(batch, advantages=advantages).select(known)


def asked_of(result: HubResult, name: str) -> Tensor:
    """The scores of the samples that a reward was asked about: routes of verifiers leave the others out."""
    asked = getattr(result, "asked", {}).get(name)
    return result.scores[name] if asked is None else result.scores[name][asked]


def reward_metrics(
    table: Tensor, scores: Mapping[str, Tensor], samples_per_prompt: int, asked: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mean and spread of the reward and of every score over the samples with a verdict.

    score_no_verdict is a share of the samples that a reward was `asked` about, bool [B]; left out where of none.
    """
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
        if asked[name].any():
            out[f"score_no_verdict/{name}"] = score[asked[name]].isnan().double().mean().item()
    return out


def gate_metrics(scores: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> dict[str, float]:
    """Share of the samples whose total each gate cuts."""
    gates = {name: rule.gate for name, rule in rules.items() if rule.gate is not None and name in scores}
    return {f"gate_cut/{name}": (scores[name] < gate.min).double().mean().item() for name, gate in gates.items()}
