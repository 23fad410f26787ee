"""Order, augmentation and learning rate: functions of (seed, epoch, step) that lose no sample."""

from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import cluster, steps
from common.errors import UserError


def flags(**changes):
    values = {"seed": 1, "batch_size": 64, "workers": 0, "augment": False, "learning_rate": 0.1, "schedule": "constant"}
    return Namespace(**{**values, **changes})


def numbered(count):
    """Images that carry their number in each pixel, and as label."""
    labels = np.arange(count)
    return np.broadcast_to(labels[:, None, None, None], (count, 8, 8, 3)).astype(np.int32), labels


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 3), st.integers(1, 50))
def test_an_epoch_has_each_sample_once_in_batches_of_almost_equal_size(count, batch_size, workers, epoch):
    images, labels = numbered(count)
    batches = list(steps.training_batches(images, labels, flags(batch_size=batch_size, workers=workers), epoch))
    assert sorted(np.concatenate([batch for _, batch, _ in batches])) == list(range(count))
    assert all((pixels[:, 0, 0, 0] == batch).all() for pixels, batch, _ in batches)
    sizes = [len(batch) for _, batch, _ in batches]
    assert sizes == [batch_size for *_, batch_size in batches]
    assert len(batches) == steps.steps_per_epoch(count, batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_workers_change_nothing():
    images, labels = numbered(300)
    for epoch in (1, 2):
        runs = [list(steps.training_batches(images, labels, flags(workers=n, augment=True), epoch)) for n in (0, 1, 4)]
        for other in runs[1:]:
            for (images_a, labels_a, _), (images_b, labels_b, _) in zip(runs[0], other):
                np.testing.assert_array_equal(images_a, images_b)
                np.testing.assert_array_equal(labels_a, labels_b)


class Counted:
    """Images that count how often each is read."""

    def __init__(self, images):
        self.images, self.shape, self.reads = images, images.shape, np.zeros(len(images), int)

    def __getitem__(self, indices):
        self.reads[indices] += 1
        return self.images[indices]


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 2), st.data())
def test_an_epoch_goes_on_from_any_step_without_reading_what_is_done(count, batch_size, workers, data):
    images, labels = numbered(count)
    args = flags(batch_size=batch_size, workers=workers, augment=True)
    whole = list(steps.training_batches(images, labels, args, 1))
    assert [len(batch) for _, batch, _ in whole] == steps.batch_sizes(count, batch_size)
    first_step = data.draw(st.integers(0, len(whole)))
    counted = Counted(images)
    rest = list(steps.training_batches(counted, labels, args, 1, first_step))
    assert len(rest) == len(whole) - first_step
    for (pixels, batch, _), (expected_pixels, expected, _) in zip(rest, whole[first_step:]):
        np.testing.assert_array_equal(pixels, expected_pixels)
        np.testing.assert_array_equal(batch, expected)
    assert counted.reads.sum() == sum(len(batch) for _, batch, _ in rest)


@given(st.integers(20, 200), st.integers(10, 50), st.integers(1, 4), st.booleans())
def test_the_shares_of_all_workers_are_the_batches_of_one(count, batch_size, size, augment):
    images, labels = numbered(count)
    args = flags(batch_size=batch_size, augment=augment)
    alone = list(steps.training_batches(images, labels, args, 3))
    validation = list(steps.validation_batches(images, labels, args))
    parts, validation_parts = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "size", size)
        for rank in range(size):
            patch.setattr(cluster, "rank", rank)
            parts.append(list(steps.training_batches(images, labels, args, 3)))
            validation_parts.append(list(steps.validation_batches(images, labels, args)))
            assert [len(batch) for _, batch, _ in parts[-1]] == steps.batch_sizes(count, batch_size)
    for whole, shares in [*zip(alone, zip(*parts)), *zip(validation, zip(*validation_parts))]:
        assert max(len(share[1]) for share in shares) - min(len(share[1]) for share in shares) <= 1
        np.testing.assert_array_equal(np.concatenate([share[0] for share in shares]), whole[0])
        np.testing.assert_array_equal(np.concatenate([share[1] for share in shares]), whole[1])
        assert {share[2:] for share in shares} == {whole[2:]}


def test_a_batch_without_a_sample_for_each_worker_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "size", 4)
    with pytest.raises(UserError, match="make batches of 3, but there are 4 workers"):
        next(steps.training_batches(*numbered(7), flags(batch_size=4), 1))


def test_each_epoch_and_each_seed_has_its_own_order():
    images, labels = numbered(100)

    def order(seed, epoch):
        return tuple(np.concatenate([b for _, b, _ in steps.training_batches(images, labels, flags(seed=seed), epoch)]))

    assert order(1, 1) == order(1, 1)
    assert len({order(seed, epoch) for seed in (1, 2, 3) for epoch in (1, 2, 3)}) == 9


def test_validation_is_in_order_without_augmentation():
    images, labels = numbered(130)
    batches = list(steps.validation_batches(images, labels, flags(augment=True)))
    np.testing.assert_array_equal(np.concatenate([batch for _, batch in batches]), labels)
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in batches]), images)


def test_a_failure_in_a_worker_is_a_failure_of_the_run():
    class Broken:
        shape, dtype = (10, 8, 8, 3), np.uint8

        def __getitem__(self, indices):
            raise RuntimeError("broken data")

    with pytest.raises(RuntimeError, match="broken data"):
        list(steps.training_batches(Broken(), np.arange(10), flags(workers=2), 1))


def test_every_augmented_image_is_a_shifted_or_mirrored_copy():
    generator = np.random.default_rng(0)
    images = generator.integers(1, 255, (200, 16, 16, 3)).astype(np.uint8)
    augmented = steps.crop_and_flip(images, *steps.draw_crops_and_flips(images.shape, 200, generator))
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


def test_the_learning_rate_is_constant_or_falls_along_half_a_cosine():
    assert {steps.learning_rate(flags(), step, 100) for step in range(100)} == {0.1}
    cosine = [steps.learning_rate(flags(schedule="cosine"), step, 100) for step in range(100)]
    assert cosine[0] == 0.1
    assert cosine[50] == pytest.approx(0.05)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] > 0


def test_step_seeds_differ_also_between_workers(monkeypatch):
    seeds = set()
    for rank in range(3):
        monkeypatch.setattr(cluster, "rank", rank)
        seeds |= {steps.step_seed(seed, step) for seed in range(3) for step in range(1000)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**32 for seed in seeds)
