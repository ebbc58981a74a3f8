"""Run training on one rank, from the agreement with the other ranks to the final event."""

from __future__ import annotations

import torch
import torch.distributed as dist

from launcher.distributed import rendezvous
from launcher.distributed.consistency_check import prepare_and_compare
from launcher.distributed.stop_requests import StopRequests
from launcher.distributed.watchdog import Watchdog
from launcher.distributed.worker_env import resolve_num_threads
from launcher.errors import EXIT_OK, EXIT_RESTART
from launcher.plan.training_plan import make_training_plan
from launcher.system.fault_injection import FaultInjector
from launcher.topology import Topology
from launcher.train.build import build_components, check_batchnorm_batch_size
from launcher.train.context_setup import choose_config, make_context, make_goodput_policy
from launcher.train.finish import finish_run
from launcher.train.job_spec import JobSpec
from launcher.train.loop import train
from launcher.train.loss_check import check_loss
from launcher.train.outcome import TrainOutcome
from launcher.train.rank_outputs import RankOutputs
from launcher.train.rank_setup import RankJob, RankSetup, prepare_rank, restore_state
from launcher.train.start_events import log_start_events
from launcher.train.transitions import admit_waiting_nodes, continue_with_plan, replan
from launcher.train.watched_metrics import check_watched_metrics

__all__ = ["run_session"]


def run_session(
    job_spec: JobSpec,
    topology: Topology,
    store: dist.Store,
    stop_requests: StopRequests,
    watchdog: Watchdog | None,
) -> int:
    """Build, restore, train, finish; return the exit status.

    Raises:
        UsageError: any rank found a configuration error before training.
    """
    faults = FaultInjector.from_env(topology.rank, topology.generation)
    faults.inject_at("start")
    threads = resolve_num_threads(job_spec.config, topology.local_world)
    torch.set_num_threads(threads)
    setup = prepare_and_compare(store, topology, lambda: prepare_rank(job_spec, topology), RankSetup.collect_facts)
    job = RankJob(job_spec, topology, setup, stop_requests, watchdog, faults, threads)
    outcome = connect_and_train(job, store)
    if watchdog is not None:
        watchdog.enter_wait()
    dist.barrier()
    dist.destroy_process_group()
    if watchdog is not None:
        watchdog.stop(finished=True)
    return EXIT_RESTART if outcome == TrainOutcome.RESTART else EXIT_OK


def connect_and_train(job: RankJob, store: dist.Store) -> TrainOutcome:
    """Connect to the other ranks, build and restore everything, and train; return how training ended."""
    config, setup = job.spec.config, job.setup
    goodput = make_goodput_policy(job)
    # the plan has the batch that goodput chose; `config` is what the user set
    plan = make_training_plan(choose_config(job, goodput), setup.sizes, job.topology.world)
    job.enter_phase("rendezvous")
    backend = rendezvous.init_process_group(
        store, job.topology, setup.device, config.launch.backend, config.launch.timeout_s
    )
    components = build_components(setup.recipe, config, job.topology, setup.device, setup.datasets)
    job.enter_phase("restore")
    checkpoints_dir = job.spec.run_dir.resolve_checkpoints_dir(config.checkpoint.dir)
    state = restore_state(components, plan, setup.checkpoint, checkpoints_dir)
    check_batchnorm_batch_size(components, plan)
    outputs = RankOutputs.open(job, plan, components, state)
    try:
        context = make_context(job, plan, components, outputs, state, goodput)
        check_watched_metrics(context, state)
        if job.topology.rank == 0:  # not before all checks: a refused request leaves a complete run complete
            job.spec.run_dir.done_json.unlink(missing_ok=True)
        log_start_events(job, context, components, state, backend, outputs.restart_cost)
        context = check_loss(context, state, components.train_data, store)
        job.handle_sigterm()
        state, outcome = train(context, state)
        while outcome in (TrainOutcome.REPLAN, TrainOutcome.ADMIT_NODES):
            if outcome == TrainOutcome.REPLAN:
                context, state = replan(context, state)
            elif admit_waiting_nodes(context, state):
                outcome = TrainOutcome.RESTART
                break
            # rebinding `context` frees the previous loader and ends its processes before training continues
            context = continue_with_plan(context, components, state)
            state, outcome = train(context, state)
        if job.watchdog is not None:
            job.watchdog.enter_phase("finish")
        finish_run(job, outputs.checkpoint_manager, context, state, outcome)
    except BaseException as error:
        if job.watchdog is not None:
            job.watchdog.stop()
        outputs.record_failure(error, job)
        raise
    finally:
        outputs.close()
    return outcome
