"""Which hooks stand: on modules, on parameters, and torch's global ones."""

import torch.nn.modules.module as torch_module

OF_MODULES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
GLOBAL = (
    "_global_forward_hooks",
    "_global_forward_hooks_with_kwargs",
    "_global_forward_hooks_always_called",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def everywhere():
    """Torch's global hooks."""
    return sum(len(getattr(torch_module, table)) for table in GLOBAL)


def standing(model):
    """Hooks on a model's modules and parameters, and torch's global ones."""
    modules = sum(len(getattr(module, table)) for module in model.modules() for table in OF_MODULES)
    parameters = sum(len(getattr(p, table) or ()) for p in model.parameters() for table in OF_PARAMETERS)
    return modules + parameters + everywhere()
