"""Any model of diffusers as a host: where its pixels lie, and its one attention call as ours.

The processor of the host runs: projections, norms and rotary embedding stay its code. Only what it
hands queries, keys and values to is exchanged.
"""

from linfusion.attention.hosts.host import Host, Levels, PerSample
from linfusion.attention.hosts.table import describe_host, host_of

__all__ = ["Host", "Levels", "PerSample", "describe_host", "host_of"]
