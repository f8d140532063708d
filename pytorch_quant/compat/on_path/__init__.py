"""A folder for `PYTHONPATH`, through which a process finds the alias without being told."""
