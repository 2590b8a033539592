"""Serve a trained policy to robots: openpi's and vla-eval's protocols on one port.

    octolike serve RUN
    octolike serve RUN --host 0.0.0.0 --key_file key --certificate cert.pem --private_key key.pem
    octolike serve RUN --reload_seconds 30            follow the newest checkpoint of a training run

Expect a line "ready after …" once everything is compiled; SIGTERM and Ctrl-C finish the running
requests. docs/serving.md describes clients, messages, limits and monitoring.
"""

import argparse
import asyncio
import os
import sys
import threading

from octolike.policy.serving.options import add_arguments, from_arguments


def main() -> None:
    """Load the policy and serve it; an expected error is one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="directory of the run")
    parser.add_argument("--embodiment", help="robot; required if the run has several")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument(
        "--plugins", action="append", default=[], help="plug-in of the run that may be executed"
    )
    add_arguments(parser)
    args = parser.parse_args()
    try:
        serve(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    options = from_arguments(args)
    options.check()  # before the policy is loaded, which takes seconds

    from octolike.policy import Policy
    from octolike.policy.serving.reload import CheckpointWatcher
    from octolike.policy.serving.server import PolicyServer

    sizes = options.batch_sizes
    policy = Policy.load(args.run, args.embodiment, args.step, sizes, args.plugins)
    watcher = CheckpointWatcher(args.run, args.plugins)
    server = PolicyServer(policy, options, watcher, lambda line: print(line, flush=True))
    for line in server.describe():
        print(line, flush=True)
    asyncio.run(server.run())
    _leave_hung_inference()


def _leave_hung_inference() -> None:
    """End the process with 1 if a call of the policy outlasts --drain_seconds."""
    for thread in threading.enumerate():
        if thread.name.startswith("octolike-inference"):
            thread.join(1)
            if thread.is_alive():
                print("inference did not end in time; the process ends without it", flush=True)
                sys.stderr.flush()
                os._exit(1)


if __name__ == "__main__":
    main()
