"""The choice of the engine and of the GPU, and the reference engine on a tiny model."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from accelerate_unsloth.engines import checks, kernels, resolve
from accelerate_unsloth.engines.checks import check_device_map, check_model_name, check_placement
from accelerate_unsloth.engines.variables import check_unsloth_modes
from accelerate_unsloth.launch import process
from accelerate_unsloth.launch.topology import Topology
from accelerate_unsloth.patches import patch_log
from accelerate_unsloth.policies import attention


@pytest.mark.parametrize(
    ("padded", "by_itself", "backend"),
    [(False, False, "varlen"), (False, True, "unchanged"), (True, False, "flash"), (True, True, "flash")],
)
def test_padded_rows_never_count_as_varlen(padded, by_itself, backend, monkeypatch):
    """`by_itself`: whether Unsloth runs rows without padding through PyTorch's varlen attention."""
    dispatch = SimpleNamespace(_TORCH_VARLEN_ATTN=len if by_itself else None)
    monkeypatch.setitem(sys.modules, "unsloth.utils.attention_dispatch", dispatch)
    monkeypatch.setattr(kernels, "spare_varlen", lambda: None if by_itself else len)
    monkeypatch.setattr(kernels, "prefers_cudnn", lambda: True)
    found = kernels.describe("unsloth", padded)
    facts = attention.Facts(lengths=1500, **found)
    assert attention.resolve("auto", facts).backend == backend
    if padded:
        with pytest.raises(ValueError, match="padded rows run through SDPA in one call"):
            attention.resolve("varlen", facts)


@pytest.mark.parametrize(("world_size", "is_known", "notes"), [(2, True, 1), (2, False, 0), (1, True, 0)])
def test_a_stock_trainer_with_a_model_of_our_loaders_is_noted(world_size, is_known, notes, monkeypatch, capsys):
    from transformers import Trainer

    def construct(self, model=None):
        self.model = model

    monkeypatch.setattr(Trainer, "__init__", construct)
    monkeypatch.setattr(checks, "topology", lambda: Topology(world_size=world_size))
    monkeypatch.setattr(checks, "placed_weights", lambda model: model)
    stock = type("UnslothSFTTrainer", (Trainer,), {})
    ours = type("SFTTrainer", (Trainer,), {"adapter_class": object})
    other = type("GRPOTrainer", (Trainer,), {})
    checks.note_stock_trainers()
    try:
        for kind in (stock, ours, other):
            kind(model="loaded" if is_known else None)
    finally:
        patch_log.undo([patch for patch in patch_log.patches if patch.owner is Trainer])
    assert Trainer.__init__ is construct
    assert capsys.readouterr().out.count("this SFTTrainer is TRL's own") == notes


@pytest.mark.parametrize(
    ("requested", "visible_gpus", "use_cpu", "engine"),
    [
        ("auto", 0, False, "reference"),
        ("auto", 2, True, "reference"),
        ("auto", 2, False, "unsloth"),
        ("reference", 2, False, "reference"),
        ("unsloth", 2, False, "unsloth"),
    ],
)
def test_the_engine_follows_the_machine_unless_requested(requested, visible_gpus, use_cpu, engine):
    choice = resolve(requested, visible_gpus, use_cpu)
    assert choice.name == engine
    assert choice.reason


@pytest.mark.parametrize(("visible_gpus", "use_cpu"), [(0, False), (2, True)])
def test_unsloth_without_a_gpu_is_rejected(visible_gpus, use_cpu):
    with pytest.raises(ValueError, match="Unsloth's kernels need one"):
        resolve("unsloth", visible_gpus, use_cpu)


@pytest.mark.parametrize("device_map", [None, "sequential", {"": "cuda:1"}, {"": 1}, "cuda:1", "cuda"])
def test_a_device_map_onto_the_own_gpu_is_accepted(device_map):
    check_device_map(device_map, world_size=2, own_device="cuda:1")


@pytest.mark.parametrize("device_map", ["auto", "balanced", "unsloth", {"": "cuda:0"}, {"a": 0, "b": 1}, "cpu"])
def test_a_device_map_elsewhere_is_rejected_with_several_processes_only(device_map):
    with pytest.raises(ValueError, match="this launch has 2 processes"):
        check_device_map(device_map, world_size=2, own_device="cuda:1")
    check_device_map(device_map, world_size=1, own_device="cuda:0")


def test_a_model_on_another_ranks_gpu_is_noticed():
    check_placement([torch.device("cuda:1"), torch.device("cpu")], "cuda:1")
    with pytest.raises(RuntimeError, match="onto cuda:0, but this process owns cuda:1"):
        check_placement([torch.device("cuda:1"), torch.device("cuda:0")], "cuda:1")


@pytest.mark.parametrize(
    ("place", "visible", "elastic", "device"),
    [
        (Topology(1, 2, 1, 2), 2, True, 1),
        (Topology(5, 8, 1, 4, 1), 4, True, 1),
        (Topology(1, 2, 1, 2), 1, False, 0),  # a scheduler that shows each task one GPU
        (Topology(0, 1, 0, 1), 4, True, None),
        (Topology(1, 2, 1, 2), 0, True, None),
    ],
)
def test_each_rank_takes_its_own_gpu(place, visible, elastic, device, monkeypatch):
    taken = []
    monkeypatch.setattr(process, "topology", lambda: place)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    process.bind_device()
    assert taken == ([] if device is None else [device])


def test_more_processes_than_gpus_are_rejected(monkeypatch):
    monkeypatch.setattr(process, "topology", lambda: Topology(0, 4, 0, 4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"4 processes were started on .*, but 2 GPU"):
        process.bind_device()


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere", "runs/2026/model"])
def test_a_path_that_does_not_exist_is_rejected(name):
    with pytest.raises(FileNotFoundError, match="does not exist on this machine"):
        check_model_name(name)


def test_a_hub_id_and_an_existing_folder_are_accepted(tmp_path):
    check_model_name("unsloth/Llama-3.2-1B-Instruct")
    check_model_name(str(tmp_path))


@pytest.fixture(scope="module")
def adapted(tiny_model):
    from accelerate_unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model), max_seq_length=64)
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


def test_only_adapters_are_trainable(adapted):
    assert all("lora_" in name for name, p in adapted[0].named_parameters() if p.requires_grad)


def test_full_finetuning_trains_every_weight(tiny_model):
    from accelerate_unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(tiny_model), full_finetuning=True)
    assert all(p.requires_grad for p in model.parameters())


def test_a_reward_model_is_loaded_with_a_head_that_is_trained(tiny_model):
    from transformers import AutoModelForSequenceClassification

    from accelerate_unsloth import FastModel

    head = {"auto_model": AutoModelForSequenceClassification, "num_labels": 1}
    model, _ = FastModel.from_pretrained(str(tiny_model), **head)
    model = FastModel.get_peft_model(model, r=4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert [(name.split(".")[-4], p.shape[0]) for name, p in trained.items()] == [("score", 1)]


def test_the_merged_model_computes_what_the_adapted_one_does(adapted, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = adapted
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained_merged(str(tmp_path), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_guarded_model_saves_itself(adapted, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from accelerate_unsloth.reliability import rank0_writes

    monkeypatch.setattr(rank0_writes, "topology", lambda: Topology(0, 2, 0, 2))
    model, _ = adapted
    rank0_writes.guard(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    monkeypatch.setattr(rank0_writes, "_writing", True)  # as if inside a save: no other rank to wait for
    copied.save_pretrained(tmp_path)
    assert all((w == 0).all() for w in load_file(tmp_path / "adapter_model.safetensors").values())


def test_only_rank_0_saves_by_position_and_by_keyword(adapted, tmp_path, monkeypatch):
    from accelerate_unsloth.reliability import rank0_writes

    model, tokenizer = adapted
    written = []
    for rank in (0, 1):
        monkeypatch.setattr(rank0_writes, "topology", lambda rank=rank: Topology(rank, 2, rank, 2))
        # Rank 0's side of the channel runs what it is given; the others' side does not.
        run = (lambda name, write: write()) if rank == 0 else (lambda name, write: None)
        monkeypatch.setattr(
            rank0_writes, "channel", lambda run=run: type("Channel", (), {"run_on_main": staticmethod(run)})
        )
        for thing in (model, tokenizer):
            rank0_writes.guard(thing)
            thing.save_pretrained(tmp_path / f"position-{rank}")
            thing.save_pretrained(save_directory=tmp_path / f"keyword-{rank}")
        written.append(sorted(path.name for path in tmp_path.iterdir()))
    assert written == [["keyword-0", "position-0"]] * 2


@pytest.mark.parametrize("name", ["save_pretrained", "save_pretrained_merged"])
def test_what_a_model_saves_has_the_permissions_of_the_umask_on_one_process_too(name, adapted, tmp_path):
    getattr(adapted[0], name)(str(tmp_path))
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_save_method_of_unsloth_only_is_rejected(adapted, tmp_path):
    with pytest.raises(ValueError, match="save_method='merged_4bit' needs Unsloth"):
        adapted[0].save_pretrained_merged(str(tmp_path), save_method="merged_4bit")


@pytest.mark.parametrize(
    "environment",
    [{"UNSLOTH_FSDP2": "1"}, {"UNSLOTH_TP_SIZE": "2"}, {"UNSLOTH_PP_SIZE": "4"}, {"UNSLOTH_FSDP2": "true"}],
)
def test_multi_gpu_modes_of_unsloth_are_rejected_by_name(environment):
    (name,) = environment
    with pytest.raises(ValueError, match=f"Unset {name}"):
        check_unsloth_modes(environment)


def test_multi_gpu_modes_that_are_off_are_accepted():
    check_unsloth_modes(
        {"UNSLOTH_FSDP2": "0", "UNSLOTH_TP_SIZE": "1", "UNSLOTH_PP_SIZE": "", "UNSLOTH_FSDP2_BACKEND": "x"}
    )


def test_layers_outside_of_the_gpu_are_rejected_before_loading():
    from accelerate_unsloth import FastLanguageModel

    with pytest.raises(ValueError, match="offload_layers='auto' moves layers"):
        FastLanguageModel.from_pretrained("nobody/nothing", offload_layers="auto")


def test_only_the_first_layers_recompute():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))
    model.config.use_cache = False
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *args, index=index: ran.append(index))

    def layers_that_run(**inputs):
        ran.clear()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return ran

    inputs = {"input_ids": torch.arange(8)[None]}
    layers = kernels.layers_that_recompute(model)
    assert layers == [*model.model.layers]
    assert kernels.set_recomputation(model, True) is False
    assert layers_that_run(**inputs) == [0, 1, 2, 2, 1, 0]
    kernels.recompute_first(layers, 2)
    assert layers_that_run(**inputs) == [0, 1, 2, 1, 0]
    kernels.set_recomputation(model, False)
    assert layers_that_run(**inputs) == [0, 1, 2]
