"""`quantize()` against the network whose quantizers were placed by hand."""

import pytest
import torch

from pytorch_quant import (
    TensorQuantizer,
    calibrate,
    export_onnx,
    fold_batchnorm,
    lint_onnx,
    models,
    quantize,
)


def network(arch, **options):
    return getattr(models, arch)(width=16, num_classes=16, **options)


def ranges_by_tensor(model, x):
    """The amax of each tensor that is quantized, by the order in which the model makes them.

    Several quantizers on one tensor count once.
    """
    # Tensors are kept, so that no memory is used twice.
    seen, handles = {}, []
    for module in model.modules():
        if isinstance(module, TensorQuantizer):

            def note(quantizer, args, _):
                (tensor,) = args
                _, amax = seen.setdefault(tensor.data_ptr(), (tensor, quantizer.amax))
                assert torch.equal(amax, quantizer.amax)

            handles.append(module.register_forward_hook(note))
            module.disable_quant()
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.enable_quant()
    return [(tuple(tensor.shape), amax) for tensor, amax in seen.values()]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_same_tensors_with_the_same_ranges_and_outputs(arch):
    by_hand = network(arch, quantize=True)
    for norm in by_hand.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
    by_call = network(arch)
    batches = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    by_hand.train()
    with torch.no_grad():
        by_hand(batches[0])
    by_call.load_state_dict(by_hand.state_dict(), strict=False)
    by_hand.eval()
    quantize(by_call.eval(), example_inputs=batches[0])
    for model in (by_hand, by_call):
        calibrate(model, batches, progress=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(by_hand(x), by_call(x))
    found = [ranges_by_tensor(model, x) for model in (by_hand, by_call)]
    # The order in which blocks run their branches may differ; what is quantized does not.
    keys = [sorted((s, a.flatten().tolist()) for s, a in order) for order in found]
    assert len(keys[0]) > 40
    assert keys[0] == keys[1]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
def test_a_placed_network_folds_without_inputs_and_exports_clean(placement, tmp_path):
    model = network("resnet18").eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    quantize(model, example_inputs=x, placement=placement)
    calibrate(model, [x], progress=False)
    quantizers = sum(isinstance(m, TensorQuantizer) for m in model.modules())
    with torch.no_grad():
        expected = model(x)
        report = fold_batchnorm(model)
        folded = model(x)
    assert len(report.pairs) == 20 and not report.skipped
    assert sum(isinstance(m, TensorQuantizer) for m in model.modules()) == quantizers
    # A code that rounding moves shows in a random network, and few are.
    assert float((folded - expected).abs().max() / expected.abs().max()) < 0.05
    target = "tensorrt" if placement == "tensorrt" else "onnxruntime"
    export_onnx(model, x, tmp_path / "m.onnx", target=target)
    assert [f for f in lint_onnx(tmp_path / "m.onnx", target) if f.severity != "warning"] == []
