"""The log: where lines go and how they read, set up at the start and at each reload; writes none itself."""

from gup.log.setup import ACCESS, close, configure, configure_child, require_destination

__all__ = ["ACCESS", "close", "configure", "configure_child", "require_destination"]
