"""Decodes image files in a process of its own: threads of one process would wait for each other at every small image.

    python common/decoder.py WIDTH HEIGHT RESIZE DESCRIPTOR FIRST STEP < names

Writes the pixels of the named files, bytes (height, width, 3), into the open file DESCRIPTOR, an array of images, at
the indices FIRST, FIRST + STEP and so on. Ends at the first file that cannot be read or, unless RESIZE is 1, has
another size, and prints how many were read. It needs nothing but Pillow and starts in a tenth of a second.
"""

import io
import os
import signal
import sys


def open_image(file):
    """Return an image, given its name or an open file, in colour. Raises what Pillow raises, and ValueError."""
    from PIL import Image

    with Image.open(file, formats=("JPEG", "PNG")) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has 16 or 32 bits per pixel, expected 8")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # the conversion would copy it


def main(width, height, resize, descriptor, first, step):
    """Do what is told above."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of whoever has started this
    parent, finished = os.getppid(), 0
    for name in sys.stdin.buffer.read().split(b"\0"):
        try:
            with open(name, "rb", buffering=0) as file:
                image = open_image(io.BytesIO(file.read()))  # Pillow reads a few bytes at a time
        except Exception:
            break  # whoever misses the pixels finds out why
        if image.size != (width, height):
            if not resize:
                break
            image = image.resize((width, height))
        os.pwrite(descriptor, image.tobytes(), (first + finished * step) * width * height * 3)
        finished += 1
        if os.getppid() != parent:
            return  # nobody wants them any more
    print(finished)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
