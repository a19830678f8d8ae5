"""Exact sequence parallelism (LASP-2) over `torch.distributed`."""
