"""The DeepSpeed configuration made from a RunConfig and the user's JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.schema import LrConfig, RunConfig, StrategyConfig
from launcher.strategies.deepspeed_config import make_deepspeed_config

DEEPSPEED = RunConfig(
    optimizer={"_target_": "torch.optim.AdamW"},
    lr=LrConfig(base=0.1),
    strategy=StrategyConfig(name="deepspeed", stage=3),
)


def make_config(base: RunConfig = DEEPSPEED, **keys: Any) -> RunConfig:
    return replace(base, strategy=replace(base.strategy, **keys))


def write_json(tmp_path: Path, **content: Any) -> str:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_deepspeed_json_sets_tuning_options(tmp_path: Path) -> None:
    """Values that are open ("auto", not enabled) or equal ours do not conflict."""
    settings = {"stage": 3, "stage3_max_live_parameters": 1000, "reduce_bucket_size": "auto", "overlap_comm": False}
    file = write_json(tmp_path, train_batch_size="auto", fp16={"enabled": False}, zero_optimization=settings)
    result = make_deepspeed_config(make_config(config=file), 100)
    assert result["zero_optimization"] == {
        "stage": 3,
        "stage3_max_live_parameters": 1000,
        "reduce_bucket_size": 100,
        "overlap_comm": False,
    }
    assert "fp16" not in result
    assert "train_batch_size" not in result


def test_deepspeed_config_neutralises_batch_size_assertions() -> None:
    result = make_deepspeed_config(DEEPSPEED, 10**12)
    assert (result["train_micro_batch_size_per_gpu"], result["gradient_accumulation_steps"]) == (1, 1)
    assert "train_batch_size" not in result
    assert result["gradient_clipping"] == 0.0  # DeepSpeed's default clips at 1
    assert result["zero_optimization"]["reduce_bucket_size"] == 500_000_000
