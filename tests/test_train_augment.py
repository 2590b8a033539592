"""Image augmentation: identity when off, shared geometry, independent draws, golden operations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octolike.config import AugmentConfig
from octolike.model.target import compile_for
from octolike.train import augment as ops

GOLDEN = Path(__file__).parents[2] / "shared/golden/octo_parts/image_ops.npz"
SIDE = 16
COLOURS = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}
ALL = AugmentConfig(crop_scale=(0.5, 1.0), cameras=("primary",), **COLOURS)


def batch(size=6, window=2, seed=0):
    """Return a batch with the same image in every example, camera, frame and goal."""
    image = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    windows = np.broadcast_to(image, (size, window, SIDE, SIDE, 3)).copy()
    return {
        "observation": {"image_primary": windows, "image_wrist": windows.copy()},
        "task": {"image_primary": windows[:, 0].copy()},
        "action": np.zeros((size, window, 1, 1), np.float32),
    }


@functools.cache
def augmented():
    """Return `batch()` after all operations, as numpy; compiled once."""
    result = jax.jit(lambda b, k: ops.augment(b, ALL, k))(batch(), jax.random.key(0))
    return jax.tree.map(np.asarray, result)


def test_augmentation_turned_off_returns_the_same_object():
    before = batch()
    assert ops.augment(before, AugmentConfig(), jax.random.key(0)) is before


def test_a_camera_without_any_operation_stays_uint8():
    config = AugmentConfig(crop_scale=(0.5, 0.6), cameras=("primary",))
    after = jax.jit(lambda b, k: ops.augment(b, config, k))(batch(), jax.random.key(0))
    after = after["observation"]
    assert after["image_wrist"].dtype == np.uint8
    np.testing.assert_array_equal(after["image_wrist"], batch()["observation"]["image_wrist"])
    assert not np.array_equal(after["image_primary"], batch()["observation"]["image_primary"])


def test_augmented_images_are_float_and_stay_in_range():
    config = AugmentConfig(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    after = jax.jit(lambda b, k: ops.augment(b, config, k))(batch(), jax.random.key(1))
    for image in (after["observation"]["image_primary"], after["task"]["image_primary"]):
        assert image.dtype == jnp.float32
        assert image.min() == 0  # the brightness shift alone reaches both ends
        assert image.max() == 255


def test_frames_of_a_window_share_draws_but_examples_do_not():
    images = augmented()["observation"]["image_primary"]
    np.testing.assert_array_equal(images[:, 0], images[:, 1])
    assert len({image[0].tobytes() for image in images}) == len(images)


def test_cameras_and_goal_images_have_independent_draws():
    after = augmented()
    observed, goal = after["observation"]["image_primary"][:, 0], after["task"]["image_primary"]
    assert not any(np.allclose(a, b) for a, b in zip(observed, goal))
    # The geometry of the wrist camera is off, so only its colours change.
    wrist = after["observation"]["image_wrist"]
    assert wrist.dtype == np.float32


def test_draws_of_different_operations_are_uncorrelated(monkeypatch):
    draws_per_image = []
    monkeypatch.setattr(
        ops,
        "augment_windows",
        lambda x, config, draws, geometry: draws_per_image.append(draws) or x,
    )
    ops.augment(batch(size=4000), ALL, jax.random.key(0))
    rows = np.asarray([row for draws in draws_per_image for row in draws])
    assert rows.shape == (3 * len(ops.AugmentDraws._fields), 4000)
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.08  # five standard deviations of chance


def test_crop_equals_a_numpy_reference():
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (5, 7, 3)).astype(np.float32)
    boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.1, 0.3, 0.55, 0.6]], np.float32)
    cropped = jax.jit(ops.crop)(np.stack([image[None]] * 2), boxes)
    for top, left, height, width, i in [(*b, i) for i, b in enumerate(boxes)]:
        expected = np.empty_like(image)
        for r in range(5):
            for c in range(7):
                y = (top + height * r / 4) * 4
                x = (left + width * c / 6) * 6
                y0, x0 = min(int(y), 3), min(int(x), 5)
                fy, fx = y - y0, x - x0
                above = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
                below = image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx
                expected[r, c] = above * (1 - fy) + below * fy
        np.testing.assert_allclose(cropped[i, 0], expected, atol=1e-3)
    np.testing.assert_allclose(cropped[0, 0], image, atol=1e-4)


def test_crop_boxes_stay_inside_the_image_and_have_the_requested_area():
    draws = ops.AugmentDraws(*np.random.default_rng(0).uniform(size=(8, 500)).astype(np.float32))
    top, left, height, width = np.asarray(ops.boxes(draws, (0.3, 0.9), (0.8, 1.25))).T
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    inside = (height < 1) & (width < 1)
    area = (height * width)[inside]
    assert area.min() > 0.3 - 1e-6
    assert area.max() < 0.9 + 1e-6
    assert (width / height)[inside].max() > 1.2


def test_a_full_turn_of_hue_and_saturation_factor_one_are_the_identity():
    image = batch(size=2)["observation"]["image_primary"]
    after = ops.saturation_and_hue(image, np.ones(2, np.float32), np.ones(2, np.float32))
    np.testing.assert_allclose(after, image, atol=1e-3)


def test_an_unknown_camera_is_an_error():
    config = AugmentConfig(brightness=0.1, cameras=("primry",))
    with pytest.raises(ValueError, match=r"'primry'; did you mean 'primary'"):
        ops.augment(batch(), config, jax.random.key(0))


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden arrays at {GOLDEN}")
def test_operations_equal_those_of_octo_for_the_same_random_numbers():
    golden = np.load(GOLDEN)
    image = golden["decoded"][None, None]  # Octo's images have values in 0 to 1
    factor, delta = golden["aug/factor_0.9_1.1"][None], golden["aug/hue_delta"][None]
    # Octo uses one seed for every draw: the crop offset is the draw behind all of these numbers.
    share = (factor[0] - 0.9) / 0.2
    scale, aspect = golden["aug/rrc_scale"][0], np.exp(golden["aug/rrc_logratio"][0])
    height, width = np.sqrt(scale / aspect), np.sqrt(scale * aspect)
    box = np.array([[(1 - height) * share, (1 - width) * share, height, width]], np.float32)
    results = {
        "random_resized_crop": ops.crop(image, box),
        "random_brightness": ops.brightness(image, golden["aug/brightness_delta"][None]),
        "random_contrast": ops.contrast(image, factor),
        "random_saturation": ops.saturation_and_hue(image, factor, None),
        "random_hue": ops.saturation_and_hue(image, None, delta),
    }
    for name, result in results.items():
        expected = 255 * golden[f"aug/{name}"]
        np.testing.assert_allclose(result[0, 0], expected, atol=2e-2, err_msg=name)


def test_depth_gets_the_crop_of_its_camera_without_interpolation():
    config = AugmentConfig(crop_scale=(0.3, 0.6))
    values = np.random.default_rng(0).choice([0.0, 0.5, 2.5], (6, 2, SIDE, SIDE, 1))
    before = batch()
    before["observation"]["depth_primary"] = values.astype(np.float32)
    # colours that encode the pixel position
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1)
    positions = np.concatenate([grid, 0 * grid[..., :1]], axis=-1).astype(np.uint8)
    before["observation"]["image_primary"] = np.broadcast_to(
        positions, (6, 2, SIDE, SIDE, 3)
    ).copy()
    after = jax.jit(lambda b, k: ops.augment(b, config, k))(before, jax.random.key(0))
    depth, colours = (after["observation"][f"{n}_primary"] for n in ("depth", "image"))
    assert set(np.unique(depth)) <= {0.0, 0.5, 2.5}
    for e in range(6):
        rows, columns = np.asarray(colours[e, 0, :, :, 0]), np.asarray(colours[e, 0, :, :, 1])
        unambiguous = (np.abs(rows % 1 - 0.5) > 0.01) & (np.abs(columns % 1 - 0.5) > 0.01)
        expected = values[e, 0, rows.round().astype(int), columns.round().astype(int)]
        np.testing.assert_allclose(
            np.asarray(depth[e, 0])[unambiguous], expected[unambiguous], atol=1e-6
        )


def test_a_crop_by_products_equals_the_gather_and_a_tpu_takes_it():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 13, 9, 3), np.uint8)
    boxes = np.array([[0, 0, 1, 1], [0.1, 0.3, 0.7, 0.5], [0.5, 0.2, 0.5, 0.8]], np.float32)
    gathered = ops.crop(images, boxes)
    np.testing.assert_allclose(ops.crop_by_products(images, boxes), gathered, atol=1e-3)
    np.testing.assert_allclose(gathered[0], images[0], atol=1e-3)  # the whole image
    for platform, has_products in (("tpu", True), ("cuda", False), ("cpu", False)):
        with compile_for(platform):
            trace = str(jax.make_jaxpr(ops.crop)(images, boxes))
        assert ("dot_general" in trace) == has_products
