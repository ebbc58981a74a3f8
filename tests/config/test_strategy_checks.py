"""Unsupported strategy settings are refused before anything starts, in one line with the fix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import ElasticConfig, LrConfig, RunConfig, StrategyConfig, TrainConfig
from launcher.config.strategy_checks import config_errors, missing_dependency
from launcher.errors import UsageError
from launcher.run_dir.open_run import open_run
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


FSDP = replace(DEEPSPEED, strategy=StrategyConfig(name="fsdp"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(FSDP, elastic=ElasticConfig(exact=True)), "strategy=fsdp does not work with elastic.exact=true"),
        (
            make_config(FSDP, param_dtype="bf16"),
            "strategy.param_dtype=bf16 computes in bf16, which contradicts train.precision=fp32",
        ),
        (
            replace(make_config(FSDP, offload=True), train=TrainConfig(device="cpu")),
            "strategy.offload=true with train.device=cpu has no effect: type strategy.offload=false",
        ),
        (make_config(stage=4), "strategy.stage=4 is not a ZeRO stage: type strategy.stage=0, 1, 2 or 3"),
        (
            make_config(offload=True, stage=0),
            "strategy.offload=true needs a sharded optimizer state: type strategy.sta",
        ),
        (
            replace(DEEPSPEED, train=TrainConfig(precision="fp64")),
            "train.precision=fp64 does not work with strategy=deeps",
        ),
        (
            replace(DEEPSPEED, elastic=ElasticConfig(exact=True)),
            "strategy=deepspeed does not work with elastic.exact=true",
        ),
        (
            replace(DEEPSPEED, optimizer={"_target_": "torch.optim.Muon"}),
            "optimizer=Muon cannot work on flat shards of par",
        ),
        (make_config(config="nowhere.json"), "strategy.config=nowhere.json cannot be read: "),
    ],
)
def test_unsupported_strategy_settings_are_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        raise UsageError(next(config_errors(config)))
    assert str(caught.value).startswith(message)
    assert "type " in str(caught.value) or "name a" in str(caught.value)


def test_supported_deepspeed_config_has_no_errors() -> None:
    for stage in range(4):
        assert not list(config_errors(make_config(stage=stage)))
    assert not list(config_errors(replace(make_config(stage=0), optimizer={"_target_": "torch.optim.Muon"})))
    assert not list(config_errors(replace(DEEPSPEED, strategy=StrategyConfig(stage=9))))  # not relevant for DDP


def test_missing_deepspeed_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detected before anything is created, without importing the package; `plan` works without it."""
    monkeypatch.setattr("launcher.config.strategy_checks.find_spec", lambda name: None)
    message = "strategy=deepspeed: DeepSpeed is not installed: type pip install 'elastic-batch-launcher[deepspeed]'"
    assert missing_dependency(DEEPSPEED) == message
    with pytest.raises(UsageError, match="is not installed"):
        open_run(DEEPSPEED, 1)
    assert not list(config_errors(DEEPSPEED))
    assert missing_dependency(RunConfig()) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 64}, "sets train_batch_size, which is set by batch.global here"),
        (
            {"gradient_accumulation_steps": 4},
            "sets gradient_accumulation_steps, which is set by batch.accumulation here",
        ),
        ({"optimizer": {"type": "AdamW"}}, "sets optimizer, which is set by optimizer here"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler, which is set by schedule here"),
        ({"bf16": {"enabled": True}}, "sets bf16, which is set by train.precision here"),
        ({"gradient_clipping": 1.0}, "sets gradient_clipping, which is set by train.clip_norm here"),
        ({"zero_optimization": {"stage": 2}}, "sets zero_optimization.stage, which is set by strategy.stage here"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "which is set by strategy.offload here"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "sets zero_optimization.offload_param, which is n",
        ),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients, which is not supported"),
        ({"tensor_parallel": {"autotp_size": 2}}, "sets tensor_parallel, which is not supported"),
    ],
)
def test_deepspeed_json_cannot_set_launcher_keys(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    config = make_config(config=write_json(tmp_path, **content))
    [problem] = config_errors(config)
    assert message in problem
    assert "take it out of the file" in problem
    with pytest.raises(UsageError, match=r"strategy\.config="):
        make_deepspeed_config(config, 100)


@pytest.mark.parametrize("text", ["{", "[]", '{"zero_optimization": 3}', '"stage"'])
def test_invalid_deepspeed_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UsageError, match="name a DeepSpeed JSON file"):
        list(config_errors(make_config(config=str(tmp_path / "ds.json"))))


def test_static_graph_contradicts_unused_parameters() -> None:
    strategy = StrategyConfig(static_graph=True, find_unused_parameters=True)
    (problem,) = config_errors(RunConfig(strategy=strategy))
    assert "strategy.static_graph=true and strategy.find_unused_parameters=true" in problem
