"""What ranks compare of tensors and of data: checksums that tell bits and places, and digests of samples."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from accelerate_unsloth.data.contents import digest_of_samples
from accelerate_unsloth.reliability.checksum import bit_sums


class Other:
    """An object whose text holds an address."""


def samples(last):
    return [
        {"x": torch.arange(3), "of": Other(), "y": np.array([1.5, last])},
        {"text": "a", "bytes": b"0", "file": "/here/a.png"},
    ]


def moved(last):
    """The same on another machine: an equal file, in another folder."""
    return [samples(last)[0], samples(last)[1] | {"file": "/there/a.png"}]


def hub(last):
    ids = [[1, 2], [], [3], [last]]
    columns = {"input_ids": ids, "mask": [[1, None], [0], None, []], "messages": [[{"role": "user"}]] * 4}
    return datasets.Dataset.from_dict(columns)


def transformed(rows):
    """Whose reading gives something else each time, and fails the test."""
    rows.set_transform(lambda batch: pytest.fail("a transform was called"))
    return rows


# A dataset that ends with a value, and the same made otherwise.
READABLE = {
    "list": (samples, moved),
    "tuple": (lambda last: tuple(samples(last)), lambda last: tuple(moved(last))),
    "tensor": (lambda last: torch.tensor([[1.0], [last]]), lambda last: torch.tensor([[1.0, last]]).T),
    "array": (lambda last: np.array([[1], [last]]), lambda last: np.array([[1, last]]).T),
    "range": (lambda last: range(last, 9), lambda last: range(last, 9, 1)),
    "tensors": (
        lambda last: TensorDataset(torch.arange(3), torch.tensor([0, 1, last])),
        lambda last: TensorDataset(torch.tensor([0, 1, 2]), torch.tensor([0, 1, last])),
    ),
    "hub": (hub, lambda last: hub(last).with_format("torch")),
    "hub, transformed": (hub, lambda last: transformed(hub(last))),
    "hub, selected": (
        lambda last: hub(last).select([3, 1]),
        lambda last: transformed(hub(last).select([1, 2, 3]).select([2, 0])),
    ),
    "subset": (lambda last: Subset(samples(last), [1, 0]), lambda last: Subset(moved(last), torch.tensor([1, 0]))),
    "concatenated": (
        lambda last: ConcatDataset([samples(1), hub(last)]),
        lambda last: ConcatDataset([moved(1), transformed(hub(last))]),
    ),
}


@pytest.mark.parametrize("kind", READABLE)
def test_contents_are_compared_where_no_code_of_a_user_reads_them(kind):
    one, same = READABLE[kind]
    assert digest_of_samples(one(7)) == digest_of_samples(same(7)) != digest_of_samples(one(8))


@pytest.mark.parametrize(
    "container",
    [lambda rows: rows, lambda rows: Subset(rows, [1]), lambda rows: ConcatDataset([[1, 2], rows])],
)
def test_a_getitem_of_a_user_is_not_called(container):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            pytest.fail("a __getitem__ was called")

    assert digest_of_samples(container(Rows())) is None


def test_subclasses_of_containers_are_not_read():
    assert digest_of_samples(type("Rows", (list,), {})([1, 2])) is None
    assert digest_of_samples({(0, 1): 2}) is None


def test_samples_are_spread_over_the_whole_dataset():
    rows = [0] * 1000
    digests = {digest_of_samples([*rows[:place], 1, *rows[place + 1 :]]) for place in (0, 15, 999)}
    assert len(digests) == 3
    assert digest_of_samples(rows) == digest_of_samples([*rows[:1], 1, *rows[2:]])  # between two that are compared


def test_only_the_named_columns_are_compared():
    rows = [{"input_ids": [1], "id": "a"}], [{"input_ids": [1], "id": "b"}]
    for one, other in (rows, map(datasets.Dataset.from_list, rows)):
        assert digest_of_samples(one) != digest_of_samples(other)
        assert digest_of_samples(one, ["input_ids"]) == digest_of_samples(other, ["input_ids"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64])
def test_checksums_tell_bits_and_places(dtype):
    values = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {"same": values.clone(), "turned": values.flip(0), "other": values + 1, "scalar": values[0, 3]}
    tensors["strided"] = values.T.contiguous().T
    sums = bit_sums(tensors | {"first": values})
    assert sums["first"] == sums["same"] == sums["strided"]
    assert len({sums[name] for name in ("first", "turned", "other", "scalar")}) == 4


def test_pieces_of_a_large_tensor_are_told_apart(monkeypatch):
    monkeypatch.setattr("accelerate_unsloth.reliability.checksum._PIECE", 4)
    first, turned = torch.arange(8), torch.arange(8).roll(4)
    sums = bit_sums({"first": first, "turned": turned})
    assert sums["first"] != sums["turned"]


@pytest.mark.parametrize("bit", [0, 63])
@pytest.mark.parametrize("place", range(4))
def test_one_bit_of_any_word_changes_the_sum(place, bit):
    words = torch.arange(4)
    turned = words.clone()
    turned[place] ^= -(2**63) if bit == 63 else 1
    sums = bit_sums({"first": words, "turned": turned})
    assert sums["first"] != sums["turned"]


def test_the_sum_depends_neither_on_where_the_bytes_lie_nor_on_a_rest_that_is_no_word():
    stored = torch.arange(23, dtype=torch.uint8)
    shifted = torch.zeros(24, dtype=torch.uint8)[1:].copy_(stored)
    assert shifted.data_ptr() % 8
    other = stored.clone()
    other[-1] ^= 1
    odd = torch.frombuffer(bytearray(5) + bytearray(stored.tolist()), dtype=torch.uint8, offset=1)[4:]
    sums = bit_sums({"first": stored, "shifted": shifted, "odd": odd, "other": other})
    assert sums["first"] == sums["shifted"] == sums["odd"] != sums["other"]


def test_two_highest_bits_do_not_cancel():
    values = torch.arange(1.0, 9.0, dtype=torch.float64)
    sums = bit_sums({"first": values, "negative": -values})
    assert sums["first"] != sums["negative"]


def test_the_bits_of_quantized_weights_inside_of_a_wrapper_are_summed():
    """`load_in_fp8=True` of Unsloth makes such weights, which cannot be viewed as bytes themselves."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        torchao.quantize_(layer, torchao.Float8WeightOnlyConfig())
    first, second = (layer[0].weight for layer in layers)
    assert type(first).__name__ == "Float8Tensor"
    sums = [bit_sums({"first": first, "second": second})]
    second.scale[0] *= 2
    sums.append(bit_sums({"second": second}))
    assert sums[0]["first"] == sums[0]["second"] != sums[1]["second"]
