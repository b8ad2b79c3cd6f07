"""AdamW against PyTorch's and CS224n's values, Muon against its definition and PyTorch's."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lora import add_lora
from model import GPT, GPTConfig
from optim import AdamW, Muon, build_optimizer, orthogonalize


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def losses(model, optimizer, steps=50):
    """Trains on a fixed stream of numbers; returns the parameters, flat."""
    stream = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 5, dtype=torch.float64, generator=stream)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_adamw_reaches_cs224n_values():
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    for _ in range(1000):
        optimizer.zero_grad()
        x = torch.from_numpy(rng.uniform(size=3).astype(np.float32))
        (model(x) - torch.stack([x[0] + x[1], -x[2]])).square().sum().backward()
        optimizer.step()
    want = [[0.55482787, 0.86665666, 0.07291982], [-0.44724506, -0.2951228, -0.2717272]]
    assert (model.weight - torch.tensor(want)).abs().max() < 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_pytorch(weight_decay):
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": weight_decay}
    a, b, c = net(), net(), net()
    ours = losses(a, AdamW(a.parameters(), decay_first=True, **options))
    theirs = losses(b, torch.optim.AdamW(b.parameters(), **options))
    assert (ours - theirs).abs().max() < 1e-12
    after = losses(c, AdamW(c.parameters(), **options))  # decaying last is something else
    assert ((after - theirs).abs().max() > 1e-6) == (weight_decay > 0)


def test_adamw_without_bias_correction():
    p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=1e-8, correct_bias=False)
    p.grad = torch.tensor([3.0, -0.5], dtype=torch.float64)
    optimizer.step(lambda: torch.zeros(()))
    moved = 0.1 * 0.1 * p.grad / (0.1 * p.grad.abs() + 1e-8)  # m = g / 10, sqrt(v) = |g| / 10
    assert (p.detach() - (torch.tensor([1.0, -2.0]) - moved)).abs().max() < 1e-12


@pytest.mark.parametrize("options, word", [
    ({"lr": -1.0}, "learning rate"), ({"betas": (1.0, 0.9)}, "beta1"), ({"betas": (0.9, -0.1)}, "beta2"),
    ({"eps": -1e-8}, "eps"), ({"weight_decay": -0.1}, "weight_decay")])
def test_settings_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        AdamW([torch.zeros(2, requires_grad=True)], **options)
    groups = [{"params": [torch.zeros(2, 2, requires_grad=True)], "parts": 1},
              {"params": [torch.zeros(2, requires_grad=True)]}]
    with pytest.raises(ValueError, match=word):
        Muon(groups, **{"lr": 0.1} | options)


@pytest.mark.parametrize("shape", [(32, 32), (96, 24), (24, 96)])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize(("dtype", "off_diagonal"), [(torch.float64, 1e-3), (torch.float32, 0.05)])
def test_singular_values_come_into_band(shape, scale, dtype, off_diagonal):
    torch.manual_seed(0)
    G = torch.randn(3, *shape, dtype=dtype) * scale
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    O = orthogonalize(G)
    values = torch.linalg.svdvals(O)
    kept = S > 0.02 * S.amax()  # below, five steps do not get there
    assert values[kept].min() > 0.65 and values.max() < 1.25
    # in the same singular directions
    inner = U.mT @ O @ Vh.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < off_diagonal
    assert (orthogonalize(G[1:2]) - O[1:2]).abs().max() < off_diagonal / 10  # whatever is in the batch


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_muon_is_pytorchs_but_for_bfloat16(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    vector = torch.zeros(2, requires_grad=True)
    mine = Muon([{"params": [ours], "parts": 1}, {"params": [vector]}], lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.02 and moved > 0.1


def tiny(optimizer="muon", **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 64, 2, 2, 32))
    return model, build_optimizer(model, optimizer, 0.02, 0.1, (0.9, 0.95), **options)


def train(model, optimizer, steps, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(64, (4, 17), generator=stream)
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_which_parameters_get_what():
    model, optimizer = tiny(adamw_learning_rate=0.005)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = group.get("parts"), group["peak"], group["weight_decay"]
    assert len(seen) == len(names)
    for name, kind in seen.items():
        if name.endswith(("wte.weight", "wpe.weight")):
            assert kind == (None, 0.005, 0.1), name
        elif "ln_" in name or name.endswith("bias"):
            assert kind == (None, 0.005, 0.0), name
        else:
            assert kind == (3 if "c_attn" in name else 1, 0.02, 0.1), name
    _, plain = tiny("adamw")
    assert sum(len(g["params"]) for g in plain.param_groups) == len(names)
    with pytest.raises(ValueError, match="adamw, muon"):
        tiny("sgd")


def test_muon_of_adapters_alone():
    """All of them are matrices of the blocks: nothing is left to AdamW."""
    model = tiny()[0].requires_grad_(False)
    add_lora(model, 2, 4.0)
    optimizer = build_optimizer(model, "muon", 0.02, 0.1, (0.9, 0.95))
    assert all("parts" in group for group in optimizer.param_groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in trained]
    for p in trained:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not any(map(torch.equal, before, trained))


def test_query_key_and_value_are_orthogonalised_apart():
    torch.manual_seed(0)
    weight = torch.randn(24, 8, dtype=torch.float64)
    gradient = torch.randn(24, 8, dtype=torch.float64) * torch.logspace(-2, 2, 24)[:, None]
    stacked = weight.clone().requires_grad_()
    apart = [w.clone().requires_grad_() for w in weight.chunk(3)]
    vector = torch.zeros(2, requires_grad=True)
    one = Muon([{"params": [stacked], "parts": 3}, {"params": [vector]}], lr=0.1)
    three = Muon([{"params": apart, "parts": 1}, {"params": [vector.detach().requires_grad_()]}], lr=0.1)
    stacked.grad = gradient
    for p, g in zip(apart, gradient.chunk(3)):
        p.grad = g
    one.step()
    three.step()
    assert (stacked - torch.cat(apart)).abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"3 stacked matrices.*\(8, 8\)"):
        Muon([{"params": [torch.zeros(8, 8, requires_grad=True)], "parts": 3},
              {"params": [vector]}], lr=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_through_a_file(tmp_path, optimizer):
    model, update = tiny(optimizer)
    train(model, update, 5)
    torch.save([model.state_dict(), update.state_dict()], tmp_path / "state.pt")
    want = train(model, update, 5, seed=1)
    again, other = tiny(optimizer)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert all((a == b).all() for a, b in zip(want, train(again, other, 5, seed=1)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_found_inf_changes_nothing(optimizer):
    model, update = tiny(optimizer)
    plain, other = tiny(optimizer)
    train(model, update, 3)
    before = train(plain, other, 3)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    update.grad_scale, update.found_inf = None, torch.ones(())
    update.step()
    assert all((a == b).all() for a, b in zip(before, model.parameters()))
    update.found_inf = torch.zeros(())
    after = zip(train(model, update, 3, seed=1), train(plain, other, 3, seed=1))
    assert all((a - b).abs().max() < 1e-6 for a, b in after)  # nor its momentum


def muon_ranks(rank, folder, results):
    """What a rank makes of three steps of Muon with 2, 3 and 4 ranks."""
    torch.set_num_threads(1)
    gather = dist.all_gather

    def strict(shares, own):
        assert own.is_contiguous()  # which NCCL asks for, and Gloo does not
        gather(shares, own)

    dist.all_gather = strict
    for world in (2, 3, 4):
        if rank < world:
            store = dist.FileStore(f"{folder}/{world}", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            results[world, rank] = muon_steps()
            dist.destroy_process_group()


def muon_steps():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 16, 3, 2, 16))
    optimizer = build_optimizer(model, "muon", 0.05, 0.1, (0.9, 0.95))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_muon_shared_over_ranks_equals_one(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(muon_ranks, (str(tmp_path), results), nprocs=4)
        results = dict(results)
    want = muon_steps()
    assert len(results) == 2 + 3 + 4
    for (world, _), found in results.items():
        assert all(torch.equal(a, b) for a, b in zip(found, results[world, 0]))  # all ranks alike
        assert all((a - b).abs().max() < 2e-3 for a, b in zip(found, want))  # bfloat16's rounding
