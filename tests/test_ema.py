"""The average of the weights: its arithmetic, and that swapping loses nothing."""

import pytest
import torch
from torch.nn import Parameter

from flowrl.ema import EMA


def parameters():
    return {"a": Parameter(torch.tensor([1.0, -2.0])), "b": Parameter(torch.tensor(3.0))}


def test_by_hand_without_warm_up():
    """Decay 0.9 from 1: weight 2 gives 0.9 + 0.2 = 1.1, then weight 4 gives 0.99 + 0.4 = 1.39."""
    weight = Parameter(torch.tensor(1.0))
    ema = EMA({"w": weight}, 0.9, warmup=False)
    for value, expected in [(2.0, 1.1), (4.0, 1.39)]:
        weight.data.fill_(value)
        ema.update()
        torch.testing.assert_close(ema.state_dict()["w"], torch.tensor(expected))


def test_by_hand_with_warm_up():
    """The decays are 1/10, 2/11, ..., up to 0.25: from 1 with weight 2, 0.1 + 1.8 = 1.9, then 0.182*1.9 + 0.818*2."""
    weight = Parameter(torch.tensor(1.0))
    ema = EMA({"w": weight}, 0.25)
    weight.data.fill_(2.0)
    expected = 1.0
    for decay in [0.1, 2 / 11, 0.25, 0.25]:
        ema.update()
        expected = decay * expected + (1 - decay) * 2
        torch.testing.assert_close(ema.state_dict()["w"], torch.tensor(expected))


def test_applying_puts_the_average_in_place_and_gives_the_weights_back():
    """Flow-GRPO's store was `p.detach().cpu()`, an alias on a CPU: 5.0 came back as the average 0.0."""
    weights = {"w": Parameter(torch.zeros(3))}
    ema = EMA(weights, 0.9)
    weights["w"].data.fill_(5.0)
    storage = weights["w"].data_ptr()
    with ema.applied():
        assert torch.equal(weights["w"], torch.zeros(3))
    assert torch.equal(weights["w"], torch.full((3,), 5.0))
    assert weights["w"].data_ptr() == storage  # an optimiser still holds the same tensor
    with ema.applied():
        assert torch.equal(weights["w"], torch.zeros(3))


def test_weights_come_back_bit_by_bit_even_after_an_error():
    weights = parameters()
    ema = EMA(weights, 0.9)
    for p in weights.values():
        p.data.add_(torch.randn_like(p) * 1e-7)
    before = {name: p.detach().clone() for name, p in weights.items()}
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_nothing_aliases():
    weights = parameters()
    ema = EMA(weights, 0.5)
    state = ema.state_dict()
    weights["a"].data.fill_(7)
    assert torch.equal(ema.state_dict()["a"], torch.tensor([1.0, -2.0]))
    ema.update()
    assert torch.equal(state["a"], torch.tensor([1.0, -2.0]))
    ema.load_state_dict(state)
    ema.update()
    assert torch.equal(state["a"], torch.tensor([1.0, -2.0]))


def test_state_round_trip_goes_on_exactly():
    first, second = parameters(), parameters()
    one, two = EMA(first, 0.999), EMA(second, 0.999)
    for step in range(3):
        for p in first.values():
            p.data.add_(step + 0.1)
        one.update()
    two.load_state_dict(one.state_dict())
    for name, p in first.items():
        second[name].data.copy_(p.data)
    one.update(), two.update()
    assert two.count == 4
    assert all(torch.equal(one.state_dict()[name], two.state_dict()[name]) for name in one.state_dict())


def test_reset_starts_at_the_present_weights():
    weights = parameters()
    ema = EMA(weights, 0.9)
    ema.update()
    weights["b"].data.fill_(9)
    ema.reset()
    assert ema.count == 0 and ema.state_dict()["b"] == 9


def test_misuse_is_refused():
    ema = EMA(parameters(), 0.9)
    with ema.applied():
        for what in (ema.update, ema.state_dict, ema.reset, lambda: ema.applied().__enter__()):
            with pytest.raises(RuntimeError, match="changed places"):
                what()
    with pytest.raises(ValueError, match=r"2 missing \(a, b\), 1 unknown \(c\)"):
        ema.load_state_dict({"c": torch.zeros(()), "count": torch.tensor(1)})
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="must lie in"):
            EMA({}, decay)
