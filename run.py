"""The steps of a training: schedule, accumulation, skipped updates, log lines, evaluation points,
stop signals, saving; metrics and plots.

The loop stays in the script:

    for step in run.steps():
        for number in run.micro_batches(model, accumulation):
            run.backward(loss, n)  # the loss: summed over this rank's targets of a micro-batch
        run.update(n)              # n: the targets of the whole update, on all ranks
        if run.evaluates:
            found = ...
            if run.is_best(found["val_loss"]):
                run.write(save_best, run.folder, ...)
        run.log(**found)
        if run.saves:
            run.save(...)          # what the script needs to go on
"""

import gc
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch

from checkpoint import (
    NEW,
    fitting,
    note_newest,
    replace_run,
    restore,
    save_checkpoint,
    settings_of,
)
from configurator import command_line
from device import host_copy
from files import naming, replacing, write_text

COUNTS = {"step": 0, "tokens": 0, "elapsed_s": 0.0, "skipped": 0,
          "loss_sum": 0.0, "counted": 0}  # the last two: since the last row, of all ranks
ROW_INTERVAL = 10  # updates between rows of metrics.jsonl, where lines are rarer
LONGEST_SILENCE = 10  # seconds, after which there is a line in any case
NO_LINE = 0.0, 0, 0, 0.0, 0  # loss, targets, tokens, seconds and updates since the last line


class Run:
    """env: Device; out: the run's folder; settings: the script's. An evaluation every eval_interval
    updates and after the last, a line every settings["log_interval"], a row of metrics.jsonl at
    least every 10. checkpoint: to resume from.
    schedule(step) -> fraction of every group's peak learning rate; None: a linear warmup over
    settings["warmup_fraction"] of the updates (a tenth), then linear to zero. flops: of a token."""

    IN_BACKGROUND = ("cuda",)  # devices that train on while a thread writes: see `write`

    def __init__(self, env, out: Path, model, optimizer, settings: dict, max_steps: int,
                 eval_interval: int, checkpoint: dict | None = None, schedule=None,
                 flops: int | None = None):
        self.env, self.out, self.model, self.optimizer = env, out, model, optimizer
        self.folder = out / NEW if checkpoint is None else out  # until the first save
        self.begin_logging(settings, checkpoint or {})
        self.command = (checkpoint or {}).get("command") or command_line()  # by which it was begun
        if checkpoint is not None:  # which model the run was begun from
            settings = settings | {"init_from": checkpoint["settings"].get("init_from")}
        self.settings, self.max_steps, self.eval_interval = settings, max_steps, eval_interval
        rate = settings.get("adamw_learning_rate")
        if rate is not None and settings["optimizer"] != "muon":
            env.say(f"note: optimizer={settings['optimizer']} trains embeddings, too, at "
                    f"learning_rate={settings['learning_rate']}: adamw_learning_rate={rate} is "
                    "heeded with optimizer=muon only")
        self.flops, self.parameters = flops, [*model.parameters()]
        warmup = round(settings.get("warmup_fraction", 0.1) * max_steps)
        self.schedule = schedule or partial(lr_scale, "linear", max_steps=max_steps,
                                            warmup_steps=warmup)
        self.best, self.last_saved = (math.inf,), None
        vars(self).update({key: (checkpoint or COUNTS)[key] for key in COUNTS})
        if checkpoint is not None:
            with fitting(checkpoint["path"]):
                model.load_state_dict(checkpoint["model"])
                restore(checkpoint, optimizer, env.scaler)
            best = checkpoint["best_loss"]
            self.best = best if isinstance(best, tuple) else (best,)
            if checkpoint["path"].name == "ckpt.pt":
                self.last_saved = self.step
            if self.step < max_steps:
                self.say_resumed(settings_of(checkpoint))
        # of this rank, since the last row
        self.losses = torch.tensor(self.loss_sum if env.rank == 0 else 0.0, device=env.device)
        self.updates, self.bad_in_a_row = [], 0  # (step, norm, source) since the last row
        self.stopped = self.improved = self.evaluates = self.saves = False
        self.logs = self.prints = True  # of an evaluation before the first step
        self.line = NO_LINE
        self.ask_interval = 1  # steps between questions for a stop signal
        self.takes = ""  # how long an update is, where it is long
        self.row = {key: getattr(self, key) for key in ("step", "tokens", "elapsed_s")}
        self.metrics = self.received = None
        self.writer = ThreadPoolExecutor(1) if env.type in self.IN_BACKGROUND else None
        self.written = []  # futures of what was given to it
        if env.rank == 0:
            self.metrics = Metrics(self.folder, -1 if checkpoint is None else self.step)

    def begin_logging(self, settings: dict, checkpoint: dict):
        """Weights & Biases and TensorBoard, where they are asked for, before any file is touched;
        a resumed run goes on with its own curves. ValueError where one cannot begin."""
        self.wandb = self.tensorboard = None
        if self.env.rank:
            return
        if settings.get("wandb_project"):
            try:
                import wandb
                self.wandb = wandb.init(
                    project=settings["wandb_project"], name=self.out.name, config=settings,
                    id=checkpoint.get("wandb_id"), resume="allow")
            except ImportError as e:
                raise ValueError(f"wandb_project needs pip install wandb ({e}); without it: "
                                 "--wandb_project=None") from None
            except Exception as e:  # noqa: BLE001 (its own errors, such as of an account)
                raise ValueError(f"Weights & Biases cannot begin ({e}); log in by `wandb login`, "
                                 "or go on without: --wandb_project=None") from None
        if settings.get("tensorboard"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise ValueError(f"tensorboard needs pip install tensorboard ({e}); without it: "
                                 "--tensorboard=False") from None
            self.tensorboard = SummaryWriter(self.folder / "tensorboard",
                                             purge_step=checkpoint.get("step", -1) + 1)

    def say_resumed(self, old: dict):
        self.env.say(f"resuming {self.out} at step {self.step}")
        changed = [f"{name} {old[name]!r:.80} -> {value!r}" for name, value in self.settings.items()
                   if name in old and old[name] != value
                   and name not in ("out_dir", "init_from", "verify", "overwrite")]
        if changed:
            self.env.say(f"changed since then: {', '.join(changed)}")
        if self.env.rank == 0:
            (self.out / "results.json").unlink(missing_ok=True)  # which are of fewer steps

    # ---- the loop ----

    def steps(self):
        """Yields the number of each update, counted from 0, with its learning rate set and torch
        seeded; ends after max_steps, or after the update in which a stop signal came."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        gc.collect()
        gc.freeze()  # else every full collection looks at all of torch, for milliseconds
        self.start_clock()
        self.printed = self.clock
        try:
            while self.step < self.max_steps and not self.stopped:
                self.scale = self.schedule(step=self.step)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * self.scale
                torch.manual_seed(micro_batch_seed(self.settings["seed"], self.step, self.env.rank))
                yield self.step
                if self.logs or self.stopped:  # evaluating and saving is not training
                    self.start_clock()
        finally:
            self.wait_written()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.stopped:
            goes_on = command_line(init_from="resume")
            if self.settings["overwrite"]:
                goes_on += " --overwrite=False"
            if self.env.world > 1:
                goes_on = "the same torchrun line with --overwrite=False --init_from=resume"
            name = self.received or "a signal"
            self.env.say(f"stopped by {name} at step {self.step}; go on with: {goes_on}")

    def receive(self, number, frame):
        """Notes a stop signal, which is asked for after each update. A second Ctrl-C interrupts at
        once; a second SIGTERM does not, as torchrun sends one, too."""
        if not self.received:
            again = "; Ctrl-C again stops without saving" if number == signal.SIGINT else ""
            self.env.say(f"stopping after this update{self.takes}, which is then saved{again}")
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def start_clock(self):
        self.clock, self.clock_step, self.clock_tokens = time.perf_counter(), self.step, self.tokens

    def micro_batches(self, model, count: int):
        """Yields the number of each micro-batch of this rank, counted over all ranks, with torch
        seeded for it. DDP reduces the gradients after the last."""
        for micro in range(count):
            number = micro * self.env.world + self.env.rank
            torch.manual_seed(micro_batch_seed(self.settings["seed"], self.step, number))
            between = micro + 1 < count and self.env.world > 1
            with model.no_sync() if between else nullcontext():
                yield number

    def backward(self, loss, n: int):
        """Adds the gradients of a loss that is summed over this rank's targets of a micro-batch,
        for the mean over the n targets of the whole update, of all micro-batches and ranks."""
        share = self.env.world / n  # DDP takes the mean over the ranks
        self.env.scaler.scale(loss * share).backward()
        self.losses += loss.detach()

    def update(self, n: int, tokens: int | None = None, source: str = ""):
        """One update from the gradients of n targets, made of so many tokens (None: n); sets what
        is due then: `evaluates`, `logs`, `saves`, `stopped`. source: where the batch stood, to be
        named if its gradient is not finite."""
        grad_clip = self.settings.get("grad_clip", 1.0)
        norm = self.env.update(self.optimizer, self.parameters, grad_clip)
        self.step += 1
        self.counted += n
        self.tokens += n if tokens is None else tokens
        self.updates.append((self.step, norm, source))
        last = self.step == self.max_steps
        self.evaluates = last or self.step % self.eval_interval == 0
        between = self.settings["log_interval"]
        self.prints = self.evaluates or self.step % between == 0
        self.logs = self.prints or self.step % min(between, ROW_INTERVAL) == 0
        silent = time.perf_counter() - self.printed > LONGEST_SILENCE
        if silent and (self.logs or self.env.world == 1):  # several ranks make rows together
            self.logs = self.prints = True
        # Asking makes several GPUs wait for each other, so it is done every few seconds: torchrun
        # kills 30 seconds after its SIGTERM.
        if self.logs or self.env.world == 1 or self.step % self.ask_interval == 0:
            self.stopped = self.env.any_rank(self.received) and not last
        self.saves = self.evaluates or self.stopped
        if self.saves:
            self.wait_written()
        if self.logs or self.stopped:
            self.measure()

    def measure(self):
        """Makes the row of what is logged, over the updates since the last one."""
        self.loss_sum = self.env.sum(self.losses.item())[0]
        norm = self.check()
        seconds, tokens = time.perf_counter() - self.clock, self.tokens - self.clock_tokens
        self.elapsed_s += seconds
        speed, peak = tokens / seconds, self.env.peak_flops()
        steps = self.step - self.clock_step
        now = self.loss_sum, self.counted, tokens, seconds, steps
        self.line = tuple(before + new for before, new in zip(self.line, now))
        step_s = self.env.sum(seconds / steps)[0] / self.env.world
        self.ask_interval = max(1, int(5 / step_s))  # the same on all ranks
        self.takes = f" of {duration(step_s)}" if step_s > 5 else ""
        mfu = speed * self.flops / (peak * self.env.world) if self.flops and peak else None
        self.row = {
            "step": self.step, "tokens": self.tokens, "train_loss": self.loss_sum / self.counted,
            "lr": self.settings["learning_rate"] * self.scale, "grad_norm": norm,
            "skipped": self.skipped or None, "tokens_per_s": speed, "mfu": mfu,
            "elapsed_s": self.elapsed_s}

    def check(self) -> float:
        """Counts the updates that were skipped as their gradient was not finite; ValueError after
        max_skipped of them in a row. Returns the norm of the last one's gradient."""
        finds_scale = self.env.scaler.is_enabled()  # float16 finds its scale by skipping some
        most = self.settings.get("max_skipped", 10) + (20 if finds_scale else 0)
        for step, norm, source in self.updates:
            if norm.isfinite():
                self.bad_in_a_row = 0
                continue
            self.bad_in_a_row += 1
            self.skipped += 1
            if not finds_scale:
                self.env.say(f"step {step}: the gradient is not finite, its update is skipped"
                             + source)
            if self.bad_in_a_row >= most:
                older = (" (or from the one before: rename its ckpt-STEP.pt to ckpt.pt)"
                         if self.settings.get("keep_checkpoints", 1) > 1 else "")
                raise ValueError(
                    f"the gradient was not finite in {self.bad_in_a_row} steps in a row, up to "
                    f"step {step}; lower --learning_rate, and go on from the last checkpoint, if "
                    f"there is one, with --init_from=resume{older}")
        self.updates = []
        return norm.item()

    # ---- what is kept of it ----

    def is_best(self, *measures: float) -> bool:
        """Whether a validation loss, or several measures of which less is better, are the best."""
        self.improved = measures < self.best
        if self.improved:
            self.best = measures
        return self.improved

    def log(self, **measures):
        """Where a line is due: prints it, and writes a row of metrics.jsonl. measures: those of an
        evaluation, which begin with `val_`, and others, which show on the line and in loss.png."""
        if self.prints or self.stopped:
            if self.env.rank == 0:
                self.show(measures)
            self.line, self.printed = NO_LINE, time.perf_counter()
        if not self.logs:  # a stop leaves no row of its own
            return
        if self.env.rank == 0:
            self.metrics.log(**self.row, **measures)
        if self.wandb:
            self.wandb.log(self.row | measures, step=self.step)
        if self.tensorboard:
            for name, value in (self.row | measures).items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, self.step)
        self.losses.zero_()
        self.loss_sum, self.counted = 0.0, 0

    def show(self, measures: dict):
        """The lines on the screen."""
        row = self.row
        if "train_loss" in row:
            loss, counted, tokens, seconds, steps = self.line
            left = (self.max_steps - self.step) * seconds / steps
            parts = [f"step {self.step:5}/{self.max_steps}", f"loss {loss / counted:.4f}",
                     f"lr {row['lr']:.2e}", f"norm {row['grad_norm']:.2f}",
                     f"{tokens / seconds:,.0f} tok/s"]
            if row["mfu"]:
                parts.append(f"mfu {row['mfu']:.1%}")
            parts += [f"{name} {value:.4g}" for name, value in measures.items()
                      if not name.startswith("val_")]
            self.env.say("  ".join([*parts, f"left {duration(left)}"]))
        found = [f"{label} {measures[name]:{'.4g' if name == 'val_ppl' else '.4f'}}"
                 for name, label in VALIDATION.items() if name in measures]
        if found:
            best = " (best)" if self.improved else ""
            self.env.say(f"step {self.step}: {', '.join(found)}{best}")

    def write(self, work, *values, **options):
        """Does work that writes files. On a GPU a thread does it, with copies in the CPU's memory
        of the tensors and models among the values, while training goes on; before the next time
        `saves` is due, and at the end, it is done or its error raised. On a CPU the copies would
        cost memory, and there is no other processor."""
        if self.writer is None:
            work(*values, **options)
        else:
            self.written.append(self.writer.submit(work, *map(host_copy, values), **options))

    def wait_written(self):
        given, self.written = self.written, []
        for future in given:
            future.result()

    def save(self, **more):
        """OUT/ckpt.pt: what resuming needs of the run, and what the script adds to it. Where
        several updates in a row were skipped, before the end, the checkpoints from before stay."""
        goes_on = self.last_saved and not self.stopped and self.step < self.max_steps
        if self.bad_in_a_row > 1 and goes_on and not self.env.scaler.is_enabled():
            self.env.say(f"step {self.step}: not saved, as the weights may have diverged")
            return
        if self.env.rank == 0:
            self.metrics.sync()
            best = self.best[0] if len(self.best) == 1 else self.best
            self.write(save_checkpoint, self.folder / "ckpt.pt", {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.env.scaler.state_dict(), "best_loss": best,
                "settings": self.settings, "command": self.command,
                "wandb_id": self.wandb and self.wandb.id,
                **{key: getattr(self, key) for key in COUNTS}, **more},
                self.settings.get("keep_checkpoints", 1), self.last_saved)
            self.write(self.metrics.plot)
        self.last_saved = self.step
        self.move()

    def results(self, results: dict):
        """OUT/results.json, which closes a fine-tuning, with the settings."""
        if self.env.rank == 0:
            write_text(self.folder / "results.json", json.dumps(
                results | {"settings": self.settings}, indent=1) + "\n")
        self.move()

    def move(self):
        """With its first save the run moves into its folder, and what an old one left goes."""
        if self.folder != self.out and self.env.rank == 0:
            self.wait_written()
            if self.tensorboard:  # which opens its file by name again
                self.tensorboard.close()
                self.tensorboard.log_dir = str(self.out / "tensorboard")
            replace_run(self.out)
            self.metrics.folder = self.out
        if self.env.rank == 0:
            note_newest(self.out)
        self.folder = self.out


VALIDATION = {"val_loss": "validation loss", "val_ppl": "perplexity", "val_bpb": "bits per byte",
              "val_accuracy": "accuracy", "val_macro_f1": "macro-F1"}
PLOTTED = {"step", "tokens", "train_loss", "lr", "grad_norm", "skipped", "tokens_per_s", "mfu",
           "elapsed_s", *VALIDATION} - {"val_accuracy"}  # in the first panel, or in none


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def lr_scale(schedule: str, step: int, max_steps: int, warmup_steps: int, min_scale: float = 0.0,
             decay_fraction: float = 0.2) -> float:
    """Fraction of the peak learning rate for update `step`, counted from 0.

    Linear warmup (the first update takes 1 / warmup_steps), then `cosine` (Loshchilov and Hutter
    2017) or `linear` decay towards min_scale, which the update after the last would reach, `wsd`
    (warmup, stable, then linear decay over the last decay_fraction; Hu et al. 2024) or `constant`.
    ValueError for another name.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = warmup_steps
    if schedule == "wsd":
        begin = max(begin, round(max_steps * (1 - decay_fraction)))
    done = min(max(0.0, (step - begin) / max(1, max_steps - begin)), 1.0)  # of the decay
    if schedule == "cosine":
        return min_scale + (1 - min_scale) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule in ("linear", "wsd"):
        return min_scale + (1 - min_scale) * (1 - done)
    raise ValueError(f"lr_schedule={schedule!r} is unknown: cosine, linear, wsd or constant")


def micro_batch_seed(seed: int, step: int, micro: int) -> int:
    """Seed of torch's random numbers (dropout) for one micro-batch of the whole job, so that they
    depend neither on what ran before nor on how many ranks share the step."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB)
    x ^= x >> 31
    return x * 0xD6E8FEB86659FD93 % 2**63


def micro_batches(total_batch_tokens: int | None, batch_size: int, block_size: int, world: int
                  ) -> int:
    """Micro-steps of each rank that make up one update; ValueError says which numbers would do."""
    one = batch_size * block_size * world
    if total_batch_tokens is None:
        return 1
    count, rest = divmod(total_batch_tokens, one)
    if count == 0 or rest:
        of_one = total_batch_tokens // (block_size * world)  # sequences of an update on a rank
        fits = [b for b in range(1, min(batch_size, of_one) + 1)
                if total_batch_tokens == of_one * block_size * world and of_one % b == 0]
        hint = f" or --batch_size={fits[-1]}" if fits else ""
        raise ValueError(
            f"total_batch_tokens={total_batch_tokens:,} is no multiple of batch_size={batch_size} "
            f"x block_size={block_size} x {world} rank{'s' if world > 1 else ''} = {one:,}; use "
            f"--total_batch_tokens={max(1, round(total_batch_tokens / one)) * one}{hint}")
    return count


class Metrics:
    """OUT/metrics.jsonl, one JSON object for each logged step, and OUT/loss.png drawn from it."""

    def __init__(self, folder: Path, resume_step: int = -1):
        """Starts an empty file or, given the step that a run resumes from, drops the later rows."""
        self.folder = folder
        self.rows = [row for row in self.read(self.path) if row["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    @property
    def path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The rows of a metrics file, if there is one; what a crash cut short is left out."""
        rows, text = [], path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]

    def log(self, **row):
        row = {key: float(f"{v:.7g}") if isinstance(v, float) else v for key, v in row.items()
               if v is not None and math.isfinite(v)}
        self.rows.append(row)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self):
        """Flushes the rows to disk, where they must be before the checkpoint that follows them."""
        with naming(self.path), open(self.path, "rb+") as file:
            os.fsync(file.fileno())

    def points(self, key: str) -> list[tuple]:
        """(tokens, value) of the rows that have a measure."""
        return [(row["tokens"], row[key]) for row in self.rows if key in row]

    def sketch(self, width: int = 72, height: int = 9) -> str:
        """The training loss as a curve of characters, for the terminal."""
        points = self.points("train_loss")
        if len(points) < 2:
            return ""
        columns = [[] for _ in range(width)]
        for tokens, loss in points:
            columns[min(width - 1, tokens * width // (points[-1][0] + 1))].append(loss)
        means = [sum(c) / len(c) if c else None for c in columns]
        low, high = (pick(m for m in means if m is not None) for pick in (min, max))
        rows = [[" "] * width for _ in range(height)]
        for x, mean in enumerate(means):
            if mean is not None:
                rows[round((high - mean) / max(high - low, 1e-9) * (height - 1))][x] = "•"
        labels = [f"{high:7.3f} ", *[" " * 8] * (height - 2), f"{low:7.3f} "]
        lines = [f"{label}│{''.join(row).rstrip()}" for label, row in zip(labels, rows)]
        return "\n".join(["training loss", *lines, f"{' ' * 8}└{'─' * width}",
                          f"{'0':>9}{f'{points[-1][0]:,} tokens':>{width}}"])

    def plot(self, unit: str = "token"):
        """Losses, in nats per unit, over training tokens; a panel for each other measure."""
        from matplotlib.ticker import EngFormatter
        others = sorted({key for row in self.rows for key in row} - PLOTTED)
        panels = 1 + len(others)
        with figure(self.folder / "loss.png", (7, 2.4 + 1.8 * panels), panels) as axes:
            top, *more = axes if others else [axes]
            styles = {"train_loss": {"label": "training", "lw": 0.8, "alpha": 0.6},
                      "val_loss": {"label": "validation", "lw": 1.8, "marker": "o", "ms": 3}}
            for key, style in styles.items():
                if points := self.points(key):
                    top.plot(*zip(*points), **style)
            for key, ax in zip(others, more):
                ax.plot(*zip(*self.points(key)), lw=1)
                ax.set(ylabel=key.removeprefix("val_"))
            last = next((row for row in reversed(self.rows) if "val_loss" in row), None)
            if last:
                top.set_title(f"validation loss {last['val_loss']:.4f} after {last['step']:,} "
                              f"steps, {last['elapsed_s'] / 60:.1f} min of training", fontsize=10)
            top.set(ylabel=f"loss (nats per {unit})")
            (more or [top])[-1].set(xlabel="training tokens")
            top.xaxis.set_major_formatter(EngFormatter(sep=""))
            for ax in [top, *more]:
                ax.grid(alpha=0.25)
            if top.lines:
                top.legend(frameon=False)


@contextmanager
def figure(png, size=(7, 4.2), rows: int = 1, columns: int = 1):
    """Axes to draw on, in rows and columns; size in inches. They end in a PNG file."""
    from matplotlib.figure import Figure
    fig = Figure(size, dpi=110, layout="constrained")
    yield fig.subplots(rows, columns, sharex="col", sharey="row")
    with replacing(png) as tmp:
        fig.savefig(tmp, format="png")
