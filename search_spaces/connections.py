"""How a sublayer reads from, and writes to, the residual streams: one module class per mixing.

    X' = H_res X + H_post^T F(H_pre X),   X (B, T, n, C): n streams of C channels        (mHC, eq. 1)

`Connection` says what every class does; `read` and `write` are the two halves of a sublayer, and `advance` is the write
of one sublayer with the read of the next, which fused kernels do in one pass over the streams.

Sources: hc_static and hc: Hyper-Connections, 2409.19606. mhc: 2512.24880. mhc_lite: 2601.05732. kromhc: 2601.21579.
In each class `projection` is the dynamic part; every other tensor (bias or static matrix, gamma, alpha) is static
and takes no weight decay, in every variant alike. `connection_parameters` sorts a model's tensors so.

Classes and the functions they call need only torch, math and itertools, and keep every constructor argument
as an attribute, so that a model can be written out as one file.
"""

import math
from contextlib import AbstractContextManager
from itertools import permutations
from typing import ClassVar

import torch
from torch import Tensor, nn

from hypernas.kernels.sinkhorn import sinkhorn
from hypernas.kernels.stream_boundary import stream_boundary
from hypernas.kernels.stream_chain import recomputing
from hypernas.kernels.stream_mix import stream_mix
from hypernas.kernels.stream_read import stream_read
from hypernas.search_spaces.streams import check_streams, mixed_factors


class Connection(nn.Module):
    """What every mixing does, for n streams. `coefficients` is whatever `read` found that the write needs."""

    n: int

    def expand(self, x: Tensor) -> Tensor:
        """(B, T, C) -> X (B, T, n, C), once after the embedding: n copies."""
        return x.unsqueeze(-2).repeat_interleave(self.n, -2)

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h = H_pre X (B, T, C), not normalised, and the coefficients."""
        raise NotImplementedError

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        """X' = H_res X + H_post^T y, for y = F(h) (B, T, C)."""
        raise NotImplementedError

    def advance(
        self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The write of the sublayer before, and the read of this connection's own: X', h and its coefficients."""
        X = self.write(X, y, coefficients)
        return X, *self.read(X)

    def reduce(self, X: Tensor) -> Tensor:
        """X -> (B, T, C), once before the head: the plain sum over the streams."""
        return X.sum(-2)

    def finish(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        """The last sublayer's write, reduced: (B, T, C)."""
        return self.reduce(self.write(X, y, coefficients))

    def matrices(self, X: Tensor) -> Tensor:
        """(B, T, n, n): H_res of every token in the stream basis, for diagnostics alone."""
        raise NotImplementedError

    def mean_mixing(self, X: Tensor) -> Tensor:
        """(n, n): the mean of `matrices`."""
        return self.matrices(X).flatten(0, -3).mean(0)


class PlainResidual(Connection):
    """The residual connection of every Transformer: X' = X + y, with X (B, T, C)."""

    def expand(self, x: Tensor) -> Tensor:
        return x

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return X, ()

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        return X + y

    def reduce(self, X: Tensor) -> Tensor:
        return X

    def matrices(self, X: Tensor) -> Tensor:
        return torch.ones(*X.shape[:-1], 1, 1, device=X.device, dtype=X.dtype)


class PostNormResidual(PlainResidual):
    """X' = norm(X + y), the original Transformer's order (Vaswani et al. 2017): the norm of the sublayer before.

    The norm after the last sublayer is the model's own, before its head.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def advance(
        self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        X = self.norm(X + y)
        return X, *self.read(X)


def _hyper_connection_init(n: int, layer_index: int) -> Tensor:
    """[A_m | A_r | B] (n, n + 2) = [e_(k mod n) | I | 1], the pre-norm residual in disguise (2409.19606, eq. 14)."""
    read = torch.zeros(n, 1)
    read[layer_index % n] = 1.0
    return torch.cat([read, torch.eye(n), torch.ones(n, 1)], 1)


class StaticHyperConnection(Connection):
    """Static hyper-connections: the same matrices for every token (2409.19606, eq. 2).

    h = A_m^T X and X' = A_r^T X + B^T y. `static` (n, n + 2) holds [A_m | A_r | B].
    """

    def __init__(self, n: int, d_model: int, layer_index: int):
        super().__init__()
        self.n, self.d_model, self.layer_index = n, d_model, layer_index
        self.static = nn.Parameter(_hyper_connection_init(n, layer_index))

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        to_branch, to_streams, from_branch = self.static.split((1, self.n, 1), 1)
        return (X * to_branch).sum(-2), (to_streams, from_branch)

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        to_streams, from_branch = coefficients
        lead = X.shape[:-2]
        return stream_mix(X, y, to_streams.mT.expand(*lead, -1, -1), from_branch.squeeze(-1).expand(*lead, -1))

    def matrices(self, X: Tensor) -> Tensor:
        return self.static[:, 1:-1].mT.expand(*X.shape[:-2], -1, -1)


class HyperConnection(Connection):
    """Dynamic hyper-connections (2409.19606, eq. 10 to 13): the static matrices plus a small term from each stream.

    X^ = RMSNorm(X) per stream with weight 1 + gamma; [A_m | A_r | B](X) = static + s tanh(X^ W^T), W (n + 2, C),
    with s = alpha[0] for A_m and A_r and alpha[1] for B. Zero-initialised W: a pre-norm residual at first.
    """

    columns: Tensor  # which alpha scales which logit

    def __init__(self, n: int, d_model: int, layer_index: int):
        super().__init__()
        self.n, self.d_model, self.layer_index = n, d_model, layer_index
        self.projection = nn.Parameter(torch.zeros(n + 2, d_model))
        self.static = nn.Parameter(_hyper_connection_init(n, layer_index))
        self.gamma = nn.Parameter(torch.zeros(d_model))
        self.alpha = nn.Parameter(torch.full((2,), 0.01))
        self.register_buffer("columns", torch.tensor([0] * (n + 1) + [1]), persistent=False)

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight = torch.addcmul(self.projection, self.projection, self.gamma)
        # Each stream is read as if it were alone: (B, T, n, n + 2).
        _, logits = stream_read(X.unsqueeze(-2), weight, weight.new_zeros(self.n + 2))
        logits = logits.to(X.dtype)
        mixing = torch.addcmul(self.static, logits.tanh(), self.alpha[self.columns])
        to_branch, to_streams, from_branch = mixing.split((1, self.n, 1), -1)
        return (to_branch * X).sum(-2), (to_streams, from_branch)

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        to_streams, from_branch = coefficients
        return stream_mix(X, y, to_streams.mT, from_branch.squeeze(-1))

    def matrices(self, X: Tensor) -> Tensor:
        _, (to_streams, _) = self.read(X)
        return to_streams.mT


class DoublyStochasticConnection(Connection):
    """What mHC, mHC-lite and KromHC share: dynamic H_pre in (0, 1), H_post in (0, 2), and a doubly stochastic H_res.

    x' = RMSNorm(vec X) over nC, one statistic a token;  logits = alpha (projection x') + bias, with rows
    [pre (n) | post (n) | res (R)] and one alpha for each of the three;
    H_pre = sigmoid(pre), H_post = 2 sigmoid(post), H_res = what the class makes of res.

    At first the projection is 0 and the bias -1, but +1 for stream layer_index mod n: H_pre = .73 there and .27
    elsewhere, so unlike HC this does not start as the plain residual. `res_bias` (R) starts H_res near the identity.
    """

    columns: Tensor  # which alpha scales which logit

    def __init__(self, n: int, d_model: int, layer_index: int, res_bias: list[float]):
        super().__init__()
        self.n, self.d_model, self.layer_index = n, d_model, layer_index
        gates = [1.0 if stream == layer_index % n else -1.0 for stream in range(n)]
        self.projection = nn.Parameter(torch.zeros(2 * n + len(res_bias), n * d_model))
        self.bias = nn.Parameter(torch.tensor(gates + gates + res_bias))
        self.gamma = nn.Parameter(torch.zeros(n * d_model))
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        columns = torch.tensor([0] * n + [1] * n + [2] * len(res_bias))
        self.register_buffer("columns", columns, persistent=False)

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, logits = stream_read(X, self.weights(), self.bias)
        post, res = logits[..., self.n : 2 * self.n].sigmoid(), logits[..., 2 * self.n :]
        return h, (2 * post, *self.mixing(res))

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        post, matrices = coefficients
        return stream_mix(X, y, matrices, post)

    def weights(self) -> Tensor:
        """The projection (2n + R, nC) with gamma and the alphas multiplied in, once a forward for all tokens."""
        weight = torch.addcmul(self.projection, self.projection, self.gamma)
        return weight * self.alpha[self.columns].unsqueeze(-1)

    def mixing(self, res: Tensor) -> tuple[Tensor, ...]:
        """H_res (B, T, n, n) from its logits (B, T, R), or whatever else the class's own `write` applies."""
        raise NotImplementedError

    def matrices(self, X: Tensor) -> Tensor:
        _, (_, matrices) = self.read(X)
        return matrices


class SinkhornHyperConnection(DoublyStochasticConnection):
    """mHC (2512.24880, eq. 7 to 9): H_res by 20 Sinkhorn iterations on n x n logits, columns first and rows last."""

    iterations: ClassVar[int] = 20

    def __init__(self, n: int, d_model: int, layer_index: int):
        super().__init__(n, d_model, layer_index, [0.0 if row == col else -8.0 for row in range(n) for col in range(n)])

    def mixing(self, res: Tensor) -> tuple[Tensor, ...]:
        return (sinkhorn(res.unflatten(-1, (self.n, self.n)), self.iterations),)


def permutation_matrices(n: int) -> Tensor:
    """All n! permutation matrices, each flattened to a row (n!, n * n), the identity first."""
    return torch.eye(n)[torch.tensor(list(permutations(range(n))))].flatten(1)


class PermutationHyperConnection(DoublyStochasticConnection):
    """mHC-lite (2601.05732): H_res = sum_k a_k P_k over all n! permutations, a = softmax(res). n at most 4."""

    permutations: Tensor

    def __init__(self, n: int, d_model: int, layer_index: int):
        super().__init__(n, d_model, layer_index, [0.0] + [-8.0] * (math.factorial(n) - 1))
        self.register_buffer("permutations", permutation_matrices(n), persistent=False)

    def mixing(self, res: Tensor) -> tuple[Tensor, ...]:
        return ((res.softmax(-1) @ self.permutations.to(res.dtype)).unflatten(-1, (self.n, self.n)),)


class KroneckerHyperConnection(DoublyStochasticConnection):
    """KromHC (2601.21579, eq. 10 and 14) for any ordered factors of n, each 2 to 4.

    H_res = U^1 (x) ... (x) U^K, U^k = sum_m softmax(res_k)_m P_m (i_k x i_k), one alpha for all factors.
    Streams are seen as (i_1, ..., i_K) and U^k works on axis k: no n x n matrix. The first factor is the outermost, as
    in the authors' code; the paper writes the product the other way round, which only names the streams differently.
    """

    def __init__(self, factors: tuple[int, ...], d_model: int, layer_index: int):
        counts = [math.factorial(factor) for factor in factors]
        res_bias = [bias for count in counts for bias in [0.0] + [-8.0] * (count - 1)]
        super().__init__(math.prod(factors), d_model, layer_index, res_bias)
        self.factors, self.counts = factors, counts
        for factor in sorted(set(factors)):
            self.register_buffer(f"permutations_{factor}", permutation_matrices(factor), persistent=False)

    def mixing(self, res: Tensor) -> tuple[Tensor, ...]:
        shares = [logits.softmax(-1) for logits in res.split(self.counts, -1)]
        return tuple(
            (share @ self.get_buffer(f"permutations_{factor}").to(share.dtype)).unflatten(-1, (factor, factor))
            for factor, share in zip(self.factors, shares, strict=True)
        )

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        post, *mixing = coefficients
        return torch.addcmul(self.mix(X, mixing), post.to(X.dtype).unsqueeze(-1), y.unsqueeze(-2))

    def matrices(self, X: Tensor) -> Tensor:
        _, (_, *mixing) = self.read(X)
        identity = torch.eye(self.n, device=X.device, dtype=X.dtype)
        return self.mix(identity.expand(*X.shape[:-2], -1, -1), mixing)

    def mix(self, X: Tensor, mixing: list[Tensor]) -> Tensor:
        """H_res X, one factor after another."""
        shape, outer = X.shape, 1
        for factor, matrix in zip(self.factors, mixing, strict=True):
            X = matrix.to(X.dtype).unsqueeze(-3) @ X.reshape(*shape[:-2], outer, factor, -1)
            outer *= factor
        return X.reshape(shape)


def walsh_transform(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of axis 1, x (m, n, C), n a power of 2: sums and differences only."""
    shape, half = x.shape, x.shape[1] // 2
    while half:
        first, second = x.reshape(shape[0], -1, 2, half, shape[2]).unbind(2)
        x = torch.stack((first + second, first - second), 2)
        half //= 2
    return x.reshape(shape) * shape[1] ** -0.5


class WalshKroneckerHyperConnection(DoublyStochasticConnection):
    """KromHC with n = 2 x 2 x ... x 2, in the basis where its H_res is diagonal: no mixing of streams at all.

    A 2 x 2 factor [[p, 1 - p], [1 - p, p]] has eigenvalues 1 and 2p - 1 = tanh((res_0 - res_1) / 2), and the
    orthonormal Walsh-Hadamard matrix W diagonalises every Kronecker product of them. So from `expand` to `reduce` the
    streams are kept as W X, where with lambda_S the product of the eigenvalues of the factors in S

        X'_S = lambda_S X_S + (W H_post)_S y,   h = sum_S (W H_pre)_S X_S,   ||W X|| = ||X||

    Its `advance` is one op, kernels/stream_boundary.py.

    Parameters stay in the stream basis, with names, shapes and first values of `KroneckerHyperConnection`: the same
    `state_dict` gives the same function there.
    """

    signs: Tensor  # sqrt(n) W: whole numbers, exact in every dtype

    def __init__(self, n: int, d_model: int, layer_index: int):
        super().__init__(n, d_model, layer_index, [0.0, -8.0] * (n.bit_length() - 1))
        signs = walsh_transform(torch.eye(n).unsqueeze(0))[0] * math.sqrt(n)
        self.register_buffer("signs", signs.round(), persistent=False)

    def expand(self, x: Tensor) -> Tensor:
        return nn.functional.pad(math.sqrt(self.n) * x.unsqueeze(-2), (0, 0, 0, self.n - 1))

    def read(self, X: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        _, h, coefficients = stream_boundary(X, None, None, *self.walsh_weights())
        return h, (coefficients,)

    def write(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        post, spectrum = coefficients[0].to(X.dtype).unsqueeze(-1).chunk(2, -2)
        return torch.addcmul(X * spectrum, post, y.unsqueeze(-2))

    def advance(
        self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        X, h, following = stream_boundary(X, y, coefficients[0], *self.walsh_weights())
        return X, h, (following,)

    def reduce(self, X: Tensor) -> Tensor:
        return math.sqrt(self.n) * X[..., 0, :]

    def finish(self, X: Tensor, y: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        """Of the last write only the first stream is needed: in the Walsh basis it is the sum over all.

        Backward needs it too; as a copy, so that it does not hold the other streams in memory.
        """
        return self.reduce(self.write(X[..., :1, :].clone(), y, (coefficients[0][..., :: self.n],)))

    def walsh_weights(self) -> tuple[Tensor, Tensor]:
        """Projection (2n + K, nC) and bias (2n + K) for streams in the Walsh basis.

        gamma and alpha are in the projection; the two logits of a factor have become their difference.
        """
        two_n, weight = 2 * self.n, self.weights()
        weight = torch.cat([weight[:two_n], weight[two_n::2] - weight[two_n + 1 :: 2]])
        weight = walsh_transform(weight.unflatten(1, (self.n, self.d_model))).flatten(1)
        return weight, torch.cat([self.bias[:two_n], self.bias[two_n::2] - self.bias[two_n + 1 :: 2]])

    def matrices(self, X: Tensor) -> Tensor:
        _, (coefficients,) = self.read(X)
        spectrum = coefficients[..., self.n :].to(X.dtype)
        return self.signs * spectrum.unsqueeze(-2) @ self.signs / self.n


def make_connection(n: int, mixing: str, factors: str | None, d_model: int, layer_index: int) -> Connection:
    """The connection module around sublayer number `layer_index` (counted over the whole model). Raises SpaceError."""
    check_streams(n, mixing, factors)
    if mixing == "none":
        return PlainResidual()
    if mixing == "hc_static":
        return StaticHyperConnection(n, d_model, layer_index)
    if mixing == "hc":
        return HyperConnection(n, d_model, layer_index)
    if mixing == "mhc":
        return SinkhornHyperConnection(n, d_model, layer_index)
    sizes = mixed_factors(n, mixing, factors)
    if set(sizes) == {2}:
        return WalshKroneckerHyperConnection(n, d_model, layer_index)
    if len(sizes) == 1:
        return PermutationHyperConnection(n, d_model, layer_index)
    return KroneckerHyperConnection(sizes, d_model, layer_index)


def stochastic_errors(matrices: Tensor) -> tuple[float, float]:
    """How far row sums and column sums of (..., n, n) are from 1 at worst. mHC's columns are not close: 20 Sinkhorn
    iterations end on rows, and what is left in the columns multiplies up over depth."""
    rows, columns = ((matrices.sum(axis) - 1.0).abs().max().item() for axis in (-1, -2))
    return rows, columns


def recomputing_streams(model: nn.Module) -> AbstractContextManager[None]:
    """Forward passes of `model` inside the block keep few of the streams for backward, which computes the others again:
    less memory, more time, the same gradients to the last bit. Connections other than KromHC with factors of 2, whose
    streams cost little to compute again, keep theirs."""
    return recomputing(sum(isinstance(module, WalshKroneckerHyperConnection) for module in model.modules()))


def connection_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(dynamic, static) parameters of all connections in `model`.

    Dynamic projections may be decayed; static tensors never are (2409.19606), nor does Muon get any of either: they
    are not the hidden matrices it is made for, and the KromHC authors train them with AdamW.
    """
    dynamic: list[nn.Parameter] = []
    static: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, Connection):
            for name, parameter in module.named_parameters(recurse=False):
                (dynamic if name == "projection" else static).append(parameter)
    return dynamic, static
