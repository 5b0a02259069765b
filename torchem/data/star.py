"""STAR files: reading that names the broken line, writing that keeps every digit.

The reader is ours because the ``starfile`` package reads a broken file quietly: a short row becomes NaN, a ``#``
within a path cuts the row, a binary file gives no blocks. Its writer rounds to six decimals.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from torchem.data.files import replacing
from torchem.errors import InputError

# labels whose values stay text though they may look like numbers (a micrograph may be called "7")
_TEXT = re.compile(r"(Name|File|Image|Mask|Scheme|SymmetryGroup|Path|Comment)\d?$")
_TOKEN = re.compile(r"""\s*(?:"([^"]*)"(?=\s|$)|'([^']*)'(?=\s|$)|(\S+))""")
_HEADER = re.compile(r"_(\S+)(?:\s+(.*))?$")

Block: TypeAlias = dict[str, Any] | pd.DataFrame


def read_star(path: str | Path, last: str | None = None) -> dict[str, Block]:
    """Blocks of a STAR file by name (without ``data_``).

    Parameters
    ----------
    last
        block after which nothing is read; None: all are.

    Returns
    -------
    a loop as a ``DataFrame`` of int64, float64 or text columns, single values as a ``dict`` of int, float and str;
    labels without their leading underscore.

    Raises
    ------
    InputError
        for a file that is missing, empty, binary or garbled, naming the line.
    """
    path = Path(path)
    lines = _lines(path)
    blocks: dict[str, Block] = {}
    name: str | None = None
    at = 0
    while at < len(lines):
        line = lines[at].strip()
        if not line or line.startswith("#"):
            at += 1
        elif line.startswith("data_"):
            if last in blocks:
                break
            name = line[5:].split()[0] if len(line) > 5 and not line[5].isspace() else ""
            if name in blocks:
                raise InputError(f"{path}, line {at + 1}: block data_{name} stands here twice; keep one")
            blocks[name] = {}
            at += 1
        elif name is None:
            raise InputError(f"{path}, line {at + 1}: {line[:60]!r} before any data_ block; this is no STAR file")
        elif line.split()[0] == "loop_":
            if len(blocks[name]):
                raise InputError(f"{path}, line {at + 1}: a second loop_ in block data_{name}; split the block")
            blocks[name], at = _loop(path, name, lines, at + 1)
        else:
            label, value = _single(path, name, line, at)
            block = blocks[name]
            if isinstance(block, pd.DataFrame):
                raise InputError(
                    f"{path}, line {at + 1}: {label} after the loop of block data_{name}; the file is garbled"
                )
            block[label] = _column(label, [value])[0]
            if isinstance(block[label], np.generic):
                block[label] = block[label].item()
            at += 1
    if not blocks:
        raise InputError(f"{path} is empty or has no data_ block; is it a STAR file?")
    return blocks


def write_star(path: str | Path, blocks: Mapping[str, Mapping[str, Any] | pd.DataFrame], comment: str = "") -> None:
    """Write blocks in RELION 5's layout, under a temporary name until whole.

    Floats carry the shortest digits that read back exactly, bools are 0 and 1, text is quoted where it has spaces
    or is empty. Lines of ``comment`` head the file.
    """
    parts = [f"# {line}\n" for line in comment.splitlines()]
    for name, block in blocks.items():
        parts.append(f"\n# version 50001\n\ndata_{name}\n\n")
        if isinstance(block, pd.DataFrame):
            parts.append("loop_ \n")
            parts += [f"_{label} #{number} \n" for number, label in enumerate(block.columns, 1)]
            columns = [_words(column.to_numpy()) for _, column in block.items()]
            parts += [" ".join(row) + " \n" for row in zip(*columns, strict=True)]
        else:
            parts += [f"_{label:<50} {_word(value)}\n" for label, value in block.items()]
        parts.append(" \n")
    with replacing(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    try:
        if b"\0" in content:
            raise ValueError
        text = content.decode("utf-8-sig")
    except ValueError:
        raise InputError(f"{path} is a binary file; give a STAR file (text)") from None
    # not str.splitlines: that also breaks at form feeds and Unicode separators within a value
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _tokens(line: str) -> list[str]:
    if '"' not in line and "'" not in line:
        return line.split()
    return [double or single or plain for double, single, plain in _TOKEN.findall(line)]


def _single(path: Path, name: str, line: str, at: int) -> tuple[str, str]:
    match = _HEADER.match(line)
    tokens = _tokens(match[2]) if match and match[2] else []
    if not match or not tokens or (len(tokens) > 1 and not tokens[1].startswith("#")):
        raise InputError(
            f"{path}, line {at + 1}: {line[:60]!r} in block data_{name} is not '_label value'; the file is garbled"
        )
    return match[1], tokens[0]


def _loop(path: Path, name: str, lines: list[str], at: int) -> tuple[pd.DataFrame, int]:
    """Table of the loop whose labels begin at line index ``at``, and the index of the line after it."""
    labels: list[str] = []
    while at < len(lines) and (not lines[at].strip() or lines[at].lstrip()[0] in "_#"):
        if match := _HEADER.match(lines[at].strip()):
            labels.append(match[1])
        at += 1
    if not labels:
        raise InputError(f"{path}, line {at}: loop_ of block data_{name} has no labels; the file is garbled")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"{path}: column _{twice} stands twice in block data_{name}; keep one")
    rows: list[list[str]] = []
    split = _tokens if any('"' in line or "'" in line for line in lines[at:]) else str.split
    while at < len(lines):
        tokens = split(lines[at])
        if tokens and tokens[0][:1] != "#":
            if tokens[0].startswith("data_"):
                break
            if len(tokens) != len(labels):
                raise InputError(
                    f"{path}, line {at + 1} (row {len(rows) + 1} of data_{name}): {len(tokens)} values for "
                    f"{len(labels)} columns; the file is cut short or garbled, write it again"
                )
            rows.append(tokens)
        at += 1
    columns: Iterable[Sequence[str]] = zip(*rows, strict=True) if rows else ([] for _ in labels)
    return pd.DataFrame({label: _column(label, column) for label, column in zip_longest(labels, columns)}), at


def _column(label: str, values: Sequence[str]) -> np.ndarray:
    """Values as int64 or float64 if all are numbers and the label is not one of text, else as text."""
    # Python reads "1_0" as a number, STAR does not
    if not _TEXT.search(label) and "_" not in "".join(values):
        try:
            return np.array(list(map(int, values)), dtype=np.int64)
        except OverflowError:
            return np.array(values, dtype=object)  # an identifier of 64 bits or more: a float would lose digits
        except ValueError:
            pass
        try:
            return np.array(list(map(float, values)), dtype=np.float64)
        except ValueError:
            pass
    return np.array(values, dtype=object)


def _words(values: np.ndarray) -> list[str]:
    if values.dtype.kind == "f" and values.dtype != np.float64:
        return values.astype(str).tolist()  # shortest digits of a float32
    if values.dtype.kind in "fiu":
        return list(map(repr, values.tolist()))
    return [_word(value) for value in values.tolist()]


def _word(value: Any) -> str:
    if not isinstance(value, str):
        if isinstance(value, bool | np.bool_):
            return str(int(value))
        if isinstance(value, np.generic):
            return _words(np.array([value]))[0]
        if isinstance(value, int | float):
            return repr(value)
    text = str(value)
    # one word, and not a quoted one
    if text.split() == [text] and text[0] not in "\"'#":
        return text
    if "\n" in text or ('"' in text and "'" in text):
        raise InputError(f"{text!r} cannot stand in a STAR file; rename it without line breaks and quotes")
    return f"'{text}'" if '"' in text else f'"{text}"'
