"""What ranks compare of tensors and of data: checksums that tell bits and places, and digests of samples."""

import pytest
import torch

from accelerate_unsloth.agreement import digest_of_samples
from accelerate_unsloth.checksum import bit_sums


def test_contents_are_compared_unless_they_differ_by_nature():
    class Noisy:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.rand(2)

    class Thing:
        pass

    same, other = ([{"x": torch.arange(3) + offset, "of": Thing()} for _ in range(70)] for offset in (0, 1))
    again = [{"x": torch.arange(3), "of": Thing()} for _ in range(70)]
    assert digest_of_samples(same) == digest_of_samples(again) != digest_of_samples(other)
    assert digest_of_samples(Noisy()) is None
    assert digest_of_samples({(0, 1): 2}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64])
def test_checksums_tell_bits_and_places(dtype):
    values = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {"same": values.clone(), "turned": values.flip(0), "other": values + 1, "scalar": values[0, 3]}
    tensors["strided"] = values.T.contiguous().T
    sums = bit_sums(tensors | {"first": values})
    assert sums["first"] == sums["same"] == sums["strided"]
    assert len({sums[name] for name in ("first", "turned", "other", "scalar")}) == 4


def test_pieces_of_a_large_tensor_are_told_apart(monkeypatch):
    monkeypatch.setattr("accelerate_unsloth.checksum._PIECE", 4)
    first, turned = torch.arange(8), torch.arange(8).roll(4)
    sums = bit_sums({"first": first, "turned": turned})
    assert sums["first"] != sums["turned"]
