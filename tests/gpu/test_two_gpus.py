"""What only GPUs can show: Unsloth's kernels under two processes, NCCL, and who holds memory where."""

import pytest

from .cases import PREFERENCES, VARIANTS
from .comparing import (
    BF16_ROUNDING,
    CHANGE_OF_WEIGHTS,
    assert_same_preferences,
    assert_same_training,
    difference,
    difference_of_changes,
)

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu, pytest.mark.launch]

# How far the merged model's logits may be from the adapter's, of what training changed: weights rounded to 16 bits gave
# 0.06 on a CPU, and an adapter that is not merged at all gives 1.
MERGING = 0.3


def each(launch, *names):
    """Parameters for one case each."""
    return [pytest.param(name, marks=pytest.mark.cases(**{launch: name}), id=name) for name in names]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.cases(one=name, two=name), id=name.removeprefix("lora-"))
        for name in ("lora-16bit", "lora-4bit", *PREFERENCES)
    ],
)
def test_two_gpus_give_the_losses_gradients_and_weights_of_one(name, outcome, suite):
    one, two = outcome("one", name), outcome("two", name)
    changes = difference_of_changes(suite.folder / "one" / name, suite.folder / "two" / name)
    largest = max(abs(a - b) / a for a, b in zip(one["losses"], two["losses"], strict=True))
    losses, norms = (difference(one, two, what) for what in ("losses", "gradient_norms"))
    suite.notes.append(
        f"one GPU against two, {name}: losses {losses:.1e} (at most {largest:.1e}), norms {norms:.1e}, weights {changes:.2f}"
    )
    (assert_same_preferences if name in PREFERENCES else assert_same_training)(one, two)
    assert changes < CHANGE_OF_WEIGHTS


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.cases(two=[name, f"lora-{name.rpartition('-')[2]}"]), id=name)
        for name in VARIANTS
    ],
)
def test_shared_weights_and_recomputation_change_nothing_but_the_memory(name, outcome, suite):
    plain, other = outcome("two", f"lora-{name.rpartition('-')[2]}"), outcome("two", name)
    assert_same_training(plain, other)
    where = name.partition("-")[0]
    if where in ("host", "sharded"):
        assert (plain["frozen_weights"], other["frozen_weights"]) == ("replicated", where)
        assert other["processes_by_gpu"] == [1, 1]  # no rank has a context on another one's GPU
        suite.notes.append(
            f"{name}: weights and adapters {other['weights_mib']:.0f} MiB, replicated {plain['weights_mib']:.0f}"
        )
        # Rounding lets some tokens differ; other weights would choose among 49,152.
        assert other["decoded_alike"] is None or other["decoded_alike"] > 0.6
        if "16bit" in name:  # those in 4 bits are smaller than what PyTorch allocates at once
            assert other["weights_mib"] < plain["weights_mib"]
    else:
        assert other["checkpointing"] == "10 of 30 layers"


@pytest.mark.cases(two=["sharded-16bit", "life"])
def test_a_sharded_model_evaluates_and_is_merged(outcome, suite):
    from safetensors.torch import load_file

    before, after = outcome("two", "sharded-16bit")["eval_losses"]
    assert after < before
    outcome("two", "life")
    names = [
        {*load_file(suite.folder / "two" / name / "merged" / "model.safetensors")}
        for name in ("life", "sharded-16bit")
    ]
    assert names[0] == names[1]


@pytest.mark.cases(two="peers")
def test_every_byte_of_another_gpu_arrives_and_no_context_is_opened_there(outcome):
    for rank in (0, 1):
        found = outcome("two", "peers", rank)
        assert found["arrived"] == [True] * 4
        assert found["own"] == [True] * 4
        assert found["why"] == ""
        assert found["processes_by_gpu"] == [1, 1]


@pytest.mark.cases(two="lora-16bit")
def test_each_process_holds_memory_on_its_own_gpu_only(outcome):
    for rank in (0, 1):
        found = outcome("two", "lora-16bit", rank)
        assert found["processes_by_gpu"] == [1, 1]  # on GPUs that nobody else uses
        assert found["devices"] == [f"cuda:{rank}"]


@pytest.mark.parametrize("name", each("two", "modules_to_save", "embedding-lora", "full"))
def test_cases_that_break_under_plain_ddp_train(name, outcome):
    before, after = outcome("two", name)["eval_losses"]
    assert after < before


@pytest.mark.parametrize("name", each("two", "frozen-16bit", "frozen-4bit"))
def test_one_bit_of_a_frozen_weight_that_differs_is_found_on_every_rank(name, outcome):
    for rank in (0, 1):
        found = outcome("two", name, rank)
        changed, as_before = found["said"]
        assert "Frozen weights" in changed
        assert found["changed"] in changed
        assert as_before == ""


@pytest.mark.cases(two=["free", "pressed"])
def test_a_rank_short_of_memory_cuts_its_micro_batches_with_the_same_losses(outcome):
    free, pressed = outcome("two", "free"), outcome("two", "pressed")
    assert "ran out of memory at step" in pressed["micro_batch_reason"]
    assert "ran out of memory at step" not in free["micro_batch_reason"]
    assert_same_training(free, pressed)


@pytest.mark.parametrize("name", each("two", "moe", "vision"))
def test_experts_that_are_skipped_and_a_tower_without_images_train(name, outcome):
    losses = outcome("two", name)["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.cases(one="moe", two="moe")
def test_the_balancing_loss_of_experts_is_that_of_the_whole_step_with_layers_on_other_gpus_too(outcome):
    one, two = outcome("one", "moe"), outcome("two", "moe")
    assert (one["frozen_weights"], two["frozen_weights"]) == ("replicated", "sharded")
    for name in ("losses", "aux_losses"):  # later rounding sends tokens to other experts
        assert two[name][:5] == pytest.approx(one[name][:5], rel=BF16_ROUNDING)


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param("two", marks=pytest.mark.cases(two=["life", "life-resumed"]), id="as many"),
        pytest.param("one", marks=pytest.mark.cases(two="life", one="life-resumed"), id="one process"),
    ],
)
def test_a_run_resumed_on_as_many_gpus_or_one_goes_on_as_the_uninterrupted_one(launch, outcome):
    whole, resumed = outcome("two", "life"), outcome(launch, "life-resumed")
    assert len(whole["losses"]) == 20
    assert_same_training(whole, resumed)
    assert whole["eval_losses"][1] < whole["eval_losses"][0]


@pytest.mark.cases(two="life")
def test_the_adapter_loads_with_plain_peft_and_computes_what_the_merged_model_does(outcome, suite):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome("two", "life")
    folder = suite.folder / "two" / "life"

    def load(source):
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    ids = tokenizer("the a rank sends its gradient to all others", return_tensors="pt").input_ids
    base, merged = load(suite.folder / "materials" / "real"), load(folder / "merged")
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
        merging = (merged(ids).logits - adapted).norm()
    assert merging < MERGING * (adapted - before).norm()
    assert merged.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
