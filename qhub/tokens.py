"""From text to token windows: plain text, `.jsonl`, `.parquet`; packed to the sequence length, deterministic by seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhub.errors import QhubError, UsageError

_TEXT_FIELDS = ("text", "content", "prompt")
_BYTES_PER_TOKEN = 16  # no tokenizer packs more text than this into a token on average: bounds what is read


@dataclass(frozen=True)
class Windows:
    """Token windows: ids (samples, seq_len) int64, each beginning with the tokenizer's BOS where it has one."""

    ids: NDArray[np.int64]
    sha256: str


def read_windows(
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    path: Path,
    samples: int,
    seq_len: int,
    *,
    seed: int | None = None,
    fewer: str | None = "--samples",
    all_there_is: bool = False,
) -> Windows:
    """`samples` windows of `seq_len` tokens from the data at `path`.

    The documents are joined and cut into consecutive windows. Without a seed the first ones are taken, in order; with one,
    `samples` windows are drawn from all of the file (no global random state is touched). `fewer` is the option that asks for
    fewer windows, for the hint; with `all_there_is`, fewer are no error, as long as there is one.

    :raises QhubError: when the data is unreadable or too short; the message says how much is needed.
    """
    room = seq_len - (1 if tokenizer.bos_token_id is not None else 0)
    wanted = samples * room
    limit = None if seed is not None else wanted * _BYTES_PER_TOKEN
    tokens = _tokens(tokenizer, path, limit)
    if limit is not None and len(tokens) < wanted:  # long runs of spaces can be one token
        tokens = _tokens(tokenizer, path, None)
    count = len(tokens) // max(room, 1)
    if count and all_there_is:
        samples = min(samples, count)
    if seq_len < 2 or count < samples:
        raise _too_short(path, len(tokens), (samples, seq_len, room), fewer)
    chosen = range(samples) if seed is None else sorted(random.Random(seed).sample(range(count), samples))
    body = np.stack([tokens[index * room : (index + 1) * room] for index in chosen])
    if room < seq_len:
        body = np.concatenate([np.full((samples, 1), tokenizer.bos_token_id, dtype=np.int64), body], axis=1)
    return Windows(body, hashlib.sha256(body.tobytes()).hexdigest())


def _too_short(path: Path, found: int, wanted: tuple[int, int, int], fewer: str | None) -> QhubError:
    samples, seq_len, room = wanted
    if seq_len < 2:
        return UsageError(f"a window of `{seq_len}` tokens has nothing to predict", hint="give a longer `--seq-len`")
    message = f"`{path}` gives `{found}` tokens; {samples} samples of {seq_len} need {samples * room}"
    if not found:
        return QhubError(message, hint="give a file with text")
    hint = f"give about {max(2, -(-samples * room // found))} times as much text"
    if fewer and found >= room:
        return QhubError(message, hint=f"{hint}, or use `{fewer} {found // room}`")
    shorter = found // samples + seq_len - room
    return QhubError(message, hint=f"{hint}, or use `--seq-len {shorter}`" if shorter > 8 else hint)


def _tokens(tokenizer: Any, path: Path, limit: int | None) -> NDArray[np.int64]:  # noqa: ANN401
    parts: list[NDArray[np.int64]] = []
    used = 0
    for document in documents(path):
        text = document if limit is None else document[: limit - used]
        text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half a character
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose: "longer than the model's maximum"
        parts.append(np.asarray(ids, dtype=np.int64))
        used += len(text)
        if limit is not None and used >= limit:
            break
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def documents(path: Path) -> Iterator[str]:
    """The texts in a file: the whole of a text file, a field of each `.jsonl` line, a column of a `.parquet` file.

    :raises QhubError: when the file does not exist or does not hold text.
    """
    if not path.is_file():
        raise UsageError(f"data file `{path}` does not exist", hint="give a text, .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise QhubError(f"`{path}` is not UTF-8 text ({error.reason} at byte {error.start})", hint="convert it to UTF-8") from None


def _jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError:
                raise QhubError(f"line {number} of `{path}` is not JSON", hint="every line of a .jsonl file is one JSON value") from None
            yield _text_of(row, f"line {number} of `{path}`")


def _text_of(row: Any, where: str) -> str:  # noqa: ANN401 - JSON
    if isinstance(row, str):
        return row
    for field in _TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return str(row[field])
    raise QhubError(f"{where} has no text", hint=f"each row needs a string field named {', '.join(_TEXT_FIELDS)}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise QhubError(f"reading `{path}` needs pyarrow", hint="pip install 'qhub-core[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise QhubError(f"`{path}` is not a parquet file ({str(error).splitlines()[0]})", hint="check how it was written") from None
    strings = {field.name for field in file.schema_arrow if str(field.type) in ("string", "large_string", "string_view")}
    columns = [name for name in _TEXT_FIELDS if name in strings]
    if not columns:
        raise QhubError(f"`{path}` has no text column", hint=f"name a string column {', '.join(_TEXT_FIELDS)}")
    try:
        for batch in file.iter_batches(columns=columns[:1]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (OSError, ValueError) as error:
        raise QhubError(f"`{path}` is damaged ({str(error).splitlines()[0]})", hint="check how it was written") from None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:  # noqa: ANN401 - a transformers tokenizer
    """The tokenizer of a model folder.

    :raises QhubError: when there is none, or it is not usable.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - what a broken tokenizer file raises is not defined
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "get the tokenizer's files again"
        if "trust_remote_code" in str(error):
            reason, hint = "it needs Python code of its own", "if you trust it: `--trust-remote-code`"
        raise QhubError(f"`{folder}` has no usable tokenizer ({reason})", hint=hint) from None
