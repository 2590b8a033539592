"""Off-screen rendering with MuJoCo: the import with a working backend, and the renderer."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import weakref
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

MAX_SIZE = 640  # pixels; of the render buffer in each direction
_BACKENDS = ("egl", "osmesa")
_PACKAGES = {"egl": "libegl1 libgl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}
_VERSIONS = (3, 3), (4, 0)  # of mujoco: first supported, first unsupported; as in pyproject.toml


@functools.cache
def load_mujoco() -> tuple[ModuleType, type]:
    """Return the mujoco module and a GL context class that renders off screen on this machine.

    MUJOCO_GL selects egl or osmesa. Without it, each is tried in a child process, because a failed
    backend leaves PyOpenGL unusable. The window backend is never used on Linux: without a display
    it aborts the process.

    Raises:
        ImportError: mujoco is missing or has an unsupported version, or no backend can render.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise ImportError("the tabletop simulator needs mujoco: pip install 'octolike[sim]'")
    _check_version(metadata.version("mujoco"))
    backend = os.environ.get("MUJOCO_GL", "")
    if sys.platform.startswith("linux") and backend not in _BACKENDS:
        backend = _find_backend()
        os.environ["MUJOCO_GL"] = backend  # worker processes need not search again
    try:
        import mujoco

        # By default MuJoCo writes a log file into the current directory. The environments read
        # MjData.warning instead.
        mujoco.set_mju_user_warning(lambda message: None)
        if backend in _BACKENDS:  # also if mujoco was first imported with another backend
            return mujoco, importlib.import_module(f"mujoco.{backend}").GLContext
        return mujoco, mujoco.GLContext
    except Exception as error:  # PyOpenGL raises AttributeError and others for a missing library
        raise ImportError(_backend_error(backend)) from error


def zoom_camera(model: Any, camera: str, zoom: float) -> None:
    """Enlarge the middle of a camera's images by a factor; 1 changes nothing."""
    if zoom != 1:
        view = model.camera(camera).fovy  # degrees, of the whole image
        view[0] = 2 * np.degrees(np.arctan(np.tan(np.radians(view[0]) / 2) / zoom))


class OffscreenRenderer:
    """Renders a scene with flat light: no shadows, reflections or antialiasing.

    The scene has `mujoco`, `gl_context` (both from `load_mujoco`), `model` and `data`.
    """

    def __init__(self, scene: Any) -> None:
        self._scene, self._mujoco = scene, scene.mujoco
        model, mujoco = scene.model, scene.mujoco
        try:
            self._gl = scene.gl_context(MAX_SIZE, MAX_SIZE)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:  # each backend raises its own exceptions
            raise RuntimeError(_backend_error(os.environ.get("MUJOCO_GL", ""))) from error
        # At interpreter exit, PyOpenGL may be unloaded before this object; finalize runs earlier.
        self._free = weakref.finalize(self, _free, self._context, self._gl)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._view = mujoco.MjvScene(model, maxgeom=500)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            self._view.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, camera: str, height: int, width: int) -> np.ndarray:
        """Return the image of the model's camera of that name: uint8 [height, width, 3]."""
        mujoco, scene = self._mujoco, self._scene
        self._gl.make_current()
        self._camera.fixedcamid = scene.model.camera(camera).id
        mujoco.mjv_updateScene(
            scene.model,
            scene.data,
            self._options,
            None,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._view,
        )
        image = np.empty((height, width, 3), np.uint8)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._view, self._context)
        mujoco.mjr_readPixels(image, None, viewport, self._context)
        return image[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the render context; also done automatically when the object or process ends."""
        self._free()


def _free(context: Any, gl: Any) -> None:
    gl.make_current()
    context.free()
    gl.free()


def _check_version(version: str) -> None:
    low, high = _VERSIONS
    parts = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not low <= parts < high:
        first, end = (".".join(map(str, limit)) for limit in (low, high))
        raise ImportError(
            f"the tabletop simulator needs mujoco {first} or later, before {end}: found "
            f"{version}; pip install 'octolike[sim]'"
        )


def _find_backend() -> str:
    code = "import mujoco; c = mujoco.GLContext(8, 8); c.make_current(); c.free()"
    for backend in _BACKENDS:
        variables = {**os.environ, "MUJOCO_GL": backend}
        result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
        if result.returncode == 0:
            return backend
    raise ImportError(_backend_error(" and ".join(_BACKENDS)))


def _backend_error(backends: str) -> str:
    packages = _PACKAGES.get(backends, f"{_PACKAGES['osmesa']} (or: {_PACKAGES['egl']})")
    return (
        f"MuJoCo cannot render off screen with {backends or 'its default backend'}: "
        f"apt-get install {packages}"
    )
