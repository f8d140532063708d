"""Attention: the written-out form against torch's, and quantized against NumPy."""

import pytest
import torch
from hand_plans import Function, fq, place, plan, planned, quantized, rand
from torch import nn
from torch.nn import functional as F

from pytorch_quant.descriptor import QuantDescriptor
from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.attention import attention
from pytorch_quant.placement.plan import PlannedQuantizer

Q, K, V = rand(2, 4, 5, 8, seed=1), rand(2, 4, 7, 8, seed=2), rand(2, 4, 7, 6, seed=3)
SDPA = "scaled_dot_product_attention"
BLANK = torch.ones(5, 7, dtype=torch.bool).tril(-1)

CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": rand(2, 1, 5, 7, seed=4) > -1},
    "float mask": {"attn_mask": rand(5, 7, seed=4)},
    "a row that sees nothing": {"attn_mask": BLANK},
    "a row of -inf": {"attn_mask": torch.zeros(5, 7).masked_fill(~BLANK, -torch.inf)},
    "dropout of 0": {"dropout_p": 0.0},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("case", CASES)
def test_written_out_equals_torch(case):
    arguments = CASES[case]
    key, value = (K[:, :2], V[:, :2]) if case == "grouped" else (K, V)
    q, k, v = (t.clone().requires_grad_() for t in (Q, key, value))
    own = attention(lambda _, x: x, q, k, v, **arguments)
    grads = torch.autograd.grad(own.square().sum(), (q, k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(own, theirs)
    expected = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_dropout_acts_on_the_probabilities():
    ones = torch.ones(1, 1, 400, 50)
    got = attention(lambda _, x: x, ones, ones, ones, dropout_p=0.5)
    assert got.std() > 0.01
    assert abs(got.mean() - 1) < 0.05


def test_mask_and_causal_together_are_refused():
    with pytest.raises(RuntimeError, match="attn_mask or is_causal, got both"):
        attention(lambda _, x: x, Q, K, V, attn_mask=BLANK, is_causal=True)


def test_each_operand_is_quantized_the_query_after_its_scale():
    # In float64 numbers from NumPy, so that only the rounding to codes is shared.
    model = quantized(
        Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v)),
        planned(place(f"{SDPA}#0", 0), amax=0.6),
        planned(place(f"{SDPA}#0", 1)),
        planned(place(f"{SDPA}#0", "value"), amax=2.0),
        planned(place(f"{SDPA}#0", "probabilities"), amax=1.0),
        **{SDPA: 1},
    )
    probabilities = (fq(Q * 8**-0.5, 0.6) @ fq(K).mT).softmax(-1)
    torch.testing.assert_close(model(Q, K, V), fq(probabilities, 1.0) @ fq(V, 2.0))


def in_projection():
    weight = PlannedQuantizer(
        QuantDescriptor(8, axis=0), (place("linear#0", 1, module="attention"),), "linear", "weight"
    )
    return planned(place("linear#0", 0, module="attention")), weight


class Attention(nn.Module):
    def __init__(self, needs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.needs = needs

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.needs)[0] + x


def by_hand(layer, x, kind, p_amax):
    """The attention of two heads, with what the plans below quantize."""
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    weight = fq(weight, weight.detach().abs().amax(1, keepdim=True).numpy())
    q, k, v = F.linear(fq(x), weight, bias).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    probabilities = fq((q * 0.5 @ k.mT).softmax(-1), p_amax)
    return layer.out_proj((probabilities @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_multihead_attention(needs, training, compiled):
    model, x = Attention(needs).train(training), rand(3, 5, 8)
    kind = "matmul" if needs else SDPA
    site = place("matmul#1", 0, module="attention")
    if not needs:
        site = place(f"{SDPA}#0", "probabilities", module="attention")
    counts = {"attention": {"linear": 2, kind: 1 + needs}}
    apply_plan(model, plan(*in_projection(), planned(site, amax=0.9), counts=counts))
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with torch.no_grad():
        expected = by_hand(model.attention, x, kind, 0.9) + x
        torch.testing.assert_close(run(x), expected)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_encoder_in_evaluation_takes_no_way_around_the_quantizers(compiled):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    module = "layers.0.self_attn"
    site = planned(place(f"{SDPA}#0", "probabilities", module=module), amax=0.02)
    linear = planned(place(None, "input", module="layers.0.linear1"), amax=0.02)
    counts = {module: {SDPA: 1}}
    x = rand(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        plain = encoder(x)
        apply_plan(encoder, plan(site, linear, counts=counts))
        run = torch.compile(encoder, fullgraph=True, backend="eager") if compiled else encoder
        layer = encoder.layers[0]
        probabilities = (
            layer.self_attn._call_quantizers.scaled_dot_product_attention_0_probabilities
        )
        for quantizer in (probabilities, layer.linear1._input_quantizer):
            quantizer.disable()
        torch.testing.assert_close(run(x), plain)
        for quantizer in (probabilities, layer.linear1._input_quantizer):
            before = run(x)
            quantizer.enable()
            assert (run(x) - before).abs().max() > 0.01
        if not compiled:
            assert run(x, src_key_padding_mask=padding).shape == x.shape
