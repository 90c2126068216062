"""The golden loss trace: 20 iterations of each algorithm on the toy, kept in golden_trace.json.

A change that should not move the numbers must leave it alone. Where one should, write it anew from the repository root
and say why in the same commit:

    python -m tests.algorithms.golden --write
"""

import json
import sys
from pathlib import Path

from flowrl.algorithms.branch_grpo import BranchGRPO
from flowrl.algorithms.dance_grpo import DanceGRPO
from flowrl.algorithms.ddpo import DDPO
from flowrl.algorithms.flash_grpo import FlashGRPO
from flowrl.algorithms.flow_dppo import FlowDPPO
from flowrl.algorithms.flow_grpo import FlowGRPO
from flowrl.algorithms.granular_grpo import GranularGRPO
from flowrl.algorithms.grpo_guard import GRPOGuard
from flowrl.algorithms.mix_grpo import MixGRPO
from flowrl.algorithms.pref_grpo import PrefGRPO
from flowrl.algorithms.tempflow_grpo import TempFlowGRPO
from tests.algorithms.toy import train

PATH = Path(__file__).with_name("golden_trace.json")
# An update moves the ratio well inside the toy's trust region; the published 1e-4 presupposes thousands of dimensions.
CASES = {
    "flow_grpo": FlowGRPO(num_steps=6, clip_range=0.02, kl_coef=0.04),
    "flow_grpo_fast_cps": FlowGRPO(num_steps=6, window=2, sde="cps", eta=0.8, clip_range=0.02, kl_coef=0.0),
    "mix_grpo": MixGRPO(num_steps=8, window=3, shift_every=5, clip_range=0.02),
    "mix_grpo_flash": MixGRPO(num_steps=8, window=2, shift_every=5, clip_range=0.02, tail=0.5, solver="dpmpp_2m"),
    "dance_grpo": DanceGRPO(num_steps=6, clip_range=0.02),
    "branch_grpo": BranchGRPO(num_steps=6, splits=(0, 1, 2), clip_range=0.02, split_noise=2.0, prune_steps=(4,)),
    "tempflow_grpo": TempFlowGRPO(num_steps=6, branches=4, clip_range=0.02),
    "granular_grpo": GranularGRPO(num_steps=6, strides=(1, 2), clip_range=0.02),
    "grpo_guard": GRPOGuard(num_steps=6, clip_range=0.01),
    "flow_dppo": FlowDPPO(num_steps=6, trust=1e-4),
    "ddpo": DDPO(num_steps=6, clip_range=0.02, min_count=8),
    "pref_grpo": PrefGRPO(num_steps=6, clip_range=0.01, margin=0.1),
    "flash_grpo": FlashGRPO(num_steps=6, clip_range=0.02),
}
KEYS = ("reward", "loss", "weight", "clip_frac", "ratio_max_dev", "approx_kl", "kl")


def trace(name: str) -> list[dict[str, float]]:
    """One record an iteration."""
    _, records = train(CASES[name], iterations=20, lr=0.02, updates=2, seed=1)
    return [{key: record[key] for key in KEYS if key in record} for record in records]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    PATH.write_text(json.dumps({name: trace(name) for name in CASES}, indent=1) + "\n")
