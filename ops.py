"""What a GPT's training step does on a CPU faster, or in less memory, than torch's own functions.

Each computes what its plain form does (F.linear, F.cross_entropy, F.embedding, a call), and elsewhere
is that form. What each of them gains is measured in docs/training_speed.md.
"""

import torch
import torch.nn.functional as F
from torch import nn


def onednn(x, weight, bias=None):
    """F.linear by oneDNN, of a plain weight or one in its own layout (decode.py); no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear of float32 rows (N, in) on an x86 CPU by oneDNN, whose products take 0.7 to 0.95 of
    the time of those of the BLAS that F.linear calls there."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        # for the weight's gradient oneDNN copies the transposed rows: much for a narrow product
        product = linear if min(weight.shape) >= 512 else F.linear
        return (linear(grad, weight.t()) if needs_dx else None,
                product(grad.t(), x.t()) if needs_dw else None,
                grad.sum(0) if needs_db else None)


ONEDNN = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()


def linear(x, weight, bias=None):
    """F.linear, by the faster of this machine's libraries."""
    if (ONEDNN and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and x.numel() * len(weight) >= 2**27 and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()):
        return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def recomputed(make, x, use, width, *args):
    """use(make(x), *args); for the backward pass make(x) is not kept but made again, on CPUs and from
    a width of 512: there a LayerNorm or GELU is little beside the products, which grow with it."""
    y = make(x)
    if (width < 512 or x.device.type != "cpu" or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()):
        return use(y, *args)
    at, size = y.data_ptr(), y.numel()

    def pack(t):
        return t.shape if t.data_ptr() == at and t.numel() == size and t.is_contiguous() else t

    def unpack(kept):
        return make(x).view(kept) if isinstance(kept, torch.Size) else kept
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(y, *args)


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets) of x (N, C) and weight (V, C), for a CPU, where the
    (N, V) logits, their softmax and gradient are most of the memory and none of the work: 256 rows
    at a time, the gradient along with the loss, both summed in float32 at least. Under autocast the
    products have its dtype. It can be run backward once, and its gradient not be derived."""

    @staticmethod
    def forward(ctx, x, weight, targets, tied=None):
        real = targets != -100
        wide = torch.promote_types(x.dtype, torch.float32)
        count, loss = real.sum().clamp(min=1), x.new_zeros((), dtype=wide)
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        rows, matrix = x.to(low), weight.to(low)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        logits = rows.new_empty(min(256, len(x)), len(weight))
        parts = [slice(j, j + 8192) for j in range(0, len(weight), 8192)]  # oneDNN copies weights
        for i in range(0, len(x), 256):
            row, own = rows[i:i + 256], real[i:i + 256]
            for part in parts:
                logits[:len(row), part] = linear(row, matrix[part])
            p = logits[:len(row)].to(wide)
            at = targets[i:i + 256].where(own, 0)[:, None]
            p -= p.amax(1, keepdim=True)
            logit = p.gather(1, at)
            total = p.exp_().sum(1, keepdim=True)
            loss += (total.log() - logit)[own].sum()
            p *= own.to(p)[:, None] / count / total
            p = p.scatter_add_(1, at, -own.to(p)[:, None] / count).to(low)
            for part in parts if dx is not None else ():
                dx[i:i + 256] += linear(p[:, part], matrix[part].t())
            if dw is not None and low == dw.dtype:
                dw.addmm_(p.t(), row)
            elif dw is not None:
                dw += p.t() @ row
        ctx.gradients, ctx.tied = [dx, dw], tied
        return loss / real.sum()  # nan where none counts, as F.cross_entropy; the gradient is 0

    @staticmethod
    def backward(ctx, scale):
        if torch.is_grad_enabled():  # create_graph: the second derivative would be silently wrong
            raise RuntimeError("this loss can be derived once; for more, F.cross_entropy of the logits")
        if ctx.gradients is None:
            raise RuntimeError("this loss has been run backward before; compute it again")
        (dx, dw), ctx.gradients = ctx.gradients, None
        for gradient in (dx, dw):
            if gradient is not None and scale != 1:
                gradient.mul_(scale)
        if ctx.tied is None:
            return dx, dw, None, None
        ctx.tied.append(dw)
        return dx, None, None, None


class TiedEmbedding(torch.autograd.Function):
    """F.embedding of ids (B, T), its gradient added to that of the head, which is `tied`[0] by then:
    two as large as the vocabulary, and their sum, would be the peak of a step's memory."""

    @staticmethod
    def forward(ctx, idx, weight, tied):
        ctx.idx, ctx.tied = idx, tied
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        dw = ctx.tied.pop()
        return None, dw.index_add_(0, ctx.idx.flatten(), grad.flatten(0, -2)), None
