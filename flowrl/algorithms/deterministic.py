"""What methods without log-probs share: samples come from the ODE, with any solver."""

from abc import abstractmethod

from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.schedule import training_times
from flowrl.types import Batch, Hyperparameters, Loss, Needs, Policy
from samplers import Kernel, Plan, deterministic


class Deterministic(Hyperparameters):
    """Steps, shift and solver of a rollout in which no step is stochastic."""

    num_steps: fields.ODESteps = 10
    shift: fields.Shift = None
    solver: fields.SolverName = "dpmpp_2m"

    @property
    def eta(self) -> float:
        """No noise is added."""
        return 0.0

    @property
    def kernel(self) -> Kernel | None:
        """There is no stochastic step."""
        return None

    @property
    def needs(self) -> Needs:
        """No log-probs."""
        return Needs(logprobs=False)

    def grid(self, times: Tensor) -> Tensor:
        """The grid [T+1] of the rollout."""
        return training_times(times, self.num_steps, self.shift)

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The ODE from noise to the finished sample."""
        return deterministic(self.grid(times), solver=self.solver)

    @abstractmethod
    def credit(self, batch: Batch) -> Tensor:
        """Credit of each row; see `flowrl.types.Algorithm`."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Loss of a minibatch; see `flowrl.types.Algorithm`."""
