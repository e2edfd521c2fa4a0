"""HellaSwag: which of four endings goes on with a text? 10,042 questions, of which guessing gets a quarter right.

`python -m training.hellaswag --model RUN_OR_NAME` scores a model. An ending is read after its context, as one text,
and its loss is summed over the ending's tokens alone. The model's answer is the ending with the lowest sum (acc), or
with the lowest mean a token (acc_norm, which does not favour short endings); of equal ones, the first.

    context                          endings, label 3
    A man is sitting on a roof. he   is using wrap to wrap a pair of skis. | ... | starts pulling up roofing on a roof.

A file of questions is JSON lines, of which ctx, endings and label are read. Where a text is longer than the model can
hold, its beginning is cut off.
Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", 2019, https://arxiv.org/abs/1905.07830
"""

import dataclasses
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from data.files import UserError, atomic_write, download, exit_on_user_error, lock, run_script
from data.tokenizer import CharTokenizer, Tokenizer
from training import devices, weights
from training.distributed import Distributed
from training.run import HELLASWAG_CHANCE, HELLASWAG_GPT2_124M

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# 12,246,618 bytes; the checksum is the one in Hugging Face's datasets/hellaswag/dataset_infos.json.
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

ENDINGS = 4
BATCH = 8  # questions scored at once: at HellaSwag's lengths and with GPT-2's vocabulary a gigabyte of logits


@dataclasses.dataclass(frozen=True)
class Question:
    """A context, four endings, and the number of the right one, 0 to 3."""

    ctx: str
    endings: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A question in tokens: four rows of context and ending, and how many tokens at the end of each are scored."""

    rows: tuple[np.ndarray, ...]  # each of 2 to block_size + 1 tokens
    scored: tuple[int, ...]
    label: int


# ----------------------------------------------------------------------------------------------------------- questions


def prepare_if_missing(
    input: str = "", folder: Path = Path("datasets/hellaswag"), url: str = URL, sha256: str = SHA256
) -> Path:
    """The file of questions: `input` if given, else the validation set in `folder`, downloaded if it is not there.

    Of several processes one downloads and the others wait. UserError when that fails or the file is another one.
    """
    if input:
        return Path(input)
    path = folder / "hellaswag_val.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            if not path.exists():  # another process may have brought it while this one waited
                option = "--input FILE (of train_gpt2.py: --hellaswag-input FILE)"
                content = download(url, sha256, "HellaSwag's validation set", option)
                atomic_write(path, lambda file: file.write(content))
    if not is_validation_set(path, sha256):
        raise UserError(f"{path} is not HellaSwag's validation set, its sha256 is another: delete it, to download anew")
    return path


def is_validation_set(path: Path, sha256: str = SHA256) -> bool:
    """Whether a file is HellaSwag's validation set, byte for byte: published scores compare with no other."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, at least one; UserError names the first line that is none, and why."""
    questions = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    questions.append(_question(line, f"{path}, line {number}"))
    except OSError as error:
        reason = f"cannot read the questions in {path}: {error.strerror}"
        raise UserError(f"{reason}: give a file in HellaSwag's format, or none, to download it") from None
    if not questions:
        raise UserError(f"{path} is empty: it must hold a question of HellaSwag a line, as JSON")
    return questions


def _question(line: bytes, where: str) -> Question:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged, it is not JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} is no question: it must be an object with ctx, endings and label")
    missing = [name for name in ("ctx", "endings", "label") if name not in fields]
    if missing:
        raise UserError(f"{where} is no question: it lacks {', '.join(missing)}")
    ctx, endings, label = fields["ctx"], fields["endings"], fields["label"]
    if not isinstance(ctx, str) or not ctx:
        raise UserError(f"{where}: ctx must be a text, and not empty")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{where}: endings must be a list of {ENDINGS} texts")
    if str(label) not in map(str, range(ENDINGS)):  # the test set, too, has no label
        raise UserError(f"{where}: label is {str(label)[:20]!r}, but must be 0 to {ENDINGS - 1}")
    return Question(ctx, tuple(endings), int(label))


# ----------------------------------------------------------------------------------------------------------- rendering


def render(questions: Sequence[Question], tokenizer: Tokenizer, block_size: int) -> list[Rendered]:
    """
    The questions in tokens: the context's, then those of a space and an ending; the last block_size + 1 of them.

    A character tokenizer leaves out the characters that it lacks: see `left_out`. UserError where nothing remains.
    """
    rendered = []
    for number, question in enumerate(questions, start=1):
        context = tokenizer.encode(_readable(question.ctx, tokenizer))
        endings = [tokenizer.encode(_readable(f" {ending}", tokenizer)) for ending in question.endings]
        if not all(map(len, [context, *endings])):
            raise UserError(
                f"question {number} has a text of which the {tokenizer.name} tokenizer knows no character: "
                "score this model on questions in its own alphabet"
            )
        # The model reads all but the last token of a row and predicts all but the first: block_size of each at most.
        rows = tuple(np.concatenate([context, ending])[-block_size - 1 :].astype(np.int64) for ending in endings)
        scored = tuple(min(len(ending), block_size) for ending in endings)
        rendered.append(Rendered(rows, scored, question.label))
    return rendered


def left_out(questions: Sequence[Question], tokenizer: Tokenizer) -> str:
    """A sentence on the characters that a character tokenizer lacks; empty where every text is read as it is."""
    texts = ["".join([question.ctx, *question.endings]) for question in questions]
    changed = [text for text in texts if _readable(text, tokenizer) != text]
    if not changed:
        return ""
    lacking = sorted(set("".join(changed)) - set(tokenizer.characters))
    some = repr("".join(lacking[:20])) + "..." * (len(lacking) > 20)
    return (
        f"the {tokenizer.name} tokenizer lacks {len(lacking)} characters, {some}: they are left out of "
        f"{len(changed):,} of {len(questions):,} questions"
    )


def _readable(text: str, tokenizer: Tokenizer) -> str:
    if not isinstance(tokenizer, CharTokenizer):
        return text  # bytes make up whatever has no token of its own
    return text.translate(dict.fromkeys(map(ord, set(text) - set(tokenizer.characters))))


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    rendered: Sequence[Rendered],
    batch: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Tensor:
    """
    This rank's share of the counts [right by sum, right by mean, questions]: (3,) int64, on the device.

    logits_of: tokens (B, T) int64 -> logits (B, T, V), of any causal model, which the caller has put into eval mode
    rendered:  what `render` returns, the same on all ranks
    batch:     questions a call, so that B = 4 batch; a rank's calls hold (B, T, V) logits in memory
    progress:  a bar on stderr

    Summed over the ranks, the counts are the same for every world_size: a batch holds the same questions whichever rank
    scores it. All ranks call logits_of equally often, as a sharded model needs. The batch size reaches no further than
    the last bits of a loss. A question for which the model gives nan counts as wrong.
    """
    # Of like lengths, so that little is padded; the longest first, so that memory runs out at once or never.
    longest_first = sorted(rendered, key=lambda question: -max(map(len, question.rows)))
    batches = [longest_first[first : first + batch] for first in range(0, len(rendered), batch)]
    counts = torch.zeros(3, dtype=torch.int64)
    for first in tqdm(range(0, len(batches), world_size), unit="batch", disable=not progress):
        mine = batches[first:][rank : rank + 1]
        # In the last round a rank may have no batch; it repeats another's and drops the counts.
        losses = ending_losses(logits_of, mine[0] if mine else batches[first], device)
        if mine:
            counts += _counts(losses, mine[0])
    return counts.to(device)


def questions_for(input: str, tokenizer: Tokenizer, block_size: int, processes: Distributed) -> list[Rendered]:
    """The questions of a run, for `scores`: those of the file `input`, or HellaSwag's. UserError where files differ."""
    path = prepare_if_missing(input)
    questions = read_questions(path)
    if processes.disagree(zlib.crc32(path.read_bytes())):
        raise UserError(f"the processes see different questions in {path}: they must share it, or hold equal copies")
    if processes.rank == 0 and (sentence := left_out(questions, tokenizer)):
        tqdm.write(f"warning: HellaSwag: {sentence}", file=sys.stderr)
    return render(questions, tokenizer, block_size)


def scores(
    model: nn.Module, questions: Sequence[Rendered], device: torch.device, processes: Distributed, autocast: Callable
) -> dict[str, float]:
    """The shares of the questions that a model answers right, in training: hellaswag_acc and hellaswag_acc_norm."""
    model.eval()
    with autocast():
        counts = evaluate(model, questions, BATCH, device, processes.rank, processes.world_size)
    model.train()
    right, right_norm, total = processes.sum(counts).tolist()
    return {"hellaswag_acc": right / total, "hellaswag_acc_norm": right_norm / total}


def ending_losses(
    logits_of: Callable[[Tensor], Tensor], questions: Sequence[Rendered], device: torch.device | str
) -> Tensor:
    """The loss of every ending, summed over its tokens: (questions, 4) float64 in nats, on the CPU. See `evaluate`."""
    rows = [(row, n) for question in questions for row, n in zip(question.rows, question.scored, strict=True)]
    tokens = torch.zeros(len(rows), max(len(row) for row, _ in rows) - 1, dtype=torch.int64)
    for i, (row, _) in enumerate(rows):
        tokens[i, : len(row) - 1] = torch.from_numpy(row[:-1])  # what pads it, on the right, no ending sees
    of_row = torch.repeat_interleave(torch.tensor([n for _, n in rows]))
    position = torch.cat([torch.arange(len(row) - 1 - n, len(row) - 1) for row, n in rows])
    targets = torch.cat([torch.from_numpy(row[-n:]) for row, n in rows])
    logits = logits_of(tokens.to(device))[of_row.to(device), position.to(device)].float()
    losses = F.cross_entropy(logits, targets.to(device), reduction="none").cpu().double()
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, of_row, losses).view(-1, ENDINGS)


def _counts(losses: Tensor, questions: Sequence[Rendered]) -> Tensor:
    """[right by sum, right by mean, questions], (3,) int64, from losses (questions, 4)."""
    labels = torch.tensor([question.label for question in questions])
    means = losses / torch.tensor([question.scored for question in questions])
    usable = ~losses.isnan().any(dim=1)
    right = [((of.argmin(dim=1) == labels) & usable).sum() for of in (losses, means)]  # argmin: the first of equal ones
    return torch.stack([*right, torch.tensor(len(questions))])


# -------------------------------------------------------------------------------------------------------- command line


def score(
    model: Annotated[str, tyro.conf.arg(metavar="RUN_OR_NAME")],
    input: Annotated[str, tyro.conf.arg(metavar="FILE")] = "",
    batch: int = BATCH,
    device: str = "auto",
) -> str:
    """Scores a model on HellaSwag.

    Returns a line that sums it up. The validation set is downloaded to datasets/hellaswag, if it is not there.

    Args:
        model: A run's folder, a checkpoint file, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face folder.
        input: Questions in HellaSwag's format, in place of the download.
        batch: Questions scored at once.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    if batch < 1:
        raise UserError(f"--batch is {batch}, but must be at least 1")
    with exit_on_user_error():
        where = devices.choose_device(device)
        network, tokenizer = weights.load(model)
        path = prepare_if_missing(input)
        questions = read_questions(path)
        rendered = render(questions, tokenizer, network.config.block_size)
        if note := left_out(questions, tokenizer):
            print("note:", note, file=sys.stderr)
        try:
            counts = evaluate(network.to(where), rendered, batch, where, progress=True)
        except (RuntimeError, MemoryError) as error:
            if devices.out_of_memory(error):
                raise UserError(f"out of memory: lower --batch, which is {batch}") from error
            raise
    return summary(model, counts, is_validation_set(path))


def summary(model: str, counts: Tensor, comparable: bool) -> str:
    """The counts in words; comparable: whether the questions are those that published scores are of."""
    correct, correct_norm, total = counts.tolist()
    acc_norm = correct_norm / total
    line = f"{model}: {total:,} questions, acc {correct / total:.4f}, acc_norm {acc_norm:.4f}"
    line += f" (standard error {math.sqrt(acc_norm * (1 - acc_norm) / total):.4f}; guessing {HELLASWAG_CHANCE:.2f}"
    return line + (f", OpenAI's GPT-2 (124M) {HELLASWAG_GPT2_124M:.4f})" if comparable else ")")


def main() -> None:
    run_script(score, prog="python -m training.hellaswag")


if __name__ == "__main__":
    main()
