"""Reading preferences: our own form, and small files in the layouts of the benchmarks."""

import csv
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards import RewardError
from rewards.preferences import read_preferences


def png(path, colour=(200, 30, 30), size=(12, 8)):
    """A picture on the disk; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path.name


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dumped(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path):
    """A folder with a.png, b.png, c.png of different colours."""
    for number, name in enumerate("abc"):
        png(tmp_path / f"{name}.png", (80 * number, 20, 20))
    return tmp_path


def told(data):
    """(prompt, file of a, file of b, p_a, dim, category) of every pair."""
    names = [(pair.a.medium.key.rpartition("/")[2], pair.b.medium.key.rpartition("/")[2]) for pair in data.pairs]
    return [(p.prompt, *n, p.p_a, p.dim, p.category) for p, n in zip(data.pairs, names, strict=True)]


# ------------------------------------------------------------------------------------------------ our own


def test_native_pairs_and_rankings(pictures):
    file = lines(
        pictures / "data.jsonl",
        {"prompt": "p", "a": "a.png", "b": "b.png", "label": 1, "meta": {"text": "hi"}, "model_a": "x", "model_b": "y"},
        {"prompt": "p", "a": "a.png", "b": "c.png", "p_a": 0.25, "dim": "quality", "category": "noise"},
        {"prompt": "q", "items": ["a.png", "b.png", "c.png"], "rank": [2, 1, 2], "models": ["x", "y", "z"]},
        {"prompt": "q", "a": "b.png", "b": "a.png", "label": 0},
    )
    data = read_preferences(file)
    assert data.format == "native" and told(data) == [
        ("p", "a.png", "b.png", 1.0, None, None),
        ("p", "a.png", "c.png", 0.25, "quality", "noise"),
        ("q", "a.png", "b.png", 0.0, None, None),
        ("q", "a.png", "c.png", 0.5, None, None),
        ("q", "b.png", "c.png", 1.0, None, None),
        ("q", "b.png", "a.png", 0.5, None, None),
    ]
    assert [pair.label for pair in data.pairs] == [1, -1, -1, 0, 1, 0]
    (ranking,) = data.rankings
    assert ranking.rank == (2, 1, 2) and [item.model for item in ranking.items] == ["x", "y", "z"]
    sample = data.pairs[0].a.sample()
    assert sample.meta == {"text": "hi"} and sample.prompt == "p" and sample.media.shape == (3, 8, 12)
    expected = torch.from_numpy(np.array(Image.open(pictures / "a.png"))).permute(2, 0, 1) / 255
    assert torch.equal(sample.media, expected)


def test_the_same_picture_for_another_prompt_or_meta_is_another_item(pictures):
    row = {"prompt": "p", "a": "a.png", "b": "b.png", "label": 1}
    file = lines(pictures / "data.jsonl", row, row, row | {"prompt": "q"}, row | {"meta": {"text": "x"}})
    keys = [pair.a.key for pair in read_preferences(file).pairs]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_folder_with_pairs_and_a_pair_store(pictures, tmp_path):
    lines(pictures / "pairs.jsonl", {"prompt": "p", "a": "a.png", "b": "b.png", "label": -1})
    assert told(read_preferences(pictures)) == [("p", "a.png", "b.png", 0.0, None, None)]
    lines(
        pictures / "pairs.jsonl",
        {"prompt": "p", "chosen": "c.png", "rejected": "b.png", "metadata": {"category": "two"}, "margin": 0.3},
    )
    data = read_preferences(pictures)
    assert data.format == "store" and told(data) == [("p", "c.png", "b.png", 1.0, None, "two")]


GOOD = {"prompt": "p", "a": "a.png", "b": "b.png", "label": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"label": 2}, r'data.jsonl:2: "label" is 2; expected 1 \(a is better\), -1 \(b\) or 0'),
        (GOOD | {"label": True}, '"label" is True'),
        (GOOD | {"p_a": 0.5}, 'expected "label" .* or "p_a" .*, found both'),
        ({"prompt": "p", "a": "a.png", "b": "b.png"}, "found neither"),
        ({"prompt": "p", "a": "a.png", "b": "b.png", "p_a": 1.5}, '"p_a" is 1.5; expected the share'),
        (GOOD | {"lable": 1}, "unknown key \"lable\" .did you mean 'label'"),
        ({"promt": "p"}, "unknown key \"promt\" .did you mean 'prompt'"),
        ({"a": "a.png", "b": "b.png", "label": 1}, 'the key "prompt" is missing'),
        (GOOD | {"a": "nowhere.png"}, "data.jsonl:2: \"a\" names 'nowhere.png', which does not exist below.*--images"),
        (GOOD | {"a": "../../etc/passwd"}, '"a" names .*outside of.*--images'),
        (GOOD | {"a": 3}, '"a" is 3; expected the name of a file'),
        (GOOD | {"meta": 3}, '"meta" is 3; expected an object'),
        (GOOD | {"category": 3}, '"category" is 3; expected a name'),
        (GOOD | {"model_a": 3}, 'the model of "a" is 3'),
        ({"prompt": "p", "items": ["a.png"], "rank": [1]}, '"items" .*expected a list of two or more items'),
        ({"prompt": "p", "items": ["a.png", "b.png"], "rank": [1]}, r'"rank" is \[1\]; expected 2 .* the 2 items'),
        ({"prompt": "p", "items": ["a.png", "b.png"], "rank": 1}, '"rank" is 1; expected 2 numbers'),
        ({"prompt": "p", "items": ["a.png", "b.png"], "rank": [1, "2"]}, "expected 2 numbers"),
        ({"prompt": "p", "items": ["a.png", "b.png"], "rank": [1, 2], "models": ["x"]}, '"models" is .*2 items'),
        ([1], "expected an object, found"),
    ],
)
def test_a_bad_line_names_its_place_and_key(pictures, row, message):
    file = lines(pictures / "data.jsonl", GOOD, row)
    with pytest.raises(RewardError, match=message):
        read_preferences(file, "native")


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": NaN}\n')
    with pytest.raises(RewardError, match="a.jsonl:1: not JSON .NaN is no JSON"):
        read_preferences(tmp_path / "a.jsonl")
    with pytest.raises(RewardError, match="there is no preference data"):
        read_preferences(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(RewardError, match=r"is no .jsonl.*give its format: one of native, store"):
        read_preferences(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RewardError, match="is a folder without pairs.jsonl.*give its format"):
        read_preferences(tmp_path / "folder")
    with pytest.raises(RewardError, match="format 'hpdv'.*did you mean 'hpdv2'"):
        read_preferences(tmp_path / "a.txt", "hpdv")
    with pytest.raises(RewardError, match="images: there is no folder"):
        read_preferences(tmp_path / "a.jsonl", "native", images=tmp_path / "gone")
    with pytest.raises(RewardError, match="fps is 0"):
        read_preferences(tmp_path / "a.jsonl", "native", fps=0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_an_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).write_text(" \n\n")
    with pytest.raises(RewardError, match=f"{name} is empty$"):
        read_preferences(tmp_path / name)


def test_a_file_without_rows_says_so(tmp_path):
    for file in (dumped(tmp_path / "a.json", []), lines(tmp_path / "a.jsonl", {})):
        with pytest.raises(RewardError, match="has no row with keys; give its format"):
            read_preferences(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "a.png", "b": "b.png", "label": 1}, 'keys a, b, label, and "prompt" is missing for the format native;'),
        (
            {"promt": "p", "a": "a.png", "b": "b.png", "label": 1},
            "\"prompt\" is missing .did you mean 'promt'.* for the format native",
        ),
        (
            {"prompt": "p", "items": [], "ranks": []},
            "\"rank\" is missing .did you mean 'ranks'.* for the format native",
        ),
        ({"prompt": "p", "chosen": "a.png"}, '"rejected" is missing for the format store'),
        (
            {"prompt": "p", "left": "a.png"},
            r"has the keys left, prompt; give its format: one of native.*\(of the command: --format",
        ),
    ],
)
def test_a_row_that_is_nearly_of_a_format_is_told_what_is_missing(tmp_path, row, message):
    with pytest.raises(RewardError, match=message):
        read_preferences(lines(tmp_path / "data.jsonl", row))


def test_a_link_out_of_the_folder_is_not_followed(pictures, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(pictures / "a.png")
    png(inner / "b.png")
    file = lines(inner / "data.jsonl", GOOD | {"a": "link.png"})
    with pytest.raises(RewardError, match="lies outside of"):
        read_preferences(file)


# ------------------------------------------------------------------------------------------------ benchmarks


def test_hpdv2(tmp_path):
    for name in "abc":
        png(tmp_path / "HPD" / "test" / f"{name}.png")
    row = {"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 0, 1]}
    row["raw_annotations"] = [{"rank": [2, 0, 1], "user_hash": "x"}]
    data = read_preferences(dumped(tmp_path / "HPD" / "test.json", [row]))
    assert data.format == "hpdv2" and [pair.label for pair in data.pairs] == [-1, -1, 1], "lower is better"
    dumped(tmp_path / "test.json", [row])
    with pytest.raises(RewardError, match='test.json: item 0: "image_path" names .*give its folder with `images`'):
        read_preferences(tmp_path / "test.json")
    assert len(read_preferences(tmp_path / "test.json", images=tmp_path / "HPD" / "test").pairs) == 3


def test_imagereward(tmp_path):
    for name in "ab":
        png(tmp_path / "test_images" / "x" / f"{name}.webp")
    row = {"id": "1", "prompt": "p", "generations": ["x/a.webp", "x/b.webp"], "ranking": [1, 1]}
    rows = [row, row | {"ranking": [2, 1]}]
    data = read_preferences(dumped(tmp_path / "test.json", rows))
    assert data.format == "imagereward" and [pair.label for pair in data.pairs] == [0, -1]
    assert data.pairs[0].a.sample().media.shape == (3, 8, 12)


def test_genai_bench_json(pictures):
    row = {"prompt": "p", "left_model": "x", "right_model": "y", "left_image": "a.png", "right_image": "b.png"}
    votes = ("leftvote", "rightvote", "tievote", "bothbad_vote")
    data = read_preferences(dumped(pictures / "image_generation.json", [row | {"vote_type": v} for v in votes]))
    assert data.format == "genai" and [pair.label for pair in data.pairs] == [1, -1, 0, 0]
    assert (data.pairs[0].a.model, data.pairs[0].b.model) == ("x", "y")
    edit = {
        "instruct_prompt": "make it red", "source_prompt": "s", "target_prompt": "t", "source_image": "c.png",
        "left_output_image": "a.png", "right_output_image": "b.png", "vote_type": "leftvote",
    }  # fmt: skip
    (pair,) = read_preferences(lines(pictures / "edits.jsonl", edit)).pairs
    sample = pair.b.sample()
    assert sample.prompt == "make it red" and torch.equal(
        sample.meta["source"], torch.from_numpy(np.array(Image.open(pictures / "c.png"))).permute(2, 0, 1) / 255
    )
    with pytest.raises(RewardError, match="\"vote_type\" is 'left'; expected one of leftvote"):
        read_preferences(dumped(pictures / "bad.json", [row | {"vote_type": "left"}]))


def test_videogen_rewardbench(tmp_path):
    for name in ("a", "b"):
        for number in range(3):
            png(tmp_path / "videos" / name / f"{number}.png", (number * 100, 0, 0))
    heads = ["path_A", "path_B", "A_model", "B_model", "prompt", "fps_A", "VQ", "MQ", "TA", "Overall"]
    rows = [
        ["videos/a", "videos/b", "x", "y", "a cat, running", 24, "A", "B", "same", "A"],
        ["videos/b", "videos/a", "y", "x", "a dog", 24, "A", "", "invalid", "B"],
    ]
    with (tmp_path / "videogen-rewardbench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    data = read_preferences(tmp_path / "videogen-rewardbench.csv")
    first = [(pair.dim, pair.label) for pair in data.pairs if pair.prompt == "a cat, running"]
    assert first == [("Overall", 1), ("VQ", 1), ("MQ", -1), ("TA", 0)]
    assert len(data.pairs) == 6 and data.skipped == {"MQ: empty": 1, "TA: invalid": 1}
    sample = data.pairs[0].a.sample()
    assert sample.kind == "video" and sample.media.shape == (3, 3, 8, 12) and data.pairs[0].a.model == "x"
    assert sample.media[:, 0, 0, 0].tolist() == pytest.approx([0, 100 / 255, 200 / 255]), "frames in order of names"


def test_mmrb2(pictures):
    def pair(chosen, *, prompt=(), response=(["image", "b.png"],)):
        return {
            "pair_id": "1", "prompt_source": "wise", "chosen": chosen, "prompt_content": [["text", "draw"], *prompt],
            "response_a": {"model": "x", "response_content": [["text", "here"], ["image", "a.png"]]},
            "response_b": {"model": "y", "response_content": list(response)},
        }  # fmt: skip

    two, none = (["image", "b.png"], ["image", "c.png"]), (["text", "no"],)
    rows = [pair("A"), pair("B", prompt=[["image", "c.png"]]), pair("A", response=two), pair("A", response=none)]
    data = read_preferences(dumped(pictures / "t2i.json", {"pairs": rows}))
    assert data.format == "mmrb2" and [p.label for p in data.pairs] == [1, -1]
    assert data.pairs[0].category == "wise" and not data.pairs[0].a.attached and "source" in data.pairs[1].a.attached
    assert sum(data.skipped.values()) == 2
    with pytest.raises(RewardError, match="item 0: \"chosen\" is 'C'"):
        read_preferences(dumped(pictures / "t2i.json", {"pairs": [pair("C")]}))
    with pytest.raises(RewardError, match="holds no pair to compare .1 not one image"):
        read_preferences(dumped(pictures / "t2i.json", {"pairs": [pair("A", response=none)]}))


def test_pickapic_as_lines_and_images(pictures):
    rows = [
        {"caption": "p", "label_0": 1, "label_1": 0, "jpg_0": "a.png", "jpg_1": "b.png", "model_0": "x"},
        {"caption": "p", "label_0": 0.5, "image_0_uid": "a", "image_1_uid": "c", "has_label": True},
        {"caption": "p", "label_0": 0, "jpg_0": "a.png", "jpg_1": "b.png", "has_label": False},
    ]
    lines(pictures / "test.jsonl", *rows)
    data = read_preferences(pictures)
    assert data.format == "pickapic" and data.skipped == {"without a label": 1}
    assert [row[1:4] for row in told(data)] == [("a.png", "b.png", 1.0), ("a.png", "c.png", 0.5)]
    lines(pictures / "test.jsonl", rows[0] | {"label_0": 2})
    with pytest.raises(RewardError, match='test.jsonl:1: "label_0" is 2; expected 0, 0.5 or 1'):
        read_preferences(pictures)


# ------------------------------------------------------------------------------------------------ tables


def jpeg(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


REDS = [(40 * number, 0, 0) for number in range(6)]
TABLE = {
    "caption": ["p", "p", "q"],
    "label_0": [1.0, 0.5, 0.0],
    "label_1": [0.0, 0.5, 1.0],
    "has_label": [True, True, False],
    "jpg_0": [jpeg(c) for c in REDS[:3]],
    "jpg_1": [jpeg(c) for c in REDS[3:]],
    "model_0": ["x", "y", "x"],
    "model_1": ["y", "x", "x"],
}


def check_pickapic(data):
    assert data.format == "pickapic" and [pair.p_a for pair in data.pairs] == [1.0, 0.5]
    assert data.skipped == {"without a label": 1} and data.pairs[1].b.model == "x"
    reds = [item.sample().media[0].mean().item() * 255 for pair in data.pairs for item in (pair.a, pair.b)]
    assert reds == pytest.approx([REDS[row][0] for row in (0, 3, 1, 4)], abs=3)
    assert len({item.key for pair in data.pairs for item in (pair.a, pair.b)}) == 4


def test_pickapic_parquet_in_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(TABLE), tmp_path / "test-00000-of-00001.parquet", row_group_size=1)
    check_pickapic(read_preferences(tmp_path / "test-00000-of-00001.parquet"))
    check_pickapic(read_preferences(tmp_path))


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_pickapic_arrow(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(TABLE)
    with (
        pyarrow.OSFile(str(tmp_path / "data.arrow"), "wb") as sink,
        getattr(pyarrow.ipc, form)(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    check_pickapic(read_preferences(tmp_path / "data.arrow"))


def test_genai_bench_parquet_with_pictures_as_structs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {
        "prompt": ["p"], "vote_type": ["rightvote"], "left_model": ["x"], "right_model": ["y"],
        "left_image": [{"bytes": jpeg((250, 0, 0)), "path": "l.jpg"}],
        "right_image": [{"bytes": b"no picture", "path": "r.jpg"}],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    (pair,) = read_preferences(tmp_path / "t.parquet").pairs
    assert pair.label == -1 and pair.a.sample().media[0].mean() > 0.9
    with pytest.raises(RewardError, match='t.parquet:1: "right_image" cannot be read'):
        pair.b.sample()


def test_tables_without_pyarrow_and_tables_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"not a table")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RewardError, match="pip install pyarrow"):
        read_preferences(tmp_path / "t.parquet", "pickapic")
    monkeypatch.undo()
    pytest.importorskip("pyarrow")
    with pytest.raises(RewardError, match="not a table that pyarrow reads"):
        read_preferences(tmp_path / "t.parquet", "pickapic")


# ------------------------------------------------------------------------------------------------ media


def one(tmp_path, name, **options):
    """The medium of that name, read as the first of a pair."""
    png(tmp_path / "other.png")
    row = {"prompt": "p", "a": name, "b": "other.png", "label": 1}
    return read_preferences(lines(tmp_path / "data.jsonl", row), **options).pairs[0].a


def test_a_video_of_a_pair_store(tmp_path):
    media = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    save_file({"media": media}, tmp_path / "v.safetensors")
    assert torch.equal(one(tmp_path, "v.safetensors").sample().media, media / 255)


def test_a_video_file_and_its_frames_a_second(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(24):
            shade = np.full((32, 32, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    whole = one(tmp_path, "v.mp4").sample()
    assert whole.media.shape == (24, 3, 32, 32) and whole.fps == 24
    some = one(tmp_path, "v.mp4", fps=6).sample()
    assert some.fps == 6 and torch.equal(some.media, whole.media[::4])
    more = one(tmp_path, "v.mp4", fps=60).sample()
    assert more.fps == 24 and len(more.media) == 24


def test_damaged_media_name_their_file(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(RewardError, match="cut.png cannot be read"):
        one(tmp_path, "cut.png").sample()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="empty holds no frames"):
        one(tmp_path, "empty").sample()
    png(tmp_path / "mixed" / "0.png")
    png(tmp_path / "mixed" / "1.png", size=(5, 5))
    with pytest.raises(RewardError, match="mixed: its frames differ in size"):
        one(tmp_path, "mixed").sample()
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(RewardError, match="v.mp4"):
        one(tmp_path, "v.mp4").sample()
