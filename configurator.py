"""Config files and --key=value over a script's plain globals.

A script's settings are its top-level `name = literal  # comment` lines; it ends with

    if __name__ == "__main__":
        run(main, globals())

and takes `[config/x.py …] [--key=value | --key value …]`, read left to right, later wins. A type
comes from the annotation (`top_k: int | None = None`), else from the default. The comment is the
help; it goes on over indented comment lines directly below (one that starts in the first column
is a heading of what follows).
"""

import ast
import copy
import difflib
import glob
import inspect
import io
import os
import re
import shlex
import sys
import textwrap
import tokenize
import traceback
from contextlib import suppress
from types import ModuleType

HERE = os.path.dirname(os.path.realpath(__file__))
LITERAL = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.expr_context,
           ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator)  # so `64 * 1024` is one too
BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
READ = {"int": int, "float": float, "bool": BOOLS.__getitem__, "str": str,
        "literal": ast.literal_eval}  # literal: anything, the kind of an unannotated None
NANOGPT = {  # its settings, and what stands for them here
    "max_iters": "max_steps", "warmup_iters": "warmup_steps",
    "eval_iters": "eval_tokens, in tokens (its eval_iters x batch_size x block_size)",
    "min_lr": "min_lr_scale, a fraction of learning_rate (its min_lr / learning_rate)",
    "lr_decay_iters": "max_steps, over which the learning rate decays",
    "decay_lr": "lr_schedule (decay_lr=False is constant)",
    "gradient_accumulation_steps": "total_batch_tokens, in tokens (its "
                                   "gradient_accumulation_steps x batch_size x block_size)",
    "always_save_checkpoint": "none: every evaluation saves",
    "backend": "none: it is nccl on GPUs, gloo elsewhere",
    "wandb_log": "wandb_project, which is enough",
    "wandb_run_name": "out_dir, after which the run is named",
    "out_dir": "init_from, the folder of a run"}  # of sample.py
KINDS = {*READ, "list", "list[int]", "list[float]", "list[bool]", "list[str]"}


def configure(settings: dict, argv=None, commands=(), positionals=False) -> list[str]:
    """Set a script's globals from its command line (default: `sys.argv[1:]`).

    Returns the command word (the first word, one of `commands`, if any are declared), then the
    other words if `positionals`, among which a .py file is no config. Where anything is wrong,
    raises ValueError with one line and leaves `settings` untouched. settings["_given"] are the
    names of those that were given. `--help` prints and exits 0.
    """
    known = find_settings(settings)
    kinds = {name: kind for name, (_, kind, _) in known.items()}
    values = {name: default for name, (default, _, _) in known.items()}
    todo, words = list(sys.argv[1:] if argv is None else argv), []
    given, in_configs = {}, set()  # by options, and by config files
    first = f"the first word is one of {', '.join(commands)}"
    while todo:
        word = todo.pop(0)
        if word in ("-h", "--help"):
            print_help(settings.get("__doc__"), known)
            raise SystemExit(0)
        elif word.startswith("--"):
            option, equals, text = word.partition("=")
            kind = kinds.get(name := option[2:].replace("-", "_"))
            if kind is None:
                raise unknown(option, name, kinds, "--")
            is_list, got = kind.startswith("list"), [text] if equals else []
            if not equals and kind.startswith("bool"):
                got = ["True"]
            while not equals and todo and not todo[0].startswith("--") and (is_list or not got):
                got.append(todo.pop(0))
            if not got:
                raise error(f"{option} needs a value: {kind}")
            value = check(option, parse(got, kind), kind)
            if is_list and value and given.get(name):  # else the later wins
                raise error(f"{option} is given twice; give all its values at once: {option} A B")
            values[name] = given[name] = value
        elif is_config(word) and not (words and positionals):
            values, names = read_config(word, kinds, values)
            in_configs |= names
        elif commands and not words and word not in commands:
            raise error(f"unexpected word {word!r}; {first}")
        elif positionals or (commands and not words):
            words.append(word)
        else:
            raise error(f"unexpected word {word!r}; a setting is written --key=value, "
                        "a config file ends in .py")
    if commands and not words:
        raise error(f"a word is missing; {first}")
    settings.update(values, _given={*given, *in_configs})
    return words


def run(main, settings: dict, argv=None, commands=(), positionals=False) -> None:
    """`main(*configure(...))` for a person at a terminal.

    A ValueError or ImportError raised by our own code (the innermost frame is in a file of this
    folder) is a message to a person, and so are an error of the file system and lack of memory:
    one line and exit status 2. Any other is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a text that a terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    ranks = os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")
    rank = f"[rank {os.environ['RANK']}] " if ranks and "RANK" in os.environ else ""
    status = 2
    try:
        try:
            main(*configure(settings, argv, commands, positionals))
        finally:
            sys.stdout.flush()  # here, so that a closed pipe shows now and not at shutdown
        return
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (RuntimeError, MemoryError) as e:
        named = re.search("out of memory|DefaultCPUAllocator", str(e))  # by torch: GPU and CPU
        if not named and not isinstance(e, MemoryError):
            raise
        tried = re.search(r"allocate [\d.]+ \w+", str(e))
        size = f" (it tried to {tried[0]})" if tried else ""
        less, B = "ask for less at once", settings.get("batch_size", 1)
        if "accumulation" in settings:
            less = f"--accumulation={2 * settings['accumulation']} may fit"
        elif B > 1:
            less = f"--batch_size={B} does not fit, --batch_size={B // 2} may"
        message = f"error: out of memory{size}; {less}"
    except (ValueError, OSError, ImportError) as e:
        *_, (frame, _) = traceback.walk_tb(e.__traceback__)
        file = frame.f_code.co_filename
        ours = not file.startswith("<") and os.path.dirname(os.path.realpath(file)) == HERE
        if not ours and (not isinstance(e, OSError) or isinstance(e, ConnectionError)):
            raise
        if isinstance(e, BrokenPipeError):  # output piped to head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE, as the shell's own tools
        message = f"error: {error(str(e) or type(e).__name__)}"
    with suppress(OSError):  # a log on the disk that is full
        sys.stderr.write(f"{rank}{message}\n")  # at once, beside the lines of other ranks
    sys.exit(status)


def command_line(**changes) -> str:
    """The command that started this script, with settings changed."""
    words = sys.argv[1:]
    for i, word in reversed([*enumerate(words)]):
        key, equals, _ = word.partition("=")
        name = key[2:].replace("-", "_") if key.startswith("--") else ""
        if name == "overwrite" and "init_from" in changes:  # which a run that goes on does not
            del words[i]
        elif name in changes:
            del words[i:i + (1 if equals else 2)]  # its value may be the next word
    words += [f"--{key}={value}" for key, value in changes.items()]
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *words])


def find_settings(settings):
    """{name: (default, kind, comment)} of a script; a kind is one of KINDS, or it + ' | None'."""
    with tokenize.open(settings["__file__"]) as f:
        source = f.read()
    comments = {token.start[0]: token for token in tokenize.generate_tokens(
        io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    known = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        name = getattr(targets[0], "id", "") if len(targets) == 1 else ""
        literal = all(isinstance(part, LITERAL) for part in ast.walk(node.value))
        if not literal or not name.islower() or name.startswith("_"):
            continue
        default, annotation = settings[name], getattr(node, "annotation", None)
        kind = ast.unparse(annotation) if annotation else type(default).__name__
        if kind == "list" and not annotation and len(types := {type(v) for v in default}) == 1:
            kind = f"list[{types.pop().__name__}]"
        if default is None and not kind.endswith(" | None"):
            kind += " | None"
        kind = kind.replace("NoneType", "literal")
        if kind.removesuffix(" | None") not in KINDS:
            raise TypeError(f"setting {name} is a {kind}; the name of a constant is upper-case")
        line, comment = node.end_lineno, []
        while line in comments and (not comment or comments[line].line[0].isspace()):
            comment.append(comments[line].string.lstrip("#").strip())
            line += 1
        known[name] = default, kind, " ".join(comment)
    return known


def parse(words, kind):
    """What words of a command line stand for; left a str where they are not of that kind."""
    kind, none, _ = kind.partition(" | None")
    if none and words == ["None"]:
        return None
    if kind.startswith("list"):
        value = parse(words, "literal")
        if len(words) == 1 and type(value) is list:
            return value
        return [parse([word], kind[5:-1] or "str") for word in words if words != [""]]
    if kind == "str":  # the shell does not do it after a `=`
        home = words[0] == "~" or words[0].startswith("~/")
        return os.path.expanduser(words[0]) if home else words[0]
    try:
        return READ[kind](words[0])
    except Exception:  # noqa: BLE001  (literal_eval raises SyntaxError, TypeError, MemoryError, …)
        return words[0]


def check(where, value, kind):
    """`value` if it is of that kind, an int made float where one is meant; else ValueError."""
    base, none, _ = kind.partition(" | None")
    if base == "literal" or (none and value is None):
        return value
    if base.startswith("list") and type(value) is list:
        return [check(where, v, base[5:-1] or "literal") for v in value]
    if base == "float" and type(value) in (int, float):
        if abs(value) <= sys.float_info.max or abs(value) == float("inf"):  # no nan, no 10**400
            return float(value)
    elif type(value).__name__ == base:
        return value
    raise error(f"{where}: got {value!r}, expected {kind}")


def is_config(word) -> bool:
    """Whether a word names a config file, with or without its .py."""
    return word.endswith(".py") or "/" in word and any(
        os.path.isfile(os.path.join(folder, f"{word}.py")) for folder in ("", HERE))


def read_config(word, kinds, values):
    """Run a config file over the current values; returns what it leaves them at, checked, and the
    names that it gave a value, or took over from another with another value."""
    word = word if word.endswith(".py") else f"{word}.py"
    path = word if os.path.exists(word) else os.path.join(HERE, word)
    if not os.path.exists(path):
        there = ", ".join(sorted(glob.glob("config/[!_]*.py", root_dir=HERE))) or "none"
        near = difflib.get_close_matches(word, there.split(", "), 1, 0.85)
        raise error(f"no config file {word!r}; "
                    + (f"did you mean {near[0]}?" if near else f"there are: {there}"))
    space = copy.deepcopy(values) | {"__file__": os.path.abspath(path), "__name__": "config"}
    try:
        with open(path, "rb") as f:
            tree = ast.parse(f.read(), path)
        exec(compile(tree, path, "exec", dont_inherit=True), space)  # noqa: S102
    except Exception as e:  # noqa: BLE001
        lines = [n for f, n in traceback.walk_tb(e.__traceback__) if f.f_code.co_filename == path]
        line = lines[-1] if lines else getattr(e, "lineno", None)
        where = f"{word}:{line}" if line else word
        raise error(f"{where}: {type(e).__name__}: {getattr(e, 'msg', e)}") from None
    wrong = [name for name, value in space.items() if name not in kinds and not (
        name.startswith("_") or callable(value) or isinstance(value, ModuleType))]
    if wrong:
        raise error(f"{word}: " + "; ".join(str(unknown(name, name, kinds)) for name in wrong))
    new = {name: check(f"{word}: {name}", space.get(name, values[name]), kind)
           for name, kind in kinds.items()}
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return new, {name for name in kinds if name in assigned or new[name] != values[name]}


def print_help(doc, known):
    print(f"{inspect.cleandoc(doc or '')}\n\nsettings, their defaults and what they are:")
    width = max(map(len, known), default=0) + 4
    for name, (default, _, comment) in known.items():
        print(textwrap.fill(
            f"{default!r:<16}  {comment}", 100, break_on_hyphens=False,
            initial_indent=f"--{name}".ljust(width), subsequent_indent=" " * (width + 18)))


def unknown(shown, name, kinds, dashes=""):
    here = re.match(r"\w*", NANOGPT.get(name, ""))[0]  # the setting, if this script has it
    if here == "none" or here in kinds:
        return error(f"{shown} is nanoGPT's; here it is "
                     f"{'' if here == 'none' else dashes}{NANOGPT[name]}")
    near = difflib.get_close_matches(name, kinds, 1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists the settings"
    return error(f"{shown}: unknown setting; {hint}")


def error(message):
    return ValueError(" ".join(message.split()))  # one line, whatever was in it
