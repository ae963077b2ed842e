"""One rank of the training that `test_ranks` compares: `python -m …together RANK WORLD FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from services.training.compute import CoderPlan, InMemory, TrainConfig, Trainer
from services.training.compute.ranks import Ranks

CODERS = ("topk", "batch_topk", "jumprelu")
STEPS, BATCH = 12, 64


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(512, 24, generator=generator).relu()
    return features @ torch.randn(24, 16, generator=generator) + 1, features @ torch.randn(24, 8, generator=generator)


def plans() -> dict[str, CoderPlan]:
    return {
        name: CoderPlan(
            "pair",
            TrainConfig(
                dict_size=96,
                group_sizes=(32, 64),
                top_k=3,
                activation=name,
                skip=name == "topk",
                batch_size=BATCH,
                num_tokens=STEPS * BATCH,
                dead_after_tokens=2 * BATCH,
                learning_rate=3e-3,
            ),
        )
        for name in CODERS
    }


def trained(ranks: Ranks) -> dict[str, Tensor]:
    trainer = Trainer(InMemory({"pair": data()}), plans(), ranks=ranks)
    steps = list(trainer.run())
    figures = {
        f"{name}/{key}": torch.tensor([getattr(reports[number], field) for reports in steps], dtype=torch.float64)
        for number, name in enumerate(CODERS)
        for key, field in (("losses", "loss"), ("l0", "l0"), ("dead", "dead_fraction"))
    }
    return figures | {name: tensor.clone() for name, tensor in trainer.state()[0].items()}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    save_file(trained(Ranks.joined()), folder / f"{rank}.safetensors")
    dist.destroy_process_group()
