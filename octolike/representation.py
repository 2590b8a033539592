"""The form in which actions are learned: invertible transforms of an action chunk.

A representation is a text, config.data.representation:

    as_stored            the actions of the dataset spec
    relative             targets relative to the robot's current state, for the whole chunk
    delta                changes: each target relative to the one before, the first to the state
    absolute             targets: the state plus the sum of the changes

and, after it,

    tool_frame           poses relative in the frame of the tool (SE(3)), not of the base
    rotation_6d          the first two columns of the rotation matrix in place of Euler angles

An action dimension and the proprio dimension of its state share their name, `d` before a change
aside: (x, dx), (joint_0, joint_0). The six dimensions x y z roll pitch yaw, with any prefix, are a
pose; its rotation is Rz(yaw) Ry(pitch) Rx(roll) in radians. Grippers, unnormalised dimensions, and
dimensions without a state are learned as stored.

`encode` runs on numpy arrays and on TensorFlow's (xp=tf.experimental.numpy); `decode`, its inverse,
on numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from octolike.config.schema import REPRESENTATION_FLAGS as FLAGS
from octolike.config.schema import REPRESENTATIONS as MODES

AXES = ("x", "y", "z", "roll", "pitch", "yaw")
KEPT = ("gripper", "finger")  # dimensions that are learned as stored


class Block(NamedTuple):
    """Action dimensions that are transformed together: one vector, or the six of a pose.

    state: dimensions of proprio, in the same order; None if they are not needed.
    """

    dims: tuple[int, ...]
    state: tuple[int, ...] | None
    is_change: bool
    is_pose: bool


class Transform(Protocol):
    """A transform of the rows of one robot: of action chunks, or of proprio."""

    names: tuple[str, ...]

    def encode(self, x: Any, state: Any, xp: Any) -> Any:
        """Return rows as the network's; state: proprio in robot units."""


class Representation:
    """The transform of one robot's action chunks.

    Attributes:
        text: as in the config.
        names: names of the learned dimensions.
        source: for each learned dimension, the action dimension that it comes from; of a rotation
            in six dimensions, the first of its angles.
        absolute: bool per learned dimension, as in Layout.
        needs_state: encode and decode need the robot's proprio.
        stored: names of the action dimensions that are learned as stored.
        angles: the action dimensions that are the angles of a pose.
    """

    def __init__(
        self,
        text: str,
        names: Sequence[str],
        absolute: Sequence[bool],
        normalized: Sequence[bool],
        state_names: Sequence[str] = (),
    ) -> None:
        """Plan the transform.

        Args:
            text: the representation.
            names: names of the action dimensions.
            absolute: bool per action dimension, as in Layout.
            normalized: bool per action dimension, as in Layout.
            state_names: names of the proprio dimensions.

        Raises:
            ValueError: the text is not a representation, or does not apply to these dimensions.
        """
        self.text, self._width = text, len(names)
        self._mode, self._tool, self._six = parse(text)
        self._blocks = self._plan(names, absolute, normalized, state_names)
        moved = [d for block in self._blocks for d in block.dims]
        self._kept = [d for d in range(self._width) if d not in moved]
        self.stored = tuple(names[d] for d in self._kept)
        already = {"delta": False, "absolute": True}.get(self._mode)
        pending = [d for d in range(self._width) if normalized[d] and absolute[d] != already]
        if not moved and pending and self._mode != "as_stored":
            raise ValueError(
                f"representation {text!r} does not apply: no action of {', '.join(names)} has its "
                f"state among the proprio {', '.join(state_names) or '(none)'}; they must share "
                "their names (dx and x)"
            )
        if self._six and not any(block.is_pose for block in self._blocks):
            raise ValueError(
                f"representation {text!r} needs roll, pitch and yaw; the actions are "
                f"{', '.join(names)}"
            )
        self.angles = tuple(d for block in self._blocks if block.is_pose for d in block.dims[3:])
        self.needs_state = any(block.state is not None for block in self._blocks)
        self.names, self.source, self.absolute = self._describe(names, absolute)

    def encode(self, chunk: Any, state: Any = None, xp: Any = np) -> Any:
        """Return chunks [..., H, A] as learned, [..., H, A'].

        state: proprio [..., P] at the first action; xp: numpy or tf.experimental.numpy.
        """
        parts = [_take(chunk, self._kept, xp)] if self._kept else []
        for block in self._blocks:
            a = _take(chunk, block.dims, xp)
            s = None if block.state is None else _take(state, block.state, xp)[..., None, :]
            parts.append(
                self._encode_pose(a, s, block, xp)
                if block.is_pose
                else self._encode(a, s, block, xp)
            )
        joined = xp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return _take(joined, self._order, xp)

    def decode(self, learned: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Return learned chunks [..., H, A'] as actions, float32 [..., H, A]."""
        x = np.take(np.asarray(learned, np.float64), np.argsort(self._order), axis=-1)
        result = np.empty((*x.shape[:-1], self._width))
        result[..., self._kept], begin = x[..., : len(self._kept)], len(self._kept)
        for block in self._blocks:
            width = _width(block, self._six)
            y, begin = x[..., begin : begin + width], begin + width
            s = None
            if block.state is not None:
                if state is None:
                    raise ValueError(f"representation {self.text!r} needs proprio to act")
                s = np.asarray(state, np.float64)[..., None, list(block.state)]
            pose = block.is_pose
            result[..., list(block.dims)] = (
                self._decode_pose(y, s, block) if pose else self._decode(y, s, block)
            )
        return result.astype(np.float32)

    def _plan(
        self,
        names: Sequence[str],
        absolute: Sequence[bool],
        normalized: Sequence[bool],
        state_names: Sequence[str],
    ) -> list[Block]:
        states = {name: i for i, name in enumerate(state_names)}
        moving = {
            name: d
            for d, name in enumerate(names)
            if normalized[d] and not any(word in name.lower() for word in KEPT)
        }
        blocks, used = [], set()
        for dims, bare in _poses(names, absolute, moving):
            is_change = not absolute[dims[0]]
            state = tuple(states[n] for n in bare) if set(bare) <= states.keys() else None
            as_vector = self._mode in ("as_stored", "absolute") and not self._six
            as_vector |= self._mode == "delta" and is_change and not (self._tool or self._six)
            if as_vector or (state is None and self._mode != "as_stored"):
                continue
            needed = None if self._mode == "as_stored" else state
            blocks.append(Block(dims, needed, is_change, True))
            used |= set(dims)
        if self._tool and not blocks:
            raise ValueError(
                f"representation {self.text!r} needs a pose (x y z roll pitch yaw) among the "
                f"actions ({', '.join(names)}) and the proprio ({', '.join(state_names) or 'none'})"
            )
        for is_change in (False, True):
            pairs = [
                (d, states.get(_bare(name) if is_change else name))
                for name, d in moving.items()
                if d not in used and absolute[d] != is_change
            ]
            blocks += self._vector(pairs, is_change)
        return blocks

    def _vector(self, pairs: Sequence[tuple[int, int | None]], is_change: bool) -> list[Block]:
        """Return the block of dimensions that are transformed one by one, if there are any."""
        target = "delta" if is_change else "absolute"
        if self._mode in ("as_stored", target):
            return []  # they are so already
        if is_change and self._mode == "relative":  # the sum of the changes needs no state
            return [Block(tuple(d for d, _ in pairs), None, True, False)] if pairs else []
        matched = [(d, s) for d, s in pairs if s is not None]
        if not matched:
            return []
        return [Block(tuple(d for d, _ in matched), tuple(s for _, s in matched), is_change, False)]

    def _describe(
        self, names: Sequence[str], absolute: Sequence[bool]
    ) -> tuple[tuple[str, ...], tuple[int, ...], tuple[bool, ...]]:
        """Set the order of the learned dimensions; return their names, sources and absolute."""
        columns = [(d, 0, names[d], absolute[d]) for d in self._kept]
        for block in self._blocks:
            is_target = {"absolute": True, "as_stored": not block.is_change}.get(self._mode, False)
            dims = block.dims[:3] if block.is_pose and self._six else block.dims
            columns += [(d, 0, names[d], is_target) for d in dims]
            if block.is_pose and self._six:
                roll = block.dims[3]
                stem = names[roll].removesuffix("roll")
                columns += [(roll, i, f"{stem}rotation_{i}", is_target) for i in range(6)]
        order = sorted(range(len(columns)), key=lambda i: columns[i][:2])
        self._order = order
        ordered = [columns[i] for i in order]
        return (
            tuple(c[2] for c in ordered),
            tuple(c[0] for c in ordered),
            tuple(c[3] for c in ordered),
        )

    def _encode(self, a: Any, s: Any, block: Block, xp: Any) -> Any:
        if block.is_change:
            total = xp.cumsum(a, axis=-2)
            return total if s is None else total + s
        return a - (s if self._mode == "relative" else _previous(a, s, xp))

    def _decode(self, y: np.ndarray, s: np.ndarray | None, block: Block) -> np.ndarray:
        if block.is_change:
            first = np.zeros_like(y[..., :1, :]) if s is None else s
            return y - _previous(y, first, np)
        assert s is not None  # targets become relative to a state
        return y + s if self._mode == "relative" else np.cumsum(y, axis=-2) + s

    def _encode_pose(self, a: Any, s: Any, block: Block, xp: Any) -> Any:
        target = a
        if block.is_change and s is not None:
            target = xp.cumsum(a, axis=-2) + s
        position, rotation = target[..., :3], rotation_matrix(target[..., 3:], xp)
        if self._mode in ("relative", "delta"):
            reference = _previous(target, s, xp) if self._mode == "delta" else s + 0 * target
            start, frame = reference[..., :3], rotation_matrix(reference[..., 3:], xp)
            inverse = xp.swapaxes(frame, -1, -2)
            position = position - start
            if self._tool:
                position = xp.matmul(inverse, position[..., None])[..., 0]
                rotation = xp.matmul(inverse, rotation)
            else:
                rotation = xp.matmul(rotation, inverse)
        return xp.concatenate([position, _rotation_columns(rotation, self._six, xp)], axis=-1)

    def _decode_pose(self, y: np.ndarray, s: np.ndarray | None, block: Block) -> np.ndarray:
        position, rotation = y[..., :3], _rotation_from_columns(y[..., 3:], self._six)
        if self._mode in ("relative", "delta"):
            assert s is not None
            position, rotation = self._targets(position, rotation, s)
        angles = euler_angles(rotation)
        if not block.is_change or s is None:
            return np.concatenate([position, angles], axis=-1)
        previous = _previous(np.concatenate([position, angles], axis=-1), s, np)
        near = np.where(
            _distance(_other_angles(angles), previous[..., 3:])
            < _distance(angles, previous[..., 3:]),
            _other_angles(angles),
            angles,
        )
        previous = np.concatenate([previous[..., :3], _previous(near, s[..., 3:], np)], axis=-1)
        change = np.concatenate([position, near], axis=-1) - previous
        return np.concatenate([change[..., :3], _wrapped(change[..., 3:])], axis=-1)

    def _targets(
        self, position: np.ndarray, rotation: np.ndarray, s: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the absolute poses of relative ones."""
        start, frame = s[..., 0, :3], rotation_matrix(s[..., 0, 3:])
        positions, rotations = [], []
        for h in range(position.shape[-2]):
            move, turn = position[..., h, :], rotation[..., h, :, :]
            if self._tool:
                move, new = (frame @ move[..., None])[..., 0], frame @ turn
            else:
                new = turn @ frame
            positions.append(start + move)
            rotations.append(new)
            if self._mode == "delta":
                start, frame = positions[-1], new
        return np.stack(positions, axis=-2), np.stack(rotations, axis=-3)


def encode_rows(
    transforms: Sequence[Transform | None],
    widths: Sequence[tuple[int, int]],
    chunk: Any,
    proprio: Any,
    record: Any,
    xp: Any = np,
) -> Any:
    """Return the chunks of rows of several robots as learned, [n, ..., H, largest A'].

    Args:
        transforms: transforms of each robot; None for actions that are learned as stored.
        widths: (A, P) of each robot: its dimensions of action and proprio.
        chunk: [n, ..., H, largest A] in robot units, padded.
        proprio: [n, ..., largest P] in robot units, padded.
        record: int [n], the robot of each row.
        xp: numpy or tf.experimental.numpy.
    """
    if not any(transforms):
        return chunk
    pairs = list(zip(transforms, widths, strict=True))
    largest = max(len(t.names) if t else a for t, (a, _) in pairs)
    result = None
    for i, (transform, (a, p)) in enumerate(pairs):
        rows = chunk[..., :a]
        if transform:
            rows = transform.encode(rows, proprio[..., :p], xp)
        width = len(transform.names) if transform else a
        padding = [(0, 0)] * (len(chunk.shape) - 1) + [(0, largest - width)]
        rows = xp.pad(rows, padding, "constant")
        shape = [-1] + [1] * (len(chunk.shape) - 1)
        is_robot = xp.reshape(record == i, shape)
        result = rows if result is None else xp.where(is_robot, rows, result)
    return result


def parse(text: str) -> tuple[str, bool, bool]:
    """Return (mode, tool_frame, rotation_6d) of a representation; ValueError for another text."""
    mode, *flags = text.split() or [""]
    unknown = [flag for flag in flags if flag not in FLAGS or flags.count(flag) > 1]
    if mode not in MODES or unknown:
        raise ValueError(
            f"representation {text!r} is not one of {', '.join(MODES)}, followed by any of "
            f"{', '.join(FLAGS)}"
        )
    tool, six = (flag in flags for flag in FLAGS)
    if tool and mode not in ("relative", "delta"):
        raise ValueError(f"representation {text!r}: tool_frame needs 'relative' or 'delta'")
    return mode, tool, six


def rotation_matrix(angles: Any, xp: Any = np) -> Any:
    """Return Rz(yaw) Ry(pitch) Rx(roll), [..., 3, 3], of roll, pitch, yaw [..., 3]."""
    sin, cos = xp.sin(angles), xp.cos(angles)
    (sr, sp, sy), (cr, cp, cy) = ([x[..., i] for i in range(3)] for x in (sin, cos))
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def euler_angles(rotation: Any, xp: Any = np) -> Any:
    """Return roll, pitch, yaw [..., 3] of rotation matrices; pitch within ±π/2."""
    cos = xp.sqrt(rotation[..., 0, 0] ** 2 + rotation[..., 1, 0] ** 2)
    roll = xp.arctan2(rotation[..., 2, 1], rotation[..., 2, 2])
    pitch = xp.arctan2(-rotation[..., 2, 0], cos)
    yaw = xp.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return xp.stack([roll, pitch, yaw], axis=-1)


def _rotation_columns(rotation: Any, six: bool, xp: Any) -> Any:
    if not six:
        return euler_angles(rotation, xp)
    return xp.concatenate([rotation[..., :, 0], rotation[..., :, 1]], axis=-1)


def _rotation_from_columns(x: np.ndarray, six: bool) -> np.ndarray:
    """Return the rotation of Euler angles, or of two columns made orthogonal."""
    if not six:
        return np.asarray(rotation_matrix(x))
    first = x[..., :3] / np.maximum(np.linalg.norm(x[..., :3], axis=-1, keepdims=True), 1e-12)
    second = x[..., 3:] - (first * x[..., 3:]).sum(axis=-1, keepdims=True) * first
    second = second / np.maximum(np.linalg.norm(second, axis=-1, keepdims=True), 1e-12)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _poses(
    names: Sequence[str], absolute: Sequence[bool], moving: dict[str, int]
) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Return (six action dimensions, names of their state) of each pose among the actions."""
    poses = []
    for name in moving:
        for change in ("d", ""):
            stem = name.removesuffix(f"{change}roll")
            full = [f"{stem}{change}{axis}" for axis in AXES]
            if name == f"{stem}{change}roll" and set(full) <= moving.keys():
                dims = tuple(moving[n] for n in full)
                if len({absolute[d] for d in dims}) == 1:
                    poses.append((dims, tuple(f"{stem}{axis}" for axis in AXES)))
                break
    return poses


def _bare(name: str) -> str:
    """Return the name of the state that a change belongs to: x of dx, left_x of left_dx."""
    prefix, _, last = name.rpartition("_")
    start = f"{prefix}_" if prefix else ""
    return f"{start}{last[1:]}" if last.startswith("d") and last[1:] in AXES else name


def _width(block: Block, six: bool) -> int:
    return 9 if block.is_pose and six else len(block.dims)


def _take(x: Any, dims: Sequence[int], xp: Any) -> Any:
    return xp.take(x, np.array(dims, np.int32), axis=-1)


def _previous(x: Any, first: Any, xp: Any) -> Any:
    """Return x [..., H, n] moved by one step, with `first` [..., 1, n] in front."""
    return xp.concatenate([first + 0 * x[..., :1, :], x[..., :-1, :]], axis=-2)


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return angles - 2 * np.pi * np.round(angles / (2 * np.pi))


def _other_angles(angles: np.ndarray) -> np.ndarray:
    """Return the other roll, pitch, yaw of the same rotation."""
    return np.asarray(angles * np.array([1, -1, 1]) + np.pi)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(_wrapped(a - b)).sum(axis=-1, keepdims=True)
