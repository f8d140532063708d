import numpy as np
import pytest
from lint_graphs import E4M3, Build, found

from pytorch_quant.export.lint.attention import head_size_reason, sequence_reason

SPEED = "performance"


def attention(
    quantized="qkpv",
    mask="plain",
    scale="behind",
    sequence=32,
    head=32,
    kind=None,
    softmax_scale=1 / 448,
):
    g = Build()
    kinds = {"kind": kind} if kind else {}
    shape = (2, 4, sequence, head)
    q, k, v = (g.input(n, shape) for n in "qkv")
    factor = g.constant("factor", np.float32(0.1))
    if "q" in quantized:
        q = g.qdq(q, "q", **kinds)
    if scale == "front":
        q = g.node("Mul", [q, factor], "scale")
    if "k" in quantized:
        k = g.qdq(k, "k", **kinds)
    k = g.node("Transpose", [k], "turn", perm=[0, 1, 3, 2])
    y = g.node("MatMul", [q, k], "scores")
    if scale == "behind":
        y = g.node("Div", [y, factor], "scale")
    m = g.input("mask", (2, 1, sequence, sequence))
    y = g.node("Add", [y, g.qdq(m, "m") if mask == "quantized" else m], "add")
    if mask == "scores":
        y = g.qdq(y, "s")
    y = g.node("Softmax", [y], "softmax", axis=-1)
    if "p" in quantized:
        y = g.qdq(y, "p", softmax_scale, **kinds)
    if "v" in quantized:
        v = g.qdq(v, "v", **kinds)
    return g.model(g.node("MatMul", [y, v], "values"))


@pytest.mark.parametrize("quantized", ["qkpv", ""])
def test_all_or_nothing(quantized):
    assert found(attention(quantized)) == []


@pytest.mark.parametrize(
    ("quantized", "nodes"),
    [
        ("kpv", ["scores"]),
        ("qpv", ["scores"]),
        ("qkv", ["values"]),
        ("qkp", ["values"]),
        ("qk", ["values"]),
        ("pv", ["scores"]),
        ("q", ["scores", "values"]),
    ],
)
def test_in_part(quantized, nodes):
    assert found(attention(quantized)) == [("L12", SPEED, node) for node in nodes]


def test_on_the_mask_or_the_scores():
    assert found(attention(mask="quantized")) == [("L12", SPEED, "add")]
    assert found(attention(mask="scores")) == [("L12", SPEED, "s/Q")]


def test_a_scale_between_the_dq_and_the_product():
    assert found(attention(scale="front")) == [("L12", SPEED, "scale")]
    nodes = [node for _, _, node in found(attention("q", scale="front"))]
    assert nodes == ["scale", "scores", "values"]


@pytest.mark.parametrize(("head", "clean"), [(16, True), (64, True), (128, False), (24, False)])
def test_head_sizes_of_int8(head, clean):
    assert found(attention(head=head)) == ([] if clean else [("L12", SPEED, "scores")])


def test_head_sizes_matter_to_fused_attention_alone():
    assert found(attention("qk", head=128)) == [("L12", SPEED, "values")]


@pytest.mark.parametrize(("head", "clean"), [(24, True), (256, True), (264, False)])
def test_head_sizes_of_fp8(head, clean):
    model = attention(head=head, kind=E4M3)
    assert found(model) == ([] if clean else [("L12", SPEED, "scores")])


@pytest.mark.parametrize(("sequence", "clean"), [(512, True), (520, False)])
def test_h5_sequences(sequence, clean):
    both = [("H5", SPEED, "scores"), ("H5", SPEED, "values")]
    assert found(attention(sequence=sequence)) == ([] if clean else both)


def test_h5_is_about_int8():
    assert found(attention(sequence=520, kind=E4M3)) == []
    assert found(attention("", sequence=520)) == []


def test_f6_softmax_scale():
    assert found(attention(kind=E4M3, softmax_scale=0.01)) == [("F6", SPEED, "p/Q")]


def test_unknown_sizes_are_no_reason():
    assert head_size_reason("int8", None) is None
    assert head_size_reason("fp8", 8) is not None
    assert sequence_reason(None) is None


def other_forms(mask_first=False, between=(), weight=None):
    """Attention with v in float, so that whoever finds the pattern has something to say."""
    g = Build()
    q, v = (g.input(n, (2, 4, 32, 32)) for n in "qv")
    k = g.floats("k", (32, 32)) if weight == "k" else g.qdq(g.input("k", (2, 4, 32, 32)), "k")
    y = g.node("MatMul", [q if weight == "k" else g.qdq(q, "q"), k], "scores")
    mask = g.input("mask", (2, 1, 32, 32))
    y = g.node("Add", [mask, y] if mask_first else [y, mask], "add")
    y = g.qdq(g.node("Softmax", [y], "softmax", axis=-1), "p") if not between else y
    for k, op in enumerate(between):
        y = g.node(op, [y], f"{op}{k}", **({"to": 1} if op == "Cast" else {}))
    v = g.weight("v.w", (32, 32), 1) if weight == "v" else v
    return g.model(g.node("MatMul", [y, v], "values"))


def test_the_mask_may_come_first():
    assert found(other_forms(mask_first=True)) == [("L12", SPEED, "values")]


@pytest.mark.parametrize(
    "between", [("Cast", "Softmax", "Cast"), ("Identity", "Softmax", "Dropout", "Identity")]
)
def test_casts_and_dropout_around_the_softmax(between):
    assert found(other_forms(between=between)) == [("L12", SPEED, "values")]


@pytest.mark.parametrize("between", [("Tanh", "Softmax"), ("Softmax", "Tanh")])
def test_another_operator_makes_it_no_attention(between):
    assert found(other_forms(between=between)) == []


def test_a_product_with_a_weight_is_no_attention():
    assert found(other_forms(weight="v")) == []
    assert found(other_forms(weight="k")) == [("L1", SPEED, "values")]


def test_a_softmax_at_the_end():
    g = Build()
    y = g.node("MatMul", [g.input("a", (2, 32, 32)), g.input("b", (2, 32, 32))], "scores")
    assert found(g.model(g.node("Softmax", [y], "softmax"))) == []


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("quantized", "sequence", "expected"),
    [("qkpv", 32, []), ("qkp", 32, ["L12"]), ("qkpv", 520, ["H5", "H5"]), ("", 520, [])],
)
def test_attention_of_einsums(quantized, sequence, expected, swapped):
    g = Build()
    q, k, v = (g.input(n, (2, sequence, 4, 32)) for n in "qkv")
    q, k, v = (g.qdq(t, f"{t}q") if t in quantized else t for t in (q, k, v))
    y = g.node("Einsum", [q, k], "scores", equation="bqhd,bkhd->bhqk")
    y = g.node("Softmax", [y], "softmax", axis=-1)
    y = g.qdq(y, "p") if "p" in quantized else y
    factors, equation = ([v, y], "bkhd,bhqk->bqhd") if swapped else ([y, v], "bhqk,bkhd->bqhd")
    model = g.model(g.node("Einsum", factors, "values", equation=equation))
    assert [rule for rule, _, _ in found(model)] == expected
