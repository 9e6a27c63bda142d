import pytest
import tiny
import torch

from castlora.errors import UserError
from castlora.maps.fitting import collect_moments, ridge_maps
from castlora.maps.shared_maps import (
    TO_SOURCE,
    branch_name,
    by_site,
    fold_site,
    pair_all,
    site_shapes,
    site_statistics,
    solve_maps,
)
from castlora.maps.starts import fold_maps
from castlora.maps.statistics import Moments
from castlora.models.modules import linear_slots
from castlora.models.pairing import pair_modules


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], y.shape[1])
    moments.update(x, y)
    return moments


def solved(x: torch.Tensor, y: torch.Tensor, ridge: float = 1e-6, name: str = "from_source.q"):
    moments = {name: moments_of(x, y)}
    maps, fits = solve_maps(moments, moments, ridge)
    return maps[name].float(), fits[name]


def test_what_a_map_explains_is_what_numpy_says(generator):
    x, y = torch.randn(200, 5, generator=generator) + 2, torch.randn(200, 3, generator=generator) - 1
    y = y + x[:, :3]
    matrix = torch.randn(3, 5, generator=generator) / 3
    left = (y - x @ matrix.T).double()
    moments = moments_of(x, y)
    assert moments.explained_by(matrix, centred=False) == pytest.approx(
        float(1 - left.square().sum() / y.double().square().sum()), rel=1e-5
    )
    assert moments.explained_by(matrix, centred=True) == pytest.approx(
        float(1 - left.var(0, unbiased=False).sum() / y.double().var(0, unbiased=False).sum()), rel=1e-5
    )


def test_a_rotation_is_found_and_nothing_draws_towards_the_identity(generator):
    x = torch.randn(4000, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    found, fit = solved(x, x @ turn.T)
    torch.testing.assert_close(found, turn, atol=1e-4, rtol=1e-4)
    assert fit.explained == pytest.approx(1, abs=1e-6)
    assert not fit.is_anchored


def test_related_activations_keep_what_the_text_says_nothing_about(generator):
    x = torch.randn(4000, 6, generator=generator)
    x[:, 5] = 0
    found, fit = solved(x, 0.9 * x + 0.05 * torch.randn(4000, 6, generator=generator))
    assert fit.is_anchored
    torch.testing.assert_close(found[:5, :5], 0.9 * torch.eye(5), atol=0.01, rtol=0)
    assert found[5, 5] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "y", [lambda x: -x, lambda x: x.flip(1), lambda x: 0.4 * x, lambda x: x[:, :4]],
    ids=["opposite", "in another order", "much smaller", "narrower"],
)  # fmt: skip
def test_unrelated_activations_are_not_drawn_towards_the_identity(generator, y):
    x = torch.randn(500, 6, generator=generator)
    assert not solved(x, y(x))[1].is_anchored


def test_only_the_way_from_the_source_is_centred(generator):
    x = torch.randn(4000, 4, generator=generator)
    shifted = 2 * x + 5
    back, _ = solved(x + 3, shifted)
    torch.testing.assert_close(back, 2 * torch.eye(4), atol=1e-3, rtol=0)
    there, _ = solved(x + 3, shifted, name=TO_SOURCE)
    assert (there - 2 * torch.eye(4)).abs().max() > 0.05


def test_how_well_maps_do_is_measured_on_other_text(generator):
    x, other = torch.randn(30, 20, generator=generator), torch.randn(500, 20, generator=generator)
    y, other_y = torch.randn(30, 20, generator=generator), torch.randn(500, 20, generator=generator)
    _, fits = solve_maps({"from_source.q": moments_of(x, y)}, {"from_source.q": moments_of(other, other_y)}, 1e-3)
    assert solved(x, y, 1e-3)[1].explained > 0.5 > 0 > fits["from_source.q"].explained


@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt2", "mistral"), ("gpt2", "gpt2-deep")])
def test_between_unrelated_models_the_fold_is_that_of_the_closed_form(paired, source, target):
    source_model, model, pairing, factors = paired(source, target)
    text = tiny.aligned(source, target)
    expected = fold_maps(
        pairing, factors, ridge_maps(collect_moments(source_model, model, pairing, text), pairing, 0.1)
    )
    slots = [linear_slots(one, one.config) for one in (source_model, model)]
    whole = pair_all(*slots)
    moments = collect_moments(source_model, model, whole, text)
    maps = {}
    for site, pairs in by_site(whole):
        statistics = site_statistics(moments, site, pairs)
        maps[site], fits = solve_maps(statistics, statistics, 0.1)
        assert not any(fit.is_anchored for fit in fits.values())
    folded = {}
    for site, pairs in by_site(pairing):
        folded |= fold_site(maps[site], pairs, pairing, factors, anchored=())
    assert folded.keys() == expected.keys()
    for name, lora in expected.items():
        torch.testing.assert_close(folded[name].a, lora.a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(folded[name].b, lora.b, rtol=1e-3, atol=1e-5)


def test_an_update_is_divided_among_the_layers_that_it_speaks_for_unless_they_repeat_its_own(paired, generator):
    _, _, pairing, factors = paired("gpt2", "gpt2-deep")
    widths = {name: lora.a.shape[1] for name, lora in factors.items()}
    divided, whole = {}, {}
    for _, pairs in by_site(pairing):
        shapes = site_shapes(pairs, widths)
        maps = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        divided |= fold_site(maps, pairs, pairing, factors, anchored={TO_SOURCE})
        whole |= fold_site(maps, pairs, pairing, factors, anchored=set(maps))
    among = {pair.target.name: pairing.multiplicity(branch) for pair, _, branch in pairing.branches()}
    assert set(among.values()) == {1, 2}
    for name, count in among.items():
        torch.testing.assert_close(whole[name].b, count * divided[name].b)
        torch.testing.assert_close(whole[name].a, divided[name].a)


@pytest.mark.parametrize(("source", "target"), [("llama", "phi3"), ("gpt2", "mistral"), ("mistral", "gpt2")])
def test_some_roles_get_the_maps_that_an_adapter_of_these_roles_needs(paired, source, target):
    models = paired(source, target)[:2]
    slots = [linear_slots(one, one.config) for one in models]
    roles = ("v", "up")
    some = {branch_name(pair, branch) for pair, _, branch in pair_all(*slots, roles).branches()}
    every = {branch_name(pair, branch) for pair, _, branch in pair_all(*slots).branches()}
    # In an MLP without a gate the first map takes the place of `up`.
    assert some == {name for name in every if {"v", "up", "fc"} & set(name.rsplit(".", 1)[-1].split("+"))}
    assert some < every
    adapted = [name for name, slot in slots[0].items() if {"v", "up", "fc"} & set(slot.roles)]
    needed = {branch_name(pair, branch) for pair, _, branch in pair_modules(*slots, adapted).branches()}
    assert some <= needed


def test_roles_without_a_partner_are_refused(paired):
    source, target = paired("llama", "gpt2")[:2]
    with pytest.raises(UserError, match="has a partner in the target"):
        pair_all(linear_slots(source, source.config), linear_slots(target, target.config), ("gate",))
