"""The contract's records refuse what no reward could use, and say how to mend it."""

import pytest
import torch

from rewards import Reward, RewardContractError, Sample, Traits, declare, traits_of


@pytest.mark.parametrize("shape", [(1, 3, 8, 8, 8), (8, 8), (8, 8, 3), (4, 8, 8), (3, 0, 8), (0, 3, 8, 8)])
def test_a_sample_refuses_a_shape_that_is_no_media(shape):
    with pytest.raises(RewardContractError, match=r"expected \[3, H, W\] for an image or \[F, 3, H, W\].*permute"):
        Sample(media=torch.zeros(shape))


def test_a_sample_refuses_bytes_and_says_how_to_convert_them():
    with pytest.raises(RewardContractError, match=r"uint8.*media\.float\(\) / 255"):
        Sample(media=torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_kind_follows_the_dimensions():
    assert Sample(media=torch.zeros(3, 8, 8)).kind == "image"
    assert Sample(media=torch.zeros(5, 3, 8, 8)).kind == "video"


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"media": {"images"}}, "media = .*expected a set of"),
        ({"media": set()}, "media = "),
        ({"scope": "batch"}, 'expected "sample" or "group"'),
        ({"needs": "text"}, r"expected a tuple of keys: needs = \('text',\)"),
        ({"range": (1, 0)}, "lowest < highest"),
    ],
)
def test_traits_refuse_what_would_silently_never_match(traits, message):
    with pytest.raises(RewardContractError, match=message):
        declare(**traits)


def test_a_misspelt_trait_is_an_error():
    with pytest.raises(TypeError, match="differentiabel"):
        declare(differentiabel=True)


def test_traits_come_from_attributes_and_default_where_there_are_none():
    class Mine:
        media = "video"
        needs = ["reference"]

        def score(self, samples):
            return [0.0] * len(samples)

    assert isinstance(Mine(), Reward)
    assert traits_of(Mine()) == Traits(media=frozenset({"video"}), needs=("reference",))
    assert traits_of(object()) == Traits()


def test_declare_sets_the_attributes_of_a_function():
    @declare(needs=("text",), range=(0, 1))
    def mine(samples):
        return [0.0] * len(samples)

    assert traits_of(mine) == Traits(needs=("text",), range=(0, 1))
