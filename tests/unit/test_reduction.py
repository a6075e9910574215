"""The reduction against the arithmetic, in two forked Gloo processes."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

from accelerate_unsloth import reduction
from accelerate_unsloth.reduction import ChunkedReducer, make_reducer

# Gradients of two ranks for three parameters; None where a rank has none. Rank 0 has 3 items, rank 1 has 1.
GRADIENTS = [
    [[4.0, 8.0], [1.0], None],
    [[8.0, 0.0], None, None],
]
ITEMS = [3, 1]
LOSSES = [2.0, 6.0]
EXPECTED = [[5.0, 6.0], [0.75], None]  # (3 x rank 0 + 1 x rank 1) / 4


def _work(rank, world_size, file, connection, case):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    connection.send(CASES[case](rank))
    dist.destroy_process_group()


def on_two_ranks(case, tmp_path):
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_work, args=(rank, 2, tmp_path / "store", pipes[rank][1], case)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = [pipe[0].recv() if pipe[0].poll(60) else None for pipe in pipes]
    for process in processes:
        process.join(10)
    assert [process.exitcode for process in processes] == [0, 0]
    return results


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (2, 1, 2)]


def reduce_once(rank, dtype=torch.float32, items=ITEMS, gradients=GRADIENTS, scale=1.0, chunk_values=1000):
    own = parameters(dtype)
    reducer = ChunkedReducer(own, chunk_bytes=chunk_values * torch.promote_types(dtype, torch.float32).itemsize)
    for parameter, values in zip(own, gradients[rank], strict=True):
        parameter.grad = None if values is None else torch.tensor(values, dtype=dtype) * scale
    totals = reducer.reduce(torch.tensor(LOSSES[rank]), torch.tensor(items[rank]), torch.tensor(10 + rank))
    own = [None if p.grad is None else (p.grad / scale).tolist() for p in own]
    return own, totals.loss.item(), totals.tokens.item()


def no_items_on_one_rank(rank):
    broken = [GRADIENTS[0], [[float("nan")] * 2, [float("inf")], None]]
    return reduce_once(rank, items=[3, 0], gradients=broken)


def no_items_at_all(rank):
    return reduce_once(rank, items=[0, 0])


def repeated_steps(rank):
    own = parameters()
    reducer = make_reducer(own, 2)
    results = []
    for with_gradient in (True, False):
        own[0].grad = torch.ones(2) if with_gradient else None
        reducer.reduce(torch.tensor(1.0), torch.tensor(1), torch.tensor(1))
        results.append(own[0].grad if own[0].grad is None else own[0].grad.tolist())
        own[0].grad = None
    return results


def broadcast(rank):
    own = [
        torch.nn.Parameter(torch.full((3,), float(rank + 1))),
        torch.nn.Parameter(torch.full((2,), float(rank + 5), dtype=torch.bfloat16)),
    ]
    make_reducer(own, 2).broadcast_parameters()
    return [p.tolist() for p in own]


def transposed(rank):
    """Weights and a gradient that are not contiguous, in messages of one value."""
    reduction.CHUNK_BYTES = 4
    own = torch.nn.Parameter(torch.arange(4.0).view(2, 2).T + rank)
    own.grad = torch.arange(4.0).view(2, 2).T * (rank + 1)
    reducer = ChunkedReducer([own], chunk_bytes=4)
    reducer.broadcast_parameters()
    reducer.reduce(torch.tensor(1.0), torch.tensor(1), torch.tensor(1))
    return own.tolist(), own.grad.tolist()


def overflow_on_one_rank(rank):
    """A GradScaler step in which rank 1 alone overflows: its weight after the step, and the next scale."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    reducer = make_reducer([weight], 2)
    scaler.scale((weight * (float("inf") if rank == 1 else 1.0)).sum()).backward()
    reducer.reduce(torch.tensor(1.0), torch.tensor(1), torch.tensor(1))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return weight.item(), scaler.get_scale()


def bad_numbers(rank):
    """Which ranks are named for a bad loss, a bad gradient, and one that a GradScaler answers for; and the votes."""
    own = parameters()
    reducer = make_reducer(own, 2)
    named = []
    for loss, gradient, check in [(float("nan"), 1.0, True), (1.0, float("inf"), True), (1.0, float("inf"), False)]:
        own[0].grad = torch.full((2,), gradient if rank == 1 else 1.0)
        totals = reducer.reduce(
            torch.tensor(loss if rank == 1 else 1.0),
            torch.tensor(1),
            torch.tensor(1),
            wants_stop=rank == 0,
            check_gradients=check,
        )
        named.append((totals.nonfinite_ranks, totals.stop_votes))
    return named


CASES = {
    "bad numbers": bad_numbers,
    "overflow on one rank": overflow_on_one_rank,
    "float32": reduce_once,
    "float64": lambda rank: reduce_once(rank, torch.float64),
    "bfloat16": lambda rank: reduce_once(rank, torch.bfloat16),
    "float16": lambda rank: reduce_once(rank, torch.float16),
    "scaled": lambda rank: reduce_once(rank, scale=65536.0),
    "chunks that cut a parameter": lambda rank: reduce_once(rank, chunk_values=1),
    "chunks of two parameters": lambda rank: reduce_once(rank, chunk_values=3),
    "transposed": transposed,
    "no items on one rank": no_items_on_one_rank,
    "no items at all": no_items_at_all,
    "repeated steps": repeated_steps,
    "broadcast": broadcast,
}


CUT = ["chunks that cut a parameter", "chunks of two parameters"]


@pytest.mark.parametrize("case", ["float32", "float64", "bfloat16", "float16", "scaled", *CUT])
def test_gradients_and_loss_are_means_over_the_items_of_all_ranks(case, tmp_path):
    for gradients, loss, tokens in on_two_ranks(case, tmp_path):
        assert gradients == EXPECTED
        assert loss == 3.0  # (3 x 2 + 1 x 6) / 4
        assert tokens == 21


def test_a_rank_without_items_adds_nothing_not_even_nan(tmp_path):
    for gradients, loss, _ in on_two_ranks("no items on one rank", tmp_path):
        assert gradients == [[4.0, 8.0], [1.0], None]
        assert loss == 2.0


def test_a_step_without_items_has_zero_loss_and_gradient(tmp_path):
    for gradients, loss, _ in on_two_ranks("no items at all", tmp_path):
        assert gradients == [[0.0, 0.0], [0.0], None]
        assert loss == 0.0


def test_a_gradient_of_the_last_step_does_not_return(tmp_path):
    assert on_two_ranks("repeated steps", tmp_path) == [[[1.0, 1.0], None]] * 2


def test_an_overflow_on_one_rank_is_skipped_on_all(tmp_path):
    assert on_two_ranks("overflow on one rank", tmp_path) == [(1.0, 4.0)] * 2


def test_every_rank_learns_whose_numbers_went_bad_and_who_wants_to_stop(tmp_path):
    assert on_two_ranks("bad numbers", tmp_path) == [[([1], 1), ([1], 1), ([], 1)]] * 2


def test_broadcast_gives_every_rank_the_weights_of_rank_0(tmp_path):
    assert on_two_ranks("broadcast", tmp_path) == [[[1.0] * 3, [5.0] * 2]] * 2


def test_tensors_need_not_be_contiguous(tmp_path):
    assert on_two_ranks("transposed", tmp_path) == [([[0.0, 2.0], [1.0, 3.0]], [[0.0, 3.0], [1.5, 4.5]])] * 2


def test_one_process_keeps_its_gradient_and_checks_it():
    weight = torch.nn.Parameter(torch.zeros(2))
    reducer = make_reducer([weight, torch.nn.Parameter(torch.zeros(0))], 1)
    for value, items, named in [(1.0, 4, []), (float("nan"), 4, [0]), (float("nan"), 0, [])]:
        weight.grad = torch.tensor([1.0, value])
        totals = reducer.reduce(torch.tensor(2.0), torch.tensor(items), torch.tensor(9), ran_out_of_memory=True)
        assert (totals.nonfinite_ranks, float(totals.loss), totals.ranks_out_of_memory) == (named, 2.0, 1)
        assert float(weight.grad[0]) == 1.0


def test_nothing_to_train_is_said():
    with pytest.raises(ValueError, match="No parameter is trainable"):
        make_reducer([torch.nn.Parameter(torch.zeros(1), requires_grad=False)], 2)
