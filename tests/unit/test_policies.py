"""Policies as functions of numbers."""

import pytest

from accelerate_unsloth.memory import budget, optimizer_state
from accelerate_unsloth.plugin import UnslothPlugin
from accelerate_unsloth.policies import activation_checkpointing, attention, micro_batch, plan
from accelerate_unsloth.reliability.watchdog import resolve_timeout


@pytest.mark.parametrize(
    ("requested", "segments", "cudnn", "lengths", "backend"),
    [
        ("auto", True, True, 1500, "flash"),
        ("auto", True, True, 0, "flash"),
        ("auto", True, True, 1, "unchanged"),  # fixed-length packing: few plans, and cuDNN is faster with them
        ("auto", True, False, 1500, "unchanged"),
        ("auto", False, True, 1500, "unchanged"),
        ("cudnn", False, False, 0, "cudnn"),
    ],
)
def test_cudnn_is_not_used_for_many_lengths(requested, segments, cudnn, lengths, backend):
    choice = attention.resolve(requested, attention.Facts(segments, "xformers runs them", cudnn, lengths))
    assert choice.backend == backend
    assert choice.reason


@pytest.mark.parametrize(
    ("segments", "cudnn", "lengths", "backend"),
    [
        (True, True, 1500, "varlen"),
        (True, False, 1500, "varlen"),  # before Hopper flash runs the rows, but still one by one
        (True, True, 1, "unchanged"),
        (False, True, 1500, "unchanged"),
    ],
)
def test_one_call_for_all_rows_is_preferred_if_available(segments, cudnn, lengths, backend):
    choice = attention.resolve("auto", attention.Facts(segments, "xformers", cudnn, lengths, has_varlen=True))
    assert (choice.backend, choice.keeps_cudnn) == (backend, False)


def test_rows_of_a_few_lengths_may_have_both():
    import torch

    choice = attention.resolve("auto", attention.Facts(True, "", True, 4, has_varlen=True))
    assert (choice.backend, choice.keeps_cudnn) == ("varlen", True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention.applied(choice):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before is True


def test_an_unavailable_kernel_is_rejected_with_the_reason():
    with pytest.raises(ValueError, match="xformers runs them"):
        attention.resolve("varlen", attention.Facts(False, "xformers runs them", True, 1500))


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("varlen", (False, True, True)), ("flash", (False, True, True)), ("efficient", (False, False, True))],
)
def test_the_kernel_is_restored_after_training(backend, expected):
    import torch

    cuda = torch.backends.cuda

    def state():
        return cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()

    before = state()
    with pytest.raises(KeyError), attention.applied(attention.AttentionChoice(backend, "")):
        assert state() == expected
        raise KeyError
    assert state() == before


@pytest.mark.parametrize(
    ("requested", "off", "without", "with_", "longest", "rank_tokens", "mode"),
    [
        ("auto", False, 27_000, 700_000, 2048, 7_000, "none"),  # an H200 with 8B dims in 4 bits
        ("auto", False, 1_500, 60_000, 2048, 7_000, "unsloth"),  # the longest sample does not fit without it
        ("auto", False, 5_000, 60_000, 6_000, 5_000, "unsloth"),  # nor here, though most do
        ("auto", False, 2_100, 60_000, 2048, 20_000, "unsloth"),  # many small micro-batches
        ("auto", True, 1_500, 60_000, 2048, 7_000, "none"),  # the script decides
        ("auto", False, None, None, 2048, 7_000, "unchanged"),
        ("none", False, 1, 1, 2048, 7_000, "none"),
        ("unsloth", False, 27_000, 700_000, 2048, 7_000, "unsloth"),
    ],
)
@pytest.mark.parametrize("asked_for", [None, True, "unsloth"])  # save memory if needed
def test_activations_are_kept_if_that_saves_time(
    requested, off, asked_for, without, with_, longest, rank_tokens, mode
):
    facts = activation_checkpointing.Facts(longest, rank_tokens, without, with_, off, asked_for)
    choice = activation_checkpointing.resolve(requested, facts)
    assert choice.mode == mode
    assert choice.may_recompute == (mode == "none" and requested == "auto" and not off)


# Tokens that fit with 0, 1, 2, 3 and all 4 layers recomputed.
FITTING = (3_000, 4_000, 6_000, 12_000, 90_000)


@pytest.mark.parametrize(
    ("rank_tokens", "longest", "layers", "budget"),
    [
        (3_000, 2_048, None, 3_000),  # all of a step fits as it is
        (12_000, 2_048, 1, 4_000),  # three micro-batches either way, and each keeps the GPU busy
        (12_000, 5_000, 2, 6_000),  # the longest sample needs it
        (4_500, 2_048, 2, 6_000),  # one micro-batch instead of two halves
        (12_000, 80_000, None, 90_000),
        (12_000, 100_000, None, 100_000),  # nothing fits by arithmetic: the probe decides
    ],
)
def test_the_fewest_layers_recompute_with_which_steps_are_shortest(rank_tokens, longest, layers, budget):
    kept, *partial, recomputed = FITTING
    facts = plan.Facts(longest, rank_tokens, kept, recomputed, partial_tokens=tuple(partial))
    chosen = plan.plan(UnslothPlugin(), facts)
    assert (chosen.checkpointing.layers, chosen.micro_batch.token_budget) == (layers, budget)
    if layers:
        assert (chosen.checkpointing.mode, chosen.checkpointing.label) == ("unsloth", f"{layers} of 4 layers")
        assert chosen.recomputed == layers / 4
        assert f"{budget:,} fit with it" in chosen.checkpointing.reason
        fallback = chosen.recomputing("it ran out of memory")
        assert (fallback.recomputed, fallback.checkpointing.layers) == (1.0, None)
        assert fallback.micro_batch.token_budget == recomputed
    else:
        assert chosen.recomputed == float(longest > kept)


def test_more_fits_with_each_recomputed_layer():
    budgets = [LLAMA_8B.tokens_within(10 * budget.GIB, layers / 32) for layers in range(33)]
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[16] < budgets[32]
    middle = [LLAMA_8B.activation_bytes(4096, part) for part in (0, 0.5, 1)]
    assert middle[1] == pytest.approx((middle[0] + middle[2]) / 2)


def test_the_table_says_how_to_keep_the_recomputation_of_the_script():
    facts = activation_checkpointing.Facts(2048, 7_000, 14_691, 90_000, asked_for="unsloth")
    choice = activation_checkpointing.resolve("auto", facts)
    assert choice.reason == (
        "14,691 tokens fit without it (the script asked for 'unsloth'; set "
        "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING=unsloth to keep it)"
    )


@pytest.mark.parametrize(
    ("requested", "known", "most", "fits", "expected"),
    [
        ("auto", True, None, 30_000, ("auto", 30_000)),
        ("auto", True, 5_000, 30_000, ("auto", 5_000)),
        ("auto", True, 50_000, 30_000, ("auto", 30_000)),
        ("auto", True, None, 1_000, ("auto", 2_048)),  # the longest sample is tried anyway
        ("auto", True, None, None, ("fixed", None)),
        ("auto", False, None, 30_000, ("fixed", None)),
        ("fixed", True, 5_000, 30_000, ("fixed", None)),
    ],
)
def test_micro_batches_are_as_large_as_memory_and_user_allow(requested, known, most, fits, expected):
    choice = micro_batch.resolve(requested, most, micro_batch.Facts(2_048, fits, lengths_known=known))
    assert (choice.mode, choice.token_budget) == expected


def test_a_limit_below_the_longest_sample_is_rejected():
    with pytest.raises(ValueError, match="micro_batch_tokens=100, but the longest sample has 128 tokens"):
        micro_batch.resolve("auto", 100, micro_batch.Facts(128))


def test_what_failed_is_not_planned_again():
    choice = micro_batch.resolve("auto", None, micro_batch.Facts(2_048, 30_000))
    assert choice.lowered(20_000, 2_048, "why").token_budget == 14_000
    assert choice.lowered(2_100, 2_048, "why").token_budget == 2_048
    assert choice.confirmed(21_000, 2_048).token_budget == 21_000


@pytest.mark.parametrize(
    ("options", "facts", "mode", "budget"),
    [
        ({}, {}, "none", 30_000),
        ({"gradient_checkpointing": "unsloth"}, {}, "unsloth", 90_000),
        ({}, {"switched_off": True}, "none", 30_000),
        ({}, {"keep_because": "experts"}, "none", 30_000),
        ({}, {"kept_tokens": 0}, "unsloth", 90_000),  # nothing fits with activations kept
        ({"micro_batch": "fixed"}, {}, "unchanged", None),  # both as in the script
        ({}, {"noisy": True}, "unchanged", None),
        ({}, {"lengths_known": False}, "unchanged", None),
        ({}, {"can_fall_back": False}, "unchanged", 90_000),  # the script recomputes
        ({"micro_batch_tokens": 9_000}, {"kept_tokens": None, "recomputed_tokens": None}, "unchanged", 9_000),
    ],
)
def test_checkpointing_and_micro_batches_are_planned_together(options, facts, mode, budget):
    known = {"kept_tokens": 30_000, "recomputed_tokens": 90_000} | facts
    chosen = plan.plan(UnslothPlugin(**options), plan.Facts(2_048, 16_384.0, **known))
    assert (chosen.checkpointing.mode, chosen.micro_batch.token_budget) == (mode, budget)


def test_a_plan_falls_back_to_recomputation_only_if_it_chose_to_keep_activations():
    facts = plan.Facts(2_048, 16_384.0, kept_tokens=30_000, recomputed_tokens=90_000)
    fallback = plan.plan(UnslothPlugin(), facts).recomputing("a sample did not fit")
    assert (fallback.checkpointing.mode, fallback.micro_batch.token_budget) == ("unsloth", 90_000)
    assert fallback.recomputing("again") is None
    assert plan.plan(UnslothPlugin(gradient_checkpointing="none"), facts).recomputing("why") is None


LLAMA_8B = budget.ModelShape(4096, 14336, 32, 32, 8, 128, 49152)


def test_the_arithmetic_gives_the_weights_and_peaks_that_were_measured():
    """Within 15% of benchmarks/step_cost_h200.json."""
    nf4_gib = (LLAMA_8B.stored_linear_values * budget.NF4_BYTES + 2 * LLAMA_8B.embedding_values) / budget.GIB
    assert nf4_gib == pytest.approx(4.14, rel=0.02)
    assert LLAMA_8B.lora_values(16) == 41_943_040
    for tokens, measured_gib in ((1024, 5.13), (4096, 5.80), (16384, 7.83)):
        step = 41_943_040 * 10 + LLAMA_8B.workspace_bytes + LLAMA_8B.activation_bytes(tokens, True)
        assert nf4_gib + step / budget.GIB == pytest.approx(measured_gib, rel=0.15)


def test_what_fits_shrinks_with_the_optimizer_and_grows_with_checkpointing():
    def fits(optim, checkpointing, left_gib=20):
        optim_bytes = optimizer_state.state_bytes(optim)
        return budget.tokens_that_fit(LLAMA_8B, left_gib * budget.GIB, 41_943_040, 4, optim_bytes, checkpointing)

    assert fits("adamw_torch", False) < fits("adamw_8bit", False) < fits("adamw_8bit", True)
    assert fits("adamw_torch", True, left_gib=0.1) == 0


def test_varlen_may_be_requested_if_unsloth_runs_it_by_itself():
    choice = attention.resolve("varlen", attention.Facts(False, "Unsloth runs it", True, 1500, runs_varlen=True))
    assert (choice.backend, choice.keeps_cudnn) == ("varlen", True)  # and nothing is switched
    assert "Unsloth runs it" in choice.reason


@pytest.mark.parametrize(
    ("requested_s", "group_timeout_s", "world_size", "timeout_s"),
    [
        (None, 1800, 1, 3600),
        (None, 1800, 2, 1440),
        (None, 9000, 2, 3600),
        (5000, 1800, 1, 5000),
        (1000, 1800, 2, 1000),
        (0, 1, 2, 0),
    ],
)
def test_a_watchdog_has_the_requested_timeout(requested_s, group_timeout_s, world_size, timeout_s):
    assert resolve_timeout(requested_s, group_timeout_s, world_size) == timeout_s


def test_a_watchdog_slower_than_the_process_group_is_rejected():
    with pytest.raises(ValueError, match=r"watchdog_timeout_s=3600, .* Set ddp_timeout=4500"):
        resolve_timeout(3600, 1800, world_size=2)


@pytest.mark.parametrize(
    ("others_gib", "allowed", "limit_gib"),
    [(0, 1.0, 72), (10, 1.0, 63), (70, 1.0, 9), (0, 0.3, 21.6), (60, 0.3, 18)],  # of 80 GiB
)
def test_a_limit_of_pytorch_counts_as_the_size_of_the_gpu(others_gib, allowed, limit_gib, monkeypatch):
    import torch

    found = {
        "mem_get_info": ((76 - others_gib) * budget.GIB, 80 * budget.GIB),
        "memory_reserved": 4 * budget.GIB,
        "memory_allocated": 3 * budget.GIB,
        "get_per_process_memory_fraction": allowed,
    }
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    reading = budget.read("cuda:0", 0.9)
    assert reading.limit_bytes == pytest.approx(limit_gib * budget.GIB, rel=1e-6)
    assert reading.left_bytes == pytest.approx((limit_gib - 3) * budget.GIB, rel=1e-6)
