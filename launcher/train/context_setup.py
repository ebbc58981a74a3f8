"""Makes the `TrainContext` from the parts that a rank has prepared."""

from __future__ import annotations

from launcher.config.schema import RunConfig
from launcher.distributed.load_balancing import LoadBalancer
from launcher.goodput.policy import BatchChooser, GoodputPolicy, TimingProfile
from launcher.plan.training_plan import TrainingPlan, make_training_plan
from launcher.telemetry.resource_meter import ResourceMeter
from launcher.train.build import TrainComponents
from launcher.train.context import TrainContext
from launcher.train.rank_outputs import RankOutputs
from launcher.train.rank_setup import RankJob
from launcher.train.state import TrainState

__all__ = ["choose_config", "make_context", "make_goodput_policy", "make_load_balancer"]


def make_context(
    job: RankJob,
    plan: TrainingPlan,
    components: TrainComponents,
    outputs: RankOutputs,
    state: TrainState,
    goodput: GoodputPolicy | None,
) -> TrainContext:
    """Make the context of the training loop."""
    topology = job.topology
    if job.watchdog is not None:
        components.clock.on_wait_begin(job.watchdog.enter_wait)
    loader = components.make_loader(plan, topology, state.position)
    loader_cpu = loader.loading.measure_share
    return TrainContext(
        training_plan=plan,
        topology=topology,
        run_dir=job.spec.run_dir,
        recipe=components.recipe,
        replica=components.replica,
        precision=components.precision,
        loader=loader,
        validator=components.make_validator(plan, topology),
        clock=components.clock,
        meter=ResourceMeter(components.device, job.threads, before_s=state.seconds, measure_loader_cpu=loader_cpu),
        logger=outputs.logger,
        recorder=outputs.recorder,
        checkpoint_manager=outputs.checkpoint_manager,
        stop_requests=job.stop_requests,
        faults=job.faults,
        load_balancer=make_load_balancer(plan),
        goodput=goodput,
        watchdog=job.watchdog,
        reads_late=components.device.type != "cpu" or job.faults.reads_late,
    )


def make_load_balancer(plan: TrainingPlan) -> LoadBalancer | None:
    """The load balancer, if elastic.balance is set and there are several workers."""
    if not plan.config.elastic.balance or plan.world == 1:
        return None
    return LoadBalancer(
        plan.batch_plan, lambda speeds: make_training_plan(plan.config, plan.sizes, plan.world, speeds).batch_plan
    )


def make_goodput_policy(job: RankJob) -> GoodputPolicy | None:
    """Under batch=goodput, the policy with its choice at the checkpoint's noise scale.

    Raises:
        UsageError: the world size is beyond the measured range, or the bounds leave no batch.
    """
    if job.spec.profile is None:
        return None
    chooser = BatchChooser(TimingProfile.from_facts(job.spec.profile), job.spec.config, job.setup.sizes.train)
    checkpoint = job.setup.checkpoint
    noise = {} if checkpoint is None else checkpoint.manifest.facts["standing"]["noise"]
    noise_knowledge = chooser.combine_noise(noise.get("acted"), noise.get("least"))
    return GoodputPolicy(chooser, job.topology.world, job.topology.nodes, noise_knowledge)


def choose_config(job: RankJob, goodput: GoodputPolicy | None) -> RunConfig:
    """The configuration to plan with: under batch=goodput, with the chosen batch."""
    return job.spec.config if goodput is None else goodput.config
