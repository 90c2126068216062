"""Samplers: how a sample of a flow model moves from noise to data.

Needs torch and nothing else of this project. A whole rollout in eight lines::

    import torch
    from samplers import all_steps, flow_sde, gaussian_logprob, noise_source, rollout, shifted_times

    velocity = lambda x, t, prompt: (x - 2) / t[:, None].clamp(min=0.1)
    roots = torch.arange(8)
    noise = noise_source((2,), seed=0, iteration=0, prompt=roots)
    r = rollout(velocity, noise(roots, roots * 0, -1), all_steps(shifted_times(10, shift=3)), flow_sde,
                eta=0.7, prompt=roots, group=roots // 4, noise=noise)
    again = gaussian_logprob(r.x_next, flow_sde(r.x, velocity(r.x, r.t, r.prompt), r.t, r.t_next, 0.7))
    print(r.x0, (again - r.logprob).abs().max())  # 8 samples; log-ratio 0

Three choices that never meet: a kernel (``flow_sde``, ``dance_sde``, ``wan_sde``, ``cps``, ``ddim``), a plan
(``all_steps``, ``window``, ``sliding_window``, ``branch_at``, ...) and the velocity, which is any callable.
"""

from samplers.guidance import Guide, reward_guided
from samplers.kernels import (
    Kernel,
    Transition,
    cps,
    dance_sde,
    ddim,
    diffusion,
    euler_maruyama,
    flow_sde,
    interpolant,
    wan_sde,
)
from samplers.logprob import Reduction, gaussian_kl, gaussian_logprob
from samplers.noise import Noise, keyed_noise, keyed_noise_batch, noise_source, stable_seed
from samplers.plan import (
    Plan,
    Strategy,
    all_steps,
    branch_at,
    compress_tail,
    deterministic,
    random_subset,
    random_window,
    sliding_window,
    subset,
    window,
    window_dwell,
    window_start,
)
from samplers.prediction import (
    denoised,
    flow_state,
    flow_time,
    noise_estimate,
    rows,
    v_prediction,
    velocity_from_eps,
    velocity_from_v_prediction,
    velocity_from_x0,
    vp_alpha,
    vp_state,
)
from samplers.prune import at_steps, best_and_worst
from samplers.rollout import MeanVelocity, Prune, Velocity, rollout
from samplers.solvers import SOLVERS, Solver, dpmpp_2m, euler, heun
from samplers.times import (
    dynamic_shift,
    dynamic_times,
    linear_times,
    scheduler_times,
    shifted_times,
    trailing_vp_times,
)
from samplers.trajectory import Trajectory, minibatch_indices

__all__ = [
    "SOLVERS",
    "Guide",
    "Kernel",
    "MeanVelocity",
    "Noise",
    "Plan",
    "Prune",
    "Reduction",
    "Solver",
    "Strategy",
    "Trajectory",
    "Transition",
    "Velocity",
    "all_steps",
    "at_steps",
    "best_and_worst",
    "branch_at",
    "compress_tail",
    "cps",
    "dance_sde",
    "ddim",
    "denoised",
    "deterministic",
    "diffusion",
    "dpmpp_2m",
    "dynamic_shift",
    "dynamic_times",
    "euler",
    "euler_maruyama",
    "flow_sde",
    "flow_state",
    "flow_time",
    "gaussian_kl",
    "gaussian_logprob",
    "heun",
    "interpolant",
    "keyed_noise",
    "keyed_noise_batch",
    "linear_times",
    "minibatch_indices",
    "noise_estimate",
    "noise_source",
    "random_subset",
    "random_window",
    "reward_guided",
    "rollout",
    "rows",
    "scheduler_times",
    "shifted_times",
    "sliding_window",
    "stable_seed",
    "subset",
    "trailing_vp_times",
    "v_prediction",
    "velocity_from_eps",
    "velocity_from_v_prediction",
    "velocity_from_x0",
    "vp_alpha",
    "vp_state",
    "wan_sde",
    "window",
    "window_dwell",
    "window_start",
]
