"""What decoding needs beyond GPT.generate: beams, streamed text, weights laid out for speed.

On a CPU, one-token steps are bound by reading the weights: `prepare` replaces each linear layer by
one that reads them faster (oneDNN's own layout) or reads fewer bytes (int8). On a GPU they are
bound by launching kernels: it records a step once and replays it.
"""

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, KVCache, check_sampling

# torch's private operators; None where this torch lacks one
REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
INT8 = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
MANY = 8  # texts decoded together, from which arithmetic, not reading the weights, takes the time


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's own layout, for CPUs; the weight's dtype may be
    another than that of the activations."""

    def __init__(self, weight, bias):
        super().__init__()
        # laid out for 8 rows: of 1, 8, 32 and 512 the fastest, or nearly, for 1 to 16 of them
        self.weight = REORDER(weight.detach().contiguous(), 8)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x):
        y = POINTWISE(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")
        return y.to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, symmetric, one scale for each output."""

    kernel_rows = 32  # more (a prompt) are bound by arithmetic: float weights, made on the fly

    def __init__(self, weight, bias):
        super().__init__()
        weight = weight.detach().float().contiguous()
        self.scale = (weight.abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = None if bias is None else bias.detach()

    def rounded(self, dtype):
        """The weight that the integers stand for."""
        return self.weight.to(dtype).mul_(self.scale.to(dtype)[:, None])

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if INT8 is None or len(rows) > self.kernel_rows or rows.size(1) % 16:
            return F.linear(x, self.rounded(x.dtype), self.bias)
        y = INT8(rows.bfloat16().contiguous(), self.weight, self.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class ShiftedCache(KVCache):
    """A cache of S tokens that always counts as full, its newest token last: of a shorter text,
    what comes before is padding. So a one-token step has the same shapes whatever the length."""

    def append(self, layer, k, v):
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept.copy_(torch.cat([kept[:, :, 1:], new], dim=2))
        return self.k[layer], self.v[layer]


class GraphedStep:
    """GPT.next_logits, whose one-token steps on a GPU are recorded once as a CUDA graph and
    replayed: launching their kernels one by one would take longer than running them. Another text
    needs another graph only if its batch is of another size, or it is longer."""

    def __init__(self, model: GPT, compile: bool = False):
        self.config, self.cache = model.config, None  # the cache that the recorded step works on
        self.text = lambda: None  # the cache of the text that lies in it, while that is in use
        self.next_logits = partial(type(model).next_logits, model)
        self.step = torch.compile(self.next_logits) if compile else self.next_logits

    def __call__(self, idx, attention_mask, cache: KVCache):
        n, shifted = cache.length, getattr(cache, "shifted", False)
        if idx.size(1) > 1 or n == 0:  # a prompt, or a window that has moved
            if shifted and n > 0:
                raise ValueError("after its prompt a text goes on one token at a time")
            cache.shifted = False
            return self.next_logits(idx, attention_mask, cache)
        if cache is not self.text():
            self.begin(idx, cache)
        if not shifted:
            for kept in (cache.k, cache.v):
                kept[:, :, :, -n:] = kept[:, :, :, :n].clone()
            cache.shifted = True
        self.token.copy_(idx)
        self.mask.zero_()
        self.mask[:, -n - 1:] = 1 if attention_mask is None else attention_mask
        self.replay()
        cache.length = n + 1
        return self.logits

    def begin(self, idx, cache):
        """Puts a text into the cache of the recorded step; the one that was there takes a copy."""
        if other := self.text():
            other.k, other.v = other.k.clone(), other.v.clone()
        B, S = cache.k.size(1), cache.k.size(3)
        if self.cache is None or self.cache.k.size(1) != B or self.cache.k.size(3) < S:
            self.record(idx, ShiftedCache(self.config, B, S, cache.k.device, cache.k.dtype))
        n = cache.length
        filled = slice(-n, None) if getattr(cache, "shifted", False) else slice(n)
        for kept, given in ((self.cache.k, cache.k), (self.cache.v, cache.v)):
            kept[:, :, :, filled] = given[:, :, :, filled]
        cache.k, cache.v, self.text = self.cache.k, self.cache.v, weakref.ref(cache)

    def run(self):
        """One step; all tensors that it reads and writes stay where they are."""
        self.cache.length = self.mask.size(1) - 1
        self.logits = self.step(self.token, self.mask, self.cache)

    def record(self, idx, cache):
        self.cache, self.replay = cache, self.run
        self.token, self.mask = torch.zeros_like(idx), idx.new_zeros(len(idx), cache.k.size(3))
        if idx.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up, as recording asks for
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self.replay = graph.replay


@torch.no_grad()
def prepare(model: GPT, quantize: str | None = None, compile: bool = False, rows: int = 1) -> GPT:
    """Makes a model decode faster, in place; it can be neither trained nor saved afterwards.

    quantize: None keeps every weight as it is and, on a CPU, only changes their layout; "int8"
    rounds the weights of all linear layers, the head included. rows: how many texts are decoded
    together; from 8 on a CPU computes in float32 what it could only read faster in 8 bits or, where
    it has no units for it, in bfloat16. On a GPU one-token steps become a CUDA graph, with
    `compile` of fused kernels, which takes half a minute to build.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is unknown: int8, or None for unchanged weights")
    weight = model.transformer.wte.weight
    if quantize and weight.device.type != "cpu":
        raise ValueError("quantize=int8 is for CPUs; on a GPU --dtype=bfloat16 serves")
    model.eval()
    if weight.device.type == "cuda":
        model.next_logits = GraphedStep(model, compile)
    if quantize is None and not packs(weight):
        return model
    kind = partial(fast_linear, quantize, rows)
    for part in model.transformer.h.modules():
        for name, layer in list(part.named_children()):
            # a subclass with parameters of its own, such as an adapter's, stays as it is
            if isinstance(layer, nn.Linear) and {*layer._parameters} == {"weight", "bias"}:
                setattr(part, name, kind(layer.weight, layer.bias))
    model.lm_head = kind(weight if model.config.tie_word_embeddings else model.lm_head.weight, None)
    return model


def fast_linear(quantize: str | None, rows: int, weight, bias):
    """The layer that `prepare` puts into the place of one with this weight and bias."""
    layer = Int8Linear(weight, bias) if quantize else None
    if rows >= MANY and packs(weight):
        floats = layer.rounded(weight.dtype) if quantize else weight
        if weight.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            floats = floats.float()
        return PackedLinear(floats, None if bias is None else bias.to(floats.dtype))
    return layer if quantize else PackedLinear(weight, bias)


def packs(weight) -> bool:
    """Whether this machine has oneDNN's layout for weights like this one."""
    onednn = REORDER and POINTWISE and torch.backends.mkldnn.is_available()
    if not onednn or not weight.is_cpu:
        return False
    bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and bfloat16()


def left_padded(prompts: list[list[int]], device):
    """(ids, attention mask), both (B, T), of prompts of unequal length, for `generate`."""
    T = max(map(len, prompts))
    idx = torch.tensor([[-1] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    return idx.clamp(min=0), (idx >= 0).long()


def stream_text(model: GPT, tokenizer, idx, *args, before=(), **options):
    """Yields (text, tokens so far) of `model.stream` for one prompt idx (1, T), as it comes; bytes
    that are not yet a whole character wait. The stop token is not part of the text. before: the ids
    that stand before it, as far as they are shown."""
    ids, start = list(before), 0  # ids[:start] are done with
    shown = tokenizer.decode(ids)  # of the others
    for count, token in enumerate(model.stream(idx, *args, **options), 1):
        if token.item() in tokenizer.stop_ids:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids[start:])
        if text.endswith("\ufffd"):
            yield "", count
            continue
        yield text[len(shown):], count
        shown, last = text, tokenizer.decode(ids[-1:])
        if "\ufffd" not in last:  # else it is a part of a character, with those before it
            start, shown = len(ids) - 1, last
    yield tokenizer.decode(ids[start:])[len(shown):], count


def check_beams(config, num_beams: int, length_penalty: float):
    """ValueError, with the range, for a setting of beam search out of it."""
    if not 1 <= num_beams <= config.vocab_size:
        raise ValueError(f"num_beams must be in 1 … {config.vocab_size}, got {num_beams}")
    if not abs(length_penalty) <= 20:
        raise ValueError(f"length_penalty must be in -20 … 20, got {length_penalty}")


def reorder(cache: KVCache, rows):
    """Row b of a cache goes on from what row rows[b] holds; only rows that change are copied."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    filled = slice(None) if getattr(cache, "shifted", False) else slice(cache.length)
    for kept in (cache.k, cache.v):
        kept[:, moved, :, filled] = kept[:, rows[moved], :, filled]


@torch.inference_mode()
def beam_search(model: GPT, idx, max_new_tokens: int, num_beams: int, length_penalty: float = 1.0,
                eos_id: int | list | None = None):
    """The likeliest continuation of each prompt idx (B, T) that a beam search finds.

    By the rules of transformers' `generate(num_beams=…, early_stopping=False)`: a hypothesis ends
    at eos_id (one or several) or at max_new_tokens and scores (sum of log-probabilities) /
    length**length_penalty, its length counted in new tokens; the search ends when no open beam
    scores better than the worst of num_beams ended ones. Returns (sequences (B, T + n), scores
    (B,)), rows that ended early filled with eos_id. ValueError for settings out of range.
    """
    check_sampling(idx, max_new_tokens, 0.0)
    check_beams(model.config, num_beams, length_penalty)
    V, block_size, wte = model.num_tokens, model.config.block_size, model.transformer.wte
    (B, T), device, end = idx.shape, idx.device, idx.size(1) + max_new_tokens
    stop = idx.new_tensor([] if eos_id is None else eos_id).view(-1)
    sequences = idx.new_full((B, num_beams, end), stop[0] if len(stop) else 0)
    sequences[:, :, :T] = idx[:, None]
    scores = torch.zeros(B, num_beams, device=device)  # of the open beams
    scores[:, 1:] = -1e9  # all start alike: only the first counts
    ended, ended_scores = sequences.clone(), torch.full_like(scores, -1e9)
    ended_ends = torch.full((B, num_beams), end, device=device)  # where the ended ones end
    improves = torch.ones(B, 1, dtype=torch.bool, device=device)
    first_row = torch.arange(B, device=device)[:, None] * num_beams
    was_training = model.training
    model.eval()
    cache = KVCache(model.config, B, min(block_size, end), device, wte.weight.dtype)
    logits = model.next_logits(idx[:, -block_size:], None, cache)  # each prompt once,
    logits = logits.repeat_interleave(num_beams, 0)  # then a row for each beam
    cache.k, cache.v = (kept.repeat_interleave(num_beams, 1) for kept in (cache.k, cache.v))
    for pos in range(T, end):
        length, last = pos + 1 - T, pos == end - 1
        total = F.log_softmax(logits.float(), -1).view(B, num_beams, V) + scores[:, :, None]
        # so many candidates that there are enough to go on with if all the best ones end
        count = min(max(2, 1 + len(stop)) * num_beams, num_beams * V)
        top, flat = total.flatten(1).topk(count)
        parent, token = flat // V, flat % V
        candidates = sequences.take_along_dim(parent[:, :, None], 1)
        candidates[:, :, pos] = token
        stops = torch.isin(token, stop) | last
        # only the best num_beams candidates may end, and only where that can still improve
        final = torch.where(stops & improves, top / length ** length_penalty, -1e9)
        final[:, num_beams:] = -1e9
        ended_scores, best = torch.cat([ended_scores, final], 1).topk(num_beams)
        ended = torch.cat([ended, candidates], 1).take_along_dim(best[:, :, None], 1)
        ended_ends = torch.cat([ended_ends, torch.full_like(token, pos + 1)], 1).gather(1, best)
        scores, best = torch.where(stops, top - 1e9, top).topk(num_beams)
        sequences = candidates.take_along_dim(best[:, :, None], 1)
        worst = torch.where(ended_scores > -1e8, ended_scores.amin(1, keepdim=True), -1e9)
        better = scores[:, :1] / length ** length_penalty > worst
        improves = improves & better.any(1, keepdim=True)
        if last or not improves.any():
            break
        reorder(cache, (parent.gather(1, best) + first_row).flatten())
        chunk = sequences[:, :, pos].reshape(-1, 1)
        if cache.length == block_size:  # the window moves on, as in GPT.stream
            cache.length = 0
            chunk = sequences[:, :, pos + 1 - (block_size + 1) // 2:pos + 1].flatten(0, 1)
        logits = model.next_logits(chunk, None, cache)
    model.train(was_training)
    return ended[:, 0, :ended_ends[:, 0].max()], ended_scores[:, 0]
