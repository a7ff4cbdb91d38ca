"""A linear layer whose weight stays packed integers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import decompress, of_integers
from aq_lightning.kernels.int4_int8_matmul import int4_int8_matmul
from aq_lightning.kernels.int4_matmul import int4_matmul
from aq_lightning.kernels.kronecker_matmul import kronecker_matmul
from aq_lightning.kernels.layout import Layout
from aq_lightning.kernels.packed import Operands, PackedWeight
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers.activations import quantize_tokens
from aq_lightning.scheme import Scheme
from aq_lightning.transforms.online import Online

_WEIGHT, _DENSE = "weight", "dense"


class Int4Linear(nn.Linear):
    """``y = Q(x) Ŵᵀ + b`` with a weight of 2 to 8 bits: Q rounds each token where the scheme has integer
    activations, and Ŵ is never there as a whole on a GPU.

    It is made in one of two states. :meth:`of` holds a weight in the kernels' layout. :meth:`expecting` holds buffers
    under the names of a checkpoint, for whoever loads it to fill; :meth:`pack` turns them into the kernels' layout.

    Online products of its input multiply in a hook, as on any linear, until :meth:`absorb` takes them over.

    It counts as a ``torch.nn.Linear`` (hooks and adapters find it), but it has no ``weight``.
    """

    online: Online

    def __init__(self, shape: tuple[int, int], scheme: Scheme, bias: nn.Parameter | None) -> None:
        """
        Args:
            shape: (N, K), outputs and inputs.
            scheme: integers of the weight and of what it reads.
            bias: (N); None: none.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.out_features, self.in_features = shape
        self.scheme = scheme
        self.register_parameter("bias", bias)
        self._absorbed = False

    @staticmethod
    def of(weight: QTensor, scheme: Scheme, bias: nn.Parameter | None = None) -> Int4Linear:
        """A layer with a weight (N, K); ``bias``: (N)."""
        linear = Int4Linear(tuple(weight.codes.shape), scheme, bias)
        linear._hold(PackedWeight.pack(weight))
        return linear

    @staticmethod
    def expecting(linear: nn.Linear, scheme: Scheme, stored: Mapping[str, Tensor]) -> Int4Linear:
        """The place of ``linear``, its bias kept, with buffers like the checkpoint's parts of its weight.

        Args:
            linear: to be replaced.
            scheme: of the checkpoint.
            stored: part's name, such as ``weight_packed`` → its shape and dtype, on the meta device.
        """
        expecting = Int4Linear((linear.out_features, linear.in_features), scheme, linear.bias)
        for name, tensor in stored.items():
            expecting.register_buffer(name, tensor)
        return expecting

    def pack(self, layout: Layout | None) -> None:
        """Turns the parts that a checkpoint stores into the kernels' layout, on the device where they are.

        Args:
            layout: how the checkpoint's words are filled; None infers it from their number.

        Raises:
            RequestError: the parts are not there, for the layer was offloaded, or do not fit the scheme.
        """
        stored = {name: buffer for name, buffer in self._buffers.items() if name.startswith(_WEIGHT)}
        if any(tensor.is_meta for tensor in stored.values()):
            raise RequestError(
                "Packed weights stay on the device that multiplies them, got a model that does not fit and was "
                "offloaded: give it a larger device, or several."
            )
        for name in stored:
            delattr(self, name)
        grid = self.scheme.weight
        if _WEIGHT in stored:
            weight = of_integers(stored[_WEIGHT], stored[f"{_WEIGHT}_scale"], grid)
        else:
            weight = decompress(_WEIGHT, stored, grid, layout)
        self._hold(PackedWeight.pack(weight))

    def unpack(self) -> QTensor:
        """The weight (N, K), to the bit as it was given."""
        shape = (self.out_features, self.in_features)
        return PackedWeight(self.words, self.scales, self.scheme.weight, self.storage, shape).unpack()

    def expand(self) -> None:
        """Keeps the weight in float32 as well, for a CPU, which would otherwise unpack it for every product: a tenth of
        the time for eight times the memory of 4 bits."""
        self.register_buffer(_DENSE, self.unpack().dequantize(torch.float32), persistent=False)

    def absorb(self, online: Online) -> None:
        """Multiplies what it reads by online products itself, from now on: in the kernel that rounds it, where there is
        one for both."""
        self.online = online
        self._absorbed = True

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N) in the dtype of x."""
        bits, activation, dense = self.scheme.weight.bits, self.scheme.activation, self._buffers.get(_DENSE)
        integers = activation is not None and activation.symmetric and dense is None
        if self._absorbed:
            by = self.online.kronecker() if integers else None
            if by is not None:
                return kronecker_matmul(x, by, Operands(self.words, self.scales, bits), activation.bits, self.bias)
            x = self.online(x)
        if integers:
            return int4_int8_matmul(x, self.words, self.scales, bits, activation.bits, self.bias)
        if activation is not None:
            x = quantize_tokens(x, activation)
        if dense is not None:
            return functional.linear(x, dense.to(x.dtype), self.bias)
        return int4_matmul(x, self.words, self.scales, bits, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"

    def _hold(self, packed: PackedWeight) -> None:
        self.register_buffer("words", packed.words)
        self.register_buffer("scales", packed.scales)
        self.storage = packed.storage
