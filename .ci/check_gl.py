"""Check that EGL or OSMesa can be loaded; with Python alone, before anything is installed."""

import ctypes
import sys

LIBRARIES = ("libEGL.so.1", "libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")


def main() -> None:
    """Exit with one line if Linux has neither library."""
    if not sys.platform.startswith("linux"):
        return
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return
    sys.exit(
        "error: rendering the simulator needs EGL or OSMesa, and neither is installed; on Debian "
        "or Ubuntu: apt install libosmesa6"
    )


if __name__ == "__main__":
    main()
