"""SLURM: what a cluster has, jobs for it, and what became of them."""
