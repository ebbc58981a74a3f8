"""What a run will do, in pure arithmetic without torch or I/O.

`training_plan.make_training_plan` derives everything from the configuration, the data sizes and the world size: the
batch and its shares (`batch.plan_batch`), the learning rate (`lr_schedule.LrSchedule`), the updates
(`timeline.Timeline`) and the order of the samples (`sample_order.SamplePermutation`). `plan_table` shows the plans of
many world sizes, which is what `launcher plan` prints.
"""
