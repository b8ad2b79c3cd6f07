"""What decoding needs beyond GPT.generate: beams, streamed text, weights laid out for speed.

On a CPU, one-token steps are bound by reading the weights: `prepare` replaces each linear layer by
one that reads them faster (oneDNN's own layout) or reads fewer bytes (int8). On a GPU they are bound
by launching kernels: it records a step once and replays it.
"""

import codecs

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, KVCache, check_sampling
from ops import onednn


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's blocked layout, for CPUs."""

    def __init__(self, weight, bias):
        super().__init__()
        # laid out for 8 rows: of 1, 8, 32 and 512 the fastest, or nearly, for 1 to 16 of them
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x):
        return onednn(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, symmetric, one scale for each output.

    Few rows go through the int8 kernel, activations in bfloat16; many (a prompt) are bound by
    arithmetic, not by reading, and go through float weights made on the fly.
    """

    kernel_rows = 32

    def __init__(self, weight, bias):
        super().__init__()
        weight = weight.detach().float().contiguous()
        self.scale = (weight.abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if len(rows) > self.kernel_rows or rows.size(1) % 16:  # the kernel reads 16 at a time
            weight = self.weight.to(x.dtype).mul_(self.scale.to(x.dtype)[:, None])
            return F.linear(x, weight, self.bias)
        y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16().contiguous(), self.weight,
                                                self.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class GraphedStep:
    """GPT.next_logits with one-token steps of fixed shape, recorded once a text as a CUDA graph.

    Position and mask lie on the device and every step attends to the whole cache, so that no shape
    changes and nothing waits for the host. Prompts, and whatever else is not one token behind a
    cache, take the usual way.
    """

    def __init__(self, model: GPT, compile: bool = False):
        self.model, self.cache, self.length = model, None, 0
        self.step = torch.compile(self.one_token) if compile else self.one_token

    def __call__(self, idx, attention_mask, cache: KVCache):
        if idx.size(1) > 1 or not cache.length:
            return GPT.next_logits(self.model, idx, attention_mask, cache)
        if cache is not self.cache:
            self.record(idx, cache)
        if cache.length != self.length:  # a text begins, or its window has moved
            self.fill(idx, attention_mask, cache)
        self.token.copy_(idx)
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        self.length = cache.length = cache.length + 1
        return self.out

    def one_token(self):
        transformer = self.model.transformer
        self.seen.index_fill_(3, self.at, True)
        x = transformer.wte(self.token) + transformer.wpe(self.pos)
        for layer, block in enumerate(transformer.h):
            x = block(x, self.seen, layer, self.cache)
        self.at.add_(1)
        self.pos.add_(1)
        return self.model.logits(transformer.ln_f(x)[:, -1])

    def run(self):
        self.cache.at = self.at
        try:
            self.out = self.step()
        finally:
            self.cache.at = None

    def record(self, idx, cache):
        B, S = idx.size(0), cache.k.size(3)
        self.cache, self.length, self.graph = cache, 0, None
        self.token = torch.zeros_like(idx)
        self.pos = torch.zeros_like(idx)  # (B, 1), of each row's next token
        self.at = idx.new_zeros(1)  # its place in the cache
        self.seen = torch.zeros(B, 1, 1, S, dtype=torch.bool, device=idx.device)
        if idx.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm up, as recording asks for
                self.at.fill_(cache.length)
                self.run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run()
            self.graph = graph

    def fill(self, idx, attention_mask, cache):
        """The position and mask of what the cache holds."""
        start = cache.length
        self.at.fill_(start)
        self.seen.fill_(False)
        if attention_mask is None:
            self.seen[..., :start] = True
            self.pos.fill_(start)
        else:
            real = attention_mask[:, :start].bool()
            self.seen[..., :start] = real[:, None, None]
            self.pos.copy_(real.sum(1, keepdim=True))


@torch.no_grad()
def prepare(model: GPT, quantize: str | None = None, compile: bool = False) -> GPT:
    """Makes a model decode faster, in place; it can be neither trained nor saved afterwards.

    quantize: None keeps every weight as it is and, on a CPU, only changes their layout; "int8"
    rounds the weights of all linear layers, the head included. On a GPU one-token steps become a
    CUDA graph, with `compile` of fused kernels, which takes half a minute. ValueError for another.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is unknown: int8, or None for the weights as they are")
    weight = model.transformer.wte.weight
    if weight.device.type == "cuda":
        model.next_logits = GraphedStep(model, compile)
    packs = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32 or weight.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # which builds without oneDNN have not
    if quantize and weight.device.type != "cpu":
        raise ValueError("quantize=int8 is for CPUs; on a GPU --dtype=bfloat16 serves")
    if quantize is None and not packs:
        return model
    kind = Int8Linear if quantize else PackedLinear
    for part in [part for block in model.transformer.h for part in (block.attn, block.mlp)]:
        for name, linear in list(part.named_children()):
            setattr(part, name, kind(linear.weight, linear.bias))
    model.lm_head = kind(weight if model.config.tie_word_embeddings else model.lm_head.weight, None)
    return model.eval()


def left_padded(prompts: list[list[int]], device):
    """(ids, attention mask), both (B, T), of prompts of unequal length, for `generate`."""
    T = max(map(len, prompts))
    idx = torch.tensor([[-1] * (T - len(prompt)) + prompt for prompt in prompts], device=device)
    return idx.clamp(min=0), (idx >= 0).long()


def stream_text(model: GPT, tokenizer, idx, *args, **options):
    """Yields (text, tokens so far) of `model.stream` for one prompt idx (1, T), as it comes; bytes
    that are not yet a whole character wait. The stop token is not part of the text."""
    utf8, count = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token in model.stream(idx, *args, **options):
        count += 1
        token = token.item()
        yield ("" if token == tokenizer.eos_id else utf8.decode(tokenizer.decode_bytes([token])),
               count)
    yield utf8.decode(b"", final=True), count


def check_beams(config, num_beams: int, length_penalty: float):
    """ValueError, with the range, for a setting of beam search out of it."""
    if not 1 <= num_beams <= config.vocab_size:
        raise ValueError(f"num_beams must be in 1 … {config.vocab_size} (the vocabulary), got {num_beams}")
    if not abs(length_penalty) <= 20:
        raise ValueError(f"length_penalty must be in -20 … 20, got {length_penalty}")


@torch.inference_mode()
def beam_search(model: GPT, idx, max_new_tokens: int, num_beams: int, length_penalty: float = 1.0,
                eos_id: int | None = None):
    """The likeliest continuation of each prompt idx (B, T) that a beam search finds.

    By the rules of transformers' `generate(num_beams=…, early_stopping=False)`: a hypothesis ends
    at eos_id or at max_new_tokens and scores (sum of log-probabilities) / length**length_penalty,
    its length counted in new tokens; the search ends when no open beam scores better than the worst
    of num_beams ended ones. Returns (sequences (B, T + n), scores (B,)), rows that ended early
    filled with eos_id. ValueError for settings out of range.
    """
    check_sampling(model.config, idx, max_new_tokens, 0.0, None, None)
    check_beams(model.config, num_beams, length_penalty)
    V, (B, T) = model.config.vocab_size, idx.shape
    device, block_size, end = idx.device, model.config.block_size, T + max_new_tokens
    keep = 2 * num_beams  # candidates: enough to go on with if all the best ones end
    sequences = idx.new_full((B, num_beams, end), 0 if eos_id is None else eos_id)
    sequences[:, :, :T] = idx[:, None]
    ended = sequences.clone()
    scores = torch.zeros(B, num_beams, device=device)  # of the open beams
    scores[:, 1:] = -1e9  # all start alike: only the first counts
    ended_scores = torch.full((B, num_beams), -1e9, device=device)
    lengths = torch.full((B, num_beams), end, device=device)  # of the ended ones
    improves = torch.ones(B, 1, dtype=torch.bool, device=device)
    first_row = torch.arange(B, device=device)[:, None] * num_beams
    was_training = model.training
    model.eval()
    window = idx[:, -block_size:]  # prefill each prompt once, then a row for each beam
    start = KVCache.for_model(model, B, min(block_size, window.size(1)))
    logits = model.next_logits(window, None, start).repeat_interleave(num_beams, 0)
    cache = KVCache.for_model(model, B * num_beams, min(block_size, end))
    cache.length = start.length
    cache.k[:, :, :, :start.length] = start.k.repeat_interleave(num_beams, 1)
    cache.v[:, :, :, :start.length] = start.v.repeat_interleave(num_beams, 1)
    for at in range(T, end):
        total = F.log_softmax(logits.float(), -1).view(B, num_beams, V) + scores[:, :, None]
        top, flat = total.flatten(1).topk(keep)  # (B, keep)
        parent, token = flat // V, flat % V
        candidates = sequences.gather(1, parent[:, :, None].expand(-1, -1, end))
        candidates[:, :, at] = token
        stops = torch.full_like(token, at == end - 1, dtype=torch.bool)
        if eos_id is not None:
            stops |= token == eos_id
        # only the best num_beams candidates may end, and only where that can still improve
        final = torch.where(stops & improves, top / (at + 1 - T) ** length_penalty, -1e9)
        final[:, num_beams:] = -1e9
        ended_scores, best = torch.cat([ended_scores, final], 1).topk(num_beams)
        ended = torch.cat([ended, candidates], 1).gather(1, best[:, :, None].expand(-1, -1, end))
        lengths = torch.cat([lengths, torch.full_like(token, at + 1)], 1).gather(1, best)
        scores, best = torch.where(stops, top - 1e9, top).topk(num_beams)
        sequences = candidates.gather(1, best[:, :, None].expand(-1, -1, end))
        worst = torch.where(ended_scores > -1e8, ended_scores.amin(1, keepdim=True), -1e9)
        improves = improves & (scores[:, :1] / (at + 1 - T) ** length_penalty > worst).any(
            1, keepdim=True)
        if at == end - 1 or not improves.any():
            break
        cache.reorder((parent.gather(1, best) + first_row).flatten())
        chunk = sequences[:, :, at].reshape(-1, 1)
        if cache.length == block_size:  # the window moves on, as in GPT.stream
            cache.length = 0
            chunk = sequences[:, :, at + 1 - (block_size + 1) // 2:at + 1].flatten(0, 1)
        logits = model.next_logits(chunk, None, cache)
    model.train(was_training)
    return ended[:, 0, :lengths[:, 0].max()], ended_scores[:, 0]
