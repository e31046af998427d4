"""Networks of diffusers as teachers: the same prediction as their own scheduler makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

diffusers: Any = pytest.importorskip("diffusers")

from fewstep.kernels import normals  # noqa: E402
from fewstep.runtime import Engine, Request  # noqa: E402
from fewstep.runtime.schedules import karras  # noqa: E402
from fewstep.runtime.solvers import SOLVERS  # noqa: E402
from fewstep.training import RecipeError, load_checkpoint, train  # noqa: E402
from fewstep.training.architectures import denoiser_of  # noqa: E402
from fewstep.training.diffusers_teacher import DiffusersError, load_diffusers  # noqa: E402
from fewstep.training.loop import generator  # noqa: E402
from fewstep.training.recipe import Recipe, recipe_from  # noqa: E402
from fewstep.training.sampling import follow, ve_levels  # noqa: E402
from fewstep.training.student_bundle import export_checkpoint  # noqa: E402


def saved(folder: Path, prediction: str, channels_out: int = 1, **scheduler: Any) -> Path:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=channels_out, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    )  # fmt: skip
    network.save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False, **scheduler).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("channels_out", [1, 2])
def test_a_teacher_says_what_its_own_scheduler_makes_of_it(prediction: str, channels_out: int, tmp_path: Path) -> None:
    """At a whole time: ``pred_original_sample`` of DDIM, on the latent of the variance-preserving path."""
    folder = saved(tmp_path, prediction, channels_out, beta_schedule="squaredcos_cap_v2")
    teacher = load_diffusers(folder)
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1000)
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    time, label = 400, torch.tensor([1, 3])
    kept = scheduler.alphas_cumprod[time]
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        raw = network(x, time, class_labels=label).sample[:, :1]
        theirs = scheduler.step(raw, time, x).pred_original_sample
        sigma = ((1 - kept) / kept).sqrt().expand(2)
        ours = teacher(x / kept.sqrt(), sigma, label)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert teacher.no_class == 3


@pytest.mark.filterwarnings("ignore")
def test_folders_that_are_no_teacher_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DiffusersError, match=r"scheduler_config.json: cannot be read"):
        load_diffusers(tmp_path)
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(DiffusersError, match=r"neither a folder unet nor a folder transformer"):
        load_diffusers(tmp_path)
    saved(tmp_path / "zero", "v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(DiffusersError, match=r"rescale_betas_zero_snr, whose last level is noise alone"):
        load_diffusers(tmp_path / "zero")
    saved(tmp_path / "flow", "epsilon")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    with pytest.raises(
        DiffusersError, match=r"a FlowMatchEulerDiscreteScheduler has no betas; its levels are not known"
    ):
        load_diffusers(tmp_path / "flow")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(DiffusersError, match=r"is a AutoencoderKL, not one of UNet2DModel"):
        load_diffusers(tmp_path)


# --- in recipes


def pipeline(folder: Path, kind: str, prediction: str = "epsilon", scheduler: str = "scaled_linear") -> dict[str, Any]:
    """A small random network of ten classes on digits, and the ``[network]`` table that names it."""
    torch.manual_seed(0)
    width = {"layers_per_block": 1, "norm_num_groups": 4}
    table: dict[str, Any] = {"kind": "diffusers", "folder": str(folder)}
    if kind == "DiTTransformer2DModel":
        network = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        )  # fmt: skip
        network.save_pretrained(folder / "transformer")
    elif kind == "UNet2DConditionModel":
        network = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, cross_attention_dim=8, attention_head_dim=4, **width,
            block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip
        network.save_pretrained(folder / "unet")
        table["conditions"] = str(folder / "conditions.safetensors")
        save_file({"conditions": torch.randn(11, 3, 8)}, table["conditions"])
    else:
        halvings = 0 if kind == "plain" else 1
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, **width, num_class_embeds=None if kind == "plain" else 11,
            block_out_channels=(8, 16)[: halvings + 1], down_block_types=("DownBlock2D",) * (halvings + 1),
            up_block_types=("UpBlock2D",) * (halvings + 1),
        )  # fmt: skip
        network.save_pretrained(folder / "unet")
    made = diffusers.DDIMScheduler(prediction_type=prediction, beta_schedule=scheduler)
    made.save_pretrained(folder / "scheduler")
    return table


def recipe_of(table: dict[str, Any], /, **student: Any) -> Recipe:
    short = {"sigma_max": 14.0, "sigma_floor": 0.03, "images": 48, "batch": 16, "guidance": 0.0, "num_steps": 2}
    data = {"source": "digits", "sigma_data": 0.75}
    evaluation = {"samples": 100, "classifier_images": 1000, "noise_seeds": 1, "step_counts": [2]}
    return recipe_from(
        {"name": "a", "data": data, "network": table, "student": {**short, **student}, "evaluation": evaluation}
    )


SMALL = {"channels": 8, "blocks": 1, "patch": 1, "attention": False}
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # by network: its prediction, what is exported, the method
    "UNet2DModel": ("v_prediction", "student", {"method": "moment-matching", "guidance": 1.0}),
    "UNet2DConditionModel": ("epsilon", "teacher", {"method": "progressive", "start_steps": 4}),
    "DiTTransformer2DModel": ("epsilon", "teacher", {"method": "dkdm", "pool": 32, "chain_steps": 4, "network": SMALL}),
    "plain": ("sample", "student", {"method": "output-distillation", "trajectories": 32, "teacher_steps": 4}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", METHODS)
def test_a_teacher_of_diffusers_is_distilled_exported_and_served(kind: str, tmp_path: Path) -> None:
    """By a recipe that names its folder; the engine's samples of teacher or student are those of the loop in torch.

    Both are networks of the same kind, but for DKDM's student, which is one of ours: one of the two is exported.
    """
    prediction, name, student = METHODS[kind]
    recipe = recipe_of(pipeline(tmp_path / "pipeline", kind, prediction), **student)
    run = tmp_path / "run"
    train(recipe, run, until="student", quiet=True)
    checkpoint = load_checkpoint(run / f"{name}.safetensors")
    bundle, _ = export_checkpoint(run / f"{name}.safetensors", tmp_path / name)
    assert (bundle.manifest.labels is None) == (kind == "plain")
    is_guided = bundle.manifest.guidance.mode == "embedded"
    assert is_guided == (name == "teacher")
    steps = 3 if name == "teacher" else 2
    table = SOLVERS["ddim"](karras(steps, 0.05, 14.0) if name == "teacher" else ve_levels(checkpoint.sigmas))
    label = None if kind == "plain" else 3
    request = Request(5, bundle.tableau("ddim", steps), label, 1.0 if is_guided else None)
    (sample,) = Engine(bundle, threads=1).generate([request])
    noise = torch.from_numpy(normals(np.array([5], np.uint64), np.array([0]), 64)).reshape(1, 1, 8, 8)
    denoiser = denoiser_of(checkpoint.network, checkpoint.network.config, checkpoint.sigma_data, 10)
    *_, end = follow(denoiser, table, table.initial_scale * noise, torch.tensor([3]), generator(0))
    assert np.abs(sample.pixels - end[0].numpy()).max() < 2e-2  # weights are stored in float16


@pytest.mark.filterwarnings("ignore")
def test_what_a_network_of_diffusers_cannot_do_is_refused_before_the_run(tmp_path: Path) -> None:
    network = pipeline(tmp_path / "a", "UNet2DModel")
    told = pipeline(tmp_path / "b", "UNet2DConditionModel")
    plain = pipeline(tmp_path / "c", "plain")
    for table, student, message in (
        (network, {"sigma_max": 40.0}, r"^\[student\] sigma_max = 40; the network's noisiest level is 36\.9"),
        (network, {"sigma_floor": 1e-3}, r"^\[student\] sigma_floor = 0\.001; the network's cleanest level is 0\.01"),
        (network, {"method": "guided", "start_steps": 2}, r"^\[student\] method = 'guided' adds an input"),
        (plain, {"guidance": 1.0}, r"^\[student\] guidance = 1, but the network takes no class; give 0"),
        ({**told, "conditions": None}, {}, r"^\[network\] .*unet: is told embeddings; give one for each class"),
        ({**network, "conditions": told["conditions"]}, {}, r"^\[network\] .*unet: takes none$"),
        ({**network, "folder": str(tmp_path / "none")}, {}, r"^\[network\] .*scheduler_config.json: cannot be read"),
    ):
        with pytest.raises(RecipeError, match=message):
            train(recipe_of(table, **student), tmp_path / "run", quiet=True)
    with pytest.raises(RecipeError, match=r"^\[network\] kind = 'diffusers' and folder go together$"):
        recipe_of({"kind": "diffusers"})
