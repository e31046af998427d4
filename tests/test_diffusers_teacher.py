"""Networks of diffusers as teachers: the same prediction as their own scheduler makes of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

diffusers: Any = pytest.importorskip("diffusers")

from fewstep.training.diffusers_teacher import DiffusersError, load_diffusers  # noqa: E402


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
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(DiffusersError, match=r"is a AutoencoderKL, not one of UNet2DModel"):
        load_diffusers(tmp_path)
