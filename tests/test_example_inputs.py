import copy
import pickle

import pytest
import torch
from torch import nn

from pytorch_quant.example_inputs import inputs_of_kept_form, keep_form


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(2, 3),
        (torch.randn(2, 3).half(), 4, None),
        {"tokens": torch.tensor([[3, 7], [5, 4]]), "mask": torch.tensor([True, False])},
        [[torch.zeros(0, 2, dtype=torch.int64)], (torch.randn(()),)],
    ],
)
def test_inputs_of_the_same_form(inputs):
    model = nn.Linear(1, 1)
    keep_form(model, inputs)

    def same(a, b):
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            if not a.is_floating_point() and a.numel():
                assert a.min() <= b.min() and b.max() <= a.max()
            return
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert list(a) == list(b)
            a, b = list(a.values()), list(b.values())
        if isinstance(a, (list, tuple)):
            for left, right in zip(a, b, strict=True):
                same(left, right)
        else:
            assert a == b

    for kept in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(inputs, inputs_of_kept_form(kept))


def test_values_are_not_kept():
    model = nn.Linear(1, 1)
    keep_form(model, torch.full((4,), 1234.5))
    assert float(inputs_of_kept_form(model).abs().max()) < 100
    assert "1234.5" not in repr(model.__dict__)
    assert inputs_of_kept_form(nn.Linear(1, 1)) is None
