"""What a run reports about itself, and where it goes.

`StageClock` times the stages of an update, `ResourceMeter` measures memory and utilisation, and `DeferredScalars` reads
results from the device without waiting. Rows (`MetricsRow`) and events (`Event`) go through the `MetricsLogger`, a
thread per destination, to the sinks that `sinks.open_sinks` opened: JSONL files, the console, TensorBoard and W&B.
"""
