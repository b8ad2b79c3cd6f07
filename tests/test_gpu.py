"""What a GPU would run: on fake tensors of cuda:0 where there is none, and on it where there is."""

import copy
import ctypes
import json
import os
import time
import traceback
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import HERE, check_equal, defaults, give, rows, start, untimed
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decode
import finetune_cls
import finetune_instruct
import run
import sonnet
import train
from data import write_data
from device import Device
from hf import load_torch
from model import GPT, GPTConfig
from run import Run
from tokenizer import open_tokenizer

REAL = torch.cuda.is_available()
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
CUDA, META = 1, 14  # of c10::DeviceType
TINY = ["--block_size=32", "--batch_size=2", "--total_batch_tokens=128", "--n_layer=2",
        "--n_head=2", "--n_embd=64", "--log_interval=100", "--compile=False", "--sample_tokens=0"]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
aten = torch.ops.aten
cuda = pytest.mark.skipif(not REAL, reason="needs a GPU")
for script in (train, finetune_cls, finetune_instruct, sonnet):
    defaults(script)  # now, before a test changes them


class Watch(TorchDispatchMode):
    """Notes the lines at which the host waits for a GPU (a number is read, a copy is not
    asynchronous), and the most bytes that are live. `flag`: what a fake bool is read as."""

    def __init__(self):
        super().__init__()
        self.lines, self.flag, self.live, self.now, self.most = [], True, set(), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in (aten._local_scalar_dense.default, aten.item.default):
            self.note(args[0].is_cuda)
            return self.flag if args[0].dtype == torch.bool else 1
        out = op(*args, **kwargs)
        if op in (aten._to_copy.default, aten.copy_.default):
            source = args[1 if op is aten.copy_.default else 0]
            later = kwargs.get("non_blocking") or args[2:] == (True,)
            self.note(source.device.type != out.device.type and source.dim() > 0 and not later)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type in ("cuda", "meta"):
                self.count(tensor.untyped_storage())
        return out

    def note(self, waits: bool):
        frames = [frame for frame in traceback.extract_stack() if waits]
        lines = [f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames
                 if os.path.dirname(frame.filename) == str(HERE)]
        self.lines += lines[-1:]

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live.add(key)
            self.now, self.most = self.now + size, max(self.most, self.now + size)
            weakref.finalize(storage, self.freed, key, size)

    def freed(self, key, size):
        self.live.discard(key)
        self.now -= size


def to(model, device):
    """nn.Module.to, which cannot put fake parameters into the place of others."""
    for module in model.modules():
        for name, p in module._parameters.items():
            moved = p if p is None else torch.nn.Parameter(p.detach().to(device), p.requires_grad)
            module._parameters[name] = moved
    return model


@pytest.fixture
def gpu(monkeypatch):
    """The Watch of fake tensors on cuda:0, whose device guard is that of meta, which does nothing;
    of a real GPU nothing is noted."""
    precision = torch.get_float32_matmul_precision()
    if REAL:
        yield SimpleNamespace(lines=[])
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(precision)
        return
    try:
        library = os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")
        registry = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(library), GUARDS)
    except (OSError, ValueError):
        pytest.skip("this torch has no registry of device guards where it is looked for")
    before, registry[CUDA] = registry[CUDA], registry[CUDA] or registry[META]
    for name, value in {"is_bf16_supported": True, "set_device": None, "get_device_name": "a fake",
                        "get_device_capability": (9, 0), "graph": nullcontext(),
                        "stream": nullcontext(), "Stream": Mock(), "current_stream": Mock(),
                        "CUDAGraph": Mock()}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which fakes lack
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # nor is there autograd
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda _: torch.no_grad())  # nor torch.tensor
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:  # real ones come of threads
        yield watch
    torch.set_float32_matmul_precision(precision)
    registry[CUDA] = before


@pytest.fixture
def loop(gpu, monkeypatch, tmp_path):
    """loop(script, *argv): the lines at which updates 2 to 4 of its own loop wait for the GPU; a
    real one raises an error there."""
    plain = Run.update

    def update(run, *args, **more):
        for p in run.parameters:
            if p.requires_grad and not REAL:
                p.grad = torch.zeros_like(p)
        plain(run, *args, **more)
        if run.step == 1:
            gpu.lines.clear()
            if REAL:
                torch.cuda.set_sync_debug_mode("error")
        if run.step == 4:
            raise InterruptedError

    def begin(script, *argv):
        found = GPT(GPTConfig(128, 257, 2, 2, 64)), open_tokenizer("bytes")
        for name, value in (("load_model", found), ("save_best", None), ("save_adapter", None)):
            monkeypatch.setattr(script, name, lambda *_, value=value, **__: value, raising=False)
        give(script, f"--out_dir={tmp_path}/run", "--log_interval=100", "--device=cuda", *argv)
        with pytest.raises(InterruptedError):
            script.main()
        return gpu.lines
    monkeypatch.setattr(Run, "update", update)
    return begin


@pytest.fixture
def data(tmp_path) -> str:
    texts = [("once upon a time " * 40, 0, 680)] * 12
    write_data(f"{tmp_path}/data", open_tokenizer("bytes"), {"train": texts, "val": texts[:1]})
    return f"--dataset={tmp_path}/data"


def texts_of(folder):
    """What scripts read: a table of classes, and records of instructions."""
    lines = ["text,label", *(f"{'good ' * (n % 9)},{n % 2}" for n in range(90))]
    (folder / "t.csv").write_text("\n".join(lines))
    records = [{"instruction": str(n), "input": "", "output": str(n)} for n in range(90)]
    (folder / "t.json").write_text(json.dumps(records))
    (folder / "form").write_text("{instruction}{input}{output}")
    return {train: [*TINY, "--max_steps=6", "--eval_interval=2", "--dropout=0.1"],
            finetune_cls: [f"--train_file={folder}/t.csv", "--batch_size=8"],
            finetune_instruct: [f"--data={folder}/t.json", f"--template={folder}/form"]}


# ---- no step waits for the GPU ----

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pretraining(loop, data, optimizer, dtype):
    assert loop(train, data, *TINY, f"--dtype={dtype}", f"--optimizer={optimizer}") == []


def test_a_wait_is_found(loop, data, monkeypatch):
    plain = Run.backward
    monkeypatch.setattr(Run, "backward", lambda run, loss, n: plain(run, loss * loss.item(), n))
    with pytest.raises(RuntimeError, match="synchroniz") if REAL else nullcontext():
        assert len(loop(train, data, *TINY)) == 6  # two micro-batches, three updates


@pytest.mark.parametrize("mode", ["full", "lora", "last_layer"])
def test_classification(loop, tmp_path, mode):
    argv = [*texts_of(tmp_path)[finetune_cls], "--init_from=weights", f"--mode={mode}", "--compile=False"]
    assert loop(finetune_cls, *argv) == []


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_instructions(loop, tmp_path, mode):
    argv = [*texts_of(tmp_path)[finetune_instruct], f"--mode={mode}", "--compile=False"]
    assert loop(finetune_instruct, *argv) == []


def test_sonnets(loop, tmp_path):
    for name, lines, count in zip(sonnet.FILES, (14, 3, 14, 3), (49, 2, 2, 2)):
        poem = "love,\n" * lines
        poems = [f"{100 - n}\n\n{poem}\n" for n in range(count)]
        (tmp_path / name).write_text("".join(poems))
    assert loop(sonnet, f"--data_dir={tmp_path}", "--allow_overlap") == []


# ---- evaluation and decoding ----

def split(tokens: int) -> SimpleNamespace:
    return SimpleNamespace(tokens=tokens, bytes=None, rows=lambda starts, n: np.zeros(
        (len(starts), n), np.int64))


def test_an_evaluation_is_small_and_waits_at_its_end_alone(gpu):
    give(train, "--block_size=1024", "--batch_size=64")
    env = Device("cuda", "bfloat16")
    model = env.place(GPT(GPTConfig(n_layer=1)))
    gpu.lines.clear()
    train.evaluate(model, split(40 * 1024 + 7), env)
    assert len(set(gpu.lines)) <= 1
    assert (env.peak_memory() if REAL else gpu.most) < 5e9  # 64 rows at once: 40 GB


def test_texts_of_a_graph_are_those_of_plain_steps(gpu):
    """The host waits once in 16 tokens, of which a fake CUDA graph records the kernels."""
    gpu.flag, texts = False, {}  # no row ends
    model = Device("cuda", "float32").place(GPT(GPTConfig(32, 1000, 2, 2, 64)))
    torch.set_float32_matmul_precision("highest")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.zeros(3, 7, dtype=torch.long, device="cuda")
    for graph in (False, True):
        if graph:
            decode.prepare(model)
        waits = []
        for new in (16, 48):  # the window moves
            gpu.lines.clear()
            generator = torch.Generator().manual_seed(1)
            texts[graph, new] = model.generate(idx, new, top_k=5, generator=generator)
            waits.append(len(gpu.lines))
        assert texts[graph, 48].shape == (3, 55)
        assert waits[1] - waits[0] == (0 if REAL else 2)
    assert not REAL or all(texts[False, new].equal(texts[True, new]) for new in (16, 48))


# ---- compiled ----

def step_bytes(checkpoint_activations: bool) -> int:
    """The most bytes of a forward and backward pass, with the weights, in float32."""
    env = Device("cpu", "float32")
    env.device = torch.device("meta")
    model = env.place(GPT(GPTConfig(256, 8000, 6, 4, 256)), checkpoint_activations)
    x = torch.zeros(8, 256, dtype=torch.long, device="meta")
    with Watch() as watch:
        model(x, x)[1].backward()
    return watch.most


def test_bytes_of_a_step():
    logits, block = 8 * 256 * 8000 * 4, 8 * 256 * 256 * 4
    plain, less = step_bytes(False), step_bytes(True)
    assert plain < 4 * logits + 6 * 30 * block
    assert less < 0.6 * plain


def graphs_of(model, dynamic=None):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=graphs, dynamic=dynamic, fullgraph=True), graphs


def test_training_and_evaluation_are_one_graph_each():
    give(train, "--block_size=32")
    model, env = GPT(GPTConfig(32, 1000, 2, 2, 64)), Device("cpu", "bfloat16")
    fast, graphs = graphs_of(env.place(model))
    ids = torch.randint(1000, (3, 33))
    for _ in range(3):
        for _ in range(2):
            with env.autocast():
                fast(ids[:, :-1], ids[:, 1:])[1].backward()
            model.zero_grad(set_to_none=True)
        train.evaluate(fast, split(40 * 32 + 7), env)
        model.generate(ids[:, :5], 3)  # eager
    assert graphs.frame_count == 2


def test_lengths_of_fine_tunings_are_few_graphs():
    """Of instructions: tests/test_finetune.py."""
    model = GPT(GPTConfig(64, 1000, 1, 2, 64))
    classifier = finetune_cls.Classifier(model, torch.zeros(2, 64))
    for net, collate in ((model, sonnet.collate), (classifier, finetune_cls.collate)):
        fast, graphs = graphs_of(net, dynamic=True)
        for n in range(2, 8):
            texts = [np.ones(n + i, int) for i in range(n)]
            fast(*collate(texts if net is classifier else [[*text] for text in texts], "cpu"))
        assert graphs.frame_count <= 3


@pytest.mark.parametrize("script", [train, finetune_cls, finetune_instruct])
def test_compiled_trainings_are_those_of_plain_ones(script, data, tmp_path, monkeypatch, capsys):
    start(train, *TINY, data, "--device=cpu", "--max_steps=1", f"--out_dir={tmp_path}/base")
    argv = [*texts_of(tmp_path)[script], "--device=cpu", "--dropout=0", "--log_interval=1"]
    argv += [data] if script is train else [f"--init_from={tmp_path}/base", "--epochs=1"]
    graphs, with_inductor = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **more: with_inductor(
        *args, backend=graphs, **more))
    found = []
    for compile in (False, True):
        torch._dynamo.reset()
        start(script, *argv, f"--compile={compile}", f"--out_dir={tmp_path}/{compile}")
        assert "torch.compile failed" not in capsys.readouterr().out
        assert (graphs.frame_count > 0) == compile
        found.append([row[key] for row in rows(tmp_path / f"{compile}")
                      for key in ("train_loss", "val_loss") if key in row])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) > 3


@pytest.mark.parametrize("order", ["wrapped first", "compiled first"])
def test_gradients_travel_during_the_backward_pass(order):
    """DDP cuts the graph into pieces, one for each bucket, where it is there when that is made."""
    torch._dynamo.reset()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        graphs = CompileCounterWithBackend("eager")
        model, x = GPT(GPTConfig(64, 8000, 4, 4, 512)), torch.randint(8000, (1, 64))
        fast = torch.compile(model, backend=graphs)
        if order == "compiled first":
            fast(x, x)[1].backward()
        DDP(fast, bucket_cap_mb=10)(x, x)[1].backward()
        assert (len(graphs.graphs) > 1) == (order == "wrapped first")
    finally:
        distributed.destroy_process_group()


# ---- a thread saves while training goes on ----

def test_files_that_a_thread_writes_are_those_written_at_once(data, tmp_path, monkeypatch):
    scripts, plain = texts_of(tmp_path), run.save_checkpoint
    scripts[train] += [data, "--learning_rate=0.01"]
    scripts[finetune_instruct] += ["--mode=lora", "--eval_interval=2"]
    start(train, *scripts[train], "--device=cpu", f"--out_dir={tmp_path}/base")

    def slowly(*args):
        time.sleep(0.1)  # the next updates are made meanwhile
        plain(*args)
    monkeypatch.setattr(run, "save_checkpoint", slowly)
    for script, argv in scripts.items():
        outs = [tmp_path / f"{script.__name__}_{name}" for name in ("once", "thread")]
        if script is not train:
            argv = [*argv, f"--init_from={tmp_path}/base"]
        for out, background in zip(outs, ((), ("cpu",))):
            monkeypatch.setattr(Run, "IN_BACKGROUND", background)
            start(script, *argv, "--device=cpu", f"--out_dir={out}")
        one, two = (load_torch(out / "ckpt.pt") for out in outs)
        check_equal(one["model"], two["model"])
        for number, state in one["optimizer"]["state"].items():
            check_equal(state, two["optimizer"]["state"][number])
        names = [sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in outs]
        assert names[0] == names[1] and untimed(outs[0]) == untimed(outs[1])
        for file in ("best/model.safetensors", "adapter/adapter_model.safetensors"):
            contents = [(out / file).read_bytes() for out in outs if (out / file).is_file()]
            assert contents[:1] == contents[1:]


def test_a_fault_of_the_thread_ends_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "IN_BACKGROUND", ("cpu",))
    monkeypatch.setattr(run, "save_checkpoint", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        start(train, *TINY, data, "--device=cpu", "--max_steps=6", "--eval_interval=2",
              f"--out_dir={tmp_path}/run")
    assert not (tmp_path / "run" / "ckpt.pt").exists()


# ---- on a GPU ----

@cuda
def test_float32_equals_the_cpu():
    model, x = GPT(GPTConfig(64, 1000, 2, 2, 64)), torch.randint(1000, (4, 64))
    env, found = Device("cuda", "float32"), []
    torch.set_float32_matmul_precision("highest")
    for net in (model, env.place(copy.deepcopy(model))):
        ids = x.to(net.transformer.wte.weight.device)
        loss = net(ids, ids)[1]
        loss.backward()
        found.append({name: p.grad.cpu() for name, p in net.named_parameters()})
        found[-1]["loss"] = loss.detach().cpu()
    check_equal(*found, atol=1e-5)


@cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted(data, tmp_path, optimizer, dtype):
    argv = [*TINY, data, "--device=cuda", f"--dtype={dtype}", f"--optimizer={optimizer}",
            "--log_interval=1", "--lr_schedule=constant", "--warmup_steps=0", "--eval_interval=4",
            "--learning_rate=3e-3"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    start(train, *argv, "--max_steps=8", f"--out_dir={tmp_path}/whole")
    start(train, *argv, "--max_steps=4", f"--out_dir={tmp_path}/cut")
    start(train, *argv, "--max_steps=8", f"--out_dir={tmp_path}/cut", "--init_from=resume")
    torch.use_deterministic_algorithms(False)
    whole, cut = ([row["train_loss"] for row in rows(tmp_path / run)] for run in ("whole", "cut"))
    assert whole == cut and whole[-1] < whole[0]
    check_equal(*(load_torch(tmp_path / run / "ckpt.pt")["model"] for run in ("whole", "cut")))
