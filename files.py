"""Files written whole or not at all, and the files of models: opened, refused in one line."""

import json
import os
import pickle
import re
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent


@contextmanager
def replacing(path):
    """Yields a temporary path; on success what was written there is flushed to disk and takes the
    place of `path` in one step. On failure the old file stays whole; OSError says so."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise OSError(f"cannot write {path}: {e.strerror or e}; what was there before is untouched"
                      ) from e
    finally:
        with suppress(OSError):  # a read-only file system says so even where there is no such file
            tmp.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name, too, outlives a loss of power
        with suppress(OSError):  # a few file systems cannot
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read_text(path) -> str:
    """The text of a UTF-8 file, without a byte-order mark; ValueError for another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # CRLF becomes LF
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}; save it as UTF-8"
                         ) from None


def write_text(path, text: str):
    """Writes a UTF-8 file, whole or not at all."""
    with replacing(path) as tmp:
        tmp.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def naming(path):
    """Gives the name of a file to an OSError of reading or writing it, which comes without."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


# ---- models ----

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # stored (in, out) by Hugging Face
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # buffers of old files, not parameters


def local_folder(name) -> Path:
    """The folder of that name, of a run with a best model its best/; `weights` is the one beside the
    scripts. ValueError without that."""
    folder = HERE / "weights" if str(name).rstrip("/") == "weights" else Path(name)
    if folder == HERE / "weights" and not folder.is_dir():
        raise ValueError(f"there is no model in {folder}; train one (make run, or python train.py "
                         "config/quickstart.py), or bring weights/ back (git checkout -- weights)")
    return folder / "best" if (folder / "best" / "config.json").is_file() else folder


def read_pretrained(name, revision=None):
    """({GPTConfig's field: value}, {our tensor name: (shape in our layout, function that reads it)})
    of a hub name, a Hugging Face or a run folder. ValueError in one line for anything unusable."""
    folder = local_folder(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the folder that it lies in")
    if folder.is_dir():
        if (folder / "ckpt.pt").is_file():
            checkpoint = load_torch(folder / "ckpt.pt")
            config, state = checkpoint.get("config"), checkpoint.get("model")
            if "model_args" in checkpoint or not isinstance(config, dict) or not isinstance(state, dict):
                raise ValueError(f"{folder / 'ckpt.pt'} was not written by train.py; nanoGPT's goes "
                                 "through convert.py --input=FILE")
            return dict(config), named_tensors(folder / "ckpt.pt", state)

        def find(file):
            return folder / file if (folder / file).is_file() else None
    elif Path(name).parts[:1] == ("out",):  # a run's folder, not somebody's model on the hub
        config = f"config/{''.join(Path(name).parts[1:2])}.py"
        hint = (f"the header of {config} says how to make it" if (HERE / config).is_file() else
                f"train it first: python train.py --out_dir={name}")
        raise ValueError(f"no such run: {name}; {hint}")
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        def find(file):
            return hub_file(str(name), file, revision)
    else:
        raise ValueError(f"no folder {name}, and it is not a hub name such as gpt2 or owner/name")

    path = find("config.json")
    if path is None:
        raise ValueError(f"{name} holds no config.json and no ckpt.pt: not a model folder")
    config = config_from_hf(read_json(path), path)
    tensors = {}
    for whole, read in (("model.safetensors", open_safetensors),
                        ("pytorch_model.bin", lambda path: named_tensors(path, load_torch(path)))):
        if (path := find(whole)) is not None:
            tensors = read(path)
        elif (path := find(f"{whole}.index.json")) is not None:
            index = read_json(path).get("weight_map")
            if not isinstance(index, dict):
                raise ValueError(f"{path} has no weight_map")
            for file in sorted(set(map(str, index.values()))):
                if Path(file).name != file:
                    raise ValueError(f"{path} names {file!r}, outside its folder")
                if (part := find(file)) is None:
                    raise ValueError(f"{name} lacks {file}, which its index names")
                tensors |= read(part)
        if path is not None:
            break
    else:
        raise ValueError(f"{name} holds no model.safetensors and no pytorch_model.bin")

    ours = {}
    for key, (shape, read) in tensors.items():
        if not key.startswith(("transformer.", "lm_head.")):
            key = f"transformer.{key}"  # saved from the bare GPT2Model
        if MASKS.search(key) or key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if not config["bias"] and re.search(r"\.(ln_\w|c_\w+)\.bias$", key):
            if read().count_nonzero():
                raise ValueError(f"{name}: {key} is not zero, but config.json says bias false")
            continue
        if CONV1D.search(key) and len(shape) == 2:  # a view: nothing is moved
            shape, read = shape[::-1], lambda read=read: read().t()
        ours[key] = (shape, read)
    return config, ours


def config_from_hf(hf: dict, path) -> dict:
    """GPTConfig's fields of a Hugging Face GPT-2 config; refuses by name what we would not compute."""
    if hf.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {hf.get('model_type')!r}, expected 'gpt2'")
    aliases = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "n_ctx": "n_positions",
               "num_hidden_layers": "n_layer", "max_position_embeddings": "n_positions"}
    hf = {aliases[key]: value for key, value in hf.items() if key in aliases} | hf
    width = hf.get("n_embd", 768)
    defaults = {"n_inner": None, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
                "add_cross_attention": False}
    for key, default in defaults.items():
        value = hf.get(key, default)
        if value != default and not (
                key == "n_inner" and type(width) is int and value == 4 * width):
            raise ValueError(f"{path}: {key}={value!r} is not supported, only {default!r}")
    dropouts = [hf.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if any(dropout != dropouts[0] for dropout in dropouts):
        raise ValueError(f"{path}: resid_pdrop, embd_pdrop and attn_pdrop differ: {dropouts}")
    activation = hf.get("activation_function", "gelu_new")
    return {
        "block_size": hf.get("n_positions", 1024), "vocab_size": hf.get("vocab_size", 50257),
        "n_layer": hf.get("n_layer", 12), "n_head": hf.get("n_head", 12), "n_embd": width,
        "dropout": dropouts[0], "bias": hf.get("bias", True),
        "activation": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "tie_word_embeddings": hf.get("tie_word_embeddings", True)}


def read_json(path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")  # noqa: TRY004
    return value


def named_tensors(path, state: dict) -> dict:
    """{name: (shape, function that reads it)} of a state dict; ValueError for anything else in it."""
    import torch
    for key, tensor in state.items():
        if not isinstance(key, str) or getattr(tensor, "layout", None) is not torch.strided:
            raise ValueError(f"{path}: {key!r} is {type(tensor).__name__}, expected names and dense "
                             "tensors")
    return {key: (tensor.shape, lambda tensor=tensor: tensor) for key, tensor in state.items()}


def open_safetensors(path) -> dict:
    """{name: (shape, function that reads it)} of a safetensors file, which is mapped, not read."""
    from safetensors import SafetensorError, safe_open
    try:
        file = safe_open(path, framework="pt")
        return {key: (tuple(file.get_slice(key).get_shape()), lambda key=key: file.get_tensor(key))
                for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or not safetensors: {e}") from None


def save_safetensors(path, tensors: dict):
    """Writes tensors by name as Hugging Face's libraries read them, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    with replacing(path) as tmp:
        try:
            save_file(tensors, tmp, {"format": "pt"})
        except SafetensorError as e:  # a disk that is full
            raise OSError(str(e)) from None
        tmp.chmod(0o644)  # safetensors leaves 0600


def load_torch(path) -> dict:
    """torch.load of tensors and plain values only: a pickle that would run code is refused."""
    import torch
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True,
                            mmap=zipfile.is_zipfile(path))  # files older than torch 1.6 are no zip
    except OSError:
        raise
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} holds more than tensors and is not loaded, as its pickle could run "
                         f"code: {str(e).splitlines()[0][:200]}") from None
    except Exception as e:  # noqa: BLE001 (a damaged pickle can raise anything)
        raise ValueError(f"{path} is damaged: "
                         f"{(str(e) or type(e).__name__).splitlines()[0][:200]}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dict")  # noqa: TRY004
    return loaded


def hub_file(name: str, file: str, revision: str | None = None):
    """Path of a hub repository's file in the local cache, downloaded if need be; None if it has
    none. A cached copy is taken as it is; `revision` pins one."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
    try:
        try:
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return Path(hf_hub_download(name, file, revision=revision))
    except errors.HFValidationError:
        raise ValueError(f"no folder {name}, and it is not a hub name") from None
    except errors.LocalEntryNotFoundError:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if file != "config.json" and isinstance(cached, str):
            return None  # offline: the repository is there, this file of it is not
        raise ValueError(
            f"{name} is no local folder, it is not in the hub's local cache, and the hub cannot be "
            f"reached; download it where there is a network (hf download {name} --local-dir FOLDER) "
            "and give that FOLDER") from None
    except errors.EntryNotFoundError:
        return None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {name}, or it needs a login") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision}") from None
