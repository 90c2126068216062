"""A buffer of rows: what it holds, with which chances it draws, and that processes and checkpoints do not change it."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import permutations

import pytest
import torch

from flowrl import checkpoint
from flowrl.replay import ReplayBuffer, answers, capacity, gathered, tensors_of
from flowrl.types import Tokens
from tests import threaded

NAN = math.nan


def tokens(lengths, start=0, prompt=0, behaviour=False):
    """Answers of such lengths, whose ids say which they are: 100 (start + row) + place."""
    size, places = len(lengths), max(lengths, default=0)
    present = torch.arange(places) < torch.tensor(lengths, dtype=torch.long)[:, None]
    ids = (100 * (start + torch.arange(size))[:, None] + torch.arange(places) + 1) * present
    mask = present & (torch.arange(places) != 1)  # the second place is a tool's
    return Tokens(
        ids=ids, present=present, mask=mask, logprob=-(ids % 97).float() / 10 * mask,
        prompt=torch.full((size,), prompt), inputs=tuple({"pixels": object()} for _ in lengths),
        behaviour=-ids.float() if behaviour else None,
    )  # fmt: skip


def filled(advantages, size=100, max_age=10, start=0, iteration=0):
    buffer = ReplayBuffer(size, max_age, answers)
    lengths = [1 + i % 4 for i in range(len(advantages))]
    buffer.add(tokens(lengths, start), torch.tensor(advantages), torch.arange(len(advantages)), iteration)
    return buffer


def held(buffer, iteration=0):
    """Which rows can be drawn, by their first id."""
    drawn = buffer.draw(10**6, iteration, 0)
    return [] if drawn is None else [int(i) // 100 for i in drawn.rows.ids[:, 0]]


def equal(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) and t.dtype == b[name].dtype for name, t in a.items())


# ------------------------------------------------------------------------------------------------ what it holds


def test_only_rows_with_an_advantage_are_held():
    buffer = filled([0.5, 0.0, -1.0, NAN, 2.0, -0.0])
    assert len(buffer) == 3 and held(buffer) == [0, 2, 4]
    drawn = buffer.draw(3, 0, 0)
    assert drawn.advantages.tolist() == [0.5, -1.0, 2.0] and drawn.prompts.tolist() == [0, 2, 4]
    assert drawn.advantages.dtype == torch.float64


def test_rows_come_back_as_they_were():
    buffer = ReplayBuffer(10, 3, answers)
    given = tokens([3, 1, 5], behaviour=True)
    buffer.add(given, torch.ones(3), torch.arange(3), 0)
    drawn = buffer.draw(9, 2, 0)
    assert equal(drawn.rows, given) and drawn.age.tolist() == [2, 2, 2]
    assert drawn.rows.inputs == (None,) * 3  # pictures are not held


def test_answers_of_other_lengths_lie_under_each_other():
    buffer = ReplayBuffer(10, 3, answers)
    parts = tokens([2, 1]), tokens([6], start=2), tokens([], start=3), tokens([3], start=3)
    for iteration, part in enumerate(parts):
        buffer.add(part, torch.ones(len(part)), torch.arange(len(part)), iteration)
    drawn = buffer.draw(9, 3, 0)
    assert equal(drawn.rows, Tokens.cat(parts)) and drawn.age.tolist() == [3, 3, 2, 0]


def test_the_oldest_make_room():
    buffer = ReplayBuffer(5, 100, answers)
    for i in range(4):
        buffer.add(tokens([6 - i] * 2, start=2 * i), torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), i)
    assert held(buffer, 3) == [3, 4, 5, 6, 7]
    assert buffer.draw(9, 3, 0).rows.ids.shape == (5, 5)  # and take their width with them


def test_a_row_is_drawn_until_it_is_too_old():
    buffer = filled([1.0, 1.0], max_age=2, iteration=5)
    assert [held(buffer, i) for i in (5, 6, 7)] == [[0, 1]] * 3 and buffer.draw(2, 8, 0) is None
    buffer.add(tokens([1], start=2), torch.ones(1), torch.zeros(1, dtype=torch.long), 8)
    assert len(buffer) == 1 and held(buffer, 8) == [2]


def test_nothing_to_draw():
    assert ReplayBuffer(3, 1, answers).draw(2, 0, 0) is None
    assert filled([0.0, NAN]).draw(2, 0, 0) is None
    assert filled([1.0]).draw(0, 0, 0) is None


def test_what_cannot_be():
    for options in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="both are at least 1"):
            ReplayBuffer(*options, answers)
    buffer = ReplayBuffer(3, 1, answers)
    for advantages, prompts in (
        (torch.ones(3), torch.ones(2)),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2, 4),) * 2,
    ):
        with pytest.raises(ValueError, match=r"2 rows with advantages \[.*give one number a row"):
            buffer.add(tokens([1, 1]), advantages, prompts, 0)


@dataclass(frozen=True)
class Row:
    """The least that a table must be."""

    x: torch.Tensor
    note: str = "no tensor"

    def __len__(self):
        return len(self.x)

    def select(self, rows):
        return Row(self.x[rows])

    @classmethod
    def cat(cls, tables):
        return cls(torch.cat([t.x for t in tables]))


def test_any_table_will_do():
    buffer = ReplayBuffer(3, 5, lambda tensors: Row(**tensors))
    for i in range(2):
        buffer.add(Row(torch.randn(3, 2, 2) + 10 * i), torch.tensor([1.0, 0.0, -1.0]), torch.arange(3), i)
    drawn = buffer.draw(3, 1, 0)
    assert drawn.rows.x.shape == (3, 2, 2) and (drawn.rows.x[1:] > 5).all() and (drawn.rows.x[0] < 5).all()
    assert drawn.prompts.tolist() == [2, 0, 2]


# ------------------------------------------------------------------------------------------------ how it draws


def test_draws_are_in_proportion_to_the_advantages():
    """The chance of an ordered draw without replacement is a product; two of four rows, against all of them."""
    advantages = [0.5, -1.0, 2.0, 0.25]
    size = [abs(a) for a in advantages]
    chance = Counter()
    for first, second in permutations(range(4), 2):
        p = size[first] / sum(size) * size[second] / (sum(size) - size[first])
        chance[first] += p
        chance[second] += p
    buffer, runs = filled(advantages, max_age=10**6), 3000
    found = Counter(int(i) // 100 for run in range(runs) for i in buffer.draw(2, run, 3).rows.ids[:, 0])
    for row, p in chance.items():
        assert abs(found[row] / runs - p) < 4.5 * math.sqrt(p * (1 - p) / runs)


def test_a_draw_is_a_function_of_seed_and_iteration():
    buffer = filled([1.0] * 40)
    draws = {(i, s): buffer.draw(5, i, s).prompts.tolist() for i in range(3) for s in range(3)}
    assert draws == {(i, s): buffer.draw(5, i, s).prompts.tolist() for i, s in draws}
    assert len({tuple(drawn) for drawn in draws.values()}) == 9
    assert all(len(set(drawn)) == 5 and drawn == sorted(drawn) for drawn in draws.values())
    state = torch.get_rng_state()
    buffer.draw(5, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_left_do_not_change_what_is_drawn_of_the_rest():
    """Rows keep their number: of two buffers, one of which never held the first rows long, the same are drawn."""
    small, large = ReplayBuffer(6, 10, answers), ReplayBuffer(60, 10, answers)
    for i in range(4):
        for buffer in (small, large):
            buffer.add(tokens([2] * 3, start=3 * i), torch.ones(3), torch.arange(3) + 3 * i, i)
    order = [large.draw(n, 4, 1).prompts.tolist() for n in range(1, 13)]
    ranked = [next(iter(set(b) - set(a))) for a, b in zip([[], *order], order, strict=False)]
    late = [prompt for prompt in ranked if prompt >= 6]
    for n in range(1, 7):
        assert small.draw(n, 4, 1).prompts.tolist() == sorted(late[:n])


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[4, 2], [], [0, 3, 1]]])
def test_a_table_of_all_processes(split):
    """Every process sends its rows to their places and gets the whole table, to the last bit."""
    whole = tokens([2, 5, 1, 3, 5], behaviour=True)
    places = [torch.tensor(rows, dtype=torch.long) for rows in split]
    engines = [threaded.on_rank(rank, len(split), lambda: threaded.load("cpu")) for rank in range(len(split))]

    def job(engine):
        place = places[engine.rank]
        return gathered(whole.select(place), place, 5, engine.sum)

    for found in threaded.together([lambda engine=engine: job(engine) for engine in engines]):
        assert equal(found, whole) and found.inputs == (None,) * 5


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    buffer = filled([0.5, -0.1, 0.0, 1e-9, 3.0, 0.3], size=4, max_age=3)
    buffer.add(tokens([7, 2], start=6), torch.tensor([0.2, -0.7]), torch.tensor([6, 7]), 1)
    checkpoint.save(tmp_path, 2, buffer.state_dict(), {})
    again = ReplayBuffer(4, 3, answers)
    again.load_state_dict(checkpoint.latest_valid(tmp_path).tensors)
    for iteration in (2, 3, 4):
        for one in (buffer, again):
            one.add(tokens([3] * 2, start=10 + iteration), torch.ones(2), torch.tensor([1, 2]), iteration)
        a, b = (one.draw(3, iteration, 5) for one in (buffer, again))
        assert equal(a.rows, b.rows) and equal(a, b)
        state, other = buffer.state_dict(), again.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in state.items())


@pytest.mark.parametrize(
    "buffer", [ReplayBuffer(4, 2, answers), filled([0.0, NAN]), filled([1.0])], ids=["new", "nothing worth it", "one"]
)
def test_an_empty_buffer_can_be_saved(tmp_path, buffer):
    if len(buffer):  # one whose rows all became too old
        buffer.add(tokens([1]), torch.zeros(1), torch.zeros(1), 99)
    assert not len(buffer)
    checkpoint.save(tmp_path, 0, buffer.state_dict(), {})
    again = filled([1.0, 2.0], size=buffer.size, max_age=buffer.max_age)
    again.load_state_dict(checkpoint.latest_valid(tmp_path).tensors)
    assert len(again) == 0 and again.draw(3, 99, 0) is None
    again.add(tokens([2, 3]), torch.ones(2), torch.arange(2), 99)
    assert held(again, 99) == [0, 1]


def test_the_state_of_another_run_is_refused():
    state = filled([1.0, 2.0]).state_dict()
    with pytest.raises(ValueError, match="holds 2 rows, more than its size, 1"):
        ReplayBuffer(1, 2, answers).load_state_dict(state)
    del state["born"]
    with pytest.raises(ValueError, match="lacks born"):
        ReplayBuffer(9, 2, answers).load_state_dict(state)


# ------------------------------------------------------------------------------------------------ staleness


def test_capacity_by_hand():
    assert capacity(0, 0, 0, batch=8, max_staleness=0) == 8
    assert capacity(3, 20, 10, batch=8, max_staleness=2) == 6 * 8 - 30
    assert capacity(0, 8, 1, batch=8, max_staleness=0) == 0


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_sample_is_used_too_late_and_the_bound_is_reached(max_staleness, batch):
    """Samples are started whenever they may be, end in any order, and are used in the order of their start."""
    generator = torch.Generator().manual_seed(batch + max_staleness)
    born, ended, version = [], set(), 0
    lags = []
    while version < 40:
        running = [i for i in range(len(born)) if i not in ended]
        started = capacity(version, len(ended), len(running), batch, max_staleness)
        born += [version] * started
        running += range(len(born) - started, len(born))
        if running:
            ended.add(running[int(torch.randint(len(running), (), generator=generator))])
        wanted = range(version * batch, (version + 1) * batch)
        if ended.issuperset(wanted):
            lags += [version - born[i] for i in wanted]
            version += 1
    assert max(lags) == max_staleness
