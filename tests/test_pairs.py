"""The pair store: which samples are paired, what is written and read back, what is refused, and how it is made."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from flowrl.data import DataError, load_prompts
from flowrl.pairs import choose, describe_pairs, load_media, read_pairs, save_media
from tests import runs

# ------------------------------------------------------------------------------------------------ choosing


def by_hand(rewards, group, how, least):
    """The definition, sample by sample."""
    out = []
    for g in sorted(set(group)):
        mine = [i for i in range(len(group)) if group[i] == g and math.isfinite(rewards[i])]
        if len(mine) < 2:
            continue
        tie = max(least, 1e-6 * max(1.0, *(abs(rewards[i]) for i in mine)))
        if how == "best_worst":
            best, worst = mine[0], mine[0]
            for i in mine:
                best = i if rewards[i] > rewards[best] else best
                worst = i if rewards[i] < rewards[worst] else worst
            out += [[best, worst]] if rewards[best] - rewards[worst] > tie else []
        else:
            out += [[i, j] for i, j in itertools.product(mine, mine) if rewards[i] - rewards[j] > tie]
    return out


@pytest.mark.parametrize(("how", "least"), [("best_worst", 0.0), ("best_worst", 0.5), ("all", 0.0), ("margin", 0.3)])
def test_choosing_against_brute_force(how, least):
    draw = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(50):
        group = torch.randint(0, 4, (14,), generator=draw)  # of any order and size
        rewards = torch.randint(0, 5, (14,), generator=draw).double() / 4  # many are equal
        rewards[torch.rand(14, generator=draw) < 0.2] = math.nan
        rewards[torch.rand(14, generator=draw) < 0.05] = math.inf
        pairs = choose(rewards, group, how, least)
        assert pairs.dtype == torch.long and pairs.shape[1:] == (2,)
        assert pairs.tolist() == by_hand(rewards.tolist(), group.tolist(), how, least)
        found += len(pairs)
    assert found > 50


def test_the_first_among_equals_and_the_example_of_the_docstring():
    rewards, group = torch.tensor([1.0, 3.0, 1.0, 3.0]), torch.zeros(4)
    assert choose(rewards, group, "best_worst").tolist() == [[1, 0]]
    rewards = torch.tensor([1.0, 3.0, math.nan, 2.0])
    assert choose(rewards, group, "best_worst").tolist() == [[1, 0]]
    assert choose(rewards, group, "all").tolist() == [[1, 0], [1, 3], [3, 0]]
    assert choose(rewards, group, "margin", 1.0).tolist() == [[1, 0]]  # more than, not as much as


@pytest.mark.parametrize("how", ["best_worst", "all", "margin"])
@pytest.mark.parametrize(
    "rewards",
    [[0.5, 0.5, 0.5], [0.5, math.nan, math.nan], [math.nan] * 3, [0.0, 5e-7, 9e-7], [1000.0, 1000.0005, 1000.0], []],
)
def test_ties_and_single_verdicts_are_no_pairs(how, rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    assert choose(rewards, torch.zeros(len(rewards)), how).shape == (0, 2)


def test_what_cannot_be_chosen_is_refused():
    two = torch.zeros(2)
    for arguments, text in [
        ((two, torch.zeros(3), "all"), r"rewards \[2\] and group \[3\]"),
        ((two, two, "margin", -0.1), "min_margin is -0.1"),
        ((two, two, "margin", math.nan), "min_margin is nan"),
        ((two, two, "all", 0.1), "no effect"),
        ((two, two, "best"), "one of best_worst, all, margin"),
    ]:
        with pytest.raises(ValueError, match=text):
            choose(*arguments)


# ------------------------------------------------------------------------------------------------ media


def bytes_of(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


@pytest.mark.parametrize(("frames", "suffix"), [(1, ".png"), (3, ".safetensors")])
def test_media_come_back_as_they_were_rounded(tmp_path, frames, suffix):
    media = bytes_of(frames, 3, 8, 12)
    name = save_media(media + 0.4 / 255, tmp_path, "00000_00")
    assert name == f"media/00000_00{suffix}"
    again = load_media(tmp_path / name)
    assert again.dtype == torch.float32 and torch.equal(again, media.float())


def test_grey_and_transparent_pictures_of_others_are_read(tmp_path):
    Image.fromarray(np.full((4, 6), 51, dtype=np.uint8)).save(tmp_path / "grey.png")
    Image.new("RGBA", (6, 4), (255, 0, 51, 255)).save(tmp_path / "alpha.png")
    assert torch.equal(load_media(tmp_path / "grey.png"), torch.full((1, 3, 4, 6), 51 / 255))
    assert load_media(tmp_path / "alpha.png")[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_damaged_media_are_named(tmp_path):
    path = tmp_path / save_media(bytes_of(1, 3, 32, 32), tmp_path, "x")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"x\.png: cannot be read .* write it anew"):
        load_media(path)
    save_file({"media": torch.zeros(2, 3, 4, 4)}, tmp_path / "floats.safetensors")
    with pytest.raises(DataError, match=r"F32 \[2, 3, 4, 4\], not U8"):
        load_media(tmp_path / "floats.safetensors")


# ------------------------------------------------------------------------------------------------ reading


GOOD = {"prompt": "a cat", "chosen": "media/w.png", "rejected": "media/l.png"}


@pytest.fixture
def store(tmp_path):
    """`store([row, ...])`: a folder with these rows (dicts or lines) and three pictures and a video to name."""

    def make(rows):
        folder = tmp_path / "store"
        for name, shape in (("w", (1, 3, 8, 8)), ("l", (1, 3, 8, 8)), ("wide", (1, 3, 8, 16)), ("clip", (2, 3, 8, 8))):
            save_media(bytes_of(*shape, seed=len(name)), folder, name)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return make


def test_rows_become_prompts_with_the_chosen_first(store):
    full = GOOD | {
        "margin": 0.5, "scores": {"chosen": {"x": 2}, "rejected": {"x": None}}, "policy": {"model": "shapes"},
        "rewards": {"chosen": 0.75, "rejected": 0.25}, "metadata": {"category": "two"},
    }  # fmt: skip
    folder = store([GOOD, full, GOOD | {"prompt": "  a dog ", "margin": None}])
    prompts = read_pairs(folder)
    assert [(p.id, p.text) for p in prompts] == [(0, "a cat"), (1, "a cat"), (2, "a dog")]
    media = [str((folder / "media" / name).resolve()) for name in ("w.png", "l.png")]
    assert prompts[0].metadata == {"stored": [{"media": media[0], "reward": 1.0}, {"media": media[1], "reward": 0.0}]}
    assert prompts[1].metadata == {
        "category": "two", "stored": [{"media": media[0], "reward": 0.75}, {"media": media[1], "reward": 0.25}],
    }  # fmt: skip
    assert (
        prompts
        == read_pairs(str(folder / "pairs.jsonl"))
        == load_prompts(folder)
        == load_prompts(str(folder / "pairs.jsonl"))
    )


def test_videos_are_pairs_too(store):
    folder = store([GOOD | {"chosen": "media/clip.safetensors", "rejected": "media/clip2.safetensors"}])
    save_media(bytes_of(2, 3, 8, 8, seed=9), folder, "clip2")
    chosen, rejected = (load_media(entry["media"]) for entry in read_pairs(folder)[0].metadata["stored"])
    assert chosen.shape == rejected.shape == (2, 3, 8, 8) and not torch.equal(chosen, rejected)


BROKEN = [
    ("", ["the line is empty", "remove it"]),
    ("{", ["broken JSON"]),
    ("[1]", ["expected an object"]),
    ('{"prompt": "a", "chosen": "media/w.png", "rejected": "media/l.png", "margin": NaN}', ["NaN is not JSON"]),
    ({"prompt": "a", "chosen": "media/w.png"}, ['"rejected" is missing', "name a file in media/"]),
    ({"chosen": "media/w.png", "rejected": "media/l.png"}, ['"prompt" is missing']),
    (GOOD | {"prompt": " "}, ["the prompt is empty"]),
    (GOOD | {"prompt": 3}, ["int 3, not text"]),
    (GOOD | {"chosen": 3}, ["chosen is 3, not the name of a file"]),
    (GOOD | {"chosen": "a\0b"}, ["not the name of a file"]),
    (GOOD | {"chosen": "media/\ud800.png"}, ["not the name of a file"]),
    (GOOD | {"chosen": "media/none.png"}, ["chosen: 'media/none.png' is no file", "put it there"]),
    (GOOD | {"chosen": "media"}, ["'media' is no file"]),
    (GOOD | {"chosen": "x" * 5000}, ["cannot be read"]),
    (GOOD | {"chosen": "media/text.png"}, ["cannot be read", "write it anew"]),
    (GOOD | {"chosen": "media/deep.png"}, ["more than 8 bits a channel"]),
    (GOOD | {"chosen": "media/bad.safetensors"}, ["'media/bad.safetensors' cannot be read"]),
    (GOOD | {"chosen": "media/other.safetensors"}, ['not the one tensor "media"']),
    (GOOD | {"rejected": "../outside.png"}, ["rejected: '../outside.png' lies outside the store", "copy it into"]),
    (GOOD | {"rejected": "media/../../outside.png"}, ["lies outside the store"]),
    (GOOD | {"rejected": "media/link.png"}, ["lies outside the store"]),
    (GOOD | {"rejected": "{absolute}"}, ["lies outside the store", "relative to the store"]),
    (GOOD | {"rejected": "media/../media/w.png"}, ["the same file", "a tie is no pair"]),
    (GOOD | {"rejected": "media/wide.png"}, ["chosen is 1 x 8 x 8", "rejected 1 x 8 x 16"]),
    (GOOD | {"rejected": "media/clip.safetensors"}, ["rejected 2 x 8 x 8", "one size"]),
    (GOOD | {"margin": 0}, ["margin is 0", "above 0"]),
    (GOOD | {"margin": -0.5}, ["margin is -0.5"]),
    (GOOD | {"margin": "0.5"}, ["margin is '0.5'"]),
    (GOOD | {"margin": True}, ["margin is True"]),
    (json.dumps(GOOD)[:-1] + ', "margin": 1e999}', ["margin is inf"]),
    (json.dumps(GOOD)[:-1] + ', "margin": 1' + "0" * 400 + "}", ["margin is 1000"]),
    (GOOD | {"rewards": {"chosen": 1}}, ["rewards is {'chosen': 1}", "finite numbers"]),
    (GOOD | {"rewards": {"chosen": 0.2, "rejected": 0.5}}, ["0.2 for the chosen and 0.5", "swap the two"]),
    (GOOD | {"rewards": {"chosen": 0.5, "rejected": 0.5}}, ["no preference"]),
    (GOOD | {"scores": [1]}, ["scores is list [1]; expected an object"]),
    (GOOD | {"scores": {"x": 1}}, ["scores is {'x': 1}; expected"]),
    (GOOD | {"metadata": "x"}, ["metadata is str 'x'"]),
    (GOOD | {"metadata": {"stored": []}}, ['"stored"', "rename it"]),
    (GOOD | {"policy": 3}, ["policy is int 3"]),
    (GOOD | {"rewrads": {}}, ["unknown field 'rewrads' (did you mean 'rewards'?)"]),
]


@pytest.mark.parametrize(("row", "parts"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_broken_rows_are_named_with_file_and_line(store, tmp_path, row, parts):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    text = row if isinstance(row, str) else json.dumps(row)
    folder = store([GOOD, text.replace("{absolute}", str(outside)), GOOD])
    (folder / "media" / "text.png").write_text("no picture")
    (folder / "media" / "bad.safetensors").write_bytes(b"\xff" * 64)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(folder / "media" / "deep.png")
    save_file({"x": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, folder / "media" / "other.safetensors")
    (folder / "media" / "link.png").symlink_to(outside)
    with pytest.raises(DataError) as caught:
        read_pairs(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/pairs.jsonl:2: ") and message.count("pairs.jsonl:") == 1
    for part in parts:
        assert part in message


def test_all_broken_rows_are_listed_up_to_ten(store):
    folder = store([GOOD, GOOD | {"margin": -1}, "{", *[GOOD | {"prompt": ""}] * 11])
    with pytest.raises(DataError) as caught:
        read_pairs(folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == "13 of 14 rows are broken." and lines[-1] == "... and 3 more." and len(lines) == 12
    assert [line.split(":")[1] for line in lines[1:-1]] == [str(n) for n in range(2, 12)]


def test_a_store_that_is_none_is_refused(store, tmp_path):
    with pytest.raises(DataError, match="holds no pairs"):
        read_pairs(store([""]))
    with pytest.raises(DataError, match=r"there is no file .*nowhere'.*flowrl pairs make"):
        read_pairs(tmp_path / "nowhere")


def test_the_header_is_enough_for_the_check(store):
    """Half of the pixels are missing: that is found when they are wanted, not when thousands of rows are checked."""
    folder = store([GOOD])
    path = folder / save_media(bytes_of(1, 3, 64, 64), folder, "w")
    save_media(bytes_of(1, 3, 64, 64), folder, "l")
    path.write_bytes(path.read_bytes()[:6000])
    entry = read_pairs(folder)[0].metadata["stored"][0]
    with pytest.raises(DataError, match=r"w\.png: cannot be read"):
        load_media(entry["media"])


def test_a_store_is_described(store):
    rows = [GOOD | {"margin": m, "policy": {"model": "shapes", "weights": None}} for m in (1, 2, 3, 4, 10)]
    found = dict(describe_pairs(store([*rows, GOOD])))
    assert found["pairs"] == "6" and found["prompts"] == "1"
    assert found["margin, mean (of 5 pairs)"] == "4" and found["margin, 50% quantile"] == "3"
    assert found["margin, 0% quantile"] == "1" and found["margin, 100% quantile"] == "10"
    assert found["policy of 5 pairs"] == "model shapes" and found["policy of 1 pairs"] == "unknown"


# ------------------------------------------------------------------------------------------------ making


SCORER = """
import math, pathlib

def score(samples):
    if (pathlib.Path(__file__).parent / "stop").exists() and any(s.prompt == "a red house" for s in samples):
        raise RuntimeError("stopped")
    values = [s.media.mean().item() for s in samples]
    return [math.nan if s.prompt == "two dogs" and s.meta.get("mute") else 0.5 if s.meta.get("tie") else v
            for s, v in zip(samples, values)]
"""


@pytest.fixture
def setting(make_config, tmp_path):
    """The config of a run over four prompts, one of which is all ties and one without verdicts; its reward's file."""
    (tmp_path / "scorer.py").write_text(SCORER)
    rows = [{"prompt": "a cat", "tie": True}, {"prompt": "two dogs", "mute": True}, {"prompt": "a red house"}]
    rows += [{"prompt": "a boat", "category": "boats"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.prompts": str(tmp_path / "prompts.jsonl"), "data.evaluation.batch_size": 3, "data.max_no_verdict": 0.99,
        "rewards": [
            {"use": f"{tmp_path}/scorer.py:score", "name": "mean", "weight": 2.0, "on_error": "raise"},
            {"use": "pixel.contrast", "weight": 0.0},
        ],
    }  # fmt: skip
    return make_config(changes)


def make(config, output, **changes):
    from flowrl.make_pairs import make_pairs

    arguments = {
        "num_prompts": None, "samples_per_prompt": 3, "how": "best_worst", "min_margin": 0.0, "weights": None,
        "num_steps": 2, "seed": 0, "console": Console(quiet=True),
    }  # fmt: skip
    return make_pairs(config, output, **(arguments | changes))


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def raw_rows(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_pairs_are_made_of_better_and_worse_samples(setting, tmp_path):
    summary = make(setting, tmp_path / "store", how="all")
    assert (summary.pairs, summary.prompts, summary.tied, summary.unjudged, summary.no_verdict) == (6, 4, 1, 1, 3)
    rows = raw_rows(tmp_path / "store")
    assert len(rows) == 6 and {row["prompt"] for row in rows} == {"a red house", "a boat"}
    for row in rows:
        better, worse = (load_media(tmp_path / "store" / row[side]) for side in ("chosen", "rejected"))
        # What was judged is what was stored, to the last bit of the reward's float32.
        assert row["scores"]["chosen"]["mean"] == better[0].mean().item() > worse[0].mean().item()
        assert row["scores"]["rejected"]["mean"] == worse[0].mean().item()
        assert row["rewards"]["chosen"] == pytest.approx(2 * row["scores"]["chosen"]["mean"])
        assert row["margin"] == row["rewards"]["chosen"] - row["rewards"]["rejected"] > 0
        assert set(row["scores"]["chosen"]) == {"mean", "pixel.contrast"}
        assert row["policy"] == {
            "config": "test", "model": row["policy"]["model"], "weights": None, "iteration": None, "guidance": 1.0,
            "num_steps": 2, "seed": 0,
        }  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "store" / "pairs.jsonl").read_text()
    assert {row["metadata"].get("category") for row in rows if row["prompt"] == "a boat"} == {"boats"}
    used = {row[side] for row in rows for side in ("chosen", "rejected")}
    assert used == {f"media/{path.name}" for path in (tmp_path / "store" / "media").iterdir()} and len(used) == 6
    assert len(read_pairs(tmp_path / "store")) == 6


def test_samples_are_the_policys_and_the_noise_follows_the_seed(setting, tmp_path):
    from flowrl.collect import Conditions, sample
    from flowrl.data import PromptSampler
    from flowrl.media import geometry_of, load_model
    from flowrl.policy import Policy

    make(setting, tmp_path / "store", how="all")
    make(setting, tmp_path / "other", how="all", seed=1)
    policy = Policy(load_model(setting), frozen=True)
    known = load_prompts(setting.data.prompts)
    prompts = [p for p in PromptSampler(known, 4, 0)(0) for _ in range(3)]
    media = sample(
        policy, prompts, range(12), Conditions(encode=policy.encode), geometry_of(setting, policy.model),
        num_steps=2, seed=0, iteration=-2,
    )  # fmt: skip
    for path in (tmp_path / "store" / "media").iterdir():
        place, member = (int(part) for part in path.stem.split("_"))
        assert (load_media(path) - media[3 * place + member]).abs().max() <= 0.51 / 255
    files, others = ({k for k in contents(tmp_path / name).items() if "png" in k[0]} for name in ("store", "other"))
    assert not {data for _, data in files} & {data for _, data in others}


def test_a_stopped_making_goes_on_and_gives_the_same_store(setting, tmp_path):
    make(setting, tmp_path / "whole", how="all")
    (tmp_path / "stop").touch()
    with pytest.raises(Exception, match="stopped"):
        make(setting, tmp_path / "store", how="all")
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    assert record["counts"]["prompts"] < 4 and contents(tmp_path / "store") != contents(tmp_path / "whole")
    with (tmp_path / "store" / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "cut sho')  # as a kill in the middle of a chunk's rows leaves it
    (tmp_path / "stop").unlink()
    make(setting, tmp_path / "store", how="all")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    before = contents(tmp_path / "store")
    assert make(setting, tmp_path / "store", how="all").pairs == 6  # nothing is left to do
    assert contents(tmp_path / "store") == before


def test_other_arguments_are_refused_on_an_old_store(setting, make_config, tmp_path):
    make(setting, tmp_path / "store")
    before = contents(tmp_path / "store")
    for changes, text in [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"samples_per_prompt": 4}, "samples_per_prompt: 3 then, 4 now"),
        ({"how": "all"}, "how: 'best_worst' then, 'all' now"),
        ({"num_prompts": 3}, "num_prompts: 4 then, 3 now"),
    ]:
        with pytest.raises(DataError, match=f"(?s){text}.*Give those again"):
            make(setting, tmp_path / "store", **changes)
    other = make_config({**_tree(setting), "rewards": [{"use": "pixel.redness"}]})
    with pytest.raises(DataError, match="rewards.0.use"):
        make(other, tmp_path / "store")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(DataError, match=r"data.prompts \(contents\)"):
        make(setting, tmp_path / "store")
    assert contents(tmp_path / "store") == before


def _tree(config):
    return {"data.prompts": config.data.prompts, "data.evaluation.batch_size": 3, "data.max_no_verdict": 0.99}


def test_portions_and_folders_are_no_other_arguments(setting, make_config, tmp_path):
    make(setting, tmp_path / "store")
    changes = {
        **_tree(setting), "rewards": [entry.model_dump() for entry in setting.rewards], "data.evaluation.batch_size": 9,
        "iterations": 9, "optimizer.lr": 1e-4,
    }  # fmt: skip
    assert make(make_config(changes, folder="elsewhere"), tmp_path / "store").prompts == 4


def test_folders_that_cannot_be_gone_on_with(setting, tmp_path):
    make(setting, tmp_path / "store")
    for name, spoil, text in [
        ("foreign", lambda f: (f / "store.json").unlink(), "without a store.json"),
        ("cut", lambda f: (f / "pairs.jsonl").write_text(""), "it was changed"),
        ("damaged", lambda f: (f / "store.json").write_text("{"), "damaged"),
    ]:
        folder = shutil.copytree(tmp_path / "store", tmp_path / name)
        spoil(folder)
        with pytest.raises(DataError, match=text):
            make(setting, folder)
    for changes, text in [
        ({"samples_per_prompt": 1}, "at least two"),
        ({"how": "all", "min_margin": 1.0}, "no effect"),
    ]:
        with pytest.raises(DataError, match=text):
            make(setting, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_runs_weights_make_other_pairs_and_are_named(trainer, setting, tmp_path):
    run = trainer({"iterations": 1, "optimizer.lr": 3e-2, "model.lora": runs.LORA}, folder="tuned")
    run.run()
    make(setting, tmp_path / "base", how="all")
    make(setting, tmp_path / "tuned_pairs", how="all", weights=tmp_path / "tuned")
    policy = raw_rows(tmp_path / "tuned_pairs")[0]["policy"]
    assert policy["weights"] == "tuned/weights" and policy["iteration"] == 1
    base, tuned = (raw_rows(tmp_path / name)[0] for name in ("base", "tuned_pairs"))
    assert base["prompt"] == tuned["prompt"] and base["rewards"] != tuned["rewards"]
    with pytest.raises(DataError, match=r"weights \(contents\): None then"):
        make(setting, tmp_path / "base", how="all", weights=tmp_path / "tuned")


def test_pairs_of_a_stores_own_prompts(setting, make_config, tmp_path):
    """What regenerating one's pairs needs: the prompts of a store, without its samples."""
    make(setting, tmp_path / "store")
    again = make_config({**_tree(setting), "data.prompts": str(tmp_path / "store")}, folder="again")
    make(again, tmp_path / "second", num_prompts=2)
    assert {row["prompt"] for row in raw_rows(tmp_path / "second")} <= {"a red house", "a boat"}
    assert read_pairs(tmp_path / "second")


def test_the_commands(command, config_file, tmp_path):
    path, output = config_file(), tmp_path / "pairs"
    arguments = ("--num-prompts", 2, "--samples-per-prompt", 3, "--num-steps", 2)
    code, out, err = command("pairs", "make", path, output, "rewards.0.weight=3", *arguments)
    assert code == 0, err
    said = " ".join(out.split())
    assert "2/2 prompts, 2 pairs" in said and "2 pairs of 2 prompts; without a pair: 0 tied" in said
    code, out, _ = command("pairs", "show", output)
    said = " ".join(out.split())
    assert code == 0 and "pairs 2" in said and "50% quantile" in said and "ties 0 of 2 (0%)" in said
    assert "config test" in said
    code, _, err = command("pairs", "make", path, output, *arguments)
    assert code == 2 and "rewards.0.weight: 3.0 then, 1.0 now" in err and "Traceback" not in err
    assert command("pairs", "make", path, output, "--choose", "best")[0] == 2
    code, _, err = command("pairs", "show", tmp_path / "nowhere")
    assert code == 2 and "there is no file" in err
