"""What the server of `pool` imports once for all ranks."""

import linfusion.linearize  # noqa: F401
import tests.tiny
import tests.tiny_joint
import tests.tiny_video_hosts  # noqa: F401
