"""The command line of the analyses; see `fastmerge.analysis`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmerge import analysis
from fastmerge.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one analysis; returns the exit code (2: bad input)."""
    parser = argparse.ArgumentParser(
        prog="fastmerge.analysis",
        description=analysis.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("interpolate", "embeddings"))
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the PNG and the CSV (figures)")
    parser.add_argument("--points", type=int, default=11, help="interpolate: how many weights from 0 to 1 (11)")
    parser.add_argument("--classes", type=int, default=3, help="embeddings: how many classes of the first task (3)")
    own, rest = parser.parse_known_args(argv)
    try:
        from fastmerge.config import parse
        from fastmerge.setup import Setup

        if own.points < 2 or own.classes < 1:
            raise UserError(f"--points {own.points} --classes {own.classes}: expected at least 2 points and 1 class")
        setup = Setup(parse(rest))
        if len(setup.scenario.tasks) < 2:
            raise UserError("--tasks 1: an analysis compares the models of two tasks; choose at least 2")
        try:
            own.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {own.out}: cannot write there ({error}); choose another folder") from None
        if own.what == "interpolate":
            from fastmerge.analysis.interpolate import interpolate

            paths = interpolate(setup, own.points, own.out)
        else:
            from fastmerge.analysis.embeddings import embeddings

            paths = embeddings(setup, own.classes, own.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
