"""Where tokens lie: the grids of the hosts."""
