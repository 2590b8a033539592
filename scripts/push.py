"""Push a run with one checkpoint and a model card to a hub repository, a bucket or a directory.

    octolike push RUN hf://OWNER/NAME              log in before: hf auth login
    octolike push RUN gs://BUCKET/NAME --step 2000
    octolike push RUN /media/stick/NAME

Expect the location with its revision, which octolike pull takes. The card (README.md) states the
data, the robot's conventions and the success rates with intervals, as the run's files have them.
"""

import argparse
import sys


def main() -> None:
    """Push; an expected error is one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="directory of the run")
    parser.add_argument("target", help="hf://OWNER/NAME, or a directory that is absent or empty")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--message", default="", help="of the hub's commit")
    parser.add_argument("--license", default="", help="for the card, e.g. mit")
    parser.add_argument("--public", action="store_true", help="create a public repository")
    parser.add_argument(
        "--with_optimizer", action="store_true", help="also what resuming the training needs"
    )
    args = vars(parser.parse_args())
    from octolike.hub import transfer

    try:
        print(transfer.push(args.pop("run"), args.pop("target"), **args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
