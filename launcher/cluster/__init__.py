"""Ray clusters: connection, jobs, workers, preemption, checks before a job, wheels."""
