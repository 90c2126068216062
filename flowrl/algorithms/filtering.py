"""Which stored steps are trained on. A mask [E] over the edges; what it leaves out gets NaN credit."""

import torch
from torch import Tensor

from flowrl.types import Batch
from samplers import stable_seed


def random_steps(batch: Batch, share: float) -> Tensor:
    """For each sample its own random int(share * stored steps) of them, at least one (DanceGRPO), bool [E].

    Drawn anew in each iteration; a function of (seed, iteration, sample, step) whatever the number of processes.
    An edge with several samples below it counts for the first of them.
    """
    edges = batch.trajectory
    leaf = edges.leaves.int().argmax(1).tolist()
    chains: dict[int, list[tuple[int, int]]] = {}
    for place, (sample, step) in enumerate(zip(leaf, edges.step.tolist(), strict=True)):
        chains.setdefault(sample, []).append((stable_seed(batch.seed, batch.iteration, sample, step), place))
    keep = torch.zeros(len(edges), dtype=torch.bool, device=edges.leaves.device)
    for chain in chains.values():
        keep[[place for _, place in sorted(chain)[: max(1, int(share * len(chain) + 1e-9))]]] = True
    return keep
