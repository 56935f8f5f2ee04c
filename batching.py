"""Which conversations share a forward pass: pure arithmetic on lengths."""


def plan_batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices of conversations of like length, longest first, each batch within ``batch_tokens`` padded tokens.

    A conversation longer than the budget is a batch of its own.

    >>> plan_batches([3, 9, 4, 10], batch_tokens=20)
    [[3, 1], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
