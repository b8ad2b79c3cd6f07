"""What makes a GPT train faster, or in less memory, put into a built model from outside.

`accelerate(model)` replaces torch's own leaf modules (Linear, LayerNorm, GELU, Embedding) by ones
that compute the same, and wraps `Attention.attend` and `GPT.loss`. It has no second form of any
method of model.py, so what you change there counts. Parameters, their names and state_dict stay as
they are. Without this file and its one call (device.py) all scripts give the same numbers to
rounding. What each part gains is measured in docs/training_speed.md.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

THRESHOLDS = {  # where each part begins to pay; the tests set them to 0
    "product": 2**27,  # multiplications of a matrix product that goes to oneDNN
    "width": 512,  # n_embd from which LayerNorm and GELU cost little beside the products
    "logits": 2**24,  # logits of a loss that is computed in chunks of rows
    "chunk": 2**22,  # logits of a chunk: each adds to the whole gradient of the embedding
}
ROWS = 128  # of a chunk at least, and of a block of attention
KEPT = 2**25  # attention weights, T² of each head and row, of which a layer may keep half in memory
COLUMNS = 8192  # of the head's weight in one product: oneDNN copies them

onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # private: may be missing
ONEDNN = (onednn_linear is not None and torch.backends.mkldnn.is_available()
          and "AVX" in torch.backends.cpu.get_cpu_capability())


def eager_training() -> bool:
    """Whether gradients are recorded, and not by torch.compile, which has its own ways."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


# ---- matrix products ----

class OneDNNLinear(torch.autograd.Function):
    """F.linear of float32 rows (N, in) on an x86 CPU by oneDNN, whose products take 0.7 to 0.95 of
    the time of those of the BLAS that F.linear calls there."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn_linear(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        # for the weight's gradient oneDNN copies the transposed rows: much for a narrow product
        product = linear if min(weight.shape) >= 512 else F.linear
        return (linear(grad, weight.t()) if needs_dx else None,
                product(grad.t(), x.t()) if needs_dw else None,
                grad.sum(0) if needs_db else None)


def linear(x, weight, bias=None):
    """F.linear, by the faster of this machine's libraries."""
    if (ONEDNN and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and x.numel() * len(weight) >= THRESHOLDS["product"]
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()):
        return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """Where its input can be computed again, it is not kept for the backward pass."""

    def forward(self, x):
        recompute, version = getattr(x, "recompute", (None, None))
        if recompute is None or x._version != version:  # or it has been changed in place since
            return linear(x, self.weight, self.bias)
        address = x.data_ptr()  # autograd keeps the function pack, which must not keep x

        def pack(t):  # of x, or a view of it, only the shape is kept
            return (t.size(), t.stride()) if t.data_ptr() == address else t

        def unpack(kept):
            return recompute().as_strided(*kept) if isinstance(kept, tuple) else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return linear(x, self.weight, self.bias)


def recomputed(module_class):
    """The class of a module that tells a Linear that reads its output how to compute it again."""
    class Recomputed(module_class):
        def forward(self, x):
            y = super().forward(x)
            if eager_training():
                y.recompute = partial(super().forward, x), y._version
            return y
    return Recomputed


# ---- attention ----

def blockwise_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """F.scaled_dot_product_attention, whose bfloat16 and whose dropout a CPU computes slowly: with
    causal attention in blocks of queries, each with the keys up to it. A quarter of a random number
    decides whether a weight is dropped, with dropout_p in steps of 2^-16."""
    B, nh, T, hs = query.shape
    pays = dropout_p or query.dtype == torch.bfloat16 and B * nh * T * T <= KEPT
    if not (pays and is_causal) or attn_mask is not None or more:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal,
                                              **more)
    q, k, v = (query * hs ** -0.5).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    future, blocks = q.new_full((ROWS, ROWS), -math.inf).triu(1), []
    k, v = k.split(ROWS, 1), v.split(ROWS, 1)  # joined below: a slice's gradient is a whole tensor
    for n, rows in enumerate(q.split(ROWS, 1), 1):
        scores, R = torch.bmm(rows, torch.cat(k[:n], 1).mT), rows.size(1)  # (B * nh, R, keys)
        scores[..., -R:] += future[:R, :R]
        weights = scores.softmax(-1)
        if dropout_p:
            numbers = torch.empty(weights.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
            quarters = numbers.view(torch.int16)[:weights.numel()].view(weights.shape)
            weights = weights * (quarters >= int(dropout_p * 2**16) - 2**15)
        blocks.append(torch.bmm(weights, torch.cat(v[:n], 1)))
    y = torch.cat(blocks, 1).unflatten(0, (B, nh))
    return y / (1 - dropout_p) if dropout_p else y


class Blockwise(TorchFunctionMode):
    """Within it torch's scaled dot-product attention is the blockwise one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            function = blockwise_attention
        return function(*args, **(kwargs or {}))


def attend(textbook, q, k, v, mask):
    """Attention.attend, with blockwise attention while it trains."""
    if not eager_training():
        return textbook(q, k, v, mask)
    with Blockwise():
        return textbook(q, k, v, mask)


# ---- the token embedding, the head that shares its weight, and the loss ----

class TiedEmbedding(torch.autograd.Function):
    """(F.embedding(idx, weight), the weight for the head). The embedding's gradient is added into
    the head's, in place: two of that size, and their sum, would take much memory."""

    @staticmethod
    def forward(ctx, idx, weight):
        ctx.idx = idx.flatten()
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, dw):  # dw: zeros where the head took no part
        return None, dw.index_add_(0, ctx.idx, grad.flatten(0, -2))


class Embedding(nn.Embedding):
    """The token embedding whose weight is the head's, too."""

    shared = None  # the weight for the head, in the forward pass that runs

    def forward(self, idx):
        self.shared = None
        large = idx.numel() * self.num_embeddings > THRESHOLDS["logits"]
        if not (large and eager_training() and self.weight.requires_grad):
            return super().forward(idx)
        x, self.shared = TiedEmbedding.apply(idx, self.weight)
        return x

    def __getstate__(self):  # a copy of the model begins without
        return vars(self) | {"shared": None}


def tied_logits(embedding, x):
    """Logits of the tied head. A GPU's products want widths that are multiples of 64; compiled,
    neither the padding nor the slice is a copy."""
    if not embedding.weight.is_cuda:
        return linear(x, embedding.weight)
    V = embedding.num_embeddings
    return F.linear(x, F.pad(embedding.weight, (0, 0, 0, -V % 64)))[..., :V]


class HeadProduct(torch.autograd.Function):
    """Logits (…, V) of x (…, C) by the head's weight (V, C), in its dtype; the weight's gradient is
    not returned but added into dw, if there is one."""

    @staticmethod
    def forward(ctx, weight, dw, x):
        rows = x.flatten(0, -2).to(weight.dtype)
        ctx.weight, ctx.dw, ctx.dtype, ctx.shape = weight, dw, x.dtype, x.shape
        ctx.save_for_backward(rows)
        logits = rows.new_empty(len(rows), len(weight))
        for columns, part in zip(logits.split(COLUMNS, 1), weight.split(COLUMNS)):
            columns.copy_(linear(rows, part))
        return logits.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        (rows,), grad, dw = ctx.saved_tensors, grad.flatten(0, -2), ctx.dw
        dx = torch.zeros_like(rows, dtype=ctx.dtype)
        for columns, part in zip(grad.split(COLUMNS, 1), ctx.weight.split(COLUMNS)):
            dx += linear(columns, part.t())
        if dw is not None and dw.dtype == rows.dtype:
            dw.addmm_(grad.t(), rows)
        elif dw is not None:
            dw += grad.t() @ rows
        return None, None, dx.view(ctx.shape)


class KnownGradients(torch.autograd.Function):
    """A value whose gradients by some tensors are there already; they are given away once."""

    @staticmethod
    def forward(ctx, value, gradients, *tensors):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        if ctx.gradients is None or torch.is_grad_enabled():  # the latter by create_graph
            raise RuntimeError("an accelerated loss has one backward pass and no second "
                               "derivative; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        if scale != 1:
            torch._foreach_mul_(gradients, scale.item())
        return None, None, *gradients


def loss(model, textbook, x, targets):
    """GPT.loss of hidden states x (N, C) in chunks of rows, each weighted by its counted targets,
    and its gradient along with it: the logits, their softmax and gradient, (N, V) each, are most of
    the memory of a step and none of its work."""
    counted = targets != -100
    large = len(x) * model.config.vocab_size > THRESHOLDS["logits"]
    if not (large and eager_training() and counted.any()):
        return textbook(x, targets)
    parameters = [p for p in model.parameters() if p.requires_grad]
    value, dx, gradients = 0.0, torch.zeros_like(x), {}  # gradients: by parameters
    wte, tied_head = model.transformer.wte, vars(model).get("lm_head")
    if tied_head is not None:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else wte.weight.dtype
        weight = wte.weight.view_as(wte.weight) if wte.shared is None else wte.shared
        if wte.weight.requires_grad:
            gradients[weight] = torch.zeros_like(wte.weight)
        vars(model)["lm_head"] = partial(HeadProduct.apply, wte.weight.detach().to(dtype),
                                         gradients.get(weight))
    try:
        size = max(ROWS, THRESHOLDS["chunk"] // model.config.vocab_size)
        for i in range(0, len(x), size):
            rows = slice(i, i + size)
            share = counted[rows].sum().item() / counted.sum().item()
            if share == 0:
                continue
            chunk = x[rows].detach().requires_grad_()
            part = textbook(chunk, targets[rows]) * share
            value += part.detach()
            dx[rows], *found = torch.autograd.grad(part, [chunk, *parameters], allow_unused=True)
            for p, gradient in zip(parameters, found):
                if gradient is not None:  # of what the loss reads beside the tied head
                    gradients[p] = gradients.get(p, 0) + gradient
    finally:
        if tied_head is not None:
            vars(model)["lm_head"], wte.shared = tied_head, None
    return KnownGradients.apply(value, [dx, *gradients.values()], x, *gradients)


# ---- all of it ----

def accelerate(model):
    """Makes a GPT train faster on the device that it is on, in place; returns it."""
    wte = model.transformer.wte
    tied = model.config.tie_word_embeddings and type(wte) is nn.Embedding
    if tied:  # in vars: it is no module, state_dict stays as it is
        vars(model)["lm_head"] = partial(tied_logits, wte)
    if not wte.weight.is_cpu or "loss" in vars(model):  # or it has been here before
        return model
    if tied:
        wte.__class__ = Embedding
    model.loss = partial(loss, model, model.loss)
    faster = {nn.Linear: Linear}
    if model.config.n_embd >= THRESHOLDS["width"]:
        faster |= {kind: recomputed(kind) for kind in (nn.LayerNorm, nn.GELU)}
    for module in model.modules():
        module.__class__ = faster.get(type(module), type(module))
        if hasattr(module, "attend"):
            module.attend = partial(attend, module.attend)
    return model
