"""Drawn pictures for the demo of image generation: coloured shapes of large pixels. Standard library only.

A picture is a function of its name: `sign-red-circle-top-left.png` is a neon sign of a red circle at the top left. It
is made of 8 x 8 squares of 8 x 8 pixels, so that a very small model can draw it. The base model of `tiny_diffusion.py`
knows shapes on paper, by night and as outlines; SD-Demo teaches it signs, which are outlines by night.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import product

SQUARES = 8
PIXELS = 8
SIZE = SQUARES * PIXELS
STYLES = ("paper", "night", "outline", "sign")
COLOURS = {
    "red": (224, 40, 48),
    "green": (40, 176, 80),
    "blue": (48, 96, 248),
    "yellow": (248, 208, 40),
    "purple": (160, 56, 216),
    "orange": (248, 128, 24),
}
SHAPES = {
    "circle": (".####.", "######", "######", "######", "######", ".####."),
    "square": ("######", "######", "######", "######", "######", "######"),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
}
PLACES = {"middle": (1, 1), "top-left": (0, 0), "top-right": (2, 0), "bottom-left": (0, 2), "bottom-right": (2, 2)}
PAPER = (244, 240, 232)
NIGHT = (16, 20, 44)
_NAME = re.compile(rf"({'|'.join(STYLES)})-({'|'.join(COLOURS)})-({'|'.join(SHAPES)})-({'|'.join(PLACES)})\.png")

Colour = tuple[int, int, int]


def pictures(style: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each picture of a style, and the words for what it shows."""
    for colour, shape, place in product(COLOURS, SHAPES, PLACES):
        yield f"{style}-{colour}-{shape}-{place}.png", f"a {colour} {shape} at the {place.replace('-', ' ')}"


def is_named(name: str) -> bool:
    """Whether a name describes a picture of this kind."""
    return _NAME.fullmatch(name) is not None


def draw(name: str) -> bytes:
    """Return the PNG file of this name; `ValueError` if the name describes no picture."""
    rows = b"".join(
        b"\0" + b"".join(bytes(colour) * PIXELS for colour in row) for row in squares(name) for _ in range(8)
    )
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def squares(name: str) -> list[list[Colour]]:
    """Return the colours of the picture of this name, one for each square."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} describes no picture")
    style, colour, shape, (right, down) = match[1], COLOURS[match[2]], SHAPES[match[3]], PLACES[match[4]]

    ground = NIGHT if style in ("night", "sign") else PAPER

    def is_shape(x: int, y: int) -> bool:
        return 0 <= y - down < len(shape) and 0 <= x - right < len(shape) and shape[y - down][x - right] == "#"

    def colour_at(x: int, y: int) -> Colour:
        if not is_shape(x, y):
            return ground
        inside = all(is_shape(x + i, y + j) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1)))
        return _faded(colour, ground) if style in ("outline", "sign") and inside else colour

    return [[colour_at(x, y) for x in range(SQUARES)] for y in range(SQUARES)]


def _faded(colour: Colour, ground: Colour) -> Colour:
    """Return a quarter of a colour on its ground."""
    red, green, blue = ((part + 3 * back) // 4 for part, back in zip(colour, ground, strict=True))
    return red, green, blue


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
