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

ZERO = RunConfig(
    optimizer={"_target_": "torch.optim.AdamW"},
    lr=LrConfig(base=0.1),
    strategy=StrategyConfig(name="deepspeed", stage=3),
)


def zero(config: RunConfig = ZERO, **keys: Any) -> RunConfig:
    return replace(config, strategy=replace(config.strategy, **keys))


def own(tmp_path: Path, **content: Any) -> str:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    return str(file)


FSDP = replace(ZERO, strategy=StrategyConfig(name="fsdp"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(FSDP, elastic=ElasticConfig(exact=True)), "strategy=fsdp does not work with elastic.exact=true"),
        (
            zero(FSDP, param_dtype="bf16"),
            "strategy.param_dtype=bf16 computes in bf16, which contradicts train.precision=fp32",
        ),
        (
            replace(zero(FSDP, offload=True), train=TrainConfig(device="cpu")),
            "strategy.offload=true with train.device=cpu has no effect: type strategy.offload=false",
        ),
        (zero(stage=4), "strategy.stage=4 is not a ZeRO stage: type strategy.stage=0, 1, 2 or 3"),
        (zero(offload=True, stage=0), "strategy.offload=true needs a sharded optimizer state: type strategy.sta"),
        (
            replace(ZERO, train=TrainConfig(precision="fp64")),
            "train.precision=fp64 does not work with strategy=deeps",
        ),
        (
            replace(ZERO, elastic=ElasticConfig(exact=True)),
            "strategy=deepspeed does not work with elastic.exact=true",
        ),
        (replace(ZERO, optimizer={"_target_": "torch.optim.Muon"}), "optimizer=Muon cannot work on flat shards of par"),
        (zero(config="nowhere.json"), "strategy.config=nowhere.json cannot be read: "),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(config: RunConfig, says: str) -> None:
    with pytest.raises(UsageError) as found:
        raise UsageError(next(config_errors(config)))
    assert str(found.value).startswith(says)
    assert "type " in str(found.value) or "name a" in str(found.value)


def test_a_run_that_deepspeed_can_do_has_no_problem() -> None:
    for stage in range(4):
        assert not list(config_errors(zero(stage=stage)))
    assert not list(config_errors(replace(zero(stage=0), optimizer={"_target_": "torch.optim.Muon"})))
    assert not list(config_errors(replace(ZERO, strategy=StrategyConfig(stage=9))))  # not relevant for DDP


def test_without_deepspeed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detected before anything is created, without importing the package; `plan` works without it."""
    monkeypatch.setattr("launcher.strategies.deepspeed_config.find_spec", lambda name: None)
    says = "strategy=deepspeed: DeepSpeed is not installed: type pip install 'elastic-batch-launcher[deepspeed]'"
    assert missing_dependency(ZERO) == says
    with pytest.raises(UsageError, match="is not installed"):
        open_run(ZERO, 1)
    assert not list(config_errors(ZERO))
    assert missing_dependency(RunConfig()) is None


@pytest.mark.parametrize(
    ("content", "says"),
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
def test_a_json_may_not_say_what_has_a_key_here(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    config = zero(config=own(tmp_path, **content))
    [problem] = config_errors(config)
    assert says in problem
    assert "take it out of the file" in problem
    with pytest.raises(UsageError, match=r"strategy\.config="):
        make_deepspeed_config(config, 100)


def test_a_json_says_how_the_work_is_done(tmp_path: Path) -> None:
    """Values that are open ("auto", not enabled) or equal ours do not conflict."""
    settings = {"stage": 3, "stage3_max_live_parameters": 1000, "reduce_bucket_size": "auto", "overlap_comm": False}
    file = own(tmp_path, train_batch_size="auto", fp16={"enabled": False}, zero_optimization=settings)
    made = make_deepspeed_config(zero(config=file), 100)
    assert made["zero_optimization"] == {
        "stage": 3,
        "stage3_max_live_parameters": 1000,
        "reduce_bucket_size": 100,
        "overlap_comm": False,
    }
    assert "fp16" not in made
    assert "train_batch_size" not in made


def test_no_batch_assertion_of_deepspeed_can_contradict_the_plan() -> None:
    made = make_deepspeed_config(ZERO, 10**12)
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (1, 1)
    assert "train_batch_size" not in made
    assert made["gradient_clipping"] == 0.0  # DeepSpeed's default clips at 1
    assert made["zero_optimization"]["reduce_bucket_size"] == 500_000_000


@pytest.mark.parametrize("text", ["{", "[]", '{"zero_optimization": 3}', '"stage"'])
def test_what_is_no_deepspeed_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UsageError, match="name a DeepSpeed JSON file"):
        list(config_errors(zero(config=str(tmp_path / "ds.json"))))
