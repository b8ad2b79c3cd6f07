"""Hugging Face's files of models: read and written; what would be computed otherwise is refused.

They name the sizes otherwise (`n_positions` for block_size) and keep the weights of the blocks'
linear layers as (in, out). Fields of GPTConfig that GPT2Config lacks, such as a fork adds, stand
under `"talegpt": {...}` where they are not at their default; such a file has another `model_type`
and our layout of weights, so that no other program takes it for a GPT-2.
"""

import difflib
import json
import pickle
import re
import shlex
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from files import HERE, hub_file, naming, read_json, replacing, write_text

# GPTConfig's fields: the name in config.json, and GPT-2's value, which holds where none is given.
NAMES = {"block_size": ("n_positions", 1024), "vocab_size": ("vocab_size", 50257),
         "n_layer": ("n_layer", 12), "n_head": ("n_head", 12), "n_embd": ("n_embd", 768),
         "activation": ("activation_function", "gelu_new"),
         "tie_word_embeddings": ("tie_word_embeddings", True), "bias": ("bias", True)}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # the first is read as our dropout
ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "n_ctx": "n_positions",
           "num_hidden_layers": "n_layer", "max_position_embeddings": "n_positions"}
MODEL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transformers can compute in other ways than model.py, with the value that is ours.
FIXED = {"n_inner": None, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
         "add_cross_attention": False, "is_causal": True}
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # stored (in, out) by Hugging Face
PREFIX = re.compile(r"((module|_orig_mod|model)\.)+")  # of DDP, the compiler and other loops
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # buffers of old files, not parameters
WITHOUT_BIAS = re.compile(r"\.(ln_\w|c_\w+)\.weight$")  # of a network with bias=False
UNUSED_BIAS = re.compile(r"\.(ln_\w|c_\w+)\.bias$")  # which transformers' modules have, at zero


def local_folder(name) -> Path:
    """The folder of that name, of a run with a best model its best/; `weights` is the one beside
    the scripts. ValueError where that is missing."""
    folder = HERE / "weights" if str(name).rstrip("/") == "weights" else Path(name)
    if folder == HERE / "weights" and not folder.is_dir():
        raise ValueError(f"there is no model in {folder}; train one (make run, or python train.py "
                         "config/quickstart.py), or bring weights/ back (git checkout -- weights)")
    run = (folder / "best" / "config.json").is_file() and not (folder / "config.json").is_file()
    return folder / "best" if run else folder


def find_file(name, file: str, revision=None) -> Path | None:
    """A file of a model's folder or hub repository, downloaded if need be; None if it has none."""
    folder = local_folder(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the folder that it lies in (nanoGPT's ckpt.pt "
                         f"goes through: python convert.py --input={name} --out=export/NAME)")
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    if run := re.match(r"out/+([^/]+)", str(name)):  # not somebody's model on the hub
        config = f"config/{run[1]}.py"
        hint = f"train it first: python train.py --out_dir={name}"
        if (HERE / config).is_file():
            hint = f"the header of {config} says how to make it"
        raise ValueError(f"no such run: {name}; {hint}, or begin with another model: "
                         "--init_from=gpt2, --init_from=weights")
    if "/" not in str(name) and "gpt2" not in str(name):  # before the hub, which takes its time
        folders = [path.name for path in Path().iterdir() if path.is_dir()] + ["weights"]
        if near := difflib.get_close_matches(str(name), folders, 1, 0.8):
            raise ValueError(f"no folder {name}; did you mean {near[0]}?")
    return hub_file(str(name), file, revision)


def read_pretrained(name, revision=None):
    """({GPTConfig's field: value}, {our tensor name: (shape, function that reads it)}), both in our
    layout, of a hub name, a Hugging Face or a run folder. ValueError for anything unusable."""
    checkpoint = local_folder(name) / "ckpt.pt"
    if checkpoint.is_file():
        saved = load_torch(checkpoint)
        if not all(isinstance(saved.get(key), dict) for key in ("config", "model", "settings")):
            raise ValueError(f"{checkpoint} was not written by train.py; nanoGPT's goes through "
                             "convert.py --input=FILE")
        return saved["config"], named_tensors(checkpoint, saved["model"])
    path = find_file(name, "config.json", revision)
    if path is None:
        raise ValueError(f"{name} holds no config.json and no ckpt.pt: not a model folder")
    hf = read_json(path)
    config, ours = config_from_hf(hf, path), {}
    tensors = {PREFIX.sub("", key, 1) if PREFIX.match(key) else key: tensor
               for key, tensor in read_tensors(name, revision).items()}
    bare = not any(key.startswith("transformer.") for key in tensors)  # GPT2Model's own file
    if not config["bias"] and "talegpt" not in hf:  # transformers gives it biases, and trains them
        config["bias"] = any(UNUSED_BIAS.search(key) and bool(read().count_nonzero())
                             for key, (_, read) in tensors.items())
    for key, (shape, read) in tensors.items():
        if bare and not key.startswith(("lm_head.", "score.")):
            key = f"transformer.{key}"
        if not config["bias"] and UNUSED_BIAS.search(key) or MASKS.search(key):  # zeros, masks
            continue
        if "talegpt" not in hf and CONV1D.search(key) and len(shape) == 2:
            shape, read = shape[::-1], lambda read=read: read().t()  # a view: nothing is moved
        ours[key] = (shape, read)
    if config["tie_word_embeddings"] and "lm_head.weight" in ours:  # tied where it is the same
        ours.setdefault("transformer.wte.weight", ours["lm_head.weight"])  # the one that was kept
        (shape, wte), (head_shape, head) = (ours.get(f"{name}.weight", ((), None))
                                            for name in ("transformer.wte", "lm_head"))
        config["tie_word_embeddings"] = shape == head_shape and torch.equal(wte(), head())
        if config["tie_word_embeddings"]:
            del ours["lm_head.weight"]
    return config, ours


def config_from_hf(hf: dict, path) -> dict:
    """GPTConfig's fields of a GPT-2's config.json; refuses by name what we would not compute."""
    old = "n_embd" in hf and "n_head" in hf  # before there was a model_type
    if hf.get("model_type", "gpt2" if old else None) not in ("gpt2", "talegpt"):
        raise ValueError(f"{path}: model_type is {hf.get('model_type')!r}, expected 'gpt2'")
    hf = dict.fromkeys(DROPOUTS, 0.1) | hf
    for key in ALIASES.keys() & hf.keys() - {"n_ctx"}:  # that one transformers does not read
        ours = ALIASES[key]
        if hf[key] is not None and hf[key] != hf.get(ours, hf[key]):
            raise ValueError(f"{path}: {key}={hf[key]} contradicts {ours}={hf[ours]}")
    hf = {ALIASES[key]: value for key, value in hf.items() if key in ALIASES} | hf
    config = {ours: hf.get(theirs, default) for ours, (theirs, default) in NAMES.items()}
    config["dropout"], width = hf["resid_pdrop"], config["n_embd"]
    if config["activation"] == "gelu_pytorch_tanh":  # the same function
        config["activation"] = "gelu_new"
    if type(width) is int and hf.get("n_inner") == 4 * width:
        hf["n_inner"] = None  # which stands for this value
    for key, ours in FIXED.items():
        if hf.get(key, ours) != ours:
            raise ValueError(f"{path}: {key}={hf[key]!r} differs from {ours!r}, which alone is "
                             "supported here")
    more = hf.get("talegpt", {})
    if not isinstance(more, dict) or more.keys() & config.keys():
        raise ValueError(f"{path}: talegpt is {more!r:.60}, expected settings that GPT-2 lacks")
    return config | more


def read_model_ids(name, revision=None) -> dict:
    """The ids of tokens that a model's files name: generation_config.json or, where that is silent,
    config.json."""
    found = {}
    for file in ("config.json", "generation_config.json"):
        if path := find_file(name, file, revision):
            ids = {key: value for key, value in read_json(path).items() if key in MODEL_IDS}
            found |= {key: value for key, value in ids.items() if value is not None}
    return found


def read_tensors(name, revision=None) -> dict:
    """{name: (shape, function that reads it)} of a model's weights, in one file or several."""
    for file, read in (("model.safetensors", open_safetensors),
                       ("pytorch_model.bin", lambda path: named_tensors(path, load_torch(path)))):
        if path := find_file(name, file, revision):
            return read(path)
        if index := find_file(name, f"{file}.index.json", revision):
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict):
                raise ValueError(f"{index} has no weight_map")
            tensors = {}
            for part in sorted(set(map(str, parts.values()))):
                path = find_file(name, part, revision) if Path(part).name == part else None
                if path is None:
                    raise ValueError(f"{index} names {part!r}, which is missing or outside its "
                                     "folder")
                tensors |= read(path)
            return tensors
    raise ValueError(f"{name} holds no model.safetensors and no pytorch_model.bin")


def named_tensors(path, state: dict) -> dict:
    """{name: (shape, function that reads it)} of a state dict; ValueError for anything else."""
    for key, tensor in state.items():
        if not isinstance(key, str) or getattr(tensor, "layout", None) is not torch.strided:
            raise ValueError(f"{path}: {key!r} is {type(tensor).__name__}, expected names and "
                             "dense tensors")
    return {key: (tuple(tensor.shape), lambda tensor=tensor: tensor)
            for key, tensor in state.items()}


def open_safetensors(path) -> dict:
    """{name: (shape, function that reads it)} of a safetensors file, which is mapped, not read."""
    try:
        file = safe_open(path, framework="pt")
        return {key: (tuple(file.get_slice(key).get_shape()), lambda key=key: file.get_tensor(key))
                for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or not safetensors: {e}") from None


def load_torch(path, verify: bool = False) -> dict:
    """torch.load of tensors and plain values only: a pickle that would run code is refused. verify:
    every byte must agree with the CRC-32s in the file, which torch.load does not check."""
    try:
        with naming(path):
            if verify:
                with zipfile.ZipFile(path) as file:
                    if damaged := file.testzip():
                        raise ValueError(f"{damaged!r} in it has another checksum")
            loaded = torch.load(path, map_location="cpu", weights_only=True,
                                mmap=zipfile.is_zipfile(path))  # before torch 1.6 it was no zip
    except OSError:
        raise
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} holds more than tensors and is not loaded, as its pickle could "
                         f"run code: {str(e).splitlines()[0][:200]}") from None
    except Exception as e:  # noqa: BLE001 (a damaged file can raise anything)
        what = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is damaged: {what}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dict")  # noqa: TRY004
    return loaded


def make_config(config_class, values: dict, where):
    """The GPTConfig of a saved model's settings; ValueError names `where` they are from."""
    unknown = values.keys() - {field.name for field in fields(config_class)}
    if unknown:
        raise ValueError(f"{where}: its network has the setting {unknown.pop()!r}, which GPTConfig "
                         "in model.py lacks; load it with the code that trained it")
    try:
        return config_class(**values)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def load(model_class, config_class, name, revision, dtype, block_size, dropout):
    """What GPT.from_pretrained says."""
    values, tensors = read_pretrained(name, revision)
    if "score.weight" in tensors:
        raise ValueError(f"{name} is a classifier, which writes no text; see what it makes of one "
                         f"by: python finetune_cls.py --init_from={shlex.quote(str(name))} "
                         '--predict "TEXT"')
    if dropout is not None:
        values["dropout"] = dropout
    config = make_config(config_class, values, name)
    with torch.device("meta"):  # no memory, no random numbers
        model = model_class(config)
    if any(buffer.is_meta for buffer in model.buffers()):  # of a fork: they are in no file
        model = model_class(config)
    state = fitting_tensors(tensors, model.state_dict(), name, dtype)
    model.load_state_dict(state, assign=True)
    if block_size is not None:
        if block_size > config.block_size:
            raise ValueError(f"block_size={block_size} is more than the {config.block_size} "
                             f"positions of {name}; --block_size={config.block_size} would do")
        config.block_size = block_size
        if "wpe" in model.transformer:
            wpe = model.transformer.wpe
            wpe.weight, wpe.num_embeddings = nn.Parameter(wpe.weight[:block_size]), block_size
    return model.eval()


def fitting_tensors(tensors: dict, wanted: dict, name, dtype=None) -> dict:
    """A state_dict with the names and shapes of `wanted` from the tensors of `read_pretrained`, as
    they are or, with dtype, as copies. ValueError for one that is missing, too many or another."""
    state = {}
    for key in wanted | tensors:
        shape, read = tensors.get(key, ("none", None))
        needed = tuple(wanted[key].shape) if key in wanted else "none"
        if shape != needed:
            raise ValueError(f"{name}: its tensors are not those that its config.json describes: "
                             f"{key} has shape {shape}, the config needs {needed}")
        tensor = read()
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {key} is {tensor.dtype}, not a floating-point tensor")
        if dtype is not None:
            tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        state[key] = tensor
    return state


def save(model, defaults, folder, more: dict):
    """Writes a GPT as transformers reads it. defaults: plain GPT-2's GPTConfig; more: further
    fields of config.json, which go before ours."""
    config, state, tensors = vars(model.config), model.state_dict(), {}
    hf = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "layer_norm_epsilon": 1e-5}
    hf |= {theirs: config[ours] for ours, (theirs, _) in NAMES.items()}
    hf["n_ctx"] = config["block_size"]  # an older name, which llama.cpp asks for
    hf |= dict.fromkeys(DROPOUTS, config["dropout"])
    hf["torch_dtype"] = str(state["transformer.wte.weight"].dtype).removeprefix("torch.")
    hf |= more
    own = {name: value for name, value in config.items()
           if name not in {*NAMES, "dropout"} and value != getattr(defaults, name)}
    if own:
        hf |= {"architectures": ["TaleGPT"], "model_type": "talegpt", "talegpt": own}
    for name, tensor in state.items():
        if not own and CONV1D.search(name):
            tensor = tensor.t()
        tensors[name] = tensor.contiguous()
        if not own and not config["bias"] and WITHOUT_BIAS.search(name):
            zeros = tensor.new_zeros(tensor.size(-1))  # their modules always have a bias
            tensors[name.replace("weight", "bias")] = zeros
    save_safetensors(Path(folder) / "model.safetensors", tensors)
    generation = {key: hf[key] for key in MODEL_IDS if key in hf}
    generation["max_length"] = config["block_size"]  # else pipelines go on past the last position
    if model.num_tokens < config["vocab_size"]:  # rows that only fill up the matrix
        generation["suppress_tokens"] = [*range(model.num_tokens, config["vocab_size"])]
    write_text(Path(folder) / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_text(Path(folder) / "config.json", json.dumps(hf, indent=2) + "\n")


def save_safetensors(path, tensors: dict):
    """Writes tensors by name as Hugging Face's libraries read them, whole or not at all."""
    with replacing(path) as tmp:
        try:
            save_file(tensors, tmp, {"format": "pt"})
        except SafetensorError as e:  # a disk that is full
            raise OSError(str(e)) from None
        tmp.chmod(0o644)  # safetensors leaves 0600
