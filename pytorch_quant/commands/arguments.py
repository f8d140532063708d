"""The parts of the command line that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

DEFAULT_TARGET = "tensorrt"

EXIT_CODES = """exit codes:
  0    done; of a check: nothing wrong
  1    failed, with one line on stderr; of a check: an error was found
  2    wrong usage
  130  Ctrl-C; files are whole or not there"""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Any],
    *,
    help: str,
    description: str,
    example: str,
    codes: str = EXIT_CODES,
    has_json: bool = True,
) -> argparse.ArgumentParser:
    """Enter a command.

    Args:
        commands: What `add_subparsers` gave.
        name: The word for it.
        run: Runs it on the options and returns an `Outcome`.
        help: A few words for the list of commands.
        description: What it does.
        example: Commands, a line each.
        codes: The part of the help on exit codes.
        has_json: Whether it takes `--json`.

    Returns:
        Its parser, with `--debug` and `--json`, which may also stand before the command.
    """
    shown = "\n".join(f"  {line}" for line in example.splitlines())
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n{shown}\n\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Without a default of their own they leave alone what stood before the command.
    missing = argparse.SUPPRESS
    parser.add_argument("--debug", action="store_true", default=missing, help="show tracebacks")
    if has_json:
        parser.add_argument(
            "--json", action="store_true", default=missing, help="one JSON object on stdout"
        )
    parser.set_defaults(run=run, parser=parser, has_json=has_json)
    return parser


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`, of commands that take a while."""
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars on stderr")


def add_target(parser: Any, what: str, default: str | None = DEFAULT_TARGET) -> None:
    """`--target`; with the default None the command finds out what was given."""
    from pytorch_quant.export.targets import TARGETS

    shown = f"{what}; default {DEFAULT_TARGET}"
    parser.add_argument("--target", choices=TARGETS, default=default, help=shown)


def add_network(parser: argparse.ArgumentParser) -> None:
    """The model and its weights."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        metavar="MODEL",
        help="module:function or file.py:function that returns it, or the name of a torchvision "
        "model such as resnet18",
    )
    group.add_argument(
        "--model-arg",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="argument of the function, a YAML value such as 10 or [1, 2]; may be repeated",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint of the float model (a state_dict, or a dict with one as model or "
        "state_dict). Of a torchvision model also the name of its weights, such as DEFAULT, which "
        "are downloaded, or random",
    )
    group.add_argument("--device", default="cpu", help="where it runs; default cpu")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, of commands that take a model as `quantize` left it."""
    parser.add_argument("--checkpoint", metavar="FILE", help="quantized.pt of `quantize`")


def add_ready(parser: argparse.ArgumentParser, *, group_help: str, target: str) -> None:
    """What `preparation.ready` makes a quantized model of.

    Args:
        parser: Of the command.
        group_help: About the data.
        target: What the runtime is for.
    """
    add_network(parser)
    add_checkpoint(parser)
    add_data(parser, required=True, samples=64, group_help=group_help)
    add_calibration(parser)
    add_target(parser, target, default=None)


def add_data(
    parser: argparse.ArgumentParser, *, required: bool, samples: int, group_help: str
) -> None:
    """The data and how images become tensors."""
    group = parser.add_argument_group("data", group_help)
    group.add_argument(
        "--data",
        required=required,
        metavar="PATH",
        help="folder of images, with or without a subfolder for each class; or .npz with one array "
        "of inputs (or several, named as the arguments of forward), and `labels`",
    )
    group.add_argument(
        "--samples",
        type=positive,
        default=samples,
        metavar="N",
        help=f"how many, at random; default {samples}",
    )
    group.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default 16")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of samples")
    group.add_argument(
        "--image-size", type=positive, metavar="N", help="pixels after the center crop; default 224"
    )
    group.add_argument(
        "--resize",
        type=positive,
        metavar="N",
        help="shorter side before it; default image size * 256 / 224",
    )
    for name, default in (("mean", "0.485,0.456,0.406"), ("std", "0.229,0.224,0.225")):
        group.add_argument(
            f"--{name}", type=three, metavar="R,G,B", help=f"of pixels in 0..1; default {default}"
        )
    group.add_argument(
        "--workers", type=not_negative, default=0, metavar="N", help="processes that read images"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What is quantized, and how ranges are found."""
    from pytorch_quant.calib.methods import METHODS, WEIGHT_METHODS

    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--rules",
        metavar="FILE",
        help="YAML mapping of layer names, globs, or dotted types and functions to a scheme (INT8, "
        "INT8_PER_TENSOR, INT8_DYNAMIC, FP8, INT4, INT4_WEIGHT_ONLY) or null for float",
    )
    group.add_argument(
        "--method", choices=METHODS, default="max", help="how activations are ranged; default max"
    )
    group.add_argument(
        "--method-option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="option of the method, such as percentile=99.9; may be repeated",
    )
    group.add_argument(
        "--weight-method", choices=WEIGHT_METHODS, default="max", help="of weights; default max"
    )
    group.add_argument(
        "--keep-batchnorm",
        action="store_true",
        help="do not fold batch norms into the layers before them",
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """A whole number above 0."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def not_negative(text: str) -> int:
    """A whole number, 0 or more."""
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def three(text: str) -> tuple[float, ...]:
    """Three numbers with commas."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"three numbers such as 0.5,0.5,0.5, got {text!r}")
    return numbers


def named_value(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no YAML value") from error


def named_shape(text: str) -> tuple[str, list[int]]:
    """`NAME=1,3,224,224`."""
    name, equals, sizes = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"NAME=1,3,224,224, got {text!r}")
    return name, [positive(size) for size in sizes.split(",")]
