"""Decodes image files in another process: threads would wait for each other at every small image.

    python common/decoder.py PARENT DESCRIPTOR FIRST STEP WIDTH HEIGHT RESIZE < names

Writes the pixels of the named files, bytes (height, width, 3), into the open file DESCRIPTOR, an array of
images, at the indices FIRST, FIRST + STEP and so on. Ends at the first file that cannot be read or, unless
RESIZE is 1, has another size, or if the process PARENT has ended. Prints how many files were read, and how
many of them were transparent. It needs nothing but Pillow and starts in a tenth of a second.
"""

import contextlib
import io
import itertools
import os
import signal
import sys

# What Pillow reads by itself. For some other formats it starts a program.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM"]
FORMATS += ["TGA", "ICO", "JPEG2000", "AVIF", "MPO", "PCX"]
ON_WHITE = "on white"  # in the `info` of an image that was transparent
ORIENTATION = 0x0112  # the tag of a camera that was held sideways


def open_image(file):
    """Return the image of a name or an open file in colour, the right way up and without transparency.

    What is transparent becomes white, and the first of several pages counts. Raises Pillow's errors and
    ValueError.
    """
    from PIL import Image, ImageOps

    with _open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has 16 or 32 bits per pixel, expected 8")
        image.load()
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image.info[ON_WHITE] = True
        return image if image.mode == "RGB" else image.convert("RGB")  # the conversion would copy it


def _open(file):
    from PIL import Image, UnidentifiedImageError

    Image.preinit()  # the usual formats; all of them would take a tenth of a second
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def main(parent, descriptor, indices, size, resize):
    """Decode the images; the arguments are those of the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it this process
    num_bytes = size[0] * size[1] * 3
    finished = num_on_white = 0
    for name, index in zip(sys.stdin.buffer.read().split(b"\0"), indices):
        try:
            with open(name, "rb", buffering=0) as file:
                image = open_image(io.BytesIO(file.read()))  # Pillow reads a few bytes at a time
        except Exception:
            break  # the parent reads this file again and reports the error
        num_on_white += ON_WHITE in image.info
        if image.size != size:
            if not resize:
                break
            image = image.resize(size)
        if os.getppid() != parent:
            return
        os.pwrite(descriptor, image.tobytes(), index * num_bytes)
        finished += 1
    print(finished, num_on_white)


if __name__ == "__main__":
    parent, descriptor, first, step, width, height, resize = map(int, sys.argv[1:])
    main(parent, descriptor, itertools.count(first, step), (width, height), resize)
