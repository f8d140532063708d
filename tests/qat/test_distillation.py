"""Distillation against NumPy, and its teacher."""

import numpy as np
import pytest
import torch
from qat_models import images, labels, network

from pytorch_quant import qat
from pytorch_quant.nn.modes import named_quantizers


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distill_loss_is_the_formula(alpha):
    student, teacher, target = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    p, q = (softmax(x.numpy().astype(np.float64) / 3) for x in (teacher, student))
    soft = 9 * (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(student.numpy().astype(np.float64))[range(6), target]).mean()
    loss = qat.distill_loss(student, teacher, target, temperature=3, alpha=alpha)
    np.testing.assert_allclose(loss, alpha * soft + (1 - alpha) * hard, rtol=1e-5)
    np.testing.assert_allclose(qat.distill_loss(student, teacher, temperature=3), soft, rtol=1e-5)


def test_distill_loss_of_maps_and_its_gradients():
    student = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: qat.distill_loss(s, teacher.detach()), student)
    qat.distill_loss(student, teacher).backward()
    assert teacher.grad is None
    flat = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(qat.distill_loss(*flat), qat.distill_loss(student, teacher))
    assert qat.distill_loss(student.half(), teacher.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), r"one shape \(N, C, ...\), got \(2, 3\) and"),
        ((torch.zeros(3), torch.zeros(3)), "one shape"),
    ],
)
def test_distill_loss_of_other_shapes(arguments, told):
    with pytest.raises(ValueError, match=told):
        qat.distill_loss(*arguments)
    for options, problem in (({"temperature": 0}, "temperature"), ({"alpha": 2}, "alpha")):
        with pytest.raises(ValueError, match=problem):
            qat.distill_loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_a_teacher_is_the_float_model_and_stays():
    model = network().eval()
    for quantizer in named_quantizers(model).values():
        quantizer.disable()
    wanted = model(images())
    for quantizer in named_quantizers(model).values():
        quantizer.enable()
    teacher = qat.Teacher(model.train())
    qat.distill_loss(model(images()), teacher(images()), labels()).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(teacher(images()), wanted) and not teacher(images()).requires_grad
    assert teacher.to(torch.float64)(images().double()).dtype == torch.float64
    assert model.training and all(p.requires_grad for p in model.parameters())
