"""Runs training on one rank, from process-group setup to the final event."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher import checkpoint, failure, rendezvous
from launcher import recipe as recipes
from launcher.assembly import OpenData, Parts, assemble, check_norms, device_of, open_data
from launcher.balance import Balancer, Level
from launcher.errors import EXIT_AGAIN, EXIT_OK, RequestError
from launcher.faults import Faults
from launcher.gate import hold
from launcher.goodput import Chooser, Fixed, Goodput, Profile
from launcher.greeting import greet
from launcher.heart import Heart, Still
from launcher.keys import flat
from launcher.loop import REPLAN, Job, train
from launcher.manifest import Found, newest, open_at
from launcher.record import Recorder, Silent, plan_facts
from launcher.recovery import Restart, last_row, totals
from launcher.redact import redacted
from launcher.saver import Saver, name_of
from launcher.settings import Run
from launcher.signals import GO_ON, JOIN, LEAVE, Wishes
from launcher.sinks import Destination, open_sinks
from launcher.sinks.journal import Journal
from launcher.standing import Standing
from launcher.strategies import LARGE_BYTES
from launcher.study import Sizes, Study, study
from launcher.summed import Watched
from launcher.telemetry import Meter
from launcher.threads import threads_of
from launcher.timeline import Position
from launcher.topology import Topology
from launcher.vote import Vote
from launcher.worker import Assignment

__all__ = ["run"]


@dataclass(frozen=True)
class Ready:
    """What a rank prepares before it joins the others, so that its errors do not leave them waiting."""

    recipe: Any
    sizes: Sizes
    device: torch.device
    data: OpenData
    found: Found | None
    folder_generation: int

    def facts(self) -> Mapping[str, Any]:
        """The values that must be equal on all ranks."""
        return {
            "the launcher's version": version("elastic-batch-launcher"),
            "torch's version": torch.__version__,
            "python's version": platform.python_version(),
            "the training data's length": self.sizes.train,
            "the validation data's length": self.sizes.val,
            "the generation in the run folder": self.folder_generation,
            "the newest checkpoint": None if self.found is None else self.found.path.name,
        }


def run(assignment: Assignment, topology: Topology, store: dist.Store, wishes: Wishes, heart: Heart | Still) -> int:
    """Build, restore, train, finish; return the exit status.

    Raises:
        UsageError: any rank found a configuration error before training.
    """
    settings = assignment.run
    faults = Faults.of(topology.rank, topology.generation)
    faults("start")
    threads = threads_of(settings, topology.local_world)
    torch.set_num_threads(threads)
    ready = greet(store, topology, lambda: made_ready(assignment, topology), Ready.facts)
    goodput, chosen = goodput_of(assignment, ready, topology)
    plan = study(chosen, ready.sizes, topology.world)
    heart.phase("rendezvous")
    faults("rendezvous")
    backend = rendezvous.join(store, topology, ready.device, settings.launch.backend, settings.launch.timeout_s)
    parts = assemble(ready.recipe, settings, topology, ready.device, ready.data)
    heart.phase("restore")
    faults("restore")
    standing = restored(parts, plan, ready.found, assignment.folder.checkpoints_in(settings.checkpoint.dir))
    check_norms(parts, plan)

    restart = restart_of(assignment, standing) if topology.rank == 0 else Restart()
    journal = open_journal(assignment) if topology.rank == 0 else Silent()
    saver = saver_of(assignment, plan, parts, journal, topology, faults)
    recorder = recorder_of(plan, journal, topology, saver, restart)
    try:
        job = job_of(topology, plan, parts, saver, recorder, wishes, faults, heart, standing, threads, goodput)
        announce(job, parts, assignment, ready, standing, backend, threads, restart)
        wishes.guard()
        standing, ending = train(job, standing)
        while ending in (REPLAN, JOIN):
            if ending == JOIN and (ending := hold(job, standing)) == LEAVE:
                break
            if ending == REPLAN:
                job, standing = replanned(job, standing)
            job = going_on(job, parts, standing)
            standing, ending = train(job, standing)
        heart.phase("finish")
        saver.settle()
        faults("finish")
        if topology.rank == 0:
            finish(job, assignment, ready.found, standing, ending)
    except BaseException as error:
        heart.stop()
        recorder.last_word()
        tell_of(error, assignment, journal, topology)
        raise
    finally:
        saver.close()
        journal.close()
    heart.waits()
    dist.barrier()
    dist.destroy_process_group()
    heart.stop(finished=True)
    return EXIT_AGAIN if ending == LEAVE else EXIT_OK


def tell_of(error: BaseException, assignment: Assignment, journal: Journal | Silent, topology: Topology) -> None:
    """Log an error; if another rank died, log only an alarm: that rank reports the cause."""
    found = failure.Failure.of(*topology.place, error, assignment.folder.log(*topology.place))
    if failure.consequence(found.message):
        journal.event("alarm", kind="peer", detail="lost connection to another worker", message=found.message)
    else:
        journal.event("error", **found.event().facts)


def made_ready(assignment: Assignment, topology: Topology) -> Ready:
    settings = assignment.run
    recipe = recipes.build(settings.recipe)
    sizes = recipes.sizes(recipe)
    return Ready(
        recipe=recipe,
        sizes=sizes,
        device=device_of(settings, topology),
        data=open_data(recipe, settings, sizes),
        found=found_checkpoint(assignment),
        folder_generation=assignment.folder.generation(),
    )


def found_checkpoint(assignment: Assignment) -> Found | None:
    """The checkpoint to resume from: at the first start of the job the one the user named, else the newest in the run.

    Raises:
        UsageError: all checkpoints are corrupt, or there is none and `resume=must`.
    """
    if assignment.checkpoint is not None:
        return open_at(assignment.checkpoint)
    found = newest(assignment.folder.checkpoints_in(assignment.run.checkpoint.dir))
    if found is None and assignment.must:
        raise RequestError(f"resume=must: {assignment.folder.path} contains no checkpoint: type resume=auto")
    return found


def restored(parts: Parts, plan: Study, found: Found | None, checkpoints: Path) -> Standing:
    """Restore the training state from the checkpoint, or create the initial one.

    The best checkpoint so far is kept only if it still exists in `checkpoints`.
    """
    if found is None:
        return Standing.fresh(plan)
    checkpoint.check_names(found.manifest, parts.outline)
    loaded = checkpoint.load(found)
    facts = loaded.manifest.facts
    parts.replica.restore(loaded.model, loaded.optimizer, facts)
    standing = Standing.restored(plan, Position(**loaded.manifest.position), facts["standing"])
    if standing.best_checkpoint is not None and not (checkpoints / standing.best_checkpoint).is_dir():
        return replace(standing, best=None, best_checkpoint=None)
    return standing


def open_journal(assignment: Assignment) -> Journal:
    folder = assignment.folder
    to = Destination(
        folder=folder.path,
        name=str(assignment.run.run.name),
        wandb_id=folder.wandb_id(),
        config=dict(redacted(flat(assignment.run))),
    )
    return Journal(open_sinks(assignment.run.sink, to))


def restart_of(assignment: Assignment, standing: Standing) -> Restart:
    """The cost of the restart; resuming from a checkpoint that the user named counts as losing nothing."""
    if assignment.generation == 1 or assignment.checkpoint is not None:
        return Restart()
    row = last_row(assignment.folder.metrics)
    return Restart.after(row, standing.position.samples, restarted=assignment.restarted)


def saver_of(
    assignment: Assignment, plan: Study, parts: Parts, journal: Journal | Silent, topology: Topology, faults: Faults
) -> Saver:
    return Saver(
        assignment.folder,
        plan.run.checkpoint,
        journal,
        rank=topology.rank,
        world=topology.world,
        sharded=in_parts(plan.run, parts, topology.world),
        patience_s=plan.run.launch.timeout_s,
        generation=topology.generation,
        every_s=plan.checkpoint_every_s,
        identity={"recipe": redacted(dict(plan.run.recipe)), "seed": plan.run.seed},
        faults=faults,
    )


def in_parts(run: Run, parts: Parts, world: int) -> bool:
    """Return whether each rank writes its own shard: as configured, else if gathering on rank 0 would be costly."""
    if run.checkpoint.sharded != "auto":
        return bool(run.checkpoint.sharded)
    size_bytes = sum(tensor.nbytes for tensor in parts.outline.values())
    return world > 1 and parts.replica.sharded and size_bytes > LARGE_BYTES


def recorder_of(
    plan: Study, journal: Journal | Silent, topology: Topology, saver: Saver, restart: Restart
) -> Recorder | Silent:
    if isinstance(journal, Silent):
        return Silent()
    return Recorder(journal, topology, plan.run.log.every, plan.sizes.tokens_per_sample, saver.told, restart)


def job_of(
    topology: Topology,
    plan: Study,
    parts: Parts,
    saver: Saver,
    recorder: Recorder | Silent,
    wishes: Wishes,
    faults: Faults,
    heart: Heart | Still,
    standing: Standing,
    threads: int,
    goodput: Goodput | Fixed,
) -> Job:
    settings = plan.run
    parts.clock.listen(heart.waits)
    feed = parts.feed(plan, topology, standing.position)
    return Job(
        study=plan,
        topology=topology,
        recipe=watched(parts.recipe, saver.journal, standing),
        replica=parts.replica,
        precision=parts.precision,
        feed=feed,
        validation=parts.validation(plan, topology),
        vote=Vote(topology.world, settings.launch.timeout_s),
        clock=parts.clock,
        recorder=recorder,
        meter=Meter(parts.device, threads, before_s=standing.seconds, loading=feed.loading.share),
        saver=saver,
        wishes=wishes,
        balance=balancer_of(plan),
        goodput=goodput,
        faults=faults,
        heart=heart,
    )


def watched(recipe: Any, journal: Journal | Silent, standing: Standing) -> Any:
    """Wrap the recipe to check its first loss, on rank 0 at the start of training only."""
    if isinstance(journal, Silent) or standing.position.samples:
        return recipe
    return Watched(recipe, lambda why: journal.event("alarm", kind="loss", detail=why))


def balancer_of(plan: Study) -> Balancer | Level:
    """The load balancer, if elastic.balance is set and there are several workers."""
    if not plan.run.elastic.balance or plan.world == 1:
        return Level()
    return Balancer(plan.plan, lambda speeds: study(plan.run, plan.sizes, plan.world, speeds).plan)


def goodput_of(assignment: Assignment, ready: Ready, topology: Topology) -> tuple[Goodput | Fixed, Run]:
    """Under batch=goodput, the choice at the checkpoint's noise scale, and the configuration with it applied.

    Raises:
        UsageError: the world size is beyond the measured range, or the bounds leave no batch.
    """
    if assignment.profile is None:
        return Fixed(), assignment.run
    chooser = Chooser(Profile.from_facts(assignment.profile), assignment.run, ready.sizes.train)
    noise = {} if ready.found is None else ready.found.manifest.facts["standing"]["noise"]
    known = chooser.known(noise.get("acted"), noise.get("least"))
    goodput = Goodput(chooser, topology.world, topology.nodes, known)
    return goodput, goodput.run


def replanned(job: Job, standing: Standing) -> tuple[Job, Standing]:
    """Switch to another plan; all ranks compute the same one, as it depends only on gathered statistics.

    Either another batch now has the highest goodput, and the learning rate follows as in any resize; or the shares are
    adapted to the measured speeds.
    """
    goodput, run, why = job.goodput, job.study.run, "shares follow the measured speeds of the workers"
    if goodput.after is not None:
        goodput = goodput.after
        run, why = goodput.run, goodput.why
    plan = study(run, job.study.sizes, job.study.world, job.balance.wants)
    samples, before = standing.position.samples, standing.schedule
    after = replace(standing, schedule=plan.resumed(before.to_facts(), samples).schedule)
    old, new = (
        plan_facts(one, schedule, one.plan_at(samples))
        for one, schedule in ((job.study, before), (plan, after.schedule))
    )
    moments = {} if new["global"] == old["global"] else {"moments": standing.moments_to(new["global"])}
    job.saver.journal.event("plan", why=why, **new, **{"from": old}, **moments)
    return replace(job, study=plan, goodput=goodput), after


def going_on(job: Job, parts: Parts, standing: Standing) -> Job:
    """Continue under the new plan, with a new loader that starts at the current position."""
    feed = parts.feed(job.study, job.topology, standing.position)
    return replace(
        job,
        feed=feed,
        meter=Meter(job.meter.device, job.meter.threads, job.meter.seconds(), feed.loading.share),
        balance=balancer_of(job.study),
    )


def announce(
    job: Job,
    parts: Parts,
    assignment: Assignment,
    ready: Ready,
    standing: Standing,
    backend: str,
    threads: int,
    restart: Restart,
) -> None:
    """Log the start events: start, the current plan, and resume or resize if they apply."""
    if job.topology.rank != 0:
        return
    event = job.saver.journal.event
    facts = plan_facts(job.study, standing.schedule, job.study.plan_at(standing.position.samples))
    last = assignment.folder.read_plan()  # read before the plan event, which overwrites it
    start = start_facts(job, parts, standing)
    event("start", run_dir=str(assignment.folder.path), backend=backend, threads=threads, **start)
    event("plan", why="; ".join(filter(None, (job.goodput.why, assignment.why))), **facts, **{"from": None})
    if ready.found is not None:
        event("resume", **resume_facts(ready.found, standing), changed=assignment.changed, lost_samples=restart.lost)
        for detail in doubts(ready.found, standing):
            event("alarm", kind="checkpoint", detail=detail)
    before = plan_before(ready.found, last)
    if before and any(before[name] != facts[name] for name in ("world", "global", "lr_scale")):
        moments = standing.moments_to(facts["global"])
        why = "; ".join(filter(None, (why_of(before, facts), job.goodput.why)))
        event("resize", why=why, **{"from": before, "to": facts}, moments=moments)


def start_facts(job: Job, parts: Parts, standing: Standing) -> dict[str, Any]:
    """The fields of the start event."""
    plan, settings, position = job.study, job.study.run, standing.position
    device = job.precision.device
    return {
        "recipe": type(parts.recipe).__name__,
        "data": {"train": plan.sizes.train, "val": plan.sizes.val},
        "parameters": parts.parameters,
        "trainable": parts.trainable,
        "strategy": settings.strategy.name,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "precision": settings.train.precision,
        "world": job.topology.world,
        "nodes": job.topology.nodes,
        "seed": settings.seed,
        "duration_samples": plan.duration,
        "updates": position.update + plan.timeline.count(position),
        "updates_per_epoch": plan.sizes.train / plan.plan.global_batch,
        "generation": job.topology.generation,
        "optimizer": type(job.replica.optimizer).__name__,
        "decay": settings.schedule.decay,
    }


def resume_facts(found: Found, standing: Standing) -> dict[str, Any]:
    """The fields of the resume event."""
    return {
        "checkpoint": found.path.name,
        "samples": standing.position.samples,
        "update": standing.position.update,
        "passed_over": [{"name": name, "why": why} for name, why in found.passed_over],
    }


def doubts(found: Found, standing: Standing) -> Iterator[str]:
    """Yield warnings about checkpoints that are missing or were skipped."""
    lost = found.manifest.facts["standing"]["best_checkpoint"]
    if lost != standing.best_checkpoint:
        yield f"the best checkpoint so far, {lost}, is missing from this run's directory"
    for name, why in found.passed_over:
        yield f"{name} was passed over: {why}"


def plan_before(found: Found | None, last: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The plan before this start: the checkpoint's, or the last logged one if the world size has changed since."""
    if found is None or (last is not None and last["world"] != found.manifest.plan["world"]):
        return last
    return dict(found.manifest.plan)


def why_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["world"] != after["world"]:
        return f"{before['world']} workers before, {after['world']} now"
    return "the plan changed at the same number of workers"


def finish(job: Job, assignment: Assignment, found: Found | None, standing: Standing, ending: int) -> None:
    """On rank 0, write the final parameters and done.json, or log that training was stopped."""
    position, event = standing.position, job.saver.journal.event
    if ending != GO_ON:
        why = assignment.folder.stop_reason() or job.wishes.why or "another rank"
        event("preempt", why=why, samples=position.samples, update=position.update)
        return
    folder = assignment.folder
    checkpoints = folder.checkpoints_in(job.study.run.checkpoint.dir)
    last = checkpoints / name_of(standing)  # absent if training had already ended at a checkpoint that the user named
    ended = found if found is not None and not last.is_dir() else open_at(last)
    checkpoint.export(folder.model, checkpoint.load(ended).model)
    if standing.best_checkpoint is not None:
        best = open_at(checkpoints / standing.best_checkpoint)
        checkpoint.export(folder.path / "best.safetensors", checkpoint.load(best).model)
    done = {
        "samples": position.samples,
        "updates": position.update,
        "seconds": job.meter.seconds(),
        "metrics": dict(standing.metrics),
        "restarts": folder.restarts(),
        **totals(folder.metrics),
    }
    if standing.reached is not None:
        done["target"] = dict(standing.reached)
    event("done", **done)
    folder.write_done(done)
