import math

import numpy as np
import pytest
import torch
from analysis_models import assert_same_state, state_of
from test_sensitivity import rank, small
from torch import nn
from torch.nn import functional as F

from pytorch_quant import calibrate
from pytorch_quant.nn import QuantLinear


def test_batches_that_are_not_real_and_batches_without_samples():
    model, batches = small()
    x, y = batches[1]
    broken = x.clone()
    broken[2, 3] = math.nan
    empty = (x[:0], y[:0])
    told = {
        "sqnr": ("batch 1: in float the model returns NaN in 3 of 15 values", "no finite value"),
        "loss": ("in float the loss of batch 1 is nan", "hold no samples"),
        "fisher": ("in float the loss of batch 1 is nan", "hold no samples"),
    }
    before = state_of(model)
    for method, (nan, none) in told.items():
        with pytest.raises(ValueError, match=nan):
            rank(model, [batches[0], (broken, y)], method)
        with pytest.raises(ValueError, match=none):
            rank(model, [empty], method)
        assert rank(model, [*batches, empty], method).rows == rank(model, batches, method).rows
    assert_same_state(before, state_of(model))


def test_numbers_of_numpy_and_scores_that_fall_without_bound():
    model, batches = small()
    ranking = rank(model, batches, "sqnr")
    assert ranking.exclude(np.int64(1)) == ranking.exclude(1)
    drop = 10 ** (-ranking.rows[1].score / 10)
    assert ranking.exclude(max_drop=np.float64(1.001 * drop)) == ranking.exclude(1)

    def evaluate(m):
        return -math.inf if m[2]._input_quantizer(torch.tensor([0.01])) != 0.01 else 1.0

    model[2]._input_quantizer.amax = 3.0
    ranking = rank(model, None, None, evaluate=evaluate)
    assert [row.score for row in ranking.rows] == [math.inf, 0.0]
    assert ranking.exclude(max_drop=1, progress=False) == {"2": None}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = QuantLinear(32, 8)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, training=True))


def test_what_a_model_draws_has_no_part_in_the_ranking():
    model = Noisy()
    batches = [(torch.randn(64, 32), torch.randint(0, 8, (64,)))]
    calibrate(model, [(2 * batches[0][0], 0)], progress=False)
    assert rank(model, batches, "sqnr").rows[0].score > 30
    # The masks of dropout alone would change it by some percent.
    assert abs(rank(model, batches, "loss").rows[0].score) < 0.01
