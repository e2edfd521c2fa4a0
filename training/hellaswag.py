"""
HellaSwag: which of four endings continues a text? 10,042 questions; random guessing gets a quarter right.

`python -m training.hellaswag --model RUN_OR_NAME` scores a model. An ending is read after its context, as one text, and
only the loss of its own tokens counts. The model's answer is the ending with the lowest sum of losses (acc), or with
the lowest mean per token (acc_norm, which does not favor short endings); ties go to the first.

    context                          endings, label 3
    A man is sitting on a roof. he   is using wrap to wrap a pair of skis. | ... | starts pulling up roofing on a roof.

Input is JSON lines with ctx, endings and label. A text longer than the block size is truncated on the left.
Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", 2019, https://arxiv.org/abs/1905.07830
"""

import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from data.files import UserError, atomic_write, download, lock, run_script
from data.tokenizer import CharTokenizer, Tokenizer
from training import devices, weights
from training.curves import HELLASWAG_CHANCE, HELLASWAG_GPT2_124M
from training.distributed import Distributed

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# 12,246,618 bytes; the checksum is the one in Hugging Face's datasets/hellaswag/dataset_infos.json.
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

ENDINGS = 4
BATCH = 8  # questions scored at once: with HellaSwag's lengths and GPT-2's vocabulary a gigabyte of logits


class Question(NamedTuple):
    """A context, four endings, and the index of the right one, 0 to 3."""

    ctx: str
    endings: tuple[str, ...]
    label: int


class Rendered(NamedTuple):
    """A question in tokens."""

    rows: tuple[np.ndarray, ...]  # context and ending, for each ending: int64, 2 to block_size + 1 tokens
    scored: tuple[int, ...]  # tokens at the end of each row that are scored
    label: int


def prepare_if_missing(
    input: str = "", folder: Path = Path("datasets/hellaswag"), url: str = URL, sha256: str = SHA256
) -> Path:
    """
    Return the file of questions: `input` if given, else the validation set in `folder`, downloaded if it is missing.

    If several processes call it, one downloads while the others wait. Raise UserError if the download fails or the file
    has another checksum.
    """
    if input:
        return Path(input)
    path = folder / "hellaswag_val.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            if not path.exists():  # another process may have downloaded it meanwhile
                option = "--input FILE (in train_gpt2.py --hellaswag-input FILE, or --hellaswag-every 0)"
                content = download(url, sha256, "HellaSwag's validation set", option)
                atomic_write(path, lambda file: file.write(content))
    if not is_validation_set(path, sha256):
        raise UserError(f"sha256 mismatch for {path}, not HellaSwag's validation set: delete it to download again")
    return path


def is_validation_set(path: Path, sha256: str = SHA256) -> bool:
    """Return whether a file is HellaSwag's validation set: published scores hold for no other file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def read_questions(path: Path) -> list[Question]:
    """Return the questions in a file, at least one; raise UserError with the first line that is not a question."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the questions in {path}: {error.strerror}") from None
    questions = [_question(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{path} is empty: it must hold one HellaSwag question per line, as JSON")
    return questions


def _question(line: bytes, place: str) -> Question:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is corrupt, not JSON in UTF-8: {error}") from None
    if missing := [f for f in ("ctx", "endings", "label") if not isinstance(fields, dict) or f not in fields]:
        raise UserError(f"{place}: not a HellaSwag question: missing {', '.join(missing)}")
    ctx, endings, label = fields["ctx"], fields["endings"], str(fields["label"])
    if not isinstance(ctx, str) or not ctx:
        raise UserError(f"{place}: ctx must be a text that is not empty")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{place}: endings must be a list of {ENDINGS} texts")
    if label not in map(str, range(ENDINGS)):  # HellaSwag's test set has none either
        raise UserError(f"{place}: label is {label[:20]!r}, but must be 0 to {ENDINGS - 1}")
    return Question(ctx, tuple(endings), int(label))


def render(questions: Sequence[Question], tokenizer: Tokenizer, block_size: int) -> list[Rendered]:
    """Return the questions in tokens. Raise UserError if the tokenizer knows no character of a text; see `left_out`."""
    rendered = []
    for number, question in enumerate(questions, start=1):
        context = tokenizer.encode(_readable(question.ctx, tokenizer))
        endings = [tokenizer.encode(_readable(f" {ending}", tokenizer)) for ending in question.endings]
        if not all(map(len, [context, *endings])):
            knows = f"a text of which the {tokenizer.name} tokenizer knows no character"
            raise UserError(f"question {number} has {knows}: score this model on questions in its own alphabet")
        # The model reads all tokens of a row but the last and predicts all but the first: at most block_size of each.
        rows = tuple(np.concatenate([context, ending])[-block_size - 1 :].astype(np.int64) for ending in endings)
        rendered.append(Rendered(rows, tuple(min(len(e), block_size) for e in endings), question.label))
    return rendered


def left_out(questions: Sequence[Question], tokenizer: Tokenizer) -> str:
    """Return a sentence about the characters that a character tokenizer lacks, empty if it lacks none."""
    texts = ["".join([question.ctx, *question.endings]) for question in questions]
    changed = [text for text in texts if _readable(text, tokenizer) != text]
    if not changed:
        return ""
    lacking = "".join(sorted(set("".join(changed)) - set(tokenizer.characters)))
    some = f"{len(lacking)} characters, {lacking[:20]!r}{'...' if len(lacking) > 20 else ''}"
    return f"the {tokenizer.name} tokenizer lacks {some}: {len(changed):,} of {len(questions):,} are read without them"


def _readable(text: str, tokenizer: Tokenizer) -> str:
    if not isinstance(tokenizer, CharTokenizer):
        return text  # byte-level tokenizers know every text
    return text.translate(dict.fromkeys(map(ord, set(text) - set(tokenizer.characters))))


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def evaluate(
    logits_of: Callable, rendered: Sequence[Rendered], batch: int, device, rank=0, world_size=1, progress=False
) -> Tensor:
    """
    Return this rank's part of the counts [right by sum, right by mean, questions]: (3,) int64, on the device.

    logits_of: any causal model in eval mode, tokens (B, T) int64 -> logits (B, T, V), with B = 4 batch
    rendered:  what `render` returns, the same on all ranks
    batch:     questions per call; progress: a bar on stderr

    The sum over the ranks is the same for every world size: the batches are the same, whichever rank scores them. All
    ranks call logits_of equally often, as a sharded model requires. nan counts as wrong.
    """
    # Batch similar lengths, to pad little; the longest first, so that memory runs out at once or never.
    longest_first = sorted(rendered, key=lambda question: -max(map(len, question.rows)))
    batches = [longest_first[first : first + batch] for first in range(0, len(rendered), batch)]
    counts = torch.zeros(3, dtype=torch.int64)
    for first in tqdm(range(0, len(batches), world_size), unit="batch", disable=not progress):
        mine = batches[first:][rank : rank + 1]
        # In the last round a rank may have no batch; it repeats another's and drops the counts.
        questions = mine[0] if mine else batches[first]
        losses = ending_losses(logits_of, questions, device)
        if mine:
            labels = torch.tensor([question.label for question in questions])
            means = losses / torch.tensor([question.scored for question in questions])
            usable = ~losses.isnan().any(dim=1)
            answers = [loss.argmin(dim=1) for loss in (losses, means)]  # the first of a tie
            right = [((answer == labels) & usable).sum() for answer in answers]
            counts += torch.stack([*right, torch.tensor(len(questions))])
    return counts.to(device)


def ending_losses(logits_of: Callable, questions: Sequence[Rendered], device) -> Tensor:
    """Return the summed loss of every ending: (questions, 4) float64, in nats, on the CPU. See `evaluate`."""
    rows = [(row, n) for question in questions for row, n in zip(question.rows, question.scored, strict=True)]
    tokens = torch.zeros(len(rows), max(len(row) for row, _ in rows) - 1, dtype=torch.int64)
    for i, (row, _) in enumerate(rows):
        tokens[i, : len(row) - 1] = torch.from_numpy(row[:-1])  # padded on the right, which no ending sees
    of_row = torch.repeat_interleave(torch.tensor([n for _, n in rows]))
    position = torch.cat([torch.arange(len(row) - 1 - n, len(row) - 1) for row, n in rows])
    targets = torch.cat([torch.from_numpy(row[-n:]) for row, n in rows])
    logits = logits_of(tokens.to(device))[of_row.to(device), position.to(device)].float()
    losses = F.cross_entropy(logits, targets.to(device), reduction="none").cpu().double()
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, of_row, losses).view(-1, ENDINGS)


def questions_for(
    input: str,
    tokenizer: Tokenizer,
    block_size: int,
    dist: Distributed = Distributed(),  # noqa: B008  it is frozen
) -> list[Rendered]:
    """Return the questions in tokens, of the file `input` or HellaSwag's; UserError if the ranks' files differ."""
    path = prepare_if_missing(input)
    questions = read_questions(path)
    if dist.disagree(zlib.crc32(path.read_bytes())):
        raise UserError(f"the ranks see different questions in {path}: they must share it, or hold equal copies")
    if dist.rank == 0 and (sentence := left_out(questions, tokenizer)):
        print(f"warning: HellaSwag: {sentence}", file=sys.stderr)
    return render(questions, tokenizer, block_size)


def scores(
    model: nn.Module, questions: Sequence[Rendered], device: torch.device, dist: Distributed, autocast: Callable
) -> dict[str, float]:
    """Return the fractions of the questions that a model in training answers right, by the names in log.jsonl."""
    model.eval()
    with autocast():
        counts = evaluate(model, questions, BATCH, device, dist.rank, dist.world_size)
    model.train()
    right, right_norm, total = dist.sum(counts).tolist()
    return {"hellaswag_acc": right / total, "hellaswag_acc_norm": right_norm / total}


def score(
    model: Annotated[str, tyro.conf.arg(metavar="RUN_OR_NAME")],
    input: Annotated[str, tyro.conf.arg(metavar="FILE")] = "",
    batch: int = BATCH,
    device: str = "auto",
) -> str:
    """Score a model on HellaSwag.

    Return a one-line summary. The validation set is downloaded to datasets/hellaswag if missing.

    Args:
        model: A run's folder, a checkpoint file, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face folder.
        input: Questions in HellaSwag's format, instead of the download.
        batch: Questions scored at once.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    if batch < 1:
        raise UserError(f"--batch is {batch}, but must be at least 1")
    chosen = devices.choose_device(device)
    network, tokenizer = weights.load(model)
    rendered = questions_for(input, tokenizer, network.config.block_size)
    with devices.explain_out_of_memory(f"lower --batch, which is {batch}"):
        counts = evaluate(network.to(chosen), rendered, batch, chosen, progress=True)
    return summary(model, counts, is_validation_set(prepare_if_missing(input)))


def summary(model: str, counts: Tensor, comparable: bool) -> str:
    """Return the result as one line. comparable: whether these are the questions of the published scores."""
    correct, correct_norm, total = counts.tolist()
    acc_norm = correct_norm / total
    error = math.sqrt(acc_norm * (1 - acc_norm) / total)
    published = f", OpenAI's GPT-2 (124M) {HELLASWAG_GPT2_124M:.4f}" if comparable else ""
    return (
        f"{model}: {total:,} questions, acc {correct / total:.4f}, acc_norm {acc_norm:.4f} "
        f"(standard error {error:.4f}; guessing {HELLASWAG_CHANCE:.2f}{published})"
    )


def main() -> None:
    run_script(score, prog="python -m training.hellaswag")


if __name__ == "__main__":
    main()
