"""What is special to Wan: two experts that share the times, and a first frame that is known."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torchvision.transforms.functional import to_pil_image

from flowrl.models import ModelError, load, load_pipeline
from flowrl.models.wan import Wan
from flowrl.policy import Policy
from flowrl.types import take
from tests.models.tiny import euler

pytestmark = pytest.mark.slow

BOUNDARY = 0.875
PICTURES = [(torch.rand(3, 40, 24, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
TEXTS = ["a red cat", "two dogs"]


def eps(model, count=2):
    shape = model.noise_shape(model.height, model.width, model.frames)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def experts():
    return load("tiny/wan22")


def gradients(model, rows, t):
    """{expert: gradients} of a sum over these rows."""
    model.trainable.requires_grad_(True).zero_grad()
    cond = take(model.encode(TEXTS), torch.tensor(rows) % 2)
    model.velocity(eps(model, 4)[rows], t[rows], cond).square().sum().backward()
    found = {name: [p.grad for p in model.trainable[name].parameters()] for name in model.components}
    return {name: [g.clone() for g in grads if g is not None] for name, grads in found.items()}


def test_each_expert_learns_from_the_rows_of_its_times_alone(experts):
    t = torch.tensor([0.3, 0.95, BOUNDARY, 0.8])
    together = gradients(experts, [0, 1, 2, 3], t)
    for name, own, others in (("transformer", [1, 2], [0, 3]), ("transformer_2", [0, 3], [1, 2])):
        alone, nothing = gradients(experts, own, t), gradients(experts, others, t)
        assert nothing[name] == [] and together[name]
        largest = max(float(g.abs().max()) for g in alone[name])
        assert largest > 0
        for a, b in zip(alone[name], together[name], strict=True):
            assert torch.allclose(a, b, atol=1e-6 * largest)


def test_a_row_says_the_same_among_rows_of_the_other_expert(experts):
    t, cond = torch.tensor([0.3, 0.95]), experts.encode(TEXTS)
    with torch.no_grad():
        for guidance in (1.0, 4.0):
            both = experts.velocity(eps(experts), t, cond, guidance)
            for i in range(2):
                one = slice(i, i + 1)
                alone = experts.velocity(eps(experts)[one], t[one], take(cond, torch.tensor([i])), guidance)
                assert torch.allclose(both[one], alone, atol=1e-5)


@pytest.fixture
def adapted():
    """A policy on both experts, of whose adapters none is zero."""
    policy = Policy(load("tiny/wan22"), lora={"rank": 2, "alpha": 6}, ema_decay=0.75, ema_warmup=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    policy.ema.reset()
    return policy


def test_the_reference_is_the_base_model_s_at_the_times_of_either_expert(experts, adapted):
    cond = experts.encode(TEXTS)
    for t in (torch.full((2,), 0.95), torch.full((2,), 0.3)):
        with torch.no_grad():
            base, tuned = experts.velocity(eps(experts), t, cond), adapted.velocity(eps(experts), t, cond)
            assert not torch.allclose(tuned, base, atol=1e-3)
            with adapted.reference():
                assert torch.equal(adapted.velocity(eps(experts), t, cond), base)
            assert torch.equal(adapted.velocity(eps(experts), t, cond), tuned)


def test_the_average_is_of_both_experts(adapted):
    def adapters():
        return {
            f"{part}.{name}": parameter.detach().clone()
            for part in ("transformer", "transformer_2")
            for name, parameter in getattr(adapted.model.pipe, part).named_parameters()
            if "lora" in name
        }

    before = adapters()
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(1.0)
    adapted.update_average()
    with adapted.averaged():
        averaged = adapters()
    assert len({name.split(".")[0] for name in before}) == 2 and averaged.keys() == before.keys()
    for name, value in averaged.items():
        assert torch.allclose(value, before[name] + 0.25, atol=1e-6), name


def test_a_guidance_of_its_own_is_refused_where_there_is_no_second_expert():
    with pytest.raises(ModelError, match="no second expert"):
        load("tiny/wan", inference={"guidance_scale_2": 2.0})


def test_a_missing_expert_is_named():
    pipe = load_pipeline("tiny/wan22")
    pipe.register_modules(transformer_2=None)
    with pytest.raises(ModelError, match="transformer_2 is missing"):
        Wan(pipe)


def test_the_grid_of_the_published_scheduler_is_taken():
    """The published checkpoints have UniPC; by its documentation sigma' = s sigma / (1 + (s - 1) sigma)."""
    model = load("tiny/wan")
    model.pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    )
    sigmas = torch.linspace(1, 0.001, 11, dtype=torch.float64)[:-1]
    times = model.times(10, 32, 32, 5)
    assert torch.allclose(times[:-1].double(), 5 * sigmas / (1 + 4 * sigmas), atol=2e-6) and times[-1] == 0


@pytest.mark.parametrize("name", ["wan_i2v", "wan22_i2v", "wan22_ti2v_image"])
def test_videos_of_two_pictures_are_the_pipeline_s_one_by_one(name):
    """The pipeline takes one picture a call; here each prompt has its own, of any size."""
    model = load(f"tiny/{name}")
    cond = model.encode(TEXTS, PICTURES)
    x0 = euler(
        lambda x, t, c: model.velocity(x, t, c, 3.0), eps(model), model.times(4, model.height, model.width, 5), cond
    )
    media = model.decode(x0)
    for i, (picture,) in enumerate(PICTURES):
        theirs = model.pipe(
            image=to_pil_image(picture), prompt=TEXTS[i], latents=eps(model)[i : i + 1], output_type="pt",
            return_dict=False, **model.arguments(guidance=3.0),
        )[0]  # fmt: skip
        assert torch.allclose(media[i], theirs[0], atol=2e-4)


def test_a_known_first_frame_comes_out_as_it_went_in():
    model = load("tiny/wan22_ti2v_image")
    cond = model.encode(TEXTS, PICTURES)
    small = torch.stack(
        [model.pipe.video_processor.preprocess(to_pil_image(picture), 32, 32)[0] for (picture,) in PICTURES]
    )
    assert torch.allclose(cond["known"], model.encode_media((small / 2 + 0.5).unsqueeze(1)), atol=1e-5)
    x0 = euler(lambda x, t, c: model.velocity(x, t, c, 3.0), eps(model), model.times(4, 32, 32, 5), cond)
    assert torch.allclose(x0[:, :, :1], cond["known"], atol=1e-6)
    t = torch.tensor([0.9, 0.2])
    estimate = eps(model) - t.reshape(-1, 1, 1, 1, 1) * model.velocity(eps(model), t, cond)
    assert torch.allclose(estimate[:, :, :1], cond["known"], atol=1e-6)


def test_the_files_of_ti2v_also_make_videos_of_a_picture():
    """They name the pipeline of text alone; model.family says otherwise."""
    cond = load("tiny/wan22_ti2v_image").encode(TEXTS, PICTURES)
    model = load("tiny/wan22_ti2v", family="wan_i2v")
    assert type(model.pipe).__name__ == "WanImageToVideoPipeline" and model.fps == 24
    for name, tensor in model.encode(TEXTS, PICTURES).items():
        assert torch.equal(tensor, cond[name])
    t = torch.tensor([0.9, 0.2])
    expected = load("tiny/wan22_ti2v_image").velocity(eps(model), t, cond)
    assert torch.equal(model.velocity(eps(model), t, cond), expected)


def test_weights_that_cannot_take_a_picture_or_such_a_text_are_refused():
    with pytest.raises(ModelError, match="model.family: wan,"):
        load("tiny/wan", family="wan_i2v")
    with pytest.raises(ModelError, match="Set it to 512"):
        load("tiny/wan_i2v", max_sequence_length=64)
    with pytest.raises(ModelError, match="source pictures"):
        load("tiny/wan22_i2v").encode(TEXTS)
