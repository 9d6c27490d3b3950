"""A token's call as it is sent: what msgpack packs by itself, as Ray uses it, and the same on the other side."""

import msgpack
import torch

from xlstm_ray.actors.call import Call
from xlstm_ray.actors.chooser import Chooser
from xlstm_ray.actors.wire import from_wire, to_wire
from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.sampler import Sampler

VOCABULARY = 50
PARAMETERS = [Sampling(temperature=1.0, seed=3, top_p=0.9), Sampling(temperature=0.0), Sampling(min_tokens=4, top_k=7)]


def sent(value: object) -> object:
    """As Ray packs it; TypeError where it would pickle something."""
    return msgpack.unpackb(msgpack.packb(value, strict_types=True))


def test_a_call_is_sent_without_a_pickle_and_chooses_the_same_tokens_there():
    sampler = Sampler(8, VOCABULARY, ends=(2, 9))
    slots = torch.tensor([5, 0, 7, sampler.idle])
    for slot, parameters in zip(slots.tolist(), PARAMETERS, strict=False):
        sampler.put(slot, parameters, position=11 + slot)
    rows = sampler.rows(slots)
    call = Call(3, 17, 4, 5, [0] * 4, [1, 1, 1, 0], 1, False, "last", (6, 8), None, rows)
    there = Call.unpacked(sent(call.packed()))
    assert there._replace(rows=None) == call._replace(rows=None)
    assert there.rows is not None
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1))
    choice = Chooser(VOCABULARY, torch.device("cpu")).choice(there.rows)
    assert Chooser.pick(choice, logits).tolist() == sampler.pick(logits, slots).tolist()
    assert Call.unpacked(sent(call._replace(rows=None, drop=()).packed())) == call._replace(rows=None, drop=())


def test_tokens_are_sent_without_a_pickle_and_other_tensors_as_arrays():
    tokens = torch.arange(48).view(16, 3)
    assert torch.equal(from_wire(sent(to_wire(tokens)), torch.int64), tokens)
    for x in (torch.arange(1000), torch.randn(3, 4), torch.randn(3, 4).bfloat16()):
        array = to_wire(x)
        assert not isinstance(array, list)
        assert torch.equal(from_wire(array, x.dtype), x)
