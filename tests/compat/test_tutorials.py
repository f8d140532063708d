"""The flows of the old user guide, through the alias, on the CPU."""

import numpy as np
import onnx
import onnx_runs
import pytest
import reference
import torch
from old_programs import quantizers, tutorial_loop
from torch import nn

from pytorch_quant.models import resnet50


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 64, 64, generator=generator) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_calibrate_resnet50_save_reload_and_export(old, tmp_path):
    desc = old.tensor_quant.QuantDescriptor(calib_method="histogram")
    layers = old.nn.QuantConv2d, old.nn.QuantLinear
    defaults = [layer.default_quant_desc_input for layer in layers]
    try:
        for layer in layers:
            layer.set_default_quant_desc_input(desc)
        old.quant_modules.initialize()
        model, fresh = resnet50().eval(), resnet50().eval()
    finally:
        old.quant_modules.deactivate()
        for layer, default in zip(layers, defaults, strict=True):
            layer.set_default_quant_desc_input(default)
    batches = images(2)
    # Random weights: batch statistics keep the activations alive.
    model.train()
    with torch.no_grad():
        for q in quantizers(old, model).values():
            q.disable()
        for _ in range(3):
            model(batches[0])
        for q in quantizers(old, model).values():
            q.enable()
    model.eval()
    tutorial_loop(old, model, batches, method="percentile", percentile=99.0)

    found = quantizers(old, model)
    assert len(found) == 2 * 54 + 1 and all(q.amax > 0 for q in found.values() if q.axis is None)
    values = np.abs(torch.cat(batches).numpy())
    stem = found["conv1._input_quantizer"]
    assert float(stem.amax) == pytest.approx(np.percentile(values, 99.0), abs=8 / 2048)
    weight = model.conv1.weight.detach().numpy()
    np.testing.assert_array_equal(
        found["conv1._weight_quantizer"].amax, reference.amax_of(weight, 0)
    )

    torch.save(model.state_dict(), tmp_path / "calibrated.pth")
    fresh.load_state_dict(torch.load(tmp_path / "calibrated.pth"))
    x = batches[1]
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(fresh(x), wanted)
        # Another method, from the histograms that are there.
        for q in found.values():
            if isinstance(q._calibrator, old.calib.HistogramCalibrator):
                q.load_calib_amax("entropy")
        assert not torch.equal(model(x), wanted)

        with old.package.enable_onnx_export():
            torch.onnx.export(fresh, (x,), tmp_path / "m.onnx", opset_version=13, dynamo=False)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert sum(n.op_type == "QuantizeLinear" for n in graph.node) == len(found)
    (got,) = onnx_runs.run(tmp_path / "m.onnx", x.numpy())
    # A random network amplifies one flipped code: it agrees with the file as closely as with itself
    # when its input moves by a millionth.
    with torch.no_grad():
        moved = fresh(x * (1 + 1e-6)) - wanted
    error = torch.from_numpy(got) - wanted
    assert error.norm() <= 2 * moved.norm() < 0.1 * wanted.norm()


def test_a_custom_quantized_module(old):
    class Gate(nn.Module, old.mixins.QuantMixin):
        """What a user writes: a layer of two quantized operands."""

        default_quant_desc_weight = old.tensor_quant.QuantDescriptor(num_bits=8, axis=(0))

        def __init__(self, size, **kwargs):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 2, size)[:, None])
            self.setup(**kwargs)

        def setup(self, **kwargs):
            # The quantizers are made in a helper, as programs do.
            desc_input, desc_weight = old.mixins.pop_quant_desc_in_kwargs(type(self), **kwargs)
            self.init_quantizer(desc_input, desc_weight)

        def forward(self, x):
            return self._input_quantizer(x) * self._weight_quantizer(self.weight)

    gate = Gate(4, quant_desc_input=old.tensor_quant.QuantDescriptor(num_bits=6))
    x = torch.randn(4, 10)
    tutorial_loop(old, nn.Sequential(gate), [x])
    weight = gate.weight.detach().numpy()
    wanted = reference.fake_quant(x.numpy(), np.abs(x.numpy()).max(), 6) * reference.fake_quant(
        weight, np.abs(weight)
    )
    np.testing.assert_allclose(gate(x).detach(), wanted, rtol=1e-6)


def test_fine_tune(old):
    with old.quant_modules.initialize():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(128, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    tutorial_loop(old, model, [x])
    before = {n: q.amax.clone() for n, q in quantizers(old, model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    # Ranges stay as calibrated.
    assert all(torch.equal(q.amax, before[n]) for n, q in quantizers(old, model).items())
