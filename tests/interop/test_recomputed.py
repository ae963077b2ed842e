"""Our evaluation's figures beside those of a script that knows only an exported file and the model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.extraction.compute import capture
from services.residency.families import family_of
from services.training.compute import TrainConfig, export, fit, load_foreign
from services.training.compute.evaluation import Evaluation, Judgement
from tests import models

SCRIPT = Path(__file__).with_name("recompute.py")
DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "tiny-gpt2"
Batch = tuple[Tensor, Tensor, Tensor]


def recomputed(model: Path, folder: Path, batches: list[Batch], layer: int) -> dict[str, float]:
    parts = zip(*batches, strict=True)
    tokens = {name: torch.stack(part) for name, part in zip(("ids", "mask", "counted"), parts, strict=True)}
    save_file(tokens, folder / "tokens")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, model, folder, folder / "tokens", str(layer)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def evaluated(path: Path, folder: Path, train: list[Batch], batches: list[Batch], config: TrainConfig) -> Judgement:
    """Train on layer 1 of a model, export, read the export again, and judge that."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    points = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    found = list(capture(model, [batch[0] for batch in train], points))
    x, y = (torch.cat([acts[point] for acts in found]) for point in points)
    transcoder, _ = fit(x, y, config)
    transcoder.info |= {"layer": 1, "source_hook_point": points[0], "target_hook_point": points[1]}
    export(transcoder, "sae_lens", folder, calibrate=x[:4096])
    evaluation = Evaluation(model, family_of(model), load_foreign(folder, "sae_lens"))
    for batch in batches:
        evaluation.read(*batch)
    for ids, mask, _ in batches:
        evaluation.score(ids, mask)
    return evaluation.result()


def assert_same(found: Judgement, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_small_models_figures_are_those_of_the_script(family: str, tmp_path: Path) -> None:
    batches = []
    for seed in range(2):
        ids = models.batch(4, 24, seed)
        mask = torch.ones_like(ids)
        mask[3, 15:] = 0
        counted = mask.clone()
        counted[:, 0] = 0
        batches.append((ids, mask, counted))
    train = [(models.batch(16, 32, seed), torch.empty(0), torch.empty(0)) for seed in range(10, 18)]
    config = TrainConfig(dict_size=256, num_tokens=20_000, top_k=16, batch_size=512)
    with models.one_thread():
        found = evaluated(models.saved(family), tmp_path / "out", train, batches, config)
    assert abs(found.ce_zero_ablated - found.ce_clean) > 0.02  # it matters what the layer adds
    assert_same(found, recomputed(models.saved(family), tmp_path / "out", batches, 1))


@pytest.mark.interop
@pytest.mark.timeout(600)
def test_the_demo_models_figures_are_those_of_the_script(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / name).read_text() for name in ("argparse.py", "typing.py", "tarfile.py", "doctest.py"))
    stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = stream[: len(stream) // 255 * 255].view(-1, 255)
    ids = torch.nn.functional.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    batches = []
    for part in ids[:16].split(4):
        counted = torch.ones_like(part)
        counted[:, 0] = 0
        batches.append((part, torch.ones_like(part), counted))
    train = [(part, torch.empty(0), torch.empty(0)) for part in ids[16:].split(8)]
    config = TrainConfig(dict_size=2048, num_tokens=150_000, top_k=32, batch_size=1024)
    found = evaluated(DEMO, tmp_path / "out", train, batches, config)
    expected = recomputed(DEMO, tmp_path / "out", batches, 1)
    print(found.fvu, found.ce_spliced, found.ce_clean, expected)  # noqa: T201
    assert found.ce_recovered > 0.5
    assert_same(found, expected)
