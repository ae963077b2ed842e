"""On a GPU the sparse step is autograd's and the CPU's: cuSPARSE's sampled products and torch's embedding kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from services.residency.lenses.selection import Encoder, select_topk
from services.training.compute import InMemory, TrainConfig, Trainer, fit
from services.training.compute.batch_topk import select_batch_topk
from services.training.compute.dead import revive
from services.training.compute.nested import Parameters, Prefixes, nested_gradients
from services.training.compute.products import PRODUCTS, faster
from services.training.compute.trainer import CoderPlan
from tests.unit.training.compute.test_nested import assert_gradients_equal_autograds, cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
D_IN, D_OUT, WIDTHS = 24, 16, (32, 96, 256)


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def drawn(seed: int, *, skip: bool) -> tuple[Parameters, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (256, D_IN), "b_enc": (256,), "W_dec": (256, D_OUT), "b_dec": (D_OUT,)}
    shapes |= {"W_skip": (D_OUT, D_IN)} if skip else {}
    parameters = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(64, D_IN, generator=generator)
    x[:3] = 0
    return parameters, x, torch.randn(64, D_OUT, generator=generator)


def on_gpu(tensors: Parameters) -> Parameters:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@given(cases())
@settings(deadline=None, max_examples=120)
def test_gradients_equal_autograds_over_all_shapes(case: dict) -> None:
    assert_gradients_equal_autograds(case, "cuda")


@pytest.mark.parametrize("top_k", [16, 256])  # as few as are measured, and all
def test_dense_and_sparse_products_are_chosen_by_measurement_here_too(
    top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"d_in": D_IN, "d_out": D_OUT, "widths": WIDTHS, "top_k": top_k, "rows": 512}
    measured = faster(**shape, device=torch.device("cuda"))
    assert measured in PRODUCTS
    monkeypatch.setattr("services.training.compute.products.PRODUCTS", {})  # it is not measured again
    assert faster(**shape, device=torch.device("cuda")) == measured


@pytest.mark.parametrize("products", sorted(PRODUCTS))
@pytest.mark.parametrize("pick", [select_topk, select_batch_topk])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_gradients_equal_the_cpus(products: str, pick: object, skip: bool, k: int) -> None:
    parameters, x, y = drawn(k, skip=skip)
    weights = torch.tensor([0.2, 0.3, 0.5])
    found = []
    for place, rows, target, share in (
        (parameters, x, y, weights),
        (on_gpu(parameters), x.cuda(), y.cuda(), weights.cuda()),
    ):
        codes = pick(Encoder(place["W_enc"], place["b_enc"]), rows, k)
        found.append(nested_gradients(place, codes, rows, target, Prefixes(WIDTHS, share), kind=PRODUCTS[products]))
    cpu, gpu = found
    assert torch.allclose(gpu.errors.cpu(), cpu.errors, rtol=1e-4)
    whole = torch.stack([gradient.norm() for gradient in cpu.gradients.values()]).norm()
    for name, gradient in cpu.gradients.items():
        assert (gpu.gradients[name].cpu() - gradient).norm() / whole < 1e-5, name


def test_the_auxiliary_loss_equals_the_cpus() -> None:
    parameters, x, y = drawn(0, skip=False)
    dead = torch.arange(0, 256, 3)
    cpu = revive(parameters, dead, x, y, aux_k=8, weight=0.5)
    gpu = revive(on_gpu(parameters), dead.cuda(), x.cuda(), y.cuda(), aux_k=8, weight=0.5)
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-4)
    for name, gradient in cpu.gradients.items():
        assert torch.allclose(gpu.gradients[name].cpu(), gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_on_the_gpu_with_float32_weights(activation: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 32, generator=generator).relu() ** 2
    x, y = features @ torch.randn(32, D_IN, generator=generator), features @ torch.randn(32, D_OUT, generator=generator)
    config = TrainConfig(
        dict_size=256, top_k=8, batch_size=256, num_tokens=256 * 200, activation=activation, dtype=dtype
    )
    transcoder, reports = fit(x.cuda(), y.cuda(), config)
    assert transcoder.W_enc.is_cuda
    assert transcoder.W_enc.dtype == transcoder.threshold.dtype == torch.float32
    assert reports[-1].fvu < 0.5 * reports[0].fvu


def test_a_state_moves_between_devices() -> None:
    x = torch.randn(512, D_IN, generator=torch.Generator().manual_seed(0))
    source = InMemory({"pair": (x, x[:, :D_OUT].clone())})
    plan = {"a": CoderPlan("pair", TrainConfig(dict_size=64, top_k=4, batch_size=64, num_tokens=64 * 8))}
    on_cpu = Trainer(source, plan)
    on_cpu.step()
    tensors, facts = on_cpu.state()
    moved = Trainer(source, plan, "cuda", ({name: tensor.clone() for name, tensor in tensors.items()}, facts))
    for _ in range(3):
        expected, got = on_cpu.step()[0].loss, moved.step()[0].loss
        assert got == pytest.approx(expected, rel=1e-3)
