"""Models and machines for the plan's tests."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.plan.hardware import HardwareProfile, profile_from_mapping
from flexbatch.plan.model_spec import ModelSpec

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GIB = 1 << 30


@cache
def model(name: str, dtype: str = "bfloat16") -> ModelSpec:
    config = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["config"]
    return spec_from_config(config, name, stored_dtype=dtype, compute_dtype=dtype)


@cache
def tiny_model() -> ModelSpec:
    """The model that comes with flexbatch."""
    return spec_from_config(json.loads((ROOT / "flexbatch/embedded/opt_tiny/config.json").read_text()), "opt-tiny")


@cache
def _machine(name: str) -> HardwareProfile:
    profile = yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())["profile"]
    return profile_from_mapping(profile, where=name)


def machine(name: str, **changes: Any) -> HardwareProfile:
    return replace(_machine(name), **changes)
