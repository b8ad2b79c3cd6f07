"""Pretrains a GPT-2, on one CPU or on many GPUs.

    python train.py config/quickstart.py
    python train.py config/tinystories.py --batch_size=8
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124M.py
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=IP --master_port=29500 \\
        train.py config/gpt2_124M.py            # and --node_rank=1 on the other node
    python train.py config/tinystories.py --init_from=resume
    python train.py --eval_only --init_from=gpt2 --dataset=tinystories  [--quantize=int8]
"""

import gc
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch

from common import (
    Metrics,
    Skips,
    StopSignal,
    begin,
    checkpoints,
    command_line,
    fitting,
    lr_scale,
    micro_batch_seed,
    micro_batches,
    model_tokenizer,
    newest_checkpoint,
    restore,
    same_settings,
    save_best,
    save_checkpoint,
    set_aside,
    start_id,
)
from configurator import run
from data import Data, WindowOrder
from decode import Int8Linear, prepare
from files import read_pretrained
from model import GPT, GPTConfig
from optim import build_optimizer

# what and where
out_dir = "out/run"  # the run's folder: ckpt.pt, best/, metrics.jsonl, loss.png
keep_checkpoints = 2  # the newest, ckpt.pt, and older ones, ckpt-STEP.pt, should that be damaged
dataset = "tinystories"  # data/NAME, made by a prepare script; or a path with a slash in it
verify = False  # check the checksums of all shards first
init_from = "scratch"  # scratch, resume, auto (resume if there is a checkpoint), a hub name or folder
revision: str | None = None  # of a hub name
wte_from: str | None = None  # a new network takes its token embeddings from this model
seed = 1337
# the network (of a new one)
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
total_batch_tokens: int | None = None  # tokens an update, over all ranks; None: one micro-batch each
optimizer = "adamw"  # or muon, for the linear layers of the blocks, and adamw for the rest
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
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of autocast: float32, bfloat16, float16
compile: bool | None = None  # torch.compile; None: on GPUs

FROM_ONE = ("max_steps", "log_interval", "eval_interval", "block_size", "batch_size", "max_skipped",
            "keep_checkpoints", "eval_tokens")  # no other number may be below 0
FIXED = ("dataset", "block_size", "n_layer", "n_head", "n_embd", "bias", "activation",
         "tie_word_embeddings", "optimizer")  # a run that is resumed goes on with these


@torch.inference_mode()
def evaluate(model, split, env) -> dict:
    """Mean loss over fixed windows of a split, shared among the ranks: val_loss (nats a token),
    val_ppl and, where the bytes of its text are known, val_bpb (bits a UTF-8 byte)."""
    T = min(block_size, model.config.block_size)
    tokens = split.tokens - 1  # the first is not predicted
    if eval_tokens is not None:
        tokens = min(tokens, eval_tokens)
    rows = max(1, min(4096, 2**26 // model.config.vocab_size) // T)  # by the size of the logits
    if env.type != "cpu":  # which is no faster with more
        rows = max(rows, batch_size)
    full = tokens // T
    batches = [(range(i * T, min(i + rows, full) * T, T), T) for i in range(0, full, rows)]
    if tokens % T:
        batches.append(([full * T], tokens % T))
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for starts, length in batches[env.rank::env.world]:
        ids = torch.from_numpy(split.rows(starts, length + 1)).to(env.device)
        with env.autocast():
            loss = model(ids[:, :-1], ids[:, 1:])[1]
        total += loss.cpu().double() * len(starts) * length
    model.train()
    loss = env.sum(total.item())[0] / tokens
    found = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700))}
    if split.bytes and tokens == split.tokens - 1:  # the bytes of a part are not known
        found["val_bpb"] = loss / math.log(2) * split.tokens / split.bytes
    return found


def sample_text(model, tokenizer, tokens: int) -> str:
    """A sample of the model, from end-of-text or (characters) a line break; always drawn alike."""
    idx = torch.tensor([[start_id(tokenizer)]], device=next(model.parameters()).device)
    ids = model.generate(idx, tokens, temperature=0.8, top_k=min(200, tokenizer.vocab_size),
                         eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(seed))
    return tokenizer.decode(ids[0, 1:].tolist()).strip()


def compiled(model, x, y, env):
    """torch.compile(model), tried on one batch; the model itself, with a warning, if that fails."""
    try:
        fast = torch.compile(model)
        with env.autocast():
            fast(x, y)[1].backward()
        return fast
    except torch.OutOfMemoryError:  # nor would it fit eagerly
        raise
    except Exception as e:  # noqa: BLE001 (whatever the platform lacks)
        env.say(f"warning: torch.compile failed here ({type(e).__name__}: "
                f"{(str(e) or '-').splitlines()[0][:120]}); running eager")
        return model
    finally:
        model.zero_grad(set_to_none=True)


def token_embeddings(name: str, data, width: int) -> torch.Tensor:
    """(V, width) token embeddings of another model; ValueError when its sizes are not these."""
    _, tensors = read_pretrained(name, revision)
    shape, read = tensors.get("transformer.wte.weight", ((), None))
    if tuple(shape) != (data.vocab_size, width):
        raise ValueError(f"wte_from={name}: its token embeddings are {tuple(shape)}, data set "
                         f"{dataset} and n_embd={width} need {(data.vocab_size, width)}")
    same_tokenizer(f"wte_from={name}", name, data.tokenizer())
    return read()


def same_tokenizer(where: str, name: str, tokenizer):
    """ValueError where the ids of a model that brings a tokenizer are not those of the data's."""
    own = model_tokenizer(name, revision)
    if own and (own.name, own.ids, own.merges) != (tokenizer.name, tokenizer.ids, tokenizer.merges):
        raise ValueError(f"{where}: its tokenizer ({own.name}, {own.vocab_size} ids) is another than that "
                         f"of data set {dataset} ({tokenizer.name}, {tokenizer.vocab_size}); prepare the "
                         f"data with the model's, --tokenizer={name}")


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def main():
    settings, env, out = begin(globals(), FROM_ONE)
    settings["ranks"], say = env.world, env.say
    for name in ("out_dir", "dataset", "init_from"):
        if not settings[name].strip() or "\0" in settings[name]:
            raise ValueError(f"{name}={settings[name]!r} names nothing; --help says what it may be")
    if not max(beta1, beta2, momentum) < 1:
        raise ValueError("beta1, beta2 and momentum must be below 1, got "
                         f"{beta1}, {beta2} and {momentum}")
    if not max(min_lr_scale, decay_fraction) <= 1:
        raise ValueError("min_lr_scale and decay_fraction must be at most 1, got "
                         f"{min_lr_scale} and {decay_fraction}")
    if quantize and not eval_only:
        raise ValueError("quantize is for evaluating only: give --eval_only too, or leave it out")
    data = Data(dataset, verify)
    if data.val.tokens < 2:
        raise ValueError("the validation split has 1 token, it needs 2 to be evaluated")
    tokenizer = data.tokenizer()
    tokenizer_json = tokenizer.to_json()
    accumulation = 1 if eval_only else micro_batches(total_batch_tokens, batch_size, block_size,
                                                     env.world)
    lr_scale(lr_schedule, warmup_steps, max_steps, warmup_steps)  # an unknown name ends here
    if init_from == "resume" and not checkpoints(out):
        raise ValueError(f"no {out / 'ckpt.pt'} to resume from; start with --init_from=scratch")
    if not eval_only:
        env.lock(out)

    # ---- the model: new, resumed or pretrained ----
    path, checkpoint = None, None
    if init_from in ("resume", "auto"):
        path, checkpoint, faults = newest_checkpoint(out)
        if faults:
            say(f"{'; '.join(faults)}; going on from {path}")
        elif path is None and (out / "metrics.jsonl").exists():
            say(f"{out} was begun, but has no checkpoint yet: beginning anew")
    if checkpoint is not None:
        same_settings(path, checkpoint, settings, FIXED)
        if checkpoint["tokenizer"] != tokenizer_json:
            raise ValueError(f"{path} was trained with another tokenizer than {dataset} has now; "
                             "bring that back, or give another --out_dir")
        if checkpoint.get("data", data.fingerprint()) != data.fingerprint():
            raise ValueError(f"{path} was trained on other shards than {dataset} has now; prepare "
                             f"them as they were, or give another --out_dir and --init_from={out}/best")
        with fitting(path):
            config = GPTConfig(**checkpoint["config"] | {"dropout": dropout})
            size = 12 * config.n_layer * config.n_embd ** 2 + config.n_embd * config.vocab_size
            if 4 * size > path.stat().st_size:
                raise ValueError(f"a network of {size:,} parameters is not in it")
            raw_model = GPT(config)
            raw_model.load_state_dict(checkpoint["model"])
    elif init_from in ("scratch", "auto"):
        raw_model = GPT(GPTConfig(block_size, data.vocab_size, n_layer, n_head, n_embd, dropout,
                                  bias, activation, tie_word_embeddings))
        if wte_from:
            raw_model.transformer.wte.weight.data.copy_(token_embeddings(wte_from, data, n_embd))
    else:
        raw_model = GPT.from_pretrained(init_from, revision, torch.float32, dropout=dropout,
                                        block_size=None if eval_only else block_size)
    config = raw_model.config
    if config.vocab_size != data.vocab_size:
        raise ValueError(f"the model has a vocabulary of {config.vocab_size}, data set {dataset} "
                         f"({tokenizer.name}) one of {data.vocab_size}; prepare it with the model's, "
                         f"--tokenizer={init_from}")
    if checkpoint is None and init_from not in ("scratch", "auto"):
        same_tokenizer(f"init_from={init_from}", init_from, tokenizer)
    raw_model.to(env.device)
    if eval_only:
        if init_from == "auto" and checkpoint is None:
            raise ValueError(f"there is no checkpoint in {out} to evaluate; name a model with --init_from")
        if quantize:
            Int8Linear.kernel_rows = 10**9  # every product as decoding does it
            prepare(raw_model, quantize)
        found = evaluate(raw_model, data.val, env)
        name = init_from + (f" in {quantize}" if quantize else "")
        bpb = f", {found['val_bpb']:.4f} bits a byte" if "val_bpb" in found else ""
        count = min(data.val.tokens - 1, eval_tokens or math.inf)  # the first is not predicted
        say(f"{name} on {dataset}, {count:,} tokens: loss {found['val_loss']:.4f}, "
            f"perplexity {found['val_ppl']:.2f}{bpb}")
        return env.close()

    update = build_optimizer(raw_model, optimizer, learning_rate, weight_decay, (beta1, beta2),
                             adamw_learning_rate, momentum)
    step, tokens, windows, elapsed, best_loss, skipped = 0, 0, 0, 0.0, math.inf, 0
    if checkpoint is not None:
        with fitting(path):
            restore(checkpoint, update, env.scaler)
        step, tokens, windows, elapsed, best_loss, skipped = (checkpoint[key] for key in (
            "step", "tokens", "windows", "elapsed_s", "best_loss", "skipped"))
    if env.sum(step)[0] != step * env.world:
        raise ValueError(f"the ranks found different checkpoints in {out}: it must be a folder that "
                         "all nodes share")
    if checkpoint is not None:
        if step >= max_steps:
            say(f"{out} is finished: {step} of {max_steps} steps, best validation loss "
                f"{best_loss:.4f}. Give more --max_steps to go on, or see it with: "
                f"python sample.py --init_from={out}")
            return env.close()
        say(f"resuming {out} at step {step}")
        was = checkpoint["settings"]
        changed = [f"{name} {was[name]!r:.80} -> {value!r}" for name, value in settings.items()
                   if name in was and was[name] != value
                   and name not in ("out_dir", "init_from", "verify")]
        if changed:
            say(f"changed since then: {', '.join(changed)}")
    del checkpoint

    # ---- batches ----
    order = WindowOrder(data.train.tokens, block_size, seed)
    per_update = accumulation * env.world * batch_size * block_size

    def batch(first):
        """The ids (B, T + 1) of the micro-batch that starts after `first` windows."""
        ids = torch.from_numpy(data.train.rows(order(first, batch_size), block_size + 1))
        return ids.pin_memory() if env.type == "cuda" else ids

    def placed(ids):
        """x, y (B, T) on the device. Other devices read memory that is not pinned when it is gone."""
        ids = ids.to(env.device, non_blocking=env.type == "cuda")
        return ids[:, :-1], ids[:, 1:]

    say(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context "
        f"{block_size}, vocabulary {config.vocab_size:,} ({tokenizer.name}): "
        f"{raw_model.num_params():,} parameters")
    say(f"{data.train.tokens:,} training tokens; {max_steps:,} steps of {per_update:,} tokens "
        f"({accumulation} x {env.world} micro-batches of {batch_size} x {block_size}), "
        f"{max_steps * per_update / data.train.tokens:.2f} epochs; {env.name()}, "
        f"{str(env.dtype).removeprefix('torch.')}")
    model = raw_model.train()
    if compile or compile is None and env.type == "cuda":
        model = compiled(raw_model, *placed(batch(0)), env)
    model = env.parallel(model)

    # ---- what is kept of the run ----
    if env.rank == 0:
        if path is None:
            set_aside(out)
        else:
            for damaged in checkpoints(out)[:len(faults)]:
                os.replace(damaged, f"{damaged}.damaged")
        metrics = Metrics(out, step or -1)
        if wandb_project:
            import wandb
            wandb.init(project=wandb_project, name=out.name, config=settings)

    def evaluate_and_keep(row):
        """Evaluates, keeps the best model, prints a sample; the measures go into the row."""
        nonlocal best_loss
        row |= evaluate(raw_model, data.val, env)
        better = row["val_loss"] < best_loss
        best_loss = min(best_loss, row["val_loss"])
        if env.rank == 0:
            if better:
                save_best(out, raw_model, tokenizer)
            bpb = f", {row['val_bpb']:.4f} bits a byte" if "val_bpb" in row else ""
            print(f"step {step}: validation loss {row['val_loss']:.4f}, perplexity "
                  f"{row['val_ppl']:.2f}{bpb}" + " (best so far)" * better)
            if sample_tokens:
                print(f"--- a sample\n{sample_text(raw_model, tokenizer, sample_tokens)}\n---")

    def where(number):
        first = windows - (step - number + 1) * per_update // block_size
        return (f"; it is of windows {first:,} to {first + per_update // block_size - 1:,} of the "
                "order")

    saved_at, saves = step if path == out / "ckpt.pt" else None, []  # the step; seconds of each
    stop, skips = StopSignal(), Skips(env, max_skipped, skipped)
    fetcher = ThreadPoolExecutor(1)

    def fetch(windows, micro):  # the next batch, while this one is computed
        return fetcher.submit(batch, windows + (micro * env.world + env.rank) * batch_size)

    # ---- the loop ----
    coming, norms = fetch(windows, 0), []
    gc.collect()
    gc.freeze()  # else every full collection looks at all of torch, for milliseconds
    clock, counted = time.perf_counter(), step
    while step < max_steps:
        scale = lr_scale(lr_schedule, step, max_steps, warmup_steps, min_lr_scale, decay_fraction)
        for group in update.param_groups:
            group["lr"] = group["peak"] * scale
        loss_sum = torch.zeros((), device=env.device)
        for micro in range(accumulation):
            number = micro * env.world + env.rank  # of this micro-batch in the whole job's step
            torch.manual_seed(micro_batch_seed(seed, step, number))
            x, y = placed(coming.result())
            last = micro == accumulation - 1
            coming = fetch(windows + last * per_update // block_size, 0 if last else micro + 1)
            with nullcontext() if last or env.world == 1 else model.no_sync():
                with env.autocast():
                    loss = model(x, y)[1] / accumulation
                env.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        norms.append(env.update(update, raw_model.parameters(), grad_clip))
        step, tokens, windows = step + 1, tokens + per_update, windows + per_update // block_size

        last = step == max_steps
        seen = last or step % eval_interval == 0
        shown = seen or step % log_interval == 0
        stopping = env.any(stop.received, shown)
        if not (shown or stopping):
            continue
        loss, norm = env.sum(loss_sum.item())[0] / env.world, norms[-1].item()
        skips.see(norms, step, say, where, "lower --learning_rate" + (
            f" and go on from {out / 'ckpt.pt'} with --init_from=resume" if saved_at else ""))
        norms, skipped = [], skips.total
        now = time.perf_counter()
        elapsed, rate = elapsed + now - clock, (step - counted) / (now - clock)
        peak = env.peak_flops()
        mfu = peak and rate * per_update * raw_model.flops_per_token(block_size) / (peak * env.world)
        row = {"step": step, "tokens": tokens, "train_loss": loss,
               "lr": learning_rate * scale, "grad_norm": norm, "skipped": skipped or None,
               "tokens_per_s": rate * per_update, "mfu": mfu, "elapsed_s": elapsed}
        say(f"step {step:5}/{max_steps}  loss {loss:.4f}  lr {learning_rate * scale:.2e}  "
            f"norm {norm:.2f}  {rate * per_update:,.0f} tok/s"
            + (f"  mfu {mfu:.1%}" if mfu else "") + f"  left {duration((max_steps - step) / rate)}")
        if seen:
            evaluate_and_keep(row)
        if shown and env.rank == 0:  # else this stop would leave a row of its own
            metrics.log(**row)
            if wandb_project:
                wandb.log(row, step=step)
        if env.rank == 0 and (seen or stopping):
            begun = time.perf_counter()
            metrics.sync()
            save_checkpoint(out / "ckpt.pt", {
                "model": raw_model.state_dict(), "optimizer": update.state_dict(),
                "scaler": env.scaler.state_dict(), "step": step, "tokens": tokens,
                "windows": windows, "elapsed_s": elapsed, "best_loss": best_loss, "skipped": skipped,
                "config": vars(config), "settings": settings, "tokenizer": tokenizer_json,
                "data": data.fingerprint(), "command": command_line()}, keep_checkpoints, saved_at)
            saved_at = step
            saves.append(time.perf_counter() - begun)
            metrics.plot()
        if stopping and not last:
            command = command_line(init_from="resume") if env.world == 1 else \
                "the same torchrun line and --init_from=resume"
            say(f"stopped by {stop.received or 'a signal'} at step {step}; go on with: {command}")
            return env.close()
        clock, counted = time.perf_counter(), step  # evaluating and saving is not training
    if env.rank == 0:
        print(f"{metrics.sketch()}\ndone: {step:,} steps, {tokens:,} tokens, {duration(elapsed)} of "
              f"training, best validation loss {best_loss:.4f}\n{len(saves)} checkpoints, "
              f"{sum(saves) / len(saves):.2f} s each; loss curve: {out / 'loss.png'}; text: "
              f"python sample.py --init_from={out} --start \"…\"")
    env.sum(0)  # rank 0 may still be writing
    env.close()


if __name__ == "__main__":
    run(main, globals())
