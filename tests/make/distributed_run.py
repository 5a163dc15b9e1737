"""A training run of one of several processes: `torchrun ... -m tests.make.distributed_run HOW FOLDER BASE`."""

import sys

import torch
import transformers

from hf_callbacks import PosthocLoraCallback
from tests.make.trainer_runs import examples


def accept_fsdp_on_cpu():
    """Without this accelerate sets FSDP aside on the CPU, and runs plain DDP without a word."""
    from accelerate import state
    from accelerate.utils import DistributedType

    begin = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init


def accept_tensor_parallelism_on_cpu():
    """accelerate refuses every kind of device but GPUs and their like; nothing that follows minds."""
    from accelerate import ParallelismConfig

    ParallelismConfig._validate_accelerator = lambda *_: None


def fsdp(state_dict_type):
    accept_fsdp_on_cpu()
    options = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": state_dict_type,
        "cpu_ram_efficient_loading": False,
    }
    return {"fsdp": True, "fsdp_config": options}


def zero(stage, *, whole=True):
    """DeepSpeed's; the optimizer is transformers' own."""
    config = {
        # Without a threshold no weight of so small a model would be spread.
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": whole,
            "stage3_param_persistence_threshold": 100,
        },
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return {"deepspeed": config}


def how(name):
    """What is said to `from_pretrained`, and to `TrainingArguments`."""
    if name == "fsdp-full":
        return {}, fsdp("FULL_STATE_DICT")
    if name == "fsdp-sharded":
        return {}, fsdp("SHARDED_STATE_DICT")
    if name.startswith("native-fsdp"):
        from transformers.distributed import DistributedConfig

        options = {"save_only_model": True, "save_strategy": "no" if name.endswith("-unsaved") else "steps"}
        return {"distributed_config": DistributedConfig(fsdp_size=2)}, options
    if name == "native-tp":
        from transformers.distributed import DistributedConfig

        accept_tensor_parallelism_on_cpu()
        # Both processes see every example.
        options = {"save_only_model": True, "per_device_train_batch_size": 4}
        return {"distributed_config": DistributedConfig(tp_size=2)}, options
    if name.startswith("zero"):
        return {}, zero(int(name[4]), whole="partitions" not in name)
    return {}, {}


def main(name, folder, base):
    loading, options = how(name)
    torch.manual_seed(0)
    # In this order: the arguments start the process group, which a sharded model is loaded with.
    args = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=4,
        save_steps=2,
        save_total_limit=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 2, **options},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **loading)
    when, strict = "end" if name.endswith("-end") else "save", not name.endswith("-unsaved")
    callback = PosthocLoraCallback(rank=8, strict=strict, when=when)
    training = transformers.Trainer(model=model, args=args, train_dataset=examples(), callbacks=[callback])
    training.train()
    weight = training.model.model.layers[0].self_attn.q_proj.weight.data
    # In one piece: the other process prints at the same moment.
    print(f"{type(training.model).__name__} {training.accelerator.distributed_type} {type(weight).__name__}\n", end="")
    if torch.distributed.is_initialized():
        # A process that leaves without it may be aborted by a thread of gloo's.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
