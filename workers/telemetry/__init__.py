"""What a worker process shows: metrics, logs, stalls of its loops."""
