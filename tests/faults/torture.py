"""
Cause faults on purpose, for a given time: python tests/faults/torture.py --seconds 3600 --seed 0

    kill     a command is killed at one of its file operations and repeated: what it leaves must equal what an
             undisturbed command leaves, with no extra file
    error    the operation fails, as on a full or broken disk: one error line and exit status 2, or a warning; then the
             same as above
    chain    a run is killed at random moments, again and again, until it ends: the same bits
    file     a file that is read is changed, by bytes or by fields: exit status 0 or 2, and one error line
    option   options with values that nobody should type: the same

Each trial runs in a process of its own, forked from this one, so that the imports are paid once. Operations are counted
by shim.c, a library that is loaded into this process by starting it again. Prints a line for whatever is wrong, with
the seed of its trial, then the counts; exit status 1 if anything was wrong.
"""

import argparse
import collections
import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]
LIMIT = 300  # seconds that a trial may take on a busy machine
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EDQUOT)
KINDS = ("kill", "error", "chain", "file", "option")
TINY = shlex.split(
    "laptop --n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --batch-tokens 64 --micro-batch 4 --eval-tokens 64 "
    "--eval-every 3 --sample-every 3 --sample-tokens 20 --checkpoint-every 2 --keep 2 --max-steps 6 --warmup-steps 2 "
    "--dtype float32 --data dataset --out-dir work/run"
)


def compiled(folder: Path) -> Path | None:
    """Return the shim, compiled into the folder; None without a compiler or LD_PRELOAD."""
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler is None:
        return None
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--trials", type=int, default=10**9, help="at most so many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    if "GPT2_SHIM" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            library = compiled(Path(folder))
            more = {"GPT2_SHIM": str(library or ""), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            more |= {"LD_PRELOAD": str(library)} if library else {}
            return subprocess.run([sys.executable, *sys.argv], env=os.environ | more).returncode
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.chdir(os.path.realpath(folder))
        return Torture(options).run()


class Torture:
    def __init__(self, options):
        self.options, self.counts, self.found = options, collections.Counter(), 0
        self.shim = ctypes.CDLL(os.environ["GPT2_SHIM"]) if os.environ["GPT2_SHIM"] else None
        self.references = {}  # command -> (operations, what it leaves)
        self.prepare()

    def prepare(self) -> None:
        """Make what the trials start from, in the current folder: texts, a dataset, a run, an export, a tokenizer."""
        import matplotlib.figure  # noqa: F401  so that forked processes find them imported
        import matplotlib.ticker  # noqa: F401
        import torch._dynamo  # which optimizers import

        import sample  # noqa: F401
        import train_gpt2  # noqa: F401
        from data import bpe, fineweb, text  # noqa: F401

        torch.set_num_threads(1)
        chosen, words = random.Random(0), shlex.split("the cat sat on a mat and it ran to see the king of all he had")
        lines = [" ".join(chosen.choice(words) for _ in range(9)) for _ in range(200)]
        Path("text.txt").write_text("\n".join(lines), encoding="utf-8")
        Path("rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
        os.mkdir("work")
        for command in (
            ["data.text", "text.txt", "--out", "dataset"],
            ["data.bpe", "train", "text.txt", "--vocab-size", "280", "--out", "tokenizer"],
            ["data.fineweb", "--input", "rows.jsonl", "--out", "web", "--shard-tokens", "500", "--processes", "1"],
            ["train_gpt2", *TINY],
            ["sample", "work/run", "--export", "exported"],
        ):
            status, said = self.attempt(command)
            assert status == 0, (command, status, said)
        os.rename("work", "done")

    def run(self) -> int:
        began, trial = time.monotonic(), 0
        kinds = [kind for kind in self.options.only if self.shim or kind not in ("kill", "error")]
        while time.monotonic() - began < self.options.seconds and trial < self.options.trials:
            for kind in kinds:
                self.random = random.Random(f"{self.options.seed} {trial} {kind}")
                shutil.rmtree("work", ignore_errors=True)
                os.mkdir("work")
                self.counts[kind] += 1
                wrong = getattr(self, kind)()
                if wrong:
                    self.found += 1
                    print(f"WRONG: {kind}, --seed {self.options.seed}, trial {trial}: {wrong}", flush=True)
            trial += 1
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts.items())
        print(f"{time.monotonic() - began:.0f} s, seed {self.options.seed}: {kinds}; wrong: {self.found}", flush=True)
        return 1 if self.found else 0

    # --------------------------------------------------------------------------------------------------- processes

    def attempt(self, command, strike=0, code=0, below="work", kill_after=None) -> tuple[int, str]:
        """Run a command in a forked process. Return its exit status, minus the signal that ended it, and its output."""
        with open("said", "wb") as file:
            pid = os.fork()
            if pid == 0:
                self.child(command, file.fileno(), strike, code, below)
        deadline = time.monotonic() + LIMIT
        sent = False
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            time.sleep(0.005)
            now = time.monotonic()
            if now > deadline or (kill_after is not None and now > deadline - LIMIT + kill_after):
                sent = now > deadline
                os.kill(pid, signal.SIGKILL)
        said = Path("said").read_bytes().decode(errors="replace")
        return os.waitstatus_to_exitcode(ended[1]), said + (f"\nstill running after {LIMIT} s" if sent else "")

    def child(self, command, output, strike, code, below) -> None:
        status = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
            if self.shim:
                self.shim.arm(strike, code, os.fsencode(os.path.abspath(below)))
            try:
                call(command)
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if self.shim:
                operations = self.shim.operations()
                self.shim.arm(0, 0, b"/nothing")
                Path("operations").write_text(str(operations), encoding="utf-8")
            sys.stdout.flush()
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
                sys.stderr.flush()
        os._exit(status)

    def commands(self) -> list[list[str]]:
        return [
            ["train_gpt2", *TINY],
            ["train_gpt2", *TINY],  # the one with most operations, twice as often
            ["data.text", "text.txt", "--out", "work/out"],
            ["data.bpe", "train", "text.txt", "--vocab-size", "280", "--out", "work/out"],
            ["sample", "done/run", "--export", "work/out"],
        ]

    def reference(self, command) -> tuple[int, dict[str, str]]:
        """Return how many operations a command does that is left alone, and what it leaves."""
        key = tuple(command)
        if key not in self.references:
            status, said = self.attempt(command)
            assert status == 0, said
            self.references[key] = int(Path("operations").read_text(encoding="utf-8")), content("work")
            shutil.rmtree("work")
            os.mkdir("work")
        return self.references[key]

    # ------------------------------------------------------------------------------------------------------ trials

    def kill(self) -> str:
        command = self.random.choice(self.commands())
        operations, expected = self.reference(command)
        strike = self.random.randint(1, operations)
        where = f"{command[0]} killed at operation {strike} of {operations}"
        status, said = self.attempt(command, strike)
        if status != -signal.SIGKILL:
            return f"{where}: exit status {status} instead: {said[-500:]}"
        return self.repeated(command, expected, where)

    def error(self) -> str:
        command, code = self.random.choice(self.commands()), self.random.choice(ERRORS)
        operations, expected = self.reference(command)
        strike = self.random.randint(1, operations)
        where = f"{command[0]}, {errno.errorcode[code]} at operation {strike} of {operations}"
        status, said = self.attempt(command, strike, code)
        if wrong := unclear(status, said):
            return f"{where}: {wrong}"
        if status == 0:  # what is worth less may be missing, and a warning says so
            expected = {name: value for name, value in expected.items() if name != "run/samples.txt"}
        return self.repeated(command, expected, where)

    def repeated(self, command, expected, where) -> str:
        status, said = self.attempt(command)
        if status == 2 and command[0] == "sample" and "is not an empty folder" in said:
            status = 0  # it was complete
        if status != 0:
            return f"{where}, repeated: exit status {status}: {said[-500:]}"
        found = content("work")
        differ = sorted(name for name in expected if found.get(name) != expected[name])
        left = sorted(found.keys() - expected.keys() - {"run/samples.txt"})
        return f"{where}, repeated: differ {differ}, left over {left}" if differ or left else ""

    def chain(self) -> str:
        command = ["train_gpt2", *TINY]
        _, expected = self.reference(command)
        began, kills, status = time.monotonic(), 0, -1
        self.attempt(command)
        alone = time.monotonic() - began
        shutil.rmtree("work")
        os.mkdir("work")
        while status != 0:
            status, said = self.attempt(command, kill_after=self.random.uniform(0, alone * (1 + kills / 10)))
            kills += status == -signal.SIGKILL
            if status not in (0, -signal.SIGKILL):
                return f"after {kills} kills: exit status {status}: {said[-500:]}"
        self.counts["kills of a chain"] += kills
        return self.repeated(command, expected, f"a run after {kills} kills")

    def file(self) -> str:
        # the run is one that has more to do, so that all of its files are read and written
        train, sample = ["train_gpt2", *TINY, "--max-steps", "8"], ["sample", "--max-new-tokens", "2"]
        newest = "run/checkpoints/step_000006.pt"
        web = [
            "data.fineweb",
            "--input",
            "rows.jsonl",
            "--out",
            "work/web",
            "--shard-tokens",
            "500",
            "--processes",
            "1",
        ]
        target, command = self.random.choice(
            [
                ("run/log.jsonl", train),
                ("run/samples.txt", train),
                ("run/config.json", [*train, "--resume", "work/run/checkpoints/step_000004.pt"]),
                ("run/.launch", train),
                (newest, train),
                (newest, [*sample, f"work/{newest}"]),
                ("dataset/meta.json", [*train, "--data", "work/dataset"]),
                ("dataset/train_000000.npy", [*train, "--data", "work/dataset"]),
                *((f"exported/{name}", [*sample, "work/exported"]) for name in sorted(os.listdir("exported"))),
                ("tokenizer/bpe.json", ["data.text", "text.txt", "--out", "work/out", "--tokenizer", "work/tokenizer"]),
                ("web/progress_00000.json", web),
                ("web/meta.json", [*train, "--data", "work/web"]),
            ]
        )
        folder = target.split("/")[0]
        shutil.copytree(f"done/{folder}" if folder == "run" else folder, f"work/{folder}")
        path = Path("work", target)
        how = self.change(path)
        status, said = self.attempt(command)
        wrong = unclear(status, said)
        return f"{target} with {how}, read by {command[0]}: {wrong}" if wrong else ""

    def option(self) -> str:
        import dataclasses

        import train_gpt2

        fields = [field.name.replace("_", "-") for field in dataclasses.fields(train_gpt2.Config)]
        fields = [name for name in fields if name not in ("find-lr", "sweep", "ladder", "recipe", "profile")]
        huge, far = "1" + "0" * 18, "1" + "0" * 30
        odd = [
            "0",
            "-1",
            "1",
            "2",
            "3",
            "7",
            "17",
            huge,
            f"-{huge}",
            far,
            "1e308",
            "1e400",
            "nan",
            "inf",
            "-inf",
            "1.5",
        ]
        odd += [
            "",
            " ",
            "x",
            "auto",
            "never",
            "none",
            "all",
            "true",
            "cpu",
            "cuda",
            "work",
            "text.txt",
            "/",
            "..",
            "--",
        ]
        odd += ["\udc80", "$\\frac", "run\nline", "-", "x" * 300]
        words = ["train_gpt2", *TINY, "--max-steps", "1", "--warmup-steps", "0"]
        for name in self.random.sample(fields, self.random.randint(1, 3)):
            words += [f"--{name}={self.random.choice(odd)}"] if self.random.random() < 0.8 else [f"--{name}"]
        status, said = self.attempt(words)
        wrong = unclear(status, said)
        return f"{words[len(TINY) + 5 :]}: {wrong}" if wrong else ""

    # ----------------------------------------------------------------------------------------------------- changes

    def change(self, path: Path) -> str:
        """Change a file as a hand or a disk may. Return how, for the report."""
        kind = self.random.choice(["bytes", "fields", "fields", "fields"])
        if path.suffix == ".pt" and kind == "fields":
            import torch

            held = torch.load(path, weights_only=True)
            how = self.alter(held, self.odd_values(torch.zeros(2), torch.full((3, 3), math.nan)))
            torch.save(held, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            Path(f"{path}.sha256").write_text(digest, encoding="utf-8")
            return how
        if path.suffix == ".json" and kind == "fields":
            held = [json.loads(path.read_text(encoding="utf-8"))]
            how = self.alter(held, self.odd_values())
            path.write_text(json.dumps(held[0] if held else None), encoding="utf-8")
            return how
        if path.suffix == ".jsonl" and kind == "fields":
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            how = self.alter(records, self.odd_values())
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            return how
        content = path.read_bytes()
        place = self.random.randrange(len(content) + 1)
        flipped = bytes([(content + b"\0")[place] ^ 4])
        changes = {
            f"its end after {place} bytes": content[:place],
            f"a flipped bit at {place}": content[:place] + flipped + content[place + 1 :],
            f"random bytes at {place}": content[:place] + self.random.randbytes(9) + content[place:],
            "nothing in it": b"",
            "100,000 brackets": b"[" * 100_000,
            "100,000 objects": b'{"a":' * 100_000,
            "twice its content": content + content,
            "UTF-16": content.decode("latin-1").encode("utf-16"),
            f"zeros after {place} bytes": content[:place] + bytes(len(content) - place),
        }
        how, new = self.random.choice(list(changes.items()))
        path.write_bytes(new)
        if path.suffix == ".pt" and self.random.random() < 0.5:
            Path(f"{path}.sha256").write_text(hashlib.sha256(new).hexdigest(), encoding="utf-8")
        return how

    def odd_values(self, *more) -> list:
        deep = []
        for _ in range(300):
            deep = [deep]
        odd = [None, True, -1, 0, 1, 7, 10**9, 10**18, 10**30, -(10**30), 0.5, 1e308, math.inf, math.nan, "", "x", "12"]
        return odd + ["\x1b[31m", "\udc80", "../..", "/", [], [[]], {}, {"type": "char"}, deep, *more]

    def alter(self, held, values: list) -> str:
        """Change one place in nested dicts and lists: another value, gone, doubled, or moved."""
        places = []

        def walk(node, path):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key, [*path, key]))
                if isinstance(node[key], dict | list) and node[key]:
                    walk(node[key], [*path, key])

        walk(held, [])
        node, key, path = self.random.choice(places)
        action = self.random.choice(["value", "value", "value", "gone", "doubled", "swapped"])
        if action == "gone":
            del node[key]
        elif action == "doubled" and isinstance(node, list):
            node.insert(key, node[key])
        elif action == "swapped" and isinstance(node, list):
            other = self.random.randrange(len(node))
            node[key], node[other] = node[other], node[key]
        else:
            node[key] = self.random.choice(values)
            return f"{'.'.join(map(str, path))} = {str(node[key])[:40]}"
        return f"{'.'.join(map(str, path))} {action}"


def call(command: list[str]) -> None:
    """Run one of our commands in this process."""
    import sample
    import train_gpt2
    from data import bpe, fineweb, text

    name, arguments = command[0], command[1:]
    if name in ("train_gpt2", "sample"):
        {"train_gpt2": train_gpt2, "sample": sample}[name].main(arguments)
        return
    sys.argv = [name, *arguments]
    {"data.text": text, "data.bpe": bpe, "data.fineweb": fineweb}[name].main()


def unclear(status: int, said: str) -> str:
    """Return what is wrong with the end of a command; "" for exit status 0, and for 2 with one error line."""
    errors = [line for line in said.split("\n") if line.startswith("error: ")]
    if status not in (0, 2) or "Traceback" in said or len(errors) != (status == 2):
        return f"exit status {status}: {said[-700:]}"
    return ""


def content(folder: str) -> dict[str, str]:
    """Return file -> what is in it, of all files below a folder; of a log what does not depend on time."""
    import torch

    def digest(held) -> str:
        """Return the values in nested containers, in sorted order: a resumed run may store them in another order."""
        if isinstance(held, dict):
            return str(sorted((str(key), digest(value)) for key, value in held.items()))
        if isinstance(held, list):
            return str([digest(value) for value in held])
        return str(hashlib.sha256(held.numpy().tobytes()).hexdigest() if isinstance(held, torch.Tensor) else held)

    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in (".lock", ".launch"):
            continue
        if path.suffix == ".pt":
            found[name] = digest(torch.load(path, weights_only=True))
            continue
        if path.name.endswith(".pt.sha256"):
            found[name] = ""
            continue
        if path.name == "log.jsonl":
            kept = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
            records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            found[name] = str([[record.get(key) for key in kept] for record in records])
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
