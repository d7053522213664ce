"""The optimizer of the training: PyTorch's AdamW, which starts without the compiler."""

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, for training loops that do not compile the optimizer.

    So that torch.compile leaves an optimizer out of its graphs, PyTorch wraps the methods below. Their wrappers import
    the compiler, which takes two thirds of the time of importing PyTorch, even if nothing is ever compiled. These are
    PyTorch's methods without the wrappers. The results are the same.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    # The wrapper of this one also disables gradients.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
