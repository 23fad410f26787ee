"""The description of a data set: shape, classes, statistics and fingerprint."""

import json

import numpy as np
import pytest

from common import batches, datasets
from common.datasets import ArrayDataset
from common.errors import UserError

pytestmark = pytest.mark.quick


class Engine:
    to_array = staticmethod(np.asarray)

    @staticmethod
    def seed_sample(seed):
        pass


class Plain:
    """A data set with only the required methods."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class Subset:
    """A part of a data set, like torch.utils.data.Subset."""

    def __init__(self, dataset, indices):
        self.dataset = dataset
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


def read(dataset, indices):
    return batches.read_samples(dataset, indices, Engine)


def arrays(count=40, dtype=np.uint8, shape=(4, 5, 3)):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, *shape)).astype(dtype), np.arange(count) % 3


def test_uint8_images_have_statistics_and_float_images_have_none():
    images, labels = arrays()
    data = datasets.describe(ArrayDataset(images, labels, ["a", "b", "c"]), Plain(images, labels), read)
    assert data.sample_shape == (4, 5, 3)
    assert data.dtype == np.uint8
    assert (data.classes, data.num_classes) == (["a", "b", "c"], 3)
    np.testing.assert_allclose(data.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(data.std, images.std((0, 1, 2)), rtol=1e-6)
    assert data.mean.dtype == data.std.dtype == np.float32
    floats = Plain(images.astype(np.float32), labels)
    assert datasets.describe(floats, floats, read).mean is None


def test_a_constant_channel_does_not_divide_by_zero():
    mean, std = datasets.channel_statistics(np.full((3, 2, 2, 1), 7, np.uint8))
    assert (mean.tolist(), std.tolist()) == ([7.0], [1.0])


def test_classes_are_found_inside_wrappers_and_needed_only_for_their_number():
    images, labels = arrays()
    inside = ArrayDataset(images, labels, [1, "b"])
    assert datasets.find_classes(Subset(Subset(inside, range(10)), range(5))) == ["1", "b"]
    data = datasets.describe(Plain(images, labels), Plain(images, labels), read)
    assert data.classes is None
    with pytest.raises(
        UserError, match="has no `classes`: add a list of their names to it, or write the number"
    ):
        _ = data.num_classes


def test_training_and_validation_data_must_match_and_not_be_empty():
    images, labels = arrays()
    train = Plain(images, labels)
    with pytest.raises(UserError, match="the validation data set has no samples"):
        datasets.describe(train, Plain(images[:0], labels[:0]), read)
    with pytest.raises(UserError, match="the training data set has no samples"):
        datasets.describe(Plain(images[:0], labels[:0]), train, read)
    expected = r"have the shape \(4, 5, 3\), but the validation samples have \(4, 4, 3\): make them equal"
    with pytest.raises(UserError, match=expected):
        datasets.describe(train, Plain(images[:, :, :4], labels), read)


@pytest.mark.parametrize("kind", [Plain, lambda images, labels: ArrayDataset(images, labels, [])])
def test_a_fingerprint_is_plain_and_distinguishes_data(kind):
    images, labels = arrays()
    own = datasets.fingerprint(kind(images, labels), read)
    assert json.loads(json.dumps(own)) == own
    assert datasets.fingerprint(kind(images.copy(), labels.copy()), read) == own
    assert datasets.fingerprint(kind(images, (labels + 1) % 3), read) != own
    other = images.copy()
    other[0] += 1
    assert datasets.fingerprint(kind(other, labels), read) != own


def test_a_custom_fingerprint_is_used():
    class Named(Plain):
        def fingerprint(self):
            return {"version": 3}

    assert datasets.fingerprint(Named(*arrays()), read) == {"version": 3}


def test_an_array_data_set_does_not_copy_a_memory_map(tmp_path):
    images, labels = arrays()
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    dataset = ArrayDataset(mapped, labels, ["a", "b", "c"], np.array([5, 3, 8]))
    assert dataset.images is mapped
    assert len(dataset) == 3
    np.testing.assert_array_equal(dataset[1][0], images[3])
    assert dataset[1][1] == labels[3]
    rows, some = dataset.__getitems__(np.array([2, 0]))
    np.testing.assert_array_equal(rows, images[[8, 5]])
    np.testing.assert_array_equal(some, labels[[8, 5]])
