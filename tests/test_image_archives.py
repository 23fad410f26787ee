"""Reading the CIFAR and MNIST files as downloaded, and a one-line error for each invalid file."""

import gzip
import re
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import flags, image_archives, images
from common.errors import UserError

pytestmark = pytest.mark.quick

NAMES = ["plane", "car", "bird"]
NUM_BYTES = 3 * 32 * 32


def load(train, validation=None, **changes):
    args = flags.image_flags("pytorch").parse_args([])
    vars(args).update({"train": train, "validation": validation, **changes})
    return images.load_images(args)


def make_images(count, *shape):
    """Return random images and labels of the classes 0, 1 and 2, each of which occurs."""
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 3


def write_cifar(path, pixels, labels, coarse=()):
    """Write images (n, 32, 32, 3) as CIFAR's binary version; `coarse` are the coarse labels of CIFAR-100."""
    columns = [np.array(column, np.uint8)[:, None] for column in (coarse, labels) if len(column)]
    columns.append(pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1))
    path.write_bytes(np.concatenate(columns, axis=1).tobytes())


def cifar_10(folder):
    """Write two training files and a test file; return the images and labels of both splits."""
    folder.mkdir(exist_ok=True)
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    (folder / "readme.html").write_text("from the archive")
    pixels, labels = make_images(50, 32, 32, 3)
    write_cifar(folder / "data_batch_1.bin", pixels[:20], labels[:20])
    write_cifar(folder / "data_batch_2.bin", pixels[20:40], labels[20:40])
    write_cifar(folder / "test_batch.bin", pixels[40:], labels[40:])
    return (pixels[:40], labels[:40]), (pixels[40:], labels[40:])


def idx(array):
    """Return an array of bytes in the IDX format."""
    return (
        struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


def mnist(folder, form="{}-{}-idx{}-ubyte", compress=False):
    """Write the four files; return the images and labels of both splits."""
    folder.mkdir(exist_ok=True)
    splits = make_images(40, 28, 28), make_images(10, 28, 28)
    for stem, (pixels, labels) in zip(("train", "t10k"), splits):
        for kind, array in (("images", pixels), ("labels", labels + 5)):
            name = form.format(stem, kind, array.ndim)
            content = idx(array)
            if compress:
                name, content = f"{name}.gz", gzip.compress(content)
            (folder / name).write_bytes(content)
    return tuple((pixels[..., None], labels) for pixels, labels in splits)


def assert_equal(dataset, expected):
    pixels, labels = dataset.__getitems__(np.arange(len(dataset)))
    np.testing.assert_array_equal(pixels, expected[0])
    np.testing.assert_array_equal(labels, expected[1])
    assert (pixels.dtype, labels.dtype) == (np.uint8, np.int64)


def test_cifar_10_as_downloaded(tmp_path, caplog):
    caplog.set_level("INFO", logger="train")
    splits = cifar_10(tmp_path)
    train, validation = load(tmp_path)
    assert_equal(train, splits[0])
    assert_equal(validation, splits[1])
    assert train.classes == validation.classes == NAMES
    assert caplog.messages[0] == (
        f"No --validation folder: using the validation or test data in --train {tmp_path}"
    )
    assert load(tmp_path, image_size=16)[1].images.shape == (10, 16, 16, 3)


def test_cifar_100_as_downloaded(tmp_path):
    (tmp_path / "fine_label_names.txt").write_text("\n".join(NAMES))
    (tmp_path / "coarse_label_names.txt").write_text("vehicle\nanimal\n")
    train, test = make_images(30, 32, 32, 3), make_images(6, 32, 32, 3)
    write_cifar(tmp_path / "train.bin", *train, coarse=train[1] // 2)
    write_cifar(tmp_path / "test.bin", *test, coarse=test[1] // 2)
    data = load(tmp_path)
    assert_equal(data[0], train)
    assert_equal(data[1], test)
    assert data[0].classes == NAMES


@pytest.mark.parametrize("form", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte"])
@pytest.mark.parametrize("compress", [False, True])
def test_mnist_as_downloaded(tmp_path, form, compress):
    splits = mnist(tmp_path, form, compress)
    train, validation = load(tmp_path)
    assert_equal(train, splits[0])
    assert_equal(validation, splits[1])
    assert train.classes == ["5", "6", "7"]


@pytest.mark.parametrize(("write", "is_test"), [(cifar_10, "test_batch.bin"), (mnist, "t10k-.*")])
def test_the_test_data_may_be_in_a_separate_folder(tmp_path, write, is_test, caplog):
    """Both channels may also have the names of training files."""
    caplog.set_level("INFO", logger="train")
    splits = write(tmp_path / "train")
    validation = tmp_path / "validation"
    validation.mkdir()
    for path in sorted((tmp_path / "train").iterdir()):
        if re.fullmatch(is_test, path.name):
            path.rename(validation / path.name)
        elif "meta" in path.name:
            (validation / path.name).write_bytes(path.read_bytes())
    data = load(tmp_path / "train", validation)
    assert_equal(data[0], splits[0])
    assert_equal(data[1], splits[1])
    held_out = "No --validation folder: a tenth of the training images is held out"
    assert held_out not in caplog.messages
    data = load(tmp_path / "train")
    assert (len(data[0]), len(data[1])) == (36, 4)
    assert held_out in caplog.messages
    assert_equal(load(tmp_path / "train", tmp_path / "train")[1], splits[0])


def test_arrays_in_the_folder_take_precedence_and_are_not_validation_data(tmp_path):
    mnist(tmp_path)
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20) % 2)
    train, validation = load(tmp_path)
    assert (len(train), len(validation)) == (18, 2)


def pickled(folder):
    (folder / "batches.meta").touch()
    (folder / "data_batch_1").touch()


def pickled_100(folder):
    for name in ("meta", "train", "test"):
        (folder / name).touch()


def cifar(change):
    def write(folder):
        cifar_10(folder)
        change(folder)

    return write


def replace_idx(name, change):
    """Write MNIST with different content in one file, optionally without other files of its split."""

    def write(folder):
        mnist(folder)
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return write


def compress_idx(name, change):
    def write(folder):
        mnist(folder, compress=True)
        path = folder / f"{name}.gz"
        path.write_bytes(change(gzip.decompress(path.read_bytes())))

    return write


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
HUGE = struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def wrong_label(folder):
    content = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(b"\x03" + content[1:])


MISTAKES = {
    "pickled": (pickled, "contains the Python version of CIFAR, .*: download the binary version"),
    "pickled 100": (pickled_100, "contains the Python version of CIFAR"),
    "truncated CIFAR": (
        cifar(lambda folder: truncate(folder / "data_batch_2.bin")),
        "data_batch_2.bin has 61459 bytes, expected a multiple of 3073: it is truncated",
    ),
    "truncated test data": (
        cifar(lambda folder: truncate(folder / "test_batch.bin")),
        "test_batch.bin has 30729 bytes",
    ),
    "empty CIFAR": (cifar(lambda folder: (folder / "data_batch_1.bin").write_bytes(b"")), "has 0 bytes"),
    "wrong label": (cifar(wrong_label), "data_batch_2.bin has the label 3, but batches.meta.txt has 3 names"),
    "no names": (
        cifar(lambda folder: (folder / "batches.meta.txt").unlink()),
        "has data_batch_1.bin, but not batches.meta.txt with the names of the classes",
    ),
    "names in bytes": (
        cifar(lambda folder: (folder / "batches.meta.txt").write_bytes(b"\xff\n\xfe\na\n")),
        "batches.meta.txt is not UTF-8",
    ),
    "equal names": (
        cifar(lambda folder: (folder / "batches.meta.txt").write_text("a\na\nb\n")),
        "batches.meta.txt has a name twice",
    ),
    "two files": (
        lambda folder: [mnist(folder), mnist(folder, compress=True)],
        "train-images-idx3-ubyte.gz have the same content: delete one",
    ),
    "no labels": (
        lambda folder: [mnist(folder), (folder / LABELS).unlink()],
        "has train-images-idx3-ubyte, but not the file with its labels",
    ),
    "no test images": (
        lambda folder: [mnist(folder), (folder / "t10k-images-idx3-ubyte").unlink()],
        "has t10k-labels-idx1-ubyte, but not the file with its images",
    ),
    "truncated IDX": (
        replace_idx(IMAGES, lambda content: content[:-1]),
        r"idx3-ubyte does not have the 31360 bytes of shape \[40, 28, 28\] that it announces",
    ),
    "more than announced": (replace_idx(IMAGES, lambda content: content + b"1"), "does not have the 31360"),
    "truncated header": (replace_idx(IMAGES, lambda content: content[:10]), "idx3-ubyte is not an IDX file"),
    "shorter header": (replace_idx(IMAGES, lambda content: content[:12]), "does not have the .* announces"),
    "no content": (
        replace_idx(LABELS, lambda content: b""),
        "idx1-ubyte is not an IDX file .* it begins with ,",
    ),
    "wrong magic": (
        replace_idx(IMAGES, lambda content: b"\0\0\x0d\3" + content[4:]),
        "not an IDX file of bytes in 3 dimensions: it begins with 00 00 0d 03, expected 00 00 08 03",
    ),
    "many dimensions": (
        replace_idx(IMAGES, lambda content: b"\0\0\x08\xc8" + 200 * b"\0\0\0\1" + b"1"),
        "idx3-ubyte is not an IDX file of bytes in 3 dimensions: it begins with 00 00 08 c8",
    ),
    "other lengths": (
        replace_idx(LABELS, lambda content: idx(np.zeros(39))),
        "idx3-ubyte has 40 images, but train-labels-idx1-ubyte has 39 labels",
    ),
    "no pixels": (
        replace_idx(IMAGES, lambda content: idx(np.zeros((40, 0, 28)))),
        r"has the shape \(40, 0, 28\): expected some images",
    ),
    "huge": (
        replace_idx(IMAGES, lambda content: HUGE),
        "does not have the 79228162458924105385300197375 bytes",
    ),
    "huge, compressed": (
        compress_idx(IMAGES, lambda content: gzip.compress(HUGE + bytes(10**6))),
        "ubyte.gz does not have the 79228162458924105385300197375 bytes",
    ),
    "no gzip": (compress_idx(IMAGES, lambda content: content), "cannot read .*ubyte.gz: Not a gzipped file"),
    "truncated gzip": (
        compress_idx(IMAGES, lambda content: gzip.compress(content)[:-100]),
        "cannot read .*ubyte.gz: Compressed file ended before",
    ),
    "damaged gzip": (
        compress_idx(LABELS, lambda content: gzip.compress(content)[:-8] + bytes(8)),
        "cannot read .*idx1-ubyte.gz: CRC check failed",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_file_is_a_one_line_error_with_its_name(tmp_path, name):
    write, message = MISTAKES[name]
    write(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_other_binary_files_may_be_beside_class_folders(tmp_path):
    (tmp_path / "train.bin").touch()
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="one folder per class"):
        load(tmp_path)


# Arbitrary and damaged files --------------------------------------------------------------------------------


def changed(content):
    """Return a strategy for `content` with bytes replaced, removed or added, and for arbitrary bytes."""

    def change(where, new, length, more):
        result = bytearray(content)
        for position, value in zip(where, new):
            result[position % len(result)] = value
        return bytes(result[: length % (len(result) + 1)] + more) if length else bytes(result) + more

    places = st.lists(st.integers(0, 40) | st.integers(0, len(content)), max_size=4)
    values = st.binary(min_size=4, max_size=4)
    lengths = st.just(0) | st.integers(0, len(content))
    return st.binary(max_size=64) | st.builds(change, places, values, lengths, st.binary(max_size=4))


FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_name(folder, *names):
    """Return images and labels of a training folder, or None after an error that names a file."""
    try:
        pixels, labels, classes = image_archives.read(folder, "train")
    except UserError as error:
        message = str(error)
    else:
        assert len(pixels) == len(labels) > 0
        assert 0 <= labels.min() <= labels.max() < len(classes)
        return pixels, labels
    assert any(name in message for name in names), message
    assert "\n" not in message
    return None


@FUZZ
@given(content=changed(idx(make_images(4, 2, 3)[0])), compress=st.booleans())
def test_arbitrary_idx_images_are_read_or_an_error_names_the_file(tmp_path, content, compress):
    folder = tmp_path / str(compress)
    folder.mkdir(exist_ok=True)
    name = f"{IMAGES}.gz" if compress else IMAGES
    (folder / name).write_bytes(gzip.compress(content) if compress else content)
    (folder / LABELS).write_bytes(idx(np.arange(4)))
    if found := read_or_name(folder, name):
        assert found[0].tobytes() == content[16:]


@FUZZ
@given(content=changed(gzip.compress(idx(np.arange(4)))))
def test_arbitrary_compressed_labels_are_read_or_an_error_names_the_file(tmp_path, content):
    (tmp_path / IMAGES).write_bytes(idx(make_images(4, 2, 3)[0]))
    (tmp_path / f"{LABELS}.gz").write_bytes(content)
    if found := read_or_name(tmp_path, f"{LABELS}.gz"):
        assert len(found[0]) == 4


@FUZZ
@given(content=changed(bytes(2 * 3073)), names=st.binary(max_size=8) | st.just(b"a\nb\nc\n"))
def test_arbitrary_cifar_files_are_read_or_an_error_names_the_file(tmp_path, content, names):
    (tmp_path / "batches.meta.txt").write_bytes(names)
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    if found := read_or_name(tmp_path, "batches.meta.txt", "data_batch_1.bin"):
        assert len(found[0]) * 3073 == len(content)
