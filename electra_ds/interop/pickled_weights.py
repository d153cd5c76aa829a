"""Reading of pickled weights (pytorch_model.bin) with a bounded amount of memory.

A file of torch.save is a program for an unpickler. torch.load(weights_only=True) runs no foreign
code, but it calls functions that a small program can let make values of any size. Therefore the
program is checked before: only that of a dict of tensors is accepted.
"""

import io
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.files import open_regular
from electra_ds.common.printable import printable, shortened

# End of a zip: the zip64 record (its sign, bytes and offset of the directory), its locator (sign,
# offset of the record) and the end record (sign, bytes and offset of the directory, comment length).
TAIL = struct.Struct("<4s36xQQ4s4xQ4x4s8xLLH")
END_BYTES = 22  # of the end record
MOST_BYTES = 1 << 24  # of a pickle; 30,000 tensors take 8 MiB
MOST_OPCODES = 1 << 20  # of a pickle; an opcode makes a value of up to 100 bytes
LEGACY_PICKLES = 5  # at the start of a file of torch before 1.6; the weights follow
MOST_REPEATS = 4  # size of all tensors / size of the file; tied embeddings are two tensors
ZIP = b"PK\x03\x04"  # the test of torch
ORDERED_DICT = "collections OrderedDict"
# Functions that a pickle may call, with any arguments.
REBUILDING = tuple(
    f"torch._utils {name}"
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
)
STORAGE = re.compile(r"torch(\.storage)? \w+Storage")
OPCODES = frozenset(
    {"PROTO", "STOP", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "MARK", "NONE", "NEWTRUE"}
    | {"NEWFALSE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "EMPTY_TUPLE", "TUPLE"}
    | {"TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND"}
    | {"APPENDS", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
    | {"SHORT_BINSTRING"}
)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of torch.save, which must be a dict of tensors.

    The messages of torch.load are replaced, because they recommend weights_only=False.
    """
    _check_stored(path)
    _check_pickles(path)
    try:
        tensors = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises exceptions of almost any type
        raise UserError(
            f"{path}: cannot be read as weights ({type(error).__name__}): it is damaged, has "
            "another format, or contains objects other than tensors, which could run code; if you "
            "trust it, convert it to safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise UserError(
            f"{path}: found values that are not tensors; expected a dict of tensors (a state_dict)"
        )
    size = path.stat().st_size
    for name, value in tensors.items():
        is_plain = value.layout == torch.strided and not value.is_quantized
        if not is_plain or value.is_meta or value.numel() * value.element_size() > size:
            raise UserError(
                f"{path}: {printable(name)} is sparse, quantized, or larger than the file; "
                "expected plain tensors"
            )
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    if total > MOST_REPEATS * size:
        raise UserError(
            f"{path}: tensors of {total:,} bytes in a file of {size:,} bytes, so that many are the "
            f"same data; expected at most {MOST_REPEATS} times the size of the file; if you trust "
            "it, convert it to safetensors"
        )
    return tensors


def _check_pickles(path: Path) -> None:
    """Raise UserError for a pickle that makes other values than a dict of tensors.

    The result of torch.load then takes little more memory than the file.
    """
    try:
        with open_regular(path) as file:
            if file.read(len(ZIP)) == ZIP:
                content, count = _pickle_of_zip(path), 1
            else:
                file.seek(0)
                content, count = file.read(MOST_BYTES), LEGACY_PICKLES
        stream = io.BytesIO(content)
        for _ in range(count):
            _check_pickle(stream)
    except (ValueError, LookupError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{path}: cannot be read as weights ({printable(str(error))}); expected a dict of "
            "tensors (a state_dict) of torch.save; copy the file again, or convert it to "
            "safetensors if you trust it"
        ) from None


def _pickle_of_zip(path: Path) -> bytes:
    """Return the pickle in a zip of torch.save. Raises ValueError if it is not there, or too large."""
    with zipfile.ZipFile(path) as archive:
        if any(x.orig_filename != x.filename for x in archive.infolist()):
            raise ValueError("a name with a NUL in the archive")
        # torch ignores the case of names.
        found = [x for x in archive.infolist() if x.filename.lower().endswith("data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{len(found)} entries named data.pkl in the archive")
        if found[0].file_size > MOST_BYTES:
            raise ValueError(f"data.pkl of {found[0].file_size:,} bytes; at most {MOST_BYTES:,}")
        return archive.read(found[0])


def _check_pickle(stream: io.BytesIO) -> None:
    """Raise ValueError unless a pickle calls only functions that rebuild tensors.

    stream: is left after the pickle. The values on the stack are followed as far as a call needs
    it: names of functions, and the empty tuple.
    """
    stack: list[object] = []
    memo: dict[object, object] = {}
    built = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if name not in OPCODES or number >= MOST_OPCODES:
            raise ValueError(f"an opcode {name} in its pickle, or too many of them")
        if name == "GLOBAL":
            _check_name(str(argument))
        elif name == "REDUCE":
            _check_call(stack[-2], stack[-1])
        elif name == "BUILD":  # of the _metadata of a state_dict
            built += 1
            if built > 1:
                raise ValueError("its pickle sets attributes of more than one object")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        value = {"GLOBAL": argument, "EMPTY_TUPLE": (), "MARK": pickletools.markobject}.get(name)
        if name in ("BINGET", "LONG_BINGET"):
            value = memo[argument]
        for popped in reversed(opcode.stack_before):
            if popped is pickletools.stackslice:
                while stack[-1] is not pickletools.markobject:
                    stack.pop()
            else:
                stack.pop()
        stack += [value] * len(opcode.stack_after)


def _check_name(name: str) -> None:
    if name != ORDERED_DICT and name not in REBUILDING and not STORAGE.fullmatch(name):
        raise ValueError(f"its pickle names {shortened(name.replace(' ', '.'))}")


def _check_call(function: object, arguments: object) -> None:
    # OrderedDict(x) is a copy, so that a few bytes could repeat a large value.
    if function not in REBUILDING and (function, arguments) != (ORDERED_DICT, ()):
        raise ValueError("its pickle calls other functions than those that rebuild tensors")


def _check_stored(path: Path) -> None:
    """Raise UserError for a zip with compressed entries: their size in memory has no limit."""
    with open_regular(path) as file:
        if file.read(4) != ZIP:
            return  # the format of torch.save before torch 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as weights ({error})") from None
    if not _has_one_directory(path):
        raise UserError(
            f"{path}: cannot be read as weights (bytes before or after the archive); copy the file "
            "again"
        )
    total = sum(entry.file_size for entry in entries)
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not is_stored or total > path.stat().st_size:
        raise UserError(
            f"{path}: cannot be read as weights (a compressed archive); torch.save does not "
            "compress"
        )


def _has_one_directory(path: Path) -> bool:
    """Return whether a zip ends with its directory and the records of it, as torch.save writes it.

    With other bytes before or after the archive, torch may read another directory than zipfile.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL.size))
        tail = file.read()
    if len(tail) < TAIL.size:
        return False
    sign64, length, offset, locator, record, end, short_length, short_offset, comment = TAIL.unpack(
        tail
    )
    if end != b"PK\5\6" or comment:
        return False
    if locator != b"PK\6\7":
        return short_offset + short_length == size - END_BYTES
    start = size - TAIL.size
    return sign64 == b"PK\6\6" and record == start and offset + length == start
