"""The ring of tensors that the next stage reads: in this process, where mapping is sharing. On GPUs: test_cuda.py."""

import torch

from xlstm_ray.actors.ring import Mapped, Ring


def test_the_last_tensors_are_read_as_they_were_whatever_their_sizes():
    """Small and large ones in turn, larger ones than ever before, and more than once around."""
    ring, mapped, kept = Ring(4), Mapped(), []
    for n in range(40):
        x = torch.randn(1 + n % 3, 1 + 7 * (n * n % 11) + n // 5, 8, generator=torch.Generator().manual_seed(n))
        kept.append((ring.put(x), x))
        for spot, wanted in kept[-4:]:
            assert torch.equal(mapped.view(spot), wanted)
    assert len({spot.ring for spot, _ in kept}) > 3


def test_an_older_tensor_than_there_are_places_is_written_over():
    ring, mapped = Ring(2), Mapped()
    first, *_ = [ring.put(torch.full((3,), float(n))) for n in range(3)]
    assert mapped.view(first).tolist() == [2.0] * 3


def test_tensors_are_joined_in_one_place_after_the_other():
    ring, mapped, kept = Ring(3), Mapped(), []
    for n in range(7):
        parts = [torch.randn(2, size + n % 2, generator=torch.Generator().manual_seed(n)) for size in (5, 1, 8)]
        kept.append((ring.join(parts), [value for part in parts for value in part.flatten().tolist()]))
        for spot, wanted in kept[-3:]:
            assert mapped.view(spot).tolist() == wanted


def test_rings_of_one_process_are_told_apart():
    mapped, spots = Mapped(), [Ring(1).put(torch.full((n + 1,), float(n))) for n in range(3)]
    assert [mapped.view(spot).tolist() for spot in spots] == [[0.0], [1.0, 1.0], [2.0, 2.0, 2.0]]
