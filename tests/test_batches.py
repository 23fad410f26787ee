"""Order, augmentation and random numbers are functions of (seed, epoch, step); no sample is lost."""

import random
from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import batches
from common.datasets import ArrayDataset
from common.distributed import Workers
from common.errors import UserError
from common.images import random_crop_and_flip

pytestmark = pytest.mark.quick


class Engine:
    """A framework without a random generator, whose images are NumPy arrays."""

    to_array = staticmethod(np.asarray)

    @staticmethod
    def seed_sample(seed):
        pass


def numbered(count):
    """Return images whose pixels and label are the index of the image."""
    labels = np.arange(count)
    images = np.broadcast_to(labels[:, None, None, None], (count, 8, 8, 3)).astype(np.int32)
    return ArrayDataset(images, labels, [])


def loader_of(dataset, epoch=None, workers=None, augment=None, **flags):
    args = Namespace(**{"seed": 1, "batch_size": 64, **flags})
    loader = batches.BatchLoader(args, dataset, workers or Workers(), Engine, epoch)
    loader.augment = augment
    return loader


def load(loader, first_step=0, num_threads=0):
    return list(batches.load_ahead(loader, range(first_step, len(loader.sizes)), num_threads))


def crop_and_flip(images, labels, rng):
    return random_crop_and_flip(images, rng), labels


def assert_equal(batch, expected):
    for ours, theirs in zip(batch, expected):
        np.testing.assert_array_equal(ours, theirs)


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 3), st.integers(0, 50))
def test_an_epoch_contains_each_sample_once_in_batches_of_similar_size(count, batch_size, num_threads, epoch):
    loader = loader_of(numbered(count), epoch, batch_size=batch_size)
    loaded = load(loader, num_threads=num_threads)
    assert sorted(np.concatenate([batch.labels for batch in loaded])) == list(range(count))
    assert all((batch.images[:, 0, 0, 0] == batch.labels).all() for batch in loaded)
    sizes = [len(batch.labels) for batch in loaded]
    assert sizes == loader.sizes == [batch.samples_per_worker for batch in loaded]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    first = epoch * len(sizes)
    assert [batch.step for batch in loaded] == list(range(first, first + len(sizes)))
    assert {batch.steps_per_epoch for batch in loaded} == {len(sizes)}
    assert all((batch.weights == 1).all() and batch.weights.dtype == np.float32 for batch in loaded)


def test_the_number_of_threads_does_not_change_the_batches():
    for epoch in (0, 1):
        loader = loader_of(numbered(300), epoch, augment=crop_and_flip)
        expected = load(loader)
        for num_threads in (1, 4):
            for batch, other in zip(expected, load(loader, num_threads=num_threads)):
                assert_equal(batch, other)


class Counted(ArrayDataset):
    """Count the reads of each sample."""

    def __init__(self, dataset):
        super().__init__(dataset.images, dataset.labels, [])
        self.reads = np.zeros(len(dataset), int)

    def __getitems__(self, indices):
        self.reads[indices] += 1
        return super().__getitems__(indices)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 2), st.data())
def test_an_epoch_continues_at_any_step_without_reading_earlier_samples(count, batch_size, num_threads, data):
    whole = load(loader_of(numbered(count), 1, augment=crop_and_flip, batch_size=batch_size))
    first_step = data.draw(st.integers(0, len(whole)))
    counted = Counted(numbered(count))
    loader = loader_of(counted, 1, augment=crop_and_flip, batch_size=batch_size)
    rest = load(loader, first_step, num_threads)
    assert len(rest) == len(whole) - first_step
    for batch, expected in zip(rest, whole[first_step:]):
        assert_equal(batch, expected)
    assert counted.reads.sum() == sum(len(batch.labels) for batch in rest)


@given(st.integers(20, 200), st.integers(10, 50), st.integers(1, 4))
def test_the_shards_of_all_workers_form_the_batches_of_one_worker(count, batch_size, size):
    dataset = numbered(count)
    for epoch in (3, None):
        alone = load(loader_of(dataset, epoch, batch_size=batch_size))
        shards = [
            load(loader_of(dataset, epoch, Workers(rank, ["host"] * size), batch_size=batch_size))
            for rank in range(size)
        ]
        for whole, parts in zip(alone, zip(*shards)):
            lengths = [len(part.labels) for part in parts]
            assert max(lengths) - min(lengths) <= 1
            np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole.images)
            np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
            assert {part.samples_per_worker for part in parts} == {whole.samples_per_worker / size}
            assert {part.step for part in parts} == {whole.step}
            assert len({part.seed for part in parts}) == size


def test_a_batch_smaller_than_the_number_of_workers_is_rejected():
    args = Namespace(batch_size=4)
    batches.check_sizes(8, args, Workers(0, ["host"] * 4))
    with pytest.raises(UserError, match="make batches of 3, but there are 4 workers"):
        batches.check_sizes(7, args, Workers(0, ["host"] * 4))


def test_the_order_depends_on_epoch_and_seed():
    def order(seed, epoch):
        return tuple(
            np.concatenate([batch.labels for batch in load(loader_of(numbered(100), epoch, seed=seed))])
        )

    assert order(1, 1) == order(1, 1)
    assert len({order(seed, epoch) for seed in (1, 2, 3) for epoch in (0, 1, 2)}) == 9


def test_validation_is_not_shuffled():
    loaded = load(loader_of(numbered(130)))
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in loaded]), np.arange(130))


def test_an_error_in_a_thread_fails_the_run():
    class Broken:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            raise RuntimeError("broken data")

    with pytest.raises(RuntimeError, match="broken data"):
        load(loader_of(Broken(), 0), num_threads=2)


def test_step_seeds_differ_between_workers():
    seeds = set()
    for rank in range(3):
        for seed in range(3):
            loader = loader_of(numbered(1000), 0, Workers(rank, ["host"] * 3), seed=seed, batch_size=4)
            seeds |= {batch.seed for batch in load(loader)}
    assert len(seeds) == 9 * 250
    assert all(0 <= seed < 2**32 for seed in seeds)


# Augmentation -----------------------------------------------------------------------------------------------


def test_labels_are_augmented_with_their_images():
    dataset = numbered(10)
    masks = np.arange(10 * 64).reshape(10, 8, 8)
    loader = loader_of(
        ArrayDataset(dataset.images, masks, []),
        0,
        augment=lambda images, labels, rng: (images[:, ::-1], labels[:, ::-1]),
    )
    batch = loader(0)
    for image, mask in zip(batch.images, batch.labels):
        np.testing.assert_array_equal(mask, masks[image[0, 0, 0]][::-1])


def test_an_augmentation_that_changes_the_type_is_rejected():
    loader = loader_of(numbered(10), 0, augment=lambda images, labels, rng: (images / 2, labels))
    with pytest.raises(
        UserError, match="augment returns float64 for images of int32: expected the same type"
    ):
        loader(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_augmented_image_is_a_shifted_or_mirrored_copy(dtype):
    generator = np.random.default_rng(0)
    images = generator.integers(1, 255, (200, 16, 16, 3)).astype(dtype)
    augmented = random_crop_and_flip(images, generator)
    assert augmented.shape == images.shape
    assert augmented.dtype == images.dtype
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, result in zip(padded, augmented):
        matches = {
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (1, -1)
            if (image[top : top + 16, left : left + 16][:, ::flip] == result).all()
        }
        assert len(matches) == 1
        seen |= matches
    assert {flip for _, _, flip in seen} == {1, -1}
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == {0, 1, 2, 3, 4}


# Custom data sets -------------------------------------------------------------------------------------------


class Random:
    """Draw from the process-wide generators, like random transforms."""

    def __init__(self, form):
        if form != "one by one":
            self.__getitems__ = lambda indices: self.read(indices, form)

    def __len__(self):
        return 50

    def __getitem__(self, index):
        image = np.full((2, 2, 1), random.random() + np.random.random(), np.float32)  # noqa: S311
        return image, index, 0.5 + index

    def read(self, indices, form):
        samples = [self[int(index)] for index in indices]
        if form == "list":
            return samples
        return tuple(map(np.stack, zip(*samples)))


@pytest.mark.parametrize("form", ["one by one", "list", "tuple"])
def test_random_numbers_of_a_data_set_depend_on_seed_epoch_and_sample(form):
    def samples(first_step=0, num_threads=0, **flags):
        loader = loader_of(Random(form), **{"epoch": 1, "batch_size": 8, **flags})
        return load(loader, first_step, num_threads)

    expected = samples()
    random.seed(5)
    for other in (samples(), samples(num_threads=3)):
        for batch, ours in zip(other, expected):
            assert_equal(batch, ours)
    for batch, ours in zip(samples(first_step=3), expected[3:]):
        assert_equal(batch, ours)
    for batch in expected:
        np.testing.assert_array_equal(batch.weights, 0.5 + batch.labels)
        assert batch.weights.dtype == np.float32
    drawn = {float(value) for batch in expected for value in batch.images[:, 0, 0, 0]}
    assert len(drawn) == 50
    for other in (samples(epoch=2), samples(seed=2)):
        assert not drawn & {float(value) for batch in other for value in batch.images[:, 0, 0, 0]}


def test_samples_of_different_shapes_or_structures_are_a_one_line_error():
    class Sized(Random):
        def __getitem__(self, index):
            return np.zeros((2 + index % 2, 2, 1)), index

    class Single(Random):
        def __getitem__(self, index):
            return (index,)

    with pytest.raises(UserError, match=r"different shapes, such as .*: make them equal in load_data"):
        loader_of(Sized("one by one"))(0)
    with pytest.raises(UserError, match=r"has 1 parts: expected \(sample, label\) or"):
        loader_of(Single("one by one"))(0)
