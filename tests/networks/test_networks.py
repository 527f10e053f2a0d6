"""Networks: equivariance, permutation of interchangeable particles, and their descriptions."""

from __future__ import annotations

import copy

import pytest
import torch

from openmm_vtdis.networks import EGNN, MLP, build_network, describe_network, parse_size

LABELS = [0, 1, 1, 0]


def random_egnn(n_dims: int = 3, **options: object) -> EGNN:
    torch.manual_seed(0)
    network = EGNN(LABELS, n_dims, n_layers=3, n_hidden=16, n_radial=8, **options)  # type: ignore[arg-type]
    return network.double()


@pytest.mark.parametrize("n_dims", [2, 3])
def test_displacement_is_equivariant(n_dims: int) -> None:
    network = random_egnn(n_dims)
    x = torch.randn(5, 4, n_dims, dtype=torch.float64)
    log_t = torch.randn(5, dtype=torch.float64)
    out = network(x, log_t)
    assert float(out.detach().abs().max()) > 1e-3
    rotation = torch.linalg.qr(torch.randn(n_dims, n_dims, dtype=torch.float64)).Q
    torch.testing.assert_close(network(x @ rotation, log_t), out @ rotation)
    torch.testing.assert_close(network(-x, log_t), -out)
    torch.testing.assert_close(network(x + 3.0, log_t), out)


def test_only_particles_of_one_label_are_interchangeable() -> None:
    network = random_egnn()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    log_t = torch.randn(5, dtype=torch.float64)
    out = network(x, log_t)
    allowed, forbidden = [3, 2, 1, 0], [1, 0, 2, 3]
    torch.testing.assert_close(network(x[:, allowed], log_t), out[:, allowed])
    assert float((network(x[:, forbidden], log_t) - out[:, forbidden]).detach().abs().max()) > 1e-3


def test_the_noise_level_and_static_features_matter() -> None:
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    log_t = torch.zeros(5, dtype=torch.float64)
    network = random_egnn()
    assert float((network(x, log_t) - network(x, log_t + 2.0)).detach().abs().max()) > 1e-4
    bonds = torch.zeros(4, 4, 1)
    bonds[0, 1] = bonds[1, 0] = 1.0
    bonded = random_egnn(edge_features=bonds.tolist(), node_features=[[0.0], [1.0], [2.0], [3.0]])
    plain = random_egnn(
        edge_features=torch.zeros(4, 4, 1).tolist(), node_features=[[0.0], [1.0], [2.0], [3.0]]
    )
    assert float((bonded(x, log_t) - plain(x, log_t)).detach().abs().max()) > 1e-5


def test_coincident_particles_give_finite_values_and_gradients() -> None:
    network = random_egnn()
    x = torch.zeros(1, 4, 3, dtype=torch.float64, requires_grad=True)
    out = network(x, torch.zeros(1, dtype=torch.float64))
    out.square().sum().backward()
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(x.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [random_egnn(), MLP(4, 2, 2, 16)], ids=["egnn", "mlp"])
def test_description_makes_the_same_network(network: torch.nn.Module) -> None:
    again = build_network(describe_network(network))
    again.load_state_dict(network.state_dict())
    assert type(again) is type(network)
    assert describe_network(again) == describe_network(network)


def test_bad_descriptions_are_refused() -> None:
    with pytest.raises(ValueError, match="a kind among"):
        build_network({"kind": "transformer"})
    with pytest.raises(ValueError, match='a size such as "egnn-4x128"'):
        parse_size("huge")
    with pytest.raises(ValueError, match="got Linear"):
        describe_network(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected leading shapes"):
        EGNN([0, 0], 3, node_features=[[1.0]])
    assert parse_size("egnn-7x256") == ("egnn", 7, 256)


def test_compiled_layers_give_the_same() -> None:
    """Traced but run as they are: compiled code takes sums where it would take products."""
    torch.manual_seed(0)
    plain = EGNN([0, 0, 1, 2], 3, 2, 16).double()
    traced = copy.deepcopy(plain)
    for layer in traced.layers:
        layer.compile(backend="eager")
    x, log_t = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    gradients = []
    for network in (plain, traced):
        network(x, log_t).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(traced(x, log_t), plain(x, log_t), rtol=1e-12, atol=1e-13)
    for a, b in zip(*gradients, strict=True):
        if a is not None:  # the last layer's node features go nowhere
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
