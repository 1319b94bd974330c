"""Merges adapters by PEFT's own ``add_weighted_adapter``; a program of its own.

``python -m flexllm_vllm.adapter_files.merging JOB``, where JOB is the file of a
:class:`MergeJob`. It ends when its standard input does: with the process that has started it.

PEFT looks at the matrices of the adapters only, so that no base model is loaded: it is given a tree
of linears whose weights take no memory.
"""

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flexllm_vllm.adapter_files.check import canonical_targets, module_paths
from flexllm_vllm.adapter_files.config import WEIGHTS_FILE, AdapterConfig, read_config
from flexllm_vllm.adapter_files.merge_job import MergeJob

_MERGED = "merged"


@dataclass(frozen=True)
class _Adapter:
    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    modules: list[str]


def merge(job: MergeJob) -> None:
    """Write the merged adapter as a PEFT folder, with a scaling of 1.

    Raises:
        ValueError, RuntimeError: PEFT cannot merge these adapters in this way.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapters = [_read(Path(path)) for path in job.paths]
    names = [f"adapter_{i}" for i in range(len(adapters))]
    model: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        config = _peft_config(adapter)
        if model is None:
            model = get_peft_model(_linears(job, adapters), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        set_peft_model_state_dict(model, adapter.tensors, adapter_name=name)
    torch.manual_seed(job.seed)
    model.base_model.add_weighted_adapter(
        names,
        job.weights,
        _MERGED,
        combination_type=job.method,
        svd_rank=job.svd_rank,
        svd_full_matrices=False,
        density=job.density,
        majority_sign_method=job.majority_sign_method,
    )
    tensors = {
        name: tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=_MERGED).items()
    }
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError("the merged weights are not finite")
    base_model = adapters[0].config.values.get("base_model_name_or_path")
    _save(job, tensors, model.peft_config[_MERGED].r, base_model)


def _read(folder: Path) -> _Adapter:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return _Adapter(read_config(folder), tensors, module_paths(tensors))


def _peft_config(adapter: _Adapter) -> Any:
    """The adapter's settings with its modules by their paths and every scaling as alpha / r: PEFT
    gives the merged adapter the first one's ``layers_to_transform`` and ``use_rslora``."""
    from peft import LoraConfig

    config = adapter.config
    ranks = {module: config.rank_of(module) for module in adapter.modules}
    return LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        target_modules=adapter.modules,
        rank_pattern={module: rank for module, rank in ranks.items() if rank != config.r},
        alpha_pattern={module: config.scaling_of(module) * rank for module, rank in ranks.items()},
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )


def _linears(job: MergeJob, adapters: list[_Adapter]) -> torch.nn.Module:
    """The linears of all adapters, at their paths and in the order of the model, which is that of
    what DARE draws. Their weights are one number each, expanded."""
    root = torch.nn.Module()
    for path in job.modules:
        tensors = next((a.tensors for a in adapters if path in a.modules), None)
        if tensors is None:
            continue
        in_features = tensors[f"base_model.model.{path}.lora_A.weight"].shape[1]
        out_features = tensors[f"base_model.model.{path}.lora_B.weight"].shape[0]
        linear = torch.nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = in_features, out_features
        weight = torch.zeros(1).expand(out_features, in_features)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.add_module(name, linear)
    return root


def _save(job: MergeJob, tensors: dict[str, torch.Tensor], r: int, base_model: str | None) -> None:
    from peft import LoraConfig

    folder = Path(job.result)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    targets = canonical_targets(module_paths(tensors), job.num_layers)
    LoraConfig(
        r=r,
        lora_alpha=r,
        **targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _end_with_parent() -> None:
    # Not sys.stdin: a thread that holds its lock when the interpreter ends aborts the process.
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    """Merge what the command line names; the last line of standard error is the reason if not."""
    # A tenth of a processor that inference keeps busy; at 19 it would be a hundredth, and a merge
    # of half a minute would take half an hour.
    os.nice(10)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        merge(MergeJob.read(Path(sys.argv[1])))
    except Exception as error:
        # Of a file that cannot be read, not where it lies.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        print(" ".join((reason or "").split()) or type(error).__name__, file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
