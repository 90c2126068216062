"""Noise as a function of identity: the same (seed, iteration, prompt, member, step) gives the same numbers.

Batch size, order, process count and restarts therefore do not change a rollout. Step -1 is the initial noise.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Noise", "keyed_noise", "keyed_noise_batch", "noise_source", "stable_seed"]

Noise = Callable[[Tensor, Tensor, int], Tensor]


def stable_seed(*key: int) -> int:
    """64-bit hash (BLAKE2b) of whole numbers; equal in every process, on every machine, in every Python."""
    text = ",".join(str(int(part)) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_noise(
    shape: Sequence[int],
    *,
    seed: int,
    iteration: int,
    prompt: int,
    member: int,
    step: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of one sample, ``shape`` fp32, drawn on the CPU and then moved to ``device``.

    Note: PyTorch's CPU generator uses the low 32 bits of a seed, so two unrelated keys may, very rarely, draw alike;
    and PyTorch does not promise equal random numbers across its own versions.
    """
    generator = torch.Generator().manual_seed(stable_seed(seed, iteration, prompt, member, step))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(device)


def keyed_noise_batch(
    shape: Sequence[int],
    *,
    seed: int,
    iteration: int,
    prompt: Tensor | Sequence[int],
    member: Tensor | Sequence[int],
    step: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise of N samples [N, *shape] fp32; row i is ``keyed_noise`` of (prompt[i], member[i]). One copy to device."""
    keys = list(zip(_ints(prompt), _ints(member), strict=True))
    out = torch.empty((len(keys), *shape))
    for row, (p, m) in zip(out, keys, strict=True):
        row.copy_(keyed_noise(shape, seed=seed, iteration=iteration, prompt=p, member=m, step=step))
    return out.to(device)


def noise_source(
    shape: Sequence[int],
    *,
    seed: int,
    iteration: int,
    prompt: Tensor | Sequence[int],
    member: Tensor | Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Noise:
    """The ``noise`` argument of ``rollout``: noise(root [N], member [N], step) -> [N, *shape] fp32.

    ``prompt`` [R] is each root's global prompt key and ``member`` [R] the index of its first leaf within the prompt's
    group (default 0): 0, 1, 2, ... when every sample is its own root, 0 when a group grows from one root.
    """
    prompts = torch.as_tensor(prompt).cpu()
    first = torch.zeros_like(prompts) if member is None else torch.as_tensor(member).cpu()

    def noise(root: Tensor, below: Tensor, step: int) -> Tensor:
        root = root.cpu()
        return keyed_noise_batch(
            shape,
            seed=seed,
            iteration=iteration,
            prompt=prompts[root],
            member=first[root] + below.cpu(),
            step=step,
            device=device,
        )

    return noise


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return [int(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
