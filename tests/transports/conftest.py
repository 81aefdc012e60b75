"""Things that libuv makes once per process and keeps (the pipe of its signals) exist before any test counts them."""

from __future__ import annotations

import uvloop

uvloop.new_event_loop().close()
