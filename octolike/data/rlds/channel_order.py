"""The order of red and blue of a dataset's images, read off the files on disk.

The raw releases of the datasets with bgr cameras are PNG with blue first. Their public copies by
prepare_open_x are JPEG, and their channels are swapped already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from octolike.data.specs.spec import DatasetSpec

JPEG = b"\xff\xd8"  # the first bytes of a JPEG image


class ChannelOrder:
    """Which cameras of a dataset store blue first."""

    def __init__(
        self, spec: DatasetSpec, setting: str, encodings: Callable[[], Mapping[str, bytes]]
    ) -> None:
        """Decide by a setting or by the encoding of the images.

        setting: "rgb" or "bgr", of all these cameras; "spec": as in the spec; "": by
        `encodings`, which returns the first bytes of an image of each camera in spec.bgr.
        """
        self._spec, self._setting, self._read = spec, setting, encodings

    @cached_property
    def swapped(self) -> tuple[str, ...]:
        """The cameras with red and blue to be swapped."""
        spec = self._spec
        if self._setting == "spec":
            return spec.bgr
        if self._setting:
            return (spec.bgr or tuple(spec.cameras)) if self._setting == "bgr" else ()
        return tuple(c for c in spec.bgr if not self._encodings[c].startswith(JPEG))

    def describe(self) -> str:
        """Return a line on the order if the dataset has bgr cameras or a setting; else ""."""
        name = self._spec.name
        if not self._spec.bgr and self._setting in ("", "spec"):
            return ""
        cameras = ", ".join(self.swapped) or "no camera"
        reason = f"data.channel_orders.{name}={self._setting}"
        if not self._setting:
            formats = ", ".join(
                f"{c} is {'JPEG, so already swapped' if x.startswith(JPEG) else 'not JPEG, so raw'}"
                for c, x in self._encodings.items()
            )
            reason = f"{formats}; to override, set data.channel_orders.{name}"
        return f"red and blue of {name}: {cameras} swapped ({reason})"

    @cached_property
    def _encodings(self) -> Mapping[str, bytes]:
        return self._read()
