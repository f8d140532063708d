"""Plans of torchvision's networks, and of our own against what we build quantized."""

from collections import Counter

import pytest
import torch

from pytorch_quant import models
from pytorch_quant.dataflow import record
from pytorch_quant.placement.apply import apply_plan
from pytorch_quant.placement.planning import make_plan

# For each network, at images of this size: weight quantizers; activation quantizers by what they
# are made for; places in adds; concatenations; what is left float, by kind and rule.
TENSORRT = {
    # 20 convolutions, 3 of them projections that share an input; 8 blocks.
    "resnet18": (64, 21, {"conv": 17, "add": 3, "pool": 1, "linear": 1}, 8, 0, {}),
    # 53 convolutions, 4 projections; 16 blocks.
    "resnet50": (64, 54, {"conv": 49, "add": 4, "pool": 1, "linear": 1}, 16, 0, {}),
    "mobilenet_v2": (64, 53, {"conv": 52, "pool": 1, "linear": 1}, 10, 0, {}),
    # 9 blocks squeeze.
    "mobilenet_v3_small": (
        64, 53, {"conv": 51, "pool": 10, "mul": 9, "linear": 2}, 6, 0, {"conv H3": 1},
    ),
    # 16 blocks squeeze; six excitations come from fewer than 16 channels.
    "efficientnet_b0": (
        64, 76, {"conv": 75, "pool": 17, "mul": 16, "linear": 1}, 9, 0, {"conv H3": 6},
    ),
    # Depthwise convolutions of 24, 58 and 116 channels; 232 are a multiple of 8.
    "shufflenet_v2_x1_0": (
        64, 44, {"conv": 29, "cat": 2, "pool": 1, "linear": 1}, 0, 12, {"conv H3": 13, "cat L6": 4},
    ),
    # 57 convolutions and a classifier; two auxiliary heads of one convolution and two layers each.
    "googlenet": (96, 64, {"conv": 25, "cat": 9, "linear": 5}, 0, 9, {}),
    # 58 layers and 4 blocks concatenate for a batch norm.
    "densenet121": (
        64, 121, {"conv": 120, "pool": 1, "linear": 1}, 0, 0, {"cat L6": 62, "avg_pool L8": 3},
    ),
    # 12 blocks of two projections, an attention of four tensors, and two layers.
    "vit_b_16": (
        64, 50, {"conv": 1, "linear": 49, "attention": 48}, 0, 0, {"cat L6": 1, "add L8": 24},
    ),
    # 12 blocks; 24 adds are residual, one mask is added in two stages.
    "swin_t": (
        64, 53, {"conv": 1, "linear": 52, "attention": 48, "pool": 1}, 0, 0,
        {"cat L6": 3, "add L8": 26},
    ),
    # 18 blocks whose residual branch ends in a linear layer.
    "convnext_tiny": (
        64, 59, {"conv": 22, "linear": 37}, 0, 0,
        {"add L8": 15, "add L4": 3, "adaptive_avg_pool L8": 1},
    ),
}  # fmt: skip

KINDS = {
    "adaptive_avg_pool": "pool",
    "avg_pool": "pool",
    "mean": "pool",
    "matmul": "attention",
    "scaled_dot_product_attention": "attention",
}
_built = {}


def network(name):
    """One of torchvision's, with random weights; built once."""
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    if name not in _built:
        options = {"image_size": TENSORRT[name][0]} if name == "vit_b_16" else {}
        if name == "googlenet":
            options["init_weights"] = False
        _built[name] = getattr(torchvision.models, name)(**options).eval()
    return _built[name]


def images(name, batch):
    size = TENSORRT[name][0]
    return torch.randn(batch, 3, size, size)


def is_weight(quantizer):
    return quantizer.reason.startswith("weight")


def numbers(plan):
    activations = [q for q in plan.quantizers if not is_weight(q)]
    calls = [place for q in activations for place in q.places if place.call]
    return (
        len(plan.quantizers) - len(activations),
        dict(Counter(KINDS.get(q.op, q.op) for q in activations)),
        sum(place.call.startswith("add#") for place in calls),
        len({place.site for place in calls if place.call.startswith("cat#")}),
        dict(Counter(f"{entry.op} {entry.reason[-3:-1]}" for entry in plan.left)),
    )


@pytest.mark.parametrize("name", TENSORRT)
def test_numbers(name):
    model = network(name)
    plan = make_plan(model, record(model, images(name, 1)), None, "tensorrt")
    assert numbers(plan) == TENSORRT[name][1:]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", TENSORRT)
def test_the_batch_of_the_example_does_not_count(name, placement):
    model = network(name)
    one, eight = (
        make_plan(model, record(model, images(name, batch)), None, placement) for batch in (1, 8)
    )
    assert one == eight


ON_ALL_SIDES = {
    # Quantizers that ONNX Runtime gets on top: the other side of each add. Unsigned ones: what a
    # ReLU wrote.
    "resnet18": (8, 18),
    "mobilenet_v2": (10, 36),
    "googlenet": (0, 32),
}


# ... and OpenVINO beyond them.
MAX_POOLS_MORE = {"resnet18": 0, "mobilenet_v2": 0, "googlenet": -1}


@pytest.mark.parametrize("name", ON_ALL_SIDES)
def test_numbers_for_onnxruntime(name):
    model = network(name)
    flow = record(model, images(name, 1))
    few, many = (make_plan(model, flow, None, p) for p in ("tensorrt", "onnxruntime"))
    added = len(many.quantizers) - len(few.quantizers)
    assert (added, sum(q.descriptor.unsigned for q in many.quantizers)) == ON_ALL_SIDES[name]
    # OpenVINO alone does not move a Q up through a MaxPool.
    pooled = make_plan(model, flow, None, "openvino").quantizers
    same = [quantizer for quantizer in pooled if quantizer in many.quantizers]
    others = [quantizer for quantizer in pooled if quantizer not in many.quantizers]
    assert len(pooled) - len(many.quantizers) == MAX_POOLS_MORE[name]
    assert all("in front of a MaxPool" in quantizer.reason for quantizer in others)
    assert len(same) + len(others) == len(pooled)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "swin_t"])
def test_no_tensor_has_two_quantizers(name, placement):
    model = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    del _built[name]
    plan = make_plan(model, record(model, images(name, 2)), None, placement)
    apply_plan(model, plan)
    flow = record(model, images(name, 2))
    # Each planned quantizer of something that runs is met, and no value meets two.
    assert len(flow.quantizers) == len(plan.quantizers)
    entered = Counter(v for values in flow.quantizers.values() for v in set(values))
    assert set(entered.values()) == {1}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50, models.resnext50_32x4d])
def test_our_networks_are_placed_as_they_are_built(build):
    options = {"width": 32, "num_classes": 20} if build is not models.resnext50_32x4d else {}
    plain, quantized = build(**options), build(quantize=True, **options)
    image = torch.randn(2, 3, 64, 64)
    plan = make_plan(plain, record(plain, image), None, "tensorrt")
    places = [
        f"{place.module}._{place.operand[0]}_quantizer"
        if place.call is None
        else f"{place.module}.residual_quantizer"
        for quantizer in plan.quantizers
        for place in quantizer.places
    ]
    flow = record(quantized, image)
    assert sorted(places) == sorted(flow.quantizers)
    assert plan.left == []
    # Built, they have one quantizer for each reader; planned, one for each tensor.
    activations = {
        value
        for name, values in flow.quantizers.items()
        for value in values
        if not name.endswith("_weight_quantizer")
    }
    assert len(activations) == sum(not is_weight(q) for q in plan.quantizers)
    blocks = [place for q in plan.quantizers for place in q.places if place.call]
    assert all((place.call, place.operand) == ("add#0", (1,)) for place in blocks)
