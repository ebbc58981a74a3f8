"""Names that other frameworks use for a key, and names of earlier versions of this one, each with what to type here."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["WORLD_SIZE_NAMES", "find_by_other_name"]

WORLD_SIZE_NAMES = frozenset(
    {
        "devices",
        "gpus_per_node",
        "n_gpus",
        "ngpus",
        "nproc",
        "nproc_per_node",
        "num_devices",
        "num_gpus",
        "num_processes",
        "world",
        "world_size",
    }
)

EPOCHS, UPDATES = "train.duration={}ep", "train.duration={}ba"
#: What to type -> the names that are typed elsewhere for it. `{}` is the typed value where it is a number.
NAMES_BY_SETTING: Mapping[str, str] = {
    EPOCHS: "epochs epoch max_epochs max_epoch num_epochs n_epochs nb_epochs num_train_epochs total_epochs "
    "training_epochs train_epochs",
    UPDATES: "max_steps num_steps total_steps train_steps training_steps max_train_steps num_train_steps max_iters "
    "num_iters max_iterations num_iterations iterations iters n_steps steps updates max_updates num_updates "
    "train_iters max_iter",
    "batch.per_device": "batch_size bs batchsize micro_batch_size microbatch_size train_micro_batch_size_per_gpu "
    "micro_batch_size_per_gpu per_device_batch_size per_device_train_batch_size batch_size_per_gpu "
    "batch_size_per_device device_batch_size local_batch_size batch.size batch.micro data.batch",
    "batch.global": "global_batch_size global_batch total_batch_size train_batch_size effective_batch_size "
    "batch.global_size",
    "batch.accumulation": "accumulate_grad_batches accumulate accum accum_steps accumulation_steps accum_iter "
    "grad_accum grad_accum_steps grad_accumulation grad_accumulation_steps gradient_accumulation "
    "gradient_accumulation_steps",
    "lr.base": "lr learning_rate learningrate base_lr max_lr peak_lr initial_lr init_lr eta lr.value lr.lr",
    "schedule=cosine": "scheduler lr_scheduler lr_schedule lr_scheduler_type scheduler_type lr_policy schedule.type "
    "schedule.name schedule.kind",
    "schedule.warmup": "warmup lr.warmup",
    "schedule.warmup={}ba": "warmup_steps num_warmup_steps warmup_iters warmup_iterations warmup_updates",
    "schedule.warmup={}ep": "warmup_epochs num_warmup_epochs warmup_num_epochs",
    "schedule.warmup={}dur": "warmup_ratio warmup_fraction warmup_proportion",
    "schedule.patience": "patience",
    "optimizer=adamw": "optim optimizer_name optimizer_type opt train.optimizer",
    "optimizer.momentum": "momentum",
    "optimizer.weight_decay": "weight_decay wd l2 optimizer.wd",
    "train.clip_norm": "clip clip_grad clip_grad_norm clip_norm grad_clip grad_clip_norm gradient_clip "
    "gradient_clip_norm gradient_clip_val gradient_clipping max_grad_norm max_norm",
    "train.precision": "precision mixed_precision dtype torch_dtype",
    "train.precision=bf16": "amp bf16 use_amp autocast bfloat16",
    "train.precision=fp16": "fp16 float16 half",
    "train.compile": "compile torch_compile use_compile",
    "train.activation_checkpointing": "activation_checkpointing gradient_checkpointing grad_checkpointing "
    "checkpoint_activations",
    "train.validate_every": "validate_every eval_every val_every validation_every eval_interval eval_freq val_interval "
    "val_check_interval validation_interval eval_frequency",
    "train.validate_every={}ep": "check_val_every_n_epoch eval_epochs eval_every_n_epochs",
    "train.validate_every={}ba": "eval_steps eval_every_n_steps val_steps validation_steps",
    "train.target.metric": "target_metric train.target.name",
    "train.stop_at_target": "early_stopping early_stop",
    "train.device": "device accelerator",
    "train.profile": "profile profiler",
    "data.num_workers": "num_workers dataloader_num_workers loader_workers num_loader_workers n_workers "
    "data.workers dataloader.workers loader.workers",
    "data.prefetch_factor": "prefetch prefetch_factor dataloader_prefetch_factor",
    "seed": "random_seed manual_seed rng_seed torch_seed global_seed seed_everything random_state data_seed",
    "launch.workers": "gpus gpu workers num_gpu",
    "launch.nodes": "nodes nnodes num_nodes n_nodes num_machines",
    "launch.backend": "backend dist_backend ddp_backend process_group_backend",
    "launch.timeout_s": "ddp_timeout dist_timeout",
    "launch.threads": "num_threads omp_num_threads threads",
    "launch.dry_run": "dry dryrun dry_run",
    "strategy=ddp": "ddp use_ddp",
    "strategy=fsdp": "fsdp fsdp2 use_fsdp",
    "strategy=deepspeed": "deepspeed use_deepspeed",
    "strategy.stage": "zero_stage zero_optimization",
    "checkpoint.every": "save_every save_interval save_freq ckpt_every ckpt_interval checkpoint_every "
    "checkpoint_interval checkpoint.interval checkpoint.frequency checkpoint.freq checkpointing_interval",
    "checkpoint.every={}ba": "save_steps save_every_n_steps checkpointing_steps checkpoint.steps ckpt_steps "
    "every_n_train_steps",
    "checkpoint.every={}ep": "checkpoint.epochs save_epochs save_every_n_epochs every_n_epochs",
    "checkpoint.keep": "save_total_limit save_top_k keep_last max_to_keep keep_last_n checkpoints_total_limit",
    "checkpoint.best": "monitor metric_for_best_model save_best",
    "checkpoint.dir": "save_dir checkpoint_dir ckpt_dir",
    "resume": "resume_from resume_from_checkpoint resume_path resume_checkpoint ckpt_path checkpoint_path ckpt "
    "load_checkpoint load_from checkpoint.resume checkpoint.path",
    "model.init": "pretrained init weights pretrained_path init_from init_checkpoint load_weights",
    "log.every": "log_every log_interval log_freq log_steps logging_steps log_every_n_steps print_freq print_every "
    "log.interval log.freq log.steps",
    "run.dir": "output_dir out_dir outdir output_path log_dir logdir logging_dir work_dir workdir default_root_dir "
    "project_dir results_dir",
    "run.name": "name run_name exp_name experiment_name run_id job_name",
    "recipe=resnet": "model arch architecture model_name",
    "recipe.data": "data data_dir data_path data_root dataset_path train_data dataset.path data.path data.dir "
    "data.root",
    "sink=wandb": "wandb use_wandb report_to logger loggers sinks",
    "sink=tensorboard": "tensorboard use_tensorboard",
    "sink.wandb.project": "project wandb_project project_name",
    "sink.wandb.entity": "entity wandb_entity",
    "sink.wandb.tags": "tags wandb_tags",
    # names of earlier versions, which the closest match would send to another key
    "elastic.first_timeout_s": "elastic.first_s",
    "elastic.hang_timeout_s": "elastic.hang_s",
    "elastic.allow_idle": "elastic.idle",
    "elastic.exact": "deterministic reproducible",
    "strategy.param_dtype": "strategy.gather",
    "strategy.meta_init": "strategy.meta",
    "strategy.reshard_after_forward": "strategy.reshard",
    "sweep.max_parallel": "sweep.at_once",
}
SETTING_BY_NAME = {name: setting for setting, names in NAMES_BY_SETTING.items() for name in names.split()}
NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+")


def find_by_other_name(name: str, value: object = None) -> str | None:
    """Return what to type for a key that has another name elsewhere, e.g. `train.duration=3ep` for `epochs=3`.

    Its section does not matter unless the name belongs to a section: `trainer.max_epochs` is `max_epochs`.
    """
    name = name.lstrip("+").lower().replace("-", "_")
    setting = SETTING_BY_NAME.get(name) or SETTING_BY_NAME.get(name.rpartition(".")[2])
    if setting is None or "{}" not in setting:
        return setting
    text = "" if value is None else str(value)
    return setting.format(text) if NUMBER.fullmatch(text) else setting.partition("=")[0]
