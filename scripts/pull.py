"""Pull a run that was pushed: every file is checked, and no code of it is executed.

    octolike pull hf://OWNER/NAME@REVISION runs/NAME
    octolike pull gs://BUCKET/NAME@REVISION runs/NAME

Expect the location with its revision. Without @REVISION the newest content is taken: pin the
revision that a robot runs.
"""

import argparse
import sys


def main() -> None:
    """Pull; an expected error is one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="hf://OWNER/NAME@REVISION, or a directory, with @REVISION")
    parser.add_argument("directory", help="new directory for the run")
    args = parser.parse_args()
    from octolike.hub import transfer

    try:
        print(transfer.pull(args.source, args.directory))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
