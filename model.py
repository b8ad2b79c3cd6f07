"""GPT-2, all of it: network, loss, loading, saving and sampling.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners": pre-LayerNorm blocks, learned positions, one fused query/key/value projection, tanh GELU,
output head tied to the token embedding. Parameter names are Hugging Face's; weights are kept in
nn.Linear layout (out, in) and transposed only when they go to or come from a file of theirs.
"""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import CONV1D, read_pretrained, save_safetensors, write_text
from ops import Linear, LinearCrossEntropy, TiedEmbedding, linear, recomputed


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
                is_causal=True if mask is None and T > 1 else False,  # noqa: SIM210 (no symbolic bool)
                dropout_p=self.dropout if self.training else 0.0)
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
            logits = self.logits(x)
        else:  # of whole tiles; the slice is fused away
            logits = F.linear(x, F.pad(head.weight, (0, 0, 0, -V % 64)))[:, :V]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return None, F.cross_entropy(logits.to(wide), targets)

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
        stop = None if eos_id in (None, []) else torch.tensor(eos_id, device=idx.device).view(-1)
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
        fields, tensors = read_pretrained(name, revision)
        fields |= {} if dropout is None else {"dropout": dropout}
        try:
            config = GPTConfig(**fields)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{name}: {e}") from None
        positions = config.block_size
        if block_size is not None:
            if block_size > positions:
                raise ValueError(f"block_size={block_size} is more than the {positions} positions of "
                                 f"{name}")
            config = GPTConfig(**fields | {"block_size": block_size})
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

    def save_pretrained(self, folder, eos_id: int | None = None, **more):
        """Writes config.json and model.safetensors as transformers' GPT2LMHeadModel reads them.
        eos_id is where their `generate` stops; more: further fields of config.json."""
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
            "torch_dtype": str(self.transformer.wte.weight.dtype).removeprefix("torch."), **more}
        save_safetensors(Path(folder) / "model.safetensors", tensors)
        write_text(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")


# ---- drawing a token ----

def check_sampling(config, idx, max_new_tokens, temperature, top_k, top_p):
    """ValueError, with the range, for a sampling setting out of it."""
    if idx.ndim != 2 or not idx.numel():
        raise ValueError(f"a prompt must be (B, T) with T >= 1, got shape {tuple(idx.shape)}")
    if not 1 <= max_new_tokens <= 2**24:
        raise ValueError(f"max_new_tokens must be in 1 … {2**24}, got {max_new_tokens}")
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
    probs, ids = (logits / max(temperature, 1e-30)).softmax(-1), None
    if top_k is not None or top_p is not None and top_p < 1:
        # exactly k of them, largest first: equal logits at the k-th place do not widen the choice
        probs, ids = probs.topk(top_k or probs.size(-1))
        if top_p is not None:  # a token stays while those before it are short of p
            before = probs.cumsum(-1, dtype=torch.float64) - probs
            probs = probs.where(before < top_p * probs.sum(-1, keepdim=True), 0)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    pick = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=cdf.size(-1) - 1)
    return (pick if ids is None else ids.gather(-1, pick)).squeeze(-1)
