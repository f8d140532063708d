r"""Accuracy of PTQ and QAT at 8 and at 4 bits, on a depthwise and on a residual network.

    python examples/qat_accuracy.py --jobs 2 --output runs/qat_accuracy.json
    python examples/qat_accuracy.py --table-only --output runs/qat_accuracy.json
    python examples/qat_accuracy.py --smoke --output runs/smoke.json

The images are the 1,797 handwritten digits of scikit-learn at 32x32. In each of three seeds five
networks are trained, each is tested on a fifth of the images that it has not seen, and so every
image is tested once per seed and row. Each result is written when it is there; the same command
goes on after an interrupt. The recipe was developed on other folds than those reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from qat_accuracy_models import NETWORKS
from qat_accuracy_tables import tables
from qat_accuracy_training import Settings, measure
from tqdm import tqdm

from pytorch_quant.files import written_aside

SMOKE = Settings(seeds=1, folds=2, epochs=1, qat_epochs=1, images=320)
Cell = tuple[str, int, int]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/qat_accuracy.json"), metavar="PATH")
    add("--jobs", type=int, default=1, help="processes, each with one thread")
    add("--smoke", action="store_true", help="a few seconds; the numbers mean nothing")
    add("--table-only", action="store_true", help="print what the file holds")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.table_only and not args.output.exists():
        parser.error(f"--output: {args.output} does not exist")
    return args


def load(path: Path, settings: Settings) -> dict[str, Any]:
    """The results of an earlier run, or none.

    Raises:
        SystemExit: the file is of something else.
    """
    wanted = {"settings": asdict(settings), "cells": {}}
    if not path.exists():
        return wanted
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path} is no file of results: {error}") from error
    found = held.get("settings") if isinstance(held, dict) else None
    if found != wanted["settings"]:
        raise SystemExit(
            f"error: {path} holds results with the settings {found}, not {wanted['settings']}; "
            "give another --output, or --smoke as in that run"
        )
    return held


def outcomes(
    cells: list[Cell], settings: Settings, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measure the cells, and give each as it is ready."""
    if jobs == 1:
        for cell in cells:
            yield cell, measure(*cell, settings)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        futures = {pool.submit(measure, *cell, settings): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, then print the tables; returns the exit code."""
    args = parse(argv)
    settings = SMOKE if args.smoke else Settings()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = load(args.output, settings)
    cells = [
        (network, seed, fold)
        for seed in settings.numbers
        for fold in range(settings.folds)
        for network in NETWORKS
    ]
    missing = [cell for cell in cells if _key(cell) not in results["cells"]]
    if missing and not args.table_only:
        results["torch"] = torch.__version__
        done = len(cells) - len(missing)
        with tqdm(total=len(cells), initial=done, desc="networks trained") as bar:
            for cell, outcome in outcomes(missing, settings, args.jobs):
                results["cells"][_key(cell)] = outcome
                with written_aside(args.output) as aside:
                    aside.write_text(json.dumps(results))
                bar.update()
        missing = []
    if missing:
        print(f"{len(missing)} of {len(cells)} networks are missing; the tables are preliminary\n")
    print(tables(results, settings))
    return 0


def _key(cell: Cell) -> str:
    return "/".join(map(str, cell))


if __name__ == "__main__":
    sys.exit(main())
