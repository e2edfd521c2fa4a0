"""Rules of the house that a machine can check: who imports whom, what the README types, how files are opened."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import kernels
import train_gpt2

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for path in ROOT.glob("**/*.py") if ".venv" not in path.parts)
PRODUCT = [path for path in SOURCES if path.parent != ROOT / "tests"]
OURS = {"train_gpt2", "sample", "model", "training", "kernels", "data"}
MAY_IMPORT = {
    "train_gpt2": {"training", "model", "kernels", "data"},
    "sample": {"training", "model", "kernels", "data"},
    "training": {"training", "model", "kernels", "data"},
    "model": {"kernels"},
    "kernels": {"kernels", "training"},
    "data": {"data"},
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_whom_they_may(path):
    module = path.relative_to(ROOT).parts[0].removesuffix(".py")
    found = {name for name in imported(tree(path).body) if name.split(".")[0] in OURS}
    assert {name.split(".")[0] for name in found} <= MAY_IMPORT[module]
    if module == "kernels" and path.stem in kernels.FAMILIES:
        assert found <= {"kernels"}  # a kernel file imports no other kernel file


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_when_a_module_is_imported(path):
    """Definitions and constants only, and `if __name__ == "__main__"`: processes that are spawned import the script."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Try)
    for node in tree(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        called = ast.unparse(node.value.func) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else ""
        registration = called.endswith(".register_autograd") or called == "forbid_double_backward"
        assert isinstance(node, allowed) or docstring or guard or registration, ast.unparse(node)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
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


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_durations_are_taken_from_a_clock_that_does_not_jump(path):
    assert "time.time(" not in path.read_text(encoding="utf-8")


def test_unsafe_ways_to_read_what_comes_from_outside_do_not_occur():
    for path in PRODUCT:
        calls = [ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        for call in calls:
            assert not re.match(r"(eval|exec|os\.system|pickle\.loads?)\(", call), call
            assert "shell=True" not in call, call
            assert not call.startswith("torch.load(") or "weights_only=True" in call, call
            assert not call.startswith("np.load(") or "allow_pickle=False" in call, call


# ------------------------------------------------------------------------------------------------------------- README


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            line = line.split("  #")[0].strip()
            if block.startswith("#!"):  # a script: only what it does with ours
                line = line[line.index("torchrun") :] if "torchrun" in line else ""
            if line:
                yield line


def test_the_readme_opens_with_the_two_commands_that_the_makefile_has():
    commands = list(readme_commands())
    assert commands[:2] == ["make laptop", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nlaptop:" in makefile and "\ntest:" in makefile


@pytest.mark.parametrize("line", sorted(set(readme_commands())))
def test_a_command_of_the_readme_exists_with_its_options(line):
    words = shlex.split(line)
    while "=" in words[0] and not words[0].startswith("-"):  # VARIABLE=value in front
        words.pop(0)
    if "train_gpt2.py" in words:
        arguments = words[words.index("train_gpt2.py") + 1 :]
        if arguments[-1] == "--help":
            assert arguments[0] in train_gpt2.PRESETS
        else:
            config = tyro.extras.overridable_config_cli(train_gpt2.PRESETS, args=arguments)
            assert isinstance(config, train_gpt2.Config)
    elif words[0] == "python":
        target = words[1:3] if words[1] == "-m" else words[1:2]
        target += words[3:4] if target[-1] == "data.tokenizer" else []  # which has commands, each with its options
        shown = subprocess.run([sys.executable, *target, "--help"], capture_output=True, text=True, cwd=ROOT).stdout
        for word in words[len(target) + 1 :]:
            assert not word.startswith("--") or word in shown, f"{word} is no option of {' '.join(target)}"
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    else:
        assert words[0] in ("git", "cd", "pip", "tensorboard"), f"no test knows what {words[0]} is"
