"""Train the demo's model: a small GPT-2 with a byte-level BPE tokenizer, on the source of Python's standard library.

    python deploy/demo/train_tiny_gpt2.py --out deploy/demo/tiny-gpt2
    python deploy/demo/train_tiny_gpt2.py --out /tmp/smoke --steps 20          # a smoke run

4 layers, width 256, 4 heads, context 256, vocabulary 4,096. Files below `test` directories are never trained on; the
held-out loss that is printed is measured on them.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CONTEXT = 256
VOCABULARY = 4096
END = "<|endoftext|>"
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}


def sources(tests: bool) -> list[str]:
    """Texts of the standard library's files, those of its tests or all others."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(library.rglob("*.py")):
        parts = set(path.relative_to(library).parts)
        if not parts & SKIPPED and bool(parts & TESTS) == tests:
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; every sequence starts with END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts one after the other, each behind END: int64 [tokens]."""
    return torch.tensor([token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids])


def batches(stream: torch.Tensor, batch_size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Windows at random places, int64 [batch_size, CONTEXT]; each starts with END, as at inference."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(stream) - CONTEXT, (batch_size,), generator=generator)
        windows = torch.stack([stream[start : start + CONTEXT] for start in starts])
        windows[:, 0] = 0
        yield windows


@torch.inference_mode()
def held_out_loss(model: GPT2LMHeadModel, stream: torch.Tensor, windows: int = 64) -> float:
    """Mean next-token loss in nats over evenly spaced windows."""
    model.eval()
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, windows).long()
    losses = []
    for start in starts:
        window = stream[start : start + CONTEXT][None].clone()
        window[:, 0] = 0
        losses.append(model(window, labels=window).loss.item())
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, peak: float = 1e-3, warm_up: int = 200) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(stream: torch.Tensor, held_out: torch.Tensor, steps: int, batch_size: int, seed: int) -> GPT2LMHeadModel:
    """A model trained from scratch."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step, batch in enumerate(batches(stream, batch_size, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  held out {held_out_loss(model, held_out):.3f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model and its tokenizer to")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    texts, held_out = sources(tests=False), sources(tests=True)
    tokenizer = train_tokenizer(texts)
    streams = token_stream(tokenizer, texts), token_stream(tokenizer, held_out or texts[-20:])
    model = train(*streams, arguments.steps, arguments.batch_size, arguments.seed)
    model.save_pretrained(arguments.out)
    special = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
