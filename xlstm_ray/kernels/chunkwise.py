"""The mLSTM's closed form over a run of tokens, in two levels: chunks at once, and a small recurrence between them.

Not an approximation: composing the steps of native.py gives exactly these sums (docs/math.md; Tiled Flash Linear
Attention, arXiv 2503.14376). Plain differentiable torch: compiled.py compiles it, training uses it uncompiled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.kernels.native import State, decayed, log_sigmoid


def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: State, chunk_size: int, eps: float = 1e-6
) -> tuple[Tensor, State]:
    """T tokens, a multiple of chunk_size L.

    q, k (B, NH, T, K)   v (B, NH, T, V): operands of the matrix products, in the model's dtype
    i, f (B, NH, T) gate pre-activations   state C (B, NH, K, V), n (B, NH, K), m (B, NH, 1) of one dtype
    Returns h (B, NH, T, V) in q's dtype, and the state after the last token, equal to mlstm_sequence's.
    """
    B, NH, T, K = q.shape
    V, L, scale = v.shape[-1], chunk_size, q.shape[-1] ** -0.5
    NC = T // L
    assert NC * L == T, "the plan pads windows to whole chunks"
    C, n, m = state
    acc, operand = C.dtype, q.dtype

    i = i.to(acc).view(B, NH, NC, L)
    b = log_sigmoid(f.to(acc)).view(B, NH, NC, L).cumsum(-1)  # decay since the chunk's start, own forget gate included
    g = b[..., -1]  # decay of a whole chunk
    a = g.unsqueeze(-1) - b + i  # log weight of each token in what its chunk adds to the state
    a_max = a.amax(-1)
    q = q.reshape(B, NH, NC, L, K)
    k = k.reshape(B, NH, NC, L, K)
    v = v.reshape(B, NH, NC, L, V)

    # 1. What each chunk adds to the state, all chunks at once.
    kw = (k.to(acc) * torch.exp(a - a_max.unsqueeze(-1)).unsqueeze(-1)).to(operand)
    dC = (kw.transpose(-1, -2) @ v).to(acc)
    dn = kw.to(acc).sum(-2)

    # 2. The state before every chunk and after the last: one small (NC + 1, NC) decay matrix a head.
    # The decay between two chunks is a sum over the chunks between them. A difference of two sums from the tile's start
    # would lose precision in a long tile (4096 tokens: 2e-4 of every weight).
    G = F.pad(g.cumsum(-1), (1, 0))
    row = torch.arange(NC + 1, device=q.device).unsqueeze(-1)
    col = torch.arange(NC, device=q.device)
    between = F.pad(g, (1, 0)).unsqueeze(-1).masked_fill(row <= col + 1, 0).cumsum(-2)
    log_w = (between + a_max.unsqueeze(-2)).masked_fill(row <= col, -torch.inf)
    ms = torch.maximum(G + m, log_w.amax(-1))
    # G + (m - ms), not G + m - ms: in windows of one chunk m grows large over a long prompt, and G + m would lose G.
    W, log_w0 = torch.exp(log_w - ms.unsqueeze(-1)), G + (m - ms)
    added = (W @ dC.view(B, NH, NC, K * V)).view(B, NH, NC + 1, K, V)
    n_added, w0 = W @ dn, torch.exp(log_w0[..., :-1])
    Cs = added[:, :, :-1] + w0[..., None, None] * C.unsqueeze(2)
    ns = n_added[:, :, :-1] + w0.unsqueeze(-1) * n.unsqueeze(2)
    # `decayed` only here: errors add up only in the state that goes from tile to tile.
    C = decayed(C, log_w0[..., -1:, None], added[:, :, -1])
    n, m = decayed(n, log_w0[..., -1:], n_added[:, :, -1]), ms[..., -1:]

    # 3. Outputs, all chunks at once: what came before the chunk, plus what is within it.
    D = b.unsqueeze(-1) - b.unsqueeze(-2) + i.unsqueeze(-2)
    D = D.masked_fill(~torch.ones(L, L, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    before = b + ms[..., :-1].unsqueeze(-1)
    mt = torch.maximum(before, D.amax(-1))
    S = (q @ k.transpose(-1, -2)).to(acc) * scale * torch.exp(D - mt.unsqueeze(-1))
    qw = torch.exp(before - mt) * scale
    numerator = (q @ Cs.to(operand)).to(acc) * qw.unsqueeze(-1) + (S.to(operand) @ v).to(acc)
    denominator = (q.to(acc) * ns.unsqueeze(-2)).sum(-1) * qw + S.sum(-1)
    h = numerator / (torch.maximum(denominator.abs(), torch.exp(-mt)) + eps).unsqueeze(-1)
    # Copies: a view would keep every chunk's state alive, and its strides would cause another compilation.
    C, n, m = (x.clone(memory_format=torch.contiguous_format) for x in (C, n, m))
    return h.to(operand).reshape(B, NH, T, V), (C, n, m)
