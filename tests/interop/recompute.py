"""FVU and CE of an exported transcoder from its files alone: torch, transformers and safetensors, nothing of Lensmesh.

    recompute.py MODEL EXPORT TOKENS LAYER

MODEL is a directory of transformers, EXPORT a folder of SAELens, TOKENS a safetensors file with `ids`, `mask` and
`counted`, int64 [batches, rows, length]. Prints {"fvu", "ce_clean", "ce_spliced", "ce_zero_ablated", "l0"}.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def places(model, layer):
    """(the MLP, the module whose output is what the layer adds)."""
    block = model.transformer.h[layer] if hasattr(model, "transformer") else model.model.layers[layer]
    return block.mlp, getattr(block, "post_feedforward_layernorm", block.mlp)


def reconstruct(weights, x):
    pre = x @ weights["W_enc"] + weights["b_enc"]
    acts = torch.where((pre > weights["threshold"]) & (pre > 0), pre, torch.zeros_like(pre))
    out = acts @ weights["W_dec"] + weights["b_dec"]
    return acts, out + x @ weights["W_skip"].T if "W_skip" in weights else out


@torch.no_grad()
def main(model_dir, export, tokens, layer):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    weights = load_file(Path(export) / "sae_weights.safetensors")
    mlp, contribution = places(model, layer)
    seen, replace = {}, {"by": None}

    def on_input(module, arguments):
        seen["x"] = arguments[0]

    def on_output(module, arguments, output):
        seen["y"] = output
        if replace["by"] == "reconstruction":
            return reconstruct(weights, seen["x"].flatten(0, 1))[1].view_as(output)
        return torch.zeros_like(output) if replace["by"] == "zero" else None

    mlp.register_forward_pre_hook(on_input)
    contribution.register_forward_hook(on_output)
    data = load_file(tokens)
    xs, ys, losses = [], [], {"ce_clean": [], "ce_spliced": [], "ce_zero_ablated": []}
    for ids, mask, counted in zip(data["ids"], data["mask"], data["counted"], strict=True):
        for name, by in (("ce_clean", None), ("ce_spliced", "reconstruction"), ("ce_zero_ablated", "zero")):
            replace["by"] = by
            scores = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
            if by is None:
                keep = counted.bool()
                xs.append(seen["x"][keep])
                ys.append(seen["y"][keep])
            loss = -scores[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            losses[name].append(loss[(mask[:, 1:] * mask[:, :-1]).bool()])
    x, y = torch.cat(xs), torch.cat(ys).double()
    acts, out = reconstruct(weights, x)
    found = {name: float(torch.cat(parts).mean()) for name, parts in losses.items()}
    found["fvu"] = float((y - out).square().sum() / (y - y.mean(0)).square().sum())
    found["l0"] = float((acts > 0).sum(1).double().mean())
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:4], int(sys.argv[4]))) + "\n")
