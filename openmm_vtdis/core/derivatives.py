"""First and second derivatives by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def differentiation() -> Iterator[None]:
    """Enable differentiation even if the caller is in no_grad or inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def leaf_of(x: Tensor) -> Tensor:
    """A float64 copy of x as a leaf to differentiate by."""
    x = x.detach().to(torch.float64)
    return (x.clone() if x.is_inference() else x).requires_grad_(True)


def gradients(
    output: Tensor, inputs: Sequence[Tensor], again: bool = True, keep: bool = True
) -> list[Tensor]:
    """Gradients of the sum of ``output`` in leaves; zero for those it does not depend on.

    ``again``: the gradients can be differentiated themselves. ``keep``: so can ``output``; False
    frees its memory where nothing is differentiated afterwards.
    """
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return list(
        torch.autograd.grad(
            output.sum(),
            inputs,
            create_graph=again,
            retain_graph=keep,
            materialize_grads=True,
        )
    )


class Linearised:
    """A function of x (B, ...) at one point, and products of its Jacobian from the left.

    One evaluation, and for each product a pass backwards through it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with differentiation():
            self._x = leaf_of(x)
            # A view, since hooks of modules (that count operations, say) refuse leaves
            self._value = function(self._x.view_as(self._x))

    @property
    def value(self) -> Tensor:
        """The function at x."""
        return self._value.detach()

    def product(self, v: Tensor) -> Tensor:
        """v^T dF/dx of every element of the batch, in the shape of x, for v in that of F."""
        if not self._value.requires_grad:
            return torch.zeros_like(self._x)
        with differentiation():
            (product,) = torch.autograd.grad(
                self._value, self._x, v, retain_graph=True, materialize_grads=True
            )
        return product


def elementwise(
    output: Tensor, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """First and second derivatives where each element depends on its own elements of the inputs.

    Everything is (P, B).
    """
    first = gradients(output, inputs)
    second = [gradients(slope, inputs, again=False) for slope in first]
    return [slope.detach() for slope in first], second


def gradients_at(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient (B, M, D) of energies (B,), detached."""
    with differentiation():
        leaf = leaf_of(x)
        (gradient,) = gradients(energy(leaf), [leaf], again=False, keep=False)
    return gradient


def differentiate_twice(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (B, M, D) and Hessian (B, M, D, M, D) of energies (B,), one pass a coordinate."""
    with differentiation():
        leaf = leaf_of(x)
        (gradient,) = gradients(energy(leaf), [leaf])
        columns = gradient.flatten(1).unbind(dim=1)
        rows = [gradients(column, [leaf], again=False)[0] for column in columns]
    hessian = torch.stack(rows, dim=1)
    return gradient.detach(), hessian.reshape(*x.shape, *x.shape[1:])
