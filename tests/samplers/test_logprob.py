"""Log-probs and KL against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from samplers import Transition, dance_sde, diffusion, flow_sde, gaussian_kl, gaussian_logprob


def transitions(num=4):
    generator = torch.Generator().manual_seed(0)
    p, q, x_next = torch.randn(3, num, 2, 3, 5, generator=generator)
    std_p, std_q = torch.rand(2, num, 1, 1, 1, generator=generator) + 0.01
    return Transition(p, std_p), Transition(q, std_q), x_next


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logprob_is_the_normal_density_with_all_constants(reduction):
    p, _, x_next = transitions()
    reference = Normal(p.mean.double(), p.std.double()).log_prob(x_next.double()).flatten(1)
    got = gaussian_logprob(x_next, p, reduction)
    assert got.shape == (4,) and got.dtype == torch.float32
    assert torch.allclose(got.double(), getattr(reference, reduction)(1), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_the_gaussian_kl(reduction):
    p, q, _ = transitions()
    reference = kl_divergence(Normal(p.mean.double(), p.std.double()), Normal(q.mean.double(), q.std.double()))
    assert torch.allclose(gaussian_kl(p, q, reduction).double(), getattr(reference.flatten(1), reduction)(1), rtol=1e-5)


def test_kl_of_equal_std_is_the_squared_distance():
    """By hand: means 3 std apart give 9/2 per dim; equal means give exactly 0."""
    p = Transition(torch.zeros(1, 4), torch.full((1, 1), 0.5))
    assert gaussian_kl(p, p._replace(mean=torch.full((1, 4), 1.5))).item() == pytest.approx(4.5)
    assert gaussian_kl(p, p).item() == 0


def test_kl_with_g_is_h_times_the_kl_with_std():
    """The published Flow-GRPO code divides by g^2 where the exact KL divides by g^2 h."""
    x, v, v_ref = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    t, t_next = torch.linspace(0.9, 0.3, 5), torch.linspace(0.8, 0.25, 5)
    for kernel in (flow_sde, dance_sde):
        p, q = kernel(x, v, t, t_next, 0.7), kernel(x, v_ref, t, t_next, 0.7)
        g = diffusion(p, t, t_next)
        published = gaussian_kl(p._replace(std=g), q._replace(std=g))
        assert torch.allclose(published, (t - t_next) * gaussian_kl(p, q), rtol=1e-5)


def test_a_step_without_noise_has_no_logprob():
    p, _, x_next = transitions()
    silent = p._replace(std=p.std * torch.tensor([1, 0, 1, 1.0])[:, None, None, None])
    for compute in (lambda: gaussian_logprob(x_next, silent), lambda: gaussian_kl(p, silent)):
        with pytest.raises(ValueError, match=r"no log-prob.*Make it an ODE step"):
            compute()


def test_unknown_reduction_is_refused():
    p, q, _ = transitions()
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        gaussian_kl(p, q, "median")
