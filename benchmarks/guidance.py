"""What does guidance by a latent reward gain (Flow-NRG, arXiv:2501.13918)? The base model, weight by weight.

    flowrl reward train-latent configs/quickstart.yaml --output latent --prompts 128 --samples-per-prompt 8 \\
        --steps 200 --blocks 3 --seed 0
    python -m benchmarks.guidance latent --weights 3 10 30

Gains are paired: the same prompts and the same noise with and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flowrl.collect import Conditions
from flowrl.config import load_config
from flowrl.data import load_prompts
from flowrl.evaluate import Evaluation, evaluate, evaluation_prompts, mean_and_error, paired_gain
from flowrl.latent_reward import LatentReward, guided_by
from flowrl.media import geometry_of, load_model
from flowrl.policy import Policy
from rewards import RewardHub

SCORES = ("shapes.strict", "shapes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a weight."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("reward", type=Path, help="folder of flowrl reward train-latent")
    parser.add_argument("--weights", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument("--cap", type=float, default=None, help="most that a correction is long, beside the velocity")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--num-samples", type=int, default=300)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args(arguments)
    config = load_config(options.config, [])
    policy = Policy(load_model(config), frozen=True, guidance=config.model.guidance)
    reward = LatentReward.load(options.reward, policy.model)
    prompts = evaluation_prompts(load_prompts(config.data.prompts, "held_out"), options.num_samples)
    conditions = Conditions(encode=policy.encode)
    with RewardHub([entry.entry() for entry in config.rewards], device=policy.device) as hub:

        def scored(weight: float) -> Evaluation:
            guide = guided_by([(reward, weight)], max_ratio=options.cap) if weight else None
            return evaluate(
                policy, prompts, hub, conditions, geometry_of(config, policy.model), num_steps=options.num_steps,
                seed=options.seed, guide=guide,
            )  # fmt: skip

        base = scored(0.0).scores
        print("weight 0:", *(f"{name} {_told(mean_and_error(base[name]))}" for name in SCORES))
        for weight in options.weights:
            found = scored(weight).scores
            gains = (f"{name} {_told(paired_gain(base[name], found[name]), '+')}" for name in SCORES)
            print(f"weight {weight:g}:", *gains, flush=True)


def _told(value: tuple[float | None, float | None], sign: str = "") -> str:
    return " ± ".join("–" if x is None else f"{x:{sign if not i else ''}.3f}" for i, x in enumerate(value))


if __name__ == "__main__":
    main()
