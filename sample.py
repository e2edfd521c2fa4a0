"""
Write text with a trained GPT.

    python sample.py RUN_OR_NAME --prompt "Hello, I'm a language model,"   a run, gpt2, gpt2-xl ...
    python sample.py RUN --chat                                   a run on dialogues, turn by turn
    python sample.py RUN_OR_NAME --export FOLDER                  for Hugging Face's transformers
"""

from data import startup

if __name__ == "__main__":
    startup.begin(torch=True)  # before torch, which takes seconds and reads what this sets

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

import kernels
import model as gpt
from data.chat import as_prompt
from data.files import UserError, as_flag, exit_on_user_error, parse_options
from data.text import documents_of, read_text
from data.tokenizer import StreamDecoder, Tokenizer
from training import devices, weights
from training.command_line import known_option

OTHER_NAMES = {  # what users of other repositories type -> what to type here
    "start": "--prompt",
    "text": "--prompt",
    "length": "--max-new-tokens",
    "max-length": "--max-new-tokens",
    "max-tokens": "--max-new-tokens",
    "n": "--num-samples",
    "out-dir": "the folder alone, as in python sample.py runs/laptop",
    "model": "the folder alone, as in python sample.py runs/laptop",
    "init-from": "the name alone, as in python sample.py gpt2",
}


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Write text with a trained GPT, or write the GPT in Hugging Face's format."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_NAME")] = ""
    """run folder, checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or Hugging Face folder"""
    prompt: str = ""
    """text to continue; default: start a new document"""
    prompt_file: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """file with the prompt, - for standard input; a trailing newline is dropped"""
    chat: bool = False
    """answer standard input line by line, for a run on dialogues (data.chat)"""
    max_new_tokens: int = 300
    """most tokens to add"""
    stop: bool = True
    """stop at the end-of-text token, as --new-only always does"""
    num_samples: int = 1
    """samples, drawn in one batch; a single one is printed token by token"""
    best_of: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """draw N samples and print the one with the highest mean log-probability per token"""
    new_only: bool = False
    """for a run on documents, such as names: print only samples that its training text lacks"""
    temperature: float = 0.8
    """0 takes the most likely token every time"""
    top_k: int | None = None
    """sample among this many of the most likely tokens"""
    top_p: float | None = None
    """sample among the fewest tokens whose probabilities reach this sum"""
    seed: int = 1337
    """seed of the sampling"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    kernels: str = "none"
    """families in Triton: all, none, auto, or of layernorm,gelu,attention,cross_entropy"""
    cache: bool = True
    """use a KV cache: faster, and the same text up to rounding"""
    export: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """instead of text, write the model to this new folder, in Hugging Face's format"""

    def __post_init__(self):
        if not self.model:
            runs = [str(folder.parent) for folder in sorted(Path("runs").glob("*/checkpoints"))]
            first, *others = [*runs, *weights.RELEASES]
            known = ", ".join(others)
            raise UserError(f"which model? python sample.py {first}, or one of {known}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            wrong = f"--prompt holds bytes that are not {sys.getfilesystemencoding()}"
            raise UserError(f"{wrong}: give it with --prompt-file")
        least = dict.fromkeys(("max_new_tokens", "num_samples", "best_of", "top_k"), 1)
        for name, low in (least | {"temperature": 0, "top_p": 1e-6, "seed": 0}).items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**63:
                raise UserError(f"{as_flag(name)} is {value}, but must be at least {low}")
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        exclusive = [("prompt", "prompt_file"), ("num_samples", "best_of"), ("new_only", "best_of")]
        single = ("prompt", "prompt_file", "num_samples", "best_of", "new_only", "export")
        exclusive += [("chat", other) for other in single]
        for one, other in exclusive:
            if {one, other} <= given:
                raise UserError(f"give {as_flag(one)} or {as_flag(other)}, not both")


def load_model(options: SampleOptions) -> tuple[gpt.GPT, Tokenizer]:
    """Return the model, on its device, and its tokenizer."""
    device = devices.choose_device(options.device)

    def choose_ops(shape: gpt.GPTConfig) -> kernels.Ops:
        sizes = {"n_embd": shape.n_embd, "n_head": shape.n_head}
        return kernels.select(options.kernels, device, **sizes, say=lambda sentence: None)

    model, tokenizer = weights.load(options.model, choose_ops)
    return model.to(device), tokenizer


def write_samples(options: SampleOptions) -> None:
    """Print samples, each with its prompt, and tokens per second to stderr."""
    prompt = options.prompt
    if options.prompt_file:
        file = "/dev/stdin" if options.prompt_file == "-" else options.prompt_file
        prompt = read_text(file).removesuffix("\n")
    known = documents_of(options.model) if options.new_only else set()
    model, tokenizer = load_model(options)
    device = devices.choose_device(options.device)
    start = gpt.start_tokens(tokenizer) if tokenizer.eot is not None or not prompt else []
    ids = [*start, *tokenizer.encode(prompt).tolist()]
    eot = tokenizer.eot if options.stop or options.new_only else None
    samples = max(options.num_samples, options.best_of)
    steps = model.generate_stream(
        torch.tensor([ids] * samples, device=device),
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        torch.Generator(device).manual_seed(options.seed),
        eot,
        options.cache,
    )
    decoder = StreamDecoder(tokenizer) if samples == 1 and not options.new_only else None
    drawn = []  # per step: a (token, log-probability) for each sample
    began = time.perf_counter()
    if decoder:
        print(prompt, end="", flush=True)
    for tokens, log_probabilities in steps:
        drawn.append(list(zip(tokens.tolist(), log_probabilities.tolist(), strict=True)))
        if decoder and tokens.item() != eot:
            print(decoder.feed(tokens.item()), end="", flush=True)
    seconds = time.perf_counter() - began

    texts, means, n_tokens = [], [], 0
    for sample in zip(*drawn, strict=True):
        tokens, log_probabilities = zip(*sample, strict=True)
        length = tokens.index(eot) + 1 if eot in tokens else len(tokens)
        n_tokens += length
        means.append(sum(log_probabilities[:length]) / length)
        texts.append(prompt + tokenizer.decode([t for t in tokens[:length] if t != eot]))
    if decoder:
        print(decoder.flush())
    elif options.best_of > 1:
        print(texts[means.index(max(means))])
    elif options.new_only:
        texts = [text for text in texts if text and text not in known]
        print(*texts, sep="\n")
        print(f"{len(texts)} of {samples} are not in the training text", file=sys.stderr)
    else:
        print("".join(f"{text}\n{'-' * 80}\n" for text in texts), end="")
    print(f"{n_tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def chat(options: SampleOptions) -> None:
    """Answer standard input line by line. The context is the dialogue so far, its newest part."""
    model, tokenizer = load_model(options)
    if tokenizer.eot is None:
        raise UserError(f"{options.model} has no end-of-text token to end an answer: see data.chat")
    device = devices.choose_device(options.device)
    generator, ids = torch.Generator(device).manual_seed(options.seed), []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        ids += tokenizer.encode(as_prompt(line)).tolist()
        decoder, answer = StreamDecoder(tokenizer), ""
        steps = model.generate_stream(
            torch.tensor([ids], device=device),
            options.max_new_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            generator,
            tokenizer.eot,
            options.cache,
        )
        for token in (tokens.item() for tokens, _ in steps):
            ids.append(token)
            if token != tokenizer.eot:
                piece = decoder.feed(token)
                print(piece if answer else piece.removeprefix(" "), end="", flush=True)
                answer += piece
        print(decoder.flush())
        ids += [tokenizer.eot] if ids[-1] != tokenizer.eot else []


def main(arguments: list[str] | None = None) -> None:
    with exit_on_user_error():
        arguments = sys.argv[1:] if arguments is None else arguments
        defaults = {field.name: field.default for field in dataclasses.fields(SampleOptions)[1:]}
        for word in arguments:
            if word.startswith("--") and word != "--help":
                known_option(word, defaults, OTHER_NAMES, "python sample.py")
        options = parse_options(lambda: tyro.cli(SampleOptions, args=arguments))
        if options.export:
            weights.export(options.export, *weights.load(options.model))
            load = f"GPT2LMHeadModel.from_pretrained({options.export!r})"
            print(f"{options.export} is ready for transformers: {load}")
        else:
            with devices.explain_out_of_memory("draw fewer samples, or take a smaller model"):
                (chat if options.chat else write_samples)(options)


if __name__ == "__main__":
    main()
