"""Videos that are written are the videos that are read."""

import pytest
import torch

from flowrl.video import save_video
from rewards.folder import read


@pytest.mark.parametrize(
    ("size", "written"), [((16, 24), (96, 144)), ((150, 200), (150, 200)), ((129, 131), (130, 132))]
)
def test_a_video_is_read_back(tmp_path, size, written):
    """Frames in order, near their colours; tiny ones enlarged by a whole number, odd sides made even."""
    height, width = size
    clip = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, height, width).clone()
    clip[:, 0, :, width // 2 :] = 0.9  # the right half is reddish
    save_video(clip, tmp_path / "new" / "clip.mp4", fps=12.5)
    found, fps = read(tmp_path / "new" / "clip.mp4")
    assert found.shape == (5, 3, *written) and fps == 12.5
    times = written[0] // height
    expected = clip.repeat_interleave(times, -1).repeat_interleave(times, -2)
    inner = found[..., : expected.shape[-2], : expected.shape[-1]]
    assert (inner - expected).abs().mean() < 0.02
    assert (found[:, :, 2:-2, 4 : written[1] // 2 - 8].mean((1, 2, 3)).diff() > 0.1).all()


def test_values_beyond_the_range_are_cut(tmp_path):
    save_video(torch.stack([torch.full((3, 16, 16), value) for value in (-1.0, 2.0)]), tmp_path / "clip.mp4")
    found, fps = read(tmp_path / "clip.mp4")
    assert found[0].max() < 0.05 and found[1].min() > 0.95 and fps == 8
