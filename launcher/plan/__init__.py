"""Pure arithmetic without torch or I/O: the batch and its shares, the sample order, the timeline, the learning-rate schedule."""
