"""Prompt files and what is refused in them; which prompts an iteration takes."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import permutations

import pytest
import torch

from flowrl.data import DataError, PromptSampler, fingerprint, load_prompts, shard
from flowrl.types import Prompt


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ------------------------------------------------------------------------------------------------ reading


def test_source_pictures_start_beside_the_file_of_prompts(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "in" / name)
    file = tmp_path / "edits.jsonl"
    rows = [
        {"prompt": "make it blue", "source": "in/a.png"},
        {"prompt": "join them", "source": ["in/a.png", "in/b.png"]},
        {"prompt": "like b", "source": "in/a.png", "reference": "in/b.png"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = (str(tmp_path / "in" / name) for name in ("a.png", "b.png"))
    first, second, third = load_prompts(file)
    assert first.sources == (a,) and first.metadata["reference"] == a  # rewards compare with what is edited
    assert second.sources == (a, b) and "reference" not in second.metadata
    assert third.metadata["reference"] == b
    told = fingerprint([first, second, third])
    Image.new("RGB", (4, 4), "green").save(b)
    assert fingerprint([first, second, third]) != told  # what the files hold belongs to the data set


@pytest.mark.parametrize(("given", "told"), [('"c.png"', "no file.*c.png"), ("[]", "path of a picture"), ("3", "path")])
def test_a_source_that_is_none_is_refused_with_its_line(tmp_path, given, told):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "source": ' + given + "}\n")
    with pytest.raises(DataError, match=f"p.jsonl:2.*source.*{told}"):
        load_prompts(tmp_path / "p.jsonl")


def test_the_built_in_world_has_categories_and_disjoint_splits():
    train, held_out = load_prompts("shapes"), load_prompts("shapes", "held_out")
    assert {p.metadata["category"] for p in train} == {p.metadata["category"] for p in held_out}
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert [p.id for p in train] == list(range(len(train)))


@pytest.mark.parametrize("text", ["a cat\na dog\n", "a cat\r\na dog\r\n", "\ufeffa cat\na dog", "a cat\na dog\n\n\n"])
def test_text_files(tmp_path, text):
    assert [(p.id, p.text) for p in load_prompts(write(tmp_path, "p.txt", text))] == [(0, "a cat"), (1, "a dog")]


def test_jsonl_keeps_metadata_and_equal_prompts_stay_apart(tmp_path):
    rows = [{"prompt": "a sign", "text": "open", "n": 2}, {"prompt": "a sign", "text": "shut"}]
    path = write(tmp_path, "p.jsonl", "\ufeff" + "\r\n".join(json.dumps(row) for row in rows))
    prompts = load_prompts(path)
    assert [p.id for p in prompts] == [0, 1]
    assert [dict(p.metadata) for p in prompts] == [{"text": "open", "n": 2}, {"text": "shut"}]


def test_unicode_line_separators_are_part_of_a_prompt(tmp_path):
    text = "a\u2028b\x0bc\x85d"
    assert [p.text for p in load_prompts(write(tmp_path, "p.txt", text))] == [text]
    record = json.dumps({"prompt": text}, ensure_ascii=False)
    assert [p.text for p in load_prompts(write(tmp_path, "p.jsonl", record))] == [text]


def test_lists_and_emoji():
    assert [p.text for p in load_prompts(["🐈 auf dem Dach", "a cat"])] == ["🐈 auf dem Dach", "a cat"]


BAD_LINES = [
    ("", ["p.jsonl:2", "the line is empty", "remove it"]),
    ("{", ["p.jsonl:2", "broken JSON", "column 2", "one object a line"]),
    ("[" * 100_000, ["p.jsonl:2", "broken JSON"]),
    ('["a"]', ["p.jsonl:2", 'expected an object like {"prompt"', "found list"]),
    ('{"promt": "a"}', ["p.jsonl:2", '"prompt" is missing', "did you mean 'promt'"]),
    ('{"caption": "a"}', ["p.jsonl:2", "rename one of caption"]),
    ('{"prompt": 3}', ["p.jsonl:2", "int 3, not text", "quotes"]),
    ('{"prompt": null}', ["p.jsonl:2", "NoneType None, not text"]),
    ('{"prompt": ["a"]}', ["p.jsonl:2", "list ['a'], not text"]),
    ('{"prompt": "  "}', ["p.jsonl:2", "the prompt is empty", "write a prompt"]),
    ('{"prompt": "a\\u0000b"}', ["p.jsonl:2", "null byte", "UTF-8"]),
    ('{"prompt": "\\ud800"}', ["p.jsonl:2", "lone surrogate"]),
    ('{"prompt": "a", "prompt": "b"}', ["p.jsonl:2", "'prompt' stands twice"]),
    ('{"prompt": "a", "score": NaN}', ["p.jsonl:2", "NaN is not JSON"]),
]


@pytest.mark.parametrize(("line", "parts"), BAD_LINES, ids=[line[:20] for line, _ in BAD_LINES])
def test_bad_lines_are_named(tmp_path, line, parts):
    path = write(tmp_path, "p.jsonl", '{"prompt": "fine"}\n' + line + '\n{"prompt": "fine"}\n')
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("p.txt", b"a\n\nb", ["p.txt:2", "empty"]),
        ("p.txt", b"a\n b\0", ["p.txt:2", "null byte"]),
        ("p.txt", "a\nb".encode("utf-16"), ["p.txt:1", "not UTF-8"]),
        ("p.txt", b"a\nb\xff", ["p.txt:2", "not UTF-8", "save the file as UTF-8"]),
        ("p.txt", b"", ["p.txt", "holds no prompts"]),
        ("p.jsonl", b"\n\n", ["holds no prompts"]),
        ("p.csv", b"a", ["'.csv'", ".jsonl"]),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, parts):
    with pytest.raises(DataError) as caught:
        load_prompts(write(tmp_path, name, data))
    for part in parts:
        assert part in str(caught.value)


def test_missing_files_suggest_their_neighbours(tmp_path, monkeypatch):
    write(tmp_path, "captions.txt", "a")
    monkeypatch.chdir(tmp_path)
    for name, part in [
        ("caption.txt", "did you mean 'captions.txt'"),
        ("shape", "did you mean 'shapes'"),
        (".", "is a folder"),
    ]:
        with pytest.raises(DataError, match=part):
            load_prompts(name)
    with pytest.raises(DataError, match="prompt 1 of the list: the prompt is empty"):
        load_prompts(["a", ""])
    with pytest.raises(DataError, match="unknown split 'test'"):
        load_prompts("shapes", "test")


def test_the_fingerprint_sees_text_metadata_and_order():
    def prints(*rows):
        return fingerprint([Prompt(id=i, text=text, metadata=meta) for i, (text, meta) in enumerate(rows)])

    base = prints(("a", {}), ("b", {"n": 1}))
    assert base == prints(("a", {}), ("b", {"n": 1}))
    assert len({base, prints(("b", {"n": 1}), ("a", {})), prints(("a", {}), ("b", {"n": 2})), prints(("a", {}))}) == 4


# ------------------------------------------------------------------------------------------------ sampling


def prompts(count, **metadata):
    return [
        Prompt(id=i, text=f"p{i % 3}", metadata={k: v[i % len(v)] for k, v in metadata.items()}) for i in range(count)
    ]


@pytest.mark.parametrize(("count", "per_iteration"), [(12, 4), (10, 4), (7, 3)])
def test_an_epoch_takes_every_prompt_once(count, per_iteration):
    sampler = PromptSampler(prompts(count), per_iteration, seed=3)
    stream = [p.id % count for iteration in range(count) for p in sampler(iteration)]
    epochs = [tuple(stream[i : i + count]) for i in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)  # each in an order of its own


def test_what_an_iteration_takes_depends_on_seed_and_iteration_alone():
    first = PromptSampler(prompts(50), 8, seed=1)
    order = [7, 0, 3, 7, 100, 0]
    assert [first(i) for i in order] == [PromptSampler(prompts(50), 8, seed=1)(i) for i in order]
    assert first(0) != PromptSampler(prompts(50), 8, seed=2)(0)
    assert first(0) != first(1)


def test_it_is_the_same_in_another_process():
    """Python's own hash is salted per process; the order must not be."""
    code = """
from flowrl.data import PromptSampler
from dataclasses import dataclass, field
@dataclass
class P:
    id: int
    metadata: dict = field(default_factory=dict)
print([p.id for p in PromptSampler([P(i) for i in range(9)], 5, seed=4)(11)])
"""
    env = os.environ | {"PYTHONHASHSEED": "123"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert json.loads(found) == [p.id for p in PromptSampler(prompts(9), 5, seed=4)(11)]


def test_a_small_data_set_gives_distinct_groups():
    sampler = PromptSampler(prompts(3), 8, seed=0)
    for iteration in range(20):
        taken = sampler(iteration)
        assert len({p.id for p in taken}) == 8
        assert set(Counter(p.id % 3 for p in taken).values()) <= {2, 3, 4}
        assert all(p.text == f"p{p.id % 3}" for p in taken)


@pytest.mark.parametrize("per_iteration", [4, 6, 7])
def test_balanced_iterations_cover_categories_evenly(per_iteration):
    data = prompts(40, category=["a", "a", "a", "b", "c", "a", "c", "a"])
    sampler = PromptSampler(data, per_iteration, seed=0, balance="category")
    total = Counter()
    for iteration in range(30):
        counts = Counter(p.metadata["category"] for p in sampler(iteration))
        total += counts
        assert max(counts.values()) - min(counts[c] for c in "abc") <= 1
    assert max(total.values()) - min(total.values()) <= 1
    seen = {p.id % 40 for iteration in range(30) for p in sampler(iteration)}
    assert seen == set(range(40))


def test_balance_needs_the_field_on_every_prompt():
    data = [Prompt(id=0, text="a", metadata={"category": "x"}), Prompt(id=1, text="b", metadata={"categroy": "x"})]
    with pytest.raises(DataError, match=r"prompt 1 \('b'\) has no metadata 'category' \(did you mean 'categroy'\?\)"):
        PromptSampler(data, 2, balance="category")


def test_impossible_samplers():
    with pytest.raises(DataError, match="no prompts"):
        PromptSampler([], 2)
    with pytest.raises(DataError, match="prompts_per_iteration=0"):
        PromptSampler(prompts(2), 0)


# ------------------------------------------------------------------------------------------------ weighted sampling


def chances(weights, draws):
    """Chance of each prompt to be among the first draws without replacement, by going through every order."""
    found = [0.0] * len(weights)
    for order in permutations(range(len(weights)), draws):
        chance, left = 1.0, sum(weights)
        for index in order:
            chance *= weights[index] / left
            left -= weights[index]
        for index in order:
            found[index] += chance
    return found


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_weighted_draws_have_the_chances_of_drawing_without_replacement(draws):
    weights, iterations = [5.0, 1.0, 0.0, 3.0, 0.25], 4000
    sampler = PromptSampler(prompts(5), draws, seed=2)
    drawn = Counter(p.id for i in range(iterations) for p in sampler(i, torch.tensor(weights)))
    for index, chance in enumerate(chances(weights, draws)):
        deviation = (chance * (1 - chance) / iterations) ** 0.5
        assert abs(drawn[index] / iterations - chance) <= 4 * deviation
    assert drawn[2] == 0


def test_the_first_of_a_weighted_draw_has_the_chance_of_its_weight():
    """The order counts too: it decides which process gets a prompt."""
    sampler, weights = PromptSampler(prompts(3), 3, seed=5), torch.tensor([1.0, 2.0, 7.0])
    firsts = Counter(sampler(i, weights)[0].id for i in range(4000))
    assert all(abs(firsts[i] / 4000 - weights[i] / 10) < 0.03 for i in range(3))


def test_a_weighted_draw_is_a_function_of_seed_iteration_and_weights_alone():
    weights = torch.linspace(0.1, 3, 50)
    first = PromptSampler(prompts(50), 8, seed=1)
    order = [7, 0, 3, 7, 100, 0]
    drawn = [first(i, weights) for i in order]
    assert drawn == [PromptSampler(prompts(50), 8, seed=1)(i, weights) for i in order]
    assert drawn == [first(i, 2**9 * weights.double()) for i in order]  # only ratios count
    assert first(0, weights) != PromptSampler(prompts(50), 8, seed=2)(0, weights)
    assert first(0, weights) != first(1, weights)
    assert first(0, weights) != first(0, weights.flip(0))


@pytest.mark.parametrize("exponent", [-300, -12, 12, 300])
def test_weights_of_any_size_can_be_compared(exponent):
    sampler, ones = PromptSampler(prompts(20), 5), torch.ones(20, dtype=torch.float64)
    assert [sampler(i, ones * 10.0**exponent) for i in range(20)] == [sampler(i, ones) for i in range(20)]


def test_a_larger_weight_only_ever_brings_a_prompt_in():
    sampler, low = PromptSampler(prompts(12), 4), torch.ones(12)
    high = low.where(torch.arange(12) != 6, 3.0)
    before, after = ([{p.id for p in sampler(i, w)} for i in range(200)] for w in (low, high))
    assert all(6 in b or b == a or (6 in a and len(b - a) == 1) for b, a in zip(before, after, strict=True))
    assert sum(6 in a for a in after) > sum(6 in b for b in before)


@pytest.mark.parametrize("per_iteration", [4, 6, 7])
def test_weighted_draws_keep_the_balance(per_iteration):
    data = prompts(40, category=["a", "a", "a", "b", "c", "a", "c", "a"])
    weights = torch.tensor([9.0 if p.metadata["category"] == "a" else 0.5 + (p.id % 3) for p in data])
    sampler, total = PromptSampler(data, per_iteration, seed=0, balance="category"), Counter()
    for iteration in range(30):
        taken = sampler(iteration, weights)
        counts = Counter(p.metadata["category"] for p in taken)
        total += counts
        assert len({p.id for p in taken}) == per_iteration
        assert max(counts.values()) - min(counts[c] for c in "abc") <= 1
    assert max(total.values()) - min(total.values()) <= 1


def test_within_a_category_the_weights_decide():
    data = prompts(8, category=["a", "b"])
    weights = torch.tensor([3.0, 5.0, 1.0, 5.0, 0.0, 5.0, 0.0, 5.0])
    sampler = PromptSampler(data, 2, balance="category")
    drawn = Counter(p.id for i in range(4000) for p in sampler(i, weights))
    assert abs(drawn[0] / 4000 - 0.75) < 0.03 and drawn[0] + drawn[2] == 4000
    assert all(abs(drawn[i] / 4000 - 0.25) < 0.03 for i in (1, 3, 5, 7))


def test_weight_0_is_taken_where_the_others_do_not_suffice():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    for iteration in range(50):
        two, four, twelve = ([p.id for p in PromptSampler(prompts(5), n)(iteration, weights)] for n in (2, 4, 12))
        assert set(two) == {1, 3} < set(four) and len(set(four)) == 4
        assert len(set(twelve)) == 12  # two laps of five, and of the third the two that are wanted
        times = Counter(i % 5 for i in twelve)
        assert [times[i] for i in range(5)] == [2, 3, 2, 3, 2]


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ([1.0, 2.0], r"weights of shape \[2\] for 3 prompts; return one for each"),
        ([[1.0], [2.0], [3.0]], r"weights of shape \[3, 1\] for 3 prompts"),
        ([1.0, float("nan"), 1.0], r"prompt 1 \('p1'\) has the weight nan; return finite numbers"),
        ([1.0, 1.0, -0.5], r"prompt 2 \('p2'\) has the weight -0.5"),
        ([float("inf"), 1.0, 1.0], r"prompt 0 \('p0'\) has the weight inf"),
        ([0.0, 0.0, 0.0], r"every prompt has the weight 0; return at least one"),
    ],
)
def test_impossible_weights(weights, part):
    with pytest.raises(DataError, match="data.curriculum: " + part):
        PromptSampler(prompts(3), 2)(0, torch.tensor(weights))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_are_contiguous_complete_and_even(count, world):
    items = list(range(count))
    parts = [shard(items, rank, world) for rank in range(world)]
    assert sum(parts, []) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
