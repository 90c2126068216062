"""Attention backends: what is set runs, what is said is true, and what would do nothing is refused."""

import sys
import types

import pytest
import torch

from flowrl import attention
from flowrl.models.pipeline import ModelError


@pytest.fixture
def flux():
    """A transformer of the newer kind: its layers ask for a backend by name."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


@pytest.fixture
def sd3():
    """A transformer of the older kind, with a second attention and normed keys as SD3.5 has."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=8,
        pooled_projection_dim=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def ask_flux(model):
    generator = torch.Generator().manual_seed(1)
    return lambda: model(
        hidden_states=torch.randn(2, 9, 16, generator=generator.manual_seed(1)),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        pooled_projections=torch.randn(2, 16, generator=generator), timestep=torch.tensor([0.3, 0.8]),
        img_ids=torch.zeros(9, 3), txt_ids=torch.zeros(5, 3), return_dict=False,
    )[0]  # fmt: skip


def ask_sd3(model):
    generator = torch.Generator().manual_seed(1)
    return lambda: model(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator.manual_seed(1)),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        pooled_projections=torch.randn(2, 16, generator=generator), timestep=torch.tensor([300.0, 800.0]),
        return_dict=False,
    )[0]  # fmt: skip


def written_out(query, key, value, attn_bias=None, op=None, scale=None):
    """Attention of [N,S,D] or [N,S,H,D], as xformers defines it."""
    flat = query.ndim == 3
    if flat:
        query, key, value = (x.unsqueeze(2) for x in (query, key, value))
    weights = torch.einsum("nshd,nthd->nhst", query, key) * (scale or query.shape[-1] ** -0.5)
    out = torch.einsum("nhst,nthd->nshd", weights.softmax(-1), value)
    return out.squeeze(2) if flat else out


@pytest.fixture
def kernel_of_xformers(monkeypatch):
    """A kernel in the place of xformers', which has none for the CPU."""
    from diffusers.models import attention_processor

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = written_out
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)


def processors(model):
    return {type(layer.processor).__name__ for layer in model.modules() if hasattr(layer, "processor")}


def active():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry.get_active_backend()[0]


def test_native_says_which_kernel_torch_takes(flux, sd3):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    said = attention.use(sd3, "native")
    assert said.startswith("native (cpu: ")
    name = said.removeprefix("native (cpu: ").rstrip(")").upper()
    kernel = getattr(SDPBackend, name if name == "MATH" else f"{name}_ATTENTION")
    x = torch.randn(1, 2, 32, 8)
    with sdpa_kernel(kernel):
        torch.nn.functional.scaled_dot_product_attention(x, x, x)  # and that kernel is one that runs here
    assert attention.use(torch.nn.Linear(2, 2), "native") == "native (no attention layers)"


def test_a_backend_is_set_on_one_model_alone(flux):
    before = active()
    assert attention.use(flux, "_native_math") == "_native_math (cpu)"
    assert {layer.processor._attention_backend.value for layer in attention.layers_of(flux).dispatching} == {
        "_native_math"
    }
    assert active() == before


def test_a_choice_that_another_model_made_for_the_process_does_not_matter(flux):
    """diffusers' own `set_attention_backend` changes all models, and `reset_attention_backend` does not change back."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = active()
    try:
        _AttentionBackendRegistry.set_active_backend(type(before)("_native_cudnn"))
        with torch.no_grad(), pytest.raises(RuntimeError, match="No viable backend"):
            ask_flux(flux)()
        attention.use(flux, "native")
        with torch.no_grad():
            assert ask_flux(flux)().isfinite().all()
        assert active().value == "_native_cudnn"
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_backends_agree(flux):
    names = attention.backends(flux, gradient=False)
    assert {"native", "_native_math", "flex"} <= set(names)
    for name in names:
        assert attention.agreement(flux, name, ask_flux(flux)) <= 1e-5, name


def test_a_backend_without_a_gradient_is_refused_in_training(flux):
    with pytest.raises(ModelError, match="'flex' cannot run on cpu .*backward.*model.attention=native"):
        attention.use(flux, "flex")
    assert "flex" not in attention.backends(flux)


def test_a_kernel_that_returns_no_graph_is_refused_and_one_that_rounds_is_told(flux, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    def eight_bits(query, key, value):
        rounded = [(x.detach() * 16).round() / 16 for x in (query, key)]
        return written_out(*rounded, value.detach())

    name = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, eight_bits)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value"})
    with pytest.raises(ModelError, match="gives no gradient"):
        attention.use(flux, name.value)
    assert "inexact: differs by" in attention.use(flux, name.value, gradient=False)


@pytest.mark.parametrize("name", ["flash", "sage", "_native_cudnn"])
def test_what_cannot_run_here_says_why(flux, name):
    if name in attention.backends(flux):
        pytest.skip(f"{name} runs here")
    kept = {layer.processor._attention_backend for layer in attention.layers_of(flux).dispatching}
    with pytest.raises(ModelError, match=f"attention '{name}' cannot run on cpu in float32: .*model.attention=native"):
        attention.use(flux, name)
    assert {layer.processor._attention_backend for layer in attention.layers_of(flux).dispatching} == kept


def test_what_would_do_nothing_is_refused(sd3):
    text = "'flash' does nothing on SD3Transformer2DModel.*JointAttnProcessor2_0.*or xformers"
    with pytest.raises(ModelError, match=text):
        attention.use(sd3, "flash")
    assert attention.backends(sd3)[0] == "native"


def test_models_without_any_choice_say_so():
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=8,
    )  # fmt: skip
    for name in ("flash", "xformers"):
        with pytest.raises(ModelError, match="does nothing on CogVideoX.*Set model.attention=native.$"):
            attention.use(model, name)
    assert attention.backends(model) == ["native"]


def test_names_that_are_none(flux):
    with pytest.raises(ModelError, match="'nativ': no such backend .did you mean 'native'"):
        attention.use(flux, "nativ")
    with pytest.raises(ModelError, match="'flash_hub' fetches compiled code.*model.attention=flash"):
        attention.use(flux, "flash_hub")
    assert not [name for name in attention.known() if name.endswith("_hub")]


def test_xformers_runs_or_says_why_not(sd3, flux):
    for model in (sd3, flux):
        before = processors(model)
        if "xformers" not in attention.backends(model):
            with pytest.raises(ModelError, match="'xformers' cannot run on cpu in float32"):
                attention.use(model, "xformers")
        assert processors(model) == before


def test_sd3_gets_its_own_xformers_processor_and_loses_it_again(sd3, kernel_of_xformers):
    exact = ask_sd3(sd3)().detach()
    assert attention.use(sd3, "xformers") == "xformers (cpu)"
    assert processors(sd3) == {"XFormersJointAttnProcessor"}
    assert (ask_sd3(sd3)().detach() - exact).abs().max() <= 1e-5
    assert attention.agreement(sd3, "xformers", ask_sd3(sd3)) <= 1e-5
    assert processors(sd3) == {"XFormersJointAttnProcessor"}  # as it was before
    attention.use(sd3, "native")
    assert processors(sd3) == {"JointAttnProcessor2_0"}


def test_a_unet_gets_the_xformers_processors_of_unets(kernel_of_xformers):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)

    def ask():
        return unet(x, torch.tensor([10, 900]), text, return_dict=False)[0]

    assert attention.agreement(unet, "xformers", ask) <= 1e-5
    with attention.using(unet, "xformers"):
        assert processors(unet) == {"XFormersAttnProcessor"}
    assert processors(unet) == {"AttnProcessor2_0"}


def test_a_context_puts_everything_back(flux):
    attention.use(flux, "_native_math")
    with attention.using(flux, "native") as said:
        assert said.startswith("native")
    with pytest.raises(ZeroDivisionError), attention.using(flux, "native"):
        raise ZeroDivisionError
    assert {layer.processor._attention_backend.value for layer in attention.layers_of(flux).dispatching} == {
        "_native_math"
    }


def test_training_goes_through_the_backend_that_was_asked_for(flux):
    """Gradients of a weight through two backends are equal."""
    weight = flux.transformer_blocks[0].attn.to_q.weight
    found = []
    for name in ("native", "_native_math"):
        attention.use(flux, name)
        found.append(torch.autograd.grad(ask_flux(flux)().square().sum(), weight)[0])
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


def test_agreement_sees_a_difference(flux, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, lambda query, key, value: 0.9 * value)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value"})
    assert attention.agreement(flux, name.value, ask_flux(flux)) > 1e-3
