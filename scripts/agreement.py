"""Compare vla-eval's results of a served policy with octolike's own, episode by episode.

    octolike agreement RUN results/libero_aggregate.json

RUN was evaluated by octolike evaluate and served to vla-eval (docs/libero.md). Expect the successes
of both per task, the number of episodes with equal ends, and the difference with its interval. The
exit code is 1 if the difference is more than chance.
"""

import argparse
import sys


def main() -> None:
    """Print the table; an expected error is one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="directory of the run, or RUN/evaluation/ROBOT")
    parser.add_argument("aggregates", metavar="AGGREGATE", nargs="+", help="vla-eval's JSON files")
    args = parser.parse_args()
    from octolike.evaluation import harness_agreement

    try:
        agreement = harness_agreement.compare(args.run, args.aggregates)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(agreement.text())
    sys.exit(0 if agreement.holds else 1)


if __name__ == "__main__":
    main()
