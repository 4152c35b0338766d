"""`freeze`: the engine gives the answers of the net it was made from and keeps weights of its own."""

import pytest
import torch

import p3d_kernels as p3d
from nets import distance, randomise


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomise(p3d.p3d63(10, wiring="port")).eval()


@pytest.mark.parametrize("wiring", ["author", "port"])
@pytest.mark.parametrize("size", [(5, 33, 40), (1, 16, 16)])
def test_answers_as_the_net(wiring, size):
    torch.manual_seed(0)
    net = randomise(p3d.p3d63(10, wiring=wiring)).eval()
    x = torch.randn(2, 3, *size)
    engine = p3d.freeze(net)
    with torch.no_grad():
        assert distance(engine(x), net(x)) < 1e-5
        assert distance(engine.features(x), net.features(x)) < 1e-5


def test_dtype_is_the_engine_s_own(net):
    x = torch.randn(1, 3, 4, 32, 32)
    engine = p3d.freeze(net, torch.bfloat16)
    with torch.no_grad():
        reference = net(x)
        assert (engine(x) - reference).norm() < 0.05 * reference.norm()
    assert net.conv1_custom.weight.dtype == torch.float32
    assert {b.dtype for name, b in engine.named_buffers() if "weight" in name} == {torch.bfloat16}
    assert {b.dtype for name, b in engine.named_buffers() if "record" in name} == {torch.float32}


def test_later_changes_of_the_net_do_not_reach_the_engine(net):
    x = torch.randn(1, 3, 2, 16, 16)
    engine = p3d.freeze(net)
    before = engine(x)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    assert torch.equal(engine(x), before)


def test_the_net_stays_as_it_is(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    p3d.freeze(net, torch.float16)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in net.parameters())


def test_an_accelerated_net_can_be_frozen(net):
    plain = randomise(p3d.models.PlainP3D(p3d.models.DEPTHS["p3d63"], 10, wiring="port")).eval()
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        reference = plain(x)
    engine = p3d.freeze(p3d.accelerate(plain))
    assert distance(engine(x), reference) < 1e-5


def test_refusals(net):
    with pytest.raises(ValueError, match="eval mode"):
        p3d.freeze(net.train())
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        p3d.freeze("net")
    with pytest.raises(TypeError, match="dtype"):
        p3d.freeze(net.eval(), torch.int8)
    with pytest.raises(ValueError, match="none of their blocks"):
        p3d.freeze(torch.nn.Linear(2, 2).eval())
    engine = p3d.freeze(net)
    with pytest.raises(ValueError, match="Engine"):
        p3d.freeze(engine)
    with pytest.raises(RuntimeError, match="inference only"):
        engine.train()
    net.layer2[1].bn2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer2\.1 cannot be frozen \(bn2 has hooks"):
        p3d.freeze(net)
