"""Run random rows of a downloaded activation cache again, with a plain Transformers model; knows nothing of Lensmesh.

    rerun.py GATEWAY CACHE_ID MODEL_FOLDER TEXTS.jsonl [--rows 1000] [--adapter LORA_FOLDER]     (token in $TOKEN)

Prints one JSON object: rows that were compared, how many have the same bits in x and in y, the largest relative error.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import httpx
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

MLP = {"gpt2": "transformer.h.{}.mlp", "llama": "model.layers.{}.mlp", "gemma2": "model.layers.{}.mlp"}
ADDED = {**MLP, "gemma2": "model.layers.{}.post_feedforward_layernorm"}


def download(gateway: str, cache_id: str, name: str, folder: Path) -> Path:
    url = f"{gateway}/api/activation-caches/{cache_id}/files/{name}"
    reply = httpx.get(url, headers={"Authorization": f"Bearer {os.environ['TOKEN']}"}, timeout=60)
    (folder / name).write_bytes(reply.raise_for_status().content)
    return folder / name


def load(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def load_model(folder: Path, adapter: Path | None, told: dict[str, str]) -> torch.nn.Module:
    options: dict[str, object] = {"attn_implementation": told["attention"], "dtype": "auto"}
    if told["quantization"] == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        options["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if adapter is not None:
        model.load_adapter(str(adapter))
    return model.eval()


class Rows:
    """A cache and the texts that it was made of."""

    def __init__(self, folder: Path, texts: list[str], tokenizer: object) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.table = load(folder / "sequences.safetensors")
        self.shards = [load(folder / shard["name"]) for shard in self.manifest["shards"]]
        self.texts = texts
        self.tokenizer = tokenizer

    def chosen(self, count: int) -> list[tuple[int, int]]:
        """(shard, row) of random rows."""
        sizes = [shard["rows"] for shard in self.manifest["shards"]]
        whole = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
        picked = np.random.default_rng(0).choice(len(whole), min(count, len(whole)), replace=False)
        return [whole[index] for index in picked]

    def text_tokens(self, sequence: int) -> list[int]:
        """The tokens of a sequence, from the text of its dataset row."""
        row = int(self.table["row"][sequence])
        ids = self.tokenizer(self.texts[row])["input_ids"][: self.manifest["dataset"]["max_length"]]
        low, high = self.table["offset"][sequence : sequence + 2].tolist()
        assert ids == self.table["ids"][low:high].tolist(), "the text gives other tokens"
        return ids

    def characters(self, sequence: int, position: int) -> str:
        """The characters of a token."""
        start, stop = self.table["span"][int(self.table["offset"][sequence]) + position].tolist()
        return self.texts[int(self.table["row"][sequence])][start:stop]

    def batch(self, number: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """(sequences, ids, mask) of a forward pass, made of texts."""
        members = (self.table["batch"] == number).nonzero().flatten()
        lengths = self.table["offset"].diff()[members]
        members = members[torch.argsort(-lengths, stable=True)].tolist()
        tokens = [self.text_tokens(member) for member in members]
        ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, found in enumerate(tokens):
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return members, ids, mask


def captured(model: torch.nn.Module, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    kind, seen = model.config.model_type, {}
    mlp, added = (model.get_submodule(paths[kind].format(layer)) for paths in (MLP, ADDED))
    handles = [
        mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        added.register_forward_hook(lambda _, __, output: seen.update(y=output)),
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gateway")
    parser.add_argument("cache_id")
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--adapter", type=Path)
    told = parser.parse_args()
    texts = [json.loads(line)["text"] for line in told.texts.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        manifest = json.loads(download(told.gateway, told.cache_id, "manifest.json", folder).read_text())
        for name in ("sequences.safetensors", *(shard["name"] for shard in manifest["shards"])):
            download(told.gateway, told.cache_id, name, folder)
        tokenizer = AutoTokenizer.from_pretrained(told.model)
        rows = Rows(folder, texts, tokenizer)
        model = load_model(told.model, told.adapter, manifest["model"])
    x_name, y_name = (point["name"] for point in manifest["hook_points"])
    layer = manifest["hook_points"][0]["layer"]
    batches: dict[int, list[tuple[int, int]]] = {}
    for shard, row in rows.chosen(told.rows):
        sequence = int(rows.shards[shard]["seq"][row])
        batches.setdefault(int(rows.table["batch"][sequence]), []).append((shard, row))
    figures = {"rows": 0, "x": 0, "y": 0, "characters": 0, "error": 0.0}
    for number, wanted in batches.items():
        members, ids, mask = rows.batch(number)
        found = captured(model, layer, ids, mask)
        for shard, row in wanted:
            stored = rows.shards[shard]
            sequence, position = int(stored["seq"][row]), int(stored["pos"][row])
            place = (members.index(sequence), position)
            assert int(ids[place]) == int(stored["tok"][row])
            figures["rows"] += 1
            figures["characters"] += tokenizer.decode([int(ids[place])]) == rows.characters(sequence, position)
            for key, name in (("x", x_name), ("y", y_name)):
                kept = stored[name][row]
                again = found[key][place].to(kept.dtype)
                figures[key] += torch.equal(again, kept)
                figures["error"] = max(figures["error"], float((again - kept).norm() / kept.norm()))
    print(json.dumps(figures))  # noqa: T201 - the figures are what this script is for


if __name__ == "__main__":
    main()
