"""Keyed noise depends on its key and on nothing else."""

import hashlib

import pytest
import torch

from samplers import keyed_noise, keyed_noise_batch, noise_source, stable_seed

KEY = {"seed": 3, "iteration": 5, "prompt": 7, "member": 1, "step": -1}


def test_the_hash_is_blake2b_of_the_numbers():
    digest = hashlib.blake2b(b"3,5,-1", digest_size=8).digest()
    assert stable_seed(3, 5, -1) == int.from_bytes(digest, "little")
    assert stable_seed(torch.tensor(3), 5, -1) == stable_seed(3, 5, -1)


@pytest.mark.parametrize("name", KEY)
def test_every_part_of_the_key_matters(name):
    one = keyed_noise((4, 5), **KEY)
    other = keyed_noise((4, 5), **{**KEY, name: KEY[name] + 1})
    assert one.dtype == torch.float32 and torch.equal(one, keyed_noise((4, 5), **KEY))
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.9


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = keyed_noise((8,), **KEY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(one, keyed_noise((8,), **KEY))


def test_it_is_standard_normal():
    sample = keyed_noise_batch((64,), seed=0, iteration=0, prompt=range(400), member=[0] * 400, step=2)
    assert abs(sample.mean()) < 0.02 and abs(sample.std() - 1) < 0.02
    assert abs(torch.corrcoef(sample)[0, 1:]).max() < 0.6


def test_rows_do_not_depend_on_the_batch_or_its_order():
    prompt, member = torch.tensor([4, 4, 9, 2]), torch.tensor([0, 1, 0, 3])
    key = {"seed": 1, "iteration": 2, "step": 6}
    batch = keyed_noise_batch((2, 3), prompt=prompt, member=member, **key)
    turned = keyed_noise_batch((2, 3), prompt=prompt.flip(0), member=member.flip(0), **key)
    assert torch.equal(turned.flip(0), batch)
    for row, p, m in zip(batch, prompt, member, strict=True):
        assert torch.equal(row, keyed_noise((2, 3), prompt=p, member=m, **key))


def test_a_source_adds_the_members_of_a_root_to_its_first():
    source = noise_source((3,), seed=0, iteration=1, prompt=[5, 5, 8], member=[0, 4, 0])
    got = source(torch.tensor([1, 2]), torch.tensor([2, 1]), 7)
    assert torch.equal(got[0], keyed_noise((3,), seed=0, iteration=1, prompt=5, member=6, step=7))
    assert torch.equal(got[1], keyed_noise((3,), seed=0, iteration=1, prompt=8, member=1, step=7))


def test_a_batch_without_samples_is_empty():
    assert keyed_noise_batch((2,), seed=0, iteration=0, prompt=[], member=[], step=0).shape == (0, 2)
