"""What a run reports about itself: stage times, metric rows and events, and the sinks they go to."""
