"""The pair head reads the messages of a network, and changes nothing that it reads."""

from __future__ import annotations

import torch

from openmm_vtdis.networks.pair_head import PairHead


@torch.no_grad()
def test_the_head_reads_messages_and_the_noise_level() -> None:
    """And changes nothing that it reads."""
    torch.manual_seed(0)
    head = PairHead(4, 8, 8).double()
    torch.nn.init.normal_(head.exit.weight)
    messages = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    x, log_t = torch.randn(2, 4, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    before = messages.clone(), x.clone()
    found = head(messages, x, log_t)
    assert torch.equal(messages, before[0])
    assert torch.equal(x, before[1])
    for other in ((messages + 0.1, x, log_t), (messages, 1.1 * x, log_t), (messages, x, log_t + 1)):
        assert float((head(*other) - found).abs().max()) > 1e-3
    swapped = messages.transpose(1, 2)
    torch.testing.assert_close(head(swapped, x, log_t), found)
    alone = head(messages[:1], x[:1], log_t)  # one configuration at two noise levels
    torch.testing.assert_close(alone[0], found[0])
