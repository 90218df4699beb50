"""Whether an import may bring more into the store. Makes no room."""

from gup.config import Cache
from gup.units import format_size


def no_room(length_bytes: int, held_bytes: int, free_bytes: int, limits: Cache) -> str:
    """Why so much more can't be taken, "" when it can: an import makes no room for itself."""
    if held_bytes + length_bytes > limits.max_size:
        return (
            f"cache.max_size ({format_size(limits.max_size)}) would be exceeded, and an import evicts nothing"
        )
    if free_bytes - length_bytes < limits.min_free:
        return f"the disk would have less than cache.min_free ({format_size(limits.min_free)}) left"
    return ""
