"""Decodes image files in a process of its own: threads of one process would wait for each other at every small image.

    python common/decoder.py WIDTH HEIGHT RESIZE < names > pixels

Writes the pixels of the named files as bytes (height, width, 3), one after the other, and ends at the first one that
cannot be read or, unless RESIZE is 1, has another size. It needs nothing but Pillow and starts in a tenth of a second.
"""

import io
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


def main(width, height, resize):
    """Do what is told above."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of whoever has started this
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whose end is the end of this too
    with open(1, "wb", buffering=2**16) as pixels:  # not a few at a time: each time somebody is woken up
        for name in sys.stdin.buffer.read().split(b"\0"):
            try:
                with open(name, "rb", buffering=0) as file:
                    image = open_image(io.BytesIO(file.read()))  # Pillow reads a few bytes at a time
            except Exception:
                return  # whoever misses the pixels finds out why
            if image.size != (width, height):
                if not resize:
                    return
                image = image.resize((width, height))
            pixels.write(image.tobytes())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
