"""Goodput: which batch makes the most progress per second.

Progress per second is throughput times statistical efficiency. `noise_scale.NoiseScale` estimates the gradient noise
scale, on which the efficiency depends; `throughput_model` finds the knee of the measured sizes and predicts others;
`update_time_model` predicts the time of an update at other world sizes; `batch_choice.best_choice` takes the best
batch. `policy.GoodputPolicy` follows the noise scale during training (batch=goodput), `plan_table` shows it in `plan`,
and `auto_batch` has the rules for `batch.per_device=auto`: whether a measurement is needed and which configuration
follows from it. `launch.resolve_auto` applies them when a job starts. Only `measured_noise` reads earlier runs.
"""
