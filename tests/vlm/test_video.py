"""Questions about videos: frames of files and of lists, what each class is given, log-probs of the answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.config import make_config
from flowrl.data import DataError, fingerprint
from flowrl.models.pipeline import ModelError
from flowrl.train import Trainer
from flowrl.video import save_video
from flowrl.vlm.augment import shuffled
from flowrl.vlm.data import clips, load_questions, messages
from flowrl.vlm.generate import begin
from flowrl.vlm.model import pictures_of, with_pictures
from flowrl.vlm.server import _sendable
from tests import runs
from tests.vlm.policies import LORA, TEMPERATURE, answers, expected, load, make, picture, written_out

pytestmark = pytest.mark.slow

WITH, WITHOUT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"), ("llava", "smolvlm")
GREYS = 12
"""Frames of the files: evenly grey, from dark to light."""


def asked(text, *parts):
    return ({"role": "user", "content": [*parts, {"type": "text", "text": text}]},)


def video(seeds, width=56, height=56, fps=2.0):
    return {"type": "video", "video": [picture(seed, width, height) for seed in seeds], "fps": fps}


def image(seed, width=56, height=56):
    return {"type": "image", "image": picture(seed, width, height)}


QUESTIONS = (
    asked("what moves?", video(range(4))),
    asked("count", video(range(4, 7), 40, 70), image(8, 90, 30)),
    asked("hello"),
    asked("what now?", video([11, 12], 84, 28, fps=0.5)),
)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with a.mp4 and b.gif of greys that get lighter, frames of two sizes, and broken.mp4."""
    folder = tmp_path_factory.mktemp("videos")
    greys = torch.linspace(0, 1, GREYS)
    save_video(greys[:, None, None, None].expand(-1, 3, 64, 64), folder / "a.mp4", fps=6)
    shades = [Image.new("RGB", (48, 48), (round(255 * float(grey)),) * 3) for grey in greys]
    shades[0].save(folder / "b.gif", save_all=True, append_images=shades[1:], duration=250, loop=0)
    for i in range(3):
        shades[i].save(folder / f"{i}.png")
    shades[0].resize((20, 20)).save(folder / "small.png")
    (folder / "broken.mp4").write_bytes(b"#EXTM3U\n/etc/hostname\n")
    return folder


def rows_of(folder, *rows, name="questions.jsonl", **options):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_questions(folder / name, **options)


def levels(clip):
    return [np.asarray(frame, dtype=float).mean() / 255 for frame in clip.frames]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("most", [1, 4, 8, 100])
@pytest.mark.parametrize(("file", "rate"), [("a.mp4", 6.0), ("b.gif", 4.0)])
def test_frames_of_a_file_are_evenly_spaced_and_know_their_time(media, file, rate, most):
    (question,) = rows_of(media, {"prompt": "what?", "videos": [file]}, video_frames=most)
    (clip,) = clips(question)
    count = min(most, GREYS)
    wanted = [i * GREYS // count / (GREYS - 1) for i in range(count)]
    assert levels(clip) == pytest.approx(wanted, abs=0.03)
    assert clip.fps == pytest.approx(rate * count / GREYS)
    assert {frame.mode for frame in clip.frames} == {"RGB"} and len({frame.size for frame in clip.frames}) == 1


def test_a_list_of_pictures_is_a_video(media):
    (question,) = rows_of(media, {"prompt": "what?", "videos": [["0.png", "1.png", "2.png"], "b.gif"]}, video_frames=2)
    first, second = clips(question)
    assert levels(first) == pytest.approx([0, 1 / 11], abs=0.01) and first.fps == pytest.approx(2 * 2 / 3)
    assert len(second.frames) == 2
    (memory,) = load_questions([{"prompt": "what?", "videos": [[picture(0), picture(1)]]}])
    assert [frame.tobytes() for frame in clips(memory)[0].frames] == [picture(0).tobytes(), picture(1).tobytes()]


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_frames_are_the_same_frames_and_never_in_order(media, seed):
    row = {"prompt": "what?", "videos": ["a.mp4", ["0.png", "1.png"], ["2.png"]], "shuffled": True}  # a field of theirs
    (question,) = rows_of(media, row)
    assert levels(clips(question)[0]) == sorted(levels(clips(question)[0]))
    there, mixed = clips(question), clips(shuffled(question, key=(seed, 7)))
    assert [clip.fps for clip in mixed] == [clip.fps for clip in there]
    assert [sorted(levels(clip)) for clip in mixed] == [sorted(levels(clip)) for clip in there]
    assert levels(mixed[0]) != levels(there[0]) and levels(mixed[1]) == levels(there[1])[::-1]
    again, other = (clips(shuffled(question, key=key)) for key in ((seed, 7), (seed, 8)))
    assert levels(again[0]) == levels(mixed[0]) != levels(other[0])


def test_marks_say_where_videos_and_pictures_stand(media):
    row = {"videos": ["b.gif", ["0.png"]], "images": ["1.png"]}
    marked, bare = rows_of(
        media, {"prompt": "<image>a <video> b <video>c", **row}, {"prompt": "what?", **row}, name="marks.jsonl"
    )
    (message,) = messages(marked)
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["image", "text", "video", "text", "video", "text"]
    assert [len(part["video"]) for part in message["content"] if part["type"] == "video"] == [8, 1]
    (message,) = messages(bare)
    assert [part["type"] for part in message["content"]] == ["video", "video", "image", "text"]


def test_what_is_no_video_is_refused_in_words(media):
    for given, told in (
        ("a.mp4", "give a list of videos"), (["0.png"], r"a video is the path of an \.mp4 or \.gif, or its frames"),
        ([[]], "a video is the path of"), (["c.mp4"], "there is no file .*c.mp4"), ([3], "a video is the path of"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=told):
            rows_of(media, {"prompt": "what?", "videos": given})
    with pytest.raises(DataError, match="1 times <video> in the text, and 2 videos"):
        rows_of(media, {"prompt": "<video> what?", "videos": ["a.mp4", "b.gif"]})
    (sizes,) = rows_of(media, {"prompt": "what?", "videos": [["0.png", "small.png"]]})
    with pytest.raises(DataError, match="prompt 0: videos: the frames of a video differ in size"):
        clips(sizes)


def test_a_file_is_read_as_what_its_name_says(media):
    """A list of other files that calls itself .mp4 opens none of them."""
    (question,) = rows_of(media, {"prompt": "what?", "videos": ["broken.mp4"]})
    with pytest.raises(DataError, match=r"broken.mp4 cannot be read as a video .*; replace the file"):
        clips(question)


def test_a_resumed_run_notices_another_video(media, tmp_path):
    for file in ("a.mp4", "b.gif", "0.png"):
        (tmp_path / file).write_bytes((media / file).read_bytes())
    row = {"prompt": "what?", "videos": ["a.mp4", ["0.png"]]}
    prints = [fingerprint(rows_of(tmp_path, row))]
    (tmp_path / "a.mp4").write_bytes((media / "b.gif").read_bytes())
    prints.append(fingerprint(rows_of(tmp_path, row)))
    (tmp_path / "0.png").write_bytes((media / "1.png").read_bytes())
    prints += [fingerprint(rows_of(tmp_path, row)), fingerprint(rows_of(tmp_path, row, video_frames=4))]
    assert len(set(prints)) == 4


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", WITH)
def test_the_first_ratio_is_one_and_log_probs_are_those_of_the_model_alone(name):
    """Mixed with pictures and none, of other sizes and lengths; read once a prompt, and each row apart."""
    policy = make(name, lora=LORA)
    inputs = [policy.prepare(question) for question in QUESTIONS]
    rows, tokens = answers(policy, limit=8, inputs=inputs)
    alone = [expected(policy.model, row) for row in rows]
    said = policy.evaluate(tokens).logprob
    for row, own, there in zip(rows, alone, said, strict=True):
        assert torch.allclose(there[: len(own)].detach(), own.float(), atol=2e-4)
        assert torch.allclose(row.logprob, own.float(), atol=2e-4)
    assert (said - tokens.logprob).abs().max() < 2e-4
    assert policy._share_checked and policy._share  # prompts were read once


@pytest.mark.parametrize("name", WITH)
def test_frames_are_seen_in_their_order(name):
    """Another frame, or another order, changes what the model says; of Qwen2.5 and 3 also another time."""
    model = load(name)

    def said(*parts):
        inputs = model.prepare(asked("what?", *parts))
        batch = written_out(model, [begin(inputs, (0,))])
        with torch.no_grad():
            return model.logprobs(model.states(batch)[0][:, -1])

    there, other = said(video([1, 2, 3, 4])), said(video([1, 2, 3, 5]))
    assert not torch.allclose(there, other, atol=1e-4) and torch.equal(there, said(video([1, 2, 3, 4])))
    assert not torch.allclose(there, said(video([3, 4, 1, 2])), atol=1e-4)
    knows_time = name in ("qwen2_5_vl", "qwen3_vl")
    assert torch.allclose(there, said(video([1, 2, 3, 4], fps=0.2)), atol=1e-5) != knows_time


@pytest.mark.parametrize("name", WITH[:3])
def test_no_frame_is_dropped_or_doubled_that_was_chosen(name):
    """Patches: two frames make one in time, and an odd last one is repeated."""
    model = load(name)
    for count in (2, 3, 8):
        grid = model.prepare(asked("what?", video(range(count)))).media["video_grid_thw"]
        assert grid[0, 0] == -(-count // 2)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_videos_says_so(name):
    with pytest.raises(ModelError, match=r"takes no videos: \w+ has nothing that prepares them. Give pictures"):
        load(name).prepare(QUESTIONS[0])


def test_masked_pictures_are_those_of_videos_too():
    question = asked("what?", video([1, 2]), image(3))
    assert [one.tobytes() for one in pictures_of(question)] == [picture(seed).tobytes() for seed in (1, 2, 3)]
    (swapped,) = with_pictures(question, [picture(seed) for seed in (7, 8, 9)])
    assert [len(part.get("video", ())) for part in swapped["content"]] == [2, 0, 0]
    assert [one.tobytes() for one in pictures_of([swapped])] == [picture(seed).tobytes() for seed in (7, 8, 9)]
    policy = make("qwen2_vl")
    _, tokens = answers(policy, limit=4, inputs=[policy.prepare(QUESTIONS[0])])
    with torch.no_grad(), policy.masked_images(0.6, 0):
        blind = policy.evaluate(tokens).logprob
    assert (blind - tokens.logprob)[tokens.mask].abs().max() > 1e-3


def test_a_server_is_sent_none():
    with pytest.raises(ModelError, match="a server is sent pictures, no videos"):
        _sendable(QUESTIONS[0][0])


# ------------------------------------------------------------------------------------------------ a run


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_a_run_learns_from_questions_about_videos(media, vlm_tree, tmp_path, name):
    rows_of(
        media, {"prompt": "<video> what moves?", "videos": ["a.mp4"], "answer": "1"},
        {"prompt": "how many?", "videos": [["0.png", "1.png", "2.png"]], "images": ["1.png"], "answer": "2"},
        {"prompt": "hello", "answer": "3"}, name="run.jsonl",
    )  # fmt: skip
    changes = {"data.prompts": f"{media}/run.jsonl", "data.video_frames": 4, "iterations": 2,
               "generation.temperature": TEMPERATURE}  # fmt: skip
    run = Trainer(make_config(vlm_tree(tmp_path / "run", changes, name)))
    assert run.config.data.video_frames == 4
    run.run()
    told = runs.rows(tmp_path / "run")
    assert all(row["ratio_first_update"] < 1e-4 and row["grad_norm"] > 0 for row in told)
    assert (tmp_path / "run" / "samples" / "000002.png").is_file()
