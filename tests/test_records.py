"""TFRecord files (TensorFlow) and RecordIO files (MXNet) are equivalent to class folders."""

import importlib.util
import json
import multiprocessing
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import flags, images
from common.errors import UserError
from helpers import ROOT, choose, history, model_bytes, run_many, save_images

SUFFIXES = {"tensorflow": ".tfrecord", "mxnet": ".rec"}
MAGIC = struct.pack("<I", 0xCED7230A)


@pytest.fixture(scope="module", params=SUFFIXES)
def records(request):
    """Return the module `records` of a framework."""
    return load_module(choose(request.param))


@pytest.fixture(scope="module")
def tfrecord():
    return load_module("tensorflow")


@pytest.fixture(scope="module")
def recordio():
    return load_module(choose("mxnet"))


def load_module(framework):
    if framework == "mxnet":
        np.bool = bool  # as in engine.py
    spec = importlib.util.spec_from_file_location(f"{framework}_records", ROOT / framework / "records.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(records, train, validation=None):
    args = flags.image_flags("pytorch").parse_args([])
    vars(args).update({"train": train, "validation": validation})
    return images.load_images(args, records.RecordFile if records else None)


def read_all(dataset):
    pixels, labels = dataset.__getitems__(np.arange(len(dataset)))
    return pixels.tobytes(), labels.tolist()


def write(path, contents, labels, **options):
    """Write a file of records with the framework of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".rec":
        write_recordio(path, contents, labels)
    else:
        write_tfrecord(path, contents, labels, **options)
    return path


def feature(value):
    import tensorflow as tf

    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    if isinstance(value, float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=np.atleast_1d(value)))


def example(**features):
    """Return a record; `_` in the names means a slash."""
    import tensorflow as tf

    features = {name.replace("_", "/"): feature(value) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_examples(path, examples, compression=None):
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for content in examples:
            writer.write(content)


def write_tfrecord(path, contents, labels, names=None, compression=None):
    examples = []
    for content, label in zip(contents, labels):
        more = {"image_class_text": names[label].encode()} if names else {}
        examples.append(example(image_encoded=content, image_class_label=int(label), image_height=8, **more))
    write_examples(path, examples, compression)


def write_recordio(path, contents, labels):
    from mxnet import recordio

    writer = recordio.MXRecordIO(str(path), "w")
    for index, (content, label) in enumerate(zip(contents, labels)):
        header = recordio.IRHeader(0, label, index, 0)
        writer.write(recordio.pack(header, content))
    writer.close()


@pytest.fixture
def folders(tmp_path, digits):
    """Return class folders with 60 images, and the images as bytes with their labels in the same order."""
    folder = tmp_path / "folders"
    labels = digits[1][:60] % 3
    save_images(folder, digits[0][:60], labels, suffixes=(".png", ".jpg"))
    paths = sorted(folder.glob("*/*"))
    return folder, [path.read_bytes() for path in paths], [int(path.parent.name[-1]) for path in paths]


# Training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", SUFFIXES)
def test_a_training_is_bit_identical_to_class_folders_after_an_interruption(framework, tmp_path, folders):
    folder, contents, labels = folders
    suffix = SUFFIXES[choose(framework)]
    load_module(framework)
    for number in range(2):
        half = slice(number * 30, (number + 1) * 30)
        write(tmp_path / f"records/{number}{suffix}", contents[half], labels[half])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    options = ["--epochs", 1, "--batch-size", 16, "--augment"]
    interrupt = 'at_call(Run, "finish_step", 2, lambda: send(signal.SIGTERM))'
    jobs = [
        (whole, [*options, "--train", folder]),
        (parts, [*options, "--train", tmp_path / "records"], interrupt),
        (parts, [*options, "--train", tmp_path / "records"]),
    ]
    results = run_many(framework, jobs, cwd=tmp_path)
    assert [result.code for result in results] == [0, 143, 0], [result.errors for result in results]
    assert "Starting training from epoch: 1, step: 3\n" in results[2].output
    assert (
        f"Reading the labels of 2 record files (0.0 GB) in --train {tmp_path}/records, such as 0{suffix}\n"
        in results[1].output
    )
    assert history(whole, framework) == history(parts, framework)
    models = [model_bytes(each, framework) for each in (whole, parts)]
    for model in models:
        facts = json.loads(model.pop("model.json"))
        assert facts["class_names"] in (["0", "1", "2"], ["class-0", "class-1", "class-2"])
    assert models[0] == models[1]


# Reading ----------------------------------------------------------------------------------------------------


def suffix_of(records):
    return ".rec" if records.RecordFile.is_one("a.rec") else ".tfrecord"


def test_the_images_equal_those_of_class_folders(records, tmp_path, folders):
    folder, contents, labels = folders
    path = write(tmp_path / f"records/data{suffix_of(records)}", contents, labels)
    for data, other in zip(load(records, path.parent), load(None, folder)):
        assert read_all(data) == read_all(other)
        assert data.classes == ["0", "1", "2"]
        assert data.images.source.sizes.tolist() == [len(content) for content in contents]


def test_an_empty_file_contains_no_images(records, tmp_path, folders):
    suffix = suffix_of(records)
    write(tmp_path / f"records/0{suffix}", [], [])
    with pytest.raises(UserError, match="has record files without any images"):
        load(records, tmp_path / "records")
    write(tmp_path / f"records/1{suffix}", *folders[1:])
    assert len(load(records, tmp_path / "records")[0]) == 54


def test_files_named_as_such_are_the_validation_data(records, tmp_path, folders, caplog):
    caplog.set_level("INFO", logger="train")
    _, contents, labels = folders
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]
    others = ["test-00000-of-00001", "labels.txt"]
    if suffix_of(records) == ".rec":
        names = ["pets_train.rec", "pets_train2.rec", "pets_val.rec"]
        others = ["pets_test.rec", "labels.txt", "pets_train.lst", "pets_train.idx"]
    folder = tmp_path / "records"
    for number, name in enumerate(names):
        write(folder / name, contents[number::3], labels[number::3])
    for name in others:
        (folder / name).touch()
    train, validation = load(records, folder)
    assert (len(train), len(validation)) == (40, 20)
    assert read_all(validation)[1] == labels[2::3]
    left_out = sorted([names[2], *others[:2]])
    assert caplog.messages[0] == (
        f"Left out of --train {folder}, not its training data (3): {', '.join(left_out)}"
    )
    assert caplog.messages[2] == (
        f"No --validation folder: using the validation or test data in --train {folder}"
    )
    assert caplog.messages[3].startswith("Reading the labels of 1 record files (0.0 GB) in the validation")
    assert not any("Left out" in message for message in caplog.messages[1:])
    assert read_all(load(records, folder, folder)[1]) == read_all(validation)
    # In a separate folder the names do not matter.
    validation = tmp_path / "channel"
    validation.mkdir()
    shutil.move(folder / names[0], validation)
    assert len(load(records, folder, validation)[1]) == 20


def test_the_class_names_of_a_tfrecord_file(tfrecord, tmp_path, folders):
    _, contents, labels = folders
    path = tmp_path / "records/a.tfrecords"

    def classes(*names):
        write(path, contents, labels, names=names)
        return load(tfrecord, path.parent)[0].classes

    assert classes("owl", "cat", "dog") == ["owl", "cat", "dog"]
    assert classes("crane", "crane", "dog") == ["0", "1", "2"]  # as in ImageNet: the bird and the machine
    assert classes("owl\n", "cat", "dog") == ["0", "1", "2"]
    classes("owl", "cat", "dog")
    write(path.with_name("b.tfrec"), contents, labels, names=["owl", "cat", "cow"])
    assert load(tfrecord, path.parent)[0].classes == ["0", "1", "2"]


def test_a_recordio_file_may_contain_the_magic_number(recordio, tmp_path):
    """The writer splits the record at it, even inside the header."""
    contents = [MAGIC * 3, b"1234" + MAGIC + b"56", bytes(3) + MAGIC, MAGIC[:2], b""]
    magic_label = int(struct.unpack("<f", MAGIC)[0])
    path = write(tmp_path / "data.rec", contents, range(5))
    file = recordio.RecordFile(path)
    assert file.labels.tolist() == list(range(5))
    assert [file.read(index) for index in range(5)] == contents
    assert list(file.sizes) == list(map(len, contents))
    with pytest.raises(UserError, match=r"data\.rec, record 1: it has the label -1.* expected an integer"):
        recordio.RecordFile(write(path, [b"12", b"34"], [1, magic_label]))


def test_the_label_may_follow_the_header(recordio, tmp_path):
    path = write(tmp_path / "data.rec", [b"image", b"other"], [[7], [8]])
    file = recordio.RecordFile(path)
    assert file.labels.tolist() == [7, 8]
    assert list(file.sizes) == [5, 5]
    assert file.read(1) == b"other"


def read_in_child(file, queue):
    queue.put([file.read(index) for index in range(len(file.labels))])


def test_threads_read_the_same_file(records, tmp_path, folders):
    _, contents, labels = folders
    file = records.RecordFile(write(tmp_path / f"data{suffix_of(records)}", contents, labels))
    order = np.random.default_rng(0).integers(0, 60, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(file.read, order)) == [contents[index] for index in order]


def test_forked_processes_read_the_same_file(recordio, tmp_path, folders):
    _, contents, labels = folders
    file = recordio.RecordFile(write(tmp_path / "data.rec", contents, labels))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_in_child, args=(file, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert file.read(0) == contents[0]
    for _ in processes:
        assert queue.get(timeout=60) == contents
    for process in processes:
        process.join()


# Errors -----------------------------------------------------------------------------------------------------


def tfrecord_header(length):
    return struct.pack("<Q", length) + bytes(4)


def examples(*contents):
    return lambda path: write_examples(path, contents)


def compressed(kind):
    return lambda path: write_tfrecord(path, [b"image"] * 50, [0] * 50, compression=kind)


TFRECORD_MISTAKES = {
    "text": (
        b"label,image\n" * 10,
        "record 0: the file ends inside it: expected a TFRecord file; this one is",
    ),
    "huge": (tfrecord_header(2**64 - 1) + bytes(100), "record 0: the file ends inside it"),
    "large": (tfrecord_header(10**9) + bytes(100), "record 0: the file ends inside it"),
    "half a header": (b"\1\0\0\0", "record 0: the file ends inside it"),
    "wrong checksum": (tfrecord_header(4) + bytes(8), "record 0: its checksum is wrong; replace the file"),
    "gzip": (compressed("GZIP"), "data.tfrecord is compressed: expected a TFRecord file without compression"),
    "zlib": (compressed("ZLIB"), "data.tfrecord is compressed: expected"),
    "no example": (examples(b"\xff\xff"), "record 0: expected a tf.train.Example"),
    "nothing": (examples(b""), "record 0: it has the features nothing: expected image/encoded and"),
    "other features": (
        lambda path: write_examples(path, [example(image=b"1", label=1)]),
        "record 0: it has the features image, label: expected image/encoded and image/class/label",
    ),
    "lines": (
        lambda path: write_examples(path, [example(**{"a\nb": 1})]),
        r"record 0: it has the features 'a\\nb': expected",
    ),
    "no label": (
        lambda path: write_examples(path, [example(image_encoded=b"1", image_format=b"png")]),
        "record 0: it has the features image/encoded, image/format: expected",
    ),
    "float label": (
        lambda path: write_examples(path, [example(image_encoded=b"1", image_class_label=1.0)]),
        "record 0: its feature image/class/label is not one integer",
    ),
    "two labels": (
        lambda path: write_examples(path, [example(image_encoded=b"1", image_class_label=[1, 2])]),
        "record 0: its feature image/class/label is not one integer",
    ),
    "no bytes": (
        lambda path: write_examples(path, [example(image_encoded=1, image_class_label=1)]),
        "record 0: its feature image/encoded is not one text of bytes",
    ),
}


def part(kind, content, length=None):
    """Return a part of a RecordIO record."""
    word = kind << 29 | (len(content) if length is None else length)
    return MAGIC + struct.pack("<I", word) + content + bytes(-len(content) % 4)


def record(label, content=b"1234", num_labels=0):
    return struct.pack("<IfQQ", num_labels, label, 0, 0) + content


GOOD = part(0, record(1))
RECORDIO_MISTAKES = {
    "text": (b"label,image\n" * 10, "record 0: it does not start like a record of MXNet's RecordIO"),
    "short": (MAGIC, "record 0: it does not start like"),
    "second": (GOOD + bytes(40), "record 1: it does not start like"),
    "truncated": (GOOD + GOOD[:-1], "record 1: the file ends inside it: it is truncated or damaged"),
    "huge": (part(0, record(1), 2**29 - 1), "record 0: the file ends inside it"),
    "several labels": (
        part(0, record(0, bytes(20), 5)),
        "record 0: it has 5 labels: expected one, the class of the image",
    ),
    "huge number of labels": (part(0, record(0, bytes(20), 2**32 - 1)), "record 0: it has 4294967295 labels"),
    "no label": (part(0, record(0, b"", 1)), "record 0: it has 24 bytes: expected a label and an image"),
    "no header": (GOOD + part(0, b"12345"), "record 1: it has 5 bytes: expected a label and an image"),
    "half a label": (part(0, record(0.5)), "record 0: it has the label 0.5: expected an integer"),
    "NaN": (part(0, record(np.nan)), "record 0: it has the label nan: expected an integer"),
    "infinity": (part(0, record(np.inf)), "record 0: it has the label inf: expected an integer"),
    "large label": (part(0, record(1e30)), r"record 0: it has the label 1e\+30: expected an integer"),
    "rest": (part(3, record(0)), "record 0: it starts with the rest of another record"),
    "unknown kind": (part(7, record(0)), "record 0: it starts with the rest of another record"),
    "no end": (part(1, record(0)), "record 0: it does not start like"),
    "another record": (part(1, record(0)) + GOOD, "record 0: its end is missing"),
}


def assert_error(records, path, content, message):
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(records, path.parent)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", TFRECORD_MISTAKES)
def test_an_error_in_a_tfrecord_file_is_one_line(tfrecord, tmp_path, name):
    assert_error(tfrecord, tmp_path / "data.tfrecord", *TFRECORD_MISTAKES[name])


@pytest.mark.parametrize("name", RECORDIO_MISTAKES)
def test_an_error_in_a_recordio_file_is_one_line(recordio, tmp_path, name):
    assert_error(recordio, tmp_path / "data.rec", *RECORDIO_MISTAKES[name])


def test_an_error_names_the_file_that_cannot_be_opened(records, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*/gone: No such file or directory"):
        records.RecordFile(tmp_path / "gone")


def test_an_error_names_file_and_record_of_a_damaged_image(records, tmp_path, folders):
    _, contents, labels = folders
    contents[7] = contents[7][:40]
    path = write(tmp_path / f"records/data{suffix_of(records)}", contents, labels)
    message = rf"cannot read the image {path}, record \d+: .*Replace it"
    for damage in (lambda: None, path.unlink):
        train, _ = load(records, path.parent)
        damage()
        with pytest.raises(UserError, match=message) as caught:
            train.images[np.arange(60)]
        assert "\n" not in str(caught.value)


def test_a_damaged_tfrecord_is_detected_by_its_checksum(tfrecord, tmp_path, folders):
    path = write(tmp_path / "data.tfrecord", *folders[1:])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tfrecord, record \d+: its checksum is wrong"):
        tfrecord.RecordFile(path)


# Arbitrary and damaged files --------------------------------------------------------------------------------

FUZZ = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(content):
    """Return a strategy for `content` with bytes replaced, removed or added, and for arbitrary bytes."""

    def change(places, length, more):
        result = bytearray(content)
        for position, value in places:
            result[position] = value
        return bytes(result[:length]) + more

    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    lengths = st.just(len(content)) | st.integers(0, len(content))
    return st.binary(max_size=64) | st.builds(change, places, lengths, st.binary(max_size=8))


def read_or_name(records, path, content, max_records):
    """Read a whole file: its number of images is plausible, or a UserError names the file."""
    path.write_bytes(content)
    try:
        file = records.RecordFile(path)
    except UserError as error:
        message = str(error)
    else:
        assert len(file.labels) == len(file.sizes) <= max_records
        for index, size in enumerate(file.sizes):
            assert len(file.read(index)) == size
        return
    assert str(path) in message
    assert "\n" not in message


def masked_crc(content):
    """Return the checksum of TFRecord files, to also test damage with valid checksums."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord_of(content):
    length = struct.pack("<Q", len(content))
    return length + masked_crc(length) + content + masked_crc(content)


def field(number, content):
    """Return a protocol buffer field."""
    return bytes([number << 3 | 2, len(content)]) + content


# example(image_encoded=b"12", image_class_label=3), stored here to avoid the framework at import.
SMALL = field(1, b"image/encoded") + field(2, field(1, field(1, b"12")))
SMALL = field(1, SMALL) + field(1, field(1, b"image/class/label") + field(2, field(3, field(1, b"\3"))))
SMALL = field(1, SMALL)


def test_the_files_are_valid_before_they_are_damaged(tfrecord, tmp_path):
    path = tmp_path / "data.tfrecord"
    path.write_bytes(tfrecord_of(SMALL) * 2)
    file = tfrecord.RecordFile(path)
    assert (file.labels.tolist(), file.read(1)) == ([3, 3], b"12")


@FUZZ
@given(content=changed(tfrecord_of(SMALL) * 2))
def test_arbitrary_tfrecord_files_are_read_or_an_error_names_the_file(tfrecord, tmp_path, content):
    read_or_name(tfrecord, tmp_path / "data.tfrecord", content, len(content) // 16)


@FUZZ
@given(content=changed(SMALL))
def test_arbitrary_records_with_valid_checksums_are_read_or_named(tfrecord, tmp_path, content):
    read_or_name(tfrecord, tmp_path / "data.tfrecord", tfrecord_of(content), 1)


@FUZZ
@given(
    content=changed(
        GOOD + part(1, record(2)) + part(2, b"") + part(3, b"12") + part(0, record(0, b"123456", 1))
    )
)
def test_arbitrary_recordio_files_are_read_or_an_error_names_the_file(recordio, tmp_path, content):
    read_or_name(recordio, tmp_path / "data.rec", content, len(content) // 32)
