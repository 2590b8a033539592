"""ServeOptions: every option of `octolike serve`, once."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octolike.config.components import check_fields, default_of, option
from octolike.errors import ConfigError

KEY_VARIABLE = "OCTOLIKE_KEY"
MIN_KEY = 16
ON_LIMIT = ("refuse", "clip")


@dataclass(kw_only=True, frozen=True)
class ServeOptions:
    """The settings of a server; they are not part of a run."""

    host: str = option("127.0.0.1", "address to listen at; another one than loopback needs a key")
    port: int = option(8000, "port; 0: a free one, which is printed", low=0, high=65535)
    key_file: str = option(
        "", f"file that holds the clients' key; '': the variable {KEY_VARIABLE}, or no key"
    )
    certificate: str = option("", "file of the TLS certificate (PEM); '': no TLS")
    private_key: str = option("", "file of the certificate's private key (PEM)")
    batch_sizes: tuple[int, ...] = option(
        (1, 4, 16), "observations per compiled call; requests are padded to the next size", low=1
    )
    batch_wait_ms: float = option(
        5.0, "longest wait for other robots' requests, at most a quarter of a call's time", low=0
    )
    queue: int = option(64, "requests that may wait; further ones are answered 'busy'", low=1)
    clients: int = option(256, "open connections; then the one idle for longest is closed", low=1)
    message_mb: int = option(16, "largest message in MiB", low=1, high=1024)
    send_seconds: float = option(
        10.0, "a client that takes longer to read a reply is disconnected", low=0.1
    )
    drain_seconds: float = option(
        30.0, "time to finish running requests after SIGTERM or Ctrl-C", low=0
    )
    reload_seconds: float = option(
        0.0, "how often to look for a newer checkpoint of the run; 0: never", low=0
    )
    keys: dict[str, str] = option(
        dict,
        "{key of the policy: key of the client's observation, or several joined by '+'}, e.g. "
        "image_primary=observation/image",
    )
    history: str = option(
        "none",
        "single observations of openpi clients: 'none', or 'server' to link those of one "
        "connection as consecutive control steps (right if the client asks at every step)",
        choices=("none", "server"),
    )
    seed: int = option(
        0, "of the noise of clients that send no seed of their own", low=0, high=2**32 - 1
    )
    execute: int = option(
        0, "vla-eval: actions of each chunk to execute; 0: the run's evaluate.execute", low=0
    )
    cameras: dict[str, str] = option(
        dict, "vla-eval: {camera of the policy: camera of the benchmark}; {}: those known by name"
    )
    limit_range: float = option(
        -1.0,
        "actions must lie within the recorded range, widened by this share of it; -1: anywhere",
        low=-1,
    )
    limit_step: float = option(
        -1.0,
        "targets of consecutive actions must differ by at most this share of the recorded range; "
        "-1: by anything",
        low=-1,
    )
    limits: str = option(
        "", "JSON file with limits per dimension, {name: {'low':, 'high':, 'step':}}"
    )
    on_limit: str = option(
        "refuse", "for actions beyond a limit: answer with an error, or clip", choices=ON_LIMIT
    )

    def check(self) -> None:
        """Raise ConfigError for values that are not allowed, alone or together."""
        check_fields(self)
        if not self.batch_sizes:
            raise ConfigError("batch_sizes is empty; give at least one, e.g. 1")
        if bool(self.certificate) != bool(self.private_key):
            raise ConfigError("TLS needs both --certificate and --private_key")
        self.tls()
        if not self.key() and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} is reachable from other machines, and there is no key: put one "
                f"of at least {MIN_KEY} characters into a file (--key_file) or {KEY_VARIABLE}, or "
                "listen at 127.0.0.1 and use an SSH tunnel"
            )

    def key(self) -> str:
        """Return the clients' key; '' for none. ConfigError if it is unreadable or too short."""
        text, source = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
        if self.key_file:
            path = Path(self.key_file)
            try:
                text, source = path.read_text(encoding="utf-8"), str(path)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"key_file {path} cannot be read: {error}") from error
            if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                raise ConfigError(f"key_file {path} is readable by others; run: chmod 600 {path}")
        text = text.strip()
        if (self.key_file or text) and len(text) < MIN_KEY:
            raise ConfigError(
                f"the key in {source} has {len(text)} characters; expected at least {MIN_KEY}, "
                "e.g. from: openssl rand -hex 32"
            )
        if not text.isascii():
            raise ConfigError(f"the key in {source} must be ASCII")
        return text

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS settings; None for none."""
        if not self.certificate:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.private_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate {self.certificate} with the key {self.private_key} cannot be "
                f"loaded: {error}"
            ) from error
        return context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an argument per option."""
    for f in dataclasses.fields(ServeOptions):
        default = default_of(f)
        text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        note = f" (default: {text})" if text not in ("", {}) else ""
        kind: dict[str, Any] = {"type": type(default), "metavar": type(default).__name__.upper()}
        if isinstance(default, dict):
            kind = {"action": "append", "metavar": "KEY=VALUE", "default": []}
        elif isinstance(default, tuple):
            kind = {"type": str, "metavar": "N,N,…"}
        help_text = f"{f.metadata['meaning']}{note}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", **{"default": text, **kind}, help=help_text)


def from_arguments(args: argparse.Namespace) -> ServeOptions:
    """Return the options of parsed arguments; ConfigError for a value that cannot be read."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(ServeOptions):
        default, value = default_of(f), getattr(args, f.name)
        if isinstance(default, dict):
            pairs = [text.partition("=") for text in value]
            if bad := [key for key, equals, text in pairs if not (key and equals and text)]:
                raise ConfigError(f"--{f.name} {bad[0]}: expected KEY=VALUE")
            value = {key: text for key, _, text in pairs}
        elif isinstance(default, tuple):
            try:
                value = tuple(int(text) for text in str(value).split(",") if text)
            except ValueError as error:
                raise ConfigError(f"--{f.name} {value}: expected integers, N,N,…") from error
        values[f.name] = value
    return ServeOptions(**values)


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
