"""Dialogues: `python -m data.chat FILE.jsonl --out FOLDER` makes a dataset to fine-tune a GPT that answers.

A line of the file is a dialogue: {"prompt": "...", "response": "..."}, or {"turns": ["...", "...", ...]}, in which a
person and the model speak in turn. A turn becomes, for the tokenizer,

    User: PROMPT
    Assistant: RESPONSE<|endoftext|>

and only the response and its end count in the loss: what a person may say is not for the model to learn. Every tenth
dialogue, at least one, is held out for validation. `sample.py RUN --chat` speaks in the same form.
"""

import json
import shlex
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data.files import UserError, run_script
from data.shards import summary, write_dataset
from data.text import read_text
from data.tokenizer import Tokenizer, choose


def as_prompt(prompt: str) -> str:
    """Return what the model sees before it answers."""
    return f"User: {prompt}\nAssistant:"


def as_response(response: str) -> str:
    """Return what the model is to write, without the end-of-text token."""
    return f" {response}"


def encode(tokenizer: Tokenizer, turns: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a dialogue's tokens, (n,) int64, and which of them count in the loss, (n,) bool."""
    ids, scored = [], []
    for prompt, response in zip(turns[::2], turns[1::2], strict=True):
        asked = tokenizer.encode(as_prompt(prompt)).tolist()
        answered = [*tokenizer.encode(as_response(response)).tolist(), tokenizer.eot]
        ids += asked + answered
        scored += [False] * len(asked) + [True] * len(answered)
    return np.array(ids), np.array(scored)


def read_dialogues(path: Path) -> list[list[str]]:
    """Return the turns of each dialogue, prompts and responses in turn. UserError names the line that is wrong."""
    dialogues = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            turns = record["turns"] if "turns" in record else [record["prompt"], record["response"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            turns = None
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns) or len(turns) % 2:
            form = 'a prompt and a response, or "turns", as many prompts as responses, all strings'
            raise UserError(f"{path}, line {number}, is no dialogue: it needs {form}")
        if turns:
            dialogues.append(turns)
    return dialogues


def prepare(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.jsonl")],
    folder: Annotated[Path, tyro.conf.arg(name="out", metavar="FOLDER")],
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|gpt2|FILE")] = "gpt2",
) -> str:
    """Prepare a dataset of dialogues, of which only the responses count in the loss.

    Return a one-line summary. Raise UserError, and keep an older dataset in the folder, if the file cannot be read, a
    line is no dialogue, or there are fewer than two.

    Args:
        file: A dialogue per line: a prompt and a response, or a list of turns.
        folder: The folder to write.
        tokenizer: GPT-2's tokens, to fine-tune OpenAI's weights, characters, or those of a file or folder that holds a
            tokenizer.
    """
    dialogues = read_dialogues(file)
    if len(dialogues) < 2:
        raise UserError(f"{file} has {len(dialogues)} dialogues: give at least two, one of them to validate on")
    everything = as_prompt("") + as_response("") + "".join(turn for turns in dialogues for turn in turns)
    chosen = choose(tokenizer, everything, documents=True)
    if chosen.eot is None:
        raise UserError(f"--tokenizer {tokenizer} has no end-of-text token, which ends a response: use gpt2 or char")
    encoded = [encode(chosen, turns) for turns in dialogues]
    held_out = range(9, len(encoded), 10) or range(len(encoded) - 1, len(encoded))
    places = {"train": [i for i in range(len(encoded)) if i not in held_out], "val": held_out}
    splits, scored = ({name: [encoded[i][k] for i in which] for name, which in places.items()} for k in (0, 1))
    command = "python -m data.chat " + shlex.join(map(str, [file, "--out", folder, "--tokenizer", tokenizer]))
    return summary(folder, write_dataset(folder, chosen, splits, command=command, scored=scored))


def main() -> None:
    run_script(prepare, prog="python -m data.chat")


if __name__ == "__main__":
    main()
