"""A synthetic Llama of a real one's shape: for speed and memory, where no real model can be had.

    python make_llama.py OUT --shape 1.1b          # TinyLlama-1.1B's shape, 2.2 GB
    python make_llama.py OUT --shape 7b            # Llama-2-7B's shape, 13.5 GB in three shards
    python make_llama.py OUT --shape 1.1b --layers 1

Writes a Hugging Face folder (bfloat16 safetensors, config, tokenizer) and `calibration.txt`, enough for 128
samples of 512 tokens. Needs numpy and tokenizers; memory stays below 0.5 GB, as tensors are made in pieces
and go straight to the file.

What is realistic about the weights, since quantizers are sensitive to it (`Weights`):
- heavy tails: entries are `z * (0.8 + 0.07 z²)` of a normal z (kurtosis about 6), rows differ in scale;
- outlier channels: about 0.5 % of the hidden channels have norm gains 10 to 30 times the others', the same
  channels in every layer, and the projections that read them have these columns smaller by the gain's root;
  likewise 0.5 % of the MLP's inner channels, larger in `up_proj` and smaller in `down_proj`.
The model knows no language: accuracy on it means nothing, agreement with its float self does.

Every tensor is drawn from a generator seeded by (`--seed`, its name): the same bytes whatever the sharding,
and `--layers N` is the whole model's first N blocks.
"""

import argparse
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Floats = npt.NDArray[np.float32]
SHARD_LIMIT_BYTES = 5_000_000_000
CHUNK_ELEMENTS = 1 << 24
BFLOAT16_BYTES = 2
OUTLIER_SHARE = 0.005
CALIBRATION_WORDS = 128 * 512
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


@dataclass(frozen=True)
class Shape:
    """The sizes that a Llama's config has, under transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 32000

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the files; matrices are (N out, K in)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            block = f"model.layers.{layer}."
            yield block + "input_layernorm.weight", (hidden,)
            yield block + "self_attn.q_proj.weight", (hidden, hidden)
            yield block + "self_attn.k_proj.weight", (self.kv_size, hidden)
            yield block + "self_attn.v_proj.weight", (self.kv_size, hidden)
            yield block + "self_attn.o_proj.weight", (hidden, hidden)
            yield block + "post_attention_layernorm.weight", (hidden,)
            yield block + "mlp.gate_proj.weight", (inner, hidden)
            yield block + "mlp.up_proj.weight", (inner, hidden)
            yield block + "mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


SHAPES = {
    "110m": Shape(768, 12, 12, 12, 2048),
    "1.1b": Shape(2048, 22, 32, 4, 5632),
    "7b": Shape(4096, 32, 32, 32, 11008),
}


def generator(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one tensor (or one choice), independent of all others."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


def to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16 (ties to even), as bits. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


class Weights:
    """The values of the tensors of one model; draws nothing until asked, keeps only the outlier gains."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.seed = seed
        self.hidden_gains = self._outlier_gains("hidden outliers", shape.hidden_size)
        self.inner_gains = self._outlier_gains("inner outliers", shape.intermediate_size)

    def _outlier_gains(self, name: str, channels: int) -> Floats:
        """(channels,) float32: 1, and 10 to 30 in the outlier channels."""
        random = generator(self.seed, name)
        gains = np.ones(channels, dtype=np.float32)
        chosen = random.choice(channels, max(1, round(channels * OUTLIER_SHARE)), replace=False)
        gains[chosen] = random.uniform(10, 30, len(chosen))
        return gains

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint16]]:
        """The tensor in row-major order as bfloat16 bits, in pieces of at most about 2**24 elements."""
        random = generator(self.seed, name)
        if len(shape) == 1:
            yield to_bfloat16(self._gain(random, shape[0]))
            return
        columns, rows_at_once = self._column_scale(name, shape[1]), max(1, CHUNK_ELEMENTS // shape[1])
        for first in range(0, shape[0], rows_at_once):
            rows = min(rows_at_once, shape[0] - first)
            matrix = heavy_tailed(random, rows, shape[1])
            matrix *= columns
            if name.endswith("up_proj.weight"):
                matrix *= self.inner_gains[first : first + rows, None]
            yield to_bfloat16(matrix)

    def _gain(self, random: np.random.Generator, channels: int) -> Floats:
        """A norm's weight (channels,): spread around 0.5, the outlier channels above."""
        spread = random.lognormal(-0.7, 0.15, channels).astype(np.float32)
        return np.asarray(spread * self.hidden_gains, dtype=np.float32)

    def _column_scale(self, name: str, columns: int) -> Floats:
        """(columns,) float32: the standard deviation of a matrix's columns."""
        if name.endswith("embed_tokens.weight"):
            return np.full(columns, 0.5, dtype=np.float32)
        deviation = np.float32(columns**-0.5)
        if name.endswith("down_proj.weight"):
            return np.asarray(deviation / np.sqrt(self.inner_gains), dtype=np.float32)
        if name.endswith("o_proj.weight"):
            return np.full(columns, deviation, dtype=np.float32)
        return np.asarray(2 * deviation / np.sqrt(self.hidden_gains), dtype=np.float32)


def heavy_tailed(random: np.random.Generator, rows: int, columns: int) -> Floats:
    """(rows, columns) float32 of mean 0 and deviation about 1, heavier-tailed than a normal."""
    z = random.standard_normal((rows, columns), dtype=np.float32)
    factor = z * z
    factor *= 0.07
    factor += 0.8
    z *= factor
    z *= random.lognormal(0, 0.2, (rows, 1)).astype(np.float32)
    return z


def byte_count(shape: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor."""
    return int(np.prod(shape)) * BFLOAT16_BYTES


def shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors divided, in order, into files of at most SHARD_LIMIT_BYTES."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used_bytes = 0
    for name, tensor in shape.tensors():
        if used_bytes + byte_count(tensor) > SHARD_LIMIT_BYTES and files[-1]:
            files.append({})
            used_bytes = 0
        files[-1][name] = tensor
        used_bytes += byte_count(tensor)
    return files


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], weights: Weights) -> None:
    """One safetensors file: length of the header, header, tensors in its order without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + byte_count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            for chunk in weights.chunks(name, shape):
                chunk.tofile(file)


def write_weights(folder: Path, shape: Shape, seed: int) -> None:
    """All shards, and their index where there is more than one."""
    weights, files = Weights(shape, seed), shards(shape)
    if len(files) == 1:
        write_safetensors(folder / "model.safetensors", files[0], weights)
        return
    index: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, tensors, weights)
        index.update(dict.fromkeys(tensors, name))
    total = sum(byte_count(tensor) for _, tensor in shape.tensors())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_json(path: Path, value: object) -> None:
    """JSON as transformers writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_config(folder: Path, shape: Shape, context: int) -> None:
    """config.json of a LlamaForCausalLM, head and embedding untied."""
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_json(folder / "config.json", {**common, **asdict(shape)})


def syllables() -> list[str]:
    """The 100 syllables all words consist of."""
    return [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE in which a space and a word of two syllables is one token.

    Merges in order: letters to syllables, syllables to words, space before the word, and then a third
    syllable behind it for as many words as the vocabulary has room.
    """
    vocab = {token: number for number, token in enumerate([UNKNOWN, BOS, EOS, *byte_letters()])}
    merges: list[tuple[str, str]] = []
    for pair in merge_pairs():
        if len(vocab) == vocab_size:
            break
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([UNKNOWN, BOS, EOS])
    return tokenizer


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def merge_pairs() -> Iterator[tuple[str, str]]:
    """The merges by falling priority: about a million, more than any vocabulary takes."""
    space = "\u0120"  # the letter that stands for the space in byte-level vocabularies
    parts = syllables()
    words = [first + second for first in parts for second in parts]
    yield from ((part[0], part[1]) for part in parts)
    yield from ((word[:2], word[2:]) for word in words)
    yield from ((space, word) for word in words)
    yield from ((space + word, part) for word in words for part in parts)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json and what transformers needs beside it."""
    build_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def calibration_text(seed: int) -> str:
    """Random two-syllable words, some much more frequent than others, as in a text; each is one token."""
    random, parts = generator(seed, "calibration"), syllables()
    ranks = np.arange(1, len(parts) ** 2 + 1)
    chances = 1 / (ranks + 10)
    order = random.permutation(len(ranks))
    drawn = order[random.choice(len(ranks), CALIBRATION_WORDS, p=chances / chances.sum())]
    return "".join(f" {parts[word // len(parts)]}{parts[word % len(parts)]}" for word in drawn)


def main() -> None:
    """Read the arguments, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="number of blocks, where not the shape's own")
    parser.add_argument("--context", type=int, default=2048, help="positions that the config allows; the weights are the same")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        shape = Shape(**{**asdict(shape), "num_hidden_layers": args.layers})
    args.out.mkdir(parents=True, exist_ok=True)
    write_config(args.out, shape, args.context)
    write_tokenizer(args.out, shape.vocab_size)
    (args.out / "calibration.txt").write_text(calibration_text(args.seed), encoding="utf-8")
    write_weights(args.out, shape, args.seed)


if __name__ == "__main__":
    main()
