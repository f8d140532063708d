"""The arguments of a model as one list of tensors, in the order of the inputs of a file."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def split_arguments(args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and keywords, from `args` as `torch.onnx.export` takes them.

    Args:
        args: A tensor, a mapping of keywords, or a tuple, whose last item is a mapping of keywords
            if it is a dict.

    Raises:
        TypeError: something else.
    """
    if isinstance(args, Tensor):
        return (args,), {}
    if isinstance(args, dict):
        return (), dict(args)
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"args is a tensor, a tuple of arguments or a dict of keywords, got "
            f"{type(args).__name__}; write (argument,) for one argument that is no tensor"
        )
    if args and isinstance(args[-1], dict):
        return tuple(args[:-1]), dict(args[-1])
    return tuple(args), {}


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested containers, in the order that the exporter of torch writes them."""
    return torch.utils._pytree.tree_leaves(tree)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors among `leaves`."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def in_order_of_signature(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], list[Any]]:
    """The names and values of all arguments that are given, as `forward` lists them.

    Raises:
        TypeError: they do not fit `forward`, or it gathers some of them in `*args` or `**kwargs`.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    parameters = bound.signature.parameters
    for name in bound.arguments:
        if parameters[name].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            raise TypeError(
                f"{type(model).__name__}.forward gathers arguments in {name!r}; wrap the model in "
                "a module whose forward names each of them"
            )
    return list(bound.arguments), list(bound.arguments.values())


def apart(tree: Any) -> Any:
    """The same containers, in which no tensor stands twice.

    The current exporter of torch knows tensors by identity: of `model(x, x)` it makes one input
    that is read twice, and another that is never read.
    """
    met: set[int] = set()

    def copied_if_met(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in met:
            return leaf.detach().clone()
        met.add(id(leaf))
        return leaf

    return torch.utils._pytree.tree_map(copied_if_met, tree)
