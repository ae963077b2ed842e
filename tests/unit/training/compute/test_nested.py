"""The sparse step's gradients are autograd's dense ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import Encoder, select_topk
from services.training.compute.batch_topk import select_batch_topk
from services.training.compute.dead import revive
from services.training.compute.nested import Parameters, Prefixes, nested_gradients
from services.training.compute.products import PRODUCTS


def draw_parameters(generator: torch.Generator, d_in: int, d_out: int, dict_size: int, *, skip: bool) -> Parameters:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parameters = {
        "W_enc": draw(dict_size, d_in),
        "b_enc": draw(dict_size),
        "W_dec": draw(dict_size, d_out),
        "b_dec": draw(d_out),
    }
    return parameters | ({"W_skip": draw(d_out, d_in)} if skip else {})


def dense_gradients(
    parameters: Parameters, active: Tensor, x: Tensor, y: Tensor, prefixes: Prefixes
) -> tuple[Tensor, Parameters]:
    """Autograd over the plain formula; `active` bool [N, D] is the selection, which is a constant."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    z = (x @ leaves["W_enc"].T + leaves["b_enc"]).relu() * active
    base = leaves["b_dec"] + (x @ leaves["W_skip"].T if "W_skip" in leaves else 0)
    errors = torch.stack([(base + z[:, :m] @ leaves["W_dec"][:m] - y).square().mean() for m in prefixes.widths])
    (errors @ prefixes.weights).backward()
    return errors.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(got: Parameters, expected: Parameters) -> None:
    """To 1e-5 of the whole gradient in float32 (a single parameter's may have cancelled), to 1e-12 in float64."""
    assert got.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().clamp_min(1e-6)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() / whole < (1e-5 if gradient.dtype == torch.float32 else 1e-12), name


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    groups = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    return {
        "groups": groups,
        "k": draw(st.integers(1, sum(groups))),
        "rows": draw(st.integers(1, 9)),
        "d_in": draw(st.integers(1, 7)),
        "d_out": draw(st.integers(1, 7)),
        "skip": draw(st.booleans()),
        "batch": draw(st.booleans()),
        "ties": draw(st.booleans()),
        "silent": draw(st.booleans()),
        "products": draw(st.sampled_from(sorted(PRODUCTS))),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 2**31)),
    }


def assert_gradients_equal_autograds(case: dict, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    dict_size = sum(case["groups"])
    parameters = draw_parameters(generator, case["d_in"], case["d_out"], dict_size, skip=case["skip"])
    parameters = {name: tensor.to(case["dtype"]) for name, tensor in parameters.items()}
    x = torch.randn(case["rows"], case["d_in"], generator=generator).to(case["dtype"])
    y = torch.randn(case["rows"], case["d_out"], generator=generator).to(case["dtype"])
    if case["ties"]:
        parameters["W_enc"] = parameters["W_enc"][:1].repeat(dict_size, 1)
        parameters["b_enc"][:] = 0
    if case["silent"]:
        x[0] = 0
        parameters["b_enc"].clamp_(max=-0.5)
    widths = torch.tensor(case["groups"]).cumsum(0).tolist()
    weights = torch.rand(len(widths), generator=generator).to(case["dtype"]) + 0.1
    weights /= weights.sum()
    parameters = {name: tensor.to(device) for name, tensor in parameters.items()}
    x, y, weights = x.to(device), y.to(device), weights.to(device)
    pick = select_batch_topk if case["batch"] else select_topk
    codes = pick(Encoder(parameters["W_enc"], parameters["b_enc"]), x, case["k"])
    if case["silent"]:
        assert not (codes.row == 0).any()
    kind = PRODUCTS[case["products"]]
    got = nested_gradients(parameters, codes, x, y, Prefixes(widths, weights), kind=kind)
    errors, expected = dense_gradients(parameters, codes.dense() > 0, x, y, Prefixes(widths, weights))
    assert torch.allclose(got.errors, errors, rtol=1e-4, atol=1e-6)
    assert_same(got.gradients, expected)


@given(cases())
@settings(deadline=None, max_examples=120)
def test_gradients_equal_autograds(case: dict) -> None:
    assert_gradients_equal_autograds(case)


def test_one_prefix_is_the_plain_transcoder() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = draw_parameters(generator, 5, 4, 32, skip=False)
    x, y = torch.randn(16, 5, generator=generator), torch.randn(16, 4, generator=generator)
    codes = select_topk(Encoder(parameters["W_enc"], parameters["b_enc"]), x, 6)
    got = nested_gradients(parameters, codes, x, y, Prefixes([32], torch.ones(1)))
    z = codes.dense()
    assert torch.allclose(got.residual, y - (z @ parameters["W_dec"] + parameters["b_dec"]), atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_auxiliary_loss_reaches_the_encoder_of_the_dead_and_nobody_else(dead_count: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = draw_parameters(generator, 5, 4, 32, skip=False)
    x, residual = torch.randn(16, 5, generator=generator), torch.randn(16, 4, generator=generator)
    dead = torch.randperm(32, generator=generator)[:dead_count].sort().values
    revival = revive(parameters, dead, x, residual, aux_k=k, weight=0.5)

    leaves = {name: parameters[name][dead].clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec")}
    pre = x @ leaves["W_enc"].T + leaves["b_enc"]
    chosen = torch.zeros_like(pre).scatter(1, pre.topk(min(k, dead_count), 1).indices, 1.0)
    error = (pre.relu() * chosen) @ leaves["W_dec"] - residual
    loss = error.square().mean() / residual.var(0, correction=0).mean()
    (0.5 * loss).backward()
    assert abs(revival.loss - loss.item()) < 1e-4 * max(1.0, loss.item())
    assert_same(revival.gradients, {name: leaf.grad for name, leaf in leaves.items()})
    assert revival.latents.tolist() == dead.tolist()


def test_an_empty_code_reconstructs_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = draw_parameters(generator, 3, 2, 8, skip=False)
    none = torch.zeros(0, dtype=torch.int64)
    got = nested_gradients(
        parameters,
        Codes(4, 8, none, none, torch.zeros(0)),
        torch.zeros(4, 3),
        torch.zeros(4, 2),
        Prefixes([3, 8], torch.full((2,), 0.5)),
    )
    assert torch.allclose(got.residual, -parameters["b_dec"].expand(4, -1))
    assert not got.gradients["W_enc"].any()
    assert not got.gradients["W_dec"].any()
