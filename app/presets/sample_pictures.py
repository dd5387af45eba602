"""Small drawn pictures for the demo of vision-language models: one shape in one colour. Standard library only.

A picture is a function of its name: `red-ring-16-15-11-28.png` is a red ring with the centre (16, 15) and the radius
11 on the grey 28. So the names in a data set are all that has to be shipped.
"""

import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from random import Random

SIZE = 32
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 255), "yellow": (250, 204, 21)}
SHAPES = ("ring", "square", "triangle")
_NAME = re.compile(rf"({'|'.join(COLOURS)})-({'|'.join(SHAPES)})-(\d+)-(\d+)-(\d+)-(\d+)\.png")


def picture_name(colour: str, shape: str, chance: Random, *, of_base: bool = False) -> str:
    """Return the name of a picture that is large and near the middle, as a small model needs it.

    What the base model learns from (odd greys) is never what it is trained and scored on later (even ones).
    """
    x, y = (SIZE // 2 + chance.randint(-2, 2) for _ in range(2))
    grey = 2 * chance.randrange(32) + of_base
    return f"{colour}-{shape}-{x}-{y}-{chance.randint(10, 12)}-{grey}.png"


def draw(name: str) -> bytes:
    """Return the PNG file of this name; `ValueError` if the name describes no picture."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} describes no picture")
    x, y, radius, grey = (int(number) for number in match.groups()[2:])
    colour, background = bytes(COLOURS[match[1]]), bytes([min(grey, 255)] * 3)
    lines = []
    for number in range(SIZE):
        line = bytearray(background * SIZE)
        for half, paint in zip(_half_widths(match[2], number - y, radius), (colour, background), strict=True):
            left, right = max(0, x - half), min(SIZE, x + half + 1)
            if left < right:
                line[3 * left : 3 * right] = paint * (right - left)
        lines.append(b"\0" + line)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def draw_all(names: Iterable[str], folder: Path) -> None:
    """Draw the pictures into a folder, which may hold others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(draw(name))


def _half_widths(shape: str, down: int, radius: int) -> tuple[int, int]:
    """Return how far shape and hole go to each side of the middle, `down` lines below it; -1 where they are not."""
    if shape == "ring":
        return _half_circle(down, radius), _half_circle(down, radius // 2)
    if shape == "square":
        return (radius if abs(down) <= radius else -1), -1
    return ((down + radius) // 2 if abs(down) <= radius else -1), -1


def _half_circle(down: int, radius: int) -> int:
    return int((radius**2 - down**2) ** 0.5) if abs(down) <= radius else -1


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
