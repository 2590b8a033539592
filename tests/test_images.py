"""Images are resized in numpy (the policy) as in TensorFlow (the data): bit for bit."""

import dataclasses

import numpy as np
import pytest

from octolike import images
from octolike.config import DataConfig

tf = pytest.importorskip("tensorflow")
from octolike.data.rlds import decode  # noqa: E402

# Input and output sizes: by integers, by other factors, of one side, to and from a single pixel.
SIZES = [
    ((480, 640), 256),
    ((180, 320), 128),
    ((64, 48), 16),
    ((30, 41), 27),
    ((9, 9), 16),
    ((100, 20), 32),
    ((32, 50), 32),
    ((7, 5), 1),
    ((1, 1), 3),
]


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return an image with smooth parts, noise and the largest values."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3))
    slope = np.linspace(0, 255, width)[:, None]
    image = np.where(np.arange(height)[:, None, None] % 7 < 3, slope, noise)
    image[: height // 4] = 255
    return image.astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
    return tf.io.encode_png(image).numpy()


def test_both_sides_and_the_option_have_the_same_kernels():
    (resize,) = (f for f in dataclasses.fields(DataConfig) if f.name == "resize")
    assert set(images.KERNELS) == set(decode.KERNELS) == set(resize.metadata["choices"])


@pytest.mark.parametrize("kernel", images.KERNELS)
@pytest.mark.parametrize(("size", "side"), SIZES)
def test_the_policy_resizes_as_the_data_do(kernel, size, side):
    image = random_image(*size)
    (by_tensorflow,) = decode.decode_images(tf.constant([encode(image)]), side, kernel).numpy()
    by_numpy = images.resize(image, side, side, kernel)
    assert by_numpy.dtype == np.uint8
    np.testing.assert_array_equal(by_numpy, by_tensorflow)


@pytest.mark.parametrize("kernel", images.KERNELS)
def test_not_a_single_bit_differs_before_rounding(kernel):
    """Rounding would hide most differences of the weights."""
    rng = np.random.default_rng(1)
    for i in range(12):
        (height, width), side = rng.integers(3, 200, 2).tolist(), int(rng.integers(2, 120))
        image = random_image(height, width, i)
        by_numpy = images.KERNELS[kernel](image.astype(np.float32), side, side)
        np.testing.assert_array_equal(by_numpy, decode.KERNELS[kernel](image, side))


def test_area_is_the_mean_over_the_pixels_and_bilinear_where_a_side_grows():
    image = random_image(12, 18)
    mean = image.reshape(4, 3, 3, 6, 3).mean((1, 3))
    np.testing.assert_allclose(images.resize_area(image.astype(np.float32), 4, 3), mean, rtol=1e-6)
    taller = images.resize(image, 13, 9, "area")
    np.testing.assert_array_equal(taller, images.resize(image, 13, 9, "bilinear"))
    assert (images.resize(image, 12, 9, "area") != images.resize(image, 12, 9, "bilinear")).any()


def test_kernels_keep_a_constant_image_and_differ_otherwise():
    constant = np.full((50, 40, 3), 201, np.uint8)
    assert all((images.resize(constant, 16, 16, k) == 201).all() for k in images.KERNELS)
    results = {images.resize(random_image(50, 40), 16, 16, k).tobytes() for k in images.KERNELS}
    assert len(results) == len(images.KERNELS)


def test_an_image_of_the_right_size_is_left_alone():
    image = random_image(16, 16)
    assert images.resize(image, 16, 16, "lanczos3") is image


@pytest.mark.parametrize("kernel", images.KERNELS)
def test_a_batch_may_mix_sizes_formats_and_missing_images(kernel):
    small, large = random_image(16, 16), random_image(40, 30)
    encoded = [encode(small), b"", encode(large), tf.io.encode_jpeg(small, quality=95).numpy()]
    dataset = tf.data.Dataset.from_tensors(encoded).map(
        lambda x: decode.decode_images(x, 16, kernel)
    )
    batch = next(dataset.as_numpy_iterator())
    assert batch.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(batch[0], small)
    assert not batch[1].any()
    np.testing.assert_array_equal(batch[2], images.resize(large, 16, 16, kernel))
    assert np.abs(batch[3].astype(int) - small).mean() < 64
