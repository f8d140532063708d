"""The range of a quantizer in training: learned as a parameter, or following its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytorch_quant import axes, distributed
from pytorch_quant.axes import Axis
from pytorch_quant.formats import Format
from pytorch_quant.learned_range import RangeMethod, positive
from pytorch_quant.nn.quantizer.interception import Intercepted


class RangeParameter(Intercepted):
    """What `TensorQuantizer` knows of ranges that training changes; `pytorch_quant.qat` uses it.

    A learned range is the parameter `_amax` in the place of the buffer of that name, so that
    checkpoints fit in both directions. What is quantized with is its magnitude
    (`learned_range.positive`). One value has shape `(1,)`, because FSDP2 shards no scalars; in a
    `state_dict` it has the shape `()` of the buffer.
    """

    # On the class, so that pickles from before there were such ranges have them.
    _range_method: RangeMethod | None = None
    _range_of_weight: bool = False
    _range_momentum: float | None = None
    _range_synced: bool = True

    _amax: Tensor
    _axis: Axis
    _block_size: int | None
    _learn_amax: bool

    @property
    def format(self) -> Format:
        """The number format of the codes."""
        raise NotImplementedError

    def prescaled(self, x: Tensor) -> Tensor:
        """`x` times the pre-quantization scale."""
        raise NotImplementedError

    @property
    def learned_range(self) -> nn.Parameter | None:
        """The parameter behind a range that `qat.learn_ranges` made trainable; else None."""
        return self._parameters.get("_amax")

    @property
    def learns(self) -> bool:
        """Whether training changes its range by gradients."""
        return self._learn_amax

    @property
    def learns_by_clip(self) -> bool:
        """Whether it was made with `learn_amax=True`: the range is that of its clip."""
        return self._learn_amax and self._range_method is None

    @property
    def range_momentum(self) -> float | None:
        """The weight of earlier batches in a range that follows them; None if it stands still."""
        return self._range_momentum

    @property
    def range_synced(self) -> bool:
        """Whether a range that follows the batches is that of all processes."""
        return self._range_synced

    def follow_range(self, momentum: float | None, *, synced: bool | None = None) -> None:
        """Let the range follow what passes in train mode, in place.

        Args:
            momentum: The weight of earlier batches; None stops it.
            synced: Agree with the other processes in each forward pass; None leaves it.
        """
        self._range_momentum = momentum
        if synced is not None:
            self._range_synced = synced

    def learn_range(self, method: RangeMethod, *, weight: bool) -> None:
        """Make the present amax a parameter, in place.

        Args:
            method: `lsq` or `pact`.
            weight: What is quantized is a weight, which has no axis of examples.
        """
        self._range_method, self._range_of_weight, self._learn_amax = method, weight, True
        self._range_momentum = None
        self._start_learning()

    def stop_learning_range(self) -> None:
        """Make the learned range the buffer `_amax`, in place."""
        amax = self._learned_amax()
        self._range_method, self._learn_amax = None, False
        self._parameters.pop("_amax", None)
        if amax is not None:
            self._amax = amax.detach().clone()

    def _start_learning(self) -> None:
        if self.learned_range is None:
            amax = self._buffers["_amax"]
            assert amax is not None
            self._amax = nn.Parameter(_as_parameter(amax))

    def _learned_amax(self) -> Tensor | None:
        """The learned range in the graph of autograd; None if there is none."""
        parameter = self.learned_range
        if parameter is None:
            return None
        # Sharded by FSDP2 only outside of a forward pass, where it has to be gathered.
        amax = positive(distributed.whole(parameter), self.format.bound)
        return amax.reshape(()) if self._axis is None and self._block_size is None else amax

    def _write_range(self, value: Any) -> bool:
        """Set the learned range; false if there is none."""
        parameter: Any = self.learned_range
        if parameter is None:
            return False
        amax = torch.as_tensor(value, dtype=torch.float32, device=parameter.device)
        new = _as_parameter(amax)
        with torch.no_grad():
            if new.numel() != parameter.numel():
                self._parameters["_amax"] = nn.Parameter(new, parameter.requires_grad)
            elif hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                mesh, placements = parameter.device_mesh, parameter.placements
                new = distribute_tensor(new.reshape(parameter.shape), mesh, placements)
                parameter.copy_(new)
            else:
                parameter.data.copy_(new.reshape(parameter.shape))
        return True

    def _keep_range_exact(self, exact: Tensor | None) -> None:
        """Undo what half() did to the learned range; `exact` is what it was."""
        parameter = self.learned_range
        if exact is not None and parameter is not None and parameter.dtype != exact.dtype:
            parameter.data = exact.to(parameter.device)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.learned_range is None or keep_vars:
            return
        key = f"{prefix}_amax"
        saved = destination[key]
        sharded = hasattr(saved, "device_mesh")
        local = saved._local_tensor if sharded else saved
        # A copy only where it has to be: programs write to the tensors of a state_dict.
        if not local.is_meta and bool((local < 0).any()):
            saved = saved.abs()
        per_tensor = self._axis is None and self._block_size is None
        destination[key] = saved.reshape(()) if per_tensor and not sharded else saved

    def _in_own_shape(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """`state_dict` with one value in the shape that this quantizer has for it."""
        key = f"{prefix}_amax"
        loaded = state_dict.get(key)
        if loaded is None or loaded.numel() != 1 or loaded.dim() > 1:
            return state_dict
        per_tensor = self._axis is None and self._block_size is None
        shape = loaded.shape
        if self.learned_range is not None and self.learned_range.numel() == 1:
            shape = self.learned_range.shape
        elif per_tensor and self._buffers.get("_amax") is None:
            # From a sharded model, whose one value has an axis.
            shape = torch.Size()
        return state_dict if shape == loaded.shape else {**state_dict, key: loaded.reshape(shape)}

    def _follow(self, inputs: Tensor) -> None:
        """Move the range towards that of `inputs`: a moving average of the batches' maxima.

        NaN and Inf leave it as it is.
        """
        momentum = self._range_momentum
        if momentum is None or _recomputing():
            return
        with torch.no_grad():
            values, axis = self.prescaled(inputs.detach()), self._axis
            if self._block_size is not None:
                assert isinstance(axis, int)
                values, axis = axes.to_groups(values, axis, self._block_size), 0
            seen = axes.reduce_amax(values, axis).float()
            amax = self._buffers.get("_amax")
            if self._range_synced and distributed.world_size() > 1:
                torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            if amax is None:
                self._amax = seen.nan_to_num(0.0, 0.0, 0.0)
                return
            seen = seen.reshape(amax.shape)
            # A range of 0 comes of batches of zeros, or of none that was finite: no start yet.
            moved = torch.where(amax > 0, torch.lerp(seen, amax, momentum), seen)
            # Through .data: what autograd has saved of the range is a copy, see _range_in_use.
            amax.data.copy_(torch.where(torch.isfinite(moved), moved, amax))

    def _range_in_use(self, amax: Tensor | None) -> Tensor | None:
        """The range for a forward pass: `amax`, unless it is learned or about to move."""
        if self.learned_range is not None:
            return self._learned_amax()
        moving = self._range_momentum is not None and self.training and amax is not None
        return amax.clone() if moving and amax is not None else amax


def _as_parameter(amax: Tensor) -> Tensor:
    amax = amax.detach().to(torch.float32).clone()
    return amax if amax.dim() else amax.reshape(1)


def _recomputing() -> bool:
    # A checkpoint runs its part again inside of the backward pass; it was counted the first time.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
