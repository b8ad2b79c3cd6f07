"""GPT-2, all of it: network, loss, loading, saving and sampling.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-LayerNorm blocks,
learned positions, one fused query/key/value projection, tanh GELU, output head tied to the token
embedding. Parameters have Hugging Face's names; weights lie as nn.Linear has them, (out, in).
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

import hf

ACTIVATIONS = {  # by transformers' names, under which they are saved
    "gelu_new": lambda: nn.GELU(approximate="tanh"),  # GPT-2's
    "gelu": nn.GELU,  # the erf form
}


@dataclass
class GPTConfig:
    """Sizes and switches of a network; ValueError for what cannot be built. The defaults are plain
    GPT-2's. A field that you add comes back wherever a model is loaded (hf.py says how)."""

    block_size: int = 1024  # context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    activation: str = "gelu_new"  # or another of ACTIVATIONS
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kind = {float: int | float}.get(field.type, field.type)
            if not isinstance(value, kind) or type(value) is bool and kind in (int, int | float):
                raise ValueError(f"{field.name} must be {kind}, got {value!r}")
        for name, most in (("block_size", 2**24), ("vocab_size", 2**24), ("n_layer", 10_000),
                           ("n_head", 2**17), ("n_embd", 2**17)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"{name} must be in 1 … {most}, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            near = min((n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0),
                       key=lambda n: abs(n - self.n_head))
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}; "
                             f"n_head={near} would")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {[*ACTIVATIONS]}, got {self.activation!r}")


PRESETS = {  # the four published sizes
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124,439,808 parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 354,823,168
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774,030,080
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1,557,611,200
}


class KVCache:
    """Keys and values of every layer for B sequences of up to S tokens, allocated once: k, v
    (L, B, nh, S, hs). `length` positions are filled; `GPT.hidden` moves it on."""

    def __init__(self, config: GPTConfig, B: int, S: int, device=None, dtype=None):
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, B, config.n_head, S, hs)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Stores k, v (B, nh, T, hs) after what is there; returns all of them, (B, nh, S', hs)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with nh heads of size hs = C / nh."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask, layer, cache):
        """(B, T, C) to (B, T, C); mask as in `attend`; layer: the number of this one in a cache."""
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
                   for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = self.attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v, mask):
        """Scaled dot-product attention of q (B, nh, T, hs) to k, v (B, nh, S, hs), whose last T are
        q's own. mask: what each token sees, (T, S) or (B, 1, T, S); None: all up to itself, where T
        is S or 1 (is_causal aligns top-left, which is wrong for a chunk after a cache)."""
        causal = True if mask is None and q.size(2) > 1 else False  # noqa: SIM210 (not symbolic)
        return F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0,
                                              is_causal=causal)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_proj(self.activation(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask, layer, cache):
        x = x + self.attn(self.ln_1(x), mask, layer, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, untrained = config, nn.Embedding.from_pretrained
        self.num_tokens = config.vocab_size  # fewer where rows only fill up the matrix
        self.transformer = nn.ModuleDict({
            # not nn.Embedding(): it would draw its own numbers first, and slowly on "meta"
            "wte": untrained(torch.empty(config.vocab_size, config.n_embd), False),
            "wpe": untrained(torch.empty(config.block_size, config.n_embd), False),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        """Forward and backward FLOPs of a token at context T: 6 for each weight of a matrix product
        and 12 L C T for attention (PaLM, Chowdhery et al. 2022, appendix B, causal or not)."""
        c = self.config
        multiplied = self.num_params() + 2 * c.n_layer * c.n_embd * T
        for module in self.modules():
            if isinstance(module, nn.Embedding):  # only read, but where it is the head, too
                head = c.tie_word_embeddings and module is self.transformer.wte
                multiplied -= 0 if head else module.weight.numel()
        return 6 * multiplied

    def hidden(self, idx, attention_mask=None, cache: KVCache | None = None):
        """Hidden states (B, T, C) after the final LayerNorm; ValueError past block_size.

        idx: (B, T) token ids. attention_mask: (B, T), 1 for real tokens and 0 for padding on either
        side, where the result is meaningless; positions are counted over real tokens. With a cache,
        idx continues what it holds (S' tokens), and the mask, if any, covers both: (B, S' + T).
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
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, layer, cache)
        if cache is not None:
            cache.length = S
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) to logits (..., V)."""
        head = getattr(self, "lm_head", None)
        return F.linear(x, self.transformer.wte.weight) if head is None else head(x)

    def loss(self, x, targets):
        """Mean cross-entropy in nats of x (N, C) against next ids (N,), -100 where none counts."""
        logits = self.logits(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def forward(self, idx, targets=None, attention_mask=None, cache: KVCache | None = None):
        """(logits (B, T, V), None) of ids (B, T) or, with targets (B, T), the ids that come next,
        -100 where none counts: (None, mean cross-entropy in nats). The rest is as in `hidden`."""
        x = self.hidden(idx, attention_mask, cache)
        if targets is None:
            return self.logits(x), None
        return None, self.loss(x.flatten(0, 1), targets.flatten())

    def next_logits(self, idx, attention_mask, cache: KVCache):
        """Logits (B, num_tokens) of the token that follows; the arguments are those of `hidden`."""
        return self.logits(self.hidden(idx, attention_mask, cache)[:, -1])[:, :self.num_tokens]

    # ---- sampling ----

    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, eos_id: int | list | None = None,
                 generator: torch.Generator | None = None, attention_mask=None):
        """Continues the prompts idx (B, T); returns (B, T + n), n <= max_new_tokens. temperature 0
        is greedy; top_k keeps the k most likely tokens, then top_p the fewest whose probability
        reaches p (Holtzman et al. 2020). A row ends at eos_id (or one of several), which fills it
        up. Shorter prompts are left-padded, with 0 in attention_mask (B, T). Each row draws its own
        numbers, seeded from `generator` (None: torch's). ValueError for a setting out of range."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, eos_id, generator,
                             attention_mask)
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None,
               generator=None, attention_mask=None):
        """Yields the tokens of `generate`, (B,) at a time. Past block_size the window moves: its
        older half is dropped and the cache rebuilt."""
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p, attention_mask)
        B, block_size, mask = idx.size(0), self.config.block_size, attention_mask
        stop = torch.tensor(-1 if eos_id in (None, []) else eos_id, device=idx.device).view(-1)
        if temperature > 0:  # all of a row's random numbers now: one uniform number for each token
            where = generator.device if generator else "cpu"
            seed = torch.randint(2**62, (1,), generator=generator, device=where).item()
            rows = (torch.Generator().manual_seed(seed + row) for row in range(B))
            u = torch.stack([torch.rand(max_new_tokens, dtype=torch.float64, generator=row)
                             for row in rows]).to("cpu" if idx.is_mps else idx.device)
        chunk = idx[:, -block_size:]
        mask = None if mask is None else mask[:, -block_size:]
        S, weight = min(block_size, chunk.size(1) + max_new_tokens - 1), self.transformer.wte.weight
        cache = KVCache(self.config, B, S, weight.device, weight.dtype)
        window = [chunk]  # of what the cache is rebuilt
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        was_training = self.training
        self.eval()
        try:
            for i in range(max_new_tokens):
                if cache.length + chunk.size(1) > block_size:
                    first = -((block_size + 1) // 2)
                    if mask is not None:  # a padded row moves when it alone is full
                        mask = mask.clone()
                        mask[mask.sum(1) > block_size, :first] = 0
                        first = int(mask.any(0).int().argmax())
                        mask = mask[:, first:]
                    chunk = torch.cat(window, dim=1)[:, first:]
                    window, cache.length = [chunk], 0
                logits = self.next_logits(chunk, mask, cache)
                if temperature > 0:
                    token = draw(logits, u[:, i, None], temperature, top_k, top_p)
                else:
                    token = logits.argmax(-1)
                token = torch.where(ended, stop[0], token)
                ended |= torch.isin(token, stop)
                yield token
                if (idx.is_cpu or i % 16 == 15) and ended.all():  # a GPU would be waited for
                    return
                chunk = token[:, None]
                window.append(chunk)
                mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, name, revision: str | None = None, dtype: torch.dtype | None = None,
                        block_size: int | None = None, dropout: float | None = None):
        """Loads a hub name ("gpt2", …), a Hugging Face or run folder, in evaluation mode. Without
        dtype the weights stay as they are in the file, and mapped: memory is shared until something
        writes to it. With dtype they are a copy. block_size crops the context."""
        return hf.load(cls, GPTConfig, name, revision, dtype, block_size, dropout)

    def save_pretrained(self, folder, eos_id: int | None = None, **more):
        """Writes config.json and model.safetensors as transformers' GPT2LMHeadModel reads them,
        with the id where its `generate` stops and further fields of config.json."""
        hf.save(self, GPTConfig(), folder, {"bos_token_id": eos_id, "eos_token_id": eos_id} | more)


def check_sampling(idx, max_new_tokens, temperature, top_k=None, top_p=None, mask=None):
    """ValueError, with the range, for a sampling setting out of it."""
    if mask is not None and (mask.shape != idx.shape or not mask[:, -1].all()):
        raise ValueError("attention_mask must be (B, T) and end in 1: padded on the left")
    if idx.ndim != 2 or not idx.numel():
        raise ValueError(f"a prompt must be (B, T) with T >= 1, got shape {tuple(idx.shape)}")
    if not 1 <= max_new_tokens <= 2**24:
        raise ValueError(f"max_new_tokens must be in 1 … {2**24}, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be 1 or more, or 0 for all tokens, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def draw(logits, u, temperature: float, top_k: int | None, top_p: float | None):
    """Tokens (B,) for logits (B, V) and uniform numbers u (B, 1), by inverting the distribution, on
    the device of u: MPS has no float64."""
    logits, device = logits.to(u.device, torch.float32), logits.device
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature is greedy, not an overflow
    probs, ids = (logits / max(temperature, 1e-30)).softmax(-1), None
    if top_k or top_p is not None and top_p < 1:
        # exactly k of them, largest first: equal logits at the k-th place do not widen the choice
        probs, ids = probs.topk(min(top_k or probs.size(-1), probs.size(-1)))
        if top_p is not None:  # a token stays while those before it are short of p
            before = probs.cumsum(-1, dtype=torch.float64) - probs
            probs = probs.where(before < top_p * probs.sum(-1, keepdim=True), 0)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    pick = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=cdf.size(-1) - 1)
    return (pick if ids is None else ids.gather(-1, pick)).squeeze(-1).to(device)
