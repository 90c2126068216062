"""Several processes with full copies of the model (data parallel), joined by accelerate; launch with torchrun.

Gradients are summed once an optimiser step, in one flat buffer, not by DistributedDataParallel: the processes may hold
different numbers of minibatches (an uneven split of the prompts), on which DDP's hooks would wait for ever.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

# The main process evaluates alone while the others wait for it.
TIMEOUT = timedelta(hours=4)
LONGEST = 65_536


class Accelerate:
    """The process group that `torchrun` started: NCCL on accelerators, gloo on CPUs."""

    def __init__(self, device: str = "auto") -> None:
        from accelerate import PartialState

        on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
        self.state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
        self.rank, self.world = self.state.process_index, self.state.num_processes
        self.device = self.state.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone().to(self.device)
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.state.wait_for_everyone()

    def gather_text(self, text: str) -> list[str]:
        """UTF-8 bytes through a fixed-size tensor gather: no pickle travels between processes."""
        if self.world == 1:
            return [text]
        data = text.encode()[:LONGEST]
        mine = torch.zeros(LONGEST, dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        everyone = [torch.zeros_like(mine, device=self.device) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, mine.to(self.device))
        return [bytes(t.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for t in everyone]

    def close(self) -> None:
        """Leave after everybody has arrived: leaving early aborts the others now and then."""
        if self.world > 1:
            self.barrier()
            torch.distributed.destroy_process_group()


def load(device: str = "auto") -> Accelerate:
    """The engine `accelerate`."""
    return Accelerate(device)
