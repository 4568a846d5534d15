"""PEFT LoRA adapters, merged into the weights at load, so that nothing later knows of them."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.models.files import check_adapter_folder
from r2r_glimp.models.source import one_line


def check_adapter(folder: Path) -> None:
    """Whether the adapter of a folder can be merged, as far as its files tell; takes no time.

    Raises:
        UsageError: peft is not installed.
        CheckpointError: the adapter is broken, unsafe, or of another kind than LoRA.
    """
    if find_spec("peft") is None:
        raise UsageError(
            "adapters need peft, which is not installed: pip install 'r2r_glimp[train]'"
        )
    kind = check_adapter_folder(folder).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is an adapter of kind {kind}: only LORA can be merged")


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a checked adapter added to its weights, in place.

    Raises:
        CheckpointError: the adapter was made for another model, or holds NaN or infinite weights.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict  # takes seconds

    weights = load_file(folder / "adapter_model.safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is refused below
            config = PeftConfig.from_pretrained(str(folder))
            peft_model = get_peft_model(model, config)
            _refuse_tied_targets(model, peft_model, folder)
            result: Any = set_peft_model_state_dict(peft_model, weights)
            missing = [
                key for key in result.missing_keys if ".lora_" in key or ".modules_to_save." in key
            ]
            if missing:
                raise CheckpointError(f"{folder} has no weights for {missing[0]}")
            if result.unexpected_keys:
                raise CheckpointError(
                    f"{folder} does not fit {type(model).__name__}: no place for "
                    f"{result.unexpected_keys[0]}"
                )
            merged = peft_model.merge_and_unload(safe_merge=True)
    except CheckpointError:
        raise
    except Exception as error:  # peft raises many kinds for what does not fit
        raise CheckpointError(
            f"{folder} does not fit {type(model).__name__}: {_reason(error)}"
        ) from error
    return merged


def _reason(error: Exception) -> str:
    """PyTorch's size mismatches come after a first line that says little."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("size mismatch")), one_line(error))


def _refuse_tied_targets(model: PreTrainedModel, peft_model: Any, folder: Path) -> None:
    """Input and output embeddings that share their weights cannot take a change to one of them."""
    output = model.get_output_embeddings()
    if output is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    targets = {name.split(".")[-1] for name in peft_model.base_model.targeted_module_names}
    tied = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"} & targets
    if tied:
        raise CheckpointError(
            f"{folder} changes {sorted(tied)[0]}, which this model ties to its other embedding: "
            "it cannot be merged"
        )
