"""Every pass of the policy goes through the forward of whatever wraps it."""

from __future__ import annotations

from contextlib import nullcontext

import acting
import pytest
import tiny
import torch
from test_trainer import trainer
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from distalign.engine import Group, score
from distalign.methods import METHODS
from distalign.models.policy import Lora
from distalign.training.passes import redirect

GROUPS = [Group([5, 6, 7], [[8, 9, 3], [4, 3]]), Group([9, 4], [[7, 3], [6]])]


class Wrapper(nn.Module):
    """Calls the model and counts."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        """As the model's."""
        self.calls += 1
        return self.module(*args, **kwargs)


def test_a_function_runs_inside_the_wrapper_and_the_model_is_itself_again():
    """Also while the function runs, and after it has raised."""
    model = tiny.model().eval()
    wrapper = Wrapper(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(redirect(wrapper, model, lambda: model(ids).logits, nullcontext()), plain)
    assert wrapper.calls == 1
    assert "forward" not in vars(model)
    with pytest.raises(ArithmeticError):
        redirect(wrapper, model, lambda: (_ for _ in ()).throw(ArithmeticError()), nullcontext())
    assert "forward" not in vars(model)
    model.forward = own = model.forward
    redirect(model, model, lambda: None, nullcontext())
    assert vars(model)["forward"] is own


def test_gradients_through_a_data_parallel_wrapper(tmp_path):
    """A group of one process: DDP's reducer sees an ordinary forward, and gradients are the same."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, model = tiny.model().train(), tiny.model().train()
        score(plain, GROUPS).logps.sum().backward()
        wrapper = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            logps = redirect(wrapper, model, lambda: score(model, GROUPS).token_logps, nullcontext())
            logps.sum().backward()
        # The reducer holds the group, and would end it as this function returns: its threads then wait for the GIL.
        del wrapper, logps
    finally:
        distributed.destroy_process_group()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("name", [*acting.METHODS, "dpo"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_no_pass_goes_around_the_wrapped_forward(tmp_path, name, lora):
    """Sampling, scoring, the adapter-off reference, evaluation and steps: layers run only inside the root's forward."""
    if name in acting.METHODS:
        made = acting.trainer(tmp_path, acting.METHODS[name], lora=lora, max_steps=2, num_iterations=2)
    else:
        settings = {"held": tiny.encoded_pairs(4), "eval_strategy": "steps", "eval_steps": 1}
        made = trainer(tmp_path, METHODS[name](gamma=0.5), lora=lora, max_steps=2, **settings)
    inside, passes = [0], [0]
    made.model.register_forward_pre_hook(lambda *_: inside.__setitem__(0, inside[0] + 1))
    made.model.register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] - 1), always_call=True)

    def layer(*_):
        passes[0] += 1
        assert inside[0] > 0, "a pass of the policy went around the wrapped forward"

    next(m for n, m in made.model.named_modules() if n.endswith("layers.0")).register_forward_pre_hook(layer)
    made.train()
    assert passes[0] > 4
