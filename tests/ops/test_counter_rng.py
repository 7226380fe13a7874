"""Random numbers keyed by position: where they come from, and whether they look random."""

from __future__ import annotations

import torch

from fisherkern.ops import counter_rng


def test_counter_numbers_depend_on_position_alone() -> None:
    rows, columns = torch.arange(5), torch.arange(300)
    whole = counter_rng.random_bits(3, rows, columns)
    part = counter_rng.random_bits(3, rows[2:4], columns[100:200])
    assert torch.equal(whole[2:4, 100:200], part)
    assert not torch.equal(whole, counter_rng.random_bits(4, rows, columns))
    assert torch.equal(counter_rng.random_bits_at(3, rows, columns[:5]), whole[:, :5].diagonal())
    # splitmix64 of 0 after one step, from the reference implementation.
    assert int(counter_rng._mix(torch.tensor([counter_rng.GOLDEN]))[0]) == -2152535657050944081


def test_counter_numbers_look_random() -> None:
    u = counter_rng.uniform(0, torch.arange(200), torch.arange(500))
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = u.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 50  # chi², 19 degrees
    bits = counter_rng.random_bits(0, torch.arange(200), torch.arange(500))
    signs = torch.stack([counter_rng.signs(bits, r, torch.float64) for r in (0, 1, 31, 63)])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    correlation = torch.corrcoef(signs.flatten(1)) - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / bits.numel() ** 0.5


def test_gumbel_numbers_follow_their_distribution() -> None:
    g = counter_rng.gumbel_at(1, torch.arange(300)[:, None], torch.arange(300)).flatten()
    assert g.dtype == torch.float64 and g.isfinite().all()
    # P(G <= x) = exp(−exp(−x)); Kolmogorov's distance is below 2/sqrt(n) but once in 1500.
    cdf = (-(-g.sort().values).exp()).exp()
    step = (torch.arange(len(g)) + 0.5) / len(g)
    assert float((cdf - step).abs().max()) < 2 / len(g) ** 0.5


def test_signs_of_pairs_are_those_of_the_table() -> None:
    rows, columns = torch.tensor([0, 1, 31, 32, 33, 1000, 2**40]), torch.arange(40)
    for dtype in (torch.float32, torch.float64):
        values = torch.rand(7, 40, dtype=dtype) + 0.1
        found = counter_rng.apply_random_signs_(values.clone(), 5, rows, columns)
        pairs = torch.broadcast_tensors(rows[:, None], columns)
        assert torch.equal(found, values * counter_rng.random_signs_at(5, *pairs, dtype))
        assert found.dtype == dtype
    part = counter_rng.apply_random_signs_(values[2:5, 10:].clone(), 5, rows[2:5], columns[10:])
    assert torch.equal(part, found[2:5, 10:])


def test_signs_are_independent_across_rows_and_columns() -> None:
    """What a shared word, a shared row bit or a xor of two hashes would break.

    Products over two columns of a row, over two rows, and over the four corners of a
    rectangle all have mean zero: the last is what bit(item) xor bit(row) fails at.
    """
    n, c = 256, 400
    signs = counter_rng.apply_random_signs_(
        torch.ones(n, c, dtype=torch.float64), 3, torch.arange(n), torch.arange(c)
    )
    for found in (signs, signs.T):
        products = found @ found.T / found.shape[1]
        off = products[~torch.eye(len(products), dtype=torch.bool)]
        assert float(off.abs().max()) < 6 / found.shape[1] ** 0.5
        assert abs(float(off.square().mean()) * found.shape[1] - 1) < 0.05
    corners = signs[:-1, :-1] * signs[1:, :-1] * signs[:-1, 1:] * signs[1:, 1:]
    assert abs(float(corners.mean())) < 5 / corners.numel() ** 0.5
    assert abs(float(signs.mean())) < 5 / signs.numel() ** 0.5


def test_buckets_deal_every_block_evenly() -> None:
    probes, columns = 7, torch.arange(7 * 3000 + 4)
    bucket = counter_rng.bucket_of(2, columns, probes)
    assert (bucket[:-4].view(-1, probes).sort(dim=1).values == torch.arange(probes)).all()
    for start, stop in ((0, len(columns)), (17, 17), (17, 18), (20, 21_000), (6993, 6995)):
        dealt = counter_rng.members_by_bucket(2, probes, start, stop - start, columns.device)
        for r, members in enumerate(dealt):
            own = (bucket[start:stop] == r).nonzero()[:, 0] + start
            assert torch.equal(members, own)
    first = torch.bincount(bucket[::probes], minlength=probes)
    assert float(((first - 3001 / 7) ** 2 / (3001 / 7)).sum()) < 25  # chi², 6 degrees
    assert not torch.equal(bucket, counter_rng.bucket_of(3, columns, probes))
