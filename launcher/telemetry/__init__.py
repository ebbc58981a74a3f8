"""What a run reports about itself, and where it goes.

`StageClock` times the stages of an update, `ResourceMeter` measures memory and utilisation, and `UpdateScalars` are an
update's results on the device. Rows (`MetricsRow`) and events (`Event`) go through the `MetricsLogger`, a
thread per destination, to the sinks that `sinks.open_sinks` opened: JSONL files, the console, TensorBoard and W&B.
"""
