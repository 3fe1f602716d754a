"""Loading with PEFT when a warning is a failure: PEFT warns where it leaves a tensor out."""

import contextlib
import logging
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import get_peft_model_state_dict


class Fail(Exception):
    pass


class RaiseOnWarning(logging.Handler):
    def emit(self, record):
        raise Fail(f"logged by {record.name}: {record.getMessage()}")


@contextlib.contextmanager
def no_warnings():
    """Makes a warning, or a log record of level warning, an exception."""
    handler = RaiseOnWarning(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in (None, "torch", "transformers", "peft", "huggingface_hub")]
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("error")
        # transformers calls a property of its own that it deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        for logger in loggers:
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        yield


def check_tensors(model, file, name="default"):
    """Every tensor of the file is in the adapter, bit for bit, and the other way round."""
    with warnings.catch_warnings():
        # This is what PEFT saves with: it takes the bias of a B for an incomplete matrix.
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # With bias="all" it lists the biases of a module to save under the wrapper's names as well.
    held = {k: t for k, t in held.items() if ".modules_to_save." not in k and ".original_module." not in k}
    missing, unexpected = sorted(held.keys() - file.keys()), sorted(file.keys() - held.keys())
    if missing or unexpected:
        raise Fail(f"missing in the file: {missing}; not used by PEFT: {unexpected}")
    for key, tensor in file.items():
        if held[key].shape != tensor.shape or not torch.equal(held[key], tensor.to(held[key].dtype)):
            raise Fail(f"{key}: the model holds other values than the file")
