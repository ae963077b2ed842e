"""Load an export with the tool it is for and reconstruct; knows nothing of Lensmesh. `reader.py TOOL FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    x = load_file(folder / "x.in")["x"]
    if tool == "sae_lens":
        from sae_lens import SAE

        loaded = SAE.load_from_disk(folder)
        facts = {"class": type(loaded).__name__}
        with torch.no_grad():
            y = loaded(x)
        loaded.save_model(folder / "resaved")
    else:
        from sparsify import SparseCoder

        loaded = SparseCoder.load_from_disk(folder)
        facts = {"k": loaded.cfg.k, "num_latents": loaded.num_latents}
        with torch.no_grad():
            y = loaded(x).sae_out
        loaded.save_to_disk(folder / "resaved")
    save_file({"y": y.contiguous()}, folder / "y.out")
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
