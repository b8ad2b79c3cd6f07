"""Optimizers: which parameters decay, and what updates them."""

import torch


def build_optimizer(model, name: str, learning_rate: float, weight_decay: float,
                    betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The optimizer called `name` over the trainable parameters of a model.

    Matrices (two dimensions: linears and embeddings) decay, biases and LayerNorm gains do not.
    ValueError for an unknown name.
    """
    if name != "adamw":
        raise ValueError(f"optimizer={name!r} is unknown; there is: adamw")
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas,
                             fused=params[0].device.type in ("cuda", "cpu"))
