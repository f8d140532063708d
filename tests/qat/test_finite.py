"""The search for the range that exploded."""

import pytest
import torch
from qat_models import images, labels, network
from torch import nn

from pytorch_quant import qat


def test_check_finite_is_silent_where_all_is_well():
    model = network()
    qat.check_finite(model)
    qat.check_finite(model, torch.tensor(1.0))
    qat.check_finite(nn.Linear(1, 1))


def test_check_finite_names_the_range():
    model = network()
    qat.learn_ranges(model)
    with torch.no_grad():
        model[3]._weight_quantizer._amax[2] = float("nan")
        model[5]._input_quantizer._amax.fill_(float("inf"))
    told = (
        r"the loss is nan; the range of 3._weight_quantizer is nan; and so are 1 more: "
        r"5._input_quantizer\. Go back"
    )
    with pytest.raises(FloatingPointError, match=told):
        qat.check_finite(model, float("nan"))
    with pytest.raises(FloatingPointError, match=r"^the range of 3._weight_quantizer is nan"):
        qat.check_finite(model)


def test_check_finite_of_a_loss_names_the_largest_range():
    model = network()
    model[3]._input_quantizer.amax = 1e9
    told = r"the loss is inf; all ranges are finite, the largest is 3._input_quantizer: 1e\+09"
    with pytest.raises(FloatingPointError, match=told):
        qat.check_finite(model, torch.tensor([0.0, float("inf")]))
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite: 0\.weight;"):
        qat.check_finite(model, float("inf"))


def test_a_training_that_explodes_is_named():
    model = network()
    qat.learn_ranges(model)
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.0, range_lr=1e38))
    with pytest.raises(FloatingPointError, match=r"_quantizer is (inf|nan)"):
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(images()), labels())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            qat.check_finite(model, loss)
