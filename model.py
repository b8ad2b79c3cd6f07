"""GPT-2, all of it: network, loss, loading, saving and sampling.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners": pre-LayerNorm blocks, learned positions, one fused query/key/value projection, tanh GELU,
output head tied to the token embedding. Parameter names are Hugging Face's; weights are kept in
nn.Linear layout (out, in) and transposed only when they go to or come from a file of theirs.
"""

import json
import math
import os
import pickle
import re
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent


@dataclass
class GPTConfig:
    """Sizes and switches of a network; raises ValueError for sizes that cannot be built."""

    block_size: int = 1024  # context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    activation: str = "gelu_new"  # GPT-2's tanh approximation; "gelu" is the erf form
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name, most in (("block_size", 2**24), ("vocab_size", 2**24), ("n_layer", 10_000),
                           ("n_head", 2**17), ("n_embd", 2**17)):
            size = getattr(self, name)
            if type(size) is not int or not 0 < size <= most:
                raise ValueError(f"{name} must be a whole number in 1 … {most}, got {size!r}")
        if self.n_embd % self.n_head:
            fits = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}; "
                             f"n_head={min(fits, key=lambda n: abs(n - self.n_head))} would")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.activation not in ("gelu_new", "gelu"):
            raise ValueError(f"activation must be 'gelu_new' or 'gelu', got {self.activation!r}")
        for name in ("bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")


PRESETS = {  # the four published sizes
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124,439,808 parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 354,823,168
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774,030,080
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1,557,611,200
}


class KVCache:
    """Keys and values of every layer for B sequences of up to S tokens, allocated once.

    k, v: (L, B, nh, S, hs). `length` positions are filled; `GPT.hidden` moves it on.
    """

    def __init__(self, config: GPTConfig, B: int, S: int, device=None, dtype=None):
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, B, config.n_head, S, hs)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.at = None  # (1,) where a step of fixed shape writes: see decode.GraphedStep

    @classmethod
    def for_model(cls, model, B: int, S: int):
        """An empty cache with the device and dtype of a model."""
        weight = model.transformer.wte.weight
        return cls(model.config, B, S, weight.device, weight.dtype)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Stores k, v (B, nh, T, hs) behind what is there; returns all of them, (B, nh, S', hs)."""
        if self.at is not None:
            return (self.k[layer].index_copy_(2, self.at, k),
                    self.v[layer].index_copy_(2, self.at, v))
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def reorder(self, rows: torch.Tensor):
        """Row b goes on from what row rows[b] holds; only rows that change are copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for kept in (self.k, self.v):
            kept[:, moved, :, :self.length] = kept[:, rows[moved], :, :self.length]


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


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask, layer, cache):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
                   for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # is_causal aligns top-left, which is wrong for a chunk behind a cache: that brings a mask.
        # On a CPU the backward pass in bfloat16 takes 1.3 to 3 times as long up to 256 tokens.
        wide = (q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= 256
                and torch.is_grad_enabled())
        with torch.autocast("cpu", enabled=False) if wide else nullcontext():
            y = F.scaled_dot_product_attention(
                *(t.float() if wide else t for t in (q, k, v)), attn_mask=mask,
                is_causal=mask is None and T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C).to(q.dtype))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        gelu = partial(F.gelu, approximate=self.approximate)
        x = recomputed(gelu, self.c_fc(x), self.c_proj, x.size(-1))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask, layer, cache):
        C = x.size(-1)
        x = x + recomputed(self.ln_1, x, self.attn, C, mask, layer, cache)
        return x + recomputed(self.ln_2, x, self.mlp, C)


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets) of x (N, C) and weight (V, C), for a CPU, where the
    (N, V) logits, their softmax and gradient are most of the memory and none of the work: 256 rows
    at a time, the gradient along with the loss. Under autocast the products have its dtype. It can
    be run backward once."""

    @staticmethod
    def forward(ctx, x, weight, targets, tied=None):
        real = targets != -100
        count, loss = real.sum().clamp(min=1), x.new_zeros(())
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
            p = logits[:len(row)].to(x.dtype)
            at = targets[i:i + 256].clamp(min=0)[:, None]
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


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            # not nn.Embedding(): it would draw its own numbers first, and slowly on "meta"
            "wte": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), False),
            "wpe": nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), False),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias)})
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.transformer.wte.weight.is_meta:
            self.init_weights()

    def init_weights(self):
        """N(0, 0.02), biases zero; both projections into the residual stream 0.02 / sqrt(2 L), so
        that its variance does not grow with depth (Radford et al. 2019, section 2.3)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, std=0.02 / scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def num_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Forward and backward FLOPs a token at context T: 6 for each weight of a matrix product and
        12 L C T for attention (PaLM, Chowdhery et al. 2022, appendix B; causality not deducted)."""
        c = self.config
        lookups = self.transformer.wpe.weight.numel()  # read, not multiplied
        if not c.tie_word_embeddings:
            lookups += self.transformer.wte.weight.numel()
        return 6 * (self.num_params() - lookups) + 12 * c.n_layer * c.n_embd * T

    def hidden(self, idx, attention_mask=None, cache: KVCache | None = None, tied=None):
        """Hidden states after the final LayerNorm.

        idx: (B, T) token ids. attention_mask: (B, T), 1 for real tokens and 0 for padding on either
        side; positions are counted over real tokens. With a cache, idx continues what it holds
        (S' tokens) and the mask, if any, covers both: (B, S' + T). Returns (B, T, C); rows at
        padding are finite and meaningless. tied is for `forward`: see TiedEmbedding. ValueError past
        block_size.
        """
        T, start = idx.size(1), cache.length if cache is not None else 0
        S = start + T
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens do not fit a context of {self.config.block_size}")
        mask = None
        if attention_mask is not None:
            real = attention_mask.bool()
            pos = (real.cumsum(1) - 1).clamp(min=0)[:, start:]
            causal = torch.ones(T, S, dtype=torch.bool, device=idx.device).tril(start)
            own = causal & ~causal.tril(start - 1)  # a row with nothing to see would be NaN
            mask = causal & real[:, None, None, :] | own  # (B, 1, T, S)
        else:
            pos = torch.arange(start, S, device=idx.device)
            if start and T > 1:
                mask = torch.ones(T, S, dtype=torch.bool, device=idx.device).tril(start)
        wte = self.transformer.wte
        x = wte(idx) if tied is None else TiedEmbedding.apply(idx, wte.weight, tied)
        x = F.dropout(x + self.transformer.wpe(pos), self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, layer, cache)
        if cache is not None:
            cache.length = S
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) to logits (..., V)."""
        head = getattr(self, "lm_head", None)
        return linear(x, self.transformer.wte.weight) if head is None else head(x)

    def forward(self, idx, targets=None, attention_mask=None, cache: KVCache | None = None):
        """idx: (B, T) ids; targets: (B, T) ids of the next tokens, -100 where none counts.

        Returns (logits (B, T, V), None) without targets, (None, mean cross-entropy in nats) with.
        """
        wte, V = self.transformer.wte, self.config.vocab_size
        head, eager = getattr(self, "lm_head", wte), not torch.compiler.is_compiling()
        chunked = (eager and targets is not None and torch.is_grad_enabled()
                   and idx.numel() * V > 2**24 and idx.device.type == "cpu")
        tied = [] if chunked and head is wte and wte.weight.requires_grad else None
        x = self.hidden(idx, attention_mask, cache, tied)
        if targets is None:
            return self.logits(x), None
        x, targets = x.flatten(0, 1), targets.flatten()
        if chunked:
            return None, LinearCrossEntropy.apply(x, head.weight, targets, tied)
        if eager or not torch.is_grad_enabled():
            return None, F.cross_entropy(self.logits(x), targets)
        logits = F.linear(x, F.pad(head.weight, (0, 0, 0, -V % 64)))[:, :V]
        return None, F.cross_entropy(logits, targets)  # of whole tiles; the slice is fused away

    def next_logits(self, idx, attention_mask, cache: KVCache):
        """Logits (B, V) of the token that follows; the arguments are those of `hidden`."""
        return self.logits(self.hidden(idx, attention_mask, cache)[:, -1])

    # ---- sampling ----

    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, eos_id: int | list | None = None,
                 generator: torch.Generator | None = None, attention_mask=None):
        """Continues the prompts idx (B, T); returns (B, T + n), n <= max_new_tokens.

        temperature 0 is greedy. top_k keeps the k most likely tokens, top_p the fewest whose
        probability reaches p (Holtzman et al. 2020), after top_k. A row ends at `eos_id` (one id
        or several) and is filled with it; n is smaller when all rows ended. Prompts of unequal
        length are left-padded and marked in attention_mask (B, T). Each row has random numbers of
        its own, seeded from `generator` (default: torch's global one), so its text does not depend
        on the other rows. ValueError for a setting out of range.
        """
        steps = self.stream(idx, max_new_tokens, temperature, top_k, top_p, eos_id, generator,
                            attention_mask)
        return torch.cat([idx, *(token[:, None] for token in steps)], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None,
               generator=None, attention_mask=None):
        """Yields the tokens of `generate`, (B,) at a time.

        Past block_size the window moves: its older half is dropped and the cache rebuilt.
        """
        check_sampling(self.config, idx, max_new_tokens, temperature, top_k, top_p)
        stop = None if eos_id is None else torch.tensor(eos_id, device=idx.device).view(-1)
        B, n = idx.size(0), max_new_tokens
        if temperature > 0:  # all of a row's random numbers now: one uniform a token
            seed = torch.randint(2**62, (1,), generator=generator,
                                 device=generator.device if generator else "cpu").item()
            where = "cpu" if idx.device.type == "mps" else idx.device  # MPS has no float64
            u = torch.stack([torch.rand(n, dtype=torch.float64, generator=torch.Generator()
                             .manual_seed(seed + row)) for row in range(B)]).to(where)
        block_size, mask = self.config.block_size, attention_mask
        chunk = idx[:, -block_size:]
        mask = mask[:, -block_size:] if mask is not None else None
        cache = KVCache.for_model(self, B, min(block_size, chunk.size(1) + n - 1))
        seen = [chunk]  # for the window, should it have to move
        done = torch.zeros(B, dtype=torch.bool, device=idx.device)
        patience = 1 if idx.device.type == "cpu" else 16  # asking a GPU whether all ended waits for it
        was_training = self.training
        self.eval()
        try:
            for i in range(n):
                if cache.length + chunk.size(1) > block_size:
                    first = -((block_size + 1) // 2)
                    if mask is not None:  # a padded row moves when it alone is full
                        mask = mask.clone()
                        mask[mask.sum(1) > block_size, :first] = 0
                        first = int(mask.any(0).int().argmax())
                        mask = mask[:, first:]
                    chunk = torch.cat(seen, dim=1)[:, first:]
                    seen, cache.length = [chunk], 0
                logits = self.next_logits(chunk, mask, cache)
                if temperature > 0:
                    token = draw(logits.to(where), u[:, i, None], temperature, top_k, top_p)
                    token = token.to(idx.device)
                else:
                    token = logits.argmax(-1)
                if stop is not None:
                    token = torch.where(done, stop[0], token)
                    done |= torch.isin(token, stop)
                yield token
                if stop is not None and i % patience == patience - 1 and done.all():
                    return
                chunk = token[:, None]
                seen.append(chunk)
                if mask is not None:
                    mask = F.pad(mask, (0, 1), value=1)
        finally:
            self.train(was_training)

    # ---- files ----

    @classmethod
    def from_pretrained(cls, name, revision: str | None = None, dtype: torch.dtype | None = None,
                        block_size: int | None = None, dropout: float | None = None):
        """Loads a hub name ("gpt2", "distilgpt2", …), a Hugging Face folder or a run folder.

        Without dtype the weights stay as they are in the file, and mapped: memory is shared until
        something writes to it, and the file is never changed. With dtype they are a copy of their
        own. block_size crops the context; dropout overrides the file's. The model comes in
        evaluation mode. ValueError names what does not fit.
        """
        config, tensors = read_pretrained(name, revision)
        positions = config.block_size
        if block_size is not None:
            if block_size > config.block_size:
                raise ValueError(f"block_size={block_size} is more than the {config.block_size} "
                                 f"positions of {name}")
            config = replace(config, block_size=block_size)
        if dropout is not None:
            config = replace(config, dropout=dropout)
        with torch.device("meta"):  # no memory, no random numbers
            model = cls(config)
        state = {}
        for key, want in model.state_dict().items():
            if key not in tensors:
                raise ValueError(f"{name} has no tensor {key}")
            shape, read = tensors.pop(key)
            if key == "transformer.wpe.weight" and tuple(shape) == (positions, config.n_embd):
                shape = want.shape  # cropped below, as asked
            if tuple(shape) != tuple(want.shape):
                raise ValueError(f"{name}: {key} has shape {tuple(shape)}, "
                                 f"config.json makes it {tuple(want.shape)}")
            state[key] = read
        if tensors:
            raise ValueError(f"{name} has tensors that GPT-2 has not: {', '.join(sorted(tensors)[:4])}"
                             + (f" and {len(tensors) - 4} more" if len(tensors) > 4 else ""))
        for key, read in state.items():
            tensor = read()[:model.get_parameter(key).size(0)]
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: {key} is {tensor.dtype}, not a floating-point tensor")
            state[key] = tensor if dtype is None else tensor.to(
                dtype, copy=True, memory_format=torch.contiguous_format)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, folder, eos_id: int | None = None):
        """Writes config.json and model.safetensors as transformers' GPT2LMHeadModel reads them.
        eos_id is where their `generate` stops."""
        from safetensors.torch import save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensors[name] = (tensor.t() if CONV1D.search(name) else tensor).contiguous()
            if not self.config.bias and re.search(r"\.(ln_\w|c_\w+)\.weight$", name):
                width = tensors[name].size(-1)  # their modules always have a bias
                tensors[name.replace("weight", "bias")] = tensor.new_zeros(width)
        c = self.config
        config = {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "n_positions": c.block_size, "vocab_size": c.vocab_size,
            "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
            "activation_function": c.activation, "tie_word_embeddings": c.tie_word_embeddings,
            "layer_norm_epsilon": 1e-5, "bias": c.bias,
            "bos_token_id": eos_id, "eos_token_id": eos_id,
            "torch_dtype": str(self.transformer.wte.weight.dtype).removeprefix("torch.")}
        text = json.dumps(config, indent=2) + "\n"
        for file, write in (("model.safetensors", lambda f: save_file(tensors, f, {"format": "pt"})),
                            ("config.json", lambda f: f.write_text(text, encoding="utf-8"))):
            tmp = folder / f"{file}.tmp"
            try:
                write(tmp)
                tmp.chmod(0o644)  # safetensors leaves 0600
                with open(tmp, "rb+") as f:
                    os.fsync(f.fileno())
                os.replace(tmp, folder / file)
            finally:
                tmp.unlink(missing_ok=True)


CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # stored (in, out) by Hugging Face
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # buffers of old files, not parameters


def local_folder(name) -> Path:
    """The folder of that name; `weights` is the one beside the scripts. ValueError without it."""
    if str(name).rstrip("/") != "weights":
        return Path(name)
    folder = HERE / "weights"
    if not folder.is_dir():
        raise ValueError(f"there is no model in {folder}; train one (make run, or python train.py "
                         "config/quickstart.py), or bring weights/ back (git checkout -- weights)")
    return folder


def read_pretrained(name, revision=None):
    """(GPTConfig, {our tensor name: (shape in our layout, function that reads it)}) of a hub name,
    a Hugging Face folder or a run folder. ValueError in one line for anything unusable."""
    folder = local_folder(name)
    if folder.is_dir():
        if (folder / "best" / "config.json").is_file():
            folder = folder / "best"
        elif (folder / "ckpt.pt").is_file():
            checkpoint = load_torch(folder / "ckpt.pt")
            try:
                config = GPTConfig(**checkpoint["config"])
                return config, {k: (v.shape, lambda v=v: v) for k, v in checkpoint["model"].items()}
            except (KeyError, TypeError, AttributeError, IndexError):
                raise ValueError(f"{folder / 'ckpt.pt'} was not written by train.py; nanoGPT's goes "
                                 "through convert.py --input=FILE") from None

        def find(file):
            return folder / file if (folder / file).is_file() else None
    elif Path(name).parts[:1] == ("out",):  # a run's folder, not somebody's model on the hub
        config = f"config/{''.join(Path(name).parts[1:2])}.py"
        hint = (f"the header of {config} says how to make it" if (HERE / config).is_file() else
                f"train it first: python train.py --out_dir={name}")
        raise ValueError(f"no such run: {name}; {hint}")
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        def find(file):
            return hub_file(str(name), file, revision)
    else:
        raise ValueError(f"no folder {name}, and it is not a hub name such as gpt2 or owner/name")

    path = find("config.json")
    if path is None:
        raise ValueError(f"{name} holds no config.json and no ckpt.pt: not a model folder")
    config = config_from_hf(read_json(path), path)
    tensors = {}
    if (path := find("model.safetensors")) is not None:
        open_safetensors(path, tensors)
    elif (path := find("model.safetensors.index.json")) is not None:
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{path} has no weight_map")
        for file in sorted(set(map(str, index.values()))):
            if Path(file).name != file:
                raise ValueError(f"{path} names {file!r}, outside its folder")
            if (path := find(file)) is None:
                raise ValueError(f"{name} lacks {file}, which its index names")
            open_safetensors(path, tensors)
    elif (path := find("pytorch_model.bin")) is not None:
        for key, tensor in load_torch(path).items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(  # noqa: TRY004
                    f"{path}: {key} is {type(tensor).__name__}, expected a tensor")
            tensors[key] = (tensor.shape, lambda tensor=tensor: tensor)
    else:
        raise ValueError(f"{name} holds no model.safetensors and no pytorch_model.bin")

    ours = {}
    for key, (shape, read) in tensors.items():
        if not key.startswith(("transformer.", "lm_head.")):
            key = f"transformer.{key}"  # saved from the bare GPT2Model
        if MASKS.search(key) or key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if not config.bias and re.search(r"\.(ln_\w|c_\w+)\.bias$", key):
            if read().count_nonzero():
                raise ValueError(f"{name}: {key} is not zero, but config.json says bias false")
            continue
        if CONV1D.search(key) and len(shape) == 2:  # a view: nothing is moved
            shape, read = shape[::-1], lambda read=read: read().t()
        ours[key] = (shape, read)
    return config, ours


def config_from_hf(hf: dict, path) -> GPTConfig:
    """GPTConfig of a Hugging Face GPT-2 config; refuses by name whatever we would not compute."""
    if hf.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {hf.get('model_type')!r}, expected 'gpt2'")
    aliases = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "n_ctx": "n_positions",
               "num_hidden_layers": "n_layer", "max_position_embeddings": "n_positions"}
    hf = {aliases[key]: value for key, value in hf.items() if key in aliases} | hf
    width = hf.get("n_embd", 768)
    defaults = {"n_inner": None, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
                "add_cross_attention": False}
    for key, default in defaults.items():
        value = hf.get(key, default)
        if value != default and not (
                key == "n_inner" and type(width) is int and value == 4 * width):
            raise ValueError(f"{path}: {key}={value!r} is not supported, only {default!r}")
    dropouts = [hf.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if any(dropout != dropouts[0] for dropout in dropouts):
        raise ValueError(f"{path}: resid_pdrop, embd_pdrop and attn_pdrop differ: {dropouts}")
    activation = hf.get("activation_function", "gelu_new")
    try:
        return GPTConfig(
            block_size=hf.get("n_positions", 1024), vocab_size=hf.get("vocab_size", 50257),
            n_layer=hf.get("n_layer", 12), n_head=hf.get("n_head", 12), n_embd=width,
            dropout=dropouts[0], bias=hf.get("bias", True),
            activation="gelu_new" if activation == "gelu_pytorch_tanh" else activation,
            tie_word_embeddings=hf.get("tie_word_embeddings", True))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read_json(path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")  # noqa: TRY004
    return value


def open_safetensors(path, tensors: dict):
    from safetensors import SafetensorError, safe_open
    try:
        file = safe_open(path, framework="pt")  # mapped, not read
        for key in file.keys():  # noqa: SIM118 (not a dict)
            shape = tuple(file.get_slice(key).get_shape())
            tensors[key] = (shape, lambda key=key: file.get_tensor(key))
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or not safetensors: {e}") from None


def load_torch(path) -> dict:
    """torch.load of tensors and plain values only: a pickle that would run code is refused."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True,
                            mmap=zipfile.is_zipfile(path))  # files older than torch 1.6 are no zip
    except OSError:
        raise
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} holds more than tensors and is not loaded, as its pickle could run "
                         f"code: {str(e).splitlines()[0][:200]}") from None
    except Exception as e:  # noqa: BLE001 (a damaged pickle can raise anything)
        raise ValueError(f"{path} is damaged: "
                         f"{(str(e) or type(e).__name__).splitlines()[0][:200]}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dict")  # noqa: TRY004
    return loaded


def hub_file(name: str, file: str, revision: str | None = None):
    """Path of a hub repository's file in the local cache, downloaded if need be; None if it has
    none. A cached copy is taken as it is; `revision` pins one."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
    try:
        try:
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return Path(hf_hub_download(name, file, revision=revision))
    except errors.HFValidationError:
        raise ValueError(f"no folder {name}, and it is not a hub name") from None
    except errors.LocalEntryNotFoundError:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if file != "config.json" and isinstance(cached, str):
            return None  # offline: the repository is there, this file of it is not
        raise ValueError(
            f"{name} is no local folder, it is not in the hub's local cache, and the hub cannot be "
            f"reached; download it where there is a network (hf download {name} --local-dir FOLDER) "
            "and give that FOLDER") from None
    except errors.EntryNotFoundError:
        return None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {name}, or it needs a login") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision}") from None


# ---- drawing a token ----

def check_sampling(config, idx, max_new_tokens, temperature, top_k, top_p):
    """ValueError, with the range, for a sampling setting out of it."""
    if idx.ndim != 2 or not idx.numel():
        raise ValueError(f"a prompt must be (B, T) with T >= 1, got shape {tuple(idx.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k must be in 1 … {config.vocab_size} (the vocabulary), got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def draw(logits, u, temperature: float, top_k: int | None, top_p: float | None):
    """Tokens (B,) for logits (B, V) and uniform numbers u (B, 1), by inverting the distribution."""
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature is greedy, not an overflow
    probs, ids = (logits / temperature).softmax(-1), None
    if top_k is not None or top_p is not None and top_p < 1:
        # exactly k of them, largest first: equal logits at the k-th place do not widen the choice
        probs, ids = probs.topk(top_k or probs.size(-1))
        if top_p is not None:  # a token stays while those before it are short of p
            before = probs.cumsum(-1, dtype=torch.float64) - probs
            probs = probs.where(before < top_p * probs.sum(-1, keepdim=True), 0)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    pick = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=cdf.size(-1) - 1)
    return (pick if ids is None else ids.gather(-1, pick)).squeeze(-1)
