"""The commands, a file each; what they share stands in the other files.

Each has `add(commands)`, which enters its parser, and a function that runs it and returns an
`Outcome`. What a command needs is imported when it runs.
"""

COMMANDS = (
    "demo",
    "quantize",
    "sensitivity",
    "report",
    "summary",
    "lint",
    "fix",
    "predict",
    "verify",
    "bench",
    "run_compat",
)
"""The modules of the commands, in the order of `--help`."""
