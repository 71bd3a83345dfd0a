"""Damaged copies of files, for fuzzing what reads them."""

import io
import json
import random
import re
import struct
import zipfile
import zlib

_INTEGERS = [
    struct.pack(form, value)
    for form, values in (
        ("<I", (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)),
        (">I", (1, 100_000, 0x7FFFFFFF, 0xFFFFFFFF)),
        ("<Q", (0, 1, 10**9, 10**18, 2**63, 2**64 - 1)),
        ("<d", (float("nan"), float("inf"), -1.0, 1e300)),
    )
    for value in values
]
_WORDS = [
    b"0",
    b"-1",
    b"nan",
    b"inf",
    b"1e300",
    b"999999999999999999",
    b"99999999999999999999999999",
    b"\xff",
    b"x",
    b"",
]
_VALUES = [0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, float("nan"), "", "float32", "int64", None, True, [], [1], {}, [[]]]
_PATHS = [b"../../../etc/passwd", b"/etc/passwd", b"a/../../b.png", b"..", b"\n", b"a" * 300]


def mutate(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A copy of `content` with one to four kinds of damage, some of it taken from `donor`."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_MUTATIONS)(data, donor, rng)
    return bytes(data)


def mutate_npz(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A copy of an .npz file with one of its arrays damaged, and checksums that hold."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(sorted(members))
    members[chosen] = mutate(members[chosen], donor, rng)
    if rng.random() < 0.1:
        del members[chosen]
    result = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(result, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return result.getvalue()


def mutate_checkpoint(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A copy of a checkpoint of version 2 with damage in its header or in one of its tensors, and good checksums."""
    place, length = struct.unpack_from("<QQ", content, 20)
    data, text = bytearray(content[:place]), content[place : place + length]
    header = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.choice(("entry", "bytes", "text"))
        entry = header["tensors"][rng.choice(sorted(header["tensors"]))]
        if kind == "entry":
            owner = rng.choice((header, entry, entry, entry["shape"]))
            key = rng.randrange(len(owner)) if isinstance(owner, list) and owner else rng.choice(sorted(owner or ["x"]))
            if isinstance(owner, dict) and rng.random() < 0.1:
                del owner[key]
                break
            if not isinstance(owner, list) or owner:
                owner[key] = rng.choice(_VALUES)
                break
        elif kind == "bytes":
            position = entry["place"] + rng.randrange(64)
            value = rng.choice(_INTEGERS)
            data[position : position + len(value)] = value[: max(len(data) - position, 0)]
    else:
        for entry in header["tensors"].values():
            row_bytes = {"float32": 4, "int32": 4, "uint8": 1, "bool": 1}.get(entry["dtype"], 8)
            for size in entry["shape"][1:]:
                row_bytes *= size
            end = entry["place"] + row_bytes * (entry["shape"][0] if entry["shape"] else 1)
            step = entry["block_rows"] * row_bytes
            entry["crc32"] = [
                zlib.crc32(data[first : min(first + step, end)]) for first in range(entry["place"], end, step or 1)
            ]
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = mutate(text, donor, rng)
    prologue = struct.pack(
        "<16sIQQI", content[:16], rng.choice((2, 2, 2, 2, 3)), len(data), len(text), zlib.crc32(text)
    )
    data[: len(prologue) + 4] = prologue + struct.pack("<I", zlib.crc32(prologue))
    return bytes(data) + text


def mutate_json(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A copy of a JSON file that is one still, with some of its values replaced or taken out."""
    root = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        owner = root
        while True:  # the deeper, the rarer: a file has few fields of its own and very many numbers
            keys = range(len(owner)) if isinstance(owner, list) else sorted(owner)
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(owner[key], (dict, list)) and rng.random() < 0.8:
                owner = owner[key]
                continue
            if rng.random() < 0.2:
                del owner[key]
            else:
                owner[key] = rng.choice(
                    (*_VALUES, *(path.decode() for path in _PATHS), "1e300", owner[key], [owner[key]])
                )
            break
    return json.dumps(root).encode()


def mutate_text(content: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A copy of a text file with some of its words and numbers replaced, whatever stands between them."""
    data = content
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = [match.span() for match in re.finditer(rb'[^\s,<>="/]+', data)]
        start, end = rng.choice(places) if places else (0, 0)
        data = data[:start] + rng.choice((*_WORDS, *_PATHS)) + data[end:]
    return data


def _flip_bits(data: bytearray, donor: bytes, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 3, 20))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(data: bytearray, donor: bytes, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _append(data: bytearray, donor: bytes, rng: random.Random) -> None:
    data += donor[: rng.choice((1, 8, 1000))]


def _delete(data: bytearray, donor: bytes, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 4, 8, 50))]


def _splice(data: bytearray, donor: bytes, rng: random.Random) -> None:
    start, source = rng.randrange(len(data) + 1), rng.randrange(len(donor) + 1)
    length = rng.choice((1, 8, 64, 500))
    data[start : start + length] = donor[source : source + length]


def _repeat(data: bytearray, donor: bytes, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = data[start : start + rng.choice((8, 64, 500))] * rng.choice((1, 2, 50))


def _put_integer(data: bytearray, donor: bytes, rng: random.Random) -> None:
    integer = rng.choice(_INTEGERS)
    # Half of the time near the beginning, where headers keep their counts.
    start = rng.randrange(min(len(data), rng.choice((64, 1 << 30))) + 1)
    data[start : start + len(integer)] = integer


def _put_word(data: bytearray, donor: bytes, rng: random.Random) -> None:
    """Replace a word of a text file, or what stands between two blanks by chance."""
    words = bytes(data[: 1 << 16]).split(b" ")
    if len(words) > 1:
        words[rng.randrange(len(words))] = rng.choice(_WORDS)
        data[: 1 << 16] = b" ".join(words)


def _swap_lines(data: bytearray, donor: bytes, rng: random.Random) -> None:
    lines = bytes(data[: 1 << 16]).split(b"\n")
    if len(lines) > 1:
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[first], lines[second] = lines[second], lines[first]
        data[: 1 << 16] = b"\n".join(lines)


def _put_path(data: bytearray, donor: bytes, rng: random.Random) -> None:
    """Replace the name of a picture by one that leads elsewhere, or cannot be a name."""
    at = bytes(data).find(b".png", rng.randrange(len(data) + 1))
    if at > 3:
        data[at - 3 : at + 4] = rng.choice(_PATHS)


_MUTATIONS = (
    *(_flip_bits, _truncate, _append, _delete, _splice, _repeat),
    *(_put_integer, _put_integer, _put_word, _put_word, _swap_lines, _put_path),
)
