"""Tiny random models, with a tokenizer, saved as a hub download would lie on disk; nothing is fetched."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 512
WIDTH = 64
CONTEXT = 128
FAMILIES = ("gpt2", "gpt_neo", "llama", "mistral", "gemma2")
EXPERIMENTAL = ("gptj", "bloom", "falcon", "falcon_grouped", "falcon_serial")
TEXTS = (
    "def add(left, right):\n    return left + right\n",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "for index in range(10):\n    print(index, 'is less than ten')\n",
    "A model reads its own activations, one layer at a time.",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n",
)


@functools.cache
def _tokenizer_json() -> str:
    """A byte-level BPE with `VOCAB` entries, trained on `TEXTS`; <pad> 0, <bos> 1, <eos> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that every tiny model comes with."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def _build(family: str, layers: int) -> PreTrainedModel:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rope = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **ids,
    }
    match family:
        case "gpt2":
            config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=layers, n_head=4, **ids)
            return GPT2LMHeadModel(config)
        case "gpt_neo":
            neo = GPTNeoConfig(
                vocab_size=VOCAB,
                max_position_embeddings=CONTEXT,
                hidden_size=WIDTH,
                num_layers=layers,
                num_heads=4,
                attention_types=[[["global", "local"], (layers + 1) // 2]],
                window_size=16,
                **ids,
            )
            return GPTNeoForCausalLM(neo)
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**rope, tie_word_embeddings=False))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**rope, sliding_window=32, tie_word_embeddings=False))
        case "gemma2":
            gemma = Gemma2Config(**rope, head_dim=16, query_pre_attn_scalar=16, sliding_window=32)
            gemma._attn_implementation = "eager"
            return Gemma2ForCausalLM(gemma)
    return _other(family, layers, ids)


def _other(family: str, layers: int, ids: dict[str, int]) -> PreTrainedModel:
    size = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 4}
    config: dict[str, Any] = {**size, **ids}
    match family:
        case "t5":
            t5 = T5Config(
                vocab_size=VOCAB,
                d_model=WIDTH,
                d_kv=16,
                d_ff=2 * WIDTH,
                num_layers=layers,
                num_decoder_layers=layers,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                eos_token_id=2,
                pad_token_id=0,
            )
            return T5ForConditionalGeneration(t5)
        case "gptj":
            return GPTJForCausalLM(GPTJConfig(**config, n_positions=CONTEXT, rotary_dim=8))
        case "bloom":
            return BloomForCausalLM(BloomConfig(**config))
        case "falcon":
            return FalconForCausalLM(FalconConfig(**config))
        case "falcon_grouped":
            return FalconForCausalLM(FalconConfig(**config, new_decoder_architecture=True, num_kv_heads=2))
        case "falcon_serial":
            return FalconForCausalLM(FalconConfig(**config, multi_query=False, parallel_attn=False, alibi=True))
    raise ValueError(f"no tiny model of family {family!r}")


def tiny(family: str, layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in memory, in eval mode.

    Every norm gain and bias is random too: a gain of exactly one (or, in Gemma, zero) would hide a hook that takes the
    tensor on the wrong side of the norm.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(family, layers).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if "embed" in name or "wte" in name else 0.12))
    return model.eval()


@functools.cache
def _saved(family: str, layers: int, seed: int) -> Path:
    path = Path(_session_directory().name) / f"{family}-{layers}-{seed}"
    model = tiny(family, layers, seed)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@functools.cache
def _session_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lensmesh-models-")


def saved(family: str, layers: int = 4, seed: int = 0) -> Path:
    """Directory of a tiny model (config, safetensors, tokenizer), built once a session; do not write to it."""
    return _saved(family, layers, seed)


def copied(destination: Path, family: str, layers: int = 4, seed: int = 0) -> Path:
    """A private copy of `saved(...)` below `destination`, for tests that damage files."""
    target = destination / family
    shutil.copytree(saved(family, layers, seed), target)
    return target


def quantized(family: str, bits: int) -> PreTrainedModel:
    """The tiny model of two layers as bitsandbytes' int8 or int4 on the CPU, as residency would load it."""
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model = AutoModelForCausalLM.from_pretrained(saved(family, 2), quantization_config=config, device_map="cpu").eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def batch(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], int64, never a special token."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on a single thread: on models this small two of them cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
