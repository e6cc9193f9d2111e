"""Can this machine, or this cluster, do it: checks whose every finding comes with the fix."""
