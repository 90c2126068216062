"""What a run leaves for people: pictures, a table with honest errors, and one page that needs no network."""

import base64
import io
import json
import math
import re
import statistics

import pytest
import torch
from PIL import Image

from flowrl.evaluate import Evaluation
from flowrl.report import comparison, save_grid, save_pair, spread, to_image, write_report
from flowrl.types import Prompt

EVIL = "<script>alert('x')</script> & \"quotes\""


def evaluation(texts, size=16, frames=1):
    media = torch.rand(len(texts), frames, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Evaluation(prompts=[Prompt(id=i, text=t) for i, t in enumerate(texts)], scores={}, measures={}, media=media)


# ------------------------------------------------------------------------------------------------ pictures


def test_a_grid_of_videos_moves_and_is_an_mp4_too(tmp_path):
    av = pytest.importorskip("av")

    media = torch.zeros(4, 5, 3, 16, 16)
    for frame in range(5):
        media[:, frame, 0, :, 3 * frame : 3 * frame + 3] = 1  # a red bar that moves to the right
    found = Evaluation(prompts=[Prompt(id=i, text="x") for i in range(4)], scores={}, measures={}, media=media)
    for name in ("before", "after"):
        save_grid(found, tmp_path / f"{name}.png", 4, fps=4)
    with Image.open(tmp_path / "before.png") as image:
        assert image.n_frames == 5 and image.info["duration"] == 250
        size = image.size
        first = image.convert("RGB").getpixel((10, 40))  # inside the first picture, at its left
        image.seek(4)
        last = image.convert("RGB").getpixel((10, 40))
    assert first[0] > 200 > last[0]  # the bar was there, and has gone
    with av.open(str(tmp_path / "before.mp4")) as video:
        frames = [frame.to_image() for frame in video.decode(video=0)]
    assert len(frames) == 5 and frames[0].size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    save_pair(tmp_path / "before.png", tmp_path / "after.png", tmp_path / "pair.png")
    with Image.open(tmp_path / "pair.png") as image:
        assert image.n_frames == 5


def test_a_picture_keeps_its_colours_and_is_clamped():
    picture = torch.tensor([1.2, 0.5, -0.3])[:, None, None].expand(3, 4, 6)
    image = to_image(picture)
    assert image.size == (6, 4) and image.getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize(("total", "count"), [(600, 8), (5, 5), (3, 8), (1, 1), (7, 0)])
def test_places_are_spread_and_different(total, count):
    places = spread(total, count)
    assert len(places) == len(set(places)) == min(total, count)
    assert places == sorted(places) and all(0 <= p < total for p in places)
    assert spread(600, 2) == [150, 450]


def test_a_grid_shows_each_picture_above_its_prompt(tmp_path):
    found = evaluation(["a red circle"] * 8)
    found.media[:] = torch.linspace(0, 1, 8)[:, None, None, None, None]
    save_grid(found, tmp_path / "deep" / "grid.png", 8, cell=32)
    sheet = Image.open(tmp_path / "deep" / "grid.png")
    assert sheet.size == (4 * 40 + 8, 2 * 70 + 8)
    greys = [sheet.getpixel((8 + x * 40 + 16, 8 + y * 70 + 16))[0] for y in range(2) for x in range(4)]
    assert greys == pytest.approx([255 * i / 7 for i in range(8)], abs=1)
    caption = sheet.crop((8, 8 + 34, 40, 8 + 60)).convert("L")
    assert min(caption.tobytes()) < 200  # there is writing


def test_no_grid_is_no_file(tmp_path):
    save_grid(evaluation(["a"]), tmp_path / "none.png", 0)
    without = Evaluation(prompts=[], scores={}, measures={})
    save_grid(without, tmp_path / "none.png", 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "ein Rätsel “in” Anführungszeichen", "猫と犬", "🙂 " * 30, "x" * 500, EVIL, "a\nb"]
)
def test_any_prompt_can_be_a_caption(tmp_path, text):
    save_grid(evaluation([text], frames=3), tmp_path / "grid.png", 1)
    assert (tmp_path / "grid.png").is_file()


# ------------------------------------------------------------------------------------------------ a run's page


BEFORE, AFTER = [0.0, 1.0, None, 0.5, 0.25], [1.0, 1.0, 1.0, 0.0, None]
CATEGORIES = ["a", "a", "b", "b", "b"]


def entry(values, categories=None):
    known = [v for v in values if v is not None]
    found = {"mean": statistics.mean(known) if known else None, "se": None}
    if len(known) > 1:
        found["se"] = statistics.stdev(known) / math.sqrt(len(known))
    if categories:
        found["by_category"] = {
            c: entry([v for v, of in zip(values, categories, strict=True) if of == c]) for c in sorted(set(categories))
        }
    return found


@pytest.fixture
def folder(tmp_path):
    """A run of two evaluations as the trainer would have left it, its name and prompts as bad as can be."""
    folder = tmp_path / "<b>run"
    (folder / "samples").mkdir(parents=True)
    for iteration, values in ((0, BEFORE), (60, [0.1] * 5), (120, AFTER)):
        samples = {
            "prompts": [EVIL] * 5,
            "categories": CATEGORIES,
            "scores": {"<i>shapes": values, "only_once": [1.0] * 5},
        }
        if iteration:
            del samples["scores"]["only_once"]
        (folder / "samples" / f"{iteration:06d}.json").write_text(json.dumps(samples))
        found = evaluation([EVIL] * 5)
        found.media[:] = iteration / 120
        save_grid(found, folder / "samples" / f"{iteration:06d}.png", 4)
    summary = {
        side: {
            "scores": {"<i>shapes": entry(values, CATEGORIES), "only_once": entry(values)},
            "measures": {"fidelity": {"mean": mean, "se": None}, "unknown": {"mean": None, "se": None}},
        }
        for side, values, mean in (("base", BEFORE, 0.5), ("final", AFTER, 0.75))
    }
    (folder / "summary.json").write_text(json.dumps(summary | {"headline": "<i>shapes"}))
    lines = [
        {"iteration": i, "reward/mean": 0.1 * i, "kl": None, "score/<u>mine": 2.0, "lr": 1e-4, "grad_norm": 1.0}
        for i in range(12)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"name: run\ndata:\n  prompts: [{json.dumps(EVIL)}]\n")
    return folder


def test_the_table_against_brute_force(folder):
    table = {name: values for name, *values in comparison(folder)}
    differences = [a - b for b, a in zip(BEFORE, AFTER, strict=True) if None not in (a, b)]
    before, after, gain, error = table["<i>shapes"]
    assert before == pytest.approx(statistics.mean([0.0, 1.0, 0.5, 0.25]))
    assert after == pytest.approx(0.75) and gain == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(3))
    for category in "ab":
        pairs = [p for p, c in zip(zip(BEFORE, AFTER, strict=True), CATEGORIES, strict=True) if c == category]
        gains = [a - b for b, a in pairs if None not in (a, b)]
        before, after, gain, error = table[f"  {category}"]
        assert before == pytest.approx(statistics.mean(b for b, _ in pairs if b is not None))
        assert after == pytest.approx(statistics.mean(a for _, a in pairs if a is not None))
        assert gain == pytest.approx(statistics.mean(gains))
        assert error == (pytest.approx(statistics.stdev(gains) / math.sqrt(len(gains))) if len(gains) > 1 else None)
    assert table["fidelity"] == [0.5, 0.75, 0.25, None] and table["unknown"][2] is None
    assert "only_once" not in table  # a part that one of the two lacks cannot be compared


def test_the_page_is_one_file_without_links(folder):
    page = write_report(folder).read_text()
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and "<link" not in page
    sources = re.findall(r"src=['\"]([^'\"]*)", page)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    before, after = (Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources)
    assert before.getpixel((20, 20))[0] == 0 and after.getpixel((20, 20))[0] == 255  # the first and the last


def test_the_page_escapes_what_people_wrote(folder):
    page = write_report(folder).read_text()
    assert "&lt;script&gt;" in page and "&lt;i&gt;shapes" in page and "&lt;u&gt;mine" in page and "&lt;b&gt;run" in page
    tags = set(re.findall(r"<([a-z0-9]+)[ >]", page))
    assert tags <= set("meta title style h1 h2 h3 table tr th td div img svg text polyline pre".split())


def test_the_page_has_the_table_the_curves_and_the_config(folder):
    page = write_report(folder).read_text()
    cells = re.findall(r"<td>([^<]*)</td>", page)
    names = cells[::5]
    assert names == ["&lt;i&gt;shapes", "  a", "  b", "fidelity", "unknown"]
    assert cells[1:4] == ["0.4375", "0.75", "0.1667"] and cells[-4:] == ["–"] * 4
    charts = re.findall(r"<svg.*?</svg>", page)
    told = [re.search(r"font-size='12'>(.*?)<", chart)[1] for chart in charts]
    assert told == ["reward/mean", "grad_norm", "lr", "score/&lt;u&gt;mine"]  # kl was never a number
    points = re.search(r"points='(.*?)'", charts[0])[1].split()
    assert len(points) == 12 and float(points[0].split(",")[1]) > float(points[-1].split(",")[1])
    assert "name: run" in page


def test_a_page_of_a_run_with_a_single_evaluation(folder):
    for path in sorted((folder / "samples").glob("*"))[2:]:
        path.unlink()
    page = write_report(folder).read_text()
    assert comparison(folder) == [] and "<td>" not in page and "<img" not in page and "<svg" in page
