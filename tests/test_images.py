"""Images in class folders and arrays are read; each mistake in them is one clear line."""

import io
import os
import re
import signal
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common import decoder, flags, images, machine
from common.errors import UserError
from helpers import ROOT, environment, save_images, start_command

pytestmark = pytest.mark.quick


def load(**changes):
    args = flags.image_flags("pytorch").parse_args([])
    vars(args).update({"train": None, "validation": None, **changes})
    return images.load_images(args)


@pytest.fixture
def log(caplog):
    """Return a function that returns the text logged since its last call."""
    caplog.set_level("INFO", logger="train")

    def read():
        text = "".join(f"{message}\n" for message in caplog.messages)
        caplog.clear()
        return text

    return read


def rows_of(dataset):
    """Return all images and labels of a data set."""
    return dataset.__getitems__(np.arange(len(dataset)))


def all_images(data):
    """Return training and validation images and labels, sorted, to compare sets."""
    pixels, labels = (np.concatenate(parts) for parts in zip(*map(rows_of, data)))
    order = np.lexsort((*pixels.reshape(len(pixels), -1).T, labels))
    return pixels[order], labels[order]


def test_without_a_folder_the_digits_are_used(log):
    train, validation = load()
    assert train.classes == validation.classes == [str(digit) for digit in range(10)]
    assert (len(train), len(validation)) == (1618, 179)
    pixels, labels = rows_of(train)
    assert pixels.shape == (1618, 8, 8, 1)
    assert (pixels.dtype, labels.dtype) == (np.uint8, np.int64)
    assert pixels.max() == 255
    assert "1618 training and 179 validation images of shape (8, 8, 1), 10 classes, 0.1 MB" in log()


def test_the_held_out_tenth_depends_on_the_seed_and_shares_no_image():
    first, again, other = load(seed=1), load(seed=1), load(seed=2)
    held_out, labels = rows_of(first[1])
    np.testing.assert_array_equal(held_out, rows_of(again[1])[0])
    assert not np.array_equal(labels, rows_of(other[1])[1])
    assert not set(first[0].indices) & set(first[1].indices)
    for data in (first, other):
        np.testing.assert_array_equal(all_images(data)[0], all_images(load(seed=3))[0])


def test_class_folders_of_png_and_jpeg(tmp_path, digits):
    save_images(tmp_path / "train", *digits, suffixes=(".png", ".JPG", ".jpeg"))
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "train/.hidden/1.png").write_bytes(b"not an image")
    (tmp_path / "train/class-0/notes.txt").write_text("not an image")
    (tmp_path / "train/README.md").write_text("not a class")
    data = load(train=tmp_path / "train")
    assert data[0].classes == [f"class-{digit}" for digit in range(10)]
    assert all_images(data)[0].shape == (300, 8, 8, 3)
    png = digits[0][0]  # the first file is a PNG, so its pixels are the same
    assert any((image == png[..., None]).all() for image in all_images(data)[0])


def test_a_validation_channel_keeps_the_class_indices(tmp_path, digits):
    pixels, labels = digits
    save_images(tmp_path / "train", pixels[:200], labels[:200])
    few = np.isin(labels[200:], [3, 7])
    save_images(tmp_path / "validation", pixels[200:][few], labels[200:][few])
    train, validation = load(train=tmp_path / "train", validation=tmp_path / "validation")
    assert len(train) == 200
    np.testing.assert_array_equal(np.sort(rows_of(validation)[1]), np.sort(labels[200:][few]))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
def test_arrays_as_npz_or_npy(tmp_path, digits, dtype, shape):
    pixels, labels = digits[0].reshape(-1, *shape).astype(dtype), digits[1]
    (tmp_path / "npz").mkdir()
    (tmp_path / "npy").mkdir()
    np.savez(tmp_path / "npz/data.npz", x=pixels, y=labels + 1)
    np.save(tmp_path / "npy/train_data.npy", pixels)
    np.save(tmp_path / "npy/train_labels.npy", labels.astype(np.float64).reshape(-1, 1) + 1)
    for folder in ("npz", "npy"):
        data = load(train=tmp_path / folder)
        read, indices = all_images(data)
        assert read.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        assert read.shape == (300, 8, 8, 1)
        assert data[0].classes == [str(digit) for digit in range(1, 11)]
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(np.sort(indices), np.sort(labels))


def test_validation_arrays(tmp_path, digits):
    np.savez(tmp_path / "train.npz", x=digits[0][:200], y=digits[1][:200])
    validation = tmp_path / "validation"
    validation.mkdir()
    np.save(validation / "eval_data.npy", digits[0][200:])
    np.save(validation / "eval_labels.npy", digits[1][200:])
    pixels, labels = rows_of(load(train=tmp_path, validation=validation)[1])
    np.testing.assert_array_equal(pixels[..., 0], digits[0][200:])
    np.testing.assert_array_equal(labels, digits[1][200:])


def test_image_size_resizes_all_kinds(tmp_path, digits):
    def loaded(**changes):
        return all_images(load(**changes))[0]

    assert loaded(image_size=32).shape[1:] == (32, 32, 1)
    np.savez(tmp_path / "data.npz", x=digits[0] / 255.0, y=digits[1])
    floats = loaded(train=tmp_path, image_size=16)
    assert (floats.shape[1:], floats.dtype) == ((16, 16, 1), np.float32)
    assert 0 <= floats.min() < floats.max() <= 1
    save_images(tmp_path / "folders", *digits)
    Image.fromarray(np.zeros((20, 10), np.uint8)).save(tmp_path / "folders/class-0/other-size.png")
    assert loaded(train=tmp_path / "folders", image_size=16).shape[1:] == (16, 16, 3)


def test_images_that_do_not_fit_into_memory_are_decoded_again(tmp_path, digits, monkeypatch, log):
    save_images(tmp_path, *digits)
    expected = all_images(load(train=tmp_path))
    assert "decoded when first needed: 0.1 MB\n" in log()
    bytes_of_ten = 10 * 8 * 8 * 3
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * bytes_of_ten)
    data = load(train=tmp_path)
    assert "0.1 MB, of which 0.0 MB stay in memory, and the rest are decoded in each epoch" in log()
    for _ in range(2):
        for part, other in zip(expected, all_images(data)):
            np.testing.assert_array_equal(part, other)
    assert data[0].images.num_kept == 10
    assert not data[0].is_in_memory


def test_an_image_is_read_when_it_is_first_needed(tmp_path, digits):
    """It is not read again if memory permits; the other images may be missing."""
    save_images(tmp_path, *digits)
    train, _ = load(train=tmp_path)
    first = train[0][0]
    some = train.__getitems__(np.array([0, 5, 5, 3]))[0]
    np.testing.assert_array_equal(first, some[0])
    assert not train.is_in_memory
    for path in tmp_path.glob("*/*"):
        path.unlink()
    np.testing.assert_array_equal(some, train.__getitems__(np.array([0, 5, 5, 3]))[0])
    with pytest.raises(UserError, match=r"cannot read the image .*/class-.*png: .*No such file"):
        train.__getitems__(np.arange(10))


JPEG = [("jpg", mode) for mode in ("RGB", "L", "CMYK")]
PNG = [("png", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1")]


def all_kinds(folder, kinds):
    """Write 400 images of 64 x 48 pixels in four classes, alternating between these formats."""
    generator = np.random.default_rng(0)
    for index in range(400):
        suffix, mode = kinds[index % len(kinds)]
        path = folder / f"class {index % 4}" / "nested" / f"{index} é.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}][
            index % 4 if suffix == "jpg" else 0
        ]
        noise = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        pixels = np.kron(noise, np.ones((4, 4, 1), np.uint8))
        Image.fromarray(pixels).convert(mode).save(path, **settings)


@pytest.mark.parametrize("image_size", [None, 12])
def test_all_cores_read_the_same_pixels_as_pillow_alone(tmp_path, monkeypatch, image_size):
    all_kinds(tmp_path, JPEG + PNG)
    monkeypatch.setattr(decoder, "_find_simplejpeg", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    alone = all_images(load(train=tmp_path, image_size=image_size))
    assert alone[0].shape[1:] == ((12, 12, 3) if image_size else (48, 64, 3))
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    helped = all_images(load(train=tmp_path, image_size=image_size))
    np.testing.assert_array_equal(alone[0], helped[0])
    np.testing.assert_array_equal(alone[1], helped[1])


LOAD = """
import signal
import sys
import numpy as np
from pathlib import Path
from common import flags, images
args = flags.image_flags("pytorch").parse_args(["--train", sys.argv[1]])
train, _ = images.load_images(args)
signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has switched it off
try:
    print(flush=True)
    train.__getitems__(np.arange(100))
except KeyboardInterrupt:
    sys.exit(17)
"""


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_signal_ends_the_threads_that_decode(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    image = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(image)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(100):
            os.link(image, tmp_path / name / f"{index}{suffix}")
    env = environment(OPENBLAS_NUM_THREADS="1")  # no other threads
    with start_command([sys.executable, "-c", LOAD, str(tmp_path)], ROOT, env) as process:
        process.stdout.readline()
        while psutil.Process(process.pid).num_threads() == 1:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 17


def one_class(folder, digits):
    save_images(folder, digits[0][:5], [0] * 5)


def unreadable(folder, digits):
    save_images(folder, *digits)
    (folder / "class-3/broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")


def truncated(folder, digits):
    save_images(folder, *digits, suffixes=(".jpg",))
    path = folder / "class-0/0.jpg"
    path.write_bytes(path.read_bytes()[:-100])


def arrays(**changes):
    def write(folder, digits):
        arrays = {"x": digits[0], "y": digits[1]}
        arrays.update({name: change(digits) for name, change in changes.items()})
        np.savez(folder / "data.npz", **arrays)

    return write


def not_an_archive(folder, digits):
    (folder / "data.npz").write_bytes(b"PK nothing")


def renamed_array(folder, digits):
    np.save(folder / "data.npy", digits[0])
    (folder / "data.npy").rename(folder / "data.npz")


def damaged_archive(folder, digits):
    np.savez_compressed(folder / "data.npz", x=digits[0], y=digits[1])
    content = bytearray((folder / "data.npz").read_bytes())
    content[100:200] = bytes(100)
    (folder / "data.npz").write_bytes(content)


def many_bits(folder, digits):
    save_images(folder, *digits)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "class-1/deep.tif")


MISTAKES = {
    "32 bits": (many_bits, ["class-1/deep.tif", "32 bits per pixel, expected 8 or 16"]),
    "NaN images": (arrays(x=lambda digits: digits[0] * np.nan), ["not a number", "data.npz"]),
    "infinite labels": (arrays(y=lambda digits: digits[1] + np.inf), ["labels that are not integers"]),
    "one label": (arrays(y=lambda digits: np.array(1)), ["(1,)", "one integer per image"]),
    "no pixels": (arrays(x=lambda digits: digits[0][:, :0]), ["(300, 0, 8, 1)"]),
    "empty": (lambda folder, digits: None, ["--train", "contains nothing", "one folder per class"]),
    "no class folders": (
        lambda folder, digits: (folder / "a.jpg").touch(),
        ["contains a.jpg", "one folder per class"],
    ),
    "empty class folder": (
        lambda folder, digits: (folder / "cat").mkdir(),
        ["contains cat", "one folder per class"],
    ),
    "one class": (one_class, ["one class only (class-0)", "two or more"]),
    "unreadable": (unreadable, ["cannot read the image", "class-3/broken.jpg"]),
    "truncated": (truncated, ["cannot read the image", "class-0/0.jpg"]),
    "lengths": (arrays(y=lambda digits: digits[1][:-1]), ["300 images", "(299,)"]),
    "float labels": (arrays(y=lambda digits: digits[1] + 0.5), ["labels that are not integers"]),
    "NaN labels": (arrays(y=lambda digits: digits[1] * np.nan), ["labels that are not integers"]),
    "text labels": (arrays(y=lambda digits: digits[1].astype(str)), ["labels that are not integers"]),
    "one-hot labels": (arrays(y=lambda digits: np.eye(10)[digits[1]]), ["300 images", "(300, 10)"]),
    "flat images": (arrays(x=lambda digits: digits[0].reshape(300, 64)), ["(300, 64)", "(n, height, width)"]),
    "channels first": (arrays(x=lambda digits: np.zeros((300, 3, 8, 8))), ["channels last"]),
    "no images": (
        arrays(x=lambda digits: np.zeros((0, 8, 8)), y=lambda digits: np.zeros(0)),
        ["contains no images"],
    ),
    "pickle": (arrays(x=lambda digits: np.array([{}] * 300)), ["cannot read", "data.npz"]),
    "no archive": (not_an_archive, ["cannot read", "data.npz"]),
    "an array": (renamed_array, ["cannot read", "data.npz"]),
    "damaged": (damaged_archive, ["cannot read", "data.npz"]),
    "huge label": (arrays(y=lambda digits: digits[1] * 1e300), ["data.npz has the label 9e+300"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_reported_with_its_location(tmp_path, digits, name):
    write, parts = MISTAKES[name]
    write(tmp_path, digits)
    with pytest.raises(UserError) as caught:
        all_images(load(train=tmp_path))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_an_archive_that_unpacks_to_more_than_memory_is_refused(tmp_path, digits, monkeypatch):
    np.savez_compressed(tmp_path / "data.npz", x=np.zeros((300, 200, 200), np.uint8), y=digits[1])
    monkeypatch.setattr(machine, "available_memory", lambda: 10e6)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    with pytest.raises(UserError, match="does not fit into memory"):
        load(train=tmp_path)


def test_a_pipe_among_the_images_is_left_out(tmp_path, digits, log):
    save_images(tmp_path, *digits)
    os.mkfifo(tmp_path / "data.npz")
    os.mkfifo(tmp_path / "class-0/pipe.png")
    training, validation = load(train=tmp_path)
    assert len(training) + len(validation) == 300
    assert "not images (2): data.npz, pipe.png" in log()


def test_wrong_names_in_an_archive(tmp_path, digits):
    np.savez(tmp_path / "data.npz", images=digits[0], labels=digits[1])
    with pytest.raises(UserError, match="has images, labels: expected arrays named x and y"):
        load(train=tmp_path)


def test_folders_without_images_are_named_and_skipped(tmp_path, digits, log):
    save_images(tmp_path, *digits)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/image.psd").touch()
    assert "notes" not in load(train=tmp_path)[0].classes
    assert f"Skipping the folders without images in --train {tmp_path}: notes" in log()


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".gif", ".tif", ".jfif", ".ppm"])
def test_all_formats_of_pillow_are_read(tmp_path, digits, suffix):
    save_images(tmp_path / "train", digits[0][:30], digits[1][:30], (".png", suffix))
    train, validation = load(train=tmp_path / "train")
    assert len(train) + len(validation) == 30


def test_a_photo_taken_sideways_is_rotated(tmp_path):
    """By Pillow and by the other library."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # the upper half is white
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[decoder.ORIENTATION] = 6  # rotate clockwise
    for suffix in (".png", ".jpg"):
        folder = tmp_path / suffix[1:]
        for name in ("cat", "dog"):
            (folder / name).mkdir(parents=True)
            upright.save(folder / name / f"upright{suffix}", quality=100)
            upright.rotate(90).save(folder / name / f"sideways{suffix}", exif=exif, quality=100)
        read, _ = all_images(load(train=folder))
        for image in read:
            np.testing.assert_allclose(image, pixels, atol=2)


def test_transparent_pixels_become_white_and_the_log_says_so(tmp_path, log):
    icon = np.zeros((8, 8, 4), np.uint8)
    icon[:4, :, 3] = 255  # the upper half is black, the lower one transparent
    for name in ("arrow", "cross"):
        (tmp_path / name).mkdir()
        Image.fromarray(icon).save(tmp_path / name / "icon.png")
        Image.fromarray(icon).convert("P").save(tmp_path / name / "palette.png")
        Image.fromarray(icon[..., :3]).save(tmp_path / name / "plain.png")
    read, _ = all_images(load(train=tmp_path))
    assert sorted(read[:, 7, 0, 0]) == [0, 0, 255, 255, 255, 255]
    assert not read[:, 0].any()
    assert (
        len(re.findall(rf"Image {tmp_path}/\w+/\w+.png is partly transparent: drawn on white; ", log())) == 1
    )


def test_files_that_are_left_out_are_counted_and_named(tmp_path, digits, log):
    save_images(tmp_path, digits[0][:20], digits[1][:20])
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "class-0/notes.txt").write_text("")
    (tmp_path / "class-1/.DS_Store").write_text("")
    load(train=tmp_path)
    assert f"Left out of --train {tmp_path}, not images (2): labels.csv, notes.txt\n" in log()


def test_a_dangling_link_is_left_out_and_a_name_that_is_not_utf_8_is_read(tmp_path, digits, log):
    save_images(tmp_path, digits[0][:20], digits[1][:20])
    (tmp_path / "class-0/gone.png").symlink_to("nowhere.png")
    os.rename(tmp_path / "class-1/1.png", os.fsencode(tmp_path / "class-1") + b"/\xff.png")
    assert len(all_images(load(train=tmp_path))[0]) == 20
    assert "not images (1): gone.png\n" in log()
    os.rename(tmp_path / "class-2", os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(UserError, match=r"class folder named b'\\xff', which is not UTF-8: rename it"):
        load(train=tmp_path)


def test_deep_and_animated_images_are_read_and_the_log_says_so_once(tmp_path, log):
    deep = np.full((8, 8), 1000, np.uint16)
    pages = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 20)]
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(deep).save(tmp_path / name / "deep.png")
        pages[0].save(tmp_path / name / "pages.tif", save_all=True, append_images=pages[1:])
        Image.fromarray(np.zeros((16, 12, 3), np.uint8)).save(tmp_path / name / "wide.png")
    read, _ = all_images(load(train=tmp_path))
    assert sorted(read[:, 0, 0, 0]) == [0, 0, 1000 >> 8, 1000 >> 8, 10, 10]
    text = log()
    for note in (decoder.EIGHT_BITS, decoder.FIRST_PAGE, decoder.RESIZED):
        assert text.count(note) == 1


def test_the_aspect_ratio_is_kept(tmp_path):
    """The shorter side is resized, and the centre cropped; arrays are treated like files."""
    pixels = np.zeros((2, 20, 40, 3), np.uint8)
    pixels[:, :, 8:32] = 200  # the square in the middle with a margin
    for name, image in zip("ab", pixels):
        (tmp_path / "files" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "files" / name / "1.png")
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays/data.npz", x=pixels, y=[0, 1])
    for kind in ("files", "arrays"):
        read, _ = all_images(load(train=tmp_path / kind, image_size=10))
        assert read.shape == (2, 10, 10, 3)
        assert (read == 200).all()


def test_linked_folders_are_read_once(tmp_path, digits):
    save_images(tmp_path / "train", digits[0][:20], digits[1][:20])
    save_images(tmp_path / "more", digits[0][20:30], np.zeros(10, int))
    (tmp_path / "train/class-0/more").symlink_to(tmp_path / "more/class-0")
    (tmp_path / "train/class-0/circle").symlink_to(tmp_path / "train/class-0")
    assert len(all_images(load(train=tmp_path / "train"))[0]) == 30


@pytest.mark.parametrize(
    "names",
    [("train", "val"), ("Train", "Test"), ("training", "validation", "test"), ("an-output", "train", "val")],
)
def test_a_folder_of_data_sets_is_not_read_as_class_folders(tmp_path, digits, names):
    for name in names:
        save_images(tmp_path / name, *digits)
    first = next(name for name in sorted(names) if name != "an-output")
    with pytest.raises(UserError, match=f"look like data sets: pass .*{first}"):
        load(train=tmp_path)


def test_a_validation_folder_inside_the_training_folder_is_refused(tmp_path, digits):
    save_images(tmp_path, *digits)
    with pytest.raises(UserError, match="class-3 is inside --train"):
        load(train=tmp_path, validation=tmp_path / "class-3")


def test_each_class_contributes_its_share_to_the_held_out_tenth(tmp_path, digits):
    labels = np.array([0] * 200 + [1] * 5)
    save_images(tmp_path, digits[0][:205], labels)
    train, validation = load(train=tmp_path)
    assert len(validation) == 20
    assert np.bincount(rows_of(validation)[1]).tolist() == [19, 1]
    assert np.bincount(rows_of(train)[1]).tolist() == [181, 4]


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    free = machine.available_memory()
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "current").write_text("1000000\n")
    monkeypatch.setattr(machine, "CONTAINER", [(tmp_path / "max", tmp_path / "current")])
    assert machine.available_memory() == 2_000_000
    (tmp_path / "max").write_text("max\n")  # no limit
    assert machine.available_memory() == pytest.approx(free, rel=0.5)


def test_processes_of_one_host_share_the_memory(tmp_path, digits, monkeypatch):
    save_images(tmp_path, *digits)
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * 60 * 8 * 8 * 3)
    for variable, expected in (("", 60), ("3", 20)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", variable)
        assert load(train=tmp_path)[0].images.num_kept == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="variable LOCAL_WORLD_SIZE is 'two': expected a whole number"):
        load(train=tmp_path)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"--train .*/nowhere is not a folder: expected one folder per class"):
        load(train=tmp_path / "nowhere")


def test_validation_must_fit_the_training_data(tmp_path, digits):
    np.savez(tmp_path / "train.npz", x=digits[0], y=digits[1] % 5)
    for name, pixels, labels, message in (
        ("classes", digits[0], digits[1], "--validation .* has classes that --train lacks: 5, 6, 7, 8, 9"),
        ("shape", digits[0][:, :4], digits[1] % 5, r"--validation .* has images of shape \(4, 8, 1\)"),
    ):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "data.npz", x=pixels, y=labels)
        with pytest.raises(UserError, match=message):
            load(train=tmp_path, validation=tmp_path / name)


def encoded(form):
    """Return an image of 12 x 10 pixels in a format, as bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


ENCODED = [encoded(form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]


@st.composite
def damaged_images(draw):
    """Any bytes, or an image that is truncated or has some bytes replaced, most of them in its header."""
    content = bytearray(draw(st.sampled_from(ENCODED)))
    places = st.integers(0, 40) | st.integers(0, len(content) - 1)
    for position, value in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        content[position] = value
    length = draw(st.just(len(content)) | st.integers(0, len(content)))
    return draw(st.binary(max_size=64) | st.just(bytes(content[:length])))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged_images(), name=st.sampled_from(["cat/0.png", "dog/8.jpg"]))
@pytest.mark.filterwarnings("ignore")  # Pillow warns about huge images and odd tags
def test_any_file_in_a_class_folder_is_an_image_or_named(tmp_path, monkeypatch, content, name):
    """The first file too, which sets the size of all images.

    Below Pillow's limit a few bytes may still be an image of many pixels, which would need gigabytes.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir(exist_ok=True)
        for number in range(4):
            (tmp_path / label / f"{number}.png").write_bytes(ENCODED[0])
    (tmp_path / "dog/8.jpg").write_bytes(ENCODED[1])
    (tmp_path / name).write_bytes(content)
    try:
        pixels, labels = all_images(load(train=tmp_path))
    except UserError as error:
        message = str(error)
    else:
        assert len(pixels) == len(labels) == 9
        return
    assert f"cannot read the image {tmp_path}/{name}: " in message
    assert "\n" not in message
