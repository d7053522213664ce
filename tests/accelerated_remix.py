"""A Remix that accelerate prepares in two processes, see mixing/test_fsdp.py: accelerated_remix.py KIND."""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from conftest import relative
from sharded_remix import gradients, whole
from test_any_transformer import make

from mixing.stage_rates import set_stage_rates


def main(kind: str):
    """Prepare a Remix, and compare its gradients with those of one process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    remix, arguments = make("flux", rank=2)
    expected = gradients(remix, arguments)
    remix.zero_grad()
    kwargs = {}
    if kind == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["FluxTransformerBlock", "FluxSingleTransformerBlock"],
            cpu_ram_efficient_loading=True,
            reshard_after_forward=True,
        )
        kwargs = dict(fsdp_plugin=plugin)
    accelerator = Accelerator(cpu=True, **kwargs)
    optimizer = torch.optim.SGD(remix.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(remix, optimizer)
    rank = accelerator.process_index
    out = model(**take(arguments, rank)).sample.float()
    weights = torch.randn(4, *out.shape[1:], generator=torch.Generator().manual_seed(1))
    inner = accelerator.unwrap_model(model)
    accelerator.backward((out * weights[2 * rank : 2 * rank + 2]).sum() + 0.1 * inner.prior_loss())
    found = {name: whole(p.grad) for name, p in inner.named_parameters() if p.grad is not None}
    for name, value in expected.items():
        if value.abs().max() > 1e-3:
            assert relative(found[name], value) < 1e-5, name
    set_stage_rates(optimizer, inner, [0.5])
    before = whole(inner.logits.detach()).clone()
    optimizer.step()
    torch.testing.assert_close(whole(inner.logits.detach()), before - 0.5 * 0.1 * found["coefficients.logits"])
    accelerator.print(kind, "passed")
    accelerator.end_training()


def take(arguments: dict, rank: int) -> dict:
    positions = ("img_ids", "txt_ids")
    return {k: v if k in positions else v[2 * rank : 2 * rank + 2] for k, v in arguments.items()}


if __name__ == "__main__":
    main(sys.argv[1])
