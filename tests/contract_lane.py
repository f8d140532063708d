"""Which tests have to hold on every torch that is supported: the lane `-m contract`.

Core numerics, `torch.compile`, both exporters, `quantize` on torchvision's and our own models,
programs of pytorch_quantization, checkpoints. tools/matrix.py runs it in each environment.
"""

CONTRACT = frozenset(
    {
        "compat/test_habits.py",
        "compat/test_habits_export.py",
        "compat/test_habits_objects.py",
        "compat/test_old_pickles.py",
        "compat/test_tutorials.py",
        "export/test_dynamic_export.py",
        "export/test_export_onnx.py",
        "export/test_fp8_export.py",
        "export/test_int4.py",
        "export/test_opsets.py",
        "export/test_plain_export.py",
        "export/test_verify.py",
        "nn/test_compile.py",
        "nn/test_layers.py",
        "nn/test_tensor_quantizer.py",
        "nn/test_weight_cache.py",
        "placement/test_against_hand_built.py",
        "placement/test_attention.py",
        "placement/test_compiled_models.py",
        "placement/test_frames.py",
        "placement/test_planning_models.py",
        "ptq/test_calibration.py",
        "ptq/test_storage.py",
        "qat/test_learning.py",
        "qat/test_training.py",
        "test_axes.py",
        "test_fake_quant.py",
        "test_formats.py",
        "test_public_api.py",
        "test_quantization.py",
        "test_tensor_quant.py",
        "test_versions.py",
        "tools/test_matrix.py",
    }
)
"""Files below tests/, whole; single tests elsewhere carry the marker themselves."""
