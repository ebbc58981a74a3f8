"""`launcher plan`: the batch plan, learning rate and schedule at every world size, without starting a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from launcher.cli.arguments import handle_info_flags, print_notes, resolve_config
from launcher.config.cli_args import HydraArgs
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_OK, UsageError
from launcher.system.formatting import encodable

__all__ = ["run_plan"]


def run_plan(args: Sequence[str]) -> int:
    """Print the batch plan, learning rate and schedule at every world size, without starting a run."""
    if handle_info_flags(HydraArgs.parse(args), args):
        return EXIT_OK
    config = resolve_config(args)
    from launcher import recipe as recipes
    from launcher.plan import plan_table

    recipe = recipes.build_recipe(config.recipe)
    if config.batch.policy == "goodput":
        return print_goodput_plan(config, recipe)
    document = plan_table.make_plan_document(config, recipes.get_dataset_sizes(recipe), config.plan.world_sizes)
    if config.plan.memory:  # this needs the model, and therefore torch
        from launcher.plan.memory_model import make_memory_document
        from launcher.strategies.model_size import measure_model_size

        world_sizes = [row["world"] for row in document["plans"]]
        document["memory"] = make_memory_document(measure_model_size(recipe, config), world_sizes)
    print(json.dumps(document) if config.format == "json" else plan_table.format_plan_table(document))
    return EXIT_OK


def print_goodput_plan(config: RunConfig, recipe: Any) -> int:
    """Print the plan for batch.policy=goodput, using the update times measured on this machine."""
    from launcher import recipe as recipes
    from launcher.config import strategy_checks
    from launcher.goodput import measured_noise, plan_table
    from launcher.goodput.policy import BatchChooser, TimingProfile
    from launcher.tune import cache

    sizes = recipes.get_dataset_sizes(recipe)
    profiles = cache.matching_profiles(config, cache.source_hash(recipe), sizes.train)
    if isinstance(profiles, cache.CacheLookup):
        print_notes(profiles.notes)
        raise UsageError(
            "batch.policy=goodput needs measured update times: type launcher tune with the same overrides, with 2 or "
            "more workers to measure the cost of communication"
        )
    timings = TimingProfile.from_documents(
        (profile.document for profile in profiles), every_micro=strategy_checks.needs_equal_micro_batches(config)
    )
    document = plan_table.goodput_plan_document(
        BatchChooser(timings, config, sizes.train),
        sizes,
        measured_noise.find_noise_scale(config),
        plan_table.format_measurements(profiles),
    )
    text = json.dumps(document) if config.format == "json" else plan_table.goodput_plan_text(document).rstrip()
    print(encodable(text, sys.stdout))
    return EXIT_OK
