"""
Write text with a trained GPT.

    python sample.py RUN_OR_NAME --prompt "Hello, I'm a language model,"     write text with a run, gpt2, gpt2-xl ...
    python sample.py RUN_OR_NAME --export FOLDER                             write it in Hugging Face's format
"""

from training import startup

if __name__ == "__main__":
    startup.begin()  # before torch is imported, which takes seconds and reads what it sets

import dataclasses
import sys
import time
from typing import Annotated

import torch
import tyro

import kernels
import model as gpt
from data.files import UserError, as_user_error, exit_on_user_error, parse_options
from data.text import new_documents
from data.tokenizer import StreamDecoder, from_spec
from training import devices, weights


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Write text with a trained GPT, or write the GPT in Hugging Face's format."""

    model: Annotated[str, tyro.conf.Positional]
    """a run's folder, a checkpoint file, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face folder"""
    prompt: str = ""
    """text to go on from; none: from the start of a document"""
    max_new_tokens: int = 300
    """tokens to add"""
    num_samples: int = 1
    """samples, drawn side by side; a single one appears as it is written"""
    new_only: bool = False
    """of a run on documents, for example names: each sample up to its end, without those of the training text"""
    temperature: float = 0.8
    """0 takes the most likely token every time"""
    top_k: int | None = None
    """sample among this many of the most likely tokens"""
    top_p: float | None = None
    """sample among the fewest tokens whose probabilities reach this sum"""
    seed: int = 1337
    """of the sampling"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    kernels: str = "none"
    """families in Triton: all, none, or a list of layernorm,gelu,attention,cross_entropy"""
    cache: bool = True
    """keep keys and values; the text is the same without, up to rounding, and the time is not"""
    export: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """write no text, but the model into this new folder, in Hugging Face's format"""

    def __post_init__(self):
        bounds = {"max_new_tokens": 1, "num_samples": 1, "temperature": 0, "top_k": 1, "top_p": 1e-6, "seed": 0}
        for name, least in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**63:
                raise UserError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")


def continue_prompt(options: SampleOptions) -> None:
    """Print samples; what the model is asked comes back in front of what it adds."""
    device = devices.choose_device(options.device)
    with as_user_error():
        ops = kernels.select(options.kernels, device)
    model, spec = weights.load(options.model, ops)
    model.to(device).eval()
    tokenizer = from_spec(spec)
    start = gpt.start_tokens(tokenizer) if tokenizer.eot is not None or not options.prompt else []
    prompt = [*start, *tokenizer.encode(options.prompt).tolist()]
    tokens = torch.tensor([prompt] * options.num_samples, device=device)
    steps = model.generate_stream(
        tokens,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        torch.Generator(device).manual_seed(options.seed),
        options.cache,
    )
    began = time.perf_counter()
    if options.new_only:
        new = new_documents(options.model, torch.stack(list(steps), dim=1).tolist(), options.prompt)
        print(*new, sep="\n")
        print(f"{len(new)} of {options.num_samples} are not in the training text", file=sys.stderr)
    elif options.num_samples > 1:
        for sample_ids in torch.stack(list(steps), dim=1).tolist():
            print(options.prompt + tokenizer.decode(sample_ids), "-" * 80, sep="\n")
    else:
        print(options.prompt, end="", flush=True)
        decoder = StreamDecoder(tokenizer)
        for token in steps:
            print(decoder.feed(token.item()), end="", flush=True)
        print(decoder.flush())
    rate = options.num_samples * options.max_new_tokens / (time.perf_counter() - began)
    print(f"{rate:,.1f} tokens/s", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="replace")  # where a terminal lacks a character of the text
    with exit_on_user_error():
        startup.end()
        options = parse_options(lambda: tyro.cli(SampleOptions, args=arguments))
        if options.export:
            weights.export(options.model, options.export)
            print(f"{options.export} is ready for transformers: GPT2LMHeadModel.from_pretrained({options.export!r})")
        else:
            continue_prompt(options)


if __name__ == "__main__":
    main()
