"""Multi-rank fine-tuning: ranks that take a DP-SGD step together, checkpoints, the job."""
