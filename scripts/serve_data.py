"""Build batches for training processes on other machines: a worker of data.service.

    octolike serve_data --config bridge --config.data.root=DIR --port 7070
    octolike train --config bridge --config.data.service=host:7070

Use the config and the overrides of the training; only the location of the data (data.root, roots,
cache), data.threads and options outside config.data may differ. Several workers share the work:
--config.data.service="('host1:7070', 'host2:7070')". Any of them may end and come back.

Expect the table of datasets, the address, and a line with clients, batches/s and MiB/s at intervals
while there are requests. Ctrl-C or SIGTERM ends it. The connection is neither encrypted nor
authenticated: use it in trusted networks only (--host selects the network).
"""

import signal
import sys
import threading

from absl import flags

from octolike import config as configs

PORT = flags.DEFINE_integer("port", 7070, "port to listen on; 0: any free port", lower_bound=0)
HOST = flags.DEFINE_string("host", "0.0.0.0", "address to listen on; default: all networks")
EVERY = flags.DEFINE_integer("every", 30, "seconds between progress lines", lower_bound=1)


def main(config: configs.Config) -> None:
    """Serve until a signal; report data errors in one line, without a traceback."""
    from octolike import errors
    from octolike.data.service import worker

    ended = threading.Event()
    try:
        server = worker.serve(config, HOST.value, PORT.value)
    except (configs.ConfigError, errors.DataError) as error:
        sys.exit(f"error: {error}")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: ended.set())
    print(server.description)
    print(f"serving on {HOST.value}:{server.port}", flush=True)
    while not ended.wait(EVERY.value):
        line = server.progress()
        if line:
            print(line, flush=True)
    server.stop()
    print("ended")


if __name__ == "__main__":
    configs.run(main)
