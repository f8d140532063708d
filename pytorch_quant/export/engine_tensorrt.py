"""Running an ONNX file in TensorRT, 8.6 or newer, with tensors of torch as its memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytorch_quant.export.ports import read_onnx
from pytorch_quant.export.session import Session, is_path
from pytorch_quant.optional import require


class TensorRTSession(Session):
    """An engine is built for each combination of input shapes, and kept.

    Args:
        model: A file, or an `onnx.ModelProto`.
    """

    def __init__(self, model: Any) -> None:
        self._model = read_onnx(model) if is_path(model) else model
        super().__init__(self._model)
        self._engines: dict[tuple[torch.Size, ...], Any] = {}

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._engines:
            self._engines[shapes] = self._build(shapes)
        # A context serves one thread at a time.
        context = self._engines[shapes].create_execution_context()
        names = [port.name for port in self.inputs]
        memory = {n: t.cuda() for n, t in zip(names, tensors, strict=True)}
        for name, tensor in memory.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for port in self.outputs:
            shape = tuple(context.get_tensor_shape(port.name))
            memory[port.name] = torch.empty(shape, dtype=port.dtype, device="cuda")
        for name, tensor in memory.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT failed to run the engine; its log says why")
        stream.synchronize()
        return [memory[port.name].cpu() for port in self.outputs]

    def _build(self, shapes: tuple[torch.Size, ...]) -> Any:
        tensorrt = require("tensorrt")

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        # Up to version 9 explicit batch is asked for; later ones know nothing else.
        explicit = getattr(tensorrt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
        network = builder.create_network(0 if explicit is None else 1 << int(explicit))
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse(self._model.SerializeToString()):
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise RuntimeError(f"TensorRT cannot load the model: {'; '.join(errors)}")
        config = builder.create_builder_config()
        # Strongly typed networks, the only ones since version 11, take types from the file.
        for kind in ("INT8", "FP8"):
            flag = getattr(tensorrt.BuilderFlag, kind, None)
            if flag is not None:
                config.set_flag(flag)
        profile = builder.create_optimization_profile()
        for port, shape in zip(self.inputs, shapes, strict=True):
            profile.set_shape(port.name, tuple(shape), tuple(shape), tuple(shape))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("TensorRT cannot build an engine; its log says why")
        return tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
