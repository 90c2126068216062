"""The half of a run that makes samples and shows them; `flowrl.train` is the half that learns from them.

There are two, `flowrl.media.MediaActor` for generators of pictures and videos and `flowrl.vlm.actor.TextActor` for
models that write; `Config.actor` names the one that a config is for. The trainer asks neither which it got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from flowrl.collect import Guidance
from flowrl.config import Config
from flowrl.configfile import Key
from flowrl.engine import Engine
from flowrl.evaluate import Evaluation
from flowrl.policy import Trained
from flowrl.replay import Replayed
from flowrl.types import AnyBatch, Prompt, TokenBatch, Tokens
from rewards import HubResult
from rewards.combine import Rule
from rewards.types import RewardError


class Judge(Protocol):
    """The rewards of a run, as far as the trainer reads them."""

    @property
    def rules(self) -> Mapping[str, Rule]:
        """{reward: how its score enters the total}"""
        ...

    def close(self) -> None:
        """Let go of what rewards hold."""
        ...


J = TypeVar("J", bound=Judge)


def watched(held_out: J, trained: Judge) -> J:
    """Rewards that are not trained on; a RewardError where a score of theirs has the name of one that is."""
    if both := sorted(set(held_out.rules) & set(trained.rules)):
        raise RewardError(
            f"rewards and eval_rewards both have scores called {', '.join(both)}; give those of eval_rewards a `name:`"
        )
    return held_out


class Actor(Protocol):
    """Prompts to judged samples. Built from what is cheap to check (prompts, rewards); `load` reads the weights."""

    hub: Judge
    """The rewards that are trained on."""
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    policy: Trained
    """From `load` on."""
    in_effect: list[str]
    """What was done to make the model fit, in sentences; from `load` on."""
    held_out: dict[str, Rule]
    """Rewards that are only watched."""
    judges: bool
    """Whether samples are scored after they are drawn; otherwise they carry their rewards, or need none."""
    denoises: bool
    """Whether a sample is made in steps, whose number can be chosen, and which can be guided."""
    guide: Guidance | None
    """What guides them in evaluations."""

    def __init__(self, config: Config, algorithm: Any, engine: Engine) -> None: ...

    @staticmethod
    def problems(config: Config) -> Iterator[tuple[Key, str]]:
        """(key, message) of everything wrong with a config that shows before weights are loaded."""
        ...

    @staticmethod
    def notes(config: Config) -> Iterator[str]:
        """What a config's rewards lack on this machine: no mistake, it may be fetched or run elsewhere."""
        ...

    @staticmethod
    def small(config: Config) -> dict[str, Any]:
        """Overrides {dotted key: value} that make one sample cheap, for a try of everything else."""
        ...

    @staticmethod
    def forms(config: Config) -> tuple[str, ...]:
        """Formats that a run's weights can be exported in, the usual one first."""
        ...

    @staticmethod
    def forecast(
        config: Config, devices: int, tflops: float | None, memory: float | None
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """What `describe` says, and memory and work in sentences, without reading weights.

        `tflops` is the peak of one device (None: measured), `memory` its GiB, where what to change is asked.
        """
        ...

    def fingerprint(self, prompts: Sequence[Prompt]) -> str:
        """A hash of everything that prompts hold."""
        ...

    def load(self) -> None:
        """The model and its policy."""
        ...

    def load_finished(self, weights: Path | None) -> None:
        """The model to be used and not trained: with exported weights, or None: as it was before the run."""
        ...

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """The policy of a checkpoint, to be exported: nothing that only training needs is loaded."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """What a run does and costs, as (what, how much) lines for people."""
        ...

    def warmup(self, everywhere: bool) -> None:
        """Try each reward once; `everywhere` is False on processes that do not evaluate."""
        ...

    def plan(self, iteration: int) -> Any:
        """How the samples of an iteration are made, equal on every process: what `collect` takes."""
        ...

    def collect(self, plan: Any, prompts: Sequence[Prompt], slots: Sequence[int], iteration: int) -> AnyBatch:
        """Samples of these prompts, which stand at `slots` of the iteration's whole list."""
        ...

    def submit(self, batch: AnyBatch) -> Callable[[], HubResult]:
        """Hand the samples to the rewards, which may go on meanwhile; the answer waits for them."""
        ...

    def prepared(self, batch: AnyBatch) -> AnyBatch:
        """With what the algorithm's credit and loss read besides rewards."""
        ...

    def facts(self, batch: AnyBatch) -> dict[str, Tensor]:
        """What else is known of each sample, finite float64 [B]: gathered from all processes beside the scores."""
        ...

    def metrics(
        self, prompts: Sequence[Prompt], batch: AnyBatch, table: Tensor, scores: Mapping[str, Tensor],
        facts: Mapping[str, Tensor], seconds: float,
    ) -> dict[str, float]:  # fmt: skip
        """Numbers about an iteration's samples that only this kind has; tables are of all processes."""
        ...

    def join(self, batches: Sequence[AnyBatch]) -> AnyBatch:
        """The samples of several tries under each other."""
        ...

    def revive(self, batch: AnyBatch, dead: Sequence[Prompt], iteration: int) -> list[Prompt]:
        """Prompts whose answers were all wrong, made easier for another try; [] where nothing can be done."""
        ...

    def replayed(self, batch: TokenBatch, again: Replayed[Tokens], mine: Tensor) -> TokenBatch:
        """A batch and behind it the rows `mine` of earlier answers."""
        ...

    def record(self, folder: Path, iteration: int, batch: AnyBatch, result: HubResult) -> None:
        """Single samples with what every reward said, for people."""
        ...

    def evaluate(self) -> Evaluation:
        """Held-out prompts, scored by all rewards."""
        ...

    def show(self, found: Evaluation, path: Path) -> None:
        """A picture of some of them."""
        ...

    def export(self, folder: Path, *, form: str | None = None, averaged: bool = True) -> str:
        """The weights in one of `forms` (None: the usual one), and in a few words what reads them."""
        ...

    def check_export(self, folder: Path) -> None:
        """Read exported weights as a user would, and draw a sample with them; an error says what does not work."""
        ...

    def close(self) -> None:
        """Let go of what rewards hold."""
        ...
