"""Optimizers: AdamW written out, Muon, and which parameters get what."""

import torch
import torch.distributed as dist

# Newton-Schulz steps (a, b, c) for singular values in (0, 1], X <- a X + (b X Xᵀ + c (X Xᵀ)²) X:
# Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def check(lr, betas, eps, weight_decay):
    """ValueError, with the range, for a hyper-parameter out of it."""
    if lr < 0:
        raise ValueError(f"learning rate must be 0 or more, got {lr}")
    for i, beta in enumerate(betas, 1):
        if not 0 <= beta < 1:
            raise ValueError(f"beta{i} must be in [0, 1), got {beta}")
    if eps < 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")


class AdamW(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov and Hutter
    2019, algorithm 2), written to be read; `build_optimizer` runs PyTorch's fused one.

    correct_bias: divide the moments by 1 - beta^t. decay_first: decay before the update, as
    PyTorch does; else after it, as CS224n's reference does. ValueError for settings out of range.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0, correct_bias: bool = True,
                 decay_first: bool = False):
        check(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "correct_bias": correct_bias,
                                  "decay_first": decay_first})

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                if group["decay_first"]:  # added: float32 rounds 1 - lr * weight_decay too coarsely
                    p.add_(p, alpha=-lr * group["weight_decay"])
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                correct1 = correct2 = 1.0
                if group["correct_bias"]:
                    correct1, correct2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
                p.addcdiv_(m, (v / correct2).sqrt_().add_(group["eps"]), value=-lr / correct1)
                if not group["decay_first"]:
                    p.add_(p, alpha=-lr * group["weight_decay"])
        return loss


def orthogonalize(G, steps: int = 5):
    """Matrices G (B, m, n) with all singular values moved to about 1 (0.7 to 1.2), by `steps`
    Newton-Schulz iterations; those below some 1e-3 of the norm may stay smaller. float32 is done in
    bfloat16 where the chip has units for it: exact enough, and twice as fast."""
    has_bf16 = (torch.cuda.get_device_capability(G.device) >= (8, 0) if G.is_cuda else
                G.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    X = G.bfloat16() if has_bf16 and G.dtype == torch.float32 else G
    if tall := X.size(-2) > X.size(-1):
        X = X.mT  # so that X Xᵀ is the smaller of the two
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


def orthogonalize_shared(G):
    """`orthogonalize` of matrices (B, m, n) that all ranks have alike: each does its share, and all
    get all, as this is a tenth of a step on eight GPUs where every rank does everything."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalize(G)
    share = -(-len(G) // world)  # rounded up
    padded = G.new_zeros(world * share, *G.shape[1:])
    padded[:len(G)] = G
    own = orthogonalize(padded.split(share)[dist.get_rank()]).contiguous()  # as NCCL wants it
    shares = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(shares, own)
    return torch.cat(shares)[:len(G)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), for matrices; AdamW for the rest.

    Groups with `parts` are Muon's: every parameter is `parts` matrices on top of each other (3 for
    fused query, key and value), each orthogonalised for itself; all of one shape go through
    Newton-Schulz as one batch. An update has spectral norm lr * sqrt(max(1, rows / columns)), its
    momentum is Nesterov's, its weight decay decoupled. Other groups are PyTorch's AdamW's. The
    ranks share the matrices out and get the same update. ValueError for settings out of range.
    """

    _step_supports_amp_scaling = True  # a step with `found_inf` set to 1 changes no weight

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.95):
        check(lr, (*betas, momentum), eps, weight_decay)
        for group in groups:
            for p in group["params"] if "parts" in group else []:
                if p.dim() != 2 or p.size(0) % group["parts"]:
                    raise ValueError(f"Muon updates {group['parts']} stacked matrices, got a "
                                     f"parameter of shape {tuple(p.shape)}")
        rest = [g for g in groups if "parts" not in g]  # none where all are adapters
        self.adamw = torch.optim.AdamW(rest or [torch.zeros(0)], lr, betas, eps, weight_decay,
                                       fused=True)
        super().__init__([{"momentum": momentum} | g for g in groups if "parts" in g]
                         + self.adamw.param_groups[:len(rest)],
                         {"lr": lr, "weight_decay": weight_decay})
        self.share()

    def share(self):
        """AdamW works on the same groups and state, so that there is one state_dict."""
        self.adamw.state = self.state
        self.adamw.param_groups = [g for g in self.param_groups if "parts" not in g]

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; a closure is not supported."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":  # asking costs nothing
            if found_inf:
                return
            found_inf = None
        self.adamw.grad_scale, self.adamw.found_inf = None, found_inf
        self.adamw.step()
        batches = {}  # of one shape and group: [(matrix, its gradient, its momentum)]
        for number, group in enumerate(self.param_groups):
            for p in group["params"] if "parts" in group else []:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                stacked = p, p.grad, self.state[p]["momentum_buffer"]
                for matrix in zip(*(tensor.chunk(group["parts"]) for tensor in stacked)):
                    batches.setdefault((number, *matrix[0].shape), []).append(matrix)
        for (number, m, n), batch in batches.items():
            group = self.param_groups[number]
            lr, momentum = group["lr"], group["momentum"]
            matrices, gradients, buffers = zip(*batch)
            G, M = torch.stack(gradients), torch.stack(buffers)  # (B, m, n)
            good = 1.0
            if found_inf is not None:
                G, good = torch.where(found_inf > 0, M, G), 1 - found_inf
            M.lerp_(G, 1 - momentum)
            update = orthogonalize_shared(G.lerp_(M, momentum)) * good
            torch._foreach_copy_(buffers, M.unbind())
            if group["weight_decay"]:
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"] * good)
            torch._foreach_add_(matrices, update.unbind(), alpha=-lr * max(1, m / n) ** 0.5)


OPTIMIZERS = {  # name: function of parameter groups and settings; one line for one of yours
    "adamw": lambda groups, s: torch.optim.AdamW(
        groups, s["lr"], s["betas"], weight_decay=s["weight_decay"], fused=True),
    "muon": lambda groups, s: Muon(
        groups, s["lr"], s["betas"], weight_decay=s["weight_decay"], momentum=s["momentum"]),
    "adamw_plain": lambda groups, s: AdamW(
        groups, s["lr"], s["betas"], 1e-8, s["weight_decay"], decay_first=True),
}


def build_optimizer(model, name: str, learning_rate: float, weight_decay: float,
                    betas: tuple[float, float], adamw_learning_rate: float | None = None,
                    momentum: float = 0.95, head=(), head_learning_rate: float | None = None):
    """The optimizer called `name` in OPTIMIZERS over the trainable parameters of a model.

    Muon updates the linear layers of the blocks and leaves the embeddings, the head and all vectors
    to AdamW, at adamw_learning_rate. Matrices decay, biases and LayerNorm gains do not. head: the
    parameters that have head_learning_rate; None: the rate of the others that AdamW updates. A
    group's `peak` is its learning rate at the top of the schedule. ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is unknown; there are: {', '.join(OPTIMIZERS)}")
    head = list(head)
    rest, stacked, single = [], [], []
    for key, p in model.named_parameters():
        if not p.requires_grad or any(p is other for other in head):
            continue
        of_muon = name == "muon" and p.dim() == 2 and "transformer.h." in key
        (rest if not of_muon else stacked if key.endswith("c_attn.weight") else single).append(p)
    peak = learning_rate if name != "muon" or adamw_learning_rate is None else adamw_learning_rate
    groups = [{"params": [p for p in rest if p.dim() >= 2], "peak": peak},
              {"params": [p for p in rest if p.dim() < 2], "peak": peak, "weight_decay": 0.0},
              {"params": head, "peak": peak if head_learning_rate is None else head_learning_rate},
              {"params": stacked, "peak": learning_rate, "parts": 3},
              {"params": single, "peak": learning_rate, "parts": 1}]
    settings = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay,
                "momentum": momentum}
    return OPTIMIZERS[name]([group for group in groups if group["params"]], settings)
