"""Decisions as functions of numbers."""

import pytest

from accelerate_unsloth.memory import budget, optimizer_state
from accelerate_unsloth.policies import activation_checkpointing, attention, gradient_sync, micro_batch
from accelerate_unsloth.reliability.watchdog import resolve_timeout


@pytest.mark.parametrize(
    ("requested", "world_size", "trainable", "total", "takes_count", "mode"),
    [
        ("auto", 1, 10**9, 10**9, True, "none"),
        ("overlapped", 1, 10**9, 10**9, True, "none"),
        ("auto", 4, 42_000_000, 8 * 10**9, True, "after_backward"),
        ("auto", 4, 525_000_000, 8 * 10**9, True, "after_backward"),  # modules_to_save=["lm_head"],
        ("auto", 4, 8 * 10**9, 8 * 10**9, True, "overlapped"),
        ("auto", 4, 8 * 10**9, 8 * 10**9, False, "after_backward"),
        ("after_backward", 4, 8 * 10**9, 8 * 10**9, True, "after_backward"),
        ("overlapped", 4, 1000, 2000, True, "overlapped"),
    ],
)
def test_gradient_sync(requested, world_size, trainable, total, takes_count, mode):
    choice = gradient_sync.resolve(requested, world_size, trainable, total, takes_count)
    assert choice.mode == mode
    assert choice.reason
    assert not choice.reason.endswith(".")


def test_overlapped_is_refused_where_it_cannot_be_exact():
    with pytest.raises(ValueError, match="it is exact only for a loss"):
        gradient_sync.resolve("overlapped", 2, 1000, 1000, loss_takes_item_count=False)


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
def test_cudnn_is_kept_away_from_many_lengths(requested, segments, cudnn, lengths, backend):
    choice = attention.resolve(requested, segments, "xformers runs them", cudnn, lengths)
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
def test_one_call_for_all_rows_is_best_where_it_can_be_had(segments, cudnn, lengths, backend):
    choice = attention.resolve("auto", segments, "xformers", cudnn, lengths, has_varlen=True)
    assert (choice.backend, choice.keeps_cudnn) == (backend, False)


def test_rows_of_a_few_lengths_may_have_both():
    import torch

    choice = attention.resolve("auto", True, "", True, 4, has_varlen=True)
    assert (choice.backend, choice.keeps_cudnn) == ("varlen", True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention.applied(choice):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before is True


def test_a_kernel_that_is_not_there_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="xformers runs them"):
        attention.resolve("varlen", False, "xformers runs them", True, 1500)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("varlen", (False, True, True)), ("flash", (False, True, True)), ("efficient", (False, False, True))],
)
def test_the_kernel_is_that_of_the_training_and_the_old_one_comes_back(backend, expected):
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
        ("auto", True, 1_500, 60_000, 2048, 7_000, "none"),  # obeyed
        ("auto", False, 0, 0, 2048, 7_000, "unchanged"),
        ("none", False, 1, 1, 2048, 7_000, "none"),
        ("unsloth", False, 27_000, 700_000, 2048, 7_000, "unsloth"),
    ],
)
@pytest.mark.parametrize("asked_for", [None, True, "unsloth"])  # save memory if needed
def test_activations_are_kept_where_that_saves_time(
    requested, off, asked_for, without, with_, longest, rank_tokens, mode
):
    choice = activation_checkpointing.resolve(requested, off, asked_for, without, with_, longest, rank_tokens)
    assert choice.mode == mode
    assert choice.may_recompute == (mode == "none" and requested == "auto" and not off)


def test_the_table_says_how_to_get_the_recomputation_that_the_script_asked_for():
    choice = activation_checkpointing.resolve("auto", False, "unsloth", 14_691, 90_000, 2048, 7_000)
    assert choice.reason == (
        "14,691 tokens fit without it (the script asked for 'unsloth'; set "
        "ACCELERATE_UNSLOTH_GRADIENT_CHECKPOINTING=unsloth to keep it)"
    )


@pytest.mark.parametrize(
    ("requested", "known", "in_step", "most", "fits", "expected"),
    [
        ("auto", True, False, None, 30_000, ("auto", 30_000)),
        ("auto", True, False, 5_000, 30_000, ("auto", 5_000)),
        ("auto", True, False, 50_000, 30_000, ("auto", 30_000)),
        ("auto", True, False, None, 1_000, ("auto", 2_048)),  # the longest sample is tried nevertheless
        ("auto", True, False, None, None, ("fixed", None)),
        ("auto", True, True, None, 30_000, ("fixed", None)),
        ("auto", False, False, None, 30_000, ("fixed", None)),
        ("fixed", True, False, 5_000, 30_000, ("fixed", None)),
    ],
)
def test_micro_batches_are_as_large_as_memory_and_user_allow(requested, known, in_step, most, fits, expected):
    choice = micro_batch.resolve(requested, known, in_step, most, fits, longest=2_048)
    assert (choice.mode, choice.token_budget) == expected


def test_a_limit_below_the_longest_sample_is_refused():
    with pytest.raises(ValueError, match="micro_batch_tokens=100, but the longest sample has 128 tokens"):
        micro_batch.resolve("auto", True, False, 100, None, longest=128)


def test_what_failed_is_not_planned_again():
    choice = micro_batch.resolve("auto", True, False, None, 30_000, longest=2_048)
    assert micro_batch.lowered(choice, 20_000, 2_048, "why").token_budget == 14_000
    assert micro_batch.lowered(choice, 2_100, 2_048, "why").token_budget == 2_048
    assert micro_batch.confirmed(choice, 21_000, 2_048).token_budget == 21_000


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


def test_noise_that_depends_on_the_micro_batch_keeps_the_cut_of_the_arguments():
    assert micro_batch.resolve("auto", True, False, 4_000, 30_000, 2_048, noisy=True).mode == "fixed"
    assert micro_batch.resolve("auto", True, False, 4_000, 30_000, 2_048).mode == "auto"


def test_varlen_may_be_asked_for_where_unsloth_runs_it_by_itself():
    choice = attention.resolve("varlen", False, "Unsloth runs it", True, 1500, runs_varlen=True)
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
def test_a_watchdog_has_the_time_that_was_asked_for(requested_s, group_timeout_s, world_size, timeout_s):
    assert resolve_timeout(requested_s, group_timeout_s, world_size) == timeout_s


def test_a_watchdog_that_the_process_group_would_forestall_is_rejected_with_the_fix():
    with pytest.raises(ValueError, match=r"watchdog_timeout_s=3600, .* Set ddp_timeout=4500"):
        resolve_timeout(3600, 1800, world_size=2)
