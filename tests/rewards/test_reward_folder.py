"""Pictures and videos from the disk as samples."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from rewards import RewardError
from rewards.folder import read, read_media
from rewards.media import to_array, to_pil, to_uint8
from tests.rewards.makers import noise


def save(path, seed=0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(noise(seed, size).media).save(path)
    return path


def test_a_file_is_read_bit_by_bit(tmp_path):
    media, fps = read(save(tmp_path / "a.png"))
    assert torch.equal(to_uint8(media), to_uint8(noise(0, 16).media)) and fps is None


def test_a_folder_is_its_pictures_in_order_with_one_prompt(tmp_path):
    for i, name in enumerate(("b.png", "a.png", "c.PNG")):
        save(tmp_path / name, i)
    (tmp_path / "notes.txt").write_text("no picture")
    samples, paths = read_media([tmp_path], "a dog", {"text": "hi"})
    assert [path.name for path in paths] == ["a.png", "b.png", "c.PNG"]
    assert {s.prompt for s in samples} == {"a dog"} and {s.group for s in samples} == {0}
    assert samples[0].meta == {"text": "hi"}
    assert len(read_media([tmp_path], "", {}, limit=2)[0]) == 2


@pytest.mark.parametrize("key", ["file", "file_name"])
def test_a_list_gives_prompts_metadata_and_groups(tmp_path, key):
    rows = [
        {key: "x/a.png", "prompt": "one", "text": "hi", "meta": {"source": "s"}},
        {key: "b.png", "prompt": "two"},
        {key: "c.png", "prompt": "one"},
    ]
    for i, row in enumerate(rows):
        save(tmp_path / row[key], i)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for given in (tmp_path, tmp_path / "metadata.jsonl"):
        samples, paths = read_media([given], "not used", {})
        assert [s.group for s in samples] == [0, 1, 0]
        assert samples[0].meta == {"text": "hi", "source": "s"}
        assert [path.relative_to(tmp_path) for path in paths] == [Path("x/a.png"), Path("b.png"), Path("c.png")]


def test_a_folder_of_frames_is_a_video(tmp_path):
    for i in range(3):
        save(tmp_path / "clip" / f"{i}.png", i)
    media, _ = read(tmp_path / "clip")
    assert media.shape == (3, 3, 16, 16) and torch.equal(to_uint8(media[2]), to_uint8(noise(2, 16).media))


def test_a_video_file_is_its_frames_and_their_rate(tmp_path):
    av = pytest.importorskip("av")
    grey = [torch.full((3, 32, 32), value) for value in (0.1, 0.5, 0.9)]
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for image in grey:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(to_array(image), format="rgb24")))
        container.mux(stream.encode())
    media, fps = read(tmp_path / "v.mp4")
    assert fps == 4 and media.shape == (3, 3, 32, 32)
    assert media.mean((1, 2, 3)).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"file": "a.png"}\n{"prompt": "x"}\n')
    (tmp_path / "worse.jsonl").write_text("nonsense\n")
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    assert read(tmp_path / "grey.png")[0].shape == (3, 4, 4)
    for path, said in (
        ("bad.png", "bad.png cannot be read"), ("bad.mp4", "bad.mp4 cannot be read"),
        ("none.png", "does not exist"), ("empty", "no picture or video"), ("bad.jsonl", r"bad.jsonl:2: no `file`"),
        ("worse.jsonl", r"worse.jsonl:1: no JSON"), ("none.jsonl", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(RewardError, match=said):
            read_media([tmp_path / path], "", {})
