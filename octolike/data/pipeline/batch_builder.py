"""Frames to a batch: windows, chunks and goals, padded numbers, wordings, decoded images.

A batch is built at once, not example by example: indices are arrays over the batch, and an image
that occurs in several examples is decoded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.pipeline import goals, windows
from octolike.data.pipeline.dataset_split import DatasetSplit
from octolike.data.rlds import decode
from octolike.data.rlds.reader import Episode, error_summary
from octolike.embodiment import Embodiment
from octolike.errors import DataError
from octolike.text import load_paraphrases


class EpisodeRef(NamedTuple):
    """An episode of a batch, its split, and its number in the split."""

    source: DatasetSplit
    number: int
    episode: Episode


class BatchBuilder:
    """Builds the leaves of batches, except token ids."""

    def __init__(self, config: DataConfig, embodiments: Sequence[Embodiment]) -> None:
        self._config = config
        self._action_dim = max(len(e.learned) for e in embodiments)
        self._proprio_dim = max((len(e.proprio) for e in embodiments if e.proprio), default=0)
        self.paraphrases: Mapping[str, tuple[str, ...]] = {}
        if config.paraphrases:
            self.paraphrases = load_paraphrases(config.paraphrases)
        self._decode = {
            (side, bgr): tf.function(
                lambda x, side=side, bgr=bgr: decode.decode_images(x, side, config.resize)[
                    ..., :: -1 if bgr else 1
                ],
                input_signature=[tf.TensorSpec([None], tf.string)],
            )
            for side in set(config.cameras.values())
            for bgr in (False, True)
        }

    def batch(
        self,
        episodes: Sequence[EpisodeRef],
        which: np.ndarray,
        t: np.ndarray,
        draws: np.ndarray,
        dropout: bool,
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return (leaves of a batch by dotted path, B instructions, "" if there is none).

        Example i is frame t[i] of episodes[which[i]]; draws: float [B, goals.DRAWS]. dropout: drop
        conditioning and vary the wording of instructions, as in training.
        """
        d = self._config
        length = np.array([len(e.episode) for e in episodes])[which]
        texts = [
            self._wording(episodes[j].episode.instructions[s], row, dropout)
            for j, s, row in zip(which.tolist(), t.tolist(), draws, strict=True)
        ]
        number = np.array([e.source.tasks[e.number] for e in episodes])[which]
        has_task = np.array([e.source.has_task[e.number] for e in episodes])[which]
        has_image = [any(c in e.episode.images for c in d.cameras) for e in episodes]
        task = goals.choose(
            draws,
            t,
            length,
            strategy=d.goal,
            keep_language=d.keep_language if dropout else 1.0,
            keep_goal=d.keep_goal if dropout else 1.0,
            keep_task_id=d.keep_task_id if dropout else 1.0,
            has_language=np.array([bool(x) for x in texts]),
            has_goal=np.array(has_image)[which],
            has_task_id=has_task & d.task_ids,
        )
        end = np.where(task.goal, task.step, length)
        steps, in_episode = windows.window_steps(t, d.window)
        chunk, valid = windows.chunk_steps(t, d.window, d.horizon, length, end)
        widths = np.array([e.episode.action.shape[-1] for e in episodes])[which]
        dims = np.arange(self._action_dim) < widths[:, None]
        leaves = {
            "observation.timestep_mask": in_episode,
            "action": _gather(
                [e.episode.action for e in episodes], which, chunk, self._action_dim, steps
            ),
            "action_mask": valid[..., None] & dims[:, None, None],
            "dataset": np.array([e.source.number for e in episodes], np.int32)[which],
            "embodiment": np.array([e.source.record for e in episodes], np.int32)[which],
            "task.present.language": task.language,
            "task.task_id": number.astype(np.int32),
            "task.present.task_id": task.task_id,
        }
        if d.use_proprio and self._proprio_dim:
            proprio = [e.episode.proprio for e in episodes]
            present = np.array([x is not None for x in proprio])[which]
            leaves["observation.proprio"] = _gather(proprio, which, steps, self._proprio_dim)
            leaves["observation.present.proprio"] = np.repeat(present[:, None], d.window, 1)
        for camera in d.cameras:
            leaves |= self._images(camera, episodes, which, steps, task)
        for camera in d.depth:
            leaves |= self._depth_images(camera, episodes, which, steps)
        texts = [x if keep else "" for x, keep in zip(texts, task.language, strict=True)]
        return leaves, texts

    def _wording(self, instruction: str | Sequence[str], draws: np.ndarray, train: bool) -> str:
        """Return one of a step's instructions or its paraphrases; without `train` the first."""
        options = [instruction] if isinstance(instruction, str) else list(instruction)
        options = list(dict.fromkeys(filter(None, (x.strip() for x in options))))
        if not options:
            return ""
        if not train:
            return options[0]
        text = options[int(draws[goals.WORDING] * len(options))]
        wordings = (text, *self.paraphrases.get(text, ()))
        return wordings[int(draws[goals.PARAPHRASE] * len(wordings))]

    def _images(
        self,
        camera: str,
        episodes: Sequence[EpisodeRef],
        which: np.ndarray,
        steps: np.ndarray,
        task: goals.TaskChoice,
    ) -> dict[str, np.ndarray]:
        """Return the leaves of a camera, window and goal; each distinct image is decoded once."""
        d, key, window = self._config, f"image_{camera}", steps.shape[1]
        has_camera = np.array([camera in e.episode.images for e in episodes])[which]
        present = np.repeat(has_camera[:, None], window, 1)
        leaves: dict[str, np.ndarray] = {f"observation.present.{key}": present}
        image_steps = steps
        if d.goal != "none":
            leaves[f"task.present.{key}"] = has_goal = has_camera & task.goal
            image_steps = np.concatenate([steps, task.step[:, None]], axis=1)
            present = np.concatenate([present, has_goal[:, None]], axis=1)
        # One number per (episode, step), −1 for an absent image.
        longest = max(len(e.episode) for e in episodes)
        numbers = np.where(present, which[:, None] * longest + image_steps, -1)
        distinct, inverse = np.unique(numbers, return_inverse=True)
        frames = [divmod(n, longest) for n in distinct.tolist() if n >= 0]
        pixels = self._pixels(camera, episodes, frames)
        if len(frames) < len(distinct):
            black = np.zeros((1, *pixels.shape[1:]), pixels.dtype)
            pixels = np.concatenate([black, pixels])
        inverse = inverse.reshape(numbers.shape)
        leaves[f"observation.{key}"] = pixels[inverse[:, :window]]
        if d.goal != "none":
            leaves[f"task.{key}"] = pixels[inverse[:, window]]
        return leaves

    def _depth_images(
        self, camera: str, episodes: Sequence[EpisodeRef], which: np.ndarray, steps: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the leaves of a depth camera, in metres; 0 if it is absent."""
        side, key = self._config.depth[camera], f"depth_{camera}"
        has_depth = np.array([camera in e.episode.depth for e in episodes])[which]
        metres = np.zeros((*steps.shape, side, side, 1), np.float32)
        decoded: dict[tuple[int, int], np.ndarray] = {}
        for i, j in enumerate(which.tolist()):
            for w, s in enumerate(steps[i].tolist() if has_depth[i] else ()):
                if (j, s) not in decoded:
                    decoded[j, s] = self._depth(camera, episodes[j], s, side)
                metres[i, w] = decoded[j, s]
        present = np.repeat(has_depth[:, None], steps.shape[1], 1)
        return {f"observation.{key}": metres, f"observation.present.{key}": present}

    def _depth(self, camera: str, ref: EpisodeRef, step: int, side: int) -> np.ndarray:
        unit = ref.source.spec.depth_unit
        try:
            return decode.decode_depth(ref.episode.depth[camera][step], side) * unit
        except tf.errors.OpError as error:
            raise DataError(
                f"{ref.source.spec.name}: {ref.source.name_of(ref.number)}: depth of "
                f"{camera}, step {step}, cannot be decoded: {error_summary(error)}"
            ) from None

    def _pixels(
        self, camera: str, episodes: Sequence[EpisodeRef], frames: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        """Return uint8 [N, side, side, 3] of (episode, step) frames."""
        side = self._config.cameras[camera]
        result = np.zeros((len(frames), side, side, 3), np.uint8)
        encoded = [episodes[j].episode.images[camera][s] for j, s in frames]
        bgr = np.array([camera in episodes[j].source.spec.bgr for j, _ in frames], bool)
        for swapped in np.unique(bgr).tolist():
            indices = np.flatnonzero(bgr == swapped)
            images = tf.constant([encoded[i] for i in indices.tolist()], tf.string)
            try:
                pixels = self._decode[side, swapped](images).numpy()
            except tf.errors.OpError as error:
                raise self._decoding_error(camera, episodes, frames, encoded, error) from None
            if len(indices) == len(frames):
                return pixels
            result[indices] = pixels
        return result

    def _decoding_error(
        self,
        camera: str,
        episodes: Sequence[EpisodeRef],
        frames: Sequence[tuple[int, int]],
        encoded: Sequence[bytes],
        error: tf.errors.OpError,
    ) -> DataError:
        """Return the error that names the first image that cannot be decoded."""
        for (j, step), image in zip(frames, encoded, strict=True):
            try:
                decode.check_image(image)
            except tf.errors.OpError as fault:
                ref = episodes[j]
                return DataError(
                    f"{ref.source.spec.name}: {ref.source.name_of(ref.number)}: {camera} "
                    f"image of step {step} cannot be decoded: {error_summary(fault)}"
                )
        return DataError(f"{camera} images could not be decoded: {error_summary(error)}")


def _gather(
    values: Sequence[np.ndarray | None],
    which: np.ndarray,
    steps: np.ndarray,
    width: int,
    chunk_starts: np.ndarray | None = None,
) -> np.ndarray:
    """Return float32 [*steps.shape, width]: values[which[i]][steps[i]], padded with 0.

    Values [T, H, n] are chunks already, of which those at chunk_starts[i] are taken.
    """
    result = np.zeros((*steps.shape, width), np.float32)
    for i, j in enumerate(which.tolist()):
        x = values[j]
        if x is not None:
            index = chunk_starts if x.ndim == 3 and chunk_starts is not None else steps
            result[i, ..., : x.shape[-1]] = x[index[i]]
    return result
