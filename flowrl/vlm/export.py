"""What a policy that writes has learnt, as files that peft and transformers read, and reading it back.

| form | files | for |
|---|---|---|
| `peft` | adapter_model.safetensors, adapter_config.json | `peft.PeftModel.from_pretrained` |
| `full` | the whole model and its processor, adapters merged | `AutoModelForImageTextToText.from_pretrained` |

Each has the settings of sampling in `inference.json`, and a README with code. A value head lies beside them in a file
of its own, since no model class of transformers has one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flowrl.models.pipeline import INFERENCE, ModelError
from flowrl.vlm.model import quiet
from flowrl.weights import ADAPTER, save_component, share, with_adapter

Form = Literal["peft", "full"]
FORMS: tuple[Form, ...] = get_args(Form)
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
VALUE_HEAD = "value_head.safetensors"

_PEFT_PREFIX = "base_model.model."


def write(model: Any, lora: bool, folder: Path, form: Form, inference: Mapping[str, Any]) -> None:
    """Writes one form into a folder, which is made; ModelError for adapters where there are none."""
    if form not in FORMS:
        raise ModelError(f"format {form!r}: a model that writes is exported as {' or '.join(FORMS)}.")
    if form == "peft" and not lora:
        raise ModelError("format peft is for LoRA adapters, and here all weights were trained. Take format full.")
    folder.mkdir(parents=True, exist_ok=True)
    loading = _write_peft(model, folder) if form == "peft" else _write_full(model, lora, folder)
    if model.value_head is not None:
        from safetensors.torch import save_file

        save_file({name: _plain(t) for name, t in model.value_head.state_dict().items()}, folder / VALUE_HEAD)
    (folder / INFERENCE).write_text(json.dumps(dict(inference), indent=2) + "\n")
    (folder / "README.md").write_text(_readme(model, lora, loading))
    share(folder)


def _write_peft(model: Any, folder: Path) -> list[str]:
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(model.trainable, adapter_name=ADAPTER)
    stored = {f"{_PEFT_PREFIX}{name}": _plain(tensor) for name, tensor in found.items()}
    save_file(stored, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = copy.copy(model.trainable.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = None if Path(model.path).expanduser().exists() else model.path
    config.save_pretrained(folder)
    base = f"resolve({model.path!r})"
    return [
        "from flowrl.vlm.model import resolve",
        "from peft import PeftModel",
        f"processor = AutoProcessor.from_pretrained({base})",
        f"model = AutoModelForImageTextToText.from_pretrained({base}, dtype={model.dtype})",
        f'model = PeftModel.from_pretrained(model, "{folder.name}")',
    ]


def _write_full(model: Any, lora: bool, folder: Path) -> list[str]:
    """Note: what was trained in fp32 is rounded to the dtype that the model computes in."""
    made = copy.deepcopy(model.trainable).to("cpu")
    if hasattr(made, "value_head"):
        del made.value_head
    if lora:
        _merge(made)
    with quiet():
        save_component(made.to(model.dtype), folder)
    model.processor.save_pretrained(folder)
    return [
        f'processor = AutoProcessor.from_pretrained("{folder.name}")',
        f'model = AutoModelForImageTextToText.from_pretrained("{folder.name}", dtype={model.dtype})',
    ]


def _merge(network: Any) -> None:
    """Adds adapters to the weights under them, and leaves nothing else of them."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [*network.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            network.set_submodule(name, layer.get_base_layer())
    network._hf_peft_config_loaded = False
    del network.peft_config


def _readme(model: Any, lora: bool, loading: list[str]) -> str:
    code = "\n".join(
        [
            "import torch",
            "from PIL import Image",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            *loading,
            'content = [{"type": "image", "image": Image.open("picture.png")}, {"type": "text", "text": "Question?"}]',
            "inputs = processor.apply_chat_template(",
            '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,',
            '    return_tensors="pt",',
            ")",
            "ids = model.generate(**inputs, max_new_tokens=256)",
            'print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]
    )
    title = f"{'LoRA' if lora else 'Weights'} for {Path(model.path).name if Path(model.path).is_dir() else model.path}"
    return f"# {title}\n\nTrained with flowrl. In the folder above this one:\n\n```python\n{code}\n```\n"


# ------------------------------------------------------------------------------------------------ reading


def read_adapters(folder: Path, alpha: float) -> dict[str, Tensor]:
    """The values of exported adapters by the names of the trained parameters; ModelError for another alpha."""
    from safetensors.torch import load_file

    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    if config["lora_alpha"] != alpha:
        raise ModelError(
            f"weights {str(folder)!r} have lora alpha {config['lora_alpha']}, the policy {alpha}: make them equal."
        )
    found = load_file(str(folder / ADAPTER_WEIGHTS))
    return {with_adapter(name.removeprefix(_PEFT_PREFIX)): tensor for name, tensor in found.items()}


def read_full(folder: Path, network: Any) -> dict[str, Tensor]:
    """The values of an exported model by the names of its parameters."""
    stored = type(network).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return dict(stored.named_parameters())


def read_value_head(folder: Path) -> dict[str, Tensor]:
    """The values of an exported value head by the names of its parameters in the network; {} without one."""
    from safetensors.torch import load_file

    file = folder / VALUE_HEAD
    return {f"value_head.{name}": tensor for name, tensor in load_file(str(file)).items()} if file.is_file() else {}


def is_peft(folder: Path) -> bool:
    """Whether an export is of adapters."""
    return (folder / ADAPTER_WEIGHTS).is_file()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
