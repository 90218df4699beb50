"""Which products and languages have series of their own, so that a site's stay few; counts nothing."""

from collections.abc import Callable, Iterable, Sequence

from gup.metrics import MAX_SHOWN, MAX_STREAMS

Label = tuple[str, str]
"""Product and language."""
OTHER: Label = ("other", "other")

StreamNames = Sequence[tuple[str, str, str]]
ProductOf = Callable[[tuple[str, str, str]], Label | None]
"""What the catalogue calls a stream (version, language, moniker), None where it is not listed."""


def stream_labels(names: StreamNames, slot: int, product_of: ProductOf) -> Label:
    """Product and language of stream number `slot`: the catalogue's, else moniker and variant."""
    if slot >= min(len(names), MAX_STREAMS):
        return OTHER
    _, language, stream = names[slot]
    return product_of(names[slot]) or (stream, language)


def shown_labels(names: StreamNames, product_of: ProductOf) -> list[Label]:
    """What each slot is shown as: the first MAX_SHOWN products and languages apart, the rest as OTHER.

    Slots are given once and for good, so what is shown apart stays so while the catalogue does.
    """
    shown: dict[Label, None] = {}
    labels = []
    for slot in range(MAX_STREAMS + 1):
        label = stream_labels(names, slot, product_of)
        if label not in shown and (label == OTHER or len(shown) >= MAX_SHOWN):
            label = OTHER
        else:
            shown[label] = None
        labels.append(label)
    return labels


def first_shown(names: StreamNames, product_of: ProductOf, labels: Iterable[Label]) -> list[Label]:
    """MAX_SHOWN of `labels` at most, in their order: those whose bytes are shown apart before others."""
    apart = set(shown_labels(names, product_of))
    return sorted(labels, key=lambda label: label not in apart)[:MAX_SHOWN]
