"""HPSv2 by a tiny network of open_clip, in the layout of the published .pt file."""

import pytest
import torch

from rewards import RewardError, Sample, build
from rewards.files import Weights, read_tensors
from rewards.hpsv2 import HPSv2
from rewards.media import from_pil
from tests.rewards.clips import SIDE, build_open_clip, photo

NAME = "tiny-reward-clip"
PROMPTS = ["a red circle", "two blue squares", "a star, " * 100]
SIZES = [(SIDE, SIDE), (96, 64), (40, 200)]


def tiny(folder):
    """For the conformance tests: {"state_dict": ...} and the other things that a training run leaves in a file."""
    model = build_open_clip(folder)
    state = {"epoch": 3, "name": "hps", "state_dict": model.state_dict()}
    torch.save(state, folder / "HPS_v2.1_compressed.pt")
    return {"model": str(folder), "architecture": NAME}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hps")


@pytest.fixture(scope="module")
def options(folder):
    return tiny(folder)


def loaded(options, dtype=torch.float32, **more):
    reward = build("hpsv2", {**options, **more})
    reward.load("cpu", dtype)
    return reward


@pytest.fixture(scope="module")
def reward(options):
    return loaded(options)


def samples():
    return [
        Sample(media=from_pil(photo(*size, seed=i)), prompt=prompt)
        for i, (size, prompt) in enumerate(zip(SIZES, PROMPTS, strict=True))
    ]


@torch.no_grad()
def test_score_is_that_of_open_clips_own_loader_and_transform(options, reward, folder):
    """create_model reads the file itself; its transform is for PIL, with the longer side resized and black around."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = open_clip.create_model(NAME, pretrained=str(folder / "HPS_v2.1_compressed.pt")).eval()
    transform = image_transform_v2(PreprocessCfg(size=SIDE, resize_mode="longest", fill_color=0), is_train=False)
    pixels = torch.stack([transform(photo(*size, seed=i)) for i, size in enumerate(SIZES)])
    tokens = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    expected = (images * texts).sum(-1)
    assert (reward.score(samples()) - expected).abs().max() < 0.01
    torch.testing.assert_close(reward.score(samples())[:1], expected[:1], rtol=1e-4, atol=1e-5)  # of its own size
    assert expected.std() > 0.03
    assert reward.scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)


def test_a_wide_picture_is_not_cut(reward):
    """What lies outside the centre square matters, unlike in CLIP's own preprocessing."""
    plain, marked = torch.full((3, 40, 200), 0.5), torch.full((3, 40, 200), 0.5)
    marked[:, :, :60] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    scores = reward.score([Sample(media=plain, prompt="a red circle"), Sample(media=marked, prompt="a red circle")])
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_version_chooses_the_file(options, folder):
    with pytest.raises(RewardError, match=r"has no HPS_v2_compressed.pt.*give the path of your copy"):
        loaded(options, version="2.0")
    (folder / "HPS_v2_compressed.pt").symlink_to(folder / "HPS_v2.1_compressed.pt")
    assert torch.equal(loaded(options, version="2.0").score(samples()), loaded(options).score(samples()))
    with pytest.raises(RewardError, match="version is 2.1; expected one of '2.1', '2.0', quoted"):
        HPSv2(version=2.1)


def test_the_file_itself_may_be_given(options, folder, reward):
    made = loaded(options, model=str(folder / "HPS_v2.1_compressed.pt"))
    assert torch.equal(made.score(samples()), reward.score(samples()))
    assert made._encoder.trunk.model is reward._encoder.trunk.model


def test_a_file_of_another_network_is_refused(options, tmp_path):
    torch.save({"state_dict": {"visual.proj": torch.zeros(16, 12)}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(RewardError, match="not of this network: .* missing"):
        loaded(options, model=str(tmp_path))
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"<html>404</html>")
    with pytest.raises(RewardError, match="no checkpoint of tensors alone"):
        loaded(options, model=str(tmp_path))


def test_an_old_file_that_is_no_zip_is_read_too(options, reward, folder, tmp_path):
    old = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)
    torch.save(old, tmp_path / "HPS_v2.1_compressed.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(loaded(options, model=str(tmp_path)).score(samples()), reward.score(samples()))


def test_an_architecture_that_open_clip_has_not(options):
    with pytest.raises(RewardError, match="no architecture 'ViT-Q-1'"):
        loaded(options, architecture="ViT-Q-1")


def test_missing_weights_are_named_with_the_command(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RewardError, match=r"hf download xswu/HPSv2 HPS_v2.1_compressed.pt --revision none-such"):
        HPSv2(revision="none-such").load("cpu", torch.float32)


def test_batch_of_several_sizes_is_each_alone(reward):
    alone = torch.cat([reward.score([sample]) for sample in samples()])
    torch.testing.assert_close(reward.score(samples()), alone, rtol=1e-5, atol=1e-6)


def test_bfloat16(options, reward):
    made = loaded(options, dtype=torch.bfloat16)
    value = made.score(samples())
    assert value.dtype == torch.float32
    assert made.scale == reward.scale
    torch.testing.assert_close(value, reward.score(samples()), rtol=0, atol=0.05)


def test_checkpointing_changes_nothing_but_the_memory(options, reward):
    def run(made):
        kept = []
        media = samples()[1].media.requires_grad_()

        def keep(tensor):
            if 17 in tensor.shape:  # 4 x 4 patches and the class token
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = made.score([Sample(media=media, prompt=PROMPTS[0])])
        value.sum().backward()
        return value.detach(), media.grad, sum(kept)

    (value, gradient, kept), (expected, slope, all_kept) = run(loaded(options, checkpoint=True)), run(reward)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slope)
    assert kept < 0.5 * all_kept


def test_the_shared_network_leaves_with_its_last_reward(options):
    import gc
    import weakref

    made = loaded(options, dtype=torch.float64)
    model = weakref.ref(made._encoder.trunk.model)
    made.unload()
    gc.collect()
    assert model() is None
    with pytest.raises(RewardError, match="hpsv2 has no weights yet"):
        made.score(samples())


def test_its_card_names_the_file_that_it_reads():
    assert HPSv2.card.weights == (Weights("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),)
    assert HPSv2()._weights == HPSv2.card.weights[0]


@pytest.mark.parametrize("name", ["file.safetensors", "file.pt"])
def test_a_file_that_is_no_checkpoint_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"<html>404</html>")
    with pytest.raises(RewardError, match=f"{name} is no checkpoint of tensors alone"):
        read_tensors(tmp_path / name)


def test_a_tensor_without_a_name_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "file.pt")
    with pytest.raises(RewardError, match="is no checkpoint of tensors alone"):
        read_tensors(tmp_path / "file.pt")
