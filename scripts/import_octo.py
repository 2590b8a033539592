"""Import a checkpoint of the original Octo as an ordinary run directory.

    octolike import_octo --source CKPT_DIR --target runs/octo-small
    ... --text_encoder DIR_OR_HUB_ID    tokenizer (and weights, if the checkpoint has none)
    ... --text_encoder FILE.npz         instructions and their vectors, if Octo embedded them
    ... --step N                        of the checkpoint; default: the newest
    ... --golden DIR                    compare with Octo's outputs: octo_import/golden.py

Expect the parts of the model with their parameter counts, notes on settings that the checkpoint
does not state, and with --golden a table of differences; exit code 1 if one exceeds 1e-4, or if a
sampling chain differs by more than float32's rounding explains. Then use
Policy.load("runs/octo-small"), or finetune with --config.train.init_from=runs/octo-small.
"""

import argparse
import sys


def main() -> None:
    """Import, print notes, compare; expected errors are one line without a traceback."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="directory written by save_pretrained")
    parser.add_argument("--target", required=True, help="run directory to write")
    parser.add_argument("--text_encoder", default="", help="directory, hub id or .npz")
    parser.add_argument("--step", type=int, help="step to import; default: the newest")
    parser.add_argument("--golden", help="directory with inputs.npz and outputs.npz")
    options = parser.parse_args()

    from octolike.octo_import import golden, importer
    from octolike.train import state

    try:
        imported = importer.import_checkpoint(
            options.source, options.target, text_encoder=options.text_encoder, step=options.step
        )
        print(state.summarize_params(imported.run.params, ()))
        for note in imported.notes:
            print(f"note: {note}")
        print(f"step {imported.run.step} of {options.source} is now {options.target}")
        if options.golden:
            rows = golden.compare(imported, options.golden)
            print(golden.table(rows))
            sys.exit(0 if all(row.good for row in rows) else 1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
