"""Ray: connection, workers, jobs, preemption, wheels."""
