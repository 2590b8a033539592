"""Verify a run: compare every file with the checksums that training wrote.

    octolike verify RUN             checkpoints, config, embodiment records, spec files, results
    octolike verify RUN --accept    accept the config and records as they are now, after an edit

Expect a table with a line per part of the run: intact, not verified (written by an older version),
or FAULTY with the files. The exit code is 1 if something is faulty. No code of the run is executed.
"""

import argparse
import sys


def main() -> None:
    """Verify, or accept; expected errors are one line without a traceback."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="directory of the run")
    parser.add_argument(
        "--accept", action="store_true", help="write the manifest of its files anew"
    )
    args = parser.parse_args()
    from octolike import files
    from octolike.train import run_manifest, verify

    try:
        if args.accept:
            changed = run_manifest.accept(files.as_path(args.run))
            print(f"accepted: {', '.join(changed) or 'nothing had changed'}")
        findings = verify.verify_run(args.run)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {files.with_remedy(error)}")
    print(verify.table(findings))
    sys.exit(1 if any(f.state == verify.FAULTY for f in findings) else 0)


if __name__ == "__main__":
    main()
