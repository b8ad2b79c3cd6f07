"""A run's folder: checkpoints, the best model, and models found by name.

OUT/ckpt.pt holds all that a resumed run needs, older ones are ckpt-STEP.pt; OUT/best is the best
model as a Hugging Face folder. A folder that holds a run is not written over unasked.
"""

import math
import os
import shlex
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from files import HERE, read_json, replacing, write_text
from foreign import OTHER_FILES, SAVE, TOKENIZER_FILES
from hf import (
    MODEL_IDS,
    find_file,
    load_torch,
    local_folder,
    make_config,
    read_model_ids,
)
from lora import load_adapter, merge, unmerge
from model import GPT, GPTConfig
from text import say_once
from tokenizer import Tokenizer, from_json, open_tokenizer

# What every checkpoint must hold, before anything in it is used.
FIELDS = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "settings": dict,
          "step": int, "tokens": int, "skipped": int, "elapsed_s": float, "tokenizer": str,
          "best_loss": (float, tuple), "loss_sum": float, "counted": int}
OLDER = {"skipped": 0, "loss_sum": 0.0, "counted": 0}  # which older checkpoints lack
# Fields of generation_config.json that are settings here, or change nothing in what is drawn.
DECODING = (*MODEL_IDS, "do_sample", "temperature", "top_k", "top_p", "num_beams", "length_penalty",
            "max_length", "max_new_tokens", "num_return_sequences", "use_cache",
            "cache_implementation", "transformers_version")
# Settings that a resumed run does not take from its checkpoint.
OF_THE_MOMENT = ("init_from", "out_dir", "overwrite", "device", "compile", "verify",
                 "checkpoint_activations", "eval_only", "quantize", "predict", "predict_file")
NEW = ".new"  # in a run's folder: a new run until its first checkpoint or result
NEWEST = HERE / "out" / ".newest"  # names the folder of the run that was saved last
# What a run leaves in its folder.
RUN_FILES = ("ckpt.pt", "ckpt-*.pt", "best", "adapter", "tensorboard", "results.json",
             "metrics.jsonl", "loss.png", "answers.jsonl", "confusion.png", "predictions",
             "predictions_*.csv",
             "generated_*.txt", "dev_*.txt")


# ---- checkpoints ----

def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first: ckpt.pt, then ckpt-STEP.pt."""
    older = [path for path in out_dir.glob("ckpt-*.pt") if path.stem[5:].isdecimal()]
    older.sort(key=lambda path: int(path.stem[5:]), reverse=True)
    return [path for path in (out_dir / "ckpt.pt", *older) if path.is_file()]


def save_checkpoint(path: Path, checkpoint: dict, keep: int = 1, last_step: int | None = None):
    """torch.save of tensors and plain values, whole or not at all; OSError when it cannot. Of what
    was there before, saved at last_step, keep - 1 stay as ckpt-STEP.pt."""
    with replacing(path) as tmp:
        tmp.touch()  # so that a folder that cannot be written says so in the system's words
        try:
            torch.save(checkpoint, tmp)
        except RuntimeError as e:  # torch's word for a disk that is full
            raise OSError(str(e).splitlines()[0] + ": is the disk full?") from None
        if keep > 1 and last_step is not None and path.is_file():
            older = path.with_name(f"ckpt-{last_step}.pt")
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)  # so that there is a ckpt.pt at every moment
            except OSError:  # a file system without links
                os.replace(path, older)
    for old in checkpoints(path.parent)[keep:]:
        old.unlink()


def read_checkpoint(path: Path, **more: type) -> dict:
    """A checkpoint whose every byte was verified, and its "path". ValueError in one line for one
    that is damaged, or lacks a field of every checkpoint or one of `more`, this script's own."""
    checkpoint = OLDER | load_torch(path, verify=True) | {"path": path}
    for name, kind in (FIELDS | more).items():
        value = checkpoint.get(name)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if good and (kind is int or name == "elapsed_s"):
            good = 0 <= value < math.inf
        if not good:
            raise ValueError(f"{path} was not written by this script (its {name} is "
                             f"{type(value).__name__}); convert.py reads nanoGPT's")
    return checkpoint


def newest_checkpoint(out_dir: Path, say=print, **more: type) -> dict | None:
    """The checkpoint in a run's folder: ckpt.pt or, if that is damaged, the one before it. None
    where there is none, ValueError where neither is whole."""
    faults = []
    for path in checkpoints(out_dir)[:2]:
        try:
            checkpoint = read_checkpoint(path, **more)
        except (ValueError, OSError) as e:
            faults.append(str(e))
            continue
        if faults:
            say(f"{faults[0]}; going on from {path}")
        return checkpoint
    if faults:
        raise ValueError(f"{'; nor can the older one be read: '.join(faults)}; bring one back, or "
                         "begin anew with --init_from=scratch --overwrite")
    return None


def take_settings(script: dict):
    """Gives a script that resumes the settings of the run in its out_dir, but for those that a
    command line or a config file gave, and those of the machine and the moment."""
    script["_given"] = script.get("_given", set())
    if script["init_from"] not in ("resume", "auto"):
        return
    for path in checkpoints(Path(script["out_dir"]))[:2]:
        with suppress(ValueError, TypeError, OSError):  # a damaged one is for open_run
            old = settings_of(load_torch(path))
            kept = {*script["_given"], *OF_THE_MOMENT}
            if script.get("eval_only"):  # no arithmetic goes on
                kept.add("dtype")
            script.update({name: value for name, value in old.items()
                           if name in script and name not in kept})
            return
    if script["init_from"] == "resume" and not checkpoints(Path(script["out_dir"])):
        raise ValueError(f"no {Path(script['out_dir'], 'ckpt.pt')} to resume from; start without "
                         "--init_from=resume")


def settings_of(checkpoint: dict) -> dict:
    """The settings that a run was begun with, and the sizes that a pretrained model decided."""
    old, config = dict(checkpoint.get("settings")), dict(checkpoint.get("config"))
    return old | {name: size for name, size in config.items() if old.get(name) is not None}


def check_settings(path: Path, old: dict, new: dict, names, command: str | None = None):
    """ValueError, with all of them, where a resumed run would go on with other values of these
    settings; command: by which the run was begun."""
    other = [f"{name}={old[name]}, not {new[name]}" for name in sorted(names)
             if name in old and new[name] != old[name]]
    if other:
        begun = f" (it was begun by: {command})" if command else ""
        raise ValueError(f"{path} was trained with {'; '.join(other)}; give that, or another "
                         f"--out_dir{begun}")


def check_data(checkpoint: dict | None, digest: str, name):
    """ValueError where a resumed run would go on with other data, which would mix its splits."""
    if checkpoint is not None and checkpoint.get("data", digest) != digest:
        path = checkpoint["path"]
        raise ValueError(f"{path} was trained on other data than {name} has now; bring that back, "
                         "or begin anew with another --out_dir and "
                         f"--init_from={shlex.quote(str(path.parent))}")


@contextmanager
def fitting(path):
    """What torch raises for a checkpoint whose parts do not fit each other, as one line."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        what = (str(e).splitlines() or [""])[0][:200]
        raise ValueError(f"the parts of {path} do not fit each other ({what}): it is damaged, or "
                         "was written by another script") from None


def saved_model(checkpoint: dict, dropout: float) -> tuple[GPT, Tokenizer]:
    """The untrained network of a checkpoint's config, whose weights Run loads, and its tokenizer.
    ValueError where the fields do not fit, or the file is too small for such a network."""
    path = checkpoint["path"]
    config = make_config(GPTConfig, checkpoint["config"] | {"dropout": dropout}, path)
    size = 12 * config.n_layer * config.n_embd ** 2 + config.n_embd * config.vocab_size
    if 2 * size > path.stat().st_size:  # bytes; a fork's parameters may be fewer, not so few
        raise ValueError(f"{path} is damaged: a network of {size:,} parameters is not in it")
    with fitting(path):
        tokenizer = from_json(checkpoint["tokenizer"])
    model = GPT(config)
    model.num_tokens = tokenizer.vocab_size
    return model, tokenizer


def restore(checkpoint: dict, optimizer, scaler):
    """Loads the state of any torch.optim.Optimizer, but not its settings, which are today's, and
    that of float16's scaler. ValueError where it is the state of other parameters."""
    if checkpoint["scaler"]:  # empty where the dtype was not float16
        scaler.load_state_dict(checkpoint["scaler"])
    saved = checkpoint["optimizer"]
    for old, new in zip(saved["param_groups"], optimizer.param_groups):
        old |= {key: value for key, value in new.items() if key != "params"}
    optimizer.load_state_dict(saved)
    has_moments = any(group.get(key) for group in optimizer.param_groups
                      for key in ("betas", "momentum"))
    if not optimizer.state and has_moments and checkpoint["step"] > checkpoint["skipped"]:
        raise ValueError("the state of its optimizer is empty")
    like_parameter = {}  # name: whether the tensors of that name are shaped as their parameters
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                same = value.shape == p.shape
                if value.dim() and like_parameter.setdefault(key, same) != same:
                    raise ValueError(f"its optimizer's {key} is of other parameters")
                # a copy, else the file stays mapped; fused AdamW wants its parameter's strides
                new = torch.empty_like(p if same else value, dtype=value.dtype, device=value.device)
                state[key] = new.copy_(value)


# ---- the folder ----

def open_run(env, out: Path, settings: dict, fixed, **fields: type) -> dict | None:
    """Locks a folder for this run; returns the checkpoint of the run that it goes on with, if any.
    fixed: the settings that a resumed run cannot change; fields: what its checkpoint holds beside
    those of every one. ValueError for a run that would be written over unasked."""
    init_from, overwrite = settings["init_from"], settings["overwrite"]
    resumes = init_from in ("resume", "auto")
    if overwrite and resumes:
        raise ValueError(f"--overwrite begins anew, --init_from={init_from} goes on with the run "
                         f"in {out}: give one of them")
    env.lock(out)
    if env.rank == 0:
        replace_run(out)
    env.sum(0)  # the other ranks wait for that
    if resumes and checkpoints(out):
        checkpoint = newest_checkpoint(out, env.say, **fields)
        check_settings(checkpoint["path"], settings_of(checkpoint), settings, fixed,
                       checkpoint.get("command"))
        return checkpoint
    if init_from == "auto" and "windows" not in fields:  # only train.py has a network of its own
        raise ValueError(f"there is no run in {out} to go on with: name the model that a new one "
                         "begins with, --init_from=MODEL")
    if init_from == "auto":
        env.say(f"there is no run in {out} yet: a new one begins")

    def names(kinds):
        paths = [path for kind in kinds for path in out.glob(kind)]
        return sorted({path.relative_to(out).parts[0] for path in paths
                       if path.is_file() or any(path.iterdir())})

    # What a run is known by, else what a new one would remove; metrics alone are of one that never
    # saved.
    found = names(("ckpt*.pt", "results.json", "best/config.json")) or names(
        set(RUN_FILES) - {"metrics.jsonl", "loss.png"})
    if found and not overwrite:
        resume = "go on with it by --init_from=resume, " if checkpoints(out) else ""
        raise ValueError(f"{out} holds a run already ({', '.join(found)}); {resume}give another "
                         "--out_dir, or write over it with --overwrite")
    return None


def replace_run(out: Path):
    """Puts a new run, which until its first checkpoint or result writes into OUT/.new, in the place
    of what an old one left in the folder. Finishes what one that was killed left to do, or removes
    what it wrote."""
    new, whole = out / NEW, out / f"{NEW}.whole"
    if (new / "ckpt.pt").is_file() or (new / "results.json").is_file():
        for path in [path for kind in RUN_FILES for path in out.glob(kind)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.replace(new, whole)  # from here on there is only the new one
    shutil.rmtree(new, ignore_errors=True)
    if whole.is_dir():
        for path in whole.iterdir():
            os.replace(path, out / path.name)
        whole.rmdir()


def save_best(out_dir: Path, model, tokenizer, files: dict | None = None, **config):
    """Puts a model, its adapters merged, and its tokenizer into OUT/best as a Hugging Face folder.
    Each file is replaced whole; config.json, without which it is no model, comes last. config:
    further fields of it; files: options of the tokenizer's `save`."""
    best = out_dir / "best"
    if tokenizer.eos_id is not None and tokenizer.eos_id not in tokenizer.stop_ids:
        tokenizer.stop_ids.append(tokenizer.eos_id)  # with it training closes its texts
    if not (best / "config.json").is_file():  # else the tokenizer is there, the same
        tokenizer.save(best, **{"model_max_length": model.config.block_size} | (files or {}))
    merge(model)
    model.save_pretrained(best, **tokenizer.model_ids() | config)
    unmerge(model)


# ---- models by name ----

def note_newest(out: Path):
    """Notes a run as the one that was saved last."""
    with suppress(OSError):  # a copy of the scripts that cannot be written
        write_text(NEWEST, f"{out.resolve()}\n")


def newest_run() -> str:
    """The run that was saved last: the one that a training noted in out/.newest, or below out/. A
    classifier writes no text: that is said, and the next one taken. Without a run it is `weights`,
    which is said, too. ValueError if there is neither."""
    noted = NEWEST.read_text("utf-8").strip() if NEWEST.is_file() else ""
    files = {file.resolve() for file in [Path(noted, "ckpt.pt"), *Path("out").glob("**/ckpt.pt")]
             if file.is_file() and file.parent.name not in (NEW, f"{NEW}.whole")}
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        run, config = file.parent, file.parent / "best" / "config.json"
        if run.is_relative_to(Path.cwd()):
            run = run.relative_to(Path.cwd())
        text = config.read_text("utf-8", errors="replace") if config.is_file() else ""
        if 'ForSequenceClassification"' not in text:
            return str(run)
        print(f"the newest run, {run}, is a classifier, see what it makes of a text by: python "
              f"finetune_cls.py --init_from={shlex.quote(str(run))} --predict \"TEXT\"")
    local_folder("weights")
    print("no run under out/ yet: this is the model in weights/, which came with the code")
    return "weights"


def adapter_base(name) -> str | None:
    """The base model that a folder with low-rank adapters names, None for other folders."""
    adapter = local_folder(name) / "adapter_config.json"
    if not adapter.is_file():
        return None
    config = read_json(adapter)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter} names no base model: its base_model_name_or_path is {base!r}")
    if revision not in (None, "main"):
        raise ValueError(f"{adapter} names revision {revision} of {base}, expected none: download "
                         "that, name its folder as base_model_name_or_path, and remove revision")
    return base


def model_tokenizer(name, revision: str | None = None) -> Tokenizer | None:
    """The one that lies with a model (a run or Hugging Face folder, a hub name) or adapters, else
    their base model's, if any. ValueError for one of a kind that is not read here."""
    folder, base = local_folder(name), adapter_base(name)
    if (folder / "ckpt.pt").is_file():
        return from_json(load_torch(folder / "ckpt.pt").get("tokenizer", ""))
    found = [find_file(name, file, revision) for file in (*TOKENIZER_FILES, *OTHER_FILES)]
    found = {path.name: path for path in found if path}  # of the hub's, all lie in one folder
    if found.keys() & {"tokenizer.json", "vocab.json", "vocab.bpe"}:
        tokenizer = open_tokenizer(min(found.values()).parent)
        tokenizer.take_model_ids(read_model_ids(base or name, revision))
        return tokenizer
    if other := found.keys() & set(OTHER_FILES):
        raise ValueError(f"{name}: its tokenizer is {min(other)}, which is not read here; expected "
                         f"tokenizer.json, which {SAVE} writes")
    return model_tokenizer(base, revision) if base else None


def note_decoding(name, revision, num_tokens: int):
    """Names what a model's generation_config.json asks of decoding that the scripts do not do."""
    path = find_file(name, "generation_config.json", revision)
    asked = {key: value for key, value in (read_json(path) if path else {}).items()
             if key not in DECODING and not key.startswith(("_", "output_", "return_"))
             and value not in (None, False, [], {}) and (key, value) != ("repetition_penalty", 1)}
    if min(asked.get("suppress_tokens", [0])) >= num_tokens:  # rows past the tokenizer's ids
        del asked["suppress_tokens"]
    if asked:
        say_once(f"note: {path} asks for {', '.join(sorted(asked))}, which transformers' generate "
                 "does and the scripts here do not")


def load_model(name, tokenizer=None, **options):
    """(GPT, its Tokenizer) of a run folder, a Hugging Face folder or a hub name; of a folder with
    low-rank adapters in PEFT's format, their base model with the adapters merged. A tokenizer, or
    its name, may be given; without one and without files of it, it is GPT-2's. options go to
    GPT.from_pretrained. Rows of the model past the tokenizer's ids are never drawn; ValueError
    where there are fewer, and for a revision of a folder, which has none."""
    is_folder, revision = local_folder(name).is_dir(), options.get("revision")
    if name in ("scratch", "resume", "auto") and not is_folder:
        raise ValueError(f"init_from={name} is for training; name a model: the folder of a run, "
                         "such as out/NAME, or a hub name")
    if base := adapter_base(name):
        folder = local_folder(name)
        try:
            own = tokenizer or model_tokenizer(name, revision)
            model, tokenizer = load_model(base, own, **options)
        except ValueError as e:
            raise ValueError(f"{folder / 'adapter_config.json'} names the base model {base}: {e}"
                             ) from None
        load_adapter(model, folder)
        merge(model, for_good=True)
        return model.requires_grad_(), tokenizer
    if revision and is_folder:
        raise ValueError(f"revision={revision} is of a hub name, {name} is a folder")
    if not is_folder and find_file(name, "adapter_config.json", revision):
        raise ValueError(f"{name} on the hub has an adapter: download it (hf download {name} "
                         "--local-dir FOLDER) and give that FOLDER")
    model = GPT.from_pretrained(name, **options)
    rows, own = model.config.vocab_size, None
    if tokenizer is None:
        tokenizer = own = model_tokenizer(name, revision)
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer or "gpt2")
    size = tokenizer.vocab_size
    if size > rows or own is None and rows - size >= 128:  # fewer may fill up the matrix
        raise ValueError(f"the tokenizer ({tokenizer.name}) has {size} ids, the model in {name} "
                         f"has {rows} rows for them; its folder needs the tokenizer.json that it "
                         f"was trained with, and --tokenizer={name} prepares data for it")
    model.num_tokens = tokenizer.vocab_size
    note_decoding(name, revision, model.num_tokens)
    return model, tokenizer
