"""What follows when the training loop returns before the end: another plan, or the admission of waiting nodes."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

from launcher.distributed.join_gate import JOIN_POLL_S
from launcher.distributed.stop_requests import StopLevel
from launcher.plan.training_plan import make_training_plan
from launcher.telemetry.resource_meter import ResourceMeter
from launcher.train.build import TrainComponents
from launcher.train.context import TrainContext
from launcher.train.context_setup import make_load_balancer
from launcher.train.metrics_recorder import plan_to_dict
from launcher.train.state import TrainState

__all__ = ["JOIN_TIMEOUT_S", "admit_waiting_nodes", "continue_with_plan", "replan"]

JOIN_TIMEOUT_S = 60.0  # time for a node's torchrun to start and to reach the rendezvous


def replan(context: TrainContext, state: TrainState) -> tuple[TrainContext, TrainState]:
    """Switch to another plan; all ranks compute the same one, as it depends only on gathered statistics.

    Either another batch now has the highest goodput, and the learning rate follows as in any resize; or the shares are
    adapted to the measured speeds.
    """
    previous_plan, goodput, config = context.training_plan, context.goodput, context.config
    why = "shares follow the measured speeds of the workers"
    if goodput is not None and goodput.successor is not None:
        goodput = goodput.successor
        config, why = goodput.config, goodput.why
    speeds = None if context.load_balancer is None else context.load_balancer.new_speeds
    plan = make_training_plan(config, previous_plan.sizes, previous_plan.world, speeds)
    samples, previous_schedule = state.position.samples, state.schedule
    schedule = plan.with_lr_history(previous_schedule.to_facts(), samples).schedule
    state = replace(state, schedule=schedule)
    old = plan_to_dict(previous_plan, previous_schedule, previous_plan.batch_plan_at(samples))
    new = plan_to_dict(plan, schedule, plan.batch_plan_at(samples))
    moments = {} if new["global"] == old["global"] else {"moments": state.second_moment_factor(new["global"])}
    context.log_event("plan", why=why, **new, **{"from": old}, **moments)
    return replace(context, training_plan=plan, goodput=goodput), state


def continue_with_plan(context: TrainContext, components: TrainComponents, state: TrainState) -> TrainContext:
    """Continue under the current plan, with a new loader that starts at the current position."""
    loader = components.make_loader(context.training_plan, context.topology, state.position)
    meter = context.meter
    return replace(
        context,
        loader=loader,
        meter=ResourceMeter(meter.device, meter.threads, meter.seconds(), loader.loading.measure_share),
        load_balancer=make_load_balancer(context.training_plan),
    )


def admit_waiting_nodes(context: TrainContext, state: TrainState) -> bool:
    """Admit the waiting nodes after the save. Return True once a node has joined and the agents end the workers.

    Return False if no node joined in time, or if a stop was requested meanwhile: training continues, and stops at the
    next update. A failed save has already raised an alarm and is retried when the next checkpoint is due.
    """
    with suppress(OSError):
        context.checkpoint_manager.wait()
    names = ", ".join(context.stop_source.admit_nodes()) if context.stop_source else ""
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while context.stop_requests.level <= StopLevel.ADMIT_NODES and time.monotonic() < deadline_s:
        if context.watchdog is not None:
            context.watchdog.enter_phase("checkpoint", state.position.update)  # waiting is not a hang
        time.sleep(JOIN_POLL_S)
    if context.stop_requests.level == StopLevel.RESTART:  # the agent sends SIGTERM once a node has joined
        return True
    if context.stop_requests.level == StopLevel.STOP:
        return False
    detail = f"{names} asked to join but did not connect within {JOIN_TIMEOUT_S:g} s"
    context.log_event("alarm", kind="gate", detail=detail)
    context.stop_requests.clear_admit()
    return False
