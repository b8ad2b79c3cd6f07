"""Files written whole or not at all, readers that name the file they fail on, the hub's files."""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent  # where the scripts, data/, config/ and weights/ lie
UNREACHABLE = set()  # names that the hub could not be asked for: once is enough, it takes long


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
    with suppress(OSError):  # Windows and a few file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name, too, outlives a loss of power
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


def read_json(path) -> dict:
    """The object of a JSON file; ValueError for anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")  # noqa: TRY004
    return value


def hub_file(name: str, file: str, revision: str | None = None):
    """Path of a hub repository's file in the local cache, downloaded if need be; None if it has
    none. A cached copy is taken as it is; `revision` pins one."""
    from huggingface_hub import errors, hf_hub_download, logging, try_to_load_from_cache
    logging.set_verbosity_error()  # without a network it tells of each of its retries
    try:
        try:
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            if name in UNREACHABLE:
                raise
            return Path(hf_hub_download(name, file, revision=revision))
    except errors.HFValidationError:
        raise ValueError(f"no folder {name}, and it is not a hub name such as gpt2 or owner/name"
                         ) from None
    except errors.LocalEntryNotFoundError:
        UNREACHABLE.add(name)
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if file != "config.json" and isinstance(cached, str):
            return None  # offline: the repository is there, this file of it is not
        raise ValueError(f"{name} is no folder, not in the hub's local cache, and the hub cannot "
                         f"be reached; download it where there is a network (hf download {name} "
                         "--local-dir FOLDER) and give that FOLDER, or take the small model "
                         "that came with the code, weights") from None
    except errors.EntryNotFoundError:
        return None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no model {name}, or it needs a login") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision}") from None
