"""`sensitivity`: which layers quantization hurts most, and rules that leave them float."""

from __future__ import annotations

import argparse
from typing import Any

from pytorch_quant.commands.arguments import add_command, add_quiet, add_ready, not_negative
from pytorch_quant.commands.outcome import Outcome, UsageError

_EXAMPLE = """pytorch-quant sensitivity resnet18 --weights DEFAULT --data images/ --by fisher \\
    --exclude 3 --write-rules rules.yaml
pytorch-quant quantize resnet18 --weights DEFAULT --data images/ --rules rules.yaml"""


def add(commands: Any) -> None:
    """Enter the command."""
    parser = add_command(
        commands,
        "sensitivity",
        _run,
        help="rank layers by what quantizing them costs",
        description="Rank layers and calls by the harm that quantizing each of them alone does, "
        "the worst first,\nand make rules that leave the worst ones float. The model is quantized "
        "and calibrated on the\nsame data first, or comes from a quantized checkpoint.",
        example=_EXAMPLE,
    )
    add_ready(
        parser,
        group_help="labelled, for loss, fisher, evaluate",
        target="the runtime whose placement is used",
    )
    group = parser.add_argument_group("ranking")
    group.add_argument(
        "--by",
        choices=("sqnr", "loss", "fisher", "evaluate"),
        default="sqnr",
        help="SQNR of the output; increase of the cross entropy; its prediction from gradients, "
        "in one pass for all layers; or drop of top-1 in percent. Default sqnr",
    )
    group.add_argument("--exclude", type=not_negative, metavar="K", help="leave the K worst float")
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="COST",
        help="leave as many float as it takes to cost at most that: of the noise as a share of the "
        "output's power with sqnr, else in the unit of the ranking",
    )
    group.add_argument(
        "--write-rules", metavar="FILE", help="write the rules as YAML, for `quantize --rules`"
    )
    add_quiet(parser)


def _run(options: argparse.Namespace) -> Outcome:
    from pytorch_quant.analysis import sensitivity
    from pytorch_quant.commands.preparation import ready
    from pytorch_quant.commands.rule_files import write_rules
    from pytorch_quant.commands.samples import cross_entropy, forward, top1
    from pytorch_quant.commands.writable import check_file

    excludes = options.exclude is not None or options.max_drop is not None
    if options.exclude is not None and options.max_drop is not None:
        raise UsageError("give either --exclude or --max-drop")
    if options.write_rules is not None and not excludes:
        raise UsageError("--write-rules needs --exclude or --max-drop to say what stays float")
    if options.max_drop is not None and not options.max_drop >= 0:
        raise UsageError(f"--max-drop must be at least 0, got {options.max_drop}")
    if options.write_rules is not None:
        check_file(options.write_rules)
    prepared = ready(options, labelled=options.by != "sqnr")
    model, batches, rules = prepared.model, prepared.batches, prepared.rules

    def evaluate(model: Any) -> float:
        return top1(model, batches, name="top-1", progress=False)

    ranking = sensitivity(
        model,
        batches,
        evaluate if options.by == "evaluate" else None,
        options.by,
        loss=cross_entropy(batches) if options.by in ("loss", "fisher") else None,
        forward=forward,
        progress=not options.quiet,
    )
    text, data = str(ranking), ranking.as_dict()
    if excludes:
        left = ranking.exclude(
            options.exclude, max_drop=options.max_drop, progress=not options.quiet
        )
        # An exact name is stronger than any other rule, and the later of two entries wins.
        merged = {**{key: value for key, value in rules.items() if key not in left}, **left}
        data["excluded"], data["rules"] = list(left), merged
        text += f"\n\nleft float: {', '.join(left) or 'nothing'}"
        if options.write_rules is not None:
            write_rules(options.write_rules, merged)
            text += f"\nrules: {options.write_rules}"
    return Outcome(text, data)
