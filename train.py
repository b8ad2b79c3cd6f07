"""Pretrains a GPT-2, on one CPU or on many GPUs.

    python train.py config/quickstart.py
    python train.py config/tinystories.py --batch_size=8
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124M.py
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=IP --master_port=29500 \\
        train.py config/gpt2_124M.py            # and --node_rank=1 on the other node
    python train.py config/tinystories.py --init_from=resume
    python train.py --eval_only --init_from=gpt2 --dataset=tinystories  [--quantize=int8]
"""

import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from checkpoint import (
    adapter_base,
    check_data,
    check_settings,
    checkpoints,
    load_model,
    model_tokenizer,
    newest_checkpoint,
    open_run,
    save_best,
    saved_model,
    take_settings,
)
from configurator import run as run_script
from data import Data, WindowOrder
from decode import Int8Linear, prepare
from device import begin, to_device
from hf import read_model_ids, read_pretrained
from model import GPT, GPTConfig
from optim import build_optimizer
from run import Run, duration, lr_scale, micro_batches
from tokenizer import from_json

# what and where
out_dir = "out/run"  # the run's folder: ckpt.pt, best/, metrics.jsonl, loss.png
overwrite = False  # begin anew in a folder that holds a run
keep_checkpoints = 2  # the newest, ckpt.pt, and older ones, ckpt-STEP.pt, should that be damaged
dataset = "tinystories"  # data/NAME, made by a prepare script; or a path with a slash in it
verify = False  # check the checksums of all shards first
init_from = "scratch"  # or resume, auto (resume if there is a checkpoint), a hub name or folder
revision: str | None = None  # of a hub name
wte_from: str | None = None  # a new network takes its token embeddings from this model
seed = 1337
# the network, of a new one: fields of GPTConfig, which a resumed run goes on with
block_size = 1024  # context in tokens; crops that of a pretrained model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # also of a pretrained model
bias = True  # in Linear and LayerNorm; GPT-2 has it
activation = "gelu_new"  # GPT-2's tanh GELU; or gelu (erf)
tie_word_embeddings = True  # the output head is the token embedding
# the updates
max_steps = 3000  # updates in all
batch_size = 16  # sequences of a micro-batch, on each rank
total_batch_tokens: int | None = None  # of an update, on all ranks; None: one micro-batch each
optimizer = "adamw"  # or muon (linear layers of the blocks; the rest by adamw), adamw_plain
learning_rate = 6e-4  # its peak
adamw_learning_rate: float | None = None  # with muon, the peak of the rest; None: the same
momentum = 0.95  # of muon
weight_decay = 0.1  # of matrices
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0 for none
max_skipped = 10  # updates in a row skipped for a gradient that is not finite, then the run ends
lr_schedule = "cosine"  # after the warmup: cosine, linear, wsd (stable, then linear) or constant
warmup_steps = 100
min_lr_scale = 0.1  # what the learning rate decays to, as a fraction of its peak
decay_fraction = 0.2  # wsd: part of max_steps that decays
# what is seen of it
log_interval = 10  # steps between lines
eval_interval = 250  # steps between evaluations, each with a checkpoint and a sample
eval_tokens: int | None = None  # evaluate on the first so many tokens; None: the whole split
eval_only = False  # evaluate and leave
quantize: str | None = None  # with eval_only: int8, to see what it costs
sample_tokens = 100  # length of the printed sample; 0 for none
wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
tensorboard = False  # also log for TensorBoard (pip install tensorboard)
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of autocast: float32, bfloat16, float16
compile: bool | None = None  # torch.compile; None: on GPUs
checkpoint_activations = False  # compute each block again for its gradient: less memory, slower
bfloat16_gradients = False  # several GPUs exchange gradients in bfloat16: half the traffic

FROM_ONE = ("max_steps", "log_interval", "eval_interval", "block_size", "batch_size", "max_skipped",
            "keep_checkpoints", "eval_tokens")  # no other number may be below 0


@torch.inference_mode()
def evaluate(model, split, env, num_bytes: int | None = None) -> dict:
    """Mean loss over fixed windows of a split, shared among the ranks: val_loss (nats per token),
    val_ppl and, given the number of bytes in its text, val_bpb (bits per UTF-8 byte). All batches
    have one shape, as a compiled model wants it, bounded by the sizes of its hidden states and of
    its logits."""
    T, V = min(block_size, model.config.block_size), model.config.vocab_size
    tokens = split.tokens - 1  # the first is not predicted
    if eval_tokens is not None:
        tokens = min(tokens, eval_tokens)
    windows = -(-tokens // T)  # rounded up: the last is filled up with targets that do not count
    limit = min(4096, 2**26 // V) if env.type == "cpu" else min(2**17, 2**28 // V)  # tokens
    rows = max(1, limit // T)
    rows = -(-windows // -(-windows // rows))  # as even as it goes
    model.eval()
    losses = []  # (mean of a batch, its targets); a GPU is waited for only at the end
    for first in range(rows * env.rank, windows, rows * env.world):
        starts = [i * T for i in range(first, min(first + rows, windows))]
        ids = np.full((rows, T + 1), -100)
        for row, start in zip(ids, starts):
            length = min(T, tokens - start) + 1
            row[:length] = split.rows([start], length)
        counted = int((ids[:, 1:] != -100).sum())
        ids = to_device(torch.from_numpy(ids), env.device)
        with env.autocast():
            losses.append((model(ids[:, :-1].clamp(min=0), ids[:, 1:])[1], counted))
    model.train()
    loss = env.sum(sum(loss.item() * counted for loss, counted in losses))[0] / tokens
    found = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700))}
    if num_bytes:
        found["val_bpb"] = loss / math.log(2) * (tokens + 1) / num_bytes
    return found


def evaluated_bytes(split, tokenizer) -> int | None:
    """UTF-8 bytes of the text that `evaluate` covers, special tokens left out; None where they are
    unknown."""
    if split.bytes is None or eval_tokens is None or eval_tokens >= split.tokens - 1:
        return split.bytes
    if tokenizer.name == "tokenizers":  # it may have lost some of the text, such as unknown words
        return None
    special = {*tokenizer.special.values()}
    ids = split.rows([0], eval_tokens + 1)[0].tolist()
    return len(tokenizer.decode([i for i in ids if i not in special]).encode())


def sample_text(model, tokenizer, tokens: int) -> str:
    """A sample of the model, from end-of-text or (characters) a line break; always drawn alike."""
    idx = torch.tensor([[tokenizer.start_id]], device=next(model.parameters()).device)
    ids = model.generate(idx, tokens, temperature=0.8, top_k=200, eos_id=tokenizer.stop_ids,
                         generator=torch.Generator().manual_seed(seed))
    return tokenizer.decode(ids[0, 1:].tolist()).strip()


def token_embeddings(name: str, data, width: int) -> torch.Tensor:
    """(V, width) token embeddings of another model; ValueError when its sizes are not these."""
    _, tensors = read_pretrained(adapter_base(name) or name, revision)
    shape, read = tensors.get("transformer.wte.weight", ((), None))
    if tuple(shape) != (data.vocab_size, width):
        raise ValueError(f"wte_from={name}: its token embeddings are {tuple(shape)}, data set "
                         f"{dataset} and n_embd={width} need {(data.vocab_size, width)}")
    same_tokenizer(f"wte_from={name}", name, data.tokenizer())
    return read()


def same_tokenizer(where: str, name: str, tokenizer):
    """ValueError where the ids of a model that brings a tokenizer are not those of the data's."""
    own = model_tokenizer(name, revision)
    if own and own.definition() != tokenizer.definition():
        raise ValueError(f"{where}: its tokenizer ({own.name}, {own.vocab_size} ids) is another "
                         f"than that of data set {dataset} ({tokenizer.name}, "
                         f"{tokenizer.vocab_size}); prepare the data with the model's, "
                         f"--tokenizer={shlex.quote(name)}")


def check(settings: dict):
    """ValueError for settings that contradict each other or are out of range."""
    for name in ("out_dir", "dataset", "init_from"):
        if not settings[name].strip() or "\0" in settings[name]:
            raise ValueError(f"{name}={settings[name]!r} names nothing; --help says what it may be")
    if not max(beta1, beta2, momentum) < 1:
        raise ValueError("beta1, beta2 and momentum must be below 1, got "
                         f"{beta1}, {beta2} and {momentum}")
    if not max(min_lr_scale, decay_fraction) <= 1:
        raise ValueError("min_lr_scale and decay_fraction must be at most 1, got "
                         f"{min_lr_scale} and {decay_fraction}")
    if wte_from and init_from not in ("scratch", "resume", "auto"):
        raise ValueError(f"wte_from is for a new network; init_from={init_from} has embeddings")
    if quantize and not eval_only:
        raise ValueError("quantize is for evaluating only: give --eval_only too, or leave it out")
    lr_scale(lr_schedule, warmup_steps, max_steps, warmup_steps)  # an unknown name ends here


def network_settings(settings: dict) -> dict:
    """Those of the settings that are fields of GPTConfig."""
    names = {field.name for field in fields(GPTConfig)}
    return {name: value for name, value in settings.items() if name in names}


def take_what_is_there(script: dict):
    """Settings that were not given come from the run that goes on or is evaluated; the context, if
    it is shorter, from a pretrained model. ValueError for a given size that is not the model's."""
    evaluates = eval_only and "init_from" not in script.get("_given", ())
    if evaluates:
        if not checkpoints(Path(out_dir)):
            raise ValueError(f"there is no checkpoint in {out_dir}; name a model with --init_from")
        script["init_from"] = "resume"
    take_settings(script)
    if evaluates and (Path(out_dir) / "best" / "config.json").is_file():
        script["init_from"], script["revision"] = out_dir, None  # that one was of a hub name
    if init_from.strip() in ("", "scratch", "resume", "auto"):
        return
    base = adapter_base(init_from) or init_from
    theirs = vars(GPTConfig()) | read_pretrained(base, revision)[0]
    given = network_settings(script).keys() & script["_given"] - {"block_size", "dropout"}
    other = [f"{name}={theirs[name]}, not {script[name]}" for name in sorted(given)
             if theirs[name] != script[name]]
    if other:
        raise ValueError(f"the model in {init_from} has {'; '.join(other)}; leave that out, or "
                         "begin with a network of your own, --init_from=scratch")
    if eval_only and "block_size" in script["_given"] and block_size > theirs["block_size"]:
        raise ValueError(f"block_size={block_size} is more than the {theirs['block_size']} "
                         f"positions of {init_from}")
    if "block_size" not in script["_given"]:
        script["block_size"] = min(block_size, theirs["block_size"])
    script.update({name: theirs[name] for name in network_settings(script)
                   if name not in ("block_size", "dropout")})


def resumed_model(checkpoint: dict, settings: dict, data) -> tuple:
    """The network of a checkpoint, and its tokenizer; ValueError where the run could not go on with
    it as it was."""
    path, network = checkpoint["path"], network_settings(settings)
    old = vars(GPTConfig()) | checkpoint["config"]  # which lacks what the code has learned since
    check_settings(path, old, network, network.keys() - {"dropout"}, checkpoint.get("command"))
    if from_json(checkpoint["tokenizer"]).definition() != data.tokenizer().definition():
        raise ValueError(f"{path} was trained with another tokenizer than {dataset} has now; "
                         "bring that back, or give another --out_dir")
    if not eval_only:
        check_data(checkpoint, data.fingerprint(), dataset)
    return saved_model(checkpoint, dropout)


def first_model(settings: dict, data, tokenizer) -> GPT:
    """The network that a run begins with: a new one, or a pretrained one, whose files say what
    stops a text."""
    if init_from not in ("scratch", "auto"):
        same_tokenizer(f"init_from={init_from}", init_from, tokenizer)
        tokenizer.take_model_ids(read_model_ids(adapter_base(init_from) or init_from, revision))
        return load_model(init_from, tokenizer, revision=revision, dtype=torch.float32,
                          dropout=dropout, block_size=None if eval_only else block_size)[0]
    model = GPT(GPTConfig(vocab_size=data.vocab_size, **network_settings(settings)))
    if wte_from:
        model.transformer.wte.weight.data.copy_(token_embeddings(wte_from, data, n_embd))
    return model


def report_evaluation(model, data, env, num_bytes: int | None):
    """--eval_only: evaluates, prints."""
    if quantize:
        Int8Linear.kernel_rows = 10**9  # every product as decoding does it
        prepare(model, quantize)
    found = evaluate(model, data.val, env, num_bytes)
    bpb = f", {found['val_bpb']:.4f} bits per byte" if "val_bpb" in found else ""
    count = min(data.val.tokens - 1, eval_tokens or math.inf)  # the first is not predicted
    name = f"{init_from} in {quantize}" if quantize else init_from
    env.say(f"{name} on {dataset}, {count:,} tokens: loss {found['val_loss']:.4f}, perplexity "
            f"{found['val_ppl']:.2f}{bpb}")
    env.close()


def main():
    take_what_is_there(globals())
    settings, env, out = begin(globals(), FROM_ONE)
    check(settings)
    settings["ranks"], say = env.world, env.say
    data = Data(dataset, verify)
    if data.note:
        say(data.note)
    if data.val.tokens < 2:
        raise ValueError(f"the validation split of {dataset} has {data.val.tokens} tokens, it "
                         "needs 2 to be evaluated")
    checkpoint = None
    if not eval_only:
        accumulation = micro_batches(total_batch_tokens, batch_size, block_size, env.world)
        checkpoint = open_run(env, out, settings, ["optimizer"], windows=int)
    elif init_from in ("resume", "auto"):
        checkpoint = newest_checkpoint(out, say, windows=int)
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint in {out}; name a model with --init_from")

    # ---- the model: new, resumed or pretrained ----
    if checkpoint is not None:
        raw_model, tokenizer = resumed_model(checkpoint, settings, data)
    else:
        tokenizer = data.tokenizer()
        raw_model = first_model(settings, data, tokenizer)
    config, num_bytes = raw_model.config, evaluated_bytes(data.val, tokenizer)
    env.place(raw_model, checkpoint_activations)
    if eval_only:
        if checkpoint is not None:
            raw_model.load_state_dict(checkpoint["model"])
        return report_evaluation(raw_model, data, env, num_bytes)

    # ---- the run ----
    betas = beta1, beta2
    update = build_optimizer(raw_model, optimizer, learning_rate, weight_decay, betas,
                             adamw_learning_rate, momentum)
    schedule = partial(lr_scale, lr_schedule, max_steps=max_steps, warmup_steps=warmup_steps,
                       min_scale=min_lr_scale, decay_fraction=decay_fraction)
    run = Run(env, out, raw_model, update, settings, max_steps, eval_interval, checkpoint,
              schedule, raw_model.flops_per_token(block_size))
    if max_steps < warmup_steps:
        say(f"note: warmup_steps={warmup_steps} is more than max_steps={max_steps}: the learning "
            f"rate ends at {schedule(max_steps - 1):.0%} of its peak")
    windows = 0  # of training text that have been read
    if env.sum(run.step)[0] != run.step * env.world:
        raise ValueError(f"the ranks found different checkpoints in {out}: it must be a folder "
                         "that all nodes share")
    if checkpoint is not None:
        windows = checkpoint["windows"]
        if run.step >= max_steps:
            say(f"{out} is finished: {run.step} of {max_steps} steps, best validation loss "
                f"{run.best[0]:.4f}. Give more --max_steps to go on, or see it with: "
                f"python sample.py --init_from={shlex.quote(str(out))}")
            return env.close()
        if checkpoint["settings"].get("eval_tokens") != eval_tokens:
            say("eval_tokens changed: losses are of other tokens now, and the best is sought anew")
            run.best = (math.inf,)
    del checkpoint

    # ---- batches ----
    order = WindowOrder(data.train.tokens, block_size, seed)
    one = batch_size * block_size  # tokens of a micro-batch
    per_update = accumulation * env.world * one
    fetcher = ThreadPoolExecutor(1)

    def batch(first):
        """The ids (B, T + 1) of the micro-batch that starts after `first` windows."""
        ids = torch.from_numpy(data.train.rows(order(first, batch_size), block_size + 1))
        return ids.pin_memory() if env.type == "cuda" else ids

    def fetch(first, number):  # the next micro-batch, while this one is computed
        return fetcher.submit(batch, first + number * batch_size)

    def placed(ids):
        """x, y (B, T) on the device."""
        ids = to_device(ids, env.device)
        return ids[:, :-1], ids[:, 1:]

    say(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context "
        f"{block_size}, vocabulary {config.vocab_size:,} ({tokenizer.name}): "
        f"{raw_model.num_params():,} parameters")
    parts = f"{accumulation * env.world} micro-batches of " if per_update > one else ""
    say(f"{data.train.tokens:,} training tokens; {max_steps:,} steps of {per_update:,} tokens "
        f"({parts}{batch_size} x {block_size}), "
        f"{max_steps * per_update / data.train.tokens:.2f} epochs; {env.name()}, "
        f"{str(env.dtype).removeprefix('torch.')}")
    model, fast = env.compiled(raw_model.train(), compile, bfloat16=bfloat16_gradients,
                               loss=lambda model: model(*placed(batch(0)))[1])

    # ---- the loop ----
    coming, found = fetch(windows, env.rank), {}
    for _ in run.steps():
        first, windows = windows, windows + per_update // block_size
        for number in run.micro_batches(model, accumulation):
            x, y = placed(coming.result())
            following = number + env.world
            last = following >= accumulation * env.world
            coming = fetch(windows, env.rank) if last else fetch(first, following)
            with env.autocast():
                loss = model(x, y)[1]
            run.backward(loss * y.numel(), per_update)
        run.update(per_update, source=f"; it is of windows {first:,} to {windows - 1:,}")

        # once in a while: evaluate, keep the best model
        found = {}
        if run.evaluates:
            found = evaluate(fast, data.val, env, num_bytes)
            if run.is_best(found["val_loss"]) and env.rank == 0:
                run.write(save_best, run.folder, raw_model, tokenizer)
        run.log(**found)
        if run.evaluates and sample_tokens and env.rank == 0:
            print(f"--- a sample\n{sample_text(raw_model, tokenizer, sample_tokens)}\n---")
        if run.saves:
            run.save(windows=windows, config=vars(config), tokenizer=tokenizer.to_json(),
                     data=data.fingerprint())

    if env.rank == 0 and not run.stopped:
        print(f"{run.metrics.sketch()}\ndone: {run.step:,} steps, {run.tokens:,} tokens, "
              f"{duration(run.elapsed_s)} of training, best validation loss {run.best[0]:.4f}\n"
              f"loss curve: {out / 'loss.png'}\n"
              f"text: python sample.py --init_from={shlex.quote(str(out))}")
    env.sum(0)  # rank 0 may still be writing
    env.close()


if __name__ == "__main__":
    run_script(main, globals())
