"""Low-rank adapters on the linear layers of a GPT, and which part of it a fine-tuning trains.

LoRA (Hu et al. 2021): y = W x + b + (alpha / rank) B A dropout(x). W and b are frozen; A (rank, in)
starts at random, B (out, rank) at zero. The files are those of the PEFT library.
"""

import json
import math
import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import read_json, write_text
from hf import load_torch, named_tensors, open_safetensors, save_safetensors

# PEFT's settings: with these values as here, without effect on a saved adapter, or read below. Any
# other must be off.
COMPUTED = {"peft_type": ("LORA",), "bias": ("none", None),
            "init_lora_weights": (True, False, None, "gaussian", "orthogonal")}  # others change W
HARMLESS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
            "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform",
            "layers_pattern", "lora_dropout", "peft_version", "megatron_config", "megatron_core",
            "qalora_group_size", "runtime_config", "r", "lora_alpha", "use_rslora", "rank_pattern",
            "alpha_pattern")
TARGETS = ("c_attn", "c_proj", "c_fc")  # all linear layers of the blocks


class LoRA:
    """What `add_lora` mixes into the class of a linear layer: its output plus the adapter's."""

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        y = super().forward(x)
        y += F.linear(low * (self.alpha / self.rank), self.lora_B)
        return y


@cache
def with_adapter(linear_class):
    """The class of such a linear layer with an adapter."""
    return type(f"LoRA{linear_class.__name__}", (LoRA, linear_class), {})


def add_lora(model, rank: int, alpha: float, dropout: float = 0.0, targets=TARGETS):
    """Freezes a GPT and puts trainable adapters on the linear layers of its blocks whose names end
    in one of the targets; ValueError for one that matches none. Before DDP and the optimizer."""
    numbers = type(rank) is int and {type(alpha), type(dropout)} <= {int, float}
    if not numbers or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ValueError("rank must be 1 or more, alpha above 0, dropout in [0, 1); got "
                         f"{rank!r}, {alpha!r}, {dropout!r}")
    linears = {f".{name}": module for name, module in model.named_modules()
               if isinstance(module, nn.Linear) and name != "lm_head"}
    for target in targets or [""]:
        if not any(name.endswith(f".{target}") for name in linears):
            there = ", ".join(sorted({name.split(".", 4)[-1] for name in linears})) or "none"
            raise ValueError(f"no linear layer to adapt is called {target!r}; there are: {there}")
    model.requires_grad_(False)
    model.lora_targets = list(targets)
    for name, linear in linears.items():
        if not name.endswith(tuple(f".{target}" for target in targets)):
            continue
        linear.__class__ = with_adapter(type(linear))
        linear.rank, linear.alpha, linear.dropout = rank, alpha, dropout
        linear.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        linear.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5))  # as PEFT, and nn.Linear itself


def adapted(model) -> list[LoRA]:
    """The layers with adapters."""
    return [module for module in model.modules() if isinstance(module, LoRA)]


@torch.no_grad()
def merge(model, for_good: bool = False):
    """Adds the adapters into the weights, in place: the model is then a plain GPT, which can be
    saved, decoded and quantized as any other; until `unmerge`, unless for good."""
    for layer in adapted(model):
        if not for_good:
            layer.unmerged = {k: getattr(layer, k) for k in ("weight", "lora_A", "lora_B")}
        delta = layer.lora_B @ layer.lora_A * (layer.alpha / layer.rank)
        layer.weight = nn.Parameter(layer.weight + delta, False)
        del layer.lora_A, layer.lora_B
        layer.__class__ = type(layer).__bases__[1]


def unmerge(model):
    """Puts the base weights and the adapters back, bit for bit as they were before `merge`."""
    for layer in (m for m in model.modules() if hasattr(m, "unmerged")):
        layer.__class__ = with_adapter(type(layer))
        for name, parameter in vars(layer).pop("unmerged").items():
            setattr(layer, name, parameter)


def set_trainable(model, mode: str, train_blocks: int = 1, rank: int = 16, alpha: float = 32.0,
                  dropout: float = 0.0, targets=TARGETS) -> int:
    """Chooses what a fine-tuning trains of a GPT; returns how many parameters that is. mode: full;
    last_layer (none: the layer on top is not part of the GPT); last_blocks (the last `train_blocks`
    and the final LayerNorm); lora (see `add_lora`). ValueError for another."""
    blocks = model.transformer.h
    parts = {"full": [model], "last_layer": [], "lora": [],
             "last_blocks": [*blocks[-train_blocks:], model.transformer.ln_f]}
    if mode not in parts:
        raise ValueError(f"mode={mode!r} is unknown: {', '.join(parts)}")
    if mode == "last_blocks" and not 1 <= train_blocks <= len(blocks):
        raise ValueError(f"train_blocks must be in 1 … {len(blocks)}, got {train_blocks}")
    model.requires_grad_(False)
    for part in parts[mode]:
        part.requires_grad_(True)
    if mode == "lora":
        add_lora(model, rank, alpha, dropout, targets)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- files ----

def adapter_tensors(model) -> dict:
    """The adapters' parameters under the names that PEFT gives them in a file."""
    return {f"base_model.model.{name}.weight": p.detach()
            for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def save_adapter(model, folder, base_name: str):
    """Writes adapter_config.json and adapter_model.safetensors as PEFT's PeftModel.from_pretrained
    reads them. base_name: the hub name or folder of the model that they belong to."""
    layer = adapted(model)[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name),
        "r": layer.rank, "lora_alpha": layer.alpha, "lora_dropout": layer.dropout, "bias": "none",
        "target_modules": model.lora_targets, "inference_mode": True,
        "fan_in_fan_out": True}  # their layers are Conv1D
    save_safetensors(Path(folder) / "adapter_model.safetensors", adapter_tensors(model))
    write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def load_adapter(model, folder):
    """Puts the adapters that `save_adapter` or PEFT wrote on a GPT, in place. ValueError for those
    of another base model, with the shapes, and for kinds that we would not compute."""
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{folder} adapts a model for {config['task_type']}, with a head of its "
                         "own; merge it by PEFT's merge_and_unload and save_pretrained, and give "
                         "that folder to finetune_cls.py")
    for key, value in config.items():
        if not (value in COMPUTED[key] if key in COMPUTED else key in HARMLESS or not value):
            raise ValueError(f"{folder}: {key}={value!r} is not supported; it may change what is "
                             "computed")
    found = read_adapter(folder)
    for key in found:
        if ".lora_" not in key:
            raise ValueError(f"{folder} also changes {key}, which is not supported; merge it by "
                             "PEFT's merge_and_unload and save_pretrained, and give that folder")
    names = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in found}
    add_lora(model, config.get("r", 8), config.get("lora_alpha", 8),
             config.get("lora_dropout", 0.0), sorted(names))

    def of_layer(key, name, default):  # patterns end a layer's name; the first that fits counts
        patterns = config.get(key) or {}
        return next((value for pattern, value in patterns.items()
                     if re.match(rf"(.*\.)?({pattern})$", name)), default)

    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            layer.rank = of_layer("rank_pattern", name, layer.rank)
            layer.alpha = of_layer("alpha_pattern", name, layer.alpha)
            if config.get("use_rslora"):  # Kalajdzievski 2023: alpha / sqrt(rank)
                layer.alpha *= math.sqrt(layer.rank)
            layer.lora_A = nn.Parameter(layer.weight.new_empty(layer.rank, layer.in_features))
            layer.lora_B = nn.Parameter(layer.weight.new_empty(layer.out_features, layer.rank))
    ours = adapter_tensors(model)
    for key in sorted(ours | found):
        shape = list(found[key][0]) if key in found else "none"
        needed = list(ours[key].shape) if key in ours else "none"
        if shape != needed:
            raise ValueError(f"{folder} is an adapter for another base model: {key} has shape "
                             f"{shape}, this one needs {needed}")
        tensor = found[key][1]()
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: {key} is {tensor.dtype}, not a floating-point tensor")
        ours[key].copy_(tensor)


def read_adapter(folder) -> dict:
    """{name: (shape, function that reads it)} of an adapter's file, PEFT's newer or older one."""
    if (folder / "adapter_model.safetensors").is_file():
        return open_safetensors(folder / "adapter_model.safetensors")
    older = folder / "adapter_model.bin"
    if not older.is_file():
        raise ValueError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors "
                         "and no adapter_model.bin")
    return named_tensors(older, load_torch(older))
