"""Finding and loading models, and what is said when it fails."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flowrl import models
from flowrl.models import ModelError, load, pipeline, resolve
from flowrl.resolve import ResolveError


@pytest.mark.parametrize("part", ["vae", "scheduler", "transformer", "text_encoder_2"])
def test_a_missing_part_is_named(tmp_path, part):

    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny/sd3"), folder)
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=rf"lacks {part}/ \(.*model_index.json names.*hf download"):
        load(folder)


def test_a_part_that_was_left_out_is_named(tmp_path):

    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny/sd3"), folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="comes without vae"):
        load(folder)


def test_weights_of_another_family_are_refused():
    with pytest.raises(ModelError, match="is a StableDiffusion3Pipeline, and Flux serves FluxPipeline"):
        load("tiny/sd3", family="flux")


def test_an_unknown_tiny_name_is_refused_with_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'sd3'"):
        load("tiny/sd33")


def test_importing_the_models_imports_no_diffusers():
    code = (
        "import sys, flowrl.models.sd3, flowrl.policy; print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_family_is_read_from_the_folder(tiny_sd3):
    assert models.family_of(tiny_sd3) == "sd3"
    families = models.families()
    assert families["sd3"] == ("StableDiffusion3Pipeline",) and families["wan"] == ("WanPipeline",)
    served = [name for pipelines in families.values() for name in pipelines]
    assert len(served) == len(set(served))  # a pipeline has one family


def test_everything_is_frozen_and_in_evaluation_mode(sd3):
    parts = [part for part in sd3.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 5
    for part in parts:
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_a_built_in_model_is_only_a_path(tiny_sd3, tmp_path, monkeypatch, capfd):
    package = tmp_path / "packaged_world"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights").symlink_to(tiny_sd3, target_is_directory=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(pipeline.BUILT_IN, "world", "packaged_world/weights")
    capfd.readouterr()
    model = models.load("world")
    assert capfd.readouterr().err == ""  # no bars, no warnings
    assert model.path == "world" and model.inference["max_sequence_length"] == 8


def test_built_in_weights_that_were_not_installed(monkeypatch):
    monkeypatch.setitem(pipeline.BUILT_IN, "world", "flowrl.engine/weights")
    with pytest.raises(ModelError, match="'world': its weights are missing from this installation.*reinstall"):
        models.load("world")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(
        ModelError, match="no such folder, and a hub id has the form owner/name.*built-in models: shapes"
    ):
        models.load("shape")
    with pytest.raises(ModelError, match="no such folder"):
        models.load(tmp_path / "a" / "b" / "c")
    with pytest.raises(ModelError, match="no model_index.json. A diffusers pipeline folder is needed"):
        models.load(tmp_path)
    (tmp_path / pipeline.LORA_WEIGHTS).touch()
    with pytest.raises(ModelError, match="looks like exported weights"):
        models.load(tmp_path)
    assert models.resolve("owner/name-1.5") == "owner/name-1.5"


def test_a_pipeline_of_no_family(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    with pytest.raises(
        ModelError, match=r"is a MochiPipeline.*there are: .*sd3 \(StableDiffusion3Pipeline\).*model.family"
    ):
        models.load(tmp_path)
    with pytest.raises(ResolveError, match="did you mean 'sd3'"):
        models.load(tmp_path, family="sd33")


def test_a_family_may_be_a_file_of_the_user_s(tiny_sd3, tmp_path):
    source = "from flowrl.models.sd3 import SD3\nclass Mine(SD3):\n    '''Another.'''\n"
    (tmp_path / "mine.py").write_text(source)
    model = models.load(tiny_sd3, family=f"{tmp_path / 'mine.py'}:Mine")
    assert type(model).__name__ == "Mine"


def test_files_that_are_not_what_they_should_be(tmp_path, tiny_sd3):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="model_index.json is not valid JSON"):
        models.load(tmp_path)
    (tmp_path / "model_index.json").write_text((tiny_sd3 / "model_index.json").read_text())
    with pytest.raises(ModelError, match="lacks scheduler/.*complete copy"):
        models.load(tmp_path)


def test_settings_that_the_pipeline_does_not_take(tmp_path, sd3):
    (tmp_path / "inference.json").write_text(json.dumps({"num_steps": 3}))
    with pytest.raises(
        ModelError,
        match="inference.json .or model.inference. has num_steps, which the call of Stable",
    ):
        models.read_inference(tmp_path, sd3.pipe)


def _answer(kind, status):
    return kind("server text", response=SimpleNamespace(headers={}, request=None, status_code=status))


def test_what_the_hub_answers(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    cases = {
        "is gated.*Accept the terms at https://huggingface.co/owner/name.*hf auth login": _answer(
            errors.GatedRepoError, 403
        ),
        "was not found.*Check the spelling": _answer(errors.RepositoryNotFoundError, 401),
        "hub could not be reached.*hf download owner/name.*'shapes'": errors.LocalEntryNotFoundError("offline"),
        "not in diffusers format": _answer(errors.RemoteEntryNotFoundError, 404),
        "could not be read": _answer(errors.HfHubHTTPError, 500),
        "not in the local cache": errors.OfflineModeIsEnabled("offline"),
    }
    for message, error in cases.items():

        def download(*args, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(ModelError, match=message):
            models.load("owner/name")


def test_a_hub_model_without_settings_has_none(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*args):
        raise _answer(errors.RemoteEntryNotFoundError, 404)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert models.read_inference("owner/name", SimpleNamespace()) == {}


def test_guidance_has_one_key(tmp_path):
    from flowrl.media import load_model
    from tests import runs

    config = runs.config("tiny/sd3", tmp_path, {"model.inference": {"guidance_scale": 7.0}})
    with pytest.raises(ModelError, match="guidance_scale, which is model.guidance"):
        load_model(config)


def test_settings_that_training_does_not_heed_are_told():
    with pytest.warns(UserWarning, match="sets clip_skip, which SD3 does not heed"):
        load("tiny/sd3", inference={"clip_skip": 1})
