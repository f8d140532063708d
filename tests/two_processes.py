"""Runs a program in two processes and collects what each of them saved."""

import os
import subprocess
import sys

import torch


def run_two(program, arguments, folder, seconds):
    """The contents of `result0` and `result1` in `folder`.

    Args:
        program: The path of a Python file that takes its rank first.
        arguments: The further arguments, a function of the rank.
        folder: Where it writes.
        seconds: When to give up.
    """
    places = (str(program.parents[2]), os.environ.get("PYTHONPATH"))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    logs = [folder / f"log{rank}" for rank in range(2)]
    running = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(program), str(rank), *map(str, arguments(rank))]
            with log.open("w") as out:
                running.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
        codes = [process.wait(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"result{rank}") for rank in range(2)]
