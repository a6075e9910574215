"""
Every function and class of other libraries that is overridden, patched or called privately, with the parameters that
this code relies on. When an upgrade removes one or changes it, the test that fails carries its name.
"""

import json

import pytest

from ..launching import WORKERS, launch

pytestmark = pytest.mark.launch

# point: parameters that must exist, in this order among the others
POINTS = {
    # overridden by the mixin
    "transformers:Trainer._build_accelerator_args": ["self", "kwargs"],
    "transformers:Trainer._get_dataloader": [
        "self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
    ],
    "transformers:Trainer._prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "transformers:Trainer.get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "transformers:Trainer.training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "transformers:Trainer.compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "transformers:Trainer.evaluation_loop": ["self", "dataloader", "metric_key_prefix"],
    "transformers:Trainer.prediction_step": ["self", "model", "inputs", "prediction_loss_only"],
    "transformers:Trainer.save_model": ["self", "output_dir", "_internal_call"],
    "transformers:Trainer.push_to_hub": ["self"],
    "transformers:Trainer.log": ["self", "logs", "start_time"],
    "transformers:Trainer.train": ["self", "resume_from_checkpoint"],
    "transformers:Trainer._load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "transformers:Trainer._load_best_model": ["self"],
    "peft:PeftModel.load_adapter": ["self", "model_id", "adapter_name", "torch_device"],
    "transformers:Trainer._save_checkpoint": ["self", "model", "trial"],
    "transformers:Trainer._finalize_training": ["self", "trial", "num_train_samples", "start_time"],
    "transformers.trainer:sort_checkpoints": ["output_dir", "best_model_checkpoint"],
    "transformers:Trainer._evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "transformers:Trainer._get_output_dir": ["self", "trial"],
    "transformers:Trainer._push_from_checkpoint": ["self", "checkpoint_folder"],
    "transformers.trainer:TRAINER_STATE_NAME": [],
    "trl:SFTTrainer._prepare_dataset": ["self", "dataset", "processing_class", "args", "packing"],
    "trl:DPOTrainer._prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "trl:KTOTrainer._prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "trl:RewardTrainer._prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "trl:DPOTrainer._compute_loss": ["self", "model", "inputs", "return_outputs"],
    "trl:SFTTrainer.compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    # called or replaced
    "transformers:Trainer._remove_unused_columns": ["self", "dataset", "description"],
    "transformers:Trainer._get_collator_with_removed_columns": ["self", "data_collator", "description"],
    "transformers:Trainer._set_signature_columns_if_needed": ["self"],
    "transformers.trainer_utils:seed_worker": ["worker_id", "num_workers", "rank"],
    "transformers.trainer_pt_utils:get_length_grouped_indices": ["lengths", "batch_size", "generator"],
    "accelerate:Accelerator.prepare_model": ["self", "model", "device_placement", "evaluation_mode"],
    "accelerate:PartialState.main_process_first": ["self"],
    "accelerate:PartialState.local_main_process_first": ["self"],
    "accelerate.utils:DDPCommunicationHookType": [],
    "accelerate.launchers:are_libraries_initialized": ["library_names"],
    "torch.cuda:_is_in_bad_fork": [],
    "transformers:TrainingArguments._setup_devices": [],
    "transformers:Trainer.floating_point_ops": ["self", "inputs"],
    "transformers:Trainer._track_num_input_tokens": ["self", "inputs"],
    "transformers:TrainingArguments.__post_init__": ["self"],
    "torch._C:_set_storage_access_error_msg": [],
    "torch._C:_current_graph_task_id": [],
    "transformers.modeling_utils:convert_and_load_state_dict_in_model": [
        "model", "state_dict", "load_config", "disk_offload_index",
    ],
    "transformers.core_model_loading:rename_source_key": [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ],
    "trl.trainer:SFTTrainer.__init__": ["self", "model", "args"],
    "trl.trainer.sft_trainer:SFTTrainer.__init__": ["self", "model", "args"],
    "torch.distributed:rendezvous": ["url"],
    "trl.trainer.utils:_ChunkedLogProbFunction.forward": [
        "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs",
    ],
    "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func": [
        "gate_logits", "num_experts", "top_k", "attention_mask",
    ],
    "accelerate:Accelerator.gather": ["self", "tensor"],
    "accelerate:Accelerator.gather_for_metrics": ["self", "input_data"],
    "accelerate:Accelerator.reduce": ["self", "tensor"],
    "accelerate:Accelerator.pad_across_processes": ["self", "tensor"],
    "torch.amp:GradScaler.unscale_": ["self", "optimizer"],
    "torch.amp:GradScaler.step": ["self", "optimizer"],
    "torch.amp:GradScaler.update": ["self", "new_scale"],
    "datasets:Dataset.save_to_disk": ["self", "dataset_path"],
    "datasets.formatting:query_table": ["table", "key", "indices"],
    "datasets.table:MemoryMappedTable.from_file": ["filename", "replays"],
    "datasets.table:concat_tables": ["tables", "axis"],
}  # fmt: skip

UNSLOTH_POINTS = {
    "unsloth.save:_merge_lora": ["layer", "name"],
    "unsloth.models._utils:offload_to_disk": ["W", "model", "name", "temporary_location"],
    "unsloth.models.loader:_offline_quantize_to_fp8": ["model_name", "fp8_mode"],
    "unsloth:FastLanguageModel.from_pretrained": ["model_name", "device_map"],
    "unsloth:FastLanguageModel.get_peft_model": ["model"],
    "unsloth:FastModel.from_pretrained": ["model_name", "device_map"],
    "unsloth:FastModel.get_peft_model": ["model"],
    "unsloth.models.loader_utils:prepare_device_map": [],
    "unsloth.models.rl:PatchFastRL": [],
    "unsloth.models.llama:LlamaRotaryEmbedding._set_cos_sin_cache": ["self", "seq_len", "device", "dtype"],
    "unsloth.models.gemma:GemmaFixedRotaryEmbedding._set_cos_sin_cache": ["self", "seq_len", "device", "dtype"],
    "unsloth.models._utils:patch_gradient_accumulation_fix": ["Trainer"],
    "unsloth.models.llama:FastLlamaModel.for_training": ["model", "use_gradient_checkpointing"],
    "unsloth.utils.attention_dispatch:_load_torch_varlen_attn": [],
    "unsloth.models.llama:logger.addFilter": [],
    "unsloth_zoo.fused_losses.aux_loss:unsloth_ga_scale_aux_loss": ["aux_loss", "labels"],
    "unsloth_zoo.loss_utils:_unsloth_get_batch_samples": ["self", "epoch_iterator", "num_batches"],
    "unsloth_zoo.dataset_utils:sft_prepare_dataset": ["self", "dataset", "processing_class", "args"],
}


def signatures(points):
    finished = launch(WORKERS / "signatures.py", points, processes=1)
    assert finished.status == 0, finished.output[-3000:]
    return json.loads(finished.output.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return signatures(POINTS)


@pytest.fixture(scope="module")
def found_in_unsloth(unsloth_once):
    return json.loads((unsloth_once / "points.json").read_text())


def check(point, needed, parameters):
    assert parameters is not None, f"{point} does not exist any more"
    positions = [parameters.index(name) for name in needed if name in parameters]
    assert len(positions) == len(needed), f"{point} takes {parameters}, and this code relies on {needed}"
    assert positions == sorted(positions), f"{point} takes its parameters in another order: {parameters}"


@pytest.mark.parametrize("point", POINTS)
def test_point(point, found):
    check(point, POINTS[point], found[point])


@pytest.mark.unsloth
@pytest.mark.parametrize("point", UNSLOTH_POINTS)
def test_point_of_unsloth(point, found_in_unsloth):
    check(point, UNSLOTH_POINTS[point], found_in_unsloth[point])


def test_a_missing_or_changed_point_is_named():
    seen = signatures(["transformers:Trainer._no_such_method", "transformers:Trainer.log"])
    with pytest.raises(AssertionError, match="_no_such_method does not exist"):
        check("Trainer._no_such_method", [], seen["transformers:Trainer._no_such_method"])
    with pytest.raises(AssertionError, match="relies on"):
        check("Trainer.log", ["self", "colour"], seen["transformers:Trainer.log"])
