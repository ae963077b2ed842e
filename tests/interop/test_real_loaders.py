"""Exports are opened by the real sae-lens and eai-sparsify, in an environment of their own that this test builds.

Run it with `pytest -m interop`; it installs from the package index, minutes the first time.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.residency.lenses.transcoder import Transcoder
from services.training.compute import TrainConfig, export, fit, load_foreign
from tests.interop.environments import interpreter_with

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

REQUIREMENTS = ("sae-lens>=6,<7", "eai-sparsify", f"torch=={torch.__version__.partition('+')[0]}")
READER = Path(__file__).with_name("reader.py")


@pytest.fixture(scope="session")
def python() -> Path:
    return interpreter_with(*REQUIREMENTS)


@pytest.fixture(scope="session")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(200, 32, generator=draw)
    x = ((torch.rand(12_000, 200, generator=draw) < 0.03) * torch.rand(12_000, 200, generator=draw)) @ features
    return x, torch.tanh(x @ torch.randn(32, 32, generator=draw) / 6)


@pytest.fixture(scope="session")
def transcoders(rows: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Transcoder]:
    """Trained, by activation, with and without skip path."""
    x, y = rows
    found = {}
    for activation in ("topk", "batch_topk", "jumprelu"):
        for skip in (False, True):
            config = TrainConfig(
                dict_size=512, num_tokens=60_000, top_k=16, batch_size=512, activation=activation, skip=skip
            )
            transcoder, _ = fit(x[:8000], y[:8000], config)
            transcoder.info |= {
                "layer": 0,
                "source_hook_point": "blocks.0.mlp.hook_in",
                "target_hook_point": "blocks.0.hook_mlp_out",
            }
            found[f"{activation}{'-skip' * skip}"] = transcoder
    return found


def read_by_others(python: Path, tool: str, folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """(reconstruction of x, what the tool says it has loaded)."""
    save_file({"x": x.contiguous()}, folder / "x.in")
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # nothing of ours is importable there
    done = subprocess.run(
        [python, READER, tool, folder], env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "y.out")["y"], json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["topk", "batch_topk", "jumprelu", "topk-skip", "batch_topk-skip", "jumprelu-skip"])
def test_sae_lens_reconstructs_what_our_converted_transcoder_does(
    name: str, python: Path, rows: tuple, transcoders: dict, tmp_path: Path
) -> None:
    x, y = rows
    held_out = (x[10_000:], y[10_000:])
    found = export(transcoders[name], "sae_lens", tmp_path, calibrate=x[:8000], held_out=held_out)
    theirs, facts = read_by_others(python, "sae_lens", tmp_path, held_out[0])
    assert facts["class"] == ("JumpReLUSkipTranscoder" if "skip" in name else "JumpReLUTranscoder")
    ours = load_foreign(tmp_path, "sae_lens")(held_out[0])
    torch.testing.assert_close(ours, found.transcoder(held_out[0]), rtol=0, atol=0)
    assert float((theirs - ours).abs().max()) <= 1e-5
    print(name, found.thresholds, found.original, found.converted, float((theirs - ours).abs().max()))  # noqa: T201


@pytest.mark.parametrize("name", ["topk", "topk-skip"])
def test_sparsify_reconstructs_what_we_do(
    name: str, python: Path, rows: tuple, transcoders: dict, tmp_path: Path
) -> None:
    x = rows[0][10_000:]
    export(transcoders[name], "sparsify", tmp_path)
    theirs, facts = read_by_others(python, "sparsify", tmp_path, x)
    assert (facts["k"], facts["num_latents"]) == (16, 512)
    assert float((theirs - transcoders[name](x)).abs().max()) <= 1e-5


def test_what_the_tools_write_themselves_is_read(python: Path, rows: tuple, transcoders: dict, tmp_path: Path) -> None:
    """They load our export and save it again: that file is wholly theirs."""
    x = rows[0][10_000:]
    for tool, name in (("sae_lens", "batch_topk-skip"), ("sparsify", "topk-skip")):
        folder = tmp_path / tool
        export(transcoders[name], tool, folder)
        read_by_others(python, tool, folder, x)
        found = load_foreign(folder / "resaved", tool)
        expected = load_foreign(folder, tool)
        assert found.shape.group_sizes == (512,)
        assert torch.equal(found(x), expected(x))
