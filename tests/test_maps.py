import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castlora import CastLayer
from castlora.adapters.factors import LowRank
from castlora.maps.cast_layer import FoldedA, FoldedB, balance, fold_from_source, fold_to_source, merge_branches

sizes = st.integers(1, 12)
shapes = st.tuples(sizes, sizes, sizes, sizes, sizes)
seeds = st.integers(0, 2**16)


def random_layer(shape: tuple[int, int, int, int, int], seed: int) -> CastLayer:
    source_in, source_out, target_in, target_out, rank = shape
    generator = torch.Generator().manual_seed(seed)
    a, b, to_source, from_source = (
        torch.randn(size, generator=generator) / max(size) ** 0.5
        for size in ((rank, source_in), (source_out, rank), (source_in, target_in), (target_out, source_out))
    )
    return CastLayer(LowRank(a, b), to_source, from_source)


@given(shape=shapes, seed=seeds, positions=st.lists(st.integers(1, 4), max_size=3))
def test_the_live_layer_and_its_fold_compute_the_same(shape, seed, positions):
    layer = random_layer(shape, seed)
    activations = torch.randn(*positions, shape[2], generator=torch.Generator().manual_seed(seed + 1))
    folded = layer.fold()
    assert folded.a.shape == (shape[4], shape[2])
    assert folded.b.shape == (shape[3], shape[4])
    torch.testing.assert_close(activations @ folded.a.T @ folded.b.T, layer(activations))


@given(shape=shapes, seed=seeds)
def test_the_live_layer_is_the_equation_of_the_paper(shape, seed):
    layer = random_layer(shape, seed)
    hidden = torch.randn(shape[2], generator=torch.Generator().manual_seed(seed + 1))
    expected = layer.map_from_source @ layer.lora_b @ layer.lora_a @ layer.map_to_source @ hidden
    torch.testing.assert_close(layer(hidden), expected)


def test_only_the_maps_are_trained():
    layer = random_layer((3, 4, 5, 6, 2), seed=0)
    layer(torch.ones(5)).sum().backward()
    assert {name for name, _ in layer.named_parameters()} == {"map_to_source", "map_from_source"}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    assert not layer.lora_a.requires_grad and not layer.lora_b.requires_grad
    assert set(layer.state_dict()) == {"map_to_source", "lora_a", "lora_b", "map_from_source"}


@given(shape=shapes, seed=seeds)
def test_identity_maps_leave_the_update_to_the_bit(shape, seed):
    lora = random_layer(shape, seed).fold()
    folded = CastLayer(lora, torch.eye(lora.a.shape[1]), torch.eye(lora.b.shape[0])).fold()
    assert torch.equal(folded.a, lora.a) and torch.equal(folded.b, lora.b)


@given(parts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), gap=st.integers(0, 2))
def test_merged_branches_compute_what_each_computes_on_its_rows(parts, gap):
    d_in, branches, rows, start = 5, [], [], gap
    for rank, length in parts:
        branches.append(LowRank(torch.randn(rank, d_in), torch.randn(length, rank)))
        rows.append(slice(start, start + length))
        start += length
    merged = merge_branches(branches, rows, d_out=start + gap)
    assert merged.rank == sum(branch.rank for branch in branches)
    delta = merged.b @ merged.a
    for branch, part in zip(branches, rows, strict=True):
        torch.testing.assert_close(delta[part], branch.b @ branch.a)
    assert delta[:gap].abs().sum() == delta[start:].abs().sum() == 0


@settings(max_examples=50)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    widths=st.tuples(sizes, sizes, sizes),
)
def test_parametrizations_compute_the_padded_merge_of_the_folds(ranks, padding, widths):
    source_in, source_out, target_in = widths
    rows = [slice(4 * index, 4 * index + 3) for index in range(len(ranks))]
    d_out, rank = 4 * len(ranks), sum(ranks) + padding
    loras = [LowRank(torch.randn(r, source_in), torch.randn(source_out, r)) for r in ranks]
    to_source = [torch.randn(source_in, target_in) for _ in ranks]
    from_source = [torch.randn(3, source_out) for _ in ranks]
    folded = [
        LowRank(fold_to_source(lora.a, into), fold_from_source(out_of, lora.b))
        for lora, into, out_of in zip(loras, to_source, from_source, strict=True)
    ]
    merged = merge_branches(folded, rows, d_out)
    a = FoldedA([lora.a for lora in loras], to_source, rank)(*to_source)
    b = FoldedB([lora.b for lora in loras], from_source, rows, (d_out, rank))(*from_source)
    assert (a.shape, b.shape) == ((rank, target_in), (d_out, rank))
    torch.testing.assert_close(a[: merged.rank], merged.a)
    torch.testing.assert_close(b[:, : merged.rank], merged.b)
    assert a[merged.rank :].abs().sum() == b[:, merged.rank :].abs().sum() == 0


def test_modules_that_start_from_one_map_train_copies_of_it():
    shared = torch.randn(3, 5)
    first = FoldedA([torch.randn(2, 3)], [shared], 2).right_inverse(torch.empty(0))
    second = FoldedB([torch.randn(5, 2)], [shared], [slice(0, 3)], (3, 2)).right_inverse(torch.empty(0))
    assert torch.equal(first[0], shared) and torch.equal(second[0], shared)
    assert len({tensor.data_ptr() for tensor in (shared, *first, *second)}) == 3


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_balanced_factors_give_the_same_update_and_share_its_singular_values(seed, rank, unlike):
    generator = torch.Generator().manual_seed(seed)
    lora = LowRank(
        unlike * torch.randn(rank, 9, generator=generator), torch.randn(7, rank, generator=generator) / unlike
    )
    balanced = balance(lora)
    torch.testing.assert_close(balanced.b @ balanced.a, lora.b @ lora.a, rtol=1e-4, atol=1e-5)
    singular_values = torch.diag(torch.linalg.svdvals(lora.b @ lora.a)[:rank])
    torch.testing.assert_close(balanced.a @ balanced.a.T, singular_values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(balanced.b.T @ balanced.b, singular_values, rtol=1e-3, atol=1e-4)


def test_balancing_an_update_of_zero_leaves_zero():
    balanced = balance(LowRank(torch.randn(2, 5), torch.zeros(4, 2)))
    assert balanced.a.abs().max() == balanced.b.abs().max() == 0
