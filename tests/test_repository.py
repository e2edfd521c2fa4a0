"""Rules that a machine can check: imports, other systems, what READMEs type, how files are opened, spelling."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

import kernels
import train_gpt2
from training.sweep import take_grid

SOURCES = sorted(path for path in ROOT.glob("**/*.py") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts))
PRODUCT = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
READMES = sorted(path for path in ROOT.glob("**/README.md") if ".venv" not in path.relative_to(ROOT).parts)
EACH = pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def text(path):
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path):
    return ast.parse(text(path))


# ------------------------------------------------------------------------------------------------------------ imports

# data and kernels import nothing of ours but themselves, model imports kernels, training imports those, the scripts all
BELOW = {"data": set(), "kernels": set(), "model": {"kernels"}, "training": {"data", "kernels", "model"}}
BELOW |= dict.fromkeys(("train_gpt2", "sample"), {"data", "kernels", "model", "training"})
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PRODUCT}


def imports(node):
    """The modules of ours that the import statements below a node of a syntax tree name."""
    for part in ast.walk(node):
        names = []
        if isinstance(part, ast.Import):
            names = [alias.name for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f"a relative import: {ast.unparse(part)}"
            members = [f"{part.module}.{alias.name}" for alias in part.names]
            names = [member if member in MODULES else part.module for member in members]
        yield from (name for name in names if name.split(".")[0] in BELOW)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_those_on_the_floors_below_and_never_inside_a_function(module):
    floor, nodes = module.split(".")[0], list(ast.walk(tree(MODULES[module])))
    found = set(imports(tree(MODULES[module])))
    assert {name.split(".")[0] for name in found} <= BELOW[floor] | {floor}
    late = [name for node in nodes if isinstance(node, ast.FunctionDef | ast.Lambda) for name in imports(node)]
    assert late == []
    if module.removeprefix("kernels.") in kernels.FAMILIES:
        assert not found & {"kernels", *(f"kernels.{family}" for family in kernels.FAMILIES)}  # nor another kernel file


def test_no_module_imports_itself_by_way_of_others():
    below = {module: set(imports(tree(path))) for module, path in MODULES.items()}
    while leaves := [module for module, found in below.items() if not found & set(below)]:
        for module in leaves:
            del below[module]
    assert below == {}, "these, or what they import, import each other"


@EACH
def test_nothing_runs_when_a_module_is_imported(path):
    """Definitions and constants only, and `if __name__ == "__main__"`: processes that are spawned import the script."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Try)
    for node in tree(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guards = "__name__", "startup.is_command_of"  # python -m: as it finds the command, it imports the package
        guard = isinstance(node, ast.If) and any(guard in ast.unparse(node.test) for guard in guards)
        called = ast.unparse(node.value.func) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else ""
        registration = called.endswith(".register_autograd") or called == "common.forbid_double_backward"
        assert isinstance(node, allowed) or docstring or guard or registration, ast.unparse(node)


# ------------------------------------------------------------------------------------------- other Pythons and systems

NEED_TRITON = {"kernels.report.__main__", "kernels.report.traffic"}  # they look at what Triton makes of a kernel
NEED_TRITON |= {"kernels.emulator.driver", "kernels.emulator.costs", "kernels.emulator.launches"}
ELSEWHERE = """
import builtins, importlib, os, signal, sys
ours, hidden = set({ours}), {{"fcntl", "resource", "termios", "pwd", "grp", "pty", "triton"}}
real = builtins.__import__

def without(name, globals=None, *rest):
    if name.split(".")[0] in hidden and (globals or {{}}).get("__name__", "").split(".")[0] in ours:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return real(name, globals, *rest)

builtins.__import__ = without
import torch, numpy, tyro, tqdm, multiprocessing, subprocess
for module, names in ((os, ("fork", "getuid", "sched_getaffinity", "O_NONBLOCK")),
                      (signal, ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGSTOP", "alarm"))):
    for name in names:
        vars(module).pop(name, None)
for module in {modules}:
    importlib.import_module(module)
    print(module)
"""


@pytest.mark.parametrize("minor", range(11, 15))
def test_the_grammar_is_that_of_every_python_from_3_11_on(minor):
    for path in SOURCES:
        ast.parse(text(path), feature_version=(3, minor))


def test_every_module_can_be_imported_without_triton_and_without_what_windows_lacks():
    modules = [module for module in MODULES if module not in NEED_TRITON]
    program = ELSEWHERE.format(ours=sorted(BELOW), modules=modules)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == modules, done.stderr


@EACH
def test_text_is_read_and_written_as_utf8_on_every_system(path):
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = any(re.fullmatch(r"[rwxa]?b\+?|[rwxa]\+?b", word) for word in words)
        opens = name == "open" and not re.search(r"os\.open|opener", ast.unparse(node.func))  # not a file of text
        if (opens or (method and name in ("read_text", "write_text"))) and not binary:
            explicit = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert explicit or "utf-8" in words, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


@EACH
def test_durations_are_taken_from_a_clock_that_does_not_jump(path):
    assert "time.time(" not in text(path)


def test_unsafe_ways_to_read_what_comes_from_outside_do_not_occur():
    for path in PRODUCT:
        calls = [ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        for call in calls:
            assert not re.match(r"(eval|exec|os\.system|pickle\.loads?)\(", call), call
            assert "shell=True" not in call, call
            assert not call.startswith("torch.load(") or "weights_only=True" in call, call
            assert not call.startswith("np.load(") or "allow_pickle=False" in call, call


# ----------------------------------------------------------------------------------------------------------- language

BRITISH = r"""(?xi) \b \w* (?:
    (?: character|emphas|final|general|initial|maxim|minim|normal|optim|organ|parallel|penal|quant|random|real|recogn|
        serial|special|summar|synchron|token|util|vector ) is (?: e[ds]? | er s? | ing | ation s? ) \b
    | (?: analys | catalyse | paralyse ) (?: e | ing ) \b | behaviour | favour | colour | honour | neighbour | labour
    | licence | defence | offence | artefact | catalogue | centre\b | grey | metre\b | judgement | whilst | fulfil\b
    | (?: label | model | travel | cancel | signal ) l (?: ed | ing | er ) \b )"""


def lines_with(pattern, paths):
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(text(path).splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_the_scripts_and_the_model_fit_a_terminal_of_100_columns():
    for name in ("train_gpt2.py", "sample.py", "model.py"):
        assert max(map(len, text(ROOT / name).splitlines())) <= 100, name


def test_spelling_is_american():
    words = [path for path in [*SOURCES, *READMES] if path != Path(__file__)]
    assert lines_with(BRITISH, words) == []


def test_where_is_kept_for_places():
    assert len(found := lines_with(r"(?<!\.)\bwhere\b", PRODUCT)) < 3, "\n".join(found)  # tl.where is code


def test_docstrings_open_with_a_verb_or_a_noun():
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [
        f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, documented) and re.match(r"(Of|Where)\b", docstring := ast.get_docstring(node) or "")
    ]
    assert found == []


# ------------------------------------------------------------------------------------------------------------ READMEs


def readme_commands(path):
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text(path).replace("\\\n", " "), re.DOTALL):
        for line in block.splitlines():
            line = line.split("  #")[0].strip()
            if block.startswith("#!"):  # a script: only what it does with ours
                line = line[line.index("torchrun") :] if "torchrun" in line else ""
            if line:
                yield line


@functools.cache
def help_of(name, *words):
    """What a module of ours prints for --help, in this process."""
    module = importlib.import_module(f"{name}.__main__" if ROOT.joinpath(*name.split(".")).is_dir() else name)
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words, "--help"])
        with pytest.raises(SystemExit):
            module.main()
    assert '\nif __name__ == "__main__":\n' in text(Path(module.__file__))
    return shown.getvalue()


def test_the_readme_opens_with_the_two_commands_that_the_makefile_has():
    assert list(readme_commands(ROOT / "README.md"))[:2] == ["make laptop", "make test"]
    makefile = text(ROOT / "Makefile")
    assert "\nlaptop:" in makefile and "\ntest:" in makefile


@pytest.mark.parametrize("line", sorted({line for path in READMES for line in readme_commands(path)}))
def test_a_command_of_a_readme_exists_with_its_options(line):
    words = shlex.split(line)
    while "=" in words[0] and not words[0].startswith("-"):  # VARIABLE=value in front
        words.pop(0)
    if "train_gpt2.py" in words:
        arguments = words[words.index("train_gpt2.py") + 1 :]
        if arguments[0] == "--ladder":
            assert set(arguments[1:]) <= {"--quick"}
        elif arguments[-1] == "--help":
            assert arguments[0] in train_gpt2.PRESETS
        else:
            assert isinstance(train_gpt2.parse(take_grid(arguments)[0]), train_gpt2.Config)
    elif words[0] == "python":
        if words[1] == "-m":
            target, rest = words[2:3], words[3:]
            if target[0] == "data.bpe" and rest:  # which have commands, each with its options
                target.append(rest.pop(0))
        else:
            target, rest = [words[1].removesuffix(".py")], words[2:]
            assert words[1].startswith("-") or (ROOT / words[1]).exists()
        for word in rest:
            assert not word.startswith("--") or word in help_of(*target), f"{word} is no option of {line}"
    elif words[0] == "make":
        assert f"\n{words[1]}:" in text(ROOT / "Makefile")
    else:
        assert words[0] in ("git", "cd", "pip", "tensorboard", ".ci/run"), f"no test knows what {words[0]} is"


def test_tests_that_a_readme_names_exist():
    files = {path.name for path in SOURCES}
    functions = {name for path in SOURCES for name in re.findall(r"^def (test_\w+)", text(path), re.MULTILINE)}
    named = {name for path in READMES for name in re.findall(r"`(?:tests/)?(test_[a-z\d_]+(?:\.py)?)`", text(path))}
    assert named - files - functions == set()
