"""Reading images from class folders and arrays, and one clear line for each mistake in them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import decoder, flags, images
from common.errors import UserError
from conftest import ROOT


def load(**changes):
    args = flags.image_flags("pytorch").parse_args([])
    vars(args).update({"train": None, "validation": None, **changes})
    return images.load_images(args)


def save_images(folder, arrays, labels, suffixes=(".png",)):
    """Write one folder per class."""
    for index, (array, label) in enumerate(zip(arrays, labels)):
        path = folder / f"class-{label}" / f"{index}{suffixes[index % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, quality=100) if path.suffix != ".png" else Image.fromarray(array).save(path)


def all_images(data):
    """Return training and validation images and labels, sorted, to compare sets."""
    pixels = np.concatenate([data.train_images[:], data.validation_images[:]])
    labels = np.concatenate([data.train_labels, data.validation_labels])
    order = np.lexsort((*pixels.reshape(len(pixels), -1).T, labels))
    return pixels[order], labels[order]


def test_without_a_folder_the_digits_are_used(capsys):
    data = load()
    assert data.image_shape == (8, 8, 1)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert (len(data.train_labels), len(data.validation_labels)) == (1618, 179)
    assert data.train_images.dtype == np.uint8
    assert data.train_images[:].max() == 255
    assert "1618 training and 179 validation images of shape (8, 8, 1), 10 classes, 0.1 MB" in capsys.readouterr().out


def test_the_held_out_tenth_is_drawn_with_the_seed_and_shares_no_image():
    first, again, other = load(seed=1), load(seed=1), load(seed=2)
    np.testing.assert_array_equal(first.validation_images[:], again.validation_images[:])
    assert not np.array_equal(first.validation_labels, other.validation_labels)
    assert not set(first.train_images.indices) & set(first.validation_images.indices)
    for data in (first, other):
        np.testing.assert_array_equal(all_images(data)[0], all_images(load(seed=3))[0])


def test_class_folders_of_png_and_jpeg(tmp_path, digits):
    save_images(tmp_path / "train", *digits, suffixes=(".png", ".JPG", ".jpeg"))
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "train/.hidden/1.png").write_bytes(b"not an image")
    (tmp_path / "train/class-0/notes.txt").write_text("not an image")
    (tmp_path / "train/README.md").write_text("not a class")
    data = load(train=tmp_path / "train")
    assert data.class_names == [f"class-{digit}" for digit in range(10)]
    assert data.image_shape == (8, 8, 3)
    assert len(data.train_labels) + len(data.validation_labels) == 300
    png = digits[0][0]  # the first file is a PNG, so its pixels are the same
    assert any((image == png[..., None]).all() for image in all_images(data)[0])


def test_a_validation_channel_keeps_the_class_indices(tmp_path, digits):
    pixels, labels = digits
    save_images(tmp_path / "train", pixels[:200], labels[:200])
    few = np.isin(labels[200:], [3, 7])
    save_images(tmp_path / "validation", pixels[200:][few], labels[200:][few])
    data = load(train=tmp_path / "train", validation=tmp_path / "validation")
    assert len(data.train_labels) == 200
    assert set(data.validation_labels) == {3, 7}
    np.testing.assert_array_equal(np.sort(data.validation_labels), np.sort(labels[200:][few]))


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
        assert data.train_images.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        assert data.image_shape == (8, 8, 1)
        assert data.class_names == [str(digit) for digit in range(1, 11)]
        assert (data.train_labels.dtype, data.train_labels.min(), data.train_labels.max()) == (np.int64, 0, 9)
        np.testing.assert_array_equal(np.sort(all_images(data)[1]), np.sort(labels))


def test_validation_arrays(tmp_path, digits):
    np.savez(tmp_path / "train.npz", x=digits[0][:200], y=digits[1][:200])
    validation = tmp_path / "validation"
    validation.mkdir()
    np.save(validation / "eval_data.npy", digits[0][200:])
    np.save(validation / "eval_labels.npy", digits[1][200:])
    data = load(train=tmp_path, validation=validation)
    np.testing.assert_array_equal(data.validation_images[..., 0], digits[0][200:])
    np.testing.assert_array_equal(data.validation_labels, digits[1][200:])


def test_image_size_resizes_all_kinds(tmp_path, digits):
    assert load(image_size=32).image_shape == (32, 32, 1)
    np.savez(tmp_path / "data.npz", x=digits[0] / 255.0, y=digits[1])
    data = load(train=tmp_path, image_size=16)
    assert (data.image_shape, data.train_images.dtype) == ((16, 16, 1), np.float32)
    assert 0 <= data.train_images[:].min() < data.train_images[:].max() <= 1
    save_images(tmp_path / "folders", *digits)
    Image.fromarray(np.zeros((20, 10), np.uint8)).save(tmp_path / "folders/class-0/other-size.png")
    assert load(train=tmp_path / "folders", image_size=16).image_shape == (16, 16, 3)


def test_channel_statistics_are_those_of_the_training_images():
    data = load()
    mean, deviation = data.channel_statistics()
    np.testing.assert_allclose(mean, data.train_images[:].mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, data.train_images[:].std((0, 1, 2)), rtol=1e-6)


def test_images_that_do_not_fit_into_memory_are_kept_on_disk(tmp_path, digits, monkeypatch, capsys):
    save_images(tmp_path, *digits)
    in_memory = load(train=tmp_path)
    monkeypatch.setattr(images, "_available_memory", lambda: 1000)
    on_disk = load(train=tmp_path)
    assert "on disk" in capsys.readouterr().out
    np.testing.assert_array_equal(in_memory.train_images[:], on_disk.train_images[:])


JPEG = [("jpg", mode) for mode in ("RGB", "L", "CMYK")]
PNG = [("png", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1")]


def all_kinds(folder, kinds):
    """Write 400 images of 24 x 16 pixels in four classes, of all these kinds in turns."""
    generator = np.random.default_rng(0)
    for index in range(400):
        suffix, mode = kinds[index % len(kinds)]
        path = folder / f"class {index % 4}" / "nested" / f"{index} é.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}][
            index % 4 if suffix == "jpg" else 0
        ]
        pixels = np.kron(generator.integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))
        Image.fromarray(pixels).convert(mode).save(path, **settings)


@pytest.mark.parametrize("kinds", [JPEG, JPEG + PNG], ids=["JPEG", "JPEG and PNG"])
@pytest.mark.parametrize("image_size", [None, 12])
def test_all_cores_read_the_same_as_pillow_alone(tmp_path, monkeypatch, image_size, kinds):
    all_kinds(tmp_path, kinds)
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: set())
    alone = load(train=tmp_path, image_size=image_size)
    assert alone.image_shape == ((12, 12, 3) if image_size else (16, 24, 3))
    monkeypatch.undo()
    here = {0, *range(2, 400, 3)} if kinds == JPEG else {0}  # the first, for its size; CMYK that simplejpeg leaves

    def open_few(file):
        assert int(Path(file).name.split()[0]) in here
        return decoder.open_image(file)

    monkeypatch.setattr(images, "_open", open_few)
    for cores in (1, 3):
        monkeypatch.setattr(images.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        helped = load(train=tmp_path, image_size=image_size)
        np.testing.assert_array_equal(all_images(alone)[0], all_images(helped)[0])
        np.testing.assert_array_equal(alone.train_labels, helped.train_labels)


def test_what_a_process_does_not_read_is_read_without_it(tmp_path, digits, monkeypatch):
    save_images(tmp_path, *digits)
    expected = load(train=tmp_path)
    monkeypatch.setattr(images.sys, "executable", "/bin/true")
    np.testing.assert_array_equal(expected.train_images[:], load(train=tmp_path).train_images[:])


def has_ended(pid):
    """Return whether a process has ended; who has not been waited for yet (Z) has too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_stays_behind_whoever_it_reads_for(tmp_path, digits, number):
    save_images(tmp_path, *digits)
    names = [str(path) for path in tmp_path.rglob("*.png")] * 10_000  # enough for minutes
    code = "import os, sys; from common import images\n"
    code += "names = sys.stdin.read().split()\n"
    code += "pixels, place = images._allocate((len(names), 8, 8, 3), 'uint8', shared=True)\n"
    code += "reader = images._start_decoder(names, range(len(names)), (8, 8), None, place)\n"
    code += "while not pixels[10].any(): pass\n"
    code += f"print(reader.pid, flush=True); os.kill(os.getpid(), {int(number)})"
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=ROOT, input="\n".join(names), capture_output=True, text=True)
    assert finished.returncode == -number
    deadline = time.monotonic() + 20
    while not has_ended(int(finished.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Error" not in finished.stderr


def test_a_signal_ends_the_threads_that_read_jpeg_files(tmp_path, digits):
    save_images(tmp_path, *digits, suffixes=(".jpg",))
    names = [str(path) for path in tmp_path.rglob("*.jpg")] * 10_000  # enough for minutes
    code = "import os, sys, threading; from common import images\n"
    code += "names = sys.stdin.read().split()\n"
    code += "threading.Timer(1, os.kill, (os.getpid(), 2)).start()\n"
    code += "try: images._read_jpegs(names, (8, 8), None, (100, 100))\n"
    code += "except KeyboardInterrupt: sys.exit(17)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, input="\n".join(names), text=True, timeout=20).returncode == 17


def one_class(folder, digits):
    save_images(folder, digits[0][:5], [0] * 5)


def unreadable(folder, digits):
    save_images(folder, *digits)
    (folder / "class-3/broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")


def truncated(folder, digits):
    save_images(folder, *digits, suffixes=(".jpg",))
    path = folder / "class-0/0.jpg"
    path.write_bytes(path.read_bytes()[:-100])


def different_sizes(folder, digits):
    save_images(folder, *digits)
    Image.fromarray(np.zeros((20, 10), np.uint8)).save(folder / "class-5/other-size.png")


def arrays(**changes):
    def write(folder, digits):
        arrays = {"x": digits[0], "y": digits[1]}
        arrays.update({name: change(digits) for name, change in changes.items()})
        np.savez(folder / "data.npz", **arrays)

    return write


def not_an_archive(folder, digits):
    (folder / "data.npz").write_bytes(b"PK nothing")


def sixteen_bits(folder, digits):
    save_images(folder, *digits)
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(folder / "class-1/deep.png")


MISTAKES = {
    "16 bits": (sixteen_bits, ["class-1/deep.png", "16 or 32 bits per pixel, expected 8"]),
    "NaN images": (arrays(x=lambda digits: digits[0] * np.nan), ["not a number", "data.npz"]),
    "infinite labels": (arrays(y=lambda digits: digits[1] + np.inf), ["labels that are not integers"]),
    "one label": (arrays(y=lambda digits: np.array(1)), ["(1,)", "one integer per image"]),
    "no pixels": (arrays(x=lambda digits: digits[0][:, :0]), ["(300, 0, 8, 1)"]),
    "empty": (lambda folder, digits: None, ["--train", "holds nothing", "one folder per class"]),
    "no class folders": (lambda folder, digits: (folder / "a.jpg").touch(), ["holds a.jpg", "one folder per class"]),
    "empty class folder": (lambda folder, digits: (folder / "cat").mkdir(), ["holds cat", "one folder per class"]),
    "one class": (one_class, ["one class only (class-0)", "two or more"]),
    "unreadable": (unreadable, ["cannot read the image", "class-3/broken.jpg"]),
    "truncated": (truncated, ["cannot read the image", "class-0/0.jpg"]),
    "different sizes": (different_sizes, ["class-5/other-size.png is 10x20", "--image-size"]),
    "lengths": (arrays(y=lambda digits: digits[1][:-1]), ["300 images", "(299,)"]),
    "float labels": (arrays(y=lambda digits: digits[1] + 0.5), ["labels that are not integers"]),
    "NaN labels": (arrays(y=lambda digits: digits[1] * np.nan), ["labels that are not integers"]),
    "text labels": (arrays(y=lambda digits: digits[1].astype(str)), ["labels that are not integers"]),
    "one-hot labels": (arrays(y=lambda digits: np.eye(10)[digits[1]]), ["300 images", "(300, 10)"]),
    "flat images": (arrays(x=lambda digits: digits[0].reshape(300, 64)), ["(300, 64)", "(n, height, width)"]),
    "channels first": (arrays(x=lambda digits: np.zeros((300, 3, 8, 8))), ["channels last"]),
    "no images": (arrays(x=lambda digits: np.zeros((0, 8, 8)), y=lambda digits: np.zeros(0)), ["holds no images"]),
    "pickle": (arrays(x=lambda digits: np.array([{}] * 300)), ["cannot read", "data.npz"]),
    "no archive": (not_an_archive, ["cannot read", "data.npz"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_told_with_its_place(tmp_path, digits, name):
    write, parts = MISTAKES[name]
    write(tmp_path, digits)
    with pytest.raises(UserError) as caught:
        load(train=tmp_path)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_wrong_names_in_an_archive(tmp_path, digits):
    np.savez(tmp_path / "data.npz", images=digits[0], labels=digits[1])
    with pytest.raises(UserError, match="holds images, labels: expected arrays named x and y"):
        load(train=tmp_path)


def test_folders_without_images_are_named_and_skipped(tmp_path, digits, capsys):
    save_images(tmp_path, *digits)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/image.webp").touch()
    assert "notes" not in load(train=tmp_path).class_names
    assert "Skipping the folders without .jpg, .jpeg, .png files" in capsys.readouterr().out


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
