"""An accelerated model computes what the plain one does: loss, gradients, names; in less memory."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F

import ops
from device import Device
from lora import add_lora, merge
from model import GPT, GPTConfig


@pytest.fixture
def always(monkeypatch):
    """Every part of it is used, however small the model."""
    for name in ops.THRESHOLDS:
        monkeypatch.setitem(ops.THRESHOLDS, name, 0)


def make(dtype=torch.float64, **options) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 300, "vocab_size": 97, "n_layer": 2, "n_head": 2,
                             "n_embd": 32} | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def batch(B=3, T=280, V=97):
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, :270], targets[1, ::3] = -100, -100  # a chunk without targets, others with some
    return ids[:, :-1], targets


def gradients(model, x, y, scale=3.0):
    loss = model(x, y)[1]
    (scale * loss).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def check_equal(plain, fast, x, y, atol=1e-12):
    (a, wanted), (b, found) = gradients(plain, x, y), gradients(fast, x, y)
    assert abs(a - b) < atol
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert found[name].shape == gradient.shape
            assert (found[name] - gradient).abs().max() <= atol, name


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"bias": False},
                                     {"activation": "gelu"}])
def test_the_same_loss_and_gradients(always, options):
    plain, (x, y) = make(**options), batch()
    fast = ops.accelerate(make(**options))
    assert [*fast.state_dict()] == [*plain.state_dict()]
    assert ops.accelerate(fast) is fast  # once is enough
    check_equal(plain, fast, x, y)
    check_equal(plain, copy.deepcopy(fast), x, y)
    assert torch.equal(plain(x)[0], fast(x)[0])


def test_frozen_parts_and_what_the_head_takes_no_part_in(always):
    x, y = batch()
    for names in (["wte"], ["h.0"], ["h.", "ln_f", "wpe"]):
        plain, fast = make(), ops.accelerate(make())
        for model in (plain, fast):
            for name, p in model.named_parameters():
                p.requires_grad_(not any(part in name for part in names))
        check_equal(plain, fast, x, y)
    plain, fast = make(), ops.accelerate(make())
    for model in (plain, fast):  # hidden states alone, and two forward passes before one backward
        (model.hidden(x).square().mean() + model(x[:1], y[:1])[1] + model.hidden(x[1:]).mean()).backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        assert (p.grad - q.grad).abs().max() < 1e-12, name


def test_a_changed_loss_and_attention_count(always, monkeypatch):
    """What a fork writes into GPT.loss, GPT.logits and Attention.attend."""
    import model as module
    plain_loss, attend = module.GPT.loss, module.Attention.attend

    def loss(self, x, targets):
        logits = self.logits(x)
        smooth = F.cross_entropy(logits, targets, label_smoothing=0.2)
        return smooth + plain_loss(self, x, targets) + F.cross_entropy(  # its weight, too, besides
            x @ self.transformer.wte.weight.T * 0.5, targets)

    def window(self, q, k, v, mask):
        T, S = q.size(2), k.size(2)
        far = torch.ones(T, S, dtype=torch.bool).tril(S - T - 5)
        causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return attend(self, q, k, v, causal & ~far)

    x, y = batch()
    before = make()(x, y)[1]
    monkeypatch.setattr(module.GPT, "loss", loss)
    monkeypatch.setattr(module.Attention, "attend", window)
    check_equal(make(), ops.accelerate(make()), x, y)
    assert abs(before - make()(x, y)[1]) > 0.1


def test_adapters_on_an_accelerated_model(always):
    x, y = batch()
    models = make(), ops.accelerate(make())
    for model in models:
        torch.manual_seed(1)
        add_lora(model, 4, 8.0)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p, std=0.2)
    check_equal(*models, x, y)
    merge(models[1])
    assert abs(models[0](x, y)[1] - models[1](x, y)[1]) < 1e-12


def test_what_it_cannot_do(always):
    x, y = batch()
    model = ops.accelerate(make())
    loss = model(x, y)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    p = model.transformer.ln_f.weight
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x, y)[1], p, create_graph=True)
    assert model(x, torch.full_like(y, -100))[1].isnan()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        model(x, y + 97)


def test_a_large_vocabulary_makes_no_logits_at_once(monkeypatch):
    model, rows = ops.accelerate(make(vocab_size=50257, block_size=400)), []
    textbook = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *a: rows.append(len(x)) or textbook(x, *a))
    x, y = batch(2, 300, 50257)
    model(x, y)[1].backward()
    assert max(rows) == ops.ROWS and sum(rows) >= 300
    with torch.no_grad():
        model(x[:, :9], y[:, :9])
    assert rows[-1] == 18


@pytest.mark.skipif(not ops.ONEDNN, reason="oneDNN's products are for x86 CPUs")
@pytest.mark.parametrize("size", [(512, 1024), (256, 2048)])
@pytest.mark.parametrize("frozen, bias", [(False, True), (True, True), (False, False)])
def test_large_products_by_onednn(size, frozen, bias):
    torch.manual_seed(0)
    C, out = size
    leaves = [torch.randn(2, 128, C, requires_grad=True),
              torch.randn(out, C, requires_grad=not frozen),
              *[torch.randn(out, requires_grad=not frozen)] * bias]
    scale, found = torch.randn(2, 128, out), []
    for own in (leaves, [leaf.detach().double().requires_grad_(leaf.requires_grad)
                         for leaf in leaves]):
        y = ops.linear(*own)
        by_onednn = "OneDNN" in str(y.grad_fn.next_functions[0][0])
        assert by_onednn == (y.dtype == torch.float32)
        y += 0.5  # as LoRA does
        y.backward(scale.to(y.dtype).transpose(0, 1).contiguous().transpose(0, 1))
        grown = [leaf for leaf in own if leaf.requires_grad]
        first = torch.autograd.grad(ops.linear(*own).square().sum(), grown, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), grown)
        found.append([y, *(leaf.grad for leaf in grown), *first, *second])
    for ours, exact in zip(*found):
        assert ours.shape == exact.shape and (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (leaves[1].grad is None) == frozen


def test_wide_blocks_keep_less_for_the_backward_pass(monkeypatch):
    """LayerNorms and GELU are computed again for it: the same gradients, bit for bit."""
    x, y = batch(2, 16)
    found, outputs = [], []
    gelu = F.gelu

    def watched(*args, **kwargs):
        result = gelu(*args, **kwargs)
        outputs.append(weakref.ref(result))
        return result
    monkeypatch.setattr(F, "gelu", watched)
    for accelerated in (True, False):
        model = make(torch.float32, n_embd=512)
        if accelerated:
            ops.accelerate(model)
        loss = model(x, y)[1]
        assert [output() is not None for output in outputs] == [not accelerated] * 2
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
        assert len(outputs) == (4 if accelerated else 2)
        outputs.clear()
    assert all((a == b).all() for a, b in zip(*found))


def test_blockwise_attention(monkeypatch):
    """Without dropout it is torch's, in several blocks; with it, each weight is dropped with that
    probability for itself, and the others make up for them."""
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, 3, 2, 300, 16, dtype=torch.float64).requires_grad_()
    found = []
    for attention in (F.scaled_dot_product_attention, ops.blockwise_attention):
        y = attention(q, k, v, None, 1e-9, is_causal=True)
        found.append([y, *torch.autograd.grad(y, [q, k, v], dy)])
    for wanted, got in zip(*found):
        torch.testing.assert_close(got, wanted, atol=1e-7, rtol=0)
    same, T = torch.zeros(1, 3, 300, 8), 300  # all scores alike: a row's weights are 1 / its number
    each = torch.eye(T).expand(1, 3, T, T)  # so that y are the weights
    weights = ops.blockwise_attention(same, same, each, None, 0.3, is_causal=True)
    seen = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    assert ((weights == 0) | (weights - seen / 0.7).abs().lt(1e-6)).all()
    kept = weights[..., seen > 0] > 0  # (1, 3, weights)
    assert kept.float().mean() == pytest.approx(0.7, abs=0.005) and kept.float().std() > 0.4
    assert (kept[0, 0] & kept[0, 1]).float().mean() == pytest.approx(0.49, abs=0.007)
    low = [t.detach().bfloat16() for t in (q, k, v)]
    torchs = F.scaled_dot_product_attention(*low, is_causal=True)
    assert not torch.equal(ops.blockwise_attention(*low, is_causal=True), torchs)
    monkeypatch.setattr(ops, "KEPT", 0)  # too many weights to keep
    assert torch.equal(ops.blockwise_attention(*low, is_causal=True), torchs)


@pytest.mark.parametrize(("dropout", "dtype", "own"), [
    (0.0, torch.float32, set()), (0.0, torch.bfloat16, {"aten::_softmax"}),
    (0.1, torch.float32, {"aten::_softmax", "aten::random_"})])
def test_training_goes_through_blockwise_attention(dropout, dtype, own):
    """It calls what torch's attention does not call then, and only while it trains."""
    from torch.profiler import profile
    model, (x, y) = ops.accelerate(make(torch.float32, dropout=dropout)), batch()
    for trains in (True, False):
        with torch.set_grad_enabled(trains), torch.autocast(
                "cpu", dtype, enabled=dtype != torch.float32), profile() as events:
            model.train(trains)(x, y)
        called = {event.key for event in events.key_averages()}
        assert called & {"aten::_softmax", "aten::random_"} == (own if trains else set())


def test_bfloat16_autocast(always):
    """Its gradients are near float32's; the head's products are in bfloat16."""
    model, found = ops.accelerate(make(torch.float32, vocab_size=1000)), []
    x, y = batch(3, 64, 1000)
    y[0] = x[0]
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", kind, enabled=kind == torch.bfloat16):
            loss = model(x, y)[1]
            assert model.logits(model.hidden(x)).dtype == kind
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    assert abs(found[0][0] - found[1][0]) < 0.05
    for a, b in zip(found[0][1:], found[1][1:]):
        assert a.dtype == b.dtype and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_compiled_it_is_the_plain_model(always):
    torch._dynamo.reset()
    model, (x, y) = ops.accelerate(make()), batch(2, 20)
    wanted, _ = gradients(make(), x, y)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(x, y)[1]
    assert abs(loss - wanted) < 1e-12


def test_blocks_computed_again_have_the_same_gradients(always):
    ids = torch.randint(50, (3, 17))
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Device("cpu").place(GPT(GPTConfig(16, 50, 2, 2, 32, dropout=0.2)), again).train()
        torch.manual_seed(1)
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        gradients.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
