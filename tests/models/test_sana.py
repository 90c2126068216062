"""What is Sana's own: the grid of its real scheduler, the size it draws at, and weights that learnt a variance."""

import inspect

import pytest
import torch

from flowrl.models import load
from flowrl.models.sana import Sana
from tests.models.test_conformance import drawn_by_diffusers, noise, sampled

pytestmark = pytest.mark.slow

TEXTS = ["a red cat", "two dogs on a hill"]


@pytest.fixture(scope="module")
def model():
    return load("tiny/sana")


def published(model, *, fractions=False, **config):
    """The same networks with the scheduler that the published weights come with; `fractions` of its timesteps stay."""
    from diffusers import DPMSolverMultistepScheduler

    class Uncut(DPMSolverMultistepScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = 1000 * self.sigmas[:-1]

    kind = Uncut if fractions else DPMSolverMultistepScheduler
    scheduler = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, **config)
    pipe = type(model.pipe)(**{**model.pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return Sana(pipe, inference=model.inference)


def test_the_published_scheduler_s_grid(model):
    u = torch.linspace(0.999, 0, 5, dtype=torch.float64)
    times = published(model).times(4, 32, 32)
    assert torch.allclose(times.double(), 3 * u / (1 + 2 * u), atol=1e-6)


def test_the_published_scheduler_s_first_order_step_is_euler_s(model):
    """But for the fractions of its timesteps, which it cuts off."""
    own = published(model, fractions=True, solver_order=1)
    eps = noise(own, len(TEXTS))
    mine, theirs = sampled(own, TEXTS, eps, 3.0, 4), drawn_by_diffusers(own, TEXTS, eps, 3.0)
    assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1)))


def test_the_pipeline_s_defaults_where_the_folder_has_none(model):
    bare = Sana(model.pipe)
    default = inspect.signature(type(model.pipe).__call__).parameters["complex_human_instruction"].default
    assert (bare.height, bare.width) == (32, 32)
    assert bare.arguments()["use_resolution_binning"] is False
    assert bare.arguments()["complex_human_instruction"] == default


def test_the_other_branch_has_no_instruction(model):
    plain = Sana(model.pipe, inference={**model.inference, "complex_human_instruction": []})
    cond, bare = model.encode(TEXTS), plain.encode(TEXTS)
    assert torch.equal(cond["negative_prompt_embeds"], bare["negative_prompt_embeds"])
    assert not torch.allclose(cond["prompt_embeds"], bare["prompt_embeds"])


def test_a_learnt_variance_is_left_out(model):
    from diffusers import SanaTransformer2DModel

    own = load("tiny/sana")
    torch.manual_seed(0)
    config = {**own.pipe.transformer.config, "out_channels": 2 * own.latent_channels}
    own.pipe.transformer = own.trainable = SanaTransformer2DModel.from_config(config).eval()
    eps = noise(own, len(TEXTS))
    mine, theirs = sampled(own, TEXTS, eps, 3.0, 4), drawn_by_diffusers(own, TEXTS, eps, 3.0)
    assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1)))
