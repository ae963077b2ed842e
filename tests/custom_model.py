"""A model class as an operator may have one: GPT-2 under a name that transformers does not know."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel


class TwinConfig(GPT2Config):
    model_type = "lensmesh_twin"


class TwinLM(GPT2LMHeadModel):
    config_class = TwinConfig


class NoModel:
    pass
