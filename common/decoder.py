"""Decode images of any format that Pillow reads, in the size and the colours of the training images."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any

import numpy as np

# Formats that Pillow reads by itself. For some others it starts a program.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM"]
FORMATS += ["TGA", "ICO", "JPEG2000", "AVIF", "MPO", "PCX"]
PAGES = ("GIF", "TIFF", "WEBP")  # formats of several pages
ORIENTATION = 0x0112  # the tag of a camera that was held sideways

# The changes to an image, as the log names them.
NOTES = "notes"  # the key in `Image.info`
ON_WHITE = "partly transparent: drawn on white"
EIGHT_BITS = "16 bits deep: read with 8 bits"
FIRST_PAGE = "one of several pages: only the first is read"
RESIZED = "of another size: resized, and cropped if its shape differs"


def decode(content: bytes, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Return the pixels of an encoded image, uint8 (height, width, 3), and the changes to it (see above).

    Args:
        content: the bytes of a file.
        size: (width, height) of the result.

    Raises Pillow's errors and ValueError.
    """
    pixels = _decode_jpeg(content)
    notes: list[str] = []
    if pixels is None:
        image = open_image(io.BytesIO(content))
        notes += image.info.get(NOTES, [])
    elif pixels.shape[1::-1] == size:
        return pixels, notes
    else:
        from PIL import Image

        image = Image.fromarray(pixels)
    if image.size != size:
        notes.append(RESIZED)
        image = fit(image, size)
    return np.asarray(image), notes


def fit(image: Any, size: tuple[int, int]) -> Any:
    """Return a Pillow image resized until it covers (width, height), and cropped around the centre."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, size, Image.BILINEAR)  # type: ignore[attr-defined]


def open_image(file: Any) -> Any:
    """Return the image of a name or an open file in colour, the right way up and without transparency.

    The changes to it are in `info[NOTES]`. Raises Pillow's errors and ValueError.
    """
    from PIL import Image, ImageOps

    notes = []
    with _open(file) as image:
        if image.format in PAGES and getattr(image, "is_animated", False):
            notes.append(FIRST_PAGE)
        image.load()
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            notes.append(EIGHT_BITS)
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has 32 bits per pixel, expected 8 or 16")
        if image.has_transparency_data:
            notes.append(ON_WHITE)
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":  # the conversion would copy it
            image = image.convert("RGB")
        image.info[NOTES] = notes
        return image


def _open(file):
    from PIL import Image, UnidentifiedImageError

    Image.preinit()  # the usual formats; all of them would take a tenth of a second
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    Image.init()
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:  # its message has the address of a buffer
        raise ValueError("it is not an image, or damaged") from error


def _decode_jpeg(content):
    """Return the pixels of a JPEG file; None if Pillow has to read it, whose error messages are clear.

    The result is that of Pillow, in half the time.
    """
    simplejpeg = _find_simplejpeg()
    if simplejpeg is None or not content.startswith(b"\xff\xd8"):
        return None
    from PIL import Image

    if b"Exif\0\0" in content[:4096]:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
            if image.getexif().get(ORIENTATION, 1) != 1:
                return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in ("YCbCr", "Gray") or height * width > Image.MAX_IMAGE_PIXELS:
            return None
        return simplejpeg.decode_jpeg(content)
    except ValueError:
        return None


@functools.lru_cache(maxsize=None)  # cache needs Python 3.9
def _find_simplejpeg():
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
